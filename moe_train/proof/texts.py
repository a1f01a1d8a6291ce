"""Prove what an export contains besides weights: tokenizer, chat template, and the end of a generation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from moe_train.data.chat import conversation_to_tokens
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.template_files import ADDITIONAL_TEMPLATES
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import read_object
from moe_train.proof import reread
from moe_train.proof.checks import Check, Fault, Finding, NotChecked, ProofRecord, run
from moe_train.weights import gguf

FIXED_CONVERSATIONS = (
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
    record: ProofRecord,
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
        run("tokenizer", partial(_check_tokenizer, directory, tokenizer)),
        run("template", partial(_check_template, directory, layout, tokenizer, template, conversations, record)),
        run("generation", partial(check_generation, directory, layout, () if tokenizer is None else tokenizer.end_ids)),
    ]


def _check_tokenizer(directory: Path, tokenizer: Tokenizer | None) -> Finding:
    if tokenizer is None:
        raise NotChecked("the export has no tokenizer")
    # Compared by content: some layouts keep the tokenizer's files under other names.
    hashes = {_sha256(file) for file in directory.iterdir() if file.suffix not in _WEIGHT_SUFFIXES}
    for file in tokenizer.files:
        # The run's own template has replaced the tokenizer's.
        is_template = file.name == "chat_template.jinja" or file.parent.name == ADDITIONAL_TEMPLATES
        if not is_template and _sha256(file) not in hashes:
            raise Fault(f"no file in the directory has the bytes of the tokenizer's {file.name}")
    return Finding(f"{len(tokenizer.files)} files of the tokenizer, byte for byte", {"count": len(tokenizer.files)})


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


_WEIGHT_SUFFIXES = (".safetensors", ".gguf")


def load_texts(directory: Path, layout: str) -> tuple[Tokenizer, str | None]:
    """Load the tokenizer and the chat template of a directory. Raises NotChecked if it has no tokenizer."""
    if (directory / "tokenizer.json").is_file():
        tokenizer: Tokenizer = HuggingFace(directory)
    else:
        # If there are both, tekken.json comes first and is taken.
        files = sorted((*directory.glob("tekken.json"), *directory.glob("tokenizer.model*")))
        if not files:
            raise NotChecked("the export has no tokenizer")
        tokenizer = Mistral(files[0])
    template = conversation_to_tokens.load_template(None, tokenizer)
    if layout == "gguf":
        # llama.cpp reads the template from the file of weights, and ignores other files.
        file = gguf.file_in(directory)
        if file is not None:
            template = reread.gguf_settings(file).get("tokenizer.chat_template")
    return tokenizer, template


def _check_template(
    directory: Path,
    layout: str,
    tokenizer: Tokenizer | None,
    template: str | None,
    conversations: Sequence[Conversation],
    record: ProofRecord,
) -> Finding:
    if tokenizer is None:
        raise NotChecked("the export has no tokenizer")
    if isinstance(tokenizer, HuggingFace) and template is None:
        raise NotChecked("the tokenizer has no chat template")
    exported_tokenizer, exported_template = load_texts(directory, layout)
    fixed_tokens: dict[str, list[list[int]]] = {}
    for i, conversation in enumerate(FIXED_CONVERSATIONS):
        try:
            tokens = rendered_examples(conversation, template, tokenizer)
        except ValueError:  # the template refuses it, for example because its format has no system messages
            continue
        fixed_tokens[str(i)] = tokens
        exported_tokens = rendered_examples(conversation, exported_template, exported_tokenizer)
        check_tokens(f"fixed conversation {i}", exported_tokens, tokens)
    for i, conversation in enumerate(conversations):
        exported_tokens = rendered_examples(conversation, exported_template, exported_tokenizer)
        check_tokens(f"training conversation {i}", exported_tokens, rendered_examples(conversation, template, tokenizer))
    if not fixed_tokens and not conversations:
        raise NotChecked("the template renders none of the fixed conversations, and there are no training conversations")
    record["conversations"] = fixed_tokens
    summary = f"{len(conversations)} training and {len(fixed_tokens)} fixed conversations are rendered to the tokens of training"
    if not conversations:
        summary = f"{len(fixed_tokens)} fixed conversations are rendered to the same tokens; the run has no training conversations"
    return Finding(summary, {"training": len(conversations), "fixed": len(fixed_tokens)})


def rendered_examples(conversation: Conversation, template: str | None, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the tokens of each example that a conversation is trained as."""
    return [example.tokens for example in conversation_to_tokens.examples(conversation, template, tokenizer)]


def check_tokens(name: str, exported: list[list[int]], trained: list[list[int]]) -> None:
    """Raise Fault if two renderings of a conversation differ.

    Args:
        name: what the message calls the conversation.
        exported: the tokens of the directory's template.
        trained: the tokens of training.
    """
    if exported != trained:
        raise Fault(f"the template in the directory renders {name} to other tokens than in training")


def check_generation(directory: Path, layout: str, end_ids: Sequence[int]) -> Finding:
    """Check that the files tell servers which tokens end a generation, or by which token the end of a scored text is found.

    Args:
        directory: the export.
        layout: layout of the files.
        end_ids: ids of the tokens, the tokenizer's end of a text first; empty if the export has no tokenizer.

    Raises:
        Fault: the files state another token than the tokenizer.
        NotChecked: the layout leaves this to the tokenizer's own files.
    """
    eos_id = end_ids[0] if end_ids else None
    match layout:
        case "hf" if _scores_texts(directory):
            return _check_padding(directory, end_ids)
        case "hf":
            source = "generation_config.json"
            stated = read_object(directory / source).get("eos_token_id")
            # Hugging Face takes one id or a list of them; GGUF, below, has a single id.
            expected = list(end_ids) if len(end_ids) > 1 else eos_id
        case "gguf":
            source = "tokenizer.ggml.eos_token_id"
            file = gguf.file_in(directory)
            stated = None if file is None else reread.gguf_settings(file).get(source)
            expected = eos_id
        case _:
            raise NotChecked("this layout leaves the end-of-sequence token to the tokenizer's own files")
    if stated != expected:
        raise Fault(f"{source} states the end-of-sequence token {stated}, but the tokenizer's is {expected}")
    return Finding(f"{source} states the tokenizer's end-of-sequence token, {stated}")


def _scores_texts(directory: Path) -> bool:
    """Return whether the files are of a class of transformers that scores a text at its last token that is not padding."""
    file = directory / "config.json"
    if not file.is_file():
        return False
    architectures = read_object(file).get("architectures") or [""]
    return str(architectures[0]).endswith("ForSequenceClassification")


def _check_padding(directory: Path, end_ids: Sequence[int]) -> Finding:
    """Check that the padding token is one that no text contains: a control token that neither begins nor ends anything.

    Raises:
        Fault: another token is stated, at which a reader would take the wrong score.
        NotChecked: the export has no tokenizer.
    """
    if not end_ids:
        raise NotChecked("the export has no tokenizer")
    settings = read_object(directory / "config.json")
    stated = settings.get("pad_token_id")
    tokenizer, template = load_texts(directory, "hf")
    name = None if stated is None else tokenizer.decode([stated], keep_special=True)
    if stated not in tokenizer.control_ids or stated in (*end_ids, settings.get("bos_token_id"), settings.get("eos_token_id")):
        raise Fault(f"config.json states pad_token_id {stated} ({name}), which may occur in a text")
    if template is not None and name is not None and name in template:
        raise Fault(f"config.json states pad_token_id {stated} ({name}), which the chat template writes")
    return Finding(f"scores are read at the last token that is not {name} ({stated}), which no text contains")
