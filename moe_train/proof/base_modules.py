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
from moe_train.proof.expected_tower import tower_tensors

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
_FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
"""A matrix of an expert in files, and the parameter of all experts that it is a part of in memory."""
_TAKEN_FOR_EXPERTS = {"deepseek_v3": ("gate", "gate_proj", "up_proj", "down_proj")}
"""Last names in target_modules that PEFT takes for those of routed experts and routers, whatever precedes them, by model type."""
_TYPE_OF_CLASS = {"MixtralForCausalLM": "mixtral", "DeepseekV3ForCausalLM": "deepseek_v3"}
_PREFIX = "base_model.model."
_LORA_NAME = re.compile(r"(?P<module>.*)\.lora_(A\.weight|B\.weight|embedding_A|embedding_B)")


class BaseModules(NamedTuple):
    """The modules of a base."""

    architecture: str
    """Class in transformers, for messages."""
    is_wrapper: bool
    """Whether the text model is inside a multimodal model."""
    weights: frozenset[str]
    """Names of the weights in memory, where a Mixtral's experts have a matrix each, as in its adapters."""
    model_type: str = "mixtral"
    """The type of the text model in transformers."""


def read_base_modules(base: Path) -> BaseModules:
    """Read the modules of a base in Hugging Face's layout from its config.json and the headers of its files."""
    settings = read_object(base / "config.json")
    architectures = settings.get("architectures") or []
    is_wrapper = bool(set(architectures) & set(WRAPPERS)) or settings.get("model_type") in WRAPPERS.values()
    # Older files state a class alone.
    model_type = (settings.get("text_config") or settings).get("model_type") or _TYPE_OF_CLASS.get(next(iter(architectures), ""))
    weights: set[str] = set()
    for name, stored in reread.tensors(base).items():
        if stored.name.endswith(_SCALES):  # scales of FP8 weights and activations belong to no module that PEFT could adapt
            continue
        if not stored.file.name.startswith("consolidated"):  # Mistral's own layout, which may be in the same folder
            weights.update(_weights_in_memory(_in_memory(name) if is_wrapper else name, stored.shape, str(model_type)))
    weights.add("lm_head.weight")  # a tied head has no tensor
    architecture = next(iter(architectures), str(settings.get("model_type")))
    return BaseModules(architecture, is_wrapper, frozenset(weights), str(model_type))


def exported_modules(model: config.Model, is_wrapper: bool = False, encoder: config.Encoder | None = None) -> BaseModules:
    """Return the modules of a base that has to be exported to Hugging Face's layout before transformers can load it.

    Args:
        model: the text model.
        is_wrapper: whether the export is a multimodal model.
        encoder: sizes of its tower; None if the adapter has nothing of that.
    """
    weights = {"lm_head.weight"}
    tensors = expected.model_tensors("hf", model)
    if is_wrapper:
        tensors = [expected.in_wrapper(tensor) for tensor in tensors]
    for tensor in tower_tensors("hf", encoder, model.model_dim) if encoder is not None else ():
        tensors.append(tensor._replace(name=_in_memory(tensor.name)))
    for tensor in tensors:
        weights.update(_weights_in_memory(tensor.name, tensor.shape, model.family))
    return BaseModules("its export with --format hf", is_wrapper, frozenset(weights), model.family)


def _in_memory(name: str) -> str:
    """Return the name in memory of a tensor of a wrapper's files."""
    for in_file, in_memory in _IN_MEMORY.items():
        if name.startswith(in_file):
            return in_memory + name.removeprefix(in_file)
    return name


def _weights_in_memory(name: str, shape: tuple[int, ...], model_type: str) -> Iterator[str]:
    """Yield the weights that a tensor of the files is or belongs to."""
    layer, experts, of_expert = name.partition("mlp.experts.")
    if model_type != "mixtral":
        # Files may have a matrix for each expert, which transformers 5 joins: `3.up_proj.weight`.
        leaf = of_expert.removesuffix(".weight").rpartition(".")[2]
        yield f"{layer}{experts}{_FUSED.get(leaf, leaf)}" if experts else name
        return
    # Experts as transformers 5 fuses them: (E, 2f, d) and (E, d, f), with gate and up in one tensor and no `.weight`.
    leaves = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}.get(of_expert, ())
    for e in range(shape[0] if leaves else 0):
        for leaf in leaves:
            yield f"{layer}block_sparse_moe.experts.{e}.{leaf}.weight"
    if not leaves:
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
    _check_last_names(settings, base)
    parameters = _adapted_parameters(settings, base)
    adapted: set[str] = set()
    in_full: set[str] = set()
    for name in sorted(adapter):
        lora = _LORA_NAME.fullmatch(name.removeprefix(_PREFIX))
        module = lora["module"] if lora else _saved_module(name.removeprefix(_PREFIX), base)
        if not name.startswith(_PREFIX) or (module not in parameters and f"{module}.weight" not in base.weights):
            raise Fault(
                f"{name} belongs to no module of the base ({base.architecture}); PEFT would leave it out with a mere warning"
            )
        # A weight that was trained in full; PEFT lists it under modules_to_save and not under target_modules.
        if lora is None:
            in_full.add(module)
            continue
        adapted.add(module)
        if module not in parameters and not _is_selected(module, settings):
            raise Fault(f"{name} is not selected by target_modules {settings.get('target_modules')!r}; PEFT would leave it out")
    if unused := sorted(parameters.keys() - adapted):
        raise Fault(f"target_parameters also selects {parameters[unused[0]]} of the base, which has no adapter here")
    for weight in sorted(base.weights):
        module = weight.removesuffix(".weight")
        if module != weight and module not in adapted and _is_selected(module, settings):
            raise Fault(
                f"target_modules {settings.get('target_modules')!r} also selects {module} of the base, which has no adapter here"
            )
    _check_saved(in_full, settings, base)
    summary = f"{len(adapted):,} modules of the base ({base.architecture}) get an adapter, and no others"
    if in_full:
        summary += f"; {len(in_full):,} are replaced"
    return Finding(summary, {"count": len(adapted), "replaced": len(in_full), "architecture": base.architecture})


def _check_last_names(settings: Mapping[str, Any], base: BaseModules) -> None:
    """Check that PEFT does not take a target for the routed experts. Raises Fault if it does."""
    targets = settings.get("target_modules") or []
    for target in re.split(r"[|()]", targets) if isinstance(targets, str) else targets:
        if re.split(r"\W", target)[-1] in _TAKEN_FOR_EXPERTS.get(base.model_type, ()):
            raise Fault(
                f"target_modules has {target!r}, which PEFT takes for the routed experts of a {base.model_type}, so that the "
                "module itself would get no adapter; it has to be in target_parameters"
            )


def _adapted_parameters(settings: Mapping[str, Any], base: BaseModules) -> dict[str, str]:
    """Return the parameters that target_parameters selects, by the names of the modules that PEFT wraps around them.

    Of two parameters of the same module, the wrapper of the first is inside that of the second.
    """
    targets = settings.get("target_parameters") or ()
    selected = [weight for weight in base.weights if any(f".{weight}".endswith(f".{target}") for target in targets)]
    by_module: dict[str, list[str]] = {}
    # In reverse order, gate_up_proj is before down_proj, as in the module.
    for weight in sorted(selected, reverse=True):
        by_module.setdefault(weight.rpartition(".")[0], []).append(weight)
    wrappers: dict[str, str] = {}
    for module, weights in by_module.items():
        for i, weight in enumerate(reversed(weights)):
            wrappers[module + ".base_layer" * i] = weight
    return wrappers


def _saved_module(name: str, base: BaseModules) -> str:
    """Return the module of a weight that was trained in full."""
    if name in base.weights and name.endswith(".bias"):
        return name.removesuffix(".bias")
    return (_old_router(name) if base.model_type == "mixtral" else name).removesuffix(".weight")


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
