"""The program ladder: which step programs exist as executables, on which device sets, and how they get there.

What it is: DESIGN 5 "Programs". A step is a meshless `jax.shard_map` inside `jit`, traced under `jax.set_mesh`: one
trace per (phase, dop, bucket), one backend compile, and for every other device set of that size the same executable
*retargeted*. An executable comes from the first of: memory, retargeting what is in memory, the store on disk, a
compile. The hot path is `get`, a dict lookup.
What it is not: what a step computes (`esp/`), which program a step uses (`buckets.py`, the policy), or the calling of
programs (`executor.py`).

Several processes: a process holds only the programs whose mesh holds one of its devices; store and retargeting are
off, because an executable of several processes is tied to them; JAX's own cache serves there.
"""

import logging
import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from enum import StrEnum
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from loong_jax import mappings, retarget
from loong_jax.compile_watch import CompileWatch, heard_cache_hit
from loong_jax.program_store import ProgramStore, environment
from loong_jax.retarget import Device, RetargetError, Serialized
from loong_jax.types import Program, ProgramReady
from pallas_kernels.chips import chip_of

log = logging.getLogger(__name__)

Instances = tuple[int, ...]

_PROBE_DEVICES = 8  # enough to verify retargeting; more only makes start-up longer


class StepFunction(NamedTuple):
    """What a builder returns for one Program.

    `function`: a shard_map without a mesh, to be jitted; `arguments`: pytrees of jax.ShapeDtypeStruct (global
    shapes); `specs`: matching (prefix) pytrees of PartitionSpec over the axes ("sp", "tp"); `donate`: indices of
    donated arguments.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    specs: tuple[Any, ...]
    donate: tuple[int, ...]


class ProgramsFull(RuntimeError):
    """This process cannot map one more executable (`mappings.py`)."""


class Path(StrEnum):
    """Who waited for an executable."""

    WARM_UP = "warm_up"
    SERVING = "serving"
    BACKGROUND = "background"


class Origin(StrEnum):
    """Where an executable came from."""

    STORE = "store"
    RETARGET = "retarget"
    COMPILE = "compile"


class Programs:
    """Executables by (program, instances).

    `mesh_of(instances)`: Mesh of shape (dop, tp), axes ("sp", "tp"), over the instances' devices in order.
    `post` gets the answers to `prepare`, from the background thread or the caller's.
    `fingerprint` names everything the built functions depend on that is not in `Program` (sources, model, cluster,
    backend flags: `program_store.fingerprint`); executables in the store are found by it.
    `threads`: executables made at once during `warm_up`.
    """

    def __init__(
        self,
        build: Callable[[Program], StepFunction],
        mesh_of: Callable[[Instances], Mesh],
        store: ProgramStore | None,
        post: Callable[[ProgramReady], None],
        fingerprint: str,
        *,
        threads: int = 2,
    ):
        self._mesh_of = mesh_of
        self._post = post
        self._threads = threads
        self._compiled: dict[tuple[Program, Instances], jax.stages.Compiled] = {}
        self._lock = threading.Lock()  # the small tables below
        self._program_locks: defaultdict[Program, threading.Lock] = defaultdict(threading.Lock)
        self._maker = _Maker(build, store, fingerprint)
        self._ready = False
        self._after_ready: Counter[tuple[Path, Origin]] = Counter()
        self._watch = CompileWatch()
        self._pending: set[tuple[Program, Instances]] = set()
        self._requests: queue.SimpleQueue[tuple[Program, Instances] | None] = queue.SimpleQueue()
        self._background = threading.Thread(target=self._serve_requests, name="programs", daemon=True)
        self._background.start()

    def get(self, program: Program, instances: Instances) -> jax.stages.Compiled | None:
        """The executable, or None where there is none yet."""
        return self._compiled.get((program, instances))

    def compile(self, program: Program, instances: Instances) -> jax.stages.Compiled:
        """The executable, made now in this thread if need be. After `mark_ready` making one here is a stall of the
        serving path and counted as such. The mesh must hold a device of this process."""
        return self._ensure(program, instances, Path.SERVING)

    def prepare(self, program: Program, instances: Instances) -> None:
        """Have it made in the background; answered by ProgramReady, at once if it is there. A failure is logged, and
        the next `prepare` tries again. Does nothing in a process without a device in the mesh."""
        key = (program, instances)
        if not self._is_ours(instances):
            return
        with self._lock:
            available = key in self._compiled
            if not available and key not in self._pending:
                self._pending.add(key)
                self._requests.put(key)
        if available:
            self._post(ProgramReady(program, instances))

    def warm_up(
        self,
        programs_and_sets: Sequence[tuple[Program, Instances]],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Make all of them before serving; `ready` lists them then. `progress(done, total)` is called in this thread.
        Raises what a compile raises."""
        wanted = [key for key in programs_and_sets if self._is_ours(key[1])]
        with ThreadPoolExecutor(self._threads, thread_name_prefix="warm-up") as pool:
            futures = [pool.submit(self._ensure, *key, Path.WARM_UP) for key in _one_of_each_first(wanted)]
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    future.result()
                    if progress is not None:
                        progress(done, len(wanted))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def mark_ready(self) -> None:
        """From here on the serving path should compile nothing."""
        self._ready = True
        self._watch.start()

    @property
    def ready(self) -> tuple[tuple[Program, Instances], ...]:
        """All executables at hand."""
        return tuple(self._compiled.copy())

    @property
    def compiles_after_ready(self) -> int:
        """Backend compiles that `compile` made the serving path wait for since `mark_ready`."""
        return self._after_ready[Path.SERVING, Origin.COMPILE]

    @property
    def loads_after_ready(self) -> int:
        """Executables the serving path waited for since `mark_ready` without a backend compile."""
        return self._after_ready[Path.SERVING, Origin.STORE] + self._after_ready[Path.SERVING, Origin.RETARGET]

    @property
    def background_compiles_after_ready(self) -> int:
        return self._after_ready[Path.BACKGROUND, Origin.COMPILE]

    @property
    def stray_compiles_after_ready(self) -> int:
        """Backend compiles of the whole JAX process since `mark_ready` that were none of ours: an operation outside the
        programs met a new shape."""
        return self._watch.num_stray

    def close(self) -> None:
        """Stop the background thread: waits for the compile it is in; requests still queued are dropped."""
        with self._lock:
            self._pending.clear()
        self._requests.put(None)
        self._background.join()
        self._watch.close()
        self._compiled.clear()
        self._maker.forget()

    def _ensure(self, program: Program, instances: Instances, path: Path) -> jax.stages.Compiled:
        key = (program, instances)
        # One at a time per program: whoever comes second retargets what the first has compiled.
        with self._program_lock(program):
            compiled = self._compiled.get(key)
            if compiled is not None:
                return compiled
            if not mappings.room_for_executable():
                raise ProgramsFull(
                    f"{program} on {instances}: {len(self._compiled)} executables fill this process's memory mappings; "
                    "use fewer buckets or instances, or raise vm.max_map_count"
                )
            with self._watch.ours():
                compiled, origin = self._maker.make(program, self._mesh_of(instances))
            self._compiled[key] = compiled
        if self._ready:
            with self._lock:
                self._after_ready[path, origin] += 1
            if path is Path.SERVING:
                log.warning("%s on %s was missing in the serving path (%s)", program, instances, origin)
        return compiled

    def _program_lock(self, program: Program) -> threading.Lock:
        with self._lock:
            return self._program_locks[program]

    def _serve_requests(self) -> None:
        while (key := self._requests.get()) is not None:
            with self._lock:
                if key not in self._pending:  # closed
                    continue
                # Before the work, so that a `prepare` that comes while it fails is a new request, not a lost one.
                self._pending.discard(key)
            try:
                self._ensure(*key, Path.BACKGROUND)
            except ProgramsFull as error:
                log.warning("%s", error)
            except Exception:
                log.exception("cannot make %s on %s", *key)
            else:
                self._post(ProgramReady(*key))

    def _is_ours(self, instances: Instances) -> bool:
        here = jax.process_index()
        return any(device.process_index == here for device in self._mesh_of(instances).devices.flat)


class _Maker:
    """Makes executables: memory, then store, then a compile. Knows nothing of who asks. Calls for the same program
    must not overlap."""

    def __init__(self, build: Callable[[Program], StepFunction], store: ProgramStore | None, fingerprint: str):
        self._build = build
        self._store = store
        self._fingerprint = fingerprint
        self._jitted: dict[Program, tuple[StepFunction, Callable[..., Any]]] = {}
        self._serialized: dict[Program, Serialized] = {}
        self._environment: dict[str, Any] = {}
        self._may_retarget: bool | None = None
        self._verify_lock = threading.Lock()
        self._trace_lock = threading.Lock()

    def make(self, program: Program, mesh: Mesh) -> tuple[jax.stages.Compiled, Origin]:
        devices = tuple(mesh.devices.flat)
        if any(device.process_index != jax.process_index() for device in devices):
            return self._compile(program, mesh), Origin.COMPILE
        movable = self._is_movable(devices[0])
        if movable and (compiled := self._retarget(program, devices)) is not None:
            return compiled, Origin.RETARGET
        key = self._key(program, mesh, movable) if self._store is not None else {}
        if (compiled := self._load(program, key, devices)) is not None:
            return compiled, Origin.STORE
        with retarget.uncached():
            compiled, from_cache = heard_cache_hit(lambda: self._compile(program, mesh))
        if not from_cache:
            self._keep(program, key, compiled, devices)
        return compiled, Origin.COMPILE

    def forget(self) -> None:
        """Let go of what was made: a traced function keeps the executables compiled from it, and their mappings."""
        self._jitted.clear()
        self._serialized.clear()

    def _retarget(self, program: Program, devices: Sequence[Device]) -> jax.stages.Compiled | None:
        serialized = self._serialized.get(program)
        if serialized is None:
            return None
        try:
            return retarget.load(serialized, devices)
        except RetargetError as error:
            log.warning("%s does not load on %s: %s", program, devices, error)
            del self._serialized[program]
            return None

    def _load(self, program: Program, key: dict[str, Any], devices: Sequence[Device]) -> jax.stages.Compiled | None:
        if self._store is None or (serialized := self._store.get(key)) is None:
            return None
        try:
            compiled = retarget.load(serialized, devices)
        except RetargetError as error:
            log.warning("%s from the store does not load: %s", program, error)
            self._store.discard(key)
            return None
        self._serialized[program] = serialized
        return compiled

    def _keep(
        self, program: Program, key: dict[str, Any], compiled: jax.stages.Compiled, devices: Sequence[Device]
    ) -> None:
        try:
            serialized = retarget.serialize(compiled, devices)
        except RetargetError as error:
            log.info("%s is compiled anew for each device set: %s", program, error)
            return
        self._serialized[program] = serialized
        if self._store is not None:
            self._store.put(key, serialized)

    def _compile(self, program: Program, mesh: Mesh) -> jax.stages.Compiled:
        # Tracing holds the GIL, so it is done one at a time; the compile itself releases it. The trace is cached by
        # JAX under the abstract mesh: for the next device set of this size only the lowering's shardings are new.
        with self._trace_lock, jax.set_mesh(mesh):
            if program not in self._jitted:
                step = self._build(program)
                self._jitted[program] = step, jax.jit(step.function, donate_argnums=step.donate)
            step, jitted = self._jitted[program]
            lowered = jitted.lower(*placed(step, mesh))
        with jax.set_mesh(mesh):
            return lowered.compile(compiler_options=compiler_options(mesh.devices.flat[0]))

    def _is_movable(self, device: Device) -> bool:
        with self._verify_lock:
            if self._may_retarget is None:
                self._environment = environment(device)
                local = jax.local_devices(backend=device.platform)
                self._may_retarget = retarget.verify(local[:_PROBE_DEVICES])
                log.info("retargeting of executables: %s", "on" if self._may_retarget else "off, each set is compiled")
            return self._may_retarget

    def _key(self, program: Program, mesh: Mesh, movable: bool) -> dict[str, Any]:
        return {
            **self._environment,
            "fingerprint": self._fingerprint,
            "phase": program.phase.value,
            "dop": program.dop,
            "bucket": program.bucket,
            "mesh": list(mesh.devices.shape),
            "axes": ",".join(map(str, mesh.axis_names)),
            "compiler_options": compiler_options(mesh.devices.flat[0]),
            "devices": [] if movable else [device.id for device in mesh.devices.flat],
        }


def compiler_options(device: Device) -> dict[str, str | bool]:
    """XLA's options for steps on a kind of device."""
    if chip_of(device.device_kind).name == "tpu7x":
        # Arguments of 16 bits come in tiles of 8 rows, and there it computes in tiles of 16: every step would lay out
        # the weights of all layers anew, which is as much scratch as weights.
        return {"xla_tpu_control_large_2nd_minor_layout_for_x16": False}
    return {}


def placed(step: StepFunction, mesh: Mesh) -> tuple[Any, ...]:
    """The arguments' structs with their shardings on `mesh`."""

    def place(spec: PartitionSpec, argument: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), argument)

    return jax.tree.map(place, step.specs, step.arguments, is_leaf=lambda node: isinstance(node, PartitionSpec))


def _one_of_each_first(wanted: Sequence[tuple[Program, Instances]]) -> list[tuple[Program, Instances]]:
    """Threads should not queue for one program while others wait for their first compile."""
    seen: set[Program] = set()
    first, rest = [], []
    for key in wanted:
        (rest if key[0] in seen else first).append(key)
        seen.add(key[0])
    return first + rest
