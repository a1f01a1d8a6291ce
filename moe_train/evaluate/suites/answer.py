"""Put the items of a suite to a model, and grade its answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from moe_train import config
from moe_train.data.chat.example import RenderedPrompt
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.evaluate.suites.generation import GeneratedText, LoadedModel, TextOptions, generate_answers
from moe_train.evaluate.suites.grade import Grade, reads_control_tokens
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.likelihood import Continuation, log_likelihoods
from moe_train.evaluate.suites.load import LoadedSuite
from moe_train.evaluate.suites.not_graded import NotGraded
from moe_train.evaluate.suites.prompts import LETTERS, Prompter
from moe_train.machine.progress import counted

log = logging.getLogger(__name__)

JUDGE_REQUESTS = 8
"""Number of requests to a judge at a time."""


class Answer(NamedTuple):
    """What a model answered to an item, and its score."""

    item: SuiteItem
    text: str
    """The answer; for multiple choice, the likeliest choice; for perplexity, the expected answer."""
    score: float | None
    """Score from 0 to 1; None if the answer could not be graded."""
    finished: bool
    """Whether the answer ended by itself or at a stop text, rather than after the most tokens that the suite allows."""
    tokens: tuple[int, ...] = ()
    """The generated tokens; () where nothing is generated."""
    problem: str | None = None
    """Why the answer could not be graded."""
    log_likelihood: float | None = None
    """For perplexity: the log-probability of the expected answer in nats."""
    text_tokens: int = 0
    """For perplexity: the number of its tokens."""


def answer_items(loaded_suite: LoadedSuite, prompter: Prompter, model: LoadedModel) -> list[Answer]:
    """Return the graded answer to each item, in the order of the items. How many could not be graded is logged.

    Raises:
        ValueError: A prompt cannot be written or is too long; no item has been answered then.
        ConnectionError: A judge does not answer.
    """
    config.require_vocabulary(model.model, "answer a suite")
    suite = loaded_suite.suite
    match suite.grader:
        case config.ChoiceGrader():
            return _choose(suite, suite.grader, loaded_suite.items, prompter, model)
        case config.PerplexityGrader():
            return _measure(suite, loaded_suite.items, prompter, model)
    generated = _generate(suite, loaded_suite.items, prompter, model)
    answers = list(_graded(suite, loaded_suite.items, generated, loaded_suite.grade))
    problems = [answer.problem for answer in answers if answer.problem is not None]
    if problems:
        message = "suite %s: %d of %d answers could not be graded, which widens its interval; the first: %s"
        log.warning(message, suite.name, len(problems), len(answers), problems[0])
    return answers


def check_prompts(loaded_suite: LoadedSuite, prompter: Prompter, model: config.Model) -> None:
    """Raise ValueError if the prompt of an item cannot be written for a model, or is too long for it."""
    config.require_vocabulary(model, "answer a suite")
    suite = loaded_suite.suite
    match suite.grader:
        case config.ChoiceGrader():
            _choices_to_compare(suite.grader, loaded_suite.items, prompter, model)
        case config.PerplexityGrader():
            _texts_to_measure(loaded_suite.items, prompter, model)
        case _:
            _prompts_to_continue(suite, loaded_suite.items, prompter, model)


def prompter_of(loaded: LoadedSuite, tokenizer: Tokenizer, template: str | None) -> Prompter:
    """Return how the questions of a suite are written for a model with this tokenizer and chat template."""
    grader = loaded.suite.grader
    letters = isinstance(grader, config.ChoiceGrader) and grader.compare == "letters"
    return Prompter(loaded.suite.prompt, loaded.examples, tokenizer, template, letters)


def check_length(item: SuiteItem, tokens: int, new_tokens: int, model: config.Model) -> None:
    """Raise ValueError if a prompt of `tokens` tokens leaves no room for `new_tokens` more."""
    if tokens + new_tokens > model.max_seq_len:
        raise ValueError(
            f"{item.location}: the prompt has {tokens} tokens; with {new_tokens} more it exceeds the model's max_seq_len "
            f"{model.max_seq_len}; shorten it, lower generation.max_tokens or use fewer examples"
        )


def _prompts_to_continue(
    suite: config.Suite, items: Sequence[SuiteItem], prompter: Prompter, model: config.Model
) -> list[RenderedPrompt]:
    """Return each item's prompt. Raises ValueError for one without tokens, or that is too long."""
    prompts = [prompter.rendered(item) for item in items]
    for item, prompt in zip(items, prompts, strict=True):
        if not prompt.tokens:
            raise ValueError(f"{item.location}: the prompt has no tokens, so there is nothing to continue; write a question")
        check_length(item, len(prompt.tokens), suite.generation.max_tokens, model)
    return prompts


def _generate(suite: config.Suite, items: Sequence[SuiteItem], prompter: Prompter, model: LoadedModel) -> list[GeneratedText]:
    """Generate an answer to each item."""
    prompts = _prompts_to_continue(suite, items, prompter, model.model)
    options = TextOptions(suite.generation, suite.batch_size, reads_control_tokens(suite.grader))
    add_progress = counted(f"suite {suite.name}", len(items), "items")
    return generate_answers(model, prompter.tokenizer, prompts, options, add_progress)


def _graded(
    suite: config.Suite, items: Sequence[SuiteItem], generated: Sequence[GeneratedText], grade: Grade | None
) -> Iterator[Answer]:
    """Grade generated answers, several at a time with a judge."""

    def graded(item: SuiteItem, answer: GeneratedText) -> Answer:
        if grade is None:
            return Answer(item, answer.text, None, answer.finished, answer.tokens)
        try:
            return Answer(item, answer.text, grade(item, answer.text), answer.finished, answer.tokens)
        except NotGraded as reason:
            return Answer(item, answer.text, None, answer.finished, answer.tokens, f"{item.location}: {reason}")

    if not isinstance(suite.grader, config.JudgeGrader) or grade is None:
        yield from map(graded, items, generated)
        return
    add_progress = counted(f"judging {suite.name}", len(items), "answers")
    with ThreadPoolExecutor(JUDGE_REQUESTS) as threads:
        pending = [threads.submit(graded, item, answer) for item, answer in zip(items, generated, strict=True)]
        try:
            for future in pending:
                yield future.result()
                add_progress(1)
        finally:
            # After an error the requests that have not begun are of no use.
            for future in pending:
                future.cancel()


def _choices_to_compare(
    grader: config.ChoiceGrader, items: Sequence[SuiteItem], prompter: Prompter, model: config.Model
) -> list[Continuation]:
    """Return the tokens of each choice of each item after its prompt. Raises ValueError for one that is too long."""
    continuations = []
    for item in items:
        for i, choice in enumerate(item.choices):
            continuation = prompter.continuation(item, LETTERS[i] if grader.compare == "letters" else choice)
            check_length(item, len(continuation.prompt), len(continuation.text), model)
            continuations.append(continuation)
    return continuations


def _choose(
    suite: config.Suite, grader: config.ChoiceGrader, items: Sequence[SuiteItem], prompter: Prompter, model: LoadedModel
) -> list[Answer]:
    """Find the likeliest choice of each item."""
    continuations = _choices_to_compare(grader, items, prompter, model.model)
    totals = iter(log_likelihoods(model.structure, model.weights, model.mesh, continuations, suite.batch_size))
    answers = []
    for item in items:
        scores = []
        for choice in item.choices:
            length = len(choice) if grader.normalization == "characters" else 1
            scores.append(next(totals) / max(length, 1))
        # Of equally likely choices the first counts, as in lm-evaluation-harness.
        likeliest = item.choices[scores.index(max(scores))]
        answers.append(Answer(item, likeliest, float(likeliest in item.answers), True))
    return answers


def _texts_to_measure(items: Sequence[SuiteItem], prompter: Prompter, model: config.Model) -> list[Continuation]:
    """Return the tokens of each item's expected answer, the first if there are several. Raises ValueError if it is too long."""
    continuations = [prompter.continuation(item, item.answers[0]) for item in items]
    for item, continuation in zip(items, continuations, strict=True):
        check_length(item, len(continuation.prompt), len(continuation.text), model)
    return continuations


def _measure(suite: config.Suite, items: Sequence[SuiteItem], prompter: Prompter, model: LoadedModel) -> list[Answer]:
    """Measure the probability of each item's expected answer, the first if there are several."""
    continuations = _texts_to_measure(items, prompter, model.model)
    totals = log_likelihoods(model.structure, model.weights, model.mesh, continuations, suite.batch_size)
    answers = []
    for item, continuation, total in zip(items, continuations, totals, strict=True):
        length = len(continuation.text)
        score = math.exp(total / length)
        answers.append(Answer(item, item.answers[0], score, True, log_likelihood=total, text_tokens=length))
    return answers
