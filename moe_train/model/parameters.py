"""Conversion between a model and a flat dict {path: array} of its parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.tree_util import PyTreeDef
from jaxtyping import Array, Shaped

from moe_train.machine.compiler_options import brief_options
from moe_train.machine.mesh import platform
from moe_train.model.lora import adaptable
from moe_train.model.moe.layer import MoE
from moe_train.model.transformer import Transformer

Parameters = dict[str, Shaped[Array, "..."]]
"""Arrays of a model by parameter path."""


def parameters(model: Transformer) -> tuple[PyTreeDef, dict[str, Any]]:
    """Split a model into its structure and {path: array}; `combine(structure, …)` is the inverse. Works on abstract models too."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    return structure, {_path_of(keys): leaf for keys, leaf in leaves}


def initial_parameters(model: Callable[[], Transformer], paths: Collection[str]) -> Parameters:
    """Create the parameters of a randomly initialized model at some paths; nothing is computed for the other paths.

    Args:
        model: function that initializes the model (`init_model`).
        paths: paths of the parameters to return.
    """

    def create() -> Parameters:
        return {path: x for path, x in parameters(model())[1].items() if path in paths}

    return jax.jit(create, compiler_options=brief_options(platform()) or None)()


def combine(structure: PyTreeDef, *parts: Parameters) -> Transformer:
    """Build a model from its structure and its parameters, which may be split over several dicts (trainable, frozen)."""
    merged = _merge(parts)
    return structure.unflatten([merged[path] for path in _paths(structure)])


def combine_some(structure: PyTreeDef, *parts: Parameters) -> Transformer:
    """Build a model from some of its parameters. The others are None, and their modules cannot be called."""
    merged = _merge(parts)
    return structure.unflatten([merged.get(path) for path in _paths(structure)])


def _merge(parts: Iterable[Parameters]) -> Parameters:
    merged: Parameters = {}
    for part in parts:
        merged |= part
    return merged


def _paths(structure: PyTreeDef) -> list[str]:
    # Only the paths are needed, so any values will do.
    leaves, _ = jax.tree_util.tree_flatten_with_path(structure.unflatten(range(structure.num_leaves)))
    return [_path_of(keys) for keys, _ in leaves]


def _path_of(keys: tuple[Any, ...]) -> str:
    """Convert the keys of the pytree to `stacks.0.layers.0.attention.q_proj.weight`; a Param's own `.value` is left out."""
    names = [_key_name(key) for key in keys]
    if names[-1] == "value":
        names.pop()
    return ".".join(names)


def _key_name(key: Any) -> str:
    """Return the attribute, index or dict key that a key of a pytree stands for."""
    # Of GetAttrKey, SequenceKey and DictKey in `jax.tree_util`, in this order.
    for attribute in ("name", "idx", "key"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def without_adapters(structure: PyTreeDef) -> PyTreeDef:
    """Return the structure of the same model without its adapters."""
    model = structure.unflatten(range(structure.num_leaves))
    for _, module in adaptable(model):
        if module.lora_a is not None:
            module.lora_a = nnx.data(None)
            module.lora_b = nnx.data(None)
    return jax.tree_util.tree_structure(model)


def with_expert_ids(structure: PyTreeDef) -> PyTreeDef:
    """Return the structure of the same model with `RouterStats` that contain the chosen experts."""
    model = structure.unflatten(range(structure.num_leaves))
    for layer in _sparse(model):
        # Static attributes belong to the structure and not to the leaves, so the parameters stay the same.
        layer.keeps_expert_ids = True
    return jax.tree_util.tree_structure(model)


def with_capacity(structure: PyTreeDef, capacity_factor: float | None) -> PyTreeDef:
    """Return the structure of the same model with experts of limited capacity (see `capacity`); None for no limit."""
    model = structure.unflatten(range(structure.num_leaves))
    for layer in _sparse(model):
        layer.capacity_factor = capacity_factor
    return jax.tree_util.tree_structure(model)


def with_row_balance(structure: PyTreeDef) -> PyTreeDef:
    """Return the structure of the same model whose balance loss is that of each row of a batch (see `RouterStats`)."""
    model = structure.unflatten(range(structure.num_leaves))
    for layer in _sparse(model):
        layer.balances_rows = True
    return jax.tree_util.tree_structure(model)


def _sparse(model: Transformer) -> Iterator[MoE]:
    layers = itertools.chain.from_iterable(stack.layers for stack in model.stacks)
    for layer in layers:
        if isinstance(layer.ffn, MoE):
            yield layer.ffn
