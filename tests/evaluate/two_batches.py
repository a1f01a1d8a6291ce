"""A loader of two batches of 8 rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from moe_train.data.batches.batch import Batch
from tests.train.tiny_step import batch

# The second bears loss on more tokens.
HALVES = [Batch(*(x[rows] for x in batch())) for rows in (slice(8), slice(8, 16))]
LOADER: Any = SimpleNamespace(batches=2, batch=lambda i: HALVES[i])
