"""GGUF: whole models and adapters as llama.cpp loads them."""

from moe_train.weights.gguf.files import (
    FILE,
    QUANTIZE,
    Matrix,
    file_in,
    open_weights,
    quantize_tool,
    read_model,
    unpack_tokenizer,
    write,
)

__all__ = ["FILE", "QUANTIZE", "Matrix", "file_in", "open_weights", "quantize_tool", "read_model", "unpack_tokenizer", "write"]
