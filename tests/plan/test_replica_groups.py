"""Every way to write the groups of a collective, and the mesh axes that they lie along."""

from __future__ import annotations

import pytest

from moe_train.plan.replica_groups import ReplicaGroups, axes_of, replica_groups


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[4,2]<=[2,2,2]T(2,1,0)", ((0, 4), (2, 6), (1, 5), (3, 7))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
    ],
)
def test_the_ways_to_write_groups(text: str, groups: ReplicaGroups) -> None:
    assert replica_groups(f"channel_id=1, replica_groups={text}, use_global_device_ids=true, to_apply=%add") == groups


def test_axes_along_which_a_group_lies() -> None:
    mesh = {"data": 2, "fsdp": 2, "expert": 2}
    assert axes_of(((0, 1), (2, 3)), mesh) == ("expert",)
    assert axes_of(((0, 4),), mesh) == ("data",)
    assert axes_of(((0, 1, 2, 3),), mesh) == ("fsdp", "expert")
