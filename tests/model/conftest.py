"""Quick compiling, and what a compiled program sends between devices, read off its text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import pytest

QUICK: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 12):
    QUICK["xla_cpu_use_fusion_emitters"] = False  # newer ones have no choice
quick_jit = partial(jax.jit, compiler_options=QUICK)
"""For programs of tiny arrays: compiling takes a quarter of the time."""


class Collective(NamedTuple):
    """One instruction; those of a group of one device are left out."""

    kind: str
    devices: int
    """That take part in one group."""
    shapes: list[tuple[int, ...]]
    """Of its results."""


@pytest.fixture(scope="session")
def collectives() -> Callable[[str], list[Collective]]:
    return read


def read(hlo: str) -> list[Collective]:
    """XLA:TPU writes some reduce-scatters as computations named all-reduce-scatter, around an all-reduce."""
    found, scattered = [], None
    for line in hlo.splitlines():
        if line.startswith("%"):
            scattered = shapes(line.split("->")[1]) if line.startswith("%all-reduce-scatter") else None
        match = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) (all-reduce|reduce-scatter|all-gather|all-to-all)(?:-start)?\(", line)
        if match and group_size(line) > 1:
            kind = match[2] if scattered is None else "reduce-scatter"
            found.append(Collective(kind, group_size(line), scattered or shapes(match[1])))
    return found


def shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\b(?:pred|[fsub]+\d+)\[([\d,]*)\]", text)]


def group_size(line: str) -> int:
    """Groups are written as lists, as a reshaped iota, or as axes of a mesh."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{(.*?)\}", line)
    assert axes, line
    sizes = dict(re.findall(r"('\w+')=(\d+)", axes[1]))
    return math.prod(int(sizes[name]) for name in re.findall(r"'\w+'", axes[2]))
