"""Muon's orthogonalized momentum (https://kellerjordan.github.io/posts/muon) for sharded matrices."""

from __future__ import annotations

import math

import jax
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from moe_train.machine.mesh import axis_size
from moe_train.model.paths import ParameterPath
from moe_train.model.sharding.fsdp import mesh_axes
from moe_train.model.sharding.specs import spec_of

_MATRICES = {
    # {module: (input dims, output dims) of its weight, its lora_a and its lora_b, counted from the last dim}
    "q_proj": (((-3,), (-2, -1)), ((-2,), (-1,)), ((-3,), (-2, -1))),
    "k_proj": (((-3,), (-2, -1)), ((-2,), (-1,)), ((-3,), (-2, -1))),
    "v_proj": (((-3,), (-2, -1)), ((-2,), (-1,)), ((-3,), (-2, -1))),
    "o_proj": (((-3, -2), (-1,)), ((-3, -2), (-1,)), ((-2,), (-1,))),
    # Latent attention: from the hidden state to a latent, and from a latent to heads.
    "q_a_proj": (((-2,), (-1,)),) * 3,
    "q_b_proj": (((-3,), (-2, -1)), ((-2,), (-1,)), ((-3,), (-2, -1))),
    "kv_a_proj": (((-2,), (-1,)),) * 3,
    "kv_b_proj": (((-3,), (-2, -1)), ((-2,), (-1,)), ((-3,), (-2, -1))),
    "gate_proj": (((-2,), (-1,)),) * 3,
    "up_proj": (((-2,), (-1,)),) * 3,
    "down_proj": (((-2,), (-1,)),) * 3,
    # Towers: the projector, and convolutions, whose rows are the pixels of a patch or the frames of a window.
    "in_proj": (((-2,), (-1,)),) * 3,
    "out_proj": (((-2,), (-1,)),) * 3,
    "merge_proj": (((-2,), (-1,)),) * 3,
    "patch_proj": (((-2,), (-1,)),) * 3,
    "first_conv": (((-2,), (-1,)),) * 3,
    "second_conv": (((-2,), (-1,)),) * 3,
}
_LEAVES = ("weight", "lora_a", "lora_b")


def matrix_dims(path: str) -> optax.contrib.MuonDimensionNumbers | None:
    """Return which dims of a weight are the rows and columns of a matrix; the other dims count matrices (layers, experts).

    None for arrays that Muon does not treat as matrices: embeddings, head, router, norms and biases.
    """
    parsed = ParameterPath.parse(path)
    dims = _MATRICES.get(parsed.module_name)
    if dims is None or parsed.leaf not in _LEAVES:
        return None
    return optax.contrib.MuonDimensionNumbers(*dims[_LEAVES.index(parsed.leaf)])


def orthogonalize(
    updates: dict[str, Float[Array, "..."] | optax.MaskedNode], ns_steps: int
) -> dict[str, Float[Array, "..."] | optax.MaskedNode]:
    """Replace each matrix U S V^T by about U V^T, times sqrt(max(1, outputs / inputs)), by Newton-Schulz iterations.

    See https://kellerjordan.github.io/posts/muon. Optax's iteration does not support explicit sharding, so it runs in a local
    view: the layers are distributed over the devices that share a layer's matrices, each matrix is gathered on one of them, and
    the result is sent back.

    Args:
        updates: momentum of each matrix by path; `optax.MaskedNode` entries are returned unchanged.
        ns_steps: number of iterations.
    """
    orthogonal = {}
    for path, x in updates.items():
        if isinstance(x, optax.MaskedNode):
            orthogonal[path] = x
        else:
            orthogonal[path] = _orthogonalize_matrices(path, x, ns_steps)
    return orthogonal


def _orthogonalize_matrices(path: str, x: Float[Array, "*dims"], ns_steps: int) -> Float[Array, "*dims"]:
    dims = matrix_dims(path)
    assert dims is not None
    inputs, outputs = (math.prod(x.shape[dim] for dim in axes) for axes in dims)
    matrix = {dim % x.ndim for dim in (*dims.reduction_axis, *dims.output_axis)}
    specs = _specs_to_unsplit_matrices(x.shape, spec_of(x), matrix)
    # With a momentum of 0, Optax's Muon is the iteration only.
    iteration = optax.contrib.scale_by_muon(ns_steps=ns_steps, beta=0.0, nesterov=False, weight_dimension_numbers=dims)

    def local(x: Float[Array, "..."]) -> Float[Array, "..."]:
        return iteration.update(x, iteration.init(x))[0]

    for spec in specs[1:]:
        x = jax.sharding.reshard(x, spec)
    # Every device now holds complete matrices of some layers, so the iteration needs no collective.
    y = jax.shard_map(local, in_specs=specs[-1], out_specs=specs[-1])(x)
    for spec in reversed(specs[:-1]):
        y = jax.sharding.reshard(y, spec)
    return y * math.sqrt(max(1.0, outputs / inputs))


def _specs_to_unsplit_matrices(shape: tuple[int, ...], spec: P, matrix: set[int]) -> list[P]:
    """Return the specs on the way from a weight's own spec to one that does not split its matrix dims.

    The axes that split the matrix dims split the layers (dim 0) instead, as far as they divide their number. Each spec moves one
    axis, since each such step is an all-to-all. A matrix that is not stacked is gathered on every device.
    """
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    specs = [spec]
    layers: tuple[str, ...] = ()
    is_stacked = 0 not in matrix
    # Dim 0 then counts layers, which no weight's own spec splits.
    assert not is_stacked or entries[0] is None
    for dim in sorted(matrix):
        split = mesh_axes(entries[dim])
        for axis in reversed(split):  # innermost axis first, so that the rest is still a split by the outer axes
            split = split[:-1]
            entries[dim] = split or None
            if is_stacked and shape[0] % math.prod(axis_size(a) for a in (*layers, axis)) == 0:
                layers = (*layers, axis)
            specs.append(P(layers or None, *entries[1:]))
    return specs
