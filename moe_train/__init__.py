"""Train, adapt and ship sparse Mixture-of-Experts transformers of the Mistral family in JAX."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("moe-train")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"
