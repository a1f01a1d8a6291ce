"""Tokenizers, record kinds and data sources."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from moe_train.config.section import (
    LocalPath,
    Positive,
    PositiveFloat,
    Section,
)


class HuggingFaceTokenizer(Section):
    """A Hugging Face tokenizer.

    path: a directory with `tokenizer.json` (and `tokenizer_config.json`, `chat_template.jinja`), or the `tokenizer.json` itself.
    longest_stretch: most characters that are encoded at once; longer texts are split between words, and a longer text without such
    a place, as fifty million times the same letter, is an error. A million characters take about 250 MB.
    """

    name: Literal["huggingface"]
    path: LocalPath
    longest_stretch: Positive = 1 << 20


class MistralTokenizer(Section):
    """A Mistral tokenizer, read by mistral-common: a `tekken.json` or a sentencepiece `tokenizer.model.v*`.

    longest_stretch: as of a Hugging Face tokenizer.
    """

    name: Literal["mistral"]
    path: LocalPath
    longest_stretch: Positive = 1 << 20


Tokenizer = Annotated[HuggingFaceTokenizer | MistralTokenizer, Field(discriminator="name")]
"""The tagged union of tokenizers."""


def _as_tuple(value: object) -> object:
    """Convert a list to a tuple, since strict types accept no list."""
    return tuple(value) if isinstance(value, list) else value


Keys = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""Names of keys of a record."""


class TextRecord(Section):
    """Plain text; the loss covers every token.

    too_long: whether a record longer than the sequence is split, dropped or an error. ignore: names of keys that are not read
    although they may change the meaning of a record, such as `label` or `messages.reasoning`.
    """

    name: Literal["text"]
    column: str = "text"
    ignore: Keys = ()
    too_long: Literal["split", "drop", "error"] = "split"


class ConversationRecord(Section):
    """The settings of a request, for records that do not state them in columns of these names.

    reasoning_effort: how long the model may think, such as none or high. response_format: the format of answers, as in OpenAI's
    requests. Both are written into prompts where the tokenizer or the chat template has a place for them, and are never trained
    on. chat_template_kwargs: variables of the chat template, such as `enable_thinking`.
    """

    reasoning_effort: str | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRecord(ConversationRecord):
    """A list of messages (`role`, `content`) rendered by the chat template; the loss covers the assistant's tokens.

    If there is no column `messages`, `interactions`, `conversations` and `conversation` are read. For other spellings set `role`
    and `content` (the keys of a message) and `roles` (a mapping from the names in the file to system, user, assistant, tool).
    """

    name: Literal["chat"]
    column: str = "messages"
    role: str = "role"
    content: str = "content"
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(default={})
    ignore: Keys = ()
    too_long: Literal["truncate", "drop", "error"] = "error"


class CompletionRecord(ConversationRecord):
    """A prompt and its completion, rendered as one user turn and one assistant turn of the chat template.

    The columns `system`, `history` (pairs of question and answer), `input`, `context` and `tools` are read too: `input` and
    `context` follow the prompt, each after a line break.
    """

    name: Literal["completion"]
    prompt: str = "prompt"
    completion: str = "completion"
    ignore: Keys = ()
    too_long: Literal["truncate", "drop", "error"] = "error"


class PreferenceRecord(ConversationRecord):
    """A prompt with a preferred and a rejected answer, as texts or messages. No objective reads such records yet.

    prompt: a column; null if `chosen` and `rejected` begin with the prompt.
    """

    name: Literal["preference"]
    prompt: str | None = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    ignore: Keys = ()
    too_long: Literal["truncate", "drop", "error"] = "error"


class LabelledRecord(ConversationRecord):
    """A conversation whose last answer the column `label` marks as good (true) or bad. No objective reads such records yet.

    messages: the column of the conversation; null for the columns `prompt` and `completion`.
    """

    name: Literal["labelled"]
    label: str = "label"
    messages: str | None = None
    prompt: str = "prompt"
    completion: str = "completion"
    ignore: Keys = ()
    too_long: Literal["truncate", "drop", "error"] = "error"


Record = Annotated[TextRecord | ChatRecord | CompletionRecord | PreferenceRecord | LabelledRecord, Field(discriminator="name")]
"""The tagged union of record kinds."""


class FileSource(Section):
    """Local files: paths, folders, zip archives or globs, relative to the working directory.

    A folder with several splits of a data set needs a choice: name the files of one, such as `data/train-*.parquet`.
    `licence` and `origin` are documentation: they are copied to the records of the run.
    """

    name: Literal["files"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    format: Literal["auto", "text", "json", "csv", "tsv", "parquet", "arrow"] = "auto"
    record: Record
    weight: PositiveFloat | None = None
    licence: str | None = None
    origin: str | None = None


class HubSource(Section):
    """A data set of the Hugging Face hub; this is the only setting that downloads training data over the network."""

    name: Literal["hub"]
    dataset: str
    subset: str | None = None
    split: str = "train"
    # Required, since the content of a branch changes; `HubDataset` accepts only a full commit hash.
    revision: str
    record: Record
    weight: PositiveFloat | None = None
    licence: str | None = None
    origin: str | None = None


class PreparedSource(Section):
    """The output of `moe-train data prepare`: a folder with manifest.json, local or in a bucket (`gs://…`).

    too_long defaults to the value that the data were prepared with. From a bucket, parts of files are read when they are needed,
    and the most recent `cache_mib` MiB of them stay in memory.
    """

    name: Literal["prepared"]
    path: str
    too_long: Literal["split", "truncate", "drop", "error"] | None = None
    weight: PositiveFloat | None = None
    cache_mib: Positive = 1024


class PythonSource(Section):
    """Records from the program that calls moe_train: an object that implements `moe_train.data.records.source.Records`.

    A config file can only name such a source, by its `title`; a program that continues the run passes `records` again.
    """

    name: Literal["python"]
    title: str = "records"
    # Excluded from dumps and the schema: a YAML file cannot hold an object of a program.
    records: SkipJsonSchema[Any] = Field(default=None, exclude=True, repr=False)
    record: Record
    weight: PositiveFloat | None = None
    licence: str | None = None
    origin: str | None = None


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

    chat_template: a jinja file, its text, or `chatml` for the template of that name that comes with this package; null for the
    tokenizer's own. chat_date: the date that a template reads with `strftime_now` (null: the day on which data were first prepared
    in `cache_dir`); prepared sets record it.

    Without weights an epoch has each row of each source once. With weights, which either all sources have or none, the share of a
    source in the rows of training, and so in its tokens, is its weight divided by the sum of all weights.
    shuffle_tokens: records are shuffled within windows of about this many tokens, and the windows come in random order (null: one
    window over all records). For a bucket, choose a value of which two windows fit into its `cache_mib`.
    """

    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    chat_date: Annotated[str | None, BeforeValidator(_date)] = None
    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    eval: tuple[Source, ...] = ()
    packing: BestFit = BestFit(name="best_fit")
    shuffle_tokens: Positive | None = None
    cache_dir: LocalPath = "runs/cache"
    num_proc: Positive = 1
    prefetch: Positive = 2

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
