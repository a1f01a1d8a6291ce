"""Who may import whom: the arrows between the package's folders as data, checked in the source, inside functions too.

config <- machine <- model, data <- train, weights <- checkpoint, proof <- evaluate <- plan, governance <- run <- commands <- cli
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "moe_train"

# What each folder may import of ours besides itself; a name stands for everything below it. The longest key that fits counts.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    # moe_train itself only hands on public names, and imports a folder when one of its names is used.
    "": ("config", "machine", "model", "data", "train", "checkpoint", "commands", "run"),
    "config": (),
    "machine": ("config",),
    "model": ("config", "machine"),
    "data": ("config", "machine.checked_file", "machine.files", "machine.network", "machine.program"),
    "train": ("config", "machine", "model", "data"),
    "weights": ("config", "machine", "model", "data"),
    "checkpoint": ("config", "machine", "model", "data", "train", "weights"),
    "proof": ("config", "machine", "model", "data", "train", "weights"),
    # The second reader of an export shares no code with the writer.
    "proof.expected": ("config", "proof.expected_hugging_face", "proof.expected_latent", "proof.expected_tensor"),
    "proof.expected_hugging_face": ("config", "proof.expected_tensor"),
    "proof.expected_latent": ("config", "proof.expected_tensor"),
    "proof.expected_tensor": ("config",),
    "proof.softmax_scale": ("config", "proof.checks", "proof.expected", "proof.reread"),
    "proof.reread": ("config", "machine"),
    "proof.checks": (),
    "evaluate": ("config", "machine", "model", "data", "train", "weights", "checkpoint", "proof"),
    "plan": ("config", "machine", "model", "data", "train", "weights", "checkpoint", "proof", "evaluate"),
    "governance": ("config", "machine", "model", "data", "train", "weights", "checkpoint", "proof", "evaluate"),
    "run": ("config", "machine", "model", "data", "train", "weights", "checkpoint", "proof", "evaluate", "plan"),
    "commands": (
        *("config", "machine", "model", "data", "train", "weights", "checkpoint", "proof", "evaluate", "plan", "governance", "run"),
    ),
    "cli": ("config", "machine", "data", "plan", "commands", "run"),
    "__main__": ("cli", "machine.huge_pages"),
}

JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
# Outside packages that a module must not import, whatever it is for.
MUST_NOT_IMPORT: dict[str, set[str]] = {
    "": {"torch", "transformers", "peft", "pickle", "dill", "cloudpickle", "tests"},
    **dict.fromkeys(
        (
            *("config", "machine.processes", "machine.files", "machine.checked_file", "machine.huge_pages"),
            *("data", "cli", "commands.plot", "__main__"),
        ),
        JAX,
    ),
}
NO_NAMES = {"utils", "util", "common", "base", "helpers", "helper", "registry", "factory", "misc", "core", "lib"}


def modules() -> dict[str, Path]:
    """Dotted name without `moe_train.` -> file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


MODULES = modules()


def imported(source: str, module: str, known: set[str]) -> tuple[set[str], set[str]]:
    """(our modules, outside packages) that `module` with this source imports anywhere."""
    ours, outside = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ("moe_train." + module).split(".")[: -node.level] if node.level else []
            package = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{package}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, inner = name.partition(".")
            if top != "moe_train":
                outside.add(top)
                continue
            while inner not in known:  # the last part is a function or class
                inner = inner.rpartition(".")[0]
            ours.add(inner)
    return ours - {""}, outside


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def rule(module: str) -> str | None:
    """The longest key of MAY_IMPORT that `module` stands under."""
    keys = [key for key in MAY_IMPORT if module == key or (key and module.startswith(key + "."))]
    return max(keys, key=len, default=None)


def faults(module: str, source: str, known: set[str]) -> list[str]:
    key = rule(module)
    if key is None:
        return [f"{module} has no place in MAY_IMPORT; say what it may import"]
    ours, outside = imported(source, module, known)
    folder = module.partition(".")[0]
    allowed = MAY_IMPORT[key] if "." in key else (*MAY_IMPORT[key], folder)
    banned = {name for prefix, names in MUST_NOT_IMPORT.items() if not prefix or within(module, (prefix,)) for name in names}
    return [f"{module} imports {name}" for name in sorted(ours) if not within(name, allowed)] + [
        f"{module} imports {name}" for name in sorted(outside & banned)
    ]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module or "moe_train")
def test_a_module_imports_only_from_its_left(module: str) -> None:
    assert not faults(module, MODULES[module].read_text(encoding="utf-8"), set(MODULES))


def test_no_cycles() -> None:
    graph = {m: imported(path.read_text(encoding="utf-8"), m, set(MODULES))[0] - {m} for m, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


def test_files_are_named_after_their_idea() -> None:
    assert not {module for module in MODULES if set(module.split(".")) & NO_NAMES}


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("data.batches.loader", "def f():\n    import jax.numpy as jnp", "data.batches.loader imports jax"),
        ("data.batches.loader", "from moe_train.machine.mesh import BATCH", "data.batches.loader imports machine.mesh"),
        ("model.layers", "from moe_train import config, data", "model.layers imports data"),
        ("model.layers", "from ..data import batches", "model.layers imports data.batches"),
        ("machine.mesh", "import moe_train.model.layers", "machine.mesh imports model.layers"),
        ("train.step", "from moe_train.run import loop", "train.step imports run.loop"),
        ("run.loop", "if True:\n    from moe_train.cli import main", "run.loop imports cli"),
        ("weights.hf.files", "import torch", "weights.hf.files imports torch"),
        ("proof.expected", "from moe_train.weights import names", "proof.expected imports weights"),
        ("extras", "", "extras has no place in MAY_IMPORT; say what it may import"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, said: str) -> None:
    known = {"", "config", "machine.mesh", "data", "data.batches", "model.layers", "run.loop", "weights", "cli"}
    assert faults(module, source, known) == [said]


def test_an_allowed_import_is_not_a_fault() -> None:
    source = "from moe_train import config\nfrom moe_train.data.batches.batch import Batch\nimport jax"
    assert not faults("train.step", source, {"", "config", "data", "data.batch"})
