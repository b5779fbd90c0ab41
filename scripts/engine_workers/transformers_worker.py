"""`transformers`' side of `scripts/bench_engine.py`, run in a virtual environment of its own with torch.

Reads one JSON case a line and answers with one JSON line. Attention is SDPA, the cache is the library's default. A
batch of decoding rows starts from one prefilled row repeated, which takes nothing from the steps that are timed.
"""

import argparse
import json
import os
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]


def prompt(model, batch: int, num_tokens: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, num_tokens))


def prefill_s(model, num_tokens: int) -> float:
    ids = prompt(model, 1, num_tokens)
    start_s = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    return time.perf_counter() - start_s


def decode_s(model, batch: int, context: int, num_tokens: int) -> float:
    out = model(prompt(model, 1, context), use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    cache.batch_repeat_interleave(batch)
    token = out.logits[:, -1:].argmax(-1).repeat(batch, 1)
    for step in range(3 + num_tokens):
        if step == 3:
            start_s = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return time.perf_counter() - start_s


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa", local_files_only=True
    ).eval()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        if case["kind"] == "prefill":
            seconds = prefill_s(model, case["tokens"])
        else:
            seconds = decode_s(model, case["batch"], case["context"], case["tokens"])
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
