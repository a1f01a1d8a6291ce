"""Continue prompts with a model, in a batch of prompts of different lengths, with a cache of keys and values.

Two programs are compiled for each batch and cache size: one takes 64 tokens of every prompt, the other a single token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from moe_train import config
from moe_train.checkpoint.model_dir import open_model
from moe_train.data.chat.chat_date import date_of_data, dated
from moe_train.data.chat.conversation_to_tokens import check_effort_option, load_template, render_prompt
from moe_train.data.records.problem import checked_text
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.evaluate.generate import GenerationOptions, check_lengths, decode_after, generate_tokens


def generate_text(
    directory: str | Path,
    prompts: Sequence[str],
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    chat: bool = False,
    chat_template: str | None = None,
    reasoning_effort: str | None = None,
) -> list[str]:
    """Complete `prompts` with a run (its named or else newest checkpoint) or a Hugging Face model.

        [answer] = moe_train.generate_text("runs/tuned", ["What is a mesh?"], max_tokens=40, chat=True)

    Args:
        directory: the run or model.
        prompts: texts.
        max_tokens: the most tokens to generate for each prompt.
        temperature: 0 for greedy decoding.
        seed: for sampling.
        chat: whether each prompt is a user's turn, rendered in the tokenizer's chat format; otherwise it is text to continue.
        chat_template: a jinja file, its text, or a name, for `chat`; None for the template of the run or of the model's tokenizer.
        reasoning_effort: how long the model may think, for `chat`; None for the default of the tokenizer or template.

    Returns:
        The completions, without their prompts.
    """
    opened = open_model(directory)
    model = opened.model
    tokenizer = opened.tokenizer
    for option, value in (("--chat-template", chat_template), ("--reasoning-effort", reasoning_effort)):
        if value is not None and not chat:
            raise ValueError(f"{option} has no effect on text to continue; add --chat, or leave it out")
    template = opened.chat_template if chat_template is None else load_template(chat_template, tokenizer)
    if template is not None:
        data = opened.run.data if opened.run else None
        # The date of the training data, so that the prompt has the tokens that training saw.
        template = dated(template, date_of_data(data if isinstance(data, config.RunData) else None))
    check_effort_option(reasoning_effort, template, tokenizer)
    encode = _chat_prompt(template, tokenizer, reasoning_effort) if chat else _text_prompt(tokenizer)
    tokens = [encode(prompt) for prompt in prompts]
    check_lengths(tokens, max_tokens, model)
    with jax.set_mesh(opened.mesh):
        structure, weights = opened.load()
        options = GenerationOptions(max_tokens, tuple(tokenizer.end_ids), temperature, seed, opened.compute.dtype)
        generated = generate_tokens(structure, weights, model, opened.mesh, tokens, options)
    return [decode_after(tokenizer, before, after) for before, after in zip(tokens, generated, strict=True)]


def _chat_prompt(template: str | None, tokenizer: Tokenizer, reasoning_effort: str | None) -> Callable[[str], list[int]]:
    """Return a function that renders a prompt as a user's turn."""

    def encode(prompt: str) -> list[int]:
        return render_prompt([{"role": "user", "content": prompt}], template, tokenizer, reasoning_effort=reasoning_effort)

    return encode


def _text_prompt(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Return a function that encodes a prompt as the beginning of a text."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    def encode(prompt: str) -> list[int]:
        return start + tokenizer.encode(checked_text(prompt, "the prompt"))

    return encode
