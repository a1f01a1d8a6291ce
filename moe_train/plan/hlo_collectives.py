"""Bytes that one device receives in each collective of an HLO module.

With g devices in a group, a device receives (g-1)/g of the result of an all-gather, (g-1)/g of the operand of a
reduce-scatter, twice that for an all-reduce, (g-1)/g of an all-to-all, and the whole operand of a permute. For a ragged
all-to-all the smaller side counts, since the other is a buffer for the worst case. XLA:TPU writes a reduce-scatter as a
fusion named all-reduce-scatter, and traffic that crosses slices as messages between hosts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe_train.plan.hlo_text import Instruction, ShapesByName, operand_shapes, second_element, stated_shapes
from moe_train.plan.replica_groups import ReplicaGroups, replica_groups

COLLECTIVE_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")
"""Opcodes of the collectives that are counted."""
SCATTER_PREFIX = "all-reduce-scatter"
"""Prefix of the names of computations in which XLA:TPU reduces and keeps only a part."""


@dataclass(frozen=True)
class Collective:
    """One collective instruction, regardless of how often it runs."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    """Shape of its first result on one device."""
    bytes: float
    """Bytes received by one device each time."""
    groups: ReplicaGroups
    asynchronous: bool
    """Whether it is a pair of start and done, between which other work may run."""
    hidden_flops: float
    """FLOPs of the matrix products scheduled between start and done."""
    source: str
    """The operation of the program that it comes from, by JAX's name."""
    chain: str = ""
    """The name shared by all parts of a collective that several fusions perform alongside other work; empty otherwise."""


def collective_of(i: Instruction, kind: str, known: ShapesByName, scattered: bool) -> Collective | None:
    """Read a collective instruction.

    Args:
        i: the instruction.
        kind: its opcode without `-start`.
        known: shapes of the results of the computation's other instructions.
        scattered: whether it belongs to a computation that keeps only a part of what it reduces (`SCATTER_PREFIX`).

    Returns:
        None if a group is a single device, or if every device of a permute keeps its data.
    """
    asynchronous = i.opcode.endswith("-start")
    result_text = i.result
    if asynchronous and kind != "all-reduce":  # these return their operands too
        result_text = second_element(i.result)
    results = stated_shapes(result_text)
    size = sum(s.bytes for s in results)
    if kind == "collective-permute":
        # The list ends with two braces, of which the first closes the last pair.
        pairs = re.findall(r"\{(\d+),(\d+)\}", i.attributes.split("source_target_pairs=")[1].split("}}")[0] + "}")
        groups: ReplicaGroups = tuple((int(a), int(b)) for a, b in pairs if a != b)
        if not groups:  # no device sends to another
            return None
    else:
        groups = replica_groups(i.attributes)
        if len(groups[0]) == 1:
            return None
    if kind == "ragged-all-to-all":
        # The larger side is a buffer for the worst case, of which the rest stays empty.
        size = min(size, operand_shapes(i, known)[0].bytes)
    if kind == "all-reduce" and scattered:
        # The instruction inside the fusion states the whole array, of which a device keeps its part.
        kind = "reduce-scatter"
        size = size / len(groups[0])
    received = _received_bytes(kind, size, len(groups[0]))
    source = re.search(r'op_name="([^"]*)"', i.attributes)
    chain = re.search(r'chain_id="\w+"', i.attributes)
    return Collective(
        kind=kind,
        dtype=results[0].dtype,
        shape=results[0].dims,
        bytes=received,
        groups=groups,
        asynchronous=asynchronous,
        hidden_flops=0,
        source=source[1] if source else "",
        chain=chain[0] if chain else "",
    )


def _received_bytes(kind: str, size: float, g: int) -> float:
    """Return the bytes received by one of g devices for a result of `size` bytes."""
    match kind:
        case "all-reduce":  # a reduce-scatter and an all-gather
            return size * 2 * (g - 1) / g
        case "reduce-scatter":  # the result is one device's part
            return size * (g - 1)
        case "collective-permute":
            return size
        case _:
            return size * (g - 1) / g


def received_between_slices(i: Instruction) -> Collective | None:
    """Read what arrives from other slices, which XLA:TPU sends through the hosts with one `recv` per collective.

    Returns:
        None for a `recv` of another kind.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
    devices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x\{([\d,:]+)\}"', i.attributes)
    if not kind or not devices:
        return None
    slices = _expand_ranges(devices[1])
    places = _expand_ranges(devices[2])
    # Devices of the same place in each slice exchange data.
    groups = tuple(tuple((s - slices[0]) * len(places) + place for s in slices) for place in places)
    result = stated_shapes(i.result)[0]
    collective_kind = kind[1].lower().replace("_", "-").replace("one-to-one", "collective-permute")
    return Collective(
        kind=collective_kind,
        dtype=result.dtype,
        shape=result.dims,
        bytes=_received_bytes(collective_kind, result.bytes, len(slices)),
        groups=groups,
        asynchronous=True,
        hidden_flops=0,
        source="",
    )


def _expand_ranges(text: str) -> list[int]:
    """Expand ranges: `0:3,8` -> 0, 1, 2, 3, 8."""
    numbers: list[int] = []
    for part in text.split(","):
        ends = [int(n) for n in part.split(":")]
        numbers += range(ends[0], ends[-1] + 1)
    return numbers
