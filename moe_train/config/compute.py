"""Dtypes, kernels, and the device mesh."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, model_validator

from moe_train.config.section import (
    Dtype,
    Section,
    _integral,
)


class Compute(Section):
    """Dtypes, rematerialization and kernels; `auto` chooses the fast implementation for the platform."""

    dtype: Dtype = "float32"
    """Dtype of activations and matrix products. bfloat16 on accelerators, float32 on CPUs, where bfloat16 is slower."""
    param_dtype: Dtype = "float32"
    """Dtype in which weights are stored. Keep float32 for full training, or set bfloat16 and `optimizer.rounding`; bfloat16 for
    LoRA halves the memory of the frozen weights.
    """
    remat: Literal["minimal", "full"] = "minimal"
    """What a layer keeps for its backward pass. `minimal` keeps the outputs of matrix products and recomputes only what is cheap
    (norms, rotary positions, activations, gathered weights); `full` keeps only the layer's input, for less memory and about a third
    more compute.
    """
    attention: Literal["auto", "reference", "blocked", "splash", "cudnn"] = "auto"
    """Kernel of attention; `auto` chooses the fast one of the platform. `reference` is the plain formula, to rule a kernel out."""
    transport: Literal["auto", "all_gather", "all_to_all", "ragged_all_to_all"] = "auto"
    """How tokens reach their experts along the mesh axis `expert`: with all_gather every device receives all tokens; with
    all_to_all and ragged_all_to_all (not on CPUs) tokens are sent to the devices of their experts, and these two recompute the
    experts whatever remat is. `auto` chooses the one that moves the fewest bytes.
    """
    grouped_matmul: Literal["auto", "reference", "blocked", "megablox", "ragged_dot"] = "auto"
    """Kernel of the products of experts; `auto` chooses the fast one of the platform. `reference` is the plain formula, to rule a
    kernel out.
    """


AxisSize = Annotated[int, BeforeValidator(_integral)]
"""Number of devices along a mesh axis; -1 for the devices that the other axes leave."""


class Mesh(Section):
    """Number of devices along each mesh axis. One axis may be -1: it takes the devices that the other axes leave."""

    data: AxisSize = 1
    """Replicas of the model, between which the batch is split; gradients are all-reduced once per step."""
    fsdp: AxisSize = 1
    """Devices that split the batch and also the weights, which are gathered just before use. Raise it if weights and optimizer do
    not fit.
    """
    expert: AxisSize = 1
    """Devices that split the batch and also the experts; a divisor of `num_experts`."""
    context: AxisSize = 1
    """Devices that split each sequence, for long ones."""
    tensor: AxisSize = 1
    """Devices that split attention heads, ffn_dim and the vocabulary; for fast links only."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = {k: getattr(self, k) for k in type(self).model_fields}
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"mesh.{axis} is {size}; use a positive number, or -1 for all remaining devices")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError("only one mesh axis can be -1 (all remaining devices); state the sizes of the others")
        return self
