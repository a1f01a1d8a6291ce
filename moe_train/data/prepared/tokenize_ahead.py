"""Tokenize ahead of training: each source once, shard by shard, one process per shard. Finished shards survive any failure.

CACHE/tokens-KEY/manifest.json, SHARD/…     a prepared set
      tokens-KEY.unfinished/SHARD/…         a set in progress, or one whose process died
      scans/                                hashes of files that have not changed since
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypedDict

from moe_train import config
from moe_train.data.chat.chat_date import date_of
from moe_train.data.media import MediaRules
from moe_train.data.prepared.manifest import Manifest, Rules, ShardEntry, SourceFile
from moe_train.data.prepared.media_files import changed_file
from moe_train.data.prepared.shard_pool import PrepareProgress, ProgressReport, tokenize_shards
from moe_train.data.prepared.shards import Shard, cut
from moe_train.data.prepared.tokenize_shard import Recipe, is_intact
from moe_train.data.records.scan import Scan
from moe_train.data.records.source import OpenSource
from moe_train.data.records.unread import add_counts
from moe_train.data.sound.rules import SoundRules

log = logging.getLogger(__name__)

_RULES = 7
"""Version of the rules that turn a record into ids. Increase it with every change of the ids, so that old sets are made again."""
_RULES_OF_PAIRS = 8
"""The version for preference pairs, whose sets count the positions that both answers share."""
_MEDIA_FILES = 2
"""Version of the files of a shard that hold pictures and sound; it decides the keys of sets whose tokenizer writes either."""


def prepare(recipe: Recipe, cache_dir: str | Path, num_proc: int = 1, report: ProgressReport | None = None) -> Path:
    """Tokenize a source, unless that has been done, and return the folder with its tokens.

    Several processes may call this at the same time: one does the work, and the others wait. The finished shards of a process that
    was killed are reused.

    Args:
        recipe: The source, and how to tokenize its records.
        cache_dir: The folder for prepared sets.
        num_proc: Number of processes.
        report: A function that is called with the progress; None to log it.

    Raises:
        ValueError: If a record cannot be used (with its origin), if no record has any text, if the source changes while it is
            read, or if it cannot be passed to other processes.
        RuntimeError: If a process was killed.
    """
    cache = Path(cache_dir)
    scans = recipe.records.scan(cache / "scans")
    rules = _rules(recipe.source.record, recipe.template)
    # Everything besides the content that decides ids; any change here gives every shard a new key.
    versions = [_version(rules)] if recipe.tokenizer.media is None else [_version(rules), _MEDIA_FILES]
    conversion = json.dumps([*versions, recipe.tokenizer.identity, rules.model_dump(mode="json")], sort_keys=True)
    shards = cut(recipe.records, scans, conversion)
    # None stands where earlier versions had a list of places, so that the folders of sets keep their names.
    identity = [recipe.source.licence, recipe.source.origin, None, [shard.key for shard in shards]]
    directory = cache / f"tokens-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}"
    if directory.exists():
        _check_media(directory, shards, recipe)
        return directory
    with only_one(directory.with_suffix(".lock")):
        # Another process may have made the set while this one waited for the lock.
        if directory.exists():
            return directory
        unfinished = directory.with_suffix(".unfinished")
        unfinished.mkdir(exist_ok=True)
        for leftover in unfinished.glob(".*.unfinished-*"):  # left by a process that was killed
            shutil.rmtree(leftover)
        _tokenize_missing(unfinished, shards, recipe, num_proc, report or _Log())
        # A second scan detects files that were changed while they were tokenized.
        if recipe.records.scan(cache / "scans") != scans:
            raise ValueError(
                f"{_places(recipe.records)}: records were changed while they were read; start again when nothing writes to them"
            )
        manifest = _manifest(unfinished, shards, scans, recipe, rules)
        if not manifest.examples:
            shutil.rmtree(unfinished)
            raise ValueError(f"{_places(recipe.records)}: no record with any text")
        manifest.write(unfinished)
        os.rename(unfinished, directory)
    return directory


def _check_media(directory: Path, shards: list[Shard], recipe: Recipe) -> None:
    """Raise ValueError if a picture or clip is another one than in the set in `directory`, whose records are the same."""
    for shard in shards:
        changed = _changed_file(directory / shard.key, shard, recipe.records)
        if changed is not None:
            kind = "sound" if isinstance(recipe.tokenizer.media, SoundRules) else "picture"
            state = "is another one" if changed.is_file() else "is missing, or another one,"
            raise ValueError(
                f"the {kind} {changed} {state} than when records with the same content were tokenized; restore it, or remove "
                f"{directory} to tokenize them again"
            )


def _changed_file(folder: Path, shard: Shard, records: OpenSource) -> Path | None:
    """Return a picture or a clip of a shard in `folder` that is another one now; None if there is none."""
    return changed_file(folder, [records.folder(span.place) for span in shard.spans])


def _tokenize_missing(unfinished: Path, shards: list[Shard], recipe: Recipe, num_proc: int, report: ProgressReport) -> None:
    """Tokenize the shards that neither this set, in progress in the folder `unfinished`, nor another one has."""
    distinct = {shard.key: shard for shard in shards}  # two files may have the same content
    todo = []
    for shard in distinct.values():
        folder = unfinished / shard.key
        if folder.exists() and not is_intact(folder):
            log.warning("%s is damaged; it is tokenized again", folder)
            shutil.rmtree(folder)
        elif folder.exists() and _changed_file(folder, shard, recipe.records) is not None:
            shutil.rmtree(folder)
        if not folder.exists() and not _linked(shard, unfinished, recipe.records):
            todo.append(shard)
    if todo:
        existing = ""
        if len(todo) < len(distinct):
            existing = f", {len(distinct) - len(todo)} of {len(distinct)} shards are there"
        log.info("tokenizing %s%s", _places(recipe.records), existing)
    try:
        tokenize_shards(unfinished, todo, len(distinct), recipe, num_proc, report)
    finally:
        if not any(unfinished.iterdir()):  # no finished shard to keep
            unfinished.rmdir()


def _places(records: OpenSource) -> str:
    """Return the first places of a source, for messages."""
    return ", ".join(records.names[:3]) + (", …" if len(records.names) > 3 else "")


def _version(rules: Rules) -> int:
    """Return the version of the rules for a kind of records."""
    return _RULES_OF_PAIRS if rules.record["name"] == "preference" else _RULES


def _rules(record: config.Record, template: str | None) -> Rules:
    """Return the rules that turn records into ids, for the manifest."""
    template_sha256 = None
    if template is not None and record.name != "text":
        template_sha256 = hashlib.sha256(template.encode()).hexdigest()
    return Rules(
        record=record.model_dump(mode="json", exclude={"too_long"}),  # too_long matters only for packing
        # None for texts, on which a template has no effect.
        template_sha256=template_sha256,
        chat_date=None if template_sha256 is None else date_of(template),
        libraries={name: importlib.metadata.version(name) for name in ("tokenizers", "mistral-common", "jinja2")},
    )


def _linked(shard: Shard, unfinished: Path, records: OpenSource) -> bool:
    """Return whether another set has the same shard; if so, link its files into this one."""
    # Sets in progress match as well: the folder of a shard appears only when it is complete.
    for existing in unfinished.parent.glob(f"tokens-*/{shard.key}"):
        if not is_intact(existing) or _changed_file(existing, shard, records) is not None:
            continue
        # Hidden until all files are there: a folder named by the key counts as a finished shard.
        link_dir = unfinished / f".{shard.key}.unfinished-link"
        with contextlib.suppress(FileNotFoundError):  # the other set was removed meanwhile
            shutil.copytree(existing, link_dir, copy_function=_link)
            link_dir.rename(unfinished / shard.key)
            return True
    return False


def _link(file: str, target: str) -> None:
    """Create a hard link, or a copy if the file system has no hard links."""
    try:
        os.link(file, target)
    except OSError:  # the file system has no hard links
        shutil.copy2(file, target)


@contextlib.contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock, so that one process at a time makes a set."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        # The kernel frees the lock when the process ends, however it ends; the file itself stays.
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _ShardFacts(TypedDict):
    """The content of `facts.json`, which `write_shard` writes."""

    dtype: Literal["uint16", "uint32"]
    examples: int
    tokens: int
    loss_tokens: int
    empty: int
    unread: dict[str, int]
    per_span: list[tuple[int, int]]
    """(records, tokens) of each span of the shard."""
    sizes: dict[str, int]
    sha256: str


def _manifest(directory: Path, shards: list[Shard], scans: list[Scan], recipe: Recipe, rules: Rules) -> Manifest:
    """Build the manifest from the facts that each shard recorded."""
    facts: list[_ShardFacts] = [json.loads((directory / shard.key / "facts.json").read_text()) for shard in shards]
    # A large file is cut into several shards and small ones share a shard, so counts are gathered by file.
    records_of = [0] * len(recipe.records.places)
    tokens_of = [0] * len(recipe.records.places)
    unread: Counter[str] = Counter()
    entries = []
    for shard, fact in zip(shards, facts, strict=True):
        for span, (num_records, num_tokens) in zip(shard.spans, fact["per_span"], strict=True):
            records_of[span.place] += num_records
            tokens_of[span.place] += num_tokens
        add_counts(unread, fact["unread"])
        entries.append(
            ShardEntry(
                name=shard.key,
                spans=shard.spans,
                examples=fact["examples"],
                tokens=fact["tokens"],
                sizes=fact["sizes"],
                sha256=fact["sha256"],
            )
        )
    files = []
    for place, scan, records, tokens in zip(recipe.records.places, scans, records_of, tokens_of, strict=True):
        files.append(
            SourceFile(path=place.name, sha256=scan.sha256, size=scan.size, by_line=place.by_line, records=records, tokens=tokens)
        )
    versioned_rules = json.dumps([_version(rules), rules.model_dump(mode="json")], sort_keys=True)
    return Manifest(
        licence=recipe.source.licence,
        origin=recipe.source.origin,
        tokenizer_sha256=recipe.tokenizer.identity,
        rules=rules,
        rules_sha256=hashlib.sha256(versioned_rules.encode()).hexdigest(),
        too_long=recipe.source.record.too_long,
        # The same in all shards, since it depends on the tokenizer alone.
        dtype=facts[0]["dtype"],
        records=sum(records_of),
        empty=sum(fact["empty"] for fact in facts),
        examples=sum(fact["examples"] for fact in facts),
        tokens=sum(fact["tokens"] for fact in facts),
        loss_tokens=sum(fact["loss_tokens"] for fact in facts),
        unread=dict(unread),
        files=tuple(files),
        shards=tuple(entries),
        media=_media_rules(recipe, entries),
    ).sealed()


def _media_rules(recipe: Recipe, entries: list[ShardEntry]) -> MediaRules | None:
    """Return how pictures or sound became tokens; None if no record has any."""
    return recipe.tokenizer.media if any("media" in entry.sizes for entry in entries) else None


class _Log:
    """Logs the progress in one line every ten seconds."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._last_logged = self._start

    def __call__(self, progress: PrepareProgress) -> None:
        if time.monotonic() - self._last_logged > 10:
            self._last_logged = time.monotonic()
            seconds = self._last_logged - self._start
            log.info("%d of %d shards; %d records, %.1fM tokens in %.0f s", *progress[:3], progress.tokens / 1e6, seconds)
