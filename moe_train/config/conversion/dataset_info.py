"""The `dataset_info.json` of LLaMA-Factory: the file, format and columns of each data set that a config names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_train.config.conversion.draft import Draft

FILE_NAME = "dataset_info.json"
"""Name of the file in the folder of the data."""
_ROLES = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}
"""Tag of LLaMA-Factory -> our role."""
_USUAL_ROLES = {"user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation", "system_tag": "system"}
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
        stage: `pt` for plain text.
    """
    for remark in _remarks(entry):
        draft.note(f"dataset {name}", remark)
    record = _record(entry, stage)
    if "file_name" in entry:
        return {"name": "files", "files": [f"{folder}/{entry['file_name']}"], "record": record}
    hub = str(entry.get("hf_hub_url", name))
    draft.note(f"dataset {name}", f"{hub} is a data set of the hub; state its commit as revision, or download it and name files")
    source = {"name": "hub", "dataset": hub, "split": entry.get("split", "train"), "revision": "STATE-THE-COMMIT", "record": record}
    if entry.get("subset"):
        source["subset"] = entry["subset"]
    return source


def _record(entry: dict[str, Any], stage: str) -> dict[str, Any]:
    columns = entry.get("columns") or {}
    if stage == "pt":
        return {"name": "text", "column": columns.get("prompt", "text")}
    if entry.get("formatting", "alpaca") != "sharegpt":
        # Alpaca's key `input` is read after the instruction without being named.
        prompt = columns.get("prompt", "instruction")
        return {"name": "completion", "prompt": prompt, "completion": columns.get("response", "output")}
    tags = entry.get("tags") or {}
    record: dict[str, Any] = {"name": "chat", "column": columns.get("messages", "conversations")}
    record |= {"role": tags.get("role_tag", "from"), "content": tags.get("content_tag", "value")}
    roles = {}
    for tag, role in _ROLES.items():
        spelling = tags.get(tag, _USUAL_ROLES[tag])
        if tag in tags and spelling not in (role, _USUAL_ROLES[tag]):
            roles[spelling] = role
    return {**record, "roles": roles} if roles else record


def _remarks(entry: dict[str, Any]) -> Iterator[str]:
    """Yield what of an entry has no equivalent, or needs a look."""
    columns = entry.get("columns") or {}
    if entry.get("ranking"):
        yield "its records are pairs of answers; written is how their conversations are read, see objective and record: preference"
    for key, usual in (("query", "input"), ("system", "system"), ("tools", "tools")):
        if columns.get(key, usual) != usual:
            yield f"the column {columns[key]} ({key}) has to be named {usual} to be read"
    for key in ("history", "images", "videos", "audios", "kto_tag"):
        if columns.get(key):
            yield f"the column {columns[key]} ({key}) is not read"
    if (entry.get("tags") or {}).get("function_tag"):
        yield "tool calls are turns of the assistant with tool_calls; see the guide on your own data"
    for key in entry.keys() - _KNOWN:
        yield f"{key} has no equivalent"
