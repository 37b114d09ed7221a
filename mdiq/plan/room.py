"""Check whether the model fits on the Nodes, and advise when it does not."""

from collections.abc import Sequence

from mdiq.errors import PlanError
from mdiq.plan.partition import Goal
from mdiq.plan.profile import ModelShape, NodeProfile

_MIB = 1 << 20
_GIB = 1 << 30
_STEP_BYTES = 256 * _MIB  # memory of a device to look for
_KV_STEP = 32  # of advised KV capacities: tokens of a KvBlock


def format_bytes(num_bytes: int) -> str:
    """Return "812 MiB" or "1.5 GiB"."""
    return f"{num_bytes / _GIB:.1f} GiB" if abs(num_bytes) >= _GIB else f"{num_bytes / _MIB:.0f} MiB"


def count_layers(num_layers: int) -> str:
    """Return "1 layer" or "8 layers"."""
    return "1 layer" if num_layers == 1 else f"{num_layers} layers"


def check_room(model: ModelShape, nodes: Sequence[NodeProfile], goal: Goal, spares: Sequence[NodeProfile] = ()) -> None:
    """Check that the Nodes, the Starter first, can hold the model with the goal's KV capacity.

    Raises:
        PlanError: they cannot; it says what each can hold, what is missing, and what would help.
    """
    starter = nodes[0]
    layer_bytes = model.layer_bytes + goal.kv_tokens * model.kv_bytes
    kv = f"{goal.kv_tokens:,} tokens of KV cache"
    starter_bytes = starter.memory_bytes - starter.room_bytes(model, is_starter=True) + layer_bytes
    if starter_bytes > starter.memory_bytes:
        raise PlanError(
            f"{starter.name}: as the Starter it needs {format_bytes(starter_bytes)}, of which embedding and head take "
            f"{format_bytes(model.ends_bytes)} and one layer with {kv} {format_bytes(layer_bytes)}, and it may take "
            f"{format_bytes(starter.memory_bytes)}; raise its memory or make a larger node the starter"
        )
    _check_trusted(model, starter, goal)
    missing = model.num_layers - sum(held_layers(model, nodes, goal.kv_tokens))
    if missing > 0:
        held = ", ".join(
            f"{node.name} {layers} (of {format_bytes(node.memory_bytes)})"
            for node, layers in zip(nodes, held_layers(model, nodes, goal.kv_tokens), strict=True)
        )
        raise PlanError(
            f"plan: {model.num_layers} layers of {format_bytes(layer_bytes)} each with {kv} do not fit; the nodes hold "
            f"{held}; {count_layers(missing)} or {format_bytes(missing * layer_bytes)} too many: "
            + ", or ".join(_advice(model, nodes, goal, spares, missing * layer_bytes))
        )


def _check_trusted(model: ModelShape, starter: NodeProfile, goal: Goal) -> None:
    """Check that the Starter can hold the Layers that are to stay there."""
    wanted = goal.min_starter_layers
    if wanted > model.num_layers:
        raise PlanError(
            f"min_starter_layers: {wanted} layers are to stay on {starter.name}, and the model has "
            f"{model.num_layers}; write {model.num_layers} or less"
        )
    held = starter.max_layers(model, goal.kv_tokens, is_starter=True)
    if held < wanted:
        kv = f"{goal.kv_tokens:,} tokens of KV cache"
        missing_bytes = (wanted - held) * (model.layer_bytes + goal.kv_tokens * model.kv_bytes)
        smaller = [
            each.weights
            for each in model.smaller
            if starter.max_layers(each, goal.kv_tokens, is_starter=True) >= wanted
        ]
        raise PlanError(
            f"min_starter_layers: {wanted} layers with {kv} are to stay on {starter.name}, and its "
            f"{format_bytes(starter.memory_bytes)} hold {held}; give it {format_bytes(missing_bytes)} more, or make a "
            f"larger node the starter, or write min_starter_layers: {held}"
            + "".join(f", or use weights {weights}" for weights in smaller)
        )


def held_layers(model: ModelShape, nodes: Sequence[NodeProfile], kv_tokens: int) -> list[int]:
    """Return how many Layers each Node can hold, the Starter first."""
    return [node.max_layers(model, kv_tokens, is_starter=not i) for i, node in enumerate(nodes)]


def min_nodes(model: ModelShape, nodes: Sequence[NodeProfile], kv_tokens: int) -> int:
    """Return the minimum number of Nodes, the Starter included, if all together can hold the model."""
    starter, *others = held_layers(model, nodes, kv_tokens)
    num_nodes, held = 1, starter
    for layers in sorted(others, reverse=True):
        if held >= model.num_layers:
            break
        num_nodes, held = num_nodes + 1, held + layers
    return num_nodes


def _advice(
    model: ModelShape, nodes: Sequence[NodeProfile], goal: Goal, spares: Sequence[NodeProfile], missing_bytes: int
) -> list[str]:
    device_bytes = missing_bytes + max(node.process_bytes for node in nodes) + model.activation_bytes
    steps = -(-device_bytes // _STEP_BYTES)
    advice = [f"add one device that gives {steps * _STEP_BYTES / _GIB:g} GiB"]
    if spares and _fits(model, [*nodes, *spares], goal.kv_tokens):
        advice.append(f"let {', '.join(spare.name for spare in spares)} take part (spare: false)")
    advice += [f"weights {smaller.weights}" for smaller in model.smaller if _fits(smaller, nodes, goal.kv_tokens)]
    least, most = 0, goal.kv_tokens // _KV_STEP + 1  # steps of KV cache: with the least of them the model fits
    while most - least > 1:
        fitting = (least + most) // 2
        least, most = (fitting, most) if _fits(model, nodes, fitting * _KV_STEP) else (least, fitting)
    if least:
        advice.append(f"take {least * _KV_STEP:,} tokens of KV cache")
    return advice


def _fits(model: ModelShape, nodes: Sequence[NodeProfile], kv_tokens: int) -> bool:
    held = held_layers(model, nodes, kv_tokens)
    return held[0] > 0 and sum(held) >= model.num_layers
