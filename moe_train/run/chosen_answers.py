"""A warning when the answers that a run prefers become less likely than they were, which a preference loss alone permits."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from moe_train import config

STEPS = 10
"""Number of logged steps whose mean counts."""
NATS = 1.0
"""Fall of the mean log-probability of an answer, in nats, that is worth a line."""


class ChosenAnswers:
    """Follows `rewards/chosen`, and says once that preferred answers have become less likely than under the reference."""

    def __init__(self, objective: config.Objective) -> None:
        self._objective = objective
        self._recent: deque[float] = deque(maxlen=STEPS)
        self._has_warned = False

    def warning(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """Return a line after a step if its metrics are the first that call for it; None otherwise."""
        section = self._objective
        if self._has_warned or not isinstance(section, config.Preference | config.UnpairedPreference):
            return None
        if isinstance(section, config.Preference) and not section.has_reference:
            return None
        self._recent.append(metrics["rewards/chosen"] / section.beta)
        mean = sum(self._recent) / len(self._recent)
        if len(self._recent) < STEPS or not mean < -NATS:
            return None
        self._has_warned = True
        remedy = "raise objective.desirable_weight"
        if isinstance(section, config.Preference):
            remedy = f"raise objective.sft_weight ({section.sft_weight:g} now; 0.1 to 1 is usual)"
        return (
            f"WARNING: step {step}: preferred answers have become less likely than under the reference, by {-mean:.2g} nats on "
            f"average over {STEPS} steps: the loss asks only that others fall further. To keep them likely, {remedy}, or lower "
            "optimizer.learning_rate"
        )
