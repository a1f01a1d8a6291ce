"""The table of names is a bijection for every family, at the sizes that people have."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_train import config
from moe_train.weights import names
from tests.tiny import DEEPSEEK_V3, MISTRAL4
from tests.weights.names.models import LAYOUTS, PUBLISHED, SMALL, shapes_of


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_is_used_and_every_parameter_filled_once(name: str) -> None:
    m, tensors, parameters = PUBLISHED[name]
    shapes = shapes_of(m)
    formats = config.FAMILIES[m.family].formats
    for layout in LAYOUTS.values():
        # Only some layouts have the tensors that latent attention and shared experts need.
        if layout.file_format not in formats:
            continue
        table = names.weight_pieces(m, layout)
        in_file = {piece.name: piece.shape for piece in table}
        if layout.experts[0].stack == names.hugging_face_of(m).experts[0].stack:  # experts are stored as published
            assert len(in_file) == tensors
        assert len({(piece.path, piece.lead) for piece in table}) == len(table)
        total = sum(math.prod(shape) for shape in in_file.values())
        assert (
            total == sum(math.prod(piece.internal_shape) for piece in table) == sum(map(math.prod, shapes.values())) == parameters
        )
        names.check_file_tensors("here", table, in_file, shapes)
        if layout.layer.startswith(("model.", "language_model.")):
            assert names.weight_pieces(m, names.detect_hugging_face(in_file)) == table


@pytest.mark.parametrize("model", [MISTRAL4, DEEPSEEK_V3], ids=["mistral4", "deepseek_v3"])
def test_latents_and_shared_experts_there_and_back(model: config.Model) -> None:
    """In the layout that is written, parts along every dim included that is ever split: all but the dims of a head."""
    for piece in names.weight_pieces(model):
        ours = np.random.default_rng(0).normal(size=piece.internal_shape)
        tensor = np.full(piece.shape, np.nan)
        tensor[tuple(at if isinstance(at, int) else slice(*at) for at in piece.part)] = piece.to_file(ours)
        assert np.array_equal(piece.from_file(tensor.__getitem__), ours)
        for dim, size in enumerate(ours.shape):
            is_head_dim = len(ours.shape) == 3 and dim == (1 if "o_proj" in piece.path else 2)
            if is_head_dim:
                continue
            ranges = [(0, size // 2) if d == dim else (0, n) for d, n in enumerate(ours.shape)]
            assert np.array_equal(piece.from_file(tensor.__getitem__, ranges), ours[tuple(slice(*r) for r in ranges)])


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
