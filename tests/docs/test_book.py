"""The pages that users read: links lead somewhere, commands work, and what is generated is of today."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mdiq.cli.main import app
from tests.docs.book import (
    PAGES,
    README,
    ROOT,
    anchors_of,
    commands_of,
    links_of,
    name_of,
    named_commands_of,
    text_of,
)
from tests.docs.figures import KEPT, block_of, figures
from tests.docs.generated import PAGE, command_line_page

RUN_HERE = re.compile(r"mdiq (init|keys|api-key|check|cache) |tar ")
RUN_WITH_A_MODEL = re.compile(r"mdiq run (?!--topology)|python - <<")
"""tests/integration/test_book.py runs these, with a tiny model."""

RING = (
    "integration/test_topology_ring.py::test_three_nodes_answer_as_three_local_ones_and_a_second_run_transfers_nothing"
)
DRAIN = "integration/test_serve.py::test_a_drained_node_leaves_the_others_its_layers_and_comes_back"
ROUTER = "route/test_service.py::test_an_operator_sees_drains_and_reads_again_from_the_command_line"
PLAN = "cli/test_plan.py::test_mdiq_plan_says_what_to_do_first_and_then_shows_the_plan"
GOAL = "cli/test_plan.py::test_mdiq_plan_takes_goal_and_users_from_the_topology_unless_they_are_given"
SIMULATE = "cli/test_simulate.py::test_the_pages_commands_predict_rings"
MINE = "integration/test_simulate.py::test_a_machine_that_has_measured_itself_can_be_simulated"
LINKS = "integration/test_bench.py::test_two_nodes_are_measured_over_slow_links"
EVALUATION = "integration/test_evaluate.py::test_the_papers_tables_come_from_one_command"
REPORT = "integration/test_report.py::test_a_trial_of_two_nodes_becomes_a_report_in_both_languages"
RUN_ELSEWHERE = {
    "mdiq node topology.yaml --name": RING,
    "mdiq run --topology topology.yaml": RING,
    "mdiq serve topology.yaml": DRAIN,
    "mdiq status topology.yaml": DRAIN,
    "mdiq drain topology.yaml pi2": DRAIN,
    "mdiq reload topology.yaml": (
        "integration/test_serve.py::test_a_revoked_key_ends_its_connections_and_a_broken_file_changes_nothing"
    ),
    "curl http://127.0.0.1:8080/": "integration/test_serve.py::test_the_pages_requests_are_answered",
    "mdiq route routes.yaml": "integration/test_route.py::test_requests_are_answered_as_if_no_ring_had_been_killed",
    "mdiq status routes.yaml": ROUTER,
    "mdiq drain routes.yaml ring-a": ROUTER,
    "mdiq reload routes.yaml": ROUTER,
    "mdiq plan topology.yaml": PLAN,
    "mdiq plan topology.yaml --objective": GOAL,
    "mdiq plan topology.yaml --forget": "cli/test_plan.py::test_figures_are_forgotten_on_demand",
    "mdiq bench --nodes 1 --users 8 --temperature 0,1": "cli/test_bench.py::test_one_node_is_measured_in_this_process",
    "mdiq bench --nodes 1,2 --users": LINKS,
    "mdiq bench --shape tinyllama-1.1b --nodes 2 --users 8 --link none": LINKS,
    "mdiq bench --shape tinyllama-1.1b --nodes 1,2,3 --users-per-node 4 --cpu 0.5": (
        "integration/test_bench.py::test_nodes_run_under_a_quota_and_leave_nothing_behind"
    ),
    "mdiq evaluate": EVALUATION,
    "mdiq report": REPORT,
    "mdiq report --api": "integration/test_report.py::test_a_running_ring_is_measured_through_its_api",
    "mdiq simulate --devices": SIMULATE,
    "mdiq simulate --list": "cli/test_simulate.py::test_kinds_are_listed",
    "mdiq simulate --measure": MINE,
    "mdiq simulate --catalogue": MINE,
    "mdiq simulate --check": "integration/test_simulate.py::test_five_rings_are_measured_beside_their_predictions",
    "mdiq plan topology.yaml --min-starter-layers": "cli/test_plan.py::test_mdiq_plan_tells_what_trusted_layers_cost",
    "mdiq privacy --model smollm2-135m-instruct": (
        "integration/test_privacy.py::test_the_first_hop_tells_most_tokens_and_noise_hides_them"
    ),
    "mdiq perplexity": "integration/test_perplexity.py::test_packed_weights_keep_the_bounds",
}
"""Beginning of a command -> the test that runs it; the longest beginning counts.

Addresses, ports, models and sizes are the tests' own.
"""

NOT_RUN = {
    "python3 -m venv .venv && ": "it installs everything: .ci/run does so in a fresh clone, by the block of the tests",
    "mdiq bench --shape tinyllama-1.1b --bits 4 --users 1,8 --peer llama-cpp": (
        "llama-cpp-python compiles for minutes; bench/test_peer.py runs its program on a llama.cpp that pretends"
    ),
}
"""Beginning of a command -> why no test runs it."""

_COMMANDS = [
    (page, command) for page in PAGES if name_of(page) != "nodes/README.md" for command in commands_of(text_of(page))
]
"""Those of nodes/README.md are run by tests/devices, which keeps a list of its own."""


def _how(command: str) -> list[str]:
    known = (*RUN_ELSEWHERE, *NOT_RUN)
    beginnings = [beginning for beginning in known if command.startswith(beginning)]
    longest = max(map(len, beginnings), default=0)
    found = [beginning for beginning in beginnings if len(beginning) == longest]
    return found + [known.pattern for known in (RUN_HERE, RUN_WITH_A_MODEL) if known.match(command)]


def test_every_command_of_the_pages_is_run_by_a_test_or_said_not_to_be() -> None:
    ways = {command: _how(command) for _, command in _COMMANDS}
    assert len(ways) >= 35, "it reads too little"
    assert {command: way for command, way in ways.items() if len(way) != 1} == {}
    used = {way for found in ways.values() for way in found}
    assert {*RUN_ELSEWHERE, *NOT_RUN} - used == set(), "no page has them any more"


@pytest.mark.parametrize("test", sorted(set(RUN_ELSEWHERE.values())))
def test_the_test_that_runs_a_command_exists_and_has_its_words(test: str) -> None:
    file, _, name = test.partition("::")
    source = text_of(ROOT / "tests" / file)
    assert re.search(rf"^(async )?def {name}\(", source, re.MULTILINE)
    for beginning in (beginning for beginning, known in RUN_ELSEWHERE.items() if known == test):
        for word in re.findall(r"(?<=mdiq )(?!node)\w+|--(?!name)[a-z][a-z-]*", beginning):
            assert f'"{word}"' in source, f"{file} does not run {word}"


@pytest.mark.parametrize("command", sorted({command for _, command in _COMMANDS if command.startswith("mdiq ")}))
def test_mdiq_takes_the_command(command: str) -> None:
    name, *arguments = shlex.split(command.partition(" > ")[0])
    taker = typer.main.get_command(app)
    while hasattr(taker, "commands"):
        name, *arguments = arguments
        taker = taker.commands[name]
    taker.make_context(name, arguments)


def _is_command(words: list[str]) -> bool:
    """Tell whether mdiq has a command and the options that come with it; values and ellipses count for nothing."""
    taker = typer.main.get_command(app)
    while hasattr(taker, "commands") and words and not words[0].startswith("--"):
        name, *words = words
        if name not in taker.commands:
            return False
        taker = taker.commands[name]
    options = {option for parameter in taker.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return {word.partition("=")[0] for word in words if word.startswith("--")} <= options | {"--help"}


@pytest.mark.parametrize(
    "sentence", ["run `mdiq reprot`", "`mdiq plan topology.yaml\n--explian` says", "`mdiq --fast`"]
)
def test_a_command_that_mdiq_lacks_is_found(sentence: str) -> None:
    [words] = named_commands_of(sentence)
    assert not _is_command(words)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_commands_that_sentences_name_exist(page: Path) -> None:
    assert [words for words in named_commands_of(text_of(page)) if not _is_command(words)] == []


def test_what_is_said_of_other_systems_has_a_source() -> None:
    text = text_of(ROOT / "docs" / "comparison.md")
    sources = dict(re.findall(r"^\[([\w-]+)\]: (https://\S+)$", text, re.MULTILINE))
    assert set(re.findall(r"\]\[([\w-]+)\]", text)) == set(sources)
    rows = [
        row.strip("|").split("|")
        for row in re.findall(r"^\| .*\|$", text.partition("## What is split")[2], re.MULTILINE)
    ]
    cells = [
        (row[0].strip(), cell.strip()) for row in rows for cell in row[1:] if row[0].strip() not in ("system", "mdiq")
    ]
    assert len(cells) > 100, "it reads too little"
    assert [cell for cell in cells if not re.search(r"\]\[[\w-]+\]|^not found", cell[1])] == []


def test_the_summaries_say_the_same_in_both_languages() -> None:
    english, japanese = (text_of(ROOT / "docs" / f"summary{tongue}.md") for tongue in ("", "-ja"))
    pages = {link for link in links_of(english) if not link.startswith("summary")}
    assert pages == {link for link in links_of(japanese) if not link.startswith("summary")}
    for pattern in (r"^## |^\| |^- ", r"`mdiq \w+`"):
        counts = [
            len(re.findall(pattern, re.sub(r"`mdiq\s+", "`mdiq ", text), re.MULTILINE)) for text in (english, japanese)
        ]
        assert counts[0] == counts[1] > 0
    japanese = japanese.replace("100万", "")  # a million
    figures = [set(re.findall(r"\d[\d,.]*\d", text)) for text in (english, japanese)]
    assert figures[0] == figures[1]


def test_the_figures_of_the_front_page_are_those_that_its_commands_wrote() -> None:
    report, bench = (json.loads(path.read_text(encoding="utf-8")) for path in KEPT.values())
    assert block_of(README.read_text(encoding="utf-8")) == figures(report, bench)
    assert report["receipt"]["commit"] and not report["receipt"]["is_changed"]


@pytest.mark.parametrize("page", sorted({page for page, command in _COMMANDS if RUN_HERE.match(command)}), ids=name_of)
def test_the_commands_about_files_work_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each device is a folder, in which `ssh` runs what it is given."""
    here, programs = tmp_path / "desk", tmp_path / "bin"
    for folder in (here, programs):
        folder.mkdir()
    ssh = programs / "ssh"
    ssh.write_text('#!/bin/sh\nmkdir -p "$HOME/$1" && cd "$HOME/$1" && shift && exec "$@"\n')
    ssh.chmod(0o755)
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    monkeypatch.chdir(here)
    monkeypatch.setenv("MDIQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "packed" / "0123456789abcdef-18ec-int8-v5").mkdir(parents=True)
    first = commands_of(text_of(README))[2]
    for command in [first, *(command for its, command in _COMMANDS if its == page and RUN_HERE.match(command))]:
        if not command.startswith("mdiq "):
            subprocess.run(["bash", "-euo", "pipefail", "-c", command], env=environment, check=True, timeout=20)
            continue
        if command.startswith("mdiq init "):
            for file in here.iterdir():
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            shutil.copy(ROOT / "configs" / "routes" / "two-rings-and-a-copy.yaml", here / "routes.yaml")
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, f"{command}: {done.output} {done.exception}"
    for there in tmp_path.glob("pi@*"):
        [key] = (there / "keys").glob("*.key")
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        check = CliRunner().invoke(app, ["check", str(there / "topology.yaml")])
        assert check.exit_code == 0, check.output


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    wrong = []
    for link in links_of(text_of(page)):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors_of(text_of(file))):
            wrong.append(link)
    assert wrong == []


def test_the_front_page_is_short() -> None:
    assert len(text_of(README).splitlines()) <= 150


def test_the_page_of_the_command_line_is_of_today() -> None:
    assert text_of(PAGE) == command_line_page(), "run `python -m tests.docs.generated` and commit what it writes"
