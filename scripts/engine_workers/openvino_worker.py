"""OpenVINO GenAI's side of `scripts/bench_engine.py`, run in a virtual environment of its own.

The checkpoint is exported to OpenVINO's form once, without weight compression, and run in the precision asked for.
Reads one JSON case a line and answers with one JSON line. Steps are timed by the pipeline's own clock.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov  # pyright: ignore[reportMissingImports]
import openvino_genai as genai  # pyright: ignore[reportMissingImports]
from optimum.intel import OVModelForCausalLM  # pyright: ignore[reportMissingImports]

CACHE_GB = 8


def export(model: Path, out: Path) -> None:
    if not (out / "openvino_model.xml").exists():
        OVModelForCausalLM.from_pretrained(model, export=True, load_in_8bit=False, compile=False).save_pretrained(out)


class Pipeline:
    """A continuous-batching pipeline over token ids; prompts never repeat."""

    def __init__(self, directory: Path, dtype: str, vocab_size: int):
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_seqs = CACHE_GB, 64
        scheduler.max_num_batched_tokens = 2048
        precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
        self._pipeline = genai.ContinuousBatchingPipeline(
            str(directory), scheduler, "CPU",
            {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}, {},
        )  # fmt: skip
        self._vocab_size, self._num_requests = vocab_size, 0

    def _add(self, num_tokens: int, max_tokens: int):
        self._num_requests += 1
        rng = random.Random(self._num_requests)
        ids = np.array([[rng.randrange(3, self._vocab_size) for _ in range(num_tokens)]], np.int64)
        config = genai.GenerationConfig(max_new_tokens=max_tokens, ignore_eos=True)
        return self._pipeline.add_request(self._num_requests, ov.Tensor(ids), config)

    def _step_s(self) -> float:
        start_s = time.perf_counter()
        self._pipeline.step()
        return time.perf_counter() - start_s

    def prefill_s(self, num_tokens: int) -> float:
        handle = self._add(num_tokens, 1)  # a request whose handle is gone is dropped
        seconds = 0.0
        while self._pipeline.has_non_finished_requests():
            seconds += self._step_s()
        assert handle.can_read()
        return seconds

    def decode_s(self, batch: int, context: int, num_tokens: int) -> float:
        """The last steps, in which every request decodes."""
        handles = [self._add(context, num_tokens + 3 + 64) for _ in range(batch)]
        emitted = [0] * batch
        taken: list[float] = []
        while len(taken) < num_tokens + 3:
            seconds = self._step_s()
            all_running = min(emitted) > 0
            for i, handle in enumerate(handles):
                while handle.can_read():
                    emitted[i] += sum(len(output.generated_ids) for output in handle.read().values())
            if all_running:
                taken.append(seconds)
        for handle in handles:
            handle.cancel()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return sum(taken[3:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    out = args.model.with_name(args.model.name + "-openvino")
    export(args.model, out)
    config = json.loads((args.model / "config.json").read_text())
    pipeline = Pipeline(out, args.dtype, config["vocab_size"])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        if case["kind"] == "prefill":
            seconds = pipeline.prefill_s(case["tokens"])
        else:
            seconds = pipeline.decode_s(case["batch"], case["context"], case["tokens"])
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
