"""Name the key and the value of a config.json for which its fields describe no model."""

from __future__ import annotations

from pydantic import ValidationError

_KEYS = {
    "vocab_size": "vocab_size",
    "model_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "experts_per_token": "num_experts_per_tok",
    "theta": "rope_theta",
}
"""Keys of config.json by the fields that a model reads them into, where the two have one value."""


def first_problem(error: ValidationError) -> str:
    """Return the first reason why fields are no model, with the value, and the key of config.json where that is known."""
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"])
    message = first["msg"].replace("Value error, ", "")
    key = _KEYS.get(str(first["loc"][-1])) if first["loc"] else None
    if key is not None and not isinstance(first["input"], dict):
        return f"{key} is {first['input']!r}: {message}"
    return ": ".join(part for part in (location, message) if part)
