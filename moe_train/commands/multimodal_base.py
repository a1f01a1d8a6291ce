"""What becomes of the tower and projector of a multimodal base in an export: carried, or left out on request."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_train import config
from moe_train.checkpoint.initial_files import carried_of, first_files, first_path
from moe_train.checkpoint.metadata import CheckpointMetadata
from moe_train.checkpoint.model_dir import LoadedWeights, OpenedModel
from moe_train.checkpoint.runs import is_run, read_run
from moe_train.commands.left_out import report_left_out
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import JsonObject
from moe_train.model.paths import ParameterPath
from moe_train.proof import expected
from moe_train.weights import external, gguf, together
from moe_train.weights.arrays import LazyParameters
from moe_train.weights.on_disk import Carried
from moe_train.weights.wrappers import trained_tower
from moe_train.weights.wrappers.carry import Wrapping, WrappingLayout, carry

log = logging.getLogger(__name__)


class TextOfExport(NamedTuple):
    """The parts of an export that the carried files have to agree with."""

    model: config.Model
    tokenizer: Tokenizer | None
    chat_template: str | None


class TrainedTower(NamedTuple):
    """What was trained of a tower and its projector."""

    weights: LazyParameters
    """Weights by path, with the adapters and what these adapt."""
    lora: config.Lora | None
    dtype: np.dtype
    """Dtype of the trained tensors in the export."""


class PartsOfExport(NamedTuple):
    """What a whole model has of a multimodal base besides the text model; all empty for a text model."""

    wrapping: Wrapping | None
    mmproj: Path | None
    """llama.cpp's file of the tower, to be copied."""
    about: JsonObject
    """Entries of the record."""


def parts_of_export(
    opened: OpenedModel, loaded: LoadedWeights, layout: expected.ModelLayout, dtype: str, text_only: bool
) -> PartsOfExport:
    """Return what an export carries of the multimodal model that a run started from, or of the model itself; says so in a line.

    Args:
        opened: the run or the model.
        loaded: its weights, those of a trained tower included.
        layout: layout of the export.
        dtype: dtype of the export, which trained tensors of the tower have.
        text_only: whether the text model is exported alone.

    Raises:
        ValueError, FileNotFoundError: see `find_wrapping`.
    """
    source = opened.directory
    weights_of_tower = trained_tower.tower_weights(loaded.weights)
    if jax.process_count() > 1:
        # The first process alone writes what is carried in Mistral's own layout.
        weights_of_tower = together.gather_on_each_process(weights_of_tower)
    if layout == "gguf":
        if text_only:
            raise ValueError("--text-only has no effect with --format gguf, which always has the text model alone; leave it out")
        mmproj = find_mmproj(source, bool(weights_of_tower) or _trains_embeddings(opened))
        return PartsOfExport(None, mmproj.file, mmproj.to_json())
    tower = trained_tower_of(weights_of_tower, opened.lora, dtype)
    text = TextOfExport(opened.model, opened.tokenizer, opened.chat_template)
    wrapping = find_wrapping(source, layout, text, loaded.about, text_only, tower)
    lost: JsonObject = {}
    if text_only:
        lost = report_left_out(source, "--text-only exports the text model alone")
    return PartsOfExport(wrapping, None, lost)


def trained_tower_of(weights: LazyParameters, lora: config.Lora | None, dtype: str) -> TrainedTower | None:
    """Return what was trained of a tower among `weights`; None for nothing.

    Args:
        weights: weights by path, with the adapters and what these adapt.
        lora: the section of the adapters.
        dtype: dtype of the export.
    """
    of_tower = trained_tower.tower_weights(weights)
    if not of_tower:
        return None
    # Tensors of a tower are no linear maps of the text model, which alone become FP8.
    return TrainedTower(of_tower, lora, jnp.dtype("bfloat16" if dtype == "fp8" else dtype))


def _trains_embeddings(opened: OpenedModel) -> bool:
    """Return whether the embeddings of an export may differ from those of the files that training started from."""
    if opened.run is None:
        return False
    if opened.lora is None:
        return True
    return ParameterPath.parse("embed.weight").is_trained(opened.lora) or bool(opened.lora.targets_of("embed"))


def find_wrapping(
    source: str | Path,
    layout: WrappingLayout,
    text: TextOfExport,
    about: CheckpointMetadata | None,
    text_only: bool,
    tower: TrainedTower | None = None,
) -> Wrapping | None:
    """Return what an export of `source` carries of the multimodal model that it started from; says so in a line.

    Args:
        source: a run or an external model.
        layout: layout of the export.
        text: the text model and texts of the export.
        about: metadata of the run's checkpoint; None for an external model.
        text_only: whether the text model is exported alone.
        tower: what was trained of the tower and projector; None for nothing.

    Returns:
        The wrapping; None for a text model, or if `text_only` is set.

    Raises:
        ValueError: `text_only` has no effect, the layout cannot express the tower, or the tower has changed since the run started.
        FileNotFoundError: the base is no longer there.
    """
    recorded = about.base.carried if about is not None and about.base is not None else {}
    carried = carried_of(source)
    if text_only:
        if carried is None and not recorded:
            raise ValueError(f"--text-only has no effect: {source} is a text model without a tower; leave it out")
        return None
    if recorded:
        _check_recorded(source, carried, recorded)
    if carried is None:
        return None
    files = first_path(source)
    assert files is not None  # `carried` was found there
    description = carried.description
    if tower is not None:
        carried = trained_tower.with_trained(carried, text.model, tower.weights, tower.lora, tower.dtype)
    wrapping = carry(files, carried, layout, text.model, text.tokenizer, text.chat_template)
    trained = len(trained_tower.trained_names(carried.tensors))
    if trained:
        log.info("%d tensors of the %s are written as trained, the others unchanged", trained, description)
    else:
        log.info("%s of %s are carried into the export unchanged; --text-only leaves them out", description, files)
    return wrapping


def _check_recorded(source: str | Path, carried: Carried | None, recorded: Mapping[str, str]) -> None:
    """Raise an error unless the tower is still the one of the run's start."""
    files = first_path(source)
    if files is None or not files.exists():
        raise FileNotFoundError(
            f"{source} started from the multimodal model {files}, whose tower and projector ({len(recorded)} tensors) belong into "
            "the export, but it does not exist here; copy it there, or export the text model alone with --text-only"
        )
    current = {} if carried is None else external.hash_carried(files)
    changed = sorted(name for name in {*current, *recorded} if current.get(name) != recorded.get(name))
    if changed:
        raise ValueError(
            f"the tower and projector in {files} have changed since {source} was started ({len(changed)} tensors, the first "
            f"{changed[0]}); restore the original files, or export the text model alone with --text-only"
        )


class Mmproj(NamedTuple):
    """Where llama.cpp gets the tower of a GGUF export from."""

    file: Path | None
    """The base's own file, which is copied; None if there is none that fits."""
    command: str | None
    """The command that makes the file; None if `file` is copied, or for a text model."""

    def to_json(self) -> JsonObject:
        """Return the entry `mmproj` of the export's record; {} for a text model."""
        if self.file is not None:
            return {"mmproj": {"source": str(self.file), "file": self.file.name}}
        return {} if self.command is None else {"mmproj": {"command": self.command}}


def find_mmproj(source: str | Path, trains_embeddings: bool) -> Mmproj:
    """Find the mmproj file in which llama.cpp keeps the tower of a base; says in a line where it comes from.

    Args:
        source: a run or an external model.
        trains_embeddings: whether the embeddings may differ from the base's; the file of a vision tower has a row of them.
    """
    files = first_files(source)
    carried = carried_of(source)
    candidates = [] if files is None or not files.is_dir() else _mmproj_files(files)
    if len(candidates) == 1 and not trains_embeddings:
        (file,) = candidates
        log.info("%s of the base is carried into the export, for llama-server --mmproj %s", file.name, file.name)
        return Mmproj(file, None)
    if carried is None:
        return Mmproj(None, None)
    script = "python convert_hf_to_gguf.py HF_EXPORT --mmproj --outfile mmproj-model.gguf"
    merge = " --merge" if is_run(source) and read_run(source).lora else ""
    command = f"moe-train export {shlex.quote(str(source))} HF_EXPORT{merge} && {script}"
    log.info("the GGUF file has the text model alone; the %s go into a file of their own: %s", carried.parts, command)
    return Mmproj(None, command)


def _mmproj_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.gguf")) if gguf.is_mmproj(file)]
