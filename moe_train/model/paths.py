"""What the path of a parameter means: its stack, layer, module and kind.

A path names a parameter everywhere: in checkpoints, in masks, in the layouts' tables. It is a string wherever it is a key;
`ParameterPath.parse` takes it apart.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from moe_train import config

Kind = Literal["norms", "biases", "router", "embeddings", "matrices"]
"""Groups of parameters, by the names of `optimizer.no_decay`."""


@dataclass(frozen=True)
class ParameterPath:
    """`stacks.1.layers.0.ffn.router.weight`, or `embed.weight`, taken apart; `str` puts it together."""

    module: str
    """Name inside its layer or, outside the stacks, in the model: `ffn.router`, `attention_norm`, `embed`."""
    leaf: str
    """Which array of the module: `weight`, `scale` of a norm, `bias` of a router, `lora_a`, `lora_b`."""
    stack: int | None = None
    """None for what is in no layer: embedding, final norm and head."""
    place: int | None = None
    """The layer's place in the period of its stack."""
    part: Literal["", "codes", "scales"] = ""
    """Which of the two arrays of a quantized weight."""

    @classmethod
    @functools.lru_cache(maxsize=65536)
    def parse(cls, path: str) -> ParameterPath:
        names = path.split(".")
        stack = place = None
        if names[0] == "stacks":
            stack, place = int(names[1]), int(names[3])
            names = names[4:]
        part: Any = names.pop() if names[-1] in ("codes", "scales") else ""
        return cls(".".join(names[:-1]), names[-1], stack, place, part)

    def __str__(self) -> str:
        return ".".join(name for name in (self.module_path, self.leaf, self.part) if name)

    @property
    def module_path(self) -> str:
        """The module's own path: `stacks.1.layers.0.ffn.router`."""
        return self.module if self.stack is None else f"stacks.{self.stack}.layers.{self.place}.{self.module}"

    @property
    def module_name(self) -> str:
        """The last part of the module's name: `q_proj`."""
        return self.module.rpartition(".")[2]

    @property
    def weight(self) -> str:
        """The path of the module's weight, whole where it is quantized."""
        return self.sibling("weight")

    def sibling(self, leaf: str, module: str | None = None) -> str:
        """The path of another array of the same module, or of another module in the same place."""
        return str(replace(self, leaf=leaf, part="", module=self.module if module is None else module))

    @property
    def adapter(self) -> tuple[str, str]:
        """The paths of A and B of the module's adapter, whether it has one or not."""
        return self.sibling("lora_a"), self.sibling("lora_b")

    def has_adapter(self, parameters: Mapping[str, Any]) -> bool:
        """Whether this is a weight with an adapter among the parameters."""
        return self.leaf == "weight" and self.adapter[0] in parameters

    @property
    def in_layer(self) -> bool:
        """Whether the array is stacked: its first dim counts repeats of the period."""
        return self.stack is not None

    @property
    def is_adapter(self) -> bool:
        return self.leaf in ("lora_a", "lora_b")

    @property
    def is_norm(self) -> bool:
        return self.leaf == "scale"

    @property
    def is_router(self) -> bool:
        """Whether the array belongs to a router: its weight, its bias or its adapter."""
        return self.module == "ffn.router"

    @property
    def is_router_bias(self) -> bool:
        """Whether the array is a router's bias, which moves towards an even load and has no gradient."""
        return self.is_router and self.leaf == "bias"

    @property
    def is_embedding(self) -> bool:
        return self.module == "embed"

    @property
    def is_head(self) -> bool:
        return self.module == "head"

    @property
    def is_ffn(self) -> bool:
        """Whether the array belongs to the feed-forward part of a layer, its router included."""
        return self.module.startswith("ffn.")

    def is_expert(self, model: config.Model) -> bool:
        """Whether the array holds weights or adapters of routed experts; its second dim then counts experts."""
        if self.stack is None or not self.is_ffn or self.is_router or self.module.startswith("ffn.shared."):
            return False
        return config.stacks(model)[self.stack].is_sparse

    def layer(self, model: config.Model, repeat: int) -> int | None:
        """The number in the whole model of the layer that entry `repeat` of the array belongs to; None outside layers."""
        if self.stack is None or self.place is None:
            return None
        return config.stacks(model)[self.stack].layer(self.place, repeat)

    @property
    def kind(self) -> Kind:
        if self.is_norm:
            return "norms"
        if self.leaf == "bias":
            return "biases"
        if self.is_router:
            return "router"
        return "embeddings" if self.is_embedding or self.is_head else "matrices"

    def is_trained(self, lora: config.Lora) -> bool:
        """Whether LoRA training changes the array: an adapter's, or one of a module that is trained in full."""
        return self.is_adapter or lora.trains_in_full(self.module)


def in_layer(position: config.LayerPosition, name: str) -> str:
    """The path of an array such as `ffn.router.weight` in a layer."""
    return f"stacks.{position.stack}.layers.{position.place}.{name}"


def of_module(module_path: str, leaf: str = "weight") -> ParameterPath:
    """The path of an array of the module at `stacks.0.layers.0.attention.q_proj`."""
    return ParameterPath.parse(f"{module_path}.{leaf}")


def adapter_ranks(arrays: Mapping[str, Any]) -> dict[str, int]:
    """{path of the module: rank} of every adapter among the arrays (or their shapes), in their order."""
    paths = {ParameterPath.parse(path): array for path, array in arrays.items()}
    return {path.module_path: array.shape[-1] for path, array in paths.items() if path.leaf == "lora_a"}


def rows_of_routers(repeats: Mapping[str, int]) -> dict[str, slice]:
    """{path of an array of every router: its rows in `RouterStats`, which are in the order of the sparse layers}.

    repeats: the length of each of these arrays' first dim. Of a stack, place j of a period of n has rows j, j + n, ….
    """
    places: dict[int, list[tuple[int, str]]] = {}
    for name in repeats:
        path = ParameterPath.parse(name)
        assert path.stack is not None and path.place is not None, name
        places.setdefault(path.stack, []).append((path.place, name))
    rows: dict[str, slice] = {}
    start = 0
    for _, of_stack in sorted(places.items()):
        period = len(of_stack)
        stop = start + period * repeats[of_stack[0][1]]
        rows |= {name: slice(start + place, stop, period) for place, name in of_stack}
        start = stop
    return rows
