"""Restoring a small state: on another mesh, and from the newest checkpoint that is whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from moe_train.checkpoint.metadata import newest_metadata
from moe_train.machine.mesh import make_mesh
from tests.checkpoint.states import (
    ABOUT,
    MESHES,
    damage,
    restored,
    same,
    save_steps,
    steps_in,
)

# of the threads of Orbax that a failure cuts short
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_what_is_saved_comes_back(tmp_path, mesh):
    saved = save_steps(tmp_path, {1: None, 2: None})
    found = restored(tmp_path)
    assert same(found.state, saved[2]) and found.about == ABOUT and not found.damaged
    assert found.state.trainable["gate"].dtype == jnp.bfloat16


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
    assert newest_metadata(tmp_path) == ABOUT
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
