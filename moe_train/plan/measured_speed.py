"""Speed of training as others have measured it, beside the roofline, which no program reaches."""

from __future__ import annotations

from typing import NamedTuple

from moe_train import config
from moe_train.plan.choice import Choice, share_of_peak
from moe_train.plan.topology import Topology


class MeasuredShare(NamedTuple):
    """A model FLOPs utilization that somebody has published."""

    device: str
    """The key of its row in `devices.DEVICES`."""
    is_sparse: bool
    """Whether the model had experts."""
    share: float
    """Model FLOP/s over the peak of the device in bfloat16."""
    source: str
    """The model, the program and where the figure stands."""


_MEASURED = (
    MeasuredShare("h100", True, 468 / 989, "Mixtral 8x7B, Megatron Core 0.9 (its MoE README: 468 TFLOP/s)"),
    MeasuredShare("h100", False, 0.47, "GPT-3 175B, Megatron Core (its README)"),
    MeasuredShare("v5p", False, 0.7147, "a dense 32B on v5p-128, MaxText (its performance page)"),
    MeasuredShare("v5e", False, 0.6110, "a dense 16B on v5e-256, MaxText (its page on v5e)"),
)
"""Published figures, read in November 2026; all are of pretraining in bfloat16."""


class CalibratedSpeed(NamedTuple):
    """The speed of a choice at the share of the peak that others have measured."""

    tokens_per_second: float
    measured: MeasuredShare


def measured_share(model: config.Model, device: str) -> MeasuredShare | None:
    """Return the published share for a device: of a model of the same kind, or else of the other; None if there is none."""
    is_sparse = isinstance(model.ffn, config.MoeFfn)
    rows = [row for row in _MEASURED if row.device == device]
    # False sorts before True, so that a model of the same kind comes first.
    return min(rows, key=lambda row: row.is_sparse != is_sparse, default=None)


def calibrated_speed(choice: Choice, topology: Topology) -> CalibratedSpeed | None:
    """Return the speed of a choice if it reaches the share that others have measured, but never more than the roofline.

    Returns:
        None if nothing is published for the device, or if the run computes in another dtype.
    """
    measured = measured_share(choice.run.model, topology.device)
    if measured is None or choice.run.compute.dtype != "bfloat16":
        return None
    # The roofline's own share shrinks with what binds the step, such as bytes received; measurements were not bound so.
    share = min(measured.share, share_of_peak(choice, topology))
    return CalibratedSpeed(choice.tokens_per_second * share / share_of_peak(choice, topology), measured)
