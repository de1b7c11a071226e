"""The machine words beneath the hart: numba intrinsics for memory, atomics and 64-bit arithmetic.

The hart's state and the guest's memory are plain host memory, reached by address. Every value is an ``int64`` that
holds a 64-bit pattern; what needs another reading of the pattern (unsigned, floating) has an intrinsic here. Only
the build of the engine and tests of its parts import this module, since numba takes half a second to import.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from llvmlite import ir
from numba import njit, types
from numba.core import compiler, typed_passes, untyped_passes
from numba.core.compiler_machinery import PassManager
from numba.core.registry import cpu_target
from numba.extending import intrinsic

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
I1, I128 = ir.IntType(1), ir.IntType(128)
F32, F64 = ir.FloatType(), ir.DoubleType()

#: Whether ``native`` makes functions that Python can call. The build of the engine clears it: it only wants their text.
python_face = True


@dataclass(frozen=True)
class Compiled:
    """A function that the build compiled: its symbol, and LLVM texts that define it and what of numba's it calls."""

    symbol: str
    texts: tuple[str, ...]


#: What ``native`` has compiled for the build, by what it returned.
compiled_functions: dict[Callable[..., int], Compiled] = {}


def native(function: Callable[..., int]) -> Callable[..., int]:
    """Compile a function whose arguments and result are all ``int64``.

    One explicit signature: left to itself, numba makes one variant for each literal argument.
    """
    count = len(inspect.signature(function).parameters)
    if python_face:
        signature = types.int64(*[types.int64] * count)
        return cast(Word, njit(signature, error_model="numpy")(function))
    return _for_build(function, count)


class _PlainPipeline(compiler.CompilerBase):  # type: ignore[misc]  # numba has no type information
    """Only the passes that code without arrays, closures and exceptions needs: half of numba's time."""

    def define_pipelines(self) -> list[PassManager]:
        passes = PassManager("plain")
        for step in (
            untyped_passes.TranslateByteCode,
            untyped_passes.FixupArgs,
            untyped_passes.IRProcessing,
            untyped_passes.ReconstructSSA,
            typed_passes.NopythonTypeInference,
            typed_passes.PreLowerStripPhis,
            typed_passes.IRLegalization,
            typed_passes.NativeLowering,
            typed_passes.NoPythonBackend,
        ):
            passes.add_pass(step, step.__name__)
        passes.finalize()
        return [passes]


def _for_build(function: Callable[..., int], count: int) -> Callable[..., int]:
    """Compile to LLVM text only. Others call the function by its symbol, so that each one's text stays its own."""
    flags = compiler.Flags()
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = flags.no_compile = True
    flags.error_model = "numpy"
    contexts = cpu_target.typing_context, cpu_target.target_context
    arguments = (types.int64,) * count
    result = compiler.compile_extra(*contexts, function, arguments, types.int64, flags, {}, None, _PlainPipeline)
    symbol = str(result.fndesc.mangled_name)

    def emit_call(builder: ir.IRBuilder, *values: ir.Value) -> ir.Value:
        """numba's calling convention: status ``f(result *, exception **, arguments …)``. Nothing raises."""
        pointer = I64.as_pointer()
        kind = ir.FunctionType(I32, [pointer, pointer] + [I64] * count)
        callee = builder.module.globals.get(symbol) or ir.Function(builder.module, kind, symbol)
        with builder.goto_entry_block():
            place = builder.alloca(I64)
        builder.call(callee, [place, ir.Constant(pointer, None), *values])
        return builder.load(place)

    name = f"call_{function.__name__}"
    called = define(name, emit_call, types.int64, (types.int64,) * count, function.__doc__ or "")
    libraries = [result.library, *result.library._linking_libraries]
    compiled_functions[called] = Compiled(symbol, tuple(str(library.get_llvm_str()) for library in libraries))
    return called


Emit = Callable[..., ir.Value]
Word = Callable[..., int]  #: an intrinsic whose result is a 64-bit pattern
Floating = Callable[..., float]


def define(name: str, emit: Emit, result: types.Type, arguments: tuple[types.Type, ...], words: str) -> Word:
    """An intrinsic called ``name``: ``emit(builder, *values)`` writes its instructions."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
        value = emit(builder, *values)
        return ir.Constant(I8, None) if value is None else value

    def typing(*_: Any) -> Any:
        return result(*arguments), code

    parameters = [inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [
        inspect.Parameter(f"argument_{index}", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for index in range(len(arguments))
    ]
    names = ", ".join(parameter.name for parameter in parameters)
    scope: dict[str, Any] = {"typing": typing}
    exec(f"def {name}({names}):\n    return typing({names})", scope)
    function = scope[name]
    function.__doc__ = words
    function.__module__ = __name__
    return cast(Word, intrinsic(function))


def _pointer(builder: ir.IRBuilder, address: ir.Value, element: ir.Type) -> ir.Value:
    return builder.inttoptr(address, element.as_pointer())


def _load(name: str, element: ir.IntType, signed: bool) -> Word:
    def emit(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
        value = builder.load(_pointer(builder, address, element), align=1)
        if element.width == 64:
            return value
        return builder.sext(value, I64) if signed else builder.zext(value, I64)

    return define(name, emit, types.int64, (types.int64,), f"The {element.width}-bit integer at a host address.")


def _store(name: str, element: ir.IntType) -> Word:
    def emit(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
        low = value if element.width == 64 else builder.trunc(value, element)
        builder.store(low, _pointer(builder, address, element), align=1)
        return value

    words = f"Store the low {element.width} bits of a value at a host address."
    return define(name, emit, types.int64, (types.int64, types.int64), words)


load_i8 = _load("load_i8", I8, True)
load_u8 = _load("load_u8", I8, False)
load_i16 = _load("load_i16", I16, True)
load_u16 = _load("load_u16", I16, False)
load_i32 = _load("load_i32", I32, True)
load_u32 = _load("load_u32", I32, False)
load_i64 = _load("load_i64", I64, True)
store_i8 = _store("store_i8", I8)
store_i16 = _store("store_i16", I16)
store_i32 = _store("store_i32", I32)
store_i64 = _store("store_i64", I64)


def _binary(name: str, words: str) -> Callable[[Emit], Word]:
    return lambda emit: define(name, emit, types.int64, (types.int64, types.int64), words)


def _unary(name: str, words: str) -> Callable[[Emit], Word]:
    return lambda emit: define(name, emit, types.int64, (types.int64,), words)


shift_right_logical = _binary("shift_right_logical", "Logical shift right; the amount is 0..63.")(
    lambda b, value, amount: b.lshr(value, amount)
)
less_unsigned = _binary("less_unsigned", "1 if the first pattern is below the second, both read as unsigned, else 0.")(
    lambda b, left, right: b.zext(b.icmp_unsigned("<", left, right), I64)
)
divide_unsigned = _binary("divide_unsigned", "Unsigned quotient; the divisor is not zero.")(
    lambda b, left, right: b.udiv(left, right)
)
remainder_unsigned = _binary("remainder_unsigned", "Unsigned remainder; the divisor is not zero.")(
    lambda b, left, right: b.urem(left, right)
)
divide_signed = _binary("divide_signed", "Quotient rounded to zero; neither divisor 0 nor overflow.")(
    lambda b, left, right: b.sdiv(left, right)
)
remainder_signed = _binary("remainder_signed", "Remainder with the dividend's sign; neither divisor 0 nor overflow.")(
    lambda b, left, right: b.srem(left, right)
)
sign_extend_32 = _unary("sign_extend_32", "The low 32 bits, sign-extended.")(lambda b, v: b.sext(b.trunc(v, I32), I64))
zero_extend_32 = _unary("zero_extend_32", "The low 32 bits, zero-extended.")(lambda b, v: b.zext(b.trunc(v, I32), I64))


def _high(name: str, left_signed: bool, right_signed: bool) -> Word:
    def emit(builder: ir.IRBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
        wide_left = builder.sext(left, I128) if left_signed else builder.zext(left, I128)
        wide_right = builder.sext(right, I128) if right_signed else builder.zext(right, I128)
        return builder.trunc(builder.lshr(builder.mul(wide_left, wide_right), ir.Constant(I128, 64)), I64)

    return define(name, emit, types.int64, (types.int64, types.int64), "Upper 64 bits of the 128-bit product.")


multiply_high_signed = _high("multiply_high_signed", True, True)
multiply_high_unsigned = _high("multiply_high_unsigned", False, False)
multiply_high_signed_unsigned = _high("multiply_high_signed_unsigned", True, False)

count_leading_zeros = _unary("count_leading_zeros", "Leading zero bits of a 64-bit pattern: 0..64.")(
    lambda b, v: b.ctlz(v, ir.Constant(I1, 0))
)


def _floating(name: str, function: str, kind: ir.Type, numba_kind: types.Type, count: int) -> Floating:
    def emit(builder: ir.IRBuilder, *values: ir.Value) -> ir.Value:
        declared = builder.module.declare_intrinsic(f"llvm.{function}", [kind])
        return builder.call(declared, values)

    words = f"IEEE 754 {function}, rounded to nearest even."
    return cast(Floating, define(name, emit, numba_kind, (numba_kind,) * count, words))


sqrt64 = _floating("sqrt64", "sqrt", F64, types.float64, 1)
sqrt32 = _floating("sqrt32", "sqrt", F32, types.float32, 1)

as_f64 = cast(
    Floating, define("as_f64", lambda b, v: b.bitcast(v, F64), types.float64, (types.int64,), "A pattern as a double.")
)
as_bits64 = define("as_bits64", lambda b, v: b.bitcast(v, I64), types.int64, (types.float64,), "A double's pattern.")
as_f32 = cast(
    Floating,
    define(
        "as_f32", lambda b, v: b.bitcast(b.trunc(v, I32), F32), types.float32, (types.int64,), "Low 32 bits as a float."
    ),
)
as_bits32 = define(
    "as_bits32", lambda b, v: b.zext(b.bitcast(v, I32), I64), types.int64, (types.float32,), "A float's pattern."
)


def _fma(name: str, kind: ir.Type, numba_kind: types.Type) -> Floating:
    words = "x × y + z, rounded once to nearest."
    return cast(Floating, define(name, lambda b, x, y, z: b.fma(x, y, z), numba_kind, (numba_kind,) * 3, words))


fma64 = _fma("fma64", F64, types.float64)
fma32 = _fma("fma32", F32, types.float32)


def _atomic(name: str, operation: str, element: ir.IntType) -> Word:
    def emit(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
        low = value if element.width == 64 else builder.trunc(value, element)
        old = builder.atomic_rmw(operation, _pointer(builder, address, element), low, "seq_cst")
        return old if element.width == 64 else builder.sext(old, I64)

    words = (
        f"Atomic {operation} of {element.width} bits at an aligned host address; returns the old value, sign-extended."
    )
    return define(name, emit, types.int64, (types.int64, types.int64), words)


def _atomics(operation: str, stem: str) -> tuple[Word, Word]:
    return _atomic(f"atomic_{stem}_i32", operation, I32), _atomic(f"atomic_{stem}_i64", operation, I64)


atomic_swap_i32, atomic_swap_i64 = _atomics("xchg", "swap")
atomic_add_i32, atomic_add_i64 = _atomics("add", "add")
atomic_and_i32, atomic_and_i64 = _atomics("and", "and")
atomic_or_i32, atomic_or_i64 = _atomics("or", "or")
atomic_xor_i32, atomic_xor_i64 = _atomics("xor", "xor")
atomic_max_i32, atomic_max_i64 = _atomics("max", "max")
atomic_min_i32, atomic_min_i64 = _atomics("min", "min")
atomic_maxu_i32, atomic_maxu_i64 = _atomics("umax", "maxu")
atomic_minu_i32, atomic_minu_i64 = _atomics("umin", "minu")


def _compare_exchange(name: str, element: ir.IntType) -> Word:
    def emit(builder: ir.IRBuilder, address: ir.Value, expected: ir.Value, value: ir.Value) -> ir.Value:
        if element.width != 64:
            expected, value = builder.trunc(expected, element), builder.trunc(value, element)
        pair = builder.cmpxchg(_pointer(builder, address, element), expected, value, "seq_cst", "seq_cst")
        return builder.zext(builder.extract_value(pair, 1), I64)

    words = "Store a value if the aligned host address still holds the expected one; 1 if it did, else 0."
    return define(name, emit, types.int64, (types.int64, types.int64, types.int64), words)


compare_exchange_i32 = _compare_exchange("compare_exchange_i32", I32)
compare_exchange_i64 = _compare_exchange("compare_exchange_i64", I64)


def _emit_atomic_load(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.load_atomic(_pointer(builder, address, I64), "acquire", 8)


def _emit_atomic_store(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
    builder.store_atomic(value, _pointer(builder, address, I64), "seq_cst", 8)
    return value


acquire_i64 = define("acquire_i64", _emit_atomic_load, types.int64, (types.int64,), "Atomic load with acquire order.")
publish_i64 = define(
    "publish_i64", _emit_atomic_store, types.int64, (types.int64, types.int64), "Sequentially consistent store."
)


def _emit_fence(builder: ir.IRBuilder) -> ir.Value:
    builder.fence("seq_cst")
    return ir.Constant(I64, 0)


memory_fence = define("memory_fence", _emit_fence, types.int64, (), "Order all memory accesses before against after.")


def _emit_yield(builder: ir.IRBuilder) -> ir.Value:
    """POSIX sched_yield(2), whose symbol the process already has."""
    function = builder.module.globals.get("sched_yield")
    function = function or ir.Function(builder.module, ir.FunctionType(I32, []), "sched_yield")
    return builder.sext(builder.call(function, []), I64)


yield_processor = define("yield_processor", _emit_yield, types.int64, (), "Let another thread of the host run.")

CLOCK_MONOTONIC = 1


def _emit_monotonic_ns(builder: ir.IRBuilder) -> ir.Value:
    """POSIX clock_gettime(2), whose symbol the process already has."""
    kind = ir.FunctionType(I32, [I32, ir.ArrayType(I64, 2).as_pointer()])
    function = builder.module.globals.get("clock_gettime") or ir.Function(builder.module, kind, "clock_gettime")
    with builder.goto_entry_block():
        time = builder.alloca(ir.ArrayType(I64, 2))
    builder.call(function, [ir.Constant(I32, CLOCK_MONOTONIC), time])
    seconds = builder.load(builder.gep(time, [ir.Constant(I32, 0), ir.Constant(I32, 0)]))
    rest = builder.load(builder.gep(time, [ir.Constant(I32, 0), ir.Constant(I32, 1)]))
    return builder.add(builder.mul(seconds, ir.Constant(I64, 1_000_000_000)), rest)


monotonic_ns = define("monotonic_ns", _emit_monotonic_ns, types.int64, (), "The host's monotonic clock, nanoseconds.")
