"""A network for every node of a topology on one machine: namespaces that a bridge joins, or addresses of loopback."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Network

BRIDGE = "br0"  # as in capture.py
SPACE = IPv4Network("10.77.0.0/24")
"""Addresses for nodes whose own are none that a namespace can have."""
_HUB_ADDRESS = "10.77.255.254"
_FIRST_LISTENER = 10  # descriptor of a relay's first listening socket
_HELD = b"held\n"
# Listens in the namespace of a link, then becomes its relay in that of the bridge, with the sockets that it has.
_LISTEN_AND_BECOME = f"""
import json, os, socket, sys
endpoints, command = json.loads(sys.argv[1]), sys.argv[2:]
for number, endpoint in enumerate(endpoints, {_FIRST_LISTENER}):
    listener = socket.create_server(tuple(endpoint))
    os.dup2(listener.fileno(), number, inheritable=True)
os.execvp(command[0], command)
"""


class NoNamespacesError(Exception):
    """The kernel does not let us; the text says why."""


@dataclass(frozen=True, slots=True)
class Link:
    """How the Hop from one Node to the next is. shape: as `mdiq bench --link` takes it."""

    sender: str
    receiver: str
    shape: str


class Namespaces:
    """A network namespace for each Node, joined by a bridge in one of their own.

    Each is held by a process that does nothing but wait for the end of its standard input, so they end with this one.
    """

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self.addresses = addresses
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        with ExitStack() as undo:
            undo.callback(self.close)
            self._hub = self._hold_hub()
            for name in addresses:
                self._holders[name] = self._hold(*self._unshare())
            hub = [f"link add {BRIDGE} type bridge", f"addr add {_HUB_ADDRESS}/32 dev {BRIDGE}"]
            hub += ["link set lo up", f"link set {BRIDGE} up", f"route add default dev {BRIDGE}"]
            for i, name in enumerate(addresses):
                hub.append(f"link add v{i} type veth peer name eth0 netns {self._holders[name].pid}")
                hub += [f"link set v{i} master {BRIDGE}", f"link set v{i} up"]
            self._ip(self._hub, hub)
            for name, address in addresses.items():
                mine = ["link set lo up", f"addr add {address}/32 dev eth0", "link set eth0 up"]
                self._ip(self._holders[name], [*mine, "route add default dev eth0"])
            undo.pop_all()

    def inside(self, name: str) -> list[str]:
        """Return what stands in front of a command that is to run in a Node's network."""
        return self._enter(self._holders[name])

    def capture(self) -> tuple[list[str], list[str]]:
        """Return what stands in front of capture.py, and its arguments after the file."""
        return self._enter(self._hub), []

    def relay(self, link: Link, ports: Sequence[int]) -> tuple[list[str], list[list[object]]]:
        """Put a namespace in the place of a link; return the command of the relay that is to stand there, and targets.

        Connections from the sender to the receiver's ports lead into that namespace, where the relay listens at the
        receiver's address. It goes on to the receiver from the bridge's namespace: so neither end has to know of it.
        """
        sender, receiver = self.addresses[link.sender], self.addresses[link.receiver]
        place = self._hold(*self._unshare())
        here, there, table = "hop", "far", 100
        self._holders[f"{link.sender}:{link.receiver}"] = place
        mine = [f"link add {here} type veth peer name {there} netns {place.pid}", f"link set {here} up"]
        mine += [f"route add {receiver}/32 dev {here} src {sender} table {table}"]
        # By port: what the receiver has opened, to a port of the sender's, is answered over the bridge.
        mine += [f"rule add to {receiver}/32 ipproto tcp dport {port} lookup {table}" for port in ports]
        self._ip(self._holders[link.sender], mine)
        # Answers from there come on another interface than that of the main table, which some systems do not accept.
        settings = "; ".join(f"echo 0 >/proc/sys/net/ipv4/conf/{name}/rp_filter" for name in ("all", here))
        subprocess.run([*self._enter(self._holders[link.sender]), "sh", "-c", settings], stderr=subprocess.DEVNULL)
        self._ip(
            place,
            [
                "link set lo up",
                f"addr add {receiver}/32 dev lo",
                f"link set {there} up",
                f"route add {sender}/32 dev {there}",
            ],
        )
        endpoints = json.dumps([[receiver, port] for port in ports])
        command = [*self._enter(place), sys.executable, "-P", "-S", "-c", _LISTEN_AND_BECOME, endpoints]
        # It is in the user namespace already.
        command += ["nsenter", "--target", str(self._hub.pid), "--net", "--"]
        return command, [[f"tcp://{receiver}:{port}", i] for i, port in enumerate(ports, _FIRST_LISTENER)]

    def close(self) -> None:
        """End the processes that hold the namespaces."""
        for holder in self._holders.values():
            holder.kill()
        for holder in self._holders.values():
            holder.wait()
            for pipe in (holder.stdin, holder.stdout, holder.stderr):
                if pipe is not None:
                    pipe.close()
        self._holders.clear()

    def _hold_hub(self) -> subprocess.Popen[bytes]:
        """Hold a namespace that belongs to us: as root, or in a user namespace in which we are."""
        reasons = []
        for self._is_user in (False, True) if os.getuid() == 0 else (True,):
            try:
                hub = self._hold("unshare", *(["--user", "--map-root-user"] if self._is_user else []), "--net")
            except NoNamespacesError as error:
                reasons.append(str(error))
                continue
            self._holders[""] = hub
            return hub
        raise NoNamespacesError("; ".join(dict.fromkeys(reasons)))

    def _hold(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a process that holds the namespaces which ``command`` makes, and return when they are there."""
        try:
            holder = subprocess.Popen(
                [*command, "sh", "-c", "echo held; exec cat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise NoNamespacesError(f"{command[0]}: {error.strerror}") from None
        assert holder.stdout is not None and holder.stderr is not None  # PIPE was asked for
        if holder.stdout.readline() == _HELD:
            return holder
        _, errors = holder.communicate()
        raise NoNamespacesError(_first_line(errors))

    def _unshare(self) -> list[str]:
        return [*self._enter(self._hub), "unshare", "--net"]

    def _enter(self, holder: subprocess.Popen[bytes]) -> list[str]:
        user = ["--user", "--preserve-credentials"] if self._is_user else []
        return ["nsenter", "--target", str(holder.pid), *user, "--net", "--"]

    def _ip(self, holder: subprocess.Popen[bytes], lines: Sequence[str]) -> None:
        done = subprocess.run(
            [*self._enter(holder), "ip", "-batch", "-"], input="\n".join(lines).encode(), capture_output=True
        )
        if done.returncode:
            raise NoNamespacesError(f"ip: {_first_line(done.stderr)}")


class Plain:
    """Loopback for all Nodes, an address for each; several rings of one machine use different ones."""

    def __init__(self, names: Sequence[str]) -> None:
        self._network = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}"
        self.addresses: Mapping[str, str] = {name: f"{self._network}.{i}" for i, name in enumerate(names, 1)}

    def inside(self, name: str) -> list[str]:
        """Return what stands in front of a Node's command: nothing."""
        return []

    def capture(self) -> tuple[list[str], list[str]]:
        """Return what stands in front of capture.py, and its arguments after the file."""
        return [], [f"{self._network}.0/24"]

    def close(self) -> None:
        """Nothing is to be undone."""


def _first_line(text: bytes) -> str:
    return next(iter(text.decode(errors="replace").strip().splitlines()), "it says nothing")
