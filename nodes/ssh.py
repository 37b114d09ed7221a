"""Commands on devices over ssh, the system's own: as root, with errors that say what to do."""

import asyncio
import shlex
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CONNECT_TIMEOUT_S = 15

_ADVICE: Sequence[tuple[str, str]] = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is another than before: find out why; a device that was set "
        "up anew is forgotten with: ssh-keygen -R {address}",
    ),
    (
        "Host key verification failed",
        "its host key is not known here: log in once by hand ({login}) and compare the "
        "fingerprint, or give --accept-new-host-keys",
    ),
    (
        "Permission denied",
        "it refuses the login: copy your key there (ssh-copy-id {login}), or give --user or --identity",
    ),
    ("Could not resolve", "its address has no entry in DNS or /etc/hosts: correct `address` in the topology"),
    ("Connection refused", "it is up, but no ssh server answers: apt install openssh-server there, or give --port"),
    ("No route to host", "the network does not know it: is it on, and in this network?"),
    ("timed out", "it does not answer: is it on, and its cable plugged in?"),
)
"""Text in ssh's complaint -> what to do about it."""


class ProvisionError(Exception):
    """What went wrong on a device or with the operator's files, in one line. ``code`` is the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Device:
    """A device of the topology. key: its private key file here, or None in a ring without keys."""

    name: str
    address: str
    role: str
    key: Path | None


@dataclass(frozen=True, slots=True)
class Ssh:
    """How devices are reached. control: folder for the sockets of connections that are kept open."""

    user: str
    port: int
    identity: Path | None
    known_hosts: Path | None
    accept_new: bool
    control: Path

    def command(self, device: Device, remote: str) -> list[str]:
        """Return the argument vector that runs a shell command on a device, as root."""
        as_root = remote if self.user == "root" else f"sudo -n sh -c {shlex.quote(remote)}"
        return [*self._ssh(), "--", device.address, as_root]

    async def run(
        self, device: Device, remote: str, *, send: AsyncIterator[bytes] | None = None, timeout_s: float
    ) -> str:
        """Run a shell command on a device as root and return its output; ``send`` goes to its standard input.

        Raises:
            ProvisionError: the device does not answer, or the command fails or takes too long.
        """
        process = await asyncio.create_subprocess_exec(
            *self.command(device, remote),
            stdin=asyncio.subprocess.DEVNULL if send is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(timeout_s):
                _, out, err = await asyncio.gather(_feed(process, send), _all(process.stdout), _all(process.stderr))
                code = await process.wait()
        except TimeoutError:
            raise ProvisionError(f"took longer than {timeout_s:.0f} s; look at the device and run this again") from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if code == 0:
            return out
        raise ProvisionError(self._explain(device, code, err or out))

    async def hang_up(self, device: Device) -> None:
        """End the connection that ssh keeps open for the next command."""
        process = await asyncio.create_subprocess_exec(
            *self._ssh(),
            "-O",
            "exit",
            "--",
            device.address,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        await process.wait()

    def _ssh(self) -> list[str]:
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": str(CONNECT_TIMEOUT_S),
            "ServerAliveInterval": "10",
            "ControlMaster": "auto",
            "ControlPath": str(self.control / "%C"),
            "ControlPersist": "60",
            "StrictHostKeyChecking": "accept-new" if self.accept_new else "yes",
        }
        if self.known_hosts is not None:
            options["UserKnownHostsFile"] = str(self.known_hosts)
        arguments = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        if self.identity is not None:
            arguments += ["-i", str(self.identity), "-o", "IdentitiesOnly=yes"]
        return ["ssh", *arguments, "-p", str(self.port), "-l", self.user]

    def _explain(self, device: Device, code: int, complaint: str) -> str:
        """Return one line of what failed and what to do, from what a command left on stderr."""
        lines = [line.strip() for line in complaint.splitlines() if line.strip()]
        last = "; ".join(lines[-3:]) or f"exit code {code}"
        if code == 255:  # ssh itself
            for text, advice in _ADVICE:
                if text in complaint:
                    login = f"{self.user}@{device.address}"
                    return f"{device.address}: {advice.format(address=device.address, login=login)}"
            return f"{device.address}: ssh failed: {last}"
        if "sudo:" in complaint:
            return f"sudo asks for a password: let {self.user} use sudo without one there, or give --user root ({last})"
        return last


async def _feed(process: asyncio.subprocess.Process, chunks: AsyncIterator[bytes] | None) -> None:
    if chunks is None or process.stdin is None:
        return
    # A device that has gone says why on stderr; the broken pipe says less.
    with suppress(BrokenPipeError, ConnectionResetError):
        async for chunk in chunks:
            process.stdin.write(chunk)
            await process.stdin.drain()
    process.stdin.close()


async def _all(stream: asyncio.StreamReader | None) -> str:
    return "" if stream is None else (await stream.read()).decode(errors="replace")
