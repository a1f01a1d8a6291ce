"""Which runs, steps, checkpoints and exports hold a record: the inverse of `data trace`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from moe_train import config
from moe_train.checkpoint.metadata import CheckpointMetadata, survey
from moe_train.checkpoint.runs import TOKENIZER_FOLDER, saved_config
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.prepared.manifest import MANIFEST, Manifest
from moe_train.data.prepared.store import ExampleSlice, TokenStore
from moe_train.data.records.search import LocatedRecord, Wanted, search_file
from moe_train.data.records.source import Origin
from moe_train.data.tokenizers.load import load_tokenizer, tokenizer_at
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.governance.exports_of_run import ExportEntry, exports_of_run
from moe_train.governance.lineage import manifests_of
from moe_train.governance.provenance import state_of
from moe_train.train.objectives.choose import objective_of_run

_DECODED_AT_ONCE = 256
"""Number of examples that are read and decoded together."""


class SearchedSet(NamedTuple):
    """A prepared set that a run trains on, and the records in it that were looked for."""

    source: int
    """Index in `data.train`."""
    sha256: str
    """Hash of the set."""
    path: str | None
    """Folder of the set; None if it is not in the run's cache any more."""
    records: tuple[LocatedRecord, ...]
    not_searched: tuple[str, ...]
    """Raw files that could not be searched, with the reason."""


class RunWithRecord(NamedTuple):
    """A run, and what of it holds the records that were looked for."""

    run_dir: Path
    sets: tuple[SearchedSet, ...]
    steps: tuple[int, ...] | None
    """Training steps, counted from 1, that learnt from them; None if that cannot be told."""
    why_unknown: str | None
    """Why the steps cannot be told."""
    checkpoints: tuple[int, ...]
    """Steps of the checkpoints that have learnt from them."""
    clean_checkpoints: tuple[int, ...]
    """Steps of the checkpoints from before."""
    exports: tuple[ExportEntry, ...]
    """Exports of the checkpoints that have learnt from them."""
    held_out: tuple[LocatedRecord, ...]
    """Records of the evaluation set, which are measured with, and never trained on."""

    @property
    def is_trained_on(self) -> bool:
        """Return whether the run's training sets hold a record that was looked for."""
        return any(searched.records for searched in self.sets)


def find_in_run(run_dir: Path, looked_for: Wanted) -> RunWithRecord:
    """Search the data of a run, and its order of data.

    Raises:
        FileNotFoundError: The run has no checkpoint that can be read.
    """
    readable = survey(run_dir).readable
    if not readable:
        raise FileNotFoundError(f"{run_dir} has no checkpoint that can be read, so its order of data is unknown")
    newest, saved = next(iter(readable.items()))
    run = config.run_of(saved_config(run_dir, saved.about))
    data = run.training_data()
    tokenizer = load_tokenizer(tokenizer_at(run_dir / TOKENIZER_FOLDER))
    manifests = manifests_of(run_dir / MANIFEST)
    sets = []
    for index, (source, manifest) in enumerate(zip(data.train, manifests, strict=False)):
        sets.append(_search_set(index, source, manifest, _folder_of_set(source, manifest, data.cache_dir), tokenizer, looked_for))
    steps: tuple[int, ...] | None = ()
    why_unknown = None
    if len(manifests) != len(data.train):
        why_unknown = f"{run_dir / MANIFEST} does not state the {len(data.train)} sets of the run"
    elif any(searched.records for searched in sets):
        why_unknown = _why_order_is_unknown(sets)
    if why_unknown is None:
        steps = _steps(run, sets, tokenizer, newest, saved.about)
    if steps is None or why_unknown is not None:
        steps = None
        why_unknown = why_unknown or "the order of data of this version is another one than that of the run"
    # Where the steps cannot be told, every checkpoint may have learnt from the records.
    first = 0 if steps is None else min(steps, default=newest + 1)
    return RunWithRecord(
        run_dir,
        tuple(sets),
        steps,
        why_unknown,
        tuple(step for step in sorted(readable) if step >= first),
        tuple(step for step in sorted(readable) if step < first),
        tuple(entry for entry in exports_of_run(run_dir) if entry.step >= first),
        tuple(_search_held_out(data, looked_for)),
    )


def _search_set(
    index: int, source: config.Source, manifest: Manifest, folder: Path | None, tokenizer: Tokenizer, looked_for: Wanted
) -> SearchedSet:
    """Search the raw files of a set; where one is gone or has changed, the tokens that were made from it."""
    file_format = source.format if isinstance(source, config.FileSource) else "auto"
    records: list[LocatedRecord] = []
    not_searched = []
    others = []
    for number, file in enumerate(manifest.files):
        if file.sha256 is not None and state_of(Path(file.path), file.sha256) == "unchanged":
            records += search_file(Path(file.path), file_format, looked_for)
        else:
            others.append(number)
    if others and folder is not None and looked_for.pattern is not None:
        records += _search_tokens(TokenStore(folder), set(others), tokenizer, looked_for)
    elif others:
        reason = "its prepared set is gone" if folder is None else "a hash cannot be found in tokens"
        not_searched = [f"{manifest.files[number].path}: gone or changed since, and {reason}" for number in others]
    return SearchedSet(index, manifest.hash, None if folder is None else str(folder), tuple(records), tuple(not_searched))


def _search_tokens(store: TokenStore, places: set[int], tokenizer: Tokenizer, looked_for: Wanted) -> Iterator[LocatedRecord]:
    """Yield the records of some files whose decoded examples contain the pattern."""
    lengths = store.lengths()
    seen: set[Origin] = set()
    for first in range(0, len(store), _DECODED_AT_ONCE):
        numbers = range(first, min(first + _DECODED_AT_ONCE, len(store)))
        examples = store.read([ExampleSlice(number, 0, int(lengths[number])) for number in numbers])
        for number, piece in zip(numbers, examples, strict=True):
            origin = store.origin(number)
            if origin.place in places and origin not in seen and looked_for.in_text(tokenizer.decode(piece.tokens.tolist())):
                seen.add(origin)
                where = f"{store.where(number)} (found in its tokens)"
                yield LocatedRecord(store.place(origin), origin.number, where, "not known")


def _search_held_out(data: config.Data, looked_for: Wanted) -> Iterator[LocatedRecord]:
    """Yield the matching records of the evaluation set, as far as it is in files."""
    for source in data.eval:
        if isinstance(source, config.FileSource):
            for path in source.files:
                if Path(path).is_file():
                    yield from search_file(Path(path), source.format, looked_for)


def _folder_of_set(source: config.Source, manifest: Manifest, cache_dir: str) -> Path | None:
    """Return the folder of a prepared set; None if it is in a bucket, or not in the cache any more."""
    if isinstance(source, config.PreparedSource):
        return Path(source.path) if Path(source.path).is_dir() else None
    for path in sorted(Path(cache_dir).glob(f"tokens-*/{MANIFEST}")):
        # As text, since a folder that another version has written need not be read.
        if f'"{manifest.hash}"' in path.read_text(encoding="utf-8", errors="replace"):
            return path.parent
    return None


def _why_order_is_unknown(sets: Sequence[SearchedSet]) -> str | None:
    """Return why the steps cannot be told; None if every prepared set is there."""
    for searched in sets:
        if searched.path is None:
            return f"the prepared set {searched.sha256[:16]} of data.train.{searched.source} is not in the cache any more"
    return None


def _steps(
    run: config.Run, sets: Sequence[SearchedSet], tokenizer: Tokenizer, newest: int, about: CheckpointMetadata
) -> tuple[int, ...] | None:
    """Return the steps up to the newest checkpoint that learnt from the records; None if the order is not the run's."""
    if not any(searched.records for searched in sets):
        return ()
    data = run.training_data()
    prepared = [_as_prepared(source, searched) for source, searched in zip(data.train, sets, strict=True)]
    rows = BatchRows(run.train.batch_size, run.train.seq_len)
    batch_type = objective_of_run(run).batch_type
    on_sets = data.model_copy(update={"train": tuple(prepared)})
    loader = Loader(on_sets, "train", tokenizer, rows, seed=run.seed, batch_type=batch_type)
    if loader.identity != about.data:
        return None
    steps: set[int] = set()
    for searched, store in zip(sets, [TokenStore(str(searched.path)) for searched in sets], strict=True):
        places = {file.path: number for number, file in enumerate(store.manifest.files)}
        origins = {Origin(places[record.file], record.number) for record in searched.records}
        steps |= set(loader.steps_with(searched.source, origins, newest))
    # The loader counts from 0.
    return tuple(step + 1 for step in sorted(steps))


def _as_prepared(source: config.Source, searched: SearchedSet) -> config.PreparedSource:
    """Return the prepared set of a source, so that raw files that are gone or changed do not matter."""
    too_long = source.too_long if isinstance(source, config.PreparedSource) else source.record.too_long
    return config.PreparedSource(name="prepared", path=str(searched.path), too_long=too_long, weight=source.weight)
