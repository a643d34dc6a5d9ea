"""Triton kernels of `spectral_sample`: noise is drawn, projected and forgotten, then drawn again and corrected.

A channel is a list of lines (height, or frames * height) of `width` elements. Its low band is separable: columns
`column_basis` `(column_bands, width)`, lines `line_basis` `(line_bands, num_lines)`, which for video is the product of
the bases of frames and height. A program takes a few lines of one channel of one row.
"""

import triton
import triton.language as tl

from noisepolicy.ops.triton_kernels import COUNTER_WORDS, join_words, load_log_std, log_density, quad_normals


@triton.jit
def line_noise(
    plane,
    line,
    size,
    width,
    num_lines,
    channels,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    LINES: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Noise of `line` `(LINES,)` of a plane (row and channel), drawn in whole quads that may begin before the line.

    Returns:
        noise, index in the row, column and mask of what is inside the line, each `(LINES, 4 * QUADS)`.
    """
    row = plane // channels
    line_start = (plane % channels * num_lines + line) * width
    first_quad = line_start // 4
    counter = join_words(offset_low, offset_high) + row.to(tl.uint64) * tl.cast((size + 3) // 4, tl.uint64)
    quad = first_quad[:, None] + tl.arange(0, QUADS)[None, :]
    noise = quad_normals(join_words(seed_low, seed_high), counter + quad.to(tl.uint64))
    noise = tl.reshape(noise, [LINES, 4 * QUADS])
    index = (first_quad * 4)[:, None] + tl.arange(0, 4 * QUADS)[None, :]
    column = index - line_start[:, None]
    mask = (column >= 0) & (column < width) & (line < num_lines)[:, None]
    return noise, index, column, mask


@triton.jit(do_not_specialize=COUNTER_WORDS)
def project_kernel(
    column_basis,
    line_basis,
    partials,
    size,
    width,
    num_lines,
    channels,
    num_blocks,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    COLUMN_BANDS: tl.constexpr,
    LINE_BANDS: tl.constexpr,
    TILE: tl.constexpr,
    LINES: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Each block of lines' part of the low band: `partials` is `(planes, num_blocks, line_bands, column_bands)`."""
    program = tl.program_id(0)
    line = program % num_blocks * LINES + tl.arange(0, LINES)
    noise, _, column, mask = line_noise(
        program // num_blocks,
        line,
        size,
        width,
        num_lines,
        channels,
        seed_low,
        seed_high,
        offset_low,
        offset_high,
        LINES,
        QUADS,
    )
    part = partials + program.to(tl.int64) * (LINE_BANDS * COLUMN_BANDS)
    for column_band in range(COLUMN_BANDS):
        wave = tl.load(column_basis + column_band * width + column, mask=mask, other=0.0)
        line_sum = tl.sum(noise * wave, 1)
        for tile in range((LINE_BANDS + TILE - 1) // TILE):
            band = tile * TILE + tl.arange(0, TILE)
            inside = (band < LINE_BANDS)[:, None] & (line < num_lines)[None, :]
            weight = tl.load(line_basis + band[:, None] * num_lines + line[None, :], mask=inside, other=0.0)
            sums = tl.sum(weight * line_sum[None, :], 1)
            tl.store(part + band * COLUMN_BANDS + column_band, sums, mask=band < LINE_BANDS)


@triton.jit
def action_kernel(
    noise_partials,
    mean,
    log_std,
    coefficients,
    shift,
    partials,
    size,
    run,
    band_size,
    num_blocks,
    NUM_PARTIALS: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Coefficients of the noise from `project_kernel`'s parts, the action, and action - noise: exactly 0 untrained.

    `size` elements to a row, `band_size` to a channel; `partials` `(batch, num_blocks)` are log_prob's.
    """
    program = tl.program_id(0)
    row = program // num_blocks
    index = program % num_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    plane = row.to(tl.int64) * (size // band_size) + index // band_size
    place = noise_partials + plane * (NUM_PARTIALS * band_size) + index % band_size
    noise = tl.zeros([BLOCK], tl.float32)
    for part in range(NUM_PARTIALS):
        noise += tl.load(place + part * band_size, mask=mask, other=0.0)
    start = row.to(tl.int64) * size
    m = tl.load(mean + start + index, mask=mask, other=0.0).to(tl.float32)
    s = load_log_std(log_std, row, index, mask, size, run, PER_ROW)
    action = m + tl.exp(s) * noise
    tl.store(coefficients + start + index, action, mask=mask)
    tl.store(shift + start + index, action - noise, mask=mask)
    tl.store(partials + program, tl.sum(tl.where(mask, log_density(noise, s), 0.0), 0))


@triton.jit(do_not_specialize=COUNTER_WORDS)
def replace_band_kernel(
    column_basis,
    line_basis,
    shift,
    latents,
    size,
    width,
    num_lines,
    channels,
    num_blocks,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    COLUMN_BANDS: tl.constexpr,
    LINE_BANDS: tl.constexpr,
    TILE: tl.constexpr,
    LINES: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Latents: the same noise, drawn again, plus the shift of its low band."""
    program = tl.program_id(0)
    plane = program // num_blocks
    line = program % num_blocks * LINES + tl.arange(0, LINES)
    noise, index, column, mask = line_noise(
        plane,
        line,
        size,
        width,
        num_lines,
        channels,
        seed_low,
        seed_high,
        offset_low,
        offset_high,
        LINES,
        QUADS,
    )
    plane_shift = shift + plane.to(tl.int64) * (LINE_BANDS * COLUMN_BANDS)
    change = tl.zeros([LINES, 4 * QUADS], tl.float32)
    for column_band in range(COLUMN_BANDS):
        line_change = tl.zeros([LINES], tl.float32)
        for tile in range((LINE_BANDS + TILE - 1) // TILE):
            band = tile * TILE + tl.arange(0, TILE)
            inside = (band < LINE_BANDS)[:, None] & (line < num_lines)[None, :]
            weight = tl.load(line_basis + band[:, None] * num_lines + line[None, :], mask=inside, other=0.0)
            amount = tl.load(plane_shift + band * COLUMN_BANDS + column_band, mask=band < LINE_BANDS, other=0.0)
            line_change += tl.sum(weight * amount[:, None], 0)
        wave = tl.load(column_basis + column_band * width + column, mask=mask, other=0.0)
        change += line_change[:, None] * wave
    row = plane // channels
    tl.store(latents + row.to(tl.int64) * size + index, noise + change, mask=mask)
