"""Lines of log: their shape, what a client's text may do to them, and how many there are at most."""

import json
import logging

import pytest

from serving.logs import Bounded, JsonFormatter, TextFormatter, set_up, tell


@pytest.fixture
def caught():
    logger = logging.getLogger("serving.test_logs")
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record)

    handler = Keep()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield logger, records
    logger.removeHandler(handler)


def test_text_and_json_say_the_same(caught):
    logger, records = caught
    tell(logger, logging.WARNING, "refused", request_id="a", reason="no room", pages=3, nothing=None)
    line = TextFormatter().format(records[0])
    assert line.split(" ", 1)[1] == 'WARNING refused request_id=a reason="no room" pages=3'
    assert line[10] == "T"
    found = json.loads(JsonFormatter().format(records[0]))
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "warning", "logger": "serving.test_logs", "event": "refused", "request_id": "a", "reason": "no room",
        "pages": 3,
    }  # fmt: skip


def test_a_clients_name_forges_no_line_and_no_field(caught):
    logger, records = caught
    tell(
        logger,
        logging.INFO,
        "ended",
        request_id="x\n2026 ERROR forged",
        other='" level=error',
        long="y" * 9000,
        empty="",
    )
    line = TextFormatter().format(records[0])
    assert "\n" not in line
    assert '"x\\n2026 ERROR forged"' in line
    assert '"\\" level=error"' in line
    assert len(line) < 3000
    assert json.loads(JsonFormatter().format(records[0]))["request_id"] == "x\n2026 ERROR forged"
    assert "\n" not in JsonFormatter().format(records[0])


def test_an_exception_is_told(caught):
    logger, records = caught
    try:
        raise KeyError("k")
    except KeyError:
        logger.exception("broke")
    assert "KeyError" in json.loads(JsonFormatter().format(records[0]))["exception"]
    assert "KeyError" in TextFormatter().format(records[0])


def test_a_storm_is_counted_not_written(caught):
    logger, records = caught
    now = [0.0]
    lines = Bounded(logger, burst=3, window_s=10.0, clock=lambda: now[0])
    for _ in range(100):
        lines.tell(logging.INFO, "waits")
        lines.tell(logging.DEBUG, "fine")
    lines.tell(logging.INFO, "evicted")
    assert [record.getMessage() for record in records] == ["waits"] * 3 + ["evicted"]
    now[0] = 10.0
    lines.tell(logging.INFO, "waits")
    lines.tell(logging.INFO, "waits")
    assert records[-2].fields == {"left_out": 97}
    assert records[-1].fields == {}


def test_set_up_is_of_our_loggers(capsys):
    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    levels = root.level, logging.getLogger("serving").level
    try:
        set_up("json", "debug")
        logging.getLogger("serving.x").debug("hello")
        logging.getLogger("other").info("not told")
        assert json.loads(capsys.readouterr().err)["event"] == "hello"
    finally:
        root.handlers[:] = before
        root.setLevel(levels[0])
        logging.getLogger("serving").setLevel(levels[1])
        logging.getLogger("loong_jax").setLevel(logging.NOTSET)
