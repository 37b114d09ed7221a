"""The fixed splits of MDI-LLM, to compare with: Layers of the Starter and of each other Node.

From N_LAYERS_NODES in src/sub/config.py of github.com/davmacario/MDI-LLM, at commit 0258c84.
"""

_STARTER_LAYERS = {
    2: {12: 5, 22: 10, 24: 10, 32: 14, 36: 16, 48: 22},
    3: {12: 2, 22: 6, 24: 4, 32: 8, 36: 10, 48: 14},
}
"""Nodes -> Layers of the model -> Layers of the Starter; the other Nodes share the rest evenly."""


def mdi_split(num_layers: int, num_nodes: int) -> tuple[int, ...] | None:
    """Return MDI-LLM's split of a model over so many Nodes, or None where it has none."""
    starter = _STARTER_LAYERS.get(num_nodes, {}).get(num_layers)
    if starter is None:
        return None
    return (starter, *[(num_layers - starter) // (num_nodes - 1)] * (num_nodes - 1))
