"""Which layers go to which Stage: a given split is checked; without one, the split is even."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from mdiq.core.types import LayerRange
from mdiq.errors import PlanError


def check_split(split: Sequence[int], num_layers: int, *, min_first: int = 1) -> tuple[LayerRange, ...]:
    """Return the LayerRanges of Stages with ``split[i]`` layers each.

    Raises:
        PlanError: they do not cover the model exactly, or a Stage has no layer, or the first too few.
    """
    where = f"--layers {','.join(map(str, split))}"
    if not split or min(split) < 1:
        raise PlanError(f"{where}: every node needs at least 1 layer; write for example {_example(num_layers)}")
    if split[0] < min_first:
        raise PlanError(
            f"{where}: {min_first} layers are to stay on the starter (min_starter_layers), and it has {split[0]}; "
            "give it more, or ask for less"
        )
    total = sum(split)
    if total != num_layers:
        change = f"take {total - num_layers} away" if total > num_layers else f"add {num_layers - total}"
        raise PlanError(f"{where}: these cover {total} layers and the model has {num_layers}; {change}")
    return _ranges(split)


def split_layers(
    num_layers: int, num_nodes: int, head_layers: float = 0.0, *, min_first: int = 1
) -> tuple[LayerRange, ...]:
    """Return LayerRanges that give every Stage the same work, on Nodes of one kind.

    head_layers: the head's cost, in Layers; it is charged to the Starter, which still has at least one Layer.
    min_first: Layers that the Starter has at least. The other Stages differ by at most one Layer, and the later ones
    get the remainder.

    Raises:
        PlanError: there are more nodes than layers, or no nodes; or too few layers are left for the other nodes.
    """
    if not 1 <= num_nodes <= num_layers:
        raise PlanError(
            f"--nodes {num_nodes}: the model has {num_layers} layers and every node needs one; use 1 to {num_layers}"
        )
    if min_first + num_nodes - 1 > num_layers:
        raise PlanError(
            f"min_starter_layers: {min_first} layers on the starter leave {max(num_layers - min_first, 0)} of "
            f"{num_layers} for {num_nodes - 1} other nodes, and each needs one; write "
            f"{num_layers - num_nodes + 1} or less"
        )
    if num_nodes == 1:
        return _ranges([num_layers])
    fair = round((num_layers + head_layers) / num_nodes - head_layers)
    # Never more than an even share: the remainder goes to the later Stages.
    first = max(min(fair, num_layers // num_nodes), min_first)
    return _ranges([first, *_even(num_layers - first, num_nodes - 1)])


def _even(num_layers: int, num_nodes: int) -> list[int]:
    least, left_over = divmod(num_layers, num_nodes)
    return [least + (i >= num_nodes - left_over) for i in range(num_nodes)]


def _ranges(split: Sequence[int]) -> tuple[LayerRange, ...]:
    return tuple(LayerRange(start, stop) for start, stop in pairwise(accumulate(split, initial=0)))


def _example(num_layers: int) -> str:
    return ",".join(map(str, _even(num_layers, min(2, num_layers))))
