"""`moe-train doctor`: what this machine offers, and what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import moe_train
from moe_train.machine.network import is_forbidden

State = Literal["ok", "missing", "broken"]
"""Whether a part works, is not there although some commands need it, or does not work although every command needs it."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "datasets", "grain", "tokenizers", "mistral-common", "numpy")
_EXTRAS = {
    "tpu": ("libtpu", "TPUs, and `plan` with the real TPU compiler"),
    "cuda": ("jax_cuda12_plugin", "NVIDIA GPUs"),
    "gguf": ("gguf", "quantized GGUF files"),
    "report": ("matplotlib", "`plot`"),
    "pii": ("detect_secrets", "personal data and secrets in `data check`"),
    "vision": ("PIL", "pictures in records"),
    "audio": ("soundfile", "sound in records that is not WAV"),
    "evidence": ("model_signing", "signatures of `evidence`"),
    "s3": ("s3fs", "prepared data in S3"),
    "gcs": ("gcsfs", "prepared data in Google Cloud Storage"),
    "azure": ("adlfs", "prepared data in Azure"),
}
"""Extra -> a module that it installs, and what it is for."""
_NETWORK_SETTINGS = (
    "MOE_TRAIN_OFFLINE",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HTTPS_PROXY",
    "https_proxy",
    "PIP_INDEX_URL",
    "PIP_NO_INDEX",
)
_LOW_DISK = 5 * 10**9
"""Bytes of free disk space below which a run of any size soon stops."""


class Finding(NamedTuple):
    """What was found out about one part of the machine."""

    part: str
    state: State
    text: str
    remedy: str = ""
    """What to do; empty if the part works."""


def examine_machine() -> list[Finding]:
    """Examine versions, devices, memory, disk, extras, the chat template's sandbox, caches and network settings.

    No connection is made, and nothing is written.
    """
    devices = _examined("devices", _devices)
    compilation = _examined("compilation", _compilation)
    if devices.state == compilation.state == "broken":
        compilation = Finding("compilation", "missing", "not tried without devices", "see the devices above")
    findings = [_python(), _packages(), devices, _memory(), _disk()]
    findings += [_extra(name, module, purpose) for name, (module, purpose) in _EXTRAS.items()]
    findings += [compilation, _cache(), _examined("chat template", _template), _network()]
    return findings


def _examined(part: str, examine: Callable[[], Finding]) -> Finding:
    """Return what a function finds out, or the error that it ends with."""
    try:
        return examine()
    except Exception as error:  # whatever a part of the machine does wrong is what is asked for
        from moe_train.machine.backend import backend_failure

        message, _, remedy = (backend_failure(error) or f"{type(error).__name__}: {error}").partition("; ")
        return Finding(
            part, "broken", " ".join(message.split()), remedy or "run the command that needs it with --debug for a traceback"
        )


def _python() -> Finding:
    return Finding("moe-train", "ok", f"{moe_train.__version__} on Python {platform.python_version()}, {sys.executable}")


def _packages() -> Finding:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    return Finding("packages", "ok", ", ".join(versions))


def _devices() -> Finding:
    import jax

    kinds: dict[str, int] = {}
    for device in jax.devices():
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    shown = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return Finding("devices", "ok", f"{shown} ({jax.default_backend()}), {os.cpu_count()} CPU cores")


def _memory() -> Finding:
    from moe_train.machine.host_memory import available_memory

    available = available_memory()
    if available is None:
        return Finding("host memory", "missing", "this system does not state it", "watch it yourself; loads are not checked")
    return Finding("host memory", "ok", f"{available / 1e9:.1f} GB available")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / 1e9:.1f} GB free in {Path.cwd()}"
    if free < _LOW_DISK:
        return Finding("disk", "missing", text, "free some space, or set run_dir and data.cache_dir to another disk")
    return Finding("disk", "ok", text)


def _extra(name: str, module: str, purpose: str) -> Finding:
    if importlib.util.find_spec(module) is not None:
        return Finding(f"extra {name}", "ok", f"for {purpose}")
    return Finding(f"extra {name}", "missing", f"for {purpose}", f"bash launch/install.sh {name}")


def _compilation() -> Finding:
    import jax
    import jax.numpy as jnp

    total = float(jax.jit(jnp.sum)(jnp.ones((8, 8))))
    if total != 64:
        return Finding("compilation", "broken", f"the sum of 64 ones is {total}", "reinstall jax and jaxlib of one version")
    return Finding("compilation", "ok", "a compiled program computes what it should")


def _cache() -> Finding:
    from moe_train.machine.compile_cache import use_compile_cache

    cache = use_compile_cache()
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if cache is None and folder and os.environ.get("MOE_TRAIN_COMPILE_CACHE") != "off":
        return Finding("compilation cache", "ok", f"JAX's own, in {folder} (JAX_COMPILATION_CACHE_DIR)")
    if cache is None:
        return Finding("compilation cache", "missing", "none is used", "unset MOE_TRAIN_COMPILE_CACHE, or name a folder in it")
    return Finding("compilation cache", "ok", f"programs are kept in {cache.folder}")


def _template() -> Finding:
    from moe_train.data.chat.conversation_to_tokens import read_template
    from moe_train.data.chat.sandbox import render

    question = "What is a mesh?"
    variables = {"messages": [{"role": "user", "content": question}], "add_generation_prompt": True}
    (text,) = render(read_template("chatml"), [variables])
    if question not in text:
        return Finding("chat template", "broken", "the packaged template does not write a question", "reinstall moe-train")
    return Finding("chat template", "ok", "templates are rendered in a process of their own, with limits")


def _network() -> Finding:
    stated = [f"{name}={os.environ[name]}" for name in _NETWORK_SETTINGS if name in os.environ]
    text = "used only for data sets on the hub and for buckets that a config names"
    if is_forbidden():
        text = "forbidden, except between the processes of a job"
    return Finding("network", "ok", f"{text}; {', '.join(stated)}" if stated else text)
