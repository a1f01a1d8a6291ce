"""`moe-train data check`: what is wrong with records before they are trained on, and what training on them will take.

Records are read once, in chunks that any number of processes examine in any order; what they found is gathered in the
order of the records. Memory does not grow with the corpus: fingerprints lie on disk, lengths are counted, and of the
problems of one rule the first few are kept and the others counted.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from moe_train import config
from moe_train.atomic import new_directory, refuse_existing
from moe_train.data import files, packing, rules
from moe_train.data.conversation import Conversation, normalise, recognise
from moe_train.data.duplicates import SIMILAR, Spool
from moe_train.data.duplicates import WORDS as DUPLICATE_WORDS
from moe_train.data.examine import OVERLAP_WORDS, Chunk, Findings, Question, Stop, examine, held_out_hashes
from moe_train.data.fields import Problem
from moe_train.data.files import Block
from moe_train.data.sources import resolve
from moe_train.data.tokenizer import Tokenizer
from moe_train.json_file import read_object

_ROWS, _CHARACTERS = 256, 1 << 20  # records that are no lines, and characters of their columns, in one chunk
_WORTH_PROCESSES = 8 << 20  # bytes; less is done before processes have started
_PACKED_AT_ONCE = 1 << 21  # examples; of more, a fraction with the same lengths is packed


@dataclass(frozen=True)
class Source:
    """Files, how their records are read (None: each recognised by its columns), and their share in a mixture."""

    files: tuple[str, ...]
    format: str = "auto"
    record: config.Record | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Settings:
    """allowed: rules that may be broken; seq_len, batch_size: of the training to come, where known; against: the evaluation
    set; bench: what `bench --json` wrote; fix: a folder to write; sample: how many records to read, instead of
    all; num_proc: processes; shown: problems and duplicates to name for each rule."""

    template: str | None = None
    allowed: frozenset[str] = frozenset()
    seq_len: int | None = None
    batch_size: int | None = None
    against: tuple[Source, ...] = ()
    bench: Path | None = None
    fix: Path | None = None
    sample: int | None = None
    num_proc: int = 1
    shown: int = 10


def sources_of(chosen: Sequence[config.Source]) -> tuple[Source, ...]:
    """Those of a run's config, read as its training would. Raises ValueError for one that is not in files."""
    found = []
    for source in chosen:
        if not isinstance(source, config.FileSource):
            where = source.path if isinstance(source, config.PreparedSource) else source.dataset
            made_of = "those that its manifest.json names" if isinstance(source, config.PreparedSource) else "its download"
            raise ValueError(
                f"data: {where} is a {source.name} source, and not files of records, which are what is checked; "
                f"name files ({made_of}): moe-train data check FILES --tokenizer T"
            )
        found.append(Source(source.files, source.format, source.record, source.weight))
    return tuple(found)


def section_of(columns: Sequence[str]) -> config.Record | None:
    """The record section that OURS=THEIRS pairs state; none where there are none.

    Raises ValueError where they state no kind of record, or two.
    """
    pairs = dict(pair.partition("=")[::2] for pair in columns)
    kinds = {("text",): "text", ("messages",): "chat", ("completion", "prompt"): "completion"}
    if not pairs:
        return None
    if tuple(sorted(pairs)) not in kinds or not all(pairs.values()):
        raise ValueError(
            f"--map {' '.join(columns)} should be text=COLUMN, messages=COLUMN, or prompt=COLUMN and completion=COLUMN"
        )
    match kinds[tuple(sorted(pairs))]:
        case "text":
            return config.TextRecord(name="text", column=pairs["text"])
        case "chat":
            return config.ChatRecord(name="chat", column=pairs["messages"])
        case _:
            return config.CompletionRecord(name="completion", prompt=pairs["prompt"], completion=pairs["completion"])


class Place(NamedTuple):
    """A file, its format, the source it belongs to, and what its records are counted by."""

    file: Path
    kind: str
    source: int
    counted: str  # line, row, or byte where lines were picked out

    def where(self, number: int) -> str:
        return f"{self.file}:{number}" if self.counted == "line" else f"{self.file}: {self.counted} {number}"


Progress = Callable[[int, int, int], None]
"""Told how many bytes of the files are done, how many they have, and how many records are done."""


def check(sources: Sequence[Source], tokenizer: Tokenizer, settings: Settings, progress: Progress | None = None) -> dict[str, Any]:
    """Everything that is known of the records, as JSON would have it (see `tests/data/test_check.py` for the keys).

    Raises FileNotFoundError, FileExistsError and ValueError where the check cannot be made as asked: nothing to read, a
    `fix` folder that is there, records with tools for a tokenizer without tool tokens.
    """
    if settings.sample is not None and settings.fix is not None:
        raise ValueError("a sample cannot be fixed: leave out --sample or --fix")
    if settings.fix is not None:
        refuse_existing(settings.fix)
    unknown = sorted(settings.allowed - RULES)
    if unknown:
        raise ValueError(f"there is no rule {unknown[0]}; the rules are {', '.join(sorted(RULES))}")
    tokens_per_second = _tokens_per_second(settings.bench)
    places = _places(sources, settings.sample is not None)
    held_out = _HeldOut(settings.against)
    question = Question(
        records=tuple(sources[place.source].record for place in places),
        tokenizer=tokenizer,
        template=settings.template,
        seq_len=settings.seq_len,
        allowed=settings.allowed,
        repairing=settings.fix is not None,
        held_out=held_out.hashes,
    )
    sizes = [place.file.stat().st_size for place in places]
    num_proc = settings.num_proc if sum(sizes) > _WORTH_PROCESSES or settings.sample else 1
    coverage = None if settings.sample is None else _Coverage(settings.sample, sizes)
    chunks = _all_chunks(places, question) if coverage is None else _some_chunks(places, question, coverage)
    with tempfile.TemporaryDirectory(prefix="moe-train-check-") as scratch, _output(settings.fix, places) as fixed:
        gathered = _Gathered(places, Path(scratch), settings.shown, held_out)
        for found, done in _examined(chunks, question, num_proc, places):
            gathered.add(found)
            if fixed is not None and found.kept is not None:
                fixed.add(found)
            if progress is not None:
                progress(done, sum(sizes), gathered.records)
        gathered.name_empty_files()
        answer = gathered.answer(sources, settings, tokens_per_second)
        if coverage is not None:
            answer["sample"] = coverage.answer(gathered.records)
            answer["duplicates"] = None
        if fixed is not None:
            answer["fixed"] = fixed.close(settings.fix)
    return answer


RULES = frozenset(rule.name for rule in rules.RULES) | {
    *("type", "columns", "text-and-content", "empty-text", "refused", "too-long", "no-loss", "tools"),
    *("not-json", "not-a-record", "not-utf-8", "unreadable", "empty-file"),
}
"""What can be wrong. Those of the last line are of files, before a record is one."""


# --- reading ---------------------------------------------------------------------------------------------------


def _places(sources: Sequence[Source], picked: bool) -> list[Place]:
    places = []
    for i, source in enumerate(sources):
        record = source.record or config.TextRecord(name="text")
        section = config.FileSource.model_validate(
            {"name": "files", "files": source.files, "format": source.format, "record": record}
        )
        for file, kind in resolve(section):
            lines = kind == "json" and not files.is_array(file)
            anywhere = picked and lines and file.suffix.lower() not in files.COMPRESSIONS
            places.append(Place(file, kind, i, "byte" if anywhere else "line" if lines or kind == "text" else "row"))
    return places


def _read(place: Place, section: config.Record | None) -> Iterator[tuple[int, files.Item]]:
    """The records of a file, one after the other."""
    match place.kind:
        case "json" if place.counted == "line":
            yield from files.read_lines(place.file)
        case "text":
            column = section.column if isinstance(section, config.TextRecord) else "text"
            for line, text in files.read_text(place.file):
                yield line, text if isinstance(text, Problem) else {column: text}
        case "json":
            yield from files.read_array(place.file)
        case "csv":
            yield from files.read_csv(place.file)
        case _:
            yield from files.read_rows(place.file, place.kind, None)


def _all_chunks(places: list[Place], question: Question) -> Iterator[tuple[Chunk, int]]:
    """Every record, and how many bytes of the files have been read."""
    before = 0
    for i, place in enumerate(places):
        size = place.file.stat().st_size
        if place.kind == "json" and place.counted == "line":
            packed = place.file.suffix.lower() in files.COMPRESSIONS
            done = 0
            for block in files.blocks(place.file):
                done += len(block.lines) if isinstance(block.lines, bytes) else 0
                yield Chunk(i, block), before + (0 if packed else min(done, size))
        else:
            rows = _read(place, question.records[i])
            for some in _grouped(rows):
                yield Chunk(i, some), before
        before += size


def _grouped(rows: Iterator[tuple[int, files.Item]]) -> Iterator[list[tuple[int, files.Item]]]:
    some: list[tuple[int, files.Item]] = []
    room = _CHARACTERS
    for number, item in rows:
        some.append((number, item))
        room -= sum(len(value) for value in item.values() if isinstance(value, str)) if isinstance(item, dict) else 0
        if len(some) == _ROWS or room <= 0:
            yield some
            some, room = [], _CHARACTERS
    if some:
        yield some


class _Coverage:
    """How much of the files a sample has read."""

    def __init__(self, wanted: int, sizes: list[int]) -> None:
        self.sizes = sizes
        total = max(sum(sizes), 1)
        self.quota = [max(1, round(wanted * size / total)) if size else 0 for size in sizes]
        self.picked_bytes = self.picked = self.picked_of = 0
        self.only_begun: list[str] = []

    def answer(self, records: int) -> dict[str, Any]:
        """of_about: what the length of the picked lines suggests; None where some file's records have no known number."""
        about = round(self.picked_of * self.picked / self.picked_bytes) if self.picked_bytes and not self.only_begun else None
        return {
            "records": records,
            "of_about": None if about is None else max(about, records),
            "share": None if about is None else min(1.0, records / max(about, 1)),
            "files": len(self.sizes),
            "bytes": sum(self.sizes),
            "only_begun": self.only_begun,
        }


def _some_chunks(places: list[Place], question: Question, coverage: _Coverage) -> Iterator[tuple[Chunk, int]]:
    """Lines from all over a file, one in each of as many equal parts; of files that cannot be entered anywhere, the first
    records. The same every time."""
    before = 0
    for i, (place, size, quota) in enumerate(zip(places, coverage.sizes, coverage.quota, strict=True)):
        if place.counted == "byte":
            lines: list[Block] = []
            with place.file.open("rb") as stream:
                last = -1
                chosen = random.Random(0)
                for k in range(quota):
                    goal = int((k + chosen.random()) * size / quota)
                    stream.seek(max(goal - 1, 0))
                    if goal:
                        stream.readline(files.MAX_RECORD)  # the rest of the line that the goal is in
                    at = stream.tell()
                    line = stream.readline(files.MAX_RECORD)
                    if at <= last or not line.strip():
                        continue
                    last = at
                    coverage.picked += 1
                    coverage.picked_bytes += len(line)
                    lines.append(Block(at + 1, line))
            coverage.picked_of += size
            for start in range(0, len(lines), _ROWS):
                yield Chunk(i, lines[start : start + _ROWS]), before
        else:
            rows = _read(place, question.records[i])
            some = list(itertools.islice(rows, quota))
            if next(rows, None) is not None:
                coverage.only_begun.append(str(place.file))
            for group in _grouped(iter(some)):
                yield Chunk(i, group), before
        before += size


# --- processes -------------------------------------------------------------------------------------------------


def _examined(
    chunks: Iterator[tuple[Chunk, int]], question: Question, num_proc: int, places: list[Place]
) -> Iterator[tuple[Findings, int]]:
    try:
        if num_proc == 1:
            form = rules.form_of(question.tokenizer, question.template)
            for chunk, done in chunks:
                yield examine(chunk, question, form), done
            return
        # spawn: this process may have started threads that a fork would not survive
        with ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), _begin, (question,)) as pool:
            waiting: collections.deque[tuple[Future[Findings], int]] = collections.deque()
            try:
                for chunk, done in chunks:
                    waiting.append((pool.submit(_work, chunk), done))
                    if len(waiting) > 2 * num_proc:
                        future, done = waiting.popleft()
                        yield future.result(), done
                while waiting:
                    future, done = waiting.popleft()
                    yield future.result(), done
            finally:
                for future, _ in waiting:
                    future.cancel()
    except Stop as stop:
        place, number, _, _ = stop.args
        raise ValueError(f"{places[place].where(number)}: {stop}") from stop
    except BrokenProcessPool as error:
        raise RuntimeError("a process that examined records died, for want of memory perhaps; use --num-proc 1") from error


_asked: tuple[Question, rules.Form] | None = None


def _begin(question: Question) -> None:
    global _asked
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _asked = question, rules.form_of(question.tokenizer, question.template)


def _work(chunk: Chunk) -> Findings:
    assert _asked is not None
    return examine(chunk, *_asked)


# --- the evaluation set ----------------------------------------------------------------------------------------


class _HeldOut:
    """hashes: of the word sequences of the evaluation set, sorted, each once; None where there is none."""

    def __init__(self, sources: tuple[Source, ...]) -> None:
        self.hashes: np.ndarray | None = None
        if not sources:
            return
        records: list[str | Conversation] = []
        for place in _places(sources, picked=False):
            section = sources[place.source].record
            for number, item in _read(place, section):
                try:
                    if isinstance(item, Problem):
                        raise item
                    records.append(normalise(item, section or recognise(item)))
                except Problem as problem:
                    raise ValueError(f"{place.where(number)}: {problem}") from problem
        if not records:
            raise ValueError("the evaluation set has no records to compare with")
        self.num_records = len(records)
        hashes, self._record = held_out_hashes(records)
        self.hashes, self._group = np.unique(hashes, return_inverse=True)
        self._hit = np.zeros(len(self.hashes), bool)

    def add(self, hit: np.ndarray) -> None:
        self._hit[hit] = True

    @property
    def num_hit(self) -> int:
        """Records of the evaluation set that have something in common with the corpus."""
        return len(np.unique(self._record[self._hit[self._group]]))


# --- gathering -------------------------------------------------------------------------------------------------


@dataclass
class _Gathered:
    """What all chunks together have."""

    places: list[Place]
    scratch: Path
    shown: int
    held_out: _HeldOut
    records: int = 0
    loss_tokens: int = 0
    overlapping: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    problems: list[dict[str, Any]] = field(default_factory=list)
    bad_records: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    lengths: dict[tuple[int, str], Counter[int]] = field(default_factory=dict)
    overlaps: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._spool = Spool(self.scratch)
        self._origins = (self.scratch / "origins").open("wb")
        self._seen = [0] * len(self.places)

    def add(self, found: Findings) -> None:
        place = self.places[found.place]
        self.records += found.num_records
        self._seen[found.place] += found.num_records
        self.loss_tokens += found.loss_tokens
        self.shapes.update(found.shapes)
        self.bad_records += len({number for number, _ in found.problems})
        for number, problem in found.problems:
            self._name(place, number, problem)
        for (kind, ids), count in found.lengths.items():
            self.lengths.setdefault((place.source, kind), Counter())[ids] += count
        self._spool.add(found.prints)
        self._origins.write(np.stack([np.full_like(found.numbers, found.place), found.numbers], 1).tobytes())
        if self.held_out.hashes is not None:
            self.overlapping += len(found.overlapping)
            self.held_out.add(found.held_out)
            self.overlaps += [place.where(int(n)) for n in found.overlapping[: self.shown - len(self.overlaps)]]

    def name_empty_files(self) -> None:
        for place, seen in zip(self.places, self._seen, strict=True):
            if not seen:
                self._name(place, 1, Problem("empty-file", "the file has no records", "leave it out"))

    def _name(self, place: Place, number: int, problem: Problem) -> None:
        self.broken[problem.rule] += 1
        if self.broken[problem.rule] <= self.shown:
            named = {"where": place.where(number), "file": str(place.file), place.counted: number}
            self.problems.append({**named, "rule": problem.rule, "message": problem.message, "remedy": problem.remedy})

    def answer(self, sources: Sequence[Source], settings: Settings, tokens_per_second: float | None) -> dict[str, Any]:
        self._origins.close()
        lengths: Counter[int] = sum(self.lengths.values(), Counter())
        feeding = _packing(self.lengths, sources, settings, tokens_per_second)
        return {
            "files": len(self.places),
            "bytes": sum(place.file.stat().st_size for place in self.places),
            "records": self.records,
            "records_with_problems": self.bad_records,
            "shapes": dict(self.shapes.most_common()),
            "examples": lengths.total(),
            "tokens": sum(ids * count for ids, count in lengths.items()),
            "loss_tokens": self.loss_tokens,
            "lengths": _histogram(lengths),
            **feeding,
            "duplicates": self._duplicates(),
            "overlap": self._overlap(),
            "problem_counts": dict(self.broken.most_common()),
            "problems": self.problems,
        }

    def _duplicates(self) -> dict[str, Any]:
        found = self._spool.duplicates(self.shown)
        origins = np.memmap(self.scratch / "origins", np.int64, "r").reshape(-1, 2) if self._spool.num_records else np.zeros((0, 2))

        def where(record: int) -> str:
            place, number = origins[record].tolist()
            return self.places[place].where(number)

        return {
            "exact": found.exact,
            "near": found.near,
            "method": f"MinHash of {DUPLICATE_WORDS}-word sequences, Jaccard similarity of {SIMILAR} or more",
            "examples": [
                {"where": where(twin.record), "like": where(twin.earlier), "similarity": round(twin.similarity, 2)}
                for twin in found.examples
            ],
        }

    def _overlap(self) -> dict[str, Any] | None:
        if self.held_out.hashes is None:
            return None
        return {
            "records": self.overlapping,
            "evaluation_records": self.held_out.num_hit,
            "of": self.held_out.num_records,
            "words": OVERLAP_WORDS,
            "examples": self.overlaps,
        }


def _histogram(lengths: Counter[int]) -> dict[str, Any] | None:
    """Of ids in an example; records in bins up to each power of two."""
    if not lengths:
        return None
    values = np.array(sorted(lengths))
    counts = np.array([lengths[value] for value in values.tolist()])
    below = np.cumsum(counts)
    total = int(below[-1])

    def quantile(share: float) -> int:
        return int(values[np.searchsorted(below, share * total)])

    bins = Counter({1 << (value - 1).bit_length(): 0 for value in (int(values[0]), int(values[-1]))})
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        bins[1 << (value - 1).bit_length()] += count
    tops = [1 << k for k in range(min(bins).bit_length() - 1, max(bins).bit_length())]
    return {
        "mean": round(float((values * counts).sum() / total), 1),
        "median": quantile(0.5),
        "p95": quantile(0.95),
        "max": int(values[-1]),
        "histogram": [{"up_to": top, "examples": bins[top]} for top in tops],
    }


def _packing(
    lengths: dict[tuple[int, str], Counter[int]], sources: Sequence[Source], settings: Settings, tokens_per_second: float | None
) -> dict[str, Any]:
    """What training's own packing plan makes of the lengths. A row holds seq_len positions, an example one less than its ids."""
    T = settings.seq_len
    if T is None:
        return {"truncation": None, "packing": None}
    longer = [(ids - 1 - T, count) for counter in lengths.values() for ids, count in counter.items() if ids - 1 > T]
    rows = dict.fromkeys(range(len(sources)), 0)
    positions = 0
    for (source, kind), counter in lengths.items():
        record = sources[source].record
        too_long: packing.TooLong = record.too_long if record is not None else "split" if kind == "text" else "drop"
        each = np.array(sorted(counter), np.int64)
        counts = np.array([counter[ids] for ids in each.tolist()], np.int64)
        part = -(-int(counts.sum()) // _PACKED_AT_ONCE)
        plan = packing.make_plan(np.repeat(each - 1, -(-counts // part)), T, "drop" if too_long == "error" else too_long)
        rows[source] += plan.num_rows * part
        positions += plan.num_tokens * part
    total = sum(rows.values())
    shares = np.array([sources[source].weight for source in rows if rows[source]])
    seen = max((rows[s] * shares.sum() / sources[s].weight for s in rows if rows[s]), default=0)  # until each row was seen
    steps = None if settings.batch_size is None else -(-int(np.ceil(seen)) // settings.batch_size)
    seconds = None
    if tokens_per_second is not None:
        seconds = (int(np.ceil(seen)) if steps is None else steps * settings.batch_size) * T / tokens_per_second  # type: ignore[operator]
    return {
        "truncation": {
            "seq_len": T,
            "examples_longer": sum(count for _, count in longer),
            "tokens_beyond": sum(beyond * count for beyond, count in longer),
        },
        "packing": {
            "rows": total,
            "efficiency": round(positions / (total * T), 4) if total else None,
            "batch_size": settings.batch_size,
            "steps_per_epoch": steps,
            "seconds_per_epoch": seconds,
        },
    }


def _tokens_per_second(bench: Path | None) -> float | None:
    if bench is None:
        return None
    found = read_object(bench).get("tokens_per_second")
    if not isinstance(found, int | float) or found <= 0:
        raise ValueError(f"{bench} has no tokens_per_second; write it with: moe-train bench CONFIG --json > {bench}")
    return float(found)


# --- the corrected copy ----------------------------------------------------------------------------------------


class _Fixed:
    """A folder with a copy of each file as JSON lines, and `changes.jsonl`, which says what is not as it was."""

    def __init__(self, directory: Path, places: list[Place]) -> None:
        self._directory, self._places = directory, places
        self._changes = (directory / "changes.jsonl").open("w", encoding="utf-8")
        self._names = _copy_names([place.file for place in places])
        self._open: tuple[int, IO[bytes]] | None = None
        self.kept = 0
        self.counts: Counter[str] = Counter()
        self._dropped: set[int] = set()

    def add(self, found: Findings) -> None:
        assert found.kept is not None
        if self._open is None or self._open[0] != found.place:
            self._close_file()
            path = self._directory / self._names[found.place]
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open = found.place, path.open("wb")
        self._open[1].write(found.kept.lines)
        self.kept += found.kept.num_records
        for action in ("changed", "dropped"):
            self.counts[action] += len({change.number for change in found.kept.changes if change.action == action})
        for change in found.kept.changes:
            said = {"where": self._places[found.place].where(change.number), **change._asdict()}
            del said["number"]
            self._changes.write(json.dumps(said, ensure_ascii=True) + "\n")

    def close(self, written: Path | None) -> dict[str, Any]:
        self._close_file()
        self._changes.close()
        return {"directory": str(written), "kept": self.kept, "changed": self.counts["changed"], "dropped": self.counts["dropped"]}

    def _close_file(self) -> None:
        if self._open is not None:
            self._open[1].close()


def _copy_names(paths: list[Path]) -> list[str]:
    """Names below one folder that keep the tree that the files stand in; all are JSON lines, whatever they were."""
    absolute = [path.absolute() for path in paths]
    root = Path(os.path.commonpath([path.parent for path in absolute]))
    names: list[str] = []
    for path in absolute:
        inside = path.relative_to(root)
        name = Path(inside.stem) if inside.suffix.lower() in files.COMPRESSIONS else Path(inside.name)
        name = inside.parent / (name if name.suffix.lower() in (".jsonl", ".ndjson") else f"{name}.jsonl")
        taken = {*names, "changes.jsonl"}
        unique = itertools.chain([name], (name.with_name(f"{name.stem}-{k}{name.suffix}") for k in itertools.count(2)))
        names.append(next(str(n) for n in unique if str(n) not in taken))
    return names


@contextlib.contextmanager
def _output(fix: Path | None, places: list[Place]) -> Iterator[_Fixed | None]:
    if fix is None:
        yield None
        return
    with new_directory(fix) as directory:
        yield _Fixed(directory, places)
