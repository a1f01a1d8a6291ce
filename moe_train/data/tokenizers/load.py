"""Load the tokenizer of a config section, and find the section that fits the files in a folder."""

from __future__ import annotations

from pathlib import Path

from moe_train import config
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral


def load_tokenizer(section: config.Tokenizer) -> HuggingFace | Mistral:
    """Load the tokenizer that a config section names, from local files, never from the network.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If the files cannot be used.
    """
    match section:
        case config.HuggingFaceTokenizer():
            return HuggingFace(section.path, section.longest_stretch)
        case config.MistralTokenizer():
            return Mistral(section.path, section.longest_stretch)


def tokenizer_at(path: str | Path) -> config.Tokenizer:
    """Return the config section for the tokenizer at `path`, a folder or a file.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    if (path / "tokenizer.json").is_file() or path.name == "tokenizer.json":
        return config.HuggingFaceTokenizer(name="huggingface", path=str(path))
    if (path / "tekken.json").is_file():
        return config.MistralTokenizer(name="mistral", path=str(path / "tekken.json"))
    if path.is_file() or any((*path.glob("tekken*.json"), *path.glob("*.model*"))):
        return config.MistralTokenizer(name="mistral", path=str(path))
    raise FileNotFoundError(f"no tokenizer at {path}; give a folder with tokenizer.json, a tekken.json or a tokenizer.model.v*")
