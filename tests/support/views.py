"""What a policy sees, by hand: a cluster of pages of four tokens, requests by what they hold, and a draft over them."""

from __future__ import annotations

from collections.abc import Sequence

from loong_jax.config import ClusterConfig, LadderConfig, LimitsConfig
from loong_jax.cost.unmeasured import unmeasured
from loong_jax.policy.draft import Draft
from loong_jax.policy.groups import ReadyGroups
from loong_jax.types import NEVER, InstanceView, Phase, Program, Record, Resident, Run, Target
from tests.support.schedules import arcs

PAGE_TOKENS = 4
LIMITS = LimitsConfig(chunk_tokens=32, decode_headroom_pages=1)


class Seen(Record, frozen=True):
    """A `RequestView` by hand."""

    request: int
    arrived_us: int
    prompt_len: int
    known: int
    issued: int
    max_tokens: int
    num_generated: int
    running: bool
    missing: tuple[Run, ...]
    resident: tuple[Resident, ...] = ()
    open_page: tuple[int, int] | None = None
    device_group: tuple[int, ...] = ()
    in_flight: int = 0
    num_evictions: int = 0
    score: bool = False
    target: Target = Target()
    first_token_us: int = NEVER

    @property
    def kv(self) -> dict[int, int]:
        return {held.instance: held.tokens for held in self.resident}

    @property
    def prefill_phase(self) -> Phase:
        return Phase.SCORE if self.score else Phase.PREFILL


class SeenView(Record, frozen=True):
    """A `View` by hand; every waiting request may start."""

    page_tokens: int
    instances: tuple[InstanceView, ...]
    active: tuple[Seen, ...] = ()
    waiting: tuple[Seen, ...] = ()
    ready: frozenset[tuple[Program, tuple[int, ...]]] = frozenset()
    now_us: int = 0
    version: int = 0
    mean_output: float = 64.0
    usual_prompt: int = 0

    @property
    def free_places(self) -> int:
        return len(self.waiting)

    @property
    def requests(self) -> tuple[Seen, ...]:
        return self.active + self.waiting


def cluster(num_instances: int = 4, dops: Sequence[int] = (1, 2, 3, 4)) -> ClusterConfig:
    ladder = LadderConfig(
        dops=tuple(dop for dop in dops if dop <= num_instances),
        prefill_tokens=(16,),
        decode_rows=(2,),
        score_tokens=(16,),
    )
    return ClusterConfig(
        num_instances, page_tokens=PAGE_TOKENS, pages_per_instance=16, ring_tokens=16, query_tile_tokens=16,
        ladder=ladder,
    )  # fmt: skip


def instance(index: int, free: int = 16, queued: int = 0, prefilling: int = 0, alive: bool = True) -> InstanceView:
    return InstanceView(index, free, 16, queued, prefilling, alive)


FOUR = tuple(instance(index) for index in range(4))


def decoding(
    request: int,
    pages: dict[int, int],
    *,
    open_page: tuple[int, int] | None = None,
    device_group: tuple[int, ...] = (),
    in_flight: int = 0,
) -> Seen:
    """One that decodes, with `pages` by instance."""
    resident = tuple(Resident(i, n * PAGE_TOKENS, n) for i, n in pages.items())
    known = sum(pages.values()) * PAGE_TOKENS + 1
    return Seen(
        request, request, known - 1, known, known, 100, 1, True, (Run(known - 1, 1),), resident, open_page,
        device_group, in_flight, 0,
    )  # fmt: skip


def prompting(
    request: int, prompt_len: int, pages: dict[int, int] | None = None, in_flight: int = 0, score: bool = False
) -> Seen:
    """One whose first pages, `pages` by instance, hold KV, and whose other positions need prefill."""
    resident = tuple(Resident(i, n * PAGE_TOKENS, n) for i, n in (pages or {}).items())
    done = sum(r.tokens for r in resident)
    return Seen(
        request, request, prompt_len, prompt_len, prompt_len, 100, 0, False, (Run(done, prompt_len - done),), resident,
        None, (), in_flight, 0, score,
    )  # fmt: skip


def draft(
    requests: Sequence[Seen],
    instances: Sequence[InstanceView] = FOUR,
    ready: Sequence[tuple[Program, tuple[int, ...]]] | None = None,
    dops: Sequence[int] = (1, 2, 3, 4),
) -> Draft:
    """READY by default: every program on every arc."""
    config = cluster(len(instances), dops)
    programs = frozenset(arcs(config) if ready is None else ready)
    view = SeenView(PAGE_TOKENS, tuple(instances), tuple(requests), ready=programs)
    return Draft(config, LIMITS, ReadyGroups(programs), view, unmeasured())
