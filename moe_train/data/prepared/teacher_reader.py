"""Read a teacher's predictions from a prepared set, local or in a bucket."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_train.data.prepared.folder import ArrayPart, File, LocalFolder, RemoteFolder, StoredArray
from moe_train.data.prepared.manifest import Manifest, TeacherEntry
from moe_train.data.prepared.teacher_values import TeacherValues


class TeacherReader:
    """The predictions of a set.

    Args:
        folder: the folder of the set.
        manifest: its manifest.
        entry: what it states of the teacher.
    """

    def __init__(self, folder: LocalFolder | RemoteFolder, manifest: Manifest, entry: TeacherEntry) -> None:
        self._folder = folder
        self._manifest = manifest
        self._entry = entry

    def read(self, starts: Sequence[int], shards: Sequence[tuple[int, int]], counts: Sequence[int]) -> list[TeacherValues]:
        """Return the predictions for the trained tokens of some pieces, as far as they are stored.

        Args:
            starts: position of each piece in its example.
            shards: (shard, index of the example in it) of each.
            counts: number of trained tokens of each.
        """
        offsets = []
        for number, index in shards:
            offsets.append(ArrayPart(self._array(number, "teacher_offsets", "int64"), index, index + 2))
        parts: list[ArrayPart] = []
        k = self._entry.top_k
        for place, (number, _), bounds, count in zip(starts, shards, self._folder.read(offsets), counts, strict=True):
            # Only texts, all of whose tokens are trained on, have pieces that do not start at 0.
            start = int(bounds[0]) + place
            # A teacher read rows of a certain length; `check_set` refuses to train on more.
            stop = min(start + count, int(bounds[1]))
            parts.append(ArrayPart(self._array(number, "teacher_ids", self._manifest.dtype), start * k, stop * k))
            parts.append(ArrayPart(self._array(number, "teacher_logprobs", "float16"), start * k, stop * k))
            parts.append(ArrayPart(self._array(number, "teacher_tail", "float32"), start, stop))
        arrays = iter(self._folder.read(parts))
        return [_values(next(arrays), next(arrays), next(arrays), k) for _ in starts]

    def _array(self, number: int, name: str, dtype: str) -> StoredArray:
        shard = self._manifest.shards[number]
        return self._folder.array(File(f"{shard.name}/{name}", dtype, shard.sizes[name]))


def _values(ids: np.ndarray, logprobs: np.ndarray, tail: np.ndarray, k: int) -> TeacherValues:
    return TeacherValues(ids.reshape(-1, k).astype(np.int32), logprobs.reshape(-1, k), tail)
