"""A config of axolotl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from moe_train.config.conversion import arguments
from moe_train.config.conversion.draft import EVERY_LINEAR, Draft, local_model, modules
from moe_train.config.conversion.objectives import Pairs, objective_name, pair_record, put_marks, put_pairs, put_reward
from moe_train.config.conversion.values import as_files, as_mapping, as_mappings, as_names, as_text
from moe_train.config.strict_yaml import shown


def read(draft: Draft, devices: int) -> None:
    """Read a config of axolotl into the draft; `devices` is the number of devices that it ran on."""
    draft.put("init_from", local_model(draft, str(draft.take("base_model", default="models/BASE"))))
    draft.take("model_type", "base_model_config", "tokenizer_type", "is_mistral_derived_model", "strict")
    _read_lora(draft)
    _read_objective(draft)
    _read_data(draft)
    draft.put("train.seq_len", draft.whole("sequence_len", default=2048))
    arguments.read_length_and_batch(draft, devices, epochs=1)
    arguments.read_optimizer(draft, schedule="cosine")
    arguments.read_precision(draft)
    arguments.read_evaluation_and_saving(draft)
    if draft.flag("sample_packing") or draft.flag("pad_to_sequence_len"):
        draft.note("sample_packing", "left out: examples are always packed, and never attend to each other")
    if draft.take("fsdp"):
        draft.note("fsdp", "use mesh.fsdp: parameters, gradients and optimizer are sharded over the mesh")
    draft.take("flash_attention", "sdp_attention", "xformers_attention", "attn_implementation")
    arguments.note_trained_prompts(draft, "train_on_inputs")


_DEFAULTS = (("roles_to_train", ["assistant"]), ("roles_to_train", ["gpt", "assistant"]), ("train_on_eos", "turn"))
"""Settings of a data set that state what holds here anyway."""
_PAIR_TYPES: Mapping[str, tuple[str | None, str, str]] = MappingProxyType(
    {
        "intel": ("question", "chosen", "rejected"),
        "argilla": ("instruction", "chosen_response", "rejected_response"),
        "icr": ("input", "chosen", "rejected"),
        "prompt_pairs": ("prompt", "chosen", "rejected"),
        "argilla_chat": (None, "chosen", "rejected"),
        "ultra": (None, "chosen", "rejected"),
    }
)
"""Last part of a type of preference pairs -> the columns of prompt and answers; None if the answers begin with the prompt."""
_MARKED_TYPES: Mapping[str, dict[str, str]] = MappingProxyType(
    {
        "intel": {"prompt": "question"},
        "argilla": {"prompt": "instruction"},
        "icr": {"prompt": "input"},
        "argilla_chat": {"messages": "completion"},
    }
)
"""Last part of a type of marked answers -> our record's columns, where they are not `prompt` and `completion`."""


def _read_objective(draft: Draft) -> None:
    kind = draft.take("rl")
    if draft.flag("reward_model"):
        put_reward(draft)
        return
    if kind in (None, False):
        return
    beta = draft.number("rl_beta", "dpo_beta", default=0.1) or 0.1
    if kind == "kto":
        weights = draft.number("kto_desirable_weight", default=1.0), draft.number("kto_undesirable_weight", default=1.0)
        put_marks(draft, beta, weights[0] or 1.0, weights[1] or 1.0)
        return
    sft_weight = draft.number("rpo_alpha", default=0.0) or 0.0
    loss = str(kind)
    if kind == "orpo":
        beta = draft.number("orpo_alpha", default=0.1) or 0.1
    elif kind == "simpo":
        # The default of TRL's CPO, on which axolotl's SimPO stands.
        sft_weight = draft.number("cpo_alpha", default=1.0) or 0.0
    elif kind in ("dpo", True):
        loss = str(draft.take("dpo_loss_type", default="sigmoid")).strip("[]'")
        loss = "sigmoid_norm" if draft.flag("dpo_norm_loss") else loss
    elif kind != "ipo":
        draft.note("rl", f"{kind} is not supported; dpo, ipo, simpo, orpo and kto are; written is the next-token objective")
        return
    margin = draft.number("simpo_gamma", default=0.5)
    put_pairs(draft, "rl", Pairs(loss, beta, draft.number("dpo_label_smoothing", default=0.0) or 0.0, sft_weight, margin))


def _read_lora(draft: Draft) -> None:
    adapter = draft.take("adapter")
    four_bits = draft.flag("load_in_4bit")
    eight_bits = draft.flag("load_in_8bit")
    every_linear = draft.flag("lora_target_linear")
    names = draft.take("lora_target_modules", default=[])
    names = as_names("lora_target_modules", names) + as_names("lora_target_parameters", draft.take("lora_target_parameters"))
    in_full = draft.take("lora_modules_to_save", default=[])
    start = draft.take("lora_model_dir")
    if adapter not in ("lora", "qlora"):
        draft.take("lora_r", "lora_alpha", "lora_dropout")
        if adapter:
            draft.note("adapter", f"{adapter} is not supported; lora and qlora are")
        return
    target = arguments.read_lora_numbers(draft, ("lora_r",), 8, 16)
    patterns = list(EVERY_LINEAR) if every_linear else modules(draft, "lora_target_modules", names)
    draft.put("lora.targets", [{"modules": patterns or list(EVERY_LINEAR), **target}])
    if not patterns:
        draft.note("lora_target_modules", "none is stated; written are attention and FFN")
    draft.put("lora.train", modules(draft, "lora_modules_to_save", in_full) or None)
    draft.put("lora.init_from", start)
    if adapter == "qlora" or four_bits:
        draft.put("lora.quantize", {"name": "nf4"})
    elif eight_bits:
        draft.put("lora.quantize", {"name": "int8"})


def _read_data(draft: Draft) -> None:
    entries: Any = draft.take("pretraining_dataset", default=[])
    sources = []
    for entry in entries if isinstance(entries, list) else [entries]:
        # A text alone is the name of a data set.
        named = entry if isinstance(entry, dict) else {"path": entry}
        sources.append(_source(draft, "pretraining_dataset", {**named, "type": "pretrain"}))
    sources += _sources(draft, "datasets")
    draft.put("data.train", sources)
    draft.put("data.eval", _sources(draft, "test_datasets") or None)
    share = draft.number("val_set_size", default=0.0)
    if share:
        draft.note("val_set_size", f"held-out data are sources of their own (data.eval); split off {share:g} of the records")
    template = draft.take("chat_template_jinja")
    name = draft.take("chat_template")
    if template is not None:
        draft.put("data.chat_template", template)
    elif name == "chatml":
        draft.put("data.chat_template", "chatml")
    elif name not in (None, "tokenizer_default"):
        draft.note("chat_template", f"{name}: the tokenizer's own is used; compare with `moe-train data show`")
    draft.put("data.num_proc", draft.whole("dataset_processes", "dataset_num_proc"))
    draft.take("dataset_prepared_path")


def _sources(draft: Draft, key: str) -> list[dict[str, Any]]:
    """Return our sources for a list of data sets."""
    return [_source(draft, key, entry) for entry in as_mappings(key, draft.take(key))]


def _source(draft: Draft, key: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return our source for an entry of `datasets`."""
    known = {"text_column", "path", "data_files", "ds_type", "type", "split", "name", "field", "conversation", "train_on_split"}
    known |= {"field_messages", "message_field_role", "message_field_content", "message_property_mappings", "roles"}
    if objective_name(draft) != "next_token":
        known |= {"field_chosen", "field_rejected", "field_prompt", "field_completion", "field_label"}
    for name in sorted(name for name in set(entry) - known if (name, entry[name]) not in _DEFAULTS):
        draft.note(f"{key}.{name}", f"no such setting here (value {shown(entry[name])}); check with `moe-train data show`")
    path = str(entry.get("path", ""))
    record = _record(draft, key, entry)
    files = entry.get("data_files") or ([path] if PurePosixPath(path).suffix or path.startswith((".", "/")) else None)
    if files is not None:
        return {"name": "files", "files": as_files(f"{key}.data_files", files), "record": record}
    draft.note(f"{key}.path", f"{path} is a data set of the hub; state its commit as revision, or download it and name files")
    hub = {"name": "hub", "dataset": path, "split": entry.get("split", "train"), "revision": "STATE-THE-COMMIT", "record": record}
    if entry.get("name"):
        hub["subset"] = entry["name"]
    return hub


def _record(draft: Draft, key: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return our record section for the `type` of a data set."""
    objective = objective_name(draft)
    if objective in ("preference", "reward"):
        return _pair_record(draft, key, entry)
    if objective == "unpaired_preference":
        return _marked_record(key, entry)
    kind = _kind(key, entry) or "completion"
    if isinstance(kind, dict):
        question, answer = kind.get("field_instruction", "instruction"), kind.get("field_output", "output")
        draft.note(f"{key}.type", "a format of one's own: prompts are written by the chat template instead")
        for field, usual in (("field_input", "input"), ("field_system", "system")):
            if kind.get(field) not in (None, "", usual):
                draft.note(f"{key}.type.{field}", f"the column {kind[field]} has to be named {usual} to be read")
        if kind.get("system_prompt"):
            draft.note(f"{key}.type.system_prompt", "a system message for all records has to stand in a column system")
        return {"name": "completion", "prompt": question, "completion": answer}
    if kind in ("sharegpt", "messages") or kind.startswith("chat_template"):
        record: dict[str, Any] = {"name": "chat"}
        mapping = as_mapping(f"{key}.message_property_mappings", entry.get("message_property_mappings"))
        role = entry.get("message_field_role") or mapping.get("role")
        content = entry.get("message_field_content") or mapping.get("content")
        for name, value in (("column", entry.get("field_messages")), ("role", role), ("content", content)):
            if value:
                record[name] = value
        roles: dict[str, str] = {}
        for role_name, spellings in as_mapping(f"{key}.roles", entry.get("roles")).items():
            roles |= dict.fromkeys(as_names(f"{key}.roles.{role_name}", spellings), role_name)
        if roles:
            record["roles"] = roles
        return record
    if kind in ("completion", "pretrain", "pretraining"):
        return {"name": "text", "column": entry.get("field") or entry.get("text_column") or "text"}
    if kind.startswith("alpaca") or kind in ("gpteacher", "oasst"):
        draft.note(f"{key}.type", f"{kind}: the chat template writes the prompt, not Alpaca's headings")
        return {"name": "completion", "prompt": "instruction", "completion": "output"}
    draft.note(f"{key}.type", f"{kind} is not known; written is a chat; see `moe-train explain data.train.record`")
    return {"name": "chat"}


def _kind(key: str, entry: dict[str, Any]) -> str | dict[str, Any] | None:
    """Return the type of a data set: a name, or a format of one's own; None if it states none."""
    kind = entry.get("type")
    return kind if kind is None or isinstance(kind, dict) else as_text(f"{key}.type", kind)


def _pair_record(draft: Draft, key: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return our record section for preference pairs."""
    kind = _kind(key, entry) or ""
    fields: dict[str, Any] = kind if isinstance(kind, dict) else entry
    chosen, rejected = fields.get("field_chosen", "chosen"), fields.get("field_rejected", "rejected")
    if isinstance(kind, dict):
        draft.note(f"{key}.type", "a format of one's own: prompts are written by the chat template instead")
        return pair_record(kind.get("field_prompt", "prompt"), chosen, rejected)
    template, _, suffix = kind.rpartition(".")
    if template == "bradley_terry":
        return pair_record("input", chosen, rejected)
    if kind.startswith("chat_template") and not suffix.startswith("argilla"):
        return pair_record(entry.get("field_messages", "messages"), chosen, rejected)
    if kind == "chat_template.argilla":
        suffix = "argilla_chat"
    if kind and suffix not in _PAIR_TYPES:
        draft.note(f"{key}.type", f"{kind} is not known; written are the columns prompt, chosen and rejected")
    return pair_record(*_PAIR_TYPES.get(suffix, ("prompt", chosen, rejected)))


def _marked_record(key: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return our record section for answers marked as good or bad."""
    kind = _kind(key, entry) or ""
    if isinstance(kind, dict):
        fields = {"prompt": "field_prompt", "completion": "field_completion", "label": "field_label"}
        return {"name": "labelled", **{name: kind.get(field, name) for name, field in fields.items()}}
    return {"name": "labelled", **_MARKED_TYPES.get(kind.rpartition(".")[2], {})}
