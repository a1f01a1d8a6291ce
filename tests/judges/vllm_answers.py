"""What vLLM answers: log-probabilities along a prompt and the tokens that it continues with, of a model and of adapters on it.

Runs in vLLM's own environment: `python vllm_answers.py REQUEST.json OUT.npz`; see test_vllm.py for both.
vLLM has the experts' kernel for GPUs alone where adapters are on (Triton). Here that kernel is torch's, written plainly;
what it reads is what vLLM loaded, scaled, packed and put in its place.
"""

import json
import os
import sys
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts


def experts(self: Any, *, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, **_: Any) -> None:
    """output = sum over a token's experts of weight · (w2 + BA)(silu((w1 + BA) x) · (w3 + BA) x). w1 holds w1 and w3."""
    lora = self._lora_context
    slots = lora.punica_wrapper.token_lora_indices.tolist()

    def delta(a: Any, b: Any, slot: int, expert: int, x: Any) -> Any:
        return b[slot, expert] @ (a[slot, expert] @ x) if slot >= 0 else 0

    (a1, a3), (b1, b3) = lora.w13_lora_a_stacked, lora.w13_lora_b_stacked
    (a2,), (b2,) = lora.w2_lora_a_stacked, lora.w2_lora_b_stacked
    output.zero_()
    for m, x in enumerate(hidden_states):
        for weight, e in zip(topk_weights[m], topk_ids[m].tolist(), strict=True):
            slot = slots[m] if m < len(slots) else -1
            gate, up = (w1[e] @ x).chunk(2)
            gate, up = gate + delta(a1, b1, slot, e, x), up + delta(a3, b3, slot, e, x)
            h = torch.nn.functional.silu(gate) * up
            output[m] += weight * (w2[e] @ h + delta(a2, b2, slot, e, h))


def main(request: dict[str, Any], out: str) -> None:
    TritonExperts.apply = experts
    adapters, prompt = request["adapters"], request["prompt"]
    options = {"enable_lora": True, "max_lora_rank": request["max_lora_rank"], "max_loras": 1} if adapters else {}
    llm = LLM(
        model=request["model"],
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=len(prompt) + request["max_tokens"],
        max_num_seqs=1,
        max_logprobs=-1,
        enable_prefix_caching=False,
        **options,
        **request["options"],
    )
    ask = SamplingParams(
        temperature=0, max_tokens=request["max_tokens"], prompt_logprobs=-1, logprobs=-1, ignore_eos=True, detokenize=False
    )
    found = {}
    for i, (name, directory) in enumerate({"": None, **adapters}.items()):
        adapter = None if directory is None else LoRARequest(name, i, directory)
        try:
            (answer,) = llm.generate({"prompt_token_ids": prompt}, ask, lora_request=adapter, use_tqdm=False)
        except ValueError as error:
            found[f"{name}.refused"] = np.array(str(error))
            continue
        rows = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
        found[f"{name}.logprobs"] = np.array([[row[token].logprob for token in sorted(row)] for row in rows])
        found[f"{name}.tokens"] = np.array(answer.outputs[0].token_ids)
    np.savez(out, **found)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file), sys.argv[2])
