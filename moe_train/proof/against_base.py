"""Compare merged files with those of the base alone: what they reveal about the adapters without having these.

For a base weight W, the file has round(W + s·A·B). So the difference is, except for rounding, of the adapter's rank or less: a
matrix D that differs from one of rank r by no more than E has at most |E| outside its r largest singular vectors (Eckart and
Young; Frobenius norms). A matrix that was not adapted must be the base's, rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_train import config
from moe_train.machine import progress
from moe_train.model.lora import scale_of_expert
from moe_train.model.paths import ParameterPath
from moe_train.proof import fp8, reread
from moe_train.proof.checks import Fault, Finding, MetricValue
from moe_train.proof.expected_tensor import ExpectedTensor, Part
from moe_train.proof.reread import Stored
from moe_train.proof.rounding import MANTISSA, decode_with_tolerance
from moe_train.weights.on_disk import WeightFiles
from moe_train.weights.wrappers import encoders

BASE_CHUNK_BYTES = 2**22
"""Bytes of a file that are compared at once."""
EXTRA_DIRECTIONS = 8
"""Directions beyond the rank with which two rounds of the power iteration find the rank's."""


@dataclass
class _Tally:
    """What has been found in the matrices compared so far."""

    unchanged: int = 0
    """Matrices without an adapter that are the base's."""
    trained_in_full: int = 0
    """Matrices of which nothing can be said, since they were trained in full."""
    adapted: int = 0
    """Matrices whose difference has their adapter's rank."""
    without_delta: list[str] = field(default_factory=list)
    """Names of matrices that have an adapter and yet are the base's."""


def compare_with_base(
    expected_tensors: Sequence[ExpectedTensor],
    stored: Mapping[str, Stored],
    base: WeightFiles,
    lora: config.Lora | None,
    untrained: int,
) -> Finding:
    """Compare every matrix of the files with the base's, whatever the base's layout. One matrix is in memory at a time.

    Args:
        expected_tensors: the tensors of the text model, and of a tower those with adapters, in the layout of the files.
        stored: tensors of the files by name.
        base: the base model.
        lora: the section of the adapters that were merged; None if every matrix must be the base's.
        untrained: number of matrices whose delta was zero at the export.

    Raises:
        Fault: a matrix cannot be the base's with an adapter; the first such matrix is named.
        ValueError: the base has other shapes.
    """
    pieces = list(base.pieces)
    tensors = dict(base.tensors)
    if base.carried is not None and encoders.is_computed(base.carried):
        pieces += encoders.pieces_of(base.carried, base.model)
        tensors |= base.carried.tensors
    base_pieces = {(piece.path, piece.lead): piece for piece in pieces}
    tally = _Tally()
    report_tensors = progress.counted("comparing with the base", len(expected_tensors), "tensors")
    for tensor in expected_tensors:
        report_tensors(1)
        stored_tensor = stored[tensor.name]
        if stored_tensor.shape != tensor.shape:
            raise Fault(
                f"{stored_tensor.name} has the shape {stored_tensor.shape}, but {tensor.shape} in the base; give the base that "
                "the export was made from"
            )
        for i, part in enumerate(tensor.parts):
            rank = _rank(lora, part)
            if rank is None:
                tally.trained_in_full += 1
                continue
            piece = base_pieces[part.path, part.lead]
            # From the base's layout to the model's, and from there to the layout of the export, which may be another one.
            b_oi = part.to_file(piece.from_file(tensors[piece.name].read))
            name = f"{stored_tensor.name}[{i}]" if len(tensor.parts) > 1 else stored_tensor.name
            change = _change(stored_tensor, i, len(tensor.parts), b_oi.reshape(-1, b_oi.shape[-1]))
            _judge(name, stored_tensor.kind, change, rank, tally)
    if len(tally.without_delta) > untrained:
        raise Fault(
            f"{tally.without_delta[0]} is the base's: its delta is gone ({len(tally.without_delta)} such matrices; {untrained} "
            "were never trained)"
        )
    metrics: dict[str, MetricValue] = {
        "count": tally.unchanged,
        "adapted": tally.adapted,
        "untrained": len(tally.without_delta),
        "trained_in_full": tally.trained_in_full,
        "tolerance": "half a unit in the last place of the file's dtype, all together",
    }
    return Finding(_summary(tally, stored, lora), metrics)


def _judge(name: str, kind: str, change: _Change, rank: int, tally: _Tally) -> None:
    """Count a matrix, or raise Fault if its difference is neither rounding nor of its adapter's rank."""
    may_hide_delta = rank > 0 and kind not in MANTISSA  # quantization may hide a small delta
    if change.is_rounding and not may_hide_delta:
        if rank:
            tally.without_delta.append(name)
        else:
            tally.unchanged += 1
        return
    if not rank:
        raise Fault(f"{name} was not adapted, and is not the base's: off by {change.largest:.3g}")
    outside = change.outside(rank)
    if outside > change.noise:
        raise Fault(
            f"the difference between {name} and the base's is not of rank {rank}: {outside:.3g} of {change.norm:.3g} is left, "
            f"of which rounding explains {change.noise:.3g}"
        )
    tally.adapted += 1


def _summary(tally: _Tally, stored: Mapping[str, Stored], lora: config.Lora | None) -> str:
    summary = f"{tally.unchanged:,} matrices are the base's"
    if lora is None:
        return summary
    summary += f"; {tally.adapted:,} others differ from the base's by their adapter's rank"
    if tally.without_delta:
        summary += f"; {len(tally.without_delta):,} never trained"
    if tally.trained_in_full:
        summary += f"; {tally.trained_in_full:,} trained in full"
    summary += ". This does not show what A and B were: give --adapter or --run"
    quantized_kinds = sorted({tensor.kind for tensor in stored.values()} - MANTISSA.keys())
    if quantized_kinds:
        summary += f", also because a missing delta cannot be distinguished from rounding in {', '.join(quantized_kinds)}"
    return summary


def _rank(lora: config.Lora | None, part: Part) -> int | None:
    """Return the rank of a part's adapter, 0 without one; None if the part was trained in full."""
    if lora is None:
        return 0
    path = ParameterPath.parse(part.path)
    if path.is_trained(lora):
        return None
    if path.is_tower and part.mixes_factors:  # rows of a kernel are no outputs, so the rank of its change says nothing
        return None
    routed = len(part.lead) == 2
    if path.leaf != "weight":  # norms and biases have no adapters
        return 0
    targets = lora.targets_of(path.module, routed=routed)
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
        num_directions = min(rank + EXTRA_DIRECTIONS, *self.d_oi.shape)
        random = np.random.default_rng(0).normal(size=(self.d_oi.shape[1], num_directions)).astype(np.float32)
        q = np.linalg.qr(self.d_oi @ random)[0]
        for _ in range(2):
            q = np.linalg.qr(self.d_oi @ (self.d_oi.T @ q))[0]
        projected = q.T @ self.d_oi
        remaining = np.linalg.svd(projected.astype(np.float64), compute_uv=False)[rank:]
        # What lies outside of q and what lies inside but past the rank are orthogonal, so their squares add up.
        return float(np.hypot(np.linalg.norm(self.d_oi - q @ projected), np.linalg.norm(remaining)))


def _change(stored: Stored, i: int, parts: int, b_oi: np.ndarray) -> _Change:
    """Measure the difference between part i of `parts` of a tensor and the base's matrix, rows at a time."""
    rows = stored.rows // parts
    step = max(1, BASE_CHUNK_BYTES * rows // max(1, stored.nbytes // parts))
    d_oi = np.empty(b_oi.shape, np.float32)
    squared_noise = 0.0
    is_rounding = True
    with stored.file.open("rb") as file:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            base_chunk = b_oi[start:stop].astype(np.float64)
            raw = stored.read(file.fileno(), i * rows + start, i * rows + stop)
            scales = None
            if stored.scales is not None:
                scales = fp8.scales_of_rows(fp8.read_scales(stored), start, stop, base_chunk.shape[1])
            written, allowed = decode_with_tolerance(stored.kind, raw, base_chunk, scales)
            difference = written - base_chunk
            if stored.kind in MANTISSA:
                stored_chunk = np.frombuffer(raw, reread.FLOAT_DTYPES[stored.kind]).reshape(base_chunk.shape)
                is_rounding = is_rounding and np.array_equal(stored_chunk, b_oi[start:stop].astype(stored_chunk.dtype))
                # The tolerance is that of the sum, which is near what was written and may be far from the base.
                _, allowed = decode_with_tolerance(stored.kind, raw, written)
                # Rounding to nearest errs by at most half a unit in the last place.
                allowed = allowed / 2
            else:
                is_rounding = is_rounding and bool(np.all(np.abs(difference) <= allowed))
            squared_noise += float(np.vdot(allowed, allowed))
            d_oi[start:stop] = difference
    norm = float(np.linalg.norm(d_oi))
    # The difference itself is kept in float32, which rounds it again.
    noise = np.sqrt(squared_noise) + 2.0**-20 * norm
    return _Change(d_oi, norm, float(np.abs(d_oi).max(initial=0.0)), noise, is_rounding)
