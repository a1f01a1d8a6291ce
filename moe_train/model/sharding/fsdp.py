"""Products with weights that are sharded over `fsdp`: gathered just before use, with gradients scattered back.

A plain reshard of the weight would make its gradient an all-reduce of the whole weight. Here the gradient is computed with
the weight's own spec, which lowers to a reduce-scatter.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from moe_train.machine.mesh import axis_size, batch_axes, global_axes
from moe_train.model.outer_products import sum_of_outer_products
from moe_train.model.quantize import Quantized, dequantize
from moe_train.model.sharding.collectives import gather_axis, reduce_scatter_axis
from moe_train.model.sharding.local_view import in_local_view, index_along, sum_along, vary
from moe_train.model.sharding.specs import ACTIVATION, TENSOR_AND_EXPERT, activation_spec, gathered_spec, place, spec_of

SpecEntry = str | tuple[str, ...] | None
"""Entry of a partition spec: the mesh axis or axes that split a dim; None if none does."""


def project(equation: str, x: Float[Array, "..."], w: Float[Array, "..."] | Quantized, saved: bool = True) -> Float[Array, "..."]:
    """Compute `einsum(equation, x, w)` for an activation and a weight sharded over `fsdp`.

    Args:
        equation: two operands, e.g. `"BTD,DNH->BTNH"`; the letters determine the result's sharding (`ACTIVATION`).
        x: activation.
        w: weight. A quantized weight is gathered in its quantized form, and has no gradient.
        saved: whether remat `minimal` keeps the product for the backward pass (`stack.SAVED`).

    Returns:
        The product, in the dtype of x.
    """
    x = place(x, equation.split(",")[0])
    if isinstance(w, Quantized):
        return _named(_project_quantized(equation, x, w), saved)
    # Cast before the gather, so that it moves numbers of the compute dtype.
    return _named(_project(equation, x, w.astype(x.dtype)), saved)


def _named(y: Float[Array, "*dims"], saved: bool) -> Float[Array, "*dims"]:
    """Give y the name by which remat `minimal` keeps it for the backward pass, or none."""
    return checkpoint_name(y, "projection") if saved else y


_Operands = tuple[Float[Array, "..."], Float[Array, "..."]]
"""Activation and weight of a product, or their gradients."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(equation: str, x: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.einsum(equation, x, _gather(w), out_sharding=activation_spec(equation.split("->")[1]))


def _gather(w: Shaped[Array, "*dims"]) -> Shaped[Array, "*dims"]:
    """Gather a weight axis by axis: over both axes at once, XLA:TPU would use an all-reduce."""
    spec = spec_of(w)

    def local(w: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        for split_by, axis in ((TENSOR_AND_EXPERT, "expert"), ("fsdp", "fsdp")):
            for dim, entry in enumerate(spec):
                if entry == split_by:
                    w = gather_axis(w, axis, dim)
        return w

    # The result is equal along the axes that it was gathered over, which the check cannot see.
    return jax.shard_map(local, in_specs=spec, out_specs=gathered_spec(spec), check_vma=False)(w)


def _project_forward(equation: str, x: Float[Array, "..."], w: Float[Array, "..."]) -> tuple[Float[Array, "..."], _Operands]:
    return _project(equation, x, w), (x, w)


def _project_backward(equation: str, saved: _Operands, dy: Float[Array, "..."]) -> _Operands:
    x, w = saved
    operands, y_letters = equation.split("->")
    x_letters, w_letters = operands.split(",")
    # Gathered a second time: only this device's part was saved in the forward pass.
    dx = jnp.einsum(f"{y_letters},{w_letters}->{x_letters}", dy, _gather(w), out_sharding=activation_spec(x_letters))
    return dx, _weight_gradient(f"{x_letters},{y_letters}->{w_letters}", x, dy, spec_of(w))


def _weight_gradient(equation: str, x: Float[Array, "..."], dy: Float[Array, "..."], spec: P) -> Float[Array, "..."]:
    """Compute this device's part of the weight gradient, summed over all tokens.

    The scatter is explicit: XLA by itself would all-reduce a weight that two axes split, in full, over one of them.

    Args:
        equation: einsum of the activation and the gradient of the product that gives the gradient of the weight.
        x: activation.
        dy: gradient of the product.
        spec: partition spec of the weight.
    """
    operands, w_letters = equation.split("->")
    x_letters, y_letters = operands.split(",")
    token_axes = (*batch_axes(), "context")

    def local(x: Float[Array, "..."], dy: Float[Array, "..."]) -> Float[Array, "..."]:
        dw = _einsum_over_tokens(equation, x, dy)
        # Axes that split the weight are scattered over; along the others devices share the weight, and the gradient is summed.
        to_sum = list(token_axes)
        for dim, entry in enumerate(spec):
            for axis in mesh_axes(entry):
                if axis in to_sum and axis_size(axis) > 1:
                    dw = reduce_scatter_axis(dw, axis, dim)
                    to_sum.remove(axis)
        return sum_along(dw, tuple(to_sum))

    entries = (*spec, *(None,) * (len(w_letters) - len(spec)))
    local_spec = P(*(_with_tensor(letter, entry) for letter, entry in zip(w_letters, entries, strict=True)))
    dw = in_local_view(local, (activation_spec(x_letters), activation_spec(y_letters)), local_spec)(x, dy)
    # Gathers over `tensor` where only the activation was split by it (`_with_tensor`).
    return jax.sharding.reshard(dw, spec)


def _einsum_over_tokens(equation: str, x: Float[Array, "..."], dy: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute `einsum(equation, x, dy)`, which sums over the tokens of both. Local view.

    With tokens as one dim, since XLA:CPU transposes x in memory before a product that sums over several dims.
    """
    operands, w_letters = equation.split("->")
    x_letters, y_letters = operands.split(",")
    tokens = [letter for letter in x_letters if letter not in w_letters]
    count = len(tokens)
    inputs, outputs = x_letters[count:], y_letters[count:]
    if x_letters[:count] != y_letters[:count] or w_letters not in (inputs + outputs, outputs + inputs):
        return jnp.einsum(equation, x, dy)
    rows = math.prod(x.shape[:count])
    first, last = (x, dy) if w_letters == inputs + outputs else (dy, x)
    dw = sum_of_outer_products(first.reshape(rows, -1), last.reshape(rows, -1))
    return dw.reshape(*first.shape[count:], *last.shape[count:])


def _with_tensor(letter: str, entry: SpecEntry) -> SpecEntry:
    """Return the entry of a weight gradient's spec as `shard_map` computes it, for the weight dim with this letter.

    The gradient is split over `tensor` where the activation is, even if the weight itself is not.
    """
    return "tensor" if entry is None and ACTIVATION.get(letter) == "tensor" else entry


def mesh_axes(entry: SpecEntry) -> tuple[str, ...]:
    """Return the mesh axes that an entry of a partition spec names."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


_project.defvjp(_project_forward, _project_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project_quantized(equation: str, x: Float[Array, "..."], w: Quantized) -> Float[Array, "..."]:
    return jnp.einsum(equation, x, _gather_quantized(w, x.dtype), out_sharding=activation_spec(equation.split("->")[1]))


def _gather_quantized(w: Quantized, dtype: jnp.dtype) -> Float[Array, "..."]:
    gathered = Quantized(_gather(w.codes), _gather(w.scales))
    spec = spec_of(gathered.codes)
    return jax.shard_map(lambda w: dequantize(w, dtype), in_specs=spec, out_specs=spec)(gathered)


def _project_quantized_forward(equation: str, x: Float[Array, "..."], w: Quantized) -> tuple[Float[Array, "..."], Quantized]:
    return _project_quantized(equation, x, w), w


def _project_quantized_backward(equation: str, w: Quantized, dy: Float[Array, "..."]) -> tuple[Float[Array, "..."], None]:
    operands, y_letters = equation.split("->")
    x_letters, w_letters = operands.split(",")
    gathered = _gather_quantized(w, dy.dtype)
    dx = jnp.einsum(f"{y_letters},{w_letters}->{x_letters}", dy, gathered, out_sharding=activation_spec(x_letters))
    return dx, None


_project_quantized.defvjp(_project_quantized_forward, _project_quantized_backward)


def lookup(table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
    """Look up rows of an embedding table that is split over `tensor` (V) and, depending on its spec, `fsdp` (D).

    Args:
        table_VD: the table.
        tokens_BT: token ids.
        dtype: dtype of the result.
    """
    spec = spec_of(table_VD)
    axes = global_axes()

    def local(table_vd: Float[Array, "v d"], tokens_bt: Int[Array, "b t"]) -> Float[Array, "b t D"]:
        table_vD = gather_rows(table_vd.astype(dtype), spec, axes)
        # Each device looks up the tokens of its own rows and adds zeros for the others.
        row_bt = tokens_bt - index_along("tensor") * table_vD.shape[0]
        is_own_bt = (row_bt >= 0) & (row_bt < table_vD.shape[0])
        return sum_along(jnp.where(is_own_bt[..., None], table_vD[jnp.where(is_own_bt, row_bt, 0)], 0), "tensor")

    run = in_local_view(local, (spec, activation_spec("BT")), activation_spec("BTD"))
    return run(table_VD, tokens_BT)


def gather_rows(table_vd: Float[Array, "v d"], spec: P, axes: tuple[str, ...]) -> Float[Array, "r D"]:
    """Gather this device's rows over `tensor` with all columns. Call it inside `shard_map`.

    Args:
        table_vd: this device's part of a table (V, n).
        spec: partition spec of the table.
        axes: result of `global_axes()` outside the `shard_map`.
    """
    table_vd = vary_with_spec(table_vd, spec, axes)
    if "fsdp" in spec:
        table_vd = gather_axis(table_vd, "fsdp", 1)
    if TENSOR_AND_EXPERT in spec:
        table_vd = gather_axis(table_vd, "expert", 0)
    return table_vd


def vary_with_spec(w: Shaped[Array, "*dims"], spec: P, axes: tuple[str, ...]) -> Shaped[Array, "*dims"]:
    """Let a weight vary along the mesh axes that `spec` does not split it over. Call it inside `shard_map`, before the gather.

    The activations that the weight is multiplied with vary along these axes, so its gradient is then summed over them. Before
    the gather, that sum is of this device's part and not of the whole weight.

    Args:
        w: this device's part of a weight.
        spec: partition spec of the weight.
        axes: result of `global_axes()` outside the `shard_map`.
    """
    splits = set(itertools.chain.from_iterable(mesh_axes(entry) for entry in spec))
    return vary(w, tuple(axis for axis in axes if axis not in splits))
