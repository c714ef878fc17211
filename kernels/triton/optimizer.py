"""The optimizer step: one launch for all parameters of all groups.

A program updates one chunk, at most CHUNK elements of one slice of one tensor.  It finds everything that
it needs in the tables of `depthnet.kernels.step`; what the elements of a chunk share is computed in
float64, once a program.  The formulas are those of csrc/math/adam.h and sgd.h.

Clipping adds a launch before it, for the norm of the gradients.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from depthnet.kernels.device_tables import device_tables
from depthnet.kernels.step import GROUP, TENSOR, StepTables

# A program goes through its chunk block by block.  Eight elements a thread are one access of 128 bits in a
# 16-bit dtype, two in float32, and leave registers for many programs side by side.
CHUNK, BLOCK = tl.constexpr(4096), tl.constexpr(1024)
OPTIONS = {
    "num_warps": 2 if torch.version.hip else 4,  # 128 threads; a wavefront of AMD's has 64
    # Products are contracted with sums whatever the environment says, as in the CPU's kernels.
    "enable_fp_fusion": True,
}

# The words of a row of the tables, and the storage types by their codes.
PARAM, GRAD, STATE0, STATE1, STATE2, MASTER, STEP = map(tl.constexpr, range(7))
SIZE, SLICES, _, GROUP_ROW, DTYPE, FRESH, ROUNDING = map(tl.constexpr, range(7, len(TENSOR)))
LR, EPS, WEIGHT_DECAY, BETA1, BETA2, DECOUPLED, MAXIMIZE, NESTEROV, LR_ADDRESS = map(
    tl.constexpr, range(len(GROUP))
)
TENSOR_WORDS, GROUP_WORDS = tl.constexpr(len(TENSOR)), tl.constexpr(len(GROUP))
STORAGE = tl.constexpr((tl.float32, tl.float64, tl.bfloat16, tl.float16))


@triton.jit
def _chunk(chunks):
    """This program's row of the table of chunks, with the number of elements in place of the end."""
    row = chunks + tl.program_id(0).to(tl.int64) * 4
    begin = tl.load(row + 2)
    return tl.load(row), tl.load(row + 1), begin, (tl.load(row + 3) - begin).to(tl.int32)


@triton.jit
def _array(row, WORD: tl.constexpr, TYPE: tl.constexpr, begin):
    """Where the chunk starts in one of a tensor's arrays; null if the tensor does not have it."""
    address = tl.load(row + WORD)
    address = tl.where(address != 0, address + begin * (TYPE.primitive_bitwidth // 8), 0)
    return address.to(tl.pointer_type(TYPE))


@triton.jit
def _address(array):
    return array.to(tl.int64)


@triton.jit
def _load(array, offsets, mask, ALIGN: tl.constexpr):
    return tl.load(tl.multiple_of(array + offsets, ALIGN), mask=mask)


@triton.jit
def _store(array, offsets, values, mask, ALIGN: tl.constexpr):
    pointers = tl.multiple_of(array + offsets, ALIGN)
    tl.store(pointers, values.to(array.dtype.element_ty), mask=mask)


@triton.jit
def _exists(array, offsets):
    """Whether an array that some tensors do not have is there, as a mask."""
    return tl.full(offsets.shape, _address(array), tl.int64) != 0


@triton.jit
def _both(mask, condition):
    return condition if mask is None else mask & condition


@triton.jit
def _number(row, WORD: tl.constexpr):
    return tl.load(row + WORD).to(tl.float64, bitcast=True)


@triton.jit
def _power(base, exponent):
    """base^exponent for base >= 0 and exponent > 0."""
    power = tl.exp(exponent * tl.log(tl.where(base > 0, base, 1.0)))
    return tl.where(base > 0, power, 0.0)


@triton.jit
def _root(x):
    """The square root, rounded as IEEE 754 demands; so is the quotient below."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def _quotient(x, y):
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def _scramble(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _random_bits(rounding, step, begin, offsets):
    """rounding_bits() of the elements begin + offsets, uint32."""
    key = _scramble(_scramble(rounding.to(tl.uint32)) ^ step.to(tl.uint32))
    high, first = (begin >> 32).to(tl.uint32), begin.to(tl.uint32)
    low = first + offsets.to(tl.uint32)
    key = tl.where(low >= first, _scramble(key ^ high), _scramble(key ^ (high + 1)))
    return _scramble(_scramble(low) ^ key)


@triton.jit
def _round_stochastically(x, random, TYPE: tl.constexpr):
    """x moved to one of its two neighbours in TYPE, or on to infinity; what is not finite stays."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    if TYPE.is_bf16():
        moved = (size + (random >> 16)) & 0xFFFF0000
    else:
        # The last bit of a float16, 2^(e-10) for e >= -14, is a power of two: as is the exponent alone.
        last = tl.maximum(size & 0x7F800000, 113 << 23) - (10 << 23)
        fraction = (random >> 19).to(tl.float32) * 2**-13
        up = size.to(tl.float32, bitcast=True) + fraction * last.to(tl.float32, bitcast=True)
        # Towards 0: normal numbers drop 13 bits, subnormal ones are multiples of 2^-24.
        subnormal = (tl.floor(up * 2**24) * 2**-24).to(tl.uint32, bitcast=True)
        normal = up.to(tl.uint32, bitcast=True) & 0xFFFFE000
        moved = tl.where(up < 2**-14, subnormal, normal)
    moved = (moved | (bits & 0x80000000)).to(tl.float32, bitcast=True)
    return tl.where(size < 0x7F800000, moved, x)


@triton.jit
def _count_step(row, arrived):
    """The number of this step, float64; the last of the tensor's programs to come here stores it.

    Nobody reads the count after that: each program reads it before it arrives, with all of its threads
    because of the barrier, and only when all have arrived is the count written.  `arrived` is left at 0
    for the next launch.  It is step 0 of a tensor that does not count its steps.
    """
    address = tl.load(row + STEP)
    steps_done = address.to(tl.pointer_type(tl.float32))
    step = tl.load(steps_done, mask=address != 0, other=-1.0) + 1
    slices = tl.load(row + SLICES)
    programs = slices * tl.cdiv(tl.load(row + SIZE) // slices, CHUNK)
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1) == programs - 1:
        tl.store(steps_done, step, mask=address != 0)
        tl.store(arrived, 0)
    return step.to(tl.float64)


@triton.jit
def _shared_constants(group, scales, slices, slice, grad_scale, norm, max_norm):
    """For a slice: lr, eps, and what Adam and SGD have in common: factor, shrink, coupled, couples."""
    lr_address = tl.load(group + LR_ADDRESS)
    lr_tensor = tl.load(lr_address.to(tl.pointer_type(tl.float32)), mask=lr_address != 0, other=0.0)
    lr = tl.where(lr_address != 0, lr_tensor.to(tl.float64), _number(group, LR))
    lr *= tl.load(scales + slice)
    eps = _number(group, EPS) * tl.load(scales + slices + slice)
    weight_decay = _number(group, WEIGHT_DECAY) * tl.load(scales + 2 * slices + slice)
    decoupled = _number(group, DECOUPLED) != 0
    factor = tl.where(_number(group, MAXIMIZE) != 0, -1.0, 1.0).to(tl.float64)
    divisor = tl.full((), 1.0, tl.float64)
    if grad_scale is not None:
        divisor = tl.load(grad_scale).to(tl.float64)
    if norm is not None:
        clip = max_norm / (tl.load(norm).to(tl.float64) / divisor + 1e-6)
        factor *= tl.where(clip >= 1, 1.0, clip)
    factor /= divisor
    shrink = tl.where(decoupled, 1 - lr * weight_decay, 1.0)
    coupled = tl.where(decoupled, 0.0, weight_decay)
    return lr, eps, (factor, shrink, coupled, coupled != 0)


@triton.jit
def _adam_constants(group, lr, eps, step):
    beta1, beta2 = _number(group, BETA1), _number(group, BETA2)
    step_size = lr / (1 - _power(beta1, step))
    inverse_root_bias2 = 1 / tl.sqrt(1 - _power(beta2, step))
    return beta1, 1 - beta1, beta2, 1 - beta2, inverse_root_bias2, step_size, eps


@triton.jit
def _sgd_constants(row, group, lr):
    fresh = tl.load(row + FRESH) != 0  # the first gradient of a buffer is not dampened
    one_minus_dampening = tl.where(fresh, 1.0, 1 - _number(group, BETA2))
    nesterov = _number(group, NESTEROV) != 0
    return _number(group, BETA1), one_minus_dampening, lr, nesterov


@triton.jit
def _adam(
    p,
    g,
    state0,
    state1,
    state2,
    offsets,
    mask,
    constants,
    ALIGN: tl.constexpr,
    AMSGRAD: tl.constexpr,
):
    """Write the moments and return what p moves by."""
    beta1, one_minus_beta1, beta2, one_minus_beta2, inverse_root_bias2, step_size, eps = constants
    m, v = _load(state0, offsets, mask, ALIGN), _load(state1, offsets, mask, ALIGN)
    # Between the two, from the nearer one: so that neither cancels, and m = g stays.
    nearer_m = m + one_minus_beta1.to(p.dtype) * (g - m)
    m = tl.where(one_minus_beta1 < 0.5, nearer_m, g - beta1.to(p.dtype) * (g - m))
    v = beta2.to(p.dtype) * v + one_minus_beta2.to(p.dtype) * g * g
    _store(state0, offsets, m, mask, ALIGN)
    _store(state1, offsets, v, mask, ALIGN)
    if AMSGRAD:
        exists = _exists(state2, offsets)
        greatest = _load(state2, offsets, _both(mask, exists), ALIGN)
        v = tl.where(exists & ~((v > greatest) | (v != v)), greatest, v)  # NaN stays, in either
        _store(state2, offsets, v, _both(mask, exists), ALIGN)
    root = _root(v) * inverse_root_bias2.to(p.dtype) + eps.to(p.dtype)
    return step_size.to(p.dtype) * _quotient(m, root)


@triton.jit
def _sgd(g, state0, offsets, mask, constants, ALIGN: tl.constexpr, MOMENTUM: tl.constexpr):
    """Write the momentum buffer and return what p moves by."""
    momentum, one_minus_dampening, lr, nesterov = constants
    direction = g
    if MOMENTUM:
        exists = _exists(state0, offsets)
        momentum = momentum.to(g.dtype)
        buffer = _load(state0, offsets, _both(mask, exists), ALIGN)
        buffer = momentum * buffer + one_minus_dampening.to(g.dtype) * g
        _store(state0, offsets, buffer, _both(mask, exists), ALIGN)
        moved = tl.where(nesterov, g + momentum * buffer, buffer)
        direction = tl.where(exists, moved, g)
    return lr.to(g.dtype) * direction


@triton.jit
def _update_elements(
    arrays,
    offsets,
    mask,
    shared,
    constants,
    seed,
    ALIGN: tl.constexpr,
    ADAM: tl.constexpr,
    NSTATES: tl.constexpr,
    MASTERS: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """The step of one block; `arrays` start where the chunk does, `mask` is None for whole blocks."""
    param, grad, state0, state1, state2, master = arrays
    COMPUTE: tl.constexpr = master.dtype.element_ty
    TYPE: tl.constexpr = param.dtype.element_ty
    factor, shrink, coupled, couples = shared
    if MASTERS:
        mastered = _exists(master, offsets)
        p = tl.where(
            mastered,
            _load(master, offsets, _both(mask, mastered), ALIGN),
            _load(param, offsets, _both(mask, ~mastered), ALIGN).to(COMPUTE),
        )
    else:
        p = _load(param, offsets, mask, ALIGN).to(COMPUTE)
    g = _load(grad, offsets, mask, ALIGN).to(COMPUTE) * factor.to(COMPUTE)
    g = tl.where(couples, g + coupled.to(COMPUTE) * p, g)
    if ADAM:
        change = _adam(p, g, state0, state1, state2, offsets, mask, constants, ALIGN, NSTATES == 3)
    else:
        change = _sgd(g, state0, offsets, mask, constants, ALIGN, NSTATES == 1)
    p = p * shrink.to(COMPUTE) - change
    if MASTERS:
        _store(master, offsets, p, _both(mask, mastered), ALIGN)
    if ROUNDED and TYPE.primitive_bitwidth == 16:
        rounding, step, begin = seed
        if (rounding != 0) & (_address(master) == 0):
            p = _round_stochastically(p, _random_bits(rounding, step, begin, offsets), TYPE)
    _store(param, offsets, p, mask, ALIGN)


@triton.jit
def _update_chunk(
    row,
    begin,
    count,
    shared,
    constants,
    seed,
    TYPE: tl.constexpr,
    ADAM: tl.constexpr,
    NSTATES: tl.constexpr,
    MASTERS: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """The step of a chunk of a tensor that is stored as TYPE: whole blocks, then what is left."""
    COMPUTE: tl.constexpr = tl.float64 if TYPE.is_fp64() else tl.float32
    param, grad = _array(row, PARAM, TYPE, begin), _array(row, GRAD, TYPE, begin)
    state0, state1 = _array(row, STATE0, COMPUTE, begin), _array(row, STATE1, COMPUTE, begin)
    state2, master = _array(row, STATE2, COMPUTE, begin), _array(row, MASTER, COMPUTE, begin)
    arrays = (param, grad, state0, state1, state2, master)
    bits = _address(param) | _address(grad) | _address(state0)
    bits |= _address(state1) | _address(state2) | _address(master)
    # Only without a mask, and aligned, do accesses become 128 bits wide.
    whole = tl.where(bits % 16 == 0, count // BLOCK * BLOCK, 0)
    for start in range(0, whole, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        _update_elements(
            *(arrays, offsets, None, shared, constants, seed, 16),
            *(ADAM, NSTATES, MASTERS, ROUNDED),
        )
    for start in range(whole, count, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        _update_elements(
            *(arrays, offsets, offsets < count, shared, constants, seed, 1),
            *(ADAM, NSTATES, MASTERS, ROUNDED),
        )


@triton.jit(
    do_not_specialize=["slices"],
    do_not_specialize_on_alignment=["grad_scale", "found_inf", "norm"],
)
def optimizer_step_kernel(
    tensors,
    groups,
    scales,
    slices,
    chunks,
    arrived,
    grad_scale,
    found_inf,
    norm,
    max_norm: tl.float64,
    ADAM: tl.constexpr,
    DTYPES: tl.constexpr,
    NSTATES: tl.constexpr,
    STEPS: tl.constexpr,
    MASTERS: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """Update one chunk.

    Pointers are those of `DeviceTables`; grad_scale, found_inf and norm may be None.  The constants say
    what occurs in the tables, so that nothing else is compiled: ADAM or SGD, the bits of DTYPES the
    codes of the storage types, NSTATES how many states a tensor has at most, STEPS, MASTERS and ROUNDED
    whether one counts its steps, has a master copy, is rounded stochastically.
    """
    if found_inf is not None and tl.load(found_inf) != 0:
        return
    tensor, slice, begin, count = _chunk(chunks)
    row = tensors + tensor * TENSOR_WORDS
    group = groups + tl.load(row + GROUP_ROW) * GROUP_WORDS
    lr, eps, shared = _shared_constants(group, scales, slices, slice, grad_scale, norm, max_norm)
    step = _count_step(row, arrived + tensor) if STEPS else tl.full((), 0.0, tl.float64)
    constants = _adam_constants(group, lr, eps, step) if ADAM else _sgd_constants(row, group, lr)
    seed = (tl.load(row + ROUNDING), step, begin)
    dtype = tl.load(row + DTYPE)
    for code in tl.static_range(4):
        if DTYPES & (1 << code) and dtype == code:
            _update_chunk(
                *(row, begin, count, shared, constants, seed, STORAGE[code]),
                *(ADAM, NSTATES, MASTERS, ROUNDED),
            )


@triton.jit
def gradient_norm_kernel(tensors, chunks, arrived, partial_sums, norm, DTYPES: tl.constexpr):
    """The norm of all gradients, always added in the same order; pointers of `DeviceTables`."""
    tensor, _, begin, count = _chunk(chunks)
    row = tensors + tensor * TENSOR_WORDS
    dtype = tl.load(row + DTYPE)
    program, programs = tl.program_id(0), tl.num_programs(0)
    for code in tl.static_range(4):
        if DTYPES & (1 << code) and dtype == code:
            grad = _array(row, GRAD, STORAGE[code], begin)
            COMPUTE: tl.constexpr = tl.float64 if STORAGE[code].is_fp64() else tl.float32
            whole = tl.where(_address(grad) % 16 == 0, count // BLOCK * BLOCK, 0)
            sums = tl.zeros((BLOCK,), COMPUTE)
            for start in range(0, whole, BLOCK):
                g = _load(grad, start + tl.arange(0, BLOCK), None, 16).to(COMPUTE)
                sums += g * g
            for start in range(whole, count, BLOCK):
                offsets = start + tl.arange(0, BLOCK)
                g = tl.load(grad + offsets, mask=offsets < count, other=0.0).to(COMPUTE)
                sums += g * g
            tl.store(partial_sums + program, tl.sum(sums))
    # The last program adds what all have stored.  That each stored before it arrived is what the barrier
    # and the atomic's release and acquire are for.
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1) == programs - 1:
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, programs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            total += tl.load(partial_sums + index, mask=index < programs, other=0.0)
        tl.store(norm, tl.sqrt(tl.sum(total)))
        tl.store(arrived, 0)


def _variant(tables: StepTables) -> dict[str, int | bool]:
    """The constants of the kernel for these tables, which keep them."""
    variant = tables.__dict__.get("_triton_variant")
    if variant is None:
        table = tables.tensors
        states = [bool(table[name].any()) for name in ("state0", "state1", "state2")]
        variant = tables.__dict__["_triton_variant"] = {
            "ADAM": tables.rule == "adam",
            "DTYPES": int(np.bitwise_or.reduce(1 << table["dtype"])),
            "NSTATES": sum(states),
            "STEPS": bool(table["step"].any()),
            "MASTERS": bool(table["master"].any()),
            "ROUNDED": bool(table["rounding"].any()),
        }
    return variant


def optimizer_step_(tables: StepTables) -> None:
    """One step of all parameters, in place, without waiting for the device; see `StepTables`."""
    device = device_tables(tables, CHUNK.value)
    grid = (len(device.chunks),)
    if grid == (0,):
        return
    variant, norm = _variant(tables), None
    with torch.cuda.device_of(device.scales):
        if tables.max_grad_norm is not None:
            norm = device.norm
            gradient_norm_kernel[grid](
                *(device.tensors, device.chunks, device.arrived, device.partial_sums, norm),
                DTYPES=variant["DTYPES"],
                **OPTIONS,
            )
        optimizer_step_kernel[grid](
            *(device.tensors, device.groups, device.scales, device.scales.shape[1]),
            *(device.chunks, device.arrived, tables.grad_scale, tables.found_inf, norm),
            tables.max_grad_norm or 0.0,
            **variant,
            **OPTIONS,
        )
