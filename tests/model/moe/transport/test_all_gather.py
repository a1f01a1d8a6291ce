"""Dispatch and combine against plain indexing; the whole transport is tested with the experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_train.model.moe.transport import all_gather

D, A = 8, 2


def test_dispatch_and_combine_differentiate_as_indexing_does() -> None:
    rng = np.random.default_rng(0)
    m, R = 6, 6 * A
    x, y, d, dy = (jnp.asarray(rng.normal(size=(n, D)), jnp.float32) for n in (m, R, m, R))
    weights = jnp.asarray(rng.random((m, A)), jnp.float32)
    order = jnp.asarray(rng.permutation(R))
    inverse = jnp.argsort(order).reshape(m, A)

    @partial(jax.jit, static_argnums=0)
    def pull(f: Any, primals: Any, d: Any) -> Any:
        y, vjp = jax.vjp(f, *primals)
        return y, *vjp(d)

    def close(ours: Any, plain: Any) -> None:
        for a, b in zip(ours, plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    ours = pull(lambda x: all_gather.dispatch_tokens(x, order, inverse), (x,), dy)
    close(ours, pull(lambda x: jnp.repeat(x, A, axis=0)[order], (x,), dy))
    ours = pull(lambda y, w: all_gather.combine_rows(y, w, order, inverse), (y, weights), d)
    close(ours, pull(lambda y, w: jnp.sum(w[..., None] * y[inverse], axis=1), (y, weights), d))
