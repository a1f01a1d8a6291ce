"""Tokenizers, records and sources."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from moe_train.config.section import (
    LocalPath,
    Positive,
    PositiveFloat,
    Section,
)


class HuggingFaceTokenizer(Section):
    """A directory with `tokenizer.json` (and `tokenizer_config.json`, `chat_template.jinja`), or that file."""

    name: Literal["huggingface"]
    path: LocalPath


class MistralTokenizer(Section):
    """A `tekken.json` or a sentencepiece `tokenizer.model.v*`, read by mistral-common."""

    name: Literal["mistral"]
    path: LocalPath


Tokenizer = Annotated[HuggingFaceTokenizer | MistralTokenizer, Field(discriminator="name")]


class TextRecord(Section):
    """Plain text; every token bears loss. A record longer than the sequence is split, dropped or an error."""

    name: Literal["text"]
    column: str = "text"
    too_long: Literal["split", "drop", "error"] = "split"


class ChatRecord(Section):
    """A list of messages (`role`, `content`) rendered by the chat template; the assistant's tokens bear loss.

    `interactions` and ShareGPT's `conversations` are found where `messages` is not; other spellings by `role` and
    `content` (the keys of a message) and `roles` (theirs -> system, user, assistant, tool).
    """

    name: Literal["chat"]
    column: str = "messages"
    role: str = "role"
    content: str = "content"
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(default={})
    too_long: Literal["truncate", "drop", "error"] = "error"


class CompletionRecord(Section):
    """A prompt and its completion, rendered as one user and one assistant turn of the chat template."""

    name: Literal["completion"]
    prompt: str = "prompt"
    completion: str = "completion"
    too_long: Literal["truncate", "drop", "error"] = "error"


Record = Annotated[TextRecord | ChatRecord | CompletionRecord, Field(discriminator="name")]


class FileSource(Section):
    """Local files: paths, folders or globs, relative to the working directory. `licence` and `origin` go on record."""

    name: Literal["files"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    format: Literal["auto", "text", "json", "csv", "parquet", "arrow"] = "auto"
    record: Record
    weight: PositiveFloat = 1.0
    licence: str | None = None
    origin: str | None = None


class HubSource(Section):
    """A data set of the Hugging Face hub; the only setting that lets training data come over the network."""

    name: Literal["hub"]
    dataset: str
    subset: str | None = None
    split: str = "train"
    revision: str
    record: Record
    weight: PositiveFloat = 1.0
    licence: str | None = None
    origin: str | None = None


class PreparedSource(Section):
    """What `moe-train data prepare` made: a folder with manifest.json, here or in a bucket (`gs://…`).

    too_long is the prepared record's where it is not stated. Of a bucket, parts of files are read as they are needed,
    and the last `cache_mib` of them stay in memory.
    """

    name: Literal["prepared"]
    path: str
    too_long: Literal["split", "truncate", "drop", "error"] | None = None
    weight: PositiveFloat = 1.0
    cache_mib: Positive = 1024


class PythonSource(Section):
    """Records of the program that calls moe_train: an object as `moe_train.data.records.source.Records` describes it.

    A config file can only name such a source, as `title`; whoever continues its run passes `records` again.
    """

    name: Literal["python"]
    title: str = "records"
    records: SkipJsonSchema[Any] = Field(default=None, exclude=True, repr=False)
    record: Record
    weight: PositiveFloat = 1.0
    licence: str | None = None
    origin: str | None = None


RecordSource = FileSource | HubSource | PythonSource


Source = Annotated[RecordSource | PreparedSource, Field(discriminator="name")]


class BestFit(Section):
    """The longest example first (by a length that is off by a random tenth), each into the fullest row that has room for it."""

    name: Literal["best_fit"]


class Data(Section):
    """What is trained on and evaluated on. `tokenizer` may be left out where `init_from` carries one.

    The share of a source in the rows of training, and so in its tokens, is its weight over the sum of weights.
    shuffle_tokens: records are shuffled within windows of about that many tokens, which come in random order (null: over
    all); for a bucket, choose what fits its `cache_mib` twice.
    """

    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    eval: tuple[Source, ...] = ()
    packing: BestFit = BestFit(name="best_fit")
    shuffle_tokens: Positive | None = None
    cache_dir: LocalPath = "runs/cache"
    num_proc: Positive = 1
    prefetch: Positive = 2
