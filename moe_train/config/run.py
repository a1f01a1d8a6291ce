"""The resolved record of a run: what will happen, with every choice made.

`run.resolve.resolve` makes a `Run` from a `Config`; everything below the command line takes a `Run` or a part of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moe_train.config.adapters import Lora
from moe_train.config.architecture import Model
from moe_train.config.audio import Audio, AudioEncoder
from moe_train.config.average import Average
from moe_train.config.compute import Compute, Mesh
from moe_train.config.config import Config, RunName
from moe_train.config.data import Data, Tokenizer
from moe_train.config.objective import Objective
from moe_train.config.optimization import Loss, Optimizer
from moe_train.config.profile import Profile
from moe_train.config.section import LocalPath, Positive, RunDirectory, Section, Seed
from moe_train.config.tower_features import StoredFeatures
from moe_train.config.training import Checkpoint, Evaluation, Metrics, Train
from moe_train.config.vision import Vision, VisionEncoder

Encoder = VisionEncoder | AudioEncoder
"""Sizes of a tower and its projector."""


class RandomWeights(Section):
    """Training starts from randomly initialized weights."""

    name: Literal["random"] = "random"


class PretrainedWeights(Section):
    """Training starts from the weights of another run or of an external model."""

    name: Literal["pretrained"] = "pretrained"
    path: LocalPath


InitialWeights = Annotated[RandomWeights | PretrainedWeights, Field(discriminator="name")]
"""The tagged union of starting points."""


class FullTraining(Section):
    """Every weight is trained."""

    name: Literal["full"] = "full"


class RunData(Data):
    """The `data` section with a resolved tokenizer. chat_template: the template's text; None for the tokenizer's own."""

    tokenizer: Tokenizer


class RunVision(Vision):
    """The `vision` section, with the patches of a row and the sizes of the tower stated."""

    patches_per_row: Positive
    encoder: VisionEncoder

    @property
    def units_per_row(self) -> int:
        """Patches that a row has room for."""
        return self.patches_per_row


class RunAudio(Audio):
    """The `audio` section, with the chunks of a row and the sizes of the tower stated."""

    chunks_per_row: Positive
    encoder: AudioEncoder

    @property
    def units_per_row(self) -> int:
        """Chunks that a row has room for."""
        return self.chunks_per_row


class NoAudio(Section):
    """Records have no sound."""

    name: Literal["none"] = "none"


class NoVision(Section):
    """Records have no pictures."""

    name: Literal["none"] = "none"


class NoData(Section):
    """A placeholder for a run whose data cannot be read: the config has no `data` section, or no tokenizer is known.

    reason: an error message that names the remedy.
    """

    reason: str


class Run(Section):
    """The resolved record of a run, in which nothing is left to be decided; compare `Config`, which is what the user wrote.

    method: full training, or adapters (LoRA) with explicit targets. mesh: the size of each axis, never -1. vision and audio: the
    sizes of the tower, and the patches or chunks of a row.
    """

    name: RunName
    run_dir: RunDirectory
    seed: Seed
    initial_weights: InitialWeights
    model: Model
    method: FullTraining | Lora
    objective: Objective
    data: RunData | NoData
    train: Train
    optimizer: Optimizer
    vision: RunVision | NoVision
    audio: RunAudio | NoAudio
    loss: Loss
    compute: Compute
    mesh: Mesh
    evaluation: Evaluation
    checkpoint: Checkpoint
    average: Average
    metrics: Metrics
    profile: Profile
    export: Literal["all", "none"]
    network: Literal["any", "none"]

    @property
    def lora(self) -> Lora | None:
        """The adapter section; None in full training."""
        return self.method if isinstance(self.method, Lora) else None

    @property
    def init_from(self) -> str | None:
        """Path of the weights to start from; None for random initialization."""
        if isinstance(self.initial_weights, PretrainedWeights):
            return self.initial_weights.path
        return None

    @property
    def pictures(self) -> RunVision | None:
        """The `vision` section; None if the records have no pictures."""
        return self.vision if isinstance(self.vision, RunVision) else None

    @property
    def media(self) -> RunVision | RunAudio | None:
        """The section `vision` or `audio`; None if the records have neither pictures nor sound."""
        return self.audio if isinstance(self.audio, RunAudio) else self.pictures

    @property
    def encoder(self) -> Encoder | None:
        """The vision or audio tower; None if the records have neither pictures nor sound."""
        return None if self.media is None else self.media.encoder

    @property
    def rooms(self) -> tuple[int, ...]:
        """Patches or chunks that rows of a step may have room for, ascending to all of `units_per_row`; () without a tower.

        Each is half of the next, rounded up to what divides over `context`.
        """
        media = self.media
        if media is None:
            return ()
        multiple = self.mesh.context * (media.encoder.patches_per_token if isinstance(media, RunVision) else 1)
        sizes = {media.units_per_row}
        for halvings in range(1, media.buckets):
            size = -(-media.units_per_row // 2**halvings)
            sizes.add(min(size + -size % multiple, media.units_per_row))
        return tuple(sorted(sizes))

    @property
    def stored_features(self) -> StoredFeatures | None:
        """How features of the tower are stored; None if steps compute them, or without a tower."""
        features = None if self.media is None else self.media.features
        return features if isinstance(features, StoredFeatures) else None

    @property
    def computed_media(self) -> RunVision | RunAudio | None:
        """The section `vision` or `audio` if steps run its tower; None otherwise."""
        return self.media if self.stored_features is None else None

    @property
    def model_encoder(self) -> Encoder | None:
        """The tower of the model that is trained; None without one, or where its features are stored.

        Suites are answered with the model that is trained, so that it has a tower for their pictures or sound.
        """
        return self.encoder if self.stored_features is None or self.evaluation.suites else None

    @property
    def trained_tower(self) -> tuple[str, ...]:
        """Patterns of the modules of the tower and its projector that full training trains."""
        return () if self.media is None else self.media.train

    @property
    def trains_tower(self) -> bool:
        """Whether a module of the tower or its projector is trained, in full or through an adapter."""
        return bool(self.trained_tower) or (self.lora is not None and self.lora.trains_tower)

    def training_data(self) -> RunData:
        """Return the data section. Raises ValueError, which names the remedy, if there is none."""
        if isinstance(self.data, NoData):
            raise ValueError(self.data.reason)
        return self.data

    def to_config(self) -> Config:
        """Return the config that states all of this, for files; it resolves to an equal `Run`."""
        sections = {key: getattr(self, key) for key in _SHARED_WITH_CONFIG}
        # As a plain `Data`, to equal the section that a file gives; dict() keeps the sections inside as they are.
        data = Data(**dict(self.data)) if isinstance(self.data, RunData) else None
        vision = None if self.pictures is None else Vision(**dict(self.pictures))
        audio = Audio(**dict(self.audio)) if isinstance(self.audio, RunAudio) else None
        return Config(**sections, init_from=self.init_from, lora=self.lora, data=data, vision=vision, audio=audio)


_DECIDED = ("data", "vision", "audio")
_SHARED_WITH_CONFIG = tuple(key for key in Run.model_fields if key in Config.model_fields and key not in _DECIDED)


def run_of(config: Config) -> Run:
    """Convert a config that states everything to a `Run`: one from `Run.to_config`, or one that `resolve` has completed.

    Raises:
        ValueError: the config leaves a choice to a checkpoint or to the devices.
    """
    if config.model is None:
        raise ValueError("the config does not state model, so it is not resolved; call run.resolve.resolve first")
    if -1 in config.mesh.model_dump().values():
        raise ValueError("the config has a mesh axis of -1, so it is not resolved; call run.resolve.resolve first")
    initial_weights: RandomWeights | PretrainedWeights = RandomWeights()
    if config.init_from is not None:
        initial_weights = PretrainedWeights(path=config.init_from)
    return Run(
        **{key: getattr(config, key) for key in _SHARED_WITH_CONFIG},
        initial_weights=initial_weights,
        method=FullTraining() if config.lora is None else config.lora,
        data=_decided_data(config),
        vision=_decided_vision(config),
        audio=_decided_audio(config),
    )


def _decided_vision(config: Config) -> RunVision | NoVision:
    """Return the section on pictures with its sizes. Raises ValueError if they are not stated."""
    if config.vision is None:
        return NoVision()
    if config.vision.encoder is None or config.vision.patches_per_row is None:
        raise ValueError("the config does not state vision.encoder, so it is not resolved; call run.resolve.resolve first")
    return RunVision(**dict(config.vision))


def _decided_audio(config: Config) -> RunAudio | NoAudio:
    """Return the section on sound with its sizes. Raises ValueError if they are not stated."""
    if config.audio is None:
        return NoAudio()
    if config.audio.encoder is None or config.audio.chunks_per_row is None:
        raise ValueError("the config does not state audio.encoder, so it is not resolved; call run.resolve.resolve first")
    return RunAudio(**dict(config.audio))


def _decided_data(config: Config) -> RunData | NoData:
    """Return the data section with its tokenizer, or the reason why there is none."""
    if config.data is None:
        return NoData(reason="the config has no data section; state data.train and data.tokenizer")
    if config.data.tokenizer is None:
        missing = ""
        if config.init_from is not None:
            missing = f", and there is none in {config.init_from}"
        return NoData(reason=f"data.tokenizer is not stated{missing}; state it")
    return RunData(**dict(config.data))
