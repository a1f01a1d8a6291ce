"""Prepared sets are copied completely or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.data.prepared.upload import upload


def test_the_manifest_is_copied_last_and_what_is_there_stays(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokens-1/shard").mkdir(parents=True)
    for name in ("manifest.json", "shard/tokens", "shard/offsets"):
        (tmp_path / "tokens-1" / name).write_text(name)
    copied: list[str] = []
    original = type(bucket).put_file

    def noted(self: Any, source: str, target: str, **more: Any) -> None:
        copied.append(target.partition("tokens-1/")[2])
        original(self, source, target, **more)

    monkeypatch.setattr(type(bucket), "put_file", noted)
    bucket.pipe_file("/bucket/tokens-1/shard/tokens", b"shard/tokens")  # by an upload that was interrupted
    assert upload(str(tmp_path / "tokens-1"), "memory://bucket/") == "memory://bucket/tokens-1"
    assert copied == ["shard/offsets", "manifest.json"]
    upload(str(tmp_path / "tokens-1"), "memory://bucket/")
    assert len(copied) == 2


def test_a_store_that_refuses_an_upload_is_named_in_a_line(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise PermissionError("Unable to locate\ncredentials")

    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setattr(type(bucket), "put_file", refuse)
    with pytest.raises(PermissionError, match=r"^memory://bucket is refused: Unable to locate credentials; state credentials"):
        upload(str(tmp_path), "memory://bucket")
