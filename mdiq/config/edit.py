"""Public keys into a topology file that people wrote: only those characters change, comments and order stay."""

from collections.abc import Mapping

import yaml


def with_public_keys(text: str, public_keys: Mapping[str, str]) -> str:
    """Return the text of a topology file with ``public_keys`` (node's name -> key) in it.

    text: a file that load_topology accepts, at least without keys. Nodes that ``public_keys`` does not name stay as
    they are. A key replaces the one that is there.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode), "the file was loaded before"
    changes: list[tuple[int, int, str]] = []  # where it begins and ends, and what stands there then
    for key, nodes in root.value:
        if key.value == "nodes":
            for node in nodes.value:
                changes += _changes(text, node, public_keys)
    # From the end, so that the places before it stay true. A node may stand there twice by an alias.
    for start, end, new in sorted(set(changes), reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _changes(text: str, node: yaml.MappingNode, public_keys: Mapping[str, str]) -> list[tuple[int, int, str]]:
    entries = {key.value: (key, value) for key, value in node.value}
    name_key, name = entries["name"]
    if name.value not in public_keys:
        return []
    quoted = f'"{public_keys[name.value]}"'
    if "public_key" in entries:
        _, value = entries["public_key"]
        start, end = value.start_mark.index, value.end_mark.index
        return [(start, end, quoted if end > start else f" {quoted}")]
    if node.flow_style:
        return [(name.end_mark.index,) * 2 + (f", public_key: {quoted}",)]
    line_end = text.find("\n", name.end_mark.index)
    line_end = len(text) if line_end < 0 else line_end
    place = line_end - 1 if text[line_end - 1] == "\r" else line_end
    newline = "\r\n" if "\r\n" in text else "\n"
    return [(place, place, f"{newline}{' ' * name_key.start_mark.column}public_key: {quoted}")]
