"""The results of a check in JSON form, as `moe-train data check --json` prints them."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class ListedProblem(TypedDict):
    """A problem of a record, with its location."""

    where: str
    file: str
    line: NotRequired[int]
    """Exactly one of `line`, `row` and `byte` is there."""
    row: NotRequired[int]
    byte: NotRequired[int]
    rule: str
    message: str
    remedy: str


class MergedTurnsResult(TypedDict):
    """Sums over the examples of turns with tools."""

    examples: int
    turns: int
    tokens: int
    separate_tokens: int
    """Number of tokens with an example for each turn."""
    restarts: dict[str, int]
    """Reason why turns could not be appended to the example before -> number of examples."""


class LengthBin(TypedDict):
    """Number of examples of at most `up_to` ids, and more than half as many."""

    up_to: int
    examples: int


class LengthResult(TypedDict):
    """The distribution of the lengths of examples."""

    mean: float
    median: int
    p95: int
    max: int
    histogram: list[LengthBin]


class TruncationResult(TypedDict):
    """The examples that do not fit into a row."""

    seq_len: int
    examples_longer: int
    tokens_beyond: int
    examples_with_fitting_turns: int


class PackedSource(TypedDict):
    """The rows of a source."""

    files: list[str]
    rows: int
    times_seen: float


class PackingResult(TypedDict):
    """The rows, and the length of an epoch."""

    rows: int
    efficiency: float | None
    batch_size: int | None
    steps_per_epoch: int | None
    seconds_per_epoch: float | None
    sources: list[PackedSource]


class ListedDuplicate(TypedDict):
    """A record that duplicates an earlier one."""

    where: str
    like: str
    similarity: float


class DuplicateResult(TypedDict):
    """The duplicates in the corpus."""

    exact: int
    near: int
    method: str
    examples: list[ListedDuplicate]


class OverlapResult(TypedDict):
    """The overlap of the corpus with the evaluation set."""

    records: int
    """Number of records of the corpus with an overlap."""
    evaluation_records: int
    """Number of records of the evaluation set with an overlap."""
    of: int
    """Number of records of the evaluation set."""
    words: int
    examples: list[str]


class SampleResult(TypedDict):
    """The part of the files that a sample has read."""

    records: int
    of_about: int | None
    """Total number of records, estimated from the lengths of the sampled lines; None if it cannot be estimated for some file."""
    share: float | None
    files: int
    bytes: int
    only_begun: list[str]


class ListedChange(TypedDict):
    """A change to a record."""

    where: str
    action: str
    rule: str
    what: str


class FixedResult(TypedDict):
    """The corrected copy."""

    directory: str | None
    """The folder; None if nothing was written."""
    kept: int
    changed: int
    left: int
    dropped: int
    changes: NotRequired[list[ListedChange]]
    """The first changes of each rule, if nothing was written."""


class PictureResult(TypedDict):
    """The pictures of all records, and the tokens that they become."""

    pictures: int
    tokens: int
    median_tokens: int
    """Median of the tokens of a picture."""
    most_tokens: int
    """Tokens of the largest picture."""


class SoundResult(TypedDict):
    """The clips of sound of all records, and the tokens that they become."""

    clips: int
    tokens: int
    median_tokens: int
    """Of a clip."""
    most_tokens: int
    """Of a clip."""


class CheckResult(TypedDict):
    """All results of a check."""

    files: int
    left_out: NotRequired[dict[str, int]]
    """Ending of a name -> number of files that are in no known format, and not read."""
    personal_data: NotRequired[dict[str, int]]
    """Rule -> number of places with personal data or a secret; missing if nothing was searched."""
    without_licence: NotRequired[list[int]]
    """Indices of the sources of a config that state no licence."""
    bytes: int
    records: int
    records_with_problems: int
    shapes: dict[str, int]
    not_read: dict[str, int]
    examples: int
    tokens: int
    loss_tokens: int
    merged_turns: MergedTurnsResult | None
    pictures: PictureResult | None
    """The pictures; None without any."""
    sound: SoundResult | None
    """The sound; None without any."""
    lengths: LengthResult | None
    truncation: TruncationResult | None
    packing: PackingResult | None
    duplicates: DuplicateResult | None
    """The duplicates; None for a sample."""
    overlap: OverlapResult | None
    problem_counts: dict[str, int]
    problems: list[ListedProblem]
    sample: NotRequired[SampleResult]
    fixed: NotRequired[FixedResult]
