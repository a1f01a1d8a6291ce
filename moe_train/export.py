"""A run's newest checkpoint as files that other tools load: a whole model, or an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax

from moe_train import checkpoint, config, config_file
from moe_train.atomic import refuse_existing
from moe_train.model_dir import is_run, open_model
from moe_train.weights import foreign, peft, write


def export(run_dir: str | Path, out_dir: str | Path, layout: Literal["hf", "peft"] = "hf", merge: bool = False) -> dict[str, Any]:
    """Write the weights of a run to `out_dir`, which appears whole or not at all, and compare them with the run's.

    Adapters trained beside quantised weights are merged into the weights that these were made of. Returns the figures of
    `weights.write.export` or `weights.peft.export_adapter`. Raises ValueError for what the layout has no words for,
    FileNotFoundError for a run without checkpoint, FileExistsError where out_dir is taken.
    """
    if not is_run(run_dir):
        raise ValueError(f"{run_dir} is no run: it has no folder {checkpoint.FOLDER}")
    refuse_existing(Path(out_dir))  # before the work, not after it
    opened = open_model(run_dir)
    run = opened.run
    assert run is not None
    texts = write.Texts(opened.tokenizer, opened.chat_template, config_file.dump(run))
    with jax.set_mesh(opened.mesh):
        _, weights = opened.load(quantize=False)
        if layout == "hf":
            return write.export(weights, opened.model, out_dir, dtype=_dtype(run), lora=run.lora, merge=merge, texts=texts)
        if run.lora is None or merge:
            why = "--merge makes a whole model" if merge else "it was trained in full"
            raise ValueError(f"{run_dir} gives no adapter: {why}; use --format hf")
        return peft.export_adapter(weights, opened.model, run.lora, out_dir, base_model=str(run.init_from), texts=texts)


def _dtype(run: config.Config) -> config.Dtype:
    """That of the files it started from, so that untouched weights keep their bytes; otherwise that of the training."""
    if run.init_from is not None and not is_run(run.init_from):
        found = {tensor.dtype.name for tensor in foreign.open_weights(run.init_from).tensors.values()}
        if found == {"float32"}:
            return "float32"
        if found == {"bfloat16"}:
            return "bfloat16"
    return run.compute.param_dtype
