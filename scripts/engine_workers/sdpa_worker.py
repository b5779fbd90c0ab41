"""torch's side of `scripts/bench_kernels.py --torch`, run in a virtual environment of its own.

Protocol: one JSON object a line. It says {"ready": true}; then for each {"tokens", "heads", "kv_heads", "dim", "dtype"}
it answers {"seconds": ...} of one causal `scaled_dot_product_attention`, after one uncounted for a new case.
"""

import json
import os
import sys
import time

import torch  # pyright: ignore[reportMissingImports]


def inputs(case: dict) -> list:
    """q, k, v `[1, head, tok, dim]`; KV heads as they are: `enable_gqa` shares them."""
    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    heads = (case["heads"], case["kv_heads"], case["kv_heads"])
    return [torch.randn(1, h, case["tokens"], case["dim"]).to(dtype) for h in heads]


def attend(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(json.dumps({"ready": True, "torch": torch.__version__}), flush=True)
    last, arrays = None, []
    for line in sys.stdin:
        case = json.loads(line)
        if case != last:
            last, arrays = case, inputs(case)
            attend(*arrays)
        start = time.perf_counter()
        attend(*arrays)
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
