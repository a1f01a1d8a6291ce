"""lm-evaluation-harness over the sharded model, item by item beside its own HFLM on the exported files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_train.commands import write_and_prove
from moe_train.commands.evaluate_harness import HarnessOptions, evaluate_harness
from moe_train.commands.evaluate_suite import Comparisons
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.weights import texts
from tests.evaluate.tiny_generator import MIXTRAL, ONE, random_model

pytestmark = pytest.mark.judges
QUESTIONS = ["the quick brown", "fox jumps over", "the lazy dog and the", "quick dog"]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": [" fox", " dog", "jumps over the"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_target": "fox",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "last_word": {"output_type": "loglikelihood", "doc_to_target": " dog", "metric_list": [{"metric": "acc"}]},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    out = folder / "model"
    tokenizer = train_tokenizer([*QUESTIONS, "some text to learn from"] * 5, 290, folder / "tokenizer")
    with jax.set_mesh(ONE):
        _, weights = random_model(MIXTRAL)
        options = write_and_prove.WriteOptions(dtype="float32", texts=texts.Texts(tokenizer))
        write_and_prove.export_model(weights, MIXTRAL, out, options)
    return out


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = "".join(json.dumps({"question": question}) + "\n" for question in QUESTIONS)
    (folder / "items.jsonl").write_text(lines)
    files = {"data_files": {"test": str(folder / "items.jsonl")}}
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        text = {"task": name, **data, "doc_to_text": "" if name == "rolling" else "{{question}}", **task}
        (folder / f"{name}.yaml").write_text(json.dumps(text))
    return folder


def samples_of_harness(exported: Path, tasks: Path, chat: bool, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    model = HFLM(pretrained=str(exported), dtype="float32", device="cpu", batch_size=2)
    found = simple_evaluate(model=model, tasks=names, task_manager=manager, log_samples=True, apply_chat_template=chat)
    return found["samples"]


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_item_by_item(exported: Path, tasks: Path, tmp_path: Path, chat: bool) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    names = [name for name in TASKS if not (chat and name == "rolling")]
    evaluate_harness(exported, HarnessOptions(names, tasks, apply_chat_template=chat), out_dir=tmp_path / "out")
    ours: dict[str, list[dict[str, Any]]] = {}
    for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        ours.setdefault(sample["task"], []).append(sample)
    theirs = samples_of_harness(exported, tasks, chat, names)
    for name in names:
        for mine, judge in zip(ours[name], theirs[name], strict=True):
            assert mine["doc_id"] == judge["doc_id"] and mine["prompt_hash"] == judge["prompt_hash"]
            for (answer,), (expected,) in zip(mine["resps"], judge["resps"], strict=True):
                if name == "written":
                    assert answer == expected
                elif name == "rolling":
                    assert answer == pytest.approx(expected, rel=1e-4)
                else:
                    assert answer[0] == pytest.approx(expected[0], rel=1e-4) and answer[1] == expected[1]


def test_what_is_refused(exported: Path, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    with pytest.raises(ValueError, match=r"--lm-eval mmlu: no such task in .*; it has choice, last_word, rolling, written"):
        evaluate_harness(exported, HarnessOptions(["mmlu"], tasks))
    with pytest.raises(FileNotFoundError, match=r"--include-path .*: no such folder"):
        evaluate_harness(exported, HarnessOptions(["choice"], tmp_path / "none"))


def test_against_another_model(exported: Path, tasks: Path, tmp_path: Path) -> None:
    """A copy is tied in every metric, of which the mean ones may be required."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    compared = Comparisons([copy], ["choice/acc >= base - 1", "last_word >= base"])
    result = evaluate_harness(exported, HarnessOptions(["choice", "last_word", "rolling"], tasks), None, tmp_path / "out", compared)
    methods = {row["suite"]: (row["verdict"], row["difference"], row["method"]) for row in result["comparisons"]}
    assert methods["choice/acc"] == ("tied", 0.0, "Tango's interval, McNemar's exact test")
    assert methods["rolling/word_perplexity"] == ("tied", 0.0, "paired bootstrap of the metric")
    # Four items cannot show that nothing was lost.
    assert [row["met"] for row in result["requirements"]] == [True, False] and not result["passed"]
    models = {json.loads(line)["model"] for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()}
    assert models == {str(exported), str(copy)}
    for requirement, message in (
        ("kpi >= base", "--require kpi: no such task"),
        ("choice >= base", "choice, which has several metrics; name one of choice/acc, choice/acc_norm"),
        ("rolling >= base", "rolling/word_perplexity, which is no mean of scores"),
    ):
        with pytest.raises(ValueError, match=message):
            task = "rolling" if requirement.startswith("rolling") else "choice"
            evaluate_harness(exported, HarnessOptions([task], tasks), None, None, Comparisons([copy], [requirement]))
