"""The token that pads batches of texts for a reader that finds the end of a text by it."""

from __future__ import annotations

from moe_train.data.tokenizers.tokenizer import Tokenizer

_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<unk>", "[UNK]", "<|endoftext|>")
"""Names of tokens that are made for padding, or that a text never contains, in the order of preference."""


def padding_id(tokenizer: Tokenizer) -> int:
    """Return the id of a control token that no text, no chat format and no end of an answer contains.

    Training with a head for scores checks that its data do not contain it either (`run.preflight`).

    Raises:
        ValueError: the tokenizer has no such token.
    """
    used = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.end_ids}
    by_name = {tokenizer.decode([number], keep_special=True): number for number in sorted(tokenizer.control_ids - used)}
    # A token whose name the chat template writes may occur in a conversation.
    template = tokenizer.chat_template or ""
    for name in _NAMES:
        if name in by_name and name not in template:
            return by_name[name]
    for name, number in by_name.items():
        if any(word in name.lower() for word in ("pad", "reserved", "special_", "unused")) and name not in template:
            return number
    raise ValueError(
        f"the tokenizer {tokenizer.files[0]} has no token for padding, such as <pad> or <unk>, by which transformers finds the end "
        "of a text; add a control token <pad> to it"
    )
