"""Check that a model gives the answers that an earlier evaluation recorded, item by item.

Two programs that compute the same function round differently, so that a greedy answer may take the other of two tokens that are
as good as equal. Such answers are counted apart: at the first token that differs, the model must find both tokens equally likely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moe_train.evaluate.suites.answer import Answer
from moe_train.evaluate.suites.generation import LoadedModel
from moe_train.evaluate.suites.likelihood import Continuation, log_likelihoods
from moe_train.evaluate.suites.load import LoadedSuite
from moe_train.evaluate.suites.prompts import Prompter
from moe_train.machine.files import JsonObject

NEAR_TIE = 1e-3
"""Largest difference of the log-probabilities of two tokens that count as equally likely, in nats."""
LIKELIHOOD_TOLERANCE = 1e-3
"""Largest relative difference of log-likelihoods that count as equal."""


class Reproduction(NamedTuple):
    """How the answers to one suite compare with those that were recorded."""

    suite: str
    items: int
    near_ties: int
    """Number of answers that differ after two tokens that are equally likely."""
    differing: Sequence[str]
    """Ids of the items that are answered otherwise for no such reason."""

    def in_words(self) -> str:
        """Describe the comparison in a line."""
        equal = self.items - self.near_ties - len(self.differing)
        text = f"{equal} of {self.items} answers equal"
        if self.near_ties:
            text += f", {self.near_ties} differ after two equally likely tokens"
        if self.differing:
            text += f", {len(self.differing)} differ, the first item {self.differing[0]}"
        return text


def compare_answers(
    loaded: LoadedSuite, prompter: Prompter, model: LoadedModel, answers: Sequence[Answer], recorded: Mapping[str, JsonObject]
) -> Reproduction:
    """Compare answers with recorded ones.

    Args:
        loaded: The suite.
        prompter: How its questions are written for the model.
        model: The model that gave the answers; its mesh has to be in force.
        answers: The answers.
        recorded: The recorded answer of each item, by the item's id.

    Raises:
        ValueError: The items are not those that were recorded.
    """
    if missing := sorted({answer.item.id for answer in answers} ^ recorded.keys()):
        raise ValueError(f"suite {loaded.suite.name}: item {missing[0]} is not in both the suite and the record; restore the items")
    differing: list[str] = []
    doubtful: list[tuple[Answer, JsonObject]] = []
    for answer in answers:
        earlier = recorded[answer.item.id]
        if answer.log_likelihood is not None:
            before = float(earlier["log_likelihood"])
            if abs(answer.log_likelihood - before) > LIKELIHOOD_TOLERANCE * abs(before):
                differing.append(answer.item.id)
        elif list(answer.tokens) != earlier["tokens"]:
            doubtful.append((answer, earlier))
        elif answer.text != earlier["text"]:
            differing.append(answer.item.id)  # another choice, or a tokenizer that decodes otherwise
    near_ties = 0
    for answer, earlier in doubtful:
        # A sampled answer has no two best tokens.
        greedy = loaded.suite.generation.temperature == 0
        if greedy and _is_near_tie(loaded, prompter, model, answer, earlier["tokens"]):
            near_ties += 1
        else:
            differing.append(answer.item.id)
    return Reproduction(loaded.suite.name, len(answers), near_ties, differing)


def _is_near_tie(loaded: LoadedSuite, prompter: Prompter, model: LoadedModel, answer: Answer, earlier: Sequence[int]) -> bool:
    """Return whether the first tokens that differ are equally likely to the model."""
    same = 0
    while same < min(len(answer.tokens), len(earlier)) and answer.tokens[same] == earlier[same]:
        same += 1
    prompt = [*prompter.tokens(answer.item), *answer.tokens[:same]]
    likelihoods = []
    for tokens in (answer.tokens, earlier):
        # Where an answer has ended, the token was one of those that end it.
        candidates = [tokens[same]] if same < len(tokens) else list(prompter.tokenizer.end_ids)
        continuations = [Continuation(prompt, [token]) for token in candidates]
        totals = log_likelihoods(model.structure, model.weights, model.mesh, continuations, loaded.suite.batch_size)
        likelihoods.append(max(totals))
    return abs(likelihoods[0] - likelihoods[1]) <= NEAR_TIE
