"""A model from a directory: a run of ours, or another tool's files; and what a run takes from the model it starts from."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, overload

import jax
from jax.sharding import Mesh

from moe_train import config
from moe_train.checkpoint import manager
from moe_train.checkpoint.identity import check_base
from moe_train.checkpoint.manager import Base
from moe_train.checkpoint.runs import TOKENIZER, is_run, read_run
from moe_train.data.chat.conversation_to_tokens import load_template
from moe_train.data.tokenizers.load import load_tokenizer, tokenizer_at
from moe_train.data.tokenizers.tokenizer import Tokenizer, check_vocab
from moe_train.machine.host_memory import check_host_memory
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import Parameters, parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.quantize import quantized, unquantized
from moe_train.model.transformer import init_model
from moe_train.train.state import partition
from moe_train.weights import external, external_adapter, gguf
from moe_train.weights.arrays import Held


class Opened(NamedTuple):
    """A model that is ready to be loaded."""

    directory: Path
    run: config.Run | None
    """Where the directory is a run."""
    model: config.Model
    lora: config.Lora | None
    compute: config.Compute
    tokenizer: Tokenizer
    chat_template: str | None
    mesh: Mesh

    def load(self) -> tuple[Any, Parameters]:
        """(structure, weights, adapters included); `mesh` is in force."""
        structure, shapes = parameters(jax.eval_shape(lambda: init_model(0, self.model, self.compute, self.lora)))
        check_host_memory(shapes, str(self.directory))
        return structure, load_parameters(self.directory, shapes)

    def to_export(self) -> Held:
        """The weights, adapters included, of which those in other tools' files stay there (see `left_in_files`)."""
        _, shapes = parameters(jax.eval_shape(lambda: init_model(0, self.model, self.compute, self.lora)))
        return load_parameters(self.directory, shapes, load=left_in_files)


def open_model(directory: str | Path) -> Opened:
    """A run (its newest checkpoint) or another tool's model, on the devices that are here.

    Raises FileNotFoundError where there is no model or no tokenizer, ValueError where they do not go together.
    """
    run = read_run(directory) if is_run(directory) else None
    if run and run.lora and run.init_from and not Path(run.init_from).exists():
        raise FileNotFoundError(
            f"the adapters of {directory} belong to the weights in {run.init_from}, which {Path.cwd()} has not; "
            "bring them there, or go to where the run was started"
        )
    model = run.model if run else read_model(directory)
    tokenizer = load_tokenizer(find_tokenizer(directory))
    check_vocab(tokenizer, model.vocab_size)
    template = load_template(run.data.chat_template if run and isinstance(run.data, config.RunData) else None, tokenizer)
    compute = run.compute if run else compute_here()
    mesh = make_mesh(mesh_here(run, model))
    return Opened(Path(directory), run, model, run.lora if run else None, compute, tokenizer, template, mesh)


def read_model(directory: str | Path) -> config.Model:
    """The architecture of a run or of another tool's model."""
    return read_run(directory).model if is_run(directory) else external.read_model(directory)


def find_tokenizer(directory: str | Path) -> config.Tokenizer:
    """The tokenizer that a run was trained with, or that lies in a model's folder; that of a GGUF file is unpacked beside it.

    Raises FileNotFoundError where there is none.
    """
    if is_run(directory):
        with contextlib.suppress(FileNotFoundError):  # the run's own copy
            return tokenizer_at(Path(directory) / TOKENIZER)
        data = read_run(directory).data
        if isinstance(data, config.RunData):
            return data.tokenizer
    if Path(directory).is_dir():
        with contextlib.suppress(FileNotFoundError):
            return tokenizer_at(directory)
    if (gguf_file := gguf.file_in(directory)) is not None:
        return config.HuggingFaceTokenizer(name="huggingface", path=str(gguf.unpack_tokenizer(gguf_file)))
    raise FileNotFoundError(
        f"{directory} has no tokenizer.json, tekken.json or tokenizer.model; put the model's own there, or for training name it "
        "in data.tokenizer"
    )


def compute_here() -> config.Compute:
    """Number formats for a model that no run's config speaks for."""
    dtype: config.Dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return config.Compute(dtype=dtype, param_dtype=dtype)


def dtype_of_files(directory: str | Path, otherwise: config.Dtype) -> config.Dtype:
    """The dtype of another tool's weights, so that what is written from them unchanged keeps its bytes.

    otherwise: for one of our runs, and for files of several dtypes or of one that is not written here.
    """
    if is_run(directory):
        return otherwise
    return external.open_weights(directory).dtype or otherwise


def mesh_here(run: config.Run | None, model: config.Model) -> config.Mesh:
    """The run's mesh where its devices are here; otherwise all devices along `fsdp`."""
    devices = jax.device_count()
    if run is not None and math.prod(run.mesh.model_dump().values()) == devices:
        return run.mesh
    if model.model_dim % devices:
        raise ValueError(
            f"model_dim {model.model_dim} does not divide over the {devices} devices here; show the process fewer of them"
        )
    return config.Mesh(fsdp=devices)


def left_in_files(path: str | Path, abstract: Mapping[str, Any]) -> Held:
    """Another tool's model for an export, which asks for each matrix a few times: not in memory, however large it is.

    Several processes would each read all of it; they load their parts.
    """
    return (external.leave_parameters if jax.process_count() == 1 else external.load_parameters)(path, abstract)


@overload
def load_parameters(directory: str | Path, abstract: Mapping[str, Any], step: int | None = None) -> Parameters: ...
@overload
def load_parameters(
    directory: str | Path, abstract: Mapping[str, Any], step: int | None = None, *, load: Callable[..., Held]
) -> Held: ...
def load_parameters(
    directory: str | Path,
    abstract: Mapping[str, Any],
    step: int | None = None,
    *,
    load: Callable[..., Held] = external.load_parameters,
) -> Held:
    """All weights of a run or of another tool's model, as arrays of the shapes, dtypes and shardings of `abstract`.

    Of a run: what was trained from its newest checkpoint (or that of `step`), what was frozen from where it was
    loaded at first. load: what is done with another tool's model. Raises ValueError where that has changed since.
    """
    if not is_run(directory):
        return load(directory, abstract)
    run = read_run(directory)
    trainable, frozen = partition(dict(abstract), run.lora)

    def held(array: jax.Array, path: str, like: jax.ShapeDtypeStruct) -> Parameters:
        parts = {part: trainable[part] for part in (f"{path}.codes", f"{path}.scales") if part in trainable}
        return quantized({path: array.astype(like.dtype)}, parts)

    keep = {path: partial(held, path=path, like=like) for path, like in unquantized(trainable).items()}
    params, about = manager.load_params(directory, _trained_by(run), step, keep)
    if not frozen:
        return params
    assert about.base is not None
    check_base(about.base)
    return {**params, **load_parameters(about.base.source, frozen, about.base.step, load=load)}


def _trained_by(run: config.Run) -> dict[str, Any]:
    """The shapes of what a run trains, and so of what its checkpoints hold, on the mesh in force."""
    model, lora = run.model, run.lora and run.lora.model_copy(update={"quantize": None})
    return partition(parameters(jax.eval_shape(lambda: init_model(run.seed, model, run.compute, lora)))[1], lora)[0]


def read_adapter(source: str | Path, model: config.Model) -> config.Lora:
    """The section `lora` of the adapters of a run, or of another tool's files. Raises ValueError where they are another
    model's, FileNotFoundError where there are none."""
    if not is_run(source):
        return external_adapter.read_lora(source, model)
    run = read_run(source)
    if run.lora is None:
        raise ValueError(f"{source} is a run without adapters: it was trained in full")
    if run.model != model:
        raise ValueError(f"the adapters of {source} belong to a model of another architecture")
    return run.lora


def load_adapter(origin: Base, model: config.Model, abstract: Mapping[str, Any]) -> Parameters:
    """The adapters of a run or of another tool's files, and what was trained in full beside them, as arrays like
    `abstract`: its paths of `lora` as `read_adapter` has it, and no others."""
    theirs = read_adapter(origin.source, model)
    wanted = {path: like for path, like in abstract.items() if ParameterPath.parse(path).is_trained(theirs)}
    if is_run(origin.source):
        return manager.load_params(origin.source, wanted, origin.step)[0]
    return external_adapter.load_adapter(origin.source, model, wanted)
