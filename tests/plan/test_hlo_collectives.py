"""Bytes that a device receives by each collective, as XLA prints it."""

from __future__ import annotations

import pytest

from moe_train.plan import hlo
from tests.plan.hlo_module import REST, entry


@pytest.mark.parametrize(
    ("line", "kind", "received"),
    [
        (
            f"%c = f32[64]{{0}} all-gather(%p), {REST}, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}",
            "all-gather",
            64 * 4 * 3 / 4,
        ),
        (f"%c = bf16[16]{{0}} reduce-scatter(%p), {REST}, replica_groups=[2,4]<=[8], to_apply=%add", "reduce-scatter", 16 * 2 * 3),
        (
            f"%c = f32[10]{{0}} all-reduce(%p), {REST}, replica_groups={{{{0,1}},{{2,3}}}}, to_apply=%add",
            "all-reduce",
            10 * 4 * 2 / 2,
        ),
        (
            f"%c = (s32[6]{{0}}, f32[2,3]{{1,0}}) all-to-all(%p, %p), {REST}, replica_groups=[1,8]<=[8]",
            "all-to-all",
            2 * 24 * 7 / 8,
        ),
        ("%c = f32[8]{0:T(128)} collective-permute(%p), source_target_pairs={{0,1},{1,0}}", "collective-permute", 32),
    ],
    ids=lambda value: value if isinstance(value, str) and "%" not in value else "",
)
def test_bytes_that_a_device_receives(line: str, kind: str, received: float) -> None:
    counts = hlo.count_program(entry("%p = f32[8]{0} parameter(0)", line))
    assert counts.bytes_by("kind") == {kind: received}
    assert counts.bytes == received


def test_a_ragged_all_to_all_counts_its_smaller_side() -> None:
    line = "%c = f32[64]{0} ragged-all-to-all(%p, %o, %i, %i, %i, %i), replica_groups=[1,8]<=[8]"
    counts = hlo.count_program(
        entry("%p = f32[16]{0} parameter(0)", "%o = f32[64]{0} parameter(1)", "%i = s64[8]{0} parameter(2)", line)
    )
    assert counts.bytes == 16 * 4 * 7 / 8


@pytest.mark.parametrize(
    "line",
    [
        "%c = f32[8]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add",
        "%c = f32[8]{0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}",
    ],
    ids=["a group of one device", "a permute that moves nothing"],
)
def test_what_stays_is_not_received(line: str) -> None:
    assert hlo.count_program(entry(line)).bytes == 0


def test_a_fusion_named_all_reduce_scatter_is_a_reduce_scatter() -> None:
    before = """%all-reduce-scatter.1 (p: bf16[64]) -> bf16[16] {
  %p = bf16[64]{0} parameter(0)
  %r = bf16[64]{0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %s = bf16[16]{0} dynamic-slice(%r, %i)
}
"""
    counts = hlo.count_program(
        entry("%f = bf16[16]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, metadata={}", before=before)
    )
    assert counts.bytes_by("kind") == {"reduce-scatter": 128 * 3 / 4}


@pytest.mark.parametrize(
    ("line", "received"),
    [
        ("((f32[8,2]), (f32[2,2])) reduce-scatter-start(%p), replica_groups=[1,4]<=[4], to_apply=%add", 16 * 3),
        ("((f32[2], bf16[2]), (f32[8], bf16[8])) all-gather-start(%p, %q), replica_groups=[1,4]<=[4]", (32 + 16) * 3 / 4),
        ("(f32[8], bf16[8]) all-reduce-start(%p, %q), replica_groups=[1,4]<=[4], to_apply=%add", (32 + 16) * 2 * 3 / 4),
        ("((f32[8]), (f32[8])) all-to-all-start(%p), replica_groups=[1,4]<=[4]", 32 * 3 / 4),
    ],
)
def test_a_start_states_its_operands_too(line: str, received: float) -> None:
    counts = hlo.count_program(entry(f"%s = {line}", "%d = f32[8] done(%s)"))
    assert counts.bytes == received


def test_what_crosses_slices_goes_through_the_hosts() -> None:
    by = (
        'is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    counts = hlo.count_program(
        entry(
            f"%s = (f32[8]{{0}}, u32[], token[]) send(%p, %t), channel_id=3, {by}",
            f"%r = (f32[8]{{0}}, u32[], token[]) recv(%t), channel_id=2, {by}",
            "%d = (f32[8]{0}, token[]) recv-done(%r), channel_id=2",
            "%q = (f32[8]{0}, u32[], token[]) recv(%t), channel_id=4, is_host_transfer=true",
        )
    )
    (collective,) = counts.collectives
    assert (collective.kind, collective.bytes, collective.groups) == ("all-reduce", 32, ((0, 4), (1, 5), (2, 6), (3, 7)))
