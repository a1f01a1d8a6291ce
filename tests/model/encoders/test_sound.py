"""The shardings of sound: chunks are divided like tokens."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import make_mesh
from moe_train.model.encoders.sound import Sound


def test_chunks_are_split_over_context() -> None:
    with jax.set_mesh(make_mesh(config.Mesh(data=2, context=2), jax.devices()[:4])):
        sound = Sound(np.zeros((2, 4, 32, 8)), np.zeros((2, 4), np.int32), np.zeros((2, 6), np.int32)).placed()  # type: ignore[arg-type]
        assert sound.frames_BCFM.sharding.spec[1] == "context" and sound.frames_BCFM.sharding.spec[2:] in ((None, None), P())
        assert sound.chunk_ids_BC.addressable_shards[0].data.shape == (1, 2)
