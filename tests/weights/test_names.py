"""The table of names is a bijection for every family, at the sizes that people have."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.model import parameters, transformer
from moe_train.weights import names
from tests.tiny import ONE


def attention(heads: int = 32, kv_heads: int = 8, head_dim: int = 128, **more: Any) -> config.Attention:
    return config.GroupedQueryAttention(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **more)


def dense(size: int) -> config.DenseFfn:
    return config.DenseFfn(name="dense", ffn_dim=size)


def moe(size: int, experts: int = 8) -> config.MoeFfn:
    return config.MoeFfn(name="moe", ffn_dim=size, num_experts=experts, experts_per_token=2)


def model(family: Any, vocab: int, dim: int, layers: int, a: config.Attention, ffn: config.Ffn, **more: Any) -> config.Model:
    return config.Model(family=family, vocab_size=vocab, model_dim=dim, num_layers=layers, attention=a, ffn=ffn, **more)


YARN = config.YarnRope(name="yarn", factor=16.0, original_max_seq_len=16384)
# model, tensors in its published files, parameters
PUBLISHED = {
    "Mixtral 8x7B": (model("mixtral", 32000, 4096, 32, attention(), moe(14336)), 995, 46_702_792_704),
    "Mixtral 8x22B": (model("mixtral", 32768, 6144, 56, attention(48), moe(16384)), 1739, 140_630_071_296),
    "Mistral 7B v0.3": (model("mistral", 32768, 4096, 32, attention(), dense(14336)), 291, 7_248_023_552),
    "Mistral Nemo": (model("mistral", 131072, 5120, 40, attention(), dense(14336)), 363, 12_247_782_400),
    "Ministral 8B": (
        model("ministral", 131072, 4096, 36, attention(windows=(None, 32768, 32768, 32768)), dense(12288)),
        327,
        8_019_808_256,
    ),
    "Ministral 3 3B": (
        model("ministral3", 131072, 3072, 26, attention(), dense(9216), rope=YARN, tie_embeddings=True),
        236,
        3_429_006_336,
    ),
    "SmolLM2 135M": (model("llama", 49152, 576, 30, attention(9, 3, 64), dense(1536), tie_embeddings=True), 272, 134_515_008),
}


def shapes_of(m: config.Model) -> dict[str, tuple[int, ...]]:
    with jax.set_mesh(ONE):
        abstract = jax.eval_shape(lambda: transformer.init_model(0, m, config.Compute()))
    return {path: array.shape for path, array in parameters.parameters(abstract)[1].items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_is_used_and_every_parameter_filled_once(name: str) -> None:
    m, tensors, parameters = PUBLISHED[name]
    shapes = shapes_of(m)
    for layout in LAYOUTS.values():
        table = names.weight_pieces(m, layout)
        in_file = {piece.name: piece.shape for piece in table}
        stacked = layout.experts[0].stack and isinstance(m.ffn, config.MoeFfn)
        assert stacked or len(table) == len(in_file) == tensors
        assert len({(piece.path, piece.lead) for piece in table}) == len(table)
        total = sum(math.prod(shape) for shape in in_file.values())
        assert (
            total == sum(math.prod(piece.internal_shape) for piece in table) == sum(map(math.prod, shapes.values())) == parameters
        )
        names.check_file_tensors("here", table, in_file, shapes)
        if layout.layer.startswith(("model.", "language_model.")):
            assert names.weight_pieces(m, names.detect_hugging_face(in_file)) == table


LAYOUTS = {
    "hugging face": names.HUGGING_FACE,
    "fused": names.hugging_face(fused=True),
    "wrapped": names.hugging_face("model.language_model.", "", fused=True),
    "wrapped before": names.hugging_face("language_model.model.", "language_model."),
    "mistral": names.MISTRAL,
    "gguf": names.GGUF,
}
SMALL = model("mixtral", 16, 6, 2, attention(4, 2, 6), moe(10, experts=3))


def small_files() -> dict[str, tuple[int, ...]]:
    return {piece.name: piece.shape for piece in names.weight_pieces(SMALL)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_the_same_matrix_and_parts_are_parts(layout: str) -> None:
    draw = np.random.default_rng(0).normal
    for piece in names.weight_pieces(SMALL, LAYOUTS[layout]):
        ours = draw(size=piece.internal_shape)
        tensor = np.full(piece.shape, np.nan)
        tensor[tuple(at if isinstance(at, int) else slice(*at) for at in piece.part)] = piece.to_file(ours)
        assert np.array_equal(piece.from_file(tensor.__getitem__), ours)
        for dim, size in enumerate(ours.shape):
            if (piece.path.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and dim == 2) or "o_proj" in piece.path:
                continue  # head_dim is never cut
            for cut in ((0, size // 2), (size // 2, size)):
                ranges = [cut if d == dim else (0, n) for d, n in enumerate(ours.shape)]
                assert np.array_equal(piece.from_file(tensor.__getitem__, ranges), ours[tuple(slice(*r) for r in ranges)])


def test_a_head_is_contiguous_in_the_file() -> None:
    """The second head's rows of q_proj are rows H..2H of the file, as attention of transformers splits them."""
    (piece,) = (p for p in names.weight_pieces(SMALL) if p.name == "model.layers.0.self_attn.q_proj.weight")
    file = np.arange(24 * 6).reshape(24, 6)
    assert np.array_equal(piece.from_file(file.__getitem__)[:, 1, :], file[6:12].T)
    assert np.array_equal(piece.from_file(file.__getitem__, [(0, 6), (1, 3), (0, 6)])[:, 0, :], file[6:12].T)


@pytest.mark.parametrize(("layout", "q", "k"), [("mistral", "attention.wq", "attention.wk"), ("gguf", "attn_q", "attn_k")])
def test_rotary_pairs_lie_side_by_side_where_the_layout_has_them_so(layout: str, q: str, k: str) -> None:
    """Rows 2i and 2i + 1 of a head are there what rows i and i + H/2 are in Hugging Face's order; v is left alone."""
    ours = {(piece.path, piece.lead): piece for piece in names.weight_pieces(SMALL)}
    for piece in names.weight_pieces(SMALL, LAYOUTS[layout]):
        if piece.part:
            continue  # of a stack: the experts have no rotary order
        matrix = np.arange(math.prod(piece.shape)).reshape(piece.shape)
        half_split = ours[piece.path, piece.lead].to_file(piece.from_file(matrix.__getitem__))
        if piece.name.endswith((f"{q}.weight", f"{k}.weight")):
            pairs = half_split.reshape(-1, 2, 3, 6).swapaxes(1, 2).reshape(matrix.shape)
            assert np.array_equal(pairs, matrix) and not np.array_equal(half_split, matrix)
            assert np.array_equal(half_split[[6, 7, 9]], matrix[[6, 8, 7]])
        else:
            assert np.array_equal(half_split, matrix)


def test_the_rank_of_an_adapter_is_no_part_of_the_rotary_order() -> None:
    """lora_B of q and k is permuted as the weight is, lora_A is not."""
    module = "stacks.0.layers.0.attention.q_proj"
    hf, native = (names.lora_pieces(SMALL, {module: 2}, layout)[:2] for layout in (names.HUGGING_FACE, names.MISTRAL))
    assert [piece.name for piece in native] == [f"layers.0.attention.wq.lora_{x}.weight" for x in "AB"]
    a, b = np.arange(2 * 6).reshape(2, 6), np.arange(24 * 2).reshape(24, 2)
    assert np.array_equal(hf[0].to_file(native[0].from_file(a.__getitem__)), a)
    assert np.array_equal(hf[1].to_file(native[1].from_file(b.__getitem__))[3], b[1])


def test_the_names_of_the_experts_matrices() -> None:
    """w1 is the gate (silu), w3 goes up, w2 goes down, as Mixtral's paper and files have it."""
    body = "model.layers.1.block_sparse_moe"
    found = {piece.name: (piece.path, piece.lead) for piece in names.weight_pieces(SMALL) if piece.name.startswith(body)}
    assert found[f"{body}.gate.weight"] == ("stacks.0.layers.0.ffn.router.weight", (1,))
    for file, ours in {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.items():
        assert found[f"{body}.experts.2.{file}.weight"] == (f"stacks.0.layers.0.ffn.{ours}.weight", (1, 2))
    interleaved = SMALL.model_copy(update={"attention": attention(4, 2, 2, windows=(None, 4)), "num_layers": 4})
    (piece,) = (p for p in names.weight_pieces(interleaved) if p.name == "model.layers.3.input_layernorm.weight")
    assert (piece.path, piece.lead) == ("stacks.0.layers.1.attention_norm.scale", (1,))


def test_missing_extra_and_wrong_tensors_are_named_in_one_line() -> None:
    files, shapes, table = small_files(), shapes_of(SMALL), names.weight_pieces(SMALL)
    bad = dict(files)
    del bad["lm_head.weight"]
    bad["model.layers.0.self_attn.q_norm.weight"] = (2,)
    bad["model.norm.weight"] = (7,)
    with pytest.raises(ValueError) as caught:
        names.check_file_tensors("here", table, bad, shapes)
    message = str(caught.value)
    assert "\n" not in message
    assert "lacks lm_head.weight" in message
    assert "self_attn.q_norm.weight, which" in message
    assert "model.norm.weight of shape (7,) instead of (6,)" in message


def test_parameters_that_no_tensor_fills_are_named() -> None:
    shapes = shapes_of(SMALL)
    with pytest.raises(ValueError, match=r"has no tensors for stacks\.0\.layers\.0\.ffn\.up_proj\.lora_a"):
        names.check_file_tensors(
            "here", names.weight_pieces(SMALL), small_files(), shapes | {"stacks.0.layers.0.ffn.up_proj.lora_a": (2, 3, 6, 4)}
        )
    some = {p: s for p, s in shapes.items() if p != "head.weight"}
    names.check_file_tensors("here", names.weight_pieces(SMALL), small_files(), some)
    with pytest.raises(ValueError, match=r"embed\.weight has shape \(17, 6\)"):
        names.check_file_tensors("here", names.weight_pieces(SMALL), small_files(), shapes | {"embed.weight": (17, 6)})


def test_adapters_have_the_dims_of_their_layers() -> None:
    modules = ("attention.q_proj", "attention.o_proj", "ffn.gate_proj", "ffn.down_proj")
    ranks = {f"stacks.0.layers.0.{module}": 3 for module in modules}
    lora = config.Lora(targets=(config.LoraTarget(modules=modules, rank=3, alpha=3.0),))
    with jax.set_mesh(ONE):
        abstract = jax.eval_shape(lambda: transformer.init_model(0, SMALL, config.Compute(), lora))
    shapes = {path: a.shape for path, a in parameters.parameters(abstract)[1].items() if ".lora_" in path}
    table = names.lora_pieces(SMALL, ranks)
    in_file = {piece.name: piece.shape for piece in table}
    names.check_file_tensors("here", table, in_file, shapes)
    body = "base_model.model.model.layers.1."
    assert in_file[f"{body}self_attn.o_proj.lora_A.weight"] == (3, 24)
    assert in_file[f"{body}self_attn.o_proj.lora_B.weight"] == (6, 3)
    assert in_file[f"{body}block_sparse_moe.experts.2.w2.lora_A.weight"] == (3, 10)
    assert in_file[f"{body}block_sparse_moe.experts.2.w2.lora_B.weight"] == (6, 3)
