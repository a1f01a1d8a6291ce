"""Adapters of all experts in one A and one B: PEFT's own product of them, and the names of its wrappers."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.weights import names
from moe_train.weights.peft.fused_parameters import FusedParameter, fused_parameters
from moe_train.weights.serve import AdapterShape
from tests.tiny import MISTRAL4, MIXTRAL

FFN = "stacks.1.layers.0.ffn"
SHAPES = {
    f"{FFN}.gate_proj": AdapterShape(2, 4.0),
    f"{FFN}.up_proj": AdapterShape(3, 1.0),
    f"{FFN}.down_proj": AdapterShape(2, 4.0),
}


def parameters(*modules: str) -> list[FusedParameter]:
    shapes = {f"{FFN}.{module}": SHAPES[f"{FFN}.{module}"] for module in modules}
    return list(fused_parameters(MISTRAL4, shapes, names.HUGGING_FACE))


@pytest.mark.parametrize("modules", [("gate_proj", "up_proj"), ("up_proj",), ("down_proj",)])
def test_the_product_is_what_each_matrix_adds(modules: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    deltas: dict[tuple[str, int], np.ndarray] = {}

    def factors(module: str, lead: tuple[int, int], scale: float) -> tuple[np.ndarray, np.ndarray]:
        shape = SHAPES[module]
        in_dim, out_dim = (MISTRAL4.ffn.ffn_dim, MISTRAL4.model_dim)[:: 1 if module.endswith("down_proj") else -1]
        a = rng.normal(size=(in_dim, shape.rank))
        b = rng.normal(size=(shape.rank, out_dim))
        deltas[module, lead[1]] = shape.alpha / shape.rank * (a @ b).T
        return a, b * (shape.alpha / shape.rank / scale)

    parameter, *_ = parameters(*modules)
    a, b = parameter.join(factors)
    assert (a.shape, b.shape) == (parameter.shape_of_a, parameter.shape_of_b)
    E = MISTRAL4.ffn.num_experts
    rank = parameter.shape.rank
    scale = parameter.shape.alpha / rank
    # peft/tuners/lora/layer.py, ParamWrapper.get_delta_weight
    product = scale * np.einsum("ore,eri->eoi", b.reshape(len(b), rank, E), a.reshape(E, rank, -1))
    rows = product.shape[1] // len(parameter.modules)
    for i, module in enumerate(parameter.modules):
        for e in range(E):
            expected = deltas[module, e] if module else np.zeros((rows, product.shape[2]))
            np.testing.assert_allclose(product[e, i * rows : (i + 1) * rows], expected, atol=1e-12)


def test_the_wrapper_of_gate_and_up_is_inside_that_of_down() -> None:
    prefix = "base_model.model.model.layers.{}.mlp.experts"
    both = parameters("gate_proj", "down_proj")
    assert [parameter.stem for parameter in both] == [
        *(f"{prefix.format(1)}.base_layer", prefix.format(1)),
        *(f"{prefix.format(2)}.base_layer", prefix.format(2)),
    ]
    assert [parameter.target.rpartition(".")[2] for parameter in both[:2]] == ["gate_up_proj", "down_proj"]
    assert [parameter.stem for parameter in parameters("up_proj")] == [prefix.format(1), prefix.format(2)]


def test_a_model_without_adapters_of_experts_has_none() -> None:
    assert list(fused_parameters(MIXTRAL, {"stacks.0.layers.0.attention.q_proj": AdapterShape(2, 4.0)}, names.HUGGING_FACE)) == []
