"""What a model is worth: generation, held-out loss, drift of the routing."""
