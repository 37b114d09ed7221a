"""Routes files: what is read, and what broken ones are told."""

from pathlib import Path

import pytest

from mdiq.config.routes import MAX_SERVERS, check_routes, load_routes
from mdiq.errors import TopologyError

SAMPLE = Path(__file__).parent.parent.parent / "configs" / "routes" / "two-rings-and-a-copy.yaml"
GOOD = "version: 1\nservers:\n- {name: a, url: 'http://10.0.0.1:8080'}\n"


def test_the_sample_is_read_and_has_every_key() -> None:
    routes = load_routes(SAMPLE).routes
    assert [server.name for server in routes.servers] == ["ring-a", "ring-b", "desk"]
    assert (routes.max_requests, routes.silence_s, routes.outage_tolerance_s) == (1_024, 5.0, 60.0)
    text = (SAMPLE).read_text()
    keys = [field.alias or name for name, field in type(routes).model_fields.items()]
    keys += list(type(routes.servers[0]).model_fields)
    assert [key for key in keys if f"{key}:" not in text] == []


def test_what_is_left_out_has_a_value_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "routes.yaml"
    file.write_text(GOOD)
    loaded = load_routes(file)
    assert loaded.routes.servers[0].url == "http://10.0.0.1:8080" and loaded.routes.servers[0].key_file is None
    assert loaded.routes.api.port == 8080 and loaded.path("keys/a.key") == tmp_path / "keys" / "a.key"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("version: 1\n", 1, "servers: it is missing"),
        ("version: 2\nservers: [{name: a, url: 'http://a:1'}]\n", 1, "a version that this mdiq does not read"),
        ("version: 1\nservers: []\n", 2, f"write 1 to {MAX_SERVERS}"),
        (GOOD + "- {name: b, url: 'http://10.0.0.1:8080/'}\n", 4, "that of the server in line 3 too"),
        (GOOD + "- {name: a, url: 'http://10.0.0.2:8080'}\n", 4, "that of the server in line 3 too"),
        (GOOD + "- {name: b, url: '10.0.0.2:8080'}\n", 4, "is not the address of an API"),
        (GOOD + "- {name: b, url: 'http://a:1/v1'}\n", 4, "is not the address of an API"),
        (GOOD + "- {name: b, url: 'http://me:secret@a:1'}\n", 4, "a secret does not belong into this file"),
        (GOOD + "- {name: b, url: 'http://a:99999'}\n", 4, "is not the address of an API"),
        (GOOD + "- {name: B!, url: 'http://a:1'}\n", 4, "not a node's name"),
        (GOOD + "- {name: b, url: 'http://a:1', ca_file: ca.pem}\n", 4, "a certificate is of https"),
        (GOOD + "- {name: b, url: 'http://a:1', keyfile: x}\n", 4, "did you mean key_file?"),
        (GOOD + "api: {host: 0.0.0.0}\n", 4, "there are no API keys"),
        (GOOD + "api: {tls_cert: a.pem}\n", 4, "HTTPS needs both"),
        (GOOD + "silence: 1s\n", 4, "out of range"),
        (GOOD + "silence: 5\n", 4, "write for example 5s"),
        (GOOD + "max_requests: 0\n", 4, "out of range"),
        (GOOD + "nodes: []\n", 4, "it is not a key here"),
        ("[1]\n", 1, "it is a list"),
        ("a: b: c\n", 1, "a second"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, line: int, message: str) -> None:
    routes, findings = check_routes(text.encode())
    assert routes is None
    assert [finding.line for finding in findings if message in finding.render("f")] == [line], findings


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="configs/routes/two-rings-and-a-copy.yaml is an example"):
        load_routes(tmp_path / "none.yaml")
