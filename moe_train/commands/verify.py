"""Verify that a directory still is what was exported, by repeating its checks as far as this machine allows."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import jax

from moe_train.checkpoint.model_dir import encoder_of, mesh_for_devices, open_model
from moe_train.checkpoint.runs import is_run
from moe_train.checkpoint.trained_tower import trained_tower_paths
from moe_train.commands.adapters import base_and_adapter
from moe_train.commands.export import unquantized_model
from moe_train.machine.files import JsonObject
from moe_train.machine.mesh import make_mesh
from moe_train.proof import expected, prove, repeat, surroundings
from moe_train.proof.checks import Check
from moe_train.weights import external


def verify(
    directory: str | Path,
    base: str | Path | None = None,
    run: str | Path | None = None,
    depth: prove.Depth = "full",
    adapter: str | Path | None = None,
) -> tuple[JsonObject, list[Check]]:
    """Repeat the checks of an export.

        record, checks = moe_train.verify("tuned-hf")

    Args:
        directory: the export.
        base: the model that training started from, in any layout; the files are checked to be a merge into it (see
            `proof.against_base`).
        run: the run that was exported; the tensors are compared again with its weights, merged with its adapters.
        depth: `tensors` does not run the model and needs no accelerator.
        adapter: with `base`, the files or the run whose adapters were merged, to compare exactly.

    Returns:
        (the record of the export, the result of every check).

    Raises:
        FileNotFoundError: there is no record to repeat.
        ValueError: the record is damaged, or the arguments do not fit together.
    """
    directory = Path(directory)
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: no such folder; name the folder of an export")
    if not (directory / surroundings.RECORD_FILE).is_file():
        raise FileNotFoundError(
            f"{directory} has no {surroundings.RECORD_FILE}; only directories that `moe-train export` wrote can be verified"
        )
    record, model = repeat.read_record(directory)
    if adapter is not None and (base is None or run is not None):
        raise ValueError(
            "--adapter needs --base, the model that it was merged into, and excludes --run; state --adapter and --base, or --run"
        )
    if run is not None:
        if not is_run(run):
            raise ValueError(f"--run {run} is not a run; state the directory of the run that was exported")
        opened = unquantized_model(open_model(run))
        with jax.set_mesh(opened.mesh):
            weights = opened.to_export().weights
            # The run's adapters are in the files if these are an adapter alone, or if tensors were merged (`adapted`).
            holds_adapter = record["format"] not in get_args(expected.ModelLayout) or record.get("adapted")
            lora = opened.lora if holds_adapter else None
            trained = prove.Export(directory, record["format"], record.get("dtype", ""), weights, opened.model, lora, None, None)
            if "tower" in record:
                trained = trained._replace(encoder=trained_tower_paths(run).encoder)
            return record, repeat.repeat(directory, depth, record, model, trained)
    if adapter is not None:
        assert base is not None
        if record["format"] not in get_args(expected.ModelLayout):
            raise ValueError(f"{directory} contains an adapter, not a merged model; compare it with its run (--run)")
        with jax.set_mesh(make_mesh(mesh_for_devices(None, model))):
            encoder = encoder_of(base)
            lora, weights = base_and_adapter(base, adapter, model, None, encoder)
            trained = prove.Export(directory, record["format"], record["dtype"], weights, model, lora, None, None)
            if "tower" in record:
                trained = trained._replace(encoder=encoder)
            return record, repeat.repeat(directory, depth, record, model, trained)
    if base is not None and is_run(base):
        raise ValueError(f"--base {base} is a run; state the files that training started from, or use --run")
    opened_base = None if base is None else external.open_external_weights(base)
    if depth == "tensors" or "prompts" not in record:
        return record, repeat.repeat(directory, depth, record, model, None, opened_base)
    with jax.set_mesh(make_mesh(mesh_for_devices(None, model))):
        return record, repeat.repeat(directory, depth, record, model, None, opened_base)
