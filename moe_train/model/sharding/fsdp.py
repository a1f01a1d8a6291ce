"""Products with weights that are sharded over `fsdp`: gathered just before use, with gradients scattered back.

A plain reshard of the weight would make its gradient an all-reduce of the whole weight. Here the gradient is computed with
the weight's own spec, which lowers to a reduce-scatter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_train.machine.mesh import axis_size, batch_axes, global_axes
from moe_train.model.quantize import Quantized, dequantize
from moe_train.model.sharding.collectives import gather, scatter
from moe_train.model.sharding.specs import ACTIVATION, SPLIT, activation_spec, gathered, place, spec_of


def project(equation: str, x: Float[Array, "..."], w: Float[Array, "..."] | Quantized) -> Float[Array, "..."]:
    """Compute `einsum(equation, x, w)` for an activation and a weight sharded over `fsdp`.

    Args:
        equation: two operands, e.g. `"BTD,DNH->BTNH"`; the letters determine the result's sharding (`ACTIVATION`).
        x: activation.
        w: weight. A quantized weight is gathered in its quantized form, and has no gradient.

    Returns:
        The product, in the dtype of x.
    """
    x = place(x, equation.split(",")[0])
    y = _project_quantized(equation, x, w) if isinstance(w, Quantized) else _project(equation, x, w.astype(x.dtype))
    return checkpoint_name(y, "projection")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, _gather(w), out_sharding=activation_spec(equation.split("->")[1]))


def _gather(w: jax.Array) -> jax.Array:
    """Gather a weight axis by axis: over both axes at once, XLA:TPU would use an all-reduce."""
    spec = spec_of(w)

    def local(w: jax.Array) -> jax.Array:
        for split_by, axis in ((SPLIT, "expert"), ("fsdp", "fsdp")):
            for dim, entry in enumerate(spec):
                if entry == split_by:
                    w = gather(w, axis, dim)
        return w

    # The result is equal along the axes that it was gathered over, which the check cannot see.
    return jax.shard_map(local, in_specs=spec, out_specs=gathered(spec), check_vma=False)(w)


def _project_forward(equation: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _project(equation, x, w), (x, w)


def _project_backward(equation: str, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    operands, y_letters = equation.split("->")
    x_letters, w_letters = operands.split(",")
    dx = jnp.einsum(f"{y_letters},{w_letters}->{x_letters}", dy, _gather(w), out_sharding=activation_spec(x_letters))
    return dx, _weight_gradient(x_letters, y_letters, w_letters, x, dy, spec_of(w))


def _weight_gradient(x_letters: str, y_letters: str, w_letters: str, x: jax.Array, dy: jax.Array, spec: P) -> jax.Array:
    """Compute this device's part of the weight gradient, summed over all tokens.

    The scatter is explicit: XLA by itself would all-reduce a weight that two axes split, in full, over one of them.
    """
    tokens = (*batch_axes(), "context")

    def local(x: jax.Array, dy: jax.Array) -> jax.Array:
        dw = jnp.einsum(f"{x_letters},{y_letters}->{w_letters}", x, dy)
        sums = list(tokens)
        for dim, entry in enumerate(spec):
            for axis in entry if isinstance(entry, tuple) else (entry,):
                if axis in sums and axis_size(axis) > 1:
                    dw = scatter(dw, axis, dim)
                    sums.remove(axis)
        return jax.lax.psum(dw, tuple(sums))

    # For a weight that is not split where its activation is split over `tensor`.
    def with_tensor(letter: str, entry: Any) -> Any:
        return "tensor" if entry is None and ACTIVATION.get(letter) == "tensor" else entry

    entries = (*spec, *(None,) * (len(w_letters) - len(spec)))
    formed = P(*(with_tensor(letter, entry) for letter, entry in zip(w_letters, entries, strict=True)))
    dw = jax.shard_map(local, in_specs=(activation_spec(x_letters), activation_spec(y_letters)), out_specs=formed)(x, dy)
    return jax.sharding.reshard(dw, spec)


_project.defvjp(_project_forward, _project_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project_quantized(equation: str, x: jax.Array, w: Quantized) -> jax.Array:
    return jnp.einsum(equation, x, _gather_quantized(w, x.dtype), out_sharding=activation_spec(equation.split("->")[1]))


def _gather_quantized(w: Quantized, dtype: jnp.dtype) -> jax.Array:
    gathered = Quantized(_gather(w.codes), _gather(w.scales))
    spec = spec_of(gathered.codes)
    return jax.shard_map(lambda w: dequantize(w, dtype), in_specs=spec, out_specs=spec)(gathered)


def _project_quantized_forward(equation: str, x: jax.Array, w: Quantized) -> tuple[jax.Array, Quantized]:
    return _project_quantized(equation, x, w), w


def _project_quantized_backward(equation: str, w: Quantized, dy: jax.Array) -> tuple[jax.Array, None]:
    operands, y_letters = equation.split("->")
    x_letters, w_letters = operands.split(",")
    whole = _gather_quantized(w, dy.dtype)
    return jnp.einsum(f"{y_letters},{w_letters}->{x_letters}", dy, whole, out_sharding=activation_spec(x_letters)), None


_project_quantized.defvjp(_project_quantized_forward, _project_quantized_backward)


def lookup(table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
    """Look up rows of an embedding table that is split over `tensor` (V) and, depending on its spec, `fsdp` (D).

    Args:
        table_VD: the table.
        tokens_BT: token ids.
        dtype: dtype of the result.
    """
    spec, axes = spec_of(table_VD), global_axes()

    def local(table_vd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
        table_vD = whole_rows(table_vd.astype(dtype), spec, axes)
        # Each device looks up the tokens of its own rows and adds zeros for the others.
        row = tokens_bt - jax.lax.axis_index("tensor") * table_vD.shape[0]
        here = (row >= 0) & (row < table_vD.shape[0])
        return jax.lax.psum(jnp.where(here[..., None], table_vD[jnp.where(here, row, 0)], 0), "tensor")

    run = jax.shard_map(local, in_specs=(spec, activation_spec("BT")), out_specs=activation_spec("BTD"))
    return run(table_VD, tokens_BT)


def whole_rows(table_vd: jax.Array, spec: P, axes: tuple[str, ...]) -> jax.Array:
    """Gather this device's rows over `tensor` with all columns. Call it inside `shard_map`.

    Args:
        table_vd: this device's part of a table (V, n).
        spec: partition spec of the table.
        axes: result of `global_axes()` outside the `shard_map`.
    """
    table_vd = vary_with_spec(table_vd, spec, axes)
    if "fsdp" in spec:
        table_vd = gather(table_vd, "fsdp", 1)
    return gather(table_vd, "expert", 0) if SPLIT in spec else table_vd


def vary_with_spec(w: jax.Array, spec: P, axes: tuple[str, ...]) -> jax.Array:
    """Let a weight vary along the mesh axes that `spec` does not split it over. Call it inside `shard_map`, before the gather.

    The activations that the weight is multiplied with vary along these axes, so its gradient is then summed over them. Before
    the gather, that sum is of this device's part and not of the whole weight.

    Args:
        w: this device's part of a weight.
        spec: partition spec of the weight.
        axes: result of `global_axes()` outside the `shard_map`.
    """
    split = {axis for entry in spec if entry is not None for axis in (entry if isinstance(entry, tuple) else (entry,))}
    return jax.lax.pcast(w, tuple(axis for axis in axes if axis not in split), to="varying")
