"""A run from plan to checkpoint. Read step.py; the other files make runs dependable."""
