"""Where the tokens of a batch stand: what attention masks by."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Int


class TokenPlaces(NamedTuple):
    """Position, segment and prompt of each token of a batch."""

    positions_BT: Int[Array, "B T"]
    """Positions, which restart in each segment that continues no prompt; -1 for padding in decoding."""
    segment_ids_BT: Int[Array, "B T"]
    """Packed segments, 0 for padding. A query sees only keys with its own segment id, and those of its prompt."""
    prompt_ids_BT: Int[Array, "B T"] | None = None
    """Id of the earlier segment of the row that a token's segment continues, and sees; its own id where it continues none. None if
    no segment continues another.
    """
