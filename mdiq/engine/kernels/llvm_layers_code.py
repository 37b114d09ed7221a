"""The loops of CompiledLayers, in LLVM's language: what they compute and in which order; see model/llvm_layers.py.

A program is a row of steps. A step is words of 64 bits: its function, how many words it takes in all, whether threads
wait for each other after it, and then what its function reads. Every function is called with (its words, the Batch's
words, thread, number of threads), and does its thread's part: some rows of the Batch, columns of a matrix, or items of
attention. A row's results do not depend on the rows beside it, nor on the number of threads.
"""

from collections.abc import Callable, Sequence

from llvmlite import ir

from mdiq.engine.kernels.llvm_code import FLOAT, INT, LONG, POINTER, Function, Value, splat, vector
from mdiq.engine.kernels.llvm_words import LANES, Word

OUTPUT_STEP = 16
"""Columns of a matrix that one thread begins at: a multiple."""
_FLOATS, _OF_FLOATS = vector(FLOAT, LANES), f"v{LANES}f32"
_SPINS = 2_000  # looks at the counter before a thread lets others have its core: some ten microseconds


class Step:
    """The function of a step, being built."""

    def __init__(self, module: Value, name: str) -> None:
        self.f = Function(module, name, [POINTER, POINTER, LONG, LONG])
        self.b = self.f.b
        self._words, self._batch, self.thread, self.num_threads = self.f.arguments
        self._place = 0
        self.num_rows = self.of_batch(LONG, Word.NUM_ROWS)

    def take(self, kind: Value) -> Value:
        """Return the next word of the step."""
        self._place += 1
        return self.f.load(kind, self._words, LONG(8 * (self._place - 1)))

    def of_batch(self, kind: Value, word: int) -> Value:
        """Return a word of the Batch."""
        return self.f.load(kind, self._batch, LONG(8 * word))

    def take_rows(self) -> Value:
        """Return the address of the rows of which the step's next word is the Word."""
        return self.f.load(POINTER, self._batch, self.b.mul(self.take(LONG), LONG(8)))

    def bound(self, total: Value, thread: Value, multiple: int = 1) -> Value:
        """Return where a thread's part of ``total`` begins."""
        share = self.b.sdiv(self.b.mul(total, thread), self.num_threads)
        if multiple == 1:
            return share
        is_end = self.b.icmp_signed("==", thread, self.num_threads)
        return self.b.select(is_end, total, self.b.and_(share, LONG(-multiple)))

    def bounds(self, total: Value, multiple: int = 1) -> tuple[Value, Value]:
        """Return where this thread's part of ``total`` begins and ends."""
        following = self.b.add(self.thread, LONG(1))
        return self.bound(total, self.thread, multiple), self.bound(total, following, multiple)

    def for_rows(self, body: Callable[[Value], None]) -> None:
        """Do something with each of this thread's rows, by their numbers."""
        self.for_each(*self.bounds(self.num_rows), 1, body)

    def for_each(self, first: Value, stop: Value, step: int, body: Callable[[Value], None]) -> None:
        """Do something with each number."""

        def once(i: Value, _: list[Value]) -> Sequence[Value]:
            body(i)
            return []

        self.f.loop(first, stop, step, [], once)

    def row(self, start: Value, i: Value, num_bytes: Value) -> Value:
        """Return where row ``i`` is, of rows that are so far apart."""
        return self.f.at(start, self.b.mul(i, num_bytes))

    def take_function(self, num_pointers: int, num_integers: int) -> Callable[..., None]:
        """Return the function of which the step's next word is the address."""
        kind = ir.FunctionType(ir.VoidType(), [POINTER] * num_pointers + [LONG] * num_integers)
        function = self.take(kind.as_pointer())
        return lambda *arguments: self.b.call(function, arguments)


def build(features: frozenset[str]) -> Value:
    """Return the module: ``run`` and the functions of all kinds of steps; the bits are the same on all CPUs."""
    module = ir.Module()
    for name, body in _STEPS.items():
        step = Step(module, name)
        body(step)
        step.f.finish()
    _build_run(module, features)
    return module


def _build_run(module: Value, features: frozenset[str]) -> None:
    """Build run(program, batch, num_steps, thread, threads): what one thread does; all do it at the same time."""
    f = Function(module, "run", [POINTER, POINTER, LONG, LONG, LONG])
    b = f.b
    program, batch, num_steps, thread, num_threads = f.arguments
    kind = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, LONG, LONG]).as_pointer()
    arrivals = f.load(POINTER, batch, LONG(8 * Word.ARRIVALS))

    def step(_: Value, carried: list[Value]) -> list[Value]:
        words, expected = carried
        b.call(f.load(kind, words, LONG(0)), [f.at(words, LONG(24)), batch, thread, num_threads])
        size, waits = (f.load(LONG, words, LONG(at)) for at in (8, 16))
        has_to_wait = b.and_(b.icmp_signed(">", waits, LONG(0)), b.icmp_signed(">", num_threads, LONG(1)))
        expected = b.add(expected, b.select(has_to_wait, num_threads, LONG(0)))
        with b.if_then(has_to_wait):
            b.atomic_rmw("add", arrivals, LONG(1), "seq_cst")
            _wait(f, arrivals, expected, features)
        return [f.at(words, b.mul(size, LONG(8))), expected]

    f.loop(LONG(0), num_steps, 1, [program, LONG(0)], step)
    f.finish()


def _wait(f: Function, arrivals: Value, expected: Value, features: frozenset[str]) -> None:
    """Wait until so many threads have arrived; a thread that waits for long lets others have its core."""
    b = f.b
    before, look, behind = b.block, f.function.append_basic_block(), f.function.append_basic_block()
    yielding, again = f.function.append_basic_block(), f.function.append_basic_block()
    b.branch(look)
    b.position_at_end(look)
    looks = b.phi(LONG)
    here = b.load_atomic(arrivals, "acquire", 8, typ=LONG)
    looks.add_incoming(LONG(0), before)
    count = b.add(looks, LONG(1))
    waiting = f.function.append_basic_block()
    b.cbranch(b.icmp_signed(">=", here, expected), behind, waiting)
    b.position_at_end(waiting)
    # A thread that only looks leaves what a core has to the other thread of that core.
    if "sse2" in features:
        f.call("llvm.x86.sse2.pause", ir.VoidType())
    elif "neon" in features:
        f.call("llvm.aarch64.hint", ir.VoidType(), INT(1))
    b.cbranch(b.icmp_signed(">", count, LONG(_SPINS)), yielding, again)
    b.position_at_end(yielding)
    f.call("sched_yield", INT)
    b.branch(again)
    b.position_at_end(again)
    looks.add_incoming(count, again)
    b.branch(look)
    b.position_at_end(behind)


def _rms_norm(s: Step) -> None:
    """RMSNorm: from, to, weight, bias, eps, width, vectors in a row, bytes of a row of each, bytes before; see Norm.

    Bytes before: in a row, what comes before the first vector.
    """
    _norm(s, has_mean=False)


def _layer_norm(s: Step) -> None:
    """LayerNorm; its words are as those of RMSNorm."""
    _norm(s, has_mean=True)


def _norm(s: Step, *, has_mean: bool) -> None:
    f, b = s.f, s.b
    source, target, weight, bias, eps = s.take_rows(), s.take_rows(), s.take(POINTER), s.take(POINTER), s.take(FLOAT)
    width, count, source_bytes, target_bytes, before = (s.take(LONG) for _ in range(5))
    vector_bytes = b.mul(width, LONG(4))
    size = b.sitofp(width, FLOAT)

    def one(x: Value, y: Value) -> None:
        def total(of: Callable[[Value, Value], Value]) -> Value:
            def add(i: Value, sums: list[Value]) -> list[Value]:
                return [of(f.load(_FLOATS, x, b.mul(i, LONG(4))), sums[0])]

            return f.total(f.loop(LONG(0), width, LANES, [splat(FLOAT, LANES, 0.0)], add)[0])

        mean = f.spread(b.fdiv(total(b.fadd), size), LANES) if has_mean else None

        def less_mean(value: Value) -> Value:
            return value if mean is None else b.fsub(value, mean)

        def square(value: Value, found: Value) -> Value:
            rest = less_mean(value)
            return f.call(f"llvm.fma.{_OF_FLOATS}", _FLOATS, rest, rest, found)

        variance = b.fadd(b.fdiv(total(square), size), eps)
        scale = f.spread(b.fdiv(FLOAT(1.0), f.call("llvm.sqrt.f32", FLOAT, variance)), LANES)

        def store(i: Value) -> None:
            at = b.mul(i, LONG(4))
            value = b.fmul(b.fmul(less_mean(f.load(_FLOATS, x, at)), scale), f.load(_FLOATS, weight, at))
            f.store(b.fadd(value, f.load(_FLOATS, bias, at)) if has_mean else value, y, at)

        s.for_each(LONG(0), width, LANES, store)

    def row(i: Value) -> None:
        x_row, y_row = f.at(s.row(source, i, source_bytes), before), f.at(s.row(target, i, target_bytes), before)
        s.for_each(LONG(0), count, 1, lambda k: one(s.row(x_row, k, vector_bytes), s.row(y_row, k, vector_bytes)))

    s.for_rows(row)


def _add(s: Step) -> None:
    """HIDDEN += other rows: from, width."""
    f, b = s.f, s.b
    source, width = s.take_rows(), s.take(LONG)
    target = s.of_batch(POINTER, Word.HIDDEN)

    def row(i: Value) -> None:
        start = b.mul(i, width)

        def some(k: Value) -> None:
            at = b.mul(b.add(start, k), LONG(4))
            f.store(b.fadd(f.load(_FLOATS, target, at), f.load(_FLOATS, source, at)), target, at)

        s.for_each(LONG(0), width, LANES, some)

    s.for_rows(row)


def _prepare(s: Step) -> None:
    """Round rows for a matmul, see build_multiply: prepare, the matrix, from, bytes in ROUNDED before.

    Bytes before: of one row, of other matrices that are multiplied at the same time.
    """
    prepare = s.take_function(3, 3)
    matrix, source, before = s.take(POINTER), s.take_rows(), s.take(LONG)
    rounded = s.row(s.of_batch(POINTER, Word.ROUNDED), s.num_rows, before)
    prepare(source, matrix, rounded, s.num_rows, *s.bounds(s.num_rows))


def _multiply(s: Step) -> None:
    """A matmul: multiply, the matrix, bytes in ROUNDED before, to, width of a row, first column, columns, bias or 0."""
    f, b = s.f, s.b
    multiply = s.take_function(3, 4)
    matrix, before, target = s.take(POINTER), s.take(LONG), s.take_rows()
    width, column, num_columns, bias = s.take(LONG), s.take(LONG), s.take(LONG), s.take(LONG)
    rounded = s.row(s.of_batch(POINTER, Word.ROUNDED), s.num_rows, before)
    y = f.at(target, b.mul(column, LONG(4)))
    first, stop = s.bounds(num_columns, OUTPUT_STEP)
    multiply(matrix, rounded, y, width, first, stop, s.num_rows)
    with b.if_then(b.icmp_signed("!=", bias, LONG(0))):
        biases = b.inttoptr(bias, POINTER)

        def row(i: Value) -> None:
            start = s.row(y, i, b.mul(width, LONG(4)))

            def one(k: Value) -> None:
                at = b.mul(k, LONG(4))
                f.store(b.fadd(f.load(FLOAT, start, at), f.load(FLOAT, biases, at)), start, at)

            s.for_each(first, stop, 1, one)

        s.for_each(LONG(0), s.num_rows, 1, row)


def _rotate(s: Step) -> None:
    """Rotary embedding, in place, of heads side by side, see layers.rotate: rows, bytes of one, heads, D / 2."""
    f, b = s.f, s.b
    rows, row_bytes, num_heads, half = s.take_rows(), s.take(LONG), s.take(LONG), s.take(LONG)
    cos, sin = s.of_batch(POINTER, Word.COS), s.of_batch(POINTER, Word.SIN)
    lanes = LANES // 2
    floats, of_floats = vector(FLOAT, lanes), f"v{lanes}f32"
    half_bytes = b.mul(half, LONG(4))

    def row(i: Value) -> None:
        start, angles = s.row(rows, i, row_bytes), b.mul(i, half_bytes)

        def head(k: Value) -> None:
            left = s.row(start, k, b.mul(half_bytes, LONG(2)))
            right = f.at(left, half_bytes)

            def some(k: Value) -> None:
                at = b.mul(k, LONG(4))
                x, y = f.load(floats, left, at), f.load(floats, right, at)
                c, d = (f.load(floats, table, b.add(angles, at)) for table in (cos, sin))
                f.store(f.call(f"llvm.fma.{of_floats}", floats, b.fneg(y), d, b.fmul(x, c)), left, at)
                f.store(f.call(f"llvm.fma.{of_floats}", floats, x, d, b.fmul(y, c)), right, at)

            s.for_each(LONG(0), half, lanes, some)

        s.for_each(LONG(0), num_heads, 1, head)

    s.for_rows(row)


def _pools(s: Step, layer: Value) -> list[Value]:
    """Return the pools of K and of V."""
    pair = s.row(s.of_batch(POINTER, Word.POOLS), layer, LONG(16))
    return [s.f.load(POINTER, pair, LONG(at)) for at in (0, 8)]


def _store(s: Step) -> None:
    """Put K and V into the Layer's pools: rows, bytes of one, bytes before K in it, floats of K, the Layer's number."""
    f, b = s.f, s.b
    rows, row_bytes, before, width = s.take_rows(), s.take(LONG), s.take(LONG), s.take(LONG)
    pools, slots = _pools(s, s.take(LONG)), s.of_batch(POINTER, Word.SLOTS)
    width_bytes = b.mul(width, LONG(4))

    def row(i: Value) -> None:
        slot = f.load(LONG, slots, b.mul(i, LONG(8)))
        source = f.at(s.row(rows, i, row_bytes), before)
        for pool in pools:
            target = s.row(pool, slot, width_bytes)

            def some(k: Value, source: Value = source, target: Value = target) -> None:
                at = b.mul(k, LONG(4))
                f.store(f.load(_FLOATS, source, at), target, at)

            s.for_each(LONG(0), width, LANES, some)
            source = f.at(source, width_bytes)

    s.for_rows(row)


def _attend(s: Step) -> None:
    """Attention, see llvm_attention_code.py: attend, Q, bytes of a row, to, bytes of a row, KV heads, window, Layer."""
    f, b = s.f, s.b
    attend = s.take_function(6, 7)
    rows, row_bytes, target, target_bytes = s.take_rows(), s.take(LONG), s.take_rows(), s.take(LONG)
    num_kv_heads, window = s.take(LONG), s.take(LONG)
    keys, values = _pools(s, s.take(LONG))
    scores = s.row(s.of_batch(POINTER, Word.SCORES), s.thread, s.of_batch(LONG, Word.SCORE_BYTES))
    bounds = s.row(s.of_batch(POINTER, Word.BOUNDS), s.thread, LONG(8))
    first, stop = (f.load(LONG, bounds, LONG(at)) for at in (0, 8))
    with b.if_then(b.icmp_signed("<", first, stop)):
        reads, width = s.of_batch(POINTER, Word.READS), s.of_batch(LONG, Word.WIDTH)
        sizes = (num_kv_heads, row_bytes, target_bytes, window, width, first, stop)
        attend(rows, keys, values, target, reads, scores, *sizes)


def _activate(s: Step) -> None:
    """What stands between the MLP's matmuls, see llvm_activation_code.py: activate, from, bytes of a row, to, width."""
    activate = s.take_function(2, 5)
    source, source_bytes, target, width = s.take_rows(), s.take(LONG), s.take_rows(), s.take(LONG)
    activate(source, target, width, source_bytes, s.b.mul(width, LONG(4)), *s.bounds(s.num_rows))


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
