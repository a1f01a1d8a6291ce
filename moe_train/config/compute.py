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
    """Dtypes, rematerialization and kernels; `auto` chooses the fast implementation for the platform.

    remat selects what a layer keeps for its backward pass. `minimal` keeps the outputs of matrix products and recomputes only
    what is cheap (norms, rotary positions, activations, gathered weights); `full` keeps only the layer's input. transport selects
    how tokens reach their experts along the mesh axis `expert`: with all_gather every device receives all tokens; with all_to_all
    and ragged_all_to_all (not on CPUs) tokens are sent to the devices of their experts, and these two recompute the experts
    whatever remat is.
    """

    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    remat: Literal["minimal", "full"] = "minimal"
    attention: Literal["auto", "reference", "blocked", "splash", "cudnn"] = "auto"
    transport: Literal["auto", "all_gather", "all_to_all", "ragged_all_to_all"] = "auto"
    grouped_matmul: Literal["auto", "reference", "blocked", "megablox", "ragged_dot"] = "auto"


AxisSize = Annotated[int, BeforeValidator(_integral)]
"""Number of devices along a mesh axis; -1 for the devices that the other axes leave."""


class Mesh(Section):
    """Number of devices along each mesh axis. One axis may be -1: it takes the devices that the other axes leave.

    data splits the batch between replicas of the model; fsdp and expert split the batch and also the weights; context splits
    the sequence, for long ones; tensor splits attention heads, ffn_dim and the vocabulary.
    """

    data: AxisSize = 1
    fsdp: AxisSize = 1
    expert: AxisSize = 1
    context: AxisSize = 1
    tensor: AxisSize = 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = {k: getattr(self, k) for k in type(self).model_fields}
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"mesh.{axis} is {size}; use a positive number, or -1 for all remaining devices")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError("only one mesh axis can be -1 (all remaining devices); state the sizes of the others")
        return self
