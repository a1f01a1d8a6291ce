"""Adapters: which modules get one, what is trained in full, how frozen weights are quantized."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_train.config.section import (
    Decay,
    LocalPath,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
)

NAMED_IN_FULL = ("ffn.router", "embed", "head")
"""Modules that no pattern with a wildcard reaches: the router stays frozen unless it is named, as do both ends."""


def names_module(pattern: str, module: str) -> bool:
    """Whether a pattern of the section `lora` names a module such as `attention.q_proj`."""
    return pattern == module if module in NAMED_IN_FULL else fnmatchcase(module, pattern)


class LoraTarget(Section):
    """Modules that get an adapter. `modules` are patterns over module paths inside a layer (`attention.*`,
    `ffn.gate_proj`, `*.down_proj`), or the names `ffn.router`, `embed` and `head`; the update is
    alpha / rank * B·A (arXiv:2106.09685). `experts`: these of the routed experts alone, and no dense layer; other experts
    may be another target's."""

    modules: Annotated[tuple[str, ...], Field(min_length=1)]
    rank: Positive
    alpha: PositiveFloat
    experts: Annotated[tuple[NonNegative, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.experts is not None and len(set(self.experts)) < len(self.experts):
            raise ValueError(f"experts {list(self.experts)} names one twice")
        return self


class Nf4(Section):
    """4-bit NormalFloat of QLoRA (arXiv:2305.14314): each block of `block_size` weights is its largest magnitude times
    one of 16 levels; 4 bits a weight, and a scale of the weight's own dtype a block."""

    name: Literal["nf4"]
    block_size: Annotated[Positive, Field(multiple_of=4)] = 64


class Int8(Section):
    """Whole numbers from -127 to 127 times a scale for each block of `block_size` weights."""

    name: Literal["int8"]
    block_size: Annotated[Positive, Field(ge=2)] = 64


class Lora(Section):
    """Low-rank adapters; everything else is frozen, and where `quantize` is set, its linear maps (attention, FFN,
    experts) are held in few bits.

    rslora: alpha / sqrt(rank) in place of alpha / rank (arXiv:2312.03732). dropout: of the adapters' inputs in training.
    train: patterns of modules that are trained in full beside the adapters (`*_norm`, `ffn.router`, `embed`, `head`, …).
    init_from: an adapter to start from; `targets` and `train` are then its own where they are left out.
    """

    targets: tuple[LoraTarget, ...] = ()
    rslora: bool = False
    dropout: Decay = 0.0
    train: tuple[str, ...] = ()
    init_from: LocalPath | None = None
    quantize: Annotated[Nf4 | Int8, Field(discriminator="name")] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.targets and self.init_from is None:
            raise ValueError("lora has no targets; state at least one, or init_from (an adapter to start from)")
        return self

    @property
    def trains_router(self) -> bool:
        return "ffn.router" in (*self.train, *(name for target in self.targets for name in target.modules))

    def trains_in_full(self, module: str) -> bool:
        """Whether a module such as `ffn.router` is trained itself, beside the adapters."""
        return any(names_module(pattern, module) for pattern in self.train)

    def targets_of(self, module: str, *, routed: bool = True) -> list[LoraTarget]:
        """The targets that give a module its adapter: one, or several that share its experts.

        routed: whether the module has routed experts; targets that name experts leave others alone, such as the dense
        first layers of a sparse model.
        """
        matching = [t for t in self.targets if any(names_module(pattern, module) for pattern in t.modules)]
        return [target for target in matching if routed or target.experts is None]

    def scale(self, target: LoraTarget) -> float:
        """What the product of a target's A and B is multiplied with."""
        return target.alpha / (target.rank**0.5 if self.rslora else target.rank)
