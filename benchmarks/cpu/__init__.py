"""Measurements on a CPU: speed, and the value of each piece of the recipe."""
