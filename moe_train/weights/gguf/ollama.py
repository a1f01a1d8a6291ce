"""Ollama's `Modelfile`: which file, how a chat is spelled, where an answer ends.

Ollama spells chats with a Go template. One is written where the format is known (see chat_format); otherwise it is left
out, and Ollama takes, of the templates that it brings, the one whose Jinja looks most like that of the GGUF file.
Format of the file: https://docs.ollama.com/modelfile.
"""

from __future__ import annotations

from moe_train.weights.gguf.chat_format import Format, go


def modelfile(model: str, chat: Format | None) -> str:
    """The text of a Modelfile beside the file `model`."""
    lines = [f"FROM ./{model}"]
    if chat is None:
        lines.append("# The chat template is the one in the file, in Jinja; Ollama takes that of its own which is most like it.")
    else:
        lines += [f'TEMPLATE """{go(chat)}"""', f'PARAMETER stop "{chat.end}"']
        if chat.user[0].strip().startswith("[INST]"):
            lines.append('PARAMETER stop "[INST]"')
    return "\n".join(lines) + "\n"
