"""From a run's checkpoint to files: the same as from the weights in memory."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.checkpoint import model_dir
from moe_train.commands import write_and_prove
from moe_train.commands.export import ExportOptions, export
from moe_train.commands.serve_export import serve_command
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import Parameters
from moe_train.weights import external, hf, peft
from moe_train.weights.texts import Texts
from tests.commands.runs import LORA, MESH, MODEL, save_run
from tests.commands.wrapper import TOWER, save_run_on_wrapper
from tests.random_parameters import random_parameters


def same_files(one: Path, other: Path, *but: str) -> None:
    names, other_names = ({file.name for file in folder.iterdir()} - set(but) for folder in (one, other))
    assert names == other_names
    assert filecmp.cmpfiles(one, other, names, shallow=False)[1:] == ([], [])


def test_a_lora_run_becomes_a_merged_model_and_an_adapter(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(MESH)):
        weights = random_parameters(MODEL, lora=LORA)
        plain = {path: x for path, x in weights.items() if ".lora_" not in path}
        write_and_prove.export_model(plain, MODEL, tmp_path / "base", write_and_prove.WriteOptions(dtype="bfloat16"))
        weights |= external.load_external_parameters(tmp_path / "base", plain_shapes(plain))
        save_run(tmp_path / "run", weights, small_tokenizer, init_from=str(tmp_path / "base"), lora=LORA)
        texts = Texts(small_tokenizer, small_tokenizer.chat_template, "")
        write_and_prove.export_model(
            weights, MODEL, tmp_path / "merged", write_and_prove.WriteOptions(dtype="bfloat16", lora=LORA, merge=True, texts=texts)
        )
        peft.export_adapter(weights, MODEL, LORA, tmp_path / "adapter", base_model=str(tmp_path / "base"), texts=texts)
    report = export(tmp_path / "run", tmp_path / "hf", "hf", merge=True)
    (merge,) = (check["figures"] for check in report["checks"] if check["name"] == "merge")
    assert merge["count"] == 2 * (4 + 3 * 4)
    documents = ("README.md", "ml_bom.cdx.json")
    same_files(tmp_path / "hf", tmp_path / "merged", "moe_train.yaml", "export_proof.json", *documents)
    assert f"base_model: {tmp_path}/base" in (tmp_path / "hf/README.md").read_text()
    assert set(documents) < set(report["files"])  # a proof covers them too
    line = export(tmp_path / "run", tmp_path / "peft", "peft", options=ExportOptions(server="vllm"))["serve"]
    assert line == f"vllm serve {tmp_path}/base --enable-lora --max-lora-rank 8 --lora-modules peft={tmp_path}/peft"
    opened = model_dir.open_model(tmp_path / "run")
    assert opened.run is not None
    weights_of_the_run = config.PretrainedWeights(path=str(tmp_path / "run"))
    on_a_run = opened._replace(run=opened.run.model_copy(update={"initial_weights": weights_of_the_run}))
    line = serve_command("vllm", "peft", on_a_run, "out")
    assert line is not None and line.startswith(
        f"moe-train export {tmp_path}/run BASE_MODEL && vllm serve BASE_MODEL --enable-lora"
    )
    assert (tmp_path / "peft/export_proof.json").is_file()
    assert "rank: 2" in (tmp_path / "hf/moe_train.yaml").read_text()
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == small_tokenizer.files[0].read_bytes()
    with pytest.raises(ValueError, match="--merge"):
        export(tmp_path / "run", tmp_path / "other", "hf")
    with pytest.raises(ValueError, match="--format hf"):
        export(tmp_path / "run", tmp_path / "other", "peft", merge=True)
    with pytest.raises(FileExistsError, match="already exists"):
        export(tmp_path / "run", tmp_path / "hf", "hf", merge=True)
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"the adapters of .*run belong to the weights in .*base, which do not exist"):
        export(tmp_path / "run", tmp_path / "other", "hf", merge=True)
    assert not (tmp_path / "other").exists()


def plain_shapes(weights: Parameters) -> dict[str, jax.ShapeDtypeStruct]:
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for path, x in weights.items()}


def test_a_run_from_random_weights_becomes_a_model(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(MESH)):
        weights = random_parameters(MODEL)
        save_run(tmp_path / "run", weights, small_tokenizer)
        export(tmp_path / "run", tmp_path / "hf")
        save_run(tmp_path / "tuned", weights, small_tokenizer, init_from=str(tmp_path / "hf"))
        (tmp_path / "hf").rename(tmp_path / "gone")
        with pytest.raises(FileNotFoundError, match=r"hf, from which the run started, does not exist here.* state --dtype"):
            export(tmp_path / "tuned", tmp_path / "other")
        export(tmp_path / "tuned", tmp_path / "hf", options=ExportOptions(dtype="float32"))
        loaded = external.load_external_parameters(tmp_path / "hf", plain_shapes(weights))
    assert all(np.array_equal(np.asarray(loaded[path]), np.asarray(x)) for path, x in weights.items())
    with pytest.raises(ValueError, match="no adapters to merge"):
        export(tmp_path / "run", tmp_path / "other", merge=True)
    with pytest.raises(ValueError, match="trained in full"):
        export(tmp_path / "run", tmp_path / "other", "peft")
    with pytest.raises(ValueError, match="it is not a run"):
        export(tmp_path / "hf", tmp_path / "other", "peft")
    assert not (tmp_path / "other").exists()


def test_another_tools_model_is_turned_into_every_layout_and_back(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(MESH)):
        weights = random_parameters(MODEL)
        texts = Texts(small_tokenizer, small_tokenizer.chat_template)
        write_and_prove.export_model(
            weights, MODEL, tmp_path / "hf", write_and_prove.WriteOptions(dtype="bfloat16", texts=texts, depth="tensors")
        )
    before = external.hash_external_model(tmp_path / "hf")
    for layout in ("mistral", "gguf"):
        export(tmp_path / "hf", tmp_path / layout, layout, options=ExportOptions(depth="tensors"))
        record = export(tmp_path / layout, tmp_path / f"{layout}-hf", options=ExportOptions(dtype="bfloat16", depth="tensors"))
        assert record["dtype"] == "bfloat16" and record["source"] == str(tmp_path / layout)
        assert external.hash_external_model(tmp_path / f"{layout}-hf") == before
        assert external.read_external_model(tmp_path / f"{layout}-hf") == MODEL
    with pytest.raises(ValueError, match="--format hf does not support dtype q8_0"):
        export(tmp_path / "hf", tmp_path / "other", options=ExportOptions(dtype="q8_0"))
    with pytest.raises(ValueError, match="--max-shard-size 'much' is not a size"):
        export(tmp_path / "hf", tmp_path / "other", options=ExportOptions(max_shard_size="much"))
    export(tmp_path / "hf", tmp_path / "shards", options=ExportOptions(max_shard_size="10KB", depth="tensors"))
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    export(tmp_path / "hf", tmp_path / "half", options=ExportOptions(dtype="float16", depth="tensors"))
    record = export(tmp_path / "half", tmp_path / "half again", options=ExportOptions(depth="tensors"))
    assert record["dtype"] == "float16"
    assert external.hash_external_model(tmp_path / "half again") == external.hash_external_model(tmp_path / "half")
    assert not (tmp_path / "other").exists()


def test_a_text_only_export_of_a_wrapper_says_that_it_has_no_tower(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    save_run_on_wrapper(tmp_path, small_tokenizer, np.float16)
    record = export(tmp_path / "run", tmp_path / "out", merge=True, options=ExportOptions(text_only=True))
    assert record["left_out"]["count"] == len(TOWER) and json.loads((tmp_path / "out/export_proof.json").read_text())["left_out"]
    assert external.layout_of(tmp_path / "out") == "hf" and not hf.is_wrapper(tmp_path / "out")
