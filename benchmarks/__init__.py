"""Benchmarks. Each script runs as `python3 -m benchmarks.<folder>.<name>`."""
