"""Suites during a run: scores in the metrics and checkpoints, the best checkpoint by them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train import config
from moe_train.checkpoint.metadata import survey
from moe_train.commands.train import train
from moe_train.evaluate.suites.answer import Answer
from moe_train.evaluate.suites.load import LoadedSuite
from moe_train.run import loop, suite_scores
from moe_train.run.resolve import resolve
from moe_train.run.suite_scores import load_run_suites
from tests.run_dir import lines


def write_suite(folder: Path, grader: str = "exact") -> Path:
    (folder / "items.jsonl").write_text('{"question": "The list type", "answer": "x"}\n')
    file = folder / "kpi.yaml"
    how = "prompt: {chat: false}\ngeneration: {max_tokens: 8}\n"
    file.write_text(f"name: kpi\nitems: items.jsonl\ngrader: {{name: {grader}}}\n{how}")
    return file


def test_the_best_checkpoint_by_the_score(
    small_run: Callable[..., config.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter([0.1, 0.5, 0.9, 0.3, None])  # before training, then after steps 1, 3, 5 and 6 alone

    def answer_items(loaded: LoadedSuite, *_: object) -> list[Answer]:
        return [Answer(loaded.items[0], "x", score, True) for score in (next(given), 0.3)]

    monkeypatch.setattr(suite_scores, "answer_items", answer_items)
    settings = {"evaluation__suites": [str(write_suite(tmp_path))], "evaluation__suites_every_steps": 2}
    run = small_run(tmp_path / "run", **settings, **{"checkpoint__best_by": "kpi", "checkpoint__keep_last": 2})
    assert train(run) == loop.FINISHED
    scores = [(line["step"], line["kpi"], line.get("not_graded")) for line in lines(tmp_path / "run", "suite")]
    assert scores == [(0, pytest.approx(0.2), None), (2, 0.4, None), (4, pytest.approx(0.6), None), (6, pytest.approx(0.3), None)]
    found = survey(tmp_path / "run")
    assert found.best() == 4 and found.readable[4].about.suite_scores == {"kpi": pytest.approx(0.6)}
    assert found.readable[4].held_out_loss is None  # the loss was measured elsewhere, and does not count


@pytest.mark.parametrize(
    ("grader", "best_by", "message"),
    [
        ("judge, model: m", "loss", r"kpi.yaml: the grader judge needs to be allowed on a command line"),
        ("function, file: mine.py", "loss", r"kpi.yaml: the grader function needs to be allowed"),
        ("exact", "other", r"checkpoint.best_by is other, which is no suite of evaluation.suites; state one of loss, kpi"),
    ],
)
def test_what_is_refused(small_run: Callable[..., config.Config], tmp_path: Path, grader: str, best_by: str, message: str) -> None:
    settings = {"evaluation__suites": [str(write_suite(tmp_path, grader))], "checkpoint__best_by": best_by}
    run = resolve(small_run(tmp_path / "run", **settings))
    with pytest.raises(ValueError, match=message):
        load_run_suites(run)
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_too_long_is_found_before_training(small_run: Callable[..., config.Config], tmp_path: Path) -> None:
    file = write_suite(tmp_path)
    file.write_text(file.read_text().replace("8", "100"))
    with pytest.raises(ValueError, match="with 100 more it exceeds the model's max_seq_len"):
        train(small_run(tmp_path / "run", evaluation__suites=[str(file)]))
    assert not (tmp_path / "run").exists()


def test_settings_without_effect(small_run: Callable[..., config.Config], tmp_path: Path) -> None:
    tree = json.loads(small_run(tmp_path).model_dump_json())
    tree["evaluation"]["suites_every_steps"] = 3
    with pytest.raises(ValueError, match="suites_every_steps has no effect without suites"):
        config.Config.model_validate_json(json.dumps(tree))
