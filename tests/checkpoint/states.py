"""Small states of training, saved as checkpoints and damaged there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.checkpoint import manager
from moe_train.checkpoint.metadata import CheckpointMetadata
from moe_train.checkpoint.restore import Restored, restore
from moe_train.train.rounding import with_rounding
from moe_train.train.state import TrainState, create_state

OPTIMIZER = with_rounding(optax.adamw(1e-2), "float32_master")
SETTINGS = config.Checkpoint(keep_last=2)
ABOUT = CheckpointMetadata({"name": "test"}, 16, "an identity", None)
MESHES = {"one": config.Mesh(fsdp=8), "other": config.Mesh(data=2, fsdp=2, tensor=2)}


def new_state() -> TrainState:
    """Random numbers in three weights of different specs and dtypes, and in a bias that no optimizer has."""
    keys = jax.random.split(jax.random.key(0), 4)
    return create_state(
        {
            "head": jax.random.normal(keys[0], (16, 64), jnp.float32, out_sharding=P("tensor", "fsdp")),
            "gate": jax.random.normal(keys[1], (4, 64, 32), jnp.bfloat16, out_sharding=P("expert", "fsdp", "tensor")),
            "scale": jax.random.normal(keys[2], (64,), jnp.float32, out_sharding=P(None)),
            "stacks.0.layers.0.ffn.router.bias": jax.random.normal(keys[3], (2, 4), jnp.float32, out_sharding=P(None)),
        },
        OPTIMIZER,
    )


@jax.jit
def changed(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: (x * 2 + 1).astype(x.dtype), state)


def numpy_of(state: TrainState) -> TrainState:
    return jax.tree.map(np.array, state)


def same(a: TrainState, b: TrainState) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(numpy_of(a)), jax.tree.leaves(b), strict=True))


def save_steps(run_dir: Path, losses: dict[int, float | None]) -> dict[int, TrainState]:
    """A checkpoint for each step, of another state each; the states as numpy."""
    saved = {}
    with manager.open_for_saving(run_dir, SETTINGS) as checkpoints:
        state = jax.jit(new_state)()
        for step, loss in losses.items():
            saved[step] = numpy_of(state)
            manager.save(checkpoints, step, state, ABOUT, loss)
            state = changed(state)
    return saved


def restored(run_dir: Path, new: Callable[[], TrainState] = new_state) -> Restored | None:
    """Restore the newest state of a run that can be read."""
    with manager.open_for_saving(run_dir, SETTINGS) as checkpoints:
        return restore(checkpoints, jax.eval_shape(new))


def steps_in(run_dir: Path) -> list[str]:
    """Names of the checkpoints on disk."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def damage(folder: Path, how: str) -> None:
    """To all files that hold arrays."""
    for file in folder.rglob("d/*"):
        content = bytearray(file.read_bytes())
        match how:
            case "truncated":
                file.write_bytes(content[: len(content) // 2])
            case "zeros":
                file.write_bytes(bytes(len(content)))
            case "flipped bits":
                content[len(content) // 2] ^= 4
                file.write_bytes(content)
            case "files gone":
                file.unlink()
    if how == "empty":
        shutil.rmtree(folder)
