"""Copies the recipes of configs/ into the package while a wheel is built. Everything else stands in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Build the package, with configs/ as moe_train/recipes."""

    def run(self) -> None:
        """Build as usual, then copy. An editable installation reads configs/ of the checkout itself."""
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib) / "moe_train" / "recipes", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
