"""How the weights of an export are quantized to FP8: which ones, with which scales, and what the config states of it.

Embeddings, norms, routers and the head stay bfloat16. Nothing is calibrated: servers quantize activations as they come
(`activation_scheme: dynamic`, `qscheme_act: NO_SCALES`).

- Text models in Hugging Face's layout have blocks of 128 x 128, which transformers and vLLM's classes of text models read
  (vllm/model_executor/layers/quantization/fp8.py). A matrix that blocks do not divide stays bfloat16, as in the release of Mistral
  Large 3, since transformers dequantizes whole blocks alone; and so do those that vLLM joins with it in one matrix.
- Inside a vision wrapper there is one scale per tensor, as in Mistral's releases and in vLLM's class of Mistral 3 (mistral3.py).
- Mistral's own layout has one scale per tensor.
- Experts that share a tensor have scales of their own: one per expert, or a grid of blocks. transformers keeps one scale for gate
  and one for up (`FP8Experts`); without blocks the two are the same number, since a kernel may read the first alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import NamedTuple

from moe_train.machine.files import JsonObject
from moe_train.model.paths import ParameterPath
from moe_train.weights.fp8.sections import DEFAULT_BLOCK
from moe_train.weights.names import WeightPiece

_FUSED_BY_VLLM = (
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ("attention.q_a_proj", "attention.kv_a_proj"),
    ("ffn.gate_proj", "ffn.up_proj"),
    ("ffn.shared.gate_proj", "ffn.shared.up_proj"),
)
"""Modules that vLLM joins in one matrix, which is quantized as a whole or not at all; and so are the experts of a layer."""


class Fp8Scheme(NamedTuple):
    """How FP8 weights are written."""

    block: tuple[int, int] | None
    """Outputs and inputs that share a scale; None for one scale per tensor."""
    scale_suffix: str
    """What takes the place of `weight` at the end of the names of scales."""
    unquantized: frozenset[str] = frozenset()
    """Names of the tensors of linear maps that stay bfloat16."""

    def quantizes(self, piece: WeightPiece) -> bool:
        """Return whether a weight is quantized."""
        return is_linear_of_layer(piece) and piece.name not in self.unquantized

    def scale_name(self, name: str) -> str:
        """Return the name of the scales of a tensor; fused experts have no `.weight` in their names."""
        if name.endswith(".weight"):
            return name.removesuffix("weight") + self.scale_suffix
        return name + self.scale_suffix.removeprefix("weight")

    def scale_shape(self, piece: WeightPiece) -> tuple[int, ...]:
        """Return the shape of the scales of the tensor that a piece belongs to."""
        outputs, inputs = piece.shape[-2:]
        experts = piece.shape[:-2]
        if self.block is not None:
            return (*experts, math.ceil(outputs / self.block[0]), math.ceil(inputs / self.block[1]))
        return (*experts, outputs // piece.part_shape[0], 1) if experts else ()


MISTRAL_SCHEME = Fp8Scheme(None, "qscale_weight")
"""The scheme of Mistral's own layout."""
MISTRAL_SECTION: JsonObject = {"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}
"""The section `quantization` of params.json for that scheme."""


def is_linear_of_layer(piece: WeightPiece) -> bool:
    """Return whether a weight is a linear map of a layer and no router, so that FP8 files may have it quantized."""
    path = ParameterPath.parse(piece.path)
    return path.in_layer and path.leaf == "weight" and not path.is_router and len(piece.groups) == 2


def hugging_face_scheme(pieces: Collection[WeightPiece]) -> Fp8Scheme:
    """Return the scheme of Hugging Face's layout: blocks, or one scale per tensor in a wrapper or if blocks divide too little."""
    per_tensor = Fp8Scheme(None, "weight_scale_inv")
    if is_in_wrapper(pieces):
        return per_tensor
    linear = [piece for piece in pieces if is_linear_of_layer(piece)]
    undivided = {_fused_module(piece) for piece in linear if not _is_divided(piece)}
    unquantized = [piece for piece in linear if _fused_module(piece) in undivided]
    if 2 * _num_values(unquantized) > _num_values(linear):
        return per_tensor
    return Fp8Scheme(DEFAULT_BLOCK, "weight_scale_inv", frozenset(piece.name for piece in unquantized))


def is_in_wrapper(pieces: Collection[WeightPiece]) -> bool:
    """Return whether the names are those of a text model inside a vision wrapper."""
    return any("language_model." in piece.name for piece in pieces)


def _fused_module(piece: WeightPiece) -> tuple[int | None, str]:
    """Return the stack and a name for the modules that are quantized together with a piece's."""
    path = ParameterPath.parse(piece.path)
    if len(piece.lead) == 2:
        return path.stack, "experts"
    group = next((modules for modules in _FUSED_BY_VLLM if path.module in modules), (path.module,))
    return path.stack, group[0]


def _is_divided(piece: WeightPiece) -> bool:
    """Return whether blocks divide a matrix."""
    outputs, inputs = piece.part_shape
    if piece.part and (outputs, inputs) == DEFAULT_BLOCK:
        return False  # a block for gate and one for up would be taken for the two scales of an expert
    return outputs % DEFAULT_BLOCK[0] == 0 and inputs % DEFAULT_BLOCK[1] == 0


def _num_values(pieces: Iterable[WeightPiece]) -> int:
    return sum(math.prod(piece.part_shape) for piece in pieces)


def hugging_face_section(pieces: Collection[WeightPiece], scheme: Fp8Scheme) -> JsonObject:
    """Return the section `quantization_config` of config.json, as transformers and vLLM read it."""
    unquantized = [piece.name for piece in pieces if ParameterPath.parse(piece.path).kind == "router"]
    unquantized += [piece.name for piece in pieces if piece.name in scheme.unquantized]
    modules = list(dict.fromkeys(_module(name) for name in unquantized))
    if is_in_wrapper(pieces):
        modules += ["model.vision_tower", "model.multi_modal_projector"]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": None if scheme.block is None else list(scheme.block),
        "modules_to_not_convert": ["lm_head", *modules],
    }


def _module(name: str) -> str:
    """Return the module of a tensor; the experts of a layer are one module in transformers and in vLLM."""
    module, experts, _ = name.partition(".experts.")
    return f"{module}.experts" if experts else name.removesuffix(".weight")
