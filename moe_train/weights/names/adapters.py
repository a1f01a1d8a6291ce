"""The pieces of LoRA adapters in files, under the names of the weights that they adapt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from moe_train import config
from moe_train.model.paths import ParameterPath
from moe_train.weights.names.hugging_face import hugging_face_of
from moe_train.weights.names.pieces import WeightPiece, piece_of, row_in_layer, sizes_of
from moe_train.weights.names.tensor_layout import Row, TensorLayout


def linear_rows(attention: config.Attention, ffn: config.Ffn, layout: TensorLayout) -> list[Row]:
    """Return the rows of the linear maps, without routers, of a layer with these parts.

    Rows of an expert stand for every expert.
    """
    rows = list(layout.attention_rows(attention))
    if isinstance(ffn, config.DenseFfn):
        rows += layout.dense
    else:
        rows += layout.shared if ffn.num_shared_experts else ()
        rows += layout.experts
    # A single letter is a norm, which has no adapter.
    return [row for row in rows if " " in row.file_dims]


def lora_pieces(model: config.Model, ranks: Mapping[str, int], layout: TensorLayout | None = None) -> list[WeightPiece]:
    """List the matrices of adapters under the layout's names.

    A is (J, in) in the file and (in dims…, J) in our arrays; B is (out, J) and (J, out dims…).

    Args:
        model: the architecture of the base.
        ranks: rank of each of our modules that has an adapter, such as `stacks.0.layers.0.ffn.up_proj`.
        layout: names of the files; None for those of the layout that is written for Hugging Face.
    """
    if layout is None:
        layout = hugging_face_of(model)
    table: list[WeightPiece] = []
    for row, sizes, leads in _adaptable_rows(model, layout):
        module = ParameterPath.parse(row.path).module_path
        if module not in ranks:
            continue
        row_a, row_b = _lora_rows(row, module, layout)
        sizes_with_rank = {**sizes, "J": ranks[module]}
        for lead in leads:
            table.append(piece_of(sizes_with_rank, row_a, lead))
            table.append(piece_of(sizes_with_rank, row_b, lead))
    return table


def _adaptable_rows(
    model: config.Model, layout: TensorLayout
) -> Iterator[tuple[Row, Mapping[str, int], Sequence[tuple[int, ...]]]]:
    """Yield the row, the sizes of dims and the entries in the stacked dims of each weight that can have an adapter."""
    only_linear = layout.adapters_of_embed is None
    if not only_linear:
        yield layout.embed, sizes_of(model), [()]
    for position in config.layers(model):
        sizes = sizes_of(model, position.ffn)
        prefix = layout.layer.format(l=position.layer)
        expert_leads = [(position.repeat, e) for e in range(sizes.get("E", 0))]
        rows = linear_rows(model.attention, position.ffn, layout)
        if expert_leads and not only_linear:
            rows.append(layout.router)
        for row in rows:
            is_expert = bool(expert_leads) and row in layout.experts
            yield row_in_layer(row, position, prefix), sizes, expert_leads if is_expert else [(position.repeat,)]
    if not only_linear and not model.tie_embeddings:
        yield layout.head, sizes_of(model), [()]


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
