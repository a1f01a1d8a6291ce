"""Model evaluation: generation, held-out loss, and routing drift."""
