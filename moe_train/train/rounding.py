"""How updates reach weights that are stored in bfloat16: rounded to nearest, rounded at random, or through float32 masters.

A bfloat16 number has 8 significant bits. Rounded to nearest, the sum of a weight and an update below 1/512 of it is the weight
itself, so at learning rates of fine-tuning most updates vanish. Two remedies keep the moments in float32 as well:

- float32_master (arXiv:1710.03740, section 3.1): the optimizer updates float32 copies, and the weights are those, rounded;
- stochastic (arXiv:2010.06192): the sum is rounded up with a probability that makes the rounding right on average.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, Shaped, UInt

from moe_train import config
from moe_train.model.parameters import Parameters
from moe_train.model.sharding.specs import spec_of

BFLOAT16_DROPPED_BITS = 16
"""Bits of a float32 number that its bfloat16 rounding does not have."""


class MasterState(NamedTuple):
    """Optimizer state that includes float32 masters, sharded like their weights."""

    masters: Parameters
    """Float32 value of each bfloat16 weight, by path."""
    inner: Any
    """State of the optimizer that updates them."""


class Update(NamedTuple):
    """Result of `apply_updates`."""

    weights: Parameters
    vanished: Float[Array, ""] | None
    """Share of the bfloat16 weights with an update that keep their value; None unless updates are rounded to nearest."""


def with_rounding(optimizer: optax.GradientTransformation, rounding: config.Rounding) -> optax.GradientTransformation:
    """Return the optimizer with its moments in float32 and, for `float32_master`, with masters in its state.

    With `nearest` the optimizer is returned as it is: its moments have the dtypes of the weights.
    """
    if rounding == "nearest":
        return optimizer

    def init(weights: Parameters) -> Any:
        inner = optimizer.init(_float32(weights))
        return MasterState(_float32(_bfloat16_weights(weights)), inner) if rounding == "float32_master" else inner

    optimizer = optax.with_extra_args_support(optimizer)

    def update(gradients: Parameters, state: Any, weights: Parameters | None = None, **extra: Any) -> tuple[Parameters, Any]:
        assert weights is not None
        if rounding == "stochastic":
            return optimizer.update(_float32(gradients), state, _float32(weights), **extra)
        exact_weights = _float32(weights) | state.masters
        updates, inner = optimizer.update(_float32(gradients), state.inner, exact_weights, **extra)
        masters = {path: x + updates[path] for path, x in state.masters.items()}
        return updates, MasterState(masters, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def apply_updates(
    rounding: config.Rounding, weights: Parameters, updates: Parameters, opt_state: Any, key: Key[Array, ""] | None
) -> Update:
    """Add the updates to the weights.

    Args:
        rounding: how bfloat16 weights are rounded; other weights are always rounded to nearest.
        weights: weights before the step, by path.
        updates: result of the optimizer of `with_rounding`.
        opt_state: its state after the step.
        key: PRNG key of the step, for `stochastic`; the bits of a weight depend on it and on the path, not on the mesh.
    """
    updated = optax.apply_updates(weights, updates)
    low = _bfloat16_weights(weights)
    match rounding:
        case "nearest":
            return Update(updated, _vanished(low, updates, updated) if low else None)
        case "float32_master":
            return Update(updated | {path: x.astype(jnp.bfloat16) for path, x in opt_state.masters.items()}, None)
        case "stochastic":
            assert key is not None
            for path, x in low.items():
                # A hash of the path, since its position would depend on which other weights are trained.
                bits = _random_bits(jax.random.fold_in(key, zlib.crc32(path.encode())), x)
                updated[path] = round_stochastically(x.astype(jnp.float32) + updates[path], bits)
            return Update(updated, None)
        case _:
            assert_never(rounding)


def round_stochastically(x: Float[Array, "*dims"], bits: UInt[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Round float32 to one of the two nearest bfloat16 numbers, to each with a probability that falls with its distance.

    Args:
        x: float32 numbers.
        bits: as many random bits as bfloat16 drops, as uint16.
    """
    # Adding bits below the last kept one carries into it exactly as often as the dropped part demands.
    raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits.astype(jnp.uint32)
    kept = raised >> BFLOAT16_DROPPED_BITS << BFLOAT16_DROPPED_BITS
    rounded = jax.lax.bitcast_convert_type(kept, jnp.float32)
    # The carry would turn infinity into NaN.
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _random_bits(key: Key[Array, ""], like: Shaped[Array, "*dims"]) -> UInt[Array, "*dims"]:
    return jax.random.bits(key, like.shape, jnp.uint16, out_sharding=spec_of(like))


def _vanished(low: Parameters, updates: Parameters, updated: Parameters) -> Float[Array, ""]:
    """Return the share of the bfloat16 weights with an update that keep their value."""
    unchanged = jnp.zeros((), jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for path, x in low.items():
        has_update = updates[path] != 0
        total += jnp.sum(has_update, dtype=jnp.float32)
        unchanged += jnp.sum(has_update & (updated[path] == x), dtype=jnp.float32)
    return unchanged / jnp.maximum(total, 1)


def _bfloat16_weights(weights: Parameters) -> Parameters:
    return {path: x for path, x in weights.items() if x.dtype == jnp.bfloat16}


def _float32(arrays: Parameters) -> Parameters:
    return {path: x.astype(jnp.float32) for path, x in arrays.items()}
