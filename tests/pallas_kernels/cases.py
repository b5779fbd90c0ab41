"""The conformance cases of the kernels: inputs, poisoned where nothing may be read, and the dense answer in float64.

An implementation passes when it gives the dense answer for every case or refuses it with NotImplementedError *and* says
so in `test_conformance.UNSUPPORTED`. Everything an op must not read is NaN: padding tokens, unused slots, pages and
table entries.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.partial import NEG, Partial
from pallas_kernels.storage import encode_bits

Layout = Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


class FlashCase(NamedTuple):
    name: str
    layout: Layout
    tok: int = 128
    ctx: int = 128
    heads: int = 4
    kvh: int = 2
    dim: int = 64
    dtype: str = "float32"
    window: int | None = None
    soft_cap: float | None = None


class PagedCase(NamedTuple):
    """`ctx`: tokens each request has on this instance. `behind`: q stands that many tokens before their end."""

    name: str
    ctx: tuple[int, ...]
    page_tokens: int = 16
    qtok: int = 1
    heads: int = 4
    kvh: int = 2
    dim: int = 64
    pool_dim: int = 0  # 0: as dim
    num_pages: int = 64
    num_entries: int = 96
    dtype: str = "float32"
    storage: str = "float32"
    window: int | None = None
    soft_cap: float | None = None
    behind: int = 0
    gaps: bool = False  # partly filled pages in any order, rows sharing their first page
    rows: int = 1  # of each request, with the same entries and one position after the other
    repeat: bool = False  # few pages, so that a long table needs no large pool: an entry's page is in others too


# ---------------------------------------------------------------------------------------------------------------
# Layouts of flash_partial: (q_req, q_pos, kv_req, kv_pos)


def causal(rng, tok, ctx):
    return np.zeros(tok), np.arange(tok), np.zeros(ctx), np.arange(ctx)


def chunk(rng, tok, ctx):
    return np.zeros(tok), np.arange(ctx - tok, ctx), np.zeros(ctx), np.arange(ctx)


def striped(rng, tok, ctx):
    """Rank 1's queries against rank 2's keys of four, in units of 16, over three requests of one concatenation."""
    position = np.arange(4 * max(tok, ctx))
    ends = np.array([37, 3 * len(position) // 5])
    req = np.searchsorted(ends, position, side="right")
    pos = position - np.concatenate([[0], ends])[req]
    rank = position // 16 % 4
    q, kv = position[rank == 1][:tok], position[rank == 2][:ctx]
    return req[q], pos[q], req[kv], pos[kv]


def ragged(rng, tok, ctx):
    """Requests of 1, 2, 5, 14, ... tokens end to end; the last eighth is padding."""
    req, pos, length = [], [], 1
    while len(req) < tok:
        req += [len(set(req))] * length
        pos += range(length)
        length = 3 * length - 1 if length > 1 else 2
    req, pos = np.array(req[:tok]), np.array(pos[:tok])
    req[tok - tok // 8 :] = -1
    return req, pos, np.resize(req, ctx), np.resize(pos, ctx)


def scattered(rng, tok, ctx):
    """Any tokens of any request in any order on either side, a fifth of them padding."""

    def side(num_tokens):
        req = rng.integers(0, 5, num_tokens)
        pos = rng.permutation(4 * num_tokens)[:num_tokens]
        return np.where(rng.random(num_tokens) < 0.2, -1, req), pos

    return *side(tok), *side(ctx)


def all_padding(rng, tok, ctx):
    return np.full(tok, -1), np.arange(tok), np.full(ctx, -1), np.arange(ctx)


def padded_keys(rng, tok, ctx):
    return np.zeros(tok), np.arange(tok), np.full(ctx, -1), np.arange(ctx)


def future(rng, tok, ctx):
    return np.zeros(tok), np.arange(tok), np.zeros(ctx), tok + np.arange(ctx)


def strangers(rng, tok, ctx):
    return np.ones(tok), np.arange(tok), np.arange(ctx) % 2 * 2, np.arange(ctx)


def resident(rng, tok, ctx):
    """Chunks of three requests against what is resident of them: pages of 16 in any order, some partly filled."""
    share = -(-tok // 3)
    q_req = np.arange(tok) // share
    q_pos = np.array([500, 90, 3])[q_req] + np.arange(tok) % share
    page = rng.permutation(ctx // 16)
    kv_req = np.where(np.arange(16) < rng.integers(4, 17, page.size)[:, None], page[:, None] % 3, -1)
    return q_req, q_pos, kv_req.reshape(-1), (16 * (page // 3)[:, None] + np.arange(16)).reshape(-1)


def far(rng, tok, ctx):
    """A chunk after a million tokens; of the keys one in many, all the way back."""
    return np.zeros(tok), 2**20 + np.arange(tok), np.zeros(ctx), np.sort(rng.choice(2**20 + tok, ctx, replace=False))


FLASH_CASES = [
    *[FlashCase(f.__name__, f) for f in (causal, striped, ragged, scattered)],
    *[FlashCase(f.__name__, f) for f in (all_padding, padded_keys, future, strangers)],
    FlashCase("chunk", chunk, tok=128, ctx=512),
    FlashCase("long causal", causal, tok=1024, ctx=1024),
    FlashCase("long ragged", ragged, tok=1024, ctx=1024),
    FlashCase("long striped", striped, tok=1024, ctx=768),
    FlashCase("long scattered", scattered, tok=640, ctx=1200),
    FlashCase("resident", resident, tok=256, ctx=512),
    FlashCase("a million tokens on", far, tok=256, ctx=512),
    FlashCase("window of half a million", far, tok=256, ctx=512, window=2**19),
    FlashCase("few queries, odd sizes", chunk, tok=7, ctx=301),
    FlashCase("one query", chunk, tok=1, ctx=129),
    FlashCase("few keys", scattered, tok=300, ctx=5),
    FlashCase("window of one", causal, window=1),
    FlashCase("window", causal, tok=768, ctx=768, window=100),
    FlashCase("window striped", striped, tok=256, ctx=256, window=90),
    FlashCase("window scattered", scattered, tok=256, ctx=512, window=150),
    FlashCase("soft cap", ragged, soft_cap=2.0),
    FlashCase("soft cap and window", chunk, tok=128, ctx=512, soft_cap=5.0, window=64),
    FlashCase("MHA", ragged, heads=4, kvh=4),
    FlashCase("MQA", causal, heads=8, kvh=1),
    FlashCase("one head", causal, heads=1, kvh=1),
    FlashCase("32 heads", ragged, heads=32, kvh=8, dim=16),
    *[FlashCase(f"dim {dim}", ragged, dim=dim) for dim in (16, 80, 96, 128, 256)],
    *[FlashCase(f"bf16 {f.__name__}", f, dtype="bfloat16") for f in (causal, striped, ragged, scattered, future)],
    FlashCase("bf16 long dim 128", chunk, tok=512, ctx=1024, dim=128, dtype="bfloat16"),
    FlashCase("bf16 dim 80, window, soft cap", ragged, dim=80, dtype="bfloat16", window=9, soft_cap=5.0),
    *[FlashCase(f"bf16 {f.__name__}", f, dtype="bfloat16") for f in (all_padding, padded_keys, strangers)],
    FlashCase("bf16 long scattered, window", scattered, tok=300, ctx=600, window=150, dtype="bfloat16"),
    FlashCase("bf16 resident, MQA, dim 96", resident, tok=256, ctx=512, heads=2, kvh=1, dim=96, dtype="bfloat16"),
    FlashCase("bf16 one query, dim 256", chunk, tok=1, ctx=129, heads=1, kvh=1, dim=256, dtype="bfloat16"),
    FlashCase("bf16 a million tokens on, MHA", far, tok=128, ctx=512, heads=2, window=2**19, dtype="bfloat16"),
]

_HALF = {"dtype": "bfloat16", "storage": "bfloat16"}
_LONG = {"heads": 1, "kvh": 1, "dim": 16, "num_pages": 256, "repeat": True}
PAGED_CASES = [
    PagedCase("one row", (100,)),
    PagedCase("one token", (1,)),
    PagedCase("rows", (100, 16, 1, 333, 17)),
    PagedCase("empty rows", (0, 40, 0, 0, 7, 0)),
    PagedCase("all empty", (0, 0, 0)),
    PagedCase("gaps", (100, 60, 0, 200), gaps=True),
    PagedCase("between tiles", (64, 63, 65, 512, 511, 513), num_pages=128, num_entries=160),
    PagedCase("queries behind", (100, 30, 300), behind=29),
    PagedCase("queries before all", (100, 30), behind=1000),
    PagedCase("gather-q", (100, 0, 333), qtok=16),
    PagedCase("gather-q behind, gaps", (100, 40, 333), qtok=16, behind=25, gaps=True),
    PagedCase("gather-q of odd size", (50, 70), qtok=5),
    *[
        PagedCase(f"page {p}", (70, 0, 33), page_tokens=p, num_pages=112, num_entries=128)
        for p in (1, 2, 4, 8, 32, 64, 128)
    ],
    PagedCase("thousands of entries", (3000, 0, 500), page_tokens=1, num_pages=4096, num_entries=9000),
    PagedCase("window of one", (100, 30), window=1),
    PagedCase("window", (400, 30, 600), window=70, num_pages=128),
    PagedCase("window gather-q gaps", (300, 60), qtok=16, window=33, gaps=True),
    PagedCase("soft cap", (100, 40), soft_cap=2.0),
    PagedCase("MHA", (100, 40), kvh=4),
    PagedCase("MQA", (100, 40), heads=8, kvh=1),
    *[PagedCase(f"dim {d}", (100, 40), dim=d) for d in (16, 80, 128)],
    PagedCase("lanes", (100, 40), dim=64, pool_dim=128),
    PagedCase("lanes, gather-q", (100, 40), dim=80, pool_dim=128, qtok=16),
    PagedCase("bf16", (100, 0, 333), dtype="bfloat16", storage="bfloat16"),
    PagedCase("bits", (100, 0, 333), dtype="bfloat16", storage="uint16"),
    PagedCase("bits, gaps", (100, 60, 333), dtype="bfloat16", storage="uint16", gaps=True, pool_dim=128),
    PagedCase("bits, gather-q", (100, 0, 333), dtype="bfloat16", storage="uint16", qtok=16, behind=20),
    PagedCase("bits, f32 queries", (100, 50), storage="uint16"),
    *[PagedCase(f"bf16 page {p}", (70, 0, 33), page_tokens=p, **_HALF) for p in (8, 64, 128)],
    PagedCase("bf16 gather-q, gaps, window", (200, 60), qtok=8, behind=25, gaps=True, window=33, **_HALF),
    PagedCase("bf16 soft cap, dim 80, MHA", (100, 40), heads=2, dim=80, soft_cap=2.0, **_HALF),
    PagedCase("bf16 dim 96, lanes", (100, 40), dim=96, pool_dim=128, **_HALF),
    PagedCase("bf16 dim 256, MQA, a page of queries", (100, 40), kvh=1, heads=8, dim=256, qtok=16, **_HALF),
    PagedCase("bf16 queries before all", (100, 30), behind=1000, **_HALF),
    PagedCase("rows of one request", (100, 0, 333, 20), qtok=16, rows=5, behind=60),
    PagedCase("rows of one request, gaps, window", (200, 90), qtok=8, rows=9, behind=40, window=50, gaps=True),
    *[PagedCase(f"dim {d}", (100, 40), dim=d) for d in (96, 256)],
    PagedCase("dim 256, page 1", (70, 33), dim=256, page_tokens=1, num_pages=112, num_entries=128),
    PagedCase("dim 256, page 2", (70, 33), dim=256, page_tokens=2, num_entries=128),
    PagedCase("page 3", (70, 33), page_tokens=3),
    PagedCase("page 128, gather-q", (700, 0, 130), page_tokens=128, qtok=128, behind=90),
    PagedCase("1M tokens, window", (2**20 - 5, 0, 77), window=300, num_entries=2**16 + 99, **_LONG),
    PagedCase("1M tokens", (2**20 - 5, 0, 77), page_tokens=128, num_entries=2**13 + 99, **_LONG),
    PagedCase("bf16 1M tokens, window", (2**20 - 5, 0, 77), window=300, num_entries=2**16 + 99, **_LONG, **_HALF),
    PagedCase("128 rows x 8K pages", (2**13 - 3,) * 128, page_tokens=1, window=99, num_entries=2**20, **_LONG),
]


# ---------------------------------------------------------------------------------------------------------------
# Inputs


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.array(jnp.asarray(rng.standard_normal(shape), dtype).astype(jnp.float32))


def flash_inputs(case: FlashCase) -> dict[str, jax.Array]:
    rng = np.random.default_rng(len(case.name) + case.tok)
    q_req, q_pos, kv_req, kv_pos = (np.asarray(a, np.int32) for a in case.layout(rng, case.tok, case.ctx))
    q = 2 * _normal(rng, (case.tok, case.heads, case.dim), case.dtype)
    k, v = (_normal(rng, (case.ctx, case.kvh, case.dim), case.dtype) for _ in range(2))
    q[q_req < 0] = np.nan
    k[kv_req < 0] = np.nan
    v[kv_req < 0] = np.nan
    arrays = {name: jnp.asarray(a, case.dtype) for name, a in (("q", q), ("k", k), ("v", v))}
    labels = {"q_req": q_req, "q_pos": q_pos, "kv_req": kv_req, "kv_pos": kv_pos}
    return arrays | {name: jnp.asarray(a) for name, a in labels.items()}


def paged_inputs(case: PagedCase) -> dict[str, jax.Array]:
    rng = np.random.default_rng(len(case.name) + sum(case.ctx))
    num_layers, num_rows = 3, len(case.ctx) * case.rows
    free = list(rng.permutation(case.num_pages))
    pool = np.full(
        (num_layers, case.num_pages, 2, case.kvh, case.page_tokens, case.pool_dim or case.dim), np.nan, np.float32
    )
    entries = rng.integers(-(2**30), 2**30, (case.num_entries, 3)).astype(np.int32)
    row_start = rng.integers(0, case.num_entries, num_rows).astype(np.int32)  # of an empty row: anything
    row_len = np.zeros(num_rows, np.int32)
    q_pos = np.full((num_rows, case.qtok), -1, np.int32)
    cursor = 3  # the table need not start at 0
    for request, ctx in enumerate(case.ctx):
        first, table = int(rng.integers(0, 50)), []
        start = first
        while first < start + ctx:
            page = free.pop()
            if case.repeat:
                free.insert(0, page)
            most = rng.integers(1, case.page_tokens + 1) if case.gaps else case.page_tokens
            count = min(most, start + ctx - first)
            if not case.repeat or np.isnan(pool[1, page, 0, 0, count - 1, 0]):
                pool[1, page, :, :, :count] = 0
                pool[1, page, :, :, :count, : case.dim] = _normal(rng, (2, case.kvh, count, case.dim), "bfloat16")
            table.append((page, first, count))
            first += count
        if case.gaps and request > 0 and row_len[0] > 0:
            table.append(tuple(entries[row_start[0]]))
        table = rng.permutation(np.array(table, np.int32).reshape(-1, 3)) if case.gaps else table
        rows = slice(request * case.rows, (request + 1) * case.rows)
        if len(table):
            entries[cursor : cursor + len(table)] = table
            row_start[rows], row_len[rows] = cursor, len(table)
        cursor += len(table)
        last = max(start + ctx - case.behind, 0)
        q_pos[rows] = last + np.arange(case.rows * case.qtok).reshape(case.rows, case.qtok)
        q_pos[rows, case.qtok - case.qtok // 4 :] = -1
    q = 2 * _normal(rng, (num_rows, case.qtok, case.heads, case.dim), case.dtype)
    q[q_pos < 0] = np.nan
    return {
        "q": jnp.asarray(q, case.dtype),
        "q_pos": jnp.asarray(q_pos),
        "kv_pages": encode_bits(jnp.asarray(pool), jnp.dtype(case.storage)),
        "layer": jnp.int32(1),
        "entries": jnp.asarray(entries),
        "row_start": jnp.asarray(row_start),
        "row_len": jnp.asarray(row_len),
    }


# ---------------------------------------------------------------------------------------------------------------
# The dense answer, one query at a time in float64


def _attend(q, k, v, scale, soft_cap):
    """`q [head, dim]` over `k, v [seen, kvh, dim]`: (out [head, dim], lse [head])."""
    heads, dim = q.shape
    if len(k) == 0:
        return np.zeros((heads, dim)), np.full(heads, NEG)
    k, v = (np.repeat(a, heads // a.shape[1], axis=1) for a in (k, v))
    score = np.einsum("hd,shd->hs", q, k) * scale
    if soft_cap is not None:
        score = soft_cap * np.tanh(score / soft_cap)
    top = score.max(axis=1)
    weight = np.exp(score - top[:, None])
    return np.einsum("hs,shd->hd", weight / weight.sum(axis=1, keepdims=True), v), top + np.log(weight.sum(axis=1))


def dense_flash(case: FlashCase, inputs: dict[str, jax.Array], scale: float) -> Partial:
    q, k, v = (np.asarray(inputs[n].astype(jnp.float32), np.float64) for n in "qkv")
    q_req, q_pos, kv_req, kv_pos = (np.asarray(inputs[n]) for n in ("q_req", "q_pos", "kv_req", "kv_pos"))
    parts = []
    for t in range(case.tok):
        seen = (kv_req == q_req[t]) & (kv_req >= 0) & (kv_pos <= q_pos[t])
        seen &= q_pos[t] - kv_pos < (case.window or 2**30)
        parts.append(_attend(q[t], k[seen], v[seen], scale, case.soft_cap))
    return Partial(*(np.stack(a) for a in zip(*parts, strict=True)))


def dense_paged(case: PagedCase, inputs: dict[str, jax.Array], scale: float) -> Partial:
    pool = inputs["kv_pages"][1]
    pool = jax.lax.bitcast_convert_type(pool, jnp.bfloat16) if pool.dtype == jnp.uint16 else pool
    pool = np.asarray(pool.astype(jnp.float32), np.float64)[..., : case.dim]
    q = np.asarray(inputs["q"].astype(jnp.float32), np.float64)
    q_pos, entries, row_start, row_len = (np.asarray(inputs[n]) for n in ("q_pos", "entries", "row_start", "row_len"))
    out, lse = np.zeros(q.shape), np.full(q.shape[:-1], NEG)
    for row in range(len(q)):
        table = entries[row_start[row] : row_start[row] + row_len[row]].astype(np.int64)
        entry, slot = np.nonzero(np.arange(case.page_tokens) < table[:, 2:])
        page, pos = table[entry, 0], table[entry, 1] + slot
        k, v = pool[page, 0, :, slot], pool[page, 1, :, slot]  # [ctx, kvh, dim]
        for t in range(case.qtok):
            seen = (pos <= q_pos[row, t]) & (q_pos[row, t] - pos < (case.window or 2**30)) & (q_pos[row, t] >= 0)
            out[row, t], lse[row, t] = _attend(q[row, t], k[seen], v[seen], scale, case.soft_cap)
    return Partial(out, lse)
