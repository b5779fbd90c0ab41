"""Life cycle of a serving process: listen, load, warm up, serve, drain, end. And of a worker process.

What it is not: the composition of an engine (`serving/engine.py`) or the command line (`serving/cli.py`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from loong_jax.config import ConfigError, ModelConfig
from loong_jax.cost.file import read_cost
from loong_jax.cost.roofline import shape_of
from loong_jax.types import AnyEvent
from serving import engine as engines
from serving.about import Served
from serving.access import Access, AccessConfig, TlsFiles, check_exposure
from serving.cluster import CompletionMerger, ControlServer, FanOutExecutor
from serving.deadlines import Deadlines
from serving.device_trace import DeviceTrace
from serving.engine import Engine, EngineConfig, Loaded, LocalExecutor
from serving.generator import Generator
from serving.http.config import HttpConfig
from serving.loop import ExecutorLike
from serving.request_log import RequestLog
from serving.server import LoongServer, ServerConfig, settle
from serving.structured import StructuredLimits, StructuredOutputs
from serving.tokenizer import Tokenizer
from serving.tracing import Tracer, otlp_tracer
from serving.worker import run_worker

if TYPE_CHECKING:
    from serving.http.server import HttpServer

_JOIN_S = 600.0
_HEARTBEAT_S = 20
T = TypeVar("T")


class LaunchConfig(msgspec.Struct, frozen=True):
    """One serving process. `control_address`: where workers join, with several processes. `cost`: a file of loong
    profile; None: a cost model that claims no numbers. `http` None: gRPC only. `access` is for both listeners.
    `profile_dir`: for profiles that operators ask for; None: there are none.
    `max_model_len`: the longest prompt and answer together, in tokens; None: the model's.
    `otlp_traces_endpoint`: where spans go; None: nowhere."""

    directory: Path
    engine: EngineConfig
    server: ServerConfig
    cache_dir: Path | None = None
    event_log: Path | None = None
    control_address: str = "127.0.0.1:50052"
    cost: Path | None = None
    http: HttpConfig | None = None
    access: AccessConfig = AccessConfig()
    model_name: str = "loong"
    profile_dir: Path | None = None
    max_model_len: int | None = None
    otlp_traces_endpoint: str | None = None


class Reporter(Protocol):
    """Tells a person what goes on at start-up and at the end."""

    def say(self, message: str) -> None: ...
    def progress(self, what: str) -> engines.Progress: ...


class EngineLost(Exception):
    """The engine thread ended on its own; the message says why."""


async def serve(config: LaunchConfig, reporter: Reporter) -> None:
    """Serve until a signal. Raises CheckpointError, ConfigError, TokenizerError, PortTaken, OSError (the event log),
    EngineLost."""
    await _Leader(config, reporter).run()


def work(
    directory: Path,
    leader: str,
    process_id: int,
    use_devices: Callable[[EngineConfig], None],
    reporter: Reporter,
    cache_dir: Path | None,
) -> None:
    """Be process `process_id` of the engine led at `leader`, until that ends. `use_devices` is called with the leader's
    configuration before JAX is imported. Raises what `run_worker` raises."""

    def build(data: bytes, post: Callable[[AnyEvent], None]) -> ExecutorLike:
        config = msgspec.msgpack.decode(data, type=EngineConfig)
        use_devices(config)
        _join_processes(config, process_id)
        model = engines.read_model(directory, config.dtype)
        reporter.say(f"loading {directory}")
        loaded = engines.load(
            directory, config, model, post, cache_dir=cache_dir, progress=reporter.progress("loading")
        )
        engines.warm_up(loaded, post, reporter.progress("compiling"))
        loaded.programs.mark_ready()
        reporter.say(f"process {process_id} is ready")
        return LocalExecutor(loaded)

    run_worker(leader, process_id, build)


def _join_processes(config: EngineConfig, process_id: int) -> None:
    if config.num_processes == 1:
        return
    import jax

    # It would take SIGTERM away from us, to save training checkpoints.
    jax.config.update("jax_enable_preemption_service", False)
    # A step queued behind a lost process may never come back: JAX ends all processes, and nobody waits for ever.
    jax.distributed.initialize(
        config.coordinator, config.num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_S
    )


class _Leader:
    """The leading process, step by step."""

    def __init__(self, config: LaunchConfig, reporter: Reporter) -> None:
        self._config = config
        self._reporter = reporter
        self._asyncio_loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._crash: str | None = None

    async def run(self) -> None:
        check_exposure(self._config.server.host, self._config.access)
        access, tls = _access(self._config.access)
        model = engines.read_model(self._config.directory, self._config.engine.dtype)
        engine_config = engines.for_model(self._config.engine, model)
        if self._config.cost is not None:
            cost = read_cost(self._config.cost, shape_of(model), engine_config.cluster.tp)
            engine_config = msgspec.structs.replace(engine_config, cost=cost.coefficients)
        config = msgspec.structs.replace(self._config, engine=engine_config)
        self._config = config
        tokenizer = Tokenizer.load(config.directory)
        engine = Engine(
            config.engine,
            model,
            event_log=config.event_log,
            on_ready=lambda: self._tell(self._ready),
            on_crash=lambda message: self._tell(self._lost, message),
        )
        limits = engines.validation_limits(model, config.engine.cluster, config.max_model_len)
        self._server = LoongServer(
            engine.loop,
            tokenizer,
            limits,
            config.server,
            served=_served(config),
            deadlines=_deadlines(config.engine),
            trace=DeviceTrace(config.profile_dir),
            access=access,
            tls=tls,
        )
        tracer = None if config.otlp_traces_endpoint is None else otlp_tracer(config.otlp_traces_endpoint)
        _observe(self._server.generator, engine, tracer)
        self._http = None
        if config.http is not None:
            self._http = _http_server(engine, self._server, config.http, access, tls)
        self._catch_signals()
        try:
            await self._serve(engine, model)
        finally:
            if self._http is not None:
                await self._http.stop()
            await self._server.stop()
            await asyncio.to_thread(engine.loop.close)
            if tracer is not None:
                await asyncio.to_thread(tracer.close)
        self._reporter.say("stopped")

    async def _serve(self, engine: Engine, model: ModelConfig) -> None:
        config, say = self._config, self._reporter.say
        port = await self._server.start()
        say(f"listening on {config.server.host}:{port}; loading {config.directory}")
        if self._http is not None and config.http is not None:
            scheme = "http" if config.access.tls_cert is None else "https"
            say(f"HTTP on {scheme}://{config.http.host}:{await self._http.start()}")
        loading = asyncio.ensure_future(_in_thread(lambda: self._load(engine, model)))
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            # Compiles cannot be interrupted, and there is nobody to be kind to yet.
            say("stopped while loading")
            os._exit(128 + signal.SIGINT)
        loading.result()
        await stopped
        if self._crash is not None:
            raise EngineLost(self._crash)
        say("draining")
        await self._server.drain()

    def _load(self, engine: Engine, model: ModelConfig) -> None:
        """In a thread of its own. The engine runs at the end, and is ready when the last program has arrived."""
        config, reporter = self._config, self._reporter
        merger = control = None
        post: Callable[[AnyEvent], None] = engine.loop.post
        if config.engine.num_processes > 1:
            merger = CompletionMerger(config.engine.owners, engine.loop.post)
            control = ControlServer(msgspec.msgpack.encode(config.engine), config.engine.num_processes, merger)
            control.start(config.control_address)
            reporter.say(f"waiting for {config.engine.num_processes - 1} workers on {config.control_address}")
            post = _from_process(merger, 0)
            _join_processes(config.engine, 0)
            merger.know(engines.owners_by_devices(config.engine.cluster))
        loaded = engines.load(
            config.directory,
            config.engine,
            model,
            post,
            cache_dir=config.cache_dir,
            progress=reporter.progress("loading"),
        )
        self._server.generator.structured = StructuredOutputs(loaded.grammars, StructuredLimits())
        executor = self._executor(loaded, merger, control)
        engine.start(loaded, executor, self._asyncio_loop)
        engines.warm_up(loaded, post, reporter.progress("compiling"))
        if control is not None:
            control.wait_ready(_JOIN_S)

    def _executor(self, loaded: Loaded, merger: CompletionMerger | None, control: ControlServer | None) -> ExecutorLike:
        local = LocalExecutor(loaded)
        if merger is None or control is None:
            return local
        return FanOutExecutor(local, merger, control)

    async def _ready(self) -> None:
        await self._server.ready()
        settle()
        pool_tokens = self._config.engine.cluster.pool_tokens
        self._reporter.say(
            f"ready: {self._config.engine.cluster.num_instances} instances, pool of {pool_tokens} tokens"
        )

    async def _lost(self, message: str) -> None:
        if not self._stop.is_set():
            self._crash = message
        await self._server.engine_lost(message)

    def _tell(self, method: Callable[..., Awaitable[None]], *args: Any) -> None:
        """From the engine thread: run a coroutine in the asyncio loop."""
        self._asyncio_loop.call_soon_threadsafe(lambda: asyncio.ensure_future(method(*args)))

    def _catch_signals(self) -> None:
        """The first signal drains, the second ends at once."""

        def caught(signum: int) -> None:
            if self._stop.is_set():
                os._exit(128 + signum)
            self._stop.set()

        for signum in (signal.SIGINT, signal.SIGTERM):
            self._asyncio_loop.add_signal_handler(signum, caught, signum)


def _served(config: LaunchConfig) -> Served:
    limits = config.engine.limits
    return Served(
        config.model_name,
        max_running=limits.max_running,
        max_waiting=limits.max_waiting,
        page_tokens=config.engine.cluster.page_tokens,
    )


def _deadlines(config: EngineConfig) -> Deadlines | None:
    """None where nobody measured how long steps take."""
    return Deadlines(engines.cost_of(config), config.cluster.ladder.dops) if config.cost else None


def _access(config: AccessConfig) -> tuple[Access | None, TlsFiles | None]:
    """Raises ConfigError."""
    return (
        None if config.keys is None else Access(config),
        None if config.tls_cert is None else TlsFiles(config),
    )


def _http_server(
    engine: Engine, server: LoongServer, config: HttpConfig, access: Access | None, tls: TlsFiles | None
) -> HttpServer:
    """Raises ConfigError where the packages of the extra are missing."""
    try:
        from serving.http.server import HttpServer
    except ModuleNotFoundError as error:
        raise ConfigError(f"http-port: needs {error.name}; pip install 'loong-jax[http]'") from None
    return HttpServer(engine.loop, server.generator, config, access=access, tls=tls)


def _observe(generator: Generator, engine: Engine, tracer: Tracer | None) -> None:
    generator.observers.add(RequestLog(engine.loop.now_us))
    if tracer is not None:
        tracer.now_us = engine.loop.now_us
        generator.observers.add(tracer)


def _from_process(merger: CompletionMerger, process: int) -> Callable[[AnyEvent], None]:
    return lambda event: merger.take(process, event)


async def _in_thread(function: Callable[[], T]) -> T:
    """Run in a daemon thread: it does not keep a process alive that is told to stop."""
    asyncio_loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = asyncio_loop.create_future()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            asyncio_loop.call_soon_threadsafe(future.set_exception, error)
        else:
            asyncio_loop.call_soon_threadsafe(future.set_result, result)

    threading.Thread(target=run, name="loong-load", daemon=True).start()
    return await future
