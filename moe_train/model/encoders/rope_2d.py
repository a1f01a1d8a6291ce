"""Rotary position embedding in two dimensions: half of a head's pairs rotate by the row of a patch, half by its column."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotate_2d(x_BPNH: Float[Array, "B P N H"], places_BP2: Int[Array, "B P 2"], theta: float) -> Float[Array, "B P N H"]:
    """Rotate the pairs (x[i], x[i + H/2]), computed in float32.

    Of the H/2 frequencies theta ** (-2i / H), those of even i turn the first half of the pairs by row, and those of odd i turn the
    second half by column (arXiv:2410.07073, section 2.2).

    Args:
        x_BPNH: queries or keys of patches; H is a multiple of 4.
        places_BP2: row and column of each patch.
        theta: base of the frequencies.
    """
    H = x_BPNH.shape[-1]
    freqs = theta ** (-np.arange(0, H, 2, dtype=np.float64) / H)
    by_side = np.stack([freqs[0::2], freqs[1::2]]).astype(np.float32)
    angles = places_BP2.astype(jnp.float32)[..., None] * by_side
    angles_BPR = angles.reshape(*places_BP2.shape[:2], H // 2)
    cos = jnp.cos(angles_BPR)[:, :, None, :]
    sin = jnp.sin(angles_BPR)[:, :, None, :]
    first, second = jnp.split(x_BPNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BPNH.dtype)
