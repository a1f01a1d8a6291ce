"""Reading arrays of a checkpoint so that all processes of a job agree on whether they can be used."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train.machine.agreement import exchange


def on_current_mesh(abstract: Any) -> Any:
    """Convert shapes from `jax.eval_shape` to shapes whose shardings name the concrete mesh in force, with its devices."""
    mesh = jax.sharding.get_mesh()

    def concrete(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Return the same shape on the concrete mesh."""
        spec = P() if x.sharding is None else x.sharding.spec  # scalars of the optimizer state have no sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(concrete, abstract)


class ReadOutcome(NamedTuple):
    """What reading the arrays of an item gave in this process."""

    fault: str
    """Why they cannot be read; empty if they were read."""
    sums: list[int]
    """This process's shares of their bit sums."""


def fault_of_any(outcome: ReadOutcome, expected: list[int], item: str) -> str:
    """Return why any process could not read the arrays of an item, or how their bit sums differ; empty if all is well.

    All processes get the same answer, so that they take the same checkpoint, and none waits for another in a collective.
    """
    # JSON turns the named tuple into a list of its fields.
    answers = [ReadOutcome(*json.loads(text)) for text in exchange(json.dumps(outcome), f"on whether {item} can be read")]
    for index, answer in enumerate(answers):
        if answer.fault:
            return answer.fault if len(answers) == 1 else f"{answer.fault} (process {index})"
    # Every process has a share of every array here, since an outcome with a fault has returned above.
    totals = [sum(shares) % 2**32 for shares in zip(*(answer.sums for answer in answers), strict=True)]
    if totals != expected:
        return f"{item} is damaged: the bit sums of its arrays differ from those saved"
    return ""


def short_reason(error: BaseException) -> str:
    """Return the text of an error in one line of about 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= 200:
        return text
    # Long texts name the operating system's reason last, after paths and settings.
    reasons = [reason for reason in _REASONS if reason in text[200:]]
    return f"{text[:200]} … {''.join(reasons)}".rstrip()


_REASONS = ("No space left on device", "Disk quota exceeded", "File too large", "Read-only file system", "Input/output error")
"""Reasons of the operating system for which a save fails."""
