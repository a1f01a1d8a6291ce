"""Compare files that hold adapters alone with the adapters in memory, delta by delta."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.model.paths import ParameterPath
from moe_train.proof import expected, reread
from moe_train.proof.checks import Fault, Finding, first_and_count
from moe_train.proof.compare import (
    COMPARE_CHUNK_BYTES,
    TensorResults,
    adapter_in_file_order,
    examine_tensors,
    hash_only,
)
from moe_train.proof.expected_tensor import ExpectedTensor, Part
from moe_train.proof.expected_tower import tower_tensors
from moe_train.proof.reread import Stored
from moe_train.proof.rounding import MANTISSA
from moe_train.weights.arrays import LazyParameters

ScaleInFile = Callable[[str, int], float]
"""(name of a weight, rank) -> the factor of B·A that the layout's own tools apply."""


class DeltaResult(NamedTuple):
    """The comparison of one matrix's delta in the files with that in memory."""

    module: str
    lead: tuple[int, ...]
    trained: bool
    """Whether the delta in memory is not zero."""
    relative_error: float
    """Largest difference divided by what rounding A and B to the file's dtype allows; at most 1 is right."""


class AdapterFiles(NamedTuple):
    """The files of an adapter, as the layout's own tools read them."""

    layout: expected.AdapterLayout
    stored: Mapping[str, Stored]
    """Tensors by name."""
    scale: ScaleInFile
    in_wrapper: bool
    """Whether the base is the text model inside a vision wrapper, and the adapter has the names of that."""
    parameters: tuple[str, ...] = ()
    """PEFT's target_parameters."""
    encoder: config.Encoder | None = None
    """Sizes of the tower that has adapters or trained weights; None if none has."""

    def expected_tensors(self, model: config.Model) -> Iterator[ExpectedTensor]:
        """Yield the weights of a model that can be adapted, under the names that the layout's own tools give to them."""
        for tensor in expected.adapted_tensors(self.layout, model):
            yield expected.in_wrapper(tensor) if self.in_wrapper else tensor
        if self.encoder is not None:
            for tensor in tower_tensors("hf", self.encoder, model.model_dim):
                yield tensor._replace(name=f"model.{tensor.name}")

    def names_of(self, weight: str) -> tuple[str, str]:
        """Return the names of A and B of a weight's adapter."""
        container, _, leaf = weight.rpartition(".")
        if self.layout != "peft" or not container.endswith(".experts"):
            return expected.adapter_names(self.layout, weight)
        # PEFT wraps gate_up_proj first; the wrapper of down_proj is around that.
        is_inner = leaf == "gate_up_proj" and any(f"{container}.down_proj".endswith(f".{name}") for name in self.parameters)
        stem = f"base_model.model.{container}" + (".base_layer" if is_inner else "")
        if not any(weight.endswith(f".{name}") for name in self.parameters):
            stem = f"base_model.model.{weight}"  # no adapter
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def examine_adapter(
    files: AdapterFiles, model: config.Model, parameters: LazyParameters, lora: config.Lora
) -> tuple[TensorResults, list[DeltaResult]]:
    """Hash every tensor and compare scale · B·A of each pair with that in memory, matrix by matrix.

    Pairs for weights that have no adapter in memory must be zero; some layouts need them. Weights that were trained in full are
    compared bit by bit.

    Args:
        files: the files.
        model: the architecture of the base.
        parameters: weights by path.
        lora: the section of the adapters.

    Raises:
        Fault: a tensor is missing, or is not one of the adapter.
    """
    layout = files.layout
    stored = files.stored
    remaining = dict(stored)
    deltas: list[DeltaResult] = []
    full_weights: list[ExpectedTensor] = []
    for tensor in files.expected_tensors(model):
        name_a, name_b = files.names_of(tensor.name)
        path = ParameterPath.parse(tensor.parts[0].path)
        has_adapter = any(ParameterPath.parse(part.path).has_adapter(parameters) for part in tensor.parts)
        if has_adapter and not {name_a, name_b} <= remaining.keys():
            raise Fault(f"{name_a if name_a not in remaining else name_b} is missing")
        if name_a in remaining and name_b in remaining:
            a = remaining.pop(name_a)
            b = remaining.pop(name_b)
            for i, factors in enumerate(_read_factors(layout, tensor, a, b)):
                scale = files.scale(tensor.name, factors.rank)
                # A scale may have been multiplied into B, so it is applied before the comparison.
                scaled_factors = factors._replace(b_oJ=factors.b_oJ * scale)
                part_path = ParameterPath.parse(tensor.parts[i].path)
                with_adapter = parameters if part_path.has_adapter(parameters) else None
                deltas.append(_compare_delta(tensor, i, scaled_factors, a.kind, with_adapter, lora))
            continue
        for name in expected.full_weight_names(layout, tensor.name, model.tie_embeddings):
            if name in remaining:
                full_weights.append(tensor._replace(name=name))
                remaining.pop(name)
            elif path.is_trained(lora):
                raise Fault(f"{name}, which was trained in full, is missing")
    if remaining:
        raise Fault(first_and_count([f"{name} is not a tensor of this adapter" for name in sorted(remaining)]))
    hashed = examine_tensors(stored, hash_only(stored), None, None)
    if not full_weights:
        return hashed, deltas
    compared = examine_tensors(stored, full_weights, parameters, None)
    return TensorResults(stored, {**hashed.results, **compared.results}), deltas


class _Factors(NamedTuple):
    """A and B of one matrix, in float64 and in the file's order."""

    a_Ji: np.ndarray
    b_oJ: np.ndarray
    product_rank: int | None = None
    """Rank of the adapter if `b_oJ` is its product already; None if it is the length of `a_Ji`."""

    @property
    def rank(self) -> int:
        """Rank of the adapter."""
        return len(self.a_Ji) if self.product_rank is None else self.product_rank


def _read_factors(layout: expected.AdapterLayout, tensor: ExpectedTensor, a: Stored, b: Stored) -> Iterator[_Factors]:
    """Yield A and B of each part of a tensor. Raises Fault if their shapes are not those of its adapter."""
    if layout == "peft" and len(tensor.parts) > 1:
        yield from _read_fused_factors(tensor, a, b)
        return
    # Other tensors of three dims have a matrix for each expert or head.
    if len(tensor.shape) > 2 and ParameterPath.parse(tensor.parts[0].path).is_tower:
        yield _read_kernel(tensor, a, b)
        return
    for i in range(len(tensor.parts)):
        a_Ji = _read_part(a, i, len(tensor.parts))
        b_oJ = _read_part(b, i, len(tensor.parts))
        # The embedding's A takes tokens, (J, V), and its B is (D, J).
        if tensor.module == "embed" and a_Ji.shape[1] == tensor.shape[0]:
            a_Ji, b_oJ = b_oJ.T, a_Ji.T
        if (len(b_oJ), a_Ji.shape[1]) != tensor.shape[-2:] or len(a_Ji) != b_oJ.shape[1]:
            raise Fault(f"{a.name} {a.shape} and {b.name} {b.shape} are not an adapter of a weight {tensor.shape[-2:]}")
        yield _Factors(a_Ji, b_oJ)


def _read_kernel(tensor: ExpectedTensor, a: Stored, b: Stored) -> _Factors:
    """Return the delta of a convolution's kernel, (out, channel, positions…), in rows of its last dim, as a product.

    A is a kernel of the same size with the ranks as outputs, and B, (out, J, 1…), takes these to the outputs.
    """
    rank = a.shape[0]
    if a.shape != (rank, *tensor.shape[1:]) or b.shape != (tensor.shape[0], rank, *(1,) * (len(tensor.shape) - 2)):
        raise Fault(f"{a.name} {a.shape} and {b.name} {b.shape} are not an adapter of {tensor.name} {tensor.shape}")
    a_Ji = _read_part(a, 0, 1).reshape(rank, -1)
    b_oJ = _read_part(b, 0, 1).reshape(-1, rank)
    rows = (b_oJ @ a_Ji).reshape(-1, tensor.shape[-1])
    return _Factors(np.eye(tensor.shape[-1]), rows, rank)


def _read_fused_factors(tensor: ExpectedTensor, a: Stored, b: Stored) -> Iterator[_Factors]:
    """Yield A and B of each part of a parameter that PEFT adapts for all experts at once.

    A has the ranks of one expert after those of another; B has the first rank of every expert, then the second of every expert.
    """
    num_experts, outputs, inputs = tensor.shape
    a_all = _read_part(a, 0, 1)
    b_all = _read_part(b, 0, 1)
    if len(a_all) % num_experts or a_all.shape[1] != inputs or b_all.shape != (outputs, len(a_all)):
        raise Fault(f"{a.name} {a.shape} and {b.name} {b.shape} are not an adapter of {tensor.name} {tensor.shape}")
    rank = len(a_all) // num_experts
    parts_of_expert = len(tensor.parts) // num_experts
    rows = outputs // parts_of_expert
    for i in range(len(tensor.parts)):
        expert, part = divmod(i, parts_of_expert)
        b_oJ = b_all[part * rows : (part + 1) * rows, expert::num_experts]
        yield _Factors(a_all[expert * rank : (expert + 1) * rank], b_oJ)


def _compare_delta(
    tensor: ExpectedTensor, i: int, factors: _Factors, kind: str, parameters: LazyParameters | None, lora: config.Lora
) -> DeltaResult:
    """Compare the delta of part i of a tensor with that in memory; parameters None: it must be zero."""
    part: Part = tensor.parts[i]
    if parameters is None:
        is_zero = not factors.b_oJ.any() or not factors.a_Ji.any()
        return DeltaResult(tensor.module, part.lead, False, 0.0 if is_zero else np.inf)
    expected_a, expected_b = adapter_in_file_order(part, parameters, lora)
    # A and B were each rounded to the file's dtype, and products are summed in another order than here.
    eps = 2.0 ** (1 - MANTISSA[kind]) + 2.0**-22
    relative_error = 0.0
    step = max(1, COMPARE_CHUNK_BYTES // (8 * expected_a.shape[1]))
    for start in range(0, len(expected_b), step):
        rows = slice(start, start + step)
        difference = np.abs(factors.b_oJ[rows] @ factors.a_Ji - expected_b[rows] @ expected_a)
        # 1e-30 makes a correct delta of zero an error of 0 and not 0 / 0.
        allowed = eps * (np.abs(expected_b[rows]) @ np.abs(expected_a)) + 1e-30
        # np.maximum keeps a NaN, which Python's max would drop.
        relative_error = float(np.maximum(relative_error, (difference / allowed).max(initial=0.0)))
    trained = bool(expected_b.any() and expected_a.any())
    return DeltaResult(tensor.module, part.lead, trained, relative_error)


def _read_part(stored: Stored, i: int, parts: int) -> np.ndarray:
    """Read the rows of part i of `parts` of a tensor as float64."""
    rows = stored.rows // parts
    with stored.file.open("rb") as file:
        raw = stored.read(file.fileno(), i * rows, (i + 1) * rows)
    if stored.kind not in reread.FLOAT_DTYPES:
        raise Fault(f"{stored.name} is {stored.kind}; adapters must be {', '.join(reread.FLOAT_DTYPES)}")
    return np.frombuffer(raw, reread.FLOAT_DTYPES[stored.kind]).reshape(rows, -1).astype(np.float64)


def summarize_deltas(deltas: Sequence[DeltaResult]) -> Finding:
    """Summarize all adapters. Raises Fault if a delta differs from the one in memory."""
    wrong = [delta for delta in deltas if not delta.relative_error <= 1]  # not `> 1`, so that NaN is wrong too
    if wrong:
        raise Fault(
            f"the adapter of {wrong[0].module}{list(wrong[0].lead)} in the files is not the one in memory "
            f"({len(wrong)} matrices in all)"
        )
    untrained = sum(not delta.trained for delta in deltas)
    summary = f"{len(deltas):,} deltas are those in memory"
    if untrained:
        summary += f"; {untrained:,} are zero: never trained"
    return Finding(summary, {"count": len(deltas), "untrained": untrained, "tolerance": "A and B each rounded to the file's dtype"})
