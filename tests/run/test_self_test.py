"""The self-test finds what is wrong with a kernel, however small its part."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.machine.mesh import make_mesh
from moe_train.model.attention import kernels
from moe_train.model.moe import grouped_matmul as gm
from moe_train.model.moe.transport import choose as transport
from moe_train.run.self_test import ROWS_PER_EXPERT, check_against_all_gather, check_attention, check_grouped_matmul, chosen_kernels
from tests.compiled_programs import ragged_all_to_all

MODEL = config.Model(
    family="ministral",
    vocab_size=8,
    model_dim=8,
    num_layers=2,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8, windows=(None, 50)),
    ffn=config.DenseFfn(name="dense", ffn_dim=8),
)


@pytest.mark.parametrize("kernel", ["blocked", "ragged_dot"])
def test_passes_a_kernel_that_is_right(kernel):
    with jax.set_mesh(make_mesh(config.Mesh(fsdp=8))):  # as in a run: the test has its own mesh inside
        assert check_grouped_matmul(config.Compute(grouped_matmul=kernel)) < 1e-5


def test_passes_bfloat16():
    assert 1e-5 < check_grouped_matmul(config.Compute(dtype="bfloat16")) < 2e-2


def wrong_weight_gradient(x, w, sizes, add_to):
    """Right, but for the gradient of experts without rows: those of the expert before."""

    @jax.custom_vjp
    def f(x, w):
        return gm.reference_grouped_matmul(x, w, sizes)

    def backward(saved, dy):
        dx, dw = jax.vjp(lambda x, w: gm.reference_grouped_matmul(x, w, sizes), *saved)[1](dy)
        return dx, jnp.where((sizes == 0)[:, None, None], jnp.roll(dw, 1, axis=0), dw)

    f.defvjp(lambda x, w: (f(x, w), (x, w)), backward)
    return f(x, w)


def wrong_small_group(x, w, sizes, add_to):
    """The rows of the smallest group get another expert's matrix."""
    smallest = jnp.argmin(jnp.where(sizes == 0, 10**6, sizes))
    return gm.reference_grouped_matmul(x, w.at[smallest].set(w[(smallest + 1) % len(w)]), sizes)


def wrong_tail(x, w, sizes, add_to):
    """Rows that belong to nobody go to the last expert."""
    return gm.reference_grouped_matmul(x, w, sizes.at[-1].add(x.shape[0] - jnp.sum(sizes)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (wrong_weight_gradient, "gradient of w of grouped_matmul=blocked is wrong on cpu in case 'empty'"),
        (wrong_small_group, "result of grouped_matmul=blocked is wrong on cpu in case"),
        (wrong_tail, "result of grouped_matmul=blocked is wrong on cpu in case 'empty'"),
    ],
)
def test_stops_at_a_kernel_that_is_wrong(monkeypatch, wrong, said):
    monkeypatch.setattr(gm, "blocked_grouped_matmul", wrong)
    with pytest.raises(RuntimeError, match=said):
        check_grouped_matmul(config.Compute(grouped_matmul="blocked"))


def late_by_a_row(rows, output, starts, sizes, ats, coming, *, axis_name):
    """What the second device sends comes one row too far down."""
    ats = ats + jax.lax.axis_index(axis_name)
    return ragged_all_to_all(rows, output, starts, sizes, ats, coming, axis_name=axis_name)


def test_a_transport_is_compared_with_all_gather(monkeypatch):
    monkeypatch.setattr(transport, "platform", lambda: "a platform that has it")
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    with jax.set_mesh(make_mesh(config.Mesh(expert=2), jax.devices()[:2])):
        assert check_against_all_gather("ragged_all_to_all") < 1e-5
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", late_by_a_row)
        with pytest.raises(RuntimeError, match="ragged_all_to_all gives wrong results on this mesh in case 'even': relative error"):
            check_against_all_gather("ragged_all_to_all")


def test_cases_say_what_their_names_say():
    sizes = {name: np.array(case) for name, case in ROWS_PER_EXPERT.items()}
    assert all(len(case) == 8 and case.sum() <= 1024 for case in sizes.values())
    assert (sizes["empty"] == 0).any() and sizes["empty"].sum() < 1024
    assert (sizes["unaligned"] % 8 != 0).all() or (sizes["unaligned"] % 8 != 0).sum() > 5
    assert sizes["skewed"].max() > 0.9 * sizes["skewed"].sum()


@pytest.mark.parametrize("kernel", ["blocked", "splash"])
def test_passes_attention_that_is_right(kernel):
    with jax.set_mesh(make_mesh(config.Mesh(fsdp=8))):
        assert check_attention(MODEL, config.Compute(attention=kernel), 512) < 1e-5


def test_passes_attention_in_bfloat16():
    with jax.set_mesh(make_mesh(config.Mesh(fsdp=8))):
        assert 1e-5 < check_attention(MODEL, config.Compute(dtype="bfloat16"), 512) < 2e-2


def without_segments(q, k, v, segment_ids, *rest):
    return right(q, k, v, jax.tree.map(jnp.ones_like, segment_ids), *rest)


def with_a_wider_window(q, k, v, segment_ids, device, causal):
    return right(q, k, v, segment_ids, device, replace(causal, window=causal.window and causal.window + 1))


def with_the_gradient_of_some_keys(q, k, v, *rest):
    """Keys past the first 128 have none."""
    return right(q, jnp.concatenate([k[:, :128], jax.lax.stop_gradient(k[:, 128:])], axis=1), v, *rest)


right = kernels.blocked_attention


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (without_segments, "result of attention=blocked is wrong on cpu, window none, packed segments"),
        (with_a_wider_window, "result of attention=blocked is wrong on cpu, window 50, one segment"),
        (with_the_gradient_of_some_keys, "gradient of k of attention=blocked is wrong on cpu, window none, one segment"),
    ],
)
def test_stops_at_attention_that_is_wrong(monkeypatch, wrong, said):
    monkeypatch.setattr(kernels, "blocked_attention", wrong)
    with jax.set_mesh(make_mesh(config.Mesh(fsdp=8))), pytest.raises(RuntimeError, match=said):
        check_attention(MODEL, config.Compute(), 512)


def test_says_which_kernels_a_run_has():
    sparse = config.MoeFfn(name="moe", ffn_dim=3072, num_experts=4, experts_per_token=2)
    one_window = MODEL.attention.model_copy(update={"windows": (None,)})
    written = config.Config(
        name="a",
        run_dir="b",
        model=MODEL.model_copy(update={"family": "mixtral", "ffn": sparse, "attention": one_window}),
        train=config.Train(steps=1, batch_size=8, seq_len=1536),
        optimizer=config.AdamW(name="adamw", learning_rate=0.1),
        loss=config.Loss(load_balance_loss_coef=0.0, router_z_loss_coef=0.0),
        compute=config.Compute(dtype="bfloat16", attention="splash", grouped_matmul="megablox"),
        mesh=config.Mesh(context=2, tensor=2),
    )
    with jax.set_mesh(make_mesh(written.mesh, jax.devices()[:4])):
        assert chosen_kernels(config.run_of(written)) == {
            "attention": "splash",
            "attention_block": 128,  # of the 384 queries of a run
            "grouped_matmul": "megablox",
            "grouped_matmul_tiles": {"gate, up": (512, 8, 768), "down": (512, 768, 8)},
        }
