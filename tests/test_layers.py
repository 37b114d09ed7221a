"""Imports go downward only, and some libraries stay out of some rooms. Read with ``ast``: nothing is imported."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mdiq"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((PACKAGE.parent / "nodes").glob("*.py"))

MAY_USE = {
    "errors": set(),
    "cache": {"cache", "errors"},
    "core": {"core", "errors"},
    "plan": {"plan", "core", "errors"},
    "config": {"config", "plan", "core", "errors"},
    "engine": {"engine", "plan", "core", "cache", "errors"},
    "telemetry": {"telemetry", "plan", "core", "errors"},
    "transport": {"transport", "telemetry.trace", "plan", "core", "cache", "errors"},
    "control": {"control", "transport", "telemetry.trace", "plan", "core", "cache", "errors"},
    "runtime": {"runtime", "control", "engine", "transport", "telemetry", "plan", "core", "cache", "errors"},
    "api": {"api", "runtime", "transport.room", "core", "errors"},
    "service": {
        "service",
        "api",
        "config",
        "runtime",
        "engine",
        "transport.keys",
        "plan",
        "core",
        "cache",
        "errors",
    },
    "route": {"route", "api", "config", "runtime.admin", "runtime.lifecycle", "errors"},
    "testbed": {"testbed", "runtime.cpu_quota", "transport.keys", "config", "errors"},
    "bench": {"bench", "testbed", "runtime", "engine", "transport", "telemetry.logging", "core", "cache", "errors"},
    "report": {
        "report",
        "bench",
        "testbed",
        "config",
        "runtime",
        "engine",
        "transport",
        "plan",
        "core",
        "cache",
        "errors",
    },
    "nodes": {"cli", "config", "errors"},
    "cli": {
        "cli",
        "service",
        "route",
        "api",
        "bench",
        "report",
        "testbed",
        "config",
        "runtime",
        "control",
        "engine",
        "transport",
        "telemetry",
        "plan",
        "core",
        "cache",
        "errors",
    },
}
"""Room -> rooms or modules that it imports from. The package itself (its version) is everybody's."""

_PURE = {"asyncio", "zmq", "torch", "structlog", "time", "random", "threading", "socket", "pickle"}
MAY_NOT_USE = {
    "core": _PURE,
    "plan": _PURE,
    "config": {"asyncio", "zmq", "torch", "socket", "pickle"},
    "engine": {"zmq", "asyncio", "pickle"},
    "transport": {"torch", "pickle"},
    "control": {"torch", "pickle"},
    "api": {"torch", "zmq", "pickle"},
    "route": {"torch", "zmq", "pickle"},
}
EVERYWHERE = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}

ENGINE_MAY_USE: dict[str, set[str]] = {
    "formats": set(),
    "text": {"formats"},
    "kernels": {"formats"},
    "model": {"formats", "text", "kernels"},
}
"""Room of the engine -> other rooms of it that it imports from. Modules of the engine itself are everybody's."""


def _room(module: Path) -> str:
    """Return the room of a module: its folder, or its own name when it lies in the package itself."""
    inside = module.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def _imports(source: str) -> Iterator[str]:
    """Yield the dotted names that a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                assert level == 0, "imports are absolute"
                # `from mdiq import errors` names a room, not an attribute.
                yield from ([f"mdiq.{alias.name}" for alias in names] if module == "mdiq" else [module or ""])


def _wrong_imports(room: str, source: str) -> list[str]:
    """Return the imports that a module of this room may not have."""
    wrong: list[str] = []
    for name in _imports(source):
        top, _, inside = name.partition(".")
        if top == "mdiq":
            allowed = MAY_USE.get(room)
            if inside and not inside.startswith("__") and allowed is not None:
                if not any(inside == part or inside.startswith(part + ".") for part in allowed):
                    wrong.append(name)
        elif top in MAY_NOT_USE.get(room, set()) | EVERYWHERE:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_imports_go_downward_only(module: Path) -> None:
    assert _wrong_imports(_room(module), module.read_text(encoding="utf-8")) == []


def test_no_module_imports_itself_in_a_circle_not_even_for_types() -> None:
    names = {f"mdiq.{'.'.join(module.relative_to(PACKAGE).with_suffix('').parts)}": module for module in MODULES}
    imports = {name: {*_imports(module.read_text(encoding="utf-8"))} & names.keys() for name, module in names.items()}
    assert len([*graphlib.TopologicalSorter(imports).static_order()]) == len(MODULES)


@pytest.mark.parametrize("room", ENGINE_MAY_USE)
def test_imports_go_downward_within_the_engine(room: str) -> None:
    rooms = {path.name for path in (PACKAGE / "engine").iterdir() if (path / "__init__.py").exists()}
    assert rooms == ENGINE_MAY_USE.keys()
    forbidden = rooms - ENGINE_MAY_USE[room] - {room}
    for module in sorted((PACKAGE / "engine" / room).glob("*.py")):
        used = {name.split(".")[2] for name in _imports(module.read_text()) if name.startswith("mdiq.engine.")}
        assert not used & forbidden, f"{module.name} imports from {used & forbidden}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_operators_scripts_use_command_line_and_configuration_only(script: Path) -> None:
    assert _wrong_imports("nodes", script.read_text(encoding="utf-8")) == []


def test_only_benches_and_tests_use_equipment() -> None:
    rooms = {"mdiq.bench", "mdiq.testbed"}
    users = {
        str(module.relative_to(PACKAGE))
        for module in MODULES
        if _room(module) not in ("bench", "report", "testbed")
        and any(".".join(name.split(".")[:2]) in rooms for name in _imports(module.read_text(encoding="utf-8")))
    }
    assert users == {"cli/bench.py", "cli/evaluate.py", "cli/privacy.py", "cli/report.py", "cli/simulate.py"}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_only_the_command_line_prints(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    printed = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "print"]
    assert _room(module) == "cli" or not printed


def test_what_catches_every_error_is_at_the_edge_of_a_request_a_process_or_a_library_that_raises_anything() -> None:
    """A narrower type, or an ExitStack, does elsewhere; a loop that fails is named by its Supervisor."""
    broad: list[str] = []
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                if any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds):
                    broad.append(str(module.relative_to(PACKAGE)))
    assert sorted(broad) == [
        "api/door.py",  # one request
        "api/responses.py",  # one answer, which outlives its request
        "api/streams.py",  # one stream
        "bench/peer_llama_cpp.py",  # a process of another interpreter
        "engine/text/chat_template.py",  # a template can raise anything
        "engine/text/gguf_tokenizer.py",  # `tokenizers` raises plain Exceptions
        "runtime/admin.py",  # one question
        "runtime/head.py",  # rows of some requests
        "transport/curve.py",  # a gate that fails must say so in words
    ]


def test_every_room_has_its_place() -> None:
    rooms = {_room(module) for module in MODULES} - {"__init__", "__main__"}
    assert rooms <= MAY_USE.keys(), f"new rooms need a line in MAY_USE: {rooms - MAY_USE.keys()}"


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("core", "import time"),
        ("core", "def f():\n    from random import Random"),
        ("core", "from mdiq.plan.split import split_layers"),
        ("core", "from mdiq import plan"),
        ("plan", "from mdiq.config.topology import Topology"),
        ("config", "import socket"),
        ("engine", "import zmq.asyncio"),
        ("engine", "from mdiq.telemetry.trace import Span"),
        ("transport", "from mdiq.telemetry.metrics import Metric"),
        ("transport", "from mdiq.telemetry.traces import Span"),
        ("control", "import torch"),
        ("runtime", "from mdiq.cli.run import execute"),
        ("runtime", "from mdiq.bench.runner import Bench"),
        ("transport", "from mdiq.testbed.relay import Relay"),
        ("testbed", "from mdiq.runtime.ring_host import RingHost"),
        ("bench", "from mdiq.cli.main import app"),
        ("bench", "from mdiq.report.catalogue import Device"),
        ("report", "from mdiq.cli.main import app"),
        ("engine", "from mdiq.report.privacy import measure"),
        ("service", "from mdiq.cli.signals import run_service"),
        ("runtime", "from mdiq.service.topology_rings import TopologyRings"),
        ("api", "from mdiq.service.starter import TopologyService"),
        ("cli", "import pickle"),
        ("nodes", "from mdiq.runtime.lifecycle import Notifier"),
    ],
)
def test_a_wrong_import_is_noticed(room: str, source: str) -> None:
    assert _wrong_imports(room, source)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("core", "from mdiq.core.frame import Frame"),
        ("control", "from mdiq import errors\nimport mdiq"),
        ("transport", "from mdiq.telemetry.trace import Span"),
        ("runtime", "from mdiq import __version__\nimport time"),
    ],
)
def test_a_right_import_is_let_through(room: str, source: str) -> None:
    assert _wrong_imports(room, source) == []
