"""Features can be stored only of a tower that nothing trains."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train import config
from tests.run.tiny_config import written

STORED = config.StoredFeatures(name="stored")
PROJECTOR = config.Lora(targets=(config.LoraTarget(modules=("vision.projector.*",), rank=2, alpha=2.0),))


@pytest.mark.parametrize(
    ("sections", "pattern"),
    [
        ({"vision": config.Vision(features=STORED, train=("vision.projector.*",))}, "vision.projector"),
        ({"audio": config.Audio(features=STORED, train=("audio.tower.*",))}, "audio.tower"),
        ({"vision": config.Vision(features=STORED), "lora": PROJECTOR}, "vision.projector"),
    ],
)
def test_features_of_a_trained_tower_are_not_stored(sections: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=rf"features are stored, and '{pattern}\.\*' trains what they come from.*computed"):
        written(init_from="base", **{key: section.model_dump(mode="json") for key, section in sections.items()})
