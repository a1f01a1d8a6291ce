"""Text of HLO modules, short enough to count by hand."""

from __future__ import annotations

REST = "channel_id=1, use_global_device_ids=true"


def entry(*lines: str, before: str = "") -> str:
    """A module whose entry has these instructions."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, is_scheduled=true\n\n{before}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"
