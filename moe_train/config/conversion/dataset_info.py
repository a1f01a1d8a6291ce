"""The `dataset_info.json` of LLaMA-Factory: the file, format and columns of each data set that a config names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from moe_train.config.conversion.draft import Draft
from moe_train.config.conversion.objectives import pair_record
from moe_train.config.conversion.values import as_mapping, as_text

FILE_NAME = "dataset_info.json"
"""Name of the file in the folder of the data."""
_ROLES = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}
"""Tag of LLaMA-Factory -> our role."""
_USUAL_ROLES = {"user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation", "system_tag": "system"}
_CALL_ROLE = "function_call"
"""Role of a turn that calls a tool, as ShareGPT's records have it."""
_READ_COLUMNS = {"query": "input", "history": "history", "system": "system", "tools": "tools", "images": "images"}
"""Column of LLaMA-Factory -> the name under which it is read."""
_KNOWN = {"file_name", "formatting", "columns", "tags", "hf_hub_url", "subset", "split", "ranking"}


def read_dataset_info(draft: Draft, folder: str) -> dict[str, dict[str, Any]] | None:
    """Return name -> entry of every data set; None, with a remark, if the file is not there.

    Args:
        draft: the config, whose file may stand somewhere below the folder that its paths start from.
        folder: `dataset_dir` of the config.

    Raises:
        ValueError: the file is not JSON.
    """
    for above in (Path(), *draft.folder.absolute().parents, draft.folder):
        path = above / folder / FILE_NAME
        if path.is_file():
            try:
                entries = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is not JSON: {error}") from error
            return entries if isinstance(entries, dict) else {}
    draft.note(
        "dataset_dir", f"{folder}/{FILE_NAME} is not here; convert where it is, and files, formats and columns are read from it"
    )
    return None


def source_of(draft: Draft, name: str, entry: dict[str, Any], folder: str, stage: str) -> dict[str, Any]:
    """Return our source for a data set.

    Args:
        draft: the config, for remarks.
        name: the data set's name.
        entry: what dataset_info.json states about it.
        folder: `dataset_dir` of the config.
        stage: what is learned: `pt` for plain text, `dpo` and `rm` for pairs of answers, `kto` for marked ones, `sft` for others.
    """
    for remark in _remarks(name, entry, stage):
        draft.note(f"dataset {name}", remark)
    record = _record(name, entry, stage)
    if stage == "sft" and _names(name, entry, "columns").get("images"):
        draft.put("vision", {})
    if "file_name" in entry:
        return {"name": "files", "files": [f"{folder}/{entry['file_name']}"], "record": record}
    hub = str(entry.get("hf_hub_url", name))
    draft.note(f"dataset {name}", f"{hub} is a data set of the hub; state its commit as revision, or download it and name files")
    source = {"name": "hub", "dataset": hub, "split": entry.get("split", "train"), "revision": "STATE-THE-COMMIT", "record": record}
    if entry.get("subset"):
        source["subset"] = entry["subset"]
    return source


def _names(name: str, entry: dict[str, Any], section: Literal["columns", "tags"]) -> dict[str, str]:
    """Return LLaMA-Factory's names of columns or tags -> those of the file. Raises ValueError if they are none."""
    texts = as_mapping(f"dataset {name}: {section}", entry.get(section))
    return {key: as_text(f"dataset {name}: {section}.{key}", text) for key, text in texts.items() if text is not None}


def _record(name: str, entry: dict[str, Any], stage: str) -> dict[str, Any]:
    columns = _names(name, entry, "columns")
    if stage == "pt":
        return {"name": "text", "column": columns.get("prompt", "text")}
    is_chat = entry.get("formatting", "alpaca") != "alpaca"
    messages = columns.get("messages", "conversations")
    # Alpaca's key `input` is read after the instruction without being named.
    prompt = columns.get("prompt", "instruction")
    answer = columns.get("response", "output")
    if stage in ("dpo", "rm"):
        return pair_record(messages if is_chat else prompt, columns.get("chosen", "chosen"), columns.get("rejected", "rejected"))
    if stage == "kto":
        answers = {"messages": messages} if is_chat else {"prompt": prompt, "completion": answer}
        return {"name": "labelled", "label": columns.get("kto_tag", "kto_tag"), **answers}
    if not is_chat:
        return {"name": "completion", "prompt": prompt, "completion": answer}
    tags = _names(name, entry, "tags")
    record: dict[str, Any] = {"name": "chat", "column": messages}
    record |= {"role": tags.get("role_tag", "from"), "content": tags.get("content_tag", "value")}
    roles = {}
    for tag, role in _ROLES.items():
        spelling = tags.get(tag, _USUAL_ROLES[tag])
        if tag in tags and spelling not in (role, _USUAL_ROLES[tag]):
            roles[spelling] = role
    return {**record, "roles": roles} if roles else record


def _remarks(name: str, entry: dict[str, Any], stage: str) -> Iterator[str]:
    """Yield what of an entry has no equivalent, or needs a look."""
    columns = _names(name, entry, "columns")
    if entry.get("ranking") and stage not in ("dpo", "rm"):
        yield f"its records are pairs of answers, of which stage {stage} reads none; see objective and record: preference"
    for key, usual in _READ_COLUMNS.items():
        if columns.get(key, usual) != usual:
            yield f"the column {columns[key]} ({key}) has to be named {usual} to be read"
    unread = ("videos", "audios") if stage == "kto" else ("videos", "audios", "kto_tag")
    for key in unread:
        if columns.get(key):
            yield f"the column {columns[key]} ({key}) is not read"
    call_role = _names(name, entry, "tags").get("function_tag", _CALL_ROLE)
    if call_role != _CALL_ROLE:
        yield f"turns of the role {call_role} are calls of tools only if the role is named {_CALL_ROLE}"
    for key in entry.keys() - _KNOWN:
        yield f"{key} has no equivalent"
