"""torch's side of `scripts/bench_kernels.py --torch`, run in a virtual environment of its own.

Protocol: one JSON object a line. It says {"ready": true}; then for each {"tokens", "heads", "kv_heads", "dim", "dtype"} it
answers {"seconds": ...} of one causal `scaled_dot_product_attention`, after one that is not counted for a new case.
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


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(json.dumps({"ready": True, "torch": torch.__version__}), flush=True)
    last, arrays = None, []
    for line in sys.stdin:
        case = json.loads(line)
        run = lambda: torch.nn.functional.scaled_dot_product_attention(*arrays, is_causal=True, enable_gqa=True)
        if case != last:
            last, arrays = case, inputs(case)
            run()
        start = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
