"""The files that a run started from are found through other runs, and what of them is not trained is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from moe_train.checkpoint.initial_files import carried_of, describe_initial_files, first_files, first_path
from moe_train.commands.export import ExportOptions, export
from moe_train.commands.inspect import inspect
from moe_train.commands.plan import plan_run
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.plan.answer import PlanOptions
from moe_train.plan.answer_json import answer_as_json
from moe_train.plan.answer_table import introduction
from tests.commands.wrapper import TOWER, save_run_on_wrapper, written_config


def test_a_run_leads_to_the_files_it_started_from(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    save_run_on_wrapper(tmp_path, small_tokenizer)
    assert first_files(tmp_path / "run") == first_files(tmp_path / "base") == tmp_path / "base"
    assert first_files(tmp_path / "nowhere") is None and first_path(tmp_path / "nowhere") == tmp_path / "nowhere"
    carried = carried_of(tmp_path / "run")
    assert carried is not None and carried.tensors.keys() == TOWER.keys()
    (tmp_path / "base").rename(tmp_path / "gone")
    assert carried_of(tmp_path / "run") is None and describe_initial_files(tmp_path / "run") == []


def test_what_is_not_trained_is_said_before_and_in_plans(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    save_run_on_wrapper(tmp_path, small_tokenizer)
    (line,) = describe_initial_files(tmp_path / "run")
    assert line.startswith(f"vision tower and projector ({len(TOWER)} tensors, ") and f"of {tmp_path}/base are not trained" in line
    config = written_config(tmp_path, small_tokenizer)
    assert inspect(config).totals["init_from"] == line
    answer = plan_run(config, "v5e:1x1", PlanOptions(compile_best=0))
    assert answer_as_json(answer)["initial_files"] == [line] and line in introduction(answer)


def test_of_two_halves_the_chosen_one_is_said(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    save_run_on_wrapper(tmp_path, small_tokenizer)
    export(tmp_path / "run", tmp_path / "native", "mistral", merge=True, options=ExportOptions(depth="tensors"))
    for name in ("params.json", "consolidated.safetensors"):
        (tmp_path / "native" / name).rename(tmp_path / "base" / name)
    first, second = describe_initial_files(tmp_path / "base")
    assert first.endswith("base has the model in Hugging Face's and in Mistral's own layout; Hugging Face's files are read")
    assert "are not trained" in second
    # The proof of an adapter, and of what is carried, reads the chosen half too.
    export(tmp_path / "run", tmp_path / "adapter", "peft")
    record = export(tmp_path / "run", tmp_path / "out", merge=True, options=ExportOptions(depth="tensors"))
    assert record["carried"]["layout"] == "hf" and record["carried"]["tensors"].keys() == TOWER.keys()


def test_an_error_of_one_half_names_the_other(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    save_run_on_wrapper(tmp_path, small_tokenizer)
    folder = tmp_path / "base"
    (folder / "params.json").write_text("{}")
    safetensors.numpy.save_file({"norm.weight": np.zeros(2, np.float32)}, folder / "consolidated.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"architectures": ["UnknownForConditionalGeneration"]}))
    try:
        carried_of(folder)
    except ValueError as error:
        message = str(error)
    assert "supported: " in message and "also has the model in Mistral's own layout, which is read from a folder with" in message
    assert "its text model is a mistral, which can be trained alone" in message and "\n" not in message
