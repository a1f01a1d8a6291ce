"""The arguments of Hugging Face's Trainer, which axolotl, LLaMA-Factory and TRL share."""

from __future__ import annotations

from typing import Any

from moe_train.config.conversion.draft import Draft
from moe_train.config.conversion.values import as_mapping, as_names, as_number

TRACKERS = ("wandb", "mlflow", "trackio")
"""Trackers that both sides know, by the same names."""


def read_length_and_batch(draft: Draft, devices: int, epochs: float = 3) -> None:
    """Read the length of the run and the batch.

    Args:
        draft: the config.
        devices: number of devices that theirs ran on.
        epochs: their default number of epochs.
    """
    per_device = draft.whole("micro_batch_size", "per_device_train_batch_size", default=8) or 8
    accumulated = draft.whole("gradient_accumulation_steps", default=1) or 1
    draft.put("train.batch_size", per_device * accumulated * devices)
    draft.put("train.microbatches", accumulated if accumulated > 1 else None)
    draft.note("train.batch_size", f"{per_device} per device x {accumulated} accumulated x {devices} devices (--devices)")
    steps = draft.whole("max_steps", default=0) or 0
    stated_epochs = draft.number("num_epochs", "num_train_epochs", default=epochs) or epochs
    if steps > 0:
        draft.put("train.steps", steps)
    else:
        if stated_epochs != int(stated_epochs):
            draft.note("num_train_epochs", f"a part of an epoch is not possible; rounded up (value {stated_epochs:g})")
        draft.put("train.epochs", -int(-stated_epochs // 1))


def read_optimizer(draft: Draft, schedule: str = "linear") -> None:
    """Read optimizer, learning rate and schedule; `schedule` is the name of their default schedule."""
    name = str(draft.take("optimizer", "optim", default="adamw_torch"))
    kind = next((kind for kind in ("adafactor", "lion", "muon") if kind in name), "adamw")
    draft.put("optimizer.name", kind)
    if kind == "adamw" and not name.startswith("adamw"):
        draft.note("optimizer", f"{name} is not supported; adamw, lion, adafactor and muon are")
    elif "8bit" in name or "paged" in name or "4bit" in name:
        draft.note("optimizer", f"{name}: moments are not quantized or paged; they are sharded over the mesh (mesh.fsdp)")
    rate = draft.number("learning_rate", default=5e-5)
    draft.put("optimizer.learning_rate", rate)
    b1, b2, eps = draft.number("adam_beta1"), draft.number("adam_beta2"), draft.number("adam_epsilon")
    if kind == "adamw":
        # Stated, since our own default of b2 is another one.
        draft.put("optimizer.b1", 0.9 if b1 is None else b1)
        draft.put("optimizer.b2", 0.999 if b2 is None else b2)
        draft.put("optimizer.eps", eps)
    elif kind == "muon":
        draft.put("optimizer.adamw_learning_rate", rate)
        draft.note("optimizer", "optimizer.adamw_learning_rate (embeddings, head, norms) is set to the same rate; check it")
    draft.put("optimizer.weight_decay", draft.number("weight_decay"))
    draft.put("optimizer.max_grad_norm", draft.number("max_grad_norm"))
    _read_schedule(draft, str(draft.take("lr_scheduler", "lr_scheduler_type", default=schedule)))


def _read_schedule(draft: Draft, name: str) -> None:
    """Read the learning rate's schedule, whose kind in their words is `name`."""
    # JSON is possible as well, which says nothing that would be written.
    stated = draft.take("lr_scheduler_kwargs")
    arguments = {} if isinstance(stated, str) else as_mapping("lr_scheduler_kwargs", stated)
    ratio = draft.number("cosine_min_lr_ratio", "min_lr_ratio")
    if ratio is None and arguments.get("min_lr_rate") is not None:
        ratio = as_number("lr_scheduler_kwargs.min_lr_rate", arguments["min_lr_rate"])
    section: dict[str, Any]
    if name.startswith("cosine"):
        section = {"name": "cosine", "final_fraction": 0.0 if ratio is None else ratio}
        if "restarts" in name:
            draft.note("lr_scheduler", f"{name}: restarts are not supported; written is one cosine")
    elif name.startswith("constant"):
        section = {"name": "constant"}
    else:
        section = {"name": "linear"}
        if name != "linear":
            draft.note("lr_scheduler", f"{name} is not supported; written is linear; constant, cosine, linear and wsd are there")
    warmup = draft.number("warmup_steps")
    share = draft.number("warmup_ratio", default=0.0) or 0.0
    if warmup is not None and 0 < warmup < 1:
        share, warmup = warmup, None
    steps = draft.tree["train"].get("steps")
    if warmup is not None:
        section["warmup_steps"] = int(warmup)
    elif share and steps:
        section["warmup_steps"] = round(share * steps)
    elif share:
        draft.note("warmup_ratio", f"warm-up is a number of steps: {share:g} of those that `moe-train data check` states")
    draft.put("optimizer.schedule", section)


def read_precision(draft: Draft) -> None:
    """Read dtypes and rematerialization."""
    half = draft.flag("bf16", "bfloat16")
    if draft.flag("fp16", "float16"):
        draft.note("fp16", "float16 is not supported; written is bfloat16")
        half = True
    if half or "lora" in draft.tree:
        draft.put("compute.dtype", "bfloat16")
        # Frozen weights never change, so that nothing is lost in bfloat16; trained ones need float32.
        draft.put("compute.param_dtype", "bfloat16" if "lora" in draft.tree else "float32")
    if draft.flag("gradient_checkpointing"):
        draft.put("compute.remat", "full")
    draft.take("gradient_checkpointing_kwargs")


def read_evaluation_and_saving(draft: Draft) -> None:
    """Read when the run is evaluated, saved and logged."""
    _read_interval(draft, "eval", "evaluation.every_steps")
    _read_interval(draft, "save", "checkpoint.every_steps")
    draft.put("checkpoint.keep_last", draft.whole("save_total_limit"))
    if draft.flag("load_best_model_at_end"):
        draft.put("checkpoint.keep_best", True)
    draft.put("metrics.every_steps", draft.whole("logging_steps"))
    _read_trackers(draft)
    draft.put("seed", draft.whole("seed"))
    draft.put("run_dir", str(draft.take("output_dir", default="runs/converted")).removeprefix("./"))


def _read_trackers(draft: Draft) -> None:
    """Read where metrics are sent to; axolotl names a project in place of the tracker."""
    names = as_names("report_to", draft.take("report_to"))
    projects = {"wandb": draft.take("wandb_project"), "mlflow": draft.take("mlflow_experiment_name")}
    names += [name for name, project in projects.items() if project and name not in names]
    entity = draft.take("wandb_entity")
    sections = [tracker(name, projects.get(name), entity) for name in names if name in TRACKERS]
    draft.put("metrics.trackers", sections or None)
    if sections:
        draft.note(
            "metrics.trackers", "trackers write to files unless online: true is added to them; each needs the extra of its name"
        )
    for name in names:
        if name not in (*TRACKERS, "none", "tensorboard"):
            draft.note("report_to", f"{name} is not supported; metrics go to metrics.jsonl and TensorBoard")


def tracker(name: str, project: Any, entity: Any = None) -> dict[str, Any]:
    """Return the section of a tracker."""
    section: dict[str, Any] = {"name": name}
    if project:
        section["project"] = str(project)
    if entity and name == "wandb":
        section["entity"] = str(entity)
    return section


def _read_interval(draft: Draft, kind: str, path: str) -> None:
    """Read after how many steps something happens; their intervals in epochs, or in shares of the run, need the steps."""
    strategy = draft.take(f"{kind}_strategy", "evaluation_strategy" if kind == "eval" else f"{kind}_strategy")
    per_epoch = draft.number("evals_per_epoch" if kind == "eval" else "saves_per_epoch")
    interval = draft.number(f"{kind}_steps")
    if strategy == "epoch" or per_epoch is not None:
        draft.note(f"{kind}_strategy", f"{path} is a number of steps; `moe-train data check` states how many an epoch has")
    elif interval is not None and interval >= 1:
        draft.put(path, int(interval))
    elif interval is not None:
        draft.note(f"{kind}_steps", f"{path} is a number of steps, and {interval:g} a share of the run")


def note_trained_prompts(draft: Draft, key: str) -> None:
    """Note that prompts bear no loss here, if theirs says that they do."""
    if draft.flag(key):
        draft.note(key, "prompts are not trained on here: the loss covers the assistant's turns; of plain text it covers all")


def read_lora_numbers(draft: Draft, rank_names: tuple[str, ...], default_rank: int, default_alpha: int | None) -> dict[str, Any]:
    """Read rank, alpha, dropout and the like into the `lora` section, and return the target that gets rank and alpha."""
    rank = draft.whole(*rank_names, default=default_rank) or default_rank
    alpha = draft.number("lora_alpha", default=2 * rank if default_alpha is None else default_alpha)
    dropout = draft.number("lora_dropout")
    draft.put("lora.dropout", dropout or None)
    if draft.flag("use_rslora", "peft_use_rslora"):
        draft.put("lora.rslora", True)
    return {"rank": rank, "alpha": alpha}
