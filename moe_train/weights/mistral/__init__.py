"""Mistral's own layout: consolidated safetensors and params.json."""

from moe_train.weights.mistral.files import open_weights, tokenizer_file_name, write
from moe_train.weights.mistral.params_json import PARAMS_FILE, read_model_config, write_model_config

__all__ = ["PARAMS_FILE", "open_weights", "read_model_config", "tokenizer_file_name", "write", "write_model_config"]
