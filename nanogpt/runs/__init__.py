"""A run's console, records and folder; skip it when reading for the algorithm."""
