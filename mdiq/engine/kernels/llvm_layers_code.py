"""The loops of CompiledLayers: what they compute and in which order; see model/llvm_layers.py.

A program is a row of steps. A step is words of 64 bits: its function, how many words it takes in all, whether threads
wait for each other after it, and then what its function reads. Every function is called with (its words, the Batch's
words, thread, number of threads), and does its thread's part: some rows of the Batch, columns of a matrix, or items of
attention. A row's results do not depend on the rows beside it, nor on the number of threads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llvmlite import ir

from mdiq.engine.kernels.llvm_code import FLOAT, INT, LONG, POINTER, VOID, Function, Type, Value, constant, fma, vector
from mdiq.engine.kernels.llvm_words import LANES, Word

OUTPUT_STEP = 16
"""Columns of a matrix that one thread begins at: a multiple."""
_FLOATS = vector(FLOAT, LANES)
_SPINS = 2_000  # looks at the counter before a thread lets others have its core: some ten microseconds


class Step(Function):
    """The function of a step, being built."""

    def __init__(self, module: ir.Module, name: str) -> None:
        super().__init__(module, name, 2, 2)
        self._words, self._batch, self.thread, self.num_threads = self.arguments
        self._place = 0
        self.num_rows = self.of_batch(LONG, Word.NUM_ROWS)

    def take(self, kind: Type = LONG) -> Value:
        """Return the next word of the step."""
        self._place += 1
        return self._words.load(kind, 8 * (self._place - 1))

    def of_batch(self, kind: Type, word: int) -> Value:
        """Return a word of the Batch."""
        return self._batch.load(kind, 8 * word)

    def take_rows(self) -> Value:
        """Return the address of the rows of which the step's next word is the Word."""
        return self._batch.load(POINTER, self.take() * 8)

    def take_function(self, num_addresses: int, num_integers: int) -> Callable[..., None]:
        """Return the function of which the step's next word is the address."""
        kind = ir.FunctionType(VOID, [POINTER] * num_addresses + [LONG] * num_integers)
        function = self.take(kind.as_pointer())
        return lambda *arguments: self.b.call(function.ir, [argument.ir for argument in arguments])

    def bound(self, total: Value, thread: Value, multiple: int) -> Value:
        """Return where a thread's part of ``total`` begins."""
        share = total * thread // self.num_threads
        return share if multiple == 1 else thread.equals(self.num_threads).select(total, share & -multiple)

    def bounds(self, total: Value, multiple: int = 1) -> tuple[Value, Value]:
        """Return where this thread's part of ``total`` begins and ends."""
        following = self.thread + 1
        return self.bound(total, self.thread, multiple), self.bound(total, following, multiple)

    @contextmanager
    def each_row(self) -> Iterator[Value]:
        """Run the body of a ``with`` for each of this thread's rows, by their numbers."""
        with self.each(*self.bounds(self.num_rows)) as row:
            yield row


def build(features: frozenset[str]) -> ir.Module:
    """Return the module: ``run`` and the functions of all kinds of steps; the bits are the same on all CPUs."""
    module = ir.Module()
    for name, body in _STEPS.items():
        step = Step(module, name)
        body(step)
        step.finish()
    _build_run(module, features)
    return module


def _build_run(module: ir.Module, features: frozenset[str]) -> None:
    """Build run(program, batch, num_steps, thread, threads): what one thread does; all do it at the same time."""
    f = Function(module, "run", 2, 3)
    program, batch, num_steps, thread, num_threads = f.arguments
    kind = ir.FunctionType(VOID, [POINTER, POINTER, LONG, LONG]).as_pointer()
    arrivals = batch.load(POINTER, 8 * Word.ARRIVALS)

    def step(_: Value, carried: list[Value]) -> list[Value]:
        words, expected = carried
        function = words.load(kind)
        f.b.call(function.ir, [argument.ir for argument in (words + 24, batch, thread, num_threads)])
        size, waits = (words.load(LONG, at) for at in (8, 16))
        has_to_wait = (waits > 0) & (num_threads > 1)
        expected = expected + has_to_wait.select(num_threads, 0)
        with f.when(has_to_wait):
            f.b.atomic_rmw("add", arrivals.ir, LONG(1), "seq_cst")
            _wait(f, arrivals, expected, features)
        return [words + size * 8, expected]

    f.loop(0, num_steps, 1, [program, f.integer(0)], step)
    f.finish()


def _wait(f: Function, arrivals: Value, expected: Value, features: frozenset[str]) -> None:
    """Wait until so many threads have arrived; a thread that waits for long lets others have its core."""
    b = f.b
    before, look, after = b.block, f.function.append_basic_block(), f.function.append_basic_block()
    yielding, again = f.function.append_basic_block(), f.function.append_basic_block()
    b.branch(look)
    b.position_at_end(look)
    looks = Value(b, b.phi(LONG))
    here = Value(b, b.load_atomic(arrivals.ir, "acquire", 8, typ=LONG))
    looks.ir.add_incoming(LONG(0), before)
    count = looks + 1
    waiting = f.function.append_basic_block()
    b.cbranch((here >= expected).ir, after, waiting)
    b.position_at_end(waiting)
    # A thread that only looks leaves what a core has to the other thread of that core.
    if "sse2" in features:
        f.call("llvm.x86.sse2.pause", VOID)
    elif "neon" in features:
        f.call("llvm.aarch64.hint", VOID, constant(b, INT, 1))
    b.cbranch((count > _SPINS).ir, yielding, again)
    b.position_at_end(yielding)
    f.call("sched_yield", INT)
    b.branch(again)
    b.position_at_end(again)
    looks.ir.add_incoming(count.ir, again)
    b.branch(look)
    b.position_at_end(after)


def _rms_norm(s: Step) -> None:
    """RMSNorm: from, to, weight, bias, eps, width, vectors in a row, bytes of a row of each, bytes before; see Norm.

    Bytes before: in a row, what comes before the first vector.
    """
    _norm(s, has_mean=False)


def _layer_norm(s: Step) -> None:
    """LayerNorm; its words are as those of RMSNorm."""
    _norm(s, has_mean=True)


def _norm(s: Step, *, has_mean: bool) -> None:
    source, target, weight, bias, eps = s.take_rows(), s.take_rows(), s.take(POINTER), s.take(POINTER), s.take(FLOAT)
    width, count, source_bytes, target_bytes, before = (s.take() for _ in range(5))
    vector_bytes = width * 4
    size = width.to(FLOAT)
    none = s.splat(FLOAT, LANES, 0.0)
    with s.each_row() as i:
        x_row, y_row = source + i * source_bytes + before, target + i * target_bytes + before
        with s.each(0, count) as k:
            x, y = x_row + k * vector_bytes, y_row + k * vector_bytes
            mean = None
            if has_mean:
                total = s.fold(0, width, LANES, none, lambda i, sums: x.load(_FLOATS, i * 4) + sums).total()
                mean = (total / size).spread(LANES)

            def less_mean(at: Value) -> Value:
                value = x.load(_FLOATS, at)
                return value if mean is None else value - mean

            def add_square(i: Value, sums: Value) -> Value:
                rest = less_mean(i * 4)
                return fma(rest, rest, sums)

            variance = s.fold(0, width, LANES, none, add_square).total() / size + eps
            scale = (1.0 / variance.sqrt()).spread(LANES)
            with s.each(0, width, LANES) as j:
                at = j * 4
                value = less_mean(at) * scale * weight.load(_FLOATS, at)
                y.store(value + bias.load(_FLOATS, at) if has_mean else value, at)


def _add(s: Step) -> None:
    """HIDDEN += other rows: from, width."""
    source, width = s.take_rows(), s.take()
    target = s.of_batch(POINTER, Word.HIDDEN)
    with s.each_row() as i:
        start = i * width
        with s.each(0, width, LANES) as k:
            at = (start + k) * 4
            target.store(target.load(_FLOATS, at) + source.load(_FLOATS, at), at)


def _prepare(s: Step) -> None:
    """Round rows for a matmul, see build_multiply: prepare, the matrix, from, bytes in ROUNDED before.

    Bytes before: of one row, of other matrices that are multiplied at the same time.
    """
    prepare = s.take_function(3, 3)
    matrix, source, before = s.take(POINTER), s.take_rows(), s.take()
    rounded = s.of_batch(POINTER, Word.ROUNDED) + s.num_rows * before
    prepare(source, matrix, rounded, s.num_rows, *s.bounds(s.num_rows))


def _multiply(s: Step) -> None:
    """A matmul: multiply, the matrix, bytes in ROUNDED before, to, width of a row, first column, columns, bias or 0."""
    multiply = s.take_function(3, 4)
    matrix, before, target = s.take(POINTER), s.take(), s.take_rows()
    width, column, num_columns, bias = (s.take() for _ in range(4))
    rounded = s.of_batch(POINTER, Word.ROUNDED) + s.num_rows * before
    y = target + column * 4
    first, stop = s.bounds(num_columns, OUTPUT_STEP)
    multiply(matrix, rounded, y, width, first, stop, s.num_rows)
    with s.when(bias.differs_from(0)):
        biases = bias.as_address()
        with s.each(0, s.num_rows) as i:
            start = y + i * (width * 4)
            with s.each(first, stop) as k:
                start.store(start.load(FLOAT, k * 4) + biases.load(FLOAT, k * 4), k * 4)


def _rotate(s: Step) -> None:
    """Rotary embedding, in place, of heads side by side, see layers.rotate: rows, bytes of one, heads, D / 2."""
    rows, row_bytes, num_heads, half = s.take_rows(), s.take(), s.take(), s.take()
    cos, sin = s.of_batch(POINTER, Word.COS), s.of_batch(POINTER, Word.SIN)
    floats = vector(FLOAT, LANES // 2)
    half_bytes = half * 4
    with s.each_row() as i:
        start, angles = rows + i * row_bytes, i * half_bytes
        with s.each(0, num_heads) as head:
            left = start + head * (half_bytes * 2)
            right = left + half_bytes
            with s.each(0, half, LANES // 2) as k:
                at = k * 4
                x, y = left.load(floats, at), right.load(floats, at)
                c, d = (table.load(floats, angles + at) for table in (cos, sin))
                left.store(fma(-y, d, x * c), at)
                right.store(fma(x, d, y * c), at)


def _pools(s: Step, layer: Value) -> list[Value]:
    """Return the pools of K and of V."""
    pair = s.of_batch(POINTER, Word.POOLS) + layer * 16
    return [pair.load(POINTER, at) for at in (0, 8)]


def _store(s: Step) -> None:
    """Put K and V into the Layer's pools: rows, bytes of one, bytes before K in it, floats of K, the Layer's number."""
    rows, row_bytes, before, width = s.take_rows(), s.take(), s.take(), s.take()
    pools, slots = _pools(s, s.take()), s.of_batch(POINTER, Word.SLOTS)
    width_bytes = width * 4
    with s.each_row() as i:
        slot = slots.load(LONG, i * 8)
        source = rows + i * row_bytes + before
        for pool in pools:
            target = pool + slot * width_bytes
            with s.each(0, width, LANES) as k:
                target.store(source.load(_FLOATS, k * 4), k * 4)
            source = source + width_bytes


def _attend(s: Step) -> None:
    """Attention, see llvm_attention_code.py: attend, Q, bytes of a row, to, bytes of a row, KV heads, window, Layer."""
    attend = s.take_function(6, 7)
    rows, row_bytes, target, target_bytes = s.take_rows(), s.take(), s.take_rows(), s.take()
    num_kv_heads, window = s.take(), s.take()
    keys, values = _pools(s, s.take())
    scores = s.of_batch(POINTER, Word.SCORES) + s.thread * s.of_batch(LONG, Word.SCORE_BYTES)
    bounds = s.of_batch(POINTER, Word.BOUNDS) + s.thread * 8
    first, stop = (bounds.load(LONG, at) for at in (0, 8))
    with s.when(first < stop):
        reads, width = s.of_batch(POINTER, Word.READS), s.of_batch(LONG, Word.WIDTH)
        sizes = (num_kv_heads, row_bytes, target_bytes, window, width, first, stop)
        attend(rows, keys, values, target, reads, scores, *sizes)


def _activate(s: Step) -> None:
    """What stands between the MLP's matmuls, see llvm_activation_code.py: activate, from, bytes of a row, to, width."""
    activate = s.take_function(2, 5)
    source, source_bytes, target, width = s.take_rows(), s.take(), s.take_rows(), s.take()
    activate(source, target, width, source_bytes, width * 4, *s.bounds(s.num_rows))


_STEPS: dict[str, Callable[[Step], None]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "add": _add,
    "prepare": _prepare,
    "multiply": _multiply,
    "rotate": _rotate,
    "store": _store,
    "attend": _attend,
    "activate": _activate,
}
