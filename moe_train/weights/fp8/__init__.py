"""FP8 weights in files: what a config states of them, scales next to quantized values, dequantization, quantization for writing."""

from moe_train.weights.fp8 import scheme
from moe_train.weights.fp8.pair import dequantize_tensors
from moe_train.weights.fp8.sections import section_of_folder
from moe_train.weights.fp8.write import dtype_before_writing, tensors_of_dtype

__all__ = ["dequantize_tensors", "dtype_before_writing", "scheme", "section_of_folder", "tensors_of_dtype"]
