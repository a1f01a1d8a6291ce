"""Write PEFT adapters: one A and one B per matrix, experts included, as vLLM and PEFT read them.

PEFT with transformers 5 (tested with 0.21.2) converts the experts' tensors into its fused form while loading. What it accepts
decides what is written:
- w1, w2 and w3 are written together: a gate without its up is rejected, and both without a down load with their weights left
  out and only a warning.
- w1 and w3 have the file's own `r` and `lora_alpha`; a w2 that differs is named in the patterns by its old and its fused name.
- All experts of a matrix share rank and scale: a smaller rank is padded with zeros, and B absorbs a different scale.
- Scales are written as lora_alpha / r, rank-stabilized ones too: PEFT's fusing of gate and up, and llama.cpp, know no other.
- Dropout is written only where PEFT supports it, which excludes experts and routers.
- Weights that were trained in full are `modules_to_save`.
- Experts and routers of other families than Mixtral are adapted as parameters, all experts in one A and one B (`fused_parameters`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.machine.files import JsonObject, check_space, new_directory
from moe_train.model.paths import ParameterPath, adapter_ranks, of_module
from moe_train.weights import hf, merge, names, safetensors_files
from moe_train.weights.arrays import LazyParameters, fetch_entry
from moe_train.weights.on_disk import array_bytes
from moe_train.weights.peft.fused_parameters import Factors, FusedParameter, fused_parameters
from moe_train.weights.peft.pieces import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DOWN,
    GATE,
    UP,
    are_parameters,
    has_linear_experts,
    matrix_for_each_expert,
    saved_pieces,
)
from moe_train.weights.peft.tower import Tower, tower_adapters, tower_of, with_tower
from moe_train.weights.peft.write_settings import adapter_config
from moe_train.weights.serve import AdapterShape, Server, adapter_shapes
from moe_train.weights.texts import NO_TEXTS, Texts, write_texts


def export_adapter(
    parameters: LazyParameters,
    model: config.Model,
    lora: config.Lora,
    out_dir: str | Path,
    *,
    base_model: str,
    layout: names.TensorLayout = names.HUGGING_FACE,
    encoder: config.Encoder | None = None,
    texts: Texts = NO_TEXTS,
    server: Server | None = None,
) -> None:
    """Write the adapters of `parameters`, and the weights that were trained in full, as a PEFT directory.

    A and B keep their dtype and bytes, except where experts must agree (see the top of this file), or all modules for the sake of
    `server` (see `serve`). `out_dir` appears complete or not at all. `proof.prove_adapter` compares the files with `parameters`.

    Args:
        parameters: weights by path.
        model: the architecture of the base.
        lora: the section of the adapters.
        out_dir: the folder to write.
        base_model: name or path of the model that the adapter belongs to.
        layout: names of the base's modules in transformers; `names.WRAPPED` for the text model inside a vision wrapper.
        encoder: sizes of the tower whose modules `lora` names; None if it names none.
        texts: tokenizer, chat template and config to put beside the adapter.
        server: the server that is to read the adapter; None for PEFT itself.

    Raises:
        ValueError: PEFT or the server cannot express the adapter.
    """
    adapted = adapter_ranks(parameters)
    if not adapted:
        raise ValueError("there is no adapter to export: the model was trained in full; use --format hf")
    contents = _contents(adapted, model, lora, matrix_for_each_expert(layout, model), encoder, server)
    dtype = np.dtype(parameters[f"{next(iter(adapted))}.lora_a"].dtype)
    matrices = _Matrices(parameters, lora, contents, dtype)
    pieces = {piece.name: piece for piece in (*contents.adapters, *contents.saved)}
    specs = [safetensors_files.TensorSpec(piece.name, piece.shape, dtype) for piece in contents.adapters]
    for piece in contents.saved:
        specs.append(safetensors_files.TensorSpec(piece.name, piece.shape, np.dtype(parameters[piece.path].dtype)))
    fused = _FusedTensors(contents.experts, matrices.factors, dtype)
    specs += fused.specs()
    check_space(out_dir, sum(array_bytes(spec.shape, spec.dtype) for spec in specs))

    def values(spec: safetensors_files.TensorSpec) -> np.ndarray:
        if spec.name not in pieces:
            return fused.values(spec.name)
        piece = pieces[spec.name]
        return piece.to_file(matrices.matrix(piece))

    with new_directory(out_dir) as directory:
        safetensors_files.write_safetensors(directory / ADAPTER_WEIGHTS, specs, values)
        hf.write_json(directory / ADAPTER_CONFIG, {**contents.settings, "base_model_name_or_path": base_model})
        write_texts(directory, texts)


class _Contents(NamedTuple):
    """What the files of an adapter hold."""

    shapes: dict[str, AdapterShape]
    """Rank and alpha that they state for each module."""
    adapters: list[names.WeightPiece]
    """A and B of all modules but fused parameters."""
    saved: list[names.WeightPiece]
    """Weights that were trained in full."""
    experts: list[FusedParameter]
    settings: JsonObject
    """adapter_config.json, without the name of the base."""


def _contents(
    adapted: Mapping[str, int],
    model: config.Model,
    lora: config.Lora,
    layout: names.TensorLayout,
    encoder: config.Encoder | None,
    server: Server | None,
) -> _Contents:
    """Return what the files of an adapter hold, given the rank of each adapted module; other arguments as in `export_adapter`."""
    trained = {module: _shape(lora, module, rank) for module, rank in adapted.items()}
    of_tower = tower_adapters(trained)
    shapes = _in_file(model, {module: shape for module, shape in trained.items() if module not in of_tower})
    saved = _saved(model, lora, layout)
    tower = Tower({}, [], [])
    if encoder is not None:
        _check_tower(of_tower, server)
        tower = tower_of(encoder, model, lora, of_tower)
    if server is not None:
        shapes = adapter_shapes(server, model.family, shapes, {ParameterPath.parse(piece.path).module_path for piece in saved})
        _check_server(server, model, shapes)
    experts = [] if has_linear_experts(model) else list(fused_parameters(model, shapes, layout))
    fused_modules = {module for parameter in experts for module in parameter.modules}
    table = names.lora_pieces(model, {m: shape.rank for m, shape in shapes.items() if m not in fused_modules}, layout)
    settings = adapter_config(model, shapes, experts, lora, layout, [piece.name for piece in saved])
    return _Contents(
        {**shapes, **of_tower}, [*table, *tower.adapters], [*saved, *tower.saved], experts, with_tower(settings, tower)
    )


class _Matrices:
    """The values of an adapter's files.

    Args:
        parameters: weights by path.
        lora: the section of the adapters.
        contents: what the files hold.
        dtype: dtype of the adapters.
    """

    def __init__(self, parameters: LazyParameters, lora: config.Lora, contents: _Contents, dtype: np.dtype) -> None:
        self._parameters = parameters
        self._lora = lora
        self._shapes = contents.shapes
        self._saved = {piece.name for piece in contents.saved}
        self._dtype = dtype

    def matrix(self, piece: names.WeightPiece) -> np.ndarray:
        """Return our matrix, with the rank and scale that the file states for it."""
        if piece.name in self._saved:
            return fetch_entry(self._parameters[piece.path], piece.lead)
        if piece.path not in self._parameters:  # PEFT requires the expert's other matrices too
            return np.zeros(piece.internal_shape, self._dtype)
        path = ParameterPath.parse(piece.path)
        trained = fetch_entry(self._parameters[piece.path], piece.lead)
        shape = self._shapes[path.module_path]
        factor = 1.0
        if path.leaf == "lora_b":  # B absorbs the difference between the scale here and the one that the file's settings imply
            factor = merge.scale_of(self._lora, path.module_path, piece.lead) * shape.rank / shape.alpha
        return _scale_and_pad(trained, factor, piece.internal_shape)

    def factors(self, module: str, lead: tuple[int, int], scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Return A and B of an expert for a file with this scale."""
        a, b = (fetch_entry(self._parameters[path], lead) for path in of_module(module).adapter)
        return a, _scale_and_pad(b, merge.scale_of(self._lora, module, lead) / scale, b.shape)


def _check_tower(modules: Collection[str], server: Server | None) -> None:
    """Raise ValueError if no reader of the adapter knows the adapted modules of a tower."""
    convolutions = [module for module in modules if module.startswith("audio.") and module.endswith("_conv")]
    if convolutions:
        raise ValueError(
            f"{convolutions[0]} has an adapter, and transformers cannot run convolutions that PEFT has wrapped; export the "
            "merged model with --merge, or train that module in full (lora.train)"
        )
    if server == "vllm":
        raise ValueError("vLLM reads no adapters of a tower or its projector; export the merged model with --merge")


def _check_server(server: Server, model: config.Model, modules: Collection[str]) -> None:
    """Raise ValueError if a server does not know adapters of parameters."""
    for path in map(of_module, modules):
        if server == "vllm" and are_parameters(path, model) and (path.is_router or path.is_expert(model)):
            raise ValueError(
                f"vLLM does not read the adapter of {path.module} in a {model.family}, which PEFT keeps in one matrix for all "
                "experts; export the merged model with --merge"
            )


class _FusedTensors:
    """A and B of fused parameters; both come from one pass over the experts, and B waits until it is asked for."""

    def __init__(self, parameters: Sequence[FusedParameter], factors: Factors, dtype: np.dtype) -> None:
        self._by_stem = {parameter.stem: parameter for parameter in parameters}
        self._factors = factors
        self._dtype = dtype
        self._b: np.ndarray | None = None

    def specs(self) -> list[safetensors_files.TensorSpec]:
        """Return the tensors in the order of the file: A and B of each parameter in turn."""
        specs: list[safetensors_files.TensorSpec] = []
        for stem, parameter in self._by_stem.items():
            specs.append(safetensors_files.TensorSpec(f"{stem}.lora_A.weight", parameter.shape_of_a, self._dtype))
            specs.append(safetensors_files.TensorSpec(f"{stem}.lora_B.weight", parameter.shape_of_b, self._dtype))
        return specs

    def values(self, name: str) -> np.ndarray:
        """Return a tensor, in the order of the file."""
        stem, _, leaf = name.rpartition(".lora_")
        if leaf == "A.weight":
            a, self._b = self._by_stem[stem].join(self._factors)
            return a
        assert self._b is not None, name
        return self._b


def _scale_and_pad(trained: np.ndarray, factor: float, shape: tuple[int, ...]) -> np.ndarray:
    """Return `trained` times `factor`, rounded once, with zeros up to `shape`; a factor of 1 keeps every bit."""
    if factor != 1:
        trained = (trained.astype(np.float64) * factor).astype(trained.dtype)
    return np.pad(trained, [(0, size - length) for size, length in zip(shape, trained.shape, strict=True)])


def _shape(lora: config.Lora, module: str, rank: int) -> AdapterShape:
    """Return the rank of a stack of adapters, and the alpha that gives its first target's scale at that rank."""
    target = merge.target_of(lora, module)
    # The target's own alpha where possible, since scale * rank can differ from it by a rounding.
    return AdapterShape(rank, target.alpha if rank == target.rank and not lora.rslora else lora.scale(target) * rank)


def _saved(model: config.Model, lora: config.Lora, layout: names.TensorLayout) -> list[names.WeightPiece]:
    """Return the weights that were trained in full.

    Raises:
        ValueError: experts are among them, which PEFT with transformers 5 has as a single fused module.
    """
    paths = {piece.path for piece in names.weight_pieces(model) if ParameterPath.parse(piece.path).is_trained(lora)}
    saved = [piece for piece in saved_pieces(model, layout) if piece.path in paths]
    if experts := sorted(ParameterPath.parse(path).module for path in paths - {piece.path for piece in saved}):
        raise ValueError(
            f"{experts[0]} was trained in full, but PEFT's modules_to_save can only save all matrices of all experts or none; "
            "use --format hf --merge"
        )
    return saved


def _in_file(model: config.Model, trained: Mapping[str, AdapterShape]) -> dict[str, AdapterShape]:
    """Return the adapters of the file by module: experts have all three matrices, gate and up with the same shape."""
    shapes = dict(trained)
    if isinstance(model.ffn, config.DenseFfn) or not has_linear_experts(model):
        return shapes
    layers: set[str] = set()
    for module in trained:
        for name in (GATE, UP, DOWN):
            if module.endswith(name):
                layers.add(module.removesuffix(name))
    for layer in sorted(layers):
        gate, up, down = (layer + name for name in (GATE, UP, DOWN))
        # PEFT fuses gate and up into one parameter, so both need the same rank and alpha, and a pair if either has one.
        fused = [trained[module] for module in (gate, up) if module in trained]
        # The larger rank, then the larger alpha: `matrix` pads and rescales the other one.
        shapes[gate] = shapes[up] = max(fused or [trained[down]])
        shapes.setdefault(down, shapes[gate])
    return shapes
