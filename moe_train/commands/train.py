"""`moe-train train`: join the other processes of the job, resolve the config, and train."""

from __future__ import annotations

import jax

from moe_train import config
from moe_train.machine.mesh import join_processes
from moe_train.run import loop
from moe_train.run.resolve import resolve


def train(written: config.Config) -> int:
    """Train as the config says and return the exit code; raises the errors of `resolve` and `loop.train_run`."""
    join_processes()
    return loop.train_run(resolve(written, jax.device_count()))
