"""A larger vocabulary: where rows go under Mistral's real tokenizers, equal logits, files, what is refused."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.checkpoint import model_dir
from moe_train.cli import main
from moe_train.commands.extend_vocab import extend_vocab, load_any_tokenizer, new_ids
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import new_directory
from moe_train.machine.mesh import put_batch
from moe_train.model import parameters, transformer
from moe_train.weights import external, hf, mistral, names
from tests.commands.runs import ONE

DATA = Path(str(resources.files("mistral_common") / "data"))
MODEL = config.Model(
    family="mixtral",
    vocab_size=32000,
    model_dim=8,
    num_layers=2,
    attention=config.GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=4),
    ffn=config.MoeFfn(name="moe", ffn_dim=8, num_experts=2, experts_per_token=1),
    max_seq_len=32,
)


def make_base(
    out: Path, model: config.Model, layout: Any = hf, dtype: Any = "float32", tokenizer: str = "tokenizer.model.v1"
) -> Path:
    with new_directory(out) as directory:
        rng = np.random.default_rng(0)
        layout.write(directory, model, dtype, lambda piece: rng.normal(0, 0.3, piece.shape).astype(dtype))
        shutil.copy(DATA / tokenizer, directory / tokenizer)
    return out


def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    model = external.read_external_model(folder)
    with jax.set_mesh(ONE):
        abstract = transformer.abstract_model(model, config.Compute())
        structure, shapes = parameters.parameters(abstract)
        module = parameters.combine(structure, external.load_external_parameters(folder, shapes))
        batch = put_batch((tokens[None], np.arange(len(tokens))[None], np.ones((1, len(tokens)), int)), ONE)
        return np.asarray(jax.jit(lambda batch: module.logits(module(*batch)[0]))(batch))[0]


@pytest.fixture(scope="module")
def v1() -> Tokenizer:
    return Mistral(DATA / "tokenizer.model.v1")


@pytest.mark.parametrize("version", ["v2", "v3", "v7"])
def test_mistrals_sentencepiece_versions_put_768_control_tokens_at_3(version: str, v1: Tokenizer) -> None:
    ids = new_ids(v1, load_any_tokenizer(version))
    assert ids == {i: i if i < 3 else i + 768 for i in range(32000)}


@pytest.mark.parametrize("layout", [hf, mistral], ids=["hf", "mistral"])
def test_texts_without_new_tokens_keep_their_logits(layout: Any, tmp_path: Path, v1: Tokenizer) -> None:
    base = make_base(tmp_path / "base", MODEL, layout)
    report = extend_vocab(base, tmp_path / "out", "v3", "hf" if layout is hf else "mistral")
    assert report["tokens_before"] == 32000 and report["tokens"] == 32768 and report["ids_moved"] == 31997
    v3 = load_tokenizer(model_dir.find_tokenizer_config(tmp_path / "out"))
    text = "The capital of France is 巴黎."
    before, after = (np.array([1, *tokenizer.encode(text)]) for tokenizer in (v1, v3))
    ids = new_ids(v1, v3)
    assert [ids[i] for i in before] == list(after)
    was, now = logits(base, before), logits(tmp_path / "out", after)
    np.testing.assert_allclose(now[:, list(ids.values())], was[:, list(ids)], atol=1e-5)
    # a new token is about as likely as the mean of the others
    np.testing.assert_allclose(now[:, 3:771], was.mean(-1, keepdims=True).repeat(768, -1), atol=1e-5)


def test_the_files_of_an_extended_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied = MODEL.model_copy(update={"tie_embeddings": True, "vocab_size": 32064})  # rows to spare, which no id has
    base = make_base(tmp_path / "base", tied, dtype="bfloat16")
    with pytest.raises(SystemExit) as done:
        main.main(["extend-vocab", str(base), str(tmp_path / "out"), "--tokenizer", "v3", "--json"])
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model.v3",
    ]
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / "out" / name).read_text())
        assert (fields["bos_token_id"], fields["eos_token_id"]) == (1, 2)
    assert external.read_external_model(tmp_path / "out") == tied.model_copy(update={"vocab_size": 32768})


def test_what_cannot_be_extended_is_refused_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base", MODEL)
    small = make_base(tmp_path / "small", MODEL.model_copy(update={"vocab_size": 31999}))
    faults = {
        (base, "v9"): "v9: no such file or directory, and not a version of Mistral's tokenizer (v1, v2",
        (base, "v11"): "mistral-common contains no sentencepiece model of version v11",
        (base, "v1"): "has the same 32000 tokens as",
        (base, str(DATA / "tekken_240911.json")): "31997 of the 32000 tokens of",
        (small, "v3"): "has 32000 ids, the model's vocab_size is 31999",
        (tmp_path / "none", "v3"): "none",
    }
    for (model, tokenizer), said in faults.items():
        with pytest.raises(SystemExit) as done:
            main.main(["extend-vocab", str(model), str(tmp_path / "out"), "--tokenizer", tokenizer])
        (line,) = capsys.readouterr().err.splitlines()
        assert done.value.code == 2 and said in line, line
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "small"]


def test_a_row_that_is_written_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_train.commands import extend_vocab as module

    base, right = make_base(tmp_path / "base", MODEL), module.extend_table
    monkeypatch.setattr(module, "extend_table", lambda *given: np.roll(right(*given), 1, 0))
    with pytest.raises(RuntimeError, match=r"embed_tokens\.weight in .* differs from the base's"):
        extend_vocab(base, tmp_path / "out", "v3")
    assert not (tmp_path / "out").exists()
    assert names.HUGGING_FACE.head.path in module._VOCAB_TABLES
