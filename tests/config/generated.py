"""Files that are made of the models: `python -m tests.config.generated` writes them, and a test compares.

The schema and the tables of configs/README.md follow the code. What broken topologies are told is golden: look at the
difference before it is committed.
"""

import json
import re
from pathlib import Path
from typing import Any

from mdiq.config.load import check_file
from mdiq.config.schema import SCHEMA_FILE, schema_text, topology_schema, values_text

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "configs"
BROKEN = sorted((ROOT / "tests" / "golden" / "topology").glob("*.yaml"))

_TABLES = re.compile(r"(?<=<!-- keys -->\n).*?(?=<!-- end of keys -->)", re.DOTALL)

_SECTIONS = (
    ("The file itself", "Topology"),
    ("`model`", "ModelChoice"),
    ("`nodes`: each of them", "Node"),
    ("`nodes.noise`", "Noise"),
    ("`links`", "Links"),
    ("`links.hops`: each of them", "HopWire"),
    ("`security`", "Security"),
    ("`api`", "Api"),
    ("`ring`", "RingWishes"),
)


def key_tables() -> str:
    """Return every key with its values, default and meaning, as Markdown."""
    schema = topology_schema()
    parts = []
    for title, name in _SECTIONS:
        section = schema if name == "Topology" else schema["$defs"][name]
        rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
        for key, value in section["properties"].items():
            default = "required" if key in section.get("required", ()) else _default(value)
            meaning = value["description"].replace("|", "\\|")
            rows.append(f"| `{key}` | {values_text(value)} | {default} | {meaning} |")
        parts.append(f"### {title}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _default(value: dict[str, Any]) -> str:
    default = value["default"]
    if isinstance(default, dict):
        return "see below"
    if default == []:
        return "none"
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def readme_with_tables(text: str) -> str:
    """Return configs/README.md with the tables of today."""
    changed, count = _TABLES.subn(lambda _: f"\n{key_tables()}\n", text)
    assert count == 1, "configs/README.md: the marks around the tables are missing"
    return changed


def told(file: Path) -> str:
    """Return what an operator is told of a file, without its folder."""
    report = check_file(file)
    lines = [finding.render(file.name) for finding in report.errors]
    lines += [f"warning: {finding.render(file.name)}" for finding in report.warnings]
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    (CONFIGS / SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")
    readme = CONFIGS / "README.md"
    readme.write_text(readme_with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
    for file in BROKEN:
        file.with_suffix(".txt").write_text(told(file), encoding="utf-8")


if __name__ == "__main__":
    main()
