"""Files in Mistral's own layout, torch-free: bits, logits of a plain reference, and damaged files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_train import config
from moe_train.machine.mesh import put_batch
from moe_train.model import parameters as flat
from moe_train.model import transformer
from moe_train.weights import external
from moe_train.weights.mistral import params_json
from tests.random_parameters import abstract, assert_equal, random_parameters
from tests.tiny import EIGHT, MIXTRAL, ONE
from tests.weights.mistral.models import MISTRAL4, MODELS, write


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [*MODELS.values(), MISTRAL4], ids=[*MODELS, "mistral4"])
def test_a_model_is_read_back_bit_for_bit_on_any_mesh(model: config.Model, dtype: Any, tmp_path: Path) -> None:
    with jax.set_mesh(EIGHT):
        parameters = random_parameters(model, dtype)
        out = write(parameters, model, tmp_path / "out", dtype)
        assert_equal(external.load_external_parameters(out, abstract(model, dtype)), parameters)
    assert external.read_external_model(out) == model
    assert sorted(file.name for file in out.iterdir()) == ["consolidated.safetensors", "params.json"]


def native_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """The model as mistral-inference writes it down, in numpy: interleaved pairs turned by complex multiplication."""
    p, w = json.loads((folder / "params.json").read_text()), safetensors.numpy.load_file(folder / "consolidated.safetensors")
    w = {name: tensor.astype(np.float64) for name, tensor in w.items()}
    T, H, at = len(tokens), p["head_dim"], np.arange(len(tokens))
    freqs, factor, scale = p["rope_theta"] ** -(np.arange(0, H, 2) / H), 1.0, np.ones(T)
    if yarn := p.get("yarn"):  # arXiv:2309.00071
        place = [
            H * np.log(yarn["original_max_position_embeddings"] / (turns * 2 * np.pi)) / (2 * np.log(p["rope_theta"]))
            for turns in (yarn["beta"], yarn["alpha"])
        ]
        low, high = max(np.floor(place[0]), 0), min(np.ceil(place[1]), H - 1)
        ramp = np.clip((np.arange(H // 2) - low) / (high - low), 0, 1)
        freqs = freqs * (1 - ramp) + freqs / yarn["factor"] * ramp
        factor = 0.1 * np.log(yarn["factor"]) + 1 if yarn["apply_scale"] else 1.0
    if llama := p.get("llama_4_scaling"):
        scale = 1 + llama["beta"] * np.log(1 + at // llama["original_max_position_embeddings"])
    turn = factor * np.exp(1j * at[:, None] * freqs)[:, None]
    norm = lambda x, name: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + p["norm_eps"]) * w[name]  # noqa: E731
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    rotate = lambda x: (x.reshape(T, -1, H // 2, 2) @ [1, 1j] * turn).view(np.float64).reshape(T, -1, H)  # noqa: E731
    windows = p.get("sliding_window")
    windows = windows if isinstance(windows, list) else [windows]
    x = w["tok_embeddings.weight"][tokens]
    for i in range(p["n_layers"]):
        layer = f"layers.{i}."
        ffn = lambda x, at: (silu(x @ w[f"{at}w1.weight"].T) * (x @ w[f"{at}w3.weight"].T)) @ w[f"{at}w2.weight"].T  # noqa: E731
        h = norm(x, layer + "attention_norm.weight")
        q, k, v = ((h @ w[f"{layer}attention.w{name}.weight"].T).reshape(T, -1, H) for name in "qkv")
        q, k = rotate(q) * scale[:, None, None], np.repeat(rotate(k), p["n_heads"] // p["n_kv_heads"], 1)
        v = np.repeat(v, p["n_heads"] // p["n_kv_heads"], 1)
        seen = (at[:, None] >= at) & (at[:, None] - at < (windows[i % len(windows)] or T))
        scores = np.where(seen, np.einsum("tnh,snh->nts", q, k) / np.sqrt(H), -np.inf)
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        heads = np.einsum("nts,snh->tnh", chances / chances.sum(-1, keepdims=True), v).reshape(T, -1)
        x = x + heads @ w[layer + "attention.wo.weight"].T
        h, feed = norm(x, layer + "ffn_norm.weight"), layer + "feed_forward."
        if moe := p.get("moe"):
            gate = h @ w[feed + "gate.weight"].T
            for t in at:
                chosen = np.argsort(gate[t])[-moe["num_experts_per_tok"] :]
                share = np.exp(gate[t, chosen]) / np.exp(gate[t, chosen]).sum()
                x[t] += sum(s * ffn(h[t], f"{feed}experts.{e}.") for s, e in zip(share, chosen, strict=True))
        else:
            x = x + ffn(h, feed)
    return norm(x, "norm.weight") @ w["tok_embeddings.weight" if p["tied_embeddings"] else "output.weight"].T


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_plain_native_model_has_our_logits(model: config.Model, tmp_path: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, 24)
    with jax.set_mesh(ONE):
        compute = config.Compute()
        structure, _ = flat.parameters(transformer.abstract_model(model, compute))
        parameters = {path: array * 3 for path, array in random_parameters(model).items()}
        batch = put_batch((tokens[None], np.arange(24)[None], np.ones((1, 24), int)), ONE)
        module = flat.combine(structure, parameters)
        ours = np.asarray(jax.jit(lambda batch: module.logits(module(*batch)[0]))(batch))[0]
    theirs = native_logits(write(parameters, model, tmp_path / "out"), tokens)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4


def test_shards_with_an_index_and_the_vision_part_of_a_release(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = random_parameters(MIXTRAL)
        folder = write(parameters, MIXTRAL, tmp_path / "out")
        tensors = safetensors.numpy.load_file(folder / "consolidated.safetensors")
        vision = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 0, "num_attention_heads": 2, "image_size": 8}
        vision |= {"patch_size": 2, "adapter_bias": False}
        params = json.loads((folder / "params.json").read_text())
        (folder / "params.json").write_text(json.dumps(params | {"vision_encoder": vision}))
        tensors |= {"vision_encoder.patch_conv.weight": np.ones((4, 3, 2, 2)), "vision_encoder.ln_pre.weight": np.ones(4)}
        tensors |= {"vision_language_adapter.w_in.weight": np.ones((8, 4)), "vision_language_adapter.w_out.weight": np.ones((8, 8))}
        (folder / "consolidated.safetensors").unlink()
        halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
        places = {}
        for i, half in enumerate(halves, 1):
            safetensors.numpy.save_file(half, folder / f"consolidated-0000{i}-of-00002.safetensors")
            places |= dict.fromkeys(half, f"consolidated-0000{i}-of-00002.safetensors")
        index = folder / "consolidated.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        assert_equal(external.load_external_parameters(folder, abstract(MIXTRAL)), parameters)
    for name in ("../consolidated.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": {**places, "norm.weight": name}}))
        with pytest.raises(
            ValueError, match=r"consolidated\.safetensors\.index\.json names the file .*; shards must be plain names"
        ):
            external.open_external_weights(folder)


def test_a_tied_model_with_an_output_of_its_own_is_refused_and_a_copy_left_out(tmp_path: Path) -> None:
    model = MODELS["ministral3"]
    with jax.set_mesh(ONE):
        parameters = random_parameters(model)
        folder = write(parameters, model, tmp_path / "out")
        file = folder / "consolidated.safetensors"
        tensors = safetensors.numpy.load_file(file)
        safetensors.numpy.save_file({**tensors, "output.weight": tensors["tok_embeddings.weight"]}, file)
        assert_equal(external.load_external_parameters(folder, abstract(model)), parameters)
        safetensors.numpy.save_file({**tensors, "output.weight": tensors["tok_embeddings.weight"] + 1}, file)
        with pytest.raises(
            ValueError, match=r"output\.weight that differs from the embedding, but tied_embeddings is true in its params\.json"
        ):
            external.open_external_weights(folder)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        folder = write(random_parameters(MIXTRAL), MIXTRAL, tmp_path / "out")
        file = folder / "consolidated.safetensors"
        tensors = safetensors.numpy.load_file(file)
        gate = tensors.pop("layers.3.feed_forward.gate.weight")
        changed = {**tensors, "layers.3.gate.weight": gate, "norm.weight": np.ones(9, np.float32)}
        safetensors.numpy.save_file(changed, file)
        with pytest.raises(ValueError, match="does not hold the model") as refused:
            external.load_external_parameters(folder, abstract(MIXTRAL))
    for said in (
        "lacks layers.3.feed_forward.gate.weight",
        "has layers.3.gate.weight",
        "norm.weight of shape (9,) instead of (8,)",
    ):
        assert said in str(refused.value)


def header(tensors: str, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = tensors.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


A = '"norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "truncated": header("{" + A + "}", b"\0" * 7),
        "data to spare": header("{" + A + "}", b"\0" * 9),
        "overlapping": header("{" + A + "," + A.replace("norm", "b").replace("[0,8]", "[4,12]") + "}", b"\0" * 12),
        "the same bytes": header("{" + A + "," + A.replace("norm", "b") + "}"),
        "a gap": header("{" + A + "," + A.replace("norm", "b").replace("[0,8]", "[12,20]") + "}", b"\0" * 20),
        "a name twice": header("{" + A.replace("[2]", "[4]").replace("[0,8]", "[8,24]") + "," + A + "}"),
        "a field twice": header("{" + A.replace('"shape":[2]', '"shape":[4],"shape":[2]') + "}"),
        "a header of 2^60 bytes": header("{" + A + "}", length=2**60),
        "a shape of more than 2^64": header("{" + A.replace("[2]", f"[{2**62},4]") + "}"),
        "a negative shape": header("{" + A.replace("[2]", "[-2]") + "}"),
        "offsets the wrong way": header("{" + A.replace("[0,8]", "[8,0]") + "}"),
        "another dtype": header("{" + A.replace("F32", "Q4_K") + "}"),
        "quantised": header("{" + A.replace('"F32","shape":[2]', '"F8_E4M3","shape":[8]') + "}"),
        "no object": header("[1]", b""),
        "a pickle": b"\x80\x04K\x01.",
    }.items(),
    ids=lambda item: item[0],
)
def test_a_damaged_header_is_one_clear_line(content: tuple[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(params_json.write_model_config(MIXTRAL)))
    (tmp_path / "consolidated.safetensors").write_bytes(content[1])
    with pytest.raises(ValueError) as refused:
        external.open_external_weights(tmp_path)
    message = str(refused.value)
    assert "consolidated.safetensors" in message and "\n" not in message and len(message) < 500
