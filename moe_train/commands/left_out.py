"""Say and record what of a base an export does not have: a vision tower, and bits that the dtype of training cannot hold."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from moe_train.checkpoint.runs import is_run, read_run
from moe_train.weights import external

log = logging.getLogger(__name__)


def report_left_out(source: str | Path) -> dict[str, Any]:
    """Warn of tensors of the files, from which `source` started, that a whole model exported from it does not have.

    Args:
        source: a run or an external model.

    Returns:
        The entry `left_out` of the export's record; nothing if all tensors are exported.
    """
    files = first_files(source)
    names = external.open_external_weights(files).left_out if files is not None else ()
    if not names:
        return {}
    log.warning(
        "vision tower and projector of %s are not in the export, which is the text model alone: %d tensors such as %s; to keep "
        "images, export the adapter (--format peft) and load it on %s",
        files,
        len(names),
        names[0],
        files,
    )
    return {"left_out": {"source": str(files), "count": len(names), "tensors": list(names)}}


def report_rounding(source: str | Path, dtypes: tuple[str, str]) -> dict[str, Any]:
    """Warn if weights that were not trained lose bits on their way from float16 files to an export.

    Args:
        source: a run or an external model.
        dtypes: the dtype of the weights in memory, and that of the export.

    Returns:
        The entry `rounded_from` of the export's record; nothing if no bits are lost.
    """
    files = first_files(source)
    # float32 holds every float16 value; bfloat16 has 8 bits of significand, and float16 has 11.
    if files is None or "bfloat16" not in dtypes:
        return {}
    stored = {tensor.dtype.name for tensor in external.open_external_weights(files).tensors.values()}
    if "float16" not in stored:
        return {}
    log.warning(
        "the files of %s are float16, and bfloat16 rounds their values, those that were not trained included; to keep them, train "
        "with compute.param_dtype: float32 and export with --dtype float16",
        files,
    )
    return {"rounded_from": "float16"}


def first_files(source: str | Path) -> Path | None:
    """Return the files that a run started from, through other runs if need be, or the model itself; None if there are none."""
    seen: set[Path] = set()
    path = Path(source)
    # `seen` ends the loop if configs name each other's runs.
    while is_run(path) and path not in seen:
        seen.add(path)
        start = read_run(path).init_from
        if start is None:
            return None
        path = Path(start)
    return path if path.exists() and path not in seen else None
