"""Low-rank adapters beside frozen weights: attention, dense FFN and routed experts (LoRA, arXiv:2106.09685).

y = x·W + alpha / rank * (x·A)·B; A starts as PEFT's does, uniform in ±1/sqrt(fan-in), B as zeros. The delta is
never formed in training: an expert's adapter is two further grouped matmuls.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.model.fsdp import spec_of, without_fsdp
from moe_train.model.layers import Linear, lora_equations
from moe_train.model.moe import ExpertLinear


def is_lora(path: str) -> bool:
    """True for the path of an adapter's array."""
    return path.endswith((".lora_a", ".lora_b"))


def add_lora(model: Any, lora: config.Lora, rngs: nnx.Rngs) -> None:
    """Put adapters beside every module that a target's pattern names, in place, on a model with stacked layers.

    Raises ValueError for a pattern that names nothing, and for a module named twice.
    """
    modules = {f"{name}@{j}": m for j, layer in _layers(model) for name, m in linear_modules(layer)}
    names = sorted({key.partition("@")[0] for key in modules})
    taken: dict[str, str] = {}
    for target in lora.targets:
        for pattern in target.modules:
            matching = [name for name in names if fnmatchcase(name, pattern)]
            if not matching:
                raise ValueError(f"lora.targets: pattern {pattern!r} names no module; there are {', '.join(names)}")
            for name in matching:
                if name in taken:
                    raise ValueError(f"lora.targets: {name} is named twice, by {taken[name]!r} and {pattern!r}; give it one rank")
                taken[name] = pattern
        for key, module in modules.items():
            if taken.get(key.partition("@")[0]) in target.modules and module.lora_a is None:
                _attach(module, target, rngs)


def _layers(model: Any) -> Iterator[tuple[str, nnx.Module]]:
    for s, stack in enumerate(model.stacks):
        for j, layer in enumerate(stack.layers):
            yield f"{s}.{j}", layer


def linear_modules(layer: Any) -> Iterator[tuple[str, Linear | ExpertLinear]]:
    """(`attention.q_proj`, module) for every linear map of a layer that can have an adapter."""
    for part in ("attention", "ffn"):
        for name, module in vars(getattr(layer, part)).items():
            if isinstance(module, Linear | ExpertLinear):
                yield f"{part}.{name}", module


def _attach(module: Linear | ExpertLinear, target: config.LoraTarget, rngs: nnx.Rngs) -> None:
    weight, J = module.weight[...], target.rank
    spec = tuple(spec_of(weight)) + (None,) * (weight.ndim - len(spec_of(weight)))
    if isinstance(module, Linear):
        to_rank, _ = lora_equations(module.equation)
        batch, inputs = 1, len(to_rank.split("->")[0].split(",")[1]) - 1  # one leading dim: repeats of the stack
    else:
        batch, inputs = 2, 1  # repeats, experts
    lead, ins, outs = weight.shape[:batch], weight.shape[batch : batch + inputs], weight.shape[batch + inputs :]
    a_spec = P(*spec[:batch], *spec[batch : batch + inputs], None)
    b_spec = P(*spec[:batch], None, *spec[batch + inputs :])
    if isinstance(module, ExpertLinear):  # small beside their expert: whole on each device of `fsdp`
        a_spec, b_spec = without_fsdp(a_spec), without_fsdp(b_spec)
    fan_in = 1
    for size in ins:
        fan_in *= size
    bound = fan_in**-0.5
    # float32 whatever the base's dtype: an update of 1e-4 to a bfloat16 adapter would mostly be rounded away
    a = jax.random.uniform(rngs.params(), (*lead, *ins, J), jnp.float32, -bound, bound, out_sharding=a_spec)
    module.lora_a = nnx.Param(a)
    module.lora_b = nnx.Param(jnp.zeros((*lead, J, *outs), jnp.float32, out_sharding=b_spec))
    module.lora_scale = target.alpha / J
