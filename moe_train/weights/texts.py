"""The files of an export that hold no weights: tokenizer, chat template, the run's config, and documents about the model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from moe_train.data.tokenizers.template_files import ADDITIONAL_TEMPLATES
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.weights import mistral


class Texts(NamedTuple):
    """What an export contains besides weights."""

    tokenizer: Tokenizer | None = None
    """The tokenizer, whose files are copied byte for byte; None for an export without one."""
    chat_template: str | None = None
    """Template that replaces the tokenizer's own; None to keep that."""
    config: str | None = None
    """The resolved config of the run, kept as `moe_train.yaml`; None for a model without a run."""
    documents: Mapping[str, str] = MappingProxyType({})
    """File name -> text, such as a model card."""


NO_TEXTS = Texts()


def write_texts(directory: Path, texts: Texts) -> None:
    """Write tokenizer, chat template and the run's config under the names that other tools, and this one, look for."""
    for file in texts.tokenizer.files if texts.tokenizer else ():
        if file.parent.name == ADDITIONAL_TEMPLATES:
            if texts.chat_template is None:  # otherwise one template replaces all
                (directory / ADDITIONAL_TEMPLATES).mkdir(exist_ok=True)
                shutil.copyfile(file, directory / ADDITIONAL_TEMPLATES / file.name)
        else:
            shutil.copyfile(file, directory / mistral.tokenizer_file_name(file))
    if texts.chat_template is not None:
        (directory / "chat_template.jinja").write_text(texts.chat_template, encoding="utf-8")
    if texts.config is not None:
        (directory / "moe_train.yaml").write_text(texts.config, encoding="utf-8")
    for name, text in texts.documents.items():
        (directory / name).write_text(text, encoding="utf-8")
