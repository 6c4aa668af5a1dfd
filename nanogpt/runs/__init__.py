"""What a run prints, records and leaves in its folder; skip it when reading for the algorithm."""
