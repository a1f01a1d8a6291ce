"""Preflight checks: the tokenizer is the model's, and the exported chat template renders exactly as in training."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moe_train import config
from moe_train.checkpoint import model_dir
from moe_train.checkpoint.runs import is_run, read_run
from moe_train.data.chat import conversation_to_tokens
from moe_train.data.records.answers import judged_conversations
from moe_train.data.records.conversation import normalise
from moe_train.data.records.local_files import expand_files
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.open_source import open_source
from moe_train.data.records.problem import brief, located
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.data.tokenizers.tokenizer import Tokenizer, check_vocab
from moe_train.proof import texts
from moe_train.weights.texts import Texts, write_texts

_CONVERSATIONS = 8  # number of conversations of each source that are rendered both ways
_IDS = 512  # number of ids that are compared between two vocabularies


def check_ready(run: config.Run, data: config.RunData, tokenizer: Tokenizer) -> None:
    """Raise ValueError if the tokenizer is not the model's, or if an export would render conversations differently."""
    check_vocab(tokenizer, run.model.vocab_size)
    if run.init_from is not None:
        _check_same_tokenizer(data.tokenizer, tokenizer, run.init_from)
    template = conversation_to_tokens.load_template(data.chat_template, tokenizer)
    if isinstance(tokenizer, HuggingFace) and template is not None:
        conversations = list(_conversations(data))
        if conversations:
            _check_exported_template(tokenizer, template, conversations)


def check_files(data: config.RunData) -> None:
    """Check that the files of all sources exist and that the cache can be a folder, before the first source is tokenized.

    Raises:
        FileNotFoundError: A pattern of a source matches nothing.
        ValueError: A file cannot be used, or the cache would be below a file.
    """
    for source in (*data.train, *data.eval):
        if isinstance(source, config.FileSource):
            expand_files(source)
    cache = Path(data.cache_dir)
    parent = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"data.cache_dir is {cache}, and {parent} is a file; state a folder")


def _check_same_tokenizer(section: config.Tokenizer, tokenizer: Tokenizer, init_from: str) -> None:
    """Raise ValueError if more than 5% of the compared ids decode differently with the tokenizer found at `init_from`.

    A run's own copy must not have changed at all since its checkpoint was saved.
    """
    try:
        model_section = model_dir.find_tokenizer_config(init_from)
    except FileNotFoundError:
        return  # weights without a tokenizer: nothing to compare
    model_tokenizer = tokenizer if model_section == section else load_tokenizer(model_section)
    if is_run(init_from):
        model_dir.check_tokenizer_of_run(init_from, read_run(init_from), model_tokenizer)
    if model_tokenizer.identity == tokenizer.identity:
        return
    count = min(model_tokenizer.vocab_size, tokenizer.vocab_size)
    compared = range(0, count, max(1, count // _IDS))
    differing = []
    for number in compared:
        # Spaces, invalid UTF-8 and byte tokens are spelled differently by kinds of tokenizers, so they do not count.
        run_text = tokenizer.decode([number], keep_special=True).replace("▁", " ")
        model_text = model_tokenizer.decode([number], keep_special=True).replace("▁", " ")
        both_texts = run_text + model_text
        if run_text.strip() != model_text.strip() and "\ufffd" not in both_texts and "<0x" not in both_texts:
            differing.append((number, run_text, model_text))
    # A few control tokens may have been renamed since the other file was written.
    if len(differing) > len(compared) // 20:
        number, run_text, model_text = differing[0]
        raise ValueError(
            f"the tokenizer {tokenizer.files[0]} is not that of {init_from}: id {number} is {brief(run_text)} instead of "
            f"{brief(model_text)}, and many other ids differ; leave data.tokenizer out to use the model's own tokenizer"
        )


def _conversations(data: config.Data) -> Iterator[tuple[str, Conversation]]:
    """Yield (location for error messages, conversation) for the first records of each file source of conversations."""
    for source in data.train:
        if isinstance(source, config.FileSource) and not isinstance(source.record, config.TextRecord):
            records = open_source(source)
            for origin, fields in itertools.islice(records, _CONVERSATIONS):
                location = records.where(origin)
                for conversation in judged_conversations(located(location, normalise, fields, source.record)):
                    yield location, conversation


def _check_exported_template(tokenizer: HuggingFace, template: str, conversations: list[tuple[str, Conversation]]) -> None:
    """Write the tokenizer and template as an export would, read them back, and compare the rendered tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        # The files themselves are compared, not their content in memory, since other tools read only the files.
        directory = Path(scratch)
        write_texts(directory, Texts(tokenizer, template))
        try:
            exported = HuggingFace(directory)
        except (FileNotFoundError, ValueError) as error:
            files = ", ".join(file.name for file in tokenizer.files)
            reason = str(error).replace(scratch, "it")
            raise ValueError(
                f"an export would contain {files}, which other tools cannot read as a tokenizer ({reason}); "
                "set data.tokenizer.path to a directory with tokenizer.json"
            ) from error
        # None: the template that the exported tokenizer states, which is what other tools use.
        exported_template = conversation_to_tokens.load_template(None, exported)
        for location, conversation in conversations:
            expected = located(location, texts.rendered_examples, conversation, template, tokenizer)
            if texts.rendered_examples(conversation, exported_template, exported) != expected:
                raise ValueError(
                    f"{location}: the exported chat template would render this record to other tokens than in training; "
                    "check data.chat_template and the files next to the tokenizer"
                )
