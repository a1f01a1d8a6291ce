"""The second reader's own names of carried tensors agree with the tables of the writer, and it finds what is not the base's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from moe_train.proof.carried import CarriedFrom, carried_names, check_carried, is_audio, text_tensors
from moe_train.proof.checks import Fault
from moe_train.weights.wrappers import towers
from moe_train.weights.wrappers.classes import WRAPPERS
from tests.commands.wrapper import TEXT, TOWER, VISION

ROWS = towers.tower_tensors(towers.settings_of(WRAPPERS["Mistral3ForConditionalGeneration"], {"vision_config": VISION}, 16))


def save(folder: Path, layout: str, shapes: dict[str, tuple[int, ...]], **more: Any) -> CarriedFrom:
    folder.mkdir()
    name, stem = ("config.json", "model") if layout == "hf" else ("params.json", "consolidated")
    section = {"vision_config": VISION} if layout == "hf" else {"vision_encoder": {"num_attention_heads": 2}}
    (folder / name).write_text(json.dumps(section | more))
    arrays = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(shapes.items())}
    safetensors.numpy.save_file(arrays, folder / f"{stem}.safetensors")
    return CarriedFrom(folder, layout)  # type: ignore[arg-type]


def test_names_are_those_of_the_writer(tmp_path: Path) -> None:
    native = {str(row.native): row.shape for row in ROWS}
    origin = save(tmp_path / "hf", "hf", {**TOWER, "language_model.model.norm.weight": (4,)})
    assert set(carried_names(origin, "mistral")) == native.keys() and set(carried_names(origin, "hf")) == TOWER.keys()
    origin = save(tmp_path / "native", "mistral", {**native, "norm.weight": (4,)})
    assert set(carried_names(origin, "hf")) == TOWER.keys() and set(carried_names(origin, "mistral")) == native.keys()
    in_memory = save(tmp_path / "memory", "hf", {f"model.{name}": shape for name, shape in TOWER.items()})
    assert set(carried_names(in_memory, "hf")) == TOWER.keys()
    odd = save(tmp_path / "odd", "mistral", {"vision_encoder.odd.w1.weight": (1,), "vision_other.weight": (1,)})
    with pytest.raises(Fault, match="has no name in"):
        carried_names(odd, "hf")


def test_settings_and_files_that_are_not_the_bases_are_found(tmp_path: Path) -> None:
    origin = save(tmp_path / "base", "hf", TOWER, spatial_merge_size=2)
    save(tmp_path / "out", "hf", TOWER, spatial_merge_size=2, text_config={})
    record: dict[str, Any] = {"tensors": {}}
    assert check_carried(origin, "hf", tmp_path / "out", record).metrics["count"] == len(TOWER)
    assert record["carried"]["tensors"].keys() == record["tensors"].keys() == TOWER.keys()
    (tmp_path / "base/preprocessor_config.json").write_text("{}")
    with pytest.raises(Fault, match=r"preprocessor_config\.json is not the base's"):
        check_carried(origin, "hf", tmp_path / "out", record)
    save(tmp_path / "other", "hf", TOWER, spatial_merge_size=3)
    with pytest.raises(Fault, match=r"spatial_merge_size in config\.json is not the base's \(and 1 more\)"):
        check_carried(origin, "hf", tmp_path / "other", record)
    save(tmp_path / "less", "hf", dict(list(TOWER.items())[:-1]), spatial_merge_size=2)
    with pytest.raises(Fault, match=r"linear_2\.weight is missing"):
        check_carried(origin, "hf", tmp_path / "less", record)


def test_names_of_the_text_model() -> None:
    assert text_tensors("hf", TEXT, True)[0].name == "language_model.model.embed_tokens.weight"
    assert text_tensors("hf", TEXT, True)[-1].name == "language_model.lm_head.weight"
    assert text_tensors("hf", TEXT, False)[0].name == "model.embed_tokens.weight"
    audio = is_audio(["mm_whisper_embeddings.whisper_encoder.x"])
    assert text_tensors("mistral", TEXT, True, audio)[0].name == "mm_whisper_embeddings.tok_embeddings.weight"
    assert text_tensors("mistral", TEXT, True)[0].name == "tok_embeddings.weight"
