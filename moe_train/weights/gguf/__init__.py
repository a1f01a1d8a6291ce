"""GGUF: whole models and adapters as llama.cpp loads them."""

from moe_train.weights.gguf.files import (
    MODEL_FILE,
    QUANTIZE_TOOL,
    ReadPiece,
    file_in,
    is_mmproj,
    open_weights,
    quantize_tool,
    read_model_config,
    unpack_tokenizer,
    write,
)

__all__ = [
    "MODEL_FILE",
    "QUANTIZE_TOOL",
    "ReadPiece",
    "file_in",
    "is_mmproj",
    "open_weights",
    "quantize_tool",
    "read_model_config",
    "unpack_tokenizer",
    "write",
]
