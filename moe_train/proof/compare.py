"""Compare tensors of files with the weights in memory: bit by bit, or, with adapters merged, within one rounding.

The files are read by `reread` and laid out by `expected`; one chunk of rows is compared at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_train import config
from moe_train.machine import progress
from moe_train.model.paths import ParameterPath
from moe_train.proof import expected, reread
from moe_train.proof.checks import Fault, NotChecked
from moe_train.proof.expected import Part, Wanted
from moe_train.proof.reread import Q8_0, Stored
from moe_train.weights import together
from moe_train.weights.arrays import LazyParameters, fetch_entry
from moe_train.weights.merge import scale_of
from moe_train.weights.strided import contiguous

CHUNK = 2**18
"""Bytes of a file that are compared at once."""
BESIDE = 2**27
"""Bytes of weights that are on the host at a time, unless a single matrix is larger."""
MANTISSA = {"F32": 23, "F16": 10, "BF16": 7}
"""Explicit mantissa bits of each dtype."""
SMALLEST = {"F32": -126, "F16": -14, "BF16": -126}
"""Exponent of the smallest normal number of each dtype."""
EXPONENT = np.uint64(0x7FF << 52)
"""Mask of the exponent bits of a float64."""


class Grid(NamedTuple):
    """Upper bound of the rounding error of numbers that llama.cpp has quantized to few bits."""

    block: int
    """Numbers that share scales."""
    share: float
    """Maximum error as a share of the largest number of a block.

    If a scale is computed from the extremes of its numbers, this follows from the number of levels; otherwise it is a quarter more
    than the largest error found for numbers of fifteen distributions.
    """
    levels: int
    """Additional error in units of the rounding of the smallest half-precision scale."""


GRIDS = {
    **{"Q4_0": Grid(32, 1 / 8, 8), "Q4_1": Grid(32, 1 / 15, 16), "Q5_0": Grid(32, 1 / 16, 16), "Q5_1": Grid(32, 1 / 31, 32)},
    **{"Q2_K": Grid(256, 0.5, 60), "Q3_K": Grid(256, 0.34, 128), "Q4_K": Grid(256, 0.15, 1008), "Q5_K": Grid(256, 0.075, 2016)},
    **{"Q6_K": Grid(256, 0.025, 4096), "IQ4_NL": Grid(32, 0.16, 127), "IQ4_XS": Grid(256, 0.17, 4064)},
}
FOUND = 8.0
"""A delta must be visible in the file if its norm is this many times what the rounding has in its direction by chance."""


class Merged(NamedTuple):
    """What happened to the delta of one matrix."""

    module: str
    lead: tuple[int, ...]
    wanted: float
    """Sum of the squares of the delta."""
    kept: float
    """Inner product of the delta and what changed in the file."""
    lost: bool
    """Whether the delta is lost.

    A non-zero delta is lost if not one number of the file differs from the base's, or, in a quantized file, if the file's change
    does not go in the delta's direction.
    """


class Examined(NamedTuple):
    """The result for one tensor of the files."""

    sha256: str
    fault: str | None
    """What is wrong with the tensor; None if it is right."""
    merged: tuple[Merged, ...]


class Tensors(NamedTuple):
    """The results for all tensors."""

    stored: Mapping[str, Stored]
    examined: Mapping[str, Examined]

    def raise_faults(self) -> None:
        """Raise Fault with the first fault and the number of others, if there is one."""
        if faults := [result.fault for result in self.examined.values() if result.fault]:
            raise Fault(faults[0] + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""))


def kind_of(layout: expected.Model, wanted: Wanted, dtype: str) -> str | None:
    """Return how a file of `dtype` stores a tensor; None if llama.cpp's own tool decides."""
    code = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
    kind = code.get(dtype.lower())
    if layout != "gguf":
        return kind
    if len(wanted.shape) == 1 or wanted.name.endswith("ffn_gate_inp.weight"):
        return "F32"
    return "F16" if kind == "Q8_0" and wanted.shape[-1] % 32 else kind


def check_names(stored: Mapping[str, Stored], wanted: Sequence[Wanted], kinds: Mapping[str, str | None]) -> None:
    """Raise Fault unless every wanted tensor is there, with its shape and kind, and nothing else.

    Args:
        stored: tensors of the files by name.
        wanted: tensors that have to be there.
        kinds: how each is stored; None for any kind.
    """
    names = {w.name for w in wanted}
    faults = [f"{name} is missing" for name in names - set(stored)]
    faults += [f"{name} in {stored[name].file.name} does not belong there" for name in set(stored) - names]
    for w in wanted:
        if w.name in stored:
            stored_tensor = stored[w.name]
            if stored_tensor.shape != w.shape:
                faults.append(f"{w.name} has the shape {stored_tensor.shape}, not {w.shape}")
            if kinds[w.name] not in (stored_tensor.kind, None):
                faults.append(f"{w.name} is {stored_tensor.kind}, not {kinds[w.name]}")
    if faults:
        raise Fault(min(faults) + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""))


def examine(
    stored: Mapping[str, Stored],
    wanted: Sequence[Wanted],
    parameters: LazyParameters | None,
    lora: config.Lora | None,
) -> Tensors:
    """Hash every tensor and compare it with the weights in memory.

    Args:
        stored: tensors of the files by name.
        wanted: tensors to examine.
        parameters: weights by path, of which several processes may hold parts; None to hash only.
        lora: the section of the adapters that were merged; None if nothing was.
    """

    compared = progress.counted("reading the files", sum(stored[w.name].nbytes for w in wanted), "bytes")

    def examine_one(w: Wanted) -> Examined:
        result = _examine(stored[w.name], w, parameters, lora)
        compared(stored[w.name].nbytes)
        return result

    if jax.process_count() > 1 and parameters is not None:  # collectives must run in the same order in every process
        return Tensors(stored, {w.name: examine_one(w) for w in wanted})
    largest = max((np.prod(w.shape[-2:]) * 4 for w in wanted), default=1)
    with ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, 8, int(BESIDE // largest)))) as pool:
        return Tensors(stored, dict(zip((w.name for w in wanted), pool.map(examine_one, wanted), strict=True)))


def _examine(stored: Stored, tensor: Wanted, parameters: LazyParameters | None, lora: config.Lora | None) -> Examined:
    total = hashlib.sha256()
    fault: str | None = None
    merged: list[Merged] = []
    rows = stored.rows // len(tensor.parts)
    step = max(1, CHUNK * rows // max(1, stored.nbytes // len(tensor.parts)))
    with stored.file.open("rb") as file:
        for i, part in enumerate(tensor.parts):
            is_decoded = stored.kind in (*MANTISSA, "Q8_0", *GRIDS)
            values = None
            if parameters is not None and is_decoded:
                values = _Values(part, parameters, lora)
            if not together.is_first():  # other processes have contributed their part of the values when they were fetched
                continue
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                raw = stored.read(file.fileno(), i * rows + start, i * rows + stop)
                total.update(raw)
                if values is not None and fault is None:
                    problem = values.compare(stored, raw, start, stop)
                    if problem:
                        fault = f"{stored.name} {problem}"
            if values is not None and values.adapter is not None:
                merged.append(values.merged())
    return Examined(total.hexdigest(), fault, tuple(merged))


class _Values:
    """What a part of a tensor has to contain, in the file's order, and what has been seen of its delta so far."""

    def __init__(self, part: Part, parameters: LazyParameters, lora: config.Lora | None) -> None:
        self.part = part
        path = ParameterPath.parse(part.path)
        self.module = path.module_path
        base = part.form(fetch_entry(parameters[part.path], part.lead))
        self.base = base.reshape(1, -1) if base.ndim == 1 else base
        self.adapter: tuple[np.ndarray, np.ndarray] | None = None
        if lora is not None and path.has_adapter(parameters):
            self.adapter = in_file_order(part, parameters, lora)
        self.squared_norm = self.inner_product = self.noise = 0.0
        self.changed = False

    def compare(self, stored: Stored, raw: bytearray, start: int, stop: int) -> str | None:
        """Compare rows start to stop of the part; returns what is wrong, or None."""
        base = self.base[start:stop]
        mismatch = f"in {stored.file.name} is not {self.part.path}{list(self.part.lead)} in memory"
        if self.adapter is None and stored.kind in MANTISSA:
            written = np.frombuffer(raw, reread.PLAIN[stored.kind])
            same = contiguous(base, written.dtype).reshape(-1)
            # As bits, so that signed zeros and NaNs are compared too.
            return None if np.array_equal(_bits(written), _bits(same)) else mismatch
        delta = np.zeros(())
        if self.adapter is not None:
            a, b = self.adapter
            delta = b[start:stop] @ a
        right = base.astype(np.float64) + delta
        written, allowed = decoded(stored.kind, raw, right)
        off = np.abs(written - right)
        if self.adapter is not None:
            change = written - base
            self.squared_norm += float(np.vdot(delta, delta))
            self.inner_product += float(np.vdot(delta, change))
            if stored.kind not in MANTISSA:
                self.noise += float(np.vdot(off, off)) / base.size
            # Only in a file without quantization do equal numbers mean that nothing was added.
            self.changed = (
                self.changed
                or stored.kind not in MANTISSA
                or not np.array_equal(written, contiguous(base, reread.PLAIN[stored.kind]).astype(np.float64))
            )
        if np.all(off <= allowed):
            return None
        if self.adapter is None:
            return f"{mismatch}: off by {off.max():.3g}"
        return f"in {stored.file.name} is not {self.part.path}{list(self.part.lead)} with its adapter: off by {off.max():.3g}"

    def merged(self) -> Merged:
        """Return what happened to the delta, after all rows were compared."""
        lost = self.squared_norm > 0 and not self.changed
        # In a quantized file every number may differ, so the direction of the change decides.
        if self.noise and self.squared_norm > FOUND**2 * self.noise:
            lost = self.inner_product < self.squared_norm / 2
        return Merged(self.module, self.part.lead, self.squared_norm, self.inner_product, lost)


def in_file_order(part: Part, parameters: LazyParameters, lora: config.Lora) -> tuple[np.ndarray, np.ndarray]:
    """Return A (J, in) and B (out, J) in float64, in the file's order, with the scale multiplied into B."""
    path = ParameterPath.parse(part.path)
    a, b = (fetch_entry(parameters[name], part.lead).astype(np.float64) for name in path.adapter)
    scale = scale_of(lora, path.module_path, part.lead)
    if path.is_embedding:  # (V, D) = A (V, J) · B (J, D)
        return b, scale * a
    if path.is_head:  # (V, D) = (A (D, J) · B (J, V)) transposed
        return a.T, scale * b.T
    return a.reshape(-1, a.shape[-1]).T, scale * part.form(b)


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view({2: np.uint16, 4: np.uint32}[x.itemsize])


def decoded(kind: str, raw: bytearray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decode a chunk of a file.

    Args:
        kind: how the numbers are stored.
        raw: the bytes.
        right: the exact numbers, (rows, numbers) in float64.

    Returns:
        The numbers in float64, and how far each may be from `right`: one unit in the last place; for Q8_0, half a step of its
        block's scale plus the rounding of the scale itself, a float16; for other kinds as in `GRIDS`.
    """
    if kind in GRIDS:
        written = reread.dequantised(kind, raw, len(right)).astype(np.float64)
        block, share, levels = GRIDS[kind]
        blocks = np.abs(right).reshape(len(right), -1, block)
        allowed = np.broadcast_to(share * blocks.max(-1, keepdims=True) * 1.01 + levels * 2.0**-25, blocks.shape)
        return written, allowed.reshape(right.shape)
    if kind != "Q8_0":
        power = (right.view(np.uint64) & EXPONENT).view(np.float64)  # the largest power of two up to |right|
        written = np.frombuffer(raw, reread.PLAIN[kind]).astype(np.float64).reshape(right.shape)
        return written, np.maximum(power, 2.0 ** SMALLEST[kind]) * 2.0 ** -MANTISSA[kind]
    blocks = np.frombuffer(raw, Q8_0).reshape(len(right), -1)
    written = (blocks["scale"].astype(np.float64)[..., None] * blocks["q"]).reshape(right.shape)
    step = np.abs(right).reshape(*blocks.shape, 32).max(-1, keepdims=True) / 127
    allowed = np.broadcast_to(0.5 * step + 127 * np.maximum(step * 2.0**-11, 2.0**-25), (*blocks.shape, 32))
    return written, allowed.reshape(right.shape) * 1.001


def merge_figures(tensors: Tensors) -> tuple[str, dict[str, Any]]:
    """Summarize all merged matrices: how many there are and how much of their deltas was kept.

    Raises:
        Fault: a trained delta was lost.
        NotChecked: nothing was merged.
    """
    merged: list[Merged] = []
    for result in tensors.examined.values():
        merged += result.merged
    if not merged:
        raise NotChecked("nothing was merged")
    if lost := [m for m in merged if m.lost]:
        raise Fault(
            f"the delta of {lost[0].module}{list(lost[0].lead)} is lost: the file's numbers are those of the base, rounded "
            f"({len(lost)} matrices in all); export in float32"
        )
    shares: dict[str, tuple[float, float]] = {}
    for m in merged:
        squared_norm, inner_product = shares.get(m.module, (0.0, 0.0))
        shares[m.module] = squared_norm + m.wanted, inner_product + m.kept
    squared_norm, inner_product = (sum(share[i] for share in shares.values()) for i in (0, 1))
    worst = min((module for module in shares if shares[module][0]), key=lambda m: shares[m][1] / shares[m][0], default=None)
    untrained = sum(m.wanted == 0 for m in merged)
    least_kept = None
    if worst:
        least_kept = {"module": worst, "delta_kept": shares[worst][1] / shares[worst][0]}
    figures = {
        "count": len(merged),
        "untrained": untrained,
        "delta_kept": inner_product / squared_norm if squared_norm else 1.0,
        "least_kept": least_kept,
        "tolerance": "one unit in the last place of the file's dtype; Q8_0: half a step of the block; others as `tensors` says",
    }
    summary = f"{len(merged):,} matrices are round(base + scale·B·A); {figures['delta_kept']:.4f} of the deltas kept"
    if untrained:
        summary += f"; {untrained:,} have a delta of zero: never trained"
    return summary, figures


# --- adapters ------------------------------------------------------------------------------------------------------


class Delta(NamedTuple):
    """The comparison of one matrix's delta in the files with that in memory."""

    module: str
    lead: tuple[int, ...]
    trained: bool
    """Whether the delta in memory is not zero."""
    off: float
    """Largest difference divided by what rounding A and B to the file's dtype allows; at most 1 is right."""


def examine_adapter(
    layout: expected.Adapter,
    stored: Mapping[str, Stored],
    model: config.Model,
    parameters: LazyParameters,
    lora: config.Lora,
    scale_in_file: Callable[[str, int], float],
) -> tuple[Tensors, list[Delta]]:
    """Hash every tensor and compare scale · B·A of each pair with that in memory, matrix by matrix.

    Pairs for weights that have no adapter in memory must be zero; some layouts need them. Whole weights that were trained in full
    are compared bit by bit.

    Args:
        layout: layout of the files.
        stored: tensors of the files by name.
        model: the architecture of the base.
        parameters: weights by path.
        lora: the section of the adapters.
        scale_in_file: (name of the weight, rank) -> the scale that the layout's own tools apply.

    Raises:
        Fault: a tensor is missing or does not belong there.
    """
    remaining = dict(stored)
    deltas: list[Delta] = []
    full_weights: list[Wanted] = []
    for tensor in expected.model_tensors(expected.OF_MODEL[layout], model):
        name_a, name_b = expected.adapter_names(layout, tensor.name)
        path = ParameterPath.parse(tensor.parts[0].path)
        trained = path.has_adapter(parameters)
        if trained and not {name_a, name_b} <= remaining.keys():
            raise Fault(f"{name_a if name_a not in remaining else name_b} is missing")
        if name_a in remaining and name_b in remaining:
            a = remaining.pop(name_a)
            b = remaining.pop(name_b)
            deltas += _deltas(tensor, a, b, parameters if trained else None, lora, scale_in_file)
            continue
        for name in expected.whole_names(layout, tensor.name, model.tie_embeddings):
            if name in remaining:
                full_weights.append(tensor._replace(name=name))
                remaining.pop(name)
            elif path.is_trained(lora):
                raise Fault(f"{name}, which was trained in full, is missing")
    if remaining:
        raise Fault(f"{min(remaining)} does not belong there" + (f" (and {len(remaining) - 1} more)" if len(remaining) > 1 else ""))
    examined = examine(stored, full_weights, parameters, None).examined if full_weights else {}
    hashed = examine(stored, [Wanted(name, t.shape, (Part("", (), expected.as_is),)) for name, t in stored.items()], None, None)
    return Tensors(stored, {**hashed.examined, **examined}), deltas


def _deltas(
    tensor: Wanted,
    a: Stored,
    b: Stored,
    parameters: LazyParameters | None,
    lora: config.Lora,
    scale_in_file: Callable[[str, int], float],
) -> list[Delta]:
    deltas = []
    for i, part in enumerate(tensor.parts):
        a_Ji, b_oJ = (_numbers(t, i, len(tensor.parts)) for t in (a, b))
        if tensor.module == "embed" and a_Ji.shape[1] == tensor.shape[0]:  # here A takes tokens, (J, V), and B is (D, J)
            a_Ji, b_oJ = b_oJ.T, a_Ji.T
        if (len(b_oJ), a_Ji.shape[1]) != tensor.shape[-2:] or len(a_Ji) != b_oJ.shape[1]:
            raise Fault(f"{a.name} {a.shape} and {b.name} {b.shape} are no adapter of a weight {tensor.shape[-2:]}")
        b_oJ *= scale_in_file(tensor.name, len(a_Ji))
        if parameters is None:
            deltas.append(Delta(tensor.module, part.lead, False, 0.0 if not b_oJ.any() or not a_Ji.any() else np.inf))
            continue
        expected_a, expected_b = in_file_order(part, parameters, lora)
        eps = 2.0 ** (1 - MANTISSA[a.kind]) + 2.0**-22  # A and B were each rounded; a scale may have been multiplied into B
        off = 0.0
        step = max(1, CHUNK // (8 * expected_a.shape[1]))
        for start in range(0, len(expected_b), step):
            rows = slice(start, start + step)
            difference = np.abs(b_oJ[rows] @ a_Ji - expected_b[rows] @ expected_a)
            allowed = eps * (np.abs(expected_b[rows]) @ np.abs(expected_a)) + 1e-30
            off = max(off, float((difference / allowed).max(initial=0.0)))
        deltas.append(Delta(tensor.module, part.lead, bool(expected_b.any() and expected_a.any()), off))
    return deltas


def _numbers(stored: Stored, part: int, parts: int) -> np.ndarray:
    rows = stored.rows // parts
    with stored.file.open("rb") as file:
        raw = stored.read(file.fileno(), part * rows, (part + 1) * rows)
    if stored.kind not in reread.PLAIN:
        raise Fault(f"{stored.name} is {stored.kind}; adapters are {', '.join(reread.PLAIN)}")
    return np.frombuffer(raw, reread.PLAIN[stored.kind]).reshape(rows, -1).astype(np.float64)


def delta_figures(deltas: Sequence[Delta]) -> tuple[str, dict[str, Any]]:
    """Summarize all adapters. Raises Fault if a delta differs from the one in memory."""
    if wrong := [delta for delta in deltas if not delta.off <= 1]:
        raise Fault(
            f"the adapter of {wrong[0].module}{list(wrong[0].lead)} in the files is not the one in memory "
            f"({len(wrong)} matrices in all)"
        )
    untrained = sum(not delta.trained for delta in deltas)
    summary = f"{len(deltas):,} deltas are those in memory"
    if untrained:
        summary += f"; {untrained:,} are zero: never trained"
    figures = {"count": len(deltas), "untrained": untrained, "tolerance": "A and B each rounded to the file's dtype"}
    return summary, figures
