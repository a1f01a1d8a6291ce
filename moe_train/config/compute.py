"""Number formats, kernels, and the mesh of devices."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, model_validator

from moe_train.config.section import (
    Dtype,
    Section,
    _integral,
)


class Compute(Section):
    """Number formats, rematerialisation and kernels; `auto` takes the fast path of the platform.

    remat says what a layer keeps for its backward pass: `minimal` recomputes only what is cheap (norms, rotary
    positions, activations, gathered weights) and keeps the outputs of matrix products; `full` keeps the layer's
    input alone. transport is how tokens meet their experts along the mesh axis `expert`: every device sees all tokens
    (all_gather), or they are sent to where they go (all_to_all and, not on CPUs, ragged_all_to_all, which recompute
    experts whatever remat says).
    """

    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    remat: Literal["minimal", "full"] = "minimal"
    attention: Literal["auto", "reference", "blocked", "splash", "cudnn"] = "auto"
    transport: Literal["auto", "all_gather", "all_to_all", "ragged_all_to_all"] = "auto"
    grouped_matmul: Literal["auto", "reference", "blocked", "megablox", "ragged_dot"] = "auto"


AxisSize = Annotated[int, BeforeValidator(_integral)]


class Mesh(Section):
    """Devices along each axis; one axis may be -1: the devices that the others leave.

    data splits the batch between replicas of the model; fsdp and expert split it too, and the weights; context splits
    sequences, for long ones; tensor splits heads, ffn_dim and the vocabulary.
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
                raise ValueError(f"mesh.{axis} is {size}; use a positive number, or -1 for the rest of the devices")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError("only one mesh axis can be -1 (the rest of the devices)")
        return self
