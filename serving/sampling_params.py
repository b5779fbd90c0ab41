"""Checks of SamplingParams, into the engine's Sampling and Adjustment; what is refused is named by its field.

What it is not: the checks of the rest of a request (`serving/validation.py`).
"""

from __future__ import annotations

import math

import msgspec

from loong_jax.row_adjust import max_entries
from loong_jax.types import Adjustment, Sampling
from serving.errors import InvalidField
from serving.proto.loong.v1 import loong_pb2 as pb

MAX_SEED = 2**32 - 1


class SamplingLimits(msgspec.Struct, frozen=True):
    """Bounds of the parameters. The first three come from the model and the engine, the others are the operator's."""

    vocab_size: int
    adjust_tokens: int = 8192
    max_top: int = 20
    min_temperature: float = 0.01  # below, logits / temperature leaves float32 on the way to greedy
    max_temperature: float = 100.0
    max_penalty: float = 2.0
    min_repetition_penalty: float = 0.1
    max_repetition_penalty: float = 10.0
    max_logit_bias: int = 1024
    max_bias: float = 100.0


def check_sampling(params: pb.SamplingParams, limits: SamplingLimits) -> Sampling:
    """Everything but the adjustments. Raises InvalidField."""
    temperature = _temperature(params, limits)
    top_k = params.top_k if params.HasField("top_k") else 0
    top_p = params.top_p if params.HasField("top_p") else 1.0
    seed = params.seed if params.HasField("seed") else 0
    if not 0 <= top_k <= limits.vocab_size:
        raise InvalidField("sampling.top_k", f"{top_k} is not within 0 (all) to the vocabulary of {limits.vocab_size}")
    if not 0 < top_p <= 1:
        raise InvalidField("sampling.top_p", f"{top_p} is not above 0 and at most 1")
    if not 0 <= params.min_p <= 1:
        raise InvalidField("sampling.min_p", f"{params.min_p} is not within 0 (off) to 1")
    if not 0 <= seed <= MAX_SEED:
        raise InvalidField("sampling.seed", f"{seed} is not within 0 to {MAX_SEED}")
    if not 0 <= params.top_logprobs <= limits.max_top:
        raise InvalidField("sampling.top_logprobs", f"{params.top_logprobs} is not within 0 to {limits.max_top}")
    if temperature == 0:
        filters = (("top_k", top_k > 1), ("top_p", top_p < 1), ("min_p", params.min_p > 0))
        for name, is_on in filters:
            if is_on:
                value = f"{getattr(params, name):g}"
                message = f"{value} contradicts greedy sampling (sampling.temperature is 0)"
                raise InvalidField(f"sampling.{name}", message)
    return Sampling(temperature, top_k, top_p, seed, params.min_p, params.top_logprobs)


def _temperature(params: pb.SamplingParams, limits: SamplingLimits) -> float:
    temperature = params.temperature if params.HasField("temperature") else 0.0
    if not math.isfinite(temperature) or temperature < 0 or temperature > limits.max_temperature:
        raise InvalidField("sampling.temperature", f"{temperature} is not within 0 to {limits.max_temperature:g}")
    # The wire has float32: 0.01 arrives as 0.0099999998.
    if 0 < temperature < limits.min_temperature * (1 - 1e-6):
        raise InvalidField(
            "sampling.temperature", f"{temperature} is below {limits.min_temperature:g}; 0 means greedy sampling"
        )
    return temperature


def check_adjustment(params: pb.SamplingParams, stop_ids: tuple[int, ...], limits: SamplingLimits) -> Adjustment | None:
    """What changes the logits; None when nothing does. Raises InvalidField."""
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        if not abs(value) <= limits.max_penalty:
            message = f"{value} is not within {-limits.max_penalty:g} to {limits.max_penalty:g}"
            raise InvalidField(f"sampling.{name}", message)
    repetition = params.repetition_penalty if params.HasField("repetition_penalty") else 1.0
    least, most = limits.min_repetition_penalty, limits.max_repetition_penalty
    if not least * (1 - 1e-6) <= repetition <= most:
        raise InvalidField("sampling.repetition_penalty", f"{repetition} is not within {least:g} to {most:g}")
    if params.min_tokens < 0:
        raise InvalidField("sampling.min_tokens", f"{params.min_tokens} is negative")
    bias = _check_bias(params, limits)
    # Without ids to ban, the engine has nothing to do for `min_tokens`; stop strings wait in the stream.
    min_tokens = params.min_tokens if stop_ids else 0
    adjustment = Adjustment(bias, min_tokens, repetition, params.frequency_penalty, params.presence_penalty)
    if max_entries(adjustment, stop_ids, 1, limits.vocab_size) > limits.adjust_tokens:
        field = "logit_bias" if bias else "min_tokens"
        raise InvalidField(f"sampling.{field}", f"with the stop ids more than {limits.adjust_tokens} tokens")
    return None if adjustment == Adjustment() else adjustment


def _check_bias(params: pb.SamplingParams, limits: SamplingLimits) -> tuple[tuple[int, float], ...]:
    if len(params.logit_bias) > limits.max_logit_bias:
        message = f"{len(params.logit_bias)} tokens are more than the limit of {limits.max_logit_bias}"
        raise InvalidField("sampling.logit_bias", message)
    for token, value in params.logit_bias.items():
        if not 0 <= token < limits.vocab_size:
            message = f"token {token} is outside the vocabulary of {limits.vocab_size}"
            raise InvalidField("sampling.logit_bias", message)
        if not abs(value) <= limits.max_bias:
            message = f"{value} of token {token} is not within {-limits.max_bias:g} to {limits.max_bias:g}"
            raise InvalidField("sampling.logit_bias", message)
    return tuple(sorted((token, value) for token, value in params.logit_bias.items() if value))


def check_lengths(
    params: pb.SamplingParams,
    adjustment: Adjustment | None,
    stop_ids: tuple[int, ...],
    max_tokens: int,
    limits: SamplingLimits,
) -> None:
    """What depends on how many tokens may come. Raises InvalidField."""
    if params.min_tokens > max_tokens:
        raise InvalidField("sampling.min_tokens", f"{params.min_tokens} exceeds the {max_tokens} of max_tokens")
    if adjustment is None:
        return
    num_entries = max_entries(adjustment, stop_ids, max_tokens, limits.vocab_size)
    if num_entries > limits.adjust_tokens:
        field = "frequency_penalty" if adjustment.frequency_penalty else "presence_penalty"
        message = (
            f"with max_tokens {max_tokens} as many as {num_entries} tokens have to be counted; "
            f"this server counts {limits.adjust_tokens}"
        )
        raise InvalidField(f"sampling.{field}", message)
