"""HTTPS by certificate files: what is refused, and what strangers can do before HTTP begins."""

import asyncio
import contextlib
import json
import socket as sockets
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog

from mdiq.api import server
from mdiq.api.app import Api
from mdiq.api.keys import bare_keys
from mdiq.api.server import ApiRunner, TlsSite
from mdiq.api.tls import TlsFiles
from mdiq.core.sequence import SamplingParams
from mdiq.errors import ConfigError
from mdiq.runtime.starter_service import StreamEvent
from tests.api.certificates import make_certificate
from tests.api.test_app import CHAT, FakeRing
from tests.api.test_server import HEAD, KEY


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return TlsFiles(*make_certificate(tmp_path_factory.mktemp("tls")))


@asynccontextmanager
async def _port(context: ssl.SSLContext, max_connections: int | None = None) -> AsyncIterator[int]:
    runner = ApiRunner(Api(FakeRing(), bare_keys([KEY])).application(), max_connections=max_connections)
    await runner.setup()
    try:
        await TlsSite(runner, "127.0.0.1", 0, context).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def _trusting(cert: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=cert)


async def _answer(port: int, cert: Path, text: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=_trusting(cert))
    writer.write(text)
    try:
        return await reader.read()
    finally:
        writer.close()


async def test_answers_and_streams_are_encrypted(files: TlsFiles) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    async with _port(files.context({})) as port, aiohttp.ClientSession(headers=key) as session:
        url = f"https://127.0.0.1:{port}/v1/chat/completions"
        for stream in (False, True):
            body = {**CHAT, "stream": stream}
            async with session.post(url, json=body, ssl=_trusting(files.cert)) as response:
                assert response.status == 200
                text = await response.text()
                assert ("[DONE]" in text) == stream
        with pytest.raises(aiohttp.ClientError):
            await session.post(url.replace("https", "http"), json=CHAT)
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await session.post(url, json=CHAT)  # a certificate that nobody has vouched for


async def test_several_requests_come_with_the_end_of_the_handshake(files: TlsFiles) -> None:
    """TLS 1.3 lets a client send at once."""
    models = f"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    two = f"{models}\r\n{models}Connection: close\r\n\r\n".encode()
    async with _port(files.context({})) as port:
        for answer in await asyncio.gather(*(_answer(port, files.cert, two) for _ in range(20))):
            assert answer.count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b"\x00" * 100])
async def test_what_is_not_tls_is_closed_without_a_word_in_the_log(
    files: TlsFiles, junk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with _port(files.context({})) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            writer.write(junk)
            assert b"HTTP" not in await asyncio.wait_for(reader.read(), 40)
        writer.close()
    assert not caplog.records


async def test_handshakes_that_do_not_end_are_bounded_and_others_are_answered(
    files: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_S", 60.0)
    body = b'{"prompt": [1], "max_tokens": 1}'
    asking = f"{HEAD}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with structlog.testing.capture_logs() as lines:
        async with _port(files.context({}), max_connections=8) as port:
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
            for _, writer in silent[::2]:
                writer.write(b"\x16\x03\x01")
            answer = await _answer(port, files.cert, asking)
            assert answer.startswith(b"HTTP/1.1 200 "), answer
            num_ended = len([line for line in lines if line["event"] == "too_many_connections"])
            assert num_ended == 100 + 1 - 8
            for _, writer in silent:
                writer.close()


async def test_a_handshake_has_its_time(files: TlsFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.2)
    async with _port(files.context({})) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x16\x03\x01")
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 40) == b""
        writer.close()


async def test_files_that_were_renewed_are_used_by_the_next_connections(tmp_path: Path) -> None:
    files = TlsFiles(*make_certificate(tmp_path))
    context = files.context({})
    models = f"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n".encode()
    async with _port(context) as port:
        old = tmp_path / "old.crt"
        old.write_bytes(files.cert.read_bytes())
        make_certificate(tmp_path)
        assert (await _answer(port, old, models)).startswith(b"HTTP/1.1 200 ")
        files.load(context, {})
        with pytest.raises(ssl.SSLCertVerificationError):
            await _answer(port, old, models)
        assert (await _answer(port, files.cert, models)).startswith(b"HTTP/1.1 200 ")


def _other_key(folder: Path) -> None:
    (folder / "api.key").write_bytes(make_certificate(folder / "other")[1].read_bytes())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "api.crt").unlink(), "api.crt: No such file or directory; api.tls_cert names it"),
        (lambda folder: (folder / "api.key").unlink(), "api.key: No such file or directory; api.tls_key names it"),
        (lambda folder: (folder / "api.key").chmod(0o640), "api.key: others can read it; run chmod 600"),
        (_other_key, "api.key: it is not the key of the certificate .*api.crt"),
        (lambda folder: (folder / "api.crt").write_text("diary"), "not a PEM certificate and its private key"),
        (lambda folder: (folder / "api.key").write_text("diary"), "not a PEM certificate and its private key"),
        (lambda folder: make_certificate(folder, password="secret"), "api.key: it is encrypted with a password"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_words(
    tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    files = TlsFiles(*make_certificate(tmp_path))
    files.context({})
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=words) as refused:
        files.context({})
    assert "diary" not in str(refused.value)


def test_systemds_credentials_come_first(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path / "credentials")
    cert.rename(cert.with_name("api.tls_cert"))
    key.rename(key.with_name("api.tls_key")).chmod(0o440)
    files = TlsFiles(tmp_path / "none.crt", tmp_path / "none.key")
    files.context({"CREDENTIALS_DIRECTORY": str(cert.parent)})
    with pytest.raises(ConfigError, match="none.crt"):
        files.context({})


def test_errors_are_json_over_tls_too(files: TlsFiles) -> None:
    async def ask() -> bytes:
        async with _port(files.context({})) as port:
            return await _answer(port, files.cert, b"GET /v1/models HTTP/1.1\r\nConnection: close\r\nHost: a\r\n\r\n")

    head, _, body = asyncio.run(ask()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 401 ")
    assert json.loads(body)["error"]["type"] == "authentication_error"


async def test_a_client_that_does_not_read_is_noticed_as_soon_as_without_tls(files: TlsFiles) -> None:
    text = 10_000

    class Talking(FakeRing):
        async def answer(
            self, prompt: tuple[int, ...], params: SamplingParams, **more: Any
        ) -> AsyncGenerator[StreamEvent, None]:
            async with aclosing(super().answer(prompt, params, **more)) as events:
                async for event in events:
                    yield replace(event, text="x" * text)

    num_said = [0]
    ring = Talking(context_tokens=10_000, before=lambda i: num_said.__setitem__(0, i))
    api = Api(ring, bare_keys([KEY]))
    runner = ApiRunner(api.application(), client_timeout_s=0.5, on_cut_off=api.note_cut_off)
    await runner.setup()
    await TlsSite(runner, "127.0.0.1", 0, files.context({})).start()
    socket = sockets.socket()
    socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 16 * 1024)
    socket.setblocking(False)
    await asyncio.get_running_loop().sock_connect(socket, ("127.0.0.1", runner.addresses[0][1]))
    trusting = _trusting(files.cert)
    _, writer = await asyncio.open_connection(sock=socket, ssl=trusting, server_hostname="127.0.0.1", limit=1_024)
    body = b'{"prompt": [1], "max_tokens": 9000, "stream": true}'
    writer.write(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    async with asyncio.timeout(40):
        await ring.closed.wait()
    assert api.status()["requests"]["cut_off"] == 1
    assert num_said[0] * text < 700_000, "asyncio's own limits let 900 KB wait: in the client, both kernels and here"
    writer.close()
    await runner.cleanup()
