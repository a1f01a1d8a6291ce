"""Warn when an adapter is merged into another model than the one that it was trained on, which shapes alone do not show."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from moe_train.checkpoint.metadata import newest_metadata
from moe_train.checkpoint.runs import is_run
from moe_train.machine.files import read_object
from moe_train.proof.surroundings import RECORD_FILE
from moe_train.weights import external, peft

log = logging.getLogger(__name__)


def summary_of_hashes(hashes: Mapping[str, str]) -> str:
    """Return one hash for the hashes of all tensors of a base, as the records of exports state it."""
    # Sorted, so that the summary does not depend on the order in which files hold their tensors.
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def warn_of_another_base(base: str | Path, adapter: str | Path) -> None:
    """Warn if hashes show that the adapter was trained on other weights or, where none are known, if it names another model.

    Args:
        base: the model to merge into.
        adapter: a run or an external adapter.
    """
    trained_on, recorded = _recorded_base(adapter)
    # Hashes are of the tensors of external files; a run's checkpoint has none to compare with them.
    if recorded is not None and not is_run(base):
        if summary_of_hashes(external.hash_external_model(base)) != recorded:
            log.warning(
                "%s has other weights than %s, on which the adapter %s was trained; check BASE, or merge into those",
                base,
                trained_on,
                adapter,
            )
        return
    # A folder of the same name elsewhere is taken for a copy of the base.
    if trained_on and Path(trained_on).resolve() != Path(base).resolve() and Path(trained_on).name != Path(base).name:
        log.warning(
            "the adapter %s names %s as its base, and is merged into %s; its shapes fit, but the weights may be others",
            adapter,
            trained_on,
            base,
        )


def _recorded_base(adapter: str | Path) -> tuple[str | None, str | None]:
    """Return the base that an adapter names, and the hash of its weights; None for what is not known."""
    if is_run(adapter):
        about = newest_metadata(adapter)
        # With a step the hashes are of a checkpoint's files, not of tensors.
        if about is None or about.base is None or about.base.step is not None:
            return None, None
        return about.base.source, summary_of_hashes(about.base.hashes)
    directory = Path(adapter)
    if (directory / RECORD_FILE).is_file():
        recorded = read_object(directory / RECORD_FILE).get("base")
        if isinstance(recorded, dict) and recorded.get("step") is None and recorded.get("sha256"):
            return str(recorded.get("source")), str(recorded["sha256"])
    if (directory / peft.ADAPTER_CONFIG).is_file():
        return read_object(directory / peft.ADAPTER_CONFIG).get("base_model_name_or_path"), None
    return None, None
