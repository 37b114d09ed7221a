"""`mdiq plan`: what the planner makes of a topology, as a table that one can argue with."""

import json
from dataclasses import asdict
from pathlib import Path

import typer

from mdiq.cli.planned import read_profiles
from mdiq.config.load import load_topology
from mdiq.errors import ConfigError
from mdiq.plan.explain import explain, render
from mdiq.plan.partition import Goal, Objective
from mdiq.plan.plan import plan_split


def plan(file: Path, *, objective: Objective, users: int, with_more: bool, as_json: bool) -> int:
    """Print the plan; return the exit code.

    Raises:
        ConfigError: nothing has been measured yet.
        PlanError: the model does not fit.
    """
    loaded = load_topology(file)
    nodes = loaded.topology.ring_nodes
    profiles = read_profiles(loaded)
    names = [node.name for node in nodes]
    if profiles is None or profiles.unknown(names):
        missing = ", ".join(profiles.unknown(names) if profiles else names)
        raise ConfigError(
            f"{file}: nothing is known of {missing} yet: nodes measure themselves when a ring is formed; run "
            f"mdiq run --topology {file} Hello on the Starter once, with mdiq node on the others"
        )
    found = profiles.of(names, {node.name: node.memory_bytes for node in nodes})
    assert found is not None  # all are known
    goal = Goal(objective, 1 if objective is Objective.LATENCY else users)
    split = tuple(len(node.layers) for node in nodes if node.layers is not None)
    if split:  # by hand for all nodes, or for none
        typer.echo(f"by hand {','.join(map(str, split))}: ", nl=False, err=as_json)
        rate = plan_split(profiles.model, found, profiles.links, goal, split).value
        typer.echo(f"{rate:.1f} tokens/s predicted; the planner's own way follows", err=as_json)
    explanation = explain(profiles.model, found, profiles.links, goal)
    if as_json:
        typer.echo(json.dumps(asdict(explanation), default=str))
    else:
        typer.echo(render(explanation, with_more=with_more), nl=False)
    return 0
