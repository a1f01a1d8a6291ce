"""The sparse Mixture-of-Experts layer."""
