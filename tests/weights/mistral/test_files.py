"""Mistral's own layout, torch-free: params.json both ways, the files, bits, logits of a plain reference, damaged input."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_train import config
from moe_train.machine.files import new_directory
from moe_train.machine.mesh import put_batch
from moe_train.model import parameters as flat
from moe_train.model import transformer
from moe_train.weights import external, mistral
from moe_train.weights import merge as merging
from moe_train.weights.mistral import params_json
from tests.random_parameters import random_parameters
from tests.weights.hf.test_files import EIGHT, MINISTRAL, MIXTRAL, ONE, SIZES, abstract, assert_equal

DENSE = config.DenseFfn(name="dense", ffn_dim=12)
ATTENTION = config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=6)
YARN = config.YarnRope(name="yarn", theta=1e4, factor=4.0, original_max_seq_len=8, beta_fast=4.0)
SCALED = ATTENTION.model_copy(update={"query_scaling": config.QueryScaling(beta=0.1, original_max_seq_len=8)})
MODELS = {
    "mixtral": MIXTRAL,
    "mistral": config.Model(
        family="mistral", attention=ATTENTION.model_copy(update={"windows": (4,)}), ffn=DENSE, norm_eps=1e-6, **SIZES
    ),
    "ministral": MINISTRAL.model_copy(update={"tie_embeddings": False}),
    "ministral3": config.Model(family="ministral3", attention=SCALED, ffn=DENSE, rope=YARN, tie_embeddings=True, **SIZES),
    "scaled yarn": config.Model(
        family="ministral3",
        attention=ATTENTION,
        ffn=DENSE,
        rope=YARN.model_copy(update={"mscale": 0.0, "mscale_all_dim": 0.0}),
        **SIZES,
    ),
}


def write(parameters: Mapping[str, jax.Array], model: config.Model, out: Path, dtype: Any = "float32") -> Path:
    with new_directory(out) as directory:
        mistral.write(
            directory, model, dtype, lambda piece: piece.to_file(merging.merged(parameters, None, piece, np.dtype(dtype)))
        )
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_model_is_read_back_bit_for_bit_on_any_mesh(model: config.Model, dtype: Any, tmp_path: Path) -> None:
    with jax.set_mesh(EIGHT):
        parameters = random_parameters(model, dtype)
        out = write(parameters, model, tmp_path / "out", dtype)
        assert_equal(external.load_parameters(out, abstract(model, dtype)), parameters)
    assert external.read_model(out) == model
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
        structure, _ = flat.parameters(jax.eval_shape(lambda: transformer.init_model(0, model, compute)))
        parameters = {path: array * 3 for path, array in random_parameters(model).items()}
        batch = put_batch((tokens[None], np.arange(24)[None], np.ones((1, 24), int)), ONE)
        module = flat.combine(structure, parameters)
        ours = np.asarray(jax.jit(lambda batch: module.logits(module(*batch)[0]))(batch))[0]
    theirs = native_logits(write(parameters, model, tmp_path / "out"), tokens)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4


# --- what other people's files hold ------------------------------------------------------------------------------

PARAMS = params_json.write_model_config(MIXTRAL)


def read(params: Any, folder: Path) -> config.Model:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(params if isinstance(params, str) else json.dumps(params))
    return external.read_model(folder)


def test_the_files_of_released_models_are_understood(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fields as in Mistral 7B v0.1, Mixtral 8x7B, Ministral 8B and Ministral 3B."""
    size = {"dim": 64, "n_layers": 4, "head_dim": 16, "hidden_dim": 128, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-05}
    size["vocab_size"] = 32000
    first = read({**size, "sliding_window": 4096, "rope_theta": 1e4}, tmp_path)
    assert (first.family, first.attention.windows, first.rope.theta) == ("mistral", (4096,), 1e4)
    moe = read({**size, "max_batch_size": 0, "moe": {"num_experts_per_tok": 2, "num_experts": 8}}, tmp_path)
    assert (moe.family, moe.rope.theta, moe.max_seq_len) == ("mixtral", 1e6, 128_000)
    window = [None, 32768]
    inter = read({**size, "rope_theta": 1e8, "_sliding_window": window * 2, "max_position_embeddings": 32768}, tmp_path)
    assert (inter.family, inter.attention.windows, inter.max_seq_len) == ("ministral", (None, 32768), 32768)
    yarn = {"original_max_position_embeddings": 16384, "factor": 16, "apply_scale": False, "beta": 32, "alpha": 1}
    scaling = {"original_max_position_embeddings": 16384, "beta": 0.1}
    third = {
        "rope_theta": 1e6,
        "tied_embeddings": True,
        "yarn": yarn,
        "llama_4_scaling": scaling,
        "vision_encoder": {"image_size": 1540},
    }
    three = read({**size, **third, "max_position_embeddings": 262144}, tmp_path)
    assert three.family == "ministral3" and three.tie_embeddings and three.max_seq_len == 262144
    assert isinstance(three.rope, config.YarnRope) and (three.rope.mscale, three.rope.mscale_all_dim) == (1.0, 1.0)
    assert three.attention.query_scaling == config.QueryScaling(beta=0.1, original_max_seq_len=16384)
    assert not caplog.records
    read({**size, "rope_theta": 1e6, "new_field": 1}, tmp_path)
    assert "fields that are not read here: new_field" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dim": None}, "dim: Input should be a valid integer"),
        ({"dim": "8"}, "dim: Input should be a valid integer"),
        ({"dim": True}, "dim: Input should be a valid integer"),
        ({"n_layers": 0}, "n_layers: Input should be greater than or equal to 1"),
        ({"norm_eps": -1}, "norm_eps: Input should be greater than 0"),
        ({"norm_eps": float("nan")}, "norm_eps: Input should be "),
        ({"n_heads": 3}, "num_heads 3 is not a multiple of num_kv_heads 2"),
        ({"moe": {"num_experts": 4}}, "moe.num_experts_per_tok: Field required"),
        (
            {"moe": {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}},
            "moe.num_shared_experts: is not built here",
        ),
        ({"moe": []}, "moe: Input should be "),
        ({"sliding_window": [4, None, 4]}, "sliding_window has 3 entries, of which n_layers 4 is no multiple"),
        ({"sliding_window": []}, "sliding_window has 0 entries"),
        ({"sliding_window": 4, "_sliding_window": 4}, "sliding_window and _sliding_window are both stated"),
        ({"sliding_window": 4, "rope_theta": None}, "rope_theta is not stated, and its default differs"),
        ({"yarn": {"factor": 2.0}}, "yarn.original_max_position_embeddings: Field required"),
        ({"q_lora_rank": 1024}, "q_lora_rank is 1024, which is not built here"),
        (
            {"quantization": {"qformat_weight": "fp8_e4m3"}},
            "quantization is {'qformat_weight': 'fp8_e4m3'}, which is not built here",
        ),
        ({"model_type": "mamba"}, "model_type is 'mamba', which is not built here; it has to be 'transformer'"),
        ({"use_biases": True}, "use_biases is True"),
        ({"tied_embeddings": "yes"}, "tied_embeddings: Input should be a valid boolean"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_params_json_that_is_not_built_here_is_refused_in_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        read({**PARAMS, **change}, tmp_path)
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'params.json'}: ") and said in message and "\n" not in message


def test_a_params_json_that_is_none_is_refused(tmp_path: Path) -> None:
    for text, said in (
        ("", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("{" * 10_000, "is not JSON"),
        ("{}", "dim: Field required"),
    ):
        with pytest.raises(ValueError, match=said):
            read(text, tmp_path)
    (tmp_path / "params.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model: looked for config\.json .*params\.json"):
        external.read_model(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(FileNotFoundError, match="is an adapter, not a model; add it to its base: moe-train adapters merge BASE"):
        external.read_model(tmp_path)


def test_what_params_json_has_no_words_for_is_refused() -> None:
    model = MODELS["ministral3"]
    uneven = model.model_copy(update={"rope": YARN.model_copy(update={"mscale": 0.7})})
    with pytest.raises(ValueError, match=r"rope\.mscale 0\.7 and rope\.mscale_all_dim 1\.0 differ"):
        params_json.write_model_config(uneven)


def test_families_that_mean_the_same_are_read_as_one(tmp_path: Path) -> None:
    llama = config.Model(family="llama", attention=ATTENTION, ffn=DENSE, init_stddev=0.1, **SIZES)
    written = params_json.as_written(llama)
    assert read(params_json.write_model_config(llama), tmp_path) == written
    assert (written.family, written.init_stddev) == ("mistral", 0.02)
    halves = YARN.model_copy(update={"mscale": 0.5, "mscale_all_dim": 0.5})
    same = MODELS["ministral3"].model_copy(update={"rope": halves})  # 0.5 over 0.5 is 1, too
    assert params_json.as_written(same) == MODELS["ministral3"]


def test_shards_with_an_index_and_the_vision_part_of_a_release(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = random_parameters(MIXTRAL)
        folder = write(parameters, MIXTRAL, tmp_path / "out")
        tensors = safetensors.numpy.load_file(folder / "consolidated.safetensors")
        tensors |= {"vision_encoder.conv.weight": np.ones(2), "patch_merger.w": np.ones(2)}
        (folder / "consolidated.safetensors").unlink()
        halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
        places = {}
        for i, half in enumerate(halves, 1):
            safetensors.numpy.save_file(half, folder / f"consolidated-0000{i}-of-00002.safetensors")
            places |= dict.fromkeys(half, f"consolidated-0000{i}-of-00002.safetensors")
        index = folder / "consolidated.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        assert_equal(external.load_parameters(folder, abstract(MIXTRAL)), parameters)
    for name in ("../consolidated.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": {**places, "norm.weight": name}}))
        with pytest.raises(ValueError, match=r"consolidated\.safetensors\.index\.json names .*; files of a model lie beside"):
            external.open_weights(folder)


def test_a_tied_model_with_an_output_of_its_own_is_refused_and_a_copy_left_out(tmp_path: Path) -> None:
    model = MODELS["ministral3"]
    with jax.set_mesh(ONE):
        parameters = random_parameters(model)
        folder = write(parameters, model, tmp_path / "out")
        file = folder / "consolidated.safetensors"
        tensors = safetensors.numpy.load_file(file)
        safetensors.numpy.save_file({**tensors, "output.weight": tensors["tok_embeddings.weight"]}, file)
        assert_equal(external.load_parameters(folder, abstract(model)), parameters)
        safetensors.numpy.save_file({**tensors, "output.weight": tensors["tok_embeddings.weight"] + 1}, file)
        with pytest.raises(ValueError, match=r"output\.weight of its own, but tied_embeddings is true in its params\.json"):
            external.open_weights(folder)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        folder = write(random_parameters(MIXTRAL), MIXTRAL, tmp_path / "out")
        file = folder / "consolidated.safetensors"
        tensors = safetensors.numpy.load_file(file)
        gate = tensors.pop("layers.3.feed_forward.gate.weight")
        changed = {**tensors, "layers.3.gate.weight": gate, "norm.weight": np.ones(9, np.float32)}
        safetensors.numpy.save_file(changed, file)
        with pytest.raises(ValueError, match="does not hold the model") as refused:
            external.load_parameters(folder, abstract(MIXTRAL))
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
    read(PARAMS, tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(content[1])
    with pytest.raises(ValueError) as refused:
        external.open_weights(tmp_path)
    message = str(refused.value)
    assert "consolidated.safetensors" in message and "\n" not in message and len(message) < 500
