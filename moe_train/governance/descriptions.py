"""Tables that several documents share: the architecture, the data, the settings and the results of a training."""

from __future__ import annotations

from moe_train import config
from moe_train.data.pictures.rules import PictureRules
from moe_train.data.sound.rules import SoundRules
from moe_train.governance.lineage import Training
from moe_train.governance.markdown import TODO, table
from moe_train.machine.files import JsonObject


def architecture(model: config.Model) -> dict[str, str]:
    """Return the sizes of a model."""
    rows = {
        "layers": f"{model.num_layers}",
        "width": f"{model.model_dim:,}",
        "vocabulary": f"{model.vocab_size:,}",
        "context": f"{model.max_seq_len:,} tokens",
        "attention": f"{model.attention.name}, {model.attention.num_heads} heads",
    }
    if isinstance(model.ffn, config.MoeFfn):
        rows["experts"] = f"{model.ffn.num_experts}, of which {model.ffn.experts_per_token} serve a token"
    return rows


def sets_table(training: Training) -> str:
    """Return a table of the sets that were trained on."""
    if not training.data:
        return f"{TODO}: the run keeps no manifest of its data."
    rows = []
    for manifest in training.data:
        names = ", ".join(f"`{file.path}`" for file in manifest.files[:3])
        more = f" and {len(manifest.files) - 3} more" if len(manifest.files) > 3 else ""
        counts = [f"{count:,}" for count in (manifest.records, manifest.tokens, manifest.loss_tokens)]
        rows.append([names + more, *counts, manifest.licence or TODO, manifest.origin or TODO, f"`{manifest.hash[:16]}`"])
    return table(("files", "records", "tokens", "trained on", "licence", "origin", "hash"), rows)


def modalities(training: Training) -> list[str]:
    """Return the kinds of content that were trained on, text first."""
    rules = [manifest.media for manifest in training.data]
    has_pictures = any(isinstance(of_set, PictureRules) for of_set in rules)
    has_sound = any(isinstance(of_set, SoundRules) for of_set in rules)
    return ["text", *(["image"] if has_pictures else []), *(["audio"] if has_sound else [])]


def settings(training: Training) -> dict[str, str]:
    """Return how the weights were trained."""
    run = training.run
    rows = {
        "objective": run.objective.name,
        "optimizer": run.optimizer.name,
        "learning rate": f"{run.optimizer.learning_rate:g}, schedule {run.optimizer.schedule.name}",
        "steps": f"{training.step:,}",
        "batch": f"{run.train.batch_size} rows of {run.train.seq_len:,} tokens",
        "dtype": f"{run.compute.param_dtype} parameters",
        "seed": f"{run.seed}",
    }
    if run.lora is not None:
        rows["LoRA"] = "; ".join(f"`{', '.join(target.modules)}` rank {target.rank}" for target in run.lora.targets)
    return rows


def held_out_table(training: Training) -> str:
    """Return a table of the first, the best and the last held-out loss of a run that has measured some."""
    best = min(training.held_out, key=lambda measured: measured.loss)
    named = (("first", training.held_out[0]), ("best", best), ("last", training.held_out[-1]))
    rows = [(name, f"{measured.step}", f"{measured.loss:.4f}") for name, measured in named]
    return table(("held-out loss", "step", training.run.objective.loss_unit), rows)


def machines(training: Training) -> list[str]:
    """Return the devices that the run was started on, each combination once."""
    return sorted({_machine(session) for session in training.sessions})


def _machine(session: JsonObject) -> str:
    """Return the devices of a start of the run."""
    hardware = session.get("hardware", {})
    return f"{hardware.get('devices', '?')} x {hardware.get('device', 'unknown device')}"
