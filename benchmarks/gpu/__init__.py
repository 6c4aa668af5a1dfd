"""Measurements of the training step on one GPU."""
