"""The date that a chat template reads with `strftime_now`: fixed, so that a record has the same tokens tomorrow.

A template is rendered as of a date by setting a variable at its top, so that its text, and the identity of what is made with it,
contain the date. An export carries the template without the date, since a server renders it as of the day.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import tempfile
from pathlib import Path

from moe_train import config
from moe_train.data.chat.environment import DATE

log = logging.getLogger(__name__)

_FILE = "chat_date"
# `{%+` and `+%}` disable lstrip_blocks and trim_blocks, so that the template behind the prelude renders as it does without it.
_PRELUDE = re.compile(r"\{%\+ set " + DATE + r" = '(\d{4}-\d\d-\d\d)' \+%\}")


def dated(template: str, date: str) -> str:
    """Return the template as of a date (YYYY-MM-DD); unchanged if it does not read the date."""
    if not reads_date(template):
        return template
    # Without its old date, so that a template that already has one gets no second prelude.
    return f"{{%+ set {DATE} = '{date}' +%}}{undated(template)}"


def undated(template: str) -> str:
    """Return the template without its date."""
    return _PRELUDE.sub("", template, count=1) if template.startswith("{%+ set ") else template


def date_of(template: str | None) -> str | None:
    """Return the date as of which a template is rendered; None if it has none."""
    match = _PRELUDE.match(template or "")
    return match[1] if match else None


def reads_date(template: str) -> bool:
    """Return whether a template reads the date."""
    return "strftime_now" in template


def today() -> str:
    """Return the date of today."""
    return datetime.date.today().isoformat()


def kept_date(cache_dir: str | Path) -> str:
    """Return the date of the first preparation in a cache, which is today if nothing was prepared in it."""
    file = Path(cache_dir) / _FILE
    if file.is_file():
        return _read(file)
    return today()


def date_of_data(data: config.Data | None) -> str:
    """Return the date that a data section states, or that of its cache; today without a section."""
    if data is None:
        return today()
    return data.chat_date or kept_date(data.cache_dir)


def keep_date(cache_dir: str | Path) -> str:
    """Return the date of the first preparation in a cache; if this is the first, record today's."""
    file = Path(cache_dir) / _FILE
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, since hard links and atomic renames do not cross file systems.
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{_FILE}-", delete=False) as written:
            written.write(today() + "\n")
        try:
            os.link(written.name, file)  # unlike a rename, fails if another process was first
            log.info(
                "the chat template reads the date: it is %s for all data prepared in %s, or set data.chat_date", today(), cache_dir
            )
        except FileExistsError:
            pass
        except OSError:  # the file system has no hard links
            os.replace(written.name, file)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(written.name)
    # Read back even if just written: another process may have been first, at another date.
    return _read(file)


def _read(file: Path) -> str:
    """Read a recorded date. Raises ValueError if the file holds none."""
    text = file.read_text(encoding="utf-8").strip()
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ValueError(
            f"{file} should hold a date such as 2026-11-30, not {text!r}; set data.chat_date, and remove it"
        ) from error
