"""`moe-train evaluate`: the loss of a run or an external model on files."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from moe_train import config
from moe_train.checkpoint.model_dir import OpenedModel, open_model
from moe_train.commands.evaluate_scores import evaluate_scores
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.chat.chat_date import date_of_data
from moe_train.data.records import unread
from moe_train.data.records.conversation import normalise
from moe_train.data.records.media import shows_media
from moe_train.data.records.open_source import first_record
from moe_train.data.records.problem import located
from moe_train.data.records.recognise import recognise
from moe_train.evaluate.held_out import evaluate_held_out
from moe_train.evaluate.loss import make_batch_sums
from moe_train.machine.files import JsonObject
from moe_train.machine.mesh import BATCH
from moe_train.train.objectives.choose import objective_of
from moe_train.train.objectives.objective import Objective
from moe_train.train.objectives.preference import preference


def evaluate_model(directory: Path, files: Sequence[Path], chat_template: str | None = None) -> JsonObject:
    """Measure the next-token loss of a run (its named or else newest checkpoint) or a Hugging Face model on files.

    A model with a head for classification or rewards is compared with labels or pairs instead (`evaluate_scores`).

        loss = moe_train.evaluate_model(Path("runs/tuned"), [Path("held_out.jsonl")])["loss"]

    Rows are as long as the run's; for a model that is no run, at most 2048 tokens. Of preference pairs, the loss is that of the
    chosen answers, and `accuracy` is the share of pairs whose chosen answer has the higher mean log-probability of a token.

    Args:
        directory: the run or model.
        files: the files.
        chat_template: a jinja file, its text, or a name; None for the template of the run or of the model's tokenizer.

    Raises:
        RuntimeError: the loss is not finite.
        FileNotFoundError: a file does not exist.
    """
    opened = open_model(directory)
    run = opened.run
    if opened.model.scores is not None:
        return evaluate_scores(directory, files, run, chat_template)
    mesh = opened.mesh
    rows = _rows_of_batches(opened)
    sources = tuple(config.FileSource(name="files", files=(str(file),), record=_record(file, run)) for file in files)
    chat_date = None
    if run and isinstance(run.data, config.RunData):
        chat_template = chat_template or run.data.chat_template
        chat_date = date_of_data(run.data)
    with tempfile.TemporaryDirectory() as cache, jax.set_mesh(mesh):
        # Only `eval` is read, but a data section has to have training sources.
        data = config.Data(chat_template=chat_template, chat_date=chat_date, train=sources, eval=sources, cache_dir=cache)
        objective = _objective(sources, _media(opened, rows.seq_len))
        loader = Loader(data, "eval", opened.tokenizer, rows, seed=0, batch_type=objective.batch_type)
        if any(source.store.manifest.media is not None for source in loader.sources):
            structure, params, step = opened.load_with_tower()
        else:
            # Without pictures or sound the batches have none, and the tower is not needed.
            objective = _objective(sources)
            loader = Loader(data, "eval", opened.tokenizer, rows, seed=0, batch_type=objective.batch_type)
            structure, params, step = opened.load_with_step()
        metrics = evaluate_held_out(make_batch_sums(structure, objective), params, {}, loader, mesh)
    if "pairs" in metrics:
        metrics = _of_pairs(metrics)
    if not math.isfinite(metrics["loss"]):
        raise RuntimeError(
            f"the loss of {directory} on {loader.num_tokens} tokens is {metrics['loss']}, so its weights are unusable; "
            "evaluate an earlier checkpoint or another export"
        )
    checkpoint = {} if step is None else {"checkpoint": step}
    return {
        **checkpoint,
        **metrics,
        # Limited, since exp overflows float64 beyond 709.
        "perplexity": math.exp(min(metrics["loss"], 700)),
        "records": loader.num_records,
        "records_truncated": loader.num_truncated,
        "seq_len": rows.seq_len,
        **({"not_read": unread.in_words(loader.unread)} if loader.unread else {}),
    }


def _rows_of_batches(opened: OpenedModel) -> BatchRows:
    """Return the number of rows of a batch and their length."""
    run = opened.run
    replicas = math.prod(opened.mesh.shape[axis] for axis in BATCH)
    if run is not None:
        seq_len = run.train.seq_len
        # A microbatch of the run is known to fit into memory.
        batch_size = run.train.batch_size // run.train.microbatches
    else:
        seq_len = min(opened.model.max_seq_len, 2048)
        # About 8 rows, and at least one for each replica.
        batch_size = replicas * max(1, 8 // replicas)
    # Rounded up to a multiple of the replicas, over which the batch is divided.
    return BatchRows(batch_size + -batch_size % replicas, seq_len)


def _record(file: Path, run: config.Run | None) -> config.Record:
    """Choose the record section for a file by its first record: one of the run's own if it fits, else by the columns."""
    if not file.is_file():
        raise FileNotFoundError(f"--data {file}: no such file")
    location, first_fields = first_record((str(file),)) or (str(file), {"text": ""})  # an empty file is reported by the loader
    sources = (*run.data.eval, *run.data.train) if run and isinstance(run.data, config.RunData) else ()
    run_records = [source.record for source in sources if isinstance(source, config.RecordSource)]
    record = next((r for r in run_records if _readable(first_fields, r)), None)
    if record is None:
        record = located(location, recognise, first_fields)
    if isinstance(record, config.TextRecord):
        return record
    # As many records as possible count: training may drop one that is too long, or stop at it. Pairs are never cut.
    judged = isinstance(record, config.PreferenceRecord | config.LabelledRecord)
    whole = judged or _shows_media(first_fields, record)
    return record.model_copy(update={"too_long": "drop" if whole else "truncate"})


def _shows_media(fields: JsonObject, record: config.Record) -> bool:
    """Return whether a record has pictures or sound, which are never cut."""
    return _readable(fields, record) and shows_media(normalise(fields, record))


def _media(opened: OpenedModel, seq_len: int) -> config.RunVision | config.RunAudio | None:
    """Return the section on pictures or sound for a model with a tower; None for another model."""
    if opened.run is not None:
        return opened.run.media
    encoder = opened.encoder
    rules = opened.tokenizer.media
    if encoder is None or rules is None or rules.media != encoder.media:
        return None
    if isinstance(encoder, config.AudioEncoder):
        chunks = seq_len // encoder.tokens_per_chunk
        if not chunks:
            return None
        # The chunks of a row are divided over the devices along `context`.
        return config.RunAudio(encoder=encoder, chunks_per_row=chunks + -chunks % opened.mesh.shape["context"])
    patches = seq_len * encoder.patches_per_token
    return config.RunVision(encoder=encoder, patches_per_row=patches)


def _objective(sources: Sequence[config.FileSource], media: config.RunVision | config.RunAudio | None = None) -> Objective:
    """Return how files are measured: pairs by the likelihood of their answers, everything else by its next tokens."""
    kinds = {source.record.name for source in sources}
    if "labelled" in kinds:
        raise ValueError(
            f"{sources[0].files[0]}: answers that are labelled as good or bad have no loss without a reference; name them in "
            "data.eval of the run, or evaluate pairs (prompt, chosen, rejected)"
        )
    if "preference" not in kinds:
        return objective_of(config.NextToken(name="next_token"), media)
    if len(kinds) > 1:
        raise ValueError(f"--data names files of several kinds ({', '.join(sorted(kinds))}); evaluate pairs on their own")
    return preference(config.Preference(name="preference", loss="simpo"))


def _of_pairs(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return what a model without a reference has to say about pairs, the loss being that of a chosen answer's tokens."""
    return {
        "loss": metrics["nll_loss"],
        "pairs": metrics["pairs"],
        "accuracy": metrics["rewards/accuracies"],
        "logps/chosen": metrics["logps/chosen"],
        "logps/rejected": metrics["logps/rejected"],
    }


def _readable(fields: JsonObject, record: config.Record) -> bool:
    try:
        normalise(fields, record)
    except ValueError:
        return False
    return True
