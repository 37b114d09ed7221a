"""Measure this machine for the catalogue: `mdiq simulate --measure`.

The times are those that a Node measures of itself (engine/measure.py), of half of a model's Layers, as a Node of a ring
of two has them, and of one Layer, whose time tells what a forward costs beside its Layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mdiq.core.types import LayerRange, WeightSettings
from mdiq.engine.device import choose_device, cpu_name
from mdiq.engine.formats.checkpoint import open_checkpoint
from mdiq.engine.formats.quantize import chosen_format
from mdiq.engine.measure import SUSTAINED_S, measure_cost, measure_head
from mdiq.engine.memory import machine_free_bytes, return_free_memory, rss_bytes
from mdiq.engine.model_config import read_config
from mdiq.engine.runner import StageRunner
from mdiq.plan.micro_batches import Curve
from mdiq.report.catalogue import VERSION, Device, Figure, Mark, MeasuredLayers, Shape
from mdiq.report.simulate_files import held_of_file, shape_of
from mdiq.report.simulate_nodes import FLOP_PER_WEIGHT, Held

KV_TOKENS = 2_048
_MIB = 1 << 20
_MIN_S = 1e-6


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine as the catalogue has devices, and the model that it was measured with."""

    device: Device
    shape: Shape
    held: Held
    cpu: str
    exact: bool


def measure_machine(
    model: Path,
    name: str,
    *,
    weights: str,
    dtype: str,
    exact: bool,
    progress: Callable[[str], object] = lambda _: None,
) -> Machine:
    """Return what this machine measures of itself with a model.

    Raises:
        MdiqError: the model cannot be loaded.
    """
    config = read_config(model)
    shape = shape_of(config, model.stem)
    with open_checkpoint(model) as checkpoint:
        chosen = chosen_format(weights, checkpoint, choose_device("cpu"))
    settings = WeightSettings(chosen, dtype, exact)
    before_bytes = machine_free_bytes() + rss_bytes()

    def loaded(num_layers: int, *, is_starter: bool) -> StageRunner:
        return StageRunner.load(
            model,
            LayerRange(0, num_layers),
            is_last=False,
            owns_embedding_and_head=is_starter,
            kv_tokens=KV_TOKENS,
            weights=settings,
            wire=dtype,
        )

    half = max(config.num_layers // 2, 1)
    progress(f"measuring {half} layers")
    runner = loaded(half, is_starter=False)
    cost, layer_bytes = measure_cost(runner, min_s=SUSTAINED_S), runner.weight_bytes / half
    process_bytes = rss_bytes() - runner.weight_bytes
    progress("measuring one layer")
    runner = loaded(1, is_starter=False)
    one = measure_cost(runner, min_s=SUSTAINED_S).decode.seconds(1)
    progress("measuring the head")
    runner = loaded(1, is_starter=True)
    head = measure_head(runner, min_s=SUSTAINED_S)
    del runner
    return_free_memory(collect=True)
    forward_s = fixed_s(cost.decode.seconds(1), half, one)
    layers = MeasuredLayers(
        shape.name,
        chosen,
        shape.layer_params,
        shape.head_params,
        _per_layer(cost.decode, half, forward_s),
        _per_layer(cost.prompt, half, forward_s),
        head,
    )

    def measured(value: float, how: str) -> Figure:
        return Figure(value, Mark.MEASURED, f"mdiq simulate --measure with {shape.name}, {chosen}: {how}")

    size = 64
    arithmetic = FLOP_PER_WEIGHT * size * shape.active_layer_params
    device = Device(
        name,
        cpu_name(),
        measured(before_bytes, "memory that was free"),
        measured(layer_bytes / layers.decode.seconds(1), "a layer's bytes by the time of one token"),
        measured(arithmetic / layers.prompt.seconds(size), f"{size} tokens of a prompt in a layer"),
        measured(forward_s, f"one layer beside {half}"),
        measured(process_bytes, "memory of this process without weights"),
        layers=(layers,),
    )
    held = held_of_file(model, chosen, dtype)
    # The bytes as they are, not as the catalogue's arithmetic has them.
    held = replace(held, layer_bits=8 * layer_bytes / shape.layer_params)
    return Machine(device, shape, held, cpu_name(), exact)


def fixed_s(many_s: float, num_layers: int, one_s: float) -> float:
    """Return what a forward costs beside its Layers: f, where f + l is one_s and f + num_layers l is many_s."""
    if num_layers == 1:
        return 0.0
    layer_s = (many_s - one_s) / (num_layers - 1)
    return max(one_s - max(layer_s, 0.0), 0.0)


def as_yaml(machine: Machine) -> str:
    """Return a catalogue with this machine: `--catalogue` reads it."""
    device = machine.device
    entry: dict[str, Any] = {
        "title": device.title,
        "memory_mib": _entry(device.memory_bytes, 1 / _MIB),
        "read_gb_per_s": _entry(device.read_bytes_per_s, 1e-9),
        "compute_gflop_per_s": _entry(device.flop_per_s, 1e-9),
        "forward_ms": _entry(device.forward_s, 1e3),
        "process_mib": _entry(device.process_bytes, 1 / _MIB),
        "layers": [
            {
                "model": layers.model,
                "weights": layers.weights,
                "layer_params": layers.layer_params,
                "head_params": layers.head_params,
                "decode_ms": _points(layers.decode),
                "prompt_ms": _points(layers.prompt),
                "head_ms": _points(layers.head),
            }
            for layers in device.layers
        ],
    }
    text = yaml.safe_dump(
        {"version": VERSION, "devices": {device.name: entry}}, sort_keys=False, width=116, default_flow_style=None
    )
    return (
        "# Written by mdiq simulate --measure; mdiq simulate --catalogue reads it. Add watts if you know them:\n"
        "#     idle_w: {value: 20, mark: given, source: a meter at the wall}, and load_w likewise.\n" + text
    )


def _per_layer(curve: Curve, num_layers: int, forward_s: float) -> Curve:
    return Curve(tuple((size, max((time_s - forward_s) / num_layers, _MIN_S)) for size, time_s in curve.points))


def _entry(figure: Figure, factor: float) -> dict[str, object]:
    return {"value": _plain(figure.value * factor), "mark": str(figure.mark), "source": figure.source}


def _points(curve: Curve) -> list[list[float]]:
    return [[size, _plain(1e3 * time_s)] for size, time_s in curve.points]


def _plain(value: float) -> float:
    """Return a number that YAML does not write with an exponent, which read_document would refuse."""
    return float(f"{value:.6g}") if value >= 1e-3 else round(value, 4)
