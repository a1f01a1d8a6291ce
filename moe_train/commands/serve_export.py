"""The command that starts a server on an export."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from moe_train.checkpoint.model_dir import OpenedModel
from moe_train.commands.export_adapter import hugging_face_base
from moe_train.weights import hf, serve


def serve_command(server: serve.Server | None, layout: serve.ExportFormat, opened: OpenedModel, out_dir: str | Path) -> str | None:
    """Return the command that starts `server` on the export; None without a server.

    vLLM and transformers need the base in Hugging Face's layout, so for another base the command exports it first.
    """
    if server is None:
        return None
    run = opened.run
    rank = 1
    if opened.lora:
        # vLLM has to be started with the largest rank that it serves (--max-lora-rank).
        rank = max((target.rank for target in opened.lora.targets), default=1)
    kind: Literal["huggingface", "mistral"] = "mistral"
    if opened.tokenizer.chat_template is not None:
        kind = "huggingface"
    base = run.init_from if run else None
    base_export = ""
    if layout == "peft" and base is not None and hugging_face_base(opened) is None:
        # A placeholder: only the user knows where the base should go.
        base_export = f"moe-train export {shlex.quote(base)} BASE_MODEL && "
        base = None
    base_folder = hugging_face_base(opened)
    wrapper = None if base_folder is None else hf.find_wrapper(base_folder)
    auto_class = "AutoModelForCausalLM" if wrapper is None else wrapper.auto_class
    served = serve.ServedExport(
        layout,
        opened.model,
        out_dir,
        base_model=base,
        rank=rank,
        tokenizer=kind,
        auto_class=auto_class,
        tool_parser=_tool_parser(opened),
    )
    return base_export + serve.serving_command(server, served)


def _tool_parser(opened: OpenedModel) -> serve.ToolParser | None:
    """Return the format of the model's tool calls; None if its chat format has none."""
    if opened.chat_template is not None:
        return serve.tool_parser_of(opened.chat_template)
    controls = sorted(opened.tokenizer.control_ids)
    return serve.tool_parser_of(opened.tokenizer.decode(controls, keep_special=True))
