"""Text from the standard library: disjoint halves, the same each time, nothing imported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moe_train.commands.quickstart_text import FILES, gather_texts


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library whose modules refuse to be imported."""
    root = tmp_path / "lib"
    (root / "pydoc_data").mkdir(parents=True)
    (root / "pydoc_data" / "topics.py").write_text('topics = {"while": "The while statement.", "for": "The for statement."}\n')
    (root / "broken.py").write_text("def (:\n")
    (root / "test").mkdir()
    (root / "test" / "test_it.py").write_text('"""A module that tests something else."""\n')
    for i in range(200):
        (root / f"module{i}.py").write_text(
            f'"""Module number {i} does a thing.\n\nAt length."""\nraise SystemExit\n\n\n'
            f'class Thing:\n    """A thing that is\n    number {i}."""\n\n'
            f'    def turn(self):\n        """Turn thing {i} around once."""\n\n'
            f'    def _hidden(self):\n        """Nobody should learn of number {i}."""\n\n'
            'def shared():\n    """The same docstring in every module."""\n'
        )
    return root


def read(directory: Path) -> dict[str, list[dict]]:
    return {name: [json.loads(line) for line in (directory / name).open(encoding="utf-8")] for name in FILES}


def test_what_is_gathered(library: Path, tmp_path: Path) -> None:
    counts = gather_texts(tmp_path / "out", stdlib=library, heldout=0.2)
    gathered = read(tmp_path / "out")
    assert counts == {name: len(records) for name, records in gathered.items()}
    pairs = {(m[0]["content"], m[1]["content"]) for side in FILES[2:] for record in gathered[side] for m in [record["messages"]]}
    assert len(pairs) == counts["chat_train.jsonl"] + counts["chat_heldout.jsonl"] == 3 * 200 + 1
    assert ("What is the module module7 for?", "Module number 7 does a thing.") in pairs
    assert ("What is module7.Thing?", "A thing that is number 7.") in pairs
    assert ("What does module7.Thing.turn do?", "Turn thing 7 around once.") in pairs
    texts = [record["text"] for side in FILES[:2] for record in gathered[side]]
    assert len(texts) == 2 + 200 + 200  # topics, docstrings, sources
    assert sum("The same docstring" in text and "raise SystemExit" not in text for text in texts) == 1
    assert not any("tests something" in text for text in texts)


def test_what_is_held_out_is_nowhere_in_training(library: Path, tmp_path: Path) -> None:
    gather_texts(tmp_path / "out", stdlib=library, heldout=0.2)
    gathered = read(tmp_path / "out")
    for train, heldout in (FILES[:2], FILES[2:]):
        known, unknown = (set(re.findall(r"umber (\d+)", json.dumps(gathered[name]))) for name in (train, heldout))
        assert len(known) + len(unknown) == 200 and not known & unknown
        assert 20 <= len(unknown) <= 60


def test_the_same_files_again_and_no_more_than_asked(library: Path, tmp_path: Path) -> None:
    gather_texts(tmp_path / "a", stdlib=library)
    gather_texts(tmp_path / "b", stdlib=library)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    gather_texts(tmp_path / "c", stdlib=library, max_bytes=9_000)
    texts = [record["text"] for name in FILES[:2] for record in read(tmp_path / "c")[name]]
    assert 8_000 < sum(map(len, texts)) <= 9_000


def test_without_sources_or_with_something_there(library: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"does not contain the standard library's sources \(0 \.py files"):
        gather_texts(tmp_path / "out", stdlib=tmp_path / "none")
    (library / "pydoc_data" / "topics.py").write_text("subjects = {}\n")
    with pytest.raises(ValueError, match="does not define topics"):
        gather_texts(tmp_path / "out", stdlib=library)
    with pytest.raises(FileExistsError, match="already exists"):
        gather_texts(library)
    assert not (tmp_path / "out").exists()


def test_the_library_of_this_python(tmp_path: Path) -> None:
    counts = gather_texts(tmp_path / "out", max_bytes=2_000_000)
    gathered = read(tmp_path / "out")
    assert counts["chat_train.jsonl"] > 3000 and counts["chat_heldout.jsonl"] > 50
    assert 0.9 * 2_000_000 < sum(len(r["text"].encode()) for name in FILES[:2] for r in gathered[name]) <= 2_000_000
    for train, heldout in (FILES[:2], FILES[2:]):
        known = set(map(json.dumps, gathered[train]))
        assert len(known) == len(gathered[train]) and not known & set(map(json.dumps, gathered[heldout]))
    answers = {
        m["messages"][0]["content"]: m["messages"][1]["content"]
        for m in gathered["chat_train.jsonl"] + gathered["chat_heldout.jsonl"]
    }
    assert answers["What does json.dumps do?"] == "Serialize ``obj`` to a JSON formatted ``str``."
