"""Gather the findings of all chunks into the results of a check.

Memory does not grow with the corpus: fingerprints and origins are on disk, lengths are counted, and for each rule only the first
problems are kept and the rest counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe_train.data.check import estimate
from moe_train.data.check.duplicates import SIMILAR, Spool
from moe_train.data.check.duplicates import WORDS as DUPLICATE_WORDS
from moe_train.data.check.findings import Findings
from moe_train.data.check.held_out import HeldOutRecords
from moe_train.data.check.kinds import Kinds
from moe_train.data.check.overlap import OVERLAP_WORDS
from moe_train.data.check.results import (
    CheckResult,
    DuplicateResult,
    ListedDuplicate,
    ListedProblem,
    MergedTurnsResult,
    OverlapResult,
    PictureResult,
    SoundResult,
)
from moe_train.data.check.settings import CheckSettings
from moe_train.data.check.sources import CheckedFile, CheckedSource
from moe_train.data.records.file_bytes import size_of
from moe_train.data.records.problem import Problem
from moe_train.data.records.unread import add_counts


@dataclass
class GatheredFindings:
    """The findings of all chunks together."""

    places: list[CheckedFile]
    scratch: Path
    """A folder for what would not fit into memory."""
    num_listed: int
    """Number of problems and duplicates to list for each rule."""
    held_out: HeldOutRecords
    num_records: int = 0
    bad_records: int = 0
    loss_tokens: int = 0
    overlapping: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    """Rule -> number of problems."""
    problems: list[ListedProblem] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    lengths: dict[tuple[int, str], Counter[int]] = field(default_factory=dict)
    """See `estimate.Lengths`."""
    fitting: dict[tuple[int, str], Counter[tuple[int, int]]] = field(default_factory=dict)
    """See `estimate.Fitting`."""
    merged: Counter[str] = field(default_factory=Counter)
    restarts: Counter[str] = field(default_factory=Counter)
    pictures: Counter[int] = field(default_factory=Counter)
    """Tokens of a picture -> number of such pictures."""
    sound: Counter[int] = field(default_factory=Counter)
    """Tokens of a clip of sound -> number of such clips."""
    overlaps: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    kinds: Kinds = field(default_factory=Kinds)

    def __post_init__(self) -> None:
        self._spool = Spool(self.scratch)
        self._origins = (self.scratch / "origins").open("wb")
        self._records_in = [0] * len(self.places)

    def add(self, findings: Findings) -> None:
        """Add the findings of the next chunk."""
        place = self.places[findings.place]
        self.num_records += findings.num_records
        self._records_in[findings.place] += findings.num_records
        self.loss_tokens += findings.loss_tokens
        self.shapes.update(findings.shapes)
        add_counts(self.unread, findings.unread)
        self.kinds.add(place, findings.kinds)
        # A record with several problems is one bad record.
        self.bad_records += len({number for number, _ in findings.problems})
        for number, problem in findings.problems:
            self._add_problem(place, number, problem)
        for (kind, ids), count in findings.lengths.items():
            self.lengths.setdefault((place.source, kind), Counter())[ids] += count
        for (kind, ids, fitting_ids), count in findings.fitting.items():
            self.fitting.setdefault((place.source, kind), Counter())[ids, fitting_ids] += count
        self.merged += findings.merged
        self.restarts += findings.restarts
        self.pictures += findings.pictures
        self.sound += findings.sound
        # The spool numbers records in the order of arrival; `origins` says where each of them is.
        self._spool.add(findings.prints)
        # (n, 2) int64: place and number of each record.
        self._origins.write(np.stack([np.full_like(findings.numbers, findings.place), findings.numbers], 1).tobytes())
        if self.held_out.hashes is not None:
            self.overlapping += len(findings.overlapping)
            self.held_out.add(findings.held_out)
            num_missing = self.num_listed - len(self.overlaps)
            self.overlaps += [place.location(int(number)) for number in findings.overlapping[:num_missing]]

    def add_empty_files(self) -> None:
        """Add a problem for each file without records."""
        for place, num_records in zip(self.places, self._records_in, strict=True):
            if not num_records:
                self._add_problem(place, 1, Problem("empty-file", "the file has no records", "leave it out"))

    def add_mixed_kinds(self) -> None:
        """Add a problem for each further kind of records in a source."""
        for place, number, problem, num_records in self.kinds.problems():
            self._add_problem(place, number, problem)
            # These are the records without another problem; `add` has counted the others.
            self.bad_records += num_records

    def _add_problem(self, place: CheckedFile, number: int, problem: Problem) -> None:
        """Count a problem, and keep it if it is among the first of its rule."""
        self.broken[problem.rule] += 1
        if self.broken[problem.rule] > self.num_listed:
            return
        listed: ListedProblem = {
            "where": place.location(number),
            "file": str(place.file),
            place.counted: number,  # type: ignore[misc]  # one of three optional keys
            "rule": problem.rule,
            "message": problem.message,
            "remedy": problem.remedy,
        }
        self.problems.append(listed)

    def result(self, sources: Sequence[CheckedSource], settings: CheckSettings, tokens_per_second: float | None) -> CheckResult:
        """Return the results; nothing can be added afterwards.

        Args:
            sources: The sources, with their weights and their handling of long records.
            settings: The settings of the check.
            tokens_per_second: The speed of training; None if unknown.
        """
        self._origins.close()
        lengths: Counter[int] = sum(self.lengths.values(), Counter())
        truncation = packing = None
        if settings.seq_len is not None:
            truncation = estimate.truncation(self.lengths, self.fitting, settings.seq_len)
            packing = estimate.epoch(self.lengths, self.fitting, sources, settings.seq_len, settings.batch_size, tokens_per_second)
        return {
            "files": len(self.places),
            "bytes": sum(size_of(place.file) for place in self.places),
            "records": self.num_records,
            "records_with_problems": self.bad_records,
            "shapes": dict(self.shapes.most_common()),
            "not_read": dict(self.unread.most_common()),
            "examples": lengths.total(),
            "tokens": sum(ids * count for ids, count in lengths.items()),
            "loss_tokens": self.loss_tokens,
            "merged_turns": self._merged_turns(),
            "pictures": self._pictures(),
            "sound": self._sound(),
            "lengths": estimate.histogram(lengths),
            "truncation": truncation,
            "packing": packing,
            "duplicates": self._duplicates(),
            "overlap": self._overlap(),
            "problem_counts": dict(self.broken.most_common()),
            "problems": self.problems,
        }

    def _merged_turns(self) -> MergedTurnsResult | None:
        """Return the sums over the examples of turns with tools; None without such examples."""
        if not self.merged:
            return None
        return {
            "examples": self.merged["examples"],
            "turns": self.merged["turns"],
            "tokens": self.merged["tokens"],
            "separate_tokens": self.merged["separate_tokens"],
            "restarts": dict(self.restarts.most_common()),
        }

    def _pictures(self) -> PictureResult | None:
        """Return how many tokens the pictures have; None without pictures."""
        if not self.pictures:
            return None
        sizes = np.repeat(list(self.pictures), list(self.pictures.values()))
        return {
            "pictures": len(sizes),
            "tokens": int(sizes.sum()),
            "median_tokens": int(np.quantile(sizes, 0.5, method="nearest")),
            "most_tokens": int(sizes.max()),
        }

    def _sound(self) -> SoundResult | None:
        """Return how many tokens the sound has; None without sound."""
        if not self.sound:
            return None
        sizes = np.repeat(list(self.sound), list(self.sound.values()))
        return {
            "clips": len(sizes),
            "tokens": int(sizes.sum()),
            "median_tokens": int(np.quantile(sizes, 0.5, method="nearest")),
            "most_tokens": int(sizes.max()),
        }

    def _duplicates(self) -> DuplicateResult:
        """Find the duplicates in the corpus."""
        duplicates = self._spool.duplicates(self.num_listed)
        origins: np.ndarray = np.zeros((0, 2))
        # An empty file cannot be mapped into memory.
        if self._spool.num_records:
            origins = np.memmap(self.scratch / "origins", np.int64, "r").reshape(-1, 2)

        def location(record: int) -> str:
            """Return the location of a record, by its place in the order of the spool."""
            place, number = origins[record].tolist()
            return self.places[place].location(number)

        examples: list[ListedDuplicate] = []
        for twin in duplicates.examples:
            similarity = round(twin.similarity, 2)
            examples.append({"where": location(twin.record), "like": location(twin.earlier), "similarity": similarity})
        return {
            "exact": duplicates.exact,
            "near": duplicates.near,
            "method": f"MinHash of {DUPLICATE_WORDS}-word sequences, Jaccard similarity of {SIMILAR} or more",
            "examples": examples,
        }

    def _overlap(self) -> OverlapResult | None:
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
