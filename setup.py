"""Build script: metadata lives in pyproject.toml; this adds the recipes to the package, so that a wheel has them."""

from pathlib import Path
from shutil import copy2

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPE_FOLDERS = ("tokenizers", "pretrain", "finetune")


class BuildWithRecipes(build_py):
    """Copy the recipe folders to `beit3/_recipes` of the build, where `recipe:pretrain/NAME` finds them."""

    def run(self) -> None:
        """Build the package, then add the recipes."""
        super().run()
        if self.editable_mode:
            return  # a clone has the folders themselves
        for folder in RECIPE_FOLDERS:
            target = Path(self.build_lib, "beit3", "_recipes", folder)
            target.mkdir(parents=True, exist_ok=True)
            for recipe in Path(folder).glob("*.py"):
                copy2(recipe, target)


setup(cmdclass={"build_py": BuildWithRecipes})
