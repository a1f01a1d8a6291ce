"""Adapters as a GGUF file, which llama.cpp adds to its base model's GGUF (`llama-server -m BASE.gguf --lora adapter.gguf`).

What llama.cpp (v0.5.0) accepts, according to its source (llama-adapter.cpp, llama-graph.cpp) and to tests, decides what is
written and read:
- A is (rank, in) and B (out, rank), named after the base's tensor; B's rows of q and k are in interleaved rotary order, like
  the weights'.
- Experts are stacked, (experts, rank, in) and (experts, out, rank), with every expert in both, so there is one rank per matrix
  and layer. Gate, up and down are independent: each may be missing.
- It adds alpha / rank · B·A, with one alpha per file and the rank of each B; it does not know rsLoRA. So a different scale is
  multiplied into B. An alpha of 0 would mean a scale of 1.
- The router and an untied head may have an adapter too. For the embedding it expects A and B swapped, and applies them to a tied
  head as well; that is not supported here.
- Of latent attention (`mistral4`, `deepseek2`) it computes queries, keys, values and the head without adapters, and ignores
  those that a file has (src/models/deepseek2.cpp); such adapters are refused here in both directions.
- general.architecture has to be the base's. Apart from that, only names and shapes are compared with the base.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_train import config
from moe_train.machine.files import check_space, new_directory
from moe_train.model.parameters import Parameters
from moe_train.model.paths import ParameterPath, adapter_ranks, of_module
from moe_train.weights import gguf, merge, names
from moe_train.weights.arrays import Abstract, LazyParameters, fetch_entry, fill
from moe_train.weights.gguf import container
from moe_train.weights.gguf import settings as gguf_settings
from moe_train.weights.texts import NO_TEXTS, Texts, write_texts

ADAPTER_FILE = "adapter.gguf"
"""Name of the file that is written."""
_LAYOUT = replace(names.GGUF, adapters_of_embed=names.GGUF.adapters)
"""llama.cpp's names, with adapters of routers, embedding and head."""
_IGNORED_WITH_LATENTS = (
    "attention.q_proj",
    "attention.q_a_proj",
    "attention.q_b_proj",
    "attention.kv_a_proj",
    "attention.kv_b_proj",
    "head",
)
"""Modules whose adapters llama.cpp ignores in models with latent attention."""


def _ignored(model: config.Model, modules: Iterable[str]) -> list[str]:
    """Return the paths of modules whose adapters llama.cpp would ignore."""
    if not isinstance(model.attention, config.MultiHeadLatentAttention):
        return []
    return [path for path in modules if of_module(path).module in _IGNORED_WITH_LATENTS]


def export_adapter(
    parameters: LazyParameters,
    model: config.Model,
    lora: config.Lora,
    out_dir: str | Path,
    *,
    base_model: str,
    name: str = "adapter",
    texts: Texts = NO_TEXTS,
) -> None:
    """Write the adapters of `parameters` as a folder with `adapter.gguf`, in float32.

    `out_dir` appears complete or not at all. `proof.prove_adapter` compares the file with `parameters`.

    Args:
        parameters: weights by path.
        model: the architecture of the base.
        lora: the section of the adapters.
        out_dir: the folder to write.
        base_model: name or path of the model that the adapter belongs to.
        name: shown by servers.
        texts: tokenizer, chat template and config to put beside the adapter.

    Raises:
        ValueError: there are no adapters, or llama.cpp has no place for one.
    """
    ranks = adapter_ranks(parameters)
    if not ranks:
        raise ValueError("there is no adapter to export: the model was trained in full; use --format gguf")
    if ignored := _ignored(model, ranks):
        raise ValueError(
            f"llama.cpp ignores adapters of {ignored[0]} in {gguf_settings.architecture(model)} models, so the file would have no "
            "effect there; export the merged model with --format gguf --merge"
        )
    table = names.lora_pieces(model, ranks, _LAYOUT)
    if "embed" in ranks:
        raise ValueError("an adapter of embed cannot be written in this layout; export the merged model with --format gguf --merge")
    assert ranks.keys() == {_module(piece) for piece in table}, ranks
    if lora.train:
        raise ValueError(f"lora.train has {lora.train[0]!r}, but llama.cpp loads only adapters; export with --format gguf --merge")
    alpha = _alpha(lora, table)
    tensors: dict[str, list[names.WeightPiece]] = {}
    for piece in table:
        tensors.setdefault(piece.name, []).append(piece)

    def parts(spec: container.GgufSpec) -> Iterator[np.ndarray]:
        """Yield the matrices of a stacked tensor."""
        for piece in tensors[spec.name]:
            values = fetch_entry(parameters[piece.path], piece.lead)
            module = _module(piece)
            if ParameterPath.parse(piece.path).leaf == "lora_b":
                # llama.cpp multiplies by alpha / rank, so B carries what remains of the scale.
                factor = merge.scale_of(lora, module, piece.lead) * ranks[module] / alpha
                if factor != 1:
                    values = values.astype(np.float64) * factor
            # The only rounding: the factor was applied in float64.
            yield piece.to_file(values.astype(np.float32))

    settings = _settings(model, alpha, name, base_model)
    specs = [container.GgufSpec(name, pieces[0].shape, "F32") for name, pieces in tensors.items()]
    check_space(out_dir, sum(container.encoded_bytes(spec) for spec in specs))
    with new_directory(out_dir) as directory:
        container.write_gguf(directory / ADAPTER_FILE, settings, specs, parts)
        write_texts(directory, texts)


def _settings(model: config.Model, alpha: float, name: str, base_model: str) -> container.GgufSettings:
    """Return the keys of an adapter's file."""
    return {
        "general.architecture": gguf_settings.architecture(model),
        "general.type": "adapter",
        "general.name": name,
        "general.base_model.count": np.uint32(1),
        "general.base_model.0.name": base_model,
        "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(alpha),
    }


def open_adapter(path: str | Path) -> container.Gguf:
    """Open the adapter of one file, or of the only file in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no adapter.
    """
    file = gguf.file_in(path)
    if file is None:
        raise FileNotFoundError(f"{path} has no GGUF file, or several; name the file")
    opened = container.open_gguf(file)
    for key, required in (("general.type", "adapter"), ("adapter.type", "lora")):
        stated = opened.settings.get(key)
        if stated != required:
            raise ValueError(f"{file} is not an adapter: {key} is {stated!r}, not {required!r}")
    return opened


def read_lora(path: str | Path, model: config.Model) -> config.Lora:
    """Return the section `lora` that describes an adapter. Raises ValueError if it is for another base, or not supported."""
    opened = open_adapter(path)
    file = opened.file
    tensors = opened.tensors
    alpha = opened.settings.get("adapter.lora.alpha")
    arch = opened.settings.get("general.architecture")
    expected_arch = gguf_settings.architecture(model)
    if arch != expected_arch:
        raise ValueError(f"{file} is for another base: general.architecture is {arch!r}, not {expected_arch!r}")
    if not isinstance(alpha, float) or not 0 <= alpha < math.inf:
        raise ValueError(f"{file}: adapter.lora.alpha is {alpha!r}; it has to be a number, 0 or larger")
    # Without embed, for which llama.cpp swaps A and B (see the top of this file).
    weights = [ParameterPath.parse(piece.path) for piece in names.weight_pieces(model, names.GGUF)]
    modules = {path.module_path for path in weights if not (path.is_norm or path.is_router_bias or path.is_embedding)}
    table = names.lora_pieces(model, dict.fromkeys(modules, 1), _LAYOUT)
    ignored = set(_ignored(model, modules))
    for piece in table:
        if _module(piece) in ignored and piece.name in tensors:
            raise ValueError(f"{file} has {piece.name}, which llama.cpp ignores in {arch} models; train another adapter without it")
    if unknown := sorted(tensors.keys() - {piece.name for piece in table}):
        raise ValueError(f"{file} has {unknown[0]}, which is not a supported adapter of this model")
    targets: dict[int, list[str]] = {}
    for module, rank in _ranks(opened, table).items():
        # The file has one alpha, so modules with the same rank have the same scale.
        targets.setdefault(rank, []).append(module)
    if not targets:
        raise ValueError(f"{file} has no tensors; export the adapter again")
    # llama.cpp takes an alpha of 0 for a scale of 1.
    return config.Lora(
        targets=tuple(
            config.LoraTarget(modules=tuple(modules), rank=rank, alpha=alpha or rank) for rank, modules in targets.items()
        )
    )


def _ranks(opened: container.Gguf, table: list[names.WeightPiece]) -> dict[str, int]:
    """Return the rank of each module that has an adapter. Raises ValueError if its layers differ."""
    first_with_rank: dict[str, dict[int, str]] = {}  # for each module, the ranks of its layers and the first tensor with each
    # The table has A and B in turn.
    for piece_a in table[::2]:
        rank = 0  # no adapter in this layer
        if piece_a.name in opened.tensors:
            shape = opened.tensors[piece_a.name].shape
            if len(shape) < 2:
                raise ValueError(f"{opened.file}: {piece_a.name} has shape {shape}; the A of an adapter is a matrix")
            # A is (rank, in), or (experts, rank, in).
            rank = shape[-2]
        module = ParameterPath.parse(piece_a.path).module
        first_with_rank.setdefault(module, {}).setdefault(rank, piece_a.name)
    ranks: dict[str, int] = {}
    for module, tensor_of_rank in first_with_rank.items():
        if len(tensor_of_rank) > 1:
            states = [f"{name} has rank {rank}" if rank else f"{name} is missing" for rank, name in tensor_of_rank.items()]
            raise ValueError(
                f"{opened.file}: {states[0]}, but {states[1]}; only adapters with one rank in all layers are supported"
            )
        (rank,) = tensor_of_rank
        if rank:
            ranks[module] = rank
    return ranks


def load_adapter(path: str | Path, model: config.Model, abstract: Abstract) -> Parameters:
    """Read the adapters of a file into arrays.

    Args:
        path: the file or folder.
        model: the architecture of the base.
        abstract: {path of lora_a or lora_b: shape, dtype and sharding}, from a model with the section `read_lora(path, model)`.

    Raises:
        ValueError: the adapter belongs to another base.
    """
    tensors = open_adapter(path).tensors
    ranks = adapter_ranks(abstract)
    table = names.lora_pieces(model, ranks, _LAYOUT)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    names.check_file_tensors(path, table, shapes, {path: like.shape for path, like in abstract.items()})
    return fill(abstract, table, tensors)


def _alpha(lora: config.Lora, table: list[names.WeightPiece]) -> float:
    """Return the alpha that most matrices have, as a float32, so that most matrices are written unchanged."""
    pieces_b = [piece for piece in table if ParameterPath.parse(piece.path).leaf == "lora_b"]
    # B is (rank, …) in our arrays
    alphas = Counter(merge.scale_of(lora, _module(piece), piece.lead) * piece.internal_shape[0] for piece in pieces_b)
    alphas.pop(0.0, None)  # from experts without an adapter
    return float(np.float32(alphas.most_common(1)[0][0]))


def _module(piece: names.WeightPiece) -> str:
    """Return the path of the module that a weight belongs to."""
    return piece.path.rpartition(".")[0]
