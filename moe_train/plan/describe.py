"""Describe choices in words: their mesh, why they are not the best, and the settings in which they differ from a run."""

from __future__ import annotations

from moe_train import config
from moe_train.machine.devices import GIB
from moe_train.plan.choice import Choice
from moe_train.plan.memory import Memory

PART_NAMES = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "batch": "batch",
    "gradients": "gradients",
    "saved": "saved activations",
    "layer": "the layer at work",
    "loss": "head and logits",
}
"""The parts of `Memory`, as messages call them."""


def describe_mesh(mesh: config.Mesh) -> str:
    """Describe a mesh by its axes of more than one device."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.model_dump().items() if size > 1) or "one device"


def changed_settings(run: config.Run, other: config.Run) -> dict[str, int | str]:
    """Return the settings of mesh, transport, remat and batch that differ in `other`, {key.path: value}."""
    differences: dict[str, int | str] = {}
    for section in ("mesh", "compute", "train"):
        run_settings = getattr(run, section).model_dump()
        other_settings = getattr(other, section).model_dump()
        for key, value in other_settings.items():
            if value != run_settings[key]:
                differences[f"{section}.{key}"] = value
    if run.compute.transport == "auto":  # the same transport, resolved
        differences.pop("compute.transport", None)
    return differences


def explain(choice: Choice, best: Choice) -> str:
    """Explain in a few words why `choice` is not the best one; bytes are those received per token."""
    if choice.refused is not None:
        return f"the compiler refuses it: {choice.refused}"
    if not choice.fits:
        return f"does not fit: {_gib(choice.bytes_per_device)} of {_gib(choice.limit)} GiB, {_largest_part(choice.memory)}"
    slower = best.tokens_per_second / choice.tokens_per_second - 1
    ratio = choice.received / choice.tokens / max(best.received / best.tokens, 1e-9)
    # Half a percent would be printed as 0%. A choice can be faster than the best one if choices are ranked by bytes.
    if slower < -0.005:
        return f"{-slower:.0%} faster, {ratio:.2f} x the bytes"
    if slower < 0.005:
        return f"as fast, {ratio:.2f} x the bytes"
    return f"{slower:.0%} slower, {ratio:.2f} x the bytes"


def _largest_part(memory: Memory) -> str:
    name, size = max(memory._asdict().items(), key=lambda part: part[1])
    return f"{_gib(size)} of it {PART_NAMES[name]}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
