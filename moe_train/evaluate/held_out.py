"""Loss on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from moe_train.data.batches.loader import Loader
from moe_train.evaluate.routing import Drift, DriftSums, _drift_figures
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import Parameters


def evaluate(
    sums: Callable[..., Any],
    params: Parameters,
    frozen: Parameters,
    loader: Loader,
    mesh: Mesh,
    batches: int | None = None,
    drift: Drift | None = None,
) -> dict[str, Any]:
    """{loss: mean cross-entropy in nats over loss_tokens tokens} of the first `batches` batches (None: all).

    sums: what `make_batch_sums` made. With `drift` also, of its first batches, routing_drift[l], the share of layer l's
    assignments that the base model makes otherwise, and dead_experts[l], the share of experts that got less than 1% of
    an even share.
    """
    assert loader.batches is not None  # held-out data end
    loss, tokens, late = 0.0, 0, None
    drifted: list[DriftSums] = []
    for i in range(loader.batches if batches is None else min(batches, loader.batches)):
        batch = put_batch(loader.batch(i), mesh)
        if drift is not None and i < drift.batches:
            compared, now = drift.sums(params, frozen, batch, drift.originals)
            drifted.append(compared)
        else:
            now = sums(params, frozen, batch)
        if late is not None:  # read one batch late, so that the device does not wait
            loss, tokens = loss + float(late[0]), tokens + int(late[1])
        late = now
    if late is not None:
        loss, tokens = loss + float(late[0]), tokens + int(late[1])
    return {"loss": loss / tokens if tokens else math.nan, "loss_tokens": tokens, **_drift_figures(drifted)}
