"""What one device receives by each collective of an HLO module.

With g devices in a group: (g-1)/g of the result of an all-gather, (g-1)/g of the operand of a reduce-scatter, twice that of
an all-reduce, (g-1)/g of an all-to-all, the operand of a permute. Of a ragged all-to-all the smaller side counts: the other is
a buffer for the worst case. XLA:TPU writes a reduce-scatter as a fusion named all-reduce-scatter, and what crosses slices as
messages of the hosts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe_train.plan.hlo_text import Instruction, ShapesByName, operand_shapes, second_element, stated_shapes
from moe_train.plan.replica_groups import Groups, replica_groups

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")
SCATTER = "all-reduce-scatter"
"""How computations are named in which XLA:TPU reduces and keeps a part."""


@dataclass(frozen=True)
class Collective:
    """One instruction, whatever number of times it runs."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    """Of its (first) result on one device."""
    bytes: float
    """Received by one device each time."""
    groups: Groups
    asynchronous: bool
    """A pair of start and done; other work may run between them."""
    hidden_flops: float
    """Matrix products of what is scheduled between start and done."""
    source: str
    """The operation of the program that it comes from, as JAX names it."""
    chain: str = ""
    """Inside a fusion that does a part of it beside other work: the name that all its parts share."""


def collective_of(i: Instruction, kind: str, known: ShapesByName, scattered: bool) -> Collective | None:
    """A collective instruction; None where a group is one device.

    scattered: whether it stands in a computation that keeps only a part of what it reduces (`SCATTER`).
    """
    asynchronous = i.opcode.endswith("-start")
    results = stated_shapes(second_element(i.result) if asynchronous and kind != "all-reduce" else i.result)
    size = sum(s.bytes for s in results)
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", i.attributes.split("source_target_pairs=")[1].split("}}")[0] + "}")
        groups: Groups = tuple((int(a), int(b)) for a, b in pairs if a != b)
        if not groups:  # everything stays where it is
            return None
    else:
        groups = replica_groups(i.attributes)
        if len(groups[0]) == 1:
            return None
    if kind == "ragged-all-to-all":
        size = min(size, operand_shapes(i, known)[0].bytes)
    if kind == "all-reduce" and scattered:
        kind, size = "reduce-scatter", size / len(groups[0])
    received = _received(kind, size, len(groups[0]))
    source = re.search(r'op_name="([^"]*)"', i.attributes)
    chain = re.search(r'chain_id="\w+"', i.attributes)
    named = chain[0] if chain else ""
    of = results[0]
    return Collective(kind, of.dtype, of.dims, received, groups, asynchronous, 0, source[1] if source else "", named)


def _received(kind: str, size: float, g: int) -> float:
    """size: of the result."""
    return size * {"all-reduce": 2 * (g - 1) / g, "reduce-scatter": g - 1, "collective-permute": 1}.get(kind, (g - 1) / g)


def received_between_slices(i: Instruction) -> Collective | None:
    """What arrives from other slices, which XLA:TPU sends through the hosts: one `recv` for each collective; None for a
    `recv` of another kind."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
    devices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x\{([\d,:]+)\}"', i.attributes)
    if not kind or not devices:
        return None
    slices, places = (_numbers(text) for text in devices.groups())
    groups = tuple(tuple((s - slices[0]) * len(places) + place for s in slices) for place in places)
    result = stated_shapes(i.result)[0]
    of = kind[1].lower().replace("_", "-").replace("one-to-one", "collective-permute")
    return Collective(of, result.dtype, result.dims, _received(of, result.bytes, len(slices)), groups, True, 0, "")


def _numbers(text: str) -> list[int]:
    """`0:3,8` -> 0, 1, 2, 3, 8."""
    ends = ([int(n) for n in part.split(":")] for part in text.split(","))
    return [n for end in ends for n in range(end[0], end[-1] + 1)]
