"""A config of mistral-finetune."""

from __future__ import annotations

from typing import Any

from moe_train.config.conversion.arguments import tracker
from moe_train.config.conversion.draft import EVERY_LINEAR, Draft, local_model
from moe_train.config.conversion.values import as_mapping, as_number, as_text


def read(draft: Draft, devices: int) -> None:
    """Read a config of mistral-finetune into the draft; `devices` is the number of devices that it ran on."""
    draft.put("init_from", local_model(draft, str(draft.take("model_id_or_path", default="models/BASE"))))
    _read_lora(draft)
    _read_data(draft)
    steps = draft.whole("max_steps", default=100) or 100
    accumulated = draft.whole("num_microbatches", default=1) or 1
    per_device = draft.whole("batch_size", default=1) or 1
    draft.put("train.steps", steps)
    draft.put("train.batch_size", per_device * accumulated * devices)
    draft.put("train.microbatches", accumulated if accumulated > 1 else None)
    draft.put("train.seq_len", draft.whole("seq_len", default=2048))
    draft.note("train.batch_size", f"{per_device} per device x {accumulated} microbatches x {devices} devices (--devices)")
    _read_optimizer(draft, steps)
    draft.put("compute.dtype", "bfloat16")
    draft.put("compute.param_dtype", "bfloat16" if "lora" in draft.tree else "float32")
    if draft.flag("checkpoint"):
        draft.put("compute.remat", "full")
    frequency = draft.whole("eval_freq")
    if draft.flag("no_eval"):
        draft.tree["data"].pop("eval", None)
    else:
        draft.put("evaluation.every_steps", frequency)
    draft.put("checkpoint.every_steps", draft.whole("ckpt_freq"))
    draft.put("checkpoint.keep_last", draft.whole("num_ckpt_keep"))
    draft.put("metrics.every_steps", draft.whole("log_freq"))
    draft.put("seed", draft.whole("seed"))
    draft.put("run_dir", str(draft.take("run_dir", default="runs/converted")))
    if draft.flag("save_adapters"):
        draft.note("save_adapters", "left out: `moe-train export` writes the adapter, or the merged model with --merge")
    if draft.flag("no_ckpt"):
        draft.note("no_ckpt", "left out: the last step is always saved, since exports are written from it")
    processes = draft.whole("world_size", default=1) or 1
    if processes > 1 and devices == 1:
        draft.note("world_size", f"train.batch_size counts one device; convert again with --devices {processes} if it ran on them")
    _read_trackers(draft)


def _read_trackers(draft: Draft) -> None:
    sections = []
    for name, key in (("wandb", "project"), ("mlflow", "experiment_name")):
        section = as_mapping(name, draft.take(name))
        if section.get(key):
            sections.append(tracker(name, section[key]))
            draft.note(name, f"it writes to files unless online: true is added; it needs the extra {name}")
    draft.put("metrics.trackers", sections or None)


def _read_lora(draft: Draft) -> None:
    in_full = draft.flag("full_finetuning")
    section = as_mapping("lora", draft.take("lora"))
    if in_full or not section.get("enable", True):
        return
    rank = int(_number(section, "lora", "rank", 64))
    # Its update is scaling * B·A.
    alpha = _number(section, "lora", "scaling", 2.0) * rank
    draft.put("lora.targets", [{"modules": list(EVERY_LINEAR), "rank": rank, "alpha": alpha}])
    if section.get("dropout"):
        draft.put("lora.dropout", _number(section, "lora", "dropout", 0.0))


def _number(section: dict[str, Any], name: str, key: str, default: float) -> float:
    """Return a number of a section; `default` if it is not stated."""
    value = section.get(key)
    return default if value is None else as_number(f"{name}.{key}", value)


def _read_data(draft: Draft) -> None:
    section = as_mapping("data", draft.take("data"))
    train = _sources(section, "instruct_data", "chat") + _sources(section, "data", "text")
    draft.put("data.train", train)
    held_out = _sources(section, "eval_instruct_data", "chat") + _sources(section, "eval_data", "text")
    draft.put("data.eval", held_out or None)
    if section.get("instruct") or section.get("shuffle") is False:
        draft.note("data", "only instruct_data, data and eval_instruct_data have an equivalent; an epoch is always shuffled")


def _sources(section: dict[str, Any], key: str, record: str) -> list[dict[str, Any]]:
    """Return our sources for a text such as `a.jsonl:2,b.jsonl`, in which a number is the weight of a file."""
    sources: list[dict[str, Any]] = []
    text = as_text(f"data.{key}", section.get(key) or "")
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        path, _, weight = part.rpartition(":")
        source: dict[str, Any] = {"name": "files", "files": [path or weight], "record": {"name": record}}
        if len(parts) > 1 or path:
            source["weight"] = as_number(f"data.{key}", weight) if path else 1.0
        sources.append(source)
    return sources


def _read_optimizer(draft: Draft, steps: int) -> None:
    section = as_mapping("optim", draft.take("optim"))
    draft.put("optimizer.name", "adamw")
    draft.put("optimizer.learning_rate", _number(section, "optim", "lr", 1e-4))
    draft.put("optimizer.weight_decay", _number(section, "optim", "weight_decay", 0.1))
    draft.put("optimizer.max_grad_norm", draft.number("max_norm"))
    warmup = round(_number(section, "optim", "pct_start", 0.05) * steps)
    draft.put("optimizer.schedule", {"name": "cosine", "warmup_steps": warmup, "final_fraction": 0.0})
    draft.note("optim", "OneCycle warms up and decays along cosines; written is a linear warm-up and a cosine decay to zero")
