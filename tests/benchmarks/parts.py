"""Where a step's time goes: attention, head, MoE layer and optimizer apart, each against a dense product of its FLOPs.

    JAX_PLATFORMS=cpu taskset -c 0 python tests/benchmarks/parts.py tests/benchmarks/workload_M.yaml

A line per part: milliseconds of the forward pass, of forward and backward together, and the share of the dense product's
speed (the product of the layer's own shape, three of them for forward and backward) that it reaches.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_train import config, config_file
from moe_train.mesh import BATCH, make_mesh
from moe_train.model.attention import attend
from moe_train.model.moe import MoE
from moe_train.train.loss import cross_entropy_sum


def seconds(f: Callable[..., Any], *args: Any, runs: int = 5) -> float:
    jax.block_until_ready(f(*args))
    found = []
    for _ in range(runs):
        begun = time.perf_counter()
        jax.block_until_ready(f(*args))
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def normal(seed: int, *shape: int, spec: P | None = None) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, out_sharding=spec or P())


def dense_seconds(rows: int, inner: int, outer: int) -> float:
    """A (rows, inner) x (inner, outer) product, the gradient of its input and that of its weight."""
    x, w, dy = normal(0, rows, inner), normal(1, inner, outer), normal(2, rows, outer)
    parts = [lambda x, w, dy: x @ w, lambda x, w, dy: dy @ w.T, lambda x, w, dy: x.T @ dy]
    return sum(seconds(jax.jit(part), x, w, dy) for part in parts)


def report(name: str, f: Callable[..., Any], weights: Any, x: jax.Array, dense: float) -> None:
    dy = normal(3, *x.shape, spec=jax.typeof(x).sharding.spec)
    forward = seconds(jax.jit(f), weights, x)
    both = seconds(jax.jit(jax.grad(lambda weights, x: jnp.sum(f(weights, x) * dy), argnums=(0, 1))), weights, x)
    print(
        f"{name:10} forward {forward * 1e3:7.1f} ms   with backward {both * 1e3:7.1f} ms   {dense / both:.2f} of the dense product"
    )


def line(name: str, both: float, dense: float, forward: str = "") -> None:
    print(f"{name:10} {forward:20}   with backward {both * 1e3:7.1f} ms   {dense / both:.2f} of the dense product")


run = config_file.load(sys.argv[1])
m = run.model
assert m is not None and isinstance(m.ffn, config.MoeFfn)
B, T, D, F, V = run.train.batch_size, run.train.seq_len, m.model_dim, m.ffn.ffn_dim, m.vocab_size
N, K, H = m.attention.num_heads, m.attention.num_kv_heads, m.attention.head_dim
tokens, heads = P(BATCH, "context"), P(BATCH, "context", "tensor")
with jax.set_mesh(make_mesh(config.Mesh())):
    segments = jnp.ones((B, T), jnp.int32, out_sharding=tokens)
    positions = jax.reshard(jnp.broadcast_to(jnp.arange(T), (B, T)), tokens)
    x = normal(0, B, T, D, spec=tokens)

    moe = MoE(nnx.Rngs(0), m, run.compute)
    rows = B * T * m.ffn.experts_per_token
    report("moe", lambda moe, x: moe(x, segments)[0], moe, x, 3 * dense_seconds(rows, D, F))

    q, kv = normal(0, B, T, N, H, spec=heads), normal(1, B, T, K, H, spec=heads)
    # the FLOPs of scores and values over the causal half are those of a (B·T, N·H) x (N·H, T) product
    report("attention", lambda kv, q: attend(q, *kv, positions, segments), (kv, kv), q, dense_seconds(B * T, N * H, T))

    head, mask = normal(2, V, D, spec=P("tensor", "fsdp")), segments > 0
    both = seconds(jax.jit(jax.grad(lambda head, x: cross_entropy_sum(x, head, segments, mask), argnums=(0, 1))), head, x)
    print(
        f"{'head':10} {'':20}   with backward {both * 1e3:7.1f} ms   {dense_seconds(B * T, D, V) / both:.2f} of the dense product"
    )
