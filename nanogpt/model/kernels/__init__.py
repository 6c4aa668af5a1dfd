"""Kernels that exist for speed only; skip them when reading for the algorithm."""
