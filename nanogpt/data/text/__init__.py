"""Your own text, encoded into shards; skip it when reading for the algorithm."""
