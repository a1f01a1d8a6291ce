"""A dense model and the Mixtral made of it: equal logits without noise, every tensor from its place, nothing half done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.commands.upcycle import NewExperts, mixtral_of, upcycle
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import combine, parameters
from moe_train.model.transformer import abstract_model
from moe_train.weights import external, safetensors_files, texts
from tests.commands.runs import ONE

SIZES: dict[str, Any] = {"vocab_size": 300, "model_dim": 16, "num_layers": 2, "max_seq_len": 64, "init_stddev": 0.02}
ATTENTION = config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=6, windows=(None,))
FFN = config.DenseFfn(name="dense", ffn_dim=12)
LLAMA = config.Model(family="llama", attention=ATTENTION, ffn=FFN, tie_embeddings=True, **SIZES)
MISTRAL = config.Model(family="mistral", attention=ATTENTION.model_copy(update={"windows": (5,)}), ffn=FFN, **SIZES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_tokenizer(["the cat sat on the mat"] * 4, 300, tmp_path_factory.mktemp("tokenizer") / "bpe")


def dense_dir(directory: Path, model: config.Model, tokenizer: Any, dtype: config.Dtype = "float32") -> Path:
    """A directory of normal weights."""
    compute = config.Compute(param_dtype=dtype)
    with jax.set_mesh(ONE):
        _, shapes = parameters(abstract_model(model, compute))
        draw = np.random.default_rng(0).normal
        weights = {
            path: jax.device_put(draw(0, 0.3, x.shape).astype(x.dtype), NamedSharding(ONE, x.sharding.spec))
            for path, x in shapes.items()
        }
        write_and_prove.export_model(
            weights, model, directory, write_and_prove.WriteOptions(dtype=dtype, texts=texts.Texts(tokenizer))
        )
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.3}')
    return directory


def logits(directory: Path) -> np.ndarray:
    model = external.read_external_model(directory)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 20)).astype(np.int32)
    with jax.set_mesh(ONE):
        structure, shapes = parameters(abstract_model(model, config.Compute()))
        weights = external.load_external_parameters(directory, shapes)
        batch = put_batch((tokens, np.tile(np.arange(20, dtype=np.int32), (2, 1)), np.ones_like(tokens)), ONE)

        @jax.jit
        def run(weights: Any, *batch: jax.Array) -> jax.Array:
            module = combine(structure, weights)
            return module.logits(module(*batch)[0])

        return np.asarray(run(weights, *batch))


@pytest.mark.parametrize("model", [LLAMA, MISTRAL], ids=["llama, tied", "mistral, window"])
def test_without_noise_the_logits_are_the_dense_models(model: config.Model, tokenizer: Any, tmp_path: Path) -> None:
    base = dense_dir(tmp_path / "dense", model, tokenizer)
    report = upcycle(base, tmp_path / "sparse", NewExperts(4, 2), max_shard_bytes=5000)
    made = external.read_external_model(tmp_path / "sparse")
    assert made.family == "mixtral" and made.ffn == config.MoeFfn(name="moe", ffn_dim=12, num_experts=4, experts_per_token=2)
    assert (made.tie_embeddings, made.attention.windows) == (model.tie_embeddings, model.attention.windows)
    wanted, found = logits(base), logits(tmp_path / "sparse")
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    ffn = 2 * 3 * 16 * 12
    assert report["parameters"] == report["parameters_of_base"] + 3 * ffn + 2 * 16 * 4
    assert report["active_parameters"] == report["parameters"] - 2 * ffn


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [(NewExperts(8, 4, granularity=4), "bfloat16"), (NewExperts(9, 6, granularity=3), "float32")],
    ids=["one copy a token", "two copies a token"],
)
def test_fine_grained_experts_compute_what_the_dense_layer_did(
    experts: NewExperts, dtype: config.Dtype, tokenizer: Any, tmp_path: Path
) -> None:
    base = dense_dir(tmp_path / "dense", LLAMA, tokenizer, dtype)
    report = upcycle(base, tmp_path / "sparse", experts)
    made = external.read_external_model(tmp_path / "sparse").ffn
    assert isinstance(made, config.MoeFfn)
    assert (made.ffn_dim, made.num_experts, made.experts_per_token) == (12 // experts.granularity, experts.count, experts.per_token)
    wanted, found = logits(base), logits(tmp_path / "sparse")
    assert np.abs(found - wanted).max() <= 2e-6 * np.abs(wanted).max()
    copies = experts.count // experts.granularity
    assert report["parameters"] == report["parameters_of_base"] + 2 * ((copies - 1) * 3 * 16 * 12 + 16 * experts.count)
    written = safetensors_files.open_model_tensors(tmp_path / "sparse")
    router = written["model.layers.1.block_sparse_moe.gate.weight"].read().astype(np.float32).reshape(copies, -1, 16)
    assert (
        np.array_equal(router, np.repeat(router[:, :1], experts.granularity, axis=1)) and len(np.unique(router[:, 0, 0])) == copies
    )


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (NewExperts(8, 2, granularity=4), "--experts-per-token 2 is not a multiple of --granularity 4"),
        (NewExperts(6, 4, granularity=4), "--experts 6 is not a multiple of --granularity 4"),
        (NewExperts(10, 5, granularity=5), "--granularity 5 does not divide the feed-forward width 12"),
        (NewExperts(4, 4, granularity=4), "is a single copy; use at least 8 experts"),
        (NewExperts(4, 4, granularity=0), "--granularity 0 is not a number"),
    ],
)
def test_a_granularity_that_does_not_fit_is_refused(experts: NewExperts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixtral_of(LLAMA, experts, "BASE")


def test_every_tensor_is_from_its_place(tokenizer: Any, tmp_path: Path) -> None:
    base = dense_dir(tmp_path / "dense", MISTRAL, tokenizer, "bfloat16")
    upcycle(base, tmp_path / "sparse", NewExperts(3))
    old, new = (safetensors_files.open_model_tensors(path) for path in (base, tmp_path / "sparse"))
    renamed = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    routers = []
    for name, tensor in new.items():
        assert tensor.dtype.name == "bfloat16"
        if name.endswith(".gate.weight"):
            routers.append(tensor.read().astype(np.float32))
            continue
        if ".experts." in name:
            layer, _, rest = name.partition(".block_sparse_moe.experts.")
            name = f"{layer}.mlp.{renamed[rest.split('.')[1]]}.weight"
        np.testing.assert_array_equal(tensor.read().view(np.uint8), old[name].read().view(np.uint8))
    assert len(routers) == 2 and not np.array_equal(*routers)
    assert abs(np.std(routers) / SIZES["init_stddev"] - 1) < 0.2
    assert json.loads((tmp_path / "sparse/generation_config.json").read_text())["eos_token_id"] == [2, 7]
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "sparse" / file).read_bytes() == (base / file).read_bytes()


def test_noise_parts_the_experts_and_nothing_else(tokenizer: Any, tmp_path: Path) -> None:
    base = dense_dir(tmp_path / "dense", LLAMA, tokenizer)
    for out, seed in (("a", 1), ("again", 1), ("b", 2)):
        upcycle(base, tmp_path / out, NewExperts(2, noise=0.1, seed=seed))
    plain = safetensors_files.open_model_tensors(base)
    a, again, b = (safetensors_files.open_model_tensors(tmp_path / out) for out in ("a", "again", "b"))
    shares = []
    for name in a:
        np.testing.assert_array_equal(a[name].read(), again[name].read())
        if ".experts." in name:
            dense = plain[f"{name.partition('.block')[0]}.mlp.{'gate_proj' if '.w1.' in name else 'up_proj'}.weight"]
            assert not np.array_equal(a[name].read(), b[name].read())
            assert not np.array_equal(a[name].read(), a[name.replace("experts.0", "experts.1")].read()) or "experts.1" in name
            if ".w2." not in name:
                shares.append(np.std(a[name].read() - dense.read()) / np.std(dense.read()))
        elif name in plain:
            np.testing.assert_array_equal(a[name].read(), plain[name].read())
    assert len(shares) == 8 and all(abs(share / 0.1 - 1) < 0.25 for share in shares)


def test_what_cannot_be_upcycled_is_refused_and_leaves_nothing(tokenizer: Any, tmp_path: Path) -> None:
    base = dense_dir(tmp_path / "dense", LLAMA, tokenizer)
    upcycle(base, tmp_path / "sparse")
    interleaved = config.Model(family="ministral", attention=ATTENTION.model_copy(update={"windows": (None, 4)}), ffn=FFN, **SIZES)
    dense_dir(tmp_path / "ministral", interleaved, tokenizer)
    yarn = config.YarnRope(name="yarn", factor=4.0, original_max_seq_len=16)
    dense_dir(
        tmp_path / "ministral3", config.Model(family="ministral3", attention=ATTENTION, ffn=FFN, rope=yarn, **SIZES), tokenizer
    )
    before = sorted(tmp_path.iterdir())
    for source, error in (("sparse", "already has 8 experts"), ("ministral", "some layers only"), ("ministral3", "yarn")):
        with pytest.raises(ValueError, match=error):
            upcycle(tmp_path / source, tmp_path / "out")
    with pytest.raises(ValueError, match="--experts-per-token 3 does not fit --experts 2"):
        upcycle(base, tmp_path / "out", NewExperts(2, 3))
    with pytest.raises(ValueError, match="--noise -1 is not a standard deviation"):
        upcycle(base, tmp_path / "out", NewExperts(noise=-1))
    with pytest.raises(FileExistsError, match="already exists"):
        upcycle(base, tmp_path / "sparse")
    with pytest.raises(FileNotFoundError):
        upcycle(tmp_path / "nothing", tmp_path / "out")
    damaged = tmp_path / "dense/model-00001-of-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        upcycle(base, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
