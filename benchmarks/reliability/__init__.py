"""Whether a run survives what may happen to it."""
