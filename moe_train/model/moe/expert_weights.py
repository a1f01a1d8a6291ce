"""The weights of routed experts: stacked in one array for each matrix, or as separate arrays for each expert."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float

from moe_train.model.quantize import Quantized


class ExpertMatrix(NamedTuple):
    """One linear map of every expert: the weight (E, inputs, outputs) and the LoRA factors, None without an adapter."""

    weight: Float[Array, "E I O"] | Quantized
    lora_a: Float[Array, "E I J"] | None
    lora_b: Float[Array, "E J O"] | None
    """LoRA factor B, already multiplied by the adapter's scale."""


class ExpertWeights(NamedTuple):
    """The three matrices of SwiGLU experts."""

    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.gate.weight.shape[0]


class SeparateExperts(NamedTuple):
    """Experts whose matrices are arrays of their own, (inputs, outputs), so that none is copied out of a stack."""

    experts: tuple[ExpertWeights, ...]
    """The experts in order; their matrices have no dim E."""

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return len(self.experts)
