"""Devices: which there are, what each holds, compiling; skip when reading for the algorithm."""
