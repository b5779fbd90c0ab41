"""What a server says about itself: its model, and how busy it is.

What it is not: the account it is read from (`serving/state.py`).
"""

from __future__ import annotations

import msgspec

import loong_jax
from serving.generator import Generator
from serving.proto.loong.v1 import loong_pb2 as pb


class Served(msgspec.Struct, frozen=True):
    """What it is called, and the operator's bounds. 0: not known."""

    model_name: str = "loong"
    max_running: int = 0
    max_waiting: int = 0
    page_tokens: int = 0


def models(served: Served, generator: Generator) -> pb.ListModelsResponse:
    limits = generator.limits
    model = pb.Model(
        name=served.model_name,
        max_context_tokens=limits.max_context_tokens,
        vocab_size=limits.vocab_size,
        has_tokenizer=generator.tokenizer is not None,
        has_chat_template=generator.has_chat_template,
        scores_prompts=limits.scores_prompts,
        version=loong_jax.__version__,
    )
    return pb.ListModelsResponse(models=[model])


def loads(served: Served, state: pb.State, refusing: str | None) -> pb.Loads:
    """`refusing`: why new requests are refused now, None when they are not."""
    alive = [instance for instance in state.instances if instance.alive]
    rates = {pb.PHASE_PREFILL: 0.0, pb.PHASE_DECODE: 0.0}
    for group in state.groups:
        rates[group.phase] += group.tokens_per_s
    return pb.Loads(
        serving=refusing is None,
        not_serving=refusing or "",
        requests_running=state.requests_running,
        requests_waiting=state.requests_waiting,
        max_running=served.max_running,
        max_waiting=served.max_waiting,
        pool_tokens=served.page_tokens * sum(instance.pages_total for instance in alive),
        pool_tokens_used=served.page_tokens * sum(instance.pages_used for instance in alive),
        prefill_tokens_per_s=rates[pb.PHASE_PREFILL],
        decode_tokens_per_s=rates[pb.PHASE_DECODE],
    )
