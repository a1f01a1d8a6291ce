"""Folders: what they say of themselves decides which files are read; several splits need a choice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest

from tests.data.records.sources import ROWS, opened, texts

pytestmark = pytest.mark.usefixtures("no_network")
TEXTS = [row["text"] for row in ROWS]


def write(folder: Path, *names: str, text: str = "a") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A `DatasetDict` on disk."""
    splits = {name: datasets.Dataset.from_list(ROWS) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "test": 1})
    return tmp_path / "saved"


def test_a_saved_dict_needs_a_split(saved: Path) -> None:
    choice = f"^{saved} has the splits train, test, which are not mixed; name the folder of one: {saved}/train or {saved}/test$"
    with pytest.raises(ValueError, match=choice):
        opened(saved)
    assert texts(opened(saved / "train")) == texts(opened(saved / "test")) == TEXTS
    (saved / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert texts(opened(saved)) == TEXTS, "one split is no choice"


def test_a_saved_set_names_its_files(saved: Path) -> None:
    shutil.copy(saved / "test" / "data-00000-of-00001.arrow", saved / "train" / "cache-0123456789abcdef.arrow")
    write(saved / "train", "stray.jsonl")
    assert texts(opened(saved / "train")) == TEXTS
    (saved / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"state\.json: the file data-00001-of-00002\.arrow, which it names, is not there"):
        opened(saved / "train")


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("dataset_dict.json", '{"splits": ["../x"]}', "it should name splits"),
        ("dataset_dict.json", '{"splits"', "cannot be read"),
        ("dataset_dict.json", '{"splits": ["nothing"]}', "nothing has no state.json"),
        ("state.json", '{"_data_files": [{"filename": "../a.arrow"}]}', "_data_files should name files of the folder"),
        ("state.json", "[", "cannot be read"),
    ],
)
def test_a_description_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: str, fault: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}.*{fault}") as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_state_that_is_not_about_a_data_set_and_files_about_the_data_are_no_records(tmp_path: Path) -> None:
    about = ("state.json", "dataset_infos.json", "dataset_info.json", "LICENSE", "LICENSE.txt", "CHANGELOG.rst")
    write(tmp_path, "a.jsonl", "README.md", *about)
    (tmp_path / "state.json").write_text('{"epoch": 3}')
    (tmp_path / "README.md").write_text("# Tides\n")
    assert texts(opened(tmp_path)) == texts(opened(tmp_path / "*")) == ["a"]
    assert len(texts(opened(tmp_path / "README.md"))) == 1, "a file that is named is read"


def test_a_clone_with_a_card(tmp_path: Path) -> None:
    write(tmp_path, "data/train-00000-of-00001.json", "data/test-00000-of-00001.json", "extra.jsonl")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    )
    assert len(texts(opened(tmp_path))) == 1
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- data_files:\n  - {split: a, path: data/tr*}\n  - {split: b, path: data/te*}\n---"
    )
    with pytest.raises(ValueError, match=r"has the splits a, b, .* name the files of one: .*train-00000.* or .*test-00000.*"):
        opened(tmp_path)
    (tmp_path / "README.md").write_text("---\nconfigs:\n- data_files: data/other-*\n---\n")
    with pytest.raises(ValueError, match=r"README\.md: the split train has the files data/other-\*, and none of them is there"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"],
        ["train.jsonl", "test.jsonl"],
        ["train/a.jsonl", "validation/a.jsonl"],
        ["a.jsonl", "a_test.jsonl"],
    ],
)
def test_splits_are_not_mixed_and_each_choice_works(tmp_path: Path, names: list[str]) -> None:
    root = write(tmp_path / "clone [1]", *names)
    (root / "README.md").write_text("# Tides\n")
    for whole in (root, tmp_path / "clone*" / "**" / "*.jsonl", shutil.make_archive(str(tmp_path / "clone"), "zip", root)):
        with pytest.raises(ValueError, match="which are not mixed; name the files of one: ") as caught:
            opened(whole)
        choices = str(caught.value).split("name the files of one: ")[1].split(" or ")
        assert [texts(opened(choice)) for choice in choices] == [["a"], ["a"]]
    assert len(texts(opened(*(root / name for name in names)))) == 2, "files that are named are read together"


def test_folders_in_a_folder_describe_themselves(tmp_path: Path, saved: Path) -> None:
    write(tmp_path, "a.jsonl")
    shutil.move(saved / "train", tmp_path / "tides")
    shutil.rmtree(saved)
    write(tmp_path / "tides", "stray.jsonl")
    assert texts(opened(tmp_path)) == ["a", *TEXTS]
    assert texts(opened(tmp_path / "t*")) == TEXTS, "a glob may name folders"
