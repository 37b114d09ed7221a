"""Look up host names in separate threads.

libzmq would look them up in its I/O thread: while a name server does not answer, every link of the process stalls. It
also asks for one address family only, and so waits for ever for a host that has no address of that family. So libzmq
gets addresses, never names.
"""

import asyncio
import contextlib
import ipaddress
import socket
import threading


def name_in(endpoint: str) -> str | None:
    """Return the host name in ``tcp://HOST:PORT``; None if it is an address, or if this is not such an endpoint."""
    if not endpoint.startswith("tcp://"):
        return None
    host, _, port = endpoint.removeprefix("tcp://").rpartition(";")[2].rpartition(":")
    if not host or not port.isdecimal() or not host.replace("-", "").replace(".", "").replace("_", "").isalnum():
        return None
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host
    return None


def with_address(endpoint: str, address: str) -> str:
    """Return the endpoint with an address in place of the name of its host."""
    before, separator, after = endpoint.removeprefix("tcp://").rpartition(";")
    host = f"[{address}]" if ":" in address else address
    return f"tcp://{before}{separator}{host}:{after.rpartition(':')[2]}"


def addresses_of(name: str) -> list[str]:
    """Return the addresses of a host, IPv4 first. This may take very long.

    Raises:
        OSError: the name is unknown, or no name server answered. UnicodeError: it cannot be a name.
    """
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return sorted(dict.fromkeys(str(each[4][0]) for each in found), key=lambda address: ":" in address)


async def look_up(name: str) -> list[str]:
    """Return the addresses of a host as ``addresses_of`` does.

    Not in the loop's thread pool: a few hanging lookups would take all its threads and delay the end of the process.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()

    def tell(addresses: list[str], error: Exception | None) -> None:
        if not answer.done():
            answer.set_result(addresses) if error is None else answer.set_exception(error)

    def ask() -> None:
        addresses: list[str] = []
        failed: Exception | None = OSError(0, "the look-up broke; see the log")
        try:
            addresses, failed = addresses_of(name), None
        except (OSError, UnicodeError) as error:
            failed = error
        finally:  # what was not foreseen is for the hook of all threads
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(tell, addresses, failed)

    threading.Thread(target=ask, name=f"look-up-{name}", daemon=True).start()
    return await answer


def plain_address(address: str) -> str:
    """Return an address in its usual form: IPv4 without the ::ffff: prefix that a dual-stack socket shows."""
    try:
        mapped = ipaddress.IPv6Address(address).ipv4_mapped
    except ValueError:
        return address
    return str(mapped) if mapped is not None else address


def has_ipv6() -> bool:
    """Return whether this machine can listen on IPv6."""
    try:
        with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True):
            return True
    except (OSError, ValueError):
        return False
