"""Whether a run survives being killed."""
