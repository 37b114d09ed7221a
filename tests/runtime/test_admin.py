"""The operator's socket: questions, answers, and who may ask."""

import asyncio
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mdiq.errors import ConfigError, RingError
from mdiq.runtime.admin import AdminServer, ask, socket_path


@pytest.fixture
def environ(tmp_path: Path) -> Mapping[str, str]:
    return {"RUNTIME_DIRECTORY": str(tmp_path / "run")}


async def _echo(question: Mapping[str, Any]) -> Any:
    return question.get("say")


async def _refuse(_: Mapping[str, Any]) -> Any:
    raise RingError("pi2: it is not here")


async def _break(_: Mapping[str, Any]) -> Any:
    raise RuntimeError("a mistake of ours")


COMMANDS = {"echo": _echo, "refuse": _refuse, "break": _break}


async def test_a_question_is_answered_and_an_error_is_told(tmp_path: Path, environ: Mapping[str, str]) -> None:
    topology = tmp_path / "topology.yaml"
    async with AdminServer(socket_path(topology, environ), COMMANDS, topology):
        assert await asyncio.to_thread(ask, topology, {"do": "echo", "say": {"a": 1}}, environ) == {"a": 1}
        for question, words in (("refuse", "pi2"), ("break", "a mistake of ours"), ("dance", "one of echo")):
            with pytest.raises(ConfigError, match=words):
                await asyncio.to_thread(ask, topology, {"do": question}, environ)
    with pytest.raises(ConfigError, match="no such file"):
        await asyncio.to_thread(ask, topology, {"do": "echo"}, environ)
    topology.touch()
    with pytest.raises(ConfigError, match="no mdiq serve or mdiq route of it"):
        await asyncio.to_thread(ask, topology, {"do": "echo"}, environ)


@pytest.mark.parametrize("junk", [b"\n", b"[]\n", b"5\n", b'{"do": []}\n', b"[" * 99_999 + b"\n", b"x" * (2 << 20)])
async def test_junk_gets_an_answer_and_breaks_nothing(junk: bytes, tmp_path: Path, environ: Mapping[str, str]) -> None:
    topology = tmp_path / "topology.yaml"
    place = socket_path(topology, environ)

    def send() -> bytes:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(10)
            link.connect(str(place))
            try:
                link.sendall(junk)
                return link.recv(1000)
            except OSError:
                return b""  # it has closed the connection

    async with AdminServer(place, COMMANDS, "topology.yaml"):
        assert b"unknown command" in await asyncio.to_thread(send) or len(junk) > 1 << 20
        assert await asyncio.to_thread(ask, topology, {"do": "echo", "say": 1}, environ) == 1


async def test_nobody_else_may_open_it(tmp_path: Path, environ: Mapping[str, str]) -> None:
    place = socket_path(tmp_path / "topology.yaml", environ)
    async with AdminServer(place, COMMANDS, "topology.yaml"):
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    assert not place.exists()


async def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, environ: Mapping[str, str]) -> None:
    place = socket_path(tmp_path / "topology.yaml", environ)
    place.parent.mkdir()
    os.chmod(place.parent, 0o777)
    with pytest.raises(ConfigError, match="others can write"):
        async with AdminServer(place, COMMANDS, "topology.yaml"):
            pass


def test_each_topology_has_a_socket_of_its_own(tmp_path: Path, environ: Mapping[str, str]) -> None:
    (tmp_path / "sub").mkdir()
    one, same, other = (socket_path(tmp_path / name, environ) for name in ("a.yaml", "sub/../a.yaml", "b.yaml"))
    assert one == same != other


async def test_a_second_service_of_a_topology_is_refused_and_the_first_is_unharmed(
    tmp_path: Path, environ: Mapping[str, str]
) -> None:
    topology = tmp_path / "topology.yaml"
    place = socket_path(topology, environ)
    async with AdminServer(place, COMMANDS, "topology.yaml"):
        with pytest.raises(ConfigError, match=r"^topology\.yaml: a service of it runs already"):
            async with AdminServer(place, COMMANDS, "topology.yaml"):
                pass
        assert await asyncio.to_thread(ask, topology, {"do": "echo", "say": 1}, environ) == 1
    async with AdminServer(place, COMMANDS, "topology.yaml"):  # the first has ended
        assert await asyncio.to_thread(ask, topology, {"do": "echo", "say": 2}, environ) == 2
    place.touch()  # of a service that was killed
    async with AdminServer(place, COMMANDS, "topology.yaml"):
        assert await asyncio.to_thread(ask, topology, {"do": "echo", "say": 3}, environ) == 3
