"""A real grpc.aio server over the fake engine, with a client, in one asyncio loop."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from serving.about import Served
from serving.access import Access, AccessConfig, TlsFiles
from serving.client import ClientIdentity, LoongClient
from serving.deadlines import Deadlines
from serving.device_trace import DeviceTrace
from serving.loop import EngineLoop
from serving.sampling_params import SamplingLimits
from serving.server import LoongServer, ServerConfig
from serving.state import EngineState
from serving.tokenizer import Tokenizer
from serving.validation import ValidationLimits
from tests.support.byte_tokenizer import EOS, VOCAB_SIZE, byte_tokenizer
from tests.support.fake_engine import NEEDED, FakeExecutor, FakeManager


class Live:
    """The parts of a running server."""

    def __init__(
        self,
        manager: FakeManager,
        tokenizer: Tokenizer | None,
        config: ServerConfig,
        *,
        step_s: float,
        ready: bool,
        access: AccessConfig,
        deadlines: Deadlines | None,
        trace: DeviceTrace | None,
    ):
        asyncio_loop = asyncio.get_running_loop()
        self.manager = manager
        self.limits = ValidationLimits(
            sampling=SamplingLimits(VOCAB_SIZE, adjust_tokens=100),
            max_position=2048,
            pool_tokens=manager.num_instances * manager.pages * manager.page_tokens,
            eos_ids=(EOS,),
        )
        state = EngineState(kv_token_bytes=64, compiles_after_ready=lambda: 0)

        def tell(method: Callable[..., Awaitable[None]], *args: Any) -> None:
            asyncio_loop.call_soon_threadsafe(lambda: asyncio_loop.create_task(method(*args)))

        self.loop = EngineLoop(
            manager,
            state,
            on_ready=lambda: tell(self.server.ready),
            on_crash=lambda message: tell(self.server.engine_lost, message),
        )
        self.executor = FakeExecutor(self.loop.post, step_s=step_s, ready=ready)
        self.access = None if access.keys is None else Access(access)
        self.tls = None if access.tls_cert is None else TlsFiles(access)
        self.server = LoongServer(
            self.loop,
            tokenizer,
            self.limits,
            config,
            served=Served("echo", max_running=64, max_waiting=manager.max_waiting, page_tokens=manager.page_tokens),
            deadlines=deadlines,
            trace=trace,
            access=self.access,
            tls=self.tls,
        )
        self.client: LoongClient
        self.port: int


@contextlib.asynccontextmanager
async def live_server(
    *,
    manager: FakeManager | None = None,
    tokenizer: Tokenizer | None = None,
    has_tokenizer: bool = True,
    step_s: float = 0.0,
    ready: bool = True,
    drain_s: float = 5.0,
    access: AccessConfig = AccessConfig(),
    identity: ClientIdentity = ClientIdentity(),
    stall_s: float = 60.0,
    deadlines: Deadlines | None = None,
    trace: DeviceTrace | None = None,
    config: ServerConfig | None = None,
) -> AsyncIterator[Live]:
    tokenizer = (tokenizer or byte_tokenizer()) if has_tokenizer else None
    config = config or ServerConfig(port=0, drain_s=drain_s, stall_s=stall_s)
    live = Live(
        manager or FakeManager(),
        tokenizer,
        config,
        step_s=step_s,
        ready=ready,
        access=access,
        deadlines=deadlines,
        trace=trace,
    )
    live.port = port = await live.server.start()
    live.loop.start(live.executor, NEEDED, asyncio.get_running_loop())
    async with LoongClient(f"127.0.0.1:{port}", identity=identity) as live.client:
        try:
            if ready:
                await live.client.wait_ready(60)
            yield live
        finally:
            await live.server.stop()
            live.loop.close()


@contextlib.contextmanager
def server_in_a_thread(**options: Any) -> Iterator[str]:
    """For commands that run asyncio loops of their own. Yields its address."""
    started, done, found = threading.Event(), threading.Event(), []

    async def serve() -> None:
        async with live_server(**options) as live:
            found.append(live.client.target)
            started.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(60)
        yield found[0]
    finally:
        done.set()
        thread.join(60)


async def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait until the condition holds; fails the test when it does not in time."""
    for _ in range(int(timeout_s / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition did not come to hold")
