"""Lengths of one request: what lacks KV, and a view that is built again only after a change."""

from array import array

import pytest

from loong_jax.config import ClusterConfig
from loong_jax.ledger import Ledger
from loong_jax.request_state import RequestState, whole
from loong_jax.types import Resident, Run, Sampling


def request(prompt_len: int = 10) -> RequestState:
    return RequestState(7, 5, array("i", range(prompt_len)).tobytes(), 4, Sampling(), (3, 3))


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


def test_the_view_is_kept_until_a_change():
    ledger = Ledger(ClusterConfig(8, page_tokens=4, ring_tokens=4, query_tile_tokens=4))
    r = request()
    view = r.view(ledger)
    assert (view.prompt_len, view.resident, view.running, view.open_page) == (10, (), False, None)
    assert r.view(ledger) is view
    for first, instance in ((0, 3), (4, 1), (8, 3)):
        (page,) = ledger.reserve(instance, 1)
        ledger.commit(7, instance, page, Run(first, min(4, 9 - first)))
    r.holes = ()
    r.changed()
    view = r.view(ledger)
    assert view.resident == (Resident(1, 4, 1), Resident(3, 5, 2))
    assert (view.running, view.open_page) == (True, (3, 3)), "one token in a page of four"


def test_the_rope_length_is_fixed_at_arrival_or_inherited():
    assert request().rope_len == request().end
    prompt = array("i", range(10))
    assert RequestState(8, 0, prompt, 5, Sampling(), (), rope_len=99).rope_len == 99


def test_a_token_only_lost_devices_hold_cannot_be_fed():
    ledger = Ledger(ClusterConfig(8))
    r = request()
    r.holes, r.issued, r.device_group = (), 11, (2,)
    assert r.view(ledger).running
    r.device_group = ()
    r.changed()
    assert not r.view(ledger).running
