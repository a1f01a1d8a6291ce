"""PEFT's adapters, read and written."""

from moe_train.weights.peft.pieces import CONFIG, WEIGHTS
from moe_train.weights.peft.read import load_adapter, read_lora
from moe_train.weights.peft.write import export_adapter

__all__ = ["CONFIG", "WEIGHTS", "export_adapter", "load_adapter", "read_lora"]
