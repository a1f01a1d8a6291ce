"""Changes of pictures and sound since a shard was made."""

from __future__ import annotations

import json
import os
from pathlib import Path

from moe_train.data.chat.example import Example
from moe_train.data.prepared.media_files import MediaFiles, changed_file


def test_other_content_in_any_folder_is_a_change(tmp_path: Path) -> None:
    first, second = (tmp_path / name for name in ("first", "second"))
    for folder in (first, second):
        (folder / "pictures").mkdir(parents=True)
        (folder / "pictures" / "a.png").write_bytes(b"one")
    picture = first / "pictures" / "a.png"
    files = MediaFiles()
    files.add(0, None, Example([1, 2], None))
    files.add(1, first, Example([1, 2], None, media_files=(str(picture.resolve()),)))
    (tmp_path / "facts.json").write_text(json.dumps({"media_files": files.states}))
    folders = [None, first]
    assert changed_file(tmp_path, folders) is None
    os.utime(picture, ns=(1, 1))
    assert changed_file(tmp_path, folders) is None  # the same bytes at another time
    assert changed_file(tmp_path, [None, second]) is None  # or in another folder
    (second / "pictures" / "a.png").write_bytes(b"two")
    assert changed_file(tmp_path, [None, second]) == second / "pictures" / "a.png"
    picture.unlink()
    assert changed_file(tmp_path, folders) == picture
    assert changed_file(tmp_path, [None, None]) == Path("pictures/a.png")
    (tmp_path / "facts.json").write_text("{}")
    assert changed_file(tmp_path, [None]) is None
