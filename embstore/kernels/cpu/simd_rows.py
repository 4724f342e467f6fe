"""Two operations on a row, written for the processor's vector registers: a product with a matrix, and padding.

As numba compiles loops over columns, sums live in memory, and each loop first asks whether its input and output overlap
(which takes longer than a few products) or ends at a length that the processor cannot guess. Here the sums of up to 64
columns stay in registers while all rows of the matrix are added, and a short row is read through a mask. Products are
rounded before they are added, in the order of the rows: the bits are those of the plain loops.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES, VECTORS = 16, 4
"""Floats in a vector (a processor with shorter ones takes several), and vectors that are summed at the same time."""
_FLOAT, _INT = ir.FloatType(), ir.IntType(64)


class _Rows:
    """What both operations need: addresses of elements, and loops over the columns of `out` in groups of vectors."""

    def __init__(self, context: Any, builder: Any, sig: Any, args: Any) -> None:
        self.context, self.builder, self.sig, self.args = context, builder, sig, args

    def address(self, number: int, row: Any, column: Any) -> Any:
        """Where element [row, column] of the array in argument `number` is."""
        array = self.context.make_array(self.sig.args[number])(self.context, self.builder, self.args[number])
        return cgutils.get_item_pointer(self.context, self.builder, self.sig.args[number], array, [row, column])

    def width(self, number: int) -> Any:
        """Columns of the array in argument `number`."""
        array = self.context.make_array(self.sig.args[number])(self.context, self.builder, self.args[number])
        return cgutils.unpack_tuple(self.builder, array.shape)[1]

    def vectors(self, start: Any, offset: Any, count: int, lanes: int) -> list[Any]:
        """Addresses of `count` vectors that follow each other from `start[offset]` on."""
        kind = ir.VectorType(_FLOAT, lanes).as_pointer()
        first = self.builder.bitcast(self.builder.gep(start, [offset]), kind)
        return [self.builder.gep(first, [_INT(number)]) for number in range(count)]

    def groups(self, begin: Any, end: Any, group: int) -> tuple[Any, Any]:
        """A loop over whole groups of columns between `begin` and `end`, and where the last of them ends."""
        b = self.builder
        last = b.add(begin, b.and_(b.sub(end, begin), _INT(-group)))
        return cgutils.for_range_slice(b, begin, last, _INT(group), _INT), last

    def everywhere(self, value: Any, kind: Any) -> Any:
        """The vector whose lanes are all `value`."""
        none = ir.Constant(kind, ir.Undefined)
        one = self.builder.insert_element(none, value, ir.IntType(32)(0))
        return self.builder.shuffle_vector(
            one, none, ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
        )


def _emit_multiply(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    rows, (_, _, row, at, width, _, _, i) = _Rows(context, builder, sig, args), args
    base, source = rows.address(0, _INT(0), _INT(0)), rows.address(1, row, at)
    matrix, out, dim = rows.address(5, _INT(0), _INT(0)), rows.address(6, i, _INT(0)), rows.width(6)

    def columns(begin: Any, count: int, lanes: int) -> Any:
        kind = ir.VectorType(_FLOAT, lanes)
        sums = [cgutils.alloca_once(builder, kind) for _ in range(count)]
        loop, last = rows.groups(begin, dim, count * lanes)
        with loop as (column, _):
            for total, place in zip(sums, rows.vectors(base, column, count, lanes), strict=True):
                builder.store(builder.load(place, align=4), total)
            with cgutils.for_range(builder, width, intp=_INT) as inner:
                factor = rows.everywhere(builder.load(builder.gep(source, [inner.index])), kind)
                offset = builder.add(builder.mul(inner.index, dim), column)
                for total, place in zip(sums, rows.vectors(matrix, offset, count, lanes), strict=True):
                    product = builder.fmul(factor, builder.load(place, align=4))
                    builder.store(builder.fadd(builder.load(total), product), total)
            for total, place in zip(sums, rows.vectors(out, column, count, lanes), strict=True):
                builder.store(builder.load(total), place, align=4)
        return last

    columns(columns(columns(_INT(0), VECTORS, LANES), 1, LANES), 1, 1)
    return context.get_dummy_value()


def _emit_pad(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    rows, (_, start, width, _, i) = _Rows(context, builder, sig, args), args
    source, out, dim = rows.address(0, _INT(0), start), rows.address(3, i, _INT(0)), rows.width(3)

    def columns(begin: Any, lanes: int) -> Any:
        kind, short = ir.VectorType(_FLOAT, lanes), ir.VectorType(ir.IntType(32), lanes)
        masks = ir.VectorType(ir.IntType(1), lanes)
        load = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(kind, [kind.as_pointer(), ir.IntType(32), masks, kind]),
            f"llvm.masked.load.v{lanes}f32.p0",
        )
        loop, last = rows.groups(begin, dim, lanes)
        with loop as (column, _):
            left = builder.trunc(builder.sub(width, column), ir.IntType(32))
            mask = builder.icmp_signed("<", ir.Constant(short, list(range(lanes))), rows.everywhere(left, short))
            place = rows.vectors(source, column, 1, lanes)[0]
            value = builder.call(load, [place, ir.IntType(32)(4), mask, ir.Constant(kind, [0.0] * lanes)])
            builder.store(value, rows.vectors(out, column, 1, lanes)[0], align=4)
        return last

    columns(columns(_INT(0), LANES), 1)
    return context.get_dummy_value()


@intrinsic
def multiply_row(
    typing_context: Any,  # noqa: ARG001
    base: Any,
    table: Any,
    row: Any,  # noqa: ARG001
    at: Any,  # noqa: ARG001
    width: Any,  # noqa: ARG001
    matrix: Any,
    out: Any,
    i: Any,  # noqa: ARG001
) -> Any:
    """out[i] = base[0] + table[row, at : at + width] @ matrix: float32, in C order; the caller checked the sizes."""
    size = types.intp
    return types.void(base, table, size, size, size, matrix, out, size), _emit_multiply


@intrinsic
def pad_row(typing_context: Any, values: Any, start: Any, width: Any, out: Any, i: Any) -> Any:  # noqa: ARG001
    """out[i] = values[0, start : start + width], then zeros: float32, in C order; nothing else is read."""
    size = types.intp
    return types.void(values, size, size, out, size), _emit_pad
