"""Put the items of a suite to a model, and grade its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh
from jax.tree_util import PyTreeDef

from moe_train import config
from moe_train.evaluate.generate import GenerationOptions, decode_after, generate_tokens
from moe_train.evaluate.suites.grade import Grade, text_grader
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.likelihood import log_likelihoods
from moe_train.evaluate.suites.prompts import Prompter
from moe_train.machine.progress import counted
from moe_train.model.parameters import Parameters


class LoadedModel(NamedTuple):
    """A model whose weights are on the mesh in force."""

    structure: PyTreeDef
    """The model without its weights."""
    weights: Parameters
    """All weights, adapters included."""
    model: config.Model
    """The architecture."""
    mesh: Mesh
    """The mesh."""
    cache_dtype: config.Dtype
    """Dtype of the key-value caches."""


class Answer(NamedTuple):
    """What a model answered to an item, and its score."""

    item: SuiteItem
    text: str
    """The answer; for multiple choice, the likeliest choice."""
    score: float
    """From 0 to 1."""
    finished: bool
    """Whether the answer ended by itself or at a stop text, rather than after the most tokens that the suite allows."""


def check_length(item: SuiteItem, tokens: int, new_tokens: int, model: config.Model) -> None:
    """Raise ValueError if a prompt of `tokens` tokens leaves no room for `new_tokens` more."""
    if tokens + new_tokens > model.max_seq_len:
        raise ValueError(
            f"{item.location}: the prompt has {tokens} tokens; with {new_tokens} more it exceeds the model's max_seq_len "
            f"{model.max_seq_len}; shorten it, lower generation.max_tokens or use fewer examples"
        )


def answer_items(suite: config.Suite, items: Sequence[SuiteItem], prompter: Prompter, loaded: LoadedModel) -> list[Answer]:
    """Return the graded answer to each item, in the order of the items.

    Raises:
        ValueError: A prompt cannot be written or is too long; no item has been answered then.
    """
    grade = text_grader(suite.grader)
    if grade is None:
        assert isinstance(suite.grader, config.ChoiceGrader)  # the only grader that reads no text
        return _choose(suite, suite.grader, items, prompter, loaded)
    return _generate(suite, grade, items, prompter, loaded)


def _generate(
    suite: config.Suite, grade: Grade, items: Sequence[SuiteItem], prompter: Prompter, loaded: LoadedModel
) -> list[Answer]:
    """Generate an answer to each item and grade it."""
    prompts = [prompter.tokens(item) for item in items]
    for item, tokens in zip(items, prompts, strict=True):
        check_length(item, len(tokens), suite.generation.max_tokens, loaded.model)
    generation = suite.generation
    options = GenerationOptions(
        generation.max_tokens, tuple(prompter.tokenizer.end_ids), generation.temperature, generation.seed, loaded.cache_dtype
    )
    answers: dict[int, Answer] = {}
    add_progress = counted(f"suite {suite.name}", len(items), "items")
    # Prompts of similar length share a batch, whose caches are as long as its longest prompt needs.
    by_length = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), suite.batch_size):
        rows = by_length[start : start + suite.batch_size]
        batch = [prompts[i] for i in rows]
        generated = generate_tokens(loaded.structure, loaded.weights, loaded.model, loaded.mesh, batch, options)
        for i, new in zip(rows, generated, strict=True):
            text, stopped = _before_stop(decode_after(prompter.tokenizer, prompts[i], new), generation.stop)
            finished = stopped or len(new) < generation.max_tokens
            answers[i] = Answer(items[i], text, grade(items[i], text), finished)
        add_progress(len(rows))
    return [answers[i] for i in range(len(items))]


def _before_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return a text up to the first stop text, and whether it has one."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return (text[: min(ends)], True) if ends else (text, False)


def _choose(
    suite: config.Suite, grader: config.ChoiceGrader, items: Sequence[SuiteItem], prompter: Prompter, loaded: LoadedModel
) -> list[Answer]:
    """Find the likeliest choice of each item."""
    continuations = []
    for item in items:
        for choice in item.choices:
            continuation = prompter.continuation(item, choice)
            check_length(item, len(continuation.prompt), len(continuation.text), loaded.model)
            continuations.append(continuation)
    totals = iter(log_likelihoods(loaded.structure, loaded.weights, loaded.mesh, continuations, suite.batch_size))
    answers = []
    for item in items:
        scores = []
        for choice in item.choices:
            length = len(choice) if grader.normalization == "characters" else 1
            scores.append(next(totals) / max(length, 1))
        likeliest = item.choices[scores.index(max(scores))]
        answers.append(Answer(item, likeliest, float(likeliest in item.answers), True))
    return answers
