"""A model with a head for classification or rewards, opened to score texts and conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_train import config
from moe_train.checkpoint.model_dir import open_model
from moe_train.commands.evaluate_suite import template_of
from moe_train.data.chat.classified_to_tokens import scored_tokens
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import located
from moe_train.evaluate.scores import Scorer
from moe_train.machine import progress
from moe_train.model.parameters import combine


class NamedText(NamedTuple):
    """A text or a conversation, and where it is."""

    content: str | Conversation
    location: str


class TextScorer:
    """A run or a model that scores texts; its weights are loaded with the first of them.

    Args:
        directory: the run or model.
        chat_template: a jinja file, its text, or a name; None for the template of the run or of the model's tokenizer.

    Raises:
        FileNotFoundError: there is no model or no tokenizer.
        ValueError: the model predicts tokens and has no head for scores.
    """

    def __init__(self, directory: Path, chat_template: str | None = None) -> None:
        self._opened = open_model(directory)
        if self._opened.model.scores is None:
            raise ValueError(
                f"{directory} is a language model without a head for scores; train one with objective classification or reward"
            )
        self.head: config.ScoreHead = self._opened.model.scores
        self._template = template_of(self._opened, chat_template)
        self._scorer: Scorer | None = None

    def score(self, texts: Sequence[NamedText]) -> np.ndarray:
        """Return (N, Y) the scores of each text, before any softmax.

        Raises:
            ValueError: with its location, for a text that cannot be rendered or is too long; nothing was scored then.
        """
        names = [text.location for text in texts]
        tokens: list[list[int]] = []
        for text in texts:
            ids: Any = located(text.location, scored_tokens, text.content, self._template, self._opened.tokenizer)
            tokens.append(ids)
        with jax.set_mesh(self._opened.mesh):
            if self._scorer is None:
                transformer = combine(*self._opened.load())
                self._scorer = Scorer(transformer, self._opened.model, self._opened.mesh)
            return self._scorer.score(tokens, names, progress.counted("scoring", len(tokens), "texts"))
