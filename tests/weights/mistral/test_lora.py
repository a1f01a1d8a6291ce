"""Native adapters: bits both ways, the scaling that readers apply, faults, and mistral-inference as the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from moe_train import config
from moe_train.weights.mistral import lora as mistral_lora
from tests.random_parameters import abstract, assert_equal, random_parameters
from tests.tiny import EIGHT, LORA, MINISTRAL, MIXTRAL, ONE
from tests.weights.mistral.models import MISTRAL4

AT_TWO = config.Lora(  # alpha / rank is 2, as where nothing is stated
    targets=(config.LoraTarget(modules=("attention.q_proj", "attention.k_proj", "ffn.*_proj"), rank=2, alpha=4.0),)
)


def adapters_of(parameters: dict[str, Any]) -> dict[str, Any]:
    return {path: like for path, like in parameters.items() if path.endswith((".lora_a", ".lora_b"))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [MIXTRAL, MINISTRAL], ids=["mixtral", "ministral"])
def test_an_adapter_at_the_readers_scaling_keeps_its_bits(model: config.Model, dtype: Any, tmp_path: Path) -> None:
    with jax.set_mesh(EIGHT):
        parameters = random_parameters(model, dtype, AT_TWO)
        mistral_lora.export_adapter(parameters, model, AT_TWO, tmp_path / "out", dtype=dtype)
        read = mistral_lora.read_lora(tmp_path / "out", model)
        like = adapters_of(abstract(model, dtype, read))
        wanted = {path: array.astype(dtype).astype(array.dtype) for path, array in adapters_of(parameters).items()}
        assert_equal(mistral_lora.load_adapter(tmp_path / "out", model, like), wanted)
    assert [(target.rank, target.alpha) for target in read.targets] == [(2, 4.0)]
    with safetensors.safe_open(tmp_path / "out/lora.safetensors", "np") as written:
        assert len(list(written.keys())) == 2 * 4 * (2 + 3 * (4 if model is MIXTRAL else 1))


def test_latent_attention_and_shared_experts_have_native_names(tmp_path: Path) -> None:
    """The first layer is dense, so the experts' ranks are found in later layers."""
    targets = (
        config.LoraTarget(modules=("attention.*",), rank=2, alpha=4.0),
        config.LoraTarget(modules=("ffn.*_proj",), rank=3, alpha=6.0),
    )
    with jax.set_mesh(EIGHT):
        lora = config.Lora(targets=targets)
        parameters = random_parameters(MISTRAL4, lora=lora)
        mistral_lora.export_adapter(parameters, MISTRAL4, lora, tmp_path / "out", dtype="float32")
        read = mistral_lora.read_lora(tmp_path / "out", MISTRAL4)
        written = safetensors.numpy.load_file(tmp_path / "out/lora.safetensors")
    # Smaller ranks are filled up to one rank in these files, so every module is read with the largest.
    assert [(target.rank, target.alpha) for target in read.targets] == [(3, 6.0)]
    attention = ("wq_a", "wq_b", "wkv_a_with_mqa", "wkv_b", "wo")
    names = {f"layers.2.attention.{part}.lora_B.weight" for part in attention}
    names |= {f"layers.2.{part}.w{i}.lora_A.weight" for part in ("shared_experts", "experts.0") for i in (1, 2, 3)}
    assert names | {"layers.0.feed_forward.w1.lora_A.weight"} <= written.keys()
    assert len(written) == 2 * (3 * 5 + 3 + 2 * 3 * (1 + MISTRAL4.ffn.num_experts))
    np.testing.assert_array_equal(
        written["layers.2.attention.wkv_b.lora_B.weight"][:, :2],
        np.asarray(parameters["stacks.1.layers.0.attention.kv_b_proj.lora_b"])[1].reshape(2, -1).T,
    )


def test_ranks_are_filled_up_and_the_scale_goes_into_b(tmp_path: Path) -> None:
    """q and o have rank 2 at scale 1.5, the experts rank 3 at scale 2."""
    with jax.set_mesh(ONE):
        parameters = random_parameters(MIXTRAL, lora=LORA)
        mistral_lora.export_adapter(parameters, MIXTRAL, LORA, tmp_path / "out", dtype="float32")
    written = safetensors.numpy.load_file(tmp_path / "out/lora.safetensors")
    a, b = (written[f"layers.1.attention.wq.lora_{x}.weight"] for x in "AB")
    assert a.shape == (3, 8) and not a[2].any() and b.shape == (24, 3) and not b[:, 2].any()
    pairs = np.asarray(parameters["stacks.0.layers.0.attention.q_proj.lora_b"])[1] * 1.5 / 2
    halves = b[:, :2].T.reshape(2, 4, 3, 2)  # rank, head, pair, which of the pair
    np.testing.assert_allclose(halves.transpose(0, 1, 3, 2).reshape(2, 4, 6), pairs, rtol=1e-6)
    down = np.asarray(parameters["stacks.0.layers.0.ffn.down_proj.lora_b"])[1, 3]
    assert np.array_equal(written["layers.1.feed_forward.experts.3.w2.lora_B.weight"], down.T)
    assert json.loads((tmp_path / "out/params.json").read_text())["lora"]["scaling"] == 2.0


def test_experts_of_their_own_scale_have_it_in_b(tmp_path: Path) -> None:
    """Expert 1 has rank 1 at scale 8, the others rank 3 at 2; a reader knows one of both. All are stored at rank 3 here."""
    own = config.LoraTarget(modules=("ffn.*_proj",), rank=1, alpha=8.0, experts=(1,))
    lora = config.Lora(targets=(LORA.targets[0], own, LORA.targets[1].model_copy(update={"experts": (0, 2, 3)})))
    with jax.set_mesh(ONE):
        parameters = random_parameters(MIXTRAL, lora=lora)
        mistral_lora.export_adapter(parameters, MIXTRAL, lora, tmp_path / "out", dtype="float32")
    written = safetensors.numpy.load_file(tmp_path / "out/lora.safetensors")
    for expert, scale in enumerate([2.0, 8.0, 2.0, 2.0]):
        a, b = (np.asarray(parameters[f"stacks.0.layers.0.ffn.up_proj.lora_{x}"])[2, expert] for x in "ab")
        a_file, b_file = (written[f"layers.2.feed_forward.experts.{expert}.w3.lora_{x}.weight"] for x in "AB")
        np.testing.assert_allclose(2.0 * (b_file @ a_file), scale * (a @ b).T, rtol=1e-4, atol=1e-6)


def test_what_mistral_inference_has_no_place_for_is_refused(tmp_path: Path) -> None:
    elsewhere = LORA.model_copy(update={"targets": (*LORA.targets, config.LoraTarget(modules=("head",), rank=2, alpha=2.0))})
    in_full = LORA.model_copy(update={"train": ("ffn.router",)})
    for lora, said in (
        (elsewhere, "has no adapters of head"),
        (in_full, r"has no place for ffn\.router, which was trained in full"),
    ):
        with jax.set_mesh(ONE), pytest.raises(ValueError, match=said):
            parameters = random_parameters(MIXTRAL, lora=lora)
            mistral_lora.export_adapter(parameters, MIXTRAL, lora, tmp_path / "out", dtype="float32")
    assert not list(tmp_path.iterdir())


def test_what_is_no_adapter_of_the_model_is_refused_in_a_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with jax.set_mesh(ONE):
        mistral_lora.export_adapter(random_parameters(MIXTRAL, lora=LORA), MIXTRAL, LORA, out, dtype="float32")
        other = MIXTRAL.model_copy(update={"model_dim": 16})
        like = adapters_of(abstract(other, lora=mistral_lora.read_lora(out, other)))
        with pytest.raises(ValueError, match=r"lora_A\.weight of shape \(3, 8\) instead of \(3, 16\)"):
            mistral_lora.load_adapter(out, other, like)
        with pytest.raises(ValueError, match="there is no adapter to export"):
            mistral_lora.export_adapter(random_parameters(MIXTRAL), MIXTRAL, LORA, tmp_path / "none", dtype="float32")
    params = out / "params.json"
    for scaling in (0, "2", -1.0, True):
        params.write_text(json.dumps({"lora": {"scaling": scaling}}))
        with pytest.raises(ValueError, match=r"params\.json: lora\.scaling is .*; it has to be a positive number"):
            mistral_lora.read_lora(out, MIXTRAL)
    params.unlink()
    assert {target.alpha / target.rank for target in mistral_lora.read_lora(out, MIXTRAL).targets} == {2.0}
    safetensors.numpy.save_file({"layers.0.mamba.lora_A.weight": np.ones((1, 1))}, out / mistral_lora.LORA_FILE)
    with pytest.raises(ValueError, match=r"mamba\.lora_A\.weight, which this model has no place for"):
        mistral_lora.read_lora(out, MIXTRAL)
    with pytest.raises(FileNotFoundError, match=r"lora\.safetensors is missing"):
        mistral_lora.read_lora(tmp_path, MIXTRAL)
