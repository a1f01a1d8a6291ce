"""A training step against its own matrix products, as XLA:CPU runs them, in one process.

    JAX_PLATFORMS=cpu GLIBC_TUNABLES=glibc.malloc.hugetlb=1 taskset -c 0 python tests/benchmarks/products.py CONFIG [KEY=VALUE …]

Prints CPU seconds of a step (the median of several), those of its products in a step that is traced, their ratio, and what else
takes longest. A product is an operation of the compiled step that contains a dot; what XLA fuses with it counts as product.
"""

from __future__ import annotations

import gzip
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import jax

from moe_train.commands.bench import random_state
from moe_train.config import yaml_file
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.run.resolve import resolve
from moe_train.train.step import compile_step
from moe_train.train.step_definition import definition_of

STEPS = 5
_FUSION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = .* fusion\(.*calls=%([\w.-]+)")
_DOT = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = .* dot\(")


def products_of(program: str) -> set[str]:
    """Names of the operations of a compiled program that are or contain a dot."""
    dots, calls, computation = set(), {}, ""
    computations_with_dots = set()
    for line in program.splitlines():
        if line.startswith(("%", "ENTRY")):
            computation = line.split(" ")[0].removeprefix("%")
        elif found := _DOT.match(line):
            dots.add(found[1])
            computations_with_dots.add(computation)
        elif found := _FUSION.match(line):
            calls[found[1]] = found[2]
    return dots | {name for name, called in calls.items() if called in computations_with_dots}


def own_seconds(folder: Path) -> Counter[str]:
    """Seconds of each operation in a trace, without those of the operations inside it."""
    (file,) = folder.rglob("*.trace.json.gz")
    by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]:
        if event.get("ph") == "X":
            by_thread[event["tid"]].append(event)
    seconds: Counter[str] = Counter()
    for events in by_thread.values():
        open_events: list[dict[str, Any]] = []
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            while open_events and open_events[-1]["ts"] + open_events[-1]["dur"] <= event["ts"] + 1e-9:
                open_events.pop()
            seconds[event["name"]] += event["dur"] / 1e6
            if open_events:
                seconds[open_events[-1]["name"]] -= event["dur"] / 1e6
            open_events.append(event)
    return seconds


run = resolve(yaml_file.load_config(sys.argv[1], sys.argv[2:]), jax.device_count())
mesh = make_mesh(run.mesh)
with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    state, structure, optimizer = random_state(run)
    definition = definition_of(run, structure, optimizer)
    rows = definition.objective.batch_type.synthetic(run.train.batch_size, run.train.seq_len, run.model.vocab_size, run.seed)
    batch = put_batch(rows, mesh)
    step = compile_step(definition, state, batch, {})
    times = []
    for _ in range(1 + STEPS):
        begin = time.process_time()
        state, metrics = step(state, batch, {})
        jax.block_until_ready(metrics)
        times.append(time.process_time() - begin)
    with jax.profiler.trace(folder):
        jax.block_until_ready(step(state, batch, {}))
    seconds = own_seconds(Path(folder))
    names = products_of(step.as_text())
    products = sum(seconds[name] for name in names)
    median = statistics.median(times[1:])
    print(f"step {median:.3f} CPU s, its products {products:.3f} s, ratio {median / products:.3f}")
    kinds: Counter[str] = Counter()
    for name, spent in seconds.items():
        if name not in names and "fusion" in name:
            kinds[re.sub(r"[.\d]+$", "", name)] += spent
    print("  ".join(f"{kind} {spent:.3f}" for kind, spent in kinds.most_common(8)))
