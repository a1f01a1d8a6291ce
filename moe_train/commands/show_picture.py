"""A picture of training rows in SVG, for documentation and reviews: what `data show` prints, in its colours."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from moe_train.commands.show import Rows, print_rows
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import write_text


def write_picture(path: Path, rows: Rows, tokenizer: Tokenizer, title: str, positions: bool) -> None:
    """Write what `print_rows` prints as a picture in SVG, 110 characters wide."""
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    print_rows(rows, tokenizer, console, positions)
    # A fixed id, so that the same rows give the same file; no address of a font, since nothing is fetched.
    svg = console.export_svg(title=title, unique_id="moe-train")
    write_text(path, re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.S))
