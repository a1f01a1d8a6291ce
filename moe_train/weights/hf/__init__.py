"""Hugging Face's layout: models opened and written as transformers, vLLM and llama.cpp load them."""

from moe_train.weights.hf.config_json import read_model_config, write_model_config
from moe_train.weights.hf.config_keys import CONFIG_FILE, find_wrapper, is_wrapper
from moe_train.weights.hf.files import open_tensors, open_weights, write, write_json

__all__ = [
    "CONFIG_FILE",
    "find_wrapper",
    "is_wrapper",
    "open_tensors",
    "open_weights",
    "read_model_config",
    "write",
    "write_json",
    "write_model_config",
]
