"""The manifest: one hash over all that counts, and nothing but that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from moe_train import config
from moe_train.data.media import MediaRules
from moe_train.data.pictures.rules import PictureRules
from moe_train.data.prepared import manifest
from moe_train.data.prepared.manifest import Manifest
from moe_train.data.prepared.tokenize_ahead import prepare
from moe_train.data.prepared.tokenize_shard import Recipe
from moe_train.data.records.open_source import open_source
from moe_train.data.sound.rules import SoundRules
from moe_train.data.tokenizers.huggingface import HuggingFace


@pytest.fixture
def make(tokenizer: HuggingFace, tmp_path: Path) -> Callable[..., Manifest]:
    def make(*files: Path, record: config.Record | None = None, **said: str) -> Manifest:
        record = record or config.TextRecord(name="text")
        source = config.FileSource(name="files", files=tuple(map(str, files)), record=record, **said)
        made = Path(prepare(Recipe(source, open_source(source), tokenizer, None), tmp_path / "cache")) / manifest.MANIFEST
        return manifest.read_manifest(made.read_bytes(), str(made))

    return make


def test_it_says_which_files_gave_what(make: Callable[..., Manifest], write_lines: Callable[..., Path], tokenizer: HuggingFace):
    first = write_lines("a.jsonl", [{"text": "fox"}, {"text": ""}])
    second = write_lines("b.jsonl", [{"text": "brown dog"}] * 3)
    made = make(first, second, licence="MIT", origin="https://example.org")
    counts = [len(tokenizer.encode("fox")) + 2, 3 * (len(tokenizer.encode("brown dog")) + 2)]
    for file, path, records, tokens in zip(made.files, (first, second), (2, 3), counts, strict=True):
        assert (file.path, file.size, file.records, file.tokens) == (str(path), path.stat().st_size, records, tokens)
        assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (made.licence, made.origin, made.tokenizer_sha256) == ("MIT", "https://example.org", tokenizer.identity)
    assert (made.records, made.empty, made.examples, made.tokens) == (5, 1, 4, sum(counts))


def test_it_names_the_keys_that_were_not_read(make: Callable[..., Manifest], write_lines: Callable[..., Path]) -> None:
    plain = make(write_lines("a.jsonl", [{"text": "fox"}, {"text": "dog"}]))
    made = make(write_lines("b.jsonl", [{"text": "fox", "id": 1, "url": "u"}, {"text": "dog", "id": 2}]))
    assert (plain.unread, made.unread) == ({}, {"id": 2, "url": 1})
    older = made.model_dump(mode="json", exclude={"unread"})  # as an earlier version wrote it
    assert manifest.read_manifest(json.dumps(older), "here").hash == made.hash


RULES = (
    (PictureRules(14, 2, 1540, 10, 12, 13), "pictures"),
    (SoundRules(16000, 128, 160, 400, 3000, 8, 24, 25), "sound"),
)


@pytest.mark.parametrize(("rules", "older_field"), RULES)
def test_pictures_and_sound_of_this_version_and_of_earlier_ones(
    rules: MediaRules, older_field: str, make: Callable[..., Manifest], write_lines: Callable[..., Path]
) -> None:
    plain = make(write_lines("a.jsonl", [{"text": "fox"}]))
    made = plain.model_copy(update={"media": rules}).sealed()
    assert made.hash != plain.hash
    assert manifest.read_manifest(made.model_dump_json(), "here").media == rules
    # A set of text is the same set as before, and one with files is known, though its shards are not read.
    fields = plain.model_dump(mode="json", exclude={"media"})
    older = json.dumps(fields | {"pictures": None, "sound": None})
    assert manifest.read_manifest(older, "here") == plain
    older = json.dumps(fields | {"pictures": None, "sound": None} | {older_field: asdict(rules)})
    assert Manifest.model_validate_json(older).media == rules
    with pytest.raises(ValueError, match="here was written by an earlier version, which stored pictures and sound in other files"):
        manifest.read_manifest(older, "here")


def test_the_hash_follows_content_rules_and_licence_and_not_the_path(
    make: Callable[..., Manifest], write_lines: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_lines("a.jsonl", [{"text": "fox", "body": "dog"}])
    first = make(path, licence="MIT")
    moved = path.rename(tmp_path / "b.jsonl")
    assert make(moved, licence="MIT").hash == first.hash
    body = config.TextRecord(name="text", column="body")
    others = [make(moved), make(moved, licence="MIT", record=body), make(write_lines("c.jsonl", [{"text": "cat"}]), licence="MIT")]
    assert len({made.hash for made in (first, *others)}) == 4


def test_what_was_changed_by_hand_is_refused(make: Callable[..., Manifest], write_lines: Callable[..., Path]) -> None:
    made = make(write_lines("a.jsonl", [{"text": "fox"}]))
    text = made.model_dump_json()
    assert manifest.read_manifest(text, "here") == made
    for old, new in (('"licence":null', '"licence":"MIT"'), ('"records":1', '"records":2'), (made.files[0].sha256, "0" * 64)):
        assert old and old in text
        with pytest.raises(ValueError, match=r"^here was changed after it was written"):
            manifest.read_manifest(text.replace(old, new), "here")
    for broken in ("", "[]", "{}", text.replace('"layout":2', '"layout":3'), text[:-9]):
        with pytest.raises(ValueError, match=r"^here is no manifest that this version reads: ") as caught:
            manifest.read_manifest(broken, "here")
        assert "\n" not in str(caught.value)


def test_one_hash_over_several_sets(make: Callable[..., Manifest], write_lines: Callable[..., Path]) -> None:
    one, two = (make(write_lines(f"{text}.jsonl", [{"text": text}])) for text in ("fox", "dog"))
    assert manifest.hash_of_all([one]) == one.hash
    assert len({one.hash, two.hash, manifest.hash_of_all([one, two]), manifest.hash_of_all([two, one])}) == 4
    said = json.loads(manifest.text_of_all([one, two]))
    assert said["hash"] == manifest.hash_of_all([one, two]) and [made["hash"] for made in said["sets"]] == [one.hash, two.hash]
