"""What a router makes of a request, and which response is where."""

import json
from typing import Any

import pytest

from mdiq.api.requests import BadRequest
from mdiq.route.asked import CHATS, COMPLETIONS, MESSAGES, RESPONSES, Asked, asked_of, whole_of
from mdiq.route.sessions import KEEP_S, Session, Sessions


def _asked(path: str = CHATS, **body: Any) -> tuple[Asked, dict[str, Any]]:
    asked = asked_of(path, body, lambda: 42)
    return asked, json.loads(asked.data)


@pytest.mark.parametrize(("given", "sent"), [(None, 42), (-1, 42), (0, 0), (7, 7), ("x", "x")])
def test_a_request_without_a_seed_gets_one(given: Any, sent: Any) -> None:
    asked, body = _asked(seed=given)
    assert body["seed"] == sent and asked.is_repeatable


def test_several_prompts_without_a_seed_cannot_be_repeated_unless_they_are_greedy() -> None:
    asked, body = _asked(COMPLETIONS, prompt=["a", "b"])
    assert "seed" not in body and not asked.is_repeatable
    assert _asked(COMPLETIONS, prompt=["a", "b"], temperature=0)[0].is_repeatable
    assert _asked(COMPLETIONS, prompt=["a", "b"], seed=3)[0].is_repeatable
    assert _asked(COMPLETIONS, prompt=[5, 6])[1]["seed"] == 42, "token ids are one prompt"


def test_a_stream_always_tells_its_tokens() -> None:
    for given, wants in (({}, False), ({"stream_options": {"include_usage": True, "x": 1}}, True)):
        asked, body = _asked(stream=True, **given)
        assert body["stream_options"]["include_usage"] is True and asked.wants_usage == wants
    assert "stream_options" not in _asked(stream=False)[1]
    assert "stream_options" not in _asked(MESSAGES, stream=True)[1]
    assert _asked(stream=True, stream_options=3)[1]["stream_options"] == 3, "a mistake is for the server to name"


def test_answers_are_counted() -> None:
    assert _asked(COMPLETIONS, prompt=["a", "b", "c"], n=2)[0].num_prompts == 6
    assert [_asked(n=n)[0].num_prompts for n in (None, 3, 0, 65, True, "4")] == [1, 3, 1, 1, 1, 1]
    assert _asked(n_cmpl=3)[0].num_prompts == 3 and _asked(num_return_sequences=2.0)[0].num_choices == 2


def test_responses_are_stored_and_go_on() -> None:
    asked, _ = _asked(RESPONSES, previous_response_id="resp_1")
    assert asked.is_stored and asked.previous == "resp_1"
    assert not _asked(RESPONSES, store=False)[0].is_stored
    assert not _asked(CHATS, previous_response_id="resp_1")[0].is_stored
    assert _asked(RESPONSES, previous_response_id=3)[0].previous is None


@pytest.mark.parametrize("body", [None, [], "x", 3])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    for make in (lambda: asked_of(CHATS, body, lambda: 1), lambda: whole_of("/tokenize", body)):
        with pytest.raises(BadRequest):
            make()


def _session(number: int, owner: str = "me", body: bytes = b"1234") -> Session:
    return Session(f"resp_{number}", owner, "a", body)


def test_sessions_are_found_by_their_owner_for_an_hour() -> None:
    sessions = Sessions()
    sessions.add(_session(1), 0.0)
    assert sessions.find("resp_1", "me") is not None and sessions.find("resp_1", "you") is None
    assert sessions.is_others("resp_1", "you") and not sessions.is_others("resp_2", "you")
    sessions.add(_session(2), KEEP_S)
    assert sessions.find("resp_1", "me") is None and len(sessions) == 1


def test_the_oldest_sessions_make_room_and_lose_their_requests_first() -> None:
    sessions = Sessions(max_kept=3, max_bytes=8)
    for number in range(3):
        sessions.add(_session(number), 0.0)
    bodies = [found.body for number in range(3) if (found := sessions.find(f"resp_{number}", "me")) is not None]
    assert bodies == [b"", b"1234", b"1234"]
    sessions.add(_session(3), 0.0)
    assert sessions.find("resp_0", "me") is None and len(sessions) == 3
    sessions.forget("resp_3")
    sessions.forget("resp_3")
    sessions.add(_session(4, body=b"12345678"), 0.0)
    last = sessions.find("resp_4", "me")
    assert last is not None and last.body == b"12345678"


def test_a_session_that_has_moved_knows_its_names() -> None:
    session = _session(1)
    assert session.id_there == "resp_1"
    session.moved("b", 0, "resp_x", {"resp_y": "resp_0"})
    assert (session.server, session.id_there) == ("b", "resp_x")
    assert session.names == {"resp_x": "resp_1", "resp_y": "resp_0"}
