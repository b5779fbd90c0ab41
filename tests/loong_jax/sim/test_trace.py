import json

from loong_jax.sim.trace import Span, chrome_trace
from loong_jax.types import Phase


def test_a_step_is_an_event_on_each_of_its_instances() -> None:
    spans = [Span(10, 30, (0, 2), Phase.PREFILL, ((5, 64), (6, 2))), Span(30, 31, (1,), Phase.DECODE, ((7, 1),))]
    events = json.loads(chrome_trace(spans, 3))["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["instance 0", "instance 1", "instance 2"]
    steps = [(e["tid"], e["ts"], e["dur"], e["cat"]) for e in events if e["ph"] == "X"]
    assert steps == [(0, 10, 20, "prefill"), (2, 10, 20, "prefill"), (1, 30, 1, "decode")]
    assert events[3]["args"] == {"dop": 2, "rows": 2, "tokens": 66, "requests": [5, 6]}
