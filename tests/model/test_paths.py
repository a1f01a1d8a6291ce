"""What a parameter's path means."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.model.parameters import parameters
from moe_train.model.paths import ParameterPath, adapter_ranks, router_rows
from moe_train.model.transformer import abstract_model
from tests.tiny import ONE

MODEL = config.Model(
    family="mixtral",
    vocab_size=8,
    model_dim=8,
    num_layers=6,
    attention=config.GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=4, windows=(4, 4)),
    ffn=config.MoeFfn(
        name="moe",
        ffn_dim=8,
        num_experts=4,
        experts_per_token=2,
        router=config.SoftmaxRouter(name="softmax", bias=True),
        num_shared_experts=1,
        dense_layers=config.DenseLayers(count=2, ffn_dim=16),
    ),
)
LORA = config.Lora(
    targets=(config.LoraTarget(modules=("attention.q_proj", "ffn.router"), rank=2, alpha=2.0),),
    train=("attention_norm",),
    quantize=config.Nf4(name="nf4", block_size=4),
)


@pytest.fixture(scope="module")
def shapes() -> dict[str, jax.ShapeDtypeStruct]:
    with jax.set_mesh(ONE):
        return parameters(abstract_model(MODEL, config.Compute(), LORA))[1]


def test_every_path_of_a_model_is_taken_apart_and_put_together(shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
    assert all(str(ParameterPath.parse(path)) == path for path in shapes)


def test_the_parts_of_a_path() -> None:
    path = ParameterPath.parse("stacks.1.layers.0.ffn.shared.up_proj.weight.codes")
    assert (path.stack, path.place, path.module, path.leaf, path.part) == (1, 0, "ffn.shared.up_proj", "weight", "codes")
    assert (path.module_name, path.weight) == ("up_proj", "stacks.1.layers.0.ffn.shared.up_proj.weight")
    assert path.adapter == tuple(f"stacks.1.layers.0.ffn.shared.up_proj.lora_{x}" for x in "ab")
    assert not ParameterPath.parse("final_norm.scale").in_layer


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("embed.weight", "embeddings"),
        ("head.lora_a", "embeddings"),
        ("final_norm.scale", "norms"),
        ("stacks.1.layers.0.ffn_norm.scale", "norms"),
        ("stacks.1.layers.0.ffn.router.bias", "biases"),
        ("stacks.1.layers.0.ffn.router.weight", "router"),
        ("stacks.1.layers.0.ffn.router.lora_b", "router"),
        ("stacks.0.layers.0.ffn.gate_proj.weight", "matrices"),
        ("stacks.0.layers.0.attention.q_proj.weight.scales", "matrices"),
    ],
)
def test_the_kind_of_a_parameter(path: str, kind: str) -> None:
    assert ParameterPath.parse(path).kind == kind


def test_experts_are_those_of_sparse_stacks(shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
    experts = {path for path in shapes if ParameterPath.parse(path).is_expert(MODEL)}
    four_dims = {path for path, like in shapes.items() if like.ndim == 4 and ".ffn." in path}  # repeats, experts, in, out
    assert experts == four_dims != set()


def test_what_lora_training_changes(shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
    trained = {(p.module, p.leaf) for p in map(ParameterPath.parse, shapes) if p.is_trained(LORA)}
    adapted = {(module, f"lora_{x}") for module in ("attention.q_proj", "ffn.router") for x in "ab"}
    assert trained == adapted | {("attention_norm", "scale")}
    ranks = adapter_ranks(shapes)
    assert set(ranks.values()) == {2} and "stacks.0.layers.1.attention.q_proj" in ranks and len(ranks) == 6


def test_the_number_of_a_layer_counts_all_stacks() -> None:
    assert ParameterPath.parse("stacks.0.layers.1.ffn_norm.scale").layer(MODEL, 0) == 1
    assert ParameterPath.parse("stacks.1.layers.1.ffn_norm.scale").layer(MODEL, 1) == 5
    assert ParameterPath.parse("embed.weight").layer(MODEL, 0) is None


def test_router_rows_are_in_the_order_of_the_layers() -> None:
    """Two sparse stacks, of a period of two and of one: layers 0 to 3, then 4 and 5."""
    paths = ["stacks.1.layers.1.ffn.router.bias", "stacks.1.layers.0.ffn.router.bias", "stacks.3.layers.0.ffn.router.bias"]
    rows = router_rows(dict.fromkeys(paths, 2))
    assert [np.arange(6)[rows[path]].tolist() for path in paths] == [[1, 3], [0, 2], [4, 5]]
