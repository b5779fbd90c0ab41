"""The composition of an engine: checkpoint, programs, executor, manager, loop. The only module of `serving` that knows
them all; JAX is imported when an engine is loaded, not before, so that the command line can choose its platform.

What it is not: the listener (`serving/server.py`), the life cycle of a process (`serving/launch.py`), or the choice of
flags (`serving/cli.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

import loong_jax
from loong_jax.config import ClusterConfig, ConfigError, LimitsConfig, ModelConfig
from loong_jax.cost.fitted import FittedCost
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.eventlog import EventLogWriter, LogHeader
from loong_jax.grammar import GrammarError, Grammars, is_available
from loong_jax.manager import Manager
from loong_jax.policy import POLICIES
from loong_jax.types import AnyCommand, AnyEvent, Phase, Program, ProgramReady
from pallas_kernels import tuning
from serving.decision_log import DecisionLog
from serving.loop import EngineLoop, ExecutorLike
from serving.sampling_params import SamplingLimits
from serving.state import EngineState
from serving.step_times import StepTimes
from serving.structured import load_grammars
from serving.validation import ValidationLimits

if TYPE_CHECKING:
    from loong_jax.executor import Executor
    from loong_jax.programs import Programs

Instances = tuple[int, ...]
Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


class EngineConfig(msgspec.Struct, frozen=True):
    """All that the processes of one engine must agree on. `dtype` None: the checkpoint's. With several processes,
    `coordinator` is the address of jax.distributed, and instances are dealt to processes in order, evenly. `cost`: the
    coefficients of the cost model; empty: those of an engine that nobody has profiled. `refit`: correct them by what
    steps take. `structured`: answers may follow a grammar."""

    cluster: ClusterConfig
    limits: LimitsConfig
    policy: str = "elastic"
    dtype: str | None = None
    full_warm_up: bool = False
    num_processes: int = 1
    coordinator: str | None = None
    cost: dict[str, float] = {}
    refit: bool = True
    structured: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy: {self.policy!r} is none of {', '.join(POLICIES)}")
        if self.num_processes < 1 or self.cluster.num_instances % self.num_processes:
            raise ConfigError(
                f"num_processes: {self.cluster.num_instances} instances cannot be dealt to {self.num_processes}"
            )
        if self.num_processes > 1 and self.coordinator is None:
            raise ConfigError("coordinator: needed with several processes")
        try:
            tuning.parse(self.cluster.kernel_sizes)
        except ValueError as error:
            raise ConfigError(f"kernel-sizes: {error}") from None

    @property
    def owners(self) -> tuple[int, ...]:
        """The process of each instance, where devices have no places (`owners_by_devices`)."""
        share = self.cluster.num_instances // self.num_processes
        return tuple(instance // share for instance in range(self.cluster.num_instances))


class Loaded(NamedTuple):
    """What `load` makes: one process's data plane, not yet warm."""

    executor: Executor
    programs: Programs
    needed: list[tuple[Program, Instances]]  # readiness waits for these
    others: list[tuple[Program, Instances]]  # the rest of the ladder
    grammars: Grammars | str  # or why there are none


class LocalExecutor:
    """Executor and programs of one process under one `close`."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded

    def submit(self, command: AnyCommand) -> None:
        self._loaded.executor.submit(command)

    def close(self) -> None:
        self._loaded.programs.close()
        self._loaded.executor.close()


class Engine:
    """Manager and loop of the leading process. Takes events from the start, and runs once `start` gives it devices."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        *,
        event_log: Path | None,
        on_ready: Callable[[], None],
        on_crash: Callable[[str], None],
    ) -> None:
        cluster, limits, cost = config.cluster, config.limits, cost_of(config)
        log = None
        if event_log is not None:
            header = LogHeader(loong_jax.__version__, cluster, limits, config.policy, dict(cost.coefficients))
            log = EventLogWriter(event_log, header)
        self._programs: Programs | None = None
        self._on_ready = on_ready
        manager = Manager(cluster, limits, POLICIES[config.policy](cluster, limits), cost)
        state = EngineState(
            kv_token_bytes=kv_token_bytes(model),
            compiles_after_ready=self._compiles_after_ready,
            step_times=StepTimes(cost, manager.state.ledger.tokens, cluster.num_instances, refit=config.refit),
        )
        self.loop = EngineLoop(
            manager,
            state,
            event_log=log,
            decisions=DecisionLog(),
            on_ready=self._ready,
            on_crash=on_crash,
        )

    def start(self, loaded: Loaded, executor: ExecutorLike, asyncio_loop: asyncio.AbstractEventLoop) -> None:
        """`executor`: that of `loaded`, or one that forwards to it and to other processes."""
        self._programs = loaded.programs
        self.loop.start(executor, loaded.needed, asyncio_loop)

    def _ready(self) -> None:
        if self._programs is not None:
            self._programs.mark_ready()
        self._on_ready()

    def _compiles_after_ready(self) -> int:
        """Compiles that the serving path waited for: of programs, and of operations outside them."""
        if self._programs is None:
            return 0
        return self._programs.compiles_after_ready + self._programs.stray_compiles_after_ready


def read_model(directory: Path, dtype: str | None) -> ModelConfig:
    """The checkpoint's configuration, in `dtype` where one is asked for. Raises CheckpointError or ConfigError."""
    from loong_jax.model.hf_config import read_config

    model = read_config(directory)
    return model if dtype is None else msgspec.structs.replace(model, dtype=dtype)


def cost_of(config: EngineConfig) -> FittedCost:
    """The cost model that the engine starts with."""
    ladder = config.cluster.ladder
    return FittedCost(config.cost, ladder) if config.cost else unmeasured(ladder)


def kv_token_bytes(model: ModelConfig) -> int:
    """Bytes of one token's K and V over all layers."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * (4 if model.dtype == "float32" else 2)


def for_model(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """`config` with what the model says about the pool: KV that no layer's window shows again is dropped. And with
    structured answers where this process, which leads, has the package."""
    cluster = msgspec.structs.replace(config.cluster, kv_window=model.kv_window)
    return msgspec.structs.replace(config, cluster=cluster, structured=is_available())


def validation_limits(model: ModelConfig, cluster: ClusterConfig, max_model_len: int | None = None) -> ValidationLimits:
    """`cluster` as `for_model` made it; `max_model_len` None: the model's. Raises ConfigError."""
    if max_model_len is not None and max_model_len > model.context_length:
        raise ConfigError(f"max-model-len: the model's context ends at {model.context_length} tokens")
    pool_tokens = cluster.pool_tokens
    if cluster.kv_needed(model.context_length) <= pool_tokens:  # nothing, or a window moves along
        pool_tokens = max(pool_tokens, model.context_length)
    return ValidationLimits(
        sampling=SamplingLimits(
            model.vocab_size,
            adjust_tokens=cluster.adjust_tokens,
            max_top=min(cluster.max_top, model.vocab_size),
        ),
        scores_prompts=bool(cluster.ladder.score_tokens),
        max_position=max_model_len or model.context_length,
        pool_tokens=pool_tokens,
        eos_ids=model.eos_ids,
    )


def wanted_programs(
    cluster: ClusterConfig, platform: str, *, full: bool
) -> tuple[list[tuple[Program, Instances]], list[tuple[Program, Instances]]]:
    """(needed for readiness, the others, the most wanted first).

    The minimal ladder is the steps of DoP 1 and of the largest, each on one set of instances: that serves any request,
    and an executable at hand comes to the other sets in a fraction of a second each. `full` needs every step on every
    set. Migrations and copies are made when the manager asks for them."""
    from loong_jax.device_sets import device_sets, on_sets

    dops = cluster.ladder.dops
    sets = device_sets(cluster.num_instances, dops, platform)
    steps = [program for program in cluster.ladder.programs() if program.phase in (Phase.PREFILL, Phase.DECODE)]
    wanted = on_sets(steps, sets)  # in the order of the ladder: DoP 1 and the largest first
    if full:
        return wanted, []
    first = {dop: next(instances for instances in sets if len(instances) == dop) for dop in (1, dops[-1])}
    needed = [(program, instances) for program, instances in wanted if first.get(program.dop) == instances]
    return needed, [pair for pair in wanted if pair not in needed]


def load(
    directory: Path,
    config: EngineConfig,
    model: ModelConfig,
    post: Callable[[AnyEvent], None],
    *,
    cache_dir: Path | None,
    progress: Progress | None = None,
) -> Loaded:
    """Load this process's instances. Raises CheckpointError and ConfigError."""
    import jax

    import pallas_kernels
    from loong_jax.esp.groups import Devices
    from loong_jax.esp.steps import StepBuilder
    from loong_jax.executor import Executor
    from loong_jax.model.checkpoint import load_checkpoint
    from loong_jax.program_store import ProgramStore, enable_jax_cache, fingerprint
    from loong_jax.programs import Programs

    cluster, platform = config.cluster, jax.default_backend()
    needed_devices, num_devices = cluster.num_instances * cluster.tp, len(jax.devices())
    if platform == "cpu" and num_devices < needed_devices:
        raise ConfigError(
            f"instances: {cluster.num_instances} of tp {cluster.tp} need {needed_devices} devices, and JAX finds only "
            f"the CPU; --platform cpu makes virtual ones"
        )
    store = None
    if cache_dir is not None:
        store = ProgramStore(cache_dir / "programs")
        enable_jax_cache(cache_dir / "jax")
    devices = Devices(jax.devices(), cluster.num_instances, cluster.tp)
    builder = StepBuilder(model, cluster, platform)
    local = [
        [device if device.process_index == devices.process_index else None for device in instance]
        for instance in devices.by_instance
    ]
    weights = load_checkpoint(
        directory, model, tp=cluster.tp, devices=local, stacked=builder.stacked, progress=progress
    )
    sources = [Path(str(package.__file__)).parent for package in (loong_jax, pallas_kernels)]
    parts = fingerprint(sources, repr(model), repr(cluster), platform)
    programs = Programs(builder.build, devices.mesh, store if config.num_processes == 1 else None, post, parts)
    needed, others = wanted_programs(cluster, platform, full=config.full_warm_up)
    grammars = grammars_of(directory, config, model)
    known = None if isinstance(grammars, str) else grammars
    return Loaded(Executor(builder, devices, weights, programs, post, known), programs, needed, others, grammars)


def grammars_of(directory: Path, config: EngineConfig, model: ModelConfig) -> Grammars | str:
    """What answers may follow; or why nothing. Raises ConfigError where the leader has them and this process not."""
    if not config.structured:
        return "needs llguidance; pip install 'loong-jax[structured]'"
    if not is_available():
        raise ConfigError("structured: the leader has llguidance, this process has not")
    try:
        return load_grammars(directory, model.vocab_size, model.eos_ids)
    except GrammarError as error:
        return str(error)


def owners_by_devices(cluster: ClusterConfig) -> tuple[int, ...]:
    """The process of each instance, once all have joined. Raises ConfigError where there are too few devices."""
    import jax

    from loong_jax.esp.groups import Devices

    return Devices(jax.devices(), cluster.num_instances, cluster.tp).owners


def devices_in_words(num_devices: int) -> str:
    """As in "8 x NVIDIA H200"."""
    import jax

    return f"{num_devices} x {jax.devices()[0].device_kind}"


def warm_up(loaded: Loaded, post: Callable[[AnyEvent], None], progress: Progress | None = None) -> None:
    """Compile what readiness needs, and have the rest compiled in the background."""
    loaded.programs.warm_up(loaded.needed, progress)
    for program, instances in loaded.programs.ready:
        post(ProgramReady(program, instances))
    for program, instances in loaded.others:
        loaded.programs.prepare(program, instances)
