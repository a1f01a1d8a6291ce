"""Weights of a vision or audio tower and its projector under their names in memory, and their adapters, as PEFT has them."""

from __future__ import annotations

from collections.abc import Mapping

from moe_train import config
from moe_train.weights.names.pieces import WeightPiece, piece_of
from moe_train.weights.names.tensor_layout import Row
from moe_train.weights.wrappers import audio_pieces, vision_pieces
from moe_train.weights.wrappers.tower_tensor import TowerRows

_IN_MEMORY = "model."
"""What transformers 5 puts before the names of files in memory, and so in the names of adapters."""


def pieces_in_memory(encoder: config.Encoder, model: config.Model) -> list[WeightPiece]:
    """List every weight of a tower and its projector under the names that transformers 5 gives to them in memory."""
    tower = _rows_of(encoder, model)
    return [piece_of(tower.sizes, row._replace(name=f"{_IN_MEMORY}{row.name}"), lead) for row, lead in tower.rows]


def adapter_pieces(encoder: config.Encoder, model: config.Model, ranks: Mapping[str, int]) -> list[WeightPiece]:
    """List A and B of the adapters of a tower and its projector, as PEFT names them on the wrapper.

    A is (J, in) and B (out, J). Those of a convolution are kernels: A is (J, channel, positions…) and B (out, J, 1…).

    Args:
        encoder: sizes of the tower.
        model: the text model.
        ranks: rank J of each module that has an adapter, such as `vision.projector.in_proj`; others are ignored.
    """
    tower = _rows_of(encoder, model)
    table: list[WeightPiece] = []
    for row, lead in tower.rows:
        module = row.path.removesuffix(".weight")
        if module not in ranks or not row.path.endswith(".weight"):
            continue
        out, *ins = row.file_dims.split()
        internal_in = " ".join(dim for dim in row.internal_dims.split() if set(dim) <= set("".join(ins)))
        internal_out = " ".join(dim for dim in row.internal_dims.split() if set(dim) <= set(out))
        stem = f"base_model.model.{_IN_MEMORY}{row.name.removesuffix('.weight')}"
        a = Row(f"{stem}.lora_A.weight", f"J {' '.join(ins)}", f"{module}.lora_a", f"{internal_in} J")
        b = Row(f"{stem}.lora_B.weight", f"{out} J", f"{module}.lora_b", f"J {internal_out}")
        # The positions of a kernel: two of a picture, one of sound.
        ones = "IK"[: len(ins) - 1]
        if ones:
            b = b._replace(file_dims=f"{out} J {' '.join(ones)}", internal_dims=f"J{ones} {internal_out}")
        sizes = {**tower.sizes, "J": ranks[module], "I": 1, "K": 1}
        table += [piece_of(sizes, a, lead), piece_of(sizes, b, lead)]
    return table


def _rows_of(encoder: config.Encoder, model: config.Model) -> TowerRows:
    """Return every tensor of a tower and its projector in Hugging Face's layout."""
    if isinstance(encoder, config.AudioEncoder):
        return audio_pieces.rows_of(encoder, model)
    return vision_pieces.rows_of(encoder, model)
