"""What PEFT makes of an adapter's names on its base: the modules that transformers builds, and which of them the settings select.

Nothing here comes from `weights`: the modules are those of the base's own files, renamed as transformers renames them in memory.
PEFT only warns of tensors that belong to no module, and then computes the bare base.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_train import config
from moe_train.machine.files import read_object
from moe_train.proof import expected, reread
from moe_train.proof.checks import Fault, Finding
from moe_train.proof.reread import Stored

WRAPPERS = {
    "Mistral3ForConditionalGeneration": "mistral3",
    "LlavaForConditionalGeneration": "llava",
    "VoxtralForConditionalGeneration": "voxtral",
}
"""Classes of transformers in which the text model is a part beside a tower, and their model types."""
_IN_MEMORY = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "audio_tower.": "model.audio_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
"""Prefixes of a wrapper's tensors in its files, and in memory if these differ."""
_SCALES = ("_scale_inv", "_scale")
_PREFIX = "base_model.model."
_LORA_NAME = re.compile(r"(?P<module>.*)\.lora_(A\.weight|B\.weight|embedding_A|embedding_B)")


class BaseModules(NamedTuple):
    """The modules of a base."""

    architecture: str
    """Class in transformers, for messages."""
    is_wrapper: bool
    """Whether the text model is inside a multimodal model."""
    weights: frozenset[str]
    """Names of the weights, with a matrix for each expert."""


def read_base_modules(base: Path) -> BaseModules:
    """Read the modules of a base in Hugging Face's layout from its config.json and the headers of its files."""
    settings = read_object(base / "config.json")
    architectures = settings.get("architectures") or []
    is_wrapper = bool(set(architectures) & set(WRAPPERS)) or settings.get("model_type") in WRAPPERS.values()
    weights: set[str] = set()
    for name, stored in reread.tensors(base).items():
        if stored.name.endswith(_SCALES):  # scales of FP8 weights and activations belong to no module that PEFT could adapt
            continue
        if not stored.file.name.startswith("consolidated"):  # Mistral's own layout, which may be in the same folder
            weights.update(_weights_in_memory(name, stored, is_wrapper))
    weights.add("lm_head.weight")  # a tied head has no tensor
    return BaseModules(next(iter(architectures), str(settings.get("model_type"))), is_wrapper, frozenset(weights))


def exported_modules(model: config.Model) -> BaseModules:
    """Return the modules of a base that has to be exported to Hugging Face's layout before transformers can load it."""
    weights = {tensor.name for tensor in expected.model_tensors("hf", model)}
    return BaseModules("its export with --format hf", False, frozenset({*weights, "lm_head.weight"}))


def _weights_in_memory(name: str, stored: Stored, is_wrapper: bool) -> Iterator[str]:
    """Yield the names in memory of a tensor of the files; fused experts become a matrix for each expert."""
    if is_wrapper:
        for in_file, in_memory in _IN_MEMORY.items():
            if name.startswith(in_file):
                name = in_memory + name.removeprefix(in_file)
    layer, fused, parameter = name.partition("mlp.experts.")
    # Experts as transformers 5 fuses them: (E, 2f, d) and (E, d, f), with gate and up in one tensor and no `.weight`.
    leaves = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}.get(parameter, ())
    if fused and leaves:
        for e in range(stored.shape[0]):
            for leaf in leaves:
                yield f"{layer}block_sparse_moe.experts.{e}.{leaf}.weight"
        return
    yield _old_router(name)


def _old_router(name: str) -> str:
    """Return the name of a router before transformers 5; other names are returned as they are."""
    return name.replace(".mlp.gate.", ".block_sparse_moe.gate.")


def check_adapter_names(adapter: Collection[str], settings: Mapping[str, Any], base: BaseModules) -> Finding:
    """Check that PEFT applies every tensor of an adapter to the base, and adds nothing to other modules.

    Args:
        adapter: names of the tensors.
        settings: adapter_config.json.
        base: the modules of the base.

    Raises:
        Fault: a tensor would be left out, or a module without a tensor would get a new adapter.
    """
    adapted: set[str] = set()
    in_full: set[str] = set()
    for name in sorted(adapter):
        lora = _LORA_NAME.fullmatch(name.removeprefix(_PREFIX))
        module = lora["module"] if lora else _old_router(name.removeprefix(_PREFIX)).removesuffix(".weight")
        if not name.startswith(_PREFIX) or f"{module}.weight" not in base.weights:
            raise Fault(
                f"{name} belongs to no module of the base ({base.architecture}); PEFT would leave it out with a mere warning"
            )
        # A weight that was trained in full; PEFT lists it under modules_to_save and not under target_modules.
        if lora is None:
            in_full.add(module)
            continue
        adapted.add(module)
        if not _is_selected(module, settings):
            raise Fault(f"{name} is not selected by target_modules {settings.get('target_modules')!r}; PEFT would leave it out")
    for weight in sorted(base.weights):
        module = weight.removesuffix(".weight")
        if module not in adapted and _is_selected(module, settings):
            raise Fault(
                f"target_modules {settings.get('target_modules')!r} also selects {module} of the base, which has no adapter here"
            )
    _check_saved(in_full, settings, base)
    summary = f"{len(adapted):,} modules of the base ({base.architecture}) get an adapter, and no others"
    if in_full:
        summary += f"; {len(in_full):,} are replaced"
    return Finding(summary, {"count": len(adapted), "replaced": len(in_full), "architecture": base.architecture})


def _check_saved(in_full: Collection[str], settings: Mapping[str, Any], base: BaseModules) -> None:
    """Check that PEFT replaces exactly the modules whose full weights are in the adapter.

    Args:
        in_full: these modules.
        settings: adapter_config.json.
        base: the modules of the base.

    Raises:
        Fault: modules_to_save does not select a module of `in_full`, or selects another one.
    """
    targets = settings.get("modules_to_save") or []
    # PEFT finds the other end of a tied table itself.
    tied = {"lm_head"} if settings.get("ensure_weight_tying") else set()
    for module in sorted(set(in_full) - tied):
        if not _is_saved(module, targets):
            raise Fault(f"{module} is not selected by modules_to_save {targets!r}; PEFT would leave its weight out")
    for weight in sorted(base.weights):
        module = weight.rpartition(".")[0]
        if module not in in_full and _is_saved(module, targets):
            raise Fault(f"modules_to_save {targets!r} also selects {module} of the base, whose weight is not in the adapter")


def _is_saved(module: str, targets: Collection[str]) -> bool:
    """Return whether modules_to_save selects a module or one that contains it: PEFT compares ends of names, not at dots."""
    parts = module.split(".")
    containing = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    # A router is saved under its name in transformers 5.
    containing.append(module.replace(".block_sparse_moe.gate", ".mlp.gate"))
    return any(name.endswith(target) for name in containing for target in targets)


def _is_selected(module: str, settings: Mapping[str, Any]) -> bool:
    """Return whether target_modules selects a module, as PEFT decides it."""
    targets = settings.get("target_modules") or []
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)
