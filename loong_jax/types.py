"""Frozen records that cross the seams: events, commands, and what a policy sees and answers.

What it is: the vocabulary of floors 0-3. Events go into `Manager.handle`, commands come out, a `Policy` maps a
`View` to a `Plan`. Every event and command encodes to bytes (`loong_jax/codec.py`) and carries no object
reference, so the log, the replay and the worker of another host read the same thing.
What it is not: mutable state (that is `manager.py` and `ledger.py`) or anything that knows JAX.

Lengths of a request. `tokens[0:known]` are known to the host (prompt, then generated). KV covers positions; the
step that takes `tokens[p]` as input writes KV at `p` and samples `tokens[p + 1]`. A prefill covers all missing
positions of `[0, known)` and emits token `known`; a decode row takes the last token, at position `position`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Protocol

import msgspec

NEVER = -1
"""A time that has not come."""

TokenBytes = bytes
"""Token ids as little-endian int32: a million-token prompt stays 4 MB and slices without copying ints."""


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all plain frozen records. Records never form cycles, so the garbage collector need not track them."""


# --------------------------------------------------------------------------------------------------------------
# Words shared by everything


class Phase(StrEnum):
    """Kind of a compiled step program."""

    PREFILL = "prefill"
    SCORE = "score"  # a prefill that also gives the log-probabilities of the tokens it computes
    DECODE = "decode"
    MIGRATE = "migrate"
    COPY = "copy"


class ContextForm(StrEnum):
    """How a prefill chunk attends to resident context (DESIGN 5)."""

    GATHER_Q = "gather_q"  # context stays put; q and partials are exchanged
    RING = "ring"  # fixed tiles of context rotate; may re-home pages on the way


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RejectReason(StrEnum):
    TOO_LARGE = "too_large"  # can never fit the pool -> INVALID_ARGUMENT
    QUEUE_FULL = "queue_full"  # -> RESOURCE_EXHAUSTED
    DRAINING = "draining"  # -> UNAVAILABLE


class Program(Record, frozen=True, order=True):
    """One entry of the program ladder. `bucket`: prefill tokens per instance, or decode rows per master, or the fixed
    page count of migrate / copy."""

    phase: Phase
    dop: int
    bucket: int


class Run(Record, frozen=True, order=True):
    """Consecutive positions `[first, first + count)` of one request."""

    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count


class Sampling(Record, frozen=True):
    """Sampling of one request. `temperature == 0` is greedy; `top_k == 0`, `top_p == 1` and `min_p == 0` switch those
    filters off. Noise is keyed by (seed, position), so placement, batch mix and DoP change nothing. `num_top`: how many
    of the likeliest tokens are reported beside the sampled one."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    num_top: int = 0


class Adjustment(Record, frozen=True):
    """Changes of one request's logits before temperature and filters, in this order: `logit_bias` (token, addend) and
    the ban of its stop ids for the first `min_tokens` generated tokens; `repetition_penalty` on all tokens of prompt
    and output (positive logits are divided by it, negative ones multiplied); `frequency_penalty` per occurrence and
    `presence_penalty` once, taken off what was generated; and only tokens by which the answer may still come to satisfy
    `grammar` (`loong_jax/grammar.py`; empty: any)."""

    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    grammar: str = ""

    @property
    def counts_output(self) -> bool:
        return self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def needs_history(self) -> bool:
        """Whether a step must know the token before the one it samples: such rows are never one step late."""
        return self.repetition_penalty != 1 or self.counts_output or self.grammar != ""


class Target(Record, frozen=True):
    """How soon a request wants its tokens. `priority`: larger goes first; `ttft_us`: from its arrival to its first
    token; `tpot_us`: between tokens after it; 0: as soon as may be."""

    priority: int = 0
    ttft_us: int = 0
    tpot_us: int = 0


NO_TARGET = Target()


class Top(Record, frozen=True):
    """The likeliest tokens of one position, in descending order, under the raw logits."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


class Scores(Record, frozen=True):
    """Log-probabilities of consecutive tokens of a text given what is before each, as little-endian float32; with `k`
    likeliest tokens for each (int32) and their log-probabilities, row by row."""

    logprobs: bytes
    k: int = 0
    top_tokens: bytes = b""
    top_logprobs: bytes = b""

    def part(self, first: int, count: int) -> Scores:
        width = 4 * self.k
        return Scores(
            self.logprobs[4 * first : 4 * (first + count)],
            self.k,
            self.top_tokens[width * first : width * (first + count)],
            self.top_logprobs[width * first : width * (first + count)],
        )


# --------------------------------------------------------------------------------------------------------------
# Events (in). Everything that sways a decision is one of these.


class Event(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    pass


class Arrived(Event, frozen=True):
    """`request` ids are assigned by the caller, strictly increasing. `stop_ids` already contains the eos ids
    unless the client said ignore_eos. `max_tokens` >= 1. `num_prompt_top`: the prompt's log-probabilities are wanted,
    with so many likeliest tokens for each position."""

    request: int
    prompt: TokenBytes
    max_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()
    adjustment: Adjustment | None = None
    num_prompt_top: int | None = None
    target: Target = NO_TARGET


class StepDone(Event, frozen=True):
    """`tokens` / `logprobs`: one per emitting row, in the command's row order (empty for migrate and copy). `tops`: ()
    when no emitting row asked for any, else one for each of them. `scores`: one per row of a scoring prefill, for the
    tokens that follow those it computed (arbitrary where that one is not known)."""

    step: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    tops: tuple[Top | None, ...] = ()
    scores: tuple[Scores, ...] = ()


class StepFailed(Event, frozen=True):
    """The step is lost, and so is every page of the pools of `instances` (at least the step's own instances).

    The executor also posts a StepFailed for every step queued later on one of them, and for each step submitted to one
    of them before the Reset that follows. The manager gives them no step until all of these came and it sent the Reset.
    """

    step: int
    instances: tuple[int, ...]
    reason: str


class Aborted(Event, frozen=True):
    request: int


class RequestFailed(Event, frozen=True):
    """What alters the logits of `request` gave up (a grammar that takes too much work); its steps go on unhindered."""

    request: int
    reason: str


class Stopped(Event, frozen=True):
    """A stop string was found in the text: keep `num_generated` generated tokens, finish with reason stop."""

    request: int
    num_generated: int


class Forked(Event, frozen=True):
    """`child` continues the first `known` tokens of `parent` (0: all that are known now) with its own sampling, and
    shares the parent's full pages. It waits until the parent has KV of all of them, unless the parent ends before."""

    parent: int
    child: int
    max_tokens: int  # of the child, counted from the fork
    sampling: Sampling
    stop_ids: tuple[int, ...] = ()
    adjustment: Adjustment | None = None
    known: int = 0


class ProgramReady(Event, frozen=True):
    program: Program
    instances: tuple[int, ...]


class CostUpdated(Event, frozen=True):
    """New coefficients for the cost model, by name."""

    coefficients: dict[str, float]


class InstanceLost(Event, frozen=True):
    instance: int


class InstanceJoined(Event, frozen=True):
    instance: int


class Drain(Event, frozen=True):
    pass


class Tick(Event, frozen=True):
    pass


AnyEvent = (
    Arrived
    | StepDone
    | StepFailed
    | Aborted
    | RequestFailed
    | Stopped
    | Forked
    | ProgramReady
    | CostUpdated
    | InstanceLost
    | InstanceJoined
    | Drain
    | Tick
)

# --------------------------------------------------------------------------------------------------------------
# Commands (out)


class Command(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    pass


class PageMove(Record, frozen=True):
    """Page `src_page` of `request` on instance `src`, holding `run`, gets a new home: `dst_page` on `dst`."""

    request: int
    src: int
    src_page: int
    dst: int
    dst_page: int
    run: Run


class PrefillRow(Record, frozen=True):
    """One request of a prefill batch.

    `runs` are the positions computed now, ascending; `tokens` are their ids. Each run is cut into *units* of at most
    `page_tokens` positions from its first (`buckets.units`); unit `i` is kept on `homes[i]` in page `pages[i]`.
    With `emit`, the last position is `known - 1` and the row samples token `known`. `rope_len`: the length that
    rotary embeddings which depend on one take: the same for all rows of a request, whatever is cached or computed.
    In a scoring prefill `targets` are the ids of the tokens after those of `tokens` (0 where it is not known), and
    `num_top` says how many likeliest ones are wanted.
    """

    request: int
    slot: int  # index of the request in the devices' last-token array
    runs: tuple[Run, ...]
    tokens: TokenBytes
    homes: tuple[int, ...]
    pages: tuple[int, ...]
    emit: bool
    sampling: Sampling
    rope_len: int = 0
    targets: TokenBytes = b""
    num_top: int = 0


class RunPrefill(Command, frozen=True):
    """Prefill the rows over the group; the units of all rows, in order, are striped: unit u on rank u mod dop.

    `instances` is sorted and holds every instance with context of a row, every home, and every move's ends.
    `moves` re-home context pages while they circulate (ring form only); a moved page leaves its old home when the
    step is issued: later steps on the device see only the new one. `score`: by a scoring program.
    """

    step: int
    instances: tuple[int, ...]
    bucket: int
    form: ContextForm
    rows: tuple[PrefillRow, ...]
    moves: tuple[PageMove, ...] = ()
    score: bool = False

    @property
    def phase(self) -> Phase:
        return Phase.SCORE if self.score else Phase.PREFILL


class DecodeRow(Record, frozen=True):
    """One row of a decode step: input token `token` at `position` (or -1: the device has it, because the master
    was in the group that sampled it). Its new KV goes to slot `run.count - 1` of `page` on `master`; `run` is what
    that page holds afterwards. `rope_len`: as in PrefillRow."""

    request: int
    slot: int
    position: int
    token: int
    master: int
    page: int
    run: Run
    sampling: Sampling
    rope_len: int = 0


class RunDecode(Command, frozen=True):
    """`instances` is sorted and holds every instance with KV of a row and every master; `bucket` is rows a master."""

    step: int
    instances: tuple[int, ...]
    bucket: int
    rows: tuple[DecodeRow, ...]


class Migrate(Command, frozen=True):
    """Copy pages between exactly two instances (`instances` sorted); done -> StepDone(step). Homes change at issue."""

    step: int
    instances: tuple[int, ...]
    moves: tuple[PageMove, ...]


class PageCopy(Record, frozen=True):
    """The child's own copy of the parent's open page."""

    request: int  # the child
    src_page: int
    dst_page: int
    run: Run


class CopyPages(Command, frozen=True):
    """Copies within one instance (the open page of a fork)."""

    step: int
    instance: int
    copies: tuple[PageCopy, ...]


class Fork(Command, frozen=True):
    """The child shares these pages of the parent: (instance, page, run). Bookkeeping of the executor's mirror only."""

    parent: int
    child: int
    shared: tuple[tuple[int, int, Run], ...]


class Truncate(Command, frozen=True):
    """KV of `request` beyond `kv_len` positions is dropped."""

    request: int
    kv_len: int


class Slide(Command, frozen=True):
    """Pages of `request` that end at or before position `start` are dropped: every layer's window has passed them."""

    request: int
    start: int


class Free(Command, frozen=True):
    """All KV of `request` on `instances` is dropped (all its instances for an eviction or an end)."""

    request: int
    instances: tuple[int, ...]


class Adjust(Command, frozen=True):
    """From now on the logits of `request` are adjusted. Once, before its first step: from then on its rows tell the
    executor what was generated. `prompt` is empty unless the repetition penalty needs it; `num_prompt` its length."""

    request: int
    adjustment: Adjustment
    prompt: TokenBytes
    num_prompt: int
    stop_ids: tuple[int, ...]


class Forget(Command, frozen=True):
    """No step of an adjusted request will follow."""

    request: int


class Emit(Command, frozen=True):
    """Tokens for the client's stream: generated tokens `[index, index + len(tokens))`. `tops`: one for each, where the
    request asked for them."""

    request: int
    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    dop: int  # instances of the step that sampled them
    tops: tuple[Top, ...] = ()


class EmitScores(Command, frozen=True):
    """Log-probabilities of the prompt's tokens from `first` on; in order, each once, token 0 never."""

    request: int
    first: int
    scores: Scores


class Finish(Command, frozen=True):
    request: int
    reason: FinishReason
    num_generated: int
    message: str = ""


class Reject(Command, frozen=True):
    request: int
    reason: RejectReason
    message: str


class Prepare(Command, frozen=True):
    """Ask for a program on a device set; answered by ProgramReady."""

    program: Program
    instances: tuple[int, ...]


class Reset(Command, frozen=True):
    """The pools of `instances` were lost: make fresh ones (follows StepFailed and InstanceJoined)."""

    instances: tuple[int, ...]


AnyCommand = (
    RunPrefill
    | RunDecode
    | Migrate
    | CopyPages
    | Fork
    | Truncate
    | Slide
    | Free
    | Adjust
    | Forget
    | Emit
    | EmitScores
    | Finish
    | Reject
    | Prepare
    | Reset
)

StepCommand = RunPrefill | RunDecode | Migrate | CopyPages

# --------------------------------------------------------------------------------------------------------------
# What a policy sees, and answers (floor 2). No field tells the true output length (INV-9).


class Resident(Record, frozen=True):
    """KV of one request on one instance."""

    instance: int
    tokens: int
    pages: int


class RequestView(Protocol):
    """One unfinished request, read only and live: what it says holds until the plan is applied. Reading costs little,
    and nothing is copied; do not keep one across plans, but in what `View.version` tells to be still true.

    `missing`: runs of `[0, known)` without KV (for a running decode: nothing but the last known position). What no
    window will show again is dropped, and not missing.
    `kv`: tokens of KV by instance, in no order; `resident`: the same with pages, ascending, which costs more to read.
    `device_group`: instances whose devices hold the newest token, or () when the host knows it.
    `running`: KV of `[0, known - 1)` is complete and it may decode now; else it needs prefill of `missing`, or waits
    for the host to know its newest token (`in_flight` > 0). `score`: its prefills are scoring ones.
    `issued`: `known`, plus one per token sampled by steps in flight. `open_page`: (instance, free slots) of the page
    that the next token may join. `first_token_us`: when its first token was sampled, or NEVER.
    `in_flight`: steps issued and not done. A prefilling request with in_flight > 0 cannot be planned again."""

    @property
    def request(self) -> int: ...
    @property
    def arrived_us(self) -> int: ...
    @property
    def prompt_len(self) -> int: ...
    @property
    def known(self) -> int: ...
    @property
    def issued(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def num_generated(self) -> int: ...
    @property
    def running(self) -> bool: ...
    @property
    def missing(self) -> tuple[Run, ...]: ...
    @property
    def kv(self) -> Mapping[int, int]: ...
    @property
    def resident(self) -> tuple[Resident, ...]: ...
    @property
    def open_page(self) -> tuple[int, int] | None: ...
    @property
    def device_group(self) -> tuple[int, ...]: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def num_evictions(self) -> int: ...
    @property
    def score(self) -> bool: ...
    @property
    def prefill_phase(self) -> Phase: ...
    @property
    def target(self) -> Target: ...
    @property
    def first_token_us(self) -> int: ...


class InstanceView(Record, frozen=True):
    """`queued`: steps issued and not done (0, 1 or 2; an instance that must not get steps now shows 2).
    `prefilling`: how many of them are prefills."""

    instance: int
    free_pages: int
    num_pages: int
    queued: int
    prefilling: int
    alive: bool


class View(Protocol):
    """The state a policy may use, read only and live.

    `active` and `waiting` are in order of arrival; `free_places`: how many waiting requests may start (`max_running`,
    slots). `requests`: the active ones and as many waiting ones as may start, so a policy may start any of them.
    `mean_output`: generated tokens of the requests that ended by themselves, on average. `usual_prompt`: tokens that
    nine of ten recent prompts do not exceed (0: none came yet).
    `version` changes with everything but ordinary decoding: between two plans of one version the same requests run, on
    the same instances, none came to its end or was decoded by another group, and only lengths grew. Lists of requests
    cost their length to read, the rest does not.
    """

    @property
    def now_us(self) -> int: ...
    @property
    def version(self) -> int: ...
    @property
    def page_tokens(self) -> int: ...
    @property
    def instances(self) -> tuple[InstanceView, ...]: ...
    @property
    def free_places(self) -> int: ...
    @property
    def mean_output(self) -> float: ...
    @property
    def usual_prompt(self) -> int: ...
    @property
    def active(self) -> Sequence[RequestView]: ...
    @property
    def waiting(self) -> Sequence[RequestView]: ...
    @property
    def requests(self) -> Sequence[RequestView]: ...
    @property
    def ready(self) -> frozenset[tuple[Program, tuple[int, ...]]]: ...


class PlannedPrefillRow(Record, frozen=True):
    request: int
    runs: tuple[Run, ...]


class Share(Record, frozen=True):
    """The next `pages` units of a batch are kept on `instance`."""

    instance: int
    pages: int


class Rehome(Record, frozen=True):
    """Move `pages` pages of `request` from `src` to `dst` (lowest positions first)."""

    request: int
    src: int
    dst: int
    pages: int


class PlannedPrefill(Record, frozen=True):
    """`keep` covers the batch's units in order (the sum of pages is the number of units). `score`: as all its rows."""

    instances: tuple[int, ...]
    form: ContextForm
    rows: tuple[PlannedPrefillRow, ...]
    keep: tuple[Share, ...]
    rehome: tuple[Rehome, ...] = ()
    score: bool = False


class PlannedDecodeRow(Record, frozen=True):
    request: int
    master: int


class PlannedDecode(Record, frozen=True):
    instances: tuple[int, ...]
    rows: tuple[PlannedDecodeRow, ...]


class PlannedMigrate(Record, frozen=True):
    rehome: Rehome


class PlannedEvict(Record, frozen=True):
    """Drop all KV of a request; it is recomputed later. Only with no step in flight."""

    request: int


class PlannedPrepare(Record, frozen=True):
    program: Program
    instances: tuple[int, ...]


class Reservation(Record, frozen=True):
    """Hold `instances` for `request` until `until_us`."""

    request: int
    instances: tuple[int, ...]
    until_us: int


class Plan(Record, frozen=True):
    """Applied in this order: evicts, migrates, prefills, decodes. An instance serves at most one of them, and none
    when it already has two steps outstanding. `final`: the policy has no more to say before the next event."""

    evicts: tuple[PlannedEvict, ...] = ()
    migrates: tuple[PlannedMigrate, ...] = ()
    prefills: tuple[PlannedPrefill, ...] = ()
    decodes: tuple[PlannedDecode, ...] = ()
    prepares: tuple[PlannedPrepare, ...] = ()
    reservations: tuple[Reservation, ...] = ()
    final: bool = False
