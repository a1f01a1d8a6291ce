"""The pieces of a model's tensors in files: where each matrix is, and the transform between the file's and ours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np

from moe_train import config
from moe_train.model.paths import in_layer
from moe_train.weights.names.hugging_face import hugging_face_of
from moe_train.weights.names.tensor_layout import Row, TensorLayout


@dataclass(frozen=True)
class WeightPiece:
    """One matrix or vector of the model: where it is in the file, and where it is in our arrays."""

    name: str
    """Name of the file's tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    part: tuple[int | tuple[int, int], ...]
    """The part of the tensor: an index or a (start, end) for each leading dim; () is the whole tensor."""
    groups: tuple[tuple[int, ...], ...]
    """The part's dims, each split into the sizes of its letters: ((N, H), (D,))."""
    path: str
    """Path of our parameter."""
    lead: tuple[int, ...]
    """Index in the stacked dims: (), (repeat,) or (repeat, expert)."""
    axes: tuple[tuple[int, ...], ...]
    """For each of our dims, the positions of its letters among those of the file's dims.

    Our matrix is part.reshape(N, H, D).transpose(2, 0, 1), after which each tuple becomes one dim.
    """

    @property
    def internal_shape(self) -> tuple[int, ...]:
        """Shape of our matrix."""
        sizes = self._sizes()
        return tuple(math.prod(sizes[axis] for axis in dim) for dim in self.axes)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the part in the file."""
        return tuple(math.prod(group) for group in self.groups)

    def _sizes(self) -> list[int]:
        """Return the size of each letter, in the file's order."""
        return list(itertools.chain.from_iterable(self.groups))

    def _flat_axes(self) -> list[int]:
        """Return the transposition from the file's order of letters to ours."""
        return list(itertools.chain.from_iterable(self.axes))

    def to_file(self, matrix: np.ndarray) -> np.ndarray:
        """Turn our matrix, (in dims…, out dims…), into the part of the file's tensor."""
        sizes = self._sizes()
        flat = self._flat_axes()
        # The argsort of a permutation is its inverse.
        return matrix.reshape([sizes[axis] for axis in flat]).transpose(np.argsort(flat)).reshape(self.part_shape)

    def from_file(
        self, read: Callable[[tuple[int | slice, ...]], np.ndarray], ranges: Sequence[tuple[int, int]] | None = None
    ) -> np.ndarray:
        """Read our matrix, or a part of it, without reading more of the file than that.

        Args:
            read: returns the part of the file's tensor at an index.
            ranges: (start, stop) of each of our dims; None to read all of them. In a group such as NH only the first letter can be
                cut, and a dim of several letters cannot be cut at all.
        """
        sizes = self._sizes()
        shape = self.internal_shape
        cuts = [(0, size) for size in sizes]
        for dim, cut, size in zip(self.axes, ranges or [(0, size) for size in shape], shape, strict=True):
            if len(dim) == 1:
                cuts[dim[0]] = cut
            else:
                assert cut == (0, size), (self.path, ranges)
        file_ranges: list[tuple[int, int]] = []
        letter_sizes: list[int] = []
        axis = 0
        for group in self.groups:
            start, stop = cuts[axis]
            # Only the first letter of a group is cut, since a cut of another one would not be contiguous in the file's dim.
            assert cuts[axis + 1 : axis + len(group)] == [(0, size) for size in group[1:]], (self.path, ranges)
            stride = math.prod(group[1:])
            file_ranges.append((start * stride, stop * stride))
            letter_sizes += [stop - start, *group[1:]]
            axis += len(group)
        # Integers of `part` come first: they select an expert. A range of `part` shifts the ranges within it.
        index: list[int | slice] = [item for item in self.part if isinstance(item, int)]
        offsets = [item[0] for item in self.part if not isinstance(item, int)] + [0] * len(file_ranges)
        for (start, stop), offset in zip(file_ranges, offsets, strict=False):
            index.append(slice(start + offset, stop + offset))
        matrix = read(tuple(index)).reshape(letter_sizes).transpose(self._flat_axes())
        return matrix.reshape([math.prod(letter_sizes[axis] for axis in dim) for dim in self.axes])


def weight_pieces(model: config.Model, layout: TensorLayout | None = None) -> list[WeightPiece]:
    """List every weight of `model` in the order of the layers.

    Args:
        model: the architecture.
        layout: names of the files; None for the layout that is written for Hugging Face.

    Raises:
        ValueError: the layout cannot express the model.
    """
    if layout is None:
        layout = hugging_face_of(model)
    if inexpressible := config.without_format(model, layout.file_format):
        raise ValueError(f"no file format has a place for {inexpressible} of family {model.family}")
    sizes = sizes_of(model)
    table = [piece_of(sizes, layout.embed)]
    for position in config.layers(model):
        table += _pieces_of_layer(model, layout, position)
    table.append(piece_of(sizes, layout.norm))
    if model.scores is not None:
        assert layout.scores is not None  # `without_format` has refused other formats
        table.append(piece_of(sizes, layout.scores))
    elif not model.tie_embeddings:
        table.append(piece_of(sizes, layout.head))
    return table


def _pieces_of_layer(model: config.Model, layout: TensorLayout, position: config.LayerPosition) -> list[WeightPiece]:
    """List the weights of one layer: those that every layer has, and each expert's."""
    sizes = sizes_of(model, position.ffn)
    prefix = layout.layer.format(l=position.layer)
    attention_norm, ffn_norm = layout.norms
    rows = (attention_norm, *layout.attention_rows(model.attention), ffn_norm, *layout.rows_of_tokens(position.ffn))
    table = [piece_of(sizes, row_in_layer(row, position, prefix), (position.repeat,)) for row in rows]
    for expert in range(sizes.get("E", 0)):
        lead = (position.repeat, expert)
        table += [piece_of(sizes, row_in_layer(row, position, prefix), lead) for row in layout.experts]
    return table


def row_in_layer(row: Row, position: config.LayerPosition, prefix: str) -> Row:
    """Return the row with the complete names of a tensor of a layer."""
    return row._replace(name=prefix + row.name, path=in_layer(position, row.path))


def sizes_of(model: config.Model, ffn: config.Ffn | None = None) -> dict[str, int]:
    """Return the sizes of dims by letter; `ffn` is the layer's feed-forward part, for a tensor of a layer."""
    a = model.attention
    sizes = {"V": model.vocab_size, "D": model.model_dim}
    if model.scores is not None:
        sizes["Y"] = model.scores.num_outputs
    match a:
        case config.GroupedQueryAttention():
            sizes |= {"N": a.num_heads, "K": a.num_kv_heads, "H": a.head_dim, "Z": 2, "P": a.head_dim // 2}
        case config.MultiHeadLatentAttention():
            sizes |= {"N": a.num_heads, "H": a.qk_head_dim, "W": a.v_head_dim, "U": a.qk_nope_head_dim + a.v_head_dim}
            sizes |= {"R": a.kv_lora_rank, "C": a.kv_lora_rank + a.qk_rope_head_dim, "Q": a.q_lora_rank or 0}
        case _:
            assert_never(a)
    if ffn is not None:
        sizes["F"] = ffn.ffn_dim
    if isinstance(ffn, config.MoeFfn):
        sizes["E"] = ffn.num_experts
        sizes["S"] = ffn.num_shared_experts * ffn.ffn_dim
    return sizes


def piece_of(sizes: Mapping[str, int], row: Row, lead: tuple[int, ...] = ()) -> WeightPiece:
    """Return the matrix of a row with this entry in the stacked dims; the row's names must be complete."""
    groups = tuple(tuple(sizes[letter] for letter in group) for group in row.file_dims.split())
    shape: tuple[int, ...] = tuple(math.prod(group) for group in groups)
    part: tuple[int | tuple[int, int], ...] = ()
    if row.stack == "experts":
        shape = (sizes["E"], *shape)
        part = (lead[1],)
    elif row.stack:
        F = shape[0]
        first_row = 0 if row.stack == "gate of gate_up" else F
        part = (lead[1], (first_row, first_row + F))
        shape = (sizes["E"], 2 * F, *shape[1:])
    name = row.name
    # The name of a stacked tensor has no {e}; formatting leaves it unchanged.
    if len(lead) == 2:
        name = name.format(e=lead[1])
    letters = row.file_dims.replace(" ", "")
    return WeightPiece(
        name=name,
        shape=shape,
        part=part,
        groups=groups,
        path=row.path,
        lead=lead,
        axes=tuple(tuple(letters.index(letter) for letter in dim) for dim in row.internal_dims.split()),
    )
