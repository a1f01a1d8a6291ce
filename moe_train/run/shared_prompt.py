"""The layout of preference pairs in rows: with a prompt for each answer, or with one that both answers attend to."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train import config
from moe_train.data.batches.shared_prompts import LEAST_SAVED, share_saved
from moe_train.data.batches.sources import open_store
from moe_train.data.chat.conversation_to_tokens import load_template
from moe_train.data.prepared.store import TokenStore
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.machine.mesh import platform
from moe_train.model.attention.kernels import takes_shared_prompts
from moe_train.run.preflight import check_files, check_ready


def with_layout(run: config.Run) -> config.Run:
    """Return the run with `objective.shared_prompt: auto` decided by the attention kernel and the pairs of its data.

    Any other run is returned as it is. The pairs are tokenized for it, unless that has been done.

    Raises:
        ValueError: `shared_prompt` is true, and the attention kernel does not let two answers attend to one prompt; or the data
            cannot be used.
        FileNotFoundError: A file of the data does not exist.
    """
    section = run.objective
    if not isinstance(section, config.Preference) or section.shared_prompt is False:
        return run
    stores: list[TokenStore] = []
    if section.shared_prompt == "auto" and takes_shared_prompts(_kernel(run.compute)):
        data = run.training_data()
        tokenizer = load_tokenizer(data.tokenizer)
        # Checked before any data is tokenized, which may take long.
        check_files(data)
        check_ready(run, data, tokenizer)
        template = load_template(data.chat_template, tokenizer)
        stores = [open_store(source, data, tokenizer, template) for source in (*data.train, *data.eval)]
    shares = shares_prompts(section, run.compute, stores)
    return run.model_copy(update={"objective": section.model_copy(update={"shared_prompt": shares})})


def shares_prompts(section: config.Preference, compute: config.Compute, stores: Sequence[TokenStore]) -> bool:
    """Return whether rows hold the prompt of a pair once.

    Args:
        section: the objective.
        compute: the section with the attention kernel.
        stores: the pairs; read only for `auto`.

    Raises:
        ValueError: `shared_prompt` is true, and the attention kernel does not let two answers attend to one prompt.
    """
    kernel = _kernel(compute)
    if section.shared_prompt == "auto":
        return takes_shared_prompts(kernel) and share_saved(stores) >= LEAST_SAVED
    if section.shared_prompt and not takes_shared_prompts(kernel):
        raise ValueError(
            f"objective.shared_prompt is true, and the attention kernel {kernel} cannot let two answers attend to one prompt; set "
            "it to auto, or compute.attention to blocked"
        )
    return section.shared_prompt


def _kernel(compute: config.Compute) -> str:
    """Return the attention kernel of a run, or auto for one that every platform but the TPU may choose."""
    # On a TPU auto is splash, but for rows of an unusual length.
    return "splash" if compute.attention == "auto" and platform() == "tpu" else compute.attention
