"""`mdiq plan`: what the planner makes of a topology, as a table that one can argue with."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import typer

from mdiq.config.load import load_topology
from mdiq.errors import ConfigError
from mdiq.plan.drift import SHOWN, load_text
from mdiq.plan.explain import explain, render
from mdiq.plan.layouts import as_value, layouts
from mdiq.plan.layouts import text as layouts_text
from mdiq.plan.partition import Objective
from mdiq.plan.plan import plan_split
from mdiq.service.planned import goal_of, profiles_path, read_profiles


def forget(file: Path) -> int:
    """Have all nodes measured before the next ring; return the exit code.

    Raises:
        ConfigError: the topology cannot be used, or the figures are another user's.
    """
    path = profiles_path(load_topology(file))
    try:
        path.unlink()
    except FileNotFoundError:
        typer.echo("nothing was kept of these nodes")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; run this as the user whose service keeps it") from None
    else:
        typer.echo("forgotten: the nodes measure themselves before the next ring")
    return 0


def plan(
    file: Path,
    *,
    objective: Objective | None,
    users: int | None,
    min_starter_layers: int | None = None,
    with_more: bool,
    as_json: bool,
) -> int:
    """Print the plan; return the exit code.

    objective, users, min_starter_layers: as the topology says, where they are None.

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
    goal = goal_of(loaded.topology, objective, users)
    if min_starter_layers is not None:
        goal = replace(goal, min_starter_layers=min_starter_layers)
    split = tuple(len(node.layers) for node in nodes if node.layers is not None)
    if split:  # by hand for all nodes, or for none
        typer.echo(f"by hand {','.join(map(str, split))}: ", nl=False, err=as_json)
        rate = plan_split(profiles.model, found, profiles.links, goal, split).value
        typer.echo(f"{rate:.1f} tokens/s predicted; the planner's own split follows", err=as_json)
    explanation = explain(profiles.model, found, profiles.links, goal)
    factors = {name: factor for name in names if (factor := profiles.nodes[name].under_load) is not None}
    usable = [node for i, node in enumerate(found) if not (i and node.is_spare)]
    trusts_all = goal.min_starter_layers == 1 and all(node.noise is None for node in nodes)
    divided = layouts(profiles.model, usable, profiles.links, goal) if with_more and trusts_all else []
    if as_json:
        more = {"layouts": [as_value(layout) for layout in divided]} if with_more else {}
        typer.echo(json.dumps({**asdict(explanation), "under_load": factors, **more}, default=str))
    else:
        typer.echo(render(explanation, with_more=with_more), nl=False)
        if text := layouts_text(divided, explanation.plan):
            typer.echo(f"\n{text}", nl=False)
        if with_more and not trusts_all and len(usable) > 1:
            typer.echo("\nseveral rings or copies are not compared: each has a starter, which sees whole prompts")
        if text := load_text(factors, SHOWN):
            typer.echo(f"under load   {text} as measured alone; the plan counts on it")
    return 0
