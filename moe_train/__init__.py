"""Train, adapt and ship sparse Mixture-of-Experts transformers of the Mistral family in JAX.

The names below are the public interface; each is imported when it is first used, so that `import moe_train` is quick and loads
neither JAX nor Flax. Sections of a config are in `moe_train.config`. Complete programs are in `examples/`.

    import moe_train

    run = moe_train.resolve(moe_train.load_config("configs/tiny.yaml"))
    for metrics in moe_train.steps(run):
        print(metrics["step"], metrics["loss"])
    moe_train.export(run.run_dir, "exported")
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    # configs and runs
    "Config": "config",
    "Run": "config",
    "load_config": "config.yaml_file",
    "resolve": "run.resolve",
    "train_run": "run.loop",
    "steps": "run.loop",
    "plan_run": "commands.plan",
    # models
    "Transformer": "model.transformer",
    "init_model": "model.transformer",
    "load_model": "checkpoint.load_model",
    "make_mesh": "machine.mesh",
    "RouterStats": "model.moe.router",
    # losses of one's own
    "Objective": "train.objectives.objective",
    "Mean": "train.objectives.objective",
    "custom_objective": "train.objectives.custom",
    "token_logprobs": "train.token_logprobs",
    # data
    "Records": "data.records.source",
    "load_records": "data.records.load_records",
    "load_tokenizer": "checkpoint.load_model",
    "train_tokenizer": "commands.train_tokenizer",
    # what a trained model does, and its files
    "evaluate_model": "commands.evaluate",
    "generate_text": "commands.generate",
    "export": "commands.export",
    "verify": "commands.verify",
}
"""Public name -> module of this package that defines it."""

__all__ = [  # noqa: RUF022 (in the order of use)
    "Config",
    "Run",
    "load_config",
    "resolve",
    "train_run",
    "steps",
    "plan_run",
    "Transformer",
    "init_model",
    "load_model",
    "make_mesh",
    "RouterStats",
    "Objective",
    "Mean",
    "custom_objective",
    "token_logprobs",
    "Records",
    "load_records",
    "load_tokenizer",
    "train_tokenizer",
    "evaluate_model",
    "generate_text",
    "export",
    "verify",
]

if TYPE_CHECKING:
    from moe_train.checkpoint.load_model import load_model, load_tokenizer
    from moe_train.commands.evaluate import evaluate_model
    from moe_train.commands.export import export
    from moe_train.commands.generate import generate_text
    from moe_train.commands.plan import plan_run
    from moe_train.commands.train_tokenizer import train_tokenizer
    from moe_train.commands.verify import verify
    from moe_train.config import Config, Run
    from moe_train.config.yaml_file import load_config
    from moe_train.data.records.load_records import load_records
    from moe_train.data.records.source import Records
    from moe_train.machine.mesh import make_mesh
    from moe_train.model.moe.router import RouterStats
    from moe_train.model.transformer import Transformer, init_model
    from moe_train.run.loop import steps, train_run
    from moe_train.run.resolve import resolve
    from moe_train.train.objectives.custom import custom_objective
    from moe_train.train.objectives.objective import Mean, Objective
    from moe_train.train.token_logprobs import token_logprobs


if os.environ.get("MOE_TRAIN_OFFLINE"):
    # Here, so that it holds for programs that import the package, and for the processes that a command starts.
    from moe_train.machine.network import obey_environment

    obey_environment()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'moe_train' has no attribute {name!r}; its names are {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"moe_train.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
