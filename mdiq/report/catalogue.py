"""Devices, links and models that one need not own: the catalogue, as values. Each figure says where it is from.

The package's own is catalogue.yaml; a file of the user's adds to it, and wins where both have a name. Such a file is
input: its errors name the line.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mdiq.config.document import MAX_BYTES, read_document
from mdiq.config.findings import path_of
from mdiq.errors import ConfigError
from mdiq.plan.micro_batches import Curve

VERSION = 1
OWN = Path(__file__).with_name("catalogue.yaml")
_MIB = 1 << 20
_MAX_LAYERS = 1_024


class Mark(StrEnum):
    """How a figure is known, the strongest first. GIVEN: the user said it."""

    MEASURED = "measured"
    GIVEN = "given"
    CITED = "cited"
    ESTIMATED = "estimated"


def weakest(marks: Iterable[Mark]) -> Mark:
    """Return the mark of what was computed from figures with these marks."""
    return max(marks, key=list(Mark).index, default=Mark.MEASURED)


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and how it is known. source: where it is published, or how it was measured or estimated."""

    value: float
    mark: Mark
    source: str = ""


@dataclass(frozen=True, slots=True)
class MeasuredLayers:
    """The time of a model's Layers on a device, as it measured them itself, and of the head.

    layer_params, head_params: how many weights a Layer and the head have: models with as many take as long.
    decode, prompt: seconds of a Layer by Segments of one token, and by tokens of a prompt. head: by rows.
    """

    model: str
    weights: str
    layer_params: int
    head_params: int
    decode: Curve
    prompt: Curve
    head: Curve


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of device.

    memory_bytes: what a Node may take there, next to the operating system. process_bytes: of a Node without weights.
    read_bytes_per_s: of weights, while one token is decoded. flop_per_s: of multiplications and additions of a prompt.
    forward_s: what each forward costs beside its Layers. idle_w, load_w: at the wall; None if unknown.
    """

    name: str
    title: str
    memory_bytes: Figure
    read_bytes_per_s: Figure
    flop_per_s: Figure
    forward_s: Figure
    process_bytes: Figure
    idle_w: Figure | None = None
    load_w: Figure | None = None
    layers: tuple[MeasuredLayers, ...] = ()


@dataclass(frozen=True, slots=True)
class LinkKind:
    """A kind of link between two devices, one way. is_shared: all links of a ring share its capacity, as Wi-Fi's do."""

    name: str
    title: str
    bytes_per_s: Figure
    delay_s: Figure
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model. num_experts: of a mixture of experts, of which active_experts compute each token; else 0.

    mlp_size: of one expert, where there are several. source: of the sizes.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int
    is_tied: bool = False
    num_experts: int = 0
    active_experts: int = 0
    is_gated: bool = True
    mark: Mark = Mark.CITED
    source: str = ""

    @property
    def shared_params(self) -> int:
        """Weights of a Layer that every token meets: attention, and the router of a mixture."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + self.num_experts * self.hidden_size

    @property
    def expert_params(self) -> int:
        """Weights of one expert of a Layer; of the whole MLP where there are no experts."""
        return self.hidden_size * self.mlp_size * (3 if self.is_gated else 2)

    @property
    def layer_params(self) -> int:
        """Weights of a Layer, which memory holds."""
        return self.shared_params + max(self.num_experts, 1) * self.expert_params

    @property
    def active_layer_params(self) -> int:
        """Weights of a Layer that one token meets."""
        return self.shared_params + max(self.active_experts, 1) * self.expert_params

    @property
    def head_params(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def ends_params(self) -> int:
        """Weights of embedding and head, which are one matrix where they are tied."""
        return self.head_params * (1 if self.is_tied else 2)

    @property
    def params(self) -> int:
        """All weights, without norms and biases."""
        return self.num_layers * self.layer_params + self.ends_params

    def read_params(self, num_tokens: int) -> float:
        """Return how many weights of a Layer are read for so many tokens at once.

        Of a mixture's E experts, n tokens that choose k each meet E (1 - (1 - k / E)^n) on average, if all experts are
        as likely and tokens choose independently.
        """
        if not self.num_experts:
            return self.layer_params
        missed = (1 - self.active_experts / self.num_experts) ** num_tokens
        return self.shared_params + self.num_experts * (1 - missed) * self.expert_params


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Devices, links and models by name; router_events_per_s: what one router before many rings passes on."""

    devices: Mapping[str, Device] = field(default_factory=dict)
    links: Mapping[str, LinkKind] = field(default_factory=dict)
    models: Mapping[str, Shape] = field(default_factory=dict)
    router_events_per_s: Figure | None = None

    def with_more(self, other: "Catalogue") -> "Catalogue":
        """Return both together; the other one's entries win."""
        return Catalogue(
            {**self.devices, **other.devices},
            {**self.links, **other.links},
            {**self.models, **other.models},
            other.router_events_per_s or self.router_events_per_s,
        )


def read_catalogues(files: Iterable[Path] = ()) -> Catalogue:
    """Return the package's catalogue with those of these files.

    Raises:
        ConfigError: a file cannot be read, or its line so-and-so is wrong.
    """
    catalogue = read_catalogue(OWN)
    for file in files:
        catalogue = catalogue.with_more(read_catalogue(file))
    return catalogue


def read_catalogue(file: Path) -> Catalogue:
    """Return what one file says.

    Raises:
        ConfigError: it cannot be read, or its line so-and-so is wrong.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)  # more is refused
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; `mdiq simulate --measure` writes a catalogue") from None
    if not data.strip() or len(data) > MAX_BYTES:
        wrong = f"larger than {MAX_BYTES // 1024} KiB" if data.strip() else "empty"
        raise ConfigError(f"{file}: the file is {wrong}; `mdiq simulate --measure` writes a catalogue")
    document = read_document(data)
    if document.findings:
        raise ConfigError("\n".join(finding.render(str(file)) for finding in document.findings))
    try:
        read = _File.model_validate(document.data)
    except ValidationError as error:
        lines = []
        for each in error.errors():
            # Of a value the line is known, of one that is missing the line of what should have it.
            loc = tuple(part for part in each["loc"] if not (isinstance(part, str) and part.startswith("function-")))
            place = f" {path_of(loc)}" if loc else ""
            lines.append(f"{file}:{document.line_of(loc)}{place}: {_message(each)}")
        raise ConfigError("\n".join(lines)) from None
    return read.catalogue()


def _message(error: Any) -> str:
    text = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "missing":
        return "it is missing; an entry of mdiq/report/catalogue.yaml shows all keys"
    if error["type"] == "extra_forbidden":
        return "no such key; an entry of mdiq/report/catalogue.yaml shows all keys"
    if error["type"] in ("model_type", "dict_type"):
        return "keys with values are expected here; mdiq/report/catalogue.yaml shows them"
    return text[:1].lower() + text[1:]


# The file's form. Strict: no text becomes a number. Tuples are what read_document makes of lists.


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_MIN, _MAX = 1e-9, 1e12  # beyond them no figure is one of a device, and what follows from it is no number
_Number = Annotated[float, Field(ge=0, le=_MAX, strict=True)]
_Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
_Text = Annotated[str, Field(min_length=1, max_length=400, strict=True)]
_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", strict=True)]
_Points = Annotated[tuple[tuple[_Count, _Number], ...], Field(min_length=1, max_length=64)]


class _Figure(_Part):
    value: _Number
    mark: Mark
    source: _Text

    @model_validator(mode="after")
    def _check_source(self) -> "_Figure":
        if self.mark is Mark.CITED and "://" not in self.source:
            raise ValueError("a cited figure needs the address where it stands: source: https://...")
        return self

    def figure(self, factor: float = 1.0) -> Figure:
        return Figure(self.value * factor, self.mark, self.source)


class _Positive(_Figure):
    value: Annotated[float, Field(ge=_MIN, le=_MAX, strict=True)]


class _Layers(_Part):
    model: _Text
    weights: _Text
    layer_params: _Count
    head_params: _Count
    decode_ms: _Points
    prompt_ms: _Points
    head_ms: _Points

    @model_validator(mode="after")
    def _check_sizes(self) -> "_Layers":
        self.layers()
        return self

    def layers(self) -> MeasuredLayers:
        curves = (Curve(points).scaled(1e-3) for points in (self.decode_ms, self.prompt_ms, self.head_ms))
        return MeasuredLayers(self.model, self.weights, self.layer_params, self.head_params, *curves)


class _Device(_Part):
    title: _Text
    memory_mib: _Positive
    read_gb_per_s: _Positive
    compute_gflop_per_s: _Positive
    forward_ms: _Figure
    process_mib: _Figure
    idle_w: _Figure | None = None
    load_w: _Figure | None = None
    layers: Annotated[tuple[_Layers, ...], Field(max_length=64)] = ()

    def device(self, name: str) -> Device:
        return Device(
            name,
            self.title,
            self.memory_mib.figure(_MIB),
            self.read_gb_per_s.figure(1e9),
            self.compute_gflop_per_s.figure(1e9),
            self.forward_ms.figure(1e-3),
            self.process_mib.figure(_MIB),
            self.idle_w.figure() if self.idle_w else None,
            self.load_w.figure() if self.load_w else None,
            tuple(layers.layers() for layers in self.layers),
        )


class _Link(_Part):
    title: _Text
    mbit_per_s: _Positive
    delay_ms: _Figure
    is_shared: Annotated[bool, Field(strict=True)] = False

    def link(self, name: str) -> LinkKind:
        return LinkKind(name, self.title, self.mbit_per_s.figure(1e6 / 8), self.delay_ms.figure(1e-3), self.is_shared)


class _Shape(_Part):
    num_layers: Annotated[int, Field(ge=1, le=_MAX_LAYERS, strict=True)]
    hidden_size: _Count
    num_heads: _Count
    num_kv_heads: _Count
    head_dim: _Count
    mlp_size: _Count
    vocab_size: _Count
    is_tied: Annotated[bool, Field(strict=True)] = False
    num_experts: Annotated[int, Field(ge=0, lt=2**16, strict=True)] = 0
    active_experts: Annotated[int, Field(ge=0, lt=2**16, strict=True)] = 0
    source: _Text

    @model_validator(mode="after")
    def _check_experts(self) -> "_Shape":
        if not (0 < self.active_experts <= self.num_experts or self.active_experts == self.num_experts == 0):
            raise ValueError("active_experts must be from 1 to num_experts, or both 0")
        return self


class _Router(_Part):
    events_per_s: _Positive


class _File(_Part):
    version: int
    devices: dict[_Name, _Device] = {}
    links: dict[_Name, _Link] = {}
    models: dict[_Name, _Shape] = {}
    router: _Router | None = None

    @model_validator(mode="after")
    def _check_version(self) -> "_File":
        if self.version != VERSION:
            raise ValueError(f"version {self.version}: this mdiq reads version {VERSION}; measure again")
        return self

    def catalogue(self) -> Catalogue:
        return Catalogue(
            {name: device.device(name) for name, device in self.devices.items()},
            {name: link.link(name) for name, link in self.links.items()},
            {name: Shape(name, **shape.model_dump()) for name, shape in self.models.items()},
            self.router.events_per_s.figure() if self.router else None,
        )
