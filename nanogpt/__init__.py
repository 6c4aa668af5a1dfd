"""JAX/Flax NanoGPT: the rooms that `train_gpt.py` is built from."""
