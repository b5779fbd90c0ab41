"""Who comes first, who may not be passed any more, and what memory will hold."""

from __future__ import annotations

import msgspec
import pytest

from loong_jax.config import LimitsConfig
from loong_jax.policy.dispatch import LATE, Line, Memory, admitted, expected_output, in_order, under_way, urgent
from loong_jax.types import Target
from tests.support.views import FOUR, Seen, decoding, draft, instance, prompting

LIMITS = LimitsConfig(patience_us=1_000_000)


def seconds_of(tokens: int, resident: int) -> float:
    return tokens * 1e-3


def line_of(*requests: Seen) -> Line:
    line = Line(LIMITS)
    line.follow(requests, seconds_of)
    return line


def top(line: Line, now_us: int = 0, count: int = 16) -> list[int]:
    return [candidate.request.request for candidate in line.top(now_us, count)]


def wants(request: Seen, **target) -> Seen:
    return msgspec.structs.replace(request, target=Target(**target))


def brief(*args, **kwargs) -> Seen:
    """One whose answer fits a page."""
    return msgspec.structs.replace(prompting(*args, **kwargs), max_tokens=4)


def test_the_shortest_first_and_larger_priority_before() -> None:
    line = line_of(prompting(0, 400), prompting(1, 40), prompting(2, 4), wants(prompting(3, 900), priority=1))
    assert top(line) == [3, 2, 1, 0]
    assert top(line, count=2) == [3, 2]


def test_one_that_waited_long_is_not_passed_any_more() -> None:
    line = line_of(prompting(0, 400), prompting(1, 4))
    # 0.4 s of work, a patience of 25 times that: 10 s
    assert top(line, 1_000_000) == [1, 0]
    assert not any(c.urgent for c in line.top(3_000_000, 2))
    assert {c.request.request for c in line.top(8_200_000, 2) if c.urgent} == {0, 1}


def test_what_missed_its_target_waits_like_others_and_is_late_but_not_lost() -> None:
    target, seconds = 1_000_000.0, 0.1
    assert not urgent(700_000, 0, target, seconds)
    assert urgent(800_000, 0, target, seconds)
    assert not urgent(950_000, 0, target, seconds)  # cannot be met any more
    assert urgent(LATE * target, 0, target, seconds)
    line = line_of(wants(prompting(0, 100), ttft_us=1_000_000), prompting(1, 50))
    assert [c.urgent for c in line.top(800_000, 2)] == [True, False]
    assert [c.urgent for c in line.top(950_000, 2)] == [False, False]
    assert [c.urgent for c in line.top(4_000_000, 2)][0]


def test_the_line_follows_those_who_come_and_go() -> None:
    first, second, third = prompting(0, 8), prompting(1, 4), prompting(2, 2)
    line = line_of(first, second)
    line.follow((first, second, third), seconds_of)
    assert top(line) == [2, 1, 0]
    weight = line.weight
    line.follow((first, third), seconds_of)
    assert top(line) == [2, 0]
    assert line.weight < weight
    late = (prompting(-1, 1), first, third)  # one that was held, and came before
    line.follow(late, seconds_of)
    line.follow((*late, prompting(3, 6)), seconds_of)
    assert top(line) == [-1, 2, 3, 0]
    line.follow((), seconds_of)
    assert top(line) == []
    assert line.weight == 0


def test_output_is_expected_from_what_others_did_never_more_than_allowed() -> None:
    row = decoding(0, {0: 1})  # one token generated, at most 100
    assert expected_output(row, 64.0) == 64.0
    assert expected_output(row, 1000.0) == 100
    long = msgspec.structs.replace(row, num_generated=80)
    assert expected_output(long, 64.0) == 100
    assert expected_output(msgspec.structs.replace(long, num_generated=60), 64.0) == pytest.approx(83.0)


def test_memory_admits_what_ends_in_time() -> None:
    """Pages are lent to those who come while others end: 64 pages, rows that grow by 15."""
    rows = [decoding(i, {0: 2}) for i in range(2)]
    view = draft(rows)
    memory = Memory(view, rows)
    assert memory.admits(brief(5, 40))
    assert not memory.admits(brief(6, 240))
    assert not memory.admits(prompting(6, 60))  # 15 pages now, and 16 more to come
    assert memory.admits(brief(7, 4))


def test_a_fresh_one_that_does_not_fit_is_passed_unless_it_is_urgent() -> None:
    holder = brief(0, 200, {0: 8}, in_flight=1)
    made = draft([holder], FOUR)

    def start(now_us: int) -> list[int]:
        waiting = under_way((prompting(1, 100), brief(2, 4)), now_us, seconds_of, LIMITS)
        return [c.request.request for c in admitted(made, [holder], in_order(waiting), 0)]

    assert start(0) == [2]
    assert start(2_300_000) == []  # 100 tokens: 0.1 s, and so 2.5 s of patience


def test_places_bound_the_fresh_ones_only() -> None:
    made = draft([], [instance(0)])
    begun = under_way([prompting(0, 4, {0: 1})], 0, seconds_of, LIMITS)
    fresh = [candidate._replace(begun=False) for candidate in under_way([prompting(1, 4)], 0, seconds_of, LIMITS)]
    assert [c.request.request for c in admitted(made, [], begun + fresh, 0)] == [0]
    assert [c.request.request for c in admitted(made, [], begun + fresh, 1)] == [0, 1]
