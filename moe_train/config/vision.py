"""Vision: the tower and projector through which pictures of records become inputs of the transformer."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from moe_train.config.section import NonNegative, Positive, PositiveFloat, Section
from moe_train.config.tower_features import ComputedFeatures, TowerFeatures


class VisionEncoder(Section):
    """A Pixtral vision tower (arXiv:2410.07073) and the projector to the width of the text model."""

    media: ClassVar[str] = "pictures"
    """What the tower takes, for messages."""

    tower_dim: Positive
    """Width of the tower's hidden states (`hidden_size`)."""
    ffn_dim: Positive
    """Width of the hidden layer of each SwiGLU of the tower (`intermediate_size`)."""
    num_layers: Positive
    """Number of layers of the tower."""
    num_heads: Positive
    """Number of attention heads of the tower; each has tower_dim / num_heads dims, a multiple of 4."""
    patch_size: Positive
    """Side of a patch in pixels."""
    max_image_size: Positive
    """Longest side of a picture in pixels; larger pictures are shrunk to it."""
    theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies, which rows and columns of patches share."""
    activation: Literal["silu", "gelu"] = "silu"
    """Activation of the tower's feed-forward layers; silu in all releases of Mistral."""
    merge_size: NonNegative = 0
    """Patches along each side of a square that is merged to one token; 0 for a projector without a merger."""
    projector_norm: bool = False
    """Whether the projector begins with an RMSNorm."""
    projector_norm_eps: PositiveFloat = 1e-5
    """Constant added to the mean square in that norm."""
    projector_bias: bool = False
    """Whether the two linear maps of the projector have biases."""

    @property
    def cell_size(self) -> int:
        """Patches along each side of the square that becomes one token."""
        return max(1, self.merge_size)

    @property
    def patches_per_token(self) -> int:
        """Patches that become one token."""
        return self.cell_size**2

    @property
    def patch_values(self) -> int:
        """Numbers of a patch: its pixels in three colours."""
        return 3 * self.patch_size**2

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of a unit that a batch has room for: a patch."""
        return (self.patch_values,)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes that a tokenizer has to share, for messages by what they are."""
        return {"patch size": self.patch_size, "merged side": self.cell_size, "largest side": self.max_image_size}

    def num_features(self, patches: int) -> int:
        """Return the number of tokens that stand for some patches."""
        return patches // self.patches_per_token

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tower_dim % (4 * self.num_heads):
            raise ValueError(
                f"tower_dim {self.tower_dim} is not a multiple of 4 x num_heads {self.num_heads}: rows and columns each rotate "
                "half of a head's pairs of dims; change either"
            )
        return self


class Vision(Section):
    """Pictures in the records of training. The tower of `init_from` and its projector are frozen unless patterns name their
    modules: in full training `vision.train`, with a `lora` section `lora.targets` and `lora.train`. Exports carry what is frozen.
    """

    patches_per_row: Positive | None = None
    """Patches of pictures that a row of a batch has room for. The tower computes as many for every row, so a smaller number saves
    time where rows have more text than pictures; null: as many as fit into `train.seq_len` tokens.
    """
    buckets: Annotated[Positive, Field(le=8)] = 1
    """Sizes of that room: with 3, each step computes for all rows alike as many patches as its fullest row needs, rounded up to the
    whole room, a half or a quarter of it. Each size that occurs is compiled once; set it where pictures differ much in size.
    """
    train: tuple[str, ...] = ()
    """Patterns of the modules of tower and projector that full training trains with the text model, such as `vision.projector.*` or
    `vision.tower.*`. With a `lora` section, name them there: it freezes whatever it does not name.
    """
    features: TowerFeatures = ComputedFeatures()
    """Where the features of pictures come from: computed in every step, or stored once, which only a frozen tower allows."""
    encoder: VisionEncoder | None = None
    """Sizes of the tower and the projector. Leave it out: `init_from` states them."""
