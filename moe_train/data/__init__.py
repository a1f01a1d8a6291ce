"""From records to batches: sources -> chat -> store -> packing -> loader. This package uses numpy only, not jax."""
