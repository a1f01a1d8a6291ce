"""Read rotary positions and the scaling of queries from a config.json."""

from __future__ import annotations

from typing import Any

from moe_train.machine.files import JsonObject

_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def rope_section(fields: JsonObject) -> JsonObject:
    """Return the section of rotary positions: `rope_parameters`, or `rope_scaling` in files of transformers 4.

    Raises:
        ValueError: it is no object, or a file has both, and they differ. transformers would read `rope_scaling` alone.
    """
    sections: list[JsonObject] = []
    for key in ("rope_scaling", "rope_parameters"):
        section = fields.get(key)
        if section is not None and not isinstance(section, dict):
            raise ValueError(f"{key} is {section!r}; it has to be an object")
        if section:
            # Older files call the type of rotary positions `type`.
            kind = section.get("rope_type", section.get("type", "default"))
            theta = section.get("rope_theta", fields.get("rope_theta"))
            without_type = {name: value for name, value in section.items() if name != "type"}
            sections.append({**without_type, "rope_type": kind, "rope_theta": theta})
    if len(sections) < 2:
        return sections[0] if sections else {}
    scaling, parameters = sections
    for key in sorted(scaling.keys() | parameters.keys()):
        if scaling.get(key) != parameters.get(key):
            raise ValueError(
                f"{key} is {scaling.get(key)!r} in rope_scaling and {parameters.get(key)!r} in rope_parameters; remove one of them"
            )
    return scaling


def read_rope(fields: JsonObject, section: JsonObject) -> tuple[JsonObject, JsonObject | None]:
    """Return the sections `rope` and `attention.query_scaling` of a model; the second is None without scaled queries.

    Args:
        fields: the whole config.json, which may state `rope_theta` on its own.
        section: rotary positions, as `rope_section` returns them.

    Raises:
        ValueError: they are not supported.
    """
    kind = section.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise ValueError(f"rope_type is {kind!r}; supported: default, yarn")
    theta = fields.get("rope_theta") if section.get("rope_theta") is None else section["rope_theta"]
    if theta is None:
        raise ValueError("rope_theta is stated neither on its own nor in rope_parameters; add it")
    known_keys = {"rope_type", "rope_theta", "partial_rotary_factor", "llama_4_scaling_beta", "max_position_embeddings"}
    known_keys.add("original_max_position_embeddings")
    if kind == "yarn":
        known_keys.update(_YARN)
    if unknown := sorted(set(section) - known_keys):
        raise ValueError(f"rope_parameters.{unknown[0]} is not implemented; supported: {', '.join(sorted(known_keys))}")
    if section.get("partial_rotary_factor", 1) != 1:
        factor = section["partial_rotary_factor"]
        raise ValueError(f"rope_parameters.partial_rotary_factor is {factor}, which is not implemented; it has to be 1")
    original = section.get("original_max_position_embeddings")
    scaling = None
    if beta := section.get("llama_4_scaling_beta"):
        scaling = {"beta": _number("llama_4_scaling_beta", beta), "original_max_seq_len": original}
    if kind == "default":
        return {"name": "default", "theta": _number("rope_theta", theta)}, scaling
    if missing := [key for key in _YARN[:2] if key not in section]:
        raise ValueError(f"rope_parameters.{missing[0]} is missing, which yarn requires; add it")
    yarn: JsonObject = {}
    for key in _YARN:
        if key in section and key != "original_max_position_embeddings":
            yarn[key] = _number(key, section[key])
    # Unless both are stated, transformers uses 0.1 * log(factor) + 1, which mscale 1 over mscale_all_dim 0 gives too.
    if not (section.get("mscale") and section.get("mscale_all_dim")):
        yarn |= {"mscale": 0.0, "mscale_all_dim": 0.0}
    return {"name": "yarn", "theta": _number("rope_theta", theta), **yarn, "original_max_seq_len": original}, scaling


def _number(key: str, value: Any) -> float:
    """Return a number of the section. Raises ValueError if it is none, such as text that looks like one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {value!r}; it has to be a number")
    return float(value)
