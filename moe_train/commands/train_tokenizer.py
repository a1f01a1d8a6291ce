"""Train a tokenizer: a byte-level BPE with Mistral's chat format or ChatML, written as Hugging Face's files."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, assert_never

import tokenizers

from moe_train.data.chat.conversation_to_tokens import read_template
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.machine.files import new_directory, refuse_existing

log = logging.getLogger(__name__)

PAD = "<pad>"
BOS = "<s>"
EOS = "</s>"
BEGIN_USER = "[INST]"
END_USER = "[/INST]"

# Mistral's instruct format (v3 tekken: no spaces around the markers); the system text precedes the first user turn.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, turns = messages[0]['content'] + '\\n\\n', messages[1:] %}
{%- else %}
    {%- set system, turns = '', messages %}
{%- endif %}
{%- for message in turns %}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
        {{- raise_exception('after an optional system message, roles alternate user, assistant, user, …') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST]' + (system if loop.first else '') + message['content'] + '[/INST]' }}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""


class _Format(NamedTuple):
    """The control tokens of a chat format, and its template."""

    pad: str
    bos: str | None
    eos: str
    markers: tuple[str, ...]
    template: str


ChatFormat = Literal["mistral", "chatml"]
"""The chat formats that a tokenizer can be trained with."""


def _format(name: ChatFormat) -> _Format:
    """Return a chat format."""
    match name:
        case "mistral":
            return _Format(PAD, BOS, EOS, (BEGIN_USER, END_USER), CHAT_TEMPLATE)
        case "chatml":
            return _Format("<|endoftext|>", None, "<|im_end|>", ("<|im_start|>",), read_template("chatml"))
        case _:
            assert_never(name)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out_dir: str | Path,
    *,
    min_frequency: int = 2,
    progress: bool = False,
    chat_format: ChatFormat = "mistral",
) -> HuggingFace:
    """Train a byte-level BPE with a chat format on `texts`, write it to `out_dir` and return it, loaded.

        tokenizer = moe_train.train_tokenizer(open("text.txt"), 4096, "my_tokenizer")

    It writes tokenizer.json, tokenizer_config.json and chat_template.jinja, which transformers' AutoTokenizer reads too. The same
    texts in the same order give the same files. Too little text gives fewer than `vocab_size` ids, with a warning.

    Args:
        texts: the text to train on.
        vocab_size: number of ids, control tokens included.
        out_dir: the folder to write.
        min_frequency: the fewest occurrences of a pair that is merged.
        progress: whether to show a progress bar.
        chat_format: Mistral's format, or ChatML with tools.

    Raises:
        FileExistsError: `out_dir` exists and is not an empty folder.
        ValueError: `vocab_size` leaves no room for bytes and control tokens, or there is no text.
    """
    from tokenizers import decoders, models, pre_tokenizers, trainers

    form = _format(chat_format)
    # The trainer gives ids in this order, beginning with 0 for padding.
    specials = [form.pad, *([form.bos] if form.bos else []), form.eos, *form.markers]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(specials)
    if vocab_size < smallest:
        raise ValueError(f"--vocab-size {vocab_size} has no room for all bytes and control tokens; use {smallest} or more")
    refuse_existing(Path(out_dir))  # fail before the long work rather than after it

    tokenizer = tokenizers.Tokenizer(models.BPE())
    # Without a prefix space, the text behind a control token is encoded as it is.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    num_characters = 0

    def counted() -> Iterable[str]:
        nonlocal num_characters
        for text in texts:
            num_characters += len(text)
            yield text

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=specials,
        # All 256 bytes, so that every text can be encoded, and not only the characters seen here.
        initial_alphabet=alphabet,
        show_progress=progress,
    )
    tokenizer.train_from_iterator(counted(), trainer)
    if not num_characters:
        raise ValueError("the files contain no text to train a tokenizer on; name others")
    if tokenizer.get_vocab_size() < vocab_size:
        log.warning(
            "the tokenizer has %d tokens instead of %d, since %d characters of text contain no more frequent pairs; use more text",
            tokenizer.get_vocab_size(),
            vocab_size,
            num_characters,
        )
    with new_directory(out_dir) as directory:
        _write_files(tokenizer, form, directory)
    return HuggingFace(out_dir)


def _write_files(tokenizer: tokenizers.Tokenizer, form: _Format, directory: Path) -> None:
    """Write the tokenizer, its settings and the chat template into an existing directory."""
    from tokenizers import processors

    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": form.eos,
        "pad_token": form.pad,
        "add_bos_token": form.bos is not None,
        # transformers would otherwise remove spaces before punctuation when it decodes.
        "clean_up_tokenization_spaces": False,
    }
    if form.bos is not None:
        settings["bos_token"] = form.bos
        # Other tools use this rule to put BOS before plain text.
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{form.bos} $A", pair=f"{form.bos} $A $B", special_tokens=[(form.bos, tokenizer.token_to_id(form.bos))]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(form.template, encoding="utf-8")
