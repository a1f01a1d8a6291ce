"""Tokenize the shards of a source in this process, or in a pool of processes with one shard each at a time."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import NamedTuple

from moe_train import config
from moe_train.data.prepared.shards import Shard
from moe_train.data.prepared.tokenize_shard import Recipe, ShardReport, write_shard
from moe_train.data.records.open_source import open_source
from moe_train.data.tokenizers.tokenizer import Tokenizer


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


ProgressReport = Callable[[PrepareProgress], None]
"""A function that is called with the progress."""


def tokenize_shards(
    directory: Path, todo: list[Shard], num_shards: int, recipe: Recipe, num_proc: int, report: ProgressReport
) -> None:
    """Tokenize the shards in `todo`, in this process or in several.

    Args:
        directory: The folder in which each shard becomes a folder.
        todo: The shards that are not tokenized yet.
        num_shards: Number of shards in total, for the progress.
        recipe: How to read and tokenize their records.
        num_proc: Number of processes.
        report: A function that is called with the progress.

    Raises:
        ValueError: If a record cannot be used, or the source cannot be passed to other processes.
        RuntimeError: If a process was killed.
    """
    progress = PrepareProgress(num_shards - len(todo), num_shards, 0, 0)
    # A process would take longer to start than it saves; and the records of a program need not be picklable then.
    if num_proc == 1 or len(todo) == 1:
        _tokenize_here(directory, todo, recipe, progress, report)
        return
    # Spawn, since this process may have started threads that a fork would not survive.
    context = multiprocessing.get_context("spawn")
    # (records, tokens) of all workers, as 64-bit integers: a set may have more than 2^31 tokens.
    shared = context.Array("q", 2)
    # Without the opened source, which each worker opens for itself.
    arguments = (recipe.source, recipe.tokenizer, recipe.template, shared)
    pool = ProcessPoolExecutor(min(num_proc, len(todo)), context, _begin, arguments)
    try:
        in_flight = _submitted(pool, directory, todo, recipe)
        while in_flight:
            # With a timeout, so that the progress is reported while no shard finishes.
            finished, in_flight = wait(in_flight, 0.2, FIRST_EXCEPTION)
            for future in finished:
                # Raises what the worker raised.
                future.result()
            progress = PrepareProgress(progress.done + len(finished), num_shards, *shared[:])
            report(progress)
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a process that tokenized {', '.join(recipe.records.names[:3])} was killed (was there memory enough for {num_proc}?); "
            f"{progress.done} of {num_shards} shards are done, start again to continue"
        ) from error
    finally:
        # Shards in progress are finished, and kept for the next start; those that wait are not begun.
        pool.shutdown(cancel_futures=True)


def _tokenize_here(directory: Path, todo: list[Shard], recipe: Recipe, progress: PrepareProgress, report: ProgressReport) -> None:
    """Tokenize shards one after the other in this process."""

    def report_records(num_records: int, num_tokens: int) -> None:
        nonlocal progress
        progress = progress._replace(records=progress.records + num_records, tokens=progress.tokens + num_tokens)
        report(progress)

    for shard in todo:
        write_shard(directory / shard.key, shard, recipe, report_records)
        progress = progress._replace(done=progress.done + 1)
        report(progress)


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
    report: ShardReport


_worker: _Worker | None = None


def _begin(source: config.RecordSource, tokenizer: Tokenizer, template: str | None, shared: SynchronizedArray[int]) -> None:
    """Set up a worker process."""
    global _worker
    # The processes are the parallelism; the threads of each would only compete for the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def report(num_records: int, num_tokens: int) -> None:
        with shared.get_lock():
            shared[0] += num_records
            shared[1] += num_tokens

    _worker = _Worker(Recipe(source, open_source(source), tokenizer, template), report)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent ends: a parent that is killed cannot tell the processes that it started."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    # Exit without clean-up: a shard appears only when it is complete, so there is nothing to undo.
    os._exit(1)


def _work(directory: Path, shard: Shard) -> None:
    """Tokenize a shard in a worker process."""
    assert _worker is not None
    write_shard(directory, shard, *_worker)
