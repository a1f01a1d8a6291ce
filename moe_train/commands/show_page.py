"""Training rows as an HTML page for a browser."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from moe_train.commands.show import Rows, Token, escape_control_characters, meaning_of_green, segments, summary, title_of
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import write_text

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ font-size: 1rem; border-top: 2px solid; padding-top: .4rem; margin-top: 2rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace }}
.l {{ background: #2e9e4f40; border-bottom: 2px solid #2e9e4f }}
.c {{ color: #0a7ea4; font-weight: bold }}
sub {{ font-size: .6em; opacity: .6; user-select: none }}
span:hover {{ outline: 1px solid }}
img {{ max-width: 20rem; max-height: 20rem; border: 1px solid; vertical-align: top }}
</style></head><body><h1>{title}</h1>
<p>{summary}; <span class="l">{meaning}</span>. <span class="c">Control tokens</span> are blue.
Segments do not attend to one another. Point at a token to see its position and id{end}.</p>
{body}
</body></html>
"""


_SOUND = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"FORM", b".snd")
"""First bytes of files of sound. WebP pictures begin with RIFF too, and are told by what follows."""


def page(rows: Rows, tokenizer: Tokenizer, title: str, positions: bool) -> str:
    """Render the rows as an HTML page without scripts or external resources."""
    body = []
    for segment in segments(rows, tokenizer):
        heading = html.escape(title_of(segment, rows))
        spans = "".join(_span(token, positions) for token in segment.tokens)
        pictures = "".join(map(_picture, rows.media_of(segment)))
        body.append(f"<h2>{heading}</h2>\n{pictures}<pre>{spans}</pre>")
    return _PAGE.format(
        title=html.escape(escape_control_characters(title)),
        summary=html.escape(summary(rows)),
        meaning=meaning_of_green(rows),
        end="; the last token of a segment is only predicted" if rows.notes is None else "",
        body="\n".join(body),
    )


def _picture(content: bytes) -> str:
    """Return a picture, or a clip of sound, as part of the page; browsers tell the format by the content."""
    if content.startswith(_SOUND) and content[8:12] != b"WEBP":
        return f'<audio controls src="data:audio/wav;base64,{base64.b64encode(content).decode()}"></audio>\n'
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(content).decode()}">\n'


def _span(token: Token, positions: bool) -> str:
    # The CSS classes of `_PAGE`: l is trained on, c is a control token.
    classes = " ".join(name for name, on in (("l", token.trained_on), ("c", token.control)) if on)
    text = html.escape(escape_control_characters(token.text)) + (f"<sub>{token.position}</sub>" if positions else "")
    return f'<span class="{classes}" title="position {token.position}, id {token.id}">{text}</span>'


def write_page(path: Path, rows: Rows, tokenizer: Tokenizer, title: str, positions: bool) -> None:
    """Write `page` to a file."""
    write_text(path, page(rows, tokenizer, title, positions))
