"""PEFT's adapters, read and written."""

from moe_train.weights.peft.pieces import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from moe_train.weights.peft.read import load_adapter, read_lora
from moe_train.weights.peft.settings import read_settings
from moe_train.weights.peft.write import export_adapter

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "export_adapter", "load_adapter", "read_lora", "read_settings"]
