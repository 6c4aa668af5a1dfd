"""Encoding your own text into shards; skip it when reading for the algorithm."""
