"""Where a step's time goes: attention, head and MoE layer apart, each against a dense product of its FLOPs.

    JAX_PLATFORMS=cpu taskset -c 0 python tests/benchmarks/parts.py tests/benchmarks/workload_M.yaml

A line per part: milliseconds of the forward pass, of forward and backward together, and the share of the dense product's
speed (the product of the layer's own shape, three of them for forward and backward) that it reaches. Of the processor's
time, medians of rounds in which each has its turn: a busy machine slows all of them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.config import yaml_file
from moe_train.machine.mesh import BATCH, make_mesh
from moe_train.model.attention.kernels import attend
from moe_train.model.attention.places import TokenPlaces
from moe_train.model.moe.layer import MoE
from moe_train.train.cross_entropy import cross_entropy_sum


def seconds(calls: list[Callable[[], Any]], rounds: int = 9) -> list[float]:
    """Of each call, in turns."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + rounds):
        for call, times in zip(calls, found, strict=True):
            begun = time.process_time()
            jax.block_until_ready(call())
            times.append(time.process_time() - begun)
    return [statistics.median(times[1:]) for times in found]  # the first compiles


def normal(seed: int, *shape: int, spec: P | None = None) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, out_sharding=spec or P())


def dense(rows: int, inner: int, outer: int) -> list[Callable[[], Any]]:
    """A (rows, inner) x (inner, outer) product, the gradient of its input and that of its weight."""
    x, w, dy = normal(0, rows, inner), normal(1, inner, outer), normal(2, rows, outer)
    parts = [lambda x, w, dy: x @ w, lambda x, w, dy: dy @ w.T, lambda x, w, dy: x.T @ dy]
    return [partial(jax.jit(part), x, w, dy) for part in parts]


def report(name: str, f: Callable[..., Any], weights: Any, x: jax.Array, products: list[Callable[[], Any]], times: int = 1) -> None:
    """`times`: how often f does the work of the dense products."""
    dy = normal(3, *(like := jax.eval_shape(f, weights, x)).shape, spec=like.sharding.spec)
    backward = jax.jit(jax.grad(lambda weights, x: jnp.sum(f(weights, x) * dy), argnums=(0, 1)))
    forward, both, *apart = seconds([partial(jax.jit(f), weights, x), partial(backward, weights, x), *products])
    share = times * sum(apart) / both
    print(f"{name:10} forward {forward * 1e3:7.1f} ms   with backward {both * 1e3:7.1f} ms   {share:.2f} of the dense product")


run = yaml_file.load_config(sys.argv[1])
m = run.model
assert m is not None and isinstance(m.ffn, config.MoeFfn)
B, T, D, F, V = run.train.batch_size, run.train.seq_len, m.model_dim, m.ffn.ffn_dim, m.vocab_size
N, K, H = m.attention.num_heads, m.attention.num_kv_heads, m.attention.head_dim
tokens, heads = P(BATCH, "context"), P(BATCH, "context", "tensor")
with jax.set_mesh(make_mesh(config.Mesh())):
    segments = jnp.ones((B, T), jnp.int32, out_sharding=tokens)
    positions = jax.reshard(jnp.broadcast_to(jnp.arange(T), (B, T)), tokens)
    x = normal(0, B, T, D, spec=tokens)

    moe = MoE(nnx.Rngs(0), m, run.compute, m.ffn)
    rows = B * T * m.ffn.experts_per_token
    report("moe", lambda moe, x: moe(x, segments)[0], moe, x, dense(rows, D, F), times=3)

    q, kv = normal(0, B, T, N, H, spec=heads), normal(1, B, T, K, H, spec=heads)
    # the FLOPs of scores and values over the causal half are those of a (B·T, N·H) x (N·H, T) product
    report("attention", lambda kv, q: attend(q, *kv, TokenPlaces(positions, segments)), (kv, kv), q, dense(B * T, N * H, T))

    head, mask = normal(2, V, D, spec=P("tensor", "fsdp")), segments > 0
    report("head", lambda head, x: cross_entropy_sum(x, head, segments, mask), head, x, dense(B * T, D, V))
