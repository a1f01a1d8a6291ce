"""The build step that puts the recipes of configs/ into a wheel; pyproject.toml names it, and states everything else."""

import shutil
from pathlib import Path

from setuptools.command.build_py import build_py

RECIPES = Path("configs")


class BuildWithRecipes(build_py):
    """Build the package, with configs/ as moe_train/recipes."""

    def run(self) -> None:
        """Build as usual, then copy. An editable installation reads configs/ of the checkout itself."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(RECIPES, Path(self.build_lib) / "moe_train" / "recipes", dirs_exist_ok=True)

    def get_source_files(self) -> list[str]:
        """Return the files of a source distribution, from which a wheel can be built too."""
        recipes = [str(file) for file in sorted(RECIPES.rglob("*")) if file.is_file()]
        return [*super().get_source_files(), "launch/wheel.py", *recipes]
