"""A config of LLaMA-Factory."""

from __future__ import annotations

from typing import Any

from moe_train.config.conversion import arguments
from moe_train.config.conversion.dataset_info import read_dataset_info, source_of
from moe_train.config.conversion.draft import EVERY_LINEAR, Draft, local_model, modules
from moe_train.config.conversion.objectives import Pairs, put_marks, put_pairs, put_reward
from moe_train.config.conversion.values import as_names, as_number


def read(draft: Draft, devices: int) -> None:
    """Read a config of LLaMA-Factory into the draft; `devices` is the number of devices that it ran on."""
    stage = str(draft.take("stage", default="sft"))
    _read_objective(draft, stage)
    draft.put("init_from", local_model(draft, str(draft.take("model_name_or_path", default="models/BASE"))))
    _read_lora(draft)
    _read_data(draft, stage)
    draft.put("train.seq_len", draft.whole("cutoff_len", default=2048))
    arguments.read_length_and_batch(draft, devices)
    arguments.read_optimizer(draft)
    arguments.read_precision(draft)
    arguments.read_evaluation_and_saving(draft)
    if draft.flag("packing") or draft.flag("neat_packing"):
        draft.note("packing", "left out: examples are always packed, and never attend to each other")
    draft.take("do_train", "do_eval", "do_predict", "overwrite_output_dir", "overwrite_cache", "plot_loss", "flash_attn")
    draft.take("ddp_timeout", "per_device_eval_batch_size", "save_only_model")
    arguments.note_trained_prompts(draft, "train_on_prompt")
    if draft.flag("pure_bf16"):
        draft.put("compute.dtype", "bfloat16")
        draft.put("compute.param_dtype", "bfloat16")


def _read_objective(draft: Draft, stage: str) -> None:
    if stage == "rm":
        put_reward(draft)
    elif stage in ("dpo", "kto"):
        beta = draft.number("pref_beta", "dpo_beta", "kto_beta", default=0.1) or 0.1
        if stage == "kto":
            weights = draft.number("kto_chosen_weight", default=1.0), draft.number("kto_rejected_weight", default=1.0)
            put_marks(draft, beta, weights[0] or 1.0, weights[1] or 1.0)
        else:
            pairs = Pairs(
                str(draft.take("pref_loss", "dpo_loss", default="sigmoid")),
                beta,
                draft.number("dpo_label_smoothing", default=0.0) or 0.0,
                draft.number("pref_ftx", "dpo_ftx", default=0.0) or 0.0,
                draft.number("simpo_gamma", default=0.5),
            )
            put_pairs(draft, "pref_loss", pairs)
    elif stage not in ("sft", "pt"):
        draft.note("stage", f"{stage} is not supported; written is the next-token objective")


def _read_lora(draft: Draft) -> None:
    method = draft.take("finetuning_type", default="lora")
    bits = draft.whole("quantization_bit")
    targets = draft.take("lora_target", default="all")
    in_full = draft.take("additional_target", default=[])
    start = draft.take("adapter_name_or_path")
    if method != "lora":
        draft.take("lora_rank", "lora_alpha", "lora_dropout")
        if method != "full":
            draft.note("finetuning_type", f"{method} is not supported; written is full training; lora and full are there")
        return
    target = arguments.read_lora_numbers(draft, ("lora_rank",), 8, None)
    patterns = modules(draft, "lora_target", targets)
    draft.put("lora.targets", [{"modules": patterns or list(EVERY_LINEAR), **target}])
    draft.put("lora.train", modules(draft, "additional_target", in_full) or None)
    draft.put("lora.init_from", start)
    if bits is not None:
        draft.put("lora.quantize", {"name": "nf4" if bits == 4 else "int8"})


def _read_data(draft: Draft, stage: str) -> None:
    folder = str(draft.take("dataset_dir", default="data"))
    template = draft.take("template")
    if template is not None:
        draft.note("template", f"{template}: the tokenizer's own chat template is used; compare with `moe-train data show`")
    entries: dict[str, dict[str, Any]] | None = None
    if "dataset" in draft or "eval_dataset" in draft:
        entries = read_dataset_info(draft, folder)
    for key, section in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        value = draft.take(key)
        if value is not None:
            draft.put(section, [_source(draft, name, entries, folder, stage) for name in as_names(key, value)])
    _read_weights(draft)
    share = draft.number("val_size", default=0.0)
    if share:
        draft.note("val_size", f"held-out data are sources of their own (data.eval); split off {share:g} of the records")
    draft.put("data.num_proc", draft.whole("preprocessing_num_workers"))
    draft.take("dataloader_num_workers")


def _read_weights(draft: Draft) -> None:
    """Read the shares in which data sets are mixed."""
    stated = draft.take("interleave_probs")
    if stated is None:
        return
    texts = as_names("interleave_probs", str(stated) if isinstance(stated, int | float) else stated)
    sources = draft.tree.get("data", {}).get("train", [])
    if len(texts) != len(sources):
        draft.note("interleave_probs", f"{len(texts)} shares for {len(sources)} data sets; state weight in the sources")
        return
    for source, text in zip(sources, texts, strict=True):
        source["weight"] = as_number("interleave_probs", text)
    draft.take("mix_strategy")


def _source(draft: Draft, name: str, entries: dict[str, dict[str, Any]] | None, folder: str, stage: str) -> dict[str, Any]:
    """Return our source for a data set that dataset_info.json describes; a guess with a remark if it does not."""
    if entries is not None and isinstance(entries.get(name), dict):
        return source_of(draft, name, entries[name], folder, stage)
    reason = "is not in dataset_info.json" if entries is not None else "is described by dataset_info.json"
    draft.note(
        f"dataset {name}", f"{reason}; state its file_name and its record; written is LLaMA-Factory's default format, alpaca"
    )
    return source_of(draft, name, {"file_name": f"{name}.json"}, folder, stage)
