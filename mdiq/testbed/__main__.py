"""Runs a whole topology on one machine, each node a process of its own: see loopback.py.

python -m mdiq.testbed topology.yaml -- mdiq run --topology {topology} "Why is the sky blue?"
"""

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mdiq.errors import MdiqError
from mdiq.testbed.loopback import LINK, LoopbackRing, last_line, parse_links

STARTER = 'mdiq run --topology {topology} "Why is the sky blue?"'
POLL_S = 0.2


class _Signalled(BaseException):
    """SIGINT or SIGTERM has come."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def say(text: str) -> None:
    """Tell the operator; standard output is the Starter's."""
    sys.stderr.write(f"loopback: {text}\n")
    sys.stderr.flush()


def run(ring: LoopbackRing, command: Sequence[str], *, opens_api: bool) -> int:
    """Run the Starter's command to its end beside the Nodes, and return its exit code."""
    with ring:
        if ring.is_plain:
            say(f"no networks of their own ({ring.why_plain}): the nodes share loopback")
        for name, address in ring.addresses.items():
            say(f"{name} is at {address}")
        if opens_api:
            ring.open_api()
        starter = ring.start(ring.starter, command)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = starter.wait(POLL_S)
                return code if code >= 0 else 128 - code
            for name, code in ring.ended().items():
                how = f"exit code {code}" if code >= 0 else f"signal {-code}"
                say(f"{name} has ended with {how}: {last_line(ring.log(name).read_bytes())}")


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m mdiq.testbed",
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"The Starter's command comes after --; {{topology}} in it is the file to use. Default: {STARTER}",
    )
    parser.add_argument("topology", type=Path, help="the topology's YAML")
    parser.add_argument("--folder", type=Path, help="keep copy, keys, logs and caches there (default: nothing is kept)")
    parser.add_argument("--link", metavar="SPEC", action="append", default=[], help=f"a slow hop, {LINK}; repeat")
    parser.add_argument("--capture", metavar="FILE", type=Path, help="copy all packets there, for Wireshark")
    parser.add_argument("--open-api", action="store_true", help="let this machine reach the Starter's api.port")
    parser.add_argument("--plain", action="store_true", help="share loopback, also where networks can be had")
    here = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:here]), list(argv[here + 1 :]) or shlex.split(STARTER)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments, command = _arguments(sys.argv[1:] if argv is None else argv)

    def stop(number: int, _: object) -> None:
        raise _Signalled(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with contextlib.ExitStack() as stack:
        try:
            folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mdiq-")))
            ring = LoopbackRing(
                arguments.topology,
                folder,
                links=parse_links(arguments.link),
                capture=arguments.capture,
                plain=arguments.plain,
            )
            return run(ring, command, opens_api=arguments.open_api)
        except MdiqError as error:
            for line in str(error).splitlines():
                say(line)
            return error.exit_code
        except _Signalled as signalled:
            say("interrupted")
            return 128 + signalled.number


if __name__ == "__main__":
    sys.exit(main())
