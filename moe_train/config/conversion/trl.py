"""The arguments of TRL's scripts as YAML (`trl sft --config FILE`, and `dpo`, `kto`, `reward` alike)."""

from __future__ import annotations

from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from moe_train.config.conversion import arguments
from moe_train.config.conversion.draft import Draft, local_model, modules
from moe_train.config.conversion.objectives import Pairs, objective_name, pair_record, put_marks, put_pairs, put_reward
from moe_train.config.conversion.values import as_files, as_mappings, as_names, as_number
from moe_train.config.strict_yaml import shown

LEARNING_RATES = MappingProxyType({"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "reward": 1e-4})
"""Script of TRL 1.16 -> its default learning rate."""


def read(draft: Draft, devices: int) -> None:
    """Read arguments of TRL into the draft; `devices` is the number of devices that they ran on."""
    draft.put("init_from", local_model(draft, str(draft.take("model_name_or_path", default="models/BASE"))))
    _read_lora(draft)
    kind = _read_objective(draft)
    _read_data(draft)
    # Defaults of TRL 1.16 that are not those of transformers.
    draft.assume(learning_rate=LEARNING_RATES[kind], gradient_checkpointing=True, logging_steps=10)
    if not draft.flag("fp16"):
        draft.assume(bf16=True)
    draft.put("train.seq_len", draft.whole("max_length", "max_seq_length", default=1024))
    arguments.read_length_and_batch(draft, devices)
    arguments.read_optimizer(draft)
    arguments.read_precision(draft)
    arguments.read_evaluation_and_saving(draft)
    if draft.take("packing") is not None:
        draft.note("packing", "left out: examples are always packed, and never attend to each other")
    draft.take("torch_dtype", "dtype", "attn_implementation", "do_train", "do_eval", "per_device_eval_batch_size")
    draft.take("completion_only_loss", "assistant_only_loss", "overwrite_output_dir")
    draft.take("disable_dropout", "precompute_ref_log_probs", "precompute_ref_batch_size", "remove_unused_columns")


def _read_objective(draft: Draft) -> str:
    """Read what is learned, and return the script; a config does not name it, but each has settings of its own."""
    names = as_names("loss_type", draft.take("loss_type"))
    if "center_rewards_coefficient" in draft:
        put_reward(draft)
        return "reward"
    if "kto" in names or "desirable_weight" in draft or "undesirable_weight" in draft:
        weights = draft.number("desirable_weight", default=1.0), draft.number("undesirable_weight", default=1.0)
        put_marks(draft, draft.number("beta", default=0.1) or 0.1, weights[0] or 1.0, weights[1] or 1.0)
        return "kto"
    if "num_generations" in draft or "reward_funcs" in draft:
        draft.note("num_generations", "GRPO and RLOO are not supported; written is the next-token objective")
        return "sft"
    signs = ("beta", "precompute_ref_log_probs", "label_smoothing", "rpo_alpha", "f_divergence_type", "cpo_alpha", "simpo_gamma")
    if not any(name in draft for name in signs) and set(names) <= {"nll", "chunked_nll", "dft"}:
        if "dft" in names:
            draft.note("loss_type", "dft is not supported; written is the next-token objective")
        return "sft"
    if not names:
        draft.note("objective", "a config of TRL does not name its script; written is DPO, since beta or a like setting is stated")
    _read_pairs(draft, names or ["sigmoid"])
    return "dpo"


def _read_pairs(draft: Draft, names: list[str]) -> None:
    """Read the losses of DPO and CPO, of which several are added up with weights."""
    stated = as_names("loss_weights", draft.take("loss_weights")) or ["1"] * len(names)
    weights = {name: as_number("loss_weights", text) for name, text in zip(names, stated, strict=False)}
    sft_weight = weights.pop("sft", 0.0) or draft.number("rpo_alpha", default=0.0) or 0.0
    if "simpo" in names or "cpo_alpha" in draft:
        sft_weight = draft.number("cpo_alpha", default=1.0) or 0.0
    first = next(iter(weights), "sigmoid")
    for name in list(weights)[1:]:
        draft.note("loss_type", f"{name} is not added to {first}; one loss and sft are possible")
    scale = weights.get(first, 1.0)
    if scale not in (0.0, 1.0):
        draft.note("loss_weights", f"{first} has the weight 1, and sft {sft_weight / scale:g}, which has the same minimum")
        sft_weight /= scale
    smoothing = draft.number("label_smoothing", default=0.0) or 0.0
    beta = draft.number("beta", default=0.1) or 0.1
    put_pairs(draft, "loss_type", Pairs(first, beta, smoothing, sft_weight, draft.number("simpo_gamma", default=0.5)))


def _read_lora(draft: Draft) -> None:
    four_bits = draft.flag("load_in_4bit")
    eight_bits = draft.flag("load_in_8bit")
    targets = draft.take("lora_target_modules", "target_modules")
    in_full = draft.take("lora_modules_to_save", "modules_to_save", default=[])
    draft.take("lora_task_type", "bnb_4bit_quant_type", "use_bnb_nested_quant")
    if not draft.flag("use_peft"):
        draft.take("lora_r", "lora_alpha", "lora_dropout")
        return
    target = arguments.read_lora_numbers(draft, ("lora_r",), 16, 32)
    patterns = [] if targets is None else modules(draft, "lora_target_modules", targets)
    if not patterns:
        patterns = ["attention.q_proj", "attention.v_proj"]
        draft.note("lora_target_modules", "none is stated; written are PEFT's for Mistral models, q_proj and v_proj")
    draft.put("lora.targets", [{"modules": patterns, **target}])
    draft.put("lora.train", modules(draft, "lora_modules_to_save", in_full) or None)
    if four_bits:
        draft.put("lora.quantize", {"name": "nf4"})
    elif eight_bits:
        draft.put("lora.quantize", {"name": "int8"})


def _read_data(draft: Draft) -> None:
    split = draft.take("dataset_train_split", default="train")
    held_out_split = draft.take("dataset_test_split", default="test")
    mixture = as_mappings("datasets", draft.take("datasets"))
    entries = mixture
    if not entries:
        subset = draft.take("dataset_config", "dataset_config_name")
        entries = [{"path": draft.take("dataset_name", default=""), "name": subset, "split": split}]
    record = _record(draft)
    draft.put("data.train", [_source(draft, entry, record) for entry in entries])
    is_evaluated = draft.peek("eval_strategy") not in (None, "no")
    if is_evaluated and not mixture and draft.tree["data"]["train"][0]["name"] == "hub":
        draft.put("data.eval", [{**draft.tree["data"]["train"][0], "split": held_out_split}])
    share = draft.number("test_split_size", default=0.0)
    if share:
        draft.note("test_split_size", f"held-out data are sources of their own (data.eval); split off {share:g} of the records")
    draft.put("data.chat_template", draft.take("chat_template_path"))
    draft.put("data.num_proc", draft.whole("dataset_num_proc"))


def _record(draft: Draft) -> dict[str, Any]:
    """Return our record section, which all data sets of theirs share."""
    column = draft.take("dataset_text_field")
    objective = objective_name(draft)
    if objective in ("preference", "reward"):
        draft.note("dataset_name", "state record.prompt: null if its pairs have no column prompt, as in many data sets of TRL")
        return pair_record("prompt")
    if objective == "unpaired_preference":
        return {"name": "labelled"}
    if column:
        return {"name": "text", "column": column}
    draft.note("dataset_name", "records are read as conversations (messages); see `moe-train explain data.train.record`")
    return {"name": "chat"}


def _source(draft: Draft, entry: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Return our source for a data set: files, or a set of the hub with a placeholder for its commit."""
    for key in sorted(set(entry) - {"path", "name", "split", "columns", "data_files"}):
        draft.note(f"datasets.{key}", f"no such setting here (value {shown(entry[key])}); check with `moe-train data show`")
    path = str(entry.get("path", ""))
    files = entry.get("data_files")
    if files is None and (PurePosixPath(path).suffix or path.startswith((".", "/"))):
        files = path
    if files is not None:
        return {"name": "files", "files": as_files("datasets.data_files", files), "record": record}
    draft.note("dataset_name", f"{path} is a data set of the hub; state its commit as revision, or download it and name files")
    split = entry.get("split", "train")
    source = {"name": "hub", "dataset": path, "split": split, "revision": "STATE-THE-COMMIT", "record": record}
    if entry.get("name"):
        source["subset"] = entry["name"]
    return source
