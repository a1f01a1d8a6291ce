"""A folder of evidence: a seal over its files, and the check that it and the files that it speaks of are still the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_train.governance.markdown import TODO
from moe_train.governance.provenance import state_of
from moe_train.machine.files import JsonObject, read_object
from moe_train.proof.checks import Check, Fault, Finding, NotChecked, first_and_count, run
from moe_train.proof.surroundings import file_hashes

SEAL_FILE = "evidence.json"
"""States the sha256 of every other file of the folder, except the signature."""
SIGNATURE_FILE = "evidence.sig"
"""The signature over the folder."""
PROVENANCE_FILE = "provenance.json"
"""The chain from raw data to exported files."""


def seal_of(folder: Path) -> JsonObject:
    """Return the seal of a folder as it is now: the hash of each file, and the number of fields that say TODO."""
    hashes = {name: digest for name, digest in file_hashes(folder).items() if name not in (SEAL_FILE, SIGNATURE_FILE)}
    return {"files": hashes, "todo": todo_counts(folder)}


def todo_counts(folder: Path) -> dict[str, int]:
    """Return the number of fields that people have to fill in each page of a folder."""
    counts = {}
    for file in sorted(folder.glob("*.md")):
        counts[file.name] = sum(TODO in line for line in file.read_text(encoding="utf-8").splitlines())
    return counts


def check_folder(folder: Path) -> list[Check]:
    """Compare a folder with its seal, and the files that it speaks of with the hashes in `provenance.json`.

    Files that are not on this machine are named as not checked.

    Raises:
        FileNotFoundError: the folder has no seal, or no chain of hashes.
        ValueError: one of both is damaged.
    """
    seal = read_object(folder / SEAL_FILE)
    chain = read_object(folder / PROVENANCE_FILE)
    try:
        return _checks(folder, seal, chain)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / SEAL_FILE} or {PROVENANCE_FILE} is damaged ({type(error).__name__}: {error}); restore them, or write the "
            "evidence again"
        ) from error


def _checks(folder: Path, seal: JsonObject, chain: JsonObject) -> list[Check]:
    """Return the checks of a folder with this seal and this chain of hashes."""
    checks = [run("documents", lambda: _check_documents(folder, seal))]
    raw = {file["path"]: file["sha256"] for file in chain["raw_files"]}
    checks.append(run("raw data", lambda: _check_files(Path(), raw)))
    checkpoint = chain["checkpoint"]["files"]
    checks.append(run("checkpoint", lambda: _check_files(Path(chain["run_dir"]), checkpoint)))
    checks += _check_exports(chain)
    return checks


def _check_documents(folder: Path, seal: JsonObject) -> Finding:
    now = seal_of(folder)["files"]
    changed = sorted(name for name in seal["files"].keys() & now.keys() if seal["files"][name] != now[name])
    missing = sorted(seal["files"].keys() - now.keys())
    added = sorted(now.keys() - seal["files"].keys())
    for names, what in ((changed, "changed after it was sealed"), (missing, "gone"), (added, "not in the seal")):
        if names:
            remedy = f"if that was meant, seal again: moe-train evidence --seal {folder}"
            raise Fault(f"{first_and_count(names)}: {what}; {remedy}")
    todo = sum(seal["todo"].values())
    return Finding(f"{len(now)} files as they were sealed; {todo} lines say {TODO}")


def _check_files(folder: Path, hashes: dict[str, str]) -> Finding:
    """Compare files with their hashes."""
    if not hashes:
        raise NotChecked("no file is recorded")
    states = {name: state_of(folder / name, digest) for name, digest in hashes.items()}
    changed = [name for name, state in states.items() if state == "changed"]
    missing = [name for name, state in states.items() if state == "not here"]
    if changed:
        raise Fault(f"{first_and_count(changed)}: the content is not the one that was recorded")
    if len(missing) == len(states):
        raise NotChecked(f"none of {len(states)} files is here, such as {folder / missing[0]}; run this where they are")
    if missing:
        raise Fault(f"{first_and_count(missing)}: not here, while {len(states) - len(missing)} of the files are; restore them")
    return Finding(f"{len(states)} files have the hashes that were recorded")


def _check_exports(chain: JsonObject) -> Iterator[Check]:
    """Check each export that the evidence lists."""
    for export in chain["exports"]:
        hashes = {file["path"]: file["sha256"] for file in export["files"]}
        directory = Path(export["directory"])
        yield run(f"export {directory.name}", lambda: _check_files(directory, hashes))  # noqa: B023 (run calls it at once)
