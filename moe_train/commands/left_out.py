"""Say and record what of a base an export does not have: a tower, and bits that the dtype of training cannot hold."""

from __future__ import annotations

import logging
from pathlib import Path

from moe_train.checkpoint.initial_files import carried_of, first_files
from moe_train.machine.files import JsonObject
from moe_train.proof import base_fp8
from moe_train.weights import external
from moe_train.weights.on_disk import WeightFiles

log = logging.getLogger(__name__)


def report_left_out(source: str | Path, reason: str) -> JsonObject:
    """Warn of tensors of the multimodal files, from which `source` started, that a model made from it does not have.

    Args:
        source: a run or an external model.
        reason: why, as the end of a sentence.

    Returns:
        The entry `left_out` of the export's record; {} for a text model.
    """
    carried = carried_of(source)
    if carried is None:
        return {}
    files = first_files(source)
    log.warning("%s of %s are not in the export: %s", carried.description, files, reason)
    return {"left_out": {"source": str(files), "count": len(carried.tensors), "tensors": list(carried.tensors)}}


def report_rounding(source: str | Path, dtypes: tuple[str, str]) -> JsonObject:
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


def fp8_base(source: str | Path) -> WeightFiles | None:
    """Return the files that a run or an external model started from if they are FP8; None otherwise."""
    files = first_files(source)
    if files is None:
        return None
    weights = external.open_external_weights(files)
    return weights if base_fp8.quantized_names(weights) else None
