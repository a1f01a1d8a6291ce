"""`moe-train data prepare --teacher`: store a teacher's predictions with a prepared set, so that training does not load it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax

from moe_train import config
from moe_train.checkpoint.identity import weights_identity
from moe_train.checkpoint.model_dir import open_model
from moe_train.data.batches.sources import too_long_of
from moe_train.data.prepared.manifest import TeacherEntry
from moe_train.data.prepared.store import TokenStore
from moe_train.data.prepared.teacher_files import FilePredictions, predictions_of_column, predictions_of_file
from moe_train.data.prepared.teacher_set import write_teacher_set
from moe_train.data.prepared.teacher_values import TeacherValues
from moe_train.data.records.open_source import open_source
from moe_train.data.records.problem import brief
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.evaluate.teacher import Teacher
from moe_train.machine import progress
from moe_train.machine.agreement import exchange
from moe_train.model.parameters import combine
from moe_train.weights.together import require_shared


@dataclass(frozen=True)
class TeacherOptions:
    """Where predictions come from: exactly one of a model, files and a column."""

    model: Path | None = None
    """A run or a model."""
    files: tuple[Path, ...] = ()
    """Files of vLLM's `prompt_logprobs`, one for each source of training and then of evaluation."""
    column: str | None = None
    """Column of the records, as axolotl reads it."""
    top_k: int | None = None
    """Number of tokens to store of each prediction; None for that of the objective."""


class TeacherWriter:
    """Writes the predictions of one teacher for all sources of a run.

    Args:
        run: the resolved run of the student.
        tokenizer: the student's tokenizer.
        options: where the predictions come from.

    Raises:
        ValueError: the run has another objective, the teacher has another vocabulary, or the options do not fit the run.
    """

    def __init__(self, run: config.Run, tokenizer: Tokenizer, options: TeacherOptions) -> None:
        if not isinstance(run.objective, config.Distillation):
            raise ValueError(
                f"--teacher stores predictions for objective distillation, but the config has {run.objective.name}; "
                "set objective: {name: distillation}, whose temperature and top_k are used"
            )
        self._run = run
        self._tokenizer = tokenizer
        self._options = options
        self._top_k = options.top_k or run.objective.top_k
        self._temperature = run.objective.temperature
        limit = min(run.model.vocab_size, tokenizer.vocab_size)
        if not run.objective.top_k <= self._top_k:
            raise ValueError(f"--top-k {self._top_k} stores fewer tokens than objective.top_k {run.objective.top_k}; raise it")
        if self._top_k > limit:
            raise ValueError(f"--top-k {self._top_k} is more than the {limit} tokens of the vocabulary; lower it")
        if options.model is None and self._temperature != 1:
            raise ValueError(
                f"served log-probabilities have temperature 1, not objective.temperature {self._temperature}; set it to 1"
            )
        self._teacher: tuple[Teacher, jax.sharding.Mesh] | None = None
        self._opened = None
        if options.model is not None:
            # Checked before any weights are loaded.
            self._opened = open_model(options.model)
            config.require_vocabulary(self._opened.model, "teach")
            check_same_vocabulary(tokenizer, self._opened.tokenizer, str(options.model))
            if run.train.seq_len > self._opened.model.max_seq_len:
                limit = self._opened.model.max_seq_len
                raise ValueError(f"train.seq_len {run.train.seq_len} exceeds the teacher's max_seq_len {limit}; lower it")

    def write(self, store: TokenStore, source: config.Source, index: int) -> TokenStore:
        """Write the predictions for one source, unless they exist, and return the set that holds them.

        Of several processes, the first one writes what all of them compute.

        Args:
            store: the tokens of the source, in a local folder.
            source: the source.
            index: its number among the sources of training and then of evaluation.
        """
        if "://" in store.path:
            raise ValueError(f"{store.path} is in a bucket; prepare the data locally, and copy the result with --to")
        if store.manifest.teacher is not None:
            raise ValueError(f"{store.path} has a teacher already; name the set without one, or leave --teacher out")
        entry = self._entry(store, source, index)
        role = self._follow if jax.process_index() else self._lead
        directory = role(store, source, index, entry)
        if self._opened is not None:
            with jax.set_mesh(self._opened.mesh):
                require_shared(directory)
        return TokenStore(directory, vocab_size=self._tokenizer.vocab_size)

    def _lead(self, store: TokenStore, source: config.Source, index: int, entry: TeacherEntry) -> Path:
        """Write the set in the first process, and tell the others which examples to compute with it; returns its folder."""
        done = progress.counted("asking the teacher", len(store), "examples")

        def predictions(examples: range) -> Iterator[TeacherValues]:
            if self._options.model is not None:
                _announce(_NextExamples(examples.start, examples.stop))
            for values in self._predictions(store, source, index, examples, entry):
                yield values
                done(1)

        directory = write_teacher_set(store, self._run.training_data().cache_dir, entry, predictions)
        _announce(_Finished(str(directory)))
        return directory

    def _follow(self, store: TokenStore, source: config.Source, index: int, entry: TeacherEntry) -> Path:
        """Compute what the first process asks for until it has written the set, and return the folder of the set."""
        while True:
            announced = _heard()
            if isinstance(announced, _Finished):
                return Path(announced.directory)
            for _ in self._predictions(store, source, index, range(announced.start, announced.stop), entry):
                pass  # the first process has the same values, and writes them

    def _entry(self, store: TokenStore, source: config.Source, index: int) -> TeacherEntry:
        """Return what the manifest states of the teacher."""
        options = self._options
        if options.model is not None:
            assert self._opened is not None
            # Of several processes, each hashes its share.
            with jax.set_mesh(self._opened.mesh):
                name, sha256 = str(options.model), weights_identity(options.model).sha256
        elif options.files:
            name = str(options.files[index])
            with options.files[index].open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            name, sha256 = f"column {options.column}", store.manifest.hash
        return TeacherEntry(
            model=name,
            sha256=sha256,
            top_k=self._top_k,
            temperature=self._temperature,
            seq_len=self._run.train.seq_len,
            too_long=too_long_of(source, store),
            tokens=store.manifest.hash,
        )

    def _predictions(
        self, store: TokenStore, source: config.Source, index: int, examples: range, entry: TeacherEntry
    ) -> Iterator[TeacherValues]:
        options = self._options
        if options.model is not None:
            teacher, mesh = self._loaded(entry)
            with jax.set_mesh(mesh):
                yield from teacher.predictions(store, examples, entry.too_long)
            return
        lengths = store.lengths()
        if entry.too_long == "split" and lengths.max() > entry.seq_len:
            raise ValueError(
                f"{store.path}: texts longer than train.seq_len {entry.seq_len} are split, and a served teacher has read them "
                "whole; raise train.seq_len, or set record.too_long: drop"
            )
        settings = FilePredictions(store, lengths, entry.top_k, self._tokenizer.vocab_size, entry.seq_len)
        if options.files:
            yield from predictions_of_file(options.files[index], settings, examples)
            return
        assert options.column is not None
        if isinstance(source, config.PreparedSource):
            raise ValueError(f"{source.path} is a prepared set, which has no columns; name the files of records")
        yield from predictions_of_column(options.column, open_source(source), settings, examples)

    def _loaded(self, entry: TeacherEntry) -> tuple[Teacher, jax.sharding.Mesh]:
        """Load the teacher with the first examples that nothing is stored for."""
        if self._teacher is None:
            assert self._opened is not None
            mesh = self._opened.mesh
            with jax.set_mesh(mesh):
                model = combine(*self._opened.load())
            train = self._run.train
            rows = train.batch_size // train.microbatches
            self._teacher = Teacher(model, mesh, entry, self._tokenizer.vocab_size, rows), mesh
        return self._teacher


class _NextExamples(NamedTuple):
    """Examples that all processes compute next."""

    start: int
    stop: int


class _Finished(NamedTuple):
    """The set is written."""

    directory: str


_WRITING_SECONDS = 24 * 3600.0
"""Seconds that the other processes wait for the first one, which may hash a large set or wait for another job that writes it."""


def _announce(message: _NextExamples | _Finished) -> None:
    """Tell the other processes what comes next; called by the first one."""
    exchange(json.dumps(message), "the examples that a teacher reads next", _WRITING_SECONDS)


def _heard() -> _NextExamples | _Finished:
    """Return what the first process has announced."""
    message = json.loads(exchange("", "the examples that a teacher reads next", _WRITING_SECONDS)[0])
    return _NextExamples(*message) if len(message) == 2 else _Finished(*message)


def check_files(options: TeacherOptions, num_sources: int) -> None:
    """Raise an error unless there is a file for each source.

    Raises:
        ValueError: their numbers differ.
        FileNotFoundError: a file does not exist.
    """
    if options.files and len(options.files) != num_sources:
        raise ValueError(
            f"--teacher-file names {len(options.files)} files for {num_sources} sources; name one for each source of data.train "
            "and then of data.eval"
        )
    for file in options.files:
        if not file.is_file():
            raise FileNotFoundError(f"--teacher-file {file}: no such file")


def check_same_vocabulary(student: Tokenizer, teacher: Tokenizer, name: str) -> None:
    """Raise ValueError if an id of the student's tokenizer means something else to the teacher, or nothing.

    A teacher may have further ids: rows that pad its vocabulary, or tokens that the student lacks.
    """
    if student.identity == teacher.identity:
        return
    if student.vocab_size > teacher.vocab_size:
        raise ValueError(
            f"the student's tokenizer {student.files[0]} has {student.vocab_size} ids, and that of the teacher {name} has "
            f"{teacher.vocab_size}; choose a teacher with the same tokenizer"
        )
    # Behind a letter, since some tokenizers drop the space that begins a text.
    [*_, letter] = student.encode("a")
    for number in range(student.vocab_size):
        student_text = _text_behind(student, letter, number)
        teacher_text = _text_behind(teacher, letter, number)
        # Parts of characters, which kinds of tokenizers write differently, cannot be compared by their texts.
        if student_text != teacher_text and not {"\ufffd"} & {*student_text, *teacher_text}:
            raise ValueError(
                f"the teacher {name} has another vocabulary: id {number} is {brief(student_text)} for the student and "
                f"{brief(teacher_text)} for the teacher; choose a teacher with the same tokenizer, or learn from its texts "
                "(moe-train synthesize)"
            )


def _text_behind(tokenizer: Tokenizer, first: int, second: int) -> str:
    """Return the text of a token that follows another one."""
    both = tokenizer.decode([first, second], keep_special=True)
    return both.removeprefix(tokenizer.decode([first], keep_special=True))
