"""Load a run or an external model as an object that can be called, for programs that use this package as a library."""

from __future__ import annotations

from pathlib import Path

from moe_train.checkpoint.model_dir import find_tokenizer_config, open_model
from moe_train.data.tokenizers import load
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.mesh import use_default_mesh
from moe_train.model.parameters import combine
from moe_train.model.transformer import Transformer


def load_model(directory: str | Path) -> Transformer:
    """Load a model with its weights, adapters included, onto the mesh in force.

        model = moe_train.load_model("mixtral-8x7b")
        hidden, routers = model(tokens)
        logits = model.logits(hidden)

    Args:
        directory: A run of this package (its newest checkpoint, or the one that `RUN@STEP` or `RUN@best` names), or a model in
            any supported layout.

    Returns:
        The model. Without a mesh in force, it is on a mesh of one device, which then stays in force.

    Raises:
        FileNotFoundError: If there is no model or no tokenizer.
        ValueError: If the files do not fit together.
    """
    use_default_mesh()
    structure, weights = open_model(directory).load()
    return combine(structure, weights)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Load the tokenizer that a run was trained with, or that is in a model's folder.

        ids = moe_train.load_tokenizer("mixtral-8x7b").encode("Hello")

    Args:
        directory: A run or an external model.

    Returns:
        The tokenizer; `encode` converts a text to ids and `decode` ids to a text.

    Raises:
        FileNotFoundError: If there is none.
    """
    return load.load_tokenizer(find_tokenizer_config(directory))
