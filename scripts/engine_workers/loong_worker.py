"""Loong's side of `scripts/bench_engine.py`: manager, policy, executor and one instance, driven without a server.

Reads one JSON case a line from standard input and answers with one JSON line; see `bench_engine.py` for the fields.
What it is not: the serving loop; gRPC and text are left out on both sides of the comparison.
"""

import argparse
import json
import queue
import random
import sys
import time
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import msgspec

from loong_jax.config import ClusterConfig, LimitsConfig, ModelConfig
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.esp.groups import Devices
from loong_jax.esp.steps import StepBuilder
from loong_jax.executor import Executor
from loong_jax.manager import Manager
from loong_jax.model.checkpoint import load_checkpoint
from loong_jax.model.hf_config import read_config
from loong_jax.policy.elastic import Elastic
from loong_jax.programs import Programs
from loong_jax.types import Aborted, AnyEvent, Arrived, Emit, Finish, ProgramReady
from serving.flags import cluster_config


class Engine:
    """Manager and executor over the first devices, one event at a time, in the calling thread. `weights_on`: makes or
    reads the weights, `[instance][rank]`."""

    def __init__(
        self, model: ModelConfig, cluster: ClusterConfig, weights_on: Callable[[StepBuilder, Devices], list[list]]
    ):
        self.vocab_size = model.vocab_size
        self._cluster = cluster
        self._limits = LimitsConfig()
        builder = StepBuilder(model, cluster, jax.default_backend())
        devices = Devices(jax.devices(), cluster.num_instances, 1)
        weights = weights_on(builder, devices)
        self._inbox: queue.SimpleQueue[AnyEvent] = queue.SimpleQueue()
        self._programs = Programs(builder.build, devices.mesh, None, self._inbox.put, "bench")
        self._executor = Executor(builder, devices, weights, self._programs, self._inbox.put)
        self._policy = Elastic(cluster, self._limits)
        self._manager = Manager(cluster, self._limits, self._policy, unmeasured())
        self._num_requests = 0
        self._warm_up(cluster.num_instances)

    def _warm_up(self, num_instances: int) -> None:
        everyone = tuple(range(num_instances))
        wanted = [(p, everyone) for p in self._cluster.ladder.programs() if p.dop == num_instances]
        self._programs.warm_up(wanted)
        for program, instances in wanted:
            self.handle(ProgramReady(program, instances))

    def handle(self, event: AnyEvent) -> list:
        commands = self._manager.handle(event, time.perf_counter_ns() // 1000)
        for command in commands:
            self._executor.submit(command)
        return commands

    def arrive(self, num_tokens: int, max_tokens: int) -> tuple[int, list]:
        self._num_requests += 1
        rng = random.Random(self._num_requests)
        prompt = array("i", (rng.randrange(self.vocab_size) for _ in range(num_tokens))).tobytes()
        return self._num_requests, self.handle(Arrived(self._num_requests, prompt, max_tokens))

    def step(self) -> list:
        return self.handle(self._inbox.get(timeout=600))

    def prefill_s(self, num_tokens: int) -> float:
        """From arrival to the first token."""
        start_s = time.perf_counter()
        _, commands = self.arrive(num_tokens, 1)
        while not any(isinstance(command, Finish) for command in commands):
            commands = self.step()
        return time.perf_counter() - start_s

    def decode_s(self, batch: int, context: int, num_tokens: int) -> float:
        """Seconds for `num_tokens` tokens of each of `batch` requests, once all of them decode."""
        emitted = {self.arrive(context, 4 + 2 * num_tokens)[0]: 0 for _ in range(batch)}

        def run_until(least: int) -> None:
            while min(emitted.values()) < least:
                for command in self.step():
                    if isinstance(command, Emit):
                        emitted[command.request] += len(command.tokens)

        run_until(4)
        start_s, start = time.perf_counter(), sum(emitted.values())
        run_until(min(emitted.values()) + num_tokens)
        taken_s, done = time.perf_counter() - start_s, sum(emitted.values()) - start
        for request in emitted:
            self.handle(Aborted(request))
        while self._manager.view().requests:
            self.step()
        return taken_s * num_tokens * batch / done


def checkpoint_weights(directory: Path, builder: StepBuilder, devices: Devices) -> list[list]:
    return load_checkpoint(directory, builder.model, tp=1, devices=devices.by_instance, stacked=builder.stacked)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--dops", default="auto")
    parser.add_argument("--pool-tokens", type=int, default=160_000)
    args = parser.parse_args()
    model = msgspec.structs.replace(read_config(args.model), dtype=args.dtype)
    cluster = cluster_config(
        platform="cpu", instances=args.instances, tp=1, pool_tokens=args.pool_tokens, page_tokens=16, ring_tokens=512,
        max_running=64, dops=args.dops, prefill_buckets="auto", decode_buckets="auto",
    )  # fmt: skip
    engine = Engine(model, cluster, partial(checkpoint_weights, args.model))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        if case["kind"] == "prefill":
            seconds = engine.prefill_s(case["tokens"])
        else:
            seconds = engine.decode_s(case["batch"], case["context"], case["tokens"])
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
