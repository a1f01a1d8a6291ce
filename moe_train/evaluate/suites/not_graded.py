"""An answer that could not be graded, for a reason that is not the model's."""

from __future__ import annotations


class NotGraded(Exception):
    """The reason why an answer has no score; its score is unknown, and results allow for any."""
