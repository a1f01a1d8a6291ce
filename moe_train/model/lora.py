"""LoRA adapters on frozen weights (arXiv:2106.09685), and the selection of weights that are trained in full.

y = x·W + scale * (x·A)·B, with scale = alpha / rank. As in PEFT, A is initialized uniform in ±1/sqrt(fan-in) and B with
zeros (for the embedding: A with zeros, B normal). The delta is never materialized in training: an expert's adapter is two
further grouped matmuls. Experts with different ranks share arrays of the largest rank; past its own rank an expert's A and B
are zero and stay zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.model.encoders.audio import BiasedProjection, LayerNorm
from moe_train.model.encoders.vision import BiasedLinear
from moe_train.model.layers import Adapted, Embedding, Head, Linear, RandomSource, RMSNorm, lora_equations
from moe_train.model.moe.layer import ExpertLinear
from moe_train.model.sharding.specs import spec_of, without_fsdp


def add_lora(model: Any, lora: config.Lora, rngs: RandomSource) -> None:
    """Add adapters to every module that a target's pattern names, and make float32 of weights that are trained in full.

    The model is changed in place.

    Args:
        model: a model with stacked layers.
        lora: targets, ranks, dropout and the modules that are trained in full.
        rngs: PRNG streams for the factors.

    Raises:
        ValueError: a pattern names no module, a module or expert is named twice, or an expert does not exist.
    """
    modules = list(_modules(model))
    adaptable_names = [name for name, module in modules if isinstance(module, Adapted)]
    for target in lora.targets:
        _check_patterns("targets", target.modules, adaptable_names)
    _check_patterns("train", lora.train, [name for name, _ in modules])
    _check_routed(lora, modules)
    for name, module in modules:
        targets = []
        if isinstance(module, Adapted):
            targets = lora.targets_of(name, routed=isinstance(module, ExpertLinear))
        in_full = [pattern for pattern in lora.train if config.names_module(pattern, name)]
        if targets and in_full:
            raise ValueError(f"lora.train: {in_full[0]!r} names {name}, which has an adapter; name it in targets or in train")
        if in_full:
            _make_float32(module)
        if isinstance(module, Adapted) and targets:
            if isinstance(module, Embedding) and model.head is None:
                raise ValueError("lora.targets: embed is tied to the head, and an adapter would untie them; name it in lora.train")
            _check_experts(lora, name, module, targets)
            _attach(module, targets, lora, rngs)


def adaptable(model: Any) -> Iterator[tuple[str, Adapted]]:
    """Yield (name such as `attention.q_proj`, module) for every module that can have an adapter, once per layer of a period."""
    for name, module in _modules(model):
        if isinstance(module, Adapted):
            yield name, module


def _modules(model: Any) -> Iterator[tuple[str, nnx.Module]]:
    """Yield (name such as `attention.q_proj`, module) for every module with weights of its own, once per layer of a period."""
    for name in ("embed", "final_norm", "head"):
        if getattr(model, name) is not None:
            yield name, getattr(model, name)
    for stack in model.stacks:
        for layer in stack.layers:
            for name, part in vars(layer).items():
                if isinstance(part, RMSNorm):
                    yield name, part
                elif isinstance(part, nnx.Module):
                    yield from _parts(name, part)
    # Last, so that the initial adapters of the text model do not depend on those of the tower.
    for name in ("vision", "audio"):
        if getattr(model, name) is not None:
            yield from _parts(name, getattr(model, name))


def _parts(name: str, module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yield (name, module) for every module with weights of its own inside `module`."""
    for n, part in vars(module).items():
        if isinstance(part, Adapted | RMSNorm | LayerNorm):  # norms of latents and of towers
            yield f"{name}.{n}", part
        elif isinstance(part, nnx.Module):  # shared experts, parts of a tower
            yield from _parts(f"{name}.{n}", part)


def _check_patterns(key: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    module_names = sorted(set(names))
    for pattern in patterns:
        if not any(config.names_module(pattern, name) for name in module_names):
            raise ValueError(f"lora.{key}: pattern {pattern!r} names no module; there are {', '.join(module_names)}")


def _check_routed(lora: config.Lora, modules: Iterable[tuple[str, nnx.Module]]) -> None:
    """Raise ValueError if a target with a list of experts names a module that has no experts in any layer."""
    adaptable_names = {name for name, module in modules if isinstance(module, Adapted)}
    routed = {name for name, module in modules if isinstance(module, ExpertLinear)}
    for target in lora.targets:
        if target.experts is None:
            continue
        for name in sorted(adaptable_names - routed):
            if any(config.names_module(pattern, name) for pattern in target.modules):
                raise ValueError(f"lora.targets: {name} has no experts; leave experts {list(target.experts)} out")


def _check_experts(lora: config.Lora, name: str, module: Adapted, targets: list[config.LoraTarget]) -> None:
    """Raise ValueError if a module, or one of its experts, is named twice, or if an expert does not exist.

    A module may be named by several targets only if they name different experts.
    """
    pattern_of_expert: dict[int, str] = {}
    count = module.weight[...].shape[1] if isinstance(module, ExpertLinear) else 1
    for target in targets:
        pattern, *duplicates = [pattern for pattern in target.modules if config.names_module(pattern, name)]
        for expert in range(count) if target.experts is None else target.experts:
            if expert >= count:
                raise ValueError(f"lora.targets: {name} has no expert {expert}; it has {count} experts, numbered from 0")
            if expert in pattern_of_expert or duplicates:
                which = name if target.experts is None else f"expert {expert} of {name}"
                other = duplicates[0] if duplicates else pattern_of_expert[expert]
                raise ValueError(f"lora.targets: {which} is named twice, by {other!r} and {pattern!r}; give it one rank")
            pattern_of_expert[expert] = pattern


def _make_float32(module: nnx.Module) -> None:
    """Cast the weights to float32, as for adapters: an update of 1e-4 to a bfloat16 weight would mostly be rounded away."""
    names = ["scale" if isinstance(module, RMSNorm | LayerNorm) else "weight"]
    if isinstance(module, BiasedLinear | BiasedProjection | LayerNorm) and module.bias is not None:
        names.append("bias")
    for name in names:
        setattr(module, name, nnx.Param(getattr(module, name)[...].astype(jnp.float32)))


def _attach(module: Adapted, targets: list[config.LoraTarget], lora: config.Lora, rngs: RandomSource) -> None:
    """Create the adapter's factors, with the weight's spec on the dims that they share."""
    weight = module.weight[...]
    J = max(target.rank for target in targets)
    shape = weight.shape
    # A spec may leave out trailing dims that are not split; here each dim needs an entry.
    spec = (*spec_of(weight), *(None,) * (weight.ndim - len(spec_of(weight))))
    if isinstance(module, Head):
        # The head's matrix is (V, D): its inputs are the last dim.
        shape, spec = shape[::-1], spec[::-1]
    batch, inputs = _count_dims(module)
    split = batch + inputs
    lead = shape[:batch]
    ins = shape[batch:split]
    outs = shape[split:]
    a_spec = P(*spec[:split], None)
    b_spec = P(*spec[:batch], None, *spec[split:])
    # Adapters are small compared with their experts, so they are not sharded over `fsdp`.
    if isinstance(module, ExpertLinear):
        a_spec = without_fsdp(a_spec)
        b_spec = without_fsdp(b_spec)
    # Always float32: an update of 1e-4 to a bfloat16 adapter would mostly be rounded away.
    a = jnp.zeros((*lead, *ins, J), jnp.float32, out_sharding=a_spec)
    b = jnp.zeros((*lead, J, *outs), jnp.float32, out_sharding=b_spec)
    if rngs is not None and isinstance(module, Embedding):
        b = jax.random.normal(rngs.params(), b.shape, jnp.float32, out_sharding=b_spec)
    elif rngs is not None:
        bound = float(np.prod(ins)) ** -0.5  # 1 / sqrt(fan-in)
        a = jax.random.uniform(rngs.params(), a.shape, jnp.float32, -bound, bound, out_sharding=a_spec)
    module.lora_dropout = lora.dropout
    # Without lists of experts a module has exactly one target (`_check_experts`).
    module.lora_scale = lora.scale(targets[0])
    if any(target.experts is not None for target in targets):
        # Only routed experts can be listed (`_check_routed`), so `lead` is (repeats, experts).
        module.lora_scale = tuple(scale_of_expert(lora, targets, expert) for expert in range(lead[1]))
        ranks = np.array([rank for _, rank in module.lora_scale])
        # Past its own rank an expert's A is zero and gets no gradient, since `Adapted.adapter` sets B to zero there.
        a = a * (np.arange(J) < ranks[:, None]).astype(np.float32)[:, None, :]
    module.lora_a = nnx.Param(a)
    module.lora_b = nnx.Param(b)


def _count_dims(module: Adapted) -> tuple[int, int]:
    """Return the number of leading dims of weights that have an adapter each (repeats, experts), and of dims that A sums over."""
    match module:
        case Linear():
            to_rank, _ = lora_equations(module.equation)
            a_letters = to_rank.split("->")[0].split(",")[1]
            w_letters = module.equation.split("->")[0].split(",")[1]
            # A stack of layers has a leading dim; the projector of a tower is not stacked.
            return module.weight[...].ndim - len(w_letters), len(a_letters) - 1
        case ExpertLinear():
            return 2, 1
        case Embedding() | Head():
            return 0, 1
        case _:  # a router
            return 1, 1


def scale_of_expert(lora: config.Lora, targets: Iterable[config.LoraTarget], expert: int) -> tuple[float, int]:
    """Return (scale, rank) of the adapter of one expert; (0, 0) if no target names it."""
    for target in targets:
        if target.experts is None or expert in target.experts:
            return lora.scale(target), target.rank
    return 0.0, 0
