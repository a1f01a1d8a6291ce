"""Records to batches: sources -> chat -> store -> packing -> loader. Numpy only."""
