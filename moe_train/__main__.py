"""The program `moe-train`, which is also `python -m moe_train`."""

from __future__ import annotations

import sys

from moe_train.machine.huge_pages import restart_with_huge_pages


def main() -> None:
    """Run the command line."""
    restart_with_huge_pages(sys.argv[1:])
    # Imported here, since it is slow and the program may have to start again.
    from moe_train.cli.main import main as run_command_line

    run_command_line()


if __name__ == "__main__":
    main()
