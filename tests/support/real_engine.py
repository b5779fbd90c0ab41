"""The real executor over a checkpoint, for schedules and scripted steps, and its judge.

`DataPlane` holds what is expensive (weights on devices, compiled programs) and lends executors. `LossyExecutor` lets a
test say that a step failed: its completion is replaced, as are those of all steps behind it on the same instances, and
the pools come back only with the manager's Reset. `Judge` compares a stream with the oracle, teacher-forced.
What it is not: the live loop (`serving/loop.py`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

import loong_jax
import pallas_kernels
from loong_jax.config import ClusterConfig, LadderConfig, ModelConfig
from loong_jax.esp.groups import Devices
from loong_jax.esp.steps import StepBuilder
from loong_jax.executor import Executor
from loong_jax.grammar import Grammars
from loong_jax.model.checkpoint import load_checkpoint
from loong_jax.model.hf_config import read_config
from loong_jax.model.oracle import Oracle
from loong_jax.model.sampling import Params, sample
from loong_jax.program_store import ProgramStore, fingerprint
from loong_jax.programs import Programs
from loong_jax.types import (
    Adjustment,
    AnyCommand,
    AnyEvent,
    CopyPages,
    Migrate,
    Reset,
    RunDecode,
    RunPrefill,
    Sampling,
    Scores,
    StepDone,
    StepFailed,
    Top,
)
from tests.support import sampling_reference as reference
from tests.support.mock_matcher import MockGrammars

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "models"


def _chaos_cluster(num_instances: int, tp: int, ladder: LadderConfig) -> ClusterConfig:
    return ClusterConfig(
        num_instances, tp, page_tokens=4, pages_per_instance=24, ring_tokens=16, query_tile_tokens=16, slots=16,
        ladder=ladder,
    )  # fmt: skip


CHAOS_CLUSTERS = {
    "four": _chaos_cluster(
        4, 1, LadderConfig((1, 2, 3, 4), (16, 64), (1, 4), prefill_rows=3, move_pages=3, score_tokens=())
    ),
    "sampling": _chaos_cluster(
        3, 1, LadderConfig((1, 3), (16,), (4,), prefill_rows=3, move_pages=3, score_tokens=(16,))
    ),
    "eight": _chaos_cluster(
        8, 1, LadderConfig((1, 2, 3, 8), (16,), (4,), prefill_rows=3, move_pages=3, score_tokens=())
    ),
    "tp2": _chaos_cluster(4, 2, LadderConfig((1, 2, 4), (32,), (4,), prefill_rows=3, move_pages=3, score_tokens=())),
    "windowed": msgspec.structs.replace(
        _chaos_cluster(3, 1, LadderConfig((1, 3), (32,), (4,), prefill_rows=3, move_pages=3, score_tokens=())),
        kv_window=50,
    ),
}
"""Small pools and few programs, for schedules that pick at random. Tests that share one share its executables."""

TIE = 1e-3
"""Below this margin between the two most likely tokens, a greedy token may differ (and is counted)."""


def stored_programs(builder: StepBuilder, devices: Devices, post: Callable[[AnyEvent], None]) -> Programs:
    """Programs kept on disk between runs of the tests, for as long as no source changes."""
    sources = [Path(str(package.__file__)).parent for package in (loong_jax, pallas_kernels)]
    key = fingerprint(sources, repr(builder.model), repr(builder.cluster), builder.platform)
    return Programs(builder.build, devices.mesh, ProgramStore(ROOT / ".cache" / "programs"), post, key)


class DataPlane:
    """Weights and programs of one checkpoint on one cluster; each executor it lends has pools of its own."""

    def __init__(self, directory: Path, cluster: ClusterConfig):
        self.model, self.cluster = read_config(directory), cluster
        self.devices = Devices(jax.devices(), cluster.num_instances, cluster.tp)
        self.builder = StepBuilder(self.model, cluster, "cpu")
        self.weights = load_checkpoint(
            directory, self.model, tp=cluster.tp, devices=self.devices.by_instance, stacked=self.builder.stacked
        )
        self.programs = stored_programs(self.builder, self.devices, lambda event: None)
        self.judge = Judge(directory, self.model)

    def close(self) -> None:
        """Let go of the executables: a process cannot map those of many data planes."""
        self.programs.close()

    def executor(self, post: Callable[[AnyEvent], None]) -> Executor:
        grammars = cast(Grammars, MockGrammars(self.model.vocab_size))
        return Executor(self.builder, self.devices, self.weights, self.programs, post, grammars)


class LossyExecutor:
    """An executor whose steps fail when told. `fail` and `lose` name steps in flight and instances."""

    def __init__(self, plane: DataPlane, post: Callable[[AnyEvent], None]):
        self._post = post
        self._in_flight: dict[int, tuple[int, ...]] = {}
        self._doomed: set[int] = set()
        self._broken: set[int] = set()
        self.inner = plane.executor(self._on_event)

    def submit(self, command: AnyCommand) -> None:
        match command:
            case RunPrefill() | RunDecode() | Migrate():
                self._in_flight[command.step] = command.instances
            case CopyPages():
                self._in_flight[command.step] = (command.instance,)
            case Reset():
                self._broken -= set(command.instances)
        self.inner.submit(command)

    def fail(self, step: int) -> None:
        self._doomed.add(step)

    def lose(self, instance: int) -> None:
        self._broken.add(instance)

    def steps_in_flight(self) -> list[int]:
        return list(self._in_flight)

    def close(self) -> None:
        self.inner.close()

    def _on_event(self, event: AnyEvent) -> None:
        assert isinstance(event, StepDone), event  # a real failure is a defect
        instances = self._in_flight.pop(event.step)
        if event.step in self._doomed or not self._broken.isdisjoint(instances):
            self._broken |= set(instances)
            self._post(StepFailed(event.step, instances, "told to"))
        else:
            self._post(event)


class Verdict(NamedTuple):
    """`num_ties`: greedy tokens that differ from the oracle's where its margin is below TIE; `worst`: largest
    difference of a log-probability."""

    num_tokens: int
    num_ties: int
    worst: float


class Judge:
    """The oracle of one checkpoint, on the first device."""

    def __init__(self, directory: Path, model: ModelConfig):
        devices = [[jax.devices()[0]]]
        [[params]] = load_checkpoint(directory, model, tp=1, devices=devices, stacked=False)
        self.oracle = Oracle(model, jax.tree.map(lambda leaf: leaf[0], params))

    def check(
        self,
        prompt,
        tokens: list[int],
        logprobs: list[float],
        sampling: Sampling,
        tolerance: float = 1e-4,
        tie: float = TIE,
        rope_len: int | None = None,
        *,
        adjustment: Adjustment | None = None,
        stop_ids: tuple[int, ...] = (),
        tops: list[Top] | None = None,
    ) -> Verdict:
        """Every token is the oracle's after the same history, or a greedy tie; log-probabilities agree, and so do those
        of the likeliest tokens, where there are `tops`. `rope_len`: that of the request, where the rotary embedding
        depends on it."""
        if not tokens:
            return Verdict(0, 0, 0.0)
        history = np.concatenate([np.asarray(prompt, np.int32), np.asarray(tokens[:-1], np.int32)])
        rows = self.oracle.logits(history, rope_len)[len(prompt) - 1 :]
        raw = np.stack([reference.logprobs(row) for row in rows])
        worst = float(np.abs(raw[np.arange(len(tokens)), tokens] - np.asarray(logprobs)).max())
        assert worst < tolerance, f"log-probability off by {worst}"
        for index, top in enumerate(tops or ()):
            check_top(raw[index], top.tokens, top.logprobs, sampling.num_top, tolerance)
        if adjustment is not None:
            rows = np.stack(
                [
                    reference.adjusted(row, adjustment, np.asarray(prompt).tolist(), tokens[:index], stop_ids)
                    for index, row in enumerate(rows)
                ]
            )
        expected = rows.argmax(axis=1) if sampling.temperature == 0 else self._sampled(rows, len(prompt), sampling)
        differ = np.flatnonzero(expected != np.asarray(tokens))
        if sampling.temperature == 0:
            top = np.sort(rows, axis=1)
            margin = top[:, -1] - top[:, -2]
            assert (margin[differ] < tie).all(), f"token {differ} differs with margin {margin[differ]}"
        return Verdict(len(tokens), len(differ), worst)

    def _sampled(self, rows: np.ndarray, first: int, sampling: Sampling) -> np.ndarray:
        count = len(rows)
        padded = np.zeros((16 * -(-count // 16), rows.shape[1]), np.float32)  # few shapes, few compilations
        padded[:count] = rows
        full = lambda value, dtype: jnp.full(len(padded), value, dtype)
        params = Params(
            full(sampling.temperature, jnp.float32),
            full(sampling.top_k, jnp.int32),
            full(sampling.top_p, jnp.float32),
            full(sampling.min_p, jnp.float32),
            full(sampling.seed, jnp.uint32),
            jnp.arange(first, first + len(padded), dtype=jnp.int32),
        )
        return np.asarray(_sample(jnp.asarray(padded), params))[:count]

    def check_scores(self, prompt, scores: list[Scores], num_top: int, tolerance: float = 1e-4) -> None:
        """Log-probabilities of all prompt tokens but the first."""
        raw = self.oracle.logprobs(np.asarray(prompt, np.int32))[:-1]
        logprobs = np.concatenate([np.frombuffer(part.logprobs, "<f4") for part in scores] or [np.zeros(0)])
        expected = raw[np.arange(len(raw)), np.asarray(prompt)[1:]]
        np.testing.assert_allclose(logprobs, expected, atol=tolerance)
        tops = [
            (tokens, values)
            for part in scores
            for tokens, values in zip(
                np.frombuffer(part.top_tokens, "<i4").reshape(-1, num_top or 1),
                np.frombuffer(part.top_logprobs, "<f4").reshape(-1, num_top or 1),
                strict=True,
            )
        ]
        assert len(tops) == (len(raw) if num_top else 0)
        for row, (tokens, values) in zip(raw, tops, strict=False):
            check_top(row, tokens, values, num_top, tolerance)


def check_top(row: np.ndarray, tokens, logprobs, num_top: int, tolerance: float) -> None:
    """The likeliest tokens under log-probabilities `row`, in order, but for ties."""
    assert len(tokens) == len(logprobs) == num_top == len(set(tokens))
    np.testing.assert_allclose(logprobs, row[list(tokens)], atol=tolerance)
    np.testing.assert_allclose(logprobs, np.sort(row)[::-1][:num_top], atol=tolerance)


_sample = jax.jit(sample)
