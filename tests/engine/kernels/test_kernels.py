"""Every kernel against the same matmul in f64, and what exact mode promises; which kernel is chosen."""

import json
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import llvmlite.binding as llvm
import pytest
import torch
from safetensors.torch import save_file

import mdiq
from mdiq.engine.formats.gguf_blocks import BLOCK, scale_and_offset, take_apart
from mdiq.engine.formats.packed_file import PackedFile
from mdiq.engine.formats.quantize import quantize_columns, quantize_int4, unpack_int4
from mdiq.engine.kernels import llvm_int4, llvm_int4_code, llvm_int8, llvm_int8_code, llvm_layers_code
from mdiq.engine.kernels.choice import BATCH_CLASSES, KernelChoice
from mdiq.engine.kernels.linear import KERNELS, FbgemmInt8, PackedEmbedding, TorchInt8
from mdiq.engine.kernels.llvm_int4 import LlvmInt4, LlvmQ4K, LlvmQ6K
from mdiq.engine.kernels.llvm_int8 import LlvmInt8
from mdiq.engine.kernels.llvm_machine import Machine, host_features
from mdiq.engine.kernels.llvm_matmul import compiled
from mdiq.engine.memory import peak_bytes, reset_peak, rss_bytes
from mdiq.errors import EngineError
from tests.engine.formats.test_gguf_blocks import random_rows, values

OUT, IN = 160, 192
# Relative to the norm of the result: what the rounding of activations leaves.
TOLERANCE = {
    "llvm-int8": 2e-2,
    "fbgemm": 2e-2,
    "torch-int8": 6e-3,
    "llvm-int4": 2e-2,
    "llvm-int4-wide": 2e-2,
    "llvm-q4k": 4e-2,
    "llvm-q4k-wide": 4e-2,
    "llvm-q6k": 6e-2,
    "llvm-q6k-wide": 6e-2,
    "torch-q6k": 6e-3,
    "torch-int4": 6e-3,
}
AVAILABLE = [kernel for kernel in KERNELS if kernel.is_available()]
# They work on every CPU, and are available where they are fast.
COMPILED: list[type] = [LlvmInt4, LlvmQ4K, LlvmQ6K, LlvmInt8]
TESTED = [kernel for kernel in KERNELS if kernel in AVAILABLE or kernel in COMPILED]


def _random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HOT = torch.cat((torch.full((15,), 5), torch.arange(17)))  # one column in 17 places, some in two
NO_COLUMNS = torch.arange(0)


def _packed(
    tmp_path: Path, weights: str, *, bias: bool = True, hot: torch.Tensor | None = None
) -> tuple[PackedFile, torch.Tensor]:
    """Return a matrix "w" in a file, and the f64 matrix that it stands for."""
    weight = _random(OUT, IN) * 0.05 + 0.01
    tensors = {"w.bias": _random(OUT, seed=2)} if bias else {}
    if weights == "int8":
        columns = quantize_columns(weight, hot)
        tensors |= {f"w.{name}": tensor for name, tensor in columns.items()}
        wide = columns["q"][:, :IN].double() * columns["scale"][:, None]
    elif weights in ("q4_k", "q6_k"):
        blocks = take_apart(random_rows(weights.upper(), OUT), weights.upper())
        tensors |= {f"w.{name}": tensor for name, tensor in blocks.items()}
        wide = values(blocks)
    else:
        nibbles, scale, offset = quantize_int4(weight)
        assert offset is not None
        tensors |= {"w.nibbles": nibbles, "w.scale": scale, "w.offset": offset}
        wide = (unpack_int4(nibbles).view(OUT, -1, BLOCK).double() - 8) * scale[..., None] + offset[..., None]
    path = tmp_path / f"{weights}.safetensors"
    save_file(tensors, path)
    return PackedFile(path), wide.reshape(OUT, -1)


def _activations(num_in: int = IN) -> torch.Tensor:
    x = _random(16, num_in, seed=4)
    x[:, 5] *= 30  # outliers, as every model has
    x[3] *= 100  # and a row far larger than its neighbours
    return x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", TESTED, ids=lambda kernel: kernel.name)
def test_a_kernel_is_close_to_the_exact_product(kernel: type, bias: bool, tmp_path: Path) -> None:
    file, weight = _packed(tmp_path, kernel.formats[0], bias=bias, hot=HOT)
    x = _activations(weight.shape[1])
    expected = x.double() @ weight.t()
    if bias:
        expected += file.tensor("w.bias")
    linear = kernel(file, "w", exact=True)
    for rows in (slice(0, 1), slice(0, 16), slice(3, 5)):
        error = (linear(x[rows]) - expected[rows]).norm(dim=1) / expected[rows].norm(dim=1)
        assert error.max() < TOLERANCE[kernel.name]
    assert linear(x.bfloat16()).dtype == torch.bfloat16
    assert linear.num_bytes > OUT * IN // 2


def test_a_large_matrix_is_not_widened_as_a_whole(tmp_path: Path) -> None:
    """The head of a large vocabulary is half of a small model; a Starter's peak was five times its bytes."""
    num_bytes = 64 << 20
    q = torch.ones(num_bytes // 4_096, 4_096, dtype=torch.int8)
    save_file({"w.q": q, "w.scale": torch.ones(len(q))}, tmp_path / "w.safetensors")
    del q
    file = PackedFile(tmp_path / "w.safetensors")
    file.tensor("w.q").sum(dtype=torch.int8)  # the file's pages are in memory
    compiled("llvm_int8_code")
    if not reset_peak():
        pytest.skip("this kernel does not let us count a peak anew")
    before = rss_bytes()
    linear = LlvmInt8(file, "w", exact=True)
    assert peak_bytes() - before < 2 * num_bytes  # it was four times and more
    x = torch.ones(1, 4_096)
    assert torch.allclose(linear(x), torch.full((1, num_bytes // 4_096), 4_096.0))


@pytest.mark.parametrize("kernel", TESTED, ids=lambda kernel: kernel.name)
def test_in_exact_mode_a_row_does_not_depend_on_its_neighbours(kernel: type, tmp_path: Path) -> None:
    file, weight = _packed(tmp_path, kernel.formats[0], hot=HOT)
    linear = kernel(file, "w", exact=True)
    x = _activations(weight.shape[1])
    together = linear(x)
    for start, stop in ((0, 1), (3, 4), (2, 4), (1, 6), (5, 16)):
        assert torch.equal(linear(x[start:stop]), together[start:stop])


@pytest.mark.parametrize("kernel", [k for k in AVAILABLE if "int8" in k.formats], ids=lambda kernel: kernel.name)
def test_copies_of_hot_columns_leave_the_others_their_bits(kernel: type, tmp_path: Path) -> None:
    x = _activations().repeat(2, 1)  # more rows than torch's kernel for few takes
    errors = []
    for hot in (HOT, NO_COLUMNS):
        file, weight = _packed(tmp_path, "int8", bias=False, hot=hot)
        errors.append((kernel(file, "w", exact=False)(x).double() - x.double() @ weight.t()).norm())
    assert errors[1] > 2 * errors[0]


def test_a_large_activation_takes_bits_from_its_own_block_alone(tmp_path: Path) -> None:
    file, weight = _packed(tmp_path, "int4", bias=False)
    x = _random(3, weight.shape[1], seed=5)
    x[:, :BLOCK] = 0.0
    x[:, 5] = 1_000.0  # the largest level: no loss
    linear = LlvmInt4(file, "w", exact=True)
    expected = x.double() @ weight.t()
    others = expected - 1_000.0 * weight[:, 5]
    assert (linear(x) - expected).norm() < 2e-2 * others.norm()


@pytest.mark.parametrize(
    "kernel", [kernel for kernel in TESTED if kernel.rounding == LlvmInt8.rounding], ids=lambda kernel: kernel.name
)
def test_sums_of_the_largest_activations_and_weights_do_not_overflow(kernel: type, tmp_path: Path) -> None:
    for sign in (1.0, -1.0):
        columns = quantize_columns(torch.full((OUT, IN), sign), None)
        save_file({f"w.{name}": tensor for name, tensor in columns.items()}, tmp_path / "most.safetensors")
        linear = kernel(PackedFile(tmp_path / "most.safetensors"), "w", exact=False)
        assert torch.allclose(linear(torch.ones(3, IN)), torch.full((3, OUT), sign * IN), rtol=1e-2)


@pytest.mark.timeout(300)  # it compiles for five kinds of CPU
@pytest.mark.parametrize("kernel", [LlvmInt4, LlvmQ4K, LlvmQ6K], ids=lambda kernel: kernel.name)
def test_compiled_code_gives_the_same_bits_for_every_cpu_and_number_of_threads(
    kernel: type[LlvmInt4], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, weight = _packed(tmp_path, kernel.formats[0])
    x = _activations(weight.shape[1])
    found = kernel(file, "w", exact=True)(x)
    here, build = host_features(), llvm_int4_code.build
    kinds: list[tuple[frozenset[str], bool]] = [(frozenset(), False), (frozenset(), True)]  # without what it can do
    if "avx2" in here:
        kinds += [(frozenset({"avx2"}), False), (frozenset({"avx2", "avx512vl"}), False)]
    if "avx512bw" in here:
        kinds.append((here, True))
    for features, is_wide in kinds:
        machine = Machine(partial(build, features, is_wide=is_wide, grouped={LlvmQ4K: 4, LlvmQ6K: 6}.get(kernel, 0)))
        monkeypatch.setattr("mdiq.engine.kernels.llvm_int4.compiled", lambda *_, machine=machine, **__: machine)
        assert torch.equal(kernel(file, "w", exact=True)(x), found)
    monkeypatch.setattr("mdiq.engine.kernels.llvm_matmul._FEW_OUTPUTS", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(kernel(file, "w", exact=True)(x), found)


@pytest.mark.parametrize(
    ("kind", "kernel"), [("Q4_0", LlvmInt4), ("Q4_1", LlvmInt4), ("Q4_K", LlvmQ4K), ("Q6_K", LlvmQ6K)]
)
def test_blocks_of_a_gguf_file_keep_their_values_in_the_kernel(
    kind: str, kernel: type[LlvmInt4], tmp_path: Path
) -> None:
    """Activations of one column each are rounded without a loss: results are the weights themselves."""
    blocks = take_apart(random_rows(kind, 11), kind)
    save_file({f"w.{name}": tensor for name, tensor in blocks.items()}, tmp_path / "w.safetensors")
    linear = kernel(PackedFile(tmp_path / "w.safetensors"), "w", exact=True)
    expected = values(blocks)
    found = linear(torch.eye(expected.shape[1])).t()
    # Scales and offsets are f16 as in the file where there are groups, and f16 of a row's largest scale else.
    scale = expected if kind.endswith("K") else scale_and_offset(blocks)[0]
    most = 1e-6 if kind.endswith("K") else 15 * 2.0**-10
    assert ((found - expected).abs() <= most * scale.abs().amax(1, keepdim=True) + 1e-6 * expected.abs()).all()


@pytest.mark.skipif(not FbgemmInt8.is_available(), reason="FBGEMM is there on x86 only")
@pytest.mark.parametrize(
    "features",
    [None, frozenset[str](), frozenset({"avx2"}), frozenset({"avxvnni"})],
    ids=["this CPU", "none", "no dot products", "narrow"],
)
def test_compiled_int8_code_gives_the_bits_of_fbgemm(
    features: frozenset[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = host_features()
    if features is None:
        features = here
    if not features <= here | (frozenset({"avxvnni"}) if "avx512vl" in here and "avx512vnni" in here else frozenset()):
        features = frozenset()
    machine = Machine(partial(llvm_int8_code.build, features))
    monkeypatch.setattr("mdiq.engine.kernels.llvm_int8.compiled", lambda _: machine)
    matrices = [(_random(n, m) * 0.05 + 0.01, NO_COLUMNS) for n, m in ((OUT - 1, 80), (1, 64))]
    matrices += [(_random(OUT, IN) * 0.05 + 0.01, HOT), (torch.full((3, 96), -1.0), NO_COLUMNS)]
    for weight, hot in matrices:
        num_out, num_in = weight.shape
        columns = quantize_columns(weight, hot)
        path = tmp_path / f"{num_in}.safetensors"
        save_file({f"w.{name}": tensor for name, tensor in columns.items()} | {"w.bias": _random(num_out)}, path)
        compiled, fbgemm = (kernel(PackedFile(path), "w", exact=True) for kernel in (LlvmInt8, FbgemmInt8))
        x = _activations().repeat(3, 1)[:, :num_in]
        x[0] = 1.0  # the largest level in all columns
        for num_rows in (1, 2, 3, 13, 48):
            assert torch.equal(compiled(x[:num_rows]), fbgemm(x[:num_rows]))


INT4, INT8 = llvm_int4_code, llvm_int8_code


@pytest.mark.parametrize(
    ("code", "triple", "features", "instruction"),
    [
        (INT4, "x86_64-linux-gnu", "avx2,fma,f16c", "vpmaddubsw"),
        (INT4, "aarch64-linux-gnu", "neon", "smull"),
        (INT4, "aarch64-linux-gnu", "neon,dotprod", r"sdot\tv"),
        (INT8, "aarch64-linux-gnu", "neon,dotprod", r"sdot\tv"),
        (INT4, "x86_64-linux-gnu", "avx2,fma,avxvnni", r"vpdpbusd\t.*%ymm"),
        (INT8, "x86_64-linux-gnu", "avx2,fma", r"vpmaddubsw\t.*%ymm"),
        (INT8, "x86_64-linux-gnu", "avx2,fma,avxvnni", r"vpdpbusd\t.*%ymm"),
        (INT8, "x86_64-linux-gnu", "avx512f,avx512bw,avx512vl,avx512vnni", r"vpdpbusd\t.*%zmm"),
        (llvm_layers_code, "x86_64-linux-gnu", "sse2", r"\tpause"),
        (llvm_layers_code, "aarch64-linux-gnu", "neon", r"\tyield"),
    ],
)
def test_code_is_made_of_what_a_cpu_is_good_at(code: ModuleType, triple: str, features: str, instruction: str) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(triple).create_target_machine(
        features=",".join(f"+{name}" for name in features.split(",")), opt=3
    )
    module = llvm.parse_assembly(str(code.build(frozenset(features.split(",")))))
    module.verify()
    assert re.search(instruction, target.emit_assembly(module))


@pytest.mark.parametrize("kernel", COMPILED, ids=lambda kernel: kernel.name)
def test_activations_that_are_no_numbers_spoil_their_own_row_alone(kernel: type, tmp_path: Path) -> None:
    file, weight = _packed(tmp_path, kernel.formats[0])
    linear = kernel(file, "w", exact=True)
    x = _activations(weight.shape[1])
    expected = linear(x)
    x[2, 7], x[4, 9], x[6] = torch.nan, torch.inf, 0.0
    found = linear(x)
    others = [i for i in range(len(x)) if i not in (2, 4, 6)]
    assert torch.equal(found[others], expected[others])
    assert not found[4].isfinite().all()
    assert torch.equal(found[6], file.tensor("w.bias"))


@pytest.mark.parametrize("kernel", [LlvmInt4, LlvmInt8], ids=lambda kernel: kernel.name)
def test_a_wide_matrix_is_taken_in_parts(kernel: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_out, num_in = 37, 6_208  # neither is a multiple of what is taken at a time
    weight = _random(num_out, num_in) * 0.05
    nibbles, scale, offset = quantize_int4(weight)
    assert offset is not None
    tensors = {"nibbles": nibbles, "scale": scale, "offset": offset} | quantize_columns(weight, None)
    tensors["scale"] = scale if kernel is LlvmInt4 else tensors["scale"]
    del tensors["q" if kernel is LlvmInt4 else "nibbles"]
    save_file({f"w.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "wide.safetensors")
    linear = kernel(PackedFile(tmp_path / "wide.safetensors"), "w", exact=True)
    x = _random(13, num_in, seed=3)
    found = linear(x)
    expected = x @ weight.t()
    assert (found - expected).norm() < (0.15 if kernel is LlvmInt4 else 0.02) * expected.norm()  # and int4's rounding
    for start, stop in ((0, 1), (1, 3), (2, 10)):
        assert torch.equal(linear(x[start:stop]), found[start:stop])


def test_a_device_where_llvmlite_cannot_be_loaded_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mdiq.engine.kernels.llvm_machine", None)
    for module in (llvm_int4, llvm_int8):
        monkeypatch.setattr(module, "compiled", compiled.__wrapped__)  # as if it never was
    for weights in ("int4", "int8"):
        times = KernelChoice(exact=True, folder=tmp_path).times(weights, (32, 64))
        assert times
        assert not any(name.startswith("llvm-") for name in times)


def test_activations_of_another_width_are_refused(tmp_path: Path) -> None:
    linear = LlvmInt4(_packed(tmp_path, "int4")[0], "w", exact=True)
    with pytest.raises(RuntimeError, match=f"{IN - 64} columns of activations meet {IN} of weights"):
        linear(_activations()[:, : IN - 64])


def test_values_that_one_kernel_refuses_are_another_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nibbles, scale, _ = quantize_int4(_random(OUT, IN))
    tensors = {"w.nibbles": nibbles, "w.scale": scale, "w.offset": torch.full_like(scale, 1e6).bfloat16()}
    save_file(tensors, tmp_path / "large.safetensors")
    file = PackedFile(tmp_path / "large.safetensors")
    with pytest.raises(RuntimeError, match="too large for 16 bits"):
        LlvmInt4(file, "w", exact=True)
    choice = KernelChoice(exact=True, folder=tmp_path)
    choice._known[f"int4 exact {OUT}x{IN}"] = {"llvm-int4": [1e-9] * 3, "torch-int4": [1.0] * 3}
    assert choice.load(file, "w").name == "torch-int4"  # type: ignore[attr-defined]
    choice._known[f"int4 exact {OUT}x{IN}"] = {"llvm-int4": [1e-9] * 3}
    assert choice.load(file, "w").name != "llvm-int4", "one that was not measured"  # type: ignore[attr-defined]
    monkeypatch.setattr("mdiq.engine.kernels.choice.KERNELS", (LlvmInt4,))
    with pytest.raises(EngineError, match="large.safetensors, w: no kernel of this device takes it"):
        choice.load(file, "w")


@pytest.mark.parametrize("num_in", [33, 36, 100])
def test_a_width_that_a_kernel_cannot_read_is_left_to_another(num_in: int, tmp_path: Path) -> None:
    """torch's int8 kernel reads past the end of such rows, and the process dies of it."""
    weight = _random(OUT, num_in)
    q, scale = quantize_columns(weight, None).values()
    save_file({"w.q": q, "w.scale": scale}, tmp_path / "odd.safetensors")
    file = PackedFile(tmp_path / "odd.safetensors")
    with pytest.raises(RuntimeError, match="multiple of 16"):
        TorchInt8(file, "w", exact=True)
    if any(kernel.name == "fbgemm" for kernel in AVAILABLE):
        linear = KernelChoice(exact=True, folder=tmp_path).load(file, "w")
        x = _random(8, num_in, seed=6)
        expected = x @ (q * scale[:, None]).t()
        assert (linear(x) - expected).norm() < 2e-2 * expected.norm()


def test_the_embedding_gives_rows_of_its_matrix(tmp_path: Path) -> None:
    weight, ids = _random(50, 64), torch.tensor([49, 0, 7, 7])
    for hot in (None, torch.tensor([10, 11, 10])):  # copies are for a head of the same matrix
        columns = {f"embedding.{name}": tensor for name, tensor in quantize_columns(weight, hot).items()}
        save_file(columns, tmp_path / "ends.safetensors")
        rows = PackedEmbedding(PackedFile(tmp_path / "ends.safetensors"), torch.float32)(ids)
        assert rows.shape == (4, 64)
        # A pair of neighbours shares 127 steps.
        assert ((rows - weight[ids]).abs() <= weight[ids].abs().amax(1, keepdim=True) / 127).all()


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("exact", [False, True])
def test_the_kernel_is_the_one_that_was_measured_fastest_of_those_with_the_same_bits(
    weights: str, exact: bool, tmp_path: Path
) -> None:
    times = KernelChoice(exact=exact, folder=tmp_path).times(weights, (OUT, IN))
    assert all(len(row) == len(BATCH_CLASSES) and min(row) > 0 for row in times.values())
    file, _ = _packed(tmp_path, weights)
    kept = json.loads((tmp_path / "kernels.json").read_text())
    mode = "exact" if exact else "fast"
    found = []
    for best in times:
        # Another device's measurements: one kernel is made to have been by far the fastest.
        (row,) = kept.values()
        row[f"{weights} {mode} {OUT}x{IN}"] = {
            name: [1.0 if name != best else 1e-9] * len(BATCH_CLASSES) for name in times
        }
        (tmp_path / "kernels.json").write_text(json.dumps(kept))
        linear = KernelChoice(exact=exact, folder=tmp_path).load(file, "w")
        assert linear.name == best  # type: ignore[attr-defined]
        found.append(linear(_activations()))
    if exact:
        assert all(torch.equal(y, found[0]) for y in found)
    else:
        assert set(times) == {kernel.name for kernel in AVAILABLE if weights in kernel.formats}


def test_kernels_whose_code_changed_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KernelChoice(exact=True, folder=tmp_path).times("int8", (32, 64))
    monkeypatch.setattr("mdiq.engine.kernels.choice.engine_digest", lambda: "other code")
    KernelChoice(exact=True, folder=tmp_path).times("int8", (32, 64))
    before, after = (key.split("|") for key in json.loads((tmp_path / "kernels.json").read_text()))
    assert [part for part in after if part not in before] == [f"mdiq {mdiq.__version__} other code"]


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "\x00"])
def test_a_damaged_file_of_measurements_is_measured_again(text: str, tmp_path: Path) -> None:
    (tmp_path / "kernels.json").write_text(text)
    times = KernelChoice(exact=True, folder=tmp_path).times("int4", (32, 64))
    assert KernelChoice(exact=True, folder=tmp_path).times("int4", (32, 64)) == times


def test_a_device_without_a_kernel_for_a_format_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdiq.engine.kernels.choice.KERNELS", ())
    with pytest.raises(EngineError, match="use bf16 or f32"):
        KernelChoice(exact=True, folder=tmp_path).times("int8", (32, 64))
