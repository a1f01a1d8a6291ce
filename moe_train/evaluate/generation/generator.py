"""Generation for any number of prompts: continuous batching over compiled blocks of tokens.

Prompts are grouped by length, and each group runs in a batch whose numbers of rows and slots are powers of two, so that few
programs are compiled. Between two blocks, which run on the device alone, the host looks for stop texts, hands out what was
generated, and gives rows that have ended to waiting prompts.

    generator = Generator(transformer, model, mesh)
    completions = generator.generate(prompts, Sampling(max_tokens=100, end_ids=tuple(tokenizer.end_ids)))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from moe_train import config
from moe_train.data.media import MediaOfPiece
from moe_train.evaluate.generation.batch import Batch, ContinuationPlan, Request
from moe_train.evaluate.generation.completion import Completion, Progress, StopTexts
from moe_train.evaluate.generation.json_schema import JsonSchema
from moe_train.evaluate.generation.programs import BLOCK_TOKENS
from moe_train.evaluate.generation.sampling import Sampling
from moe_train.machine.mesh import BATCH, platform
from moe_train.model.separate_layers import separate_layers
from moe_train.model.transformer import Transformer

MIN_SLOTS = 64
"""Slots of the smallest cache."""


def check_lengths(
    prompts: Sequence[Sequence[int]], max_tokens: int, model: config.Model, names: Sequence[str] | None = None
) -> None:
    """Check that every prompt can be continued.

    Args:
        prompts: Token ids of each prompt.
        max_tokens: Number of tokens to generate.
        model: The architecture, whose max_seq_len is the limit.
        names: What each prompt is called in a message, such as its file and line; None for its number.

    Raises:
        ValueError: If a prompt has no tokens, or if `max_tokens` more would exceed the limit.
    """
    for i, prompt in enumerate(prompts):
        name = f"prompt {i + 1}" if names is None else names[i]
        if not prompt:
            raise ValueError(
                f"{name} has no tokens, and the tokenizer adds none at the beginning of a text; the prompt needs at least "
                "one token, so write some text"
            )
        if len(prompt) + max_tokens > model.max_seq_len:
            raise ValueError(
                f"{name} has {len(prompt)} tokens; with {max_tokens} new ones it exceeds the model's max_seq_len "
                f"{model.max_seq_len}; shorten the prompt or generate fewer tokens"
            )


class Generator:
    """A model that is ready to generate. The mesh has to be in force whenever it is used.

    Args:
        transformer: the model with its weights, adapters included.
        model: its architecture.
        mesh: the mesh.
        cache_dtype: dtype of the caches.
        max_rows: largest number of sequences in a batch; rounded up to a multiple of the devices that split it.
        release: give up the stacked weights of `transformer` one by one, so that they are not in memory twice
            (`separate_layers`); the transformer cannot be used afterwards. Without effect on accelerators, where layers stay
            stacked: there, slices are small beside the memory of a second copy.
    """

    def __init__(
        self,
        transformer: Transformer,
        model: config.Model,
        mesh: Mesh,
        cache_dtype: config.Dtype = "float32",
        max_rows: int = 32,
        *,
        release: bool = False,
    ) -> None:
        config.require_vocabulary(model, "generate")
        self._transformer = separate_layers(transformer, release=release) if platform() == "cpu" else transformer
        self._model = model
        self._mesh = mesh
        self._cache_dtype = jnp.dtype(cache_dtype)
        self._max_rows = max_rows

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stop_texts: StopTexts | None = None,
        indices: Sequence[int] | None = None,
        schema: JsonSchema | None = None,
        media: Sequence[MediaOfPiece | None] | None = None,
    ) -> list[Completion]:
        """Continue each prompt.

        Args:
            prompts: Token ids of each prompt.
            sampling: How they are continued.
            stop_texts: Texts that end a continuation.
            indices: The index of each prompt, on which its draws depend; None for 0, 1, 2, …
            schema: JSON schema that every continuation fits, unless it reaches `max_tokens` before its end; None for any text.
            media: The pictures, or the sound, of each prompt; None if no prompt has any.

        Raises:
            ValueError: If a prompt is empty or too long (see `check_lengths`); nothing has been generated then.
        """
        completions = [Completion([], [], "max_tokens") for _ in prompts]
        for progress in self.stream(prompts, ContinuationPlan(sampling, stop_texts, schema), indices, media=media):
            completion = completions[progress.request]
            completion.tokens.extend(progress.tokens)
            completion.logprobs.extend(progress.logprobs)
            if progress.stop is not None:
                completions[progress.request] = completion._replace(stop=progress.stop)
        return completions

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        plan: ContinuationPlan,
        indices: Sequence[int] | None = None,
        block_tokens: int = BLOCK_TOKENS,
        media: Sequence[MediaOfPiece | None] | None = None,
    ) -> Iterator[Progress]:
        """Continue each prompt as `generate` does, and yield the tokens block by block, with the last ones of a prompt its stop.

        Args:
            prompts: Token ids of each prompt.
            plan: How they are continued.
            indices: The index of each prompt, on which its draws depend; None for 0, 1, 2, …
            block_tokens: Number of tokens of a block; small for a quick first answer.
            media: The pictures, or the sound, of each prompt; None if no prompt has any.

        Raises:
            ValueError: If there are pictures or sound, and the model has no tower for them.
        """
        check_lengths(prompts, plan.sampling.max_tokens, self._model)
        shown = [None] * len(prompts) if media is None else list(media)
        requests = []
        for number, (prompt, of_prompt) in enumerate(zip(prompts, shown, strict=True)):
            if of_prompt is not None and self._transformer.audio is None and self._transformer.vision is None:
                raise ValueError("a prompt has pictures or sound, and the model was loaded without a tower; leave them out")
            requests.append(Request(number, number if indices is None else indices[number], list(prompt), of_prompt))
        return self._stream(requests, plan, block_tokens)

    def _stream(self, requests: list[Request], plan: ContinuationPlan, block_tokens: int) -> Iterator[Progress]:
        by_slots: dict[int, list[Request]] = {}
        for request in requests:
            by_slots.setdefault(self._slots(len(request.prompt) + plan.sampling.max_tokens), []).append(request)
        # The largest first, so that a cache that does not fit fails at once.
        for slots in sorted(by_slots, reverse=True):
            group = by_slots[slots]
            # Sequences of similar prompts end their prompts in the same part of `read_prompts`.
            group.sort(key=lambda request: len(request.prompt), reverse=True)
            batch = Batch(self._transformer, self._mesh, plan)
            batch.allocate(self._model, self._rows(len(group)), slots, self._cache_dtype)
            yield from batch.run(group, block_tokens)

    def _rows(self, requests: int) -> int:
        """Return the number of rows for some requests: a power of two, times the devices that split the rows."""
        devices = math.prod(self._mesh.shape[axis] for axis in BATCH)
        per_device = -(-min(requests, self._max_rows) // devices)
        return devices * 2 ** math.ceil(math.log2(per_device))

    def _slots(self, tokens: int) -> int:
        """Return the length of caches for sequences of some tokens: a power of two, rounded up to a multiple of `context`."""
        slots = max(MIN_SLOTS, 2 ** math.ceil(math.log2(tokens)))
        return slots + -slots % self._mesh.shape["context"]
