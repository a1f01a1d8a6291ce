"""`moe-train data check`: find problems in records before training, and estimate what training on them will take.

Records are read once, in chunks that any number of processes examine in any order; results are gathered in the order of
the records.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_train.data.chat.conversation_to_tokens import check_section
from moe_train.data.check import estimate
from moe_train.data.check.chunks import Coverage, all_chunks, some_chunks
from moe_train.data.check.corrected import corrected_copy
from moe_train.data.check.findings import Question
from moe_train.data.check.gathered import GatheredFindings
from moe_train.data.check.held_out import HeldOutRecords
from moe_train.data.check.personal_data import KINDS
from moe_train.data.check.processes import examine_chunks, useful_processes
from moe_train.data.check.results import CheckResult
from moe_train.data.check.settings import CheckSettings
from moe_train.data.check.sources import CheckedFile, CheckedSource, places_of
from moe_train.data.records.file_bytes import size_of
from moe_train.data.records.local_files import picture_folder
from moe_train.data.tokenizers.tokenizer import Tokenizer

CheckProgress = Callable[[int, int, int], None]
"""A function that is called with the bytes of the files read so far, their total size, and the number of records so far."""


def check_data(
    sources: Sequence[CheckedSource], tokenizer: Tokenizer, settings: CheckSettings, progress: CheckProgress | None = None
) -> CheckResult:
    """Check records.

    Args:
        sources: The files.
        tokenizer: The tokenizer of the training to come.
        settings: The settings.
        progress: A function that is called after every chunk.

    Raises:
        FileNotFoundError: If there is nothing to read.
        FileExistsError: If the `fix` folder exists.
        ValueError: If the check cannot be made as requested.
    """
    # Everything that can be refused is refused before the first record is read.
    settings.validate()
    for source in sources:
        if source.record is not None:
            check_section(source.record, settings.template, tokenizer)
    tokens_per_second = estimate.tokens_per_second(settings.bench)
    places, left_out = places_of(sources, settings.sample is not None)
    held_out = HeldOutRecords(settings.against)
    question = _question(sources, places, tokenizer, settings, held_out)
    sizes = [size_of(place.file) for place in places]
    num_proc = useful_processes(settings.num_proc, sum(sizes), sampling=bool(settings.sample))
    if settings.sample is None:
        coverage = None
        chunks = all_chunks(places, question)
    else:
        coverage = Coverage(settings.sample, sizes)
        chunks = some_chunks(places, question, coverage)
    with tempfile.TemporaryDirectory(prefix="moe-train-check-") as scratch, corrected_copy(settings, places) as copy:
        gathered = GatheredFindings(places, Path(scratch), settings.num_listed, held_out)
        for findings, bytes_read in examine_chunks(chunks, question, num_proc):
            gathered.add(findings)
            if copy is not None and findings.corrected is not None:
                copy.add(findings.place, findings.corrected)
            if progress is not None:
                progress(bytes_read, sum(sizes), gathered.num_records)
        gathered.add_empty_files()
        # A problem of a source as a whole, so `examine`, which knows one chunk, can neither find nor allow it.
        if "mixed-kinds" not in settings.allowed:
            gathered.add_mixed_kinds()
        result = gathered.result(sources, settings, tokens_per_second)
        result["left_out"] = dict(Counter(file.suffix.lower() or file.name for file in left_out).most_common())
        if settings.personal_data is not None:
            counts = {kind.rule: gathered.broken[kind.rule] for kind in KINDS}
            result["personal_data"] = {rule: count for rule, count in counts.items() if count}
        result["without_licence"] = [index for index, source in enumerate(sources) if source.without_licence]
        if coverage is not None:
            result["sample"] = coverage.result(gathered.num_records)
            # The number of duplicates in a sample says little about the whole corpus.
            result["duplicates"] = None
        if copy is not None:
            result["fixed"] = copy.close()
    return result


def _question(
    sources: Sequence[CheckedSource],
    places: list[CheckedFile],
    tokenizer: Tokenizer,
    settings: CheckSettings,
    held_out: HeldOutRecords,
) -> Question:
    """Return what each process needs to know to examine records."""
    ignored = itertools.chain.from_iterable(source.ignore for source in sources)
    return Question(
        records=tuple(sources[place.source].record for place in places),
        folders=tuple(picture_folder(place.file) for place in places),
        tokenizer=tokenizer,
        template=settings.template,
        seq_len=settings.seq_len,
        allowed=settings.allowed,
        repairing=settings.repairing,
        ignore=tuple(dict.fromkeys(ignored)),
        reasoning_effort=settings.reasoning_effort,
        personal_data=settings.personal_data,
        held_out=held_out.hashes,
    )
