"""What a check asks of a chunk of records, and what it finds; both are sent between processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.data.chat.example import Example
from moe_train.data.check.duplicates import Fingerprints
from moe_train.data.records.json_lines import Block
from moe_train.data.records.normal_form import NormalRecord
from moe_train.data.records.problem import Item, Problem
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import JsonObject


class PersonalDataSearch(NamedTuple):
    """How to search for personal data and secrets."""

    phone_region: str | None = None
    """Country whose phone numbers may stand without +, such as DE; None for international numbers alone."""


@dataclass(frozen=True)
class Question:
    """What to examine; it is sent to each process once."""

    records: tuple[config.Record | None, ...]
    """How to read the records of each place; None to recognize each record by its columns."""
    tokenizer: Tokenizer
    template: str | None
    seq_len: int | None = None
    """Positions in a row; None if unknown."""
    allowed: frozenset[str] = frozenset()
    """Rules that may be broken."""
    repairing: bool = False
    """Whether to correct records."""
    ignore: tuple[str, ...] = ()
    """Keys that are not to be read in records that are recognized by their columns."""
    reasoning_effort: str | None = None
    """The effort of conversations that are recognized by their columns and state none; None if they have none."""
    personal_data: PersonalDataSearch | None = None
    """How to search for personal data; None not to search."""
    folders: tuple[Path | None, ...] = ()
    """The folder of the pictures of each place, None if it is in no folder; () if none is."""
    held_out: np.ndarray | None = None
    """Sorted hashes of the word sequences of the evaluation set; None without one."""

    def folder(self, place: int) -> Path | None:
        """Return the folder that paths of pictures in a place are relative to; None without one."""
        return self.folders[place] if self.folders else None

    def with_effort(self, section: config.Record) -> config.Record:
        """Return the section of a record with the reasoning effort for records that state none."""
        if self.reasoning_effort is None or not isinstance(section, config.ConversationRecord):
            return section
        return section.model_copy(update={"reasoning_effort": self.reasoning_effort})


class Chunk(NamedTuple):
    """Records of a place to examine together: a block of lines, single sampled lines, or rows."""

    place: int
    records: Block | list[Block] | list[tuple[int, Item]]


class Change(NamedTuple):
    """A change to a record."""

    number: int
    """Line, row or byte of the record."""
    action: str
    """"changed", "dropped", or "left" as it is although it breaks a rule, since training accepts it."""
    rule: str
    """The rule that it broke."""
    description: str
    """The change, or the reason why the record was dropped or left."""


class CorrectedChunk(NamedTuple):
    """A corrected chunk."""

    lines: bytes
    """The records as JSON lines."""
    num_records: int
    """Number of records in `lines`."""
    changes: list[Change]


class KindCount(NamedTuple):
    """The records that were read with one section."""

    first: int
    """Line, row or byte of the first one."""
    records: int
    without_problems: int


class Findings(NamedTuple):
    """The findings for one chunk."""

    place: int
    num_records: int
    """Number of records, including bad ones."""
    shapes: Counter[str]
    """Number of records of each kind."""
    kinds: dict[str, KindCount]
    """Kind of records (see `kind_of`) -> the records of the chunk that were read with such a section."""
    unread: Counter[str]
    """Number of records in which a key was not read, by its name."""
    problems: list[tuple[int, Problem]]
    """(line, row or byte; problem) for each problem."""
    lengths: Counter[tuple[str, int]]
    """(kind, ids) -> number of examples with so many ids."""
    loss_tokens: int
    """Number of ids that are trained on."""
    fitting: Counter[tuple[str, int, int]]
    """(kind, ids, ids of the turns that fit) -> number of examples of turns with tools of which only some fit into a row."""
    merged: Counter[str]
    """Sums over the examples of turns with tools: examples, turns, tokens, and separate_tokens (with an example for each turn)."""
    restarts: Counter[str]
    """Reason why turns could not be appended to the example before -> number of examples."""
    pictures: Counter[int]
    """Tokens of a picture -> number of such pictures."""
    sound: Counter[int]
    """Tokens of a clip of sound -> number of such clips."""
    numbers: np.ndarray
    """(n,): line, row or byte of each record in `prints`."""
    prints: Fingerprints
    """The fingerprints of the records that could be read."""
    overlapping: np.ndarray
    """Line, row or byte of each record that overlaps the evaluation set."""
    held_out: np.ndarray
    """Indices of the evaluation set's hashes that were found."""
    corrected: CorrectedChunk | None
    """The corrected chunk; None if records are not corrected."""


@dataclass
class ReadRecord:
    """A record that has been read, and the results for it."""

    number: int
    fields: JsonObject
    section: config.Record
    record: NormalRecord
    unread: tuple[str, ...]
    """Names of the keys that were not read."""
    problems: list[Problem] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
