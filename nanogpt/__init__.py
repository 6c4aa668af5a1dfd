"""JAX/Flax NanoGPT: the parts that `train_gpt.py` is made of."""
