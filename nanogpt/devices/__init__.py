"""Devices, sharding and compilation; skip when reading for the algorithm."""
