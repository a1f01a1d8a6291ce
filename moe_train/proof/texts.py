"""Prove what an export contains besides weights: tokenizer, chat template, and the end of a generation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moe_train.data.chat import conversation_to_tokens
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.huggingface import ADDITIONAL_TEMPLATES, HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import read_object
from moe_train.proof import reread
from moe_train.proof.checks import Check, Fault, NotChecked, run
from moe_train.weights import gguf

FIXED = (
    Conversation([{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}], []),
    Conversation(
        [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "The capital of France?"},
            {"role": "assistant", "content": "Paris"},
            {"role": "user", "content": "And of Italy?"},
            {"role": "assistant", "content": "Rome"},
        ],
        [],
    ),
)
"""Conversations rendered at the export and at every verification; training conversations may be private and are not kept."""


def check_texts(
    directory: Path,
    layout: str,
    tokenizer: Tokenizer | None,
    template: str | None,
    conversations: Sequence[Conversation],
    record: dict[str, Any],
) -> list[Check]:
    """Check the tokenizer's files, the chat template in the directory, and the token that ends a generation.

    Args:
        directory: the export.
        layout: layout of the files.
        tokenizer: the tokenizer of training; None if the export has none.
        template: Jinja; None for the tokenizer's own.
        conversations: training conversations.
        record: receives the tokens of the fixed conversations.
    """
    return [
        run("tokenizer", partial(_tokenizer, directory, layout, tokenizer)),
        run("template", partial(_template, directory, layout, tokenizer, template, conversations, record)),
        run("generation", partial(check_generation, directory, layout, tokenizer.end_ids if tokenizer else ())),
    ]


def _tokenizer(directory: Path, layout: str, tokenizer: Tokenizer | None) -> tuple[str, dict[str, Any]]:
    if tokenizer is None:
        raise NotChecked("the export has no tokenizer")
    file_hashes = {hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir() if file.suffix not in _WEIGHTS}
    replaced = {"chat_template.jinja"}  # replaced by the run's template
    for file in tokenizer.files:
        if file.parent.name == ADDITIONAL_TEMPLATES:  # replaced by the run's template, too
            continue
        if file.name not in replaced and hashlib.sha256(file.read_bytes()).hexdigest() not in file_hashes:
            raise Fault(f"{file.name} of the tokenizer is not in the directory, byte for byte")
    return f"{len(tokenizer.files)} files of the tokenizer, byte for byte", {"count": len(tokenizer.files)}


_WEIGHTS = (".safetensors", ".gguf")


def reopened(directory: Path, layout: str) -> tuple[Tokenizer, str | None]:
    """Load the tokenizer and the chat template of a directory. Raises NotChecked if it has no tokenizer."""
    if (directory / "tokenizer.json").is_file():
        tokenizer: Tokenizer = HuggingFace(directory)
    else:
        files = sorted((*directory.glob("tekken.json"), *directory.glob("tokenizer.model*")))
        if not files:
            raise NotChecked("the export has no tokenizer")
        tokenizer = Mistral(files[0])
    template = conversation_to_tokens.load_template(None, tokenizer)
    if layout == "gguf" and (file := gguf.file_in(directory)) is not None:
        template = reread.gguf_settings(file).get("tokenizer.chat_template")
    return tokenizer, template


def _template(
    directory: Path,
    layout: str,
    tokenizer: Tokenizer | None,
    template: str | None,
    conversations: Sequence[Conversation],
    record: dict[str, Any],
) -> tuple[str, dict[str, Any]]:
    if tokenizer is None:
        raise NotChecked("the export has no tokenizer")
    if isinstance(tokenizer, HuggingFace) and template is None:
        raise NotChecked("the tokenizer has no chat template")
    reloaded = reopened(directory, layout)
    tokens_of_fixed = {}
    for i, conversation in enumerate(FIXED):
        try:
            tokens_of_fixed[i] = rendered(conversation, template, tokenizer)
        except ValueError:  # for example a format without system messages
            continue
        check_tokens(f"fixed conversation {i}", rendered(conversation, reloaded[1], reloaded[0]), tokens_of_fixed[i])
    for i, conversation in enumerate(conversations):
        check_tokens(
            f"training conversation {i}",
            rendered(conversation, reloaded[1], reloaded[0]),
            rendered(conversation, template, tokenizer),
        )
    if not tokens_of_fixed and not conversations:
        raise NotChecked("the template renders no conversation that is here")
    record["conversations"] = {str(i): tokens for i, tokens in tokens_of_fixed.items()}
    summary = f"{len(conversations)} training and {len(tokens_of_fixed)} fixed conversations give the training's tokens"
    if not conversations:
        summary = f"{len(tokens_of_fixed)} fixed conversations give the same tokens; the run has no training conversations"
    return summary, {"training": len(conversations), "fixed": len(tokens_of_fixed)}


def rendered(conversation: Conversation, template: str | None, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the tokens of each example that a conversation is trained as."""
    return [example.tokens for example in conversation_to_tokens.examples(conversation, template, tokenizer)]


def check_tokens(what: str, found: list[list[int]], wanted: list[list[int]]) -> None:
    """Raise Fault if two renderings of a conversation differ; `what` names it in the message."""
    if found != wanted:
        raise Fault(f"the template in the directory renders {what} to other tokens than training's")


def check_generation(directory: Path, layout: str, end_ids: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """Check that servers are told which tokens end a generation.

    Args:
        directory: the export.
        layout: layout of the files.
        end_ids: ids of the tokens, the tokenizer's end of a text first; empty if the export has no tokenizer.

    Raises:
        Fault: the files state another token than the tokenizer's end.
        NotChecked: the layout leaves this to the tokenizer's own files.
    """
    eos_id = end_ids[0] if end_ids else None
    match layout:
        case "hf":
            key = "generation_config.json"
            stated = read_object(directory / "generation_config.json").get("eos_token_id")
            expected = list(end_ids) if len(end_ids) > 1 else eos_id
        case "gguf":
            key = "tokenizer.ggml.eos_token_id"
            file = gguf.file_in(directory)
            stated = None if file is None else reread.gguf_settings(file).get(key)
            expected = eos_id
        case _:
            raise NotChecked("this layout leaves the end of a generation to the tokenizer's own files")
    if stated != expected:
        raise Fault(f"{key} ends a generation at {stated}; the tokenizer's end is {expected}")
    return f"{key} ends a generation at {stated}", {}
