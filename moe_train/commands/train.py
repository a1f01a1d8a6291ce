"""`moe-train train`: join the other processes of the job, decide what the config leaves open, and train."""

from __future__ import annotations

import jax

from moe_train import config
from moe_train.machine.mesh import join_processes
from moe_train.run import loop
from moe_train.run.resolve import resolve


def train(written: config.Config) -> int:
    """Train as the config says and return the exit code; raises as `resolve` and `loop.train` do."""
    join_processes()
    return loop.train(resolve(written, jax.device_count()))
