"""Compare adapters with their base and with each other; from a run or from external files.

The norm of a delta s·A·B comes from two rank-by-rank products: |s·A·B|² = s² · sum((AᵀA) * (BBᵀ)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.table import Table
from rich.text import Text

from moe_train import config
from moe_train.checkpoint import model_dir, runs
from moe_train.checkpoint.metadata import WeightOrigin
from moe_train.machine.files import JsonObject, read_object
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import Parameters, parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import abstract_model
from moe_train.weights import gguf, merge, names, peft
from moe_train.weights.arrays import fetch_entry
from moe_train.weights.gguf import lora as gguf_lora
from moe_train.weights.wrappers import tower_pieces

ReadBaseWeight = Callable[[names.WeightPiece], np.ndarray]
"""Reads the base model's weight of a piece."""


class MatrixChange(NamedTuple):
    """The change of one matrix of one layer, and of one expert if it is routed, relative to the base model."""

    layer: int | None
    """Layer of the text model, or of the tower if `module` is one of that; None outside the layers."""
    module: str
    expert: int | None
    """None for a matrix outside the routed experts."""
    delta: float
    """Frobenius norm of the change."""
    weight: float
    """Frobenius norm of the base's weight."""

    @property
    def relative(self) -> float:
        """Norm of the change over that of the weight; infinity if only the weight is zero."""
        # 0 / 0 is no change, and anything over a zero weight sorts first in the comparison.
        if self.weight:
            return self.delta / self.weight
        return math.inf if self.delta else 0.0


class Comparison(NamedTuple):
    """How far the adapters of a model changed its matrices."""

    base: str
    """Path of the base model."""
    changes: list[MatrixChange]
    """One entry per trained matrix, largest relative change first."""

    def sparse_layers(self) -> list[int]:
        """Return the layers with a changed expert, in order."""
        return sorted({change.layer for change in self.changes if change.layer is not None and change.expert is not None})

    def experts(self) -> list[list[float]]:
        """Return [sparse layer][expert]: the norm of all changes of an expert, over the norm of its adapted matrices."""
        # Squares add up: the Frobenius norm of several matrices together is the root of the sum of their squares.
        squares: dict[tuple[int, int], list[float]] = {}
        for change in self.changes:
            if change.expert is not None and change.layer is not None:
                total = squares.setdefault((change.layer, change.expert), [0.0, 0.0])
                total[0] += change.delta**2
                total[1] += change.weight**2
        rows = []
        for layer in self.sparse_layers():
            row = []
            for key in sorted(key for key in squares if key[0] == layer):
                delta, weight = squares[key]
                row.append(math.sqrt(delta / weight) if weight else 0.0)
            rows.append(row)
        return rows

    def to_json(self) -> JsonObject:
        """Return the comparison for JSON, which has no infinity: `relative` is None for a change of a zero matrix."""
        rows = []
        for change in self.changes:
            rows.append({**change._asdict(), "relative": change.relative if change.weight else None})
        return {"base": self.base, "moved": rows, "experts": self.experts()}


def diff(source: str | Path, base: str | Path | None = None, against: str | Path | None = None) -> Comparison:
    """Measure how much the adapters of `source`, and the modules trained in full, change the base model.

    Only the adapters and one matrix of the base are in memory at a time.

    Args:
        source: a run or an external adapter.
        base: the base model; None for the one that the run or adapter names.
        against: other adapters of the same base, to compare with instead of with the base.

    Raises:
        FileNotFoundError: the base model does not exist.
        ValueError: the adapters belong to another model.
    """
    base = _find_base(source) if base is None else base
    model = model_dir.read_model(base)
    encoder = model_dir.encoder_of(base)
    # One device is enough, since the norms are computed by numpy on the host.
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        adapters = [_load_adapter(path, model, encoder) for path in (source, against) if path is not None]
        changed = {path for _, trained in adapters for path in trained}
        if not any(ParameterPath.parse(path).is_tower for path in changed):
            encoder = None  # a tower that nothing changes need not be read
        read_weight = _base_weights(base, model, encoder)
        changes = []
        of_tower = [] if encoder is None else tower_pieces.pieces_in_memory(encoder, model)
        for piece in (*names.weight_pieces(model), *of_tower):
            change = _measure_change(piece, model, adapters, read_weight)
            if change is not None:
                changes.append(change)
    return Comparison(str(base), sorted(changes, key=lambda change: -change.relative))


def _find_base(source: str | Path) -> str:
    """Return the path of the base model that a run or an adapter names. Raises FileNotFoundError if it does not exist."""
    peft_config = Path(source) / peft.ADAPTER_CONFIG
    if runs.is_run(source):
        named = runs.read_run(source).init_from
    elif peft_config.is_file():
        named = read_object(peft_config).get("base_model_name_or_path")
    elif gguf.file_in(source) is not None:
        named = gguf_lora.open_adapter(source).settings.get("general.base_model.0.name")
    else:
        named = None
    if not named:
        raise FileNotFoundError(f"{source} does not name its base model; state it with --base")
    if not runs.run_folder(named).exists():
        raise FileNotFoundError(f"{source} names {named} as its base model, which does not exist here; state its path with --base")
    return named


def _load_adapter(source: str | Path, model: config.Model, encoder: config.Encoder | None) -> tuple[config.Lora, Parameters]:
    """Return the section `lora` of an adapter, and the trained parameters."""
    # Quantization is a matter of the base's weights in training; here they are read as its files hold them.
    lora = model_dir.read_adapter(source, model, encoder).model_copy(update={"quantize": None})
    shapes = parameters(abstract_model(model, config.Compute(), lora, encoder))[1]
    return lora, model_dir.load_adapter(WeightOrigin(str(source), None, {}), model, shapes, encoder)


def _base_weights(base: str | Path, model: config.Model, encoder: config.Encoder | None) -> ReadBaseWeight:
    """Return a function that reads the base's weight of a piece from its files when it is called."""
    shapes = parameters(abstract_model(model, config.Compute(), None, encoder))[1]
    lazy_weights = model_dir.load_parameters(base, shapes, load=model_dir.load_lazily)

    def read_weight(piece: names.WeightPiece) -> np.ndarray:
        return fetch_entry(lazy_weights[piece.path], piece.lead)

    return read_weight


def _measure_change(
    piece: names.WeightPiece, model: config.Model, adapters: list[tuple[config.Lora, Parameters]], read_weight: ReadBaseWeight
) -> MatrixChange | None:
    """Measure the change of one piece; None if none of the adapters touches it."""
    path = ParameterPath.parse(piece.path)
    if not any(piece.path in trained or path.has_adapter(trained) for _, trained in adapters):
        return None
    base_weight = read_weight(piece)
    if any(piece.path in trained for _, trained in adapters):  # trained in full
        trained_weight, *second_weights = (_full_weight(lora, trained, piece, base_weight) for lora, trained in adapters)
        delta = float(np.linalg.norm(trained_weight - (second_weights[0] if second_weights else base_weight)))
    else:
        delta = _norm_of_product([_factors(lora, trained, path, piece.lead) for lora, trained in adapters])
    layer = None
    if piece.lead:
        layer = piece.lead[0] if path.is_tower else path.layer(model, piece.lead[0])
    expert = piece.lead[1] if len(piece.lead) == 2 else None
    # In float16 a square overflows from 256 on, and a long sum in float32 loses small terms.
    weight_norm = math.sqrt(np.sum(np.square(base_weight, dtype=np.float32), dtype=np.float64))
    return MatrixChange(layer, path.module, expert, float(delta), weight_norm)


def _full_weight(lora: config.Lora, trained: Parameters, piece: names.WeightPiece, base_weight: np.ndarray) -> np.ndarray:
    """Return the trained weight in float64, with an adapter's delta added."""
    if piece.path in trained:
        return fetch_entry(trained[piece.path], piece.lead).astype(np.float64)
    delta = merge.lora_delta(trained, lora, piece)
    return base_weight.astype(np.float64) + (0 if delta is None else delta)


def _factors(
    lora: config.Lora, trained: Parameters, path: ParameterPath, lead: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (s·A as (in, J), B as (J, out)), or None without an adapter."""
    if not path.has_adapter(trained):
        return None
    # In float64, since the difference of two similar adapters cancels most digits.
    a, b = (fetch_entry(trained[name], lead).astype(np.float64) for name in path.adapter)
    J = b.shape[0]
    return merge.scale_of(lora, path.module_path, lead) * a.reshape(-1, J), b.reshape(J, -1)


def _norm_of_product(factors: list[tuple[np.ndarray, np.ndarray] | None]) -> float:
    """Return |A·B| of one adapter, or |A·B - A'·B'| of two.

    The difference is itself a product: A and -A' side by side, times B stacked on B'.
    """
    signed_a = []
    b_factors = []
    # A single adapter takes the first sign only.
    for sign, pair in zip((1, -1), factors, strict=False):
        if pair is not None:
            signed_a.append(sign * pair[0])
            b_factors.append(pair[1])
    a = np.concatenate(signed_a, axis=1)
    b = np.concatenate(b_factors)
    # Rounding can make the sum slightly negative where the two adapters are equal.
    return math.sqrt(max(0.0, float(np.sum((a.T @ a) * (b @ b.T)))))


def comparison_tables(comparison: Comparison, top: int) -> Iterator[str | Table]:
    """Yield the titles and tables of a comparison for a terminal.

    Args:
        comparison: the comparison.
        top: number of matrices to list, largest relative change first. A heat map of layers and experts follows.
    """
    yield f"norm of the change relative to the norm of the weight in {comparison.base}"
    table = Table(box=None)
    for column in ("layer", "module", "expert", "change", "weight", "change / weight"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for change in comparison.changes[:top]:
        place = ["" if x is None else str(x) for x in (change.layer, change.module, change.expert)]
        table.add_row(*place, f"{change.delta:.4g}", f"{change.weight:.4g}", f"{change.relative:.3%}")
    yield table
    experts = comparison.experts()
    if not experts:
        return
    yield "relative change of each expert, over its adapted matrices, in %"
    heat_map = Table(box=None)
    heat_map.add_column("layer", justify="right")
    for e in range(len(experts[0])):
        heat_map.add_column(str(e), justify="right")
    largest = max(map(max, experts)) or 1.0
    for layer, row in zip(comparison.sparse_layers(), experts, strict=True):
        heat_map.add_row(str(layer), *(Text(f"{100 * x:.3g}", style=_heat(x / largest)) for x in row))
    yield heat_map


def _heat(share: float) -> str:
    """Return a style from black on white (no change) to white on dark red (the largest change)."""
    text_color = "white" if share > 0.5 else "black"
    red = 255 - round(100 * share**2)
    fade = round(255 * (1 - share))
    return f"{text_color} on rgb({red},{fade},{fade})"
