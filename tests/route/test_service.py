"""The router as a service: its files, its socket for the operator, and a file that is read again."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from typer.testing import CliRunner

from mdiq.api.keys import line_of
from mdiq.cli.main import app
from mdiq.config.routes import load_routes
from mdiq.errors import ConfigError, TransportError, first_of
from mdiq.route import links
from mdiq.route.service import RouteService, read_key
from mdiq.runtime.admin import ask
from mdiq.runtime.lifecycle import Notifier
from tests.api.certificates import make_certificate
from tests.route.fake_server import FakeServer

KEY = "the-key-of-a-client-1"
BODY = {"prompt": [5, 6], "max_tokens": 3}


@pytest.fixture(autouse=True)
def of_this_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(links, "LOOK_S", 0.02)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Served:
    """A router that serves. file: its routes."""

    def __init__(self, file: Path, session: aiohttp.ClientSession) -> None:
        self.file, self.session = file, session
        port = load_routes(file).routes.api.port
        self.url = f"http://127.0.0.1:{port}"

    async def post(self, **headers: str) -> int:
        async with self.session.post(f"{self.url}/v1/completions", json=BODY, headers=headers) as response:
            await response.read()
            return response.status

    async def ask(self, **question: Any) -> Any:
        return await asyncio.to_thread(ask, self.file, question)

    async def until_serving(self, *names: str) -> None:
        while True:
            status = await self.ask(do="status")
            if {each["name"] for each in status["servers"] if each["state"] == "serves"} == set(names):
                return
            await asyncio.sleep(0.02)


def _write(file: Path, *servers: FakeServer, **more: Any) -> None:
    listed = [{"name": server.name, "url": server.url, **more.pop(server.name, {})} for server in servers]
    more.setdefault("api", {"port": _free_port()})
    file.write_text(yaml.safe_dump({"version": 1, "servers": listed, **more}))


@asynccontextmanager
async def _serving(file: Path) -> AsyncIterator[Served]:
    service = asyncio.create_task(RouteService(load_routes(file), Notifier(None)).run())
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as session:
            served = Served(file, session)
            while not service.done():
                try:
                    await served.ask(do="status")
                    break
                except ConfigError:
                    await asyncio.sleep(0.02)
            yield served
    finally:
        service.cancel()
        await asyncio.gather(service, return_exceptions=True)


@asynccontextmanager
async def _started(*servers: FakeServer) -> AsyncIterator[None]:
    for server in servers:
        await server.start()
    try:
        yield
    finally:
        for server in servers:
            await server.kill()


async def test_servers_come_go_and_are_drained_while_requests_run(tmp_path: Path) -> None:
    first, second, file = FakeServer("first"), FakeServer("second"), tmp_path / "routes.yaml"
    async with _started(first, second):
        _write(file, first)
        async with _serving(file) as served:
            await served.until_serving("first")
            reached, go_on = asyncio.Event(), asyncio.Event()

            async def before() -> None:
                reached.set()
                await go_on.wait()

            first.model.before = lambda i: before() if i == 1 else None
            asking = asyncio.create_task(served.post())
            await reached.wait()
            _write(file, first, second, api={"port": load_routes(file).routes.api.port})
            assert "new or changed: second" in await served.ask(do="reload")
            await served.until_serving("first", "second")
            draining = asyncio.create_task(served.ask(do="drain", node="first", undo=False))
            while not (await served.ask(do="status"))["servers"][0]["drained"]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            assert await served.post() == 200 and len(second.asked) == 1 and not draining.done()
            go_on.set()
            assert await asking == 200
            assert "first is drained" in await draining
            assert "gets requests again" in await served.ask(do="drain", node="first", undo=True)
            with pytest.raises(ConfigError, match="no server of"):
                await served.ask(do="drain", node="third", undo=False)
            _write(file, second, api={"port": load_routes(file).routes.api.port})
            assert "1 servers" in await served.ask(do="reload")
            await served.until_serving("second")
            first.asked.clear()
            assert [await served.post() for _ in range(3)] == [200] * 3 and first.asked == []


async def test_a_reload_that_cannot_be_changes_nothing(tmp_path: Path) -> None:
    first, file = FakeServer("first"), tmp_path / "routes.yaml"
    async with _started(first):
        _write(file, first)
        before = file.read_text()
        async with _serving(file) as served:
            await served.until_serving("first")
            for text, message in ((before.replace("version: 1", "version: 7"), "version"), ("", "empty")):
                file.write_text(text)
                with pytest.raises(ConfigError, match=message):
                    await served.ask(do="reload")
            _write(file, first)  # at another port
            with pytest.raises(ConfigError, match="restart mdiq route"):
                await served.ask(do="reload")
            assert await served.post() == 200


async def test_keys_are_read_again_and_each_server_gets_its_own(tmp_path: Path) -> None:
    first, file = FakeServer("first", "the-key-of-a-server-1"), tmp_path / "routes.yaml"
    for name, text in (("api.keys", line_of("me", KEY, {})), ("first.key", "the-key-of-a-server-1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    async with _started(first):
        _write(file, first, first={"key_file": "first.key"}, api={"port": _free_port(), "keys_file": "api.keys"})
        async with _serving(file) as served:
            await served.until_serving("first")
            assert await served.post() == 401
            assert await served.post(Authorization=f"Bearer {KEY}") == 200
            (tmp_path / "api.keys").write_text(line_of("me", "another-key-of-mine", {}))
            await served.ask(do="reload")
            assert await served.post(Authorization=f"Bearer {KEY}") == 401
            assert await served.post(**{"x-api-key": "another-key-of-mine"}) == 200


async def test_a_server_gets_the_keys_of_the_clients_where_the_file_says_so(tmp_path: Path) -> None:
    first, file = FakeServer("first", "the-key-of-a-server-1", KEY), tmp_path / "routes.yaml"
    (tmp_path / "first.key").write_text("the-key-of-a-server-1\n")
    (tmp_path / "first.key").chmod(0o600)
    async with _started(first):
        _write(file, first, first={"key_file": "first.key", "pass_keys": True})
        async with _serving(file) as served:
            await served.until_serving("first")
            assert await served.post() == 401
            assert await served.post(Authorization=f"Bearer {KEY}") == 200
            assert first.asked[-1][1]["Authorization"] == f"Bearer {KEY}"


async def test_a_server_with_a_certificate_of_ones_own_is_reached_and_a_false_one_is_not(tmp_path: Path) -> None:
    first, second, file = FakeServer("first"), FakeServer("second"), tmp_path / "routes.yaml"
    for server in (first, second):
        cert, key = make_certificate(tmp_path / server.name)
        server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.tls.load_cert_chain(cert, key)
    ca = {"ca_file": "first/api.crt"}
    async with _started(first, second):
        _write(file, first, second, first=ca, second=ca)
        async with _serving(file) as served:
            await served.until_serving("first")
            assert await served.post() == 200
            while (state := (await served.ask(do="status"))["servers"][1])["state"] != "gone":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            assert second.asked == [] and "certificate" in state["text"].lower()


async def test_another_certificate_under_the_same_name_is_used_after_a_reload(tmp_path: Path) -> None:
    first, file = FakeServer("first"), tmp_path / "routes.yaml"

    def certified(name: str) -> ssl.SSLContext:
        cert, key = make_certificate(tmp_path / name)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(cert, key)
        return tls

    old, new = certified("old"), certified("new")
    (tmp_path / "ca.pem").write_bytes((tmp_path / "old" / "api.crt").read_bytes())
    first.tls = old
    async with _started(first):
        _write(file, first, first={"ca_file": "ca.pem"})
        async with _serving(file) as served:
            await served.until_serving("first")
            assert await served.post() == 200
            (tmp_path / "ca.pem").write_bytes((tmp_path / "new" / "api.crt").read_bytes())
            assert "new or changed: first" in await served.ask(do="reload")
            while (state := (await served.ask(do="status"))["servers"][0])["state"] != "gone":  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # connections that were let in by the old one are not used again
            assert "certificate" in state["text"]
            await first.kill()
            first.tls = new
            await first.start()
            await served.until_serving("first")
            assert await served.post() == 200


async def test_a_reload_that_changes_nothing_about_a_server_keeps_it_in_service(tmp_path: Path) -> None:
    first, file = FakeServer("first", "the-key-of-a-server-1", "the-key-of-a-server-2"), tmp_path / "routes.yaml"
    (tmp_path / "first.key").write_text("the-key-of-a-server-1\n")
    (tmp_path / "first.key").chmod(0o600)
    async with _started(first):
        _write(file, first, first={"key_file": "first.key"})
        async with _serving(file) as served:
            await served.until_serving("first")
            (tmp_path / "first.key").write_text("the-key-of-a-server-2\n")
            first.hangs = True  # so it could not say that it serves
            assert "new or changed: first" in await served.ask(do="reload")
            assert (await served.ask(do="status"))["is_serving"] is True
            first.hangs = False
            assert await served.post() == 200
            assert first.asked[-1][1]["Authorization"] == "Bearer the-key-of-a-server-2"


async def test_a_server_that_the_file_says_is_drained_is_so_from_the_start_until_the_file_says_otherwise(
    tmp_path: Path,
) -> None:
    first, second, file = FakeServer("first"), FakeServer("second"), tmp_path / "routes.yaml"
    async with _started(first, second):
        _write(file, first, second, first={"drained": True})
        api = {"port": load_routes(file).routes.api.port}
        async with _serving(file) as served:
            await served.until_serving("first", "second")
            assert [await served.post() for _ in range(3)] == [200] * 3 and first.asked == []
            await served.ask(do="drain", node="first", undo=True)
            await served.ask(do="reload")  # the file has not changed: what the operator said last holds
            assert [each["drained"] for each in (await served.ask(do="status"))["servers"]] == [False, False]
            for is_drained in (False, True):
                _write(file, first, second, first={"drained": is_drained}, second={"drained": is_drained}, api=api)
                await served.ask(do="reload")
                found = [each["drained"] for each in (await served.ask(do="status"))["servers"]]
                assert found == [is_drained, is_drained]


async def test_a_drain_says_what_still_runs_there_for_others(tmp_path: Path) -> None:
    first, file = FakeServer("first"), tmp_path / "routes.yaml"
    first.model.num_running = 2
    async with _started(first):
        _write(file, first)
        async with _serving(file) as served:
            await served.until_serving("first")
            assert "2 still run there" in await served.ask(do="drain", node="first", undo=False)


async def test_an_operator_sees_drains_and_reads_again_from_the_command_line(tmp_path: Path) -> None:
    first, file = FakeServer("first"), tmp_path / "routes.yaml"
    async with _started(first):
        _write(file, first)
        async with _serving(file) as served:
            await served.until_serving("first")
            shown = await asyncio.to_thread(CliRunner().invoke, app, ["status", str(file)])
            assert shown.exit_code == 0 and "first" in shown.output and "serves" in shown.output
            told = await asyncio.to_thread(CliRunner().invoke, app, ["drain", str(file), "first"])
            assert "first is drained" in told.output
            told = await asyncio.to_thread(CliRunner().invoke, app, ["reload", str(file)])
            assert "1 servers; new or changed: none" in told.output
            shown = await asyncio.to_thread(CliRunner().invoke, app, ["status", str(file), "--json"])
            assert shown.exit_code == 1 and '"drained": true' in shown.output


async def test_an_address_that_is_taken_is_named(tmp_path: Path) -> None:
    first, file = FakeServer("first"), tmp_path / "routes.yaml"
    async with _started(first):
        _write(file, first, api={"port": first.port})
        with pytest.raises(ExceptionGroup) as caught:
            await RouteService(load_routes(file), Notifier(None)).run()
        error = first_of(caught.value)
        assert f"port {first.port} cannot be used" in str(error)
        # It is no mistake in a file, of which the units' RestartPreventExitStatus=2 is.
        assert isinstance(error, TransportError) and error.exit_code == 1


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("", 0o600, "holds no key"),
        ("a key", 0o600, "holds no key"),
        ("ü" * 9, 0o600, "no key"),
        ("key", 0o644, "chmod"),
    ],
)
def test_a_key_file_that_cannot_be_is_named(tmp_path: Path, text: str, mode: int, message: str) -> None:
    file = tmp_path / "a.key"
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=message):
        read_key(file, "a", {})
    with pytest.raises(ConfigError, match="key_file of a names it"):
        read_key(tmp_path / "none", "a", {})


def test_a_key_of_the_service_manager_comes_first(tmp_path: Path) -> None:
    (tmp_path / "a.key").write_text("credential\n")
    assert read_key(tmp_path / "none", "a", {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == "credential"


def test_a_wrong_file_is_named_by_the_command(tmp_path: Path) -> None:
    file = tmp_path / "routes.yaml"
    file.write_text("version: 1\n")
    done = CliRunner().invoke(app, ["route", str(file)])
    assert isinstance(done.exception, ConfigError) and "servers: it is missing" in str(done.exception)


async def test_the_certificate_of_a_router_is_among_its_metrics_and_renewed_by_a_reload(tmp_path: Path) -> None:
    only, file = FakeServer("only"), tmp_path / "routes.yaml"
    cert, _ = make_certificate(tmp_path, days=40)

    async def days_left(served: Served) -> float:
        trusting = ssl.create_default_context(cafile=cert)
        async with served.session.get(served.url.replace("http", "https", 1) + "/metrics", ssl=trusting) as response:
            text = await response.text()
        (line,) = [line for line in text.splitlines() if line.startswith("mdiq_tls_certificate_left_seconds ")]
        return float(line.split()[1]) / 86_400

    async with _started(only):
        _write(file, only, api={"port": _free_port(), "tls_cert": "api.crt", "tls_key": "api.key"})
        async with _serving(file) as served:
            await served.until_serving("only")
            assert await days_left(served) == pytest.approx(40, abs=0.1)
            make_certificate(tmp_path, days=90)
            await served.ask(do="reload")
            assert await days_left(served) == pytest.approx(90, abs=0.1)
