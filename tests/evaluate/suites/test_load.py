"""Loading suites: folders, settings for all of them, and what makes a suite another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.evaluate.suites.load import SuiteOptions, load_suite, load_suites


def write(folder: Path, name: str, more: str = "", grader: str = "{name: exact}") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "items.jsonl").write_text('{"question": "Sky?", "answer": "blue"}\n{"question": "Sea?", "answer": "green"}\n')
    file = folder / f"{name}.yaml"
    file.write_text(f"name: {name}\nitems: items.jsonl\ngrader: {grader}\n{more}")
    return file


def test_a_folder_of_suites_and_overrides(tmp_path: Path) -> None:
    write(tmp_path, "first")
    write(tmp_path, "second")
    suites = load_suites([tmp_path], SuiteOptions(["limit=1", "grader.ignore_case=true"]))
    assert [loaded.suite.name for loaded in suites] == ["first", "second"]
    assert all(len(loaded.items) == 1 and loaded.grade is not None for loaded in suites)
    with pytest.raises(ValueError, match="two suites have the name first"):
        load_suites([tmp_path, tmp_path / "first.yaml"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no \*.yaml"):
        load_suites([tmp_path / "empty"])


def test_data_elsewhere_and_the_digest(tmp_path: Path) -> None:
    file = write(tmp_path, "kpi")
    write(tmp_path / "elsewhere", "kpi")
    digest = load_suite(file).digest
    moved = load_suite(file, SuiteOptions(data=tmp_path / "elsewhere"))
    assert moved.items[0].location.startswith(str(tmp_path / "elsewhere")) and moved.digest == digest
    assert load_suite(file, SuiteOptions(["batch_size=2"])).digest == digest
    assert load_suite(file, SuiteOptions(["generation.max_tokens=9"])).digest != digest
    (tmp_path / "items.jsonl").write_text('{"question": "Sky?", "answer": "grey"}\n')
    assert load_suite(file).digest != digest


def test_solved_examples(tmp_path: Path) -> None:
    file = write(tmp_path, "kpi", "prompt: {few_shot: {items: items.jsonl, count: 3}}\n")
    with pytest.raises(ValueError, match=r"few_shot.count is 3, but items.jsonl has 2 items"):
        load_suite(file)
    assert [example.answers for example in load_suite(file, SuiteOptions(["prompt.few_shot.count=1"])).examples] == [("blue",)]


def test_without_grading_no_code_is_run(tmp_path: Path) -> None:
    file = write(tmp_path, "kpi", grader="{name: function, file: mine.py}")
    (tmp_path / "mine.py").write_text("def grade(item, answer):\n    return 1\n")
    with pytest.raises(ValueError, match="add --grader"):
        load_suite(file)
    assert load_suite(file, SuiteOptions(grade=False)).grade is None
    allowed = load_suite(file, SuiteOptions(grader_files=[tmp_path / "mine.py"]))
    assert allowed.grade is not None and allowed.grade(allowed.items[0], "x") == 1
