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
- Adapters of routed experts and routers of other families than Mixtral are refused: PEFT has no conversion for them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_train import config
from moe_train.machine.files import JsonObject, check_space, new_directory
from moe_train.model.paths import ParameterPath, adapter_ranks, of_module
from moe_train.weights import hf, merge, names, safetensors_files
from moe_train.weights.arrays import LazyParameters, fetch_entry
from moe_train.weights.on_disk import array_bytes
from moe_train.weights.peft.pieces import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DOWN,
    GATE,
    UP,
    has_linear_experts,
    is_adaptable,
    leaf_of,
    saved_pieces,
)
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
        texts: tokenizer, chat template and config to put beside the adapter.
        server: the server that is to read the adapter; None for PEFT itself.

    Raises:
        ValueError: PEFT or the server cannot express the adapter.
    """
    adapted = adapter_ranks(parameters)
    if not adapted:
        raise ValueError("there is no adapter to export: the model was trained in full; use --format hf")
    of_family = names.hugging_face_of(model)
    layout = replace(layout, router=of_family.router, experts=of_family.experts)
    _check_adaptable(model, adapted)
    shapes = _in_file(model, {module: _shape(lora, module, rank) for module, rank in adapted.items()})
    saved = _saved(model, lora, layout)
    if server is not None:
        shapes = adapter_shapes(server, model.family, shapes, {ParameterPath.parse(piece.path).module_path for piece in saved})
    table = names.lora_pieces(model, {module: shape.rank for module, shape in shapes.items()}, layout)
    settings = {**_config(model, shapes, lora, layout), "base_model_name_or_path": base_model}
    dtype = np.dtype(parameters[f"{next(iter(adapted))}.lora_a"].dtype)

    def matrix(piece: names.WeightPiece) -> np.ndarray:
        """Return our matrix, with the rank and scale that the file states for it."""
        path = ParameterPath.parse(piece.path)
        if piece in saved:
            return fetch_entry(parameters[piece.path], piece.lead)
        if piece.path not in parameters:  # PEFT requires the expert's other matrices too
            return np.zeros(piece.internal_shape, dtype)
        trained = fetch_entry(parameters[piece.path], piece.lead)
        shape = shapes[path.module_path]
        factor = 1.0
        if path.leaf == "lora_b":  # B absorbs the difference between the scale here and the one that the file's settings imply
            factor = merge.scale_of(lora, path.module_path, piece.lead) * shape.rank / shape.alpha
        return _scale_and_pad(trained, factor, piece.internal_shape)

    pieces = {piece.name: piece for piece in (*table, *saved)}
    specs = [safetensors_files.TensorSpec(piece.name, piece.shape, dtype) for piece in table]
    specs += [safetensors_files.TensorSpec(piece.name, piece.shape, np.dtype(parameters[piece.path].dtype)) for piece in saved]
    check_space(out_dir, sum(array_bytes(spec.shape, spec.dtype) for spec in specs))
    with new_directory(out_dir) as directory:
        safetensors_files.write_safetensors(
            directory / ADAPTER_WEIGHTS, specs, lambda spec: pieces[spec.name].to_file(matrix(pieces[spec.name]))
        )
        hf.write_json(directory / ADAPTER_CONFIG, settings)
        write_texts(directory, texts)


def _check_adaptable(model: config.Model, modules: Collection[str]) -> None:
    """Raise ValueError if PEFT has no adapter for one of the modules, given by their paths."""
    refused = [path for path in map(of_module, modules) if not is_adaptable(path, model)]
    if refused:
        raise ValueError(
            f"PEFT has no linear map for {refused[0].module} of a {model.family}: transformers keeps experts and routers of this "
            "family in parameters of their own; export with --format mistral-lora, or merge with --merge"
        )


def _scale_and_pad(trained: np.ndarray, factor: float, shape: tuple[int, ...]) -> np.ndarray:
    """Return `trained` times `factor`, rounded once, with zeros up to `shape`; a factor of 1 keeps every bit."""
    if factor != 1:
        trained = (trained.astype(np.float64) * factor).astype(trained.dtype)
    return np.pad(trained, [(0, size - length) for size, length in zip(shape, trained.shape, strict=True)])


# --- adapter_config.json -------------------------------------------------------------------------------------------


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


def _config(model: config.Model, shapes: Mapping[str, AdapterShape], lora: config.Lora, layout: names.TensorLayout) -> JsonObject:
    """Return adapter_config.json without the base model's name."""
    leaves = {ParameterPath.parse(piece.path).module: leaf_of(piece.name) for piece in names.weight_pieces(model)}
    by_module = {of_module(module).module: shape for module, shape in shapes.items()}  # the same in every layer
    sparse = isinstance(model.ffn, config.MoeFfn)
    # The file's own r and lora_alpha; with experts, those of w1 and w3, which the patterns cannot name (see the top of this file).
    usual = Counter(by_module.values()).most_common(1)[0][0]
    if sparse and GATE in by_module:
        usual = by_module[GATE]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    fused_names: dict[str, str] = {}  # the names in transformers 5, which PEFT looks up in the patterns too
    if sparse:
        fused_names = {DOWN: "experts.down_proj", "ffn.router": "gate.weight"}
    for module, shape in by_module.items():
        keys = [leaves[module]]
        if module in fused_names:
            keys.append(fused_names[module])
        for key in keys:
            # Patterns list only what differs from the file's own r and lora_alpha.
            if shape.rank != usual.rank:
                ranks[key] = shape.rank
            if shape.alpha != usual.alpha:
                alphas[key] = _number(shape.alpha)
    # PEFT rejects dropout for the parameters of experts and routers.
    without_dropout = sparse and by_module.keys() & {GATE, "ffn.router"}
    saved = {piece.name.removeprefix("base_model.model.").removesuffix(".weight") for piece in _saved(model, lora, layout)}
    tied = model.tie_embeddings and "lm_head" in saved
    if tied:
        saved.remove("lm_head")  # PEFT names one of the two and keeps both
    # A module of a layer is named within the layer, since `norm` alone would also match the end of input_layernorm. Within a
    # multimodal model it has its whole name, since PEFT compares ends of names, and a tower may have the same ones.
    to_save = sorted({_in_layer(name, layout) for name in saved} if layout.layer == names.HUGGING_FACE.layer else saved)
    settings: JsonObject = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": usual.rank,
        "lora_alpha": _number(usual.alpha),
        "lora_dropout": 0.0 if without_dropout else lora.dropout,
        "target_modules": _target_modules(model, shapes, layout),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": to_save or None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if tied:
        settings["ensure_weight_tying"] = True
    return settings


def _in_layer(name: str, layout: names.TensorLayout) -> str:
    """Return the name of a module within its layer; modules outside layers keep their names."""
    # re.escape also escapes the braces of the placeholder {l}.
    prefix = re.escape(layout.layer).replace(r"\{l\}", r"\d+")
    return re.sub(f"^{prefix}", "", name)


def _target_modules(model: config.Model, modules: Collection[str], layout: names.TensorLayout) -> list[str] | str:
    """Return the adapted modules, given by their paths, as PEFT's target_modules.

    For a text model this is the list of their last names, which vLLM and llama.cpp expect. Inside a vision wrapper the vision tower
    has modules of the same names, so there it is a regular expression of the whole names of the text model's modules.
    """
    stems: set[str] = set()
    for piece in names.weight_pieces(model, layout):
        if ParameterPath.parse(piece.path).module_path in modules:
            stems.add(piece.name.removesuffix(".weight"))
    if layout.layer == names.HUGGING_FACE.layer:
        return sorted({leaf_of(stem) for stem in stems})
    in_layers = sorted({re.escape(_in_layer(stem, layout)) for stem in stems if _in_layer(stem, layout) != stem})
    alternatives = sorted(re.escape(stem) for stem in stems if _in_layer(stem, layout) == stem)
    if in_layers:
        prefix = re.escape(layout.layer).replace(r"\{l\}", r"\d+")
        alternatives.append(f"{prefix}({'|'.join(in_layers)})")
    return "|".join(alternatives)


def _number(x: float) -> int | float:
    """Return an integral alpha as int, as PEFT writes it; PEFT accepts a float otherwise."""
    return int(x) if x.is_integer() else x
