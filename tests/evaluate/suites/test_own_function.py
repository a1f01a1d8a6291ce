"""Functions of the user's: what they are told, and what happens if they fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train import config
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.not_graded import NotGraded
from moe_train.evaluate.suites.own_function import function_grade

ITEM = SuiteItem("1", "items.jsonl:1", [{"role": "user", "content": "?"}], [], ("blue",), category="colours")
GRADER = config.FunctionGrader(name="function", file="mine.py")


def grade(folder: Path, source: str, answer: str = "blue") -> float:
    (folder / "mine.py").write_text(source)
    return function_grade(GRADER, folder, [folder / "mine.py"])(ITEM, answer)


def test_score(tmp_path: Path) -> None:
    source = 'def grade(item, answer):\n    return item["category"] == "colours" and answer in item["answers"]\n'
    assert grade(tmp_path, source) == 1 and grade(tmp_path, source, "red") == 0
    assert grade(tmp_path, "import numpy as np\ndef grade(item, answer):\n    return np.mean([0, 1]) == 0.5\n") == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('raise KeyError("port")', r"mine.py:2: the grader raised KeyError: 'port'"),
        ("return 3", "returned 3, which is no number from 0 to 1"),
        ("return None", "returned None"),
        ('return float("nan")', "returned nan"),
        ("import sys; sys.exit(0)", r"mine.py:2: the grader raised SystemExit: 0"),
    ],
)
def test_without_a_grade(tmp_path: Path, body: str, reason: str) -> None:
    with pytest.raises(NotGraded, match=reason):
        grade(tmp_path, f"def grade(item, answer):\n    {body}\n")


def test_code_that_was_not_named_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"read it, and add --grader .*mine.py"):
        function_grade(GRADER, tmp_path, [])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = (\n", r"mine.py:1: the grader's file cannot be imported: SyntaxError"),
        ("raise SystemExit(0)\n", r"mine.py:1: .*SystemExit: 0"),
        ("import no_such_module\n", r"mine.py:1: .*ModuleNotFoundError"),
        ("grade = 3\n", "has no function grade"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grade(tmp_path, source)
    with pytest.raises(FileNotFoundError, match="no such file of a grader"):
        function_grade(GRADER.model_copy(update={"file": "none.py"}), tmp_path, [])
