"""Loading the trainable weights of a checkpoint, array by array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_train.checkpoint import arrays, manager
from moe_train.checkpoint.load_params import load_params
from moe_train.machine.mesh import make_mesh
from moe_train.train.state import TrainState, create_state
from tests.checkpoint.states import (
    ABOUT,
    MESHES,
    OPTIMIZER,
    SETTINGS,
    damage,
    new_state,
    numpy_of,
    restored,
    same,
    save_steps,
    steps_in,
)

# of the threads of Orbax that a failure cuts short
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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
        assert same(load_params(tmp_path, shapes)[0], wanted.learned)
        kept = load_params(tmp_path, shapes, keep={"w": noting}).params
        assert same(kept, {"w.negated": -wanted.learned["w"], "w.sums": np.asarray(jnp.asarray(wanted.learned["w"]).sum(-1))})
        assert kept["w.negated"].sharding.spec == shapes["w"].sharding.spec
        assert same(restored(tmp_path, stacked).state, wanted)
    assert seen == [(1, 64, 128)] * 5


def test_reading_the_weights_passes_a_damaged_checkpoint_over_and_says_so(tmp_path, mesh, caplog):
    saved = save_steps(tmp_path, {1: None, 2: None})
    shapes = jax.eval_shape(new_state).learned
    params, about, step = load_params(tmp_path, shapes)
    assert same(params, saved[2].learned) and about == ABOUT and step == 2
    first, *_ = shapes
    negated = load_params(tmp_path, shapes, keep={first: lambda x: {first: -x}}).params
    assert same(negated, {first: -saved[2].learned[first]})
    damage(tmp_path / "checkpoints" / "2" / "params", "flipped bits")
    params, _, step = load_params(tmp_path, shapes)
    assert same(params, saved[1].learned) and step == 1 and steps_in(tmp_path) == ["1", "2"]
    assert "the checkpoint of step 2 in" in caplog.text
    with pytest.raises(
        RuntimeError, match=r"the checkpoint of step 2 in .* cannot be read: .*; restore it, or name another one, such as .*@1$"
    ):
        load_params(tmp_path, shapes, 2)
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 7"):
        load_params(tmp_path, shapes, 7)
