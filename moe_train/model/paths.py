"""The meaning of a parameter's path: its stack, layer, module and kind.

A path names a parameter everywhere: in checkpoints, in masks and in the tables of the file layouts. It is a string wherever
it is used as a key; `ParameterPath.parse` splits it into its parts.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from moe_train import config

ParameterKind = Literal["norms", "biases", "router", "embeddings", "matrices"]
"""Groups of parameters, named as in `optimizer.no_decay`."""


@dataclass(frozen=True)
class ParameterPath:
    """A parsed parameter path, such as `stacks.1.layers.0.ffn.router.weight` or `embed.weight`; `str` gives the path back."""

    module: str
    """Module name inside its layer or, outside the stacks, inside the model: `ffn.router`, `attention_norm`, `embed`."""
    leaf: str
    """Which array of the module this is: `weight`, `scale` of a norm, `bias` of a router, `lora_a` or `lora_b`."""
    stack: int | None = None
    """Index of the stack; None for arrays outside the layers: embedding, final norm and head."""
    place: int | None = None
    """Index of the layer in the period of its stack; None outside the layers."""
    part: Literal["", "codes", "scales"] = ""
    """Which of the two arrays of a quantized weight this is; empty for a weight that is not quantized."""

    @classmethod
    @functools.lru_cache(maxsize=65536)
    def parse(cls, path: str) -> ParameterPath:
        """Parse a path string. Results are cached."""
        # stacks.<stack>.layers.<place>.<module>.<leaf>, or <module>.<leaf> outside the layers.
        names = path.split(".")
        stack = place = None
        if names[0] == "stacks":
            stack, place = int(names[1]), int(names[3])
            names = names[4:]
        part: Any = ""
        if names[-1] in ("codes", "scales"):
            part = names.pop()
        return cls(".".join(names[:-1]), names[-1], stack, place, part)

    def __str__(self) -> str:
        """Return the path as a string."""
        return ".".join(name for name in (self.module_path, self.leaf, self.part) if name)

    @property
    def module_path(self) -> str:
        """Path of the module itself: `stacks.1.layers.0.ffn.router`."""
        return self.module if self.stack is None else f"stacks.{self.stack}.layers.{self.place}.{self.module}"

    @property
    def module_name(self) -> str:
        """Last component of the module's name: `q_proj`."""
        return self.module.rpartition(".")[2]

    @property
    def weight(self) -> str:
        """Path of the module's weight, without the suffix of a quantized weight's part."""
        return self.sibling("weight")

    def sibling(self, leaf: str, module: str | None = None) -> str:
        """Return the path of another array of the same module.

        Args:
            leaf: name of the other array, such as `weight` or `lora_a`.
            module: name of another module in the same layer (or in the model, outside the layers); None for the same module.
        """
        return str(replace(self, leaf=leaf, part="", module=self.module if module is None else module))

    @property
    def adapter(self) -> tuple[str, str]:
        """Paths of the LoRA factors A and B of the module, whether or not it has an adapter."""
        return self.sibling("lora_a"), self.sibling("lora_b")

    def has_adapter(self, parameters: Container[str]) -> bool:
        """Return whether this is a weight whose adapter is among `parameters`."""
        return self.leaf == "weight" and self.adapter[0] in parameters

    @property
    def in_layer(self) -> bool:
        """Whether the array is stacked: its first dim counts the repeats of the period."""
        return self.stack is not None

    @property
    def is_adapter(self) -> bool:
        """Whether the array is a LoRA factor."""
        return self.leaf in ("lora_a", "lora_b")

    @property
    def is_norm(self) -> bool:
        """Whether the array is the scale of a norm."""
        return self.leaf == "scale"

    @property
    def is_router(self) -> bool:
        """Whether the array belongs to a router: its weight, bias or adapter."""
        return self.module == "ffn.router"

    @property
    def is_router_bias(self) -> bool:
        """Whether the array is a router bias, which is moved towards an even expert load and has no gradient."""
        return self.is_router and self.leaf == "bias"

    @property
    def is_embedding(self) -> bool:
        """Whether the array belongs to the token embedding."""
        return self.module == "embed"

    @property
    def is_head(self) -> bool:
        """Whether the array belongs to the output head."""
        return self.module == "head"

    @property
    def is_vision(self) -> bool:
        """Whether the array belongs to the vision tower or its projector."""
        return self.module.startswith("vision.")

    @property
    def is_tower(self) -> bool:
        """Whether the array belongs to a vision or audio tower or its projector."""
        return self.is_vision or self.module.startswith("audio.")

    @property
    def is_ffn(self) -> bool:
        """Whether the array belongs to the feed-forward part of a layer, including its router."""
        return self.module.startswith("ffn.")

    def is_expert(self, model: config.Model) -> bool:
        """Return whether the array holds weights or adapters of routed experts; its second dim then counts experts."""
        if self.stack is None or not self.is_ffn or self.is_router or self.module.startswith("ffn.shared."):
            return False
        return config.stacks(model)[self.stack].is_sparse

    def layer(self, model: config.Model, repeat: int) -> int | None:
        """Return the index, counted over the whole model, of the layer that entry `repeat` of the array's first dim belongs to.

        None for arrays outside the layers.
        """
        if self.stack is None or self.place is None:
            return None
        return config.stacks(model)[self.stack].layer(self.place, repeat)

    @property
    def kind(self) -> ParameterKind:
        """Group of parameters that the array belongs to."""
        if self.is_norm:
            return "norms"
        # Before the router, whose bias belongs to this group.
        if self.leaf == "bias":
            return "biases"
        if self.is_router:
            return "router"
        return "embeddings" if self.is_embedding or self.is_head else "matrices"

    def is_trained(self, lora: config.Lora) -> bool:
        """Return whether LoRA training changes the array: it is an adapter, or its module is trained in full."""
        return self.is_adapter or lora.trains_in_full(self.module)


def in_layer(position: config.LayerPosition, name: str) -> str:
    """Return the path of the array `name`, such as `ffn.router.weight`, in the layer at `position`."""
    return f"stacks.{position.stack}.layers.{position.place}.{name}"


def of_module(module_path: str, leaf: str = "weight") -> ParameterPath:
    """Return the path of an array of a module, given the module's path such as `stacks.0.layers.0.attention.q_proj`."""
    return ParameterPath.parse(f"{module_path}.{leaf}")


def adapter_ranks(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Return {module path: rank} for every adapter among the arrays, in their order.

    Args:
        arrays: arrays, or their shapes, by parameter path.
    """
    paths = {ParameterPath.parse(path): array for path, array in arrays.items()}
    return {path.module_path: array.shape[-1] for path, array in paths.items() if path.leaf == "lora_a"}


def router_rows(repeats: Mapping[str, int]) -> dict[str, slice]:
    """Return {path: the rows of `RouterStats` that belong to it} for one array of every router.

    The rows of `RouterStats` are in the order of the sparse layers. Within a stack of period n, place j has rows j, j + n, ….

    Args:
        repeats: length of the first dim of each of these arrays, by path.
    """
    places: dict[int, list[tuple[int, str]]] = {}
    for name in repeats:
        path = ParameterPath.parse(name)
        assert path.stack is not None and path.place is not None, name
        places.setdefault(path.stack, []).append((path.place, name))
    rows: dict[str, slice] = {}
    start = 0  # first row of the stack
    for _, routers in sorted(places.items()):
        period = len(routers)
        stop = start + period * repeats[routers[0][1]]
        rows |= {name: slice(start + place, stop, period) for place, name in routers}
        start = stop
    return rows
