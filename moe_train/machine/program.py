"""How this program is started, so that the commands in messages run as they stand in the reader's shell."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

# The name, with the path of an environment if one stands before it; not the name of the package in a sentence.
_COMMAND = re.compile(r"(?<![\w/.-])(?:[\w./-]+/)?moe-train (?=[a-z])(?!and |is |or |for |in |with |has )")
_INSTALL = re.compile(r"\bbash launch/install\.sh ([a-z]\w*)")


@functools.cache
def program() -> str:
    """Return the words that start this installation in a shell.

    That is `moe-train` if the shell finds this installation under that name, its path if the virtual environment is not active,
    and `python -m moe_train` if there is no such script.
    """
    # Not resolved: the python of a virtual environment is a link to one outside it.
    script = Path(sys.executable).with_name("moe-train")
    found = shutil.which("moe-train")
    if found is not None and Path(found).resolve() == script.resolve():
        return "moe-train"
    if script.is_file():
        return shlex.quote(_short(script))
    return f"{shlex.quote(_short(Path(sys.executable)))} -m moe_train"


def runnable(text: str) -> str:
    """Return a message in which each `moe-train COMMAND` and `bash launch/install.sh EXTRA` runs as it stands."""
    text = _COMMAND.sub(lambda _: f"{program()} ", text)
    return _INSTALL.sub(lambda match: install_command(match[1]), text)


def install_command(extra: str) -> str:
    """Return the command that installs an extra: the script of the checkout, or pip where the package is an installed wheel."""
    script = Path(__file__).parents[2] / "launch" / "install.sh"
    if script.is_file():
        return f"bash {shlex.quote(_short(script))} {extra}"
    return f"{shlex.quote(_short(Path(sys.executable)))} -m pip install 'moe-train[{extra}]'"


def _short(path: Path) -> str:
    """Return a path relative to the working directory if it is below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
