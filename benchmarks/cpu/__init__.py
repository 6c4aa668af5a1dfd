"""Measurements on a CPU: speed, and what each piece of the recipe is worth."""
