"""Ours and transformers' training step, in turn, each in a process of its own, with the ratio pair by pair.

    python tests/benchmarks/side_by_side.py [--workload S|M] [--lora RANK] [--experts grouped_mm|eager] [--cores 0,1]

Ratios above 1 are in our favour. Needs the extra `judges`, and a machine that does nothing else.
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
FIGURES = ("tokens_per_second", "median_step_seconds", "cpu_seconds_per_step", "first_step_seconds", "bytes_at_peak")


def measure(command: list[str], cores: str) -> dict[str, float]:
    count = str(len(cores.split(",")))
    # huge pages for both: glibc's own setting, as launch/quickstart.sh has it
    environment = {"OMP_NUM_THREADS": count, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
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
arguments.add_argument("--experts", default="grouped_mm")
arguments.add_argument("--cores", default="0")
arguments.add_argument("--pairs", type=int, default=3)
arguments = arguments.parse_args()
config = f"tests/benchmarks/workload_{arguments.workload}.yaml"
ours = ["-m", "moe_train", "bench", config, "--json"]
theirs = ["tests/benchmarks/step_transformers.py", config, "--experts", arguments.experts]
if arguments.lora:
    ours.insert(
        4, f'lora={{targets: [{{modules: ["attention.*", "ffn.*"], rank: {arguments.lora}, alpha: {2 * arguments.lora}}}]}}'
    )
    theirs += ["--lora", str(arguments.lora)]

pairs = []
for _ in range(arguments.pairs):
    a, b = measure(ours, arguments.cores), measure(theirs, arguments.cores)
    pairs.append((a, b))
    print(" | ".join(f"{name} {a[name]:,.4g} : {b[name]:,.4g}" for name in FIGURES), flush=True)
better = {name: 1 if name == "tokens_per_second" else -1 for name in FIGURES}
ratios = {name: statistics.median((a[name] / b[name]) ** better[name] for a, b in pairs) for name in FIGURES}
print(json.dumps({"workload": arguments.workload, "lora": arguments.lora, "cores": arguments.cores, "median ratio": ratios}))
