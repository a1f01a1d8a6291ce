"""FLOPs against figures counted elsewhere."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.model import flops
from moe_train.model.parameters import parameters
from moe_train.model.transformer import abstract_model


def mixtral(vocab_size: int, model_dim: int, num_layers: int, head_dim: int, ffn_dim: int) -> config.Model:
    return config.Model(
        family="mixtral",
        vocab_size=vocab_size,
        model_dim=model_dim,
        num_layers=num_layers,
        attention=config.GroupedQueryAttention(num_heads=8, num_kv_heads=4, head_dim=head_dim),
        ffn=config.MoeFfn(name="moe", ffn_dim=ffn_dim, num_experts=8, experts_per_token=2),
    )


S = mixtral(vocab_size=8192, model_dim=256, num_layers=4, head_dim=32, ffn_dim=896)
M = mixtral(vocab_size=32000, model_dim=512, num_layers=8, head_dim=64, ffn_dim=1792)


@pytest.mark.parametrize(("model", "batch_size", "gflop"), [(S, 8, 219.2), (M, 4, 846.0)], ids=["S", "M"])
def test_flops_of_a_step(model, batch_size, gflop):
    """Figures of another program, which counts one step of transformers' Mixtral of the same sizes."""
    step = flops.flops_per_token(model, 512) * batch_size * 512
    assert round(step / 1e9, 1) == gflop


def test_flops_of_dense_windowed_layers():
    """By hand: 6 per weight but the embedding's, and 12 * N * H per visible key."""
    attention = config.GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=4, windows=(None, 8))
    ffn = config.DenseFfn(name="dense", ffn_dim=16)
    model = config.Model(family="ministral", vocab_size=10, model_dim=8, num_layers=2, attention=attention, ffn=ffn)
    weights = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 10 * 8
    keys = 32 / 2 + (8 - 8 * 8 / 64)  # 16 on average without a window; 7 with: 1, 2, … 8, then 8
    assert flops.flops_per_token(model, 32) == 6 * weights + 12 * 2 * 4 * keys
    assert np.mean([min(t + 0.5, 8) for t in range(32)]) == pytest.approx(7, abs=0.01)


def test_flops_with_adapters():
    """Frozen weights cost 4, adapters 6, an expert's adapter only where a token meets it."""
    lora = config.Lora(targets=(config.LoraTarget(modules=("*",), rank=16, alpha=16.0),))
    with jax.set_mesh(jax.make_mesh((1,) * 5, ("data", "fsdp", "expert", "context", "tensor"), devices=jax.devices()[:1])):
        shapes = parameters(abstract_model(S, config.Compute(), lora))[1]
    adapters = {path: x for path, x in shapes.items() if path.endswith(("lora_a", "lora_b"))}
    D, F, NH, KH = 256, 896, 256, 128
    beside = 4 * 16 * ((D + NH) * 2 + (D + KH) * 2 + 2 * 3 * (D + F))
    pairs = 3 * 4 * 4 * NH * 256
    full = flops.flops_per_token(S, 512)
    assert flops.flops_per_token(S, 512, adapters) == pytest.approx((full - pairs) * 4 / 6 + pairs + 6 * beside, rel=1e-12)
