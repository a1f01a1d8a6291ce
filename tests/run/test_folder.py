"""The folder of a run: one job at a time, and the tokenizer in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moe_train.checkpoint import model_dir
from moe_train.data.tokenizers.load import load_tokenizer, tokenizer_at
from moe_train.run import folder, preflight
from moe_train.run.folder import RunFolder, only_one


def test_a_second_process_is_kept_out_until_the_first_has_left(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(ValueError, match="is in use by another process"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass


def test_a_run_has_its_tokenizer(finished, text, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved, ignore=shutil.ignore_patterns("[23]"))
    opened = model_dir.open_model(moved)
    assert opened.tokenizer.files[0] == moved / "tokenizer" / "tokenizer.json"
    assert opened.tokenizer.identity == load_tokenizer(tokenizer_at(text / "tokenizer")).identity


def test_a_changed_tokenizer_of_a_run_is_refused_and_copied_again(finished, text, tmp_path, caplog):
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved, ignore=shutil.ignore_patterns("[23]"))
    file = moved / "tokenizer" / "tokenizer_config.json"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"bos_token", b"bor_token"))
    with pytest.raises(ValueError, match=r"moved/tokenizer is not the tokenizer that .*moved was trained with"):
        model_dir.open_model(moved)
    section = tokenizer_at(moved / "tokenizer")
    with pytest.raises(ValueError, match=r"moved/tokenizer is not the tokenizer that .*moved was trained with"):
        preflight._check_same_tokenizer(section, load_tokenizer(section), str(moved))  # of a run with init_from
    original = load_tokenizer(tokenizer_at(text / "tokenizer"))
    folder._keep_tokenizer(moved / "tokenizer", original)
    assert "it was renamed to damaged-tokenizer, and copied again" in caplog.text and file.read_bytes() == content
    assert model_dir.open_model(moved).tokenizer.identity == original.identity
    caplog.clear()
    folder._keep_tokenizer(moved / "tokenizer", original)
    assert not caplog.text


def test_a_folder_that_is_a_file_or_in_use_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=r"run_dir .*file is a file; state a directory"):
        RunFolder(file)
    with RunFolder(tmp_path), pytest.raises(ValueError, match="wait until it ends, or choose another run_dir"), RunFolder(tmp_path):
        pass
    with RunFolder(tmp_path):
        pass


def test_a_folder_is_not_made_by_opening_it(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "new"):
        assert not list(tmp_path.iterdir())
