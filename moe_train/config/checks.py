"""Checks across sections: whether the model, the mesh, the batch and the losses fit together."""

from __future__ import annotations

from typing import Literal, Protocol, assert_never

from moe_train.config.adapters import Lora
from moe_train.config.architecture import Model, MoeFfn, without_format
from moe_train.config.attention import Attention, GroupedQueryAttention, MultiHeadLatentAttention
from moe_train.config.audio import Audio, AudioEncoder
from moe_train.config.compute import Compute, Mesh
from moe_train.config.data import Data, HubSource, PreparedSource
from moe_train.config.objective import NextToken, Objective
from moe_train.config.optimization import Loss, Optimizer
from moe_train.config.tower_features import StoredFeatures
from moe_train.config.training import Evaluation, Metrics, Train
from moe_train.config.vision import Vision, VisionEncoder


class Sections(Protocol):
    """The sections that `Config` and the resolved `Run` have in common and that the checks read."""

    @property
    def lora(self) -> Lora | None: ...
    @property
    def train(self) -> Train: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def loss(self) -> Loss: ...
    @property
    def compute(self) -> Compute: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def evaluation(self) -> Evaluation: ...
    @property
    def export(self) -> Literal["all", "none"]: ...


def check_local(data: Data | None, metrics: Metrics) -> None:
    """Raise ValueError if a source of data or a tracker of a config with `network: none` needs a network."""
    for tracker in metrics.trackers:
        if tracker.online:
            raise ValueError(f"network is none, but metrics.trackers {tracker.name} is online; set online: false, or network: any")
    if data is None:
        return
    for key, sources in (("train", data.train), ("eval", data.eval)):
        for index, source in enumerate(sources):
            remote = None
            if isinstance(source, HubSource):
                remote = f"the data set {source.dataset} of the hub"
            elif isinstance(source, PreparedSource) and "://" in source.path:
                remote = f"the bucket {source.path}"
            if remote is not None:
                raise ValueError(
                    f"network is none, but data.{key}.{index} names {remote}; copy it to this machine and name its files, "
                    "or set network: any"
                )


def check_batch(sections: Sections) -> None:
    """Raise ValueError if a microbatch or a sequence does not divide evenly over the mesh."""
    mesh = sections.mesh
    train = sections.train
    # These three axes split the batch; a -1 among them makes the product negative, and the check waits for the resolved mesh.
    replicas = mesh.data * mesh.fsdp * mesh.expert
    per_microbatch = train.batch_size // train.microbatches
    if replicas > 0 and per_microbatch % replicas:
        raise ValueError(
            f"batch_size {train.batch_size} / microbatches {train.microbatches} = {per_microbatch} sequences, which do not divide "
            f"evenly over mesh data x fsdp x expert = {replicas}; use a batch_size that is a multiple of "
            f"{replicas * train.microbatches}"
        )
    chunks = 1 if mesh.context == 1 else 2 * mesh.context  # zig-zag: two chunks a device balance causal attention
    if mesh.context > 0 and train.seq_len % chunks:
        lower = train.seq_len // chunks * chunks
        # 0 is a multiple too, but no sequence length.
        choices = f"{lower} or {lower + chunks}" if lower else str(chunks)
        raise ValueError(
            f"train.seq_len {train.seq_len} does not divide into two equal chunks for each of mesh.context {mesh.context} devices; "
            f"use a multiple of {chunks}: {choices}"
        )
    # The kernel works on blocks of 128 positions or a multiple, within each chunk of a device.
    if mesh.context > 0 and sections.compute.attention == "splash" and train.seq_len % (128 * chunks):
        raise ValueError(
            f"compute.attention splash needs a train.seq_len that is a multiple of {128 * chunks} on mesh.context {mesh.context}, "
            f"not {train.seq_len}; change it, or set compute.attention to auto"
        )


def check_model(sections: Sections, model: Model) -> None:
    """Raise ValueError if `model` (stated, or read from `init_from`) does not fit the other sections."""
    mesh = sections.mesh
    loss = sections.loss
    # fsdp splits D; tensor splits heads, F and V (machine/mesh.py).
    _check_divides(mesh.fsdp, "fsdp", model.model_dim, "model_dim")
    _check_heads(mesh.tensor, model.attention)
    _check_divides(mesh.tensor, "tensor", model.ffn.ffn_dim, "ffn_dim")
    if isinstance(model.ffn, MoeFfn) and model.ffn.dense_layers is not None:
        _check_divides(mesh.tensor, "tensor", model.ffn.dense_layers.ffn_dim, "ffn.dense_layers.ffn_dim")
    _check_divides(mesh.tensor, "tensor", model.vocab_size, "vocab_size")
    if sections.train.seq_len > model.max_seq_len:
        raise ValueError(f"train.seq_len {sections.train.seq_len} exceeds the model's max_seq_len {model.max_seq_len}")
    if sections.evaluation.drift_batches and (sections.lora is None or not isinstance(model.ffn, MoeFfn)):
        raise ValueError(
            f"evaluation.drift_batches is {sections.evaluation.drift_batches}, but only adapters on a model with routers have a "
            "base model to compare routing with; leave it out"
        )
    if sections.compute.transport != "auto" and mesh.expert == 1:
        raise ValueError(f"compute.transport {sections.compute.transport} has no effect when mesh.expert is 1; leave it out")
    # Before training rather than at the export, when the training is already paid for.
    inexpressible = without_format(model)
    if inexpressible and sections.export != "none":
        raise ValueError(
            f"model has {inexpressible}, which no file format of family {model.family} can express; "
            "set export: none to train it anyway"
        )
    if not inexpressible and sections.export == "none":
        raise ValueError(f"export: none has no effect, since the model can be exported (family {model.family}); leave it out")
    if loss.balance_over != "microbatch" and not loss.load_balance_loss_coef:
        raise ValueError(f"loss.balance_over {loss.balance_over} has no effect without loss.load_balance_loss_coef; leave it out")
    coefs = {"load_balance_loss_coef": loss.load_balance_loss_coef, "router_z_loss_coef": loss.router_z_loss_coef}
    if isinstance(model.ffn, MoeFfn):
        _check_divides(mesh.expert, "expert", model.ffn.num_experts, "num_experts")
        # No default: an auxiliary loss that is off by accident fails silently.
        if (sections.lora is None or sections.lora.trains_router) and None in coefs.values():
            missing = ", ".join(f"loss.{k}" for k, v in coefs.items() if v is None)
            raise ValueError(f"state {missing}, since routers are trained (0.01 and 0.001 are usual; 0 disables a loss)")
        # With LoRA, the bias moves only if the router itself is trained in full.
        moves = model.ffn.router.bias and (sections.lora is None or "ffn.router" in sections.lora.train)
        if moves and loss.bias_update_rate is None:
            raise ValueError("state loss.bias_update_rate, since routers have a bias (0.001 is usual; 0 keeps it fixed)")
        if not moves and loss.bias_update_rate is not None:
            reason = "the routers have no bias (model.ffn.router.bias)"
            if model.ffn.router.bias:
                reason = "the routers' bias is frozen"
            raise ValueError(f"loss.bias_update_rate has no effect: {reason}; leave it out")
    else:
        if mesh.expert != 1:
            raise ValueError(f"mesh.expert is {mesh.expert}, but a {model.family} model has no experts; use fsdp or data")
        if sections.train.capacity_factor is not None:
            raise ValueError(f"train.capacity_factor is set, but a {model.family} model has no experts; leave it out")
        if any(coefs.values()) or loss.bias_update_rate is not None:
            raise ValueError(f"loss has router coefficients, but a {model.family} model has no routers; leave them out")


def _check_heads(tensor: int, attention: Attention) -> None:
    """Raise ValueError if the heads do not divide evenly over mesh axis `tensor`."""
    match attention:
        case GroupedQueryAttention(num_kv_heads=num_kv_heads):
            # Key heads are the fewest, and divide the query heads.
            _check_divides(tensor, "tensor", num_kv_heads, "num_kv_heads")
        case MultiHeadLatentAttention(num_heads=num_heads):
            _check_divides(tensor, "tensor", num_heads, "num_heads")
        case _:
            assert_never(attention)


def check_objective_of_pictures(objective: Objective) -> None:
    """Raise ValueError if an objective takes no pictures."""
    if not isinstance(objective, NextToken):
        raise ValueError(f"vision has no effect on objective {objective.name}, only next_token takes pictures; leave vision out")


def check_trained_tower(vision: Vision | None, audio: Audio | None, lora: Lora | None) -> None:
    """Raise ValueError if patterns name modules of a tower that there is no section for, or that cannot be trained so."""
    for key, medium, section in (("vision", "pictures", vision), ("audio", "sound", audio)):
        if section is not None:
            _check_train(key, section.train, lora)
            _check_features(key, section, lora)
        elif lora is not None and any(pattern.startswith(f"{key}.") for pattern in lora.tower_patterns):
            tower = f"{'an' if key == 'audio' else 'a'} {key} tower"
            raise ValueError(
                f"lora names modules of {tower}, but there is no section {key}, whose {medium} train them; add {key}: {{}}"
            )


def _check_features(key: str, section: Vision | Audio, lora: Lora | None) -> None:
    """Raise ValueError if features are stored of a tower that training changes."""
    patterns = [*section.train, *(() if lora is None else lora.tower_patterns)]
    if isinstance(section.features, StoredFeatures) and patterns:
        raise ValueError(
            f"{key}.features are stored, and {patterns[0]!r} trains what they come from; set {key}.features to {{name: computed}}, "
            "or freeze tower and projector"
        )


def _check_train(key: str, patterns: tuple[str, ...], lora: Lora | None) -> None:
    """Raise ValueError if `vision.train` or `audio.train` names what it cannot train."""
    for pattern in patterns:
        if not pattern.startswith(f"{key}."):
            raise ValueError(
                f"{key}.train: pattern {pattern!r} names no module of the tower; patterns begin with {key}., such as "
                f"{key}.projector.* or {key}.tower.*"
            )
    if patterns and lora is not None:
        raise ValueError(
            f"{key}.train has no effect with a section lora, which freezes whatever it does not name; move {list(patterns)} "
            "to lora.train, or to lora.targets for adapters"
        )


def check_vision(sections: Sections, encoder: VisionEncoder, patches_per_row: int) -> None:
    """Raise ValueError if a vision tower does not fit the mesh, or the patches of a row do not divide over it."""
    mesh = sections.mesh
    _check_divides(mesh.tensor, "tensor", encoder.num_heads, "num_heads of the vision tower")
    _check_divides(mesh.tensor, "tensor", encoder.ffn_dim, "ffn_dim of the vision tower")
    multiple = max(mesh.context, 1) * encoder.patches_per_token
    if patches_per_row % multiple:
        raise ValueError(
            f"vision.patches_per_row {patches_per_row} is not a multiple of {multiple}, the {encoder.patches_per_token} patches of "
            f"a token for each of mesh.context {mesh.context} devices; use {-(-patches_per_row // multiple) * multiple}"
        )


def check_audio_section(objective: Objective, has_base: bool, has_vision: bool) -> None:
    """Raise ValueError if a section `audio` has no effect, or lacks what it needs.

    Args:
        objective: the objective.
        has_base: whether `init_from` is stated.
        has_vision: whether `vision` is stated.
    """
    if not isinstance(objective, NextToken):
        raise ValueError(f"audio has no effect on objective {objective.name}, only next_token takes sound; leave audio out")
    if not has_base:
        raise ValueError("audio needs init_from, a multimodal model whose tower hears the sound; state it, or leave audio out")
    if has_vision:
        raise ValueError("vision and audio are both stated, and no model has both towers; leave one of them out")


def check_audio(sections: Sections, encoder: AudioEncoder, chunks_per_row: int) -> None:
    """Raise ValueError if an audio tower does not fit the mesh, or the chunks of a row do not divide over it."""
    mesh = sections.mesh
    _check_divides(mesh.tensor, "tensor", encoder.num_heads, "num_heads of the audio tower")
    _check_divides(mesh.tensor, "tensor", encoder.ffn_dim, "ffn_dim of the audio tower")
    context = max(mesh.context, 1)
    if chunks_per_row % context:
        raise ValueError(
            f"audio.chunks_per_row {chunks_per_row} is not a multiple of mesh.context {context}, over which the chunks of a row "
            f"are divided; use {-(-chunks_per_row // context) * context}"
        )


def check_rounding(sections: Sections) -> None:
    """Raise ValueError if `optimizer.rounding` is stated and no trained weight is bfloat16."""
    rounding = sections.optimizer.rounding
    if rounding == "nearest":
        return
    if sections.lora is not None:
        reason = "adapters, and what is trained with them, are float32"
    elif sections.compute.param_dtype == "float32":
        reason = "compute.param_dtype is float32"
    else:
        return
    raise ValueError(f"optimizer.rounding {rounding} has no effect: {reason}; leave it out")


def _check_divides(size: int, axis: str, dim: int, name: str) -> None:
    """Raise ValueError if `dim` is not a multiple of the mesh axis size; an axis of -1 is not checked yet."""
    if size > 0 and dim % size:
        # Ends at 1 at the latest, which divides everything.
        nearest = next(n for n in range(size, 0, -1) if dim % n == 0)
        raise ValueError(f"mesh.{axis} {size} does not divide {name} {dim}; use {nearest}")
