"""A run's newest checkpoint as files that other tools load: a whole model, or an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax

from moe_train import checkpoint, config, config_file
from moe_train.atomic import refuse_existing
from moe_train.data.chat import load_template
from moe_train.data.tokenizer import load_tokenizer
from moe_train.mesh import make_mesh
from moe_train.model.transformer import init_model, parameters
from moe_train.weights import hf, peft


def export(run_dir: str | Path, out_dir: str | Path, layout: Literal["hf", "peft"] = "hf", merge: bool = False) -> dict[str, Any]:
    """Write the weights of a run to `out_dir`, which appears whole or not at all, and compare them with the run's.

    Returns the figures of `weights.hf.export` or `weights.peft.export_adapter`. Raises ValueError for what the layout
    has no words for, FileNotFoundError for a run without checkpoint, FileExistsError where out_dir is taken.
    """
    if not checkpoint.is_run(run_dir):
        raise ValueError(f"{run_dir} is no run: it has no folder {checkpoint.FOLDER}")
    refuse_existing(Path(out_dir))  # before the work, not after it
    run = checkpoint.run_config(run_dir)
    model, lora = run.model, run.lora
    assert model is not None
    tokenizer = load_tokenizer(checkpoint.find_tokenizer(run_dir))
    template = load_template(run.data.chat_template if run.data else None, tokenizer)
    texts = hf.Texts(tokenizer, template, config_file.dump(run))
    with jax.set_mesh(make_mesh(checkpoint.mesh_here(run, model))):
        weights = checkpoint.load_parameters(
            run_dir, parameters(jax.eval_shape(lambda: init_model(0, model, run.compute, lora)))[1]
        )
        if layout == "hf":
            return hf.export(weights, model, out_dir, dtype=_dtype(run), lora=lora, merge=merge, texts=texts)
        if lora is None or merge:
            why = "--merge makes a whole model" if merge else "it was trained in full"
            raise ValueError(f"{run_dir} gives no adapter: {why}; use --format hf")
        return peft.export_adapter(weights, model, lora, out_dir, base_model=str(run.init_from), texts=texts)


def _dtype(run: config.Config) -> config.Dtype:
    """That of the files it started from, so that untouched weights keep their bytes; otherwise that of the training."""
    if run.init_from is not None and not checkpoint.is_run(run.init_from):
        found = {tensor.dtype.name for tensor in hf.open_tensors(run.init_from).values()}
        if found == {"float32"}:
            return "float32"
        if found == {"bfloat16"}:
            return "bfloat16"
    return run.compute.param_dtype
