"""Adapters compared with their base and with each other, merged, and scaled; of a run, or of another tool's files.

The norm of a delta s·A·B comes from two products of rank by rank: |s·A·B|² = s² · sum((AᵀA) * (BBᵀ)).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_train import config
from moe_train.checkpoint import model_dir, runs
from moe_train.checkpoint.manager import Base
from moe_train.commands import write_and_prove
from moe_train.machine.files import new_directory, read_object, refuse_existing
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import Parameters, parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import init_model
from moe_train.proof.scaled import prove_scaled
from moe_train.weights import gguf, merge, names, peft, texts
from moe_train.weights.arrays import Held, fetch
from moe_train.weights.gguf import lora as gguf_lora

Weight = Callable[[names.Piece], np.ndarray]
"""Gives the base's own weight of a piece."""


# --- how far it moved ----------------------------------------------------------------------------------------------


class Moved(NamedTuple):
    """How far one matrix of one layer, and of one expert, is from the base's."""

    layer: int | None
    """None for embedding, final norm and head."""
    module: str
    expert: int | None
    delta: float
    """Frobenius norm of the change."""
    weight: float
    """That of the base's weight."""

    @property
    def relative(self) -> float:
        return self.delta / self.weight if self.weight else math.inf if self.delta else 0.0


class Comparison(NamedTuple):
    base: str
    moved: list[Moved]
    """Of everything that was trained, the farthest first."""

    def experts(self) -> list[list[float]]:
        """[layer][expert]: norm of the change of an expert's matrices together, over the norm of the adapted ones."""
        sums: dict[int, dict[int, list[float]]] = {}
        for m in self.moved:
            if m.expert is not None and m.layer is not None:
                total = sums.setdefault(m.layer, {}).setdefault(m.expert, [0.0, 0.0])
                total[0] += m.delta**2
                total[1] += m.weight**2
        return [[math.sqrt(d / w) if w else 0.0 for _, (d, w) in sorted(row.items())] for _, row in sorted(sums.items())]


def diff(source: str | Path, base: str | Path | None = None, against: str | Path | None = None) -> Comparison:
    """How far the adapters of `source`, and what was trained in full beside them, are from the base model; or from
    `against`, other adapters of it.

    base: where it is not stated, the one that the run or the adapter names. Raises FileNotFoundError where it is not here,
    ValueError where the adapters are another model's. In memory are the adapters, and one matrix of the base.
    """
    base = _base_of(source) if base is None else base
    model = model_dir.read_model(base)
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        both = [_load(path, model) for path in (source, against) if path is not None]
        weight = _weights_of(base, model)
        moved = [m for piece in names.pieces(model) if (m := _moved(piece, model, both, weight)) is not None]
    return Comparison(str(base), sorted(moved, key=lambda m: -m.relative))


def _base_of(source: str | Path) -> str:
    if runs.is_run(source):
        named = runs.read_run(source).init_from
    elif (file := Path(source) / peft.CONFIG).is_file():
        named = read_object(file).get("base_model_name_or_path")
    elif gguf.file_in(source) is not None:
        named = gguf_lora.open_adapter(source).settings.get("general.base_model.0.name")
    else:
        named = None
    if not named or not Path(named).exists():
        raise FileNotFoundError(f"{source} names {named or 'nothing'} as its base model, which is not here; name it with --base")
    return named


def _load(source: str | Path, model: config.Model) -> tuple[config.Lora, Parameters]:
    """The section `lora` of an adapter, and what was trained."""
    lora = model_dir.read_adapter(source, model).model_copy(update={"quantize": None})
    shapes = parameters(jax.eval_shape(lambda: init_model(0, model, config.Compute(), lora)))[1]
    return lora, model_dir.load_adapter(Base(str(source), None, {}), model, shapes)


def _weights_of(base: str | Path, model: config.Model) -> Weight:
    shapes = parameters(jax.eval_shape(lambda: init_model(0, model, config.Compute())))[1]
    held = model_dir.load_parameters(base, shapes, load=model_dir.left_in_files)
    return lambda piece: fetch(held[piece.path], piece.lead)


def _moved(piece: names.Piece, model: config.Model, both: list[tuple[config.Lora, Parameters]], weight: Weight) -> Moved | None:
    """None for what none of the adapters touches."""
    path = ParameterPath.parse(piece.path)
    if not any(piece.path in trained or path.has_adapter(trained) for _, trained in both):
        return None
    own = weight(piece)
    if any(piece.path in trained for _, trained in both):  # in full
        first, *other = (_whole(lora, trained, piece, own) for lora, trained in both)
        delta = float(np.linalg.norm(first - (other[0] if other else own)))
    else:
        delta = _norm_of_product([_factors(lora, trained, path, piece.lead) for lora, trained in both])
    layer = path.layer(model, piece.lead[0]) if piece.lead else None
    expert = piece.lead[1] if len(piece.lead) == 2 else None
    return Moved(layer, path.module, expert, float(delta), math.sqrt(np.sum(np.square(own, dtype=np.float32), dtype=np.float64)))


def _whole(lora: config.Lora, trained: Parameters, piece: names.Piece, own: np.ndarray) -> np.ndarray:
    """The trained weight in float64, an adapter's delta added."""
    if piece.path in trained:
        return fetch(trained[piece.path], piece.lead).astype(np.float64)
    added = merge.delta(trained, lora, piece)
    return own.astype(np.float64) + (0 if added is None else added)


def _factors(
    lora: config.Lora, trained: Parameters, path: ParameterPath, lead: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray] | None:
    """(s·A as (in, J), B as (J, out)); None where there is no adapter."""
    if not path.has_adapter(trained):
        return None
    a, b = (fetch(trained[name], lead).astype(np.float64) for name in path.adapter)
    J = b.shape[0]
    return merge.scale_of(lora, path.module_path, lead) * a.reshape(-1, J), b.reshape(J, -1)


def _norm_of_product(factors: list[tuple[np.ndarray, np.ndarray] | None]) -> float:
    """|A·B| of the first, or |A·B - A'·B'| of both: the product of A and -A' side by side with B above B'."""
    signed = [(sign * f[0], f[1]) for sign, f in zip((1, -1), factors, strict=False) if f is not None]
    a, b = np.concatenate([f[0] for f in signed], axis=1), np.concatenate([f[1] for f in signed])
    return math.sqrt(max(0.0, float(np.sum((a.T @ a) * (b @ b.T)))))


# --- merge and scale -----------------------------------------------------------------------------------------------


def merge_into(base: str | Path, source: str | Path, out_dir: str | Path, dtype: config.Dtype | None = None) -> dict[str, Any]:
    """The base model with the adapters of `source` added, as a Hugging Face model, proved; returns the proof's record.

    dtype: of the files; where it is not stated, that of the base's. Raises as `weights.write.export`.
    """
    refuse_existing(Path(out_dir))  # before the work, not after it
    opened = model_dir.open_model(base)
    if opened.lora is not None:
        raise ValueError(f"{base} is a run with adapters of its own; export it with --merge, and merge into the export")
    dtype = dtype or model_dir.dtype_of_files(base, otherwise=opened.compute.param_dtype)
    with jax.set_mesh(opened.mesh):
        lora, weights = base_and_adapter(base, source, opened.model, dtype)
        return write_and_prove.export(
            weights,
            opened.model,
            out_dir,
            dtype=dtype,
            lora=lora,
            merge=True,
            texts=texts.Texts(opened.tokenizer, opened.chat_template),
            about={"source": str(base), "adapter": str(source)},
        )


def base_and_adapter(
    base: str | Path, source: str | Path, model: config.Model, dtype: config.Dtype | None = None
) -> tuple[config.Lora, Held]:
    """The section `lora` of the adapters of `source`, and all weights: the base's, in `dtype`, or that of its files where it
    is not stated, and what was trained. Those of another tool's files stay there. The mesh is in force."""
    dtype = dtype or model_dir.dtype_of_files(base, otherwise=model_dir.compute_here().param_dtype)
    compute = config.Compute(param_dtype=dtype)
    lora = model_dir.read_adapter(source, model).model_copy(update={"quantize": None})
    shapes = parameters(jax.eval_shape(lambda: init_model(0, model, compute, lora)))[1]
    trained = model_dir.load_adapter(Base(str(source), None, {}), model, shapes)
    plain = {path: like for path, like in shapes.items() if not ParameterPath.parse(path).is_trained(lora)}
    return lora, {**model_dir.load_parameters(base, plain, load=model_dir.left_in_files), **trained}


def scale(source: str | Path, factor: float, out_dir: str | Path) -> dict[str, Any]:
    """Write a PEFT adapter whose deltas are `factor` times as large, and prove it: alphas are multiplied, tensors keep their bytes.

    Raises ValueError for a factor that is not positive, for modules that were trained in full, which have no scale, and where
    the proof fails.
    """
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"factor is {factor}; it has to be positive: 1 leaves the adapter as it is, 0 would be the base itself")
    directory = Path(source)
    if runs.is_run(directory):
        raise ValueError(f"{source} is a run; export its adapter with --format peft, and scale that")
    if not (directory / peft.CONFIG).is_file():
        raise FileNotFoundError(f"{directory / peft.CONFIG} is missing; give a directory with a PEFT adapter")
    settings = read_object(directory / peft.CONFIG)
    if settings.get("modules_to_save"):
        raise ValueError(f"{source} has {settings['modules_to_save']}, trained in full: these have no scale; merge it instead")
    settings["lora_alpha"] *= factor
    settings["alpha_pattern"] = {key: alpha * factor for key, alpha in (settings.get("alpha_pattern") or {}).items()}
    with new_directory(out_dir) as beside:
        for file in directory.iterdir():
            if file.is_file() and file.name not in (peft.CONFIG, "export_proof.json"):  # the proof is of the old scale
                shutil.copyfile(file, beside / file.name)
        (beside / peft.CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        prove_scaled(beside, directory, factor)
    return {"adapter": str(out_dir), "lora_alpha": settings["lora_alpha"], "alpha_pattern": settings["alpha_pattern"]}


# --- for people ----------------------------------------------------------------------------------------------------


def show(found: Comparison, top: int) -> Iterator[Any]:
    """Titles and tables for a terminal: the `top` matrices that moved farthest, and layer by expert as a heat map."""
    from rich.table import Table
    from rich.text import Text

    yield f"change over weight, beside {found.base}"
    table = Table(box=None)
    for column in ("layer", "module", "expert", "change", "weight", "change / weight"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for m in found.moved[:top]:
        place = ["" if x is None else str(x) for x in (m.layer, m.module, m.expert)]
        table.add_row(*place, f"{m.delta:.4g}", f"{m.weight:.4g}", f"{m.relative:.3%}")
    yield table
    if experts := found.experts():
        largest = max(map(max, experts)) or 1.0
        yield "change over weight of each expert, over its layer's modules, in %"
        heat = Table(box=None)
        heat.add_column("layer", justify="right")
        for e in range(len(experts[0])):
            heat.add_column(str(e), justify="right")
        layers = sorted({m.layer for m in found.moved if m.expert is not None and m.layer is not None})
        for layer, row in zip(layers, experts, strict=True):
            heat.add_row(str(layer), *(Text(f"{100 * x:.3g}", style=_heat(x / largest)) for x in row))
        yield heat


def _heat(share: float) -> str:
    """Black on white for none, white on dark red for the most."""
    fade = round(255 * (1 - share))
    return f"{'white' if share > 0.5 else 'black'} on rgb({255 - round(100 * share**2)},{fade},{fade})"
