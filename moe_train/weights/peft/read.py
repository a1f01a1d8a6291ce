"""Read PEFT adapters, per-expert or fused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.machine.files import JsonObject, read_object
from moe_train.model.parameters import Parameters
from moe_train.model.paths import ParameterPath, adapter_ranks, of_module
from moe_train.weights import names, on_disk, safetensors_files
from moe_train.weights.arrays import Abstract, fill
from moe_train.weights.on_disk import FileTensor
from moe_train.weights.peft import fused
from moe_train.weights.peft.pieces import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DOWN,
    GATE,
    ROUTER_IN_ADAPTERS,
    ROUTER_OF_TRANSFORMERS,
    UP,
    adaptable_pieces,
    has_linear_experts,
    saved_pieces,
    tied_head,
)
from moe_train.weights.peft.settings import MERGE_FIRST, alpha_of, read_settings
from moe_train.weights.serve import AdapterShape


def read_lora(directory: str | Path, model: config.Model) -> config.Lora:
    """Return the section `lora` that describes an adapter. Raises ValueError if it is not supported."""
    directory = Path(directory)
    settings = read_settings(directory)
    tensors, layout = _open(directory, model)
    # Files with fused adapters state alphas under the fused names, which are split here like the tensors.
    if settings.get("target_parameters"):
        settings["alpha_pattern"] = fused.alpha_pattern(settings, model)
    owners = _adapter_owners(directory, settings, tensors, model, layout)
    # Checked by name alone here; `load_adapter` checks the shapes.
    known_names = {piece.name for piece in (*adaptable_pieces(model, layout), *saved_pieces(model, layout))}
    if unknown := sorted(tensors.keys() - known_names):
        raise ValueError(
            f"{directory / ADAPTER_WEIGHTS} has {unknown[0]}, which this model has no place for; name the base that it "
            f"was trained on, or {MERGE_FIRST}"
        )
    return config.Lora(
        targets=_targets(owners, model),
        rslora=bool(settings.get("use_rslora")),
        dropout=float(settings.get("lora_dropout") or 0.0),
        train=_trained_in_full(directory / ADAPTER_CONFIG, settings, tensors, model, layout),
    )


def load_adapter(directory: str | Path, model: config.Model, abstract: Abstract) -> Parameters:
    """Read the adapters of a PEFT directory, and its modules_to_save, into arrays.

    Adapters with a smaller rank than their stack's are padded with zeros.

    Args:
        directory: the adapter.
        model: the architecture of the base.
        abstract: {path: shape, dtype and sharding}, from a model with the section `read_lora(directory, model)`.

    Raises:
        ValueError: the files have other tensors than the section states.
    """
    tensors, layout = _open(Path(directory), model)
    ranks = adapter_ranks(abstract)
    saved = [piece for piece in saved_pieces(model, layout) if piece.path in abstract]
    if model.tie_embeddings:
        # `read_lora` has checked that both names of a tied table hold the same values.
        second = tied_head(model, layout).name
        saved = [piece for piece in saved if piece.name != second]
        tensors.pop(second, None)
    table = [*names.lora_pieces(model, ranks, layout), *saved]
    lora = read_lora(directory, model)
    # Where several targets share the experts of a module, the stack has the largest rank, and experts without an adapter get zeros.
    shared = {m for m in ranks if any(target.experts is not None for target in lora.targets_of(of_module(m).module))}
    padded: dict[str, FileTensor] = dict(tensors)
    for piece in table:
        if ParameterPath.parse(piece.path).module_path in shared:
            padded[piece.name] = _Padded(piece.name, piece.shape, tensors.get(piece.name))
    shapes = {name: tensor.shape for name, tensor in padded.items()}
    names.check_file_tensors(directory, table, shapes, {path: like.shape for path, like in abstract.items()})
    return fill(abstract, table, padded)


class _Padded(NamedTuple):
    """A matrix of a file, or none at all, padded with zeros to a shape."""

    name: str
    shape: tuple[int, ...]
    tensor: FileTensor | None

    @property
    def dtype(self) -> np.dtype:
        """Dtype of what `read` returns."""
        return np.dtype(np.float32) if self.tensor is None else self.tensor.dtype

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Read the part at `index` of the padded matrix."""
        padded = np.zeros(self.shape, self.dtype)
        if self.tensor is not None:
            # At the beginning of each dim: only the rank differs, and zeros in both factors add nothing to their product.
            padded[tuple(slice(size) for size in self.tensor.shape)] = self.tensor.read()
        return padded[index]


class _Opened(NamedTuple):
    """The tensors of an adapter, by the names of a per-expert file."""

    tensors: dict[str, FileTensor]
    layout: names.TensorLayout
    """The names of the base: those of a text model, or of one inside a vision wrapper."""


def _open(directory: Path, model: config.Model) -> _Opened:
    """Open tensors under the names of a per-expert file, without the copies of the base's tables that PEFT adds to adapted ones."""
    tensors: dict[str, FileTensor] = {}
    table = (model.vocab_size, model.model_dim)
    stored = safetensors_files.open_safetensors(directory / ADAPTER_WEIGHTS)
    layout = names.detect_adapted(stored, model)
    if outside := sorted(name for name in stored if any(part in name for part in names.OUTSIDE_TEXT)):
        raise ValueError(
            f"{directory / ADAPTER_WEIGHTS} has {outside[0]}: {len(outside)} of its tensors adapt the tower or projector, "
            f"and only adapters of the language model are read; {MERGE_FIRST}"
        )
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
    if not has_linear_experts(model):
        if routed := sorted(name for name in tensors if ".mlp.experts." in name or ".mlp.gate.lora_" in name):
            raise ValueError(
                f"{directory / ADAPTER_WEIGHTS} has {routed[0]}: adapters of experts and routers of a {model.family} are not read; "
                f"{MERGE_FIRST}"
            )
    elif isinstance(model.ffn, config.MoeFfn):
        version = read_object(directory / ADAPTER_CONFIG).get("peft_version")
        tensors = fused.split_fused(directory / ADAPTER_WEIGHTS, tensors, model, version)
    return _Opened(tensors, layout)


# --- which adapters there are --------------------------------------------------------------------------------------


Owners = dict[AdapterShape, set[int]]
"""The shapes of the adapters of a module, and the experts that have each of them; {0} for a module without experts."""


def _adapter_owners(
    directory: Path, settings: JsonObject, tensors: dict[str, FileTensor], model: config.Model, layout: names.TensorLayout
) -> dict[str, Owners]:
    """Return the shapes of adapters, and their owners, of each module that has adapters.

    Raises:
        ValueError: layers differ, or some layers have no adapter.
    """
    owners: dict[str, Owners] = {}
    first_layer: dict[tuple[str, int], tuple[str, AdapterShape]] = {}  # name and shape of the first adapter of each expert
    num_layers: Counter[tuple[str, int]] = Counter()
    num_possible: Counter[tuple[str, int]] = Counter()  # layers that have the module
    pieces = adaptable_pieces(model, layout)
    for piece_a, piece_b in zip(pieces[::2], pieces[1::2], strict=True):
        module = ParameterPath.parse(piece_a.path).module
        expert = piece_a.lead[1] if len(piece_a.lead) == 2 else 0
        num_possible[module, expert] += 1
        missing = [piece.name for piece in (piece_a, piece_b) if piece.name not in tensors]
        if len(missing) == 1:
            raise ValueError(f"{directory / ADAPTER_WEIGHTS} lacks {missing[0]}; save the adapter again")
        # An adapter that only some layers have is found below, by the number of layers.
        if missing:
            continue
        stem = piece_a.name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        shape = AdapterShape(tensors[piece_a.name].shape[0], alpha_of(settings, stem))
        owners.setdefault(module, {}).setdefault(shape, set()).add(expert)
        num_layers[module, expert] += 1
        first_stem, first_shape = first_layer.setdefault((module, expert), (stem, shape))
        if first_shape != shape:
            raise ValueError(
                f"{directory / ADAPTER_CONFIG}: {stem} has rank and alpha {tuple(shape)}, {first_stem} has {tuple(first_shape)}; "
                f"only adapters with the same rank and alpha in all layers are supported; {MERGE_FIRST}"
            )
    for (module, expert), count in num_layers.items():
        if count < num_possible[module, expert]:
            stem, _ = first_layer[module, expert]
            raise ValueError(
                f"{directory / ADAPTER_CONFIG}: adapters such as {stem}'s are in {count} of {num_possible[module, expert]} layers; "
                f"only adapters of all layers are supported; {MERGE_FIRST}"
            )
    if not owners:
        raise ValueError(
            f"{directory / ADAPTER_WEIGHTS} has no adapter under a name that is supported; it has "
            f"{next(iter(tensors), 'no tensors')}"
        )
    return owners


def _targets(owners_of: dict[str, Owners], model: config.Model) -> tuple[config.LoraTarget, ...]:
    """Return one target for all modules whose adapters have the same rank, alpha and experts."""
    num_experts = model.ffn.num_experts if isinstance(model.ffn, config.MoeFfn) else 1
    modules_of: dict[tuple[AdapterShape, tuple[int, ...] | None], list[str]] = {}
    for module, owners_of_shape in owners_of.items():
        max_owners = num_experts if module in (GATE, UP, DOWN) else 1
        for shape, owners in owners_of_shape.items():
            # None means all experts, which leaves the target without a list of indices.
            experts = None if len(owners) == max_owners else tuple(sorted(owners))
            modules_of.setdefault((shape, experts), []).append(module)
    targets: list[config.LoraTarget] = []
    for (shape, experts), modules in modules_of.items():
        targets.append(config.LoraTarget(modules=tuple(modules), rank=shape.rank, alpha=shape.alpha, experts=experts))
    return tuple(targets)


def _trained_in_full(
    file: Path, settings: JsonObject, tensors: dict[str, FileTensor], model: config.Model, layout: names.TensorLayout
) -> tuple[str, ...]:
    """Return the modules whose full weights are in the files. Raises ValueError if modules_to_save contradicts them."""
    saved = {
        piece.name.removesuffix(".weight"): ParameterPath.parse(piece.path).module
        for piece in saved_pieces(model, layout)
        if piece.name in tensors
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
