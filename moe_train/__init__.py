"""Train, adapt and ship sparse Mixture-of-Experts transformers of the Mistral family in JAX."""

__version__ = "0.1.0"
