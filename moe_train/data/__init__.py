"""The data pipeline, from records to batches: sources -> chat -> store -> packing -> loader. It uses numpy only, not jax."""
