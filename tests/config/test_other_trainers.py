"""Other tools' words for keys: each leads to one that exists."""

from __future__ import annotations

from moe_train.config import Config, other_trainers
from moe_train.config.schema import schema_of


def test_other_tools_words_lead_to_keys_that_exist() -> None:
    ours = set(schema_of(Config).all_keys())
    assert set(other_trainers.RENAMED) <= ours
    theirs = [word for words in other_trainers.RENAMED.values() for word in words.split()]
    assert len(theirs) == len(set(theirs)), "a word with two meanings"
    own_words = {path.rpartition(".")[2] for path in ours}
    assert not own_words & (set(theirs) | set(other_trainers.REMARKS)), "a key of ours is never unknown everywhere"
    asked = (
        "lora_r lora_alpha micro_batch_size per_device_train_batch_size gradient_accumulation_steps num_experts_per_tok "
        "num_local_experts base_model model_name_or_path ici_expert_parallelism ici_fsdp_parallelism max_seq_length "
        "max_target_length sequence_len num_train_epochs max_steps warmup_ratio hidden_size intermediate_size num_hidden_layers "
        "num_attention_heads num_key_value_heads rope_theta router_aux_loss_coef output_dir save_steps eval_steps "
        "gradient_checkpointing remat_policy per_device_batch_size dataset_path"
    )
    for word in asked.split():
        assert (other_trainers.remark(word) or "").startswith("use "), word
