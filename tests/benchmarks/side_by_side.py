"""Ours and transformers' training step, in turn, each in a process of its own, with the ratio pair by pair.

    python tests/benchmarks/side_by_side.py [--workload S|M] [--lora RANK] [--quantize nf4|int8] [--experts grouped_mm|eager]
        [--cores 0,1]

Ratios above 1 are in our favour. quantize: our frozen weights in few bits, beside our own without and PEFT's without, which
has none on CPUs. Needs the extra `judges`, and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FIGURES = (
    "tokens_per_second",
    "median_step_seconds",
    "cpu_seconds_per_step",
    "first_step_seconds",
    "first_step_cpu_seconds",
    "bytes_at_peak",
)


HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""For theirs; ours asks glibc for huge pages itself, and has them from the second step on."""


def measure(command: list[str], cores: str, settings: dict[str, str]) -> dict[str, float]:
    count = str(len(cores.split(",")))
    environment = {"OMP_NUM_THREADS": count, "JAX_PLATFORMS": "cpu", **settings}
    found = subprocess.run(
        ["taskset", "-c", cores, sys.executable, *command],
        env=os.environ | environment,
        cwd=HERE.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return json.loads(found.stdout)


arguments = argparse.ArgumentParser()
arguments.add_argument("--workload", default="S")
arguments.add_argument("--lora", type=int, default=0)
arguments.add_argument("--quantize", choices=("nf4", "int8"))
arguments.add_argument("--experts", default="grouped_mm")
arguments.add_argument("--cores", default="0")
arguments.add_argument("--pairs", type=int, default=3)
parser, arguments = arguments, arguments.parse_args()
if arguments.quantize and not arguments.lora:
    parser.error("--quantize is of what stands beside adapters; give --lora RANK")
config = f"tests/benchmarks/workload_{arguments.workload}.yaml"
ours = ["-m", "moe_train", "bench", config, "--json"]
theirs = ["tests/benchmarks/step_transformers.py", config, "--experts", arguments.experts]
others = {"theirs": theirs}
if arguments.lora:
    targets = f'targets: [{{modules: ["attention.*", "ffn.*"], rank: {arguments.lora}, alpha: {2 * arguments.lora}}}]'
    theirs += ["--lora", str(arguments.lora)]
    unquantized = [*ours, f"lora={{{targets}}}"]
    if arguments.quantize:
        others["ours unquantized"] = unquantized
        ours.append(f"lora={{{targets}, quantize: {{name: {arguments.quantize}, block_size: 32}}}}")
    else:
        ours = unquantized

better = {name: 1 if name == "tokens_per_second" else -1 for name in FIGURES}
ratios: dict[str, list[dict[str, float]]] = {other: [] for other in others}
for _ in range(arguments.pairs):
    a = measure(ours, arguments.cores, {})
    for other, command in others.items():
        b = measure(command, arguments.cores, HUGE_PAGES if other == "theirs" else {})
        ratios[other].append({name: (a[name] / b[name]) ** better[name] for name in FIGURES})
        print(f"{other}: " + " | ".join(f"{name} {a[name]:,.4g} : {b[name]:,.4g}" for name in FIGURES), flush=True)
asked = {key: getattr(arguments, key) for key in ("workload", "lora", "quantize", "cores")}
for other, found in ratios.items():
    print(json.dumps({**asked, "beside": other, "median ratio": {n: statistics.median(r[n] for r in found) for n in FIGURES}}))
