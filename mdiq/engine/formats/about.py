"""What a Layer's file says of itself, so that it can be used where nothing else of the model is: text and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mdiq.engine.families import FAMILIES
from mdiq.engine.model_config import ModelConfig, RopeConfig
from mdiq.errors import ModelError

StoredKinds = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class About:
    """digest: of the model. weights: the format of the file. config: the whole model's shape.

    is_gguf, stored: of format "plain": whether the tensors have the names and the order of GGUF files; type and shape
    of those that safetensors has no type for.
    """

    digest: str
    weights: str
    config: ModelConfig
    is_gguf: bool
    stored: StoredKinds

    @property
    def text(self) -> str:
        """The same text for the same values, in every process."""
        config = asdict(self.config) | {
            "family": self.config.family.name,
            "windowed_layers": sorted(self.config.windowed_layers),
        }
        values = {name: getattr(self, name) for name in ("digest", "weights", "is_gguf", "stored")}
        return json.dumps({**values, "config": config}, sort_keys=True)

    @classmethod
    def parse(cls, text: str, where: str) -> "About":
        """Return what ``text`` says. where: names its file in errors.

        Raises:
            ModelError: it says something else, or tells of what cannot be a model.
        """
        try:
            values = json.loads(text)
            config = _config(values["config"])
            stored = {name: (str(kind), tuple(map(int, shape))) for name, (kind, shape) in values["stored"].items()}
            about = cls(str(values["digest"]), str(values["weights"]), config, bool(values["is_gguf"]), stored)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise ModelError(
                f"{where}: it does not say what model it is of ({str(error)[:100]}); install the same mdiq everywhere"
            ) from None
        about.config.check(where)
        return about


def _config(values: Mapping[str, Any]) -> ModelConfig:
    rope, kinds = values["rope"], (int, float, bool)
    numbers: dict[str, Any] = {
        field.name: field.type(values[field.name]) for field in fields(ModelConfig) if field.type in kinds
    }
    llama3 = rope["llama3"] and (*map(float, rope["llama3"][:3]), int(rope["llama3"][3]))
    return ModelConfig(
        family=FAMILIES[values["family"]],
        rope=RopeConfig(float(rope["theta"]), float(rope["linear_factor"]), llama3),
        windowed_layers=frozenset(map(int, values["windowed_layers"])),
        **numbers,
    )
