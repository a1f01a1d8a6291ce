"""Merge and round weights on the devices that hold them, as a file of their dtype contains them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moe_train import config
from moe_train.model.paths import ParameterPath
from moe_train.model.sharding.specs import spec_of
from moe_train.weights.merge import scale_of


def round_weights(
    parameters: Mapping[str, jax.Array], lora: config.Lora | None, dtype: jnp.dtype, keep_small: bool = False
) -> dict[str, jax.Array]:
    """Merge the weights with their adapters and round them to `dtype`.

    Args:
        parameters: weights and adapters by path.
        lora: the section of the adapters; None without adapters.
        dtype: dtype of the file.
        keep_small: whether norms and routers are not rounded: GGUF keeps them in F32.

    Returns:
        The weights without adapters: bfloat16 for a file of bfloat16, otherwise rounded values in float32.
    """
    rounded = {}
    for name, weight in parameters.items():
        path = ParameterPath.parse(name)
        if path.is_adapter:
            continue
        if path.is_router_bias:  # float32 in every file
            rounded[name] = weight
            continue
        if keep_small and (path.is_norm or path.is_router):
            rounded[name] = weight
            continue
        if lora is None or not path.has_adapter(parameters):
            rounded[name] = _round(weight, dtype=dtype)
            continue
        a, b = (parameters[factor] for factor in path.adapter)
        lead = a.ndim + b.ndim - 2 - weight.ndim  # number of stacked dims: repeats, and experts if routed
        num_scales = weight.shape[1] if lead == 2 else 1
        scales = np.array([scale_of(lora, path.module_path, (0, e)[:lead]) for e in range(num_scales)], np.float32)
        rounded[name] = _merge_and_round(weight, a, b, scales, dtype=dtype, transposed=path.is_head)
    return rounded


@partial(jax.jit, static_argnames="dtype")
def _round(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # float32 holds the numbers of a float16 file exactly; bfloat16 is kept, since it takes half the memory.
    return weight.astype(dtype).astype(jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32)


@partial(jax.jit, static_argnames=("dtype", "transposed"))
def _merge_and_round(
    weight: jax.Array, a: jax.Array, b: jax.Array, scales: np.ndarray, dtype: jnp.dtype, transposed: bool
) -> jax.Array:
    """Return round(weight + scale · a·b).

    Args:
        weight: (lead…, in…, out…).
        a: (lead…, in…, J).
        b: (lead…, J, out…).
        scales: (1,), or (E,) along the last dim of lead.
        dtype: dtype to round to.
        transposed: whether the weight is (lead…, out…, in…), as the head's.
    """
    # (lead + in + J) of a and (lead + J + out) of b, less (lead + in + out) of the weight, leaves lead and twice J.
    lead = a.ndim + b.ndim - 2 - weight.ndim
    letters = "abcdefgh"
    lead_letters = letters[:lead]
    in_letters = letters[lead : a.ndim - 1]
    out_letters = letters[a.ndim - 1 : weight.ndim]
    weight_letters = out_letters + in_letters if transposed else in_letters + out_letters
    # Embedding and head are not stacked, so they have no dim for the scales.
    scale_dims = scales.shape if lead else ()
    b *= scales.reshape(*scale_dims, *(1,) * (b.ndim - lead))
    equation = f"{lead_letters}{in_letters}J,{lead_letters}J{out_letters}->{lead_letters}{weight_letters}"
    delta = jnp.einsum(equation, a, b, out_sharding=spec_of(weight), precision=jax.lax.Precision.HIGHEST)
    return _round(weight.astype(jnp.float32) + delta, dtype=dtype)
