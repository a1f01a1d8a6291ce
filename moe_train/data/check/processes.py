"""Examine the chunks of a check in one process or in several; results come in the order of the chunks."""

from __future__ import annotations

import collections
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from moe_train.data.check.examine import examine
from moe_train.data.check.findings import Chunk, Findings, Question
from moe_train.data.check.requirements import Requirements, requirements_of

_WORTH_PROCESSES = 8 << 20  # bytes; fewer are examined faster than processes start


def useful_processes(num_proc: int, num_bytes: int, sampling: bool) -> int:
    """Return how many processes to start.

    Args:
        num_proc: The largest number allowed.
        num_bytes: The size of the files.
        sampling: Whether only a sample of them is read.
    """
    if sampling or num_bytes > _WORTH_PROCESSES:
        return num_proc
    return 1


def examine_chunks(chunks: Iterator[tuple[Chunk, int]], question: Question, num_proc: int) -> Iterator[tuple[Findings, int]]:
    """Examine chunks in this process or in several.

    Args:
        chunks: The chunks, each with the number of bytes read so far.
        question: What to examine.
        num_proc: Number of processes; 1 for this one only.

    Yields:
        The findings in the order of the chunks, each with the number of bytes of its chunk.

    Raises:
        RuntimeError: If a process died.
    """
    if num_proc == 1:
        form = requirements_of(question.tokenizer, question.template)
        for chunk, num_bytes in chunks:
            yield examine(chunk, question, form), num_bytes
        return
    # spawn: this process may have started threads that a fork would not survive
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(num_proc, context, _set_up_worker, (question,)) as pool:
            yield from _examine_in_pool(chunks, pool, max_in_flight=2 * num_proc)
    except BrokenProcessPool as error:
        raise RuntimeError("a process that examined records died, for want of memory perhaps; use --num-proc 1") from error


def _examine_in_pool(
    chunks: Iterator[tuple[Chunk, int]], pool: ProcessPoolExecutor, max_in_flight: int
) -> Iterator[tuple[Findings, int]]:
    """Hand chunks to the processes of a pool, and yield the findings in their order."""
    # A queue, since chunks finish in any order and findings have to come in the order of the records.
    in_flight: collections.deque[tuple[Future[Findings], int]] = collections.deque()
    try:
        for chunk, num_bytes in chunks:
            in_flight.append((pool.submit(_examine_in_worker, chunk), num_bytes))
            # Bound the chunks in flight, since every one is in memory.
            if len(in_flight) > max_in_flight:
                future, bytes_read = in_flight.popleft()
                yield future.result(), bytes_read
        while in_flight:
            future, bytes_read = in_flight.popleft()
            yield future.result(), bytes_read
    finally:
        # After an error or an interrupt the pool would otherwise finish all of them before it closes.
        for future, _ in in_flight:
            future.cancel()


_worker_state: tuple[Question, Requirements] | None = None


def _set_up_worker(question: Question) -> None:
    """Keep the question in a worker process, so that it is sent once and not with every chunk."""
    global _worker_state
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_state = question, requirements_of(question.tokenizer, question.template)


def _examine_in_worker(chunk: Chunk) -> Findings:
    """Examine a chunk in a worker process."""
    assert _worker_state is not None
    return examine(chunk, *_worker_state)
