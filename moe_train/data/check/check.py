"""`moe-train data check`: find problems in records before training, and estimate what training on them will take.

Records are read once, in chunks that any number of processes examine in any order; results are gathered in the order of
the records. Memory does not grow with the corpus: fingerprints are on disk, lengths are counted, and for each rule only the
first problems are kept and the rest counted.
"""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_train import config
from moe_train.data.chat.conversation_to_tokens import check_section
from moe_train.data.check import estimate, rules
from moe_train.data.check.chunks import CheckedFile, CheckedSource, Coverage, all_chunks, places_of, some_chunks
from moe_train.data.check.corrected import corrected_copy
from moe_train.data.check.duplicates import SIMILAR, Spool
from moe_train.data.check.duplicates import WORDS as DUPLICATE_WORDS
from moe_train.data.check.examine import examine
from moe_train.data.check.findings import Chunk, Findings, Question
from moe_train.data.check.held_out import HeldOutRecords
from moe_train.data.check.kinds import Kinds
from moe_train.data.check.overlap import OVERLAP_WORDS
from moe_train.data.check.requirements import Requirements, requirements_of
from moe_train.data.records.file_bytes import size_of
from moe_train.data.records.problem import Problem
from moe_train.data.records.unread import add_counts
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import refuse_existing

_WORTH_PROCESSES = 8 << 20  # bytes; fewer are examined faster than processes start


@dataclass(frozen=True)
class Settings:
    """The settings of a check."""

    template: str | None = None
    """The chat template; None if there is none."""
    allowed: frozenset[str] = frozenset()
    """Rules that may be broken."""
    seq_len: int | None = None
    """Positions in a row of the training to come; None if unknown."""
    batch_size: int | None = None
    """Rows in a batch of the training to come; None if unknown."""
    against: tuple[CheckedSource, ...] = ()
    """The evaluation set to compare with."""
    bench: Path | None = None
    """The output of `bench --json`, for the speed of training; None if unknown."""
    fix: Path | None = None
    """The folder for a corrected copy; None to write none."""
    dry_run: bool = False
    """Whether to say what a corrected copy would change, without writing it."""
    sample: int | None = None
    """Number of records to read; None for all."""
    num_proc: int = 1
    """Number of processes."""
    shown: int = 10
    """Number of problems and duplicates to list for each rule."""


def sources_of(chosen: Sequence[config.Source], ignore: Sequence[str] = ()) -> tuple[CheckedSource, ...]:
    """Return the sources of a run's config, to be read as training would read them.

    Args:
        chosen: The sources.
        ignore: Keys that are not to be read, besides those that the config names.

    Raises:
        ValueError: If a source does not consist of files.
    """
    sources = []
    for source in chosen:
        if not isinstance(source, config.FileSource):
            title, file_names = _not_files(source)
            raise ValueError(
                f"data: {title} is a {source.name} source, and not files of records, which are what is checked; "
                f"name files ({file_names}): moe-train data check FILES --tokenizer T"
            )
        sources.append(CheckedSource(source.files, source.format, _ignoring(source.record, ignore), weight=source.weight))
    return tuple(sources)


def _ignoring(record: config.Record, ignore: Sequence[str]) -> config.Record:
    """Return a section that ignores more keys."""
    return record.model_copy(update={"ignore": tuple(dict.fromkeys((*record.ignore, *ignore)))})


def _not_files(source: config.HubSource | config.PythonSource | config.PreparedSource) -> tuple[str, str]:
    """Return what the source is called, and which files could be checked instead."""
    match source:
        case config.HubSource(dataset=dataset):
            return dataset, "its download"
        case config.PythonSource(title=title):
            return title, "its records as JSON lines"
        case config.PreparedSource(path=path):
            return path, "those that its manifest.json names"


def section_of(columns: Sequence[str], ignore: Sequence[str] = ()) -> config.Record | None:
    """Return the record section that OURS=THEIRS pairs describe; None if there are no pairs.

    Args:
        columns: The pairs.
        ignore: Keys that are not to be read.

    Raises:
        ValueError: If they describe no kind of record, or two.
    """
    pairs = dict(pair.partition("=")[::2] for pair in columns)
    kinds = {("text",): "text", ("messages",): "chat", ("completion", "prompt"): "completion"}
    if not pairs:
        return None
    if tuple(sorted(pairs)) not in kinds or not all(pairs.values()):
        raise ValueError(
            f"--map {' '.join(columns)} should be text=COLUMN, messages=COLUMN, or prompt=COLUMN and completion=COLUMN"
        )
    ignored = tuple(ignore)
    match kinds[tuple(sorted(pairs))]:
        case "text":
            return config.TextRecord(name="text", column=pairs["text"], ignore=ignored)
        case "chat":
            return config.ChatRecord(name="chat", column=pairs["messages"], ignore=ignored)
        case _:
            prompt, completion = pairs["prompt"], pairs["completion"]
            return config.CompletionRecord(name="completion", prompt=prompt, completion=completion, ignore=ignored)


CheckProgress = Callable[[int, int, int], None]
"""A function that is called with the bytes of the files read so far, their total size, and the number of records so far."""


def check_records(
    sources: Sequence[CheckedSource], tokenizer: Tokenizer, settings: Settings, progress: CheckProgress | None = None
) -> dict[str, Any]:
    """Check records.

    Args:
        sources: The files.
        tokenizer: The tokenizer of the training to come.
        settings: The settings.
        progress: A function that is called after every chunk.

    Returns:
        All results in JSON form; see `tests/data/check/test_check.py` for the keys.

    Raises:
        FileNotFoundError: If there is nothing to read.
        FileExistsError: If the `fix` folder exists.
        ValueError: If the check cannot be made as requested.
    """
    repairing = settings.fix is not None or settings.dry_run
    if settings.sample is not None and repairing:
        raise ValueError(f"a sample cannot be fixed: leave out --sample or {'--fix' if settings.fix else '--dry-run'}")
    if settings.fix is not None:
        refuse_existing(settings.fix)
    unknown = sorted(settings.allowed - RULE_NAMES)
    if unknown:
        raise ValueError(f"there is no rule {unknown[0]}; the rules are {', '.join(sorted(RULE_NAMES))}")
    for source in sources:
        if source.record is not None:
            check_section(source.record, settings.template, tokenizer)
    tokens_per_second = estimate.tokens_per_second(settings.bench)
    places = places_of(sources, settings.sample is not None)
    held_out = HeldOutRecords(settings.against)
    question = Question(
        records=tuple(sources[place.source].record for place in places),
        tokenizer=tokenizer,
        template=settings.template,
        seq_len=settings.seq_len,
        allowed=settings.allowed,
        repairing=repairing,
        ignore=tuple(dict.fromkeys(itertools.chain.from_iterable(source.ignore for source in sources))),
        held_out=held_out.hashes,
    )
    sizes = [size_of(place.file) for place in places]
    num_proc = 1
    if sum(sizes) > _WORTH_PROCESSES or settings.sample:
        num_proc = settings.num_proc
    if settings.sample is None:
        coverage = None
        chunks = all_chunks(places, question)
    else:
        coverage = Coverage(settings.sample, sizes)
        chunks = some_chunks(places, question, coverage)
    with tempfile.TemporaryDirectory(prefix="moe-train-check-") as scratch, corrected_copy(settings, places) as fixed:
        gathered = _Gathered(places, Path(scratch), settings.shown, held_out)
        for findings, done in _examined(chunks, question, num_proc):
            gathered.add(findings)
            if fixed is not None and findings.kept is not None:
                fixed.add(findings)
            if progress is not None:
                progress(done, sum(sizes), gathered.records)
        gathered.name_empty_files()
        if "mixed-kinds" not in settings.allowed:
            gathered.name_mixed_kinds()
        answer = gathered.answer(sources, settings, tokens_per_second)
        if coverage is not None:
            answer["sample"] = coverage.answer(gathered.records)
            # The number of duplicates in a sample says little about the whole corpus.
            answer["duplicates"] = None
        if fixed is not None:
            answer["fixed"] = fixed.close()
    return answer


RULE_NAMES = frozenset(rule.name for rule in rules.RULES) | {
    *("type", "columns", "text-and-content", "empty-text", "refused", "too-long", "no-loss", "tools", "unread-key", "weight"),
    *(
        "arguments",
        "call-text",
        "thinking",
        "settings",
        "effort",
        "pair",
        "no-objective",
        "mixed-kinds",
        "no-template",
        "template",
        "image",
    ),
    *("not-json", "not-a-record", "not-utf-8", "unreadable", "empty-file"),
}
"""The names of all rules. Those of the last line concern files and lines that do not contain a record."""


# --- processes -------------------------------------------------------------------------------------------------


def _examined(chunks: Iterator[tuple[Chunk, int]], question: Question, num_proc: int) -> Iterator[tuple[Findings, int]]:
    """Examine chunks in this process or in several; yield the findings in the order of the chunks."""
    try:
        if num_proc == 1:
            form = requirements_of(question.tokenizer, question.template)
            for chunk, done in chunks:
                yield examine(chunk, question, form), done
            return
        # spawn: this process may have started threads that a fork would not survive
        with ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), _begin, (question,)) as pool:
            in_flight: collections.deque[tuple[Future[Findings], int]] = collections.deque()
            try:
                for chunk, done in chunks:
                    in_flight.append((pool.submit(_work, chunk), done))
                    # Bound the chunks in flight, since every one is in memory.
                    if len(in_flight) > 2 * num_proc:
                        future, done = in_flight.popleft()
                        yield future.result(), done
                while in_flight:
                    future, done = in_flight.popleft()
                    yield future.result(), done
            finally:
                for future, _ in in_flight:
                    future.cancel()
    except BrokenProcessPool as error:
        raise RuntimeError("a process that examined records died, for want of memory perhaps; use --num-proc 1") from error


_asked: tuple[Question, Requirements] | None = None


def _begin(question: Question) -> None:
    """Set up a worker process."""
    global _asked
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _asked = question, requirements_of(question.tokenizer, question.template)


def _work(chunk: Chunk) -> Findings:
    """Examine a chunk in a worker process."""
    assert _asked is not None
    return examine(chunk, *_asked)


# --- gathering -------------------------------------------------------------------------------------------------


@dataclass
class _Gathered:
    """The findings of all chunks together."""

    places: list[CheckedFile]
    scratch: Path
    shown: int
    held_out: HeldOutRecords
    records: int = 0
    loss_tokens: int = 0
    overlapping: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    problems: list[dict[str, Any]] = field(default_factory=list)
    bad_records: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    lengths: dict[tuple[int, str], Counter[int]] = field(default_factory=dict)
    fitting: dict[tuple[int, str], Counter[tuple[int, int]]] = field(default_factory=dict)
    merged: Counter[str] = field(default_factory=Counter)
    restarts: Counter[str] = field(default_factory=Counter)
    overlaps: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    kinds: Kinds = field(default_factory=Kinds)

    def __post_init__(self) -> None:
        self._spool = Spool(self.scratch)
        self._origins = (self.scratch / "origins").open("wb")
        self._seen = [0] * len(self.places)

    def add(self, findings: Findings) -> None:
        """Add the findings of the next chunk."""
        place = self.places[findings.place]
        self.records += findings.num_records
        self._seen[findings.place] += findings.num_records
        self.loss_tokens += findings.loss_tokens
        self.shapes.update(findings.shapes)
        add_counts(self.unread, findings.unread)
        self.kinds.add(place, findings.kinds)
        self.bad_records += len({number for number, _ in findings.problems})
        for number, problem in findings.problems:
            self._name(place, number, problem)
        for (kind, ids), count in findings.lengths.items():
            self.lengths.setdefault((place.source, kind), Counter())[ids] += count
        for (kind, ids, kept), count in findings.fitting.items():
            self.fitting.setdefault((place.source, kind), Counter())[ids, kept] += count
        self.merged += findings.merged
        self.restarts += findings.restarts
        self._spool.add(findings.prints)
        self._origins.write(np.stack([np.full_like(findings.numbers, findings.place), findings.numbers], 1).tobytes())
        if self.held_out.hashes is not None:
            self.overlapping += len(findings.overlapping)
            self.held_out.add(findings.held_out)
            self.overlaps += [place.where(int(n)) for n in findings.overlapping[: self.shown - len(self.overlaps)]]

    def name_empty_files(self) -> None:
        """Add a problem for each file without records."""
        for place, seen in zip(self.places, self._seen, strict=True):
            if not seen:
                self._name(place, 1, Problem("empty-file", "the file has no records", "leave it out"))

    def name_mixed_kinds(self) -> None:
        """Add a problem for each further kind of records in a source."""
        for place, number, problem, records in self.kinds.problems():
            self._name(place, number, problem)
            self.bad_records += records

    def _name(self, place: CheckedFile, number: int, problem: Problem) -> None:
        """Count a problem, and keep it if it is among the first of its rule."""
        self.broken[problem.rule] += 1
        if self.broken[problem.rule] <= self.shown:
            location = {"where": place.where(number), "file": str(place.file), place.counted: number}
            self.problems.append({**location, "rule": problem.rule, "message": problem.message, "remedy": problem.remedy})

    def answer(self, sources: Sequence[CheckedSource], settings: Settings, tokens_per_second: float | None) -> dict[str, Any]:
        """Return the results in JSON form."""
        self._origins.close()
        lengths: Counter[int] = sum(self.lengths.values(), Counter())
        truncation = epoch = None
        if settings.seq_len is not None:
            truncation = estimate.truncation(self.lengths, self.fitting, settings.seq_len)
            epoch = estimate.epoch(self.lengths, self.fitting, sources, settings.seq_len, settings.batch_size, tokens_per_second)
        return {
            "files": len(self.places),
            "bytes": sum(size_of(place.file) for place in self.places),
            "records": self.records,
            "records_with_problems": self.bad_records,
            "shapes": dict(self.shapes.most_common()),
            "not_read": dict(self.unread.most_common()),
            "examples": lengths.total(),
            "tokens": sum(ids * count for ids, count in lengths.items()),
            "loss_tokens": self.loss_tokens,
            "merged_turns": {**self.merged, "restarts": dict(self.restarts.most_common())} if self.merged else None,
            "lengths": estimate.histogram(lengths),
            "truncation": truncation,
            "packing": epoch,
            "duplicates": self._duplicates(),
            "overlap": self._overlap(),
            "problem_counts": dict(self.broken.most_common()),
            "problems": self.problems,
        }

    def _duplicates(self) -> dict[str, Any]:
        """Find the duplicates in the corpus."""
        duplicates = self._spool.duplicates(self.shown)
        origins: np.ndarray = np.zeros((0, 2))
        if self._spool.num_records:
            origins = np.memmap(self.scratch / "origins", np.int64, "r").reshape(-1, 2)

        def location(record: int) -> str:
            place, number = origins[record].tolist()
            return self.places[place].where(number)

        return {
            "exact": duplicates.exact,
            "near": duplicates.near,
            "method": f"MinHash of {DUPLICATE_WORDS}-word sequences, Jaccard similarity of {SIMILAR} or more",
            "examples": [
                {"where": location(twin.record), "like": location(twin.earlier), "similarity": round(twin.similarity, 2)}
                for twin in duplicates.examples
            ],
        }

    def _overlap(self) -> dict[str, Any] | None:
        """Return the overlap with the evaluation set; None without one."""
        if self.held_out.hashes is None:
            return None
        return {
            "records": self.overlapping,
            "evaluation_records": self.held_out.num_hit,
            "of": self.held_out.num_records,
            "words": OVERLAP_WORDS,
            "examples": self.overlaps,
        }
