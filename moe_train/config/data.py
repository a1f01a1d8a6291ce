"""Tokenizers and data sources."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from moe_train.config.records import Record
from moe_train.config.section import LocalPath, Positive, PositiveFloat, Section


class HuggingFaceTokenizer(Section):
    """A Hugging Face tokenizer."""

    name: Literal["huggingface"]
    path: LocalPath
    """Directory with `tokenizer.json` (and `tokenizer_config.json`, `chat_template.jinja`), or the `tokenizer.json` itself."""
    longest_stretch: Positive = 1 << 20
    """Most characters that are encoded at once; longer texts are split between words, and a longer text without such a place, such
    as fifty million times the same letter, is an error. A million characters take about 250 MB.
    """


class MistralTokenizer(Section):
    """A Mistral tokenizer, read by mistral-common: a `tekken.json` or a sentencepiece `tokenizer.model.v*`."""

    name: Literal["mistral"]
    path: LocalPath
    """A `tekken.json` or a sentencepiece `tokenizer.model.v*`, or a directory that contains one."""
    longest_stretch: Positive = 1 << 20
    """Most characters that are encoded at once, as for a Hugging Face tokenizer."""


Tokenizer = Annotated[HuggingFaceTokenizer | MistralTokenizer, Field(discriminator="name")]
"""The tagged union of tokenizers."""


class FileSource(Section):
    """Local files: paths, folders, zip archives or globs, relative to the working directory.

    A folder with several splits of a data set needs a choice: name the files of one, such as `data/train-*.parquet`.
    """

    name: Literal["files"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths, folders, zip archives or globs, relative to the working directory."""
    format: Literal["auto", "text", "json", "csv", "tsv", "parquet", "arrow"] = "auto"
    """Format of the files; `auto` decides by name and content."""
    record: Record
    """Kind of the records, and the keys to read."""
    weight: PositiveFloat | None = None
    """Share of this source in the rows of training, relative to the other weights; null: an epoch has each row once."""
    licence: str | None = None
    """Licence of the data. It is documentation, and is copied to the records of the run."""
    origin: str | None = None
    """Where the data come from. It is documentation, and is copied to the records of the run."""


class HubSource(Section):
    """A data set of the Hugging Face hub; this is the only setting that downloads training data over the network."""

    name: Literal["hub"]
    dataset: str
    """Name of the data set, such as `openai/gsm8k`."""
    subset: str | None = None
    """Configuration of the data set; null for the only one."""
    split: str = "train"
    """Split of the data set."""
    # Required, since the content of a branch changes; `HubDataset` accepts only a full commit hash.
    revision: str
    """Full commit hash, since the content of a branch changes."""
    record: Record
    """Kind of the records, and the keys to read."""
    weight: PositiveFloat | None = None
    """Share of this source in the rows of training, relative to the other weights; null: an epoch has each row once."""
    licence: str | None = None
    """Licence of the data; documentation."""
    origin: str | None = None
    """Where the data come from; documentation."""


class PreparedSource(Section):
    """The output of `moe-train data prepare`: a folder with manifest.json, local or in a bucket (`gs://…`).

    From a bucket, parts of files are read when they are needed, and the most recent ones stay in memory.
    """

    name: Literal["prepared"]
    path: str
    """Folder with a manifest.json, local or in a bucket (`s3://…`, `gs://…`)."""
    too_long: Literal["split", "truncate", "drop", "error"] | None = None
    """What happens to an example longer than `train.seq_len`; null for the value that the data were prepared with."""
    weight: PositiveFloat | None = None
    """Share of this source in the rows of training, relative to the other weights; null: an epoch has each row once."""
    cache_mib: Positive = 1024
    """MiB of a bucket's files that stay in memory. Two windows of `data.shuffle_tokens` should fit."""


class PythonSource(Section):
    """Records from the program that calls moe_train: an object that implements `moe_train.data.records.source.Records`.

    A config file can only name such a source, by its `title`; a program that continues the run passes `records` again.
    """

    name: Literal["python"]
    title: str = "records"
    """Name of the source in records and messages."""
    # Excluded from dumps and the schema: a YAML file cannot hold an object of a program.
    records: SkipJsonSchema[Any] = Field(default=None, exclude=True, repr=False)
    """Object that implements `moe_train.data.records.source.Records`; a config file cannot state it."""
    record: Record
    """Kind of the records, and the keys to read."""
    weight: PositiveFloat | None = None
    """Share of this source in the rows of training, relative to the other weights; null: an epoch has each row once."""
    licence: str | None = None
    """Licence of the data; documentation."""
    origin: str | None = None
    """Where the data come from; documentation."""


RecordSource = FileSource | HubSource | PythonSource
"""Sources of records that still have to be tokenized."""


Source = Annotated[RecordSource | PreparedSource, Field(discriminator="name")]
"""The tagged union of data sources."""


class BestFit(Section):
    """Best-fit decreasing packing: the longest example first, each into the fullest row that has room for it.

    The lengths that decide the order are reduced by a random amount of up to a tenth, so that an example gets different
    neighbours in every epoch.
    """

    name: Literal["best_fit"]


def _date(value: object) -> object:
    """Return a date as text, since YAML reads 2026-11-30 as a date, and check that there is such a day."""
    # `type` rather than isinstance, since a datetime is a date too, but names a time of day.
    text = value.isoformat() if type(value) is datetime.date else value
    if isinstance(text, str):
        try:
            return datetime.date.fromisoformat(text).isoformat()
        except ValueError as error:
            raise ValueError(f"{text!r} is no date; write it as 2026-11-30") from error
    return text


class Data(Section):
    """Training and evaluation data. `tokenizer` may be omitted if the model of `init_from` has one.

    Without weights an epoch has each row of each source once. With weights, which either all sources have or none, the share of a
    source in the rows of training, and so in its tokens, is its weight divided by the sum of all weights.
    """

    tokenizer: Tokenizer | None = None
    """Tokenizer; null for that of the model in `init_from`."""
    chat_template: str | None = None
    """A jinja file, its text, or `chatml` for the template of that name that comes with this package; null for the tokenizer's own.
    """
    chat_date: Annotated[str | None, BeforeValidator(_date)] = None
    """Date, such as 2026-11-30, that a template reads with `strftime_now`; null: the day on which data were first prepared in
    `cache_dir`. Prepared sets record it.
    """
    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Sources of training data."""
    eval: tuple[Source, ...] = ()
    """Sources of held-out data; without any, no held-out loss is measured."""
    packing: BestFit = BestFit(name="best_fit")
    """How examples share the rows of a batch. They never attend to each other."""
    shuffle_tokens: Positive | None = None
    """Records are shuffled within windows of about this many tokens, and the windows come in random order; null: one window over
    all records. For a bucket, choose a value of which two windows fit into its `cache_mib`.
    """
    cache_dir: LocalPath = "runs/cache"
    """Folder for tokenized data. Runs with the same data, tokenizer and template share it."""
    num_proc: Positive = 1
    """Number of processes that tokenize; set it to the number of CPU cores for large data."""
    prefetch: Positive = 2
    """Number of batches that are made ahead of the step that needs them."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        stated = [source.weight is not None for source in self.train]
        if any(stated) and not all(stated):
            raise ValueError(
                f"data.train: source {stated.index(False)} (from 0) states no weight, but others do; state weight for every "
                "source, or for none (then an epoch has each row once)"
            )
        if any(source.weight is not None for source in self.eval):
            raise ValueError("data.eval: weight has no effect on evaluation, which reads each record once; leave it out")
        return self
