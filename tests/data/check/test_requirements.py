"""What tokenizers ask of records: their control tokens, and ids of nine characters where their templates want them."""

from __future__ import annotations

import pytest

from moe_train.data.check.requirements import requirements_of
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.hugging_face import DATA


@pytest.mark.parametrize(
    ("file", "nine", "control"),
    [
        ("tokenizer.model.v1", False, "[INST]"),
        ("mistral_instruct_tokenizer_240323.model.v3", True, "[TOOL_CALLS]"),
        ("mistral_instruct_tokenizer_241114.model.v7", True, "[SYSTEM_PROMPT]"),
        ("tekken_240911.json", True, "<pad>"),
    ],
)
def test_the_form_of_mistral_tokenizers(file: str, nine: bool, control: str) -> None:
    form = requirements_of(Mistral(DATA / file), None)
    assert form.nine_character_ids == nine
    assert form.control.search(f"a{control}b") and not form.control.search("[INSTALL] <span> </script>")


def test_the_form_of_a_template(tokenizer: HuggingFace) -> None:
    form = requirements_of(tokenizer, tokenizer.chat_template)
    assert form.control.search("</s>") and not form.control.search("</spam>")
    assert not form.nine_character_ids
    assert requirements_of(tokenizer, "{{ '[TOOL_CALLS]' }}").nine_character_ids
