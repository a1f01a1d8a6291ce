"""Detect a spike of the loss, or of the gradient norm, against the median of recent steps, on the device.

The limit is median + factor * max(1.4826 * median absolute deviation, 1% of the median): the first is the standard deviation of
normally distributed values whatever a few outliers are (Rousseeuw and Croux 1993), and the second keeps a flat curve from
making every step a spike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_train import config

NORMAL_DEVIATION = 1.4826
"""Standard deviation of a normal distribution, in median absolute deviations."""
SMALLEST_DEVIATION = 0.01
"""Smallest deviation that is assumed, as a share of the median."""


class GuardState(NamedTuple):
    """The recent steps, and what the guard has done so far."""

    recent_W: Float[Array, " W"]
    """Values of the last steps that were no spikes, the newest last; the first ones are not valid until the window is full."""
    filled: Int[Array, ""]
    """Number of valid values."""
    spikes: Int[Array, ""]
    """Number of spikes so far."""
    discarded: Int[Array, ""]
    """Number of steps so far whose update was skipped, or undone by a roll-back."""


class Spike(NamedTuple):
    """What the guard found in a step."""

    is_spike: Bool[Array, ""]
    limit: Float[Array, ""]
    """The value above which a step is a spike; infinite while the window is not full."""
    spikes: Int[Array, ""]
    """Number of spikes so far, this one included."""


def guard_step(
    settings: config.SpikeGuard, guard: GuardState, value: Float[Array, ""], finite: Bool[Array, ""]
) -> tuple[GuardState, Spike]:
    """Compare a step with those before it.

    Args:
        settings: what counts as a spike.
        guard: the state before the step.
        value: the step's loss or gradient norm.
        finite: whether the step is finite; one that is not is skipped anyway, and is no spike.
    """
    median = jnp.median(guard.recent_W)
    deviation = NORMAL_DEVIATION * jnp.median(jnp.abs(guard.recent_W - median))
    limit = median + settings.factor * jnp.maximum(deviation, SMALLEST_DEVIATION * jnp.abs(median))
    limit = jnp.where(guard.filled >= settings.window, limit, jnp.inf)
    is_spike = finite & (value > limit)
    # A spike would raise the limit for the next one.
    enters = finite & ~is_spike
    after = GuardState(
        recent_W=jnp.where(enters, jnp.append(guard.recent_W[1:], value.astype(jnp.float32)), guard.recent_W),
        filled=jnp.where(enters, jnp.minimum(guard.filled + 1, settings.window), guard.filled),
        spikes=guard.spikes + is_spike,
        discarded=guard.discarded + is_spike,
    )
    return after, Spike(is_spike, limit, after.spikes)


def guard_of_json(settings: config.SpikeGuard, saved: dict[str, Any] | None) -> GuardState:
    """Return the guard that a checkpoint describes, on the mesh in force; a new one for None.

    The window may have another length than the saved one: its newest values are used.
    """
    saved = saved or {"recent": [], "spikes": 0, "discarded": 0}
    recent = saved["recent"][-settings.window :]
    padded = np.zeros(settings.window, np.float32)
    padded[settings.window - len(recent) :] = recent

    def replicated(x: Shaped[np.ndarray, "*dims"]) -> Shaped[Array, "*dims"]:
        # Without a collective, which `device_put` would use to compare the values of all processes.
        return jax.make_array_from_callback(x.shape, NamedSharding(jax.sharding.get_mesh(), P()), lambda index: x[index])

    counts = (replicated(np.array(n, np.int32)) for n in (len(recent), saved["spikes"], saved["discarded"]))
    return GuardState(replicated(padded), *counts)


def guard_to_json(guard: GuardState) -> dict[str, Any]:
    """Describe the guard for a checkpoint's metadata; `guard_of_json` restores it bit for bit."""
    recent_W, filled, spikes, discarded = jax.device_get(guard)
    # float32 values are exact as Python floats, and JSON keeps those.
    valid = recent_W[len(recent_W) - int(filled) :]
    return {"recent": [float(x) for x in valid], "spikes": int(spikes), "discarded": int(discarded)}
