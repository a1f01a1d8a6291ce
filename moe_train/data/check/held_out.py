"""The evaluation set of a check: its word sequences, and which of them are also in the corpus."""

from __future__ import annotations

import numpy as np

from moe_train.data.check.overlap import held_out_hashes
from moe_train.data.check.sources import CheckedSource, places_of, read_checked
from moe_train.data.records.conversation import normalise
from moe_train.data.records.normal_form import NormalRecord
from moe_train.data.records.problem import Problem
from moe_train.data.records.recognise import recognise


class HeldOutRecords:
    """The word sequences of an evaluation set.

    Args:
        sources: The files of the evaluation set; empty for none.

    Attributes:
        hashes: Sorted unique hashes of the word sequences; None without an evaluation set.
        num_records: Number of records in the evaluation set.

    Raises:
        ValueError: If a record cannot be read, or there are no records.
    """

    def __init__(self, sources: tuple[CheckedSource, ...]) -> None:
        self.hashes: np.ndarray | None = None
        if not sources:
            return
        records: list[NormalRecord] = []
        # Never sampled: an evaluation record that is left out could not be found in the corpus.
        places, _ = places_of(sources, picked=False)
        for place in places:
            section = sources[place.source].record
            ignore = sources[place.source].ignore
            for number, item in read_checked(place, section):
                try:
                    if isinstance(item, Problem):
                        raise item
                    records.append(normalise(item, section or recognise(item, ignore)))
                except Problem as problem:
                    raise ValueError(f"{place.location(number)}: {problem}") from problem
        if not records:
            raise ValueError("the evaluation set has no records to compare with")
        self.num_records = len(records)
        hashes, self._record = held_out_hashes(records)
        # Sequences that several records share have one hash, and each of these records counts as hit.
        self.hashes, self._group = np.unique(hashes, return_inverse=True)
        self._hit = np.zeros(len(self.hashes), bool)

    def add(self, hit: np.ndarray) -> None:
        """Record which hashes were found in the corpus, by their indices."""
        self._hit[hit] = True

    @property
    def num_hit(self) -> int:
        """Number of records of the evaluation set that have a word sequence in common with the corpus."""
        return len(np.unique(self._record[self._hit[self._group]]))
