"""Names of a model's tensors in external files, our paths, and the transform between them: one two-way table per layout.

In files, linear weights are (out, in). Ours are einsum operands, (in dims…, out dims…), stacked over repeats of the period (and
over experts). Of Hugging Face's layouts, the per-expert one is written, which transformers 4 and 5, vLLM and llama.cpp read.
transformers 5's fused experts, and the prefixes of a text model inside a vision wrapper, are only read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np

from moe_train import config
from moe_train.model.paths import ParameterPath, in_layer


class Row(NamedTuple):
    """A tensor of a file and our parameter.

    Letters of dims: V vocabulary, D model_dim, N heads, K kv heads, H head_dim, F ffn_dim, E experts, J rank of an adapter; H may
    be written as its halves, Z = 2 and P = H / 2. Adjacent letters form one dim.
    """

    name: str
    """Name in the file, without the layer's prefix if it belongs to a layer."""
    file_dims: str
    """Dims of the file's tensor, by letter."""
    path: str
    """Path of our parameter."""
    internal_dims: str
    """Dims of our parameter, by letter."""
    stack: Literal["", "experts", "gate of gate_up", "up of gate_up"] = ""
    """What else the file's tensor contains: all experts, (E, dims); or gate stacked on up for all experts, (E, 2F, D)."""


@dataclass(frozen=True)
class TensorLayout:
    """How files of one kind name the tensors of a model."""

    file_format: config.FileFormat
    embed: Row
    norm: Row
    head: Row
    layer: str
    """Prefix of the names of layer `{l}`."""
    of_layer: tuple[Row, ...]
    dense: tuple[Row, ...]
    router: Row
    experts: tuple[Row, ...]
    """Rows of the experts; `{e}` stands for the expert's index if each expert has tensors of its own."""
    adapters: tuple[str, str]
    """Names of A (rank, in) and B (out, rank) for `{stem}`, a weight's name without `.weight`."""
    adapters_of_embed: tuple[str, str] | None = None
    """The same for the embedding, A (rank, V) and B (D, rank); None if routers, embedding and head cannot have adapters."""


def hugging_face(body: str = "model.", head: str = "", fused: bool = False) -> TensorLayout:
    """Build a variant of Hugging Face's layout.

    Args:
        body: prefix of all names except the head's; the default is the one that is written.
        head: prefix of the head's name; the default is the one that is written.
        fused: whether experts have transformers 5's fused layout.
    """
    if fused:
        router = Row("mlp.gate.weight", "E D", "ffn.router.weight", "D E")
        experts = (
            # Two rows share a tensor: its rows 0 to F - 1 are the gate, F to 2F - 1 the up projection. The names have no `.weight`.
            Row("mlp.experts.gate_up_proj", "F D", "ffn.gate_proj.weight", "D F", "gate of gate_up"),
            Row("mlp.experts.gate_up_proj", "F D", "ffn.up_proj.weight", "D F", "up of gate_up"),
            Row("mlp.experts.down_proj", "D F", "ffn.down_proj.weight", "F D", "experts"),
        )
    else:
        router = Row("block_sparse_moe.gate.weight", "E D", "ffn.router.weight", "D E")
        experts = (
            # Mixtral's numbers: w1 is the gate (to which silu applies), w3 the up and w2 the down projection.
            Row("block_sparse_moe.experts.{e}.w1.weight", "F D", "ffn.gate_proj.weight", "D F"),
            Row("block_sparse_moe.experts.{e}.w3.weight", "F D", "ffn.up_proj.weight", "D F"),
            Row("block_sparse_moe.experts.{e}.w2.weight", "D F", "ffn.down_proj.weight", "F D"),
        )
    return TensorLayout(
        file_format="hf",
        embed=Row(f"{body}embed_tokens.weight", "V D", "embed.weight", "V D"),
        norm=Row(f"{body}norm.weight", "D", "final_norm.scale", "D"),
        head=Row(f"{head}lm_head.weight", "V D", "head.weight", "V D"),
        layer=f"{body}layers.{{l}}.",
        of_layer=(
            Row("input_layernorm.weight", "D", "attention_norm.scale", "D"),
            Row("self_attn.q_proj.weight", "NH D", "attention.q_proj.weight", "D N H"),
            Row("self_attn.k_proj.weight", "KH D", "attention.k_proj.weight", "D K H"),
            Row("self_attn.v_proj.weight", "KH D", "attention.v_proj.weight", "D K H"),
            Row("self_attn.o_proj.weight", "D NH", "attention.o_proj.weight", "N H D"),
            # Hugging Face names this norm after what precedes it; it normalizes the input of the feed-forward part.
            Row("post_attention_layernorm.weight", "D", "ffn_norm.scale", "D"),
        ),
        dense=(
            Row("mlp.gate_proj.weight", "F D", "ffn.gate_proj.weight", "D F"),
            Row("mlp.up_proj.weight", "F D", "ffn.up_proj.weight", "D F"),
            Row("mlp.down_proj.weight", "D F", "ffn.down_proj.weight", "F D"),
        ),
        router=router,
        experts=experts,
        adapters=("base_model.model.{stem}.lora_A.weight", "base_model.model.{stem}.lora_B.weight"),
        adapters_of_embed=("base_model.model.{stem}.lora_embedding_A", "base_model.model.{stem}.lora_embedding_B"),
    )


HUGGING_FACE = hugging_face()
"""The layout that is written for Hugging Face."""
_BODIES = (("model.language_model.", ""), ("language_model.model.", "language_model."), ("model.", ""))
"""Prefixes of body and head of a text model: inside a multimodal model in memory, in its files, and alone."""
WRAPPED = hugging_face("model.language_model.")
"""The names that transformers 5 gives to the text model inside a multimodal model, and so the names of its adapters."""
WRAPPED_IN_FILES = hugging_face("language_model.model.", "language_model.")
"""The names of the text model in the files of a multimodal model, as transformers saves it."""

MISTRAL = TensorLayout(
    file_format="mistral",
    embed=Row("tok_embeddings.weight", "V D", "embed.weight", "V D"),
    norm=Row("norm.weight", "D", "final_norm.scale", "D"),
    head=Row("output.weight", "V D", "head.weight", "V D"),
    layer="layers.{l}.",
    of_layer=(
        Row("attention_norm.weight", "D", "attention_norm.scale", "D"),
        # rotary pairs are adjacent; ours, like Hugging Face's, are half a head apart
        Row("attention.wq.weight", "NPZ D", "attention.q_proj.weight", "D N ZP"),
        Row("attention.wk.weight", "KPZ D", "attention.k_proj.weight", "D K ZP"),
        Row("attention.wv.weight", "KH D", "attention.v_proj.weight", "D K H"),
        Row("attention.wo.weight", "D NH", "attention.o_proj.weight", "N H D"),
        Row("ffn_norm.weight", "D", "ffn_norm.scale", "D"),
    ),
    dense=(
        Row("feed_forward.w1.weight", "F D", "ffn.gate_proj.weight", "D F"),
        Row("feed_forward.w3.weight", "F D", "ffn.up_proj.weight", "D F"),
        Row("feed_forward.w2.weight", "D F", "ffn.down_proj.weight", "F D"),
    ),
    router=Row("feed_forward.gate.weight", "E D", "ffn.router.weight", "D E"),
    experts=(
        Row("feed_forward.experts.{e}.w1.weight", "F D", "ffn.gate_proj.weight", "D F"),
        Row("feed_forward.experts.{e}.w3.weight", "F D", "ffn.up_proj.weight", "D F"),
        Row("feed_forward.experts.{e}.w2.weight", "D F", "ffn.down_proj.weight", "F D"),
    ),
    adapters=("{stem}.lora_A.weight", "{stem}.lora_B.weight"),
)
"""Mistral's own layout: consolidated.safetensors and lora.safetensors."""
MISTRAL_WITH_AUDIO = replace(MISTRAL, embed=MISTRAL.embed._replace(name="mm_whisper_embeddings.tok_embeddings.weight"))
"""The same for a model with an audio tower, which keeps the embeddings of text and audio together."""

GGUF = TensorLayout(
    file_format="gguf",
    embed=Row("token_embd.weight", "V D", "embed.weight", "V D"),
    norm=Row("output_norm.weight", "D", "final_norm.scale", "D"),
    head=Row("output.weight", "V D", "head.weight", "V D"),
    layer="blk.{l}.",
    of_layer=(
        Row("attn_norm.weight", "D", "attention_norm.scale", "D"),
        # llama.cpp's converter brings q and k to the interleaved rotary order, that of Mistral's own files.
        Row("attn_q.weight", "NPZ D", "attention.q_proj.weight", "D N ZP"),
        Row("attn_k.weight", "KPZ D", "attention.k_proj.weight", "D K ZP"),
        Row("attn_v.weight", "KH D", "attention.v_proj.weight", "D K H"),
        Row("attn_output.weight", "D NH", "attention.o_proj.weight", "N H D"),
        Row("ffn_norm.weight", "D", "ffn_norm.scale", "D"),
    ),
    dense=(
        Row("ffn_gate.weight", "F D", "ffn.gate_proj.weight", "D F"),
        Row("ffn_up.weight", "F D", "ffn.up_proj.weight", "D F"),
        Row("ffn_down.weight", "D F", "ffn.down_proj.weight", "F D"),
    ),
    router=Row("ffn_gate_inp.weight", "E D", "ffn.router.weight", "D E"),
    experts=(
        Row("ffn_gate_exps.weight", "F D", "ffn.gate_proj.weight", "D F", "experts"),
        Row("ffn_up_exps.weight", "F D", "ffn.up_proj.weight", "D F", "experts"),
        Row("ffn_down_exps.weight", "D F", "ffn.down_proj.weight", "F D", "experts"),
    ),
    adapters=("{stem}.weight.lora_a", "{stem}.weight.lora_b"),
)
"""llama.cpp's architectures `llama` and `mistral3`; shapes are in numpy's order, the reverse of the file's."""

OUTSIDE_TEXT = ("vision_tower.", "multi_modal_projector.", "audio_tower.")
"""Parts of the names of the tensors of a multimodal model that do not belong to its text model."""
RECOMPUTED = (".rotary_emb.inv_freq",)
"""Parts of the names of tensors that every reader computes from config.json, so that nothing is lost without them."""


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


def weight_pieces(model: config.Model, layout: TensorLayout = HUGGING_FACE) -> list[WeightPiece]:
    """List every weight of `model` in the order of the layers.

    Raises:
        ValueError: the layout cannot express the model.
    """
    if inexpressible := config.without_format(model, layout.file_format):
        raise ValueError(f"no file format has a place for {inexpressible} of family {model.family}")
    sizes = _sizes(model)
    table = [_piece(sizes, layout.embed)]
    for position in config.layers(model):
        table += _pieces_of_layer(model, layout, position)
    table.append(_piece(sizes, layout.norm))
    if not model.tie_embeddings:
        table.append(_piece(sizes, layout.head))
    return table


def _pieces_of_layer(model: config.Model, layout: TensorLayout, position: config.LayerPosition) -> list[WeightPiece]:
    """List the weights of one layer: those that every layer has, and each expert's."""
    sizes = _sizes(model, position.ffn)
    prefix = layout.layer.format(l=position.layer)
    rows = layout.of_layer
    # The kind is the layer's own, since a sparse model may begin with dense layers.
    rows += layout.dense if isinstance(position.ffn, config.DenseFfn) else (layout.router,)
    table = [_piece(sizes, _in_layer(row, position, prefix), (position.repeat,)) for row in rows]
    for expert in range(sizes.get("E", 0)):
        lead = (position.repeat, expert)
        table += [_piece(sizes, _in_layer(row, position, prefix), lead) for row in layout.experts]
    return table


def _in_layer(row: Row, position: config.LayerPosition, prefix: str) -> Row:
    """Return the row with the complete names of a tensor of a layer."""
    return row._replace(name=prefix + row.name, path=in_layer(position, row.path))


def detect_hugging_face(names: Collection[str]) -> TensorLayout:
    """Detect the variant of Hugging Face's layout from the tensor names of a file."""
    # Without an embedding, check_file_tensors reports what is missing under the names of a text model alone.
    body = next((prefix for prefix in _BODIES if f"{prefix[0]}embed_tokens.weight" in names), _BODIES[-1])
    return hugging_face(*body, fused=any(name.endswith("mlp.experts.gate_up_proj") for name in names))


def detect_adapted(names: Collection[str]) -> TensorLayout:
    """Detect from the names of a PEFT file whether its base is a text model or a vision wrapper."""
    # Without the last one, `model.`, which the names inside a wrapper can begin with too.
    for body, head in _BODIES[:-1]:
        prefix, _ = HUGGING_FACE.adapters[0].split("{stem}")
        if any(name.startswith(prefix + body) for name in names):
            return hugging_face(body, head)
    return HUGGING_FACE


def linear_rows(ffn: config.Ffn, layout: TensorLayout = HUGGING_FACE) -> list[Row]:
    """Return the rows of the linear maps, without routers, of a layer with this feed-forward part.

    Rows of an expert stand for every expert.
    """
    rows = layout.dense if isinstance(ffn, config.DenseFfn) else layout.experts
    # A single letter is a norm, which has no adapter.
    return [row for row in (*layout.of_layer, *rows) if " " in row.file_dims]


def lora_pieces(model: config.Model, ranks: Mapping[str, int], layout: TensorLayout = HUGGING_FACE) -> list[WeightPiece]:
    """List the matrices of adapters under the layout's names.

    A is (J, in) in the file and (in dims…, J) in our arrays; B is (out, J) and (J, out dims…).

    Args:
        model: the architecture of the base.
        ranks: rank of each of our modules that has an adapter, such as `stacks.0.layers.0.ffn.up_proj`.
        layout: names of the files.
    """
    table: list[WeightPiece] = []
    for row, sizes, leads in _adaptable_rows(model, layout):
        module = ParameterPath.parse(row.path).module_path
        if module not in ranks:
            continue
        row_a, row_b = _lora_rows(row, module, layout)
        sizes_with_rank = {**sizes, "J": ranks[module]}
        for lead in leads:
            table.append(_piece(sizes_with_rank, row_a, lead))
            table.append(_piece(sizes_with_rank, row_b, lead))
    return table


def _adaptable_rows(
    model: config.Model, layout: TensorLayout
) -> Iterator[tuple[Row, Mapping[str, int], Sequence[tuple[int, ...]]]]:
    """Yield the row, the sizes of dims and the entries in the stacked dims of each weight that can have an adapter."""
    only_linear = layout.adapters_of_embed is None
    if not only_linear:
        yield layout.embed, _sizes(model), [()]
    for position in config.layers(model):
        sizes = _sizes(model, position.ffn)
        prefix = layout.layer.format(l=position.layer)
        expert_leads = [(position.repeat, e) for e in range(sizes.get("E", 0))]
        rows = linear_rows(position.ffn, layout)
        if expert_leads and not only_linear:
            rows.append(layout.router)
        for row in rows:
            is_expert = bool(expert_leads) and row in layout.experts
            yield _in_layer(row, position, prefix), sizes, expert_leads if is_expert else [(position.repeat,)]
    if not only_linear and not model.tie_embeddings:
        yield layout.head, _sizes(model), [()]


def _lora_rows(row: Row, module: str, layout: TensorLayout) -> tuple[Row, Row]:
    """Return the rows of A and B of the weight that `row` describes."""
    out_dims, in_dims = row.file_dims.split()
    name_templates = layout.adapters
    if row is layout.embed and layout.adapters_of_embed is not None:
        in_dims, out_dims = row.file_dims.split()  # the embedding is a lookup: the rows of its table are the inputs
        name_templates = layout.adapters_of_embed
    stem = row.name.removesuffix(".weight")
    name_a, name_b = (template.format(stem=stem) for template in name_templates)
    # A has the weight's in dims and B its out dims, each followed or preceded by the rank.
    # Compared as sets of letters, since one dim of the file, such as NH, can be two of ours.
    internal_in = " ".join(dim for dim in row.internal_dims.split() if set(dim) <= set(in_dims))
    internal_out = " ".join(dim for dim in row.internal_dims.split() if set(dim) <= set(out_dims))
    row_a = Row(name_a, f"J {in_dims}", f"{module}.lora_a", f"{internal_in} J", row.stack)
    row_b = Row(name_b, f"{out_dims} J", f"{module}.lora_b", f"J {internal_out}", row.stack)
    return row_a, row_b


class HasShape(Protocol):
    """Anything with a shape, such as a tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dims."""
        ...


def check_counts(source: object, model: config.Model, tensors: Mapping[str, HasShape]) -> None:
    """Raise ValueError if a file states more layers or experts than its tensors can have.

    A table of all of them might otherwise exceed memory.

    Args:
        source: the file, for messages.
        model: the architecture that the file states.
        tensors: tensors by name in the file.
    """
    # A layer has tensors of its own, and E is a dim of its router, so a true count exceeds neither limit.
    largest = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    experts = model.ffn.num_experts if isinstance(model.ffn, config.MoeFfn) else 0
    counts = (
        (model.num_layers, "layers", len(tensors)),
        (experts, "experts", largest),
    )
    for count, kind, limit in counts:
        if count > limit:
            raise ValueError(
                f"{source} states {count:,} {kind}, but has {len(tensors):,} tensors with no dim above {largest:,}; "
                "correct its config"
            )


def check_file_tensors(
    source: object,
    table: Collection[WeightPiece],
    tensors: Mapping[str, tuple[int, ...]],
    parameters: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise ValueError unless a file has exactly the table's tensors, fills each parameter once, and shapes fit.

    Args:
        source: the file, for messages.
        table: the pieces of the architecture.
        tensors: shapes by name in the file.
        parameters: shapes by our path.
    """
    # The pieces of a stacked tensor share its name and shape.
    expected_shapes = {piece.name: piece.shape for piece in table}
    faults = []
    if missing := [name for name in expected_shapes if name not in tensors]:
        faults.append(f"lacks {_first_few(missing)}")
    if extra := [name for name in tensors if name not in expected_shapes]:
        faults.append(f"has {_first_few(extra)}, which this architecture does not have")
    wrong_shapes: list[str] = []
    for name, shape in expected_shapes.items():
        if name in tensors and tuple(tensors[name]) != shape:
            wrong_shapes.append(f"{name} of shape {tuple(tensors[name])} instead of {shape}")
    if wrong_shapes:
        faults.append(f"has {_first_few(wrong_shapes)}")
    if faults:
        raise ValueError(f"{source} does not hold the model that its config describes: it {'; it '.join(faults)}")
    filled: dict[str, set[tuple[int, ...]]] = {}
    for piece in table:
        leads = filled.setdefault(piece.path, set())
        assert piece.lead not in leads, piece
        leads.add(piece.lead)
    if unfilled := sorted(set(parameters) - set(filled)):
        raise ValueError(f"{source} has no tensors for {_first_few(unfilled)}; load these from another file")
    for piece in table:
        if piece.path not in parameters:
            continue
        shape = tuple(parameters[piece.path])
        stacked = len(piece.lead)
        # No entry occurs twice (asserted above), so their number shows whether the stacked dims are filled.
        if shape[stacked:] != piece.internal_shape or math.prod(shape[:stacked]) != len(filled[piece.path]):
            provided = f"{len(filled[piece.path])} x {piece.internal_shape}"
            raise ValueError(f"{source}: {piece.name} provides {provided}, but {piece.path} has shape {shape}")


def _first_few(names: Collection[str], limit: int = 3) -> str:
    """Return the first names, and how many more there are."""
    text = ", ".join(list(names)[:limit])
    if len(names) > limit:
        text += f" and {len(names) - limit} more"
    return text


def _sizes(model: config.Model, ffn: config.Ffn | None = None) -> dict[str, int]:
    """Return the sizes of dims by letter; `ffn` is the layer's feed-forward part, for a tensor of a layer."""
    a = config.require_grouped_query(model.attention, "a file")
    sizes = {"V": model.vocab_size, "D": model.model_dim}
    sizes |= {"N": a.num_heads, "K": a.num_kv_heads, "H": a.head_dim, "Z": 2, "P": a.head_dim // 2}
    if ffn is not None:
        sizes["F"] = ffn.ffn_dim
    if isinstance(ffn, config.MoeFfn):
        sizes["E"] = ffn.num_experts
    return sizes


def _piece(sizes: Mapping[str, int], row: Row, lead: tuple[int, ...] = ()) -> WeightPiece:
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
