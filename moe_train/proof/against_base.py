"""Compare merged files with those of the base alone: what they reveal about the adapters without having these.

For a base weight W, the file has round(W + s·A·B). So the difference is, except for rounding, of the adapter's rank or less: a
matrix D that differs from one of rank r by no more than E has at most |E| outside its r largest singular vectors (Eckart and
Young; Frobenius norms). What was not adapted has to be the base's, rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_train import config
from moe_train.machine import progress
from moe_train.model.lora import scale_of_expert
from moe_train.model.paths import ParameterPath
from moe_train.proof import compare, expected, reread
from moe_train.proof.checks import Fault
from moe_train.proof.expected import Part
from moe_train.proof.reread import Stored
from moe_train.weights.on_disk import WeightFiles

CHUNK = 2**22
"""Bytes of a file that are compared at once."""
MORE = 8
"""Extra directions beyond the rank, so that two rounds of the power iteration find the rank's."""


def check(
    layout: expected.Model, stored: Mapping[str, Stored], base: WeightFiles, lora: config.Lora | None, untrained: int
) -> tuple[str, dict[str, Any]]:
    """Compare every matrix of the files with the base's, whatever the base's layout. One matrix is in memory at a time.

    Args:
        layout: layout of the files.
        stored: tensors of the files by name.
        base: the base model.
        lora: the section of the adapters that were merged; None if every matrix has to be the base's.
        untrained: number of matrices whose delta was zero at the export.

    Returns:
        A summary in words and its figures.

    Raises:
        Fault: a matrix cannot be the base's with an adapter; the first such matrix is named.
        ValueError: the base has other shapes.
    """
    base_pieces = {(piece.path, piece.lead): piece for piece in base.pieces}
    same = in_full = 0
    adapted: list[tuple[str, int, float]] = []
    unmoved: list[str] = []
    expected_tensors = expected.model_tensors(layout, base.model)
    compared = progress.counted("comparing with the base", len(expected_tensors), "tensors")
    for tensor in expected_tensors:
        compared(1)
        stored_tensor = stored[tensor.name]
        if stored_tensor.shape != tensor.shape:
            raise Fault(f"{stored_tensor.name} has the shape {stored_tensor.shape}, the base's is {tensor.shape}: another model")
        for i, part in enumerate(tensor.parts):
            piece = base_pieces[part.path, part.lead]
            b_oi = part.form(piece.from_file(base.tensors[piece.name].read))
            label = f"{stored_tensor.name}" + (f"[{i}]" if len(tensor.parts) > 1 else "")
            rank = _rank(lora, part)
            if rank is None:
                in_full += 1
                continue
            change = _change(stored_tensor, i, len(tensor.parts), b_oi.reshape(-1, b_oi.shape[-1]))
            may_hide_delta = rank > 0 and stored_tensor.kind not in compare.MANTISSA  # quantization may hide a small delta
            if change.is_rounding and not may_hide_delta:
                if rank:
                    unmoved.append(label)
                else:
                    same += 1
            elif not rank:
                raise Fault(f"{label} was not adapted, and is not the base's: off by {change.largest:.3g}")
            else:
                outside = change.outside(rank)
                if outside > change.noise:
                    raise Fault(
                        f"{label} less the base's is no change of rank {rank}: {outside:.3g} of {change.norm:.3g} is left, where "
                        f"rounding explains {change.noise:.3g}"
                    )
                adapted.append((label, rank, outside))
    if len(unmoved) > untrained:
        raise Fault(f"{unmoved[0]} is the base's: its delta is gone ({len(unmoved)} such matrices; {untrained} were never trained)")
    summary = f"{same:,} matrices are the base's"
    if lora is not None:
        summary += f"; {len(adapted):,} others less the base's have their adapter's rank"
        if unmoved:
            summary += f"; {len(unmoved):,} never trained"
        if in_full:
            summary += f"; {in_full:,} trained in full"
        summary += ". What A and B were is not seen so: give --adapter or --run"
        if quantized_kinds := sorted({stored_tensor.kind for stored_tensor in stored.values()} - compare.MANTISSA.keys()):
            summary += f", also for deltas of zero in {', '.join(quantized_kinds)}, which are not told from rounding"
    return summary, {
        **{"count": same, "adapted": len(adapted), "untrained": len(unmoved), "trained_in_full": in_full},
        "tolerance": "half a unit in the last place of the file's dtype, all together",
    }


def _rank(lora: config.Lora | None, part: Part) -> int | None:
    """Return the rank of a part's adapter, 0 without one; None if the part was trained in full."""
    if lora is None:
        return 0
    path = ParameterPath.parse(part.path)
    if path.is_trained(lora):
        return None
    routed = len(part.lead) == 2
    targets = lora.targets_of(path.module, routed=routed) if path.leaf == "weight" else []
    if routed:
        return scale_of_expert(lora, targets, part.lead[1])[1]
    return targets[0].rank if targets else 0


@dataclass(frozen=True)
class _Change:
    """The difference between a matrix of the file and the base's."""

    d_oi: np.ndarray
    norm: float
    largest: float
    noise: float
    """Upper bound of the norm of the rounding error."""
    is_rounding: bool
    """Whether rounding explains the whole difference."""

    def outside(self, rank: int) -> float:
        """Return the norm of what no matrix of this rank can explain, or slightly more.

        The largest singular vectors are found by a randomized range finder with two power iterations.
        """
        wide = min(rank + MORE, *self.d_oi.shape)
        q = np.linalg.qr(self.d_oi @ np.random.default_rng(0).normal(size=(self.d_oi.shape[1], wide)).astype(np.float32))[0]
        for _ in range(2):
            q = np.linalg.qr(self.d_oi @ (self.d_oi.T @ q))[0]
        projected = q.T @ self.d_oi
        remaining = np.linalg.svd(projected.astype(np.float64), compute_uv=False)[rank:]
        return float(np.hypot(np.linalg.norm(self.d_oi - q @ projected), np.linalg.norm(remaining)))


def _change(stored: Stored, part: int, parts: int, b_oi: np.ndarray) -> _Change:
    """Measure the difference between part `part` of `parts` of a tensor and the base's matrix, rows at a time."""
    rows = stored.rows // parts
    step = max(1, CHUNK * rows // max(1, stored.nbytes // parts))
    d_oi = np.empty(b_oi.shape, np.float32)
    noise = 0.0
    fits = True
    with stored.file.open("rb") as file:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            right = b_oi[start:stop].astype(np.float64)
            raw = stored.read(file.fileno(), part * rows + start, part * rows + stop)
            written, allowed = compare.decoded(stored.kind, raw, right)
            difference = written - right
            if stored.kind in compare.MANTISSA:
                rounded = np.frombuffer(raw, reread.PLAIN[stored.kind]).reshape(right.shape)
                fits = fits and np.array_equal(rounded, b_oi[start:stop].astype(rounded.dtype))
                _, allowed = compare.decoded(stored.kind, raw, written)
                # Rounding to nearest errs by at most half a unit in the last place.
                allowed = allowed / 2
            else:
                fits = fits and bool(np.all(np.abs(difference) <= allowed))
            noise += float(np.vdot(allowed, allowed))
            d_oi[start:stop] = difference
    norm = float(np.linalg.norm(d_oi))
    return _Change(d_oi, norm, float(np.abs(d_oi).max(initial=0.0)), np.sqrt(noise) + 2.0**-20 * norm, fits)
