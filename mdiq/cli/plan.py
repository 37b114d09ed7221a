"""`mdiq plan`: what the planner makes of a topology, as a table that one can argue with."""

import json
from dataclasses import asdict
from pathlib import Path

import typer

from mdiq.cli.planned import read_profiles
from mdiq.config.load import load_topology
from mdiq.core.types import LayerRange
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
    nodes = loaded.topology.nodes
    profiles = read_profiles(loaded)
    ordered = sorted(nodes, key=lambda node: not node.is_starter)
    names = [node.name for node in ordered if not node.spare]
    if profiles is None or profiles.unknown(names):
        missing = ", ".join(profiles.unknown(names) if profiles else names)
        raise ConfigError(
            f"{file}: nothing is known of {missing} yet: nodes measure themselves when a ring is formed; run "
            f"mdiq run --topology {file} Hello on the Starter once, with mdiq node on the others"
        )
    limits = {node.name: node.memory_bytes for node in ordered}
    found = profiles.of(names, limits)
    assert found is not None  # all are known
    goal = Goal(objective, 1 if objective is Objective.LATENCY else users)
    by_hand = [node.layers for node in ordered if not node.spare]
    if all(isinstance(layers, LayerRange) for layers in by_hand):
        split = tuple(len(layers) for layers in by_hand if layers is not None)
        typer.echo(f"by hand {','.join(map(str, split))}: ", nl=False, err=as_json)
        rate = plan_split(profiles.model, found, profiles.links, goal, split).value
        typer.echo(f"{rate:.1f} tokens/s predicted; the planner's own way follows", err=as_json)
    explanation = explain(profiles.model, found, profiles.links, goal)
    if as_json:
        typer.echo(json.dumps(asdict(explanation), default=str))
    else:
        typer.echo(render(explanation, with_more=with_more), nl=False)
    return 0
