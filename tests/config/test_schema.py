"""The shape of a config: a JSON schema that editors can use, and every key path that it allows."""

from __future__ import annotations

import json

from moe_train.config import Config
from moe_train.config.schema import json_schema, schema_of


def test_json_schema_is_of_the_config() -> None:
    schema = json_schema(Config)
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["$defs"]["Train"]["properties"]["batch_size"]["minimum"] == 1
    json.dumps(schema)


def test_key_paths_cover_lists_and_unions() -> None:
    keys = schema_of(Config).all_keys()
    assert {"optimizer.ns_steps", "data.train.0.record.column", "lora.targets.0.rank", "model.ffn.num_experts"} <= set(keys)
    assert len(keys) == len(set(keys))
