"""Suites on a small model: scores, comparison with another model, the gate, and what is refused before anything is answered."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from moe_train.commands import evaluate_suite, write_and_prove
from moe_train.commands.evaluate_suite import Comparisons, Outputs, SuiteOptions, evaluate_suites
from moe_train.commands.generate import generate_text
from moe_train.commands.verify_answers import verify_answers
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.weights import texts
from tests.evaluate.tiny_generator import MIXTRAL, ONE, random_model

QUESTIONS = ["the quick", "brown fox", "jumps over", "the lazy dog"]


@pytest.fixture(scope="module")
def models(small_tokenizer: HuggingFace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and one whose head prefers other tokens."""
    folder = tmp_path_factory.mktemp("models")
    with jax.set_mesh(ONE):
        _, weights = random_model(MIXTRAL)
        for name, sign in (("new", 1), ("old", -1)):
            changed = {**weights, "head.weight": sign * weights["head.weight"]}
            options = write_and_prove.WriteOptions(dtype="float32", texts=texts.Texts(small_tokenizer))
            write_and_prove.export_model(changed, MIXTRAL, folder / name, options)
    return folder / "new", folder / "old"


def suite_of(folder: Path, name: str, items: list[dict[str, object]], **sections: object) -> Path:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    file = folder / f"{name}.yaml"
    tree = {"name": name, "items": f"{name}.jsonl", "grader": {"name": "exact"}, **sections}
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in tree.items()))
    return file


@pytest.fixture
def known(models: tuple[Path, Path], tmp_path: Path) -> Path:
    """A suite whose expected answers are those of the new model, but for the last one."""
    answers = generate_text(models[0], QUESTIONS, 4)
    items = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, answers, strict=True)]
    items[-1]["answer"] = "none of these words"
    prompt = {"chat": False, "template": "{question}"}
    return suite_of(tmp_path, "known", items, prompt=prompt, generation={"max_tokens": 4}, batch_size=3)


def test_scores_comparison_and_gate(models: tuple[Path, Path], known: Path, tmp_path: Path) -> None:
    new, old = models
    comparisons = Comparisons([old], ["known >= base - 0.5"])
    result = evaluate_suites(new, [known], comparisons, outputs=Outputs(tmp_path / "out", tmp_path / "rows.jsonl"))
    score, _ = result["suites"]
    assert score["score"] == 0.75 and score["low"] < 0.75 < score["high"] and score["items"] == 4
    (compared,) = result["comparisons"]
    assert compared["difference"] == 0.75 and compared["verdict"] == "tied"  # four items show nothing
    assert result["passed"] and result["requirements"][0]["met"]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["answers"][str(new)]["score"] for row in rows] == [1, 1, 1, 0]
    assert (tmp_path / "out" / "items.jsonl").read_text() == (tmp_path / "rows.jsonl").read_text()
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["asked"]["suites"] == [{"suite": "known", "file": str(known)}]
    assert record["weights"][0]["sha256"] != record["weights"][1]["sha256"]
    assert "fox" in (tmp_path / "out" / "report.html").read_text()
    (check,) = verify_answers(new, tmp_path / "out")
    assert check.passed and check.summary.startswith("4 of 4 answers equal")
    (check,) = verify_answers(old, tmp_path / "out")
    assert check.passed is False and "the first item 1" in check.summary
    backwards = evaluate_suites(old, [known], Comparisons([new], ["known >= base - 0.5"]))
    assert not backwards["passed"]


def test_choices(models: tuple[Path, Path], tmp_path: Path) -> None:
    items = [{"question": "the", "choices": [" quick", " lazy"], "answer": answer, "category": "words"} for answer in ("A", "B")]
    file = suite_of(tmp_path, "choices", items, grader={"name": "choice"}, prompt={"chat": False, "template": "{question}"})
    (score,) = evaluate_suites(models[0], [file])["suites"]
    assert score["score"] == 0.5 and score["categories"] == {"words": 0.5}


def test_what_is_refused(models: tuple[Path, Path], known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = models
    with pytest.raises(FileNotFoundError, match=r"has no result.json; name a directory"):
        verify_answers(new, tmp_path)
    with pytest.raises(ValueError, match="--require compares with a base"):
        evaluate_suites(new, [known], Comparisons((), ["known >= base"]))
    with pytest.raises(ValueError, match="--require names the suite kpi; the suites are known"):
        evaluate_suites(new, [known], Comparisons([old], ["kpi >= base"]))
    with pytest.raises(ValueError, match="two suites have the name known"):
        evaluate_suites(new, [known, known])
    with pytest.raises(FileExistsError, match="name a new file"):
        evaluate_suites(new, [known], outputs=Outputs(items=known))
    with pytest.raises(ValueError, match="a model is named twice"):
        evaluate_suites(new, [known], Comparisons([new]))
    with pytest.raises(ValueError, match="is no run, so its seed is not known"):
        evaluate_suites(new, [known], Comparisons(seeds=[old]))
    with pytest.raises(ValueError, match=r"override grader.nam=exact: grader.nam: unknown key"):
        evaluate_suites(new, [known], options=SuiteOptions(["grader.nam=exact"]))
    with monkeypatch.context() as patched:
        # What is wrong with a base is found before any model answers.
        patched.setattr(evaluate_suite, "answer_items", None)
        with pytest.raises(FileNotFoundError, match="none: no such folder"):
            evaluate_suites(new, [known], Comparisons([tmp_path / "none"]))
    long = suite_of(tmp_path, "long", [{"question": "fox " * 300, "answer": "x"}])
    with pytest.raises(ValueError, match=r"long.jsonl:1: the prompt has \d+ tokens; with 256 more it exceeds"):
        evaluate_suites(new, [long])
    few = suite_of(tmp_path, "few", [{"question": "a", "answer": "b"}], prompt={"few_shot": {"items": "few.jsonl", "count": 2}})
    with pytest.raises(ValueError, match=r"few_shot.count is 2, but few.jsonl has 1 items"):
        evaluate_suites(new, [few])
