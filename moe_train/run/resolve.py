"""Resolve a `Config` into a `Run`: fill in all that the config leaves to `init_from`, its tokenizer or the devices.

What reads models and templates is imported where a config names one: it takes 0.2 s of processor time.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import jax

from moe_train import config
from moe_train.checkpoint.runs import is_run, read_run, run_folder
from moe_train.config import yaml_file
from moe_train.machine.mesh import AXES, abstract_mesh, mesh_sizes
from moe_train.machine.network import forbid_network
from moe_train.model.parameters import parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import abstract_model
from moe_train.run.resolve_media import audio_with_encoder, vision_with_encoder


def resolve(written: config.Config, device_count: int | None = None) -> config.Run:
    """Resolve everything that the config leaves open.

        run = moe_train.resolve(moe_train.load_config("configs/quickstart_pretrain.yaml"))

    The architecture comes from `init_from` (its config.json or its saved run) if `model` is left out, the targets of adapters
    from `lora.init_from`, the tokenizer from `init_from`, and a mesh axis of -1 from `device_count`. Neither weights nor a
    tokenizer need to exist: without a tokenizer, `Run.data` states what is missing, and code that needs data reports it.

    Args:
        written: the config as the user wrote it.
        device_count: number of devices of the mesh; None for all devices of JAX.

    Raises:
        ValueError: the config contradicts the checkpoint or the adapter, or model, mesh and batch do not fit together.
        FileNotFoundError: a checkpoint, adapter or template that the config names does not exist.
    """
    if written.network == "none":
        forbid_network("network: none")
    if device_count is None:
        device_count = jax.device_count()
    model = _architecture(written)
    changes: dict[str, Any] = {"model": model, "mesh": mesh_sizes(written.mesh, device_count)}
    encoder: config.Encoder | None = None
    if written.vision is not None:
        changes["vision"] = vision_with_encoder(written.vision, written)
        encoder = changes["vision"].encoder
        _check_trained_tower("vision", written.vision.train, model, encoder)
    if written.audio is not None:
        changes["audio"] = audio_with_encoder(written.audio, written, changes["mesh"].context)
        encoder = changes["audio"].encoder
        _check_trained_tower("audio", written.audio.train, model, encoder)
    if written.lora is not None and written.lora.init_from is not None:
        changes["lora"] = _with_adapter(written.lora, written.lora.init_from, model, encoder)
    if written.lora is not None and model.scores is not None:
        changes["lora"] = _with_trained_head(changes.get("lora", written.lora))
    if written.data is not None:
        changes["data"] = config.with_targets(_with_tokenizer(written.data, written.init_from), written.objective)
    # model_copy validates nothing, so the checks below are needed.
    complete = written.model_copy(update=changes)
    # Again, although `Config` has checked what it could: the architecture and the mesh are only known now.
    config.check_model(complete, model)
    config.check_batch(complete)
    # The patterns of an adapter that is started from are only known now.
    config.check_trained_tower(complete.vision, complete.audio, complete.lora)
    run = config.run_of(complete)
    if run.pictures is not None:
        config.check_vision(complete, run.pictures.encoder, run.pictures.patches_per_row)
    if isinstance(run.audio, config.RunAudio):
        config.check_audio(complete, run.audio.encoder, run.audio.chunks_per_row)
    return run


def _architecture(written: config.Config) -> config.Model:
    """Return the stated architecture or that of `init_from`; if both are given they must agree."""
    stated = None if written.model is None else _with_head(written.model, written)
    if written.init_from is None or not run_folder(written.init_from).exists():
        if stated is None:
            raise FileNotFoundError(
                f"init_from {written.init_from}: no such folder or file; copy it there, or state model to plan without it"
            )
        return stated
    if is_run(written.init_from) and read_run(written.init_from).lora is not None:
        raise ValueError(
            f"init_from {written.init_from} is a run with adapters; export it with --merge, and set init_from to the export"
        )
    from moe_train.checkpoint.model_dir import read_model

    read = _with_head(read_model(written.init_from), written)
    if stated is not None and _differs_in_scale_alone(stated, read):
        return stated
    if stated is not None and stated != read:
        stated_keys = yaml_file.flat(stated.model_dump(mode="json"))
        read_keys = yaml_file.flat(read.model_dump(mode="json"))
        key = next(key for key in {**stated_keys, **read_keys} if stated_keys.get(key) != read_keys.get(key))
        raise ValueError(
            f"model.{key} is {stated_keys.get(key)}, but {read_keys.get(key)} in init_from {written.init_from}; "
            "leave model out, since init_from determines it"
        )
    return read


def _with_head(model: config.Model, written: config.Config) -> config.Model:
    """Return the architecture with the head that the objective trains, in place of the one that predicts tokens.

    Raises:
        ValueError: the weights have another head for scores, or one that the objective does not train.
    """
    scores = written.objective.scores if isinstance(written.objective, config.Classification | config.Reward) else None
    if model.scores is not None and model.scores != scores:
        names = ", ".join(model.scores.output_names)
        if scores is None:
            remedy = f"which objective {written.objective.name} cannot train; start from a language model"
        else:
            remedy = f"and objective {written.objective.name} has {', '.join(scores.output_names)}; state the same labels"
        raise ValueError(f"{written.init_from or 'model'} scores texts as {names}, {remedy}")
    if scores is None:
        return model
    # A tied head would be the embedding's table, which a head for scores does not use.
    return model.model_copy(update={"scores": scores, "tie_embeddings": False})


def _check_trained_tower(key: str, patterns: tuple[str, ...], model: config.Model, encoder: config.Encoder | None) -> None:
    """Raise ValueError if a pattern of `vision.train` or `audio.train` names no module."""
    if not patterns:
        return
    # The positions of an audio tower have its own name, and are not trained.
    modules = [module for module in _modules(model, encoder) if module.startswith(f"{key}.") and module != f"{key}.tower"]
    for pattern in patterns:
        if not any(config.names_module(pattern, module) for module in modules):
            raise ValueError(f"{key}.train: pattern {pattern!r} names no module; there are {', '.join(modules)}")


def _with_trained_head(lora: config.Lora) -> config.Lora:
    """Return the section with the head among what is trained in full, since it starts from random weights.

    Raises:
        ValueError: the section gives the head an adapter.
    """
    if lora.targets_of("head"):
        raise ValueError(
            "lora.targets name the head, which a new head for scores has no use for: it is trained in full; leave it out"
        )
    if lora.trains_in_full("head"):
        return lora
    return lora.model_copy(update={"train": (*lora.train, "head")})


def _differs_in_scale_alone(stated: config.Model, read: config.Model) -> bool:
    """Return whether the config states another softmax scale than files whose readers are known to disagree about it."""
    if not isinstance(stated.attention, config.MultiHeadLatentAttention):
        return False
    attention = read.attention
    if not isinstance(attention, config.MultiHeadLatentAttention):
        return False
    corrected = attention.model_copy(update={"scale_correction": stated.attention.scale_correction})
    return stated != read and stated == read.model_copy(update={"attention": corrected})


def _with_tokenizer(data: config.Data, init_from: str | None) -> config.Data:
    """Return the data section with the tokenizer and the template's text filled in.

    The tokenizer is that of `init_from` if the section names none and `init_from` has one.
    """
    changes: dict[str, Any] = {}
    if data.chat_template is not None:
        from moe_train.data.chat.conversation_to_tokens import read_template

        # The text instead of the path, so that checkpoints and exports carry it even if the file changes or disappears.
        changes["chat_template"] = read_template(data.chat_template)
    if data.tokenizer is None and init_from is not None:
        from moe_train.checkpoint.model_dir import find_tokenizer_config

        with contextlib.suppress(FileNotFoundError):  # `config.run_of` notes that there is none
            changes["tokenizer"] = find_tokenizer_config(init_from)
    return data.model_copy(update=changes)


def _with_adapter(lora: config.Lora, source: str, model: config.Model, encoder: config.Encoder | None) -> config.Lora:
    """Return the section with the targets of the adapter that it starts from. Raises ValueError if the two contradict."""
    from moe_train.checkpoint.model_dir import read_adapter

    saved = read_adapter(source, model, encoder)
    if not lora.targets:
        lora = lora.model_copy(update={"targets": saved.targets, "rslora": saved.rslora})
    if not lora.train:
        lora = lora.model_copy(update={"train": saved.train})
    for module in _modules(model, encoder):
        stated = _module_adapters(lora, module)
        expected = _module_adapters(saved, module)
        if stated != expected:
            raise ValueError(
                f"lora.targets gives {module} {_describe_adapters(stated)}, but the adapter in {source} has "
                f"{_describe_adapters(expected)}; leave targets out"
            )
        is_saved = saved.trains_in_full(module)
        if is_saved and not lora.trains_in_full(module):
            raise ValueError(
                f"lora.train does not name {module}, but {source} contains trained weights of it; add it to lora.train"
            )
    return lora


def _modules(model: config.Model, encoder: config.Encoder | None = None) -> list[str]:
    """Return the names of all modules with weights, each once, such as `attention.q_proj`."""
    # Module names do not depend on the mesh, so one abstract device is enough.
    with jax.sharding.use_abstract_mesh(abstract_mesh(dict.fromkeys(AXES, 1))):
        shapes = parameters(abstract_model(model, config.Compute(), None, encoder))[1]
    return sorted({ParameterPath.parse(path).module for path in shapes})


class _ModuleAdapter(NamedTuple):
    """The properties of one adapter of a module in which two sections could contradict each other."""

    experts: tuple[int, ...]
    rank: int
    scale: float


def _module_adapters(lora: config.Lora, module: str) -> list[_ModuleAdapter]:
    """Return the adapters of `module` in a form that two sections can be compared by."""
    adapters = [
        # Scales are rounded to nine digits: the same scale may have been computed in different ways.
        _ModuleAdapter(target.experts or (), target.rank, float(f"{lora.scale(target):.9g}"))
        for target in lora.targets_of(module)
    ]
    return sorted(adapters)


def _describe_adapters(adapters: list[_ModuleAdapter]) -> str:
    descriptions = []
    for adapter in adapters:
        experts = f" (experts {list(adapter.experts)})" if adapter.experts else ""
        descriptions.append(f"rank {adapter.rank}, scale {adapter.scale:g}{experts}")
    return "; ".join(descriptions) or "no adapter"
