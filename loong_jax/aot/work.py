"""What a compiled step does: bytes it reads from HBM, and the floating-point operations of its matrix products.

Counted from the scheduled program, with loops multiplied out. What kernels read and compute is data of the step, so
kernels are left out here: `kernel_operands` names what they could read. XLA's own cost analysis counts a loop's body
once and knows nothing of VMEM. What it is not: time.
"""

import math
import re
from collections.abc import Callable

from loong_jax.aot.hlo import Array, Module, Operation, arrays

_NO_READ = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id", "replica-id"),
    *("copy-done", "slice-done", "async-done", "after-all", "opt-barrier", "while", "conditional", "call"),
}
_SLICED = ("dynamic-slice", "slice", "gather")
_IN_PLACE = ("dynamic-update-slice", "scatter")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_DIM_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def hbm_read_bytes(module: Module) -> int:
    """Bytes that one device reads from HBM in one step, without those of kernels and of loops whose trip count is data;
    of branches the one that reads least. What a fusion only slices counts as the slice, what it updates in place as
    nothing."""
    return _total(module, lambda names, op: _read_bytes(module, names, op))


def matmul_flops(module: Module) -> int:
    """Floating-point operations of convolutions and dots, in and outside of fusions; loops and branches as above."""

    def of(names: dict[str, Operation], op: Operation) -> int:
        if op.opcode == "fusion":
            return sum(_inner_flops(module, name) for name in op.called)
        return _flops(names, op)

    return _total(module, of)


def kernel_operands(module: Module) -> dict[str, list[int]]:
    """Of each kernel, by its name: bytes of what it takes from HBM, the largest first."""
    out: dict[str, list[int]] = {}
    for names in module.by_name.values():
        for op in names.values():
            if op.is_kernel:
                sizes = [array.num_bytes for array in _operands(names, op) if array.in_hbm]
                out[op.name.split(".")[0]] = sorted(sizes, reverse=True)
    return out


def vmem_bytes(module: Module) -> int:
    """Most that a kernel uses of VMEM, by the compiler; 0 without kernels."""
    used = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')
    kernels = [op for operations in module.computations.values() for op in operations if op.is_kernel]
    return max((int(found[1]) for op in kernels if (found := used.search(op.rest))), default=0)


def _total(module: Module, of: Callable[[dict[str, Operation], Operation], int]) -> int:
    def walk(name: str) -> int:
        names, total = module.by_name[name], 0
        for op in module.computations[name]:
            if loop := module.loop(name, op):
                total += walk(loop.body) * (loop.trips or 0)
            elif op.opcode == "conditional":
                total += min((walk(called) for called in op.called if called in module.computations), default=0)
            elif op.opcode == "call":
                total += sum(walk(called) for called in op.called)
            else:
                total += of(names, op)
        return total

    return walk(module.entry)


def _operands(names: dict[str, Operation], op: Operation) -> list[Array]:
    return [array for operand in op.operands if operand in names for array in arrays(names[operand].shape)]


def _read_bytes(module: Module, names: dict[str, Operation], op: Operation) -> int:
    if op.opcode in _NO_READ or op.is_kernel:
        return 0
    if op.opcode == "fusion":
        inner = module.computations[op.called[0]]
        parameters = {int(p.rest.split(")")[0]): p for p in inner if p.opcode == "parameter"}
        return sum(
            _parameter_bytes(module, op.called[0], parameters[index].name)
            for index, operand in enumerate(op.operands)
            if operand in names and index in parameters and _in_hbm(names[operand])
        )
    first = names.get(op.operands[0]) if op.operands else None
    if first is not None and op.opcode in (*_SLICED, *_IN_PLACE):
        if op.opcode in _SLICED:
            return op.num_bytes if _in_hbm(first) else 0
        return sum(names[o].num_bytes for o in op.operands[1:] if o in names and _in_hbm(names[o]))
    if op.opcode in ("slice-start", "dynamic-slice-start", "async-start"):  # a part on its way into VMEM
        arriving = [array.num_bytes for array in arrays(op.shape) if not array.in_hbm]
        return max(arriving, default=0) if first is not None and _in_hbm(first) else 0
    return sum(array.num_bytes for array in _operands(names, op) if array.in_hbm)


def _in_hbm(op: Operation) -> bool:
    return any(array.in_hbm for array in arrays(op.shape))


def _parameter_bytes(module: Module, computation: str, parameter: str) -> int:
    """Bytes that a fused computation reads of one parameter: all of it, unless everybody slices or updates it."""
    names, total = module.by_name[computation], 0
    if module.computations[computation][-1].name == parameter:  # the result, by another name
        return names[parameter].num_bytes
    for user in module.computations[computation]:
        if parameter not in user.operands:
            continue
        is_first = user.operands[0] == parameter
        if user.opcode in _SLICED and is_first:
            total += user.num_bytes
        elif user.opcode in _IN_PLACE and is_first:
            continue
        elif user.opcode in ("bitcast", "get-tuple-element", "reshape"):
            total += _parameter_bytes(module, computation, user.name)
        elif user.opcode == "fusion":
            inner = module.computations[user.called[0]]
            index = user.operands.index(parameter)
            name = next(p.name for p in inner if p.opcode == "parameter" and p.rest.startswith(f"{index})"))
            total += _parameter_bytes(module, user.called[0], name)
        else:
            return names[parameter].num_bytes
    return min(total, names[parameter].num_bytes)


def _inner_flops(module: Module, computation: str) -> int:
    names, total = module.by_name[computation], 0
    for op in module.computations[computation]:
        total += _flops(names, op)
        if op.opcode == "fusion":
            total += sum(_inner_flops(module, name) for name in op.called)
    return total


def _flops(names: dict[str, Operation], op: Operation) -> int:
    if op.opcode not in ("convolution", "dot") or len(op.operands) < 2:
        return 0
    left, right, out = (arrays(shape)[0].dims for shape in (*(names[o].shape for o in op.operands[:2]), op.shape))
    if op.opcode == "dot":
        contracted = _CONTRACTED.search(op.rest)
        dims = [int(n) for n in contracted[1].split(",") if n] if contracted else []
        return 2 * math.prod(out) * math.prod(left[dim] for dim in dims)
    labels = _DIM_LABELS.search(op.rest)
    if labels is None:
        return 0
    of_left, of_right, of_out = labels.groups()
    features = right[of_right.index("i")]
    batch = out[of_out.index("b")] * out[of_out.index("f")]
    spatial = [label for label in of_out if label.isdigit()]
    hits = [
        _window_hits(op.rest, axis, left[of_left.index(s)], right[of_right.index(s)], out[of_out.index(s)])
        for axis, s in enumerate(spatial)
    ]
    return 2 * batch * features * math.prod(hits)


def _window_hits(rest: str, axis: int, left: int, window: int, out: int) -> int:
    """Pairs of output place and window place that meet a place of the input, which is not padding, along one axis."""
    given = _WINDOW.search(rest)
    fields = dict(field.split("=") for field in given[1].split()) if given else {}
    pick = lambda name, default: fields[name].split("x")[axis] if name in fields else default
    stride, dilation = int(pick("stride", "1")), int(pick("rhs_dilate", "1"))
    spread, low = int(pick("lhs_dilate", "1")), int(pick("pad", "0_0").split("_")[0])
    places = (o * stride + w * dilation - low for o in range(out) for w in range(window))
    return sum(p % spread == 0 and 0 <= p // spread < left for p in places)
