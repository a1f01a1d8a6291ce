"""Records of the Hugging Face hub, read by the `datasets` library; this is the only source that uses the network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from moe_train import config
from moe_train.data.records.conversation import columns_to_load, read_columns
from moe_train.data.records.problem import Item, usable
from moe_train.data.records.scan import Scan
from moe_train.data.records.source import OpenSource, Place, Span
from moe_train.data.records.unread import NOT_LOADED
from moe_train.machine.network import require_network

_ROWS = 1024  # rows converted at a time


class HubDataset(OpenSource):
    """A data set at a fixed commit, which pins its content."""

    def __init__(self, source: config.HubSource) -> None:
        """Open a data set. Raises ValueError if the revision is a branch or a tag, whose content can change."""
        if not re.fullmatch(r"[0-9a-f]{40}", source.revision):
            raise ValueError(f"data: revision {source.revision} of {source.dataset} can move; state the commit (40 hex digits)")
        self._source = source
        name = "/".join(filter(None, (f"hub:{source.dataset}@{source.revision}", source.subset, source.split)))
        self.places = (Place(name, name, False),)

    def scan(self, memory: Path) -> list[Scan]:
        """Return one scan without a hash: the commit in the name pins the content."""
        return [Scan(None)]

    def examine(self, span: Span) -> Iterator[tuple[int, Item]]:
        """Yield the rows, counted from 1. Raises FileNotFoundError if the data set cannot be loaded."""
        require_network(self.places[0].name)
        import datasets

        from moe_train.data.records import column_values

        source = self._source
        try:
            rows = datasets.load_dataset(source.dataset, source.subset, split=source.split, revision=source.revision)
        except (OSError, ValueError) as error:  # the library's own errors derive from these
            # The library's messages go on for many lines; the first names the fault.
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"{self.places[0].name} cannot be had ({reason}); fetch it where there is a network, or use files"
            ) from error
        # If no wanted column exists all are loaded, so that the error of the first record can name them.
        present = columns_to_load(source.record, rows.column_names)
        left_out = {column: NOT_LOADED for column in rows.column_names if present and column not in present}
        # As Arrow, so that nulls and typed values are converted by the same rules as those of local Parquet files.
        typed = (rows.select_columns(present) if present else rows).with_format("arrow")
        number = 1
        for table in typed.iter(_ROWS):
            for row in column_values.rows(table):
                yield number, usable(row | left_out, read_columns(source.record))
                number += 1
