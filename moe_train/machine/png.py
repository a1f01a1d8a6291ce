"""Pictures of arrays as PNG files, and colors for shares."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def png_of(pixels_HWC: np.ndarray) -> bytes:
    """Encode RGB pixels as a PNG file (RFC 2083: 8 bits per channel, no filter).

    Args:
        pixels_HWC: (H, W, 3) uint8.
    """
    height, width, _ = pixels_HWC.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    # Each row begins with the number of its filter, 0 for none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels_HWC.reshape(height, width * 3)], axis=1)
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def load_colors(load: np.ndarray) -> np.ndarray:
    """Return colors (…, 3) uint8 of loads (…), where 1 is an even load.

    White is even, blue idle, red twice the even load or more; a value that is not finite is gray.
    """
    clipped = np.clip(np.nan_to_num(load, nan=1.0, posinf=2.0, neginf=0.0), 0.0, 2.0)[..., None]
    idle, even, busy = np.array([33, 102, 172.0]), np.array([247, 247, 247.0]), np.array([178, 24, 43.0])
    below = idle + (even - idle) * clipped
    above = even + (busy - even) * (clipped - 1)
    colors = np.where(clipped < 1, below, above)
    return np.where(np.isfinite(load)[..., None], colors, 160).astype(np.uint8)
