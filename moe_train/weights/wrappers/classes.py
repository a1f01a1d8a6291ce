"""The table of multimodal classes of transformers around a text model that is trained here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_train import config

Encoder = Literal["pixtral", "whisper"]
"""The architecture of a tower."""

_OF_IMAGES = (
    *("text_config", "vision_config", "image_token_id", "image_token_index", "projector_hidden_act", "vision_feature_layer"),
    "multimodal_projector_bias",
)


@dataclass(frozen=True)
class WrapperClass:
    """One row of the table."""

    architecture: str
    """Class in transformers: the value of `architectures` in config.json."""
    model_type: str
    encoder: Encoder
    section: Literal["vision_config", "audio_config"]
    """Key of config.json that describes the tower."""
    tower_types: tuple[str, ...]
    """Values of the section's model_type that are supported, the default first."""
    texts: tuple[str, ...]
    """Values of text_config.model_type that are supported, if they are families with this layout."""
    keys: tuple[str, ...]
    """Keys of config.json that describe the other parts than the text model."""
    auto_class: str
    """The Auto class of transformers that loads it; AutoModelForCausalLM knows none of them."""
    parts: str
    """What surrounds the text model, for messages."""
    ties: Literal["whole", "either", "never"]
    """Which `tie_word_embeddings` transformers follows: that of the whole model if stated, or else of the text model; either of
    the two; or none, since the class has a head of its own."""

    def families(self) -> list[str]:
        """Return the families of text models that are supported."""
        return [name for name, family in config.FAMILIES.items() if name in self.texts and "hf" in family.formats]


WRAPPERS = {
    row.architecture: row
    for row in (
        WrapperClass(
            architecture="Mistral3ForConditionalGeneration",
            model_type="mistral3",
            encoder="pixtral",
            section="vision_config",
            tower_types=("pixtral",),
            texts=("mistral", "ministral3", "mistral4"),
            keys=(*_OF_IMAGES, "spatial_merge_size"),
            auto_class="AutoModelForImageTextToText",
            parts="vision tower and projector",
            ties="whole",
        ),
        WrapperClass(
            architecture="LlavaForConditionalGeneration",
            model_type="llava",
            encoder="pixtral",
            section="vision_config",
            tower_types=("pixtral",),
            texts=("mistral", "llama"),
            keys=(*_OF_IMAGES, "image_seq_length", "vision_feature_select_strategy", "ignore_index"),
            auto_class="AutoModelForImageTextToText",
            parts="vision tower and projector",
            ties="either",
        ),
        WrapperClass(
            architecture="VoxtralForConditionalGeneration",
            model_type="voxtral",
            encoder="whisper",
            section="audio_config",
            tower_types=("voxtral_encoder",),
            texts=("llama", "mistral"),
            keys=("text_config", "audio_config", "audio_token_id", "projector_hidden_act"),
            auto_class="AutoModelForMultimodalLM",
            parts="audio tower and projector",
            ties="never",
        ),
    )
}
"""The table by class. To add a class, add a row here, and the names and shapes of its tower to `weights.wrappers.towers`."""


def wrapper_of_type(model_type: object) -> WrapperClass | None:
    """Return the class with this model_type, by which the Auto classes of transformers decide; None if there is none."""
    return next((row for row in WRAPPERS.values() if row.model_type == model_type), None)
