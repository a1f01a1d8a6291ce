"""What buffers for all that routing may send would cost, as the compiler sees it.

    python -m tests.benchmarks.buffers [common fallback rounds worst ragged]        (needs libtpu)

One sparse layer of Mixtral 8x7B, forward and backward, for 8 v5p chips that hold one expert each, 4096 tokens a chip:

- common: one round of `exchange`'s buffers and nothing else; what does not fit would be lost
- fallback: these, and buffers for the worst case under a `lax.cond` where something does not fit
- rounds: `exchange`, with as many rounds of the common buffers as the fullest needs
- worst: buffers for the worst case always: all tokens of all chips, 4 times the balanced load
- ragged: `ragged.exchange`, in rounds too

Each takes half a minute of one core. Written is what all operations write but kernels and collectives, a loop once and of
a conditional the cheaper branch; accessed and FLOPs are the compiler's, which takes the dearest. Kernels estimate as if all
rows were in use.
"""

from __future__ import annotations

import argparse
import os
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

from moe_train.config import yaml_file
from moe_train.machine.mesh import BATCH, axis_size, make_mesh
from moe_train.model.moe import experts
from moe_train.model.moe.layer import MoE
from moe_train.model.moe.transport import all_to_all, ragged_all_to_all
from moe_train.plan import hlo
from moe_train.plan.compile import _environment, check_installed
from moe_train.plan.topology import parse

KINDS = ("common", "fallback", "rounds", "worst", "ragged")
ROOT = Path(__file__).parents[2]
TOKENS = 4096
NO_WORK = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "custom-call", "while", "conditional", "call")


def transport(kind: str) -> Any:
    """As `exchange.exchange`, with the buffers of this kind."""
    if kind in ("rounds", "ragged"):
        return {"rounds": all_to_all.exchange, "ragged": ragged_all_to_all.exchange}[kind]

    def once(x_mD, ids_mA, weights_mA, experts, draws, run, whole, most=None):
        e = jax.tree.leaves(experts)[0].shape[0]
        common, worst = all_to_all.slots_of(ids_mA.size, axis_size("expert")), x_mD.shape[0] * min(e, ids_mA.shape[1])
        plan = all_to_all.make_plan(ids_mA, e, common)
        small, large = (partial(all_to_all._round, slots=slots, run=run) for slots in (common, worst))

        def either(i, x_mD, weights_mA, experts, plan, draws):
            fits = jax.lax.pmax(jnp.max(plan.counts_X), ("fsdp", "expert", "context")) <= common
            # computed again in the backward pass; or else it is handed what both of them save (13 GiB)
            branches = jax.checkpoint(small), jax.checkpoint(large)
            return jax.lax.cond(fits, *branches, i, x_mD, weights_mA, experts, plan, draws)

        one = {"common": small, "worst": large, "fallback": either}[kind]
        plan = plan._replace(rounds=jnp.ones_like(plan.rounds))
        return all_to_all.in_rounds(one, x_mD, weights_mA, experts, plan, draws, whole), jnp.sum(plan.counts_X)

    return once


def program(kind: str) -> jax.stages.Compiled:
    run = yaml_file.load(ROOT / "configs" / "mixtral_8x7b_pretrain_v5p.yaml")
    mesh = make_mesh(run.mesh.model_copy(update={"fsdp": 1}), topologies.get_topology_desc("v5p:2x2x2", platform="tpu").devices)

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))

    assert run.model is not None
    compute = run.compute.model_copy(update={"transport": "ragged_all_to_all" if kind == "ragged" else "all_to_all"})
    with jax.set_mesh(mesh), mock.patch.object(experts, "exchange", transport(kind)):
        layer = jax.tree.map(placed, jax.eval_shape(lambda: MoE(nnx.Rngs(0), run.model, compute, run.model.ffn)))
        tokens = NamedSharding(mesh, P(BATCH, "context"))
        x = jax.ShapeDtypeStruct((8, TOKENS, run.model.model_dim), jnp.dtype(compute.dtype), sharding=tokens)
        segments = jax.ShapeDtypeStruct((8, TOKENS), jnp.int32, sharding=tokens)
        both = jax.jit(jax.grad(lambda layer, x, s: jnp.sum(layer(x, s)[0].astype(jnp.float32)), argnums=(0, 1)))
        return both.lower(layer, x, segments).compile()


def written(text: str) -> float:
    """Bytes that operations write which are neither kernels nor collectives."""
    computations, entry = hlo._computations(text)

    def of(name: str) -> float:
        total = 0.0
        for i in computations[name]:
            if i.opcode == "while":
                total += of(i.called("body")[0])
            elif i.opcode == "conditional":
                total += min(of(n) for n in i.called("branch_computations", "true_computation", "false_computation"))
            elif i.opcode == "call":
                total += sum(of(n) for n in i.called("to_apply"))
            elif i.opcode not in NO_WORK and not i.opcode.startswith(hlo.KINDS) and not i.opcode.endswith(("-start", "-done")):
                total += sum(shape.bytes for shape in hlo._shapes(i.result))
        return total

    return of(entry)


def measure(kind: str) -> dict[str, Any]:
    compiled = program(kind)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    counts, cost = hlo.read(text), compiled.cost_analysis()
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
    kinds, place = parser.parse_args().kinds or KINDS, parse("v5p:2x2x2")
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
