"""What one compiled step sends and computes, read off its optimized HLO text, loops multiplied by their trip counts.

Bytes are those that one device receives, with g devices in a group: (g-1)/g of the result of an all-gather, (g-1)/g of
the operand of a reduce-scatter, twice that of an all-reduce, (g-1)/g of an all-to-all, the operand of a permute. Of a
ragged all-to-all the smaller side counts: the other is a buffer for the worst case. An asynchronous pair counts once,
and a loop whose trip count only the data tells counts one trip. Of a conditional the branch that receives least counts;
what the other would add is `fallback_bytes`.

XLA:TPU writes a reduce-scatter as a fusion named all-reduce-scatter, what crosses slices as messages of the hosts, and a
matrix product as a convolution, of which the taps that meet the operand count. A Pallas kernel is opaque: its own
estimate, of the worst case, is kept apart.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128} | {
    f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)
}
_SCATTER = "all-reduce-scatter"
_SHAPE = re.compile(r"\b([a-z]+[0-9][a-z0-9]*|pred)\[([\d,]*)\]")

Groups = tuple[tuple[int, ...], ...]
"""Devices, by their place in the mesh, that send to each other."""


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> float:
        bits = 8 if self.dtype.startswith("f8") else 4 if self.dtype.startswith("f4") else _BITS[self.dtype]
        return math.prod(self.dims) * bits / 8


@dataclass(frozen=True)
class Collective:
    """One instruction, whatever number of times it runs."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    """Of its (first) result on one device."""
    bytes: float
    """That one device receives each time."""
    groups: Groups
    asynchronous: bool
    """A pair of start and done; other work may run between them."""
    hidden_flops: float
    """Matrix products of what is scheduled between start and done."""
    source: str
    """The operation of the program that it comes from, as JAX names it."""
    chain: str = ""
    """Inside a fusion that does a part of it beside other work: the name that all its parts share."""


@dataclass
class Counts:
    """Of one step on one device."""

    collectives: Counter[Collective] = field(default_factory=Counter)
    """Each with the number of times that it runs."""
    flops: float = 0
    """Of matrix products."""
    kernels: Counter[str] = field(default_factory=Counter)
    """Calls of Pallas kernels, by name."""
    kernel_flops: float = 0
    """What these estimate for the worst case of their group sizes."""
    fallback_bytes: float = 0

    @property
    def bytes(self) -> float:
        return sum(c.bytes * times for c, times in self.collectives.items())

    def add(self, other: Counts, times: int = 1) -> None:
        for collective, n in other.collectives.items():
            self.collectives[collective] += n * times
        for kernel, n in other.kernels.items():
            self.kernels[kernel] += n * times
        self.flops += other.flops * times
        self.kernel_flops += other.kernel_flops * times
        self.fallback_bytes += other.fallback_bytes * times

    def bytes_by(self, of: str) -> dict[str, float]:
        """Received bytes for each `kind` or `dtype` of the collectives."""
        found: Counter[str] = Counter()
        for collective, times in self.collectives.items():
            found[getattr(collective, of)] += collective.bytes * times  # type: ignore[assignment]
        return dict(found)


class Instruction(NamedTuple):
    name: str
    result: str
    opcode: str
    operands: str
    attributes: str

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations under these attributes."""
        found = re.findall(rf"\b(?:{'|'.join(attributes)})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        return [name.lstrip("%") for several, one in found for name in (several.split(", ") if several else [one])]


def read(text: str) -> Counts:
    """What the program of an HLO module does in one run."""
    return _Module(text).counts()


def size(text: str) -> int:
    """Number of instructions of a module."""
    return sum(len(instructions) for instructions in _computations(text)[0].values())


def axes_of(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a group's devices lie; mesh: {axis: size}, the last axis being the fastest."""
    shape = tuple(mesh.values())
    places = np.stack(np.unravel_index(np.array(groups[0]), shape))
    return tuple(axis for axis, along in zip(mesh, places, strict=True) if len(set(along.tolist())) > 1)


class _Module:
    def __init__(self, text: str):
        self._computations, self._entry = _computations(text)
        self._known: dict[str, Counts] = {}
        self._scalars = {name: self._largest_constant(name) for name in self._computations}

    def counts(self) -> Counts:
        return self._of(self._entry)

    def _of(self, name: str) -> Counts:
        if name not in self._known:
            self._known[name] = self._count(name)
        return self._known[name]

    def _count(self, name: str) -> Counts:
        total = Counts()
        shapes = {i.name: _shapes(i.result) for i in self._computations[name]}
        flops_until = [0.0]
        started: dict[str, tuple[Counter[Collective], int]] = {}  # by the name of the start: what, and where
        chains: dict[str, Collective] = {}
        for at, i in enumerate(self._computations[name]):
            before = total.flops + total.kernel_flops
            if i.opcode == "while":
                total.add(self._of(i.called("body")[0]), self._trips(i))
            elif i.opcode == "conditional":
                branches = [self._of(n) for n in i.called("branch_computations", "true_computation", "false_computation")]
                least, *_, most = sorted(branches, key=lambda b: b.bytes)
                total.add(least)
                total.fallback_bytes += most.bytes - least.bytes
            elif i.opcode in ("fusion", "call", "async-start", "call-start"):
                for n in i.called("calls", "to_apply", "called_computations"):
                    part = self._of(n)
                    if i.opcode.endswith("-start"):  # on another thread of the device
                        started[i.name] = (part.collectives, at)
                        part = replace(part, collectives=Counter())
                    total.add(part)
                    for c in [c for c in part.collectives if c.chain]:  # the start, the steps and the end are one collective
                        total.collectives.pop(c)
                        hidden = part.flops + (chains[c.chain].hidden_flops if c.chain in chains else 0)
                        chains[c.chain] = replace(c, asynchronous=True, hidden_flops=hidden, chain="")
            elif i.opcode == "custom-call":
                self._count_custom_call(i, shapes, total)
            elif i.opcode == "dot":
                total.flops += _dot_flops(i, shapes)
            elif i.opcode == "convolution":
                total.flops += _convolution_flops(i, shapes)
            elif (kind := i.opcode.removesuffix("-start")) in (*KINDS, "recv"):
                collective = _between_slices(i) if kind == "recv" else _collective(i, kind, shapes, name.startswith(_SCATTER))
                if collective is not None and collective.asynchronous:
                    started[i.name] = (Counter([collective]), at)
                elif collective is not None:
                    total.collectives[collective] += 1
            flops_until.append(flops_until[-1] + total.flops + total.kernel_flops - before)
            if i.opcode.endswith("-done"):
                first = re.findall(r"%([\w.\-]+)", i.operands)
                if first and first[0] in started:
                    those, since = started.pop(first[0])
                    hidden = flops_until[at] - flops_until[since + 1]
                    for c, times in those.items():
                        total.collectives[replace(c, asynchronous=True, hidden_flops=hidden)] += times
        for those in (Counter(chains.values()), *(those for those, _ in started.values())):
            total.collectives.update(those)
        return total

    def _count_custom_call(self, i: Instruction, shapes: dict[str, list[Shape]], total: Counts) -> None:
        for n in i.called("calls", "to_apply", "called_computations"):
            total.add(self._of(n))
        if "tpu_custom_call" in i.attributes:
            total.kernels[i.name.rstrip(".0123456789")] += 1
            if estimate := re.search(r'"flops":"?(\d+)', i.attributes):
                total.kernel_flops += int(estimate[1])
        elif '"__cublas$' in i.attributes and (dims := re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)):
            lhs = _operands(i, shapes)[0]
            depth = math.prod(lhs.dims[int(d.strip('"'))] for d in dims[1].split(",") if d)
            total.flops += 2 * math.prod(_shapes(i.result)[0].dims) * depth

    def _trips(self, loop: Instruction) -> int:
        """As XLA states them, or the constant that the condition compares with; 1 where it is not known."""
        if known := re.search(r"known_trip_count\D*(\d+)", loop.attributes):
            return int(known[1])
        return self._scalars[loop.called("condition")[0]] or 1

    def _largest_constant(self, name: str) -> int:
        largest, todo, seen = 0, [name], set()
        while todo:
            now = todo.pop()
            if now in seen or now not in self._computations:
                continue
            seen.add(now)
            for i in self._computations[now]:
                if i.opcode == "constant" and i.result.startswith(("s32[]", "s64[]", "u32[]")) and i.operands.isdigit():
                    largest = max(largest, int(i.operands))
                todo += i.called("calls")
        return largest


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """{computation: its instructions, as scheduled}, and the name of the entry."""
    found: dict[str, list[Instruction]] = {}
    entry, now = "", None
    for line in text.splitlines():
        if not line.startswith(" ") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$", line)):
            now = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif now is not None and (instruction := _instruction(line)):
            now.append(instruction)
    if not entry:
        raise ValueError("the text has no ENTRY computation; is it the text of an HLO module?")
    return found, entry


def _instruction(line: str) -> Instruction | None:
    start = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not start:
        return None
    rest = line[start.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = re.match(r" ?([\w\-]+)\(", rest[end:])
    if not opcode:
        return None
    at = end + opcode.end() - 1
    close = at + _closing(rest[at:])
    return Instruction(start[1], rest[:end], opcode[1], rest[at + 1 : close], rest[close + 1 :])


def _closing(text: str) -> int:
    """Where the bracket closes that `text` starts with."""
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    return len(text)


def _shapes(text: str) -> list[Shape]:
    return [Shape(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _SHAPE.findall(text)]


def _operands(i: Instruction, shapes: dict[str, list[Shape]]) -> list[Shape]:
    """One shape an operand (of a tuple its first), stated with it or by the instruction that makes it."""
    stated = _shapes(i.operands)
    if stated:
        return stated
    return [shapes[name][0] for name in re.findall(r"[\w.\-]+", i.operands) if shapes.get(name)]


def _collective(i: Instruction, kind: str, shapes: dict[str, list[Shape]], scattered: bool) -> Collective | None:
    """None where a group is one device. scattered: an all-reduce inside a computation that keeps a part of it alone."""
    asynchronous = i.opcode.endswith("-start")
    results = _shapes(_second(i.result) if asynchronous and kind != "all-reduce" else i.result)
    size = sum(s.bytes for s in results)
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", i.attributes.split("source_target_pairs=")[1].split("}}")[0] + "}")
        groups: Groups = tuple((int(a), int(b)) for a, b in pairs if a != b)
        if not groups:  # everything stays where it is
            return None
    else:
        groups = _groups(i.attributes)
        if len(groups[0]) == 1:
            return None
    if kind == "ragged-all-to-all":
        size = min(size, _operands(i, shapes)[0].bytes)
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


def _between_slices(i: Instruction) -> Collective | None:
    """What arrives from other slices, to which XLA:TPU goes through the hosts: one such receipt a collective."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
    devices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x\{([\d,:]+)\}"', i.attributes)
    if not kind or not devices:
        return None
    slices, places = (_numbers(text) for text in devices.groups())
    groups = tuple(tuple((s - slices[0]) * len(places) + place for s in slices) for place in places)
    result = _shapes(i.result)[0]
    of = kind[1].lower().replace("_", "-").replace("one-to-one", "collective-permute")
    return Collective(of, result.dtype, result.dims, _received(of, result.bytes, len(slices)), groups, True, 0, "")


def _numbers(text: str) -> list[int]:
    """`0:3,8` -> 0, 1, 2, 3, 8."""
    ends = ([int(n) for n in part.split(":")] for part in text.split(","))
    return [n for end in ends for n in range(end[0], end[-1] + 1)]


def _second(result: str) -> str:
    """The second element of a tuple's type: the start of all but an all-reduce returns (operands, results, …)."""
    depth, parts, start = 0, [], 1
    for at, c in enumerate(result):
        depth += (c in "([{") - (c in ")]}")
        if (c == "," and depth == 1) or (c == ")" and depth == 0):
            parts.append(result[start:at])
            start = at + 1
    return parts[1] if len(parts) > 1 else result


def _groups(attributes: str) -> Groups:
    stated = re.search(r"replica_groups=(.*?)(?:, (?!device_ids)\w+=|$)", attributes)
    assert stated, attributes
    return _read_groups(stated[1])


@cache
def _read_groups(text: str) -> Groups:
    """Lists, a reshaped and transposed iota, or axes of a mesh."""
    if text.startswith("mesh"):
        return _groups_of_mesh(text)
    if "<=" in text:
        shape, of = text.split("<=")
        return _tuples(_iota(of).reshape([int(n) for n in re.findall(r"\d+", shape)]))
    return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text))


def _groups_of_mesh(text: str) -> Groups:
    """`mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`: along b, the devices in the order of that iota where one is given."""
    stated = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? ?\{(.*?)\}", text)
    assert stated, text
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", stated[1])}
    names, chosen = list(sizes), re.findall(r"'(\w+)'", stated[3])
    assert set(chosen) <= set(names), text
    ids = _iota(stated[2] or f"[{math.prod(sizes.values())}]").reshape(list(sizes.values()))
    order = [name for name in names if name not in chosen] + chosen
    return _tuples(ids.transpose([names.index(name) for name in order]).reshape(-1, math.prod(sizes[name] for name in chosen)))


def _iota(text: str) -> np.ndarray:
    """`[8,4]T(1,0)`: 0, 1, 2, … in that shape, transposed."""
    shape, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text.strip()).groups()  # type: ignore[union-attr]
    ids = np.arange(math.prod(int(n) for n in shape.split(","))).reshape([int(n) for n in shape.split(",")])
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _tuples(rows: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in rows.tolist())


def _dot_flops(i: Instruction, shapes: dict[str, list[Shape]]) -> float:
    lhs = _operands(i, shapes)[0]
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    depth = math.prod(lhs.dims[int(d)] for d in dims[1].split(",") if d) if dims else 1
    return 2 * math.prod(_shapes(i.result)[0].dims) * depth


def _convolution_flops(i: Instruction, shapes: dict[str, list[Shape]]) -> float:
    """Two for each pair of a kernel's tap and an entry of the operand that meet, over all channels."""
    lhs, rhs = _operands(i, shapes)[:2]
    (out,) = _shapes(i.result)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels, i
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    stated = dict(part.split("=") for part in window[1].split()) if window else {}
    flops = 2 * out.dims[labels[3].index("b")] * out.dims[labels[3].index("f")] * rhs.dims[labels[2].index("i")]
    spatial = sorted(c for c in labels[1] if c.isdigit())
    for n, label in enumerate(spatial):
        entry = lambda key, default, n=n: stated[key].split("x")[n] if key in stated else default  # noqa: E731
        low = int(entry("pad", "0_0").split("_")[0])
        flops *= _meetings(
            lhs.dims[labels[1].index(label)],
            out.dims[labels[3].index(label)],
            int(entry("size", "1")),
            int(entry("stride", "1")),
            int(entry("lhs_dilate", "1")),
            int(entry("rhs_dilate", "1")),
            low,
        )
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    return flops / (int(groups[1]) if groups else 1)


@cache
def _meetings(inputs: int, outputs: int, taps: int, stride: int, lhs_dilate: int, rhs_dilate: int, pad: int) -> int:
    """Pairs (output, tap) along one spatial dim whose input exists: not padding, not a hole of the dilation."""
    met = 0
    at = np.arange(outputs) * stride - pad
    for tap in range(taps):
        place = at + tap * rhs_dilate
        met += int(np.sum((place >= 0) & (place % lhs_dilate == 0) & (place // lhs_dilate < inputs)))
    return met
