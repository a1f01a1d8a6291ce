"""What is stored of a reference model for one example."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class ReferenceValues(NamedTuple):
    """Outputs of a reference model at the n positions of an example."""

    logprobs: np.ndarray
    """(n,) float32 log-probability of each target."""
    expert_ids: np.ndarray | None = None
    """(n, L * A) uint8 or uint16: the A experts that each of the L routers chooses; None for a dense model."""
