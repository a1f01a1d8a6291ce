"""LoRA adapters: which modules get one, which modules are trained in full, and how frozen weights are quantized."""

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
"""Modules that a wildcard pattern never matches: the router, the embedding and the head stay frozen unless they are named."""
TOWERS = ("vision.", "audio.")
"""Beginnings of the names of the modules of a vision or audio tower and its projector."""
_POSITIONS = "audio.tower"
"""Module of the positions of an audio tower: sinusoids, which readers of files compute anew."""


def names_module(pattern: str, module: str) -> bool:
    """Return whether a pattern of the section `lora`, `vision` or `audio` matches a module such as `attention.q_proj`.

    Modules of a tower have names like `vision.tower.layers.attention.q_proj`. Only patterns that begin with `vision.` or `audio.`
    match them, so that patterns that are meant for the text model, such as `*_norm`, leave the tower frozen.
    """
    if module in NAMED_IN_FULL:
        return pattern == module
    if module == _POSITIONS or (module.startswith(TOWERS) and not pattern.startswith(TOWERS)):
        return False
    return fnmatchcase(module, pattern)


class LoraTarget(Section):
    """A group of modules that get an adapter with the same rank and alpha: the update alpha / rank * B·A (arXiv:2106.09685)."""

    modules: Annotated[tuple[str, ...], Field(min_length=1)]
    """Patterns over module paths inside a layer, such as `attention.*`, `ffn.*`, `ffn.gate_proj` or `*.down_proj`, or one of the
    names `ffn.router`, `embed` and `head`, which no wildcard matches. Patterns of a tower and its projector begin with
    `vision.` or `audio.`, such as `vision.tower.layers.attention.*`.
    """
    rank: Positive
    """Rank of the update B·A. 8 to 32 is usual; a higher rank learns more and costs memory and time in proportion."""
    alpha: PositiveFloat
    """Numerator of the factor alpha / rank (alpha / sqrt(rank) with `rslora`) on the update. Twice the rank is usual."""
    experts: Annotated[tuple[NonNegative, ...], Field(min_length=1)] | None = None
    """Indices, from 0, of the routed experts that get an adapter; null for all. Dense layers get none if it is stated. Another
    target may name other experts.
    """

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.experts is not None and len(set(self.experts)) < len(self.experts):
            raise ValueError(f"experts {list(self.experts)} lists an expert twice; list each once")
        return self


class Nf4(Section):
    """The 4-bit NormalFloat format of QLoRA (arXiv:2305.14314).

    In a block of `block_size` weights each weight is the block's largest magnitude times one of 16 levels. A weight takes 4
    bits, and a block takes one scale in the weight's own dtype.
    """

    name: Literal["nf4"]
    block_size: Annotated[Positive, Field(multiple_of=4)] = 64
    """Number of weights that share a scale, a multiple of 4. Smaller blocks are more accurate and take more memory."""


class Int8(Section):
    """8-bit quantization: integers from -127 to 127, with one scale for each block of `block_size` weights."""

    name: Literal["int8"]
    block_size: Annotated[Positive, Field(ge=2)] = 64
    """Number of weights that share a scale. Smaller blocks are more accurate and take more memory."""


class Fp8(Section):
    """8-bit floating-point numbers (e4m3), with one float32 scale for each block of `block_size` weights.

    FP8 files keep their numbers and scales if their blocks of inputs are multiples of `block_size`.
    """

    name: Literal["fp8"]
    block_size: Annotated[Positive, Field(ge=2)] = 128
    """Number of weights that share a float32 scale. The default is that of FP8 files in 128 x 128 blocks, which then keep their
    numbers.
    """


class Lora(Section):
    """Low-rank adapters (LoRA); all other weights are frozen."""

    targets: tuple[LoraTarget, ...] = ()
    """Groups of modules that get adapters. It may be left out with `init_from`, whose targets are used then, or where `train` names
    all that is trained, such as `train: [head]` for a classifier on a frozen base.
    """
    rslora: bool = False
    """Scale updates by alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732). Set it for ranks above about 32."""
    dropout: Decay = 0.0
    """Share of the adapters' inputs that is set to zero during training. Try 0.05 if the held-out loss rises while the training
    loss falls.
    """
    train: tuple[str, ...] = ()
    """Patterns of modules that are trained in full in addition to the adapters, such as `*_norm`, `ffn.router`, `embed`, `head`,
    `vision.projector.*` or `audio.projector.*`.
    """
    init_from: LocalPath | None = None
    """Directory of an existing adapter (PEFT, Mistral or GGUF) to start from; `targets` and `train` default to those of that
    adapter. Null starts with an update of zero.
    """
    quantize: Annotated[Nf4 | Int8 | Fp8, Field(discriminator="name")] | None = None
    """Format in which the frozen linear maps (attention, FFN, experts) are kept in memory; null keeps `compute.param_dtype`. Set it
    if the base model does not fit into memory. Adapters are merged into the unquantized base.
    """

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.targets and not self.train and self.init_from is None:
            raise ValueError("lora has no targets; state at least one, or init_from (an adapter to start from)")
        return self

    @property
    def trains_router(self) -> bool:
        """Whether the router is trained, in full or through an adapter."""
        return "ffn.router" in self.train or any("ffn.router" in target.modules for target in self.targets)

    @property
    def tower_patterns(self) -> tuple[str, ...]:
        """Patterns of modules of a tower or its projector that are trained, in full or through adapters."""
        patterns = [*(pattern for target in self.targets for pattern in target.modules), *self.train]
        return tuple(pattern for pattern in patterns if pattern.startswith(TOWERS))

    @property
    def trains_tower(self) -> bool:
        """Whether modules of a tower or its projector are trained, in full or through adapters."""
        return bool(self.tower_patterns)

    def of_text(self) -> Lora | None:
        """Return the section for the text model alone; None if it trains nothing of that."""
        targets = []
        for target in self.targets:
            modules = tuple(pattern for pattern in target.modules if not pattern.startswith(TOWERS))
            if modules:
                targets.append(target.model_copy(update={"modules": modules}))
        train = tuple(pattern for pattern in self.train if not pattern.startswith(TOWERS))
        if not targets and not train:
            return None
        return self.model_copy(update={"targets": tuple(targets), "train": train})

    def trains_in_full(self, module: str) -> bool:
        """Return whether a module such as `ffn.router` is itself trained, in addition to the adapters."""
        return any(names_module(pattern, module) for pattern in self.train)

    def targets_of(self, module: str, *, routed: bool = True) -> list[LoraTarget]:
        """Return the targets that give a module its adapter: one, or several that cover different experts.

        Args:
            module: path of the module inside a layer.
            routed: whether the module has routed experts. Targets that name experts skip all other modules, such as those of the
                dense first layers of a sparse model.
        """
        matching = []
        for target in self.targets:
            matches = any(names_module(pattern, module) for pattern in target.modules)
            if matches and (routed or target.experts is None):
                matching.append(target)
        return matching

    def scale(self, target: LoraTarget) -> float:
        """Return the factor by which the product B·A of a target is multiplied."""
        # arXiv:2312.03732: with alpha / rank, updates shrink as the rank grows; with the square root they do not.
        return target.alpha / (target.rank**0.5 if self.rslora else target.rank)
