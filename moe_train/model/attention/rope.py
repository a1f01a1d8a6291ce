"""Rotary position embedding (RoPE) of half-split and of interleaved pairs, with positions that restart in each segment."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_train import config


def frequencies(rope: config.DefaultRope | config.YarnRope, head_dim: int) -> tuple[Float[np.ndarray, " pairs"], float]:
    """Return the angular frequencies (head_dim / 2,) in radians per position, and the factor on cos and sin.

    YaRN (arXiv:2309.00071, section 3.2): frequencies that turn more than `beta_fast` times in the original length are kept,
    those that turn less than `beta_slow` times are divided by `factor`, and a linear ramp lies between.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain = rope.theta**-exponents
    if isinstance(rope, config.DefaultRope):
        return plain, 1.0

    # (Real-valued) index of the pair of dims whose frequency makes so many turns over the original length.
    def dim_of(turns: float) -> float:
        return head_dim * math.log(rope.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dim_of(rope.beta_fast)), 0)
    # As in transformers, the limit is head_dim - 1, although there are only head_dim / 2 pairs.
    high = min(math.ceil(dim_of(rope.beta_slow)), head_dim - 1)
    # A ramp of width 0 would divide by zero.
    width = high - low if high > low else 0.001
    ramp = np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
    return plain / rope.factor * ramp + plain * (1 - ramp), _attention_factor(rope)


def _attention_factor(rope: config.YarnRope) -> float:
    # Equal settings (1 and 1 in Ministral 3) cancel to 1; without settings the factor is YaRN's own, 0.1 * ln(factor) + 1.
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope, rope.mscale) / _mscale(rope, rope.mscale_all_dim)
    return _mscale(rope, 1.0)


def _mscale(rope: config.YarnRope, m: float) -> float:
    """Return YaRN's temperature 0.1 * m * ln(factor) + 1 (arXiv:2309.00071, section 3.4)."""
    return 1.0 if rope.factor <= 1 else 0.1 * m * math.log(rope.factor) + 1.0


class Rotation(NamedTuple):
    """Cosine and sine of the angle by which each of P pairs of dims is turned at the position of each token, in float32."""

    cos_BTP: Float[Array, "B T P"]
    sin_BTP: Float[Array, "B T P"]


def rotation(positions_BT: Int[Array, "B T"], rope: config.DefaultRope | config.YarnRope, rotated_dims: int) -> Rotation:
    """Return the rotation by position * frequency, which all layers and heads of a model share.

    Computed where it is applied, it would be computed again for each layer, head and element: XLA fuses it there.

    Args:
        positions_BT: positions of the tokens.
        rope: frequencies.
        rotated_dims: number of dims of a head that are rotated, 2 * P.
    """
    freqs, factor = frequencies(rope, rotated_dims)
    angles_BTP = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(freqs, jnp.float32)
    return Rotation(jnp.cos(angles_BTP) * factor, jnp.sin(angles_BTP) * factor)


def rotate(x_BTNH: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x[i], x[i + H/2]), computed in float32."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return _rotate_pairs(first, second, rotation).astype(x_BTNH.dtype)


def rotate_interleaved(x_BTNH: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x[2i], x[2i + 1]), computed in float32.

    Returns:
        The rotated pairs in half-split order: products of queries and keys do not depend on the order that both have.
    """
    pairs = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], -1, 2)
    return _rotate_pairs(pairs[..., 0], pairs[..., 1], rotation).astype(x_BTNH.dtype)


def _rotate_pairs(
    first_BTNP: Float[Array, "B T N P"], second_BTNP: Float[Array, "B T N P"], rotation: Rotation
) -> Float[Array, "B T N H"]:
    """Rotate pairs of numbers; the result has the first numbers of all P pairs, then the second ones."""
    cos, sin = (x_BTP[:, :, None, :] for x_BTP in rotation)
    return jnp.concatenate([first_BTNP * cos - second_BTNP * sin, second_BTNP * cos + first_BTNP * sin], axis=-1)


def scale_correction(attention: config.MultiHeadLatentAttention, rope: config.DefaultRope | config.YarnRope) -> float:
    """Return the factor on the scores of multi-head latent attention beyond the inverse square root of the query's dims."""
    if attention.scale_correction == "none" or isinstance(rope, config.DefaultRope):
        return 1.0
    return _mscale(rope, rope.mscale_all_dim) ** 2
