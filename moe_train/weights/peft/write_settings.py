"""The settings of a PEFT adapter that is written: which modules and parameters it adapts, with which ranks and alphas."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from moe_train import config
from moe_train.machine.files import JsonObject
from moe_train.model.paths import ParameterPath, of_module
from moe_train.weights import names
from moe_train.weights.peft.fused_parameters import FusedParameter
from moe_train.weights.peft.pieces import DOWN, GATE, are_parameters, has_linear_experts, leaf_of
from moe_train.weights.serve import AdapterShape


def adapter_config(
    model: config.Model,
    shapes: Mapping[str, AdapterShape],
    experts: Sequence[FusedParameter],
    lora: config.Lora,
    layout: names.TensorLayout,
    saved: Collection[str],
) -> JsonObject:
    """Return adapter_config.json without the base model's name.

    Args:
        model: the architecture of the base.
        shapes: rank and alpha of the adapted modules, by path.
        experts: the adapters of fused parameters, whose modules are among those of `shapes`.
        lora: the section of the adapters.
        layout: names of the base's modules.
        saved: names of the tensors of weights that were trained in full.
    """
    fused_modules = {module for parameter in experts for module in parameter.modules}
    single = {module: shape for module, shape in shapes.items() if module not in fused_modules}
    linear = {module for module in single if not are_parameters(of_module(module), model)}
    stems = _stems(model, layout)
    parameters = {parameter.target for parameter in experts}
    parameters |= {f"{_in_layer(stems[module], layout)}.weight" for module in single.keys() - linear}
    shape_of_key = dict(_shape_of_keys(model, single, linear, stems, layout))
    shape_of_key |= {parameter.target: parameter.shape for parameter in experts}
    # Without an adapter in the text model, which may be if there are some in a vision tower, any shape will do.
    usual = Counter(shape_of_key.values()).most_common(1)[0][0] if shape_of_key else AdapterShape(1, 1.0)
    # With a Mixtral's experts, the file's own r and lora_alpha are those of w1 and w3, which the patterns cannot name.
    if has_linear_experts(model):
        usual = next((shape for module, shape in shapes.items() if of_module(module).module == GATE), usual)
    without_dropout = bool(parameters) or _adapts_parameters_of_mixtral(model, shapes)
    to_save, ties = _modules_to_save(model, layout, saved)
    settings: JsonObject = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": usual.rank,
        "lora_alpha": _number(usual.alpha),
        "lora_dropout": 0.0 if without_dropout else lora.dropout,
        "target_modules": _target_modules(model, {stems[module] for module in linear}, layout),
        # Patterns list only what differs from the file's own r and lora_alpha.
        "rank_pattern": {key: shape.rank for key, shape in shape_of_key.items() if shape.rank != usual.rank},
        "alpha_pattern": {key: _number(shape.alpha) for key, shape in shape_of_key.items() if shape.alpha != usual.alpha},
        "modules_to_save": to_save or None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if parameters:
        settings["target_parameters"] = sorted(parameters)
    if ties:
        settings["ensure_weight_tying"] = True
    return settings


def _stems(model: config.Model, layout: names.TensorLayout) -> dict[str, str]:
    """Return the name of a module in the base, in one of the layers that share its path."""
    stems: dict[str, str] = {}
    for piece in names.weight_pieces(model, layout):
        path = ParameterPath.parse(piece.path)
        if not path.is_router_bias:  # of the same module as the router's weight
            stems[path.module_path] = piece.name.removesuffix(".weight")
    return stems


def _shape_of_keys(
    model: config.Model,
    shapes: Mapping[str, AdapterShape],
    linear: Collection[str],
    stems: Mapping[str, str],
    layout: names.TensorLayout,
) -> Iterator[tuple[str, AdapterShape]]:
    """Yield the keys of modules in rank_pattern and alpha_pattern, with their ranks and alphas."""
    for module, shape in shapes.items():
        name = of_module(module).module
        if module not in linear:
            yield f"{_in_layer(stems[module], layout)}.weight", shape
            continue
        yield leaf_of(stems[module], model), shape
        # The names in transformers 5, which PEFT looks up in the patterns too.
        if isinstance(model.ffn, config.MoeFfn) and name == DOWN and has_linear_experts(model):
            yield "experts.down_proj", shape
        if isinstance(model.ffn, config.MoeFfn) and name == "ffn.router":
            yield "gate.weight", shape


def _adapts_parameters_of_mixtral(model: config.Model, modules: Collection[str]) -> bool:
    """Return whether PEFT turns some modules into parameters while loading, for which it rejects dropout."""
    if isinstance(model.ffn, config.DenseFfn) or not has_linear_experts(model):
        return False
    return any(of_module(module).module in (GATE, "ffn.router") for module in modules)


def _modules_to_save(model: config.Model, layout: names.TensorLayout, saved: Collection[str]) -> tuple[list[str], bool]:
    """Return modules_to_save for tensors that are saved in full, and whether PEFT has to tie embedding and head."""
    modules = {name.removeprefix("base_model.model.").removesuffix(".weight") for name in saved}
    ties = model.tie_embeddings and "lm_head" in modules
    if ties:
        modules.remove("lm_head")  # PEFT names one of the two and keeps both
    if layout.layer != names.HUGGING_FACE.layer:
        # Whole names within a multimodal model, since PEFT compares ends of names, and a tower may have the same ones.
        return sorted(modules), ties
    # Names within the layer, since `norm` alone would also match the end of input_layernorm.
    return sorted({_in_layer(name, layout) for name in modules}), ties


def _in_layer(name: str, layout: names.TensorLayout) -> str:
    """Return the name of a module within its layer; modules outside layers keep their names."""
    # re.escape also escapes the braces of the placeholder {l}.
    prefix = re.escape(layout.layer).replace(r"\{l\}", r"\d+")
    return re.sub(f"^{prefix}", "", name)


def _target_modules(model: config.Model, stems: Collection[str], layout: names.TensorLayout) -> list[str] | str:
    """Return the modules with these names, and those of the same names in other layers, as PEFT's target_modules.

    For a text model this is the list of their last names, which vLLM and llama.cpp expect. Inside a vision wrapper the vision tower
    has modules of the same names, so there it is a regular expression of the whole names of the text model's modules.
    """
    if not stems:
        return []  # PEFT looks for linear maps by itself without a list
    if layout.layer == names.HUGGING_FACE.layer:
        return sorted({leaf_of(stem, model) for stem in stems})
    in_layers = sorted({re.escape(_in_layer(stem, layout)) for stem in stems if _in_layer(stem, layout) != stem})
    alternatives = sorted(re.escape(stem) for stem in stems if _in_layer(stem, layout) == stem)
    if in_layers:
        prefix = re.escape(layout.layer).replace(r"\{l\}", r"\d+")
        alternatives.append(f"{prefix}({'|'.join(in_layers)})")
    return "|".join(alternatives)


def _number(x: float) -> int | float:
    """Return an integral alpha as int, as PEFT writes it; PEFT accepts a float otherwise."""
    return int(x) if x.is_integer() else x
