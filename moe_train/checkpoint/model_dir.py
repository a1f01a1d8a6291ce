"""Load a model from a directory, be it one of our runs or an external model, and find what a run takes from its initial model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast, overload

import jax
from jax.sharding import Mesh

from moe_train import config
from moe_train.checkpoint.identity import check_base, check_tower
from moe_train.checkpoint.initial_files import first_files
from moe_train.checkpoint.load_params import load_params
from moe_train.checkpoint.metadata import CheckpointMetadata, WeightOrigin, survey
from moe_train.checkpoint.runs import TOKENIZER_FOLDER, is_run, named_step, read_run, run_folder
from moe_train.checkpoint.trained_tower import trained_tower_paths
from moe_train.data.batches.media_batch import check_sizes
from moe_train.data.chat.conversation_to_tokens import load_template
from moe_train.data.records.media_parts import PICTURES, SOUND, MediaKind
from moe_train.data.sound.rules import SoundRules
from moe_train.data.tokenizers.load import load_tokenizer, tokenizer_at
from moe_train.data.tokenizers.tokenizer import Tokenizer, check_vocab
from moe_train.machine.host_memory import check_host_memory
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import Parameters, parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.quantize import quantize_like, unquantized_shapes
from moe_train.model.transformer import abstract_model
from moe_train.train.state import partition
from moe_train.weights import external, external_adapter, gguf
from moe_train.weights.arrays import Abstract, LazyParameters
from moe_train.weights.on_disk import FloatDtype


class LoadedWeights(NamedTuple):
    """Weights, and the checkpoint that they were read from."""

    weights: LazyParameters
    step: int | None
    """Step of the run's checkpoint; None for an external model."""
    about: CheckpointMetadata | None
    """Metadata of that checkpoint; None for an external model."""


class OpenedModel(NamedTuple):
    """A model that is ready to be loaded."""

    directory: Path
    """The directory."""
    run: config.Run | None
    """The record of the run; None if the directory holds an external model."""
    model: config.Model
    """The architecture."""
    lora: config.Lora | None
    """The adapters of the run; None if there are none."""
    compute: config.Compute
    tokenizer: Tokenizer
    chat_template: str | None
    """The chat template's text; None if there is none."""
    mesh: Mesh
    """The mesh to load the weights onto."""

    @property
    def encoder(self) -> config.Encoder | None:
        """The tower that the run was trained with, or that the external model has; None without one that is computed."""
        return self.run.encoder if self.run is not None else external.find_encoder(self.directory)

    def check_media(self, kind: MediaKind | None = None) -> None:
        """Raise ValueError if the model has no tower for pictures or sound, or one of other sizes than its tokenizer states.

        Args:
            kind: pictures or sound; None for what the tokenizer states sizes for.
        """
        if kind is None:
            kind = SOUND if isinstance(self.tokenizer.media, SoundRules) else PICTURES
        encoder = self.encoder
        if kind is SOUND and not isinstance(encoder, config.AudioEncoder):
            raise ValueError(
                f"{self.directory} has no audio tower that can be computed, so it hears no sound; name a multimodal model with "
                "an unquantized tower, or a run with a section audio"
            )
        if kind is PICTURES and not isinstance(encoder, config.VisionEncoder):
            raise ValueError(
                f"{self.directory} has no vision tower that can be computed, so it sees no pictures; name a multimodal model with "
                "an unquantized tower, or a run with a section vision"
            )
        assert encoder is not None
        check_sizes(encoder, self.tokenizer.media, self.directory)

    def load_with_tower(self) -> tuple[Any, Parameters, int | None]:
        """Load as `load_with_step` does, with the tower. The model has to have one (`encoder`)."""
        return self._load(self.lora, self.encoder)

    def load(self) -> tuple[Any, Parameters]:
        """Load the weights, adapters included; `mesh` has to be in force.

        Returns:
            The model's structure, and its weights.
        """
        structure, weights, _ = self.load_with_step()
        return structure, weights

    def load_with_step(self) -> tuple[Any, Parameters, int | None]:
        """Load as `load` does; returns the model's structure, its weights, and the step of a run's checkpoint they are from."""
        return self._load(None if self.lora is None else self.lora.of_text(), None)

    def _load(self, lora: config.Lora | None, encoder: config.Encoder | None) -> tuple[Any, Parameters, int | None]:
        """Load the parts of the model that the arguments describe."""
        # Only shapes are computed, so the seed does not matter.
        structure, shapes = parameters(abstract_model(self.model, self.compute, lora, encoder))
        check_host_memory(shapes, str(self.directory))
        loaded = load_weights(self.directory, shapes)
        return structure, cast(Parameters, loaded.weights), loaded.step  # the default loader reads all arrays

    def to_export(self) -> LoadedWeights:
        """Return the weights for an export, adapters included; weights of external files are read lazily (see `load_lazily`).

        Of a tower and its projector they have what training may have changed: the rest is carried as bytes.
        """
        encoder, names = trained_tower_paths(self.directory)
        _, shapes = parameters(abstract_model(self.model, self.compute, self.lora, encoder))
        for path in list(shapes):
            if ParameterPath.parse(path).is_tower and path not in names:
                del shapes[path]
        return load_weights(self.directory, shapes, load=load_lazily)


def open_model(directory: str | Path) -> OpenedModel:
    """Open a run (its named or else newest checkpoint) or an external model, on the available devices.

    Raises:
        FileNotFoundError: If there is no model or no tokenizer.
        ValueError: If the parts do not fit together.
    """
    run = read_run(directory) if is_run(directory) else None
    # The path is the one of the config, so it is relative to the folder where the run was started.
    if run and run.lora and run.init_from and not run_folder(run.init_from).exists():
        raise FileNotFoundError(
            f"the adapters of {directory} belong to the weights in {run.init_from}, which do not exist relative to {Path.cwd()}; "
            "copy them there, or change to the folder where the run was started"
        )
    model = run.model if run else read_model(directory)
    tokenizer = load_tokenizer(find_tokenizer_config(directory))
    if run:
        check_tokenizer_of_run(directory, run, tokenizer)
    check_vocab(tokenizer, model.vocab_size)
    chat_template = None
    if run and isinstance(run.data, config.RunData):
        chat_template = run.data.chat_template
    template = load_template(chat_template, tokenizer)
    compute = run.compute if run else default_compute()
    mesh = make_mesh(mesh_for_devices(run, model))
    return OpenedModel(Path(directory), run, model, run.lora if run else None, compute, tokenizer, template, mesh)


def read_model(directory: str | Path) -> config.Model:
    """Return the architecture of a run or of an external model."""
    if is_run(directory):
        return read_run(directory).model
    return external.read_external_model(directory)


def encoder_of(directory: str | Path) -> config.Encoder | None:
    """Return the tower of an external model, or of the one that a run started from; None without one that is computed."""
    if is_run(directory) and (encoder := read_run(directory).encoder) is not None:
        return encoder
    files = first_files(directory)
    return None if files is None else external.find_encoder(files)


def find_tokenizer_config(directory: str | Path) -> config.Tokenizer:
    """Find the tokenizer that a run was trained with, or that is in a model's folder; a GGUF file's is unpacked next to the file.

    Raises:
        FileNotFoundError: If there is none.
    """
    if is_run(directory):
        with contextlib.suppress(FileNotFoundError):  # prefer the run's own copy
            return tokenizer_at(run_folder(directory) / TOKENIZER_FOLDER)
        data = read_run(directory).data
        if isinstance(data, config.RunData):
            return data.tokenizer
    if Path(directory).is_dir():
        with contextlib.suppress(FileNotFoundError):
            return tokenizer_at(directory)
    gguf_file = gguf.file_in(directory)
    if gguf_file is not None:
        return config.HuggingFaceTokenizer(name="huggingface", path=str(gguf.unpack_tokenizer(gguf_file)))
    raise FileNotFoundError(
        f"{directory} has no tokenizer.json, tekken.json or tokenizer.model; copy the model's own there, or name it in "
        "data.tokenizer for training"
    )


def check_tokenizer_of_run(directory: str | Path, run: config.Run, tokenizer: Tokenizer) -> None:
    """Raise ValueError if the tokenizer that belongs to a run has changed since its checkpoint was saved."""
    step = named_step(directory)
    readable = survey(run_folder(directory)).readable
    saved = readable.get(step) if step is not None else next(iter(readable.values()), None)
    # Earlier versions recorded no identity.
    if saved is None or saved.about.tokenizer in (None, tokenizer.identity):
        return
    original = run.data.tokenizer.path if isinstance(run.data, config.RunData) else "its original folder"
    raise ValueError(
        f"{tokenizer.files[0].parent} is not the tokenizer that {directory} was trained with: its files have changed; copy them "
        f"again from {original}, or remove {run_folder(directory) / TOKENIZER_FOLDER} to use that"
    )


def default_compute() -> config.Compute:
    """Return the compute settings for a model that no run's config describes: float32 on CPUs, bfloat16 otherwise."""
    dtype: config.Dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return config.Compute(dtype=dtype, param_dtype=dtype)


def dtype_of_files(directory: str | Path, otherwise: FloatDtype) -> FloatDtype:
    """Return the dtype of an external model's weights, so that unchanged weights keep their bytes when they are written again.

    Args:
        directory: A run or an external model.
        otherwise: The result for a run, and for files with several dtypes or a dtype that this package does not write.
    """
    if is_run(directory):
        return otherwise
    return external.open_external_weights(directory).dtype or otherwise


def mesh_for_devices(run: config.Run | None, model: config.Model) -> config.Mesh:
    """Return the run's mesh if it fits the number of available devices; otherwise all devices along `fsdp`.

    Args:
        run: The record of a run; None for an external model.
        model: The architecture.

    Raises:
        ValueError: If model_dim does not divide over the devices.
    """
    devices = jax.device_count()
    if run is not None and math.prod(run.mesh.model_dump().values()) == devices:
        return run.mesh
    if model.model_dim % devices:
        raise ValueError(
            f"model_dim {model.model_dim} is not divisible by the {devices} available devices; make fewer of them visible"
        )
    return config.Mesh(fsdp=devices)


def load_lazily(path: str | Path, abstract: Abstract) -> LazyParameters:
    """Open an external model for an export as lazy weights, which stay in their files and are read matrix by matrix.

    An export asks for each matrix a few times, so memory does not grow with the model. With several processes, each would read
    all of the model; there every process loads its shards instead.

    Args:
        path: The external model.
        abstract: Shapes, dtypes and shardings of the weights.
    """
    if jax.process_count() == 1:
        return external.open_external_lazily(path, abstract)
    return external.load_external_parameters(path, abstract)


@overload
def load_parameters(directory: str | Path, abstract: Mapping[str, Any], step: int | None = None) -> Parameters: ...
@overload
def load_parameters(
    directory: str | Path, abstract: Mapping[str, Any], step: int | None = None, *, load: Callable[..., LazyParameters]
) -> LazyParameters: ...
def load_parameters(
    directory: str | Path,
    abstract: Mapping[str, Any],
    step: int | None = None,
    *,
    load: Callable[..., LazyParameters] = external.load_external_parameters,
) -> LazyParameters:
    """Load all weights of a run or of an external model.

    For a run, trained weights come from its checkpoint, and frozen weights from where the run loaded them at first.

    Args:
        directory: The run or model.
        abstract: Shapes, dtypes and shardings of the result.
        step: The step of the run's checkpoint; None for the one that the directory names, or else the newest that can be read.
        load: The function that loads an external model.

    Raises:
        ValueError: If the frozen weights have changed since the run started.
    """
    return load_weights(directory, abstract, step, load=load).weights


def load_weights(
    directory: str | Path,
    abstract: Mapping[str, Any],
    step: int | None = None,
    *,
    load: Callable[..., LazyParameters] = external.load_external_parameters,
) -> LoadedWeights:
    """Load weights as `load_parameters` does; returns them with the checkpoint that they were read from."""
    if not is_run(directory):
        return LoadedWeights(load(directory, abstract), None, None)
    run = read_run(directory)
    trainable, frozen = partition(dict(abstract), run.lora, run.trained_tower)

    # Checkpoints hold unquantized weights; each part is quantized as soon as it is read if `abstract` asks for it.
    def convert(array: jax.Array, path: str, like: jax.ShapeDtypeStruct) -> Parameters:
        """Convert a part of a stored array to the dtype, or to the quantized values, of `abstract`."""
        parts = {part: trainable[part] for part in (f"{path}.codes", f"{path}.scales") if part in trainable}
        return quantize_like({path: array.astype(like.dtype)}, parts)

    converters = {path: partial(convert, path=path, like=like) for path, like in unquantized_shapes(trainable).items()}
    if step is None:
        step = named_step(directory)
    # With the shapes of all arrays, even if `converters` reads a few: bit sums are stored in their order, without names.
    params, about, loaded_step = load_params(run_folder(directory), _trained_shapes(run), step, converters)
    if not frozen:
        return LoadedWeights(params, loaded_step, about)
    if about.base is None:
        raise ValueError(f"{directory} has frozen weights, but its checkpoint does not state where they came from; start a new run")
    # All of a run's checkpoint is one base; in other files the text model and the tower are checked apart.
    tower = [path for path in frozen if ParameterPath.parse(path).is_tower]
    if len(tower) < len(frozen) or about.base.step is not None:
        check_base(about.base)
    if tower:
        check_tower(about.base)
    # The base may itself be a run, whose frozen weights have a base of their own: hence the recursion.
    base_weights = load_parameters(about.base.source, frozen, about.base.step, load=load)
    return LoadedWeights({**params, **base_weights}, loaded_step, about)


def _trained_shapes(run: config.Run) -> dict[str, Any]:
    """Return the shapes of what a run trains, which is what its checkpoints hold, on the mesh in force."""
    # Checkpoints hold unquantized weights, also where the run trains on a quantized base.
    lora = run.lora and run.lora.model_copy(update={"quantize": None})
    _, shapes = parameters(abstract_model(run.model, run.compute, lora, run.encoder))
    trainable, _ = partition(shapes, lora, run.trained_tower)
    return trainable


def read_adapter(source: str | Path, model: config.Model, encoder: config.Encoder | None = None) -> config.Lora:
    """Return the `lora` section of the adapters of a run or of external files.

    Args:
        source: A run, or a folder of external adapter files.
        model: The architecture that the adapters have to fit.
        encoder: The tower that they may adapt; None to refuse adapters of one.

    Raises:
        ValueError: If the adapters belong to another model, or the run has none.
        FileNotFoundError: If there are no adapters.
    """
    if not is_run(source):
        return external_adapter.read_external_lora(source, model, encoder)
    run = read_run(source)
    if run.lora is None:
        raise ValueError(f"{source} is a run without adapters: it was trained in full; name a run with a section `lora`")
    if run.model != model:
        raise ValueError(f"the adapters of {source} belong to a model of another architecture; name the base they were trained on")
    if run.lora.trains_tower and encoder is None:
        raise ValueError(
            f"the adapters of {source} include modules of a tower, which only a multimodal base has; name that base, or "
            "export the run with --merge, and use the merged model"
        )
    return run.lora


def load_adapter(
    origin: WeightOrigin, model: config.Model, abstract: Mapping[str, Any], encoder: config.Encoder | None = None
) -> Parameters:
    """Load adapters, and the weights that were trained in full with them, from a run or from external files.

    Args:
        origin: Where the adapters are.
        model: The architecture.
        abstract: Shapes, dtypes and shardings of the arrays.
        encoder: The tower that they may adapt; None to refuse adapters of one.

    Returns:
        The arrays of `abstract` whose paths are trained by the `lora` section that `read_adapter` returns, and no others.
    """
    lora = read_adapter(origin.source, model, encoder)
    trained_shapes = {path: like for path, like in abstract.items() if ParameterPath.parse(path).is_trained(lora)}
    if is_run(origin.source):
        # The recorded step takes precedence, since the run may have newer checkpoints by now.
        step = named_step(origin.source) if origin.step is None else origin.step
        return load_params(run_folder(origin.source), trained_shapes, step).params
    return external_adapter.load_external_adapter(origin.source, model, trained_shapes, encoder)
