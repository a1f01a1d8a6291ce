"""The objective of a run, and the records that it reads."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from moe_train import config

RUN: dict[str, Any] = {
    "name": "tiny",
    "run_dir": "runs/tiny",
    "init_from": "model",
    "train": {"steps": 10, "batch_size": 8, "seq_len": 32},
    "optimizer": {"name": "adamw", "learning_rate": 1e-4},
}


def run_of(**sections: Any) -> config.Config:
    return config.Config.model_validate_json(json.dumps(RUN | sections))


def test_a_config_without_an_objective_predicts_the_next_token() -> None:
    assert run_of().objective == config.NextToken(name="next_token") == run_of(objective={"name": "next_token"}).objective


@pytest.mark.parametrize("objective", [{"name": "next_word"}, {"name": "next_token", "beta": 0.1}, {}])
def test_an_unknown_objective_is_refused(objective: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="objective"):
        run_of(objective=objective)


@pytest.mark.parametrize("place", ["train", "eval"])
def test_records_that_an_objective_does_not_read_are_refused(place: str) -> None:
    class OnlyText(config.NextToken):
        records: ClassVar[tuple[str, ...]] = ("text",)

    text = config.FileSource(name="files", files=("a.jsonl",), record=config.TextRecord(name="text"))
    chat = text.model_copy(update={"record": config.ChatRecord(name="chat")})
    prepared = config.PreparedSource(name="prepared", path="set")
    both = {"train": (text, prepared)} | {place: (text, chat)}
    config.check_records(OnlyText(name="next_token"), config.Data(train=(text, prepared)))
    config.check_records(config.NextToken(name="next_token"), config.Data(**both))
    with pytest.raises(ValueError, match="objective next_token reads records of kind text, not chat"):
        config.check_records(OnlyText(name="next_token"), config.Data(**both))


def test_a_reference_and_mismatched_answers_take_forward_passes() -> None:
    counts = {}
    for name, objective in (
        ("next token", config.NextToken(name="next_token")),
        ("dpo", config.Preference(name="preference")),
        ("simpo", config.Preference(name="preference", loss="simpo")),
        ("kto", config.UnpairedPreference(name="unpaired_preference")),
    ):
        counts[name] = [config.extra_forward_passes(objective, has_adapters) for has_adapters in (False, True)]
    assert counts == {"next token": [0, 0], "dpo": [0, 1], "simpo": [0, 0], "kto": [1, 3]}
