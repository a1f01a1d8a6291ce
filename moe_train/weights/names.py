"""The names of a model's tensors in Hugging Face files, ours, and the transform between: one two-way table.

File: the per-expert layout that transformers 4 and 5, vLLM and llama.cpp read; linear weights (out, in).
Ours: einsum operands (in dims…, out dims…), stacked on repeats of the period (and on experts).
Also read, never written: transformers 5's fused experts, and the prefixes of a text model inside a vision wrapper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_train import config

# Rows: name in the file, its dims; our path, its dims. Letters: V vocabulary, D model_dim, N heads, K kv heads,
# H head_dim, F ffn_dim, E experts, J rank of an adapter. A group such as `NH` is one dim of the file.
Row = tuple[str, str, str, str]
_MODEL: tuple[Row, ...] = (
    ("embed_tokens.weight", "V D", "embed.weight", "VD"),
    ("norm.weight", "D", "final_norm.scale", "D"),
)
_HEAD: Row = ("lm_head.weight", "V D", "head", "VD")
_LAYER: tuple[Row, ...] = (
    ("input_layernorm.weight", "D", "attention_norm.scale", "D"),
    ("self_attn.q_proj.weight", "NH D", "attention.q_proj.weight", "DNH"),
    ("self_attn.k_proj.weight", "KH D", "attention.k_proj.weight", "DKH"),
    ("self_attn.v_proj.weight", "KH D", "attention.v_proj.weight", "DKH"),
    ("self_attn.o_proj.weight", "D NH", "attention.o_proj.weight", "NHD"),
    ("post_attention_layernorm.weight", "D", "ffn_norm.scale", "D"),
)
_DENSE: tuple[Row, ...] = (
    ("mlp.gate_proj.weight", "F D", "ffn.gate_proj.weight", "DF"),
    ("mlp.up_proj.weight", "F D", "ffn.up_proj.weight", "DF"),
    ("mlp.down_proj.weight", "D F", "ffn.down_proj.weight", "FD"),
)
_ROUTER: Row = ("block_sparse_moe.gate.weight", "E D", "ffn.router.weight", "DE")
_EXPERT: tuple[Row, ...] = (
    ("block_sparse_moe.experts.{e}.w1.weight", "F D", "ffn.gate_proj.weight", "DF"),
    ("block_sparse_moe.experts.{e}.w3.weight", "F D", "ffn.up_proj.weight", "DF"),
    ("block_sparse_moe.experts.{e}.w2.weight", "D F", "ffn.down_proj.weight", "FD"),
)
_FUSED_ROUTER: Row = ("mlp.gate.weight", "E D", "ffn.router.weight", "DE")
_FUSED_GATE_UP, _FUSED_DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

PREFIXES = (("model.", ""), ("model.language_model.", ""), ("language_model.model.", "language_model."))
"""Before the names of the body, and before `lm_head`; the first is written."""
ADAPTER_PREFIX = "base_model.model.model."
IGNORED = (".rotary_emb.inv_freq", "model.vision_tower.", "model.multi_modal_projector.", "vision_tower.", "multi_modal_projector.")
"""Parts of names in files that hold no weight of the text model."""


@dataclass(frozen=True)
class Piece:
    """One matrix or vector of the model: where it is in the file, and where it is in our arrays."""

    name: str
    """Tensor of the file."""
    shape: tuple[int, ...]
    """Of that whole tensor."""
    part: tuple[int | tuple[int, int], ...]
    """Which part of the tensor: an index, or a (start, end), of each leading dim; () is the whole."""
    groups: tuple[tuple[int, ...], ...]
    """The part's dims, each split into ours: ((N, H), (D,))."""
    path: str
    """Our parameter."""
    lead: tuple[int, ...]
    """Its index in the stacked dims: (), (repeat,) or (repeat, expert)."""
    axes: tuple[int, ...]
    """ours = part.reshape(N, H, D).transpose(axes)."""

    @property
    def ours_shape(self) -> tuple[int, ...]:
        dims = [size for group in self.groups for size in group]
        return tuple(dims[axis] for axis in self.axes)

    def to_file(self, ours: np.ndarray) -> np.ndarray:
        """(in dims…, out dims…) -> the part of the file's tensor."""
        return ours.transpose(np.argsort(self.axes)).reshape([math.prod(group) for group in self.groups])

    def from_file(
        self, read: Callable[[tuple[int | slice, ...]], np.ndarray], ranges: Sequence[tuple[int, int]] | None = None
    ) -> np.ndarray:
        """Our matrix, or the part of it that `ranges` names, reading no more of the file than that.

        read: an index -> that part of the file's tensor. ranges: (start, stop) of each of our dims; inside a group
        such as NH only the first dim may be cut, as the others are never sharded.
        """
        shape = self.ours_shape
        of_axis = dict(zip(self.axes, ranges or [(0, size) for size in shape], strict=True))
        rows, dims, axis = [], [], 0
        for group in self.groups:
            (start, stop), *whole = (of_axis[axis + i] for i in range(len(group)))
            assert whole == [(0, size) for size in group[1:]], (self.path, ranges)
            inner = math.prod(group[1:])
            rows.append((start * inner, stop * inner))
            dims += [stop - start, *group[1:]]
            axis += len(group)
        where: list[int | slice] = [at for at in self.part if isinstance(at, int)]
        offsets = [at[0] for at in self.part if not isinstance(at, int)] + [0] * len(rows)
        where += [slice(start + o, stop + o) for (start, stop), o in zip(rows, offsets, strict=False)]
        return read(tuple(where)).reshape(dims).transpose(self.axes)


def pieces(model: config.Model, prefix: tuple[str, str] = PREFIXES[0], fused: bool = False) -> list[Piece]:
    """Every weight of `model` in the order of the layers; `fused` is transformers 5's layout of the experts."""
    body, head = prefix
    sizes = _sizes(model)
    found = [_piece(sizes, row, body, "") for row in _MODEL[:1]]
    for layer, path, repeat in _layers(model):
        prefix_of_layer = f"{body}layers.{layer}."
        rows = _LAYER + (_DENSE if isinstance(model.ffn, config.DenseFfn) else (_FUSED_ROUTER if fused else _ROUTER,))
        found += [_piece(sizes, row, prefix_of_layer, path, (repeat,)) for row in rows]
        if isinstance(model.ffn, config.MoeFfn):
            for e in range(model.ffn.num_experts):
                expert = _fused_expert(sizes, e) if fused else [(row, (), None) for row in _EXPERT]
                found += [_piece(sizes, row, prefix_of_layer, path, (repeat, e), *rest) for row, *rest in expert]
    found += [_piece(sizes, row, body, "") for row in _MODEL[1:]]
    return found if model.tie_embeddings else [*found, _piece(sizes, _HEAD, head, "")]


def pieces_of(model: config.Model, names: Collection[str]) -> list[Piece]:
    """`pieces` in the layout that a file with these tensor names has."""
    prefix = next((p for p in PREFIXES if f"{p[0]}{_MODEL[0][0]}" in names), PREFIXES[0])
    return pieces(model, prefix, fused=any(name.endswith(_FUSED_GATE_UP) for name in names))


def linear_rows(model: config.Model) -> list[Row]:
    """Rows of the linear maps of a layer that can have an adapter; `{e}` in the name of an expert's."""
    ffn = _DENSE if isinstance(model.ffn, config.DenseFfn) else _EXPERT
    return [row for row in (*_LAYER, *ffn) if " " in row[1]]


def adapter_pieces(model: config.Model, ranks: Mapping[str, int]) -> list[Piece]:
    """Adapters, named as PEFT names them; `ranks`: of each of our modules (`stacks.0.layers.0.ffn.up_proj`).

    lora_A is (J, in) in the file and (in dims…, J) here, lora_B (out, J) and (J, out dims…).
    """
    found = []
    for layer, path, repeat in _layers(model):
        for name, dims, ours, letters in linear_rows(model):
            module = (path + ours).removesuffix(".weight")
            if module not in ranks:
                continue
            out, into = dims.split()
            inputs, outputs = ("".join(letter for letter in letters if letter in group) for group in (into, out))
            stem = name.removesuffix(".weight")
            a: Row = (f"{stem}.lora_A.weight", f"J {into}", f"{module}.lora_a", f"{inputs}J")
            b: Row = (f"{stem}.lora_B.weight", f"{out} J", f"{module}.lora_b", f"J{outputs}")
            sizes = _sizes(model) | {"J": ranks[module]}
            leads = [(repeat, e) for e in range(sizes["E"])] if "{e}" in name else [(repeat,)]
            prefix = f"{ADAPTER_PREFIX}layers.{layer}."
            found += [_piece(sizes, row, prefix, "", lead) for lead in leads for row in (a, b)]
    return found


def check(
    where: object, table: Collection[Piece], tensors: Mapping[str, tuple[int, ...]], parameters: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError unless the file has the table's tensors and no others, fills each parameter once, and shapes fit.

    where: for the message. tensors: shapes by name in the file. parameters: shapes by our path.
    """
    wanted = {piece.name: piece.shape for piece in table}
    faults = []
    if missing := [name for name in wanted if name not in tensors]:
        faults.append(f"lacks {_some(missing)}")
    if extra := [name for name in tensors if name not in wanted]:
        faults.append(f"has {_some(extra)}, which this architecture has not")
    if wrong := [n for n, shape in wanted.items() if n in tensors and tuple(tensors[n]) != shape]:
        faults.append("has " + _some([f"{n} of shape {tuple(tensors[n])} instead of {wanted[n]}" for n in wrong]))
    if faults:
        raise ValueError(f"{where} does not hold the model that its config describes: it {'; it '.join(faults)}")
    filled: dict[str, set[tuple[int, ...]]] = {}
    for piece in table:
        leads = filled.setdefault(piece.path, set())
        assert piece.lead not in leads, piece
        leads.add(piece.lead)
    if unfilled := sorted(set(parameters) - set(filled)):
        raise ValueError(f"{where} has no tensors for {_some(unfilled)}; take these from elsewhere")
    for piece in table:
        if piece.path not in parameters:
            continue
        shape, lead = tuple(parameters[piece.path]), len(piece.lead)
        if shape[lead:] != piece.ours_shape or math.prod(shape[:lead]) != len(filled[piece.path]):
            raise ValueError(f"{where}: {piece.name} gives {len(filled[piece.path])} x {piece.ours_shape}, {piece.path} is {shape}")


def _some(names: Collection[str], show: int = 3) -> str:
    more = f" and {len(names) - show} more" if len(names) > show else ""
    return ", ".join(list(names)[:show]) + more


def _sizes(model: config.Model) -> dict[str, int]:
    a = model.attention
    sizes = {"V": model.vocab_size, "D": model.model_dim, "F": model.ffn.ffn_dim}
    sizes |= {"N": a.num_heads, "K": a.num_kv_heads, "H": a.head_dim}
    return sizes | ({"E": model.ffn.num_experts} if isinstance(model.ffn, config.MoeFfn) else {})


def _layers(model: config.Model) -> Iterator[tuple[int, str, int]]:
    """(layer, path of its place in the period, repeat)."""
    period = len(model.attention.windows)
    for layer in range(model.num_layers):
        yield layer, f"stacks.0.layers.{layer % period}.", layer // period


def _fused_expert(sizes: Mapping[str, int], e: int) -> list[tuple[Row, tuple, tuple[int, ...]]]:
    """Rows, part and whole shape of expert e's three matrices in the two fused tensors."""
    E, F, D = sizes["E"], sizes["F"], sizes["D"]
    gate_up = (E, 2 * F, D)
    return [
        ((_FUSED_GATE_UP, "F D", "ffn.gate_proj.weight", "DF"), (e, (0, F)), gate_up),
        ((_FUSED_GATE_UP, "F D", "ffn.up_proj.weight", "DF"), (e, (F, 2 * F)), gate_up),
        ((_FUSED_DOWN, "D F", "ffn.down_proj.weight", "FD"), (e,), (E, D, F)),
    ]


def _piece(
    sizes: Mapping[str, int],
    row: Row,
    name_prefix: str,
    path_prefix: str,
    lead: tuple[int, ...] = (),
    part: tuple[int | tuple[int, int], ...] = (),
    shape: tuple[int, ...] | None = None,
) -> Piece:
    name, dims, path, letters = row
    groups = tuple(tuple(sizes[letter] for letter in group) for group in dims.split())
    return Piece(
        name=name_prefix + (name.format(e=lead[1]) if len(lead) == 2 else name),
        shape=shape or tuple(math.prod(group) for group in groups),
        part=part,
        groups=groups,
        path=path_prefix + path,
        lead=lead,
        axes=tuple(dims.replace(" ", "").index(letter) for letter in letters),
    )
