"""TensorResults of files against weights in memory; the faults of whole exports are planted in test_prove.py."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from moe_train.proof import compare, reread
from moe_train.proof.checks import Fault, NotChecked
from moe_train.proof.compare import MergeResult, TensorResult, TensorResults
from moe_train.proof.expected_tensor import ExpectedTensor, Part, as_is
from moe_train.proof.reread import Stored


def wanted(name: str, *shape: int) -> ExpectedTensor:
    return ExpectedTensor(name, shape, (Part("final_norm.scale", (), as_is),))


@pytest.mark.parametrize(
    ("layout", "tensor", "dtype", "kind"),
    [
        ("hf", wanted("w", 4), "bfloat16", "BF16"),
        ("gguf", wanted("w", 4), "q8_0", "F32"),
        ("gguf", wanted("blk.0.ffn_gate_inp.weight", 4, 64), "bf16", "F32"),
        ("gguf", wanted("w", 4, 64), "q8_0", "Q8_0"),
        ("gguf", wanted("w", 4, 80), "q8_0", "F16"),  # rows of 80 are no blocks of 32
        ("gguf", wanted("w", 4, 64), "q4_k_m", None),
    ],
)
def test_the_kind_of_a_tensor(layout: str, tensor: ExpectedTensor, dtype: str, kind: str | None) -> None:
    assert compare.stored_kind(layout, tensor, dtype) == kind  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "shape", "kind", "fault"),
    [
        (("a", "b"), (4,), "F32", None),
        (("a",), (4,), "F32", "^b is missing$"),
        (("a", "b", "c"), (4,), "F32", "^c in x is not a tensor of this model$"),
        (("a", "b"), (5,), "F32", r"^a has the shape \(5,\), not \(4,\) \(and 1 more\)$"),
        (("a", "b"), (4,), "F16", r"^a is F16, not F32 \(and 1 more\)$"),
    ],
)
def test_names_shapes_and_kinds(names: tuple[str, ...], shape: tuple[int, ...], kind: str, fault: str | None) -> None:
    stored = {name: Stored(name, Path("x"), kind, shape, 0, 16) for name in names}
    both = [wanted("a", 4), wanted("b", 4)]
    if fault is None:
        compare.check_names(stored, both, dict.fromkeys("ab", kind))
        return
    with pytest.raises(Fault, match=fault):
        compare.check_names(stored, both, dict.fromkeys("ab", "F32"))


def test_one_bit_of_a_tensor_is_a_fault(tmp_path: Path) -> None:
    scale = np.arange(1, 9, dtype=np.float32)
    safetensors.numpy.save_file({"norm": scale}, tmp_path / "x.safetensors")
    stored = reread.tensors(tmp_path)
    compare.examine_tensors(stored, [wanted("norm", 8)], {"final_norm.scale": jnp.array(scale)}, None).raise_faults()
    scale.view(np.uint32)[3] ^= 1
    with pytest.raises(Fault, match=r"^norm in x\.safetensors is not final_norm\.scale\[\] in memory$"):
        compare.examine_tensors(stored, [wanted("norm", 8)], {"final_norm.scale": jnp.array(scale)}, None).raise_faults()


def merged(*parts: MergeResult) -> TensorResults:
    return TensorResults({}, {"x": TensorResult("", None, parts)})


def test_how_much_of_the_deltas_was_kept() -> None:
    kept = (
        MergeResult("q", (0,), 4.0, 3.0, False),
        MergeResult("k", (0,), 1.0, 1.0, False),
        MergeResult("k", (1,), 0.0, 0.0, False),
    )
    summary, metrics = compare.summarize_merge(merged(*kept))
    assert (metrics["count"], metrics["untrained"], metrics["delta_kept"]) == (3, 1, 0.8)
    assert metrics["least_kept"] == {"module": "q", "delta_kept": 0.75}
    assert "0.8000 of the deltas kept; 1 have a delta of zero" in summary
    with pytest.raises(Fault, match=r"the delta of q\[1\] is lost: .* \(1 matrices in all\); export in float32"):
        compare.summarize_merge(merged(*kept, MergeResult("q", (1,), 1.0, 0.0, True)))
    with pytest.raises(NotChecked, match="nothing was merged"):
        compare.summarize_merge(merged())
