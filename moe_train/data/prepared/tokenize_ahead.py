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
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from moe_train import config
from moe_train.data.chat.chat_date import date_of
from moe_train.data.prepared.manifest import Manifest, Rules, ShardEntry, SourceFile
from moe_train.data.prepared.shards import Shard, cut
from moe_train.data.prepared.tokenize_shard import Recipe, Told, write_shard
from moe_train.data.records.open_source import open_source
from moe_train.data.records.scan import Scan
from moe_train.data.records.source import OpenSource
from moe_train.data.records.unread import add_counts
from moe_train.data.tokenizers.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_RULES = 6
"""Version of the rules that turn a record into ids. Increase it with every change of the ids, so that old sets are made again."""


class PrepareProgress(NamedTuple):
    """The progress of `prepare`."""

    done: int
    """Number of finished shards."""
    shards: int
    """Number of shards in total."""
    records: int
    """Number of records that this call has read so far."""
    tokens: int
    """Number of tokens that this call has made so far."""


def prepare(
    source: config.RecordSource,
    records: OpenSource,
    tokenizer: Tokenizer,
    template: str | None,
    cache_dir: str | Path,
    num_proc: int = 1,
    shown: Callable[[PrepareProgress], None] | None = None,
) -> Path:
    """Tokenize a source, unless that has been done, and return the folder with its tokens.

    Several processes may call this at the same time: one does the work, and the others wait. The finished shards of a process that
    was killed are reused.

    Args:
        source: The config section of the source.
        records: The opened source.
        tokenizer: The tokenizer.
        template: The chat template; None if there is none.
        cache_dir: The folder for prepared sets.
        num_proc: Number of processes.
        shown: A function that is called with the progress; None to log it.

    Raises:
        ValueError: If a record cannot be used (with its origin), if no record has any text, if the source changes while it is
            read, or if it cannot be passed to other processes.
        RuntimeError: If a process was killed.
    """
    cache = Path(cache_dir)
    scans = records.scan(cache / "scans")
    rules = _rules(source.record, template)
    conversion = json.dumps([_RULES, tokenizer.identity, rules.model_dump(mode="json")], sort_keys=True)
    shards = cut(records, scans, conversion)
    identity = [source.licence, source.origin, None, [shard.key for shard in shards]]
    directory = cache / f"tokens-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}"
    if directory.exists():
        return directory
    with _only_one(directory.with_suffix(".lock")):
        if directory.exists():
            return directory
        unfinished = directory.with_suffix(".unfinished")
        unfinished.mkdir(exist_ok=True)
        for leftover in unfinished.glob(".*.unfinished-*"):  # left by a process that was killed
            shutil.rmtree(leftover)
        distinct = {shard.key: shard for shard in shards}  # two files may have the same content
        todo = []
        for shard in distinct.values():
            if not (unfinished / shard.key).exists() and not _taken(shard, unfinished, cache):
                todo.append(shard)
        places = ", ".join(records.names[:3]) + (", …" if len(records.names) > 3 else "")
        if todo:
            done = ""
            if len(todo) < len(distinct):
                done = f", {len(distinct) - len(todo)} of {len(distinct)} shards are there"
            log.info("tokenizing %s%s", places, done)
        try:
            recipe = Recipe(records, source.record, tokenizer, template)
            _tokenize(unfinished, todo, len(distinct), source, recipe, num_proc, shown or _Log())
        finally:
            if not any(unfinished.iterdir()):  # no finished shard to keep
                unfinished.rmdir()
        # A second scan detects files that were changed while they were tokenized.
        if records.scan(cache / "scans") != scans:
            raise ValueError(f"{places}: records were changed while they were read; start again when nothing writes to them")
        manifest = _manifest(unfinished, shards, scans, records, source, tokenizer, rules)
        if not manifest.examples:
            shutil.rmtree(unfinished)
            raise ValueError(f"{places}: no record with any text")
        manifest.write(unfinished)
        os.rename(unfinished, directory)
    return directory


def _rules(record: config.Record, template: str | None) -> Rules:
    """Return the rules that turn records into ids, for the manifest."""
    template_sha256 = None
    if template is not None and record.name != "text":
        template_sha256 = hashlib.sha256(template.encode()).hexdigest()
    return Rules(
        record=record.model_dump(mode="json", exclude={"too_long"}),  # too_long matters only for packing
        template_sha256=template_sha256,
        chat_date=None if template_sha256 is None else date_of(template),
        libraries={name: importlib.metadata.version(name) for name in ("tokenizers", "mistral-common", "jinja2")},
    )


def _taken(shard: Shard, unfinished: Path, cache: Path) -> bool:
    """Return whether another set has the same shard; if so, link its files into this one."""
    for existing in cache.glob(f"tokens-*/{shard.key}"):
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
def _only_one(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock, so that one process at a time makes a set."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _manifest(
    directory: Path,
    shards: list[Shard],
    scans: list[Scan],
    records: OpenSource,
    source: config.RecordSource,
    tokenizer: Tokenizer,
    rules: Rules,
) -> Manifest:
    """Build the manifest from the facts that each shard recorded."""
    facts = [json.loads((directory / shard.key / "facts.json").read_text()) for shard in shards]
    counts = [[0, 0] for _ in records.places]
    for shard, fact in zip(shards, facts, strict=True):
        for span, (num_records, num_tokens) in zip(shard.spans, fact["per_span"], strict=True):
            counts[span.place][0] += num_records
            counts[span.place][1] += num_tokens
    unread: Counter[str] = Counter()
    for fact in facts:
        add_counts(unread, fact["unread"])
    return Manifest(
        licence=source.licence,
        origin=source.origin,
        tokenizer_sha256=tokenizer.identity,
        rules=rules,
        rules_sha256=hashlib.sha256(json.dumps([_RULES, rules.model_dump(mode="json")], sort_keys=True).encode()).hexdigest(),
        too_long=source.record.too_long,
        dtype=facts[0]["dtype"],
        records=sum(num_records for num_records, _ in counts),
        **{name: sum(fact[name] for fact in facts) for name in ("empty", "examples", "tokens", "loss_tokens")},
        unread=dict(unread),
        files=tuple(
            SourceFile(path=place.name, sha256=scan.sha256, size=scan.size, by_line=place.by_line, records=n, tokens=m)
            for place, scan, (n, m) in zip(records.places, scans, counts, strict=True)
        ),
        shards=tuple(
            ShardEntry(name=shard.key, spans=shard.spans, **{key: fact[key] for key in ("examples", "tokens", "sizes", "sha256")})
            for shard, fact in zip(shards, facts, strict=True)
        ),
    ).sealed()


# --- one process per shard -------------------------------------------------------------------------------------


def _tokenize(
    directory: Path,
    todo: list[Shard],
    num_shards: int,
    source: config.RecordSource,
    recipe: Recipe,
    num_proc: int,
    shown: Callable[[PrepareProgress], None],
) -> None:
    """Tokenize the shards in `todo`, in this process or in several."""
    now = PrepareProgress(num_shards - len(todo), num_shards, 0, 0)
    if num_proc == 1 or len(todo) == 1:

        def report(num_records: int, num_tokens: int) -> None:
            nonlocal now
            now = now._replace(records=now.records + num_records, tokens=now.tokens + num_tokens)
            shown(now)

        for shard in todo:
            write_shard(directory / shard.key, shard, recipe, report)
            now = now._replace(done=now.done + 1)
            shown(now)
        return
    # spawn: this process may have started threads that a fork would not survive
    context = multiprocessing.get_context("spawn")
    shared = context.Array("q", 2)
    pool = ProcessPoolExecutor(min(num_proc, len(todo)), context, _begin, (source, recipe.tokenizer, recipe.template, shared))
    try:
        in_flight = _submitted(pool, directory, todo, recipe)
        while in_flight:
            finished, in_flight = wait(in_flight, 0.2, FIRST_EXCEPTION)
            for future in finished:
                future.result()
            now = PrepareProgress(now.done + len(finished), num_shards, *shared[:])
            shown(now)
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a process that tokenized {', '.join(recipe.records.names[:3])} was killed (was there memory enough for {num_proc}?); "
            f"{now.done} of {num_shards} shards are done, start again to continue"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, directory: Path, todo: list[Shard], recipe: Recipe) -> set[Future[None]]:
    """Start the pool's processes, to which the source is pickled, and submit the shards."""
    try:
        return {pool.submit(_work, directory / shard.key, shard) for shard in todo}
    except Exception as error:  # an object can raise anything when it is pickled
        raise ValueError(
            f"{', '.join(recipe.records.names[:3])}: the records cannot be passed to other processes ({error}); "
            "set data.num_proc to 1, or make the object picklable"
        ) from error


class _Worker(NamedTuple):
    """The state of a worker process."""

    recipe: Recipe
    report: Told


_worker: _Worker | None = None


def _begin(source: config.RecordSource, tokenizer: Tokenizer, template: str | None, shared: Any) -> None:
    """Set up a worker process."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism

    def report(num_records: int, num_tokens: int) -> None:
        with shared.get_lock():
            shared[0] += num_records
            shared[1] += num_tokens

    _worker = _Worker(Recipe(open_source(source), source.record, tokenizer, template), report)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent ends: a parent that is killed cannot tell the processes that it started."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(directory: Path, shard: Shard) -> None:
    """Tokenize a shard in a worker process."""
    assert _worker is not None
    write_shard(directory, shard, *_worker)


class _Log:
    """Logs the progress in one line every ten seconds."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._last_logged = self._start

    def __call__(self, now: PrepareProgress) -> None:
        if time.monotonic() - self._last_logged > 10:
            self._last_logged = time.monotonic()
            seconds = self._last_logged - self._start
            log.info("%d of %d shards; %d records, %.1fM tokens in %.0f s", *now[:3], now.tokens / 1e6, seconds)
