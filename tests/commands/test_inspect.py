"""What `inspect` says of a config: shapes, specs and bytes without a single array."""

from __future__ import annotations

import math

import jax

from moe_train import config
from moe_train.commands.inspect import inspect
from moe_train.machine.mesh import make_mesh
from moe_train.model.flops import flops_per_token
from moe_train.model.parameters import parameters
from moe_train.model.transformer import init_model

MODEL = config.Model(
    family="mixtral",
    vocab_size=64,
    model_dim=16,
    num_layers=2,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=4),
    ffn=config.MoeFfn(name="moe", ffn_dim=24, num_experts=4, experts_per_token=1),
)
RUN = config.Config(
    name="x",
    run_dir="x",
    model=MODEL,
    train=config.Train(steps=1, batch_size=8, seq_len=8),
    optimizer=config.AdamW(name="adamw", learning_rate=1e-3),
    loss=config.Loss(load_balance_loss_coef=0.0, router_z_loss_coef=0.0),
    mesh=config.Mesh(fsdp=2, expert=2, tensor=2),
)


def test_bytes_per_device_are_those_of_the_arrays():
    report = inspect(RUN)
    with jax.set_mesh(make_mesh(RUN.mesh)):
        _, arrays = parameters(init_model(0, MODEL, RUN.compute))
    assert {row["path"]: (row["shape"], row["bytes_per_device"]) for row in report.parameters} == {
        path: (list(x.shape), x.addressable_shards[0].data.nbytes) for path, x in arrays.items()
    }
    assert report.totals["total_parameters"] == sum(x.size for x in arrays.values())
    rows = {row["path"]: row for row in report.parameters}
    assert rows["stacks.0.layers.0.ffn.gate_proj.weight"]["spec"] == "- expert fsdp tensor"
    assert rows["final_norm.scale"]["spec"] == "-"


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_meet():
    totals = inspect(RUN).totals
    idle = 3 * 2 * 3 * 16 * 24  # experts, layers, matrices
    assert totals["active_parameters"] == totals["total_parameters"] - idle


def test_shared_experts_are_met_by_every_token_and_take_adapters():
    ffn = MODEL.ffn.model_copy(update={"num_shared_experts": 2, "router": config.SigmoidRouter(name="sigmoid", bias=True)})
    lora = config.Lora(targets=(config.LoraTarget(modules=("ffn.shared.*",), rank=2, alpha=4.0),))
    model = MODEL.model_copy(update={"ffn": ffn})
    loss = RUN.loss.model_copy(update={"bias_update_rate": 0.001})
    report = inspect(RUN.model_copy(update={"model": model, "export": "none", "loss": loss}))
    more = 2 * (3 * 16 * 2 * 24 + 4)  # layers; three matrices as wide as two experts, and a bias
    assert report.totals["total_parameters"] == inspect(RUN).totals["total_parameters"] + more
    assert report.totals["active_parameters"] == inspect(RUN).totals["active_parameters"] + more
    assert flops_per_token(model, 8) - flops_per_token(MODEL, 8) == 6 * (more - 2 * 4)
    adapted = inspect(RUN.model_copy(update={"model": model, "export": "none", "lora": lora, "loss": config.Loss()}))
    trained = {row["path"] for row in adapted.parameters if row["trainable"]}
    assert trained == {f"stacks.0.layers.0.ffn.shared.{name}_proj.lora_{x}" for name in ("gate", "up", "down") for x in "ab"}


def test_no_device_is_needed_and_adapters_alone_are_trained():
    far, replicas = (RUN.model_copy(update={"mesh": m}) for m in (config.Mesh(data=64, fsdp=8, expert=4), config.Mesh(data=8)))
    # a device has 1 sequence of 8 tokens of 64 bytes; 3 others on the axis; all_to_all's buffers are of 3 rows, not 8
    run = far.model_copy(update={"train": config.Train(steps=1, batch_size=2048, seq_len=8)})
    said = "all_to_all over 4 devices, chosen by bytes on cpu: each receives 0.0 MiB in a layer of a microbatch (all_gather 0.0)"
    assert inspect(run).totals["transport"] == said and "transport" not in inspect(replicas).totals
    assert inspect(run).totals["bytes_per_device"] < inspect(RUN).totals["bytes_per_device"]
    lora = config.Lora(targets=(config.LoraTarget(modules=("attention.*", "ffn.*_proj"), rank=2, alpha=4.0),))
    report = inspect(RUN.model_copy(update={"lora": lora}))
    assert all((".lora_" in row["path"]) == row["trainable"] for row in report.parameters)
    assert report.totals["trainable_parameters"] == sum(math.prod(row["shape"]) for row in report.parameters if row["trainable"])
