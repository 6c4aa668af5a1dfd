"""Using a trained model: sampling, export, scores; skip when reading for the algorithm."""
