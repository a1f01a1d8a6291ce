"""A config becomes a run: what is left to a checkpoint, to its tokenizer and to the devices is decided, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.run.resolve import resolve
from moe_train.weights import hf
from tests.run.tiny_config import MODEL, data, written
from tests.tiny import MISTRAL4


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """config.json alone: no weights, no tokenizer."""
    folder = tmp_path / "base"
    folder.mkdir()
    settings = hf.write_model_config(config.Model.model_validate(MODEL), dtype="float32", bos_token_id=1, eos_token_id=2)
    hf.write_json(folder / "config.json", settings)
    return folder


def test_the_architecture_comes_from_config_json_alone(base: Path) -> None:
    run = resolve(written(init_from=str(base), mesh={"fsdp": -1, "expert": 2}), device_count=8)
    assert run.model == config.Model.model_validate({**MODEL, "rope": {"name": "default", "theta": 1e6}})
    assert run.mesh == config.Mesh(fsdp=4, expert=2)
    assert run.initial_weights == config.PretrainedWeights(path=str(base)) and run.method == config.FullTraining()


def test_data_without_a_tokenizer_are_missed_where_they_are_needed(base: Path) -> None:
    run = resolve(written(init_from=str(base), data=data()), device_count=1)
    with pytest.raises(ValueError, match=r"data\.tokenizer is not stated, and there is none in .*base; state it"):
        run.training_data()
    with pytest.raises(ValueError, match="the config has no data section"):
        resolve(written(model=MODEL), device_count=1).training_data()


def test_the_models_own_tokenizer_is_found(base: Path, tokenizer: HuggingFace) -> None:
    for file in tokenizer.files:
        (base / file.name).write_bytes(file.read_bytes())
    run = resolve(written(init_from=str(base), data=data()), device_count=1)
    assert run.training_data().tokenizer == config.HuggingFaceTokenizer(name="huggingface", path=str(base))


def test_a_templates_file_is_replaced_by_its_text(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}é")
    tokenizer = {"name": "huggingface", "path": str(tmp_path)}
    run = resolve(written(model=MODEL, data=data(tokenizer=tokenizer, chat_template=str(file))), device_count=1)
    file.unlink()
    assert run.training_data().chat_template == "{{ messages[0].content }}é"
    assert resolve(run.to_config(), device_count=1) == run


@pytest.mark.parametrize(
    ("sections", "error"),
    [
        ({"model": {**MODEL, "norm_eps": 1e-3}}, r"model\.norm_eps is 0\.001, but 1e-05 in .*; leave model out"),
        ({"mesh": {"expert": 8}}, "mesh.expert 8 does not divide num_experts 4; use 4"),
        ({"mesh": {"fsdp": -1, "expert": 3}}, "mesh axes of 3 devices do not divide the 8 available devices"),
        (
            {"train": {"steps": 3, "batch_size": 4, "seq_len": 32}, "mesh": {"data": -1}},
            r"4 sequences, which do not divide evenly .* = 8; use",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(base: Path, sections: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        resolve(written(**{"init_from": str(base), **sections}), device_count=8)


def test_the_other_softmax_scale_may_be_stated(tmp_path: Path) -> None:
    """Readers of the same files are known to differ in it, and in nothing else."""
    settings = hf.write_model_config(MISTRAL4, dtype="float32", bos_token_id=1, eos_token_id=2)
    hf.write_json(tmp_path / "config.json", settings)
    attention = MISTRAL4.attention.model_copy(update={"scale_correction": "mscale_squared"})
    corrected = MISTRAL4.model_copy(update={"attention": attention})
    sections: dict[str, Any] = {"init_from": str(tmp_path), "loss": {"load_balance_loss_coef": 0.0, "router_z_loss_coef": 0.0}}
    for stated in (MISTRAL4, corrected):
        run = resolve(written(**sections, model=stated.model_dump(exclude_none=True)), device_count=1)
        assert run.model == stated
    other = corrected.model_copy(update={"norm_eps": 1e-6})
    with pytest.raises(ValueError, match="leave model out"):
        resolve(written(**sections, model=other.model_dump(exclude_none=True)), device_count=1)


def test_a_model_that_is_stated_needs_no_checkpoint() -> None:
    assert resolve(written(model=MODEL, init_from="/not/here"), device_count=1).model.num_layers == 2
    with pytest.raises(FileNotFoundError, match="init_from /not/here: no such folder or file; copy it there, or state model"):
        resolve(written(init_from="/not/here"), device_count=1)


def test_a_run_states_everything_and_returns_to_its_config(base: Path) -> None:
    lora = {"targets": [{"modules": ["attention.*"], "rank": 2, "alpha": 4}]}
    for sections in ({"model": MODEL}, {"init_from": str(base), "lora": lora}):
        run = resolve(written(**sections), device_count=1)
        assert None not in dict(run).values()
        assert config.run_of(run.to_config()) == run
