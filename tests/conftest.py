"""What every test runs under, and the fixtures that several folders share.

Eight fake CPU devices, shapes checked against annotations, the marks `slow` and `judges`; a little text and its tokenizer, the
config of a small run, and one cache of compiled programs.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# As in an active virtual environment, where messages name the program without its path.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The user's own cache of compiled programs is left alone; launch/test.sh names one for the tests.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")

import jax
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Drawn alike in each run, however busy the machine is; with --slow anew.
settings.register_profile("alike", max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("anew", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("anew" if "--slow" in sys.argv else "alike")
jax.config.update("jax_num_cpu_devices", 8)
# A test compiles its programs for seconds and runs them for milliseconds. Unoptimized, and fused by the plain emitter, they compile
# in half the CPU time. Children inherit the flags. XLA ends the process at a flag that it does not know: newer ones have no choice.
QUICK = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 12):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
FLAGS = os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))
install_import_hook(["moe_train.model", "moe_train.train"], "beartype.beartype")
# As in `cli.main`: traces make millions of objects that are no garbage, and by default Python looks at all of them again and again.
gc.set_threshold(10_000, 20, 100)

from moe_train.commands.train_tokenizer import train_tokenizer  # noqa: E402
from moe_train.config import Config  # noqa: E402
from moe_train.data.tokenizers.huggingface import HuggingFace  # noqa: E402
from tests.compiled_programs import Collective, collectives_of  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take a minute or more")
    parser.addoption("--judges", action="store_true", help="also run the comparisons with torch, transformers and peft")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a test by the size of its bytes: workers must collect equal names, and a packed file can hold the time."""
    return f"{len(val)}-bytes" if isinstance(val, bytes) else None


def pytest_configure(config: pytest.Config) -> None:
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if config.getoption("--judges") and missing:
        raise pytest.UsageError(f"--judges needs {', '.join(missing)}; run: bash launch/test.sh --judges")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--judges"):
        why = "compares with torch, transformers or peft; run: bash launch/test.sh --judges"
        for item in items:
            if item.get_closest_marker("judges"):
                item.add_marker(pytest.mark.skip(reason=why))
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let the processes that a slow test starts compile as a user's do: they train for minutes."""
    if " ".join(QUICK) == FLAGS and item.get_closest_marker("slow"):
        os.environ.pop("XLA_FLAGS", None)
    else:
        os.environ["XLA_FLAGS"] = FLAGS


@pytest.fixture(autouse=True)
def nothing_is_left_in_force() -> Iterator[None]:
    """Take back what a test has put in force for the rest of the process: a mesh, as models without one do, or no compile cache."""
    was_empty = jax.sharding.get_abstract_mesh().empty
    uses_cache = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", uses_cache)
    if was_empty and not jax.sharding.get_abstract_mesh().empty:
        jax.set_mesh(None)


MOST_MAPPINGS = 20_000
"""Memory mappings of a process at which compiled programs are given up; Linux allows 65,530, and LLVM crashes at the next one."""


@pytest.fixture(autouse=True, scope="module")
def few_programs_are_kept() -> Iterator[None]:
    """Give up compiled programs after a file of tests if they are many; each has mappings of its own for code and data."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config) -> Iterator[Path]:
    """The folder of compiled programs; many runs of one shape compile once."""
    folder = pytestconfig.cache.mkdir("jax")
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield folder
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, eval.jsonl and tokenizer/."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ab", "can", "de", "for", "gen", "in") for b in ("le", "ter", "ion", "al", "s")]
    records = [" ".join(rng.choices(words, k=rng.randint(2, 30))) for _ in range(220)]
    for name, part in (("train", records[:200]), ("eval", records[200:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": record}) + "\n" for record in part))
    train_tokenizer(records, 280, folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def small_run(text: Path, compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """`small_run(run_dir, **changes)`: 6 steps of a dense model on 8 devices, a checkpoint every 2."""
    cache = tmp_path_factory.mktemp("tokens")

    def make(run_dir: Path, **changes: Any) -> Config:
        tree: dict[str, Any] = {
            "name": "small",
            "run_dir": str(run_dir),
            "model": {
                "family": "mistral",
                "vocab_size": 288,
                "model_dim": 32,
                "num_layers": 2,
                "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
                "ffn": {"name": "dense", "ffn_dim": 48},
                "max_seq_len": 64,
            },
            "data": {
                "tokenizer": {"name": "huggingface", "path": str(text / "tokenizer")},
                "train": [{"name": "files", "files": [str(text / "train.jsonl")], "record": {"name": "text"}}],
                "eval": [{"name": "files", "files": [str(text / "eval.jsonl")], "record": {"name": "text"}}],
                "cache_dir": str(cache),
            },
            "train": {"steps": 6, "batch_size": 8, "seq_len": 32},
            "optimizer": {"name": "adamw", "learning_rate": 1e-2},
            "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
            "evaluation": {"every_steps": 3},
            "checkpoint": {"every_steps": 2, "keep_last": 5},
            "metrics": {"tensorboard": False},
        }
        for dotted, value in changes.items():
            *sections, key = dotted.split("__")
            at = tree
            for section in sections:
                at = at[section]
            at[key] = value
        return Config.model_validate_json(json.dumps(tree))

    return make


TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "What does json.dumps do? It serialises an object to a JSON formatted string.",
    "Grüße aus München, 東京 and naïve café: 3.14159 = π roughly.",
    "def add(a, b):\n    return a + b\n",
] * 8


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    return train_tokenizer(TEXTS, 360, tmp_path_factory.mktemp("tokenizer") / "bpe")


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Write records as JSON lines and return the path."""

    def write(name: str, records: list[dict]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def collectives() -> Callable[[str], list[Collective]]:
    return collectives_of
