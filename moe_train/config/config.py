"""The configuration of a run as the user writes it: one YAML file is one `Config`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_train.config.adapters import Lora
from moe_train.config.architecture import Model
from moe_train.config.audio import Audio
from moe_train.config.average import Average, LastCheckpoints, NoAverage
from moe_train.config.checks import (
    check_audio_section,
    check_batch,
    check_local,
    check_model,
    check_objective_of_pictures,
    check_rounding,
    check_trained_tower,
)
from moe_train.config.compute import Compute, Mesh
from moe_train.config.data import Data
from moe_train.config.objective import NextToken, Objective, check_records
from moe_train.config.optimization import Loss, Optimizer
from moe_train.config.profile import Profile
from moe_train.config.section import LocalPath, RunDirectory, Section, Seed
from moe_train.config.training import Checkpoint, Evaluation, Metrics, Train
from moe_train.config.vision import Vision

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Name of a run: it starts with a letter or digit; then letters, digits, `.`, `_` and `-` are allowed."""


class Config(Section):
    """The complete configuration of one run.

    Set `model` to train an architecture from random weights, or `init_from` to start from a checkpoint. Set `export: none` to
    train an architecture that no file format can express.
    """

    name: RunName
    """Name of the run, in logs and records."""
    run_dir: RunDirectory
    """Folder for checkpoints, metrics and records. All hosts must see it. A second start with the same folder continues the run.
    It may be in a bucket (gs://BUCKET/runs/NAME, s3://…): the job works in a folder, from where the first process copies.
    """
    seed: Seed = 0
    """Seed of the initial weights, the order of data and dropout."""
    init_from: LocalPath | None = None
    """Directory of a checkpoint to start from: a run (`RUN`, `RUN@30`, `RUN@best`), or a model in Hugging Face, Mistral or GGUF
    format. Null starts from random weights, which `model` describes.
    """
    model: Model | None = None
    """Architecture to train from random weights. With `init_from` leave it out: the checkpoint states it."""
    lora: Lora | None = None
    """Low-rank adapters on a frozen model; null trains every weight."""
    data: Data | None = None
    """Training and evaluation data. Only `plan`, `inspect` and `bench` work without it."""
    objective: Objective = NextToken(name="next_token")
    """What training minimizes."""
    train: Train
    """Length and batch shape of the run."""
    optimizer: Optimizer
    """Optimizer, learning rate and schedule."""
    vision: Vision | None = None
    """Pictures in the records, through the vision tower of `init_from`; null: records with pictures are refused."""
    audio: Audio | None = None
    """Sound in the records, through the audio tower of `init_from`; null: records with sound are refused."""
    loss: Loss = Loss()
    """Settings that keep routers balanced."""
    compute: Compute = Compute()
    """Dtypes, rematerialization and kernels."""
    mesh: Mesh = Mesh()
    """Number of devices along each axis; by default one device. `moe-train plan` finds the best."""
    evaluation: Evaluation = Evaluation()
    """When and how long the held-out loss is measured."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved, and which checkpoints stay."""
    average: Average = NoAverage()
    """Average of the weights that is saved with each checkpoint, as a run of its own: RUN_DIR/average."""
    metrics: Metrics = Metrics()
    """How often metrics are logged, and where to."""
    profile: Profile = Profile()
    """Steps that are traced by the profiler; null for none."""
    export: Literal["all", "none"] = "all"
    """`all` refuses an architecture that no file format can express before training; `none` trains it all the same."""
    network: Literal["any", "none"] = "any"
    """`none` makes every connection a fault, except between the processes of the job; MOE_TRAIN_OFFLINE=1 does so for any command.
    """

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model is None and self.init_from is None:
            raise ValueError("state model (an architecture to train from random weights) or init_from (a checkpoint to start from)")
        # Otherwise `resolve` checks it, once it has read the architecture of `init_from`.
        if self.model is not None:
            check_model(self, self.model)
        if self.data is not None:
            check_records(self.objective, self.data)
        check_batch(self)
        if self.vision is not None:
            check_objective_of_pictures(self.objective)
            if self.init_from is None:
                raise ValueError(
                    "vision needs init_from, a multimodal model whose tower sees the pictures; state it, or leave vision out"
                )
        check_trained_tower(self.vision, self.audio, self.lora)
        if self.audio is not None:
            check_audio_section(self.objective, has_base=self.init_from is not None, has_vision=self.vision is not None)
        if self.network == "none":
            check_local(self.data, self.metrics)
        if isinstance(self.average, LastCheckpoints) and self.checkpoint.keep_last < self.average.count - 1:
            raise ValueError(
                f"average.count {self.average.count} needs checkpoint.keep_last {self.average.count - 1} or more, not "
                f"{self.checkpoint.keep_last}, since the mean is taken over checkpoints that are kept; raise it, or lower the count"
            )
        check_rounding(self)
        if "://" in self.run_dir and not isinstance(self.average, NoAverage):
            raise ValueError(
                f"average is not kept in a bucket, and run_dir is {self.run_dir}; leave average out, or state a folder"
            )
        if self.profile.steps is not None and self.train.steps is not None and self.profile.steps[1] > self.train.steps:
            raise ValueError(
                f"profile.steps ends with {self.profile.steps[1]}, but train.steps is {self.train.steps}; trace steps of the run"
            )
        if self.compute.attention == "cudnn" and self.compute.dtype == "float32":
            raise ValueError(
                "compute.attention cudnn does not support float32; set compute.dtype to bfloat16, or attention to auto"
            )
        return self
