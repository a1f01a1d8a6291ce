"""Compare tensors of files with the weights in memory: bit by bit, or, with adapters merged, within one rounding.

The files are read by `reread` and laid out by `expected`; one chunk of rows is compared at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from moe_train import config
from moe_train.machine import progress
from moe_train.model.paths import ParameterPath
from moe_train.proof import expected, fp8, reread
from moe_train.proof.checks import Fault, Finding, MetricValue, NotChecked, first_and_count
from moe_train.proof.expected_tensor import ExpectedTensor, Part, as_is
from moe_train.proof.reread import Stored
from moe_train.proof.rounding import DECODED_KINDS, MANTISSA, decode_with_tolerance
from moe_train.weights import together
from moe_train.weights.arrays import LazyParameters, fetch_entry
from moe_train.weights.merge import scale_of
from moe_train.weights.strided import contiguous

COMPARE_CHUNK_BYTES = 2**18
"""Bytes of a file that are compared at once."""
COMPARE_HOST_BYTES = 2**27
"""Bytes of weights that are on the host at a time, unless a single matrix is larger."""
VISIBLE_NORM_RATIO = 8.0
"""A delta must be visible in the file if its norm is this many times what the rounding has in its direction by chance."""
FILE_KINDS = {
    "float32": "F32",
    "f32": "F32",
    "float16": "F16",
    "f16": "F16",
    "bfloat16": "BF16",
    "bf16": "BF16",
    "q8_0": "Q8_0",
    "fp8": reread.FP8,
}
"""Name of a dtype in numpy or llama.cpp -> its name in the headers of files."""


class MergeResult(NamedTuple):
    """The comparison of one matrix's delta with what changed in the file."""

    module: str
    lead: tuple[int, ...]
    squared_norm: float
    """Sum of the squares of the delta."""
    inner_product: float
    """Inner product of the delta and what changed in the file."""
    lost: bool
    """Whether the delta is lost.

    A non-zero delta is lost if not one number of the file differs from the base's, or, in a quantized file, if the file's change
    does not go in the delta's direction.
    """


class TensorResult(NamedTuple):
    """The result for one tensor of the files."""

    sha256: str
    fault: str | None
    """What is wrong with the tensor; None if it is right."""
    merged: tuple[MergeResult, ...]


class TensorResults(NamedTuple):
    """The results for all tensors."""

    stored: Mapping[str, Stored]
    results: Mapping[str, TensorResult]

    def raise_faults(self) -> None:
        """Raise Fault with the first fault and the number of others, if there is one."""
        faults = [result.fault for result in self.results.values() if result.fault]
        if faults:
            raise Fault(first_and_count(faults))


def stored_kind(layout: expected.ModelLayout, tensor: ExpectedTensor, dtype: str, unquantized: Collection[str] = ()) -> str | None:
    """Return how a file of `dtype` stores a tensor; None if llama.cpp's own tool decides.

    Args:
        layout: layout of the file.
        tensor: the tensor.
        dtype: dtype of the export.
        unquantized: modules whose linear maps stay bfloat16 in an FP8 file.
    """
    kind = FILE_KINDS.get(dtype.lower())
    if kind == reread.FP8 and (not _is_linear_of_layer(tensor) or _is_part_of(tensor.name, unquantized)):
        return "F32" if tensor.name.endswith("e_score_correction_bias") else "BF16"
    if layout != "gguf":
        # transformers keeps the biases of routers in float32.
        return "F32" if tensor.name.endswith("e_score_correction_bias") else kind
    # llama.cpp keeps vectors and routers in float32, whatever the file's dtype.
    if len(tensor.shape) == 1 or tensor.name.endswith("ffn_gate_inp.weight"):
        return "F32"
    if kind == "Q8_0" and tensor.shape[-1] % 32:  # the rows are no whole number of blocks
        return "F16"
    return kind


def _is_linear_of_layer(tensor: ExpectedTensor) -> bool:
    """Return whether a tensor is a linear map of a layer, but no router: what FP8 files have quantized."""
    path = ParameterPath.parse(tensor.parts[0].path)
    return path.in_layer and path.leaf == "weight" and not path.is_router


def _is_part_of(name: str, modules: Collection[str]) -> bool:
    """Return whether a tensor belongs to one of some modules."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in modules for i in range(1, len(parts)))


def check_names(stored: Mapping[str, Stored], expected_tensors: Sequence[ExpectedTensor], kinds: Mapping[str, str | None]) -> None:
    """Raise Fault unless the files have every expected tensor, with its shape and kind, and no other.

    Args:
        stored: tensors of the files by name.
        expected_tensors: tensors that the files must have.
        kinds: how each is stored; None for any kind.
    """
    names = {tensor.name for tensor in expected_tensors}
    faults = [f"{name} is missing" for name in names - set(stored)]
    faults += [f"{name} in {stored[name].file.name} is not a tensor of this model" for name in set(stored) - names]
    for tensor in expected_tensors:
        if tensor.name not in stored:
            continue
        stored_tensor = stored[tensor.name]
        if stored_tensor.shape != tensor.shape:
            faults.append(f"{tensor.name} has the shape {stored_tensor.shape}, not {tensor.shape}")
        if kinds[tensor.name] not in (stored_tensor.kind, None):
            faults.append(f"{tensor.name} is {stored_tensor.kind}, not {kinds[tensor.name]}")
    if faults:
        raise Fault(first_and_count(sorted(faults)))


def examine_tensors(
    stored: Mapping[str, Stored],
    expected_tensors: Sequence[ExpectedTensor],
    parameters: LazyParameters | None,
    lora: config.Lora | None,
) -> TensorResults:
    """Hash every tensor and compare it with the weights in memory.

    Args:
        stored: tensors of the files by name.
        expected_tensors: tensors to examine.
        parameters: weights by path, of which several processes may hold parts; None to hash only.
        lora: the section of the adapters that were merged; None if nothing was.
    """
    total_bytes = sum(stored[tensor.name].nbytes for tensor in expected_tensors)
    report_bytes = progress.counted("reading the files", total_bytes, "bytes")

    def examine_one(tensor: ExpectedTensor) -> TensorResult:
        result = _examine(stored[tensor.name], tensor, parameters, lora)
        report_bytes(stored[tensor.name].nbytes)
        return result

    if jax.process_count() > 1 and parameters is not None:  # collectives must run in the same order in every process
        return TensorResults(stored, {tensor.name: examine_one(tensor) for tensor in expected_tensors})
    # Each thread has one matrix on the host, converted to float32.
    largest_bytes = max((np.prod(tensor.shape[-2:]) * 4 for tensor in expected_tensors), default=1)
    num_threads = min(os.cpu_count() or 1, 8, int(COMPARE_HOST_BYTES // largest_bytes))
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        results = pool.map(examine_one, expected_tensors)
        return TensorResults(stored, {tensor.name: result for tensor, result in zip(expected_tensors, results, strict=True)})


def hash_only(stored: Mapping[str, Stored]) -> list[ExpectedTensor]:
    """Describe every tensor of the files as one that is hashed and not compared."""
    unknown_part = (Part("", (), as_is),)
    return [ExpectedTensor(name, tensor.shape, unknown_part) for name, tensor in stored.items()]


def _examine(stored: Stored, tensor: ExpectedTensor, parameters: LazyParameters | None, lora: config.Lora | None) -> TensorResult:
    total = hashlib.sha256()
    fault: str | None = None
    merged: list[MergeResult] = []
    num_parts = len(tensor.parts)
    rows = stored.rows // num_parts
    step = max(1, COMPARE_CHUNK_BYTES * rows // max(1, stored.nbytes // num_parts))
    scales = fp8.ScalesOfParts(stored, num_parts) if stored.scales is not None else None
    with stored.file.open("rb") as file:
        for i, part in enumerate(tensor.parts):
            comparison: _PartComparison | None = None
            if parameters is not None and stored.kind in DECODED_KINDS:
                comparison = _PartComparison(part, parameters, lora)
            if not together.is_first():  # other processes have contributed their part of the values when they were fetched
                continue
            if comparison is not None and scales is not None:
                comparison.use_scales(scales.of_part(i), scales.maxima_of(i))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                raw = stored.read(file.fileno(), i * rows + start, i * rows + stop)
                total.update(raw)
                # After the first fault the tensor is only hashed to its end.
                if comparison is not None and fault is None:
                    problem = comparison.compare(stored, raw, start, stop)
                    if problem:
                        fault = f"{stored.name} {problem}"
            if comparison is not None and scales is not None and fault is None:
                problem = scales.fault(i)
                if problem:
                    fault = f"{stored.name} {problem}"
            if comparison is not None and comparison.adapter is not None:
                merged.append(comparison.merge_result())
    if stored.scales is not None:
        total.update(fp8.read_scales(stored).tobytes())
    return TensorResult(total.hexdigest(), fault, tuple(merged))


class _PartComparison:
    """What a part of a tensor must contain, in the file's order, and what has been seen of its delta so far."""

    def __init__(self, part: Part, parameters: LazyParameters, lora: config.Lora | None) -> None:
        self.part = part
        path = ParameterPath.parse(part.path)
        self.module = path.module_path
        base = part.to_file(fetch_entry(parameters[part.path], part.lead))
        self.base = base.reshape(1, -1) if base.ndim == 1 else base
        self.adapter: tuple[np.ndarray, np.ndarray] | None = None
        if lora is not None and path.has_adapter(parameters):
            self.adapter = adapter_in_file_order(part, parameters, lora)
        self.scales: tuple[np.ndarray, fp8.BlockMaxima] | None = None
        self.squared_norm = 0.0
        self.inner_product = 0.0
        self.noise = 0.0
        self.changed = False

    def use_scales(self, scales: np.ndarray, maxima: fp8.BlockMaxima) -> None:
        """Take the scales of the part in an FP8 tensor, and what checks them, before its rows are compared."""
        self.scales = scales, maxima

    def _decode(self, stored: Stored, raw: bytearray, exact: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Decode rows that begin at `start`; returns the numbers, and how far each may be from `exact`."""
        if self.scales is None:
            return decode_with_tolerance(stored.kind, raw, exact)
        scales, maxima = self.scales
        maxima.add(exact, start)
        of_rows = fp8.scales_of_rows(scales, start, start + len(exact), exact.shape[1])
        return decode_with_tolerance(stored.kind, raw, exact, of_rows)

    def compare(self, stored: Stored, raw: bytearray, start: int, stop: int) -> str | None:
        """Compare rows start to stop of the part; returns what is wrong, or None."""
        base = self.base[start:stop]
        name = f"{self.part.path}{list(self.part.lead)}"
        mismatch = f"in {stored.file.name} is not {name} in memory"
        if self.adapter is None and stored.kind in MANTISSA:
            written = np.frombuffer(raw, reread.FLOAT_DTYPES[stored.kind])
            rounded = contiguous(base, written.dtype).reshape(-1)
            # Compared as bits, so that signed zeros and NaNs are compared too.
            return None if np.array_equal(_bits(written), _bits(rounded)) else mismatch
        if self.adapter is None:
            written, allowed = self._decode(stored, raw, base.astype(np.float64), start)
            error = np.abs(written - base)
            return None if np.all(error <= allowed) else f"{mismatch}: off by {error.max():.3g}"
        a, b = self.adapter
        delta = b[start:stop] @ a
        exact = base.astype(np.float64) + delta
        written, allowed = self._decode(stored, raw, exact, start)
        error = np.abs(written - exact)
        self._add_delta(stored.kind, base, delta, written, error)
        if np.all(error <= allowed):
            return None
        return f"in {stored.file.name} is not {name} with its adapter: off by {error.max():.3g}"

    def _add_delta(self, kind: str, base: np.ndarray, delta: np.ndarray, written: np.ndarray, error: np.ndarray) -> None:
        """Accumulate how much of the delta some rows of the file contain."""
        self.squared_norm += float(np.vdot(delta, delta))
        self.inner_product += float(np.vdot(delta, written - base))
        if kind not in MANTISSA:
            self.noise += float(np.vdot(error, error)) / base.size
            self.changed = True  # unknown: in a quantized file, equal numbers do not mean that nothing was added
        elif not self.changed:
            rounded_base = contiguous(base, reread.FLOAT_DTYPES[kind]).astype(np.float64)
            self.changed = not np.array_equal(written, rounded_base)

    def merge_result(self) -> MergeResult:
        """Return how much of the delta is in the file, after all rows were compared."""
        lost = self.squared_norm > 0 and not self.changed
        # In a quantized file every number may differ, so the direction of the change decides.
        if self.noise and self.squared_norm > VISIBLE_NORM_RATIO**2 * self.noise:
            # The inner product is about the squared norm if the file has the delta, and about 0 if it does not.
            lost = self.inner_product < self.squared_norm / 2
        return MergeResult(self.module, self.part.lead, self.squared_norm, self.inner_product, lost)


def adapter_in_file_order(part: Part, parameters: LazyParameters, lora: config.Lora) -> tuple[np.ndarray, np.ndarray]:
    """Return A (J, in) and B (out, J) in float64, in the file's order, with the scale multiplied into B."""
    path = ParameterPath.parse(part.path)
    a, b = (fetch_entry(parameters[name], part.lead).astype(np.float64) for name in path.adapter)
    scale = scale_of(lora, path.module_path, part.lead)
    if path.is_embedding:  # (V, D) = A (V, J) · B (J, D)
        return b, scale * a
    if path.is_head:  # (V, D) = (A (D, J) · B (J, V)) transposed
        return a.T, scale * b.T
    if part.mixes_factors:
        # The product, written as itself times an identity matrix.
        product = part.to_file(scale * np.tensordot(a, b, axes=1))
        return np.eye(product.shape[1]), product
    # Only outputs change their order in files (q and k: rotary pairs), so `to_file` applies to B and not to A.
    return a.reshape(-1, a.shape[-1]).T, scale * part.to_file(b)


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view({2: np.uint16, 4: np.uint32}[x.itemsize])


def summarize_merge(tensors: TensorResults) -> Finding:
    """Summarize all merged matrices: how many there are and how much of their deltas was kept.

    Raises:
        Fault: a trained delta was lost.
        NotChecked: nothing was merged.
    """
    merged: list[MergeResult] = []
    for result in tensors.results.values():
        merged += result.merged
    if not merged:
        raise NotChecked("nothing was merged")
    lost = [m for m in merged if m.lost]
    if lost:
        raise Fault(
            f"the delta of {lost[0].module}{list(lost[0].lead)} is lost: the file's numbers are those of the base, rounded "
            f"({len(lost)} matrices in all); export in float32"
        )
    sums: dict[str, tuple[float, float]] = {}
    for m in merged:
        squared_norm, inner_product = sums.get(m.module, (0.0, 0.0))
        sums[m.module] = squared_norm + m.squared_norm, inner_product + m.inner_product
    # A module that was never trained has no delta of which a share could be kept.
    kept = {module: inner_product / squared_norm for module, (squared_norm, inner_product) in sums.items() if squared_norm}
    least_kept: dict[str, MetricValue] | None = None
    if kept:
        worst = min(kept, key=lambda module: kept[module])
        least_kept = {"module": worst, "delta_kept": kept[worst]}
    total_squared_norm = sum(squared_norm for squared_norm, _ in sums.values())
    total_inner_product = sum(inner_product for _, inner_product in sums.values())
    delta_kept = total_inner_product / total_squared_norm if total_squared_norm else 1.0
    untrained = sum(m.squared_norm == 0 for m in merged)
    summary = f"{len(merged):,} matrices are round(base + scale·B·A); {delta_kept:.4f} of the deltas kept"
    if untrained:
        summary += f"; {untrained:,} have a delta of zero: never trained"
    metrics: dict[str, MetricValue] = {
        "count": len(merged),
        "untrained": untrained,
        "delta_kept": delta_kept,
        "least_kept": least_kept,
        "tolerance": "one unit in the last place of the file's dtype; Q8_0 and FP8: half a step; others as `tensors` says",
    }
    return Finding(summary, metrics)
