"""Sums of arrays' bits: the same on any mesh, on the host and in a program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.checkpoint.arrays import _bit_sums, bit_sums
from moe_train.machine.mesh import make_mesh


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_sums_of_bits_are_the_same_on_the_host_and_in_a_program(dtype):
    for settings in (config.Mesh(fsdp=8), config.Mesh(data=2, fsdp=2, tensor=2)):
        with jax.set_mesh(make_mesh(settings)):
            x = jax.jit(lambda: jax.random.normal(jax.random.key(0), (8, 64), dtype, out_sharding=P("fsdp")))()
            bits = np.asarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])
            wanted = sum(map(int, bits.reshape(-1))) % 2**32
            assert bit_sums(x) == [wanted] == [int(s) for s in _bit_sums([x])]
