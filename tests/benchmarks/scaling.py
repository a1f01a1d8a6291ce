"""A slice that grows at constant work per chip, as the compiler sees it: memory, bytes received and time to compile.

    python -m tests.benchmarks.scaling [--model small4] [--layers N] [--out FOLDER] [CHIPS …]
                                                                    (needs libtpu; a plot needs matplotlib)

Mixtral 8x7B, full training, or Mistral Small 4, LoRA on attention and shared experts, one sequence of 4096 tokens a chip, on
v5p from 8 to 512 chips: expert 8, up to 8 along fsdp, the rest replicas along data. "Beside matrix products" are bytes of
asynchronous collectives between whose start and end products run. Adds to scaling.json (scaling_small4.json) beside this file,
prints its table, and plots it where matplotlib is there; without CHIPS that is all. Time is that of a core, all of a process
that imports, traces, compiles and reads the program: a busy machine does not lengthen it. Each size takes two to three minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_train import config
from moe_train.config import yaml_file
from moe_train.plan.compile import Traffic, compile_config
from moe_train.plan.topology import parse_topology

SLICES = {8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
CONFIGS = Path(__file__).parents[2] / "configs"
SMALL4 = (
    "model={family: mistral4, vocab_size: 131072, model_dim: 4096, num_layers: 36, norm_eps: 1e-6, attention: {name: mla, "
    "num_heads: 32, q_lora_rank: 1024, kv_lora_rank: 256, qk_nope_head_dim: 64, qk_rope_head_dim: 64, v_head_dim: 128, "
    "query_scaling: {beta: 0.1, original_max_seq_len: 8192}}, ffn: {name: moe, ffn_dim: 2048, num_experts: 128, "
    "experts_per_token: 4, num_shared_experts: 1}, rope: {name: yarn, theta: 1e4, factor: 128.0, original_max_seq_len: 8192}}"
)


class Workload(NamedTuple):
    recipe: Path
    overrides: tuple[str, ...]
    layers: int
    stem: str
    """Of the files of figures."""


WORKLOADS = {
    "mixtral": Workload(CONFIGS / "mixtral_8x7b_pretrain_v5p.yaml", ("compute.remat=full",), 32, "scaling"),
    "small4": Workload(
        CONFIGS / "mistral_small4_lora_v5p.yaml",
        (SMALL4, "train.seq_len=4096", "compute.remat=full", "compute.transport=ragged_all_to_all"),
        36,
        "scaling_small4",
    ),
}


def measure(workload: Workload, chips: int, layers: int) -> dict[str, Any]:
    fsdp = min(8, chips // 8)
    mesh = {"data": chips // (8 * fsdp), "fsdp": fsdp, "expert": 8}
    overrides = [*workload.overrides, f"model.num_layers={layers}", f"train.batch_size={chips}", "train.microbatches=1"]
    overrides += [f"mesh.{axis}={size}" for axis, size in mesh.items()]
    before = core_seconds()
    run = config.run_of(yaml_file.load_config(workload.recipe, overrides))
    compiled = compile_config(run, parse_topology(f"v5p:{SLICES[chips]}"))
    return {
        "chips": chips,
        "mesh": " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1),
        "layers": layers,
        "memory_GiB": compiled.bytes_per_device / 2**30,
        "received_GB": compiled.network_bytes / 1e9,
        "by_kind": by_kind(compiled.traffic),
        "compile_core_seconds": core_seconds() - before,
        "instructions": compiled.instructions,
    }


def by_kind(traffic: Sequence[Traffic]) -> dict[str, dict[str, float]]:
    """Return the gigabytes received by each kind of collective, and those of them received beside matrix products."""
    sums: dict[str, dict[str, float]] = {}
    for t in traffic:
        kind = sums.setdefault(t.kind, {"received_GB": 0.0, "beside_products_GB": 0.0})
        kind["received_GB"] += t.bytes / 1e9
        kind["beside_products_GB"] += t.bytes_overlapped / 1e9
    return sums


def kinds_text(row: dict[str, Any]) -> str:
    """Return two cells of the table: gathered or scattered bytes with the share beside products, and all-reduced bytes."""
    kinds = row["by_kind"]
    gathered = [kinds[kind] for kind in ("all-gather", "reduce-scatter")]
    received = sum(kind["received_GB"] for kind in gathered)
    beside = sum(kind["beside_products_GB"] for kind in gathered)
    return f"{received:.2f}; {beside / received:.0%} | {kinds['all-reduce']['received_GB']:.2f}"


def core_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(rows: list[dict[str, Any]]) -> str:
    sizes = "memory per chip, GiB | received per chip and step, GB"
    kinds = "gathered or scattered, GB; of it beside matrix products | all-reduced, GB"
    lines = [f"| chips | mesh | {sizes} | {kinds} | compile time, s on one core |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        figures = f"{r['memory_GiB']:.2f} | {r['received_GB']:.2f} | {kinds_text(r)} | {r['compile_core_seconds']:.0f}"
        lines.append(f"| {r['chips']} | {r['mesh']} | {figures} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    shown = {"memory_GiB": "memory per chip, GiB", "received_GB": "received per chip and step, GB"}
    shown |= {"compile_core_seconds": "compile time, s on one core"}
    for panel, (key, title) in zip(panels, shown.items(), strict=True):
        panel.plot([r["chips"] for r in rows], [r[key] for r in rows], marker="o")
        panel.set(title=title, xlabel="chips", ylim=(0, None))
        panel.set_xscale("log", base=2)
        panel.set_xticks([r["chips"] for r in rows], [str(r["chips"]) for r in rows])
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chips", nargs="*", type=int, help=f"of {', '.join(map(str, SLICES))}")
    parser.add_argument("--model", choices=WORKLOADS, default="mixtral")
    parser.add_argument("--layers", type=int, help="the program does not grow with them, its figures do")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    workload = WORKLOADS[args.model]
    layers = args.layers or workload.layers
    file = args.out / f"{workload.stem}.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for chips in args.chips:
        rows = [r for r in rows if (r["chips"], r["layers"]) != (chips, layers)] + [measure(workload, chips, layers)]
        rows.sort(key=lambda r: (r["layers"], r["chips"]))
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(next(r for r in rows if (r["chips"], r["layers"]) == (chips, layers)), flush=True)
    print(table([r for r in rows if r["layers"] == layers]))
    if importlib.util.find_spec("matplotlib"):
        plot([r for r in rows if r["layers"] == layers], args.out / f"{workload.stem}.png")
    else:
        print("no plot: matplotlib is not here; run: bash launch/install.sh report")


if __name__ == "__main__":
    main()
