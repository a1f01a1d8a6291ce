"""Read the chat template from the files next to a `tokenizer.json`."""

from __future__ import annotations

from pathlib import Path

from moe_train.machine.files import JsonObject

ADDITIONAL_TEMPLATES = "additional_chat_templates"
"""Name of the folder next to tokenizer.json with further chat templates, such as `tool_use.jinja`."""


def template_beside(directory: Path, settings: JsonObject) -> str | None:
    """Return the text of the chat template; None if there is none.

    Like transformers, `chat_template.jinja` and the templates in `additional_chat_templates` come before those of
    tokenizer_config.json, which has one, or a list of them with names. Of several, transformers renders the one named `tool_use`
    if there are tools, and the one named `default` otherwise; here both become one template that decides the same way.
    """
    templates: dict[str, str] = {}
    stated = settings.get("chat_template")
    if isinstance(stated, list):
        for entry in stated:
            if isinstance(entry, dict) and "name" in entry:
                templates[entry["name"]] = entry["template"]
    elif isinstance(stated, str):
        templates["default"] = stated
    file = directory / "chat_template.jinja"
    if file.is_file():
        templates = {"default": file.read_text(encoding="utf-8")}
    templates |= {path.stem: path.read_text(encoding="utf-8") for path in additional_templates(directory)}
    if "tool_use" not in templates:
        return templates.get("default")
    refusal = "{{ raise_exception('there is no chat template for conversations without tools') }}"
    # The signs + keep white space as it stands; a newline at the very end of a template is never written.
    tool_use, default = (templates.get(name, refusal).removesuffix("\n") for name in ("tool_use", "default"))
    return "{%+ if tools +%}" + tool_use + "{%+ else +%}" + default + "{%+ endif +%}"


def additional_templates(directory: Path) -> list[Path]:
    """Return the files of chat templates with names, in order."""
    return sorted((directory / ADDITIONAL_TEMPLATES).glob("*.jinja"))
