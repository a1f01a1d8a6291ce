"""What an export has in addition to its weights: tokenizer, config, training conversations, and where it comes from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from moe_train import config
from moe_train.checkpoint.model_dir import LoadedWeights, OpenedModel
from moe_train.checkpoint.runs import run_folder, saved_config
from moe_train.commands.base_of_adapter import summary_of_hashes
from moe_train.config import yaml_file
from moe_train.data.pictures.read import open_picture
from moe_train.data.records.answers import judged_conversations
from moe_train.data.records.conversation import normalise
from moe_train.data.records.media import locate_media, references_of
from moe_train.data.records.media_parts import PICTURES
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.open_source import open_source
from moe_train.machine.files import JsonObject
from moe_train.weights.texts import Texts

log = logging.getLogger(__name__)

MAX_CONVERSATIONS = 32
"""Number of conversations of the training data whose tokens are compared."""


class Origin(NamedTuple):
    """What an export writes and records in addition to the weights."""

    texts: Texts
    conversations: list[Conversation]
    about: JsonObject


def origin_of(opened: OpenedModel, loaded: LoadedWeights) -> Origin:
    """Return the tokenizer, config, conversations and origin of a run or an external model."""
    run = opened.run
    if run is None:
        return Origin(Texts(opened.tokenizer, opened.chat_template), [], _about(opened, loaded))
    texts = Texts(opened.tokenizer, opened.chat_template, _config_text(opened, loaded))
    return Origin(texts, list(islice(_conversations(run), MAX_CONVERSATIONS)), _about(opened, loaded))


def _config_text(opened: OpenedModel, loaded: LoadedWeights) -> str:
    """Return the config that the loaded checkpoint was saved with, as YAML."""
    assert loaded.about is not None  # only called for runs
    return yaml_file.dump(config.run_of(saved_config(opened.directory, loaded.about)).to_config())


def _about(opened: OpenedModel, loaded: LoadedWeights) -> JsonObject:
    """Return what the record states about the origin of the weights: the checkpoint that they were read from."""
    about = loaded.about
    if opened.run is None or about is None:
        return {"source": str(opened.directory)}
    origin: JsonObject = {"source": str(run_folder(opened.directory))}
    origin |= {"run": opened.run.name, "step": loaded.step, "data_sha256": about.data, "manifest_sha256": about.manifest}
    # Of the same text that is written as the export's config.
    origin["config_sha256"] = hashlib.sha256(_config_text(opened, loaded).encode()).hexdigest()
    if about.base is not None:
        origin["base"] = {
            "source": about.base.source,
            "step": about.base.step,
            "sha256": summary_of_hashes(about.base.hashes),
        }
    return origin


def _conversations(run: config.Run) -> Iterator[Conversation]:
    """Yield the conversations of the training data that are in local files."""
    # The comparison is an extra check, so data that are elsewhere or gone do not stop an export.
    for source in run.data.train if isinstance(run.data, config.RunData) else ():
        if not isinstance(source, config.FileSource) or isinstance(source.record, config.TextRecord):
            continue
        try:
            records = open_source(source)
            for origin, fields in records:
                normal = normalise(fields, source.record)
                locate_media(normal, records.folder(origin.place))
                for conversation in judged_conversations(normal):
                    for reference in references_of(conversation.messages, PICTURES):
                        open_picture(reference)
                    yield conversation
        except (FileNotFoundError, ValueError) as error:
            log.warning("training conversations of one source cannot be read, so the export is not compared on them: %s", error)
