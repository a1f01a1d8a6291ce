"""One of two processes that save two checkpoints and restore the newest that both can read: RUN_DIR INDEX FAULT."""

from __future__ import annotations

import sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 4)

from moe_train.checkpoint import manager, restore  # noqa: E402
from moe_train.checkpoint.metadata import CheckpointMetadata  # noqa: E402
from moe_train.machine.agreement import exchange  # noqa: E402
from moe_train.machine.mesh import join_processes, make_mesh  # noqa: E402
from tests.checkpoint.states import MESHES, SETTINGS, new_state  # noqa: E402


def blind(path: Path) -> None:
    """Let this process not see anything below `path`."""
    read = restore.read_array

    def reading(item: Path, *args: object) -> object:
        if path in item.parents:
            raise FileNotFoundError(f"{item} is missing")
        return read(item, *args)

    restore.read_array = reading


join_processes()
run_dir, index, fault = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with jax.set_mesh(make_mesh(MESHES["one"])):
    with manager.open_for_saving(run_dir, SETTINGS) as checkpoints:
        state = jax.jit(new_state)()
        for step in (1, 2):
            manager.save(checkpoints, step, state, CheckpointMetadata({"name": "test"}, step, "an identity", None))
    newest = run_dir.absolute() / "checkpoints" / "2"
    if fault == "blind" and index == 1:
        blind(newest)
    if fault == "data" and index == 0:
        for file in newest.glob("params/ocdbt.process_1/d/*"):
            file.unlink()
    if fault == "metadata" and index == 0:
        (newest / "about" / "metadata").write_bytes(b"")
    exchange("", "on the damage")
    with manager.open_for_saving(run_dir, SETTINGS) as checkpoints:
        found = restore.restore(checkpoints, jax.eval_shape(new_state))
        assert found is not None
        print(
            f"process {index}: row {found.about.row}, damaged {sorted(found.damaged)}, {checkpoints.all_steps()}", file=sys.stderr
        )
