"""SamplingParams become the engine's records (what is refused is seen through the server in test_validation.py)."""

import pytest

from loong_jax.types import Adjustment, Sampling
from serving.errors import InvalidField
from serving.proto.loong.v1 import loong_pb2 as pb
from serving.sampling_params import SamplingLimits, check_adjustment, check_lengths, check_sampling

LIMITS = SamplingLimits(1000)


def test_absent_is_greedy_and_adjusts_nothing():
    assert check_sampling(pb.SamplingParams(), LIMITS) == Sampling()
    assert check_adjustment(pb.SamplingParams(), (1, 2), LIMITS) is None


def test_what_has_no_effect_costs_nothing():
    params = pb.SamplingParams(repetition_penalty=1.0, presence_penalty=0.0, logit_bias={5: 0.0}, min_tokens=4)
    assert check_adjustment(params, (), LIMITS) is None, "no id to ban"
    assert check_adjustment(params, (7,), LIMITS) == Adjustment(min_tokens=4)


def test_all_of_it():
    params = pb.SamplingParams(
        temperature=0.5, top_k=3, top_p=0.5, seed=9, min_p=0.25, top_logprobs=20, min_tokens=2,
        presence_penalty=-2.0, frequency_penalty=2.0, repetition_penalty=0.5, logit_bias={9: -100.0, 3: 100.0},
    )  # fmt: skip
    assert check_sampling(params, LIMITS) == Sampling(0.5, 3, 0.5, 9, 0.25, 20)
    expected = Adjustment(((3, 100.0), (9, -100.0)), 2, 0.5, 2.0, -2.0)
    assert check_adjustment(params, (1,), LIMITS) == expected


def test_the_bound_of_the_wire_is_within():
    assert check_adjustment(pb.SamplingParams(repetition_penalty=0.1), (), LIMITS)


@pytest.mark.parametrize(("max_tokens", "fits"), [(8193, True), (8194, False), (2**40, False)])
def test_counting_is_bounded_where_the_vocabulary_is_larger(max_tokens, fits):
    params, limits = pb.SamplingParams(presence_penalty=1.0), SamplingLimits(100_000)
    adjustment = check_adjustment(params, (), limits)
    if fits:
        check_lengths(params, adjustment, (), max_tokens, limits)
    else:
        with pytest.raises(InvalidField, match="presence_penalty"):
            check_lengths(params, adjustment, (), max_tokens, limits)
    check_lengths(params, adjustment, (), max_tokens, SamplingLimits(8000))


def test_repetition_is_not_bounded_by_it():
    params, limits = pb.SamplingParams(repetition_penalty=2.0), SamplingLimits(100_000, adjust_tokens=1)
    check_lengths(params, check_adjustment(params, (1, 2), limits), (1, 2), 10**6, limits)
