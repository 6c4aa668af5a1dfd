"""Curves of finished runs: `python3 -m nanogpt.report`; skip it when reading for the algorithm."""
