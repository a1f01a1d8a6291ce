"""What buffers for all that routing may send would cost, as the compiler sees it.

    python -m tests.benchmarks.buffers [common fallback chunks worst ragged]        (needs libtpu)

One sparse layer of Mixtral 8x7B, forward and backward, for 8 v5p chips that hold one expert each, 4096 tokens a chip:

- common: one chunk of `all_to_all`'s buckets and nothing else; what does not fit would be lost
- fallback: these, and buffers for the worst case under a `lax.cond` where something does not fit
- chunks: `all_to_all`, with as many chunks of the common buckets as the fullest needs
- worst: buffers for the worst case always: all tokens of all chips, 4 times the balanced load
- ragged: `ragged_all_to_all`, in chunks too

Each takes half a minute of one core. Written is what all operations write but kernels and collectives, a loop once and of
a conditional the cheaper branch; accessed and FLOPs are the compiler's, which takes the dearest. Kernels estimate as if all
rows were in use.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.config import yaml_file
from moe_train.machine.mesh import BATCH, make_mesh
from moe_train.model.moe.layer import MoE
from moe_train.model.moe.transport import all_to_all, chunks, ragged_all_to_all
from moe_train.model.moe.transport.transport import Assignments, Combined, ExchangeSizes, LocalExperts
from moe_train.plan import hlo, hlo_collectives, hlo_text
from moe_train.plan.compile import _environment, check_installed
from moe_train.plan.topology import parse_topology

KINDS = ("common", "fallback", "chunks", "worst", "ragged")
ROOT = Path(__file__).parents[2]
TOKENS = 4096
RunExperts = Callable[[Assignments, LocalExperts, ExchangeSizes], Combined]
NO_WORK = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "custom-call", "while", "conditional", "call")


def run_experts(kind: str) -> RunExperts:
    """`run_experts` of a transport, with the buffers of this kind."""
    if kind == "ragged":
        return ragged_all_to_all.run_experts
    if kind == "chunks":
        return all_to_all.run_experts

    def one_chunk(assignments: Assignments, experts: LocalExperts, sizes: ExchangeSizes) -> Combined:
        common = chunks.bucket_size(sizes)
        worst = sizes.tokens * min(experts.count, sizes.experts_per_token)
        routes, num_chunks = all_to_all.bucket_routes(assignments.expert_ids_mA, experts.count, common)
        small, large = (partial(all_to_all.exchange_chunk, size=size, experts=experts) for size in (common, worst))

        def either(i: jax.Array, inputs: chunks.ChunkInputs, routing: chunks.ChunkRouting) -> jax.Array:
            fits = jax.lax.pmax(jnp.max(routing.routes.counts_X), ("fsdp", "expert", "context")) <= common
            # recomputed in the backward pass; otherwise it receives what both of them save (13 GiB)
            branches = jax.checkpoint(small), jax.checkpoint(large)
            return jax.lax.cond(fits, *branches, i, inputs, routing)

        compute_chunk = {"common": small, "worst": large, "fallback": either}[kind]
        inputs = chunks.ChunkInputs(assignments.x_mD, assignments.weights_mA, experts.weights)
        routing = chunks.ChunkRouting(routes, jnp.ones_like(num_chunks), assignments.dropout_mA)
        y_mD = chunks.sum_over_chunks(compute_chunk, experts.unshard, inputs, routing)
        return Combined(y_mD, jnp.sum(routes.counts_X))

    return one_chunk


def program(kind: str) -> jax.stages.Compiled:
    run = yaml_file.load_config(ROOT / "configs" / "mixtral_8x7b_pretrain_v5p.yaml")
    mesh = make_mesh(config.Mesh(expert=8), topologies.get_topology_desc("v5p:2x2x2", platform="tpu").devices)

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))

    assert run.model is not None
    transport = ragged_all_to_all if kind == "ragged" else all_to_all
    compute = run.compute.model_copy(update={"transport": transport.NAME})
    with jax.set_mesh(mesh), mock.patch.object(transport, "run_experts", run_experts(kind)):
        layer = jax.tree.map(placed, jax.eval_shape(lambda: MoE(nnx.Rngs(0), run.model, compute, run.model.ffn)))
        tokens = NamedSharding(mesh, P(BATCH, "context"))
        x = jax.ShapeDtypeStruct((8, TOKENS, run.model.model_dim), jnp.dtype(compute.dtype), sharding=tokens)
        segments = jax.ShapeDtypeStruct((8, TOKENS), jnp.int32, sharding=tokens)
        both = jax.jit(jax.grad(lambda layer, x, s: jnp.sum(layer(x, s)[0].astype(jnp.float32)), argnums=(0, 1)))
        return both.lower(layer, x, segments).compile()


def written(text: str) -> float:
    """Bytes that operations write which are neither kernels nor collectives."""
    computations, entry = hlo_text.computations(text)

    def of(name: str) -> float:
        total = 0.0
        for i in computations[name]:
            if i.opcode == "while":
                total += of(i.called("body")[0])
            elif i.opcode == "conditional":
                total += min(of(n) for n in i.called("branch_computations", "true_computation", "false_computation"))
            elif i.opcode == "call":
                total += sum(of(n) for n in i.called("to_apply"))
            elif (
                i.opcode not in NO_WORK
                and not i.opcode.startswith(hlo_collectives.COLLECTIVE_KINDS)
                and not i.opcode.endswith(("-start", "-done"))
            ):
                total += sum(shape.bytes for shape in hlo_text.stated_shapes(i.result))
        return total

    return of(entry)


def measure(kind: str) -> dict[str, Any]:
    compiled = program(kind)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    counts, cost = hlo.count_program(text), compiled.cost_analysis()
    return {
        "buffers": kind,
        "temporaries, GiB": memory.temp_size_in_bytes / 2**30,
        "written, GB": written(text) / 1e9,
        "accessed, GB": cost["bytes accessed"] / 1e9,
        "beside kernels, GFLOP": (cost["flops"] - counts.kernel_flops) / 1e9,
        "kernels by their own estimate, TFLOP": counts.kernel_flops / 1e12,
        "received, MB": counts.bytes / 1e6,
        "in the fallback, MB": counts.fallback_bytes / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all where none is named")
    kinds, place = parser.parse_args().kinds or KINDS, parse_topology("v5p:2x2x2")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"{min(unknown)} is none of {', '.join(KINDS)}")
    try:
        check_installed(place)
    except ValueError as error:
        parser.error(str(error))
    os.environ.update(_environment(place))
    jax.config.update("jax_platforms", "cpu")
    for n, kind in enumerate(kinds):
        row = measure(kind)
        if n == 0:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        print("| " + " | ".join(x if isinstance(x, str) else f"{x:,.2f}" for x in row.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
