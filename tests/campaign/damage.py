"""Bytes flipped, cut and removed in each kind of file: the run goes on as it would have, or one line names the file."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign.signals import exported
from tests.campaign.trial_run import STEPS, Ended, Lost, Workplace, last_step, require_equal, require_equal_weights

FLIP, CUT, EMPTY, ZEROS, GONE, HALF_LINE = "a flipped bit", "cut in half", "empty", "zeros", "gone", "a NUL and half a line"
OF_A_RUN = {
    # kind of file -> a pattern below the run folder
    "run.json": "run.json",
    "metrics.jsonl": "metrics.jsonl",
    "config.yaml": "config.yaml",
    "manifest.json": "manifest.json",
    "tokenizer": "tokenizer/*.json",
    "checkpoint metadata": "checkpoints/40/about/metadata",
    "Orbax metadata": "checkpoints/40/_CHECKPOINT_METADATA",
    "array metadata": "checkpoints/40/*/manifest.ocdbt",
    "weights": "checkpoints/40/params/**/d/*",
    "optimizer state": "checkpoints/40/optimizer/**/d/*",
    "TensorBoard events": "tensorboard/*",
}
OF_A_SET = {"prepared tokens": "tokens", "prepared offsets": "offsets", "manifest of a prepared set": "manifest.json"}
Trial = tuple[str, str, Callable[[Workplace, random.Random], str]]


def trials() -> Iterator[Trial]:
    """Yield (kind, name, function) for every kind of file and of damage."""
    for what, pattern in OF_A_RUN.items():
        for how in (FLIP, CUT, EMPTY, ZEROS, GONE):
            yield f"damaged files of a run folder: {what}", how, _run_trial(pattern, how)
    yield "damaged files of a run folder: metrics.jsonl", HALF_LINE, _run_trial("metrics.jsonl", HALF_LINE)
    for what, name in OF_A_SET.items():
        for how in (FLIP, CUT, EMPTY, GONE):
            yield f"damaged files: {what}", how, _set_trial(name, how)
    for how in (FLIP, CUT, EMPTY, ZEROS):
        yield "damaged files: compiled programs", how, _compiled_trial(how)
    for name in ("*.safetensors", "config.json", "tokenizer.json", "export_proof.json"):
        for how in (FLIP, CUT, EMPTY, GONE):
            yield f"damaged files of an export: {name}", how, _export_trial(name, how)


def half_done(workplace: Workplace, name: str) -> Path:
    """Return a copy of the undisturbed run as a process that was killed after the save of step 40 left it."""
    source = workplace.folder / "half"
    if not (source / "ready").exists():
        reference = workplace.reference("half", "checkpoint.keep_last=99")
        for step in (45, 50, 55, 60):
            shutil.rmtree(reference / "checkpoints" / str(step))
        lines = (reference / "metrics.jsonl").read_text().splitlines(keepends=True)
        (reference / "metrics.jsonl").write_text("".join(lines[:44]))
        for step in range(5, 30, 5):
            shutil.rmtree(reference / "checkpoints" / str(step))
        (source / "ready").touch()
    path = workplace.new_folder(name)
    shutil.copytree(source, path)
    return path


def damage(file: Path, how: str, rng: random.Random) -> None:
    """Change a file."""
    content = bytearray(file.read_bytes())
    match how:
        case "a flipped bit":
            if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case "cut in half":
            content = content[: len(content) // 2]
        case "empty":
            content = bytearray()
        case "zeros":
            content = bytearray(len(content))
        case "a NUL and half a line":
            lines = content.splitlines(keepends=True)
            lines.insert(len(lines) // 2, b'\0{"kind": "tr\n')
            content = bytearray(b"".join(lines))
        case _:
            file.unlink()
            return
    file.write_bytes(content)


def _pick(folder: Path, pattern: str, rng: random.Random) -> Path:
    return rng.choice(sorted(file for file in folder.glob(pattern) if file.is_file()))


def _run_trial(pattern: str, how: str) -> Callable[[Workplace, random.Random], str]:
    def run(workplace: Workplace, rng: random.Random) -> str:
        run_dir = half_done(workplace, f"damage-{rng.getrandbits(32)}")
        file = _pick(run_dir, pattern, rng)
        damage(file, how, rng)
        ended = workplace.start(run_dir).wait().require(0, 2)
        reference = workplace.reference()
        lines = _require_few_lines(ended)
        if ended.code == 2:
            _require_named(ended, file)
            detail = f"refused: {lines[-1]}"
        elif pattern == "metrics.jsonl" and how != HALF_LINE:
            # Its lines cannot be had again; the weights can.
            if last_step(run_dir) != STEPS:
                raise Lost("the run is not finished")
            require_equal_weights(run_dir, reference)
            detail = "the rest of the run is equal"
        else:
            require_equal(run_dir, reference)
            detail = "equal; " + "; ".join(line for line in lines if "WARNING" in line or "dropped" in line or "damaged" in line)
        shutil.rmtree(run_dir)
        return f"{file.relative_to(run_dir)}: {detail}"

    return run


def _require_few_lines(ended: Ended) -> list[str]:
    """Return the lines of stderr. Raises Lost if the damage was answered by a page of them."""
    lines = ended.stderr.splitlines()
    long = [line for line in lines if len(line) > 1000]
    if len(lines) > 40 or long:
        raise Lost(f"{len(lines)} lines, {len(long)} of them longer than 1000 characters: {lines[0][:200]}")
    return lines


def _require_named(ended: Ended, file: Path) -> None:
    """Raise Lost unless an error names the damaged file or a folder of it that is no more than two levels up."""
    if not any(str(path) in ended.stderr for path in (file, file.parent, file.parent.parent)):
        raise Lost(f"no line names {file}: {ended.stderr[-400:]}")


def _set_trial(name: str, how: str) -> Callable[[Workplace, random.Random], str]:
    def run(workplace: Workplace, rng: random.Random) -> str:
        tokens = workplace.new_folder(f"set-{rng.getrandbits(32)}")
        run_dir = workplace.new_folder(f"set-run-{tokens.name}")
        override = f"data.cache_dir={tokens}"
        workplace.start(run_dir, override, "train.steps=6", "optimizer.schedule.warmup_steps=2").wait().require(0)
        shutil.rmtree(run_dir)
        file = _pick(tokens, f"**/{name}", rng)
        damage(file, how, rng)
        ended = workplace.start(run_dir, override).wait().require(0, 2)
        _require_few_lines(ended)
        if ended.code == 2:
            _require_named(ended, file)
            detail = f"refused: {ended.stderr.splitlines()[-1]}"
        else:
            require_equal(run_dir, workplace.reference())
            detail = "prepared again; equal"
        shutil.rmtree(tokens)
        return f"{file.relative_to(tokens)}: {detail}"

    return run


def _compiled_trial(how: str) -> Callable[[Workplace, random.Random], str]:
    def run(workplace: Workplace, rng: random.Random) -> str:
        reference = workplace.reference()
        compiled = workplace.new_folder(f"compiled-{rng.getrandbits(32)}")
        shutil.copytree(workplace.folder / "compiled", compiled)
        # The largest are the programs of the step and of the evaluation; each damaged entry is named in a line.
        for file in sorted(compiled.glob("*.entry"), key=lambda file: -file.stat().st_size)[:5]:
            damage(file, how, rng)
        run_dir = workplace.new_folder(f"compiled-run-{rng.getrandbits(32)}")
        ended = workplace.start(run_dir, env={"MOE_TRAIN_COMPILE_CACHE": str(compiled)}).wait().require(0)
        _require_few_lines(ended)
        require_equal(run_dir, reference)
        shutil.rmtree(run_dir)
        shutil.rmtree(compiled)
        return "compiled again; equal"

    return run


def _export_trial(pattern: str, how: str) -> Callable[[Workplace, random.Random], str]:
    def run(workplace: Workplace, rng: random.Random) -> str:
        copy = workplace.new_folder(f"export-{rng.getrandbits(32)}")
        shutil.copytree(exported(workplace), copy)
        file = _pick(copy, pattern, rng)
        damage(file, how, rng)
        ended = workplace.command(["verify", str(copy)], copy.with_name(f"{copy.name}.log")).wait().require(1, 2)
        lines = _require_few_lines(ended)
        shutil.rmtree(copy)
        return f"{file.name}: exit code {ended.code}: {lines[-1] if lines else 'said on stdout'}"

    return run
