"""Loss on held-out data."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_train import config
from moe_train.data.conversation import normalise, recognise
from moe_train.data.fields import located
from moe_train.data.loader import Loader
from moe_train.data.sources import open_source
from moe_train.mesh import BATCH, put_batch
from moe_train.model.transformer import Parameters, Transformer, combine, with_expert_ids
from moe_train.model_dir import open_model
from moe_train.train.loss import cross_entropy_sum


def batch_sums(params: Parameters, frozen: Parameters, batch: Any, structure: Any) -> tuple[jax.Array, jax.Array]:
    """(sum of the cross-entropy, loss-bearing tokens) of a batch."""
    model = combine(structure, params, frozen)
    hidden_BTD, _ = model(batch.tokens, batch.positions, batch.segment_ids)
    return _batch_sums(model, hidden_BTD, batch)


def _batch_sums(model: Transformer, hidden_BTD: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    beside = model.beside_head(hidden_BTD)
    total = cross_entropy_sum(hidden_BTD, model.head_weight(), batch.targets, batch.loss_mask, beside)
    return total, jnp.sum(batch.loss_mask)


def make_batch_sums(structure: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`batch_sums` of a model's structure, compiled once for all evaluations of a run."""
    return jax.jit(partial(batch_sums, structure=structure))


class Drift(NamedTuple):
    """How the routing of a model with adapters is compared with that of its base."""

    sums: Callable[..., tuple[DriftSums, tuple[jax.Array, jax.Array]]]
    """What `make_drift_sums` made."""
    originals: Parameters
    """The base's weights of what is trained in full beside the adapters."""
    batches: int
    """The first ones, each with a second forward pass."""


class DriftSums(NamedTuple):
    """Of one batch, or of several."""

    changed_L: Any
    """Assignments to experts that the base does not choose for the token."""
    load_LE: Any
    """Assignments to each expert."""
    assignments: Any
    """Of one layer."""


def drift_sums(
    params: Parameters, frozen: Parameters, batch: Any, originals: Parameters, structure: Any
) -> tuple[DriftSums, tuple[jax.Array, jax.Array]]:
    """The assignments of a batch beside the base model's, and its `batch_sums`."""
    tokens = batch.tokens, batch.positions, batch.segment_ids
    model = combine(with_expert_ids(structure), params, frozen)
    hidden_BTD, routers = model(*tokens)
    _, base = combine(with_expert_ids(structure, adapters=False), originals, frozen)(*tokens)
    assert routers is not None and base is not None and routers.expert_ids is not None and base.expert_ids is not None
    ids_LBTA, base_LBTA = routers.expert_ids, base.expert_ids
    kept_LBTA = jnp.any(ids_LBTA[..., :, None] == base_LBTA[..., None, :], axis=-1)
    valid_BT = batch.segment_ids != 0
    assignments = jnp.sum(valid_BT) * ids_LBTA.shape[-1]
    changed_L = jnp.sum(~kept_LBTA & valid_BT[None, ..., None], axis=(1, 2, 3))
    sums = DriftSums(changed_L, routers.chosen_E, assignments)
    return sums, _batch_sums(model, hidden_BTD, batch)


def make_drift_sums(structure: Any) -> Callable[..., tuple[DriftSums, tuple[jax.Array, jax.Array]]]:
    """`drift_sums` of a model's structure, compiled once for all evaluations of a run."""
    return jax.jit(partial(drift_sums, structure=structure))


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


def _drift_figures(drifted: Sequence[DriftSums]) -> dict[str, Any]:
    if not drifted:
        return {}
    sums = jax.tree.map(lambda *xs: np.sum(xs, axis=0, dtype=np.float64), *jax.device_get(drifted))
    share_LE = sums.load_LE / sums.assignments
    return {
        "routing_drift": (sums.changed_L / sums.assignments).tolist(),
        "dead_experts": np.mean(share_LE < 0.01 / share_LE.shape[1], axis=1).tolist(),
    }


def evaluate_dir(directory: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Loss of a run (its newest checkpoint) or a Hugging Face model on files of text or conversations.

    Rows are as long as the run's; of a model that is no run, at most 2048.
    """
    opened = open_model(directory)
    run, mesh = opened.run, opened.mesh
    seq_len = run.train.seq_len if run else min(opened.model.max_seq_len, 2048)
    replicas = math.prod(mesh.shape[axis] for axis in BATCH)
    batch_size = run.train.batch_size // run.train.microbatches if run else replicas * max(1, 8 // replicas)
    batch_size += -batch_size % replicas
    sources = tuple(config.FileSource(name="files", files=(str(file),), record=_record(file, run)) for file in files)
    template = run.data.chat_template if run and run.data else None
    with tempfile.TemporaryDirectory() as cache, jax.set_mesh(mesh):
        data = config.Data(chat_template=template, train=sources, eval=sources, cache_dir=cache)
        loader = Loader(data, "eval", opened.tokenizer, batch_size=batch_size, seq_len=seq_len, seed=0)
        structure, params = opened.load()
        found = evaluate(make_batch_sums(structure), params, {}, loader, mesh)
    if not math.isfinite(found["loss"]):
        raise RuntimeError(
            f"the loss of {directory} on {found['loss_tokens']} tokens is {found['loss']}: its weights are past help"
        )
    return {
        **found,
        "perplexity": math.exp(min(found["loss"], 700)),
        "records": loader.num_records,
        "records_truncated": loader.num_truncated,
        "seq_len": seq_len,
    }


def _record(file: Path, run: config.Config | None) -> config.Record:
    """How to read a file, by its first record: as the run reads its own, where that is possible, else as its columns say."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file to evaluate on")
    text = config.TextRecord(name="text")
    records = open_source(config.FileSource(name="files", files=(str(file),), record=text))
    origin, first = next(iter(records), (None, {"text": ""}))  # without any, the loader says so
    where = str(file) if origin is None else records.where(origin)
    sources = (*run.data.eval, *run.data.train) if run and run.data else ()
    own = [source.record for source in sources if isinstance(source, config.RecordSource)]
    record = next((r for r in own if _readable(first, r)), None) or located(where, recognise, first)
    return record if isinstance(record, config.TextRecord) else record.model_copy(update={"too_long": "truncate"})


def _readable(fields: dict[str, Any], record: config.Record) -> bool:
    try:
        normalise(fields, record)
    except ValueError:
        return False
    return True
