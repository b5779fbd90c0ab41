"""A server over the paced engine in a process of its own, and what to ask it: memory, threads, descriptors, CPU time.

`Child` starts it and asks; run as a program it is that process. What it is not: `loong serve` (no checkpoint, no JAX).
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import json
import os
import pstats
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import grpc  # noqa: E402
import psutil  # noqa: E402

from loong_jax.default_model import DEFAULT_MODEL  # noqa: E402
from serving.backpressure import StreamLimits  # noqa: E402
from serving.http.config import HttpConfig  # noqa: E402
from serving.http.server import HttpServer  # noqa: E402
from serving.loop import EngineLoop  # noqa: E402
from serving.proto.loong.v1 import loong_pb2 as pb  # noqa: E402
from serving.sampling_params import SamplingLimits  # noqa: E402
from serving.server import LoongServer, ServerConfig, settle  # noqa: E402
from serving.state import EngineState  # noqa: E402
from serving.tokenizer import Tokenizer  # noqa: E402
from serving.validation import ValidationLimits  # noqa: E402

GENERATE = "/loong.v1.Loong/Generate"
RAW, RAW_PACED, RAW_ONCE = "/raw.Echo/Stream", "/raw.Echo/Paced", "/raw.Echo/Once"
_ANSWER = "The sky is blue. The sun is yellow, and what follows is a longer sentence, which says nothing at all. "


class Child:
    """The process, from outside. A context manager; `flags` are those of `main`."""

    def __init__(self, **flags: Any) -> None:
        words = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, str(Path(__file__)), *words]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.pid = self._process.pid
        ports = self._read()
        self.port: int = ports["port"]
        self.http_port: int = ports["http_port"]

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def ask(self, question: str = "stats") -> dict[str, Any]:
        """ "stats", after a garbage collection; "step MS"; "profile": begin, and when asked again, print to stderr."""
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server process ended with status {self._process.wait()}")
        return json.loads(line)


class _Server:
    """Inside of the process."""

    def __init__(self, options: argparse.Namespace) -> None:
        from shell_load.engine import PacedManager

        self._options = options
        limits = ValidationLimits(
            sampling=SamplingLimits(1024, adjust_tokens=100), max_position=2**20, pool_tokens=2**24, eos_ids=(0,)
        )
        streams = StreamLimits(max_streams=options.max_streams, write_timeout_s=options.write_timeout_s)
        tokenizer = Tokenizer.load(DEFAULT_MODEL)
        assert tokenizer is not None
        self.manager = PacedManager(options.max_running, options.max_waiting, tokenizer.encode_chat(_ANSWER))
        self.loop = EngineLoop(self.manager, EngineState(kv_token_bytes=1, compiles_after_ready=int))
        if not options.text:
            tokenizer = None
        self.server = LoongServer(self.loop, tokenizer, limits, ServerConfig(port=0, streams=streams))
        self.http = HttpServer(self.loop, self.server.generator, HttpConfig(port=0)) if options.http else None

    async def start(self) -> dict[str, int]:
        from shell_load.engine import NEEDED, PacedExecutor

        self.executor = PacedExecutor(self.loop.post, self._options.step_ms / 1000)
        port = await self.server.start()
        http_port = await self.http.start() if self.http is not None else 0
        self.loop.start(self.executor, NEEDED, asyncio.get_running_loop())
        await self.server.ready()
        settle()
        return {"port": port, "http_port": http_port}

    def stats(self) -> dict[str, Any]:
        return {"open": self.manager.num_open, "tasks": len(asyncio.all_tasks())}


class _Raw:
    """The library alone: handlers that write one message again and again, once a step, or once; and the same listener
    otherwise."""

    def __init__(self, options: argparse.Namespace) -> None:
        message = pb.GenerateResponse(tokens=pb.Tokens(token_ids=[65], logprobs=[-0.5], text="a")).SerializeToString()
        self._step_s = options.step_ms / 1000
        self._step: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def stream(request: bytes, context: grpc.aio.ServicerContext) -> None:
            while True:
                await context.write(message)

        async def paced(request: bytes, context: grpc.aio.ServicerContext) -> None:
            while True:
                await context.write(message)
                await asyncio.shield(self._step)

        async def once(request: bytes, context: grpc.aio.ServicerContext) -> None:
            await context.write(message)

        methods = {"Stream": stream, "Paced": paced, "Once": once}
        handlers = {name: grpc.unary_stream_rpc_method_handler(method) for name, method in methods.items()}
        generic = grpc.method_handlers_generic_handler("raw.Echo", handlers)
        self._server = grpc.aio.server(handlers=[generic], options=(("grpc.so_reuseport", 0),))

    async def _steps(self) -> None:
        asyncio_loop = asyncio.get_running_loop()
        due_s = asyncio_loop.time()
        while True:
            due_s = max(asyncio_loop.time(), due_s + self._step_s)
            await asyncio.sleep(due_s - asyncio_loop.time())
            step, self._step = self._step, asyncio_loop.create_future()
            step.set_result(None)

    async def start(self) -> dict[str, int]:
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self._pace = asyncio.create_task(self._steps())
        return {"port": port, "http_port": 0}

    def stats(self) -> dict[str, Any]:
        return {"open": 0, "tasks": len(asyncio.all_tasks())}


async def _serve(options: argparse.Namespace) -> None:
    served = _Raw(options) if options.kind == "raw" else _Server(options)
    asyncio_loop = asyncio.get_running_loop()
    print(json.dumps(await served.start()), flush=True)
    profile: cProfile.Profile | None = None
    process = psutil.Process()
    # One thread: asyncio's own pool starts another where the first is not yet seen to be idle.
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="questions")
    while line := await asyncio_loop.run_in_executor(reader, sys.stdin.readline):
        answer: dict[str, Any] = {}
        word, *rest = line.split()
        if word == "stats":
            gc.collect()
            cpu = process.cpu_times()
            answer = {
                **served.stats(),
                "rss_mb": process.memory_info().rss / 2**20,
                "threads": threading.active_count(),
                "thread_names": sorted(thread.name for thread in threading.enumerate()),
                "os_threads": process.num_threads(),
                "fds": process.num_fds(),
                "objects": len(gc.get_objects()),
                "cpu_s": cpu.user + cpu.system,
                "now_s": time.monotonic(),
            }
        elif word == "step" and isinstance(served, _Server):
            served.executor.step_s = float(rest[0]) / 1000
        elif word == "profile" and profile is None:
            profile = cProfile.Profile()
            profile.enable()
        elif word == "profile" and profile is not None:
            profile.disable()
            pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(30)
        print(json.dumps(answer), flush=True)
    os._exit(0)  # whatever is open; how a server ends is not measured here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("loong", "raw"), default="loong")
    parser.add_argument("--step-ms", type=float, default=10.0, help="time of a step; 0: as fast as it can")
    parser.add_argument("--max-running", type=int, default=8192)
    parser.add_argument("--max-waiting", type=int, default=8192)
    parser.add_argument("--max-streams", type=int, default=StreamLimits().max_streams)
    parser.add_argument("--write-timeout-s", type=float, default=StreamLimits().write_timeout_s)
    parser.add_argument("--text", type=int, default=1, help="0: without a tokenizer")
    parser.add_argument("--http", type=int, default=0, help="1: HTTP as well")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
