"""Writes LLVM's vector instructions, so that kernels say which lanes they compute and need no vectorizer.

Vectors have any power-of-two length; LLVM splits them into the registers of the machine it compiles for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from inspect import signature
from typing import Any

import numba.core.cgutils
from llvmlite import ir  # llvmlite has no types
from numba.core import types
from numba.extending import intrinsic

from quantport_cpu.jit.target import Target, host_target

cgutils: Any = numba.core.cgutils
Value = Any  # an llvmlite value

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
_NAMES = {"i8": "i8", "i16": "i16", "i32": "i32", "i64": "i64", "half": "f16", "float": "f32"}


def inline(returns: Any, *literal: int) -> Callable[[Callable[..., Value]], Any]:
    """Makes a function that writes instructions, ``write(simd, *values)``, callable from compiled code.

    Args:
        returns: numba type of the result; ``types.void`` for nothing.
        literal: Positions of the arguments that are compile-time constants: they arrive as Python values.
    """

    def wrap(write: Callable[..., Value]) -> Any:
        def typing(context: Any, *args: Any) -> Any:
            parameters = [
                a if i in literal else types.float32 if isinstance(a, types.Float) else types.int64
                for i, a in enumerate(args)
            ]

            def generate(context: Any, builder: Any, typed: Any, values: Sequence[Value]) -> Value:
                arguments = [args[i].literal_value if i in literal else v for i, v in enumerate(values)]
                out = write(Simd(builder, host_target()), *arguments)
                return context.get_dummy_value() if returns is types.void else out

            return returns(*parameters), generate

        typing.__name__ = write.__name__
        # numba asks inspect for the parameters
        typing.__signature__ = signature(write)  # type: ignore[attr-defined]  # inspect reads it
        return intrinsic(prefer_literal=True)(typing)

    return wrap


class Simd:
    """Writes vector instructions at the position of a builder, and only those that the target has.

    Addresses are int64 values; loads and stores need no alignment.
    """

    def __init__(self, builder: Any, target: Target) -> None:
        self.b, self.target = builder, target

    def call(self, name: str, returns: Any, *args: Value) -> Value:
        """Calls the LLVM function ``name``."""
        kind = ir.FunctionType(returns, [a.type for a in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), args)

    def splat(self, lane: Value, lanes: int, kind: Any = None) -> Value:
        """``lane`` in every lane; a Python number becomes a constant of type ``kind``."""
        if kind is not None:
            return ir.Constant(ir.VectorType(kind, lanes), [lane] * lanes)
        vector = ir.VectorType(lane.type, lanes)
        first = self.b.insert_element(ir.Constant(vector, ir.Undefined), lane, ir.Constant(I32, 0))
        return self.shuffle(first, first, [0] * lanes)

    def constant(self, lanes: Sequence[float], kind: Any) -> Value:
        """A vector of Python numbers."""
        return ir.Constant(ir.VectorType(kind, len(lanes)), list(lanes))

    def shuffle(self, a: Value, b: Value, order: Sequence[int]) -> Value:
        """Lanes of ``a`` followed by ``b``, in this order."""
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), list(order)))

    def transposed(self, rows: Sequence[Value]) -> Sequence[Value]:
        """The columns of a square matrix, given as its rows; their number is a power of two."""
        size = len(rows)
        half = size // 2
        # interleaving row i with row i + half moves the bits of an element's place round by one
        orders = [[i + side for i in range(at, at + half) for side in (0, size)] for at in (0, half)]
        for _ in range(size.bit_length() - 1):
            rows = [self.shuffle(rows[i], rows[i + half], order) for i in range(half) for order in orders]
        return rows

    def at(self, address: Value, offset: Value = 0) -> Value:
        """``address + offset`` in bytes."""
        return self.b.add(address, offset if hasattr(offset, "type") else ir.Constant(I64, offset))

    def rows_there(self, count: Value, most: int) -> list[Value]:
        """Numbers of ``most`` rows: in place of those from ``count`` on, the last one that is there."""
        last = self.b.sub(count, I64(1))
        later = [I64(r) for r in range(1, most)]
        return [I64(0), *(self.b.select(self.b.icmp_signed("<", r, last), r, last) for r in later)]

    def fp32_address(self, base: Value, stride: Value, row: Value, column: Value) -> Value:
        """Where an element of an fp32 matrix lies, whose rows are ``stride`` bytes apart."""
        return self.at(self.at(base, self.b.shl(column, I64(2))), self.b.mul(stride, row))

    def load(self, kind: Any, lanes: int, address: Value) -> Value:
        """A vector, or a single value where ``lanes`` is 0."""
        kind = ir.VectorType(kind, lanes) if lanes else kind
        return self.b.load(self.b.inttoptr(address, ir.PointerType(kind)), align=1)

    def load_bf16(self, lanes: int, address: Value) -> Value:
        """A vector of bf16, as fp32."""
        wide = self.widen(self.load(I16, lanes, address), I32)
        return self.bitcast(self.int_op("shl", wide, 16), F32)

    def splat_bf16(self, address: Value, lanes: int) -> Value:
        """The bf16 at an address in every lane, as fp32."""
        twice = self.splat(self.load(I16, 0, address), 2 * lanes)
        return self.bitcast(self.int_op("shl", self.bitcast(twice, I32, lanes), 16), F32)

    def store(self, value: Value, address: Value) -> None:
        """Stores a vector or a single value."""
        self.b.store(value, self.b.inttoptr(address, ir.PointerType(value.type)), align=1)

    def store_bf16(self, value: Value, address: Value) -> None:
        """Stores fp32 as bf16, rounded to nearest even; they are finite."""
        self.store(self.narrow(self.bf16_bits(value), I16), address)

    def bf16_bits(self, value: Value) -> Value:
        """The bits of finite fp32 rounded to bf16, in the low half of int32."""
        bits = self.bitcast(value, I32)
        odd = self.int_op("and_", self.int_op("lshr", bits, 16), 1)
        rounded = self.b.add(self.int_op("add", bits, 0x7FFF), odd)
        return self.int_op("lshr", rounded, 16)

    def widen(self, value: Value, kind: Any, signed: bool = False) -> Value:
        """Integers to wider integers."""
        return (self.b.sext if signed else self.b.zext)(value, ir.VectorType(kind, value.type.count))

    def narrow(self, value: Value, kind: Any) -> Value:
        """Integers to their low bits."""
        return self.b.trunc(value, ir.VectorType(kind, value.type.count))

    def bitcast(self, value: Value, kind: Any, lanes: int = 0) -> Value:
        """The same bits as ``lanes`` lanes of another type."""
        return self.b.bitcast(value, ir.VectorType(kind, lanes or value.type.count))

    def int_to_float(self, value: Value) -> Value:
        """Signed integers to fp32, rounded to nearest even."""
        return self.b.sitofp(value, ir.VectorType(F32, value.type.count))

    def half_to_float(self, value: Value) -> Value:
        """fp16 to fp32, exactly."""
        return self.b.fpext(value, ir.VectorType(F32, value.type.count))

    def sum(self, values: Sequence[Value]) -> Value:
        """The sum of fp32 vectors, lane by lane."""
        return reduce(self.b.fadd, values)

    def int_op(self, op: str, value: Value, constant: int) -> Value:
        """``value op constant`` in every lane; ``op`` is a method of the builder, such as ``and_``."""
        return getattr(self.b, op)(value, self.splat(constant, value.type.count, value.type.element))

    def intrinsic(self, name: str, *args: Value) -> Value:
        """An intrinsic of LLVM over vectors of one type, such as ``fma``, ``umax`` or ``fabs``."""
        kind = args[0].type
        return self.call(f"llvm.{name}.v{kind.count}{_NAMES[str(kind.element)]}", kind, *args)

    def larger(self, a: Value, b: Value) -> Value:
        """The larger of two fp32 in every lane; ``b`` where one is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def reduce_lanes(self, value: Value, op: str = "add") -> Value:
        """All lanes reduced to one by ``add``, ``umax``, or for fp32 ``larger``; fp32 by halves."""
        kind = value.type
        while kind.element == F32 and value.type.count > 1:
            half = value.type.count // 2
            halves = [self.shuffle(value, value, range(i, i + half)) for i in (0, half)]
            value = self.larger(*halves) if op == "larger" else self.b.fadd(*halves)
        if kind.element == F32:
            return self.b.extract_element(value, ir.Constant(I32, 0))
        return self.call(
            f"llvm.vector.reduce.{op}.v{kind.count}{_NAMES[str(kind.element)]}", kind.element, value
        )

    def reduce_each(self, values: Sequence[Value]) -> Value:
        """The sum of the lanes of each fp32 vector: a vector of as many lanes as there are vectors."""
        count, whole = len(values), list(values)
        while len(whole) > 1:
            both = range(2 * whole[0].type.count)
            whole = [self.shuffle(a, b, both) for a, b in zip(whole[::2], whole[1::2], strict=True)]
        total = whole[0]
        while total.type.count > count:
            total = self.b.fadd(*(self.shuffle(total, total, range(i, total.type.count, 2)) for i in (0, 1)))
        return total

    def dot_pairs(self, left: Value, right: Value) -> Value:
        """Sums of two neighbouring products of int16, as int32: 256 bits or ``pair_bits``; any without x86.

        Exact for all but two products of -32768 with itself.
        """
        bits = 16 * left.type.count
        if self.target.pair_bits:
            name = "llvm.x86.avx512.pmaddw.d.512" if bits == 512 else "llvm.x86.avx2.pmadd.wd"
            return self.call(name, ir.VectorType(I32, bits // 32), left, right)
        product = self.b.mul(self.widen(left, I32, signed=True), self.widen(right, I32, signed=True))
        return self.b.add(*(self.shuffle(product, product, range(i, left.type.count, 2)) for i in (0, 1)))

    def dot_quads(self, total: Value, unsigned: Value, signed: Value) -> Value:
        """Adds to each int32 lane four products u8 x s8, exactly: 256 bits or ``dot_bits``.

        Bytes come as int32.
        """
        name = f"llvm.x86.avx512.vpdpbusd.{32 * total.type.count}"
        return self.call(name, total.type, total, unsigned, signed)

    def dot_byte_pairs(self, unsigned: Value, signed: Value) -> Value:
        """Sums of two neighbouring products u8 x s8 as int16, in which they must fit: 256 bits or
        ``pair_bits``; any without x86.
        """
        size = unsigned.type.count
        if self.target.pair_bits:
            name = "avx512.pmaddubs.w.512" if size == 64 else "avx2.pmadd.ub.sw"
            return self.call(f"llvm.x86.{name}", ir.VectorType(I16, size // 2), unsigned, signed)
        product = self.b.mul(self.widen(unsigned, I16), self.widen(signed, I16, signed=True))
        return self.b.add(*(self.shuffle(product, product, range(i, size, 2)) for i in (0, 1)))

    def look_up(self, table: Value, index: Value) -> Value:
        """Entries of a table of 16 fp32, by the low four bits of 16 lanes of int32."""
        bits = self.target.lookup_bits
        if bits == 512:
            return self.call("llvm.x86.avx512.permvar.sf.512", table.type, table, index)
        if bits == 256:
            halves = [self.shuffle(table, table, range(i, i + 8)) for i in (0, 8)]
            parts = (self.shuffle(index, index, range(i, i + 8)) for i in (0, 8))
            low, high = (self._look_up_two(halves, part) for part in parts)
            return self.shuffle(low, high, range(16))
        entries = ir.Constant(table.type, ir.Undefined)
        for lane in (ir.Constant(I32, i) for i in range(16)):
            place = self.b.and_(self.b.extract_element(index, lane), ir.Constant(I32, 15))
            entries = self.b.insert_element(entries, self.b.extract_element(table, place), lane)
        return entries

    def _look_up_two(self, tables: Sequence[Value], index: Value) -> Value:
        low, high = (self.call("llvm.x86.avx2.permps", table.type, table, index) for table in tables)
        is_high = self.b.icmp_signed("!=", self.int_op("and_", index, 8), self.splat(0, 8, I32))
        return self.b.select(is_high, high, low)

    def in_order(self, value: Value) -> Value:
        """The value, a register of the target, with everything that it needs computed here.

        LLVM would add up a long chain in another order, and keep all of its terms, which do not fit.
        """
        if not self.target.pair_bits:
            return value
        nothing = ir.InlineAsm(ir.FunctionType(value.type, [value.type]), "", "=v,0", side_effect=True)
        return self.b.call(nothing, [value])

    def variables(self, first: Value, count: int) -> list[Value]:
        """``count`` variables that start as ``first``; LLVM keeps them in registers."""
        out = [cgutils.alloca_once(self.b, first.type) for _ in range(count)]
        for variable in out:
            self.b.store(first, variable)
        return out

    def buffer(self, size: int) -> Value:
        """The address of ``size`` zero bytes on the stack."""
        kind = ir.ArrayType(I8, size)
        slot = cgutils.alloca_once(self.b, kind)
        self.b.store(ir.Constant(kind, None), slot)
        return self.b.ptrtoint(slot, I64)

    def copy(self, to: Value, source: Value, size: Value) -> None:
        """Copies ``size`` bytes."""
        pointer = ir.PointerType(I8)
        cgutils.raw_memcpy(self.b, self.b.inttoptr(to, pointer), self.b.inttoptr(source, pointer), size, 1)

    def pause(self) -> None:
        """Tells an x86 that this thread waits in a loop."""
        if self.target.pair_bits:
            self.call("llvm.x86.sse2.pause", ir.VoidType())

    def prefetch(self, address: Value) -> None:
        """Prefetches a line of memory."""
        pointer = self.b.inttoptr(address, ir.PointerType(I8))
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, *(ir.Constant(I32, c) for c in (0, 3, 1)))

    @contextmanager
    def steps(self, stop: Value, step: int) -> Iterator[Value]:
        """Loops over ``0, step, ...`` while a whole step fits below ``stop``; yields the index."""
        end = self.b.and_(stop, I64(-step))
        with cgutils.for_range_slice(self.b, I64(0), end, I64(step), I64) as (index, _):
            yield index

    @contextmanager
    def remainder(self, stop: Value, step: int) -> Iterator[tuple[Value, Value]]:
        """Runs once if ``stop`` is no multiple of ``step``; yields start and length of the remainder."""
        length = self.b.and_(stop, ir.Constant(I64, step - 1))
        with self.b.if_then(self.b.icmp_signed("!=", length, ir.Constant(I64, 0)), likely=False):
            yield self.b.sub(stop, length), length
