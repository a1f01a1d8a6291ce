"""The weights of routed experts: stacked in one array for each matrix, or as separate arrays for each expert."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_train.model.quantize import Quantized


class InStack(NamedTuple):
    """The weight (E, inputs, outputs) of one layer, read where it is: in the stacked weights of all layers.

    A scan slices the stack, and for a layer with experts that copies most of the model in each pass. Here an expert's matrix is
    sliced by itself, just before its products.
    """

    stack: Float[Array, "L E I O"]
    """Weights of all layers; without a gradient."""
    layer: Int[Array, ""]
    """Index of the layer in the stack."""
    own: Float[Array, "E I O"]
    """The slice of the layer, which stands for its gradient; nothing reads its value, so XLA leaves the slice out."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight."""
        return self.own.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weight."""
        return self.own.dtype

    def of_expert(self, expert: Int[Array, ""]) -> Float[Array, "I O"]:
        """Return the matrix of an expert."""
        return self.stack[self.layer, expert]


class ExpertMatrix(NamedTuple):
    """One linear map of every expert: the weight (E, inputs, outputs) and the LoRA factors, None without an adapter."""

    weight: Float[Array, "E I O"] | Quantized | InStack
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
