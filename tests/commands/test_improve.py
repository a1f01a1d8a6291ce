"""Rounds of sampling, grading, training and a gate: what follows from what, where they stop, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from moe_train import config
from moe_train.commands import improve as module
from moe_train.commands import write_and_prove
from moe_train.commands.improve import Rounds, form_of, improve
from moe_train.commands.synthesize import SynthesisOptions
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.evaluate.suites import answer
from moe_train.evaluate.suites.generation import GeneratedText, TextOptions
from moe_train.weights import texts
from tests.evaluate.tiny_generator import MIXTRAL, ONE, random_model

LORA = {"targets": [{"modules": ["attention.*"], "rank": 2, "alpha": 4}]}
RUN: dict[str, Any] = {
    "name": "dpo",
    "run_dir": "unused",
    "seed": 5,
    "lora": LORA,
    "objective": {"name": "preference"},
    "data": {"train": [{"name": "files", "files": ["unused"], "record": {"name": "preference", "too_long": "drop"}}]},
    "train": {"steps": 1, "batch_size": 8, "seq_len": 128},
    "optimizer": {"name": "adamw", "learning_rate": 1e-2},
    "mesh": {"fsdp": 8},
    "checkpoint": {"every_steps": 1},
}
SUITE = "{name: words, items: items.jsonl, generation: {max_tokens: 4}, grader: {name: exact}}"


@pytest.fixture
def rounds(tmp_path: Path) -> Rounds:
    items = [{"question": question, "answer": "a"} for question in ("the quick", "brown fox", "lazy dog")]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "words.yaml").write_text(SUITE)
    (tmp_path / "dpo.yaml").write_text(json.dumps({**RUN, "init_from": "base", "data": {**RUN["data"], "cache_dir": "cache"}}))
    suite = tmp_path / "words.yaml"
    return Rounds(tmp_path / "dpo.yaml", (), suite, [suite], ["words >= base - 0.1"], tmp_path / "out", 2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each step is called with, in place of what it does; `calls[0]` is the exit code of training, and whether gates pass."""
    calls: list[Any] = [SimpleNamespace(code=0, passed=True)]

    def synthesize(questions: Path, teacher: Path, out: Path, options: SynthesisOptions, *_: Any) -> None:
        calls.append(("sample", str(teacher), options.seed, options.form))
        out.mkdir(parents=True)

    def train(written: config.Config) -> int:
        assert written.lora is not None and written.data is not None
        (source,) = written.data.train
        assert isinstance(source, config.FileSource) and source.record.too_long == "drop"
        calls.append(("train", written.run_dir, written.seed, written.lora.init_from, source.files))
        return int(calls[0].code)

    def gate(rounds: Rounds, folder: Path, bases: list[Path], *_: Any) -> dict[str, Any]:
        calls.append(("gate", str(folder), list(map(str, bases))))
        score = {"suite": "words", "model": "m", "score": 0.5}
        return {"model": "m", "suites": [score, {**score, "model": "base"}], "passed": calls[0].passed}

    monkeypatch.setattr(module, "synthesize", synthesize)
    monkeypatch.setattr(module, "made_with", lambda *_: {"answers": {"accepted": 3, "rejected": 1}, "records": 1})
    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "_gate", gate)
    return calls


def test_each_round_starts_from_the_one_before(rounds: Rounds, calls: list[Any]) -> None:
    out = rounds.out
    first, second = improve(rounds)
    assert first == {
        "round": 1,
        "seed": 6,
        "accepted": 3,
        "rejected": 1,
        "records": 1,
        "words": 0.5,
        "passed": True,
        "exit_code": 0,
    }
    assert (second["round"], second["seed"]) == (2, 7)
    run = str(out / "round_1/run")
    assert calls[1:] == [
        ("sample", "base", 6, "pairs"),
        ("train", run, 6, None, (str(out / "round_1/answers/records.jsonl"),)),
        ("gate", str(out / "round_1"), ["base"]),
        ("sample", run, 7, "pairs"),
        ("train", str(out / "round_2/run"), 7, run, (str(out / "round_2/answers/records.jsonl"),)),
        ("gate", str(out / "round_2"), ["base", run]),
    ]
    # The same command samples nothing again.
    list(improve(rounds))
    assert [call[0] for call in calls[7:]] == ["train", "gate"] * 2


@pytest.mark.parametrize(("code", "passed"), [(75, True), (0, False)])
def test_a_stopped_run_and_a_failed_gate_end_the_rounds(code: int, passed: bool, rounds: Rounds, calls: list[Any]) -> None:
    calls[0] = SimpleNamespace(code=code, passed=passed)
    (row,) = improve(rounds)
    assert row["exit_code"] == code and row.get("passed", False) is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requirements": ["other >= base"]}, "--require names the suite other; the suites are words"),
        ({"overrides": ["init_from=null"]}, "init_from"),
        ({"overrides": ["lora.init_from=adapter"]}, "lora.init_from is an adapter; name with --start"),
        ({"overrides": ["objective={name: reward}"]}, "objective reward does not learn from answers"),
    ],
)
def test_what_is_refused_before_anything_is_sampled(changes: Any, message: str, rounds: Rounds, calls: list[Any]) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        next(improve(Rounds(**{**vars(rounds), **changes})))
    assert "\n" not in str(refused.value) and len(calls) == 1


def test_forms() -> None:
    assert form_of(config.UnpairedPreference(name="unpaired_preference")) == "kto"
    assert form_of(config.NextToken(name="next_token")) == "sft"


@pytest.mark.slow
def test_two_rounds_of_a_small_model(
    rounds: Rounds, small_tokenizer: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are letters in place of the model's: random ones where they are sampled, and `a`, which is right, at the gate."""

    def generate(model: object, tokenizer: object, prompts: list[Any], options: TextOptions, *_: object) -> list[GeneratedText]:
        letters = "abcd" if options.generation.temperature else "a"
        return [GeneratedText((), letters[i % len(letters)], True) for i in range(len(prompts))]

    monkeypatch.setattr(answer, "generate_answers", generate)
    with jax.set_mesh(ONE):
        options = write_and_prove.WriteOptions(dtype="float32", texts=texts.Texts(small_tokenizer))
        write_and_prove.export_model(random_model(MIXTRAL)[1], MIXTRAL, tmp_path / "base", options)
    changes = (f"init_from={tmp_path / 'base'}", f"data.cache_dir={tmp_path / 'cache'}")
    stated = Rounds(**{**vars(rounds), "overrides": changes, "requirements": ["words >= base - 0.99"]})
    rows = list(improve(stated))
    assert [row["passed"] for row in rows] == [True, True] and [row["records"] for row in rows] == [3, 3]
    metrics = [json.loads(line) for line in (rounds.out / "round_2/run/metrics.jsonl").read_text().splitlines()]
    # The second round goes on with the adapters of the first one, compared with the model without them.
    assert metrics[0]["rewards/margins"] != 0
    assert list(improve(stated)) == rows, "nothing is done again"
    with pytest.raises(ValueError, match=r"round_1/answers was made with another options .*name another --out"):
        list(improve(stated, SynthesisOptions(8)))
    with pytest.raises(ValueError, match=r"gate was made with other suites or requirements"):
        list(improve(Rounds(**{**vars(stated), "requirements": ["words >= base"]})))
