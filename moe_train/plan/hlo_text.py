"""Parse the text of an HLO module, as XLA prints it, into computations, instructions and the shapes that they state."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_BITS |= {f"s{bits}": bits for bits in (2, 4, 8, 16, 32, 64)}
_BITS |= {f"u{bits}": bits for bits in (2, 4, 8, 16, 32, 64)}
# `pred` is the only dtype without digits.
_SHAPE = re.compile(r"\b([a-z]+[0-9][a-z0-9]*|pred)\[([\d,]*)\]")


class ArrayShape(NamedTuple):
    """The dtype and dims of an array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> float:
        """Size of the array; fractional for types of less than a byte."""
        if self.dtype.startswith("f8"):  # f8e4m3fn and others
            bits = 8
        elif self.dtype.startswith("f4"):
            bits = 4
        else:
            bits = _BITS[self.dtype]
        return math.prod(self.dims) * bits / 8


ShapesByName = dict[str, list[ArrayShape]]
"""Shapes of the result of each instruction of a computation, by its name; a tuple has several."""


class Instruction(NamedTuple):
    """One line of a computation: name = result opcode(operands), attributes."""

    name: str
    result: str
    opcode: str
    operands: str
    attributes: str

    def called(self, *attributes: str) -> list[str]:
        """Return the names of the computations listed under these attributes."""
        matches = re.findall(rf"\b(?:{'|'.join(attributes)})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        names: list[str] = []
        for listed, single in matches:
            names += listed.split(", ") if listed else [single]
        return [name.lstrip("%") for name in names]


def num_instructions(text: str) -> int:
    """Return the number of instructions of a module."""
    return sum(len(instructions) for instructions in computations(text)[0].values())


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Split a module into its computations.

    Returns:
        {computation: its instructions in scheduled order}, and the name of the entry computation.

    Raises:
        ValueError: the text has no ENTRY computation.
    """
    by_name: dict[str, list[Instruction]] = {}
    entry = ""
    current = None
    for line in text.splitlines():
        # Headers of computations begin at the margin.
        # For instance: ENTRY %main.5 (x: f32[8]) -> f32[8] {
        header = None if line.startswith(" ") else re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$", line)
        if header:
            current = by_name.setdefault(header[2], [])
            if header[1]:
                entry = header[2]
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                current.append(instruction)
    if not entry:
        raise ValueError("the text has no ENTRY computation; is it the text of an HLO module?")
    return by_name, entry


def _instruction(line: str) -> Instruction | None:
    """Parse a line; None if it is not an instruction."""
    start = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not start:
        return None
    rest = line[start.end() :]
    # The type of the result is a tuple in brackets, or a single array, whose type has no space.
    end = _closing_bracket(rest) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = re.match(r" ?([\w\-]+)\(", rest[end:])
    if not opcode:
        return None
    opening = end + opcode.end() - 1
    closing = opening + _closing_bracket(rest[opening:])
    return Instruction(start[1], rest[:end], opcode[1], rest[opening + 1 : closing], rest[closing + 1 :])


def _closing_bracket(text: str) -> int:
    """Return the index of the bracket that closes the one `text` starts with."""
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    return len(text)


def stated_shapes(text: str) -> list[ArrayShape]:
    """Return every shape in a part of an instruction's text."""
    return [ArrayShape(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _SHAPE.findall(text)]


def operand_shapes(i: Instruction, known: ShapesByName) -> list[ArrayShape]:
    """Return the shape of each operand, stated in the instruction or by the one that computes it; for a tuple, its first shape."""
    stated = stated_shapes(i.operands)
    if stated:
        return stated
    return [known[name][0] for name in re.findall(r"[\w.\-]+", i.operands) if known.get(name)]


def second_element(result: str) -> str:
    """Return the second element of a tuple's type.

    The start of every collective except an all-reduce returns (operands, results, …).
    """
    depth = 0
    parts = []
    start = 1
    for index, c in enumerate(result):
        depth += (c in "([{") - (c in ")]}")
        if (c == "," and depth == 1) or (c == ")" and depth == 0):
            parts.append(result[start:index])
            start = index + 1
    return parts[1] if len(parts) > 1 else result
