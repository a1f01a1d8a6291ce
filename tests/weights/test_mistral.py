"""Mistral's own layout, torch-free: params.json both ways, the files, bits, logits of a plain reference, damaged input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_train import config
from moe_train.atomic import new_directory
from moe_train.mesh import put_batch
from moe_train.model import transformer
from moe_train.weights import foreign, mistral
from moe_train.weights import merge as merging
from tests.weights.test_hf import EIGHT, MINISTRAL, MIXTRAL, ONE, SIZES, abstract, assert_equal, random_parameters

DENSE = config.DenseFfn(name="dense", ffn_dim=12)
ATTENTION = config.Attention(num_heads=4, num_kv_heads=2, head_dim=6)
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
        assert_equal(foreign.load_parameters(out, abstract(model, dtype)), parameters)
    assert foreign.read_model(out) == model
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
        structure, _ = transformer.parameters(jax.eval_shape(lambda: transformer.init_model(0, model, compute)))
        parameters = {path: array * 3 for path, array in random_parameters(model).items()}
        batch = put_batch((tokens[None], np.arange(24)[None], np.ones((1, 24), int)), ONE)
        module = transformer.combine(structure, parameters)
        ours = np.asarray(jax.jit(lambda batch: module.logits(module(*batch)[0]))(batch))[0]
    theirs = native_logits(write(parameters, model, tmp_path / "out"), tokens)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4
