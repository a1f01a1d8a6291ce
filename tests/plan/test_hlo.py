"""Loops, branches, asynchronous pairs and kernels of HLO modules, counted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from moe_train.plan import hlo
from moe_train.plan.hlo_text import num_instructions
from tests.plan.hlo_module import entry

WHILE = """
%cond (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%open (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] compare(%t, %t), direction=LT
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %c = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  %a = f32[2,3]{1,0} parameter(1)
  %d = f32[2,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %r = (s32[], f32[8]{0}) tuple(%t, %c)
}
"""


@pytest.mark.parametrize(
    ("loop", "trips"),
    [
        ('condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}', 7),
        ("condition=%cond, body=%body", 5),  # what the counter is compared with
        ("condition=%open, body=%body", 1),  # what the data say
    ],
)
def test_loops_count_as_often_as_they_run(loop: str, trips: int) -> None:
    counts = hlo.count_program(entry(f"ROOT %w = (s32[], f32[8]{{0}}) while(%t), {loop}", before=WHILE))
    assert counts.bytes == trips * 32
    assert counts.flops == trips * 2 * 2 * 4 * 3
    assert set(counts.collectives.values()) == {trips}


def test_of_a_conditional_the_branch_that_receives_least_counts() -> None:
    branch = (
        "%{n} (p: f32[8]) -> f32[8] {{\n  ROOT %c = f32[{size}]{{0}} all-reduce(%p), replica_groups=[1,2]<=[2], to_apply=%a\n}}\n"
    )
    before = branch.format(n="few", size=8) + "\n" + branch.format(n="many", size=100)
    counts = hlo.count_program(entry("%c = f32[8]{0} conditional(%i, %p, %p), branch_computations={%many, %few}", before=before))
    assert (counts.bytes, counts.fallback_bytes) == (32, 400 - 32)


@pytest.mark.parametrize("by", ["call-start(%p), to_apply", "async-start(%p), calls"])
def test_a_collective_on_another_thread_of_the_device_is_asynchronous(by: str) -> None:
    inside = "ROOT %g = f32[8]{0} all-gather(%p), replica_groups=[1,2]<=[2], dimensions={0}"
    counts = hlo.count_program(
        entry(
            f"%s = ((f32[4]), f32[8]) {by}=%called",
            "%d = f32[2,4]{1,0} dot(f32[2,3] %a, f32[3,4] %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            f"%e = f32[8] {by.split('-')[0]}-done(%s)",
            before=f"%called (p: f32[4]) -> f32[8] {{\n  {inside}\n}}\n",
        )
    )
    ((collective, times),) = counts.collectives.items()
    assert (times, collective.bytes, collective.asynchronous, collective.hidden_flops) == (1, 16, True, 48)


def test_a_collective_that_fusions_do_in_parts_counts_once() -> None:
    """XLA:TPU's collective fusions: a start, a step beside a product, an end, all of one chain."""
    gather = '%g = f32[8]{0} all-gather(%p), replica_groups=[1,2]<=[2], dimensions={0}, frontend_attributes={chain_id="3"}'
    product = "%d = f32[2,4]{1,0} dot(f32[2,3] %a, f32[3,4] %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    before = "".join(
        f"%{name} (p: f32[4]) -> f32[8] {{\n  {gather}\n{more}}}\n\n"
        for name, more in (("start", ""), ("async_collective_fusion.1", f"  {product}\n"), ("end", ""))
    )
    counts = hlo.count_program(
        entry(*(f"%f = f32[8] fusion(%p), calls=%{n}" for n in ("start", "async_collective_fusion.1", "end")), before=before)
    )
    ((collective, times),) = counts.collectives.items()
    assert (times, collective.bytes, collective.asynchronous, collective.hidden_flops) == (1, 16, True, 48)


def test_an_asynchronous_pair_counts_once_and_says_what_hides_it() -> None:
    groups = "replica_groups=[1,2]<=[2], dimensions={0}"
    dot = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    counts = hlo.count_program(
        entry(
            "%p = f32[4,2]{1,0} parameter(0)",
            f"%s = (f32[4,2]{{1,0}}, f32[8,2]{{1,0}}) all-gather-start(%p), {groups}",
            f"%d = f32[4,4]{{1,0}} dot(%p, %q), {dot}",
            "%e = f32[8,2]{1,0} all-gather-done(%s)",
            f"%t = (f32[4,2]{{1,0}}, f32[8,2]{{1,0}}) all-gather-start(%p), {groups}",
            "%u = f32[8,2]{1,0} all-gather-done(%t)",
            f"%v = f32[4,4]{{1,0}} dot(%p, %q), {dot}",
        )
    )
    assert counts.bytes == 2 * 32
    assert sorted((c.hidden_flops, c.asynchronous, n) for c, n in counts.collectives.items()) == [(0, True, 1), (64, True, 1)]


def test_kernels_state_their_own_estimate() -> None:
    call = 'f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"12"}}'
    counts = hlo.count_program(entry(*(f"%gmm.{n} = {call}" for n in range(3))))
    assert (counts.flops, counts.kernel_flops, dict(counts.kernels)) == (0, 36, {"gmm": 3})


def test_a_real_program_is_read_as_it_was_written() -> None:
    """A scan of products, of which XLA may make fusions, calls and library calls, and a sum over devices."""
    mesh = jax.make_mesh((8,), ("x",))
    along = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))  # noqa: E731
    w = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=along())
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=along("x"))
    with jax.set_mesh(mesh):
        step = jax.jit(
            lambda x, w: jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], axis=0), out_shardings=along()
        )
        text = step.lower(x, w).compile().as_text()
    counts = hlo.count_program(text)
    assert counts.flops == 5 * 2 * (64 // 8) * 16 * 16
    assert counts.bytes_by("kind") == {"all-reduce": 16 * 4 * 2 * 7 / 8}
    assert num_instructions(text) == sum(" = " in line for line in text.splitlines() if line.startswith("  "))
