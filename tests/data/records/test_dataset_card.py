"""The front matter of a data set's README.md: which files make up which split."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.data.records.dataset_card import matches, parts


def card(folder: Path, front_matter: str) -> Path:
    (folder / "README.md").write_text(f"---\nlicense: mit\n{front_matter}\n---\n# Tides\n---\nconfigs: no\n", encoding="utf-8")
    return folder / "README.md"


@pytest.mark.parametrize(
    ("front_matter", "expected"),
    [
        ("configs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/train-*}\n  - {split: test, path: [a, b]}",
         [("train", ("data/train-*",)), ("test", ("a", "b"))]),
        ("configs:\n- config_name: x\n  data_files: x.csv\n- config_name: y\n  data_dir: sub\n  data_files: ['y.csv', 'z.csv']",
         [("x/train", ("x.csv",)), ("y/train", ("sub/y.csv", "sub/z.csv"))]),
        ("configs:\n- data_dir: sub", [("train", ("sub/**",))]),
        ("configs:\n- data_files: {train: t.csv, dev: d.csv}", [("train", ("t.csv",)), ("dev", ("d.csv",))]),
        ("configs:\n- config_name: default", []),
        ("configs: {}", []),
        ("dataset_info:\n  splits: []", []),
    ],
)  # fmt: skip
def test_the_parts_of_a_card(tmp_path: Path, front_matter: str, expected: list[tuple[str, tuple[str, ...]]]) -> None:
    assert parts(card(tmp_path, front_matter)) == expected


@pytest.mark.parametrize("text", ["", "# Tides\n", "---\nconfigs: [\nnever closed", "---\n---\n"])
def test_a_readme_that_is_no_card(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert parts(tmp_path / "README.md") == []


@pytest.mark.parametrize(
    "front_matter", ["configs: [", "configs: [1]", "configs:\n- data_files: [{path: 3}]", "configs:\n- data_files: 3"]
)
def test_a_card_that_cannot_be_read_is_named(tmp_path: Path, front_matter: str) -> None:
    with pytest.raises(ValueError, match=r"^.*README\.md: .*name the files$") as caught:
        parts(card(tmp_path, front_matter))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("data/train-1.parquet", "data/train-*", True),
        ("data/x/train-1.parquet", "data/train-*", False),
        ("data/x/y.parquet", "data/**/*.parquet", True),
        ("data/y.parquet", "./data/**/*.parquet", True),
        ("data/x/y.parquet", "data", True),
        ("data.csv", "data", False),
        ("a.csv", "**", True),
    ],
)
def test_patterns(path: str, pattern: str, expected: bool) -> None:
    assert matches(Path(path), pattern) == expected
