"""The schema and the tables of configs/README.md are those of the models, and agree with what is loaded."""

import re
from pathlib import Path

import pytest
import yaml

from mdiq.config.load import check_bytes
from mdiq.config.messages import SECTIONS
from mdiq.config.schema import SCHEMA_FILE, SCHEMA_LINE, schema_text, topology_schema
from tests.config.generated import CONFIGS, key_tables, readme_with_tables

UPDATE = "run `python -m tests.config.generated` and commit what it writes"
EXAMPLES = sorted(CONFIGS.glob("*.yaml"))


def test_the_schema_is_that_of_the_models() -> None:
    assert (CONFIGS / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text(), UPDATE


def test_the_readme_has_every_key_of_today() -> None:
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert text == readme_with_tables(text), UPDATE
    for model in SECTIONS.values():
        for name, field in model.model_fields.items():
            assert f"| `{field.alias or name}` |" in key_tables()


def test_the_readme_lists_every_example() -> None:
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\S+\.yaml)`", text, re.MULTILINE)) == {file.name for file in EXAMPLES}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_names_the_schema_first(file: Path) -> None:
    assert file.read_text(encoding="utf-8").startswith(f"{SCHEMA_LINE}\n")


def test_every_key_is_described_and_has_a_default_or_is_required() -> None:
    schema = topology_schema()
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        for key, value in section["properties"].items():
            assert value["description"].endswith("."), key
            assert ("default" in value) != (key in section.get("required", ())), key


def test_the_default_that_is_shown_is_the_one_that_holds() -> None:
    """A file that writes out every default is loaded as one that writes none."""
    schema = topology_schema()
    sections = {
        key: {
            name: value["default"] for name, value in schema["$defs"][model]["properties"].items() if "default" in value
        }
        for key, model in (
            ("model", "ModelChoice"),
            ("node", "Node"),
            ("links", "Links"),
            ("security", "Security"),
            ("api", "Api"),
            ("ring", "RingWishes"),
        )
    }
    starter = {"name": "a", "role": "starter", "address": "127.0.0.1"}
    short = {"version": 1, "model": {"path": "m"}, "nodes": [starter]}
    full = {
        "version": 1,
        "model": sections["model"] | {"path": "m"},
        "nodes": [sections["node"] | starter],
        "journal": "auto",
        **{key: sections[key] for key in ("links", "security", "api", "ring")},
    }
    loaded = [check_bytes(yaml.safe_dump(value).encode(), Path("t.yaml")).topology for value in (short, full)]
    assert loaded[0] is not None
    assert loaded[0] == loaded[1]
