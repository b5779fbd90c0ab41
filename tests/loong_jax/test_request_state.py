"""Lengths of one request: what lacks KV, and what a policy sees of it."""

from array import array

import pytest

from loong_jax.config import ClusterConfig
from loong_jax.ledger import Ledger
from loong_jax.request_state import RequestState, whole
from loong_jax.types import Resident, Run, Sampling

LEDGER = Ledger(ClusterConfig(8))


def request(prompt_len: int = 10) -> RequestState:
    return RequestState(LEDGER, 7, 5, array("i", range(prompt_len)).tobytes(), 4, Sampling(), (3, 3))


def test_a_new_request_lacks_its_whole_prompt():
    r = request()
    assert (r.known, r.issued, r.end, r.num_generated) == (10, 10, 14, 0)
    assert r.missing == (Run(0, 10),)
    assert request(1).missing == (Run(0, 1),), "one token: its KV comes with the step that samples"
    assert whole(0) == ()


@pytest.mark.parametrize(
    ("holes", "missing"),
    [
        ((), (Run(9, 1),)),
        ((Run(2, 3),), (Run(2, 3), Run(9, 1))),
        ((Run(2, 3), Run(7, 2)), (Run(2, 3), Run(7, 3))),
    ],
)
def test_the_newest_token_is_missing_too(holes, missing):
    r = request()
    r.holes = holes
    assert r.missing == missing
    r.issued += 1  # a step under way takes the last known token as input
    assert r.missing == holes


def test_a_policy_sees_where_its_kv_lies():
    ledger = Ledger(ClusterConfig(8, page_tokens=4, ring_tokens=4, query_tile_tokens=4))
    r = RequestState(ledger, 7, 5, array("i", range(10)).tobytes(), 4, Sampling(), ())
    assert (r.request, r.resident, r.running, r.open_page) == (7, (), False, None)
    for first, instance in ((0, 3), (4, 1), (8, 3)):
        (page,) = ledger.reserve(instance, 1)
        ledger.commit(7, instance, (page,), Run(first, min(4, 9 - first)))
    r.holes = ()
    assert r.resident == (Resident(1, 4, 1), Resident(3, 5, 2))
    assert (r.running, r.open_page) == (True, (3, 3)), "one token in a page of four"


def test_the_rope_length_is_fixed_at_arrival_or_inherited():
    assert request().rope_len == request().end
    prompt = array("i", range(10))
    assert RequestState(LEDGER, 8, 0, prompt, 5, Sampling(), (), rope_len=99).rope_len == 99


def test_a_token_only_lost_devices_hold_cannot_be_fed():
    r = request()
    r.holes, r.issued, r.sampled_on = (), 11, (2,)
    assert (r.running, r.device_group) == (True, (2,))
    r.sampled_on = ()
    assert not r.running
