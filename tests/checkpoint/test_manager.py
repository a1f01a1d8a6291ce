"""Saving and restoring a small state: what stays, what is damaged, what another mesh sees."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.checkpoint import arrays, manager
from moe_train.checkpoint.manager import WeightOrigin
from moe_train.machine.mesh import make_mesh
from moe_train.train.state import TrainState, create_state
from tests.checkpoint.states import ABOUT, MESHES, OPTIMIZER, SETTINGS, changed, damage, new_state, numpy_of, same, save_steps

# of the threads of Orbax that a failure cuts short
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def restored(run_dir: Path, new: Callable[[], TrainState] = new_state) -> manager.Restored | None:
    with manager.open_for_saving(run_dir, SETTINGS) as checkpoints:
        return manager.restore(checkpoints, jax.eval_shape(new))


def steps_in(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_is_saved_comes_back(tmp_path, mesh):
    saved = save_steps(tmp_path, {1: None, 2: None})
    found = restored(tmp_path)
    assert same(found.state, saved[2]) and found.about == ABOUT and not found.damaged
    assert found.state.trainable["gate"].dtype == jnp.bfloat16


def test_frozen_weights_are_not_in_it(tmp_path, mesh):
    base = WeightOrigin("models/base", None, {"a": "0" * 64})
    with manager.open_for_saving(tmp_path, SETTINGS) as checkpoints:
        state = jax.jit(new_state)()._replace(frozen={"large": jnp.ones((1000, 1000))})
        manager.save(checkpoints, 1, state, ABOUT._replace(base=base))
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 200_000
    found = restored(tmp_path)
    assert found.state.frozen == {} and found.about.base == base


def test_another_mesh_gets_the_same_numbers(tmp_path):
    with jax.set_mesh(make_mesh(MESHES["one"])):
        saved = save_steps(tmp_path, {1: None})
    with jax.set_mesh(make_mesh(MESHES["other"])):
        found = restored(tmp_path).state
    assert same(found, saved[1])
    assert found.opt_state.masters.keys() == {"gate"}  # the weight in bfloat16
    for tree in (found.trainable, found.opt_state.masters, found.opt_state.inner[0].mu):
        assert tree["gate"].sharding.spec == P("expert", "fsdp", "tensor")
        assert tree["gate"].sharding.mesh.shape["tensor"] == 2
        assert tree["gate"].addressable_shards[0].data.shape == (4, 32, 16)


def test_a_donated_state_does_not_change_what_is_being_saved(tmp_path, mesh):
    donating = jax.jit(lambda state: changed(state), donate_argnums=0)
    with manager.open_for_saving(tmp_path, SETTINGS) as checkpoints:
        state = jax.jit(new_state)()
        wanted = numpy_of(state)
        manager.save(checkpoints, 1, state, ABOUT)
        for _ in range(5):
            state = donating(state)
    assert same(restored(tmp_path).state, wanted)


def test_the_last_and_the_best_stay(tmp_path, mesh):
    save_steps(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: None, 6: 4.0})
    assert steps_in(tmp_path) == ["2", "5", "6"]
    with manager.open_for_saving(tmp_path, SETTINGS) as checkpoints:
        assert manager.best_loss(checkpoints) == 1.0
        manager.save(checkpoints, 7, jax.jit(new_state)(), ABOUT, 0.5)
    assert steps_in(tmp_path) == ["6", "7"]


def test_without_the_best(tmp_path, mesh):
    settings = config.Checkpoint(keep_last=1, keep_best=False)
    with manager.open_for_saving(tmp_path, settings) as checkpoints:
        for step, loss in ((1, 1.0), (2, 2.0)):
            manager.save(checkpoints, step, jax.jit(new_state)(), ABOUT, loss)
        manager.finish_saving(checkpoints)
        # Weights can be ruined although they were saved, so the one before goes when the next save begins.
        assert steps_in(tmp_path) == ["1", "2"]
        manager.save(checkpoints, 3, jax.jit(new_state)(), ABOUT)
    assert steps_in(tmp_path) == ["2", "3"]


def test_with_the_best_and_the_last(tmp_path, mesh):
    with manager.open_for_saving(tmp_path, config.Checkpoint(keep_last=1)) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)):
            manager.save(checkpoints, step, jax.jit(new_state)(), ABOUT, loss)
            manager.finish_saving(checkpoints)
    assert steps_in(tmp_path) == ["2", "4", "5"]


def test_nothing_is_made_before_the_first_save(tmp_path, mesh):
    assert restored(tmp_path / "run") is None
    assert not (tmp_path / "run").exists()


def test_one_flipped_bit_is_damage(tmp_path, mesh):
    """Where the file's own checks do not look: in the array's bytes."""
    saved = save_steps(tmp_path, {1: None, 2: None})
    file = max((tmp_path / "checkpoints" / "2" / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found = restored(tmp_path)
    assert same(found.state, saved[1]) and list(found.damaged) == [2]


@pytest.mark.parametrize("item", ["params", "optimizer"])
@pytest.mark.parametrize("how", ["truncated", "zeros", "flipped bits", "files gone", "empty"])
def test_a_damaged_checkpoint_is_set_aside(tmp_path, mesh, how, item):
    saved = save_steps(tmp_path, {1: None, 2: None})
    damage(tmp_path / "checkpoints" / "2" / item, how)
    found = restored(tmp_path)
    assert same(found.state, saved[1])
    assert list(found.damaged) == [2] and len(found.damaged[2]) < 350 and "\n" not in found.damaged[2]
    assert steps_in(tmp_path) == ["1", "damaged-2"]
    assert save_steps(tmp_path, {2: None})  # the step is done again, and there is room for it
    assert not restored(tmp_path).damaged
    damage(tmp_path / "checkpoints" / "2" / item, how)
    assert list(restored(tmp_path).damaged) == [2]
    assert steps_in(tmp_path) == ["1", "damaged-2"]


def test_a_damaged_description_is_damage_too(tmp_path, mesh):
    saved = save_steps(tmp_path, {1: None, 2: None})
    for file in (tmp_path / "checkpoints" / "2" / "about").rglob("metadata"):
        file.write_text("{")
    assert manager.newest_metadata(tmp_path) == ABOUT
    assert same(restored(tmp_path).state, saved[1])


SMALL_FILES = [
    *("about/metadata", "_CHECKPOINT_METADATA", "params/_METADATA", "params/_sharding", "params/array_metadatas/process_0"),
    *("params/manifest.ocdbt", "params/ocdbt.process_0/manifest.ocdbt", "optimizer/_METADATA", "optimizer/manifest.ocdbt"),
]


@pytest.mark.parametrize("how", ["empty", "cut", "flipped", "gone"])
@pytest.mark.parametrize("step", ["1", "2"])
@pytest.mark.parametrize("name", SMALL_FILES)
def test_no_small_file_of_any_checkpoint_keeps_a_run_from_starting(tmp_path, mesh, name, step, how, caplog):
    saved = save_steps(tmp_path, {1: 2.0, 2: 1.0})
    file = tmp_path / "checkpoints" / step / name
    content = file.read_bytes()
    middle = len(content) // 2
    match how:
        case "gone":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "cut":
            file.write_bytes(content[:middle])
        case "flipped":
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    found = restored(tmp_path)
    assert same(found.state, saved[1 if found.damaged else 2])
    assert all(f"checkpoints/{step}/" in reason for reason in found.damaged.values())
    if name == "about/metadata":
        assert f"checkpoints/{step}/about/metadata" in (found.damaged[2] if step == "2" else caplog.text)


def test_where_all_are_damaged_nothing_is_touched(tmp_path, mesh):
    save_steps(tmp_path, {1: None, 2: None})
    for step in ("1", "2"):
        damage(tmp_path / "checkpoints" / step / "params", "truncated")
    with pytest.raises(RuntimeError, match=r"no checkpoint in .* can be read; the newest, of step 2"):
        restored(tmp_path)
    assert steps_in(tmp_path) == ["1", "2"]


def test_what_a_killed_save_left_is_cleared_away(tmp_path, mesh):
    saved = save_steps(tmp_path, {1: None})
    shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp")
    assert same(restored(tmp_path).state, saved[1])
    save_steps(tmp_path, {2: None})
    assert steps_in(tmp_path) == ["1", "2"]


@contextmanager
def full_disk(limit: int = 2000):
    """No file grows past `limit` bytes: writing fails as it does on a full disk, in all threads."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, mesh):
    saved = save_steps(tmp_path, {1: None})
    with pytest.raises(RuntimeError) as caught, manager.open_for_saving(tmp_path, SETTINGS) as checkpoints, full_disk():
        manager.save(checkpoints, 2, changed(jax.jit(new_state)()), ABOUT)
        manager.finish_saving(checkpoints)
    said = str(caught.value)
    assert said.startswith(f"could not save a checkpoint in {tmp_path}") and said.endswith("the checkpoint of step 1 is intact")
    assert "\n" not in said and len(said) < 500
    assert steps_in(tmp_path) == ["1"]
    assert same(restored(tmp_path).state, saved[1])


@pytest.mark.parametrize("fault", ["none", "blind", "data", "metadata"])
def test_two_processes_agree_on_what_is_damaged(tmp_path, fault):
    """One cannot read what the other can: both take the checkpoint before, and neither waits for the other."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "SLURM_", "TPU_"))}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    processes = []
    for index in range(2):
        command = [sys.executable, "-m", "tests.checkpoint.two_processes", str(tmp_path), str(index), fault]
        root = Path(__file__).parents[2]
        mine = env | {"JAX_PROCESS_ID": str(index), "PYTHONPATH": str(root)}
        processes.append(subprocess.Popen(command, cwd=root, env=mine, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[1] for process in processes]
    expected = "row 2, damaged [], [1, 2]" if fault == "none" else "row 1, damaged [2], [1]"
    for index, lines in enumerate(said):
        assert f"process {index}: {expected}" in lines, lines


def test_a_full_disk_prints_no_traceback(tmp_path):
    code = f"""
import jax, pathlib
jax.config.update("jax_num_cpu_devices", 8)
from moe_train.machine.mesh import make_mesh
from tests.checkpoint.test_manager import *
run_dir = pathlib.Path({str(tmp_path)!r})
with jax.set_mesh(make_mesh(MESHES["one"])):
    save_steps(run_dir, {{1: None}})
    try:
        with manager.open_for_saving(run_dir, SETTINGS) as checkpoints, full_disk():
            manager.save(checkpoints, 2, changed(jax.jit(new_state)()), ABOUT)
            manager.finish_saving(checkpoints)
    except RuntimeError:
        print("failed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "failed\n"
    assert "Traceback" not in done.stderr and "Event loop" not in done.stderr


@pytest.mark.parametrize("mesh_there", sorted(MESHES))
def test_a_stacked_array_is_read_layer_by_layer(tmp_path, monkeypatch, mesh_there):
    monkeypatch.setattr(arrays, "CHECKPOINT_CHUNK_BYTES", 4096)  # a device's part is more, and a layer of it less

    def stacked() -> TrainState:
        w = jax.random.normal(jax.random.key(0), (5, 64, 128), jnp.bfloat16, out_sharding=P(None, "fsdp", "tensor"))
        table = jax.random.normal(jax.random.key(1), (512, 64), out_sharding=P(None, "fsdp"))
        return create_state({"w": w, "embed": table}, OPTIMIZER)

    with jax.set_mesh(make_mesh(MESHES["one"])), manager.open_for_saving(tmp_path, SETTINGS) as checkpoints:
        state = jax.jit(stacked)()
        wanted = numpy_of(state)
        manager.save(checkpoints, 1, state, ABOUT)
    seen = []

    def noting(part: jax.Array) -> dict[str, jax.Array]:
        seen.append(part.shape)
        return {"w.negated": -part, "w.sums": part.sum(-1)}

    with jax.set_mesh(make_mesh(MESHES[mesh_there])):
        shapes = jax.eval_shape(stacked).learned
        assert same(manager.load_params(tmp_path, shapes)[0], wanted.learned)
        kept = manager.load_params(tmp_path, shapes, keep={"w": noting}).params
        assert same(kept, {"w.negated": -wanted.learned["w"], "w.sums": np.asarray(jnp.asarray(wanted.learned["w"]).sum(-1))})
        assert kept["w.negated"].sharding.spec == shapes["w"].sharding.spec
        assert same(restored(tmp_path, stacked).state, wanted)
    assert seen == [(1, 64, 128)] * 5


def test_reading_the_weights_passes_a_damaged_checkpoint_over_and_says_so(tmp_path, mesh, caplog):
    saved = save_steps(tmp_path, {1: None, 2: None})
    shapes = jax.eval_shape(new_state).learned
    params, about, step = manager.load_params(tmp_path, shapes)
    assert same(params, saved[2].learned) and about == ABOUT and step == 2
    first, *_ = shapes
    negated = manager.load_params(tmp_path, shapes, keep={first: lambda x: {first: -x}}).params
    assert same(negated, {first: -saved[2].learned[first]})
    damage(tmp_path / "checkpoints" / "2" / "params", "flipped bits")
    params, _, step = manager.load_params(tmp_path, shapes)
    assert same(params, saved[1].learned) and step == 1 and steps_in(tmp_path) == ["1", "2"]
    assert "the checkpoint of step 2 in" in caplog.text
    with pytest.raises(
        RuntimeError, match=r"the checkpoint of step 2 in .* cannot be read: .*; restore it, or name another one, such as .*@1$"
    ):
        manager.load_params(tmp_path, shapes, 2)
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 7"):
        manager.load_params(tmp_path, shapes, 7)
