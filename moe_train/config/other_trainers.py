"""Names that other trainers use for our settings; they are consulted when a config has an unknown key.

The names come from axolotl, Hugging Face's Trainer, TRL and model configs, PEFT, MaxText, mistral-finetune, Megatron-LM and
torchtitan.
"""

from __future__ import annotations

RENAMED = {
    "name": "run_name experiment_name",
    "run_dir": "output_dir base_output_directory save save_dir dump_folder checkpoint_dir",
    "seed": "random_seed data_seed data_shuffle_seed",
    "init_from": (
        "base_model base_model_config model_name_or_path pretrained_model_name_or_path model_id_or_path model_id model_path "
        "hf_model_path initial_load_path load_parameters_path load pretrained_checkpoint"
    ),
    "model.family": "model_type architectures flavor",
    "model.vocab_size": "padded_vocab_size n_vocab",
    "model.model_dim": "hidden_size base_emb_dim emb_dim n_embd d_model dim",
    "model.num_layers": "num_hidden_layers base_num_decoder_layers num_decoder_layers n_layers n_layer",
    "model.attention.num_heads": "num_attention_heads base_num_query_heads num_query_heads n_heads n_head",
    "model.attention.num_kv_heads": "num_key_value_heads base_num_kv_heads num_query_groups n_kv_heads",
    "model.attention.head_dim": "kv_channels",
    "model.attention.windows": "sliding_window sliding_window_size window_size layer_types",
    "model.ffn": "moe",
    "model.ffn.ffn_dim": (
        "intermediate_size moe_intermediate_size ffn_hidden_size moe_ffn_hidden_size base_mlp_dim base_moe_mlp_dim mlp_dim "
        "hidden_dim"
    ),
    "model.ffn.num_experts": "num_local_experts n_routed_experts num_moe_experts moe_num_experts",
    "model.ffn.dense_layers.count": "first_k_dense_replace first_num_dense_layers n_dense_layers",
    "model.ffn.num_shared_experts": "n_shared_experts shared_experts",
    "model.ffn.router.name": "scoring_func moe_router_score_function routed_score_func",
    "model.ffn.router.scale": "routed_scaling_factor moe_router_topk_scaling_factor",
    "model.ffn.router.bias": "moe_router_enable_expert_bias routed_bias",
    "model.ffn.router.num_groups": "n_group moe_router_num_groups n_routing_groups",
    "model.ffn.router.groups_per_token": "topk_group moe_router_group_topk topk_routing_group",
    "model.ffn.experts_per_token": "num_experts_per_tok num_experts_per_token moe_router_topk moe_top_k",
    "model.rope": "rope_scaling rope_parameters",
    "model.rope.theta": "rope_theta rotary_base rope_max_timescale",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layernorm_epsilon norm_epsilon normalization_layer_epsilon",
    "model.tie_embeddings": "tie_word_embeddings tied_embeddings logits_via_embedding",
    "model.max_seq_len": "max_position_embeddings",
    "model.init_stddev": "initializer_range init_method_std init_std",
    "lora.targets.0.modules": "target_modules lora_target_modules lora_target_linear target_parameters lora_target",
    "lora.targets.0.rank": "lora_r r lora_rank",
    "lora.targets.0.alpha": "lora_alpha scaling",
    "lora.dropout": "lora_dropout",
    "lora.rslora": "use_rslora peft_use_rslora",
    "lora.train": "modules_to_save lora_modules_to_save additional_target",
    "lora.init_from": "lora_model_dir adapter_name_or_path",
    "lora.quantize.name": "load_in_4bit load_in_8bit bnb_4bit_quant_type",
    "data.tokenizer.path": "tokenizer_path tokenizer_name_or_path tokenizer_config tokenizer_model tokenizer_file hf_assets_path",
    "data.train": "datasets dataset_mixer train_file train_files train_data instruct_data",
    "data.train.0.dataset": "dataset_name hf_path",
    "data.train.0.files": "dataset_path data_path data_files data_dir grain_train_files hf_train_files",
    "data.train.0.record": "dataset_text_field text_column_name train_data_columns field_messages",
    "data.train.0.weight": "train_weights interleave_probs",
    "data.eval": (
        "test_datasets eval_dataset eval_instruct_data eval_file validation_file valid_data_path grain_eval_files hf_eval_files "
        "val_set_size"
    ),
    "data.cache_dir": "dataset_prepared_path data_cache_path",
    "data.num_proc": (
        "dataset_num_proc dataset_processes preprocessing_num_workers dataloader_num_workers num_workers grain_worker_count"
    ),
    "data.prefetch": "dataloader_prefetch_factor prefetch_factor grain_per_worker_buffer_size",
    "objective": "rl rlhf rl_type stage train_type",
    "objective.loss": "loss_type dpo_loss_type pref_loss preference_loss dpo.algo",
    "objective.beta": "rl_beta dpo_beta pref_beta orpo_alpha orpo_lambda kto_beta",
    "objective.label_smoothing": "dpo_label_smoothing cpo_label_smoothing",
    "objective.sft_weight": "rpo_alpha pref_ftx cpo_alpha loss_weights",
    "objective.margin": "simpo_gamma gamma_beta_ratio",
    "objective.desirable_weight": "kto_desirable_weight kto_chosen_weight",
    "objective.undesirable_weight": "kto_undesirable_weight kto_rejected_weight",
    "optimizer.name": "optim opt_type",
    "optimizer.learning_rate": "lr",
    "optimizer.schedule": "lr_scheduler lr_scheduler_type lr_decay_style lr_schedule_type",
    "optimizer.schedule.warmup_steps": "warmup_ratio warmup_steps_fraction lr_warmup_iters lr_warmup_fraction pct_start",
    "optimizer.schedule.decay_steps": "lr_wsd_decay_iters wsd_decay_steps_fraction decay_ratio",
    "optimizer.schedule.final_fraction": (
        "min_lr min_lr_ratio min_lr_factor cosine_min_lr_ratio cosine_learning_rate_final_fraction learning_rate_final_fraction"
    ),
    "optimizer.weight_decay": "adam_weight_decay",
    "optimizer.b1": "adam_beta1 adam_b1 beta1",
    "optimizer.b2": "adam_beta2 adam_b2 beta2",
    "optimizer.eps": "adam_epsilon adam_eps",
    "optimizer.max_grad_norm": "gradient_clipping gradient_clipping_threshold clip_grad max_norm",
    "train.spike_guard": "loss_watchdog_threshold loss_watchdog_patience",
    "optimizer.rounding": "bf16_stochastic_round use_stochastic_rounding master_weights main_params_dtype",
    "train.capacity_factor": "moe_expert_capacity_factor expert_capacity_factor",
    "train.steps": "max_steps num_train_steps train_iters",
    "train.epochs": "num_train_epochs num_epochs",
    "train.batch_size": (
        "micro_batch_size per_device_train_batch_size per_device_batch_size local_batch_size global_batch_size train_batch_size"
    ),
    "train.microbatches": "gradient_accumulation_steps num_microbatches",
    "train.seq_len": (
        "max_seq_length max_length sequence_len seq_length max_target_length cutoff_len model_max_length train_seq_len"
    ),
    "loss.load_balance_loss_coef": (
        "router_aux_loss_coef moe_aux_loss_coeff moe_aux_loss_coef load_balance_loss_weight aux_loss_alpha lbl_coef"
    ),
    "loss.bias_update_rate": "moe_router_bias_update_rate routed_bias_update_rate",
    "loss.router_z_loss_coef": "moe_z_loss_coeff rzl_coef",
    "compute.dtype": "bf16 fp16 mixed_precision mixed_precision_param torch_dtype",
    "compute.param_dtype": "weight_dtype params_dtype",
    "compute.remat": (
        "gradient_checkpointing remat_policy activation_checkpoint enable_activation_checkpointing recompute_granularity "
        "use_gradient_checkpointing"
    ),
    "compute.attention": "attn_implementation attention_backend flash_attention sdp_attention use_flash_attn",
    "compute.grouped_matmul": "experts_implementation moe_grouped_gemm megablox sparse_matmul use_grouped_mm",
    "mesh.data": "dcn_data_parallelism ici_data_parallelism data_parallel_replicate_degree",
    "mesh.fsdp": (
        "ici_fsdp_parallelism dcn_fsdp_parallelism data_parallel_shard_degree fsdp_config fsdp_version zero_stage deepspeed"
    ),
    "mesh.expert": "ici_expert_parallelism dcn_expert_parallelism expert_model_parallel_size expert_parallel_degree",
    "mesh.context": "ici_context_parallelism ici_sequence_parallelism context_parallel_size context_parallel_degree",
    "mesh.tensor": (
        "ici_tensor_parallelism dcn_tensor_parallelism tensor_model_parallel_size tensor_parallel_degree tensor_parallel_size"
    ),
    "evaluation.every_steps": "eval_steps eval_freq eval_interval evals_per_epoch eval_strategy evaluation_strategy",
    "evaluation.batches": "eval_iters max_eval_batches",
    "checkpoint.every_steps": "save_steps save_interval save_strategy saves_per_epoch ckpt_freq checkpoint_period",
    "checkpoint.keep_last": "save_total_limit num_ckpt_keep keep_latest_k max_num_checkpoints_to_keep",
    "checkpoint.keep_best": "load_best_model_at_end",
    "metrics.every_steps": "logging_steps log_freq log_period log_interval",
    "metrics.tensorboard": "report_to enable_tensorboard use_tensorboard tensorboard_dir logging_dir",
}
"""Our key path -> the names of other trainers for it, separated by spaces."""

_WHOLE_STEP = "the sequences of one optimizer step over all devices; train.microbatches splits it"
_IN_STEPS = "a number of optimizer steps"
_ROUTER = "the balance loss is per layer; transformers averages over the layers"

REMARKS = {
    "rl": "{name: preference, loss: sigmoid} for dpo, ipo and orpo by their names; {name: unpaired_preference} for kto",
    "precompute_ref_log_probs": "leave it out: the reference is the model without adapters, or computed once before full training",
    "sync_ref_model": "leave it out: the reference stays as it is",
    "micro_batch_size": f"{_WHOLE_STEP}: micro_batch_size x gradient_accumulation_steps x devices",
    "per_device_train_batch_size": f"{_WHOLE_STEP}: per_device_train_batch_size x gradient_accumulation_steps x devices",
    "per_device_batch_size": f"{_WHOLE_STEP}: per_device_batch_size x devices",
    "local_batch_size": f"{_WHOLE_STEP}: local_batch_size x data-parallel devices",
    "gradient_accumulation_steps": "train.batch_size counts all of them",
    "warmup_ratio": _IN_STEPS,
    "warmup_steps_fraction": _IN_STEPS,
    "lr_warmup_fraction": _IN_STEPS,
    "pct_start": _IN_STEPS,
    "decay_ratio": _IN_STEPS,
    "min_lr": "a fraction of optimizer.learning_rate",
    "fp16": "float32 or bfloat16",
    "bf16": "bfloat16",
    "gradient_checkpointing": "minimal or full",
    "router_aux_loss_coef": _ROUTER,
    "moe_aux_loss_coeff": _ROUTER,
    "moe_aux_loss_coef": _ROUTER,
    "scaling": "alpha = scaling x rank",
    "lora_target_linear": 'modules: ["*"] is all of them',
    "modules_to_save": "modules trained in full, such as embed, head, *_norm, ffn.router",
    "lora_modules_to_save": "modules trained in full, such as embed, head, *_norm, ffn.router",
    "additional_target": "modules trained in full, such as embed, head, *_norm, ffn.router",
    "target_parameters": "modules such as ffn.*_proj; each routed expert gets its own adapter",
    "val_set_size": "a separate source",
    "eval_strategy": _IN_STEPS,
    "evaluation_strategy": _IN_STEPS,
    "save_strategy": _IN_STEPS,
    "evals_per_epoch": _IN_STEPS,
    "saves_per_epoch": _IN_STEPS,
    "wsd_decay_steps_fraction": _IN_STEPS,
    "deepspeed": "parameters, gradients and optimizer are sharded over the mesh; there is no other setting",
    "fsdp_config": "parameters, gradients and optimizer are sharded over the mesh; there is no other setting",
    "zero_stage": "parameters, gradients and optimizer are sharded over the mesh; there is no other setting",
    "ici_fsdp_transpose_parallelism": "the mesh has the axes data, fsdp, expert, context and tensor",
    "pipeline_model_parallel_size": "pipelines are not supported; the mesh has the axes data, fsdp, expert, context and tensor",
    "pipeline_parallel_degree": "pipelines are not supported; the mesh has the axes data, fsdp, expert, context and tensor",
    "ici_pipeline_parallelism": "pipelines are not supported; the mesh has the axes data, fsdp, expert, context and tensor",
    "model_name": "state an architecture under model, or a checkpoint to start from as init_from",
    "hidden_dim": "the name of the FFN's width in params.json",
    "sample_packing": "leave it out: sequences are always packed (longest first, best fit), and never attend to each other",
    "pad_to_sequence_len": "leave it out: every batch is train.batch_size x train.seq_len",
    "train_on_inputs": "leave it out: in conversations, the loss covers only the assistant's tokens",
    "completion_only_loss": "leave it out: in conversations, the loss covers only the assistant's tokens",
    "assistant_only_loss": "leave it out: in conversations, the loss covers only the assistant's tokens",
    "adapter": "leave it out: a lora section trains adapters; without one every weight is trained",
    "use_peft": "leave it out: a lora section trains adapters; without one every weight is trained",
    "load_in_4bit": "nf4",
    "load_in_8bit": "int8",
    "resume_from_checkpoint": "leave it out: a run continues from the last checkpoint in run_dir by itself",
    "auto_resume_from_checkpoints": "leave it out: a run continues from the last checkpoint in run_dir by itself",
    "scan_layers": "leave it out: layers are always scanned",
    "trust_remote_code": "leave it out: code in a model's folder is never run",
    "special_tokens": "leave it out: they come with the tokenizer",
}
"""A name of another trainer -> what else differs from our setting, or why we have no such setting."""


def _our_key(key: str) -> str | None:
    for path, other_names in RENAMED.items():
        if key in other_names.split():
            return path
    return None


def remark(key: str) -> str | None:
    """Return what to write instead of another trainer's `key`, or None if no trainer in the tables has a setting of this name."""
    note = REMARKS.get(key)
    our_key = _our_key(key)
    if our_key is None:
        return note
    explanation = f" ({note})" if note else ""
    return f"use {our_key}{explanation}"
