"""Advice on yes and no, by what belongs at their place."""

import pytest

from mdiq.config.load import check_bytes
from mdiq.config.routes import check_routes
from mdiq.config.truths import advice_on_truth
from tests.config.test_load import FILE, GOOD


@pytest.mark.parametrize(
    ("schema", "advice"),
    [
        ({}, 'write true, or "yes" in quotes if it is a text'),
        ({"type": "boolean"}, "write true"),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "write true"),
        ({"type": "string"}, 'put it in quotes if it is meant: "yes"'),
        ({"type": "string", "pattern": r"^\d+$", "x-values": "a `number`"}, "write a number"),
        ({"type": "string", "enum": ["auto", "f32"]}, "write one of auto, f32"),
        ({"type": "integer", "minimum": 1, "maximum": 9}, "write 1 to 9"),
        ({"anyOf": [{"const": "auto"}, {"type": "integer"}], "x-values": "`auto`, or 1 to 9"}, "write auto, or 1 to 9"),
        ({"const": 1}, "write 1"),
        ({"type": "array", "items": {"type": "string"}}, "write a list, such as []"),
        ({"$ref": "#/$defs/Api"}, "remove the line, or write keys below it"),
    ],
)
def test_advice_on_yes_is_something_that_its_place_takes(schema: dict[str, object], advice: str) -> None:
    assert advice_on_truth("yes", schema) == advice


def test_a_key_that_can_be_off_is_so_with_null() -> None:
    schema = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    assert advice_on_truth("off", schema) == 'write null, or "off" in quotes if it is a text'
    assert advice_on_truth("on", schema) == 'put it in quotes if it is meant: "on"'


def test_a_word_in_a_list_of_texts_is_an_error_and_hides_no_other() -> None:
    spoiled = GOOD.replace("api:", "api:\n  cors_origins: [no, 'x y']", 1).encode()
    assert spoiled != GOOD.encode()
    report = check_bytes(spoiled, FILE)
    assert [finding.message.partition(";")[2] for finding in report.errors] == [
        ' put it in quotes if it is meant: "no"',
        " write for example https://chat.example.org, or '*' for all",
    ]


def test_a_routes_file_gets_the_same_advice() -> None:
    text = "version: 1\nmax_requests: yes\nservers: [{name: desk, url: 'http://127.0.0.1:1', pass_keys: on}]\n"
    _, findings = check_routes(text.encode())
    assert [finding.message for finding in findings] == [
        "YAML reads yes as true; write 1 to 65536",
        "YAML reads on as true; write true",
    ]
