"""Who may import whom: the arrows of the house as data, checked in the source, inside functions too.

config <- mesh <- model <- train.{state, loss, optimizer, step} <- checkpoint, plan <- train.{evaluate, loop} <- cli
   ^                ^
   +-- data         +-- weights (which also sees data's templates)
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "moe_train"
STEP = ("train.state", "train.loss", "train.optimizer", "train.step")
LEFT_OF_STEP = ("config", "mesh", "compiler_options", "model", "data.batch", *STEP)
LEFT_OF_LOOP = (
    *LEFT_OF_STEP,
    *(
        "train.record",
        "train.self_test",
        "train.stopping",
        "processes",
        "config_file",
        "atomic",
        "json_file",
        "data",
        "weights",
        "checkpoint",
        "model_dir",
    ),
    *("devices", "flops", "metrics", "plan", "room"),
)
COMMANDS = (
    "plan",
    *("train.evaluate", "train.loop", "generate", "bench", "inspect", "export", "upcycle", "extend_vocab", "prepare", "verify"),
    "adapters",
)

# What each module may import of ours; a name stands for everything below it. The longest key that fits a module counts.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "": (),  # moe_train itself
    "config": (),
    "foreign_keys": (),
    "atomic": (),
    "json_file": (),
    "strict_yaml": (),
    "config_schema": ("config", "strict_yaml"),
    "config_faults": ("config_schema", "foreign_keys", "strict_yaml"),
    "config_file": ("config", "config_faults", "strict_yaml"),
    "processes": (),
    "room": (),
    "compiler_options": (),
    "mesh": ("config", "processes"),
    "devices": (),
    "flops": ("config", "devices", "model"),
    "metrics": ("config", "atomic"),
    "model": ("config", "mesh", "model"),
    "data": ("config", "data", "atomic", "json_file"),
    "weights": (
        *("config", "mesh", "model", "weights", "data.tokenizer", "data.chat", "data.conversation", "data.sandbox"),
        *("atomic", "json_file", "progress"),
    ),
    "train": (),  # the package itself; its modules stand below
    **dict.fromkeys(STEP, LEFT_OF_STEP),
    "train.record": ("config", "config_file", "atomic"),
    "train.stopping": ("mesh",),
    "train.self_test": ("config", "mesh", "model"),
    "checkpoint_arrays": ("mesh",),
    "checkpoint": (*LEFT_OF_STEP, "checkpoint_arrays"),
    "model_dir": (*LEFT_OF_STEP, "config_file", "room", "weights", "checkpoint", "data.tokenizer", "data.chat"),
    "plan": (*LEFT_OF_STEP, "config_file", "atomic", "devices", "flops", "model_dir", "plan"),
    "train.evaluate": LEFT_OF_LOOP,
    "train.ready": LEFT_OF_LOOP,
    "train.start": LEFT_OF_LOOP,
    "train.figures": LEFT_OF_LOOP,
    "train.loop": (*LEFT_OF_LOOP, "train.evaluate", "train.ready", "train.start", "train.figures"),
    **dict.fromkeys(("generate", "bench", "inspect", "export", "upcycle", "extend_vocab", "prepare", "adapters"), LEFT_OF_LOOP),
    "verify": (*LEFT_OF_LOOP, "export", "adapters"),
    "quickstart": (*LEFT_OF_LOOP, *COMMANDS),
    "terminal": ("progress",),
    "progress": (),
    "plot": ("atomic",),
    "arguments": ("config", "config_file"),
    "cli_adapters": ("arguments", "terminal", "adapters"),
    "cli_data": ("config", "arguments", "terminal", "data", "prepare"),
    "cli": (
        *("config", "config_file", "config_schema", "processes", "data", *COMMANDS, "quickstart"),
        *("terminal", "arguments", "cli_adapters", "cli_data", "plot"),
    ),
    "__main__": ("cli",),
}

JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
# Outside packages that a module must not import, whatever it is for.
MUST_NOT_IMPORT: dict[str, set[str]] = {
    "": {"torch", "transformers", "peft", "pickle", "dill", "cloudpickle", "tests"},
    **dict.fromkeys(("config", "foreign_keys", "strict_yaml", "config_schema", "config_faults", "config_file"), JAX),
    **dict.fromkeys(("processes", "atomic", "json_file", "data"), JAX),
    **dict.fromkeys(("plot", "terminal", "arguments", "cli_adapters", "cli_data", "cli", "__main__"), JAX),
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
    if key is None or (key == "train" and module != "train"):
        return [f"{module} has no place in MAY_IMPORT; say what it may import"]
    ours, outside = imported(source, module, known)
    banned = {name for prefix, names in MUST_NOT_IMPORT.items() if not prefix or within(module, (prefix,)) for name in names}
    return [f"{module} imports {name}" for name in sorted(ours) if not within(name, MAY_IMPORT[key])] + [
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
        ("data.loader", "def f():\n    import jax.numpy as jnp", "data.loader imports jax"),
        ("data.loader", "from moe_train.mesh import BATCH", "data.loader imports mesh"),
        ("model.moe", "from moe_train import config, data", "model.moe imports data"),
        ("model.moe", "from ..data import batch", "model.moe imports data.batch"),
        ("mesh", "import moe_train.model.moe", "mesh imports model.moe"),
        ("train.step", "from moe_train.train import loop", "train.step imports train.loop"),
        ("train.loop", "if True:\n    from moe_train.cli import main", "train.loop imports cli"),
        ("weights.hf", "import torch", "weights.hf imports torch"),
        ("weights.hf", "from moe_train.data.loader import Loader", "weights.hf imports data.loader"),
        ("train.extras", "", "train.extras has no place in MAY_IMPORT; say what it may import"),
        ("extras", "", "extras has no place in MAY_IMPORT; say what it may import"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, said: str) -> None:
    known = {"", "config", "mesh", "data", "data.batch", "data.loader", "model", "model.moe", "train", "train.loop", "cli"}
    assert faults(module, source, known) == [said]


def test_an_allowed_import_is_not_a_fault() -> None:
    source = "from moe_train import config\nfrom moe_train.data.batch import Batch\nimport jax"
    assert not faults("train.step", source, {"", "config", "data", "data.batch"})
