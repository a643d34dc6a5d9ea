"""Kernels of backend `"triton"`: one block of one row to a program. Importing this module needs triton.

Formulas, constants and counters are those of csrc/philox.h and csrc/gaussian_math.h. A program writes the sum of its
block to its own place and `sum_kernel` adds a row's blocks in a fixed order: no atomics, so the same call gives the
same bits. Logarithm, sine and cosine are polynomials, as elsewhere. Programs are numbered on the grid's first axis
alone, the one that may exceed 65,535; offsets of rows are 64-bit, offsets inside a row 32-bit.

64-bit seeds and offsets come as two signed 32-bit words, never specialised: a new seed compiles nothing.
"""

import triton
import triton.language as tl

HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)

COUNTER_WORDS = ["seed_low", "seed_high", "offset_low", "offset_high"]


@triton.jit
def join_words(low, high):
    """The uint64 of two signed 32-bit words."""
    high_part = high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
    return high_part | low.to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def minus_two_log(u):
    """-2 ln(u) for u in [2^-24, 1], after Cephes' logf: u = m * 2^e with m in [sqrt(1/2), sqrt(2))."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    e = exponent.to(tl.float32)
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    tail = f * square * p - 2.12194440e-4 * e - 0.5 * square
    return -2.0 * (0.693359375 * e + (f + tail))


@triton.jit
def cos_sin_turn(u):
    """cos and sin of 2 pi u for u in [0, 1): the nearest quarter turn is taken off, a polynomial does the rest."""
    turns = 4.0 * u
    quarter = (turns + 0.5).to(tl.int32)
    r = (turns - quarter.to(tl.float32)) * 1.5707963267948966
    r2 = r * r
    s = r + r * r2 * (-1.6666654611e-1 + r2 * (8.3321608736e-3 - r2 * 1.9515295891e-4))
    c = 1.0 - 0.5 * r2 + r2 * r2 * (4.166664568298827e-2 + r2 * (-1.388731625493765e-3 + r2 * 2.443315711809948e-5))
    is_odd = (quarter & 1) != 0
    cosine = tl.where(is_odd, s, c)
    sine = tl.where(is_odd, c, s)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    return cosine, sine


@triton.jit
def box_muller(a, b):
    """Two independent standard normals of two random words."""
    radius = tl.sqrt_rn(minus_two_log(((a >> 8).to(tl.float32) + 1.0) * 5.9604644775390625e-8))
    cosine, sine = cos_sin_turn((b >> 8).to(tl.float32) * 5.9604644775390625e-8)
    return radius * cosine, radius * sine


@triton.jit
def quad_normals(seed, counter):
    """The four standard normals of each counter (uint64, any shape), in a new last dimension of (2, 2)."""
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.join(tl.join(n0, n2), tl.join(n1, n3))


@triton.jit
def log_density(noise, log_std):
    return -0.5 * noise * noise - log_std - HALF_LOG_TWO_PI


@triton.jit
def load_log_std(log_std, row, index, mask, size, run, PER_ROW: tl.constexpr):
    """A row's log-stds at `index`, one for each `run` of elements. Runs of 1 are specialised: 128-bit loads."""
    if PER_ROW:
        values = tl.load(log_std + row)
    else:
        values = tl.load(log_std + row.to(tl.int64) * (size // run) + index // run, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit(do_not_specialize=COUNTER_WORDS)
def gaussian_sample_kernel(
    mean,
    log_std,
    latents,
    partials,
    size,
    run,
    num_blocks,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Latents and each block's part of log_prob; `partials` is `(batch, num_blocks)`."""
    program = tl.program_id(0)
    row = program // num_blocks
    block = program % num_blocks
    quad = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    first = join_words(offset_low, offset_high) + row.to(tl.uint64) * tl.cast((size + 3) // 4, tl.uint64)
    noise = tl.reshape(quad_normals(join_words(seed_low, seed_high), first + quad.to(tl.uint64)), [BLOCK])
    index = block * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    start = row.to(tl.int64) * size
    m = tl.load(mean + start + index, mask=mask, other=0.0).to(tl.float32)
    s = load_log_std(log_std, row, index, mask, size, run, PER_ROW)
    tl.store(latents + start + index, m + tl.exp(s) * noise, mask=mask)
    tl.store(partials + program, tl.sum(tl.where(mask, log_density(noise, s), 0.0), 0))


@triton.jit
def density_kernel(
    latents,
    mean,
    log_std,
    log_prob_partials,
    kl_partials,
    size,
    num_blocks,
    PER_ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each block's part of log_prob and of the KL to the prior.

    A segment of `size` elements is a row, or, where `log_std` is constant over runs, one run of a row.
    """
    program = tl.program_id(0)
    segment = program // num_blocks
    index = program % num_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    start = segment.to(tl.int64) * size
    x = tl.load(latents + start + index, mask=mask, other=0.0)
    m = tl.load(mean + start + index, mask=mask, other=0.0).to(tl.float32)
    if PER_ELEMENT:
        s = tl.load(log_std + start + index, mask=mask, other=0.0).to(tl.float32)
    else:
        s = tl.load(log_std + segment).to(tl.float32)
    noise = (x - m) * tl.exp(-s)
    kl = 0.5 * (m * m + tl.exp(2.0 * s) - 1.0) - s
    tl.store(log_prob_partials + program, tl.sum(tl.where(mask, log_density(noise, s), 0.0), 0))
    tl.store(kl_partials + program, tl.sum(tl.where(mask, kl, 0.0), 0))


@triton.jit
def sum_kernel(partials, sums, num_partials, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """`sums[row] = sum(partials[row, :num_partials])`, added in float64, in a fixed order."""
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float64)
    for block in range(NUM_BLOCKS):
        index = block * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(partials + row.to(tl.int64) * num_partials + index, mask=index < num_partials, other=0.0)
        total += values.to(tl.float64)
    tl.store(sums + row, tl.sum(total, 0).to(tl.float32))


@triton.jit
def ppo_kernel(
    log_prob,
    kl_to_prior,
    old_log_prob,
    advantages,
    ratios,
    grad_log_prob,
    totals,
    batch,
    clip_range,
    kl_coef,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """The clipped objective of every row and the batch's means, by one program: what it reads is 16 bytes a row."""
    loss = tl.zeros([BLOCK], tl.float64)
    approx_kl = tl.zeros([BLOCK], tl.float64)
    num_clipped = tl.zeros([BLOCK], tl.float64)
    divisor = tl.maximum(batch, 1).to(tl.float32)
    for block in range(NUM_BLOCKS):
        row = block * BLOCK + tl.arange(0, BLOCK)
        mask = row < batch
        # Rows beyond the batch read zeros, hence have ratio 1 and add nothing to any total.
        log_ratio = tl.load(log_prob + row, mask=mask, other=0.0) - tl.load(old_log_prob + row, mask=mask, other=0.0)
        advantage = tl.load(advantages + row, mask=mask, other=0.0)
        kl = tl.load(kl_to_prior + row, mask=mask, other=0.0)
        ratio = tl.exp(log_ratio)
        # Selections rather than minimum and maximum, which would drop a NaN.
        clipped_ratio = tl.where(ratio < 1.0 - clip_range, 1.0 - clip_range, ratio)
        clipped_ratio = tl.where(ratio > 1.0 + clip_range, 1.0 + clip_range, clipped_ratio)
        unclipped = ratio * advantage
        clipped = clipped_ratio * advantage
        # Where the clipped branch is the smaller one the ratio has no gradient.
        is_free = unclipped <= clipped
        tl.store(ratios + row, ratio, mask=mask)
        tl.store(grad_log_prob + row, tl.where(is_free, -unclipped / divisor, 0.0), mask=mask)
        loss += (kl_coef * kl - tl.where(is_free, unclipped, clipped)).to(tl.float64)
        approx_kl += (ratio - 1.0 - log_ratio).to(tl.float64)
        num_clipped += tl.where(tl.abs(ratio - 1.0) > clip_range, 1.0, 0.0).to(tl.float64)
    tl.store(totals, (tl.sum(loss, 0) / divisor).to(tl.float32))
    tl.store(totals + 1, (tl.sum(approx_kl, 0) / divisor).to(tl.float32))
    tl.store(totals + 2, (tl.sum(num_clipped, 0) / divisor).to(tl.float32))


@triton.jit
def backward_kernel(
    latents,
    mean,
    log_std,
    grad_log_prob,
    grad_kl,
    grad_mean,
    grad_log_std,
    grad_latents,
    size,
    segments_per_row,
    num_blocks,
    PER_ELEMENT: tl.constexpr,
    NEEDS_LATENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of `sum(grad_log_prob * log_prob + grad_kl * kl_to_prior)`; segments as in `density_kernel`.

    Where a segment shares its log_std, `grad_log_std` holds each block's part of that gradient: `sum_kernel`'s input.
    """
    program = tl.program_id(0)
    segment = program // num_blocks
    index = program % num_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    start = segment.to(tl.int64) * size
    of_log_prob = tl.load(grad_log_prob + segment // segments_per_row)
    of_kl = tl.load(grad_kl + segment // segments_per_row)
    x = tl.load(latents + start + index, mask=mask, other=0.0)
    m = tl.load(mean + start + index, mask=mask, other=0.0).to(tl.float32)
    if PER_ELEMENT:
        s = tl.load(log_std + start + index, mask=mask, other=0.0).to(tl.float32)
    else:
        s = tl.load(log_std + segment).to(tl.float32)
    inverse_std = tl.exp(-s)
    noise = (x - m) * inverse_std
    of_value = of_log_prob * noise * inverse_std
    tl.store(grad_mean + start + index, of_value + of_kl * m, mask=mask)
    if NEEDS_LATENTS:
        tl.store(grad_latents + start + index, -of_value, mask=mask)
    of_log_std = of_log_prob * (noise * noise - 1.0) + of_kl * (tl.exp(2.0 * s) - 1.0)
    if PER_ELEMENT:
        tl.store(grad_log_std + start + index, of_log_std, mask=mask)
    else:
        tl.store(grad_log_std + program, tl.sum(tl.where(mask, of_log_std, 0.0), 0))
