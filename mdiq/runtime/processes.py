"""Nodes as child processes of the Starter, joined over loopback sockets: the very code that a device runs.

A child holds a pipe from its parent as standard input: the control key comes down it, and its end tells the child that
the parent is gone, however it went.
"""

import asyncio
import secrets
import signal
import sys
from collections.abc import Mapping
from typing import NoReturn

from mdiq.core import control
from mdiq.core.types import NodeId
from mdiq.errors import MdiqError, NodeDiedError, RingError
from mdiq.runtime.options import RingOptions
from mdiq.runtime.placement import core_of
from mdiq.runtime.socket_workers import SocketWorkers
from mdiq.runtime.workers import RingEvents
from mdiq.transport.push_pull import PullSource, PushSink
from mdiq.transport.router_dealer import RouterServer

OWN_ERROR = "mdiq: "  # how the command line begins the one line that says why it ends


class ProcessWorkers(SocketWorkers):
    """Every Stage but the Starter's, each in a process of its own on this machine; one that dies is started again."""

    def __init__(self, options: RingOptions, ring_key: bytes, events: RingEvents) -> None:
        super().__init__(options, ring_key, events)
        self._control_key = secrets.token_bytes(32)
        self._children: dict[NodeId, asyncio.subprocess.Process] = {}
        self._own_endpoint = self._control_endpoint = ""
        self._listen_at: dict[NodeId, str] = {}
        self._lost_alive: set[int] = set()  # processes whose end is no news

    async def open(self) -> None:
        """Start the processes, which import what they need and join.

        Raises:
            MdiqError: a port or a process failed; the message names the Node.
        """
        await super().open()
        self.source = source = await PullSource.bind(self._context, _listen(self._options, 0))
        self._own_endpoint = source.endpoint
        server = await RouterServer.bind(self._context, "tcp://127.0.0.1:0")
        self._coordinate(server, self._control_key)
        self._control_endpoint = server.endpoint
        for i, node in enumerate(self._names, 1):
            self._children[node] = child = await self._spawn(node, i)
            self._loops.run(self._watch(node, i, child), f"watch-{node}")

    async def _join_and_load(self) -> Mapping[NodeId, control.Ready]:
        coordinator = self._opened_coordinator
        hellos = await coordinator.all_joined()
        endpoints = [hellos[node].data_endpoint for node in self._names] + [self._own_endpoint]
        if self._options.slowdown is not None:
            endpoints = await self._options.slowdown.slow_hops(endpoints)
        self._endpoints = endpoints
        self.sink = await PushSink.connect(self._context, endpoints[0])
        self._listen_at = {node: hellos[node].data_endpoint for node in self._names}
        return await self._assign()

    def _assignment_of(self, i: int) -> control.Assign:
        return self._assignment(i, self._endpoints[i])

    async def aclose(self) -> None:
        """End every process and close every socket; what does not end by itself is killed."""
        self._is_closing = True
        for child in self._children.values():
            if child.stdin is not None:
                child.stdin.close()  # the child ends when its pipe does
        waits = [asyncio.create_task(child.wait()) for child in self._children.values()]
        if waits:
            await asyncio.wait(waits, timeout=0.3)
        for child in self._children.values():
            if child.returncode is None:
                child.kill()
        await asyncio.gather(*waits)
        await super().aclose()

    async def _spawn(self, node: NodeId, i: int) -> asyncio.subprocess.Process:
        options = self._options
        listen = self._listen_at.get(node) or _listen(options, i)  # again where the Node before it sends to
        command = [sys.executable, "-P", "-m", "mdiq", "node", "--name", node, "--control", self._control_endpoint]
        command += ["--listen", listen, "--threads", str(options.threads), "--stdin-key"]
        command += ["--log-level", options.log_level]
        if options.pin:
            command += ["--pin", str(core_of(i))]
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # Its own process group: Ctrl-C reaches the Starter alone, which ends its Nodes in order.
            start_new_session=True,
        )
        assert child.stdin is not None  # PIPE was asked for
        self._children[node] = child
        if options.slowdown is not None:
            options.slowdown.slow_node(node, child.pid)
        child.stdin.write(self._control_key.hex().encode() + b"\n")
        return child

    def _lost(self, node: NodeId, error: MdiqError) -> None:
        """Have a process that is of no use end, and another one start; one that is only silent may come back."""
        child, is_silent = self._children.get(node), isinstance(error, NodeDiedError) and error.is_silent
        if child is not None and child.returncode is None and not is_silent:
            self._lost_alive.add(child.pid)
            if isinstance(error, NodeDiedError):  # it stands still; else it has said that it failed, and ends by itself
                child.kill()
        super()._lost(node, error)

    async def _watch(self, node: NodeId, i: int, child: asyncio.subprocess.Process) -> NoReturn:
        """Wait for the end of a child, which is a failure: of the Ring while it forms, else another one takes over."""
        while True:
            last_words = await _forward_errors(child)
            code = await child.wait()
            error: RingError = NodeDiedError(f"{node}: {last_words or f'its process ended with {_exit_text(code)}'}")
            if self._is_closing or not self._ready:
                if last_words:  # it says why, and would say so again
                    error = RingError(*error.args)
                self._opened_coordinator.fail(node, error)  # which names the Node in the error
                raise error
            if child.pid not in self._lost_alive:
                self._opened_coordinator.lose(node, error)
            self._lost_alive.discard(child.pid)
            self._children[node] = child = await self._spawn(node, i)
            if self._is_closing:  # whoever closes has killed those that there were
                child.kill()


async def _forward_errors(child: asyncio.subprocess.Process) -> str:
    """Pass a child's log on until it ends; return its own error line, which then stands in the Starter's error."""
    assert child.stderr is not None  # PIPE was asked for
    last_words = ""
    while True:
        try:
            line = (await child.stderr.readline()).decode(errors="replace")
        except ValueError:  # longer than the reader's limit, which has dropped it
            continue
        if not line:
            return last_words
        if line.startswith(OWN_ERROR):
            last_words = line.removeprefix(OWN_ERROR).strip()
        else:
            sys.stderr.write(line)
            sys.stderr.flush()


def _listen(options: RingOptions, i: int) -> str:
    return f"tcp://127.0.0.1:{options.base_port + i if options.base_port else 0}"


def _exit_text(code: int) -> str:
    if code == -signal.SIGKILL:
        return "signal 9 (killed; if nobody did, the machine ran out of memory: see the kernel's log)"
    if code < 0:
        return f"signal {-code} ({signal.strsignal(-code)})"
    return f"exit code {code}; look at its log"
