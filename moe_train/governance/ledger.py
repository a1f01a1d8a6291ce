"""What a training took: floating-point operations that are counted, hours, and energy from a stated power."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moe_train.governance.compute import training_flops
from moe_train.governance.descriptions import machines
from moe_train.governance.lineage import Training
from moe_train.governance.markdown import TODO, mapping_table
from moe_train.machine.files import JsonObject

FALLBACK_FLOPS = 1e23 / 3
"""A third of 10^23 FLOP: the figure that counts where the training compute of the original model is not known."""


class StatedFigures(NamedTuple):
    """Figures that no record has, as a person states them."""

    base_flops: float | None = None
    """Training compute of the external base, in FLOP."""
    power_watts: float | None = None
    """Mean power of one device while it trained, in watts, cooling and hosts included if they are meant to count."""


NOTHING_STATED = StatedFigures()
"""No figure is stated."""


class Ledger(NamedTuple):
    """The compute and energy of a training."""

    flops: float
    """Model FLOPs of this training."""
    flops_before: float
    """Model FLOPs of the trainings that made its base, as far as their runs are here."""
    base_flops: float | None
    """Training compute of the external base, as stated; None if it is not."""
    has_external_base: bool
    devices: int | None
    """Number of devices; None if no start is recorded, or if it changed."""
    hours: float | None
    power_watts: float | None
    energy_kwh: float | None
    """Devices times hours times stated power; None if one of them is not known."""

    def to_json(self) -> JsonObject:
        """Return the ledger as `provenance.json` states it."""
        return {**self._asdict(), "third_of_base_flops": _third(self)}


def ledger_of(trainings: Sequence[Training], stated: StatedFigures) -> Ledger:
    """Return the ledger of the first of several trainings, of which each next one made the base of the one before."""
    training = trainings[0]
    counts = {session.get("hardware", {}).get("devices") for session in training.sessions}
    devices = counts.pop() if len(counts) == 1 else None
    hours = None if training.seconds is None else training.seconds / 3600
    energy = None
    if stated.power_watts is not None and devices is not None and hours is not None:
        energy = stated.power_watts * devices * hours / 1000
    before = sum(training_flops(earlier) for earlier in trainings[1:])
    is_external = trainings[-1].base is not None
    return Ledger(training_flops(training), before, stated.base_flops, is_external, devices, hours, stated.power_watts, energy)


def _third(ledger: Ledger) -> float | None:
    """Return a third of the training compute of the base; None if it was trained from random weights here, or is not known."""
    if ledger.base_flops is None:
        return None
    return (ledger.base_flops + ledger.flops_before) / 3


def ledger_page(training: Training, ledger: Ledger) -> str:
    """Return the ledger as a page."""
    length = training.run.train
    rows = {
        "model FLOPs": f"{ledger.flops:.3g}, counted: forward and backward pass of {training.step:,} steps of {length.batch_size} "
        f"rows of {length.seq_len:,} positions, padding and forward passes of a reference model included, recomputation excluded",
        "hardware": "; ".join(machines(training)) or f"{TODO}: no start of the run is recorded",
        "time": f"{ledger.hours:.4g} hours" if ledger.hours is not None else f"{TODO}: the run was killed, or went on afterwards",
        "power of a device": f"{ledger.power_watts:g} W, stated with --power" if ledger.power_watts else f"{TODO}: not measured",
        "energy": _energy(ledger),
    }
    sections = ["# Compute and energy", mapping_table(rows), "## Beside the base", mapping_table(_base_rows(ledger))]
    return "\n\n".join(sections) + "\n"


def _energy(ledger: Ledger) -> str:
    if ledger.energy_kwh is None:
        return f"{TODO}: measure it, or state the mean power of a device with --power"
    return f"{ledger.energy_kwh:.4g} kWh: {ledger.power_watts:g} W × {ledger.devices} devices × {ledger.hours:.4g} hours"


def _base_rows(ledger: Ledger) -> dict[str, str]:
    """Return what is known of the training compute of the base, as facts and without advice."""
    rows: dict[str, str] = {}
    if ledger.flops_before:
        rows["earlier trainings here"] = f"{ledger.flops_before:.3g} FLOP, counted"
    if not ledger.has_external_base:
        rows["external base"] = "none: training started from random weights"
        return rows
    third = _third(ledger)
    if third is None:
        rows["external base"] = f"{TODO}: its training compute; state it with --base-flops"
        rows["a third of 10^23 FLOP"] = (
            f"{FALLBACK_FLOPS:.3g} FLOP; this training is {ledger.flops / FALLBACK_FLOPS:.3g} times that"
        )
        return rows
    rows["external base"] = f"{ledger.base_flops:.3g} FLOP, stated with --base-flops"
    rows["a third of the base"] = f"{third:.3g} FLOP"
    rows["this training, as a share of the base"] = f"{ledger.flops / (3 * third):.3g}"
    rows["is it more than a third"] = "yes" if ledger.flops > third else "no"
    return rows
