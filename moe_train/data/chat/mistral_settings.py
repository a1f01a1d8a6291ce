"""Reasoning and settings that a Mistral tokenizer writes: `[THINK]` from v13 on, and `[MODEL_SETTINGS]` from v15 on.

mistral-common leaves a setting out in silence where the tokenizer's file has no builder for it, and replaces a missing effort by
the default. Both are checked here before.
"""

from __future__ import annotations

import functools

from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.model_settings_builder import ModelSettingsBuilder

from moe_train.data.chat.settings import NO_SETTINGS, check_effort, not_written, reasoning_not_written
from moe_train.data.records.normal_form import Conversation, ModelSettings, reasoning_of
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.machine.files import JsonObject


def check_written(conversation: Conversation, tokenizer: Mistral) -> None:
    """Check that the tokenizer writes the reasoning and the settings of a conversation.

    Raises:
        Problem: If it does not, or if a turn reasons although the effort is none.
    """
    builder = check_settings(conversation.settings, tokenizer)
    reasons = [i for i, message in enumerate(conversation.messages) if reasoning_of(message)]
    if not reasons:
        return
    name = _name(tokenizer)
    if not _has_think(tokenizer):
        otherwise = "use a tokenizer of version v13 or v15 with it"
        if tokenizer.finetuning.version == TokenizerVersion.v11:
            # Magistral Small of June and July 2025, whose system prompt asks for these letters.
            otherwise += ", write it into the text as the model does (<think>…</think>)"
        raise reasoning_not_written(reasons[0], f"{name} has no [THINK]", otherwise)
    if builder is None:
        return
    for i in reasons:
        if conversation.messages[i]["role"] == "system":
            message = f"message {i} is a system prompt with reasoning, which {name} does not write"
            raise Problem("thinking", message, "write it as text, or use a tokenizer of version v13")
    if builder.reasoning_effort is not None:
        stated = conversation.settings.reasoning_effort
        # mistral-common writes the default where a record states no effort.
        default = str(builder.reasoning_effort.default)
        source = f"reasoning_effort, by default of {name}" if stated is None else "reasoning_effort"
        check_effort(conversation, stated or default, source)


def check_settings(settings: ModelSettings, tokenizer: Mistral) -> ModelSettingsBuilder | None:
    """Check that the tokenizer writes settings.

    Returns:
        mistral-common's builder of settings; None if the tokenizer's version has no settings.

    Raises:
        Problem: If it does not write them.
    """
    version = tokenizer.finetuning.version
    # v15 goes on even without settings: it needs a builder to write any conversation.
    if not version.supports_model_settings and settings == NO_SETTINGS:
        return None
    name = _name(tokenizer)
    if settings.chat_template_kwargs is not None:
        raise not_written("chat_template_kwargs", f"{name} has no chat template, since its format is fixed")
    if not version.supports_model_settings:
        key = "response_format" if settings.reasoning_effort is None else "reasoning_effort"
        raise not_written(key, f"{name} writes no settings, as v15 does")
    builder = _builder(tokenizer)
    if builder is None:
        message = f"{name} has no model_settings_builder, without which mistral-common writes no conversation"
        raise Problem("settings", message, "use the complete tekken.json of the model")
    effort = settings.reasoning_effort
    if effort is not None:
        if builder.reasoning_effort is None:
            raise not_written("reasoning_effort", f"the model_settings_builder of {name} has none")
        allowed = [str(value) for value in builder.reasoning_effort.values]
        if effort not in allowed:
            message = f"reasoning_effort is {effort!r}, and {name} has {', '.join(allowed) or 'none at all'}"
            raise Problem("settings", message, "state one of those, or leave it out")
    if settings.response_format is not None and builder.json_schema is None:
        raise not_written("response_format", f"the model_settings_builder of {name} has no json_schema")
    return builder


def request_fields(settings: ModelSettings) -> JsonObject:
    """Return the settings as fields of mistral-common's request."""
    fields = {"reasoning_effort": settings.reasoning_effort, "response_format": settings.response_format}
    return {name: value for name, value in fields.items() if value is not None}


def _name(tokenizer: Mistral) -> str:
    """Return what a tokenizer is called in messages."""
    return f"{tokenizer.files[0].name} (version {tokenizer.finetuning.version.value})"


def _builder(tokenizer: Mistral) -> ModelSettingsBuilder | None:
    """Return mistral-common's builder of settings; None if the tokenizer's file has none."""
    return tokenizer.finetuning.instruct_tokenizer.tokenizer.model_settings_builder


@functools.lru_cache(maxsize=8)
def _has_think(tokenizer: Mistral) -> bool:
    """Return whether the tokenizer writes reasoning."""
    return getattr(tokenizer.finetuning.instruct_tokenizer, "BEGIN_THINK", None) is not None
