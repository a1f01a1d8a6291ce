"""Count what one compiled step sends and computes, from its optimized HLO text, with loops multiplied by their trip counts.

Bytes are those that one device receives (`hlo_collectives`). An asynchronous pair of start and done counts once, and a loop
whose trip count depends on the data counts one trip. Of a conditional, the branch that receives least counts;
`fallback_bytes` is what the most expensive branch would add. A Pallas kernel is opaque, so its own estimate, which is for
the worst case, is kept separately.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

from moe_train.plan.hlo_collectives import COLLECTIVE_KINDS, SCATTER_PREFIX, Collective, collective_of, received_between_slices
from moe_train.plan.hlo_flops import convolution_flops, cublas_flops, dot_flops
from moe_train.plan.hlo_text import Instruction, computations, stated_shapes


@dataclass
class Counts:
    """What one step does on one device."""

    collectives: Counter[Collective] = field(default_factory=Counter)
    """Collectives with the number of times that each runs."""
    flops: float = 0
    """FLOPs of matrix products outside kernels."""
    kernels: Counter[str] = field(default_factory=Counter)
    """Number of calls of each Pallas kernel, by name."""
    kernel_flops: float = 0
    """FLOPs that the kernels estimate for the worst case of their group sizes."""
    fallback_bytes: float = 0
    """Additional bytes received if every conditional takes the branch that receives most."""

    @property
    def bytes(self) -> float:
        """Bytes received through all collectives."""
        return sum(c.bytes * times for c, times in self.collectives.items())

    def add(self, other: Counts, times: int = 1) -> None:
        """Add the counts of a computation that runs `times` times."""
        for collective, n in other.collectives.items():
            self.collectives[collective] += n * times
        for kernel, n in other.kernels.items():
            self.kernels[kernel] += n * times
        self.flops += other.flops * times
        self.kernel_flops += other.kernel_flops * times
        self.fallback_bytes += other.fallback_bytes * times

    def bytes_by(self, attribute: Literal["kind", "dtype"]) -> dict[str, float]:
        """Return received bytes grouped by an attribute of the collectives."""
        totals: dict[str, float] = {}
        for collective, times in self.collectives.items():
            group = getattr(collective, attribute)
            totals[group] = totals.get(group, 0.0) + collective.bytes * times
        return totals


def count_program(text: str) -> Counts:
    """Count what the program of an HLO module does in one run."""
    return _Module(text).counts()


class _Module:
    """The computations of a module, each counted once and cached."""

    def __init__(self, text: str):
        self.computations, self._entry = computations(text)
        self._counted: dict[str, Counts] = {}
        self._largest_constants = {name: self._largest_constant(name) for name in self.computations}

    def counts(self) -> Counts:
        """Count the entry computation."""
        return self.count(self._entry)

    def count(self, name: str) -> Counts:
        """Count one run of a computation, including everything it calls."""
        if name not in self._counted:
            self._counted[name] = _Walk(self, name).counts()
        return self._counted[name]

    def trips(self, loop: Instruction) -> int:
        """Return the trip count of a loop.

        It is the count that XLA states, or else the constant that the condition compares with; 1 if neither is known.
        """
        stated_count = re.search(r"known_trip_count\D*(\d+)", loop.attributes)
        if stated_count:
            return int(stated_count[1])
        return self._largest_constants[loop.called("condition")[0]] or 1

    def _largest_constant(self, name: str) -> int:
        """Return the largest integer constant of a computation and of those it calls; 0 if there is none."""
        largest = 0
        remaining = [name]
        visited = set()
        while remaining:
            current = remaining.pop()
            if current in visited or current not in self.computations:
                continue
            visited.add(current)
            for i in self.computations[current]:
                # A constant's value is printed where other instructions have their operands.
                if i.opcode == "constant" and i.result.startswith(("s32[]", "s64[]", "u32[]")) and i.operands.isdigit():
                    largest = max(largest, int(i.operands))
                remaining += i.called("calls")
        return largest


class _Walk:
    """One pass over the instructions of a computation, in scheduled order."""

    def __init__(self, module: _Module, name: str):
        self._module = module
        self._name = name
        self._shapes = {i.name: stated_shapes(i.result) for i in module.computations[name]}
        self._total = Counts()
        self._started: dict[str, tuple[Counter[Collective], float]] = {}
        """Unfinished collectives by the name of their start instruction, with the FLOPs of all products scheduled before it."""
        self._chains: dict[str, Collective] = {}
        """Collectives that several fusions perform in parts, by the name that the parts share."""

    def counts(self) -> Counts:
        """Count all instructions; collectives whose done never appears are still counted."""
        for i in self._module.computations[self._name]:
            started = self._add(i)
            if started:
                self._started[i.name] = (started, self._flops)
            if i.opcode.endswith("-done"):
                self._finish(i)
        self._total.collectives.update(self._chains.values())
        for collectives, _ in self._started.values():
            self._total.collectives.update(collectives)
        return self._total

    @property
    def _flops(self) -> float:
        return self._total.flops + self._total.kernel_flops

    def _add(self, i: Instruction) -> Counter[Collective]:
        """Count one instruction; returns the collectives that it starts without finishing them."""
        kind = i.opcode.removesuffix("-start")
        match i.opcode:
            case "while":
                self._total.add(self._module.count(i.called("body")[0]), self._module.trips(i))
            case "conditional":
                self._add_conditional(i)
            case "async-start" | "call-start":  # runs on another thread of the device
                return self._add_calls(i)
            case "fusion" | "call":
                flops_before = self._total.flops
                collectives = self._add_calls(i)
                self._add_parts(collectives, self._total.flops - flops_before)
            case "custom-call":
                self._add_custom_call(i)
            case "dot":
                self._total.flops += dot_flops(i, self._shapes)
            case "convolution":
                self._total.flops += convolution_flops(i, self._shapes)
            case _ if kind in (*COLLECTIVE_KINDS, "recv"):
                return self._add_collective(i, kind)
        return Counter()

    def _add_conditional(self, i: Instruction) -> None:
        names = i.called("branch_computations", "true_computation", "false_computation")
        branches = [self._module.count(name) for name in names]
        # The branch with the fewest bytes is taken as the usual one; the others are fallbacks.
        cheapest, *_, costliest = sorted(branches, key=lambda branch: branch.bytes)
        self._total.add(cheapest)
        self._total.fallback_bytes += costliest.bytes - cheapest.bytes

    def _add_calls(self, i: Instruction) -> Counter[Collective]:
        """Count what an instruction calls except its collectives, which are returned."""
        collectives: Counter[Collective] = Counter()
        for name in i.called("calls", "to_apply", "called_computations"):
            part = self._module.count(name)
            self._total.add(replace(part, collectives=Counter()))
            collectives.update(part.collectives)
        return collectives

    def _add_parts(self, collectives: Counter[Collective], flops: float) -> None:
        """Count the collectives of a fusion that computes `flops` FLOPs.

        The fusions that start, continue and end a chain count as one collective.
        """
        for c, times in collectives.items():
            if not c.chain:
                self._total.collectives[c] += times
                continue
            earlier_flops = self._chains[c.chain].hidden_flops if c.chain in self._chains else 0
            # Matrix products of all parts run while the collective is in progress.
            # Without its chain's name it equals the same collective of other chains, with which it is then counted.
            self._chains[c.chain] = replace(c, asynchronous=True, hidden_flops=earlier_flops + flops, chain="")

    def _add_custom_call(self, i: Instruction) -> None:
        for name in i.called("calls", "to_apply", "called_computations"):
            self._total.add(self._module.count(name))
        if "tpu_custom_call" in i.attributes:
            # XLA appends a number to the kernel's name to make it unique.
            self._total.kernels[i.name.rstrip(".0123456789")] += 1
            estimate = re.search(r'"flops":"?(\d+)', i.attributes)
            if estimate:
                self._total.kernel_flops += int(estimate[1])
        elif '"__cublas$' in i.attributes:
            self._total.flops += cublas_flops(i, self._shapes)

    def _add_collective(self, i: Instruction, kind: str) -> Counter[Collective]:
        if kind == "recv":
            collective = received_between_slices(i)
        else:
            collective = collective_of(i, kind, self._shapes, scattered=self._name.startswith(SCATTER_PREFIX))
        if collective is None:
            return Counter()
        if collective.asynchronous:
            return Counter([collective])
        self._total.collectives[collective] += 1
        return Counter()

    def _finish(self, done: Instruction) -> None:
        """Count the collectives that a start began, with the products scheduled between start and done."""
        start = re.search(r"%([\w.\-]+)", done.operands)
        if start is None or start[1] not in self._started:
            return
        collectives, flops = self._started.pop(start[1])
        for c, times in collectives.items():
            self._total.collectives[replace(c, asynchronous=True, hidden_flops=self._flops - flops)] += times
