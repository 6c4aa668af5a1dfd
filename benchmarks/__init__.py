"""What is measured here and how: each script runs as `python3 -m benchmarks.<folder>.<name>`."""
