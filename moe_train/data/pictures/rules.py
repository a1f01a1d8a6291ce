"""The rules by which a picture becomes tokens and patches, which are those of mistral-common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple


class TokenGrid(NamedTuple):
    """The tokens of a picture: `height` rows of `width` tokens."""

    width: int
    height: int


@dataclass(frozen=True)
class PictureRules:
    """Sizes and token ids for the pictures of one model."""

    media: ClassVar[str] = "pictures"
    """What becomes tokens, for messages."""

    patch_size: int
    """Side of a patch in pixels."""
    cell_size: int
    """Patches along each side of the square that becomes one token."""
    max_image_size: int
    """Longest side of a picture in pixels; larger pictures are shrunk to it."""
    image_token: int
    """Id of [IMG], which stands for a square of patches."""
    break_token: int
    """Id of [IMG_BREAK], which ends each row of tokens but the last."""
    end_token: int
    """Id of [IMG_END], which ends a picture."""

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes that a vision tower has to share, for messages by what they are."""
        return {"patch size": self.patch_size, "merged side": self.cell_size, "largest side": self.max_image_size}

    @property
    def token_pixels(self) -> int:
        """Side in pixels of the square that becomes one token."""
        return self.patch_size * self.cell_size

    def grid(self, width: int, height: int) -> TokenGrid:
        """Return the tokens of a picture of `width` x `height` pixels."""
        ratio = max(width, height) / self.max_image_size
        if ratio > 1:
            # Rounded as in mistral-common (to even, and to at least a pixel); transformers rounds down.
            width = max(round(width / ratio), 1)
            height = max(round(height / ratio), 1)
        return TokenGrid((width - 1) // self.token_pixels + 1, (height - 1) // self.token_pixels + 1)

    def tokens(self, grid: TokenGrid) -> list[int]:
        """Return the ids that stand for a picture."""
        ids = ([self.image_token] * grid.width + [self.break_token]) * grid.height
        ids[-1] = self.end_token
        return ids

    def num_patches(self, grid: TokenGrid) -> int:
        """Return the number of patches of a picture."""
        return grid.width * grid.height * self.cell_size**2

    def room(self, tokens: Sequence[int]) -> int:
        """Return the number of patches that some tokens stand for."""
        return tokens.count(self.image_token) * self.cell_size**2

    def sizes_in(self, tokens: Sequence[int]) -> list[int]:
        """Return the number of tokens of each picture among some tokens."""
        sizes: list[int] = []
        size = 0
        for token in tokens:
            if token not in self.control_ids:
                continue
            size += 1
            if token == self.end_token:
                sizes.append(size)
                size = 0
        return sizes

    @property
    def control_ids(self) -> tuple[int, int, int]:
        """Ids of tokens that stand for pictures, which are never trained on."""
        return self.image_token, self.break_token, self.end_token
