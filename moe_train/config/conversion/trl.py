"""The arguments of TRL's SFT script as YAML (`trl sft --config FILE`)."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from moe_train.config.conversion import arguments
from moe_train.config.conversion.draft import Draft, local_model, modules


def read(draft: Draft, devices: int) -> None:
    """Read arguments of TRL into the draft; `devices` is the number of devices that they ran on."""
    draft.put("init_from", local_model(draft, str(draft.take("model_name_or_path", default="models/BASE"))))
    _read_lora(draft)
    _read_data(draft)
    draft.put("train.seq_len", draft.whole("max_length", "max_seq_length", default=1024))
    arguments.read_length_and_batch(draft, devices)
    arguments.read_optimizer(draft)
    arguments.read_precision(draft)
    arguments.read_evaluation_and_saving(draft)
    if draft.take("packing") is not None:
        draft.note("packing", "left out: examples are always packed, and never attend to each other")
    draft.take("torch_dtype", "dtype", "attn_implementation", "do_train", "do_eval", "per_device_eval_batch_size")
    draft.take("completion_only_loss", "assistant_only_loss", "overwrite_output_dir")


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
    name = str(draft.take("dataset_name", default=""))
    subset = draft.take("dataset_config", "dataset_config_name")
    split = draft.take("dataset_train_split", default="train")
    held_out_split = draft.take("dataset_test_split", default="test")
    column = draft.take("dataset_text_field")
    record: dict[str, Any] = {"name": "text", "column": column} if column else {"name": "chat"}
    if not column:
        draft.note("dataset_name", "records are read as conversations (messages); see `moe-train explain data.train.record`")
    if PurePosixPath(name).suffix or name.startswith((".", "/")):
        draft.put("data.train", [{"name": "files", "files": [name.removeprefix("./")], "record": record}])
    else:
        source = {"name": "hub", "dataset": name, "split": split, "revision": "STATE-THE-COMMIT", "record": record}
        if subset:
            source["subset"] = subset
        draft.put("data.train", [source])
        draft.note("dataset_name", f"{name} is a data set of the hub; state its commit as revision, or download it and name files")
        if draft.take("eval_strategy") not in (None, "no"):
            draft.put("data.eval", [{**source, "split": held_out_split}])
    draft.put("data.num_proc", draft.whole("dataset_num_proc"))
