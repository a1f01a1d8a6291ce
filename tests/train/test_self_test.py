"""The self-test finds what is wrong with a kernel, however small its part."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.mesh import make_mesh
from moe_train.model import grouped_matmul as gm
from moe_train.train.self_test import CASES, check_grouped_matmul


@pytest.mark.parametrize("kernel", ["blocked", "ragged_dot"])
def test_passes_a_kernel_that_is_right(kernel):
    with jax.set_mesh(make_mesh(config.Mesh(fsdp=8))):  # as in a run: the test has its own mesh inside
        assert check_grouped_matmul(config.Compute(grouped_matmul=kernel)) < 1e-5


def test_passes_bfloat16():
    assert 1e-5 < check_grouped_matmul(config.Compute(dtype="bfloat16")) < 2e-2


def wrong_weight_gradient(x, w, sizes):
    """Right, but for the gradient of experts without rows: those of the expert before."""

    @jax.custom_vjp
    def f(x, w):
        return gm.reference(x, w, sizes)

    def backward(saved, dy):
        dx, dw = jax.vjp(lambda x, w: gm.reference(x, w, sizes), *saved)[1](dy)
        return dx, jnp.where((sizes == 0)[:, None, None], jnp.roll(dw, 1, axis=0), dw)

    f.defvjp(lambda x, w: (f(x, w), (x, w)), backward)
    return f(x, w)


def wrong_small_group(x, w, sizes):
    """The rows of the smallest group get another expert's matrix."""
    smallest = jnp.argmin(jnp.where(sizes == 0, 10**6, sizes))
    return gm.reference(x, w.at[smallest].set(w[(smallest + 1) % len(w)]), sizes)


def wrong_tail(x, w, sizes):
    """Rows that belong to nobody go to the last expert."""
    return gm.reference(x, w, sizes.at[-1].add(x.shape[0] - jnp.sum(sizes)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (wrong_weight_gradient, "gradient of w of grouped_matmul=blocked is wrong on cpu, case 'empty'"),
        (wrong_small_group, "result of grouped_matmul=blocked is wrong on cpu, case"),
        (wrong_tail, "result of grouped_matmul=blocked is wrong on cpu, case 'empty'"),
    ],
)
def test_stops_at_a_kernel_that_is_wrong(monkeypatch, wrong, said):
    monkeypatch.setattr(gm, "blocked", wrong)
    with pytest.raises(RuntimeError, match=said):
        check_grouped_matmul(config.Compute(grouped_matmul="blocked"))


def test_cases_say_what_their_names_say():
    sizes = {name: np.array(case) for name, case in CASES.items()}
    assert all(len(case) == 8 and case.sum() <= 1024 for case in sizes.values())
    assert (sizes["empty"] == 0).any() and sizes["empty"].sum() < 1024
    assert (sizes["unaligned"] % 8 != 0).all() or (sizes["unaligned"] % 8 != 0).sum() > 5
    assert sizes["skewed"].max() > 0.9 * sizes["skewed"].sum()
