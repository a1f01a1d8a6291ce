"""What vLLM, llama.cpp, Ollama and transformers can read of an export, if that is less than the layout can express.

This is taken from their sources in 2026 and from tests of vLLM 0.32.0 (tests/judges/test_vllm.py):
- vLLM rejects `modules_to_save` (vllm/lora/peft_helper.py) and supports only the ranks of `MaxLoRARanks` (vllm/config/lora.py).
  Release 0.32 supports `rank_pattern` and `alpha_pattern`; earlier ones have one `r` and one `lora_alpha` for all modules.
- vLLM applies adapters of routed experts and of the router. It applies those of embedding and head in Mixtral and Llama, and
  rejects them in what it runs as MistralForCausalLM (`embedding_modules`, vllm/model_executor/models/mistral.py).
- vLLM does not know a Mixtral's tensors by Mistral's names (vllm/model_executor/models/mixtral.py); dense models work with both.
- vLLM runs Mistral Small 4 and Large 3 from Mistral's own files alone: its registry has no class for `mistral4`, and so nothing to
  put a PEFT adapter on (vllm/model_executor/models/registry.py).
- vLLM supports interleaved windows from params.json (vllm/transformers_utils/configs/mistral.py); with config.json, it runs a
  Ministral through transformers' layers.
- vLLM parses tool calls only with `--enable-auto-tool-choice` and the parser of the format: `mistral` for [TOOL_CALLS], `hermes`
  for <tool_call> (docs.vllm.ai/en/latest/features/tool_calling).
- llama.cpp reads only GGUF, including adapters (`gguf_lora`). It writes tools with the file's own template under `--jinja`
  (docs/function-calling.md), and recognizes the format of the calls by itself.
- Ollama reads GGUF through the Modelfile that is written next to it (docs.ollama.com/modelfile).
- transformers and PEFT read everything that we write; AutoModelForCausalLM does not know vision wrappers and `mistral4`, which
  AutoModelForImageTextToText loads.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, assert_never

from moe_train import config

Server = Literal["vllm", "llama.cpp", "ollama", "transformers"]
ToolParser = Literal["mistral", "hermes"]
"""Format of tool calls, by the name of vLLM's parser for it."""
ExportFormat = Literal["hf", "mistral", "gguf", "peft", "mistral-lora", "gguf-lora"]

SERVING_COMMANDS: dict[Server, dict[ExportFormat, str]] = {
    "vllm": {
        "hf": "vllm serve {out}",
        "mistral": "vllm serve {out} --tokenizer-mode {tokenizer} --config-format mistral --load-format mistral",
        "peft": "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={out}",
    },
    "llama.cpp": {
        "gguf": "llama-server -m {out}/model.gguf",
        "gguf-lora": "llama-server -m BASE.gguf --lora {out}/adapter.gguf",
    },
    "ollama": {"gguf": "ollama create {ollama_name} -f {out}/Modelfile && ollama run {ollama_name}"},
    "transformers": {
        "hf": "transformers serve {out}",
        "peft": "python -c {code}",
    },
}
"""The command that serves the export at `out`, by server and layout."""

_PEFT_CODE = (
    "from peft import PeftModel; from transformers import {auto_class} as M, AutoTokenizer as T; "
    "m, t = PeftModel.from_pretrained(M.from_pretrained({base!r}), {out!r}), T.from_pretrained({out!r}); "
    "print(t.decode(m.generate(**t('Hello', return_tensors='pt'), max_new_tokens=20)[0]))"
)
_MODEL_CODE = (
    "from transformers import {auto_class} as M, AutoTokenizer as T; "
    "m, t = M.from_pretrained({out!r}), T.from_pretrained({out!r}); "
    "print(t.decode(m.generate(**t('Hello', return_tensors='pt'), max_new_tokens=20)[0]))"
)
_SCORING_CODE = (
    "from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T; "
    "m, t = M.from_pretrained({out!r}), T.from_pretrained({out!r}); "
    "print(m(**t('Hello', return_tensors='pt')).logits)"
)
_NO_MISTRAL4_IN_VLLM = (
    "vLLM runs mistral4 from Mistral's own files alone; export the model, with adapters merged, with --format mistral"
)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Maximum ranks that vLLM can be started with."""


class AdapterShape(NamedTuple):
    """Rank and alpha of a module's adapter in a file; its scale is alpha / rank."""

    rank: int
    alpha: float


def adapter_shapes(
    server: Server, family: config.FamilyName, shapes: Mapping[str, AdapterShape], trained_in_full: Collection[str] = ()
) -> dict[str, AdapterShape]:
    """Return the rank and alpha that a PEFT file has to state for each module, so that `server` applies what was trained.

    For vLLM all modules get one rank, up to which the writer pads with zeros, and one alpha, the one that gives the most common
    scale; the writer multiplies B of the other modules by (scale here / scale there).

    Args:
        server: the server.
        family: the model's family.
        shapes: rank and alpha of our modules, with the scale alpha / rank.
        trained_in_full: modules without an adapter whose weights differ from the base's.

    Raises:
        ValueError: vLLM cannot be made to apply the adapter.
    """
    if server != "vllm":
        return dict(shapes)
    if family == "mistral4":
        raise ValueError(_NO_MISTRAL4_IN_VLLM)
    if trained_in_full:
        raise ValueError(
            f"vLLM loads only adapters, but {sorted(trained_in_full)[0]} was trained in full; export the merged model with --merge"
        )
    rank = max(shape.rank for shape in shapes.values())
    if rank > VLLM_RANKS[-1]:
        raise ValueError(
            f"vLLM loads adapters up to rank {VLLM_RANKS[-1]}, this one has rank {rank}; export the merged model with --merge"
        )
    ends = sorted({"embed", "head"} & shapes.keys())
    if ends and not config.FAMILIES[family].vllm_adapts_ends:
        raise ValueError(f"vLLM rejects an adapter of {ends[0]} in a {family}; export the merged model with --merge")
    # One alpha applies to all modules: with the most common scale, most of them are written unchanged.
    ((scale, _),) = Counter(shape.alpha / shape.rank for shape in shapes.values()).most_common(1)
    return dict.fromkeys(shapes, AdapterShape(rank, scale * rank))


def tool_parser_of(chat_format: str) -> ToolParser | None:
    """Return the format of the tool calls that a chat template writes; None if it writes none that vLLM parses.

    Args:
        chat_format: the text of the template; for a tokenizer with a chat format of its own, the names of its control tokens.
    """
    if "[TOOL_CALLS]" in chat_format:
        return "mistral"
    return "hermes" if "<tool_call>" in chat_format else None


def _with_tool_flags(command: str, server: Server, parser: ToolParser | None) -> str:
    """Return the command of a server with the flags that let it read and write tools."""
    if parser is None:
        return command
    match server:
        case "vllm":
            return f"{command} --enable-auto-tool-choice --tool-call-parser {parser}"
        case "llama.cpp":
            return f"{command} --jinja"
        case "ollama" | "transformers":
            return command
    assert_never(server)


def auto_class_of(model: config.Model) -> str:
    """Return the Auto class of transformers that loads a text model; AutoModelForCausalLM does not know mistral4."""
    return "AutoModelForImageTextToText" if model.family == "mistral4" else "AutoModelForCausalLM"


class ServedExport(NamedTuple):
    """What a server has to know of an export."""

    layout: ExportFormat
    model: config.Model
    out_dir: str | Path
    base_model: str | None = None
    """Of an adapter: its base in Hugging Face's layout; None to print the placeholder BASE_MODEL."""
    rank: int = 1
    """Of an adapter: its largest rank."""
    tokenizer: Literal["mistral", "huggingface"] = "huggingface"
    """The kind of tokenizer that is exported with the weights."""
    auto_class: str = "AutoModelForCausalLM"
    """Of an adapter: the Auto class of transformers that loads its base; a multimodal one has its own."""
    tool_parser: ToolParser | None = None
    """Format of the model's tool calls (`tool_parser_of`); None if it has none."""


def serving_command(server: Server, export: ServedExport) -> str:
    """Return the command line that serves an export.

    Raises:
        ValueError: the server does not read the layout; the message names those it reads.
    """
    _check_readable(server, export)
    model = export.model
    base = export.base_model or "BASE_MODEL"
    max_rank = export.rank
    if server == "vllm":
        max_rank = next(supported for supported in VLLM_RANKS if supported >= export.rank)
    auto_class = export.auto_class
    if model.family == "mistral4":
        auto_class = auto_class_of(model)
    template = SERVING_COMMANDS[server][export.layout]
    code = _PEFT_CODE
    tool_parser = export.tool_parser
    if model.scores is not None:
        # A server of answers has no use for a model that scores texts.
        tool_parser = None
        if server == "vllm":
            template += " --runner pooling"
        else:
            template = "python -c {code}"
            code = _SCORING_CODE
    elif server == "transformers" and export.layout == "hf" and auto_class != "AutoModelForCausalLM":
        template = "python -c {code}"
        code = _MODEL_CODE
    out_dir = Path(export.out_dir)
    command = template.format(
        out=shlex.quote(str(out_dir)),
        base=shlex.quote(base),
        name=shlex.quote(out_dir.name),
        ollama_name=re.sub(r"[^a-z0-9._-]+", "-", out_dir.resolve().name.lower()).strip("-._") or "model",
        rank=max_rank,
        tokenizer="mistral" if export.tokenizer == "mistral" else "auto",
        # Quoted twice: by !r in the template for Python, and here for the shell.
        code=shlex.quote(code.format(out=str(out_dir), base=base, auto_class=auto_class)),
    )
    return _with_tool_flags(command, server, tool_parser)


def _check_readable(server: Server, export: ServedExport) -> None:
    """Raise ValueError if the server does not read the layout of this model."""
    readable = SERVING_COMMANDS[server]
    if export.layout not in readable:
        raise ValueError(f"{server} does not read --format {export.layout}; use --format {' or '.join(readable)}")
    if server != "vllm":
        return
    is_mistral4 = export.model.family == "mistral4"
    if export.layout == "mistral" and isinstance(export.model.ffn, config.MoeFfn) and not is_mistral4:
        raise ValueError("vLLM does not know the names that --format mistral gives to experts; use --format hf")
    if export.layout != "mistral" and is_mistral4:
        raise ValueError(_NO_MISTRAL4_IN_VLLM)
