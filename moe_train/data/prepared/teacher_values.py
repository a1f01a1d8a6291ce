"""A teacher's predictions as they are stored: the most likely tokens of every trained position, and the mass of the rest."""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np


class TeacherValues(NamedTuple):
    """Predictions for n trained tokens, in the order of their positions."""

    ids: np.ndarray
    """(n, k) the teacher's most likely tokens, in descending order."""
    logprobs: np.ndarray
    """(n, k) float16: their log-probabilities."""
    tail: np.ndarray
    """(n,) float32: log of the probability of all other tokens."""

    def limited(self, count: int) -> TeacherValues:
        """Return the predictions with the first `count` tokens only; the mass of the others goes to the tail."""
        if count == self.ids.shape[1]:
            return self
        rest = np.logaddexp.reduce(self.logprobs[:, count:].astype(np.float32), axis=1)
        return TeacherValues(self.ids[:, :count], self.logprobs[:, :count], np.logaddexp(self.tail, rest))

    def first(self, count: int) -> Self:
        """Return the predictions for the first `count` trained tokens."""
        return type(self)(*(x[:count] for x in self))
