"""Outputs of the reference for full training: computed once with the model before training, and stored with the prepared sets.

With adapters there is nothing to store, since the reference is the model without them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.tree_util import PyTreeDef

from moe_train import config
from moe_train.checkpoint.identity import base_origin
from moe_train.checkpoint.metadata import WeightOrigin
from moe_train.checkpoint.model_dir import load_parameters
from moe_train.data.batches.answer_batches import SharedPromptBatch, UnpairedBatch
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.batches.sources import RowSource
from moe_train.data.prepared.reference import (
    ReferenceIdentity,
    ReferenceWriter,
    StoredExperts,
    StoredReference,
    reference_folder,
)
from moe_train.data.prepared.reference_values import ReferenceValues
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.agreement import exchange
from moe_train.machine.files import new_directory
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.model.moe.drift import experts_by_position
from moe_train.model.parameters import Parameters, combine, parameters, with_expert_ids
from moe_train.model.transformer import abstract_model
from moe_train.run.inputs import RunInputs
from moe_train.run.shared_prompt import with_layout
from moe_train.run.start import Start
from moe_train.train.objectives.choose import objective_of_run
from moe_train.train.objectives.objective import Objective
from moe_train.train.token_logprobs import batch_logprobs

Say = Callable[[str], None]


class ReferenceModel(NamedTuple):
    """The model whose log-probabilities are stored."""

    structure: PyTreeDef
    base: WeightOrigin
    load: Callable[[], Parameters]
    """Returns its weights on the mesh in force."""


def add_reference(run: config.Run, inputs: RunInputs, begin: Start, objective: Objective, mesh: Mesh, say: Say) -> None:
    """Give the loaders of a full training run the log-probabilities of the model before training; compute those that are missing.

    Nothing happens if the objective needs no reference, or if it is the model without its adapters.

    Raises:
        ValueError: The run starts from random weights, or a set holds log-probabilities of another model or other tokens.
    """
    if not objective.uses_reference or begin.state.frozen:
        return
    if begin.base is None:
        raise ValueError(
            f"objective {run.objective.name} compares with the model before training, and this one starts from random weights; "
            "state init_from, or a loss without a reference (simpo, orpo)"
        )
    loader = loader_of_all(run, inputs.tokenizer, objective)
    model = ReferenceModel(begin.structure, begin.base, partial(_weights, begin, begin.base))
    references = stored_references(run, loader, model, mesh, say)
    num_train = len(inputs.train.sources)
    inputs.train.add_references(references[:num_train])
    if inputs.held_out is not None:
        inputs.held_out.add_references(references[num_train:])


def store_reference(run: config.Run, tokenizer: Tokenizer, say: Say) -> None:
    """Store the log-probabilities of `init_from` with the prepared sets of a run, before it starts.

    Raises:
        ValueError: The run reads none that are stored.
    """
    init_from = run.init_from
    if not objective_of_run(run).uses_reference or run.lora is not None or init_from is None:
        raise ValueError(
            "--reference has no effect: only full training from init_from, on an objective with a reference, reads stored "
            "log-probabilities; leave it out"
        )
    mesh = make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        run = with_layout(run)
        objective = objective_of_run(run)
        structure, shapes = parameters(abstract_model(run.model, run.compute, run.lora, run.encoder))
        base = base_origin(init_from)
        model = ReferenceModel(structure, base, partial(load_parameters, base.source, shapes, base.step))
        stored_references(run, loader_of_all(run, tokenizer, objective), model, mesh, say)


def stored_references(run: config.Run, loader: Loader, model: ReferenceModel, mesh: Mesh, say: Say) -> list[StoredReference]:
    """Return the log-probabilities of each source of a loader, and compute those that are missing; `mesh` must be in force.

    Raises:
        ValueError: A set holds log-probabilities of another model or other tokens.
    """
    model_sha256 = model_hash(model.base)
    experts = stored_experts(run.model)
    shares_prompts = issubclass(loader.batch_type, SharedPromptBatch)
    references = []
    for i, source in enumerate(loader.sources):
        fitting = source.lengths[source.lengths <= run.train.seq_len]
        sizes = (int(source.lengths.sum()), int(fitting.sum()))
        ids_per_position = 0 if experts is None else experts.ids_per_position
        identity = ReferenceIdentity(source.store.manifest.hash, model_sha256, *sizes, shares_prompts, ids_per_position)
        named = isinstance(source.section, config.PreparedSource)
        cache_dir = run.training_data().cache_dir
        folder = reference_folder(source.store.path, cache_dir, source.store.manifest, identity, named)
        if not folder.exists():
            size = identity.positions * (4 if experts is None else 4 + experts.bytes_per_position)
            say(f"computing the reference log-probabilities of {source.name}, once: {folder} ({size / 1e6:,.1f} MB)")
            with contextlib.ExitStack() as exit_stack:
                writer = None
                if jax.process_index() == 0:
                    writer = ReferenceWriter(exit_stack.enter_context(new_directory(folder)), identity, experts)
                _compute(loader, i, model, mesh, writer)
                if writer is not None:
                    writer.finish()
            # All processes read what the first one wrote.
            exchange("written", "the reference log-probabilities")
        references.append(StoredReference(folder, identity, source.lengths, experts))
    return references


def stored_experts(model: config.Model) -> StoredExperts | None:
    """Return the experts of a reference model that are stored beside its log-probabilities; None for a dense model."""
    if not isinstance(model.ffn, config.MoeFfn):
        return None
    return StoredExperts(len(config.sparse_layers(model)), model.ffn.experts_per_token, model.ffn.num_experts)


def model_hash(base: WeightOrigin) -> str:
    """Return one hash over every byte of a run's initial weights."""
    return hashlib.sha256(json.dumps(dict(base.hashes), sort_keys=True).encode()).hexdigest()


def loader_of_all(run: config.Run, tokenizer: Tokenizer, objective: Objective) -> Loader:
    """Return a loader that yields each example of all sources once, in batches of one microbatch."""
    data = run.training_data()
    sources = tuple(source.model_copy(update={"weight": None}) for source in (*data.train, *data.eval))
    rows = BatchRows(run.train.batch_size // run.train.microbatches, run.train.seq_len, jax.process_index(), jax.process_count())
    every = data.model_copy(update={"eval": sources})
    return Loader(every, "eval", tokenizer, rows, seed=run.seed, batch_type=objective.batch_type)


def _weights(begin: Start, base: WeightOrigin) -> Parameters:
    """Return the weights before training: those of the state of a new run, otherwise loaded again."""
    if not begin.resumed:
        return begin.state.learned
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), begin.state.learned)
    return load_parameters(base.source, shapes, base.step)


def _compute(loader: Loader, index: int, model: ReferenceModel, mesh: Mesh, writer: ReferenceWriter | None) -> None:
    """Compute the outputs of the reference on a source of a loader; all processes take part, and one of them has a writer."""
    outputs_of = jax.jit(partial(_outputs, with_expert_ids(model.structure)))
    weights = model.load()
    source: RowSource = loader.sources[index]
    ends = np.cumsum(source.lengths)
    assert loader.batches is not None
    for step in range(loader.batches):
        rows = loader.pieces(step)
        if all(number != index for number, _ in rows):
            continue
        outputs = outputs_of(weights, put_batch(loader.batch(step), mesh))
        logprobs_BT, expert_ids_BTX = multihost_utils.process_allgather(outputs, tiled=True)
        if writer is None:
            continue
        for row, (number, pieces) in enumerate(rows):
            position = 0
            for piece in pieces if number == index else ():
                own = slice(position, position + piece.length)
                expert_ids = None if expert_ids_BTX is None else expert_ids_BTX[row, own]
                writer.write(int(ends[piece.example]) - piece.length, ReferenceValues(logprobs_BT[row, own], expert_ids))
                position += piece.length


def _outputs(structure: PyTreeDef, weights: Parameters, batch: Any) -> tuple[jax.Array, jax.Array | None]:
    """Return the log-probabilities of all targets of a batch, mismatched segments included, and the ids of experts by position."""
    if isinstance(batch, UnpairedBatch):
        batch = batch._replace(segment_ids=batch.segment_ids + batch.mismatched_ids)
    logprobs, routers = batch_logprobs(combine(structure, weights), batch)
    if routers is None:
        return logprobs.logprob, None
    assert routers.expert_ids is not None  # the structure keeps them
    return logprobs.logprob, experts_by_position(routers.expert_ids)
