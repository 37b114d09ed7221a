"""Security of sockets: CURVE on both ends, and the authenticator (Gate) with the lists of keys. Key files: keys.py.

A socket that binds is the CURVE server. libzmq asks the Gate of its context about every client (ZAP, RFC 27), and with
ZAP_ENFORCE_DOMAIN it refuses every client when no Gate answers. A socket that connects names the one server key that
it accepts. So both sides are authenticated, and every message carries its sender's name (metadata ``User-Id``).

pyzmq's authenticators are not used: they admit NULL peers, have no names, and have one list for all domains.
"""

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import structlog
import zmq
import zmq.asyncio
from zmq.utils import z85

from mdiq.errors import ConfigError, TransportError
from mdiq.transport.keys import is_public_key, public_of
from mdiq.transport.names import plain_address

log = structlog.get_logger()

DATA, CONTROL, WEIGHTS = "data", "control", "weights"
"""The domains: each plane has its own list, and a key counts only on the planes that list it."""
UNLISTED, DELISTED = "its key is not listed for this plane", "its key is no longer listed for this plane"
ZAP_ENDPOINT = "inproc://zeromq.zap.01"
MAX_REFUSALS = 1_000
FORGET_S = 3_600.0
LATE_S = 60.0
"""After a change of the ring: who has sent before it knows of it by then."""

Renew = Callable[[], Awaitable[None]]
Clock = Callable[[], float]


class Refusals:
    """Logs refused peers, each address once an hour, in bounded memory.

    Apart from each other: for a key that was never listed, for one that is no longer, and for all other reasons.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._noted: dict[tuple[str, str, str], float] = {}
        self._is_full = False
        self.num_refused = 0

    def note(self, domain: str, address: str, reason: str, *, public_key: str | None = None) -> None:
        """Count a refused peer, and log it unless that was done already. public_key: the one that it has shown."""
        self.num_refused += 1
        now = self._clock()
        # The oldest are first.
        while self._noted and now - next(iter(self._noted.values())) >= FORGET_S:
            del self._noted[next(iter(self._noted))]
            self._is_full = False
        kind = "" if public_key is None else reason  # not the key itself: a stranger can show any number of keys
        # Who may send activations follows the ring: the node that did so before a change tries once more.
        is_usual = domain == DATA and reason == DELISTED
        if is_usual and now - self._noted.get((domain, address, kind), now) >= LATE_S:
            kind, is_usual = f"{reason}, still", False
        key = (domain, address, kind)
        if key in self._noted:
            return
        if len(self._noted) >= MAX_REFUSALS:
            if not self._is_full:
                log.warning("refusals_no_longer_logged", num_refused=self.num_refused, for_s=FORGET_S)
            self._is_full = True
            return
        self._noted[key] = now
        shown = {} if public_key is None else {"public_key": public_key}
        write = log.info if is_usual else log.warning
        write("peer_refused", plane=domain, address=address, reason=reason, **shown)

    def has_noted_key(self, domain: str, address: str) -> bool:
        """Return whether the log has this address with a key that is not listed."""
        return any((domain, address, reason) in self._noted for reason in (UNLISTED, DELISTED))

    def forget(self, domain: str) -> None:
        """Log refusals on this plane again: its list has changed."""
        self._noted = {key: when for key, when in self._noted.items() if key[0] != domain}
        self._is_full = False


class Gate:
    """The authenticator of all secured sockets of one context: an allow-list for each domain.

    ``start`` it, let a TaskGroup ``run`` it, so that its end is noticed, and ``aclose`` it last. While it does not run,
    every peer is refused.
    """

    def __init__(self, context: zmq.asyncio.Context, *, clock: Clock = time.monotonic) -> None:
        self._context = context
        self._socket: zmq.asyncio.Socket | None = None
        self._lists: dict[str, dict[bytes, str]] = {}
        self._names: dict[str, frozenset[str]] = {}
        self._entered: dict[str, set[bytes]] = {}  # keys that may have live connections
        self._former: dict[str, set[bytes]] = {}  # keys that were listed once
        self._renewals: dict[str, list[Renew]] = {}
        self._replacing = asyncio.Lock()
        self.refusals = Refusals(clock)

    def start(self) -> None:
        """Answer from now on for the sockets of the context.

        Raises:
            TransportError: the context has a Gate already.
        """
        self._socket = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(ZAP_ENDPOINT)
        except zmq.ZMQError:
            self._socket.close()
            raise TransportError("gate: this context has one already; use that one") from None

    async def run(self) -> NoReturn:
        """Answer until cancelled. After its end, whatever the reason, every peer is refused.

        Raises:
            TransportError: it failed.
        """
        assert self._socket is not None, "start comes first"
        try:
            while True:
                request = await self._socket.recv_multipart()
                await self._socket.send_multipart(self._answer(request))
        except Exception as error:  # whatever it is: a Node that lets no peer in must say so
            log.error("gate_failed", error=repr(error))
            raise TransportError(f"gate: it failed, and lets no node in any more: {error!r}; see the log") from error
        finally:
            self._socket.close()

    async def aclose(self) -> None:
        """Stop answering."""
        if self._socket is not None:
            self._socket.close()

    async def replace(self, domain: str, keys: Mapping[str, str]) -> None:
        """Admit from now on only peers with one of these public keys. keys: public key in Z85 -> node name.

        Peers that are no longer listed, or under another name, lose their connections before this returns. If there
        are any, all others of the domain reconnect, and messages that were on their way to us may be lost.

        Raises:
            ConfigError: one of them is not a public key, or a name has two.
            TransportError: a socket of the domain cannot listen again.
        """
        listed = _listed(domain, keys)
        async with self._replacing:
            old = self._lists.get(domain, {})
            entered = self._entered.setdefault(domain, set())
            self._lists[domain] = listed
            self._former[domain] = self._former.get(domain, set()) | old.keys()
            self._names[domain] = frozenset(listed.values())
            self.refusals.forget(domain)
            revoked = {key for key in entered if listed.get(key) != old.get(key)}
            if revoked:
                # libzmq asks only when a peer connects, so every connection of the domain has to be made again.
                entered.clear()
                for renew in list(self._renewals.get(domain, ())):
                    await renew()
                names = ", ".join(sorted({old[key] for key in revoked if key in old}))
                log.info("keys_revoked", plane=domain, nodes=names)

    def admits(self, domain: str, name: str) -> bool:
        """Return whether the domain lists a Node of this name; other messages were sent before the list changed."""
        return name in self._names.get(domain, ())

    def add_renewal(self, domain: str, renew: Renew) -> None:
        """Have ``renew`` called when live connections of the domain must end."""
        self._renewals.setdefault(domain, []).append(renew)

    def remove_renewal(self, domain: str, renew: Renew) -> None:
        """Undo ``add_renewal``, if it was called, when the socket closes."""
        with contextlib.suppress(KeyError, ValueError):
            self._renewals[domain].remove(renew)

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """Return the reply to a ZAP request (RFC 27): version, id, domain, address, identity, mechanism, key."""
        _, request_id, domain_bytes, address_bytes, _, mechanism, *credentials = request
        domain, address = domain_bytes.decode(errors="replace"), plain_address(address_bytes.decode(errors="replace"))
        name = None
        if mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
            name = self._lists.get(domain, {}).get(credentials[0])
        if name is None:
            key = z85.encode(credentials[0]).decode() if len(credentials) == 1 and len(credentials[0]) == 32 else None
            is_former = bool(key) and credentials[0] in self._former.get(domain, ())
            self.refusals.note(domain, address, DELISTED if is_former else UNLISTED, public_key=key)
            return [b"1.0", request_id, b"400", b"key not listed", b"", b""]
        self._entered.setdefault(domain, set()).add(credentials[0])
        return [b"1.0", request_id, b"200", b"OK", name.encode(), b""]


@dataclass(frozen=True, slots=True)
class ServerSecurity:
    """Security of a socket that binds: its private key in Z85, the plane that it serves, and the Gate."""

    secret: bytes = field(repr=False)
    domain: str
    gate: Gate = field(repr=False)

    def apply(self, socket: zmq.asyncio.Socket) -> None:
        """Set the options, before the socket binds."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        socket.setsockopt_string(zmq.ZAP_DOMAIN, self.domain)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def admits(self, name: str) -> bool:
        """Return whether messages of this sender are accepted."""
        return self.gate.admits(self.domain, name)


@dataclass(frozen=True, slots=True)
class ClientSecurity:
    """Security of a socket that connects: its private key and its server's public one, in Z85."""

    secret: bytes = field(repr=False)
    server_public: str

    def apply(self, socket: zmq.asyncio.Socket) -> None:
        """Set the options, before the socket connects.

        Raises:
            ConfigError: the server's key is not a public key.
        """
        if not is_public_key(self.server_public):
            raise ConfigError(f"public key {self.server_public!r}: not 40 characters of Z85; make keys with mdiq keys")
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.server_public.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public_of(self.secret).encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)


Security = ServerSecurity | ClientSecurity


def check_plain_text(endpoint: str, *, insecure: bool) -> None:
    """Refuse an unsecured link that leaves this machine; with ``insecure`` warn instead.

    Raises:
        TransportError: anyone on the network could read and write on that link.
    """
    if not endpoint.startswith("tcp://") or _is_loopback(endpoint):
        return
    if not insecure:
        raise TransportError(
            f"{endpoint}: plain text is for loopback only; make keys with mdiq keys, or set security: insecure: true"
        )
    log.warning("link_in_plain_text", endpoint=endpoint, error="anyone on this network can read and change it")


def _is_loopback(endpoint: str) -> bool:
    # A source address may come first: tcp://SOURCE:PORT;ADDRESS:PORT.
    host = endpoint.removeprefix("tcp://").rpartition(";")[2].rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listed(domain: str, keys: Mapping[str, str]) -> dict[bytes, str]:
    listed: dict[bytes, str] = {}
    for public, name in keys.items():
        if not is_public_key(public):
            raise ConfigError(f"{name}: {public!r} is not a public key; make one with mdiq keys")
        if name in listed.values():
            raise ConfigError(f"{name}: two keys on the {domain} plane; give each node one")
        listed[z85.decode(public)] = name
    return listed
