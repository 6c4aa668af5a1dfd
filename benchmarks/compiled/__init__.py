"""Analysis of the training step, compiled for devices that are not present."""
