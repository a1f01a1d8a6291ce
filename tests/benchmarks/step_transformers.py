"""The training step of a workload in transformers (PEFT for LoRA) on CPU, timed as `moe-train bench` times ours.

    python tests/benchmarks/step_transformers.py tests/benchmarks/workload_S.yaml [--experts grouped_mm|eager] [--lora RANK]

Prints one JSON object. Needs the extra `judges`. Weights and tokens are random: compare times, not losses.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_train.config import yaml_file
from moe_train.machine.processes import process_started

WARM_UP, TIMED = 2, 7

arguments = argparse.ArgumentParser()
arguments.add_argument("workload")
arguments.add_argument("--experts", default="grouped_mm")
arguments.add_argument("--lora", type=int, default=0)
arguments = arguments.parse_args()

run = yaml_file.load_config(arguments.workload)
m, train = run.model, run.train
torch.manual_seed(0)
model = MixtralForCausalLM(
    MixtralConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.model_dim,
        intermediate_size=m.ffn.ffn_dim,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.attention.num_heads,
        num_key_value_heads=m.attention.num_kv_heads,
        head_dim=m.attention.head_dim,
        num_local_experts=m.ffn.num_experts,
        num_experts_per_tok=m.ffn.experts_per_token,
        max_position_embeddings=train.seq_len,
        sliding_window=None,
        use_cache=False,
        attn_implementation="sdpa",
    )
)
model.set_experts_implementation(arguments.experts)
if arguments.lora:
    from peft import LoraConfig, get_peft_model

    targets = {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    model = get_peft_model(model, LoraConfig(r=arguments.lora, lora_alpha=2 * arguments.lora, task_type="CAUSAL_LM", **targets))
model.train()
trainable = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.01, fused=True)  # its fastest on CPUs
tokens = torch.randint(0, m.vocab_size, (train.batch_size, train.seq_len))
wall, cpu = [], []
for _ in range(1 + WARM_UP + TIMED):
    begun, cpu_begun = time.perf_counter(), time.process_time()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()
    wall.append(time.perf_counter() - begun)
    cpu.append(time.process_time() - cpu_begun)
    if len(wall) == 1:
        first = {"first_step_seconds": time.time() - process_started(), "first_step_cpu_seconds": time.process_time()}
print(
    json.dumps(
        {
            **first,
            "median_step_seconds": statistics.median(wall[-TIMED:]),
            "cpu_seconds_per_step": statistics.median(cpu[-TIMED:]),
            "tokens_per_second": train.batch_size * train.seq_len / statistics.median(wall[-TIMED:]),
            "bytes_at_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )
)
