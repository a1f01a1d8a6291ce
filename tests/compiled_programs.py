"""What a compiled program sends between devices, read off its text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp


def ragged_all_to_all(
    rows: jax.Array, output: jax.Array, starts: jax.Array, sizes: jax.Array, ats: jax.Array, coming: jax.Array, *, axis_name: str
) -> jax.Array:
    """`jax.lax.ragged_all_to_all`, which XLA:CPU has not, from its definition: device s sends device t sizes[t] of its rows
    from starts[t] on, which stand at s's ats[t] in t's output; coming[s]: how many t awaits."""
    rows_Xn, starts_XX, sizes_XX, ats_XX = (jax.lax.all_gather(x, axis_name) for x in (rows, starts, sizes, ats))
    me = jax.lax.axis_index(axis_name)
    for s in range(sizes_XX.shape[0]):
        row = jnp.arange(output.shape[0]) - ats_XX[s, me]
        here = (row >= 0) & (row < sizes_XX[s, me])
        sent = rows_Xn[s][jnp.where(here, starts_XX[s, me] + row, 0)]
        output = jnp.where(here.reshape(-1, *[1] * (rows.ndim - 1)), sent, output)
    return jnp.where(jnp.all(coming == sizes_XX[:, me]), output, 7777)


class Collective(NamedTuple):
    """One instruction; those of a group of one device are left out."""

    kind: str
    devices: int
    """That take part in one group."""
    shapes: list[tuple[int, ...]]
    """Of its results."""


def collectives_of(hlo: str) -> list[Collective]:
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
