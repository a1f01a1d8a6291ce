"""The split that a file belongs to, by its name, and the error for several."""

from __future__ import annotations

from pathlib import Path, PurePath

import pytest

from moe_train.data.records.splits import check_one_split, split_of


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.jsonl", "train"),
        ("my_train-v2.csv", "train"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/test_sft-00000-of-00002.parquet", "test_sft"),
        ("part-00000-of-00002.parquet", None),
        ("validation.json", "validation"),
        ("dev.jsonl.gz", "validation"),
        ("gsm8k.test.jsonl", "test"),
        ("en/valid/0001.parquet", "validation"),
        ("train/test.jsonl", "test"),
        ("eval.txt", "test"),
        ("test/guide.md", "test"),
        ("how-to-test.md", None),
        ("contest.jsonl", None),
        ("latest.jsonl", None),
        ("tests/a.jsonl", None),
        ("a.jsonl", None),
    ],
)
def test_the_split_of_a_file(path: str, split: str | None) -> None:
    assert split_of(PurePath(path)) == split


@pytest.mark.parametrize(
    ("names", "splits", "patterns"),
    [
        (["train.jsonl", "test.jsonl"], "train, test", ["train.jsonl", "test.jsonl"]),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
         "train, test", ["data/train-0000*-of-00002.parquet", "data/test-00000-of-00001.parquet"]),
        (["train/a.jsonl", "train/b.jsonl", "dev/a.jsonl", "dev/b.jsonl"], "train, validation", ["train", "dev"]),
        (["a.jsonl", "b.jsonl", "test.jsonl"], "train, test", ["a.jsonl, {root}/b.jsonl", "test.jsonl"]),
    ],
)  # fmt: skip
def test_several_splits_are_named_with_patterns(names: list[str], splits: str, patterns: list[str]) -> None:
    root = Path("/x/train")
    with pytest.raises(
        ValueError, match=f"^{root} has the splits {splits}, which are not mixed; name the files of one: "
    ) as caught:
        check_one_split([root / name for name in names], root)
    choices = str(caught.value).split("name the files of one: ")[1].split(" or ")
    assert choices == [f"{root}/{pattern.format(root=root)}" for pattern in patterns]


def test_one_split_and_none(tmp_path: Path) -> None:
    check_one_split([tmp_path / "train.jsonl", tmp_path / "more.jsonl"], tmp_path)
    check_one_split([tmp_path / "test-1.jsonl", tmp_path / "test-2.jsonl"], tmp_path)
    check_one_split([], tmp_path)
