"""Ollama's `Modelfile`: the file to load, the chat format, and the end of an answer.

Ollama renders chats with a Go template. One is written if the format is known (see chat_format). Otherwise it is left out, and
Ollama picks, among the templates that it ships, the one whose Jinja is most similar to that of the GGUF file. Format of the
file: https://docs.ollama.com/modelfile.
"""

from __future__ import annotations

from moe_train.weights.gguf.chat_format import ChatFormat, go_template


def modelfile(model: str, chat: ChatFormat | None) -> str:
    """Return the text of a Modelfile for the file `model` in the same folder; `chat` is None if the format is unknown."""
    lines = [f"FROM ./{model}"]
    if chat is None:
        lines.append("# The file has a chat template in Jinja; Ollama uses the most similar one of its own templates.")
    else:
        lines += [f'TEMPLATE """{go_template(chat)}"""', f'PARAMETER stop "{chat.end}"']
        if chat.user[0].strip().startswith("[INST]"):
            lines.append('PARAMETER stop "[INST]"')
    return "\n".join(lines) + "\n"
