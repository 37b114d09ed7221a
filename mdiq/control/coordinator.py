"""The Starter's end of the control plane: Nodes join, load what they are told, say ready, are drained. No processes."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import structlog

from mdiq.control.answers import A, Answers, Patience, all_of, fail
from mdiq.control.leavers import Leavers
from mdiq.control.node_watch import SILENT_S, NodeWatch
from mdiq.control.sender import Sender
from mdiq.control.standby import StandingBy
from mdiq.control.strangers import Strangers, check_hello
from mdiq.core import control
from mdiq.core.membership import Membership, NodeState
from mdiq.core.types import NodeId
from mdiq.errors import EngineError, KeyRevokedError, MdiqError, NodeDiedError, RemoteProtocolError
from mdiq.telemetry.trace import MAX_SPANS, Span
from mdiq.transport.base import ControlServer
from mdiq.transport.junk import JunkBudget

log = structlog.get_logger()

REPEAT_S = 5.0  # a connection that breaks loses what is on its way: what is not answered is said again
RECONNECT_S = 0.1  # to one that is made anew, because another's key was revoked; also when the Node is gone, soon known
T = TypeVar("T")
_FORGOTTEN = "it is not a node of this ring any more"
_WITHOUT_WORK = (NodeState.JOINING, NodeState.LOADING, NodeState.STANDING_BY)


class Coordinator:
    """Talks to the Agents of the Nodes of a Ring, and of those that stand by. On a secured link each speaks for itself.

    A call to Nodes ends when all have answered, or as soon as one of them is gone, which may have answered already.
    expected: the Ring's Nodes; standing_by: others; see ``reform``. lease_s: how long a Node may say nothing while it
    starts; silence_s: while it serves or stands by.
    on_fault: called with Faults; on_loading: with a Node's progress; on_lost: with Nodes of the Ring that are gone.
    drains_strangers: a Node that speaks and has not joined still serves an earlier Starter's Ring; tell it to end, so
    that it joins this one.
    """

    def __init__(
        self,
        server: ControlServer,
        key: bytes,
        version: str,
        expected: Iterable[NodeId],
        *,
        clock: Callable[[], float],
        lease_s: float,
        silence_s: float,
        on_fault: Callable[[NodeId, control.Fault], None],
        on_loading: Callable[[NodeId, control.Loading], None],
        on_lost: Callable[[NodeId, MdiqError], None],
        drains_strangers: bool = False,
        standing_by: Iterable[StandingBy] = (),
    ) -> None:
        self._server = server
        self._key = key
        self._version = version
        self._clock = clock
        self._on_fault = on_fault
        self._on_loading = on_loading
        self._on_lost = on_lost
        self._strangers = Strangers(clock) if drains_strangers else None
        self._is_draining = False
        self._members = Membership(lease_s, silence_s)
        self._sender = Sender(server, key)
        self._watch = NodeWatch(self._members, clock=clock, ping=self._is_reached, on_gone=self._lose_sight)
        self._identities: dict[NodeId, bytes] = {}
        self._nodes: dict[bytes, NodeId] = {}
        self._ring: tuple[NodeId, ...] = tuple(expected)
        self._standby = {NodeId(node.name): node for node in standing_by}
        self._joined: dict[NodeId, asyncio.Future[control.Hello]] = {}
        self._gone: dict[NodeId, asyncio.Future[MdiqError]] = {}
        self._answers = Answers()
        self._silent: dict[NodeId, control.Hello] = {}  # whose Lease has ended, and which may be heard again
        self.ready: dict[NodeId, control.Ready] = {}  # what each Node has
        self.on_disk: dict[NodeId, frozenset[int]] = {}  # Layers, as far as its process has said
        self._news = asyncio.Event()
        self.leavers = Leavers()
        self.heartbeats: dict[NodeId, control.Heartbeat] = {}
        self.spans: dict[NodeId, list[Span]] = {}
        self._know((*self._ring, *self._standby))

    async def run(self) -> None:
        """Listen to the Agents and watch their Leases until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen(), name="control")
            tasks.create_task(self._watch.run(), name="leases")

    async def all_joined(self) -> Mapping[NodeId, control.Hello]:
        """Wait until every expected Node has joined; raises as ``assign`` does."""
        return await self._unless_gone({node: self._joined[node] for node in self._ring})

    def reform(self, ring: Iterable[NodeId], standing_by: Iterable[StandingBy]) -> None:
        """Expect other Nodes from now on, and have others stand by; the rest are strangers. See ``tell_idle``.

        What the Ring's Nodes are to do is for ``assign``.
        """
        self._ring, self._standby = tuple(ring), {NodeId(node.name): node for node in standing_by}
        self._know((*self._ring, *self._standby))
        for node in [node for node in self._joined if node not in self._ring and node not in self._standby]:
            self._forget(node)
        self._news.set()

    async def tell_idle(self) -> None:
        """Tell those that stand by, and are here, that they do; one that asked to leave, to end."""
        leaves = self.leavers.now
        for node in self.standing_by:
            self._members.set_aside(node)
            await self._send(node, control.Drain() if node == leaves else self._standby[node].message)
        if leaves is not None and leaves not in self._ring:
            self.leavers.is_over(leaves, self._is_at_work)

    @property
    def missing(self) -> list[NodeId]:
        """The Ring's Nodes that have not joined yet, or not again since they were lost."""
        return [node for node in self._ring if not self._joined[node].done()]

    @property
    def standing_by(self) -> list[NodeId]:
        """The Nodes that stand by, and are here."""
        return [node for node in self._standby if self._joined[node].done() and not self._gone[node].done()]

    @property
    def without_work(self) -> list[NodeId]:
        """The Ring's Nodes that are here and have not loaded since they joined."""
        return [node for node in self._ring if self._members.state(node) in _WITHOUT_WORK]

    def until_joined(self) -> Coroutine[Any, Any, Any]:
        """Return what waits until a Node joins from now on, of the Ring or not, or others are to be the Ring."""
        self._news.clear()
        return self._news.wait()

    def silent(self, min_s: float) -> dict[NodeId, float]:
        """Return the Nodes that have not been heard for so long, and for how long; those that are gone are not here."""
        now, here = self._clock(), [node for node in self._ring if not self._gone[node].done()]
        return {node: silent_s for node in here if (silent_s := self._members.silent_s(node, now)) >= min_s}

    async def assign(self, assignments: Mapping[NodeId, control.Assign]) -> Mapping[NodeId, control.Ready]:
        """Tell the Nodes what to load and wait until all have.

        Raises:
            MdiqError: one of them failed or died; see ``fail``.
        """
        ready = await self._call(assignments, {node: (control.Ready, each.epoch) for node, each in assignments.items()})
        for node, each in assignments.items():
            if each.measures and not ready[node].decode_s:
                raise EngineError(f"{node}: it does not say what a forward costs; this is a bug in mdiq")
        return ready

    async def begin(self, begins: Mapping[NodeId, control.Begin]) -> None:
        """Tell the Nodes to begin an Epoch and wait until all have; raises as ``assign`` does."""
        await self._call(begins, {node: (control.Begun, begin.epoch) for node, begin in begins.items()})

    async def ask(self, node: NodeId, request: control.SendBurst | control.Fetch, kind: type[A]) -> A:
        """Have one Node do something and return its answer of this kind; raises as ``assign`` does."""
        return (await self._call({node: request}, {node: (kind, request.number)}))[node]

    def burst_arrived(self, node: NodeId, number: int) -> "asyncio.Future[control.BurstArrived]":
        """Return a future of what a Node sees of a burst that it receives; raises as ``assign`` does."""
        return self._await(node, control.BurstArrived, number)

    async def drain(self, deadline_s: float) -> None:
        """Ask every Node that has joined to end, and wait for their goodbyes, at most ``deadline_s`` seconds."""
        self._is_draining = True
        for node in self._identities:  # also those that stand by: the next Ring may have work for them
            if not self._gone[node].done():
                await self._send(node, control.Drain())
        if goodbyes := [self._gone[node] for node in self._identities if node in self._ring]:
            await asyncio.wait(goodbyes, timeout=deadline_s)

    def fail(self, node: NodeId, error: MdiqError) -> None:
        """Note that a Node is gone or cannot do its part: whoever waits for it gets the error."""
        error.node = node
        fail(self._joined[node], error)
        self._answers.fail(node, error)
        if not self._gone[node].done():
            self._gone[node].set_result(error)

    def lose(self, node: NodeId, error: MdiqError) -> None:
        """Note that a Node is gone, which may join again."""
        self._members.lost(node)
        self.leavers.forget(node)
        self.fail(node, error)
        self._joined[node] = asyncio.get_running_loop().create_future()
        if node in self._ring:
            self._on_lost(node, error)
        else:
            log.info("standing_by_lost", node=node, error=str(error))

    def revoke(self, node: NodeId) -> None:
        """Note that a Node that is here has another key now; its process joins again when it has a key that counts."""
        if self._joined[node].done() and not self._gone[node].done():
            self._turn_out(node, KeyRevokedError(f"{node}: its key was revoked; it may come back with its new one"))

    def _turn_out(self, node: NodeId, error: MdiqError) -> None:
        """Note that a Node that lives is of no use as it is: it is a stranger, which is told to join anew."""
        self.lose(node, error)
        self._nodes.pop(self._identities[node], None)

    async def _listen(self) -> NoReturn:
        junk = JunkBudget()
        while True:
            identity, data = await self._server.receive()
            start_s = self._clock()
            try:
                await self._take_in(identity, control.decode(data, self._key))
                is_of_use = identity in self._nodes
            except RemoteProtocolError as error:
                log.warning("control_message_dropped", error=str(error))
                is_of_use = False
            if not is_of_use:
                await junk.spent(self._clock() - start_s)

    async def _take_in(self, identity: bytes, message: control.Message) -> None:
        sender, is_hello, before = self._server.sender, isinstance(message, control.Hello), self.standing_by
        if self._strangers is not None and identity not in self._nodes and not is_hello:
            if self._strangers.is_to_be_drained(identity):
                await self._sender.send(identity, control.Drain())
            return
        self._handle(identity, sender, message)
        for node in self.standing_by:
            if is_hello and self._nodes.get(identity) == node or node not in before:
                await self._send(node, self._standby[node].message)

    def _handle(self, identity: bytes, sender: str | None, message: control.Message) -> None:
        if isinstance(message, control.Hello):
            self._join(identity, sender, message)
            return
        node = self._nodes.get(identity)
        if node is None:
            raise RemoteProtocolError(f"{type(message).__name__} from a peer that has not joined")
        if sender not in (None, node):
            raise RemoteProtocolError(f"{type(message).__name__} for {node!r} came with the key of {sender!r}")
        self._members.heard(node, self._clock())
        if node in self._silent and isinstance(message, control.Heartbeat):
            log.info("node_heard_again", node=node)
            self._members.joined(node, self._clock())
            self._enter(node, self._silent.pop(node))
        match message:
            case control.Loading():
                self._answers.steps[node] += 1
                if self._members.state(node) is not NodeState.SERVING:  # else it fetches for later
                    self._on_loading(node, message)
            case control.Ready():
                if self._answers.came(node, message.epoch, message):
                    self._members.ready(node)
                    self.ready[node] = message
                    self.on_disk[node] = frozenset(message.on_disk)
            case control.Fetched():
                if self._answers.came(node, message.number, message):
                    self.on_disk[node] = frozenset(message.on_disk)
            case control.BurstSent() | control.BurstArrived():
                self._answers.came(node, message.number, message)
            case control.Begun():
                if self._answers.came(node, message.epoch, message):
                    self._members.begun(node)
            case control.Heartbeat():
                self.heartbeats[node] = message
            case control.Fault():
                if node in self._ring:
                    self._on_fault(node, message)
            case control.TraceChunk():
                self.spans[node] += [Span(*span) for span in message.spans[: MAX_SPANS - len(self.spans[node])]]
            case control.Leaving():
                if node in self._ring:
                    self.leavers.asks(node)
            case control.Goodbye():
                (self.fail if self._is_draining else self.lose)(
                    node, NodeDiedError(f"{node}: it has left; see its log")
                )
            case control.Failed():
                self.lose(node, message.as_error(node))
            case _:
                raise RemoteProtocolError(f"{type(message).__name__}: an agent may not send this")

    def _join(self, identity: bytes, sender: str | None, hello: control.Hello) -> None:
        node = NodeId(hello.node)
        check_hello(node, sender, self._nodes.get(identity, node), is_known=node in self._joined)
        if self._is_draining:
            return  # it has ended with this Ring and is ready for the next one
        if self._identities.get(node, identity) != identity:
            self._note_new_process(node)
        self._members.joined(node, self._clock())
        self._nodes.pop(self._identities.get(node, identity), None)  # where it spoke from before a restart
        self.on_disk.pop(node, None)
        self._silent.pop(node, None)  # that was another process, perhaps of another version
        self._identities[node] = identity
        self._nodes[identity] = node
        if (theirs := hello.mdiq_version) != self._version:
            text = f"{node}: it runs mdiq {theirs} and the starter {self._version}; install the same version"
            log.error("node_not_let_in", node=node, error=text)
            if not self._gone[node].done():  # else others go on without it, or wait for the right one
                self.fail(node, mismatch := EngineError(text))
                if node in self._ring:
                    self._on_lost(node, mismatch)
        else:
            self._enter(node, hello)

    def _enter(self, node: NodeId, hello: control.Hello) -> None:
        """Note that a Node is there, for the first time or again."""
        self.leavers.is_over(node, self._is_at_work)
        future, joined = asyncio.get_running_loop().create_future, self._joined[node]
        if self._gone[node].done():
            self._gone[node] = future()
        if joined.done() and joined.exception() is not None:  # another version of mdiq, then
            self._joined[node] = future()
        if not self._joined[node].done():
            self._joined[node].set_result(hello)
        if node in self._standby:
            self._members.set_aside(node)
        self._news.set()

    def _note_new_process(self, node: NodeId) -> None:
        """Note a new process in place of one that is gone or silent; beside one that lives, Membership refuses it."""
        is_gone = self._gone[node].done()
        if not is_gone and self._members.silent_s(node, self._clock()) < SILENT_S:
            return
        if not is_gone and self._members.state(node) is not NodeState.JOINING:
            # What it had loaded is gone. No need to wait for the end of its Lease.
            self.lose(node, NodeDiedError(f"{node}: it was started anew"))
        else:
            self._members.lost(node)

    async def _call(
        self, requests: Mapping[NodeId, control.Message], answers: Mapping[NodeId, tuple[type[A], int]]
    ) -> dict[NodeId, A]:
        """Send each Node its request, again while it does not answer; return each answer, by its kind and number."""
        futures = {node: self._await(node, kind, number) for node, (kind, number) in answers.items()}
        gone = [self._gone[node] for node in requests]  # one may be forgotten meanwhile
        if not any(each.done() for each in gone):
            for node, message in requests.items():
                if isinstance(message, control.Assign):
                    self._members.assigned(node)
        answered = asyncio.create_task(self._unless_gone(futures), name="answers")
        try:
            unsent, patience = list(requests), Patience(requests, self._answers.steps)
            while not any(each.done() for each in gone) and not answered.done():
                asked = unsent or list(requests)
                unsent = [n for n in asked if not futures[n].done() and not await self._send(n, requests[n])]
                await asyncio.wait({answered}, timeout=(pause_s := RECONNECT_S if unsent else REPEAT_S))
                for node, why in patience.ended(pause_s, [n for n in asked if not futures[n].done()]).items():
                    if isinstance(requests[node], control.Assign | control.Begin):
                        self._turn_out(node, NodeDiedError(f"{node}: {why}"))
                    fail(futures[node], EngineError(f"{node}: {why}"))  # what it does for the Ring goes on else
            return await answered
        finally:
            for future in futures.values():
                future.cancel()  # what comes later is not waited for
            answered.cancel()
            await asyncio.gather(answered, return_exceptions=True)

    async def _unless_gone(self, futures: Mapping[NodeId, "asyncio.Future[T]"]) -> dict[NodeId, T]:
        return await all_of(futures, [self._gone[node] for node in futures])

    def _await(self, node: NodeId, kind: type[A], number: int) -> "asyncio.Future[A]":
        """Return a future of the answer of this kind and number; what nobody waits for is ignored."""
        if node not in self._gone:
            raise NodeDiedError(f"{node}: {_FORGOTTEN}")
        future = self._answers.expect(node, kind, number)
        if self._gone[node].done():
            fail(future, self._gone[node].result())
        return future

    async def _is_reached(self, node: NodeId) -> bool:
        """Return whether a Node has a connection; one that has failed anyhow is not asked."""
        return self._gone[node].done() or await self._sender.reaches(self._identities[node])

    def _lose_sight(self, node: NodeId, why: str, is_silent: bool) -> None:
        """Note that a Node is gone as far as can be seen from here; it may be heard again."""
        if not self._gone[node].done():
            self._silent[node] = self._joined[node].result()
            silent_s = self._members.silent_s(node, self._clock())
            self.lose(node, NodeDiedError(f"{node}: {why}", is_silent=is_silent, unheard_s=silent_s))

    def _is_at_work(self, node: NodeId) -> bool:
        return node in self._ring and not self._gone[node].done()

    def _know(self, nodes: Iterable[NodeId]) -> None:
        """Let these Nodes join from now on."""
        future = asyncio.get_running_loop().create_future
        for node in [each for each in nodes if each not in self._joined]:
            self._joined[node], self._gone[node] = future(), future()
            self.spans[node] = []

    def _forget(self, node: NodeId) -> None:
        """Take a Node for a stranger from now on."""
        self.fail(node, NodeDiedError(f"{node}: {_FORGOTTEN}"))
        self._members.forget(node)
        self._nodes.pop(self._identities.pop(node, b""), None)
        told = self.spans, self.heartbeats, self.ready, self.on_disk, self._answers.steps
        for table in (self._joined, self._gone, self._silent, *told):
            table.pop(node, None)

    async def _send(self, node: NodeId, message: control.Message) -> bool:
        return await self._sender.send(self._identities[node], message)
