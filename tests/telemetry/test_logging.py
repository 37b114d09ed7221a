"""Log lines as they reach stderr: form, level, fields, and lines of other loggers."""

import json
import logging
import re
import sys
import threading
import warnings

import pytest
import structlog

from mdiq.telemetry.logging import MAX_LINES, WINDOW_S, configure

log = structlog.get_logger()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JOURNAL_STREAM", "MDIQ_LOG", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def json_lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_default_shows_warnings_and_no_info(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    log.info("epoch_began", epoch=4)
    log.warning("lap_overdue", epoch=4)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "epoch_began" not in captured.err
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z \[warning *\] lap_overdue +epoch=4\n", captured.err)


@pytest.mark.parametrize(("name", "value"), [("JOURNAL_STREAM", "8:12345"), ("MDIQ_LOG", "json")])
def test_a_journal_gets_json_lines(
    name: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    configure("info", node="node-1")
    log.info("epoch_began", epoch=4)
    (line,) = json_lines(capsys.readouterr().err)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", str(line.pop("timestamp")))
    assert line == {"event": "epoch_began", "epoch": 4, "level": "info", "node": "node-1"}


def test_a_terminal_gets_readable_lines_even_under_a_journal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:12345")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    configure("info", node="node-1")
    log.info("epoch_began")
    line = capsys.readouterr().err
    assert "\x1b[" in line
    assert not line.startswith("{")
    assert "node-1" in line


def test_the_bound_fields_reach_other_threads_and_lose_to_the_lines_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDIQ_LOG", "json")
    configure("info", node="node-1")
    thread = threading.Thread(target=lambda: log.info("in_a_thread"))
    thread.start()
    thread.join()
    log.info("about_another", node="node-2")
    assert [line["node"] for line in json_lines(capsys.readouterr().err)] == ["node-1", "node-2"]


def test_the_last_call_holds_for_loggers_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", node="node-1")
    log.info("first")
    configure("error", node="node-2")
    log.warning("second")
    log.error("third")
    logging.getLogger("asyncio").error("fourth")
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"first|second|third|fourth", line)[0] for line in lines] == ["first", "third", "fourth"]  # type: ignore[index]
    assert all("node-2" in line for line in lines[1:])


def test_other_loggers_warnings_come_in_the_same_form_and_their_infos_do_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDIQ_LOG", "json")
    configure("info", node="node-1")
    logging.getLogger("asyncio").info("noise")
    logging.getLogger("asyncio").warning("Executing %s took %.3f seconds", "a task", 0.25)
    (line,) = json_lines(capsys.readouterr().err)
    del line["timestamp"]
    assert line == {
        "event": "Executing a task took 0.250 seconds",
        "level": "warning",
        "logger": "asyncio",
        "node": "node-1",
    }


def test_python_warnings_are_log_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDIQ_LOG", "json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)  # another test may have begun to, and lost it with its own catch_warnings
        configure()
        warnings.warn("old thing", DeprecationWarning, stacklevel=1)
    (line,) = json_lines(capsys.readouterr().err)
    assert line["logger"] == "py.warnings"
    assert "old thing" in str(line["event"])


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_traceback_shows_no_values(
    form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts must not reach a log, and they are values of variables in half of all frames."""
    monkeypatch.setenv("MDIQ_LOG", form)
    configure()

    def fails(prompt: str) -> None:
        raise RuntimeError("it failed")

    try:
        fails("a secret " + "prompt")
    except RuntimeError:
        log.exception("loop_ended")
    text = capsys.readouterr().err
    assert "RuntimeError: it failed" in text
    assert "a secret prompt" not in text


def test_lines_of_an_event_that_comes_too_often_are_held_back_and_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDIQ_LOG", "json")
    now = 0.0
    configure("info", clock=lambda: now)
    for i in range(114_000):
        log.warning("control_message_dropped", error=f"junk {i}")
    log.warning("lap_overdue")  # another kind is not concerned
    lines = json_lines(capsys.readouterr().err)
    assert len(lines) == MAX_LINES + 1
    assert lines[0]["error"] == "junk 0"
    assert lines[-1]["event"] == "lap_overdue"
    now = WINDOW_S
    for i in range(1_000):
        log.warning("control_message_dropped", error=f"junk again {i}")
    (line,) = json_lines(capsys.readouterr().err)
    assert (line["error"], line["num_not_logged"]) == ("junk again 0", 114_000 - MAX_LINES)
    now = 2 * WINDOW_S
    log.warning("control_message_dropped", error="junk")
    (line,) = json_lines(capsys.readouterr().err)
    assert line["num_not_logged"] == 999
    now = 3 * WINDOW_S
    for _ in range(MAX_LINES):  # it was quiet: all is as at first
        log.warning("control_message_dropped", error="junk")
    assert [line.get("num_not_logged") for line in json_lines(capsys.readouterr().err)] == [None] * MAX_LINES


def test_lines_of_other_loggers_are_held_back_by_the_place_that_logs_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDIQ_LOG", "json")
    configure()
    for i in range(1_000):
        logging.getLogger("asyncio").error("socket.accept() out of system resource %d", i)
    logging.getLogger("asyncio").error("something else")
    lines = json_lines(capsys.readouterr().err)
    assert len(lines) == MAX_LINES + 1
    assert lines[-1]["event"] == "something else"


def test_each_request_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info")
    for _ in range(3 * MAX_LINES):
        log.info("request_ended", tokens=5)
    assert len(capsys.readouterr().err.splitlines()) == 3 * MAX_LINES
