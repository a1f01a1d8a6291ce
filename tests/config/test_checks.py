"""Checks across sections, by values just beyond their limits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.tiny import DENSE, SIGMOID, config_with, refusal
from tests.run.tiny_config import MODEL, data, written

HUB = {"name": "hub", "dataset": "a/b", "revision": "0" * 40, "record": {"name": "text"}}

LORA = {"targets": [{"modules": ["attention.*"], "rank": 4, "alpha": 8.0}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.seq_len": 40000}, "train.seq_len 40000 exceeds the model's max_seq_len 32768"),
        ({"loss": {}}, "state loss.load_balance_loss_coef, loss.router_z_loss_coef"),
        ({"loss.router_z_loss_coef": ...}, "state loss.router_z_loss_coef, since"),
        (
            {"model.ffn.router": SIGMOID},
            "model has a sigmoid router, which no file format of family mixtral can",
        ),
        ({"model.ffn.num_shared_experts": 1}, "model has shared experts, which no file format of family mixtral can express"),
        ({"export": "none"}, "export: none has no effect, since the model can be exported (family mixtral)"),
        ({"loss.bias_update_rate": 0.001}, "loss.bias_update_rate has no effect: the routers have no bias"),
        ({"model.ffn.router": {**SIGMOID, "bias": True}, "export": "none"}, "state loss.bias_update_rate, since"),
        ({"mesh.expert": 3, "train.batch_size": 12}, "mesh.expert 3 does not divide num_experts 4; use 2"),
        ({"mesh.fsdp": 3, "train.batch_size": 12}, "mesh.fsdp 3 does not divide model_dim 16"),
        ({"mesh.tensor": 4}, "mesh.tensor 4 does not divide num_kv_heads 2"),
        ({"mesh.fsdp": 16}, "use a batch_size that is a multiple of 16"),
        (
            {"mesh.context": 3},
            "does not divide into two equal chunks for each of mesh.context 3 devices; use a multiple of 6: 30 or 36",
        ),
        (
            {"mesh.context": 2, "compute.attention": "splash"},
            "splash needs a train.seq_len that is a multiple of 512 on mesh.context 2, not 32",
        ),
        ({"compute.transport": "all_to_all"}, "compute.transport all_to_all has no effect when mesh.expert is 1"),
        ({"evaluation.drift_batches": 1}, "evaluation.drift_batches is 1, but only adapters on a model with routers"),
    ],
)
def test_a_value_beyond_its_limit_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(**changes)


@pytest.mark.parametrize("coefficient", [0.0, None])
def test_a_dense_model_has_no_router(coefficient: float | None) -> None:
    dense = {"model.family": "mistral", "model.ffn": DENSE}
    config_with(**dense, loss={"load_balance_loss_coef": coefficient})
    assert "a mistral model has no routers" in refusal(**dense, loss={"load_balance_loss_coef": 0.1})
    assert "mesh.expert is 2, but a mistral model has no experts" in refusal(**dense, loss={}, **{"mesh.expert": 2})


def test_lora_needs_no_router_coefficients() -> None:
    config_with(loss={}, lora=LORA)


def test_a_model_without_a_format_trains_where_no_export_is_wanted() -> None:
    biased = {"model.ffn.router": {**SIGMOID, "bias": True}, "model.ffn.num_shared_experts": 2, "export": "none"}
    config_with(**biased, **{"loss.bias_update_rate": 0.001})
    config_with(**biased, lora=LORA)  # its router is frozen
    message = "bias_update_rate has no effect: the routers' bias is frozen"
    assert message in refusal(**biased, lora=LORA, **{"loss.bias_update_rate": 0.001})


def test_rounding_needs_bfloat16_weights() -> None:
    rounded = {"optimizer.rounding": "float32_master"}
    config_with(**rounded, **{"compute.param_dtype": "bfloat16"})
    assert "optimizer.rounding float32_master has no effect: compute.param_dtype is float32; leave it out" in refusal(**rounded)
    assert "adapters, and what is trained with them, are float32" in refusal(
        **rounded, **{"compute.param_dtype": "bfloat16", "loss": {}, "lora": LORA}
    )


@pytest.mark.parametrize(
    ("sections", "fault"),
    [
        ({"data": data(eval=[HUB])}, r"data\.eval\.0 names the data set a/b of the hub; copy it to this machine"),
        ({"data": data(train=[{"name": "prepared", "path": "gs://b/set"}])}, r"data\.train\.0 names the bucket gs://b/set"),
        ({"metrics": {"trackers": [{"name": "wandb", "online": True}]}}, "trackers wandb is online; set online: false"),
    ],
)
def test_what_needs_a_network_is_refused_if_there_is_none(sections, fault):
    with pytest.raises(ValueError, match=fault):
        written(model=MODEL, network="none", **sections)
    assert written(model=MODEL, network="any", **sections).network == "any"
