"""Triton kernels of the fused feature term: all stages pooled, all pairs compared, all gradients, a launch for each."""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the tables of numbers that the kernels read, a row for each set of nodes and for each pair.
# Map, start, C, H, W, grid H, grid W, N, strides of B, C, H, W, the first pair that it is the shallow side of, and, in
# the table of the pooling kernel, which has a row for each block of channels, the first of these.
SET_WIDTH = tl.constexpr(16)
# Start, C, segments and taps of the shallow side, and of the deep one, matched width, N, M, place of the costs, and the
# next pair of the same shallow side.
PAIR_WIDTH = tl.constexpr(16)
TINY = tl.constexpr(1.1754944e-38)  # the smallest normal float32
SMALL, LARGE = tl.constexpr(1e-9), tl.constexpr(1e9)  # far from where squares of float32 leave its range
SHORTEST = tl.constexpr(1e-6)  # squared: see sfr.feature.directions


@triton.jit
def pool_kernel(  # type: ignore[no-untyped-def]
    map_0, map_1, map_2, map_3, map_4, map_5, map_6, map_7, blocks_ptr, nodes_ptr, LAST: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Average-pool: program (cell, image, block of channels of a set of nodes) writes some channels of one node.

    Args:
        LAST: whether neighbouring channels of all maps are neighbours in memory.
        ALIGNED: what all channels, and strides but those of single channels, are multiples of.
    """
    row = blocks_ptr + tl.program_id(2) * SET_WIDTH
    image = tl.program_id(1).to(tl.int64)
    which, start, channels = tl.load(row), tl.load(row + 1), tl.multiple_of(tl.load(row + 2), ALIGNED)
    height, width, grid_height, grid_width = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    cell = tl.program_id(0)
    if cell < grid_height * grid_width:
        top, bottom = window(cell // grid_width, grid_height, height)
        left, right = window(cell % grid_width, grid_width, width)
        size = (bottom - top) * (right - left)
        c = tl.multiple_of(tl.load(row + 13), BLOCK_C) + tl.arange(0, BLOCK_C)
        of_image, of_channel = tl.multiple_of(tl.load(row + 8), ALIGNED), tl.load(row + 9)
        of_row, of_column = tl.multiple_of(tl.load(row + 10), ALIGNED), tl.multiple_of(tl.load(row + 11), ALIGNED)
        total = tl.zeros((BLOCK_C,), tl.float32)
        done = size * 0
        while done < size:
            p = done + tl.arange(0, BLOCK_P)
            place = image * of_image + (top + p // (right - left)) * of_row + (left + p % (right - left)) * of_column
            if LAST:  # the last axis of a tile is the one that neighbouring threads go along
                offsets = place[:, None] + c[None, :]
                inside = (p < size)[:, None] & (c < channels)[None, :]
            else:
                offsets = c[:, None] * of_channel + place[None, :]
                inside = (c < channels)[:, None] & (p < size)[None, :]
            if which == 0:
                tile = tl.load(map_0 + offsets, mask=inside, other=0.0).to(tl.float32)
            elif which == 1:
                tile = tl.load(map_1 + offsets, mask=inside, other=0.0).to(tl.float32)
            elif which == 2:
                tile = tl.load(map_2 + offsets, mask=inside, other=0.0).to(tl.float32)
            elif which == 3:
                tile = tl.load(map_3 + offsets, mask=inside, other=0.0).to(tl.float32)
            elif which == 4:
                tile = tl.load(map_4 + offsets, mask=inside, other=0.0).to(tl.float32)
            elif which == 5:
                tile = tl.load(map_5 + offsets, mask=inside, other=0.0).to(tl.float32)
            elif which == 6:
                tile = tl.load(map_6 + offsets, mask=inside, other=0.0).to(tl.float32)
            else:
                tile = tl.load(map_7 + offsets, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(tile, axis=0 if LAST else 1)
            done += BLOCK_P
        node = start + (image * tl.load(row + 7) + cell) * channels
        tl.store(nodes_ptr + node + c, total / size, mask=c < channels)


@triton.jit
def cost_kernel(  # type: ignore[no-untyped-def]
    nodes_ptr, pairs_ptr, images, cost_ptr, shallow_ptr, deep_ptr, finite_ptr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Cosine cost of one pair and image, (N, M), and what :func:`unit_length` says of its nodes."""
    pair = tl.program_id(1)
    image = tl.program_id(0).to(tl.int64)
    row = pairs_ptr + pair * PAIR_WIDTH
    width, n, m = tl.load(row + 8), tl.load(row + 9), tl.load(row + 10)
    i = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)

    # As they are, and once more in units of the largest number where squares might leave the range of float32.
    unit, other_unit = 1.0, 1.0
    peak, other_peak, sound = 0.0, 0.0, width > 0
    squares, other_squares = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    products = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    tries = width * 0 + 2
    while tries > 0:
        largest, strange = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.int32)
        other_largest, other_strange = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.int32)
        squares, other_squares = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
        products = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
        done = width * 0
        while done < width:
            own = matched(nodes_ptr, row, image, n, i, done + c, width)
            other = matched(nodes_ptr, row + 4, image, m, i, done + c, width)
            largest, strange = extremes(own, largest, strange)
            other_largest, other_strange = extremes(other, other_largest, other_strange)
            own, other = finite_only(own) / unit, finite_only(other) / other_unit
            squares += tl.sum(own * own, axis=1)
            other_squares += tl.sum(other * other, axis=1)
            products += tl.dot(own, tl.trans(other), input_precision="ieee")
            done += BLOCK_C
        sound = tl.sum(strange, axis=0) + tl.sum(other_strange, axis=0) == 0
        peak = tl.where(sound, tl.max(largest, axis=0), 0.0)
        other_peak = tl.where(sound, tl.max(other_largest, axis=0), 0.0)
        tries = tl.where((tries == 2) & sound & (extreme(peak) | extreme(other_peak)), 1, 0)
        unit = tl.where((tries == 0) | (peak < TINY), unit, peak)
        other_unit = tl.where((tries == 0) | (other_peak < TINY), other_unit, other_peak)
    squares, other_squares = tl.where(sound, squares, 0.0), tl.where(sound, other_squares, 0.0)
    factor, length, free = unit_length(squares, n, peak)
    other_factor, other_length, other_free = unit_length(other_squares, m, other_peak)
    cost = 0.5 * (length[:, None] + other_length[None, :]) - products * factor[:, None] * other_factor[None, :]
    inside = (i < n)[:, None] & (i < m)[None, :]
    offsets = tl.load(row + 11) + image * n * m + i[:, None] * m + i[None, :]
    tl.store(cost_ptr + offsets, tl.where(sound, tl.maximum(cost, 0.0), 0.0), mask=inside)
    problem = (pair * images + image) * 3 * BLOCK_N
    store_side(shallow_ptr + problem + i, BLOCK_N, tl.where(peak >= TINY, factor / unit, 0.0), length, free)
    store_side(
        deep_ptr + problem + i, BLOCK_N, tl.where(sound, other_factor / other_unit, 0.0), other_length, other_free
    )
    tl.store(finite_ptr + pair * images + image, sound.to(tl.uint8))


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    nodes_ptr, sets_ptr, pairs_ptr, cost_ptr, plan_ptr, shallow_ptr, deep_ptr, of_values_ptr, of_pair, of_image,
    gradient_ptr, images, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of the nodes: program (block of channels, image, set of nodes) sums that of all pairs it is shallow in.

    By the envelope theorem a node of mass 1/N, whose direction is u = scale * s, has the gradient
    scale * ((1/N - along) * u - sum_q plan_q v_q), with v_q the other directions and `along` what of it lies along u.
    """
    row = sets_ptr + tl.program_id(2) * SET_WIDTH
    image = tl.program_id(1).to(tl.int64)
    channels, n = tl.load(row + 2), tl.load(row + 7)
    x = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_N)
    pair = tl.load(row + 12)
    if (tl.program_id(0) * BLOCK_C < channels) & (pair >= 0):
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        while pair >= 0:
            of_pair_row = pairs_ptr + pair * PAIR_WIDTH
            segments, width, m = tl.load(of_pair_row + 2), tl.load(of_pair_row + 8), tl.load(of_pair_row + 10)
            place = tl.load(of_pair_row + 11) + image * n * m
            inside = (i < n)[:, None] & (i < m)[None, :]
            offsets = place + i[:, None] * m + i[None, :]
            plan = tl.load(plan_ptr + offsets, mask=inside, other=0.0)
            cost = tl.load(cost_ptr + offsets, mask=inside, other=0.0)
            problem = (pair * images + image) * 3 * BLOCK_N + i
            scale, length = tl.load(shallow_ptr + problem), tl.load(shallow_ptr + problem + BLOCK_N)
            free = tl.load(shallow_ptr + problem + 2 * BLOCK_N)
            other_scale, other_length = tl.load(deep_ptr + problem), tl.load(deep_ptr + problem + BLOCK_N)
            cosines = 0.5 * (length[:, None] + other_length[None, :]) - cost
            along = free * (length / n - tl.sum(plan * cosines, axis=1))
            upstream = tl.load(of_values_ptr + pair * of_pair + image * of_image)

            # A channel of a shallow side that is the wider one is in one or two windows of the matched channels.
            matched_channels = segments * width
            window_number = (x * matched_channels) // channels
            tries = 0
            while tries < tl.where(matched_channels == channels, 1, 2):
                start, stop = window(window_number, matched_channels, channels)
                contained = (start <= x) & (x < stop) & (x < channels) & (window_number < matched_channels)
                c = tl.where(contained, window_number % width, width)
                share = tl.where(contained, 1.0 / ((stop - start) * segments), 0.0)
                own = scale[:, None] * finite_only(matched(nodes_ptr, of_pair_row, image, n, i, c, width))
                other = other_scale[:, None] * finite_only(matched(nodes_ptr, of_pair_row + 4, image, m, i, c, width))
                found = (1.0 / n - along)[:, None] * own - tl.dot(plan, other, input_precision="ieee")
                total += share[None, :] * ((upstream * scale)[:, None] * found)
                window_number += 1
                tries += 1
            pair = tl.load(of_pair_row + 12)
        offsets = tl.load(row + 1) + (image * n + i[:, None]) * channels + x[None, :]
        tl.store(gradient_ptr + offsets, total, mask=(i < n)[:, None] & (x < channels)[None, :])


@triton.jit
def join_kernel(  # type: ignore[no-untyped-def]
    gradient_ptr, cells_ptr, result_ptr, channels, positions, height, width, grid_height, grid_width, of_image,
    of_channel, of_position, to_image, to_channel, to_position, GIVEN: tl.constexpr, WINDOWS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradient of a map from that of its cells (B, N, C), plus the one it has already, if there is one.

    WINDOWS along each axis may hold a position: one, or two where they overlap, as those of an uneven grid do.
    """
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(2).to(tl.int64)
    y, x = p // width, p % width
    inside = (c < channels)[:, None] & (p < positions)[None, :]
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    if GIVEN:
        offsets = image * of_image + c[:, None] * of_channel + p[None, :] * of_position
        total += tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    for down in tl.static_range(WINDOWS):
        for right in tl.static_range(WINDOWS):
            row, column = y * grid_height // height + down, x * grid_width // width + right
            top, bottom = window(row, grid_height, height)
            left, end = window(column, grid_width, width)
            contained = (row < grid_height) & (top <= y) & (column < grid_width) & (left <= x)
            cell = (image * grid_height * grid_width + row * grid_width + column) * channels
            found = tl.load(cells_ptr + cell[None, :] + c[:, None], mask=inside & contained[None, :], other=0.0).to(
                tl.float32
            )
            total += found / ((bottom - top) * (end - left))[None, :]
    offsets = image * to_image + c[:, None] * to_channel + p[None, :] * to_position
    tl.store(result_ptr + offsets, total, mask=inside)


@triton.jit
def window(index, count, size):  # type: ignore[no-untyped-def]
    """Return where a window of adaptive average pooling starts and ends."""
    return (index * size) // count, ((index + 1) * size + count - 1) // count


@triton.jit
def matched(nodes_ptr, row, image, count, i, c, width):  # type: ignore[no-untyped-def]
    """Return channels `c` of nodes `i` of one side of a pair, brought to `width` of them; zero outside.

    As channels.match_channels does: pooled to a multiple of the width, if need be, and the mean of the segments.
    """
    start, channels = tl.load(row), tl.load(row + 1)
    segments, taps = tl.load(row + 2), tl.load(row + 3)
    of_node = start + (image * count + i) * channels
    tile = tl.zeros((i.shape[0], c.shape[0]), tl.float32)
    segment = segments * 0
    while segment < segments:
        first, last = window(segment * width + c, segments * width, channels)
        tap = segment * 0
        while tap < taps:
            inside = (i < count)[:, None] & ((c < width) & (first + tap < last))[None, :]
            found = tl.load(nodes_ptr + of_node[:, None] + (first + tap)[None, :], mask=inside, other=0.0)
            tile += found / (segments * (last - first))[None, :]
            tap += 1
        segment += 1
    return tile


@triton.jit
def extremes(tile, largest, strange):  # type: ignore[no-untyped-def]
    """Return the largest size of the entries of each row so far, and how many so far are not finite."""
    size = tl.abs(tile)
    finite = (tile == tile) & (size < float("inf"))
    largest = tl.maximum(largest, tl.max(tl.where(finite, size, 0.0), axis=1))
    return largest, strange + tl.sum(tl.where(finite, 0, 1), axis=1)


@triton.jit
def extreme(peak):  # type: ignore[no-untyped-def]
    """Whether sums of squares of numbers of this size might leave the range of float32."""
    return (peak < SMALL) | (peak > LARGE)


@triton.jit
def unit_length(squares, count, peak):  # type: ignore[no-untyped-def]
    """Return what brings nodes to length 1, their squared length then, and 1 where it is 1, as directions() does."""
    least = tl.where(peak < TINY, 1.0, SHORTEST * tl.sum(squares, axis=0) / count)
    factor = 1.0 / tl.sqrt(tl.maximum(squares, least))
    return factor, squares * factor * factor, tl.where(squares > least, 1.0, 0.0)


@triton.jit
def store_side(pointers, stride, scale, length, free):  # type: ignore[no-untyped-def]
    """Store three numbers of each node of one side."""
    tl.store(pointers, scale)
    tl.store(pointers + stride, length)
    tl.store(pointers + 2 * stride, free)


@triton.jit
def finite_only(tile):  # type: ignore[no-untyped-def]
    """Return a tile with zeros in the place of what is not finite, whose gradient is zero anyway."""
    return tl.where((tile == tile) & (tl.abs(tile) < float("inf")), tile, 0.0)
