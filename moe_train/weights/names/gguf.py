"""llama.cpp's layout."""

from __future__ import annotations

from moe_train.weights.names.tensor_layout import Row, TensorLayout

GGUF = TensorLayout(
    file_format="gguf",
    embed=Row("token_embd.weight", "V D", "embed.weight", "V D"),
    norm=Row("output_norm.weight", "D", "final_norm.scale", "D"),
    head=Row("output.weight", "V D", "head.weight", "V D"),
    layer="blk.{l}.",
    norms=(
        Row("attn_norm.weight", "D", "attention_norm.scale", "D"),
        Row("ffn_norm.weight", "D", "ffn_norm.scale", "D"),
    ),
    grouped_query=(
        # llama.cpp's converter brings q and k to the interleaved rotary order, that of Mistral's own files.
        Row("attn_q.weight", "NPZ D", "attention.q_proj.weight", "D N ZP"),
        Row("attn_k.weight", "KPZ D", "attention.k_proj.weight", "D K ZP"),
        Row("attn_v.weight", "KH D", "attention.v_proj.weight", "D K H"),
        Row("attn_output.weight", "D NH", "attention.o_proj.weight", "N H D"),
    ),
    # Rotary pairs are adjacent in these files and in our latent attention alike. attn_kv_b is stored in two parts, which
    # `gguf.latent_tensors` joins.
    latent=(
        Row("attn_q.weight", "NH D", "attention.q_proj.weight", "D N H"),
        Row("attn_q_a.weight", "Q D", "attention.q_a_proj.weight", "D Q"),
        Row("attn_q_a_norm.weight", "Q", "attention.q_a_norm.scale", "Q"),
        Row("attn_q_b.weight", "NH Q", "attention.q_b_proj.weight", "Q N H"),
        Row("attn_kv_a_mqa.weight", "C D", "attention.kv_a_proj.weight", "D C"),
        Row("attn_kv_a_norm.weight", "R", "attention.kv_a_norm.scale", "R"),
        Row("attn_kv_b.weight", "NU R", "attention.kv_b_proj.weight", "R N U"),
        Row("attn_output.weight", "D NW", "attention.o_proj.weight", "N W D"),
    ),
    dense=(
        Row("ffn_gate.weight", "F D", "ffn.gate_proj.weight", "D F"),
        Row("ffn_up.weight", "F D", "ffn.up_proj.weight", "D F"),
        Row("ffn_down.weight", "D F", "ffn.down_proj.weight", "F D"),
    ),
    router=Row("ffn_gate_inp.weight", "E D", "ffn.router.weight", "D E"),
    router_bias=Row("exp_probs_b.bias", "E", "ffn.router.bias", "E"),
    shared=(
        Row("ffn_gate_shexp.weight", "S D", "ffn.shared.gate_proj.weight", "D S"),
        Row("ffn_up_shexp.weight", "S D", "ffn.shared.up_proj.weight", "D S"),
        Row("ffn_down_shexp.weight", "D S", "ffn.shared.down_proj.weight", "S D"),
    ),
    experts=(
        Row("ffn_gate_exps.weight", "F D", "ffn.gate_proj.weight", "D F", "experts"),
        Row("ffn_up_exps.weight", "F D", "ffn.up_proj.weight", "D F", "experts"),
        Row("ffn_down_exps.weight", "D F", "ffn.down_proj.weight", "F D", "experts"),
    ),
    adapters=("{stem}.weight.lora_a", "{stem}.weight.lora_b"),
)
"""llama.cpp's architectures `llama`, `mistral3`, `mistral4` and `deepseek2`.

Shapes are in numpy's order, the reverse of the file's.
"""
