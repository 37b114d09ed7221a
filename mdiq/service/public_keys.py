"""The public keys of a topology's nodes: where in its text they belong, and the text with new ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from mdiq.cache import write_whole
from mdiq.errors import ConfigError
from mdiq.transport.keys import is_public_key, key_file, public_of, read_private

KEYS_FOLDER = "keys"  # unless security.keys says otherwise
MAX_BYTES = 4 * 2**20  # a topology of 64 nodes has some kilobytes


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """What the topology says of a Node's key, and where in its text the key belongs.

    start, stop: the characters that the quoted key replaces; the same where it has to be inserted.
    before, after: what stands around the quoted key there.
    """

    name: str
    line: int
    public_key: str | None
    start: int
    stop: int
    before: str
    after: str = ""


def read_entries(file: Path, text: str) -> tuple[Path, list[NodeEntry]]:
    """Return the folder of the private keys and the Nodes' entries, in the order of the file.

    Raises:
        ConfigError: not YAML, no nodes, or a node without a usable name or key.
    """
    top = _compose(file, text)
    if not isinstance(top, yaml.MappingNode):
        raise ConfigError(f"{file}:1: not a topology; it needs a list nodes:")
    nodes = _value(top, "nodes")
    if not isinstance(nodes, yaml.SequenceNode) or not nodes.value:
        raise ConfigError(f"{file}:{_line(nodes or top)} nodes: a list of nodes must stand here; see mdiq init")
    security = _value(top, "security")
    folder = _value(security, "keys") if isinstance(security, yaml.MappingNode) else None
    if folder is not None and not isinstance(folder, yaml.ScalarNode):
        raise ConfigError(f"{file}:{_line(folder)} security.keys: write the folder of the private keys")
    entries: list[NodeEntry] = []
    for i, node in enumerate(nodes.value):
        entry = _entry(file, text, i, node)
        if (same := next((other for other in entries if other.name == entry.name), None)) is not None:
            raise ConfigError(
                f"{file}:{entry.line} nodes[{i}].name: line {same.line} has {entry.name!r} too; rename one"
            )
        entries.append(entry)
    return file.parent / (folder.value if folder is not None and folder.value else KEYS_FOLDER), entries


def with_public_keys(file: Path, text: str, entries: Sequence[NodeEntry], public: Mapping[str, str]) -> str:
    """Return the text with the entries' public keys in it, and all else as it was.

    Raises:
        ConfigError: the text is written in a way that this cannot edit.
    """
    for entry in sorted(entries, key=lambda entry: entry.start, reverse=True):
        quoted = f'{entry.before}"{public[entry.name]}"{entry.after}'
        text = text[: entry.start] + quoted + text[entry.stop :]
    # Look at the outcome as any reader will: YAML has more ways to write a mapping than the rules above know.
    _, now = read_entries(file, text)
    keys = {entry.name: entry.public_key for entry in now}
    for entry in entries:
        if keys.get(entry.name) != public[entry.name]:
            raise ConfigError(
                f"{file}:{entry.line} {entry.name}: its entry is written in a way that mdiq keys cannot edit; "
                'give it a line public_key: "" by hand, and run mdiq keys again'
            )
    return text


def _entry(file: Path, text: str, i: int, node: yaml.Node) -> NodeEntry:
    where = f"{file}:{_line(node)} nodes[{i}]"
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{where}: a mapping with name: must stand here; see mdiq init")
    name_key, name = _pair(node, "name")
    if name_key is None or not isinstance(name, yaml.ScalarNode):
        raise ConfigError(f"{where}: it has no name; add name: with a-z, 0-9 and -")
    key_file(Path(), name.value)  # refuses what is not a name
    line = _line(name_key)
    key_key, key = _pair(node, "public_key")
    if key_key is not None and key is not None:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f'{file}:{_line(key_key)} {name.value}.public_key: write public_key: ""')
        is_missing = not key.value or key.tag == "tag:yaml.org,2002:null"
        if not is_missing and not is_public_key(key.value):
            raise ConfigError(
                f"{file}:{_line(key_key)} {name.value}.public_key: not a key of 40 characters; "
                f"empty it, or make a new one with --rotate {name.value}"
            )
        start, stop = key.start_mark.index, key.end_mark.index
        _check_place(file, name.value, key_key, key)
        before = " " if start and text[start - 1] == ":" else ""
        return NodeEntry(name.value, line, None if is_missing else key.value, start, stop, before)
    _check_place(file, name.value, name_key, name)
    if node.flow_style:
        place = name.end_mark.index
        return NodeEntry(name.value, line, None, place, place, ", public_key: ")
    # A line of its own after that of the name, indented like it.
    place = text.find("\n", name.end_mark.index) + 1
    indentation = " " * name_key.start_mark.column
    if not place:
        return NodeEntry(name.value, line, None, len(text), len(text), f"\n{indentation}public_key: ")
    end = "\r\n" if text.endswith("\r\n", 0, place) else "\n"
    return NodeEntry(name.value, line, None, place, place, f"{indentation}public_key: ", end)


def _check_place(file: Path, name: str, key: yaml.Node, value: yaml.ScalarNode) -> None:
    """Refuse a value that does not stand on the line of its key, after it: an alias, a block of text."""
    lines = {key.start_mark.line, value.start_mark.line, value.end_mark.line}
    if len(lines) > 1 or value.start_mark.index < key.end_mark.index:
        raise ConfigError(f"{file}:{_line(key)} {name}.{key.value}: write it out on one line, without alias or block")


def check_private_key(file: Path, folder: Path, entry: NodeEntry) -> None:
    """Refuse a private key that is unsafe, or not the public key's. It may be missing: then the device alone has it."""
    path = key_file(folder, entry.name)
    if not path.exists():
        return
    public = public_of(read_private(path))
    if entry.public_key not in (None, public):
        raise ConfigError(
            f"{file}:{entry.line} {entry.name}.public_key: {path} belongs to another one; "
            f"bring the right file, or make a new pair with --rotate {entry.name}"
        )


def _compose(file: Path, text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{file}:{line}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}: not YAML: {str(error).splitlines()[0]}") from None


def _pair(node: yaml.MappingNode, key: str) -> tuple[yaml.Node | None, yaml.Node | None]:
    """Return the first key of that name and its value; None if there is none."""
    found = ((k, v) for k, v in node.value if isinstance(k, yaml.ScalarNode) and k.value == key)
    return next(found, (None, None))


def _value(node: yaml.MappingNode, key: str) -> yaml.Node | None:
    return _pair(node, key)[1]


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line
    return line + 1


def read_text(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file}: cannot read it: {error.strerror}; give the topology's file") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{file}: over {MAX_BYTES >> 20} MiB; this is no topology")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8; save it as UTF-8") from None


def write_text(file: Path, text: str) -> None:
    """Replace the file whole or not at all, with the mode and, where permitted, the owner that it had."""
    target = file.resolve()  # a link stays a link
    try:
        write_whole(target, text.encode(), like=target.stat())
    except OSError as error:
        raise ConfigError(f"{file}: cannot write it: {error.strerror}; the keys are made: run this again") from None
