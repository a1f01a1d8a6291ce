"""Faults that exports of other tools have had: each changes the files in a directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from moe_train.proof import compare, reread, surroundings


def patch(directory: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the bytes of a tensor, (rows, bytes of a row), where they are."""
    stored = reread.tensors(directory)[name]
    with stored.file.open("r+b") as file:
        raw = stored.read(file.fileno(), 0, stored.rows)
        changed = change(np.frombuffer(raw, np.uint8).reshape(stored.rows, -1))
        file.seek(stored.offset)
        file.write(np.ascontiguousarray(changed).tobytes())


def expert(layout: str, e: int) -> tuple[str, slice]:
    """Tensor and rows of expert e's down projection in layer 1."""
    if layout == "gguf":
        return "blk.1.ffn_down_exps.weight", slice(32 * e, 32 * (e + 1))
    if layout == "mistral":
        return f"layers.1.feed_forward.experts.{e}.w2.weight", slice(None)
    return f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight", slice(None)


def drop_expert_delta(directory: Path, base: Path, layout: str) -> None:
    name, rows = expert(layout, 2)
    untouched = reread.tensors(base)[name]
    with untouched.file.open("rb") as file:
        raw = np.frombuffer(untouched.read(file.fileno(), 0, untouched.rows), np.uint8).reshape(untouched.rows, -1)

    def change(found: np.ndarray) -> np.ndarray:
        found = found.copy()
        found[rows] = raw[rows]
        return found

    patch(directory, name, change)


def swap_experts(directory: Path, base: Path, layout: str) -> None:
    (one, rows), (other, other_rows) = expert(layout, 1), expert(layout, 3)
    kept: dict[str, np.ndarray] = {}
    patch(directory, one, lambda found: kept.setdefault("one", found.copy()))
    patch(directory, other, lambda found: kept.setdefault("other", found.copy()))

    def change(found: np.ndarray) -> np.ndarray:
        found = found.copy()
        if one == other:
            found[rows], found[other_rows] = kept["one"][other_rows], kept["one"][rows]
        else:
            found[:] = kept["other"] if found.tobytes() == kept["one"].tobytes() else kept["one"]
        return found

    for name in {one, other}:
        patch(directory, name, change)


def transpose_rotary(directory: Path, base: Path, layout: str) -> None:
    name = {
        "hf": "model.layers.0.self_attn.k_proj.weight",
        "mistral": "layers.0.attention.wk.weight",
        "gguf": "blk.0.attn_k.weight",
    }
    halves = (2, 4) if layout == "hf" else (4, 2)
    patch(directory, name[layout], lambda rows: rows.reshape(2, *halves, -1).swapaxes(1, 2).reshape(rows.shape))


def flip_a_bit(directory: Path, base: Path, layout: str) -> None:
    name = {"hf": "lm_head.weight", "mistral": "output.weight", "gguf": "output.weight"}[layout]

    def change(found: np.ndarray) -> np.ndarray:
        found = found.copy()
        found[7, 5] ^= 8
        return found

    patch(directory, name, change)


def change_template(directory: Path, base: Path, layout: str) -> None:
    file = directory / ("model.gguf" if layout == "gguf" else "chat_template.jinja")
    content = file.read_bytes()
    assert content.count(b"{{- '[INST]'") == 1
    file.write_bytes(content.replace(b"{{- '[INST]'", b"{{- '[INSI]'"))


def forget_generation(directory: Path, base: Path, layout: str) -> None:
    (directory / "generation_config.json").unlink()


def change_tokenizer(directory: Path, base: Path, layout: str) -> None:
    file = directory / "tokenizer.json"
    file.write_text(file.read_text() + "\n")


def rewrite(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Load the one file of weights, change the tensors, and write it and its index anew."""
    (file,) = directory.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    for index in directory.glob("*.index.json"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}))


def add_a_tensor(directory: Path, base: Path, layout: str) -> None:
    rewrite(directory, lambda tensors: tensors.update({"extra.weight": np.ones(3, np.float32)}))


def drop_a_tensor(directory: Path, base: Path, layout: str) -> None:
    rewrite(directory, lambda tensors: tensors.__delitem__(sorted(tensors)[5]))


def change_a_dtype(directory: Path, base: Path, layout: str) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith("norm.weight"))
        tensors[name] = tensors[name].astype(np.float16)

    rewrite(directory, change)


def forge(directory: Path) -> None:
    """Bring the record's hashes in line with the files: somebody changed them, and made a new record of hashes."""
    record = json.loads((directory / surroundings.RECORD_FILE).read_text())
    record["files"] = surroundings.file_hashes(directory)
    stored = reread.tensors(directory)
    found = compare.examine_tensors(stored, compare.hash_only(stored), None, None).results
    record["tensors"] = {name: {**record["tensors"][name], "sha256": found[name].sha256} for name in stored}
    (directory / surroundings.RECORD_FILE).write_text(json.dumps(record))


def change_router(directory: Path, base: Path, layout: str) -> None:
    names = {"hf": "model.layers.0.block_sparse_moe.gate.weight", "mistral": "layers.0.feed_forward.gate.weight"}
    patch(directory, names.get(layout, "blk.0.ffn_gate_inp.weight"), lambda rows: rows[::-1])


def scale_expert(directory: Path, base: Path, layout: str) -> None:
    """Half as large: no whole fault of names or order."""
    name, rows = expert(layout, 2)

    def change(found: np.ndarray) -> np.ndarray:
        found = found.copy()
        numbers = found.view({"hf": ml_dtypes.bfloat16, "mistral": np.float32, "gguf": reread.Q8_0}[layout])
        halved = numbers["scale"] if layout == "gguf" else numbers
        halved[rows] = halved[rows] / 2
        return found

    patch(directory, name, change)
