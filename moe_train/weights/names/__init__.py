"""Names of a model's tensors in external files, our paths, and the transform between them: one two-way table per layout.

In files, linear weights are (out, in). Ours are einsum operands, (in dims…, out dims…), stacked over repeats of the period (and
over experts).
"""

from moe_train.weights.names.adapters import linear_rows, lora_pieces
from moe_train.weights.names.check_tensors import check_counts, check_file_tensors
from moe_train.weights.names.gguf import GGUF
from moe_train.weights.names.hugging_face import (
    HUGGING_FACE,
    OUTSIDE_TEXT,
    RECOMPUTED,
    WRAPPED,
    detect_adapted,
    detect_hugging_face,
    hugging_face,
    hugging_face_of,
    wrapped_in_files,
)
from moe_train.weights.names.mistral import MISTRAL, MISTRAL_AUDIO_EMBED, mistral_of
from moe_train.weights.names.pieces import WeightPiece, weight_pieces
from moe_train.weights.names.tensor_layout import Row, TensorLayout

__all__ = [
    "GGUF",
    "HUGGING_FACE",
    "MISTRAL",
    "MISTRAL_AUDIO_EMBED",
    "OUTSIDE_TEXT",
    "RECOMPUTED",
    "WRAPPED",
    "Row",
    "TensorLayout",
    "WeightPiece",
    "check_counts",
    "check_file_tensors",
    "detect_adapted",
    "detect_hugging_face",
    "hugging_face",
    "hugging_face_of",
    "linear_rows",
    "lora_pieces",
    "mistral_of",
    "weight_pieces",
    "wrapped_in_files",
]
