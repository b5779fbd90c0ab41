from loong_jax.sim.clock import NEVER_US, Timeline


def test_order_is_by_time_then_by_insertion() -> None:
    timeline: Timeline[str] = Timeline()
    assert timeline.next_us == NEVER_US
    for at_us, item in ((5, "late"), (3, "first"), (3, "second"), (0, "start")):
        timeline.push(at_us, item)
    assert timeline.next_us == 0
    assert [timeline.pop() for _ in range(len(timeline))] == [(0, "start"), (3, "first"), (3, "second"), (5, "late")]
