"""Continue prompts with a model, or answer conversations, all prompts together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_train.commands.prompt_file import PromptRecord
from moe_train.commands.text_generator import ChatSettings, TextGenerator, TextPart
from moe_train.data.chat.example import RenderedPrompt
from moe_train.data.records.problem import located
from moe_train.evaluate.generation.completion import StopReason
from moe_train.evaluate.generation.sampling import Sampling

__all__ = ["GeneratedText", "GenerationRequest", "Sampling", "generate", "generate_text", "stream"]


@dataclass
class GeneratedText:
    """A continuation of a prompt."""

    prompt: int
    """Index of the prompt."""
    text: str
    tokens: list[int]
    """New tokens, without an end token."""
    logprobs: list[float]
    """Log-probability of each token under the model, before temperature and filters."""
    stop: StopReason


class GenerationRequest(NamedTuple):
    """What is asked of a model."""

    prompts: Sequence[str | PromptRecord]
    """Texts, or the records of a file."""
    sampling: Sampling
    stop: Sequence[str] = ()
    """Texts that end a continuation, which ends before them."""
    samples: int = 1
    """Number of continuations of each prompt; the draws of each are independent."""
    schema: Mapping[str, Any] | None = None
    """JSON schema that the continuations fit; None for any text."""
    chat: ChatSettings | None = None
    """Render each prompt as a conversation; None to continue texts."""


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
    for option, value in (("--chat-template", chat_template), ("--reasoning-effort", reasoning_effort)):
        if value is not None and not chat:
            raise ValueError(f"{option} has no effect on text to continue; add --chat, or leave it out")
    settings = ChatSettings(chat_template, reasoning_effort) if chat else None
    request = GenerationRequest(prompts, Sampling(max_tokens, temperature=temperature, seed=seed), chat=settings)
    return [generated.text for generated in generate(directory, request)]


def generate(directory: str | Path, request: GenerationRequest) -> list[GeneratedText]:
    """Generate `samples` continuations of each prompt, in the order of the prompts.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: a prompt cannot be rendered or is too long; nothing has been generated then.
    """
    generated = [
        GeneratedText(i // request.samples, "", [], [], "max_tokens") for i in range(len(request.prompts) * request.samples)
    ]
    for part in stream(directory, request):
        continuation = generated[part.prompt]
        continuation.text += part.text
        continuation.tokens += part.tokens
        continuation.logprobs += part.logprobs
        if part.stop is not None:
            continuation.stop = part.stop
    return generated


def stream(directory: str | Path, request: GenerationRequest, block_tokens: int | None = None) -> Iterator[TextPart]:
    """Yield what is generated block by block; `prompt` of a part is the index of the prompt times `samples`, plus that of the copy.

    Args:
        directory: the run or model.
        request: what is asked of it.
        block_tokens: number of tokens of a block; None for the generator's own.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: a prompt cannot be rendered or is too long; nothing has been generated then.
    """
    generator = TextGenerator(directory, request.chat or ChatSettings())
    encode = _conversation(generator) if request.chat is not None else _text(generator)
    prompts = [encode(prompt) for prompt in request.prompts]
    generator.check(prompts, request.sampling.max_tokens, [_name(prompt, i) for i, prompt in enumerate(request.prompts)])
    copies = [prompt for prompt in prompts for _ in range(request.samples)]
    settings: dict[str, Any] = {} if block_tokens is None else {"block_tokens": block_tokens}
    return generator.stream(copies, request.sampling, request.stop, request.schema, **settings)


def _name(prompt: str | PromptRecord, index: int) -> str:
    """Return what a prompt is called in a message."""
    return f"prompt {index + 1}" if isinstance(prompt, str) else f"{prompt.location}: the prompt"


def _conversation(generator: TextGenerator) -> Callable[[str | PromptRecord], RenderedPrompt]:
    """Return a function that renders a prompt as a conversation."""

    def encode(prompt: str | PromptRecord) -> RenderedPrompt:
        if isinstance(prompt, str):
            return generator.conversation_tokens([{"role": "user", "content": prompt}])
        rendered: RenderedPrompt = located(prompt.location, generator.conversation_tokens, prompt.messages, prompt.tools)
        return rendered

    return encode


def _text(generator: TextGenerator) -> Callable[[str | PromptRecord], RenderedPrompt]:
    """Return a function that encodes a prompt as the beginning of a text."""

    def encode(prompt: str | PromptRecord) -> RenderedPrompt:
        if isinstance(prompt, str):
            return generator.text_tokens(prompt)
        if prompt.text is None or prompt.tools:
            raise ValueError(f"{prompt.location}: a conversation is answered in a chat format; add --chat")
        rendered: RenderedPrompt = located(prompt.location, generator.text_tokens, prompt.text)
        return rendered

    return encode
