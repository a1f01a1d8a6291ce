"""One of several processes that train and export together: `process_worker.py ARGUMENTS…`, in an environment that says which.

Runs the command line with ARGUMENTS, then `export RUN_DIR OUT_DIR/LAYOUT` for each layout, then once more with process 1's
disk full; RUN_DIR and OUT_DIR are in the environment. Writes OUT_DIR.PROCESS.json: the bytes of tensors that this process
`loaded` of the first of these, and `read` to work out its `hashes`, those of the adapters likewise, the files of tensors that
it wrote, and what is said of a folder that it cannot see.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_train import config
from moe_train.cli import main as cli
from moe_train.machine import mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import abstract_model
from moe_train.weights import external, external_adapter, safetensors_files, together

LAYOUTS = {
    "hf": ("--merge", "--max-shard-size", "20KB"),
    "mistral": ("--merge", "--proof", "tensors"),
    "gguf": ("--merge", "--proof", "tensors"),
    "peft": (),
    "mistral-lora": (),
    "gguf-lora": (),
}


def command(*arguments: str) -> None:
    try:
        cli.main(arguments)
    except SystemExit as done:
        assert not done.code, arguments


def export(run_dir: Path, out_dir: Path, layout: str) -> None:
    command("export", str(run_dir), str(out_dir / layout), "--format", layout.partition(" ")[0], *LAYOUTS[layout], "--json")


def main(arguments: list[str], run_dir: Path, out_dir: Path) -> None:
    command(*arguments)
    seen: dict[str, Any] = {"read": 0, "written": []}
    read, write = safetensors_files.SafetensorsTensor._read_into, safetensors_files.write_safetensors

    def counting(self: safetensors_files.SafetensorsTensor, out: np.ndarray, offset: int) -> None:
        seen["read"] += out.nbytes
        read(self, out, offset)

    def noting(file: Path, *arguments: object) -> None:
        seen["written"].append(file.name)
        write(file, *arguments)

    def no_space(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    safetensors_files.SafetensorsTensor._read_into, safetensors_files.write_safetensors = counting, noting  # type: ignore[method-assign]
    for layout in LAYOUTS:
        export(run_dir, out_dir, layout)
    index = jax.process_index()
    together.SEEN_WITHIN_SECONDS = 0.0
    model = external.read_external_model(out_dir / "hf")
    with jax.set_mesh(mesh.make_mesh(config.Mesh(fsdp=4, expert=2))):
        seen["read"] = 0
        external.load_external_parameters(out_dir / "hf", parameters(abstract_model(model, config.Compute()))[1])
        seen["loaded"], seen["read"] = seen["read"], 0
        seen["hashes"] = external.hash_external_model(out_dir / "hf")
        seen["read"], before = 0, seen["read"]
        seen["adapter_hashes"] = external_adapter.hash_external_adapter(out_dir / "peft")
        seen["read"], seen["adapter_read"] = before, seen["read"]
        try:
            together.require_shared(out_dir if index == 0 else out_dir / "of another host")
        except ValueError as error:
            seen["shared"] = str(error)
    Path(f"{out_dir}.{index}.json").write_text(json.dumps(seen))
    if index == 1:
        safetensors_files.write_safetensors = no_space
    LAYOUTS["hf full"] = LAYOUTS["hf"]
    export(run_dir, out_dir, "hf full")


if __name__ == "__main__":
    main(sys.argv[1:], Path(os.environ["RUN_DIR"]), Path(os.environ["OUT_DIR"]))
