"""Adapters under the names of the weights that they adapt."""

from __future__ import annotations

import jax
import numpy as np

from moe_train import config
from moe_train.model import parameters, transformer
from moe_train.weights import names
from tests.tiny import ONE
from tests.weights.names.models import SMALL


def test_the_rank_of_an_adapter_is_no_part_of_the_rotary_order() -> None:
    """lora_B of q and k is permuted as the weight is, lora_A is not."""
    module = "stacks.0.layers.0.attention.q_proj"
    hf, native = (names.lora_pieces(SMALL, {module: 2}, layout)[:2] for layout in (names.HUGGING_FACE, names.MISTRAL))
    assert [piece.name for piece in native] == [f"layers.0.attention.wq.lora_{x}.weight" for x in "AB"]
    a, b = np.arange(2 * 6).reshape(2, 6), np.arange(24 * 2).reshape(24, 2)
    assert np.array_equal(hf[0].to_file(native[0].from_file(a.__getitem__)), a)
    assert np.array_equal(hf[1].to_file(native[1].from_file(b.__getitem__))[3], b[1])


def test_adapters_have_the_dims_of_their_layers() -> None:
    modules = ("attention.q_proj", "attention.o_proj", "ffn.gate_proj", "ffn.down_proj")
    ranks = {f"stacks.0.layers.0.{module}": 3 for module in modules}
    lora = config.Lora(targets=(config.LoraTarget(modules=modules, rank=3, alpha=3.0),))
    with jax.set_mesh(ONE):
        abstract = transformer.abstract_model(SMALL, config.Compute(), lora)
    shapes = {path: a.shape for path, a in parameters.parameters(abstract)[1].items() if ".lora_" in path}
    table = names.lora_pieces(SMALL, ranks)
    in_file = {piece.name: piece.shape for piece in table}
    names.check_file_tensors("here", table, in_file, shapes)
    body = "base_model.model.model.layers.1."
    assert in_file[f"{body}self_attn.o_proj.lora_A.weight"] == (3, 24)
    assert in_file[f"{body}self_attn.o_proj.lora_B.weight"] == (6, 3)
    assert in_file[f"{body}block_sparse_moe.experts.2.w2.lora_A.weight"] == (3, 10)
    assert in_file[f"{body}block_sparse_moe.experts.2.w2.lora_B.weight"] == (6, 3)
