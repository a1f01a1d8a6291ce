"""The checks of a config's sections, each by a value just beyond its limit."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from moe_train.config import Config

ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
MOE = {"name": "moe", "ffn_dim": 32, "num_experts": 4, "experts_per_token": 2}
SIGMOID = {"name": "sigmoid"}
DENSE = {"name": "dense", "ffn_dim": 32}
MODEL = {"family": "mixtral", "vocab_size": 128, "model_dim": 16, "num_layers": 2, "attention": ATTENTION, "ffn": MOE}
RUN = {
    "name": "tiny",
    "run_dir": "runs/tiny",
    "model": MODEL,
    "train": {"steps": 10, "batch_size": 8, "seq_len": 32},
    "optimizer": {"name": "adamw", "learning_rate": 1e-4},
    "loss": {"load_balance_loss_coef": 0.01, "router_z_loss_coef": 0.0},
}


def changed(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tree` with dotted keys set; a value of `...` removes the key."""
    tree = json.loads(json.dumps(tree))
    for dotted, value in changes.items():
        *above, key = dotted.split(".")
        at = tree
        for part in above:
            at = at.setdefault(part, {})
        if value is ...:
            del at[key]
        else:
            at[key] = value
    return tree


def config(**changes: Any) -> Config:
    return Config.model_validate_json(json.dumps(changed(RUN, changes)))


def test_a_small_run_is_accepted() -> None:
    run = config()
    assert run.compute.dtype == "float32"
    assert run.mesh.fsdp == 1
    with pytest.raises(ValidationError, match="frozen"):
        run.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "../up"}, "should match pattern"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"model": ...}, "state model"),
        ({"train.epochs": 1}, "exactly one of steps, epochs, tokens; here: steps, epochs"),
        ({"train.steps": ...}, "exactly one of steps, epochs, tokens; here: none"),
        ({"train.steps": 1.5}, "valid integer"),
        ({"train.steps": True}, "valid integer"),
        ({"train.steps": ..., "train.tokens": 255}, "tokens 255 is less than one step of 256"),
        ({"train.microbatches": 3}, "batch_size 8 is not a multiple of microbatches 3"),
        ({"train.seq_len": 40000}, "train.seq_len 40000 exceeds the model's max_seq_len 32768"),
        ({"optimizer.learning_rate": 0}, "greater than 0"),
        ({"optimizer.b1": 1.0}, "less than 1"),
        ({"optimizer.schedule": {"name": "cosine", "final_fraction": 1.1}}, "less than or equal to 1"),
        ({"loss": {}}, "state loss.load_balance_loss_coef, loss.router_z_loss_coef"),
        ({"loss.router_z_loss_coef": ...}, "state loss.router_z_loss_coef where"),
        ({"model.attention.num_heads": 3}, "num_heads 3 is not a multiple of num_kv_heads 2"),
        ({"model.attention.head_dim": 5}, "head_dim 5 is odd"),
        ({"model.attention.windows": []}, "at least 1 item"),
        ({"model.attention.windows": [0]}, "greater than or equal to 1"),
        ({"model.attention.windows": [None, 8]}, "family mixtral cannot have interleaved attention.windows; only ministral can"),
        ({"model.attention.windows": [8, 8, 8]}, "num_layers 2 is not a multiple of the 3 attention.windows"),
        ({"model.ffn.experts_per_token": 5}, "experts_per_token 5 exceeds num_experts 4"),
        ({"model.ffn": DENSE}, "family mixtral does not have a dense ffn"),
        ({"model.family": "llama"}, "family llama does not have a moe ffn"),
        (
            {"model.rope": {"name": "yarn", "factor": 2.0, "original_max_seq_len": 8}},
            "family mixtral cannot have a yarn rope; only ministral3 can",
        ),
        ({"model.attention.query_scaling": {"beta": 0.1, "original_max_seq_len": 8}}, "cannot have attention.query_scaling"),
        ({"model.ffn.router": {"name": "softmax", "scale": 2.0}}, "Extra inputs are not permitted"),
        ({"model.ffn.router": {**SIGMOID, "groups_per_token": 2}}, "groups_per_token 2 exceeds num_groups 1"),
        ({"model.ffn.router": {**SIGMOID, "num_groups": 3}}, "router.num_groups 3 does not divide num_experts 4 into groups"),
        ({"model.ffn.router": {**SIGMOID, "num_groups": 2, "groups_per_token": 2}}, "which limits nothing; leave both out"),
        ({"train.capacity_factor": 1.25}, "state max_drop_rate where there is a capacity_factor"),
        ({"train.max_drop_rate": 0.1}, "max_drop_rate has no effect without a capacity_factor"),
        ({"model.ffn.router": SIGMOID}, "no file format has a place for a sigmoid router of family mixtral; set export: none"),
        ({"model.ffn.num_shared_experts": 1}, "no file format has a place for shared experts of family mixtral"),
        (
            {"model.ffn.dense_layers": {"count": 1, "ffn_dim": 8}},
            "no file format has a place for dense first layers of family mixtral",
        ),
        ({"model.ffn.dense_layers": {"count": 2, "ffn_dim": 8}}, "ffn.dense_layers.count 2 leaves no sparse layer of num_layers 2"),
        ({"model.ffn.dense_layers": {"count": 0, "ffn_dim": 8}}, "greater than or equal to 1"),
        ({"export": "none"}, "export: none has no effect on family mixtral"),
        ({"loss.bias_update_rate": 0.001}, "loss.bias_update_rate has no effect: the routers' bias is not there"),
        ({"model.ffn.router": {**SIGMOID, "bias": True}, "export": "none"}, "state loss.bias_update_rate where"),
        ({"mesh.expert": 3, "train.batch_size": 12}, "mesh.expert 3 does not divide num_experts 4; use 2"),
        ({"mesh.fsdp": 3, "train.batch_size": 12}, "mesh.fsdp 3 does not divide model_dim 16"),
        ({"mesh.tensor": 4}, "mesh.tensor 4 does not divide num_kv_heads 2"),
        ({"mesh.fsdp": 16}, "use a multiple of 16"),
        ({"mesh.data": -1, "mesh.fsdp": -1}, "only one mesh axis can be -1"),
        ({"mesh.data": 0}, "mesh.data is 0"),
        ({"mesh.context": 3}, "does not divide into two chunks for each of mesh.context 3; use a multiple of 6: 30 or 36"),
        (
            {"mesh.context": 2, "compute.attention": "splash"},
            "splash wants a train.seq_len of whole 512s on mesh.context 2, not 32",
        ),
        ({"compute.dtype": "float16"}, "'float32' or 'bfloat16'"),
        ({"lora": {"targets": []}}, "lora has no targets"),
        ({"data": {"train": []}}, "at least 1 item"),
    ],
)
def test_a_value_beyond_its_limit_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        config(**changes)
    assert said in str(error.value)


@pytest.mark.parametrize("ours", [0.0, None])
def test_a_dense_model_has_no_router(ours: float | None) -> None:
    dense = {"model.family": "mistral", "model.ffn": DENSE}
    config(**dense, loss={"load_balance_loss_coef": ours})
    with pytest.raises(ValidationError, match="the model has no router"):
        config(**dense, loss={"load_balance_loss_coef": 0.1})
    with pytest.raises(ValidationError, match=r"mesh\.expert is 2, but a mistral model has no experts"):
        config(**dense, loss={}, **{"mesh.expert": 2})


def test_lora_needs_no_router_coefficients() -> None:
    config(loss={}, lora={"targets": [{"modules": ["attention.*"], "rank": 4, "alpha": 8.0}]})


def test_a_model_without_a_format_trains_where_no_export_is_wanted() -> None:
    biased = {"model.ffn.router": {**SIGMOID, "bias": True}, "model.ffn.num_shared_experts": 2, "export": "none"}
    config(**biased, **{"loss.bias_update_rate": 0.001})
    lora = {"targets": [{"modules": ["attention.*"], "rank": 4, "alpha": 8.0}]}
    config(**biased, lora=lora)  # its router is frozen
    with pytest.raises(ValidationError, match=r"bias_update_rate has no effect: the routers' bias is frozen"):
        config(**biased, lora=lora, **{"loss.bias_update_rate": 0.001})


@pytest.mark.parametrize("steps", [10, 10.0, 1e1])
def test_a_whole_number_may_be_written_as_a_float(steps: float) -> None:
    assert config(**{"train.steps": steps}).train.steps == 10


@pytest.mark.parametrize("key", ["run_dir", "init_from"])
def test_a_url_is_no_folder(key: str) -> None:
    with pytest.raises(ValidationError, match="a URL where a path is needed; name a path of this machine, or of a file system"):
        config(**{key: "gs://bucket/run"})


def test_config_comes_without_jax() -> None:
    code = "import sys; import moe_train.config.yaml_file; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
