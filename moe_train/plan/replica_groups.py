"""Groups of devices that take part in a collective together, read from the three notations of HLO text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache

import numpy as np

ReplicaGroups = tuple[tuple[int, ...], ...]
"""Groups of devices that exchange data, each device given by its position in the mesh."""


def axes_of(groups: ReplicaGroups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the devices of a group differ.

    Args:
        groups: the groups of a collective; the first one is examined.
        mesh: {axis: size}, with the last axis varying fastest.
    """
    shape = tuple(mesh.values())
    coordinates = np.stack(np.unravel_index(np.array(groups[0]), shape))
    varies = coordinates.min(axis=1) < coordinates.max(axis=1)
    return tuple(axis for axis, axis_varies in zip(mesh, varies, strict=True) if axis_varies)


def replica_groups(attributes: str) -> ReplicaGroups:
    """Read the groups from the attributes of an instruction."""
    # The next attribute ends the groups, except for device_ids, which is a part of the mesh notation.
    stated = re.search(r"replica_groups=(.*?)(?:, (?!device_ids)\w+=|$)", attributes)
    assert stated, attributes
    return _read_groups(stated[1])


@cache
def _read_groups(text: str) -> ReplicaGroups:
    """Read one of three notations: lists, a reshaped and transposed iota, or axes of a mesh."""
    if text.startswith("mesh"):
        return _groups_of_mesh(text)
    # Such as [2,4]<=[8] or [4,2]<=[2,4]T(1,0): the shape of the groups, and the iota that fills it. Lists are {{0,1},{2,3}}.
    if "<=" in text:
        shape, iota = text.split("<=")
        return _tuples(_iota(iota).reshape([int(n) for n in re.findall(r"\d+", shape)]))
    return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text))


def _groups_of_mesh(text: str) -> ReplicaGroups:
    """Read `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`.

    The groups lie along b, with the devices in the order of that iota, if one is given.
    """
    stated = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? ?\{(.*?)\}", text)
    assert stated, text
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", stated[1])}
    names = list(sizes)
    chosen = re.findall(r"'(\w+)'", stated[3])
    assert set(chosen) <= set(names), text
    ids = _iota(stated[2] or f"[{math.prod(sizes.values())}]").reshape(list(sizes.values()))
    # With the chosen axes innermost, each group is a row.
    order = [name for name in names if name not in chosen] + chosen
    group_size = math.prod(sizes[name] for name in chosen)
    return _tuples(ids.transpose([names.index(name) for name in order]).reshape(-1, group_size))


def _iota(text: str) -> np.ndarray:
    """Read `[8,4]T(1,0)`: the numbers 0, 1, 2, … in that shape, transposed."""
    stated = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text.strip())
    assert stated, text
    shape = [int(n) for n in stated[1].split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    if stated[2] is None:
        return ids
    return ids.transpose([int(n) for n in stated[2].split(",")])


def _tuples(rows: np.ndarray) -> ReplicaGroups:
    """Return the rows as groups of Python integers."""
    return tuple(tuple(row) for row in rows.tolist())
