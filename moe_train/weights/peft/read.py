"""Read PEFT adapters, per-expert or fused."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.machine.files import JsonObject
from moe_train.model.parameters import Parameters
from moe_train.model.paths import ParameterPath, adapter_ranks
from moe_train.weights import names, on_disk, safetensors_files
from moe_train.weights.arrays import Abstract, fill
from moe_train.weights.on_disk import FileTensor
from moe_train.weights.peft import fused
from moe_train.weights.peft.pieces import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ROUTER_IN_ADAPTERS,
    ROUTER_OF_TRANSFORMERS,
    adaptable_pieces,
    has_linear_experts,
    matrix_for_each_expert,
    saved_pieces,
    tied_head,
)
from moe_train.weights.peft.selected import check_ranks, num_modules, unselected_modules
from moe_train.weights.peft.settings import MERGE_FIRST, read_settings
from moe_train.weights.peft.stacks import Stacks, stacks_of
from moe_train.weights.peft.tower import adaptable_tower, saved_tower
from moe_train.weights.wrappers import tower_pieces

log = logging.getLogger(__name__)


def read_lora(directory: str | Path, model: config.Model, encoder: config.Encoder | None = None) -> config.Lora:
    """Return the section `lora` that describes an adapter.

    Args:
        directory: the adapter.
        model: the architecture of the base.
        encoder: sizes of the tower of the base; None to refuse adapters of one.

    Raises:
        ValueError: the adapter is not supported.
    """
    return _open(Path(directory), model, encoder).lora


def load_adapter(
    directory: str | Path, model: config.Model, abstract: Abstract, encoder: config.Encoder | None = None
) -> Parameters:
    """Read the adapters of a PEFT directory, and its modules_to_save, into arrays.

    Adapters with a smaller rank or another scale than their stack's are padded and scaled, as `stacks` describes.

    Args:
        directory: the adapter.
        model: the architecture of the base.
        abstract: {path: shape, dtype and sharding}, from a model with the section `read_lora(directory, model, encoder)`.
        encoder: as in `read_lora`.

    Raises:
        ValueError: the files have other tensors than the section states.
    """
    opened = _open(Path(directory), model, encoder)
    tensors = dict(opened.tensors)
    ranks = adapter_ranks(abstract)
    saved = [piece for piece in saved_pieces(model, opened.layout) if piece.path in abstract]
    if model.tie_embeddings:
        # `_trained_in_full` has checked that both names of a tied table hold the same values.
        second = tied_head(model, opened.layout).name
        saved = [piece for piece in saved if piece.name != second]
        tensors.pop(second, None)
    table = [*names.lora_pieces(model, ranks, opened.layout), *saved]
    if encoder is not None:
        table += tower_pieces.adapter_pieces(encoder, model, ranks)
        table += [piece for piece in saved_tower(encoder, model) if piece.path in abstract]
    for piece in table:
        if ParameterPath.parse(piece.path).module in opened.stacks.padded:
            factor = opened.stacks.factors_of_b.get(piece.name, 1.0)
            tensors[piece.name] = _Padded(piece.name, piece.shape, tensors.get(piece.name), factor)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    names.check_file_tensors(directory, table, shapes, {path: like.shape for path, like in abstract.items()})
    return fill(abstract, table, tensors)


class _Padded(NamedTuple):
    """A matrix of a file, or none at all, times a factor and padded with zeros to a shape."""

    name: str
    shape: tuple[int, ...]
    tensor: FileTensor | None
    factor: float

    @property
    def dtype(self) -> np.dtype:
        """Dtype of what `read` returns."""
        # A product with the factor is rounded to float32 at most.
        return np.dtype(np.float32) if self.tensor is None or self.factor != 1 else self.tensor.dtype

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Read the part at `index` of the padded matrix."""
        padded = np.zeros(self.shape, self.dtype)
        if self.tensor is not None:
            # At the beginning of each dim: only the rank differs, and zeros in both factors add nothing to their product.
            values = self.tensor.read()
            if self.factor != 1:
                values = values.astype(np.float64) * self.factor
            padded[tuple(slice(size) for size in self.tensor.shape)] = values
        return padded[index]


class _Opened(NamedTuple):
    """An adapter, under the names of a file with a matrix for each expert."""

    tensors: dict[str, FileTensor]
    layout: names.TensorLayout
    """The names of the base: those of a text model, or of one inside a vision wrapper."""
    stacks: Stacks
    lora: config.Lora


def _open(directory: Path, model: config.Model, encoder: config.Encoder | None) -> _Opened:
    """Open an adapter. Raises ValueError if it is not supported."""
    settings = read_settings(directory)
    stored = safetensors_files.open_safetensors(directory / ADAPTER_WEIGHTS)
    if modules := unselected_modules(stored, settings):
        if len(modules) == num_modules(stored):
            raise ValueError(
                f"{directory / ADAPTER_CONFIG} selects no module that {ADAPTER_WEIGHTS} adapts (such as {modules[0]}), with "
                "which PEFT cannot load it; correct target_modules, exclude_modules or layers_to_transform"
            )
        _warn_of_unselected(str(directory), modules[0], len(modules))
    layout = matrix_for_each_expert(names.detect_adapted(stored, model), model)
    if encoder is None:
        _refuse_tower(directory, stored)
    tensors = _tensors_in_layers(directory, settings, stored, model, layout)
    # Files with fused adapters state alphas under the fused names, which are split here like the tensors.
    if settings.get("target_parameters"):
        settings["alpha_pattern"] = fused.alpha_pattern(settings, model)
    adaptable = adaptable_pieces(model, layout)
    saved = saved_pieces(model, layout)
    if encoder is not None:
        adaptable += adaptable_tower(encoder, model)
        saved += saved_tower(encoder, model)
    stacks = stacks_of(directory, settings, tensors, adaptable)
    # Checked by name alone here; `load_adapter` checks the shapes.
    known_names = {piece.name for piece in (*adaptable, *saved)}
    if unknown := sorted(tensors.keys() - known_names):
        raise ValueError(
            f"{directory / ADAPTER_WEIGHTS} has {unknown[0]}, which this model has no place for; name the base that it "
            f"was trained on, or {MERGE_FIRST}"
        )
    check_ranks(directory / ADAPTER_WEIGHTS, stored, settings)
    lora = config.Lora(
        targets=stacks.targets,
        rslora=bool(settings.get("use_rslora")),
        dropout=float(settings.get("lora_dropout") or 0.0),
        train=_trained_in_full(directory / ADAPTER_CONFIG, settings, tensors, model, saved),
    )
    return _Opened(tensors, layout, stacks, lora)


@functools.cache
def _warn_of_unselected(directory: str, module: str, count: int) -> None:
    """Warn, once for each adapter, of tensors that PEFT would leave out."""
    log.warning(
        "%s has adapters of %d modules that its %s does not select (such as %s, by target_modules, exclude_modules or "
        "layers_to_transform); they are read, while PEFT leaves them out: correct the settings, or remove the tensors",
        directory,
        count,
        ADAPTER_CONFIG,
        module,
    )


def _refuse_tower(directory: Path, stored: Collection[str]) -> None:
    """Raise ValueError if tensors belong to a tower or projector."""
    if outside := sorted(name for name in stored if any(part in name for part in names.OUTSIDE_TEXT)):
        raise ValueError(
            f"{directory / ADAPTER_WEIGHTS} has {outside[0]}: {len(outside)} of its tensors adapt the tower or projector, which "
            f"only training with a section vision or audio reads (lora.init_from); {MERGE_FIRST}"
        )


def _tensors_in_layers(
    directory: Path,
    settings: JsonObject,
    stored: Mapping[str, FileTensor],
    model: config.Model,
    layout: names.TensorLayout,
) -> dict[str, FileTensor]:
    """Return the tensors with fused experts split, and without the copies of the base's tables that PEFT adds to adapted ones.

    Raises:
        ValueError: a tensor has another shape than the base.
    """
    tensors: dict[str, FileTensor] = {}
    table = (model.vocab_size, model.model_dim)
    for name, tensor in stored.items():
        stem = name.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
        if f"{stem}.weight" in (layout.embed.name, layout.head.name) and name.endswith(".base_layer.weight"):
            if tensor.shape != table:
                raise ValueError(
                    f"{directory / ADAPTER_WEIGHTS}: {name} has shape {tensor.shape}, but the base's is {table}: the adapter "
                    "belongs to a base with another vocabulary"
                )
            continue
        if has_linear_experts(model) and isinstance(model.ffn, config.MoeFfn) and ".lora_" in name:
            # Files may have transformers 5's name of the router; the tables have the one that is written.
            name = name.replace(f".{ROUTER_OF_TRANSFORMERS}.", f".{ROUTER_IN_ADAPTERS}.")
        tensors[name] = tensor
    if isinstance(model.ffn, config.MoeFfn):
        tensors = fused.split_fused(directory / ADAPTER_WEIGHTS, tensors, model, settings)
    return tensors


def _trained_in_full(
    file: Path,
    settings: JsonObject,
    tensors: dict[str, FileTensor],
    model: config.Model,
    pieces: Sequence[names.WeightPiece],
) -> tuple[str, ...]:
    """Return the modules whose full weights are in the files. Raises ValueError if modules_to_save contradicts them.

    Args:
        file: adapter_config.json, for messages.
        settings: its content.
        tensors: tensors by name.
        model: the architecture of the base.
        pieces: the weights that can be saved in full.
    """
    saved = {
        piece.name.removesuffix(".weight"): ParameterPath.parse(piece.path).module for piece in pieces if piece.name in tensors
    }
    for module in settings.get("modules_to_save") or ():
        if not any(name.endswith(module) for name in saved):
            raise ValueError(f"{file}: modules_to_save has {module!r}, but {ADAPTER_WEIGHTS} has no weight of it; save it again")
    if model.tie_embeddings and "embed" in saved.values():
        ends = [name for name, module in saved.items() if module == "embed"]
        if len(ends) < 2 or not on_disk.have_same_content(*(tensors[f"{name}.weight"] for name in ends)):
            raise ValueError(
                f"{file}: {min(ends)} was trained separately from the other end, but this model ties embedding and head; train "
                "with PEFT's ensure_weight_tying"
            )
    return tuple(sorted(set(saved.values())))
