"""Whether a directory still is what was exported: its proof again, as far as it can be repeated here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import jax

from moe_train.export import unquantised
from moe_train.mesh import make_mesh
from moe_train.model_dir import is_run, mesh_here, open_model
from moe_train.weights import compare, expected, proof, repeat, reread
from moe_train.weights.checks import Check


def verify(
    directory: str | Path, base: str | Path | None = None, run: str | Path | None = None, depth: proof.Depth = "full"
) -> tuple[dict[str, Any], list[Check]]:
    """(the record of the export, what came of every check).

    run: the run that was exported, with whose weights the tensors are compared again, merged with its adapters. base: the
    model that it started from, in the same layout, with which what was not adapted is compared. depth: `tensors` does not
    run the model, and needs no accelerator. Raises FileNotFoundError or ValueError where there is no record to repeat.
    """
    directory = Path(directory)
    if not (directory / proof.FILE).is_file():
        raise FileNotFoundError(f"{directory} has no {proof.FILE}; only what moe-train export wrote can be verified")
    record, model = repeat.read_record(directory)
    hashes = None if base is None else _hashes(Path(base))
    if run is not None:
        if not is_run(run):
            raise ValueError(f"--run {run} is no run; give the run that was exported")
        opened = unquantised(open_model(run))
        with jax.set_mesh(opened.mesh):
            _, weights = opened.load()
            lora = opened.lora if record["format"] not in get_args(expected.Model) or record.get("adapted") else None
            trained = proof.Export(directory, record["format"], record.get("dtype", ""), weights, opened.model, lora, None, None)
            return record, repeat.repeat(directory, depth, record, model, trained, hashes)
    if depth == "tensors" or "prompts" not in record:
        return record, repeat.repeat(directory, depth, record, model, None, hashes)
    with jax.set_mesh(make_mesh(mesh_here(None, model))):
        return record, repeat.repeat(directory, depth, record, model, None, hashes)


def _hashes(base: Path) -> dict[str, str]:
    stored = reread.tensors(base if base.is_dir() else base.parent)
    return {name: found.sha256 for name, found in compare.examine(stored, repeat.as_stored(stored), None, None).examined.items()}
