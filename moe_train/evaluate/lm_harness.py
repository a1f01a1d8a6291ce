"""A model for lm-evaluation-harness (extra `eval`): its tasks run in this process, over the sharded model.

Texts become tokens as the harness's own `HFLM` makes them on the exported files: the token that begins a document is added where
transformers adds it, once, and a text that a chat template has rendered is read with its control tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moe_train import config
from moe_train.data.chat.example import RenderedPrompt
from moe_train.data.chat.template import prompt_text
from moe_train.data.records.normal_form import Conversation, ModelSettings
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.evaluate.suites.generation import LoadedModel, TextOptions, generate_answers
from moe_train.evaluate.suites.likelihood import Continuation, log_likelihoods, scored_continuations
from moe_train.machine.progress import counted

DEFAULT_NEW_TOKENS = 256
"""Number of tokens that a task generates at most if it does not say, as in the harness."""


class HarnessModel(TemplateLM):
    """A loaded model as lm-evaluation-harness sees it; the model's mesh has to be in force.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        template: The text of its chat template; None if it has none.
        batch_size: Number of texts that are computed together.
    """

    def __init__(self, model: LoadedModel, tokenizer: Tokenizer, template: str | None, batch_size: int) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._batch_size = batch_size
        self._is_chat = False

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a document."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that stands before a text without context."""
        return self._tokenizer.eos_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Largest number of tokens of a context and its continuation."""
        return self._model.model.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, by which the harness tells caches apart."""
        return self._tokenizer.identity

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, which begins a document unless `add_special_tokens` is False."""
        tokenizer = self._tokenizer
        bos = tokenizer.bos_id
        encode = tokenizer.encode_control if self._is_chat and isinstance(tokenizer, HuggingFace) else tokenizer.encode
        ids = encode(string)
        # A template may have written the token already.
        if add_special_tokens is False or not tokenizer.adds_bos or bos is None or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the text of the chat template, which the harness records."""
        if isinstance(chat_template, str):
            raise ValueError(f"the harness asks for the chat template {chat_template!r} by name; choose it with --chat-template")
        return self._template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, up to where the assistant's turn begins."""
        if not add_generation_prompt:
            raise ValueError("a task's gen_prefix begins the assistant's turn itself, which is not supported; leave it out")
        if not isinstance(self._tokenizer, HuggingFace) or self._template is None:
            raise ValueError(
                "the harness needs a chat template that is text, and this tokenizer has none; leave --apply-chat-template out, or "
                "export the model with --format hf and evaluate that"
            )
        self._is_chat = True
        conversation = Conversation([dict(turn) for turn in chat_history], [], ModelSettings())
        return prompt_text(conversation, self._template, self._tokenizer)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        continuations = []
        for (_context, text), before, after in requests:
            if not after:
                raise ValueError(f"the continuation {text!r} of a task has no tokens; correct the task")
            # As many tokens as fit are kept from the end; the last one is only a target.
            tokens = [*before, *after][-(self.max_length + 1) :]
            split = max(len(tokens) - len(after), 1)
            continuations.append(Continuation(tokens[:split], tokens[split:]))
        model = self._model
        scored = scored_continuations(model.structure, model.weights, model.mesh, continuations, self._batch_size)
        return [(one.log_likelihood, one.is_greedy) for one in scored]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in disjoint windows of `max_length` tokens."""
        continuations: list[Continuation] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1)
            for window in map(make_disjoint_window, windows):
                before, after = window
                continuations.append(Continuation(before, after))
                owners.append(number)
        model = self._model
        totals = [0.0] * len(requests)
        parts = log_likelihoods(model.structure, model.weights, model.mesh, continuations, self._batch_size)
        for number, part in zip(owners, parts, strict=True):
            totals[number] += part
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the generated text of each request; requests with the same settings are computed together."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        add_progress = counted("harness", len(requests), "texts")
        for numbers in groups.values():
            generation = _generation(requests[numbers[0]].args[1])
            longest = self.max_length - generation.max_tokens
            if longest < 1:
                raise ValueError(
                    f"a task generates {generation.max_tokens} tokens, and the model's max_seq_len is {self.max_length}; lower "
                    "max_gen_toks in the task"
                )
            prompts = [RenderedPrompt(self.tok_encode(requests[number].args[0])[-longest:]) for number in numbers]
            options = TextOptions(generation, self._batch_size)
            answers = generate_answers(self._model, self._tokenizer, prompts, options, add_progress)
            for number, answer in zip(numbers, answers, strict=True):
                texts[number] = answer.text
        return texts


_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the largest number of new tokens, by precedence in the harness."""


def _generation(settings: dict[str, Any]) -> config.AnswerGeneration:
    """Return the harness's settings of a generation. Raises ValueError for one that is not supported."""
    remaining = dict(settings)
    until: str | Sequence[str] = remaining.pop("until", None) or ()
    stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
    stated = [value for name in _MAX_TOKENS if (value := remaining.pop(name, None)) is not None]
    temperature = float(remaining.pop("temperature", 0.0) or 0.0)
    samples = remaining.pop("do_sample", None)
    if samples is False:
        temperature = 0.0
    elif samples and temperature == 0:
        temperature = 1.0
    if remaining:
        name = next(iter(remaining))
        raise ValueError(f"a task's generation_kwargs have {name}, which is not supported; remove it from the task")
    max_tokens = int(stated[0]) if stated else DEFAULT_NEW_TOKENS
    return config.AnswerGeneration(max_tokens=max_tokens, stop=stop, temperature=temperature)
