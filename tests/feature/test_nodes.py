"""Nodes: every layout against plain loops, the grids of a pair, channel segments and the matching of channels."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfr.feature.channels import channel_segments, match_channels
from sfr.feature.nodes import common_grids, to_nodes
from sfr.model.formats import Grid, View, as_map, cells, spatial_shape, token_grid

PROFILE = settings(max_examples=40, deadline=None, database=None, derandomize=True)


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bounds(cell: int, cell_count: int, size: int) -> tuple[int, int]:
    """First and last (exclusive) index that one cell of adaptive average pooling covers on one axis."""
    return cell * size // cell_count, -(-(cell + 1) * size // cell_count)


def pooled_vector(values: list[float], count: int) -> list[float]:
    result = []
    for cell in range(count):
        low, high = bounds(cell, count, len(values))
        result.append(sum(values[low:high]) / (high - low))
    return result


def reference_nodes_1d(feature: Tensor, grid: int) -> Tensor:
    """Nodes of a (B, C, L) map."""
    batch, channels, length = feature.shape
    nodes = torch.zeros(batch, grid, channels)
    for b in range(batch):
        for c in range(channels):
            for i in range(grid):
                low, high = bounds(i, grid, length)
                nodes[b, i, c] = sum(feature[b, c, x].item() for x in range(low, high)) / (high - low)
    return nodes


def reference_nodes_2d(feature: Tensor, grid: tuple[int, int]) -> Tensor:
    """Nodes of a (B, C, H, W) map, row by row."""
    batch, channels, height, width = feature.shape
    nodes = torch.zeros(batch, grid[0] * grid[1], channels)
    for b in range(batch):
        for c in range(channels):
            for i in range(grid[0]):
                for j in range(grid[1]):
                    top, bottom = bounds(i, grid[0], height)
                    left, right = bounds(j, grid[1], width)
                    window = [feature[b, c, y, x].item() for y in range(top, bottom) for x in range(left, right)]
                    nodes[b, i * grid[1] + j, c] = sum(window) / len(window)
    return nodes


@pytest.mark.parametrize(("length", "grid"), [(8, 4), (7, 3), (5, 5), (6, 1)])
def test_nodes_of_a_1d_map_are_means_over_its_cells(length: int, grid: int) -> None:
    feature = features(2, 3, length)
    torch.testing.assert_close(to_nodes(feature, (grid,)), reference_nodes_1d(feature, grid))


@pytest.mark.parametrize(("size", "grid"), [((8, 8), (4, 4)), ((7, 5), (3, 2)), ((4, 6), (4, 6)), ((5, 4), (1, 4))])
def test_nodes_of_a_2d_map_are_means_over_its_cells(size: tuple[int, int], grid: tuple[int, int]) -> None:
    feature = features(2, 3, *size)
    torch.testing.assert_close(to_nodes(feature, grid), reference_nodes_2d(feature, grid))


def test_nodes_of_a_3d_map_are_means_over_its_cells() -> None:
    feature = features(2, 3, 4, 6, 2)
    expected = torch.zeros(2, 2 * 3 * 2, 3)
    for i in range(2):
        for j in range(3):
            for k in range(2):
                cell = feature[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, k : k + 1]
                expected[:, (i * 3 + j) * 2 + k] = cell.mean(dim=(2, 3, 4))
    torch.testing.assert_close(to_nodes(feature, (2, 3, 2)), expected)


@pytest.mark.parametrize(("size", "grid"), [((8, 6), (4, 3)), ((7, 5), (3, 2)), ((4, 4), (4, 4))])
def test_nodes_of_a_channels_last_map_are_means_over_its_cells(size: tuple[int, int], grid: tuple[int, int]) -> None:
    feature = features(2, *size, 3)
    expected = reference_nodes_2d(feature.permute(0, 3, 1, 2), grid)
    torch.testing.assert_close(to_nodes(as_map(feature, View("channels_last")), grid), expected)


@pytest.mark.parametrize(("count", "grid"), [(12, 4), (7, 3)])
def test_nodes_of_tokens_are_means_over_neighbouring_tokens(count: int, grid: int) -> None:
    feature = features(2, count, 3)
    expected = reference_nodes_1d(feature.transpose(1, 2), grid)
    torch.testing.assert_close(to_nodes(as_map(feature, View("tokens")), (grid,)), expected)


def test_nodes_of_tokens_at_full_count_are_the_tokens() -> None:
    feature = features(2, 9, 5)
    assert torch.equal(to_nodes(as_map(feature, View("tokens")), (9,)), feature)


def test_tokens_of_an_image_are_its_map_row_by_row_without_the_prefix() -> None:
    feature = features(2, 2 + 12, 5)
    unfolded = as_map(feature, View("tokens", 2, (6, 8)))
    assert unfolded.shape == (2, 5, 3, 4)
    for row in range(3):
        for column in range(4):
            assert torch.equal(unfolded[:, :, row, column], feature[:, 2 + row * 4 + column])


def test_tokens_of_a_sequence_keep_one_axis() -> None:
    feature = features(2, 12, 5)
    unfolded = as_map(feature, View("tokens"))
    assert torch.equal(unfolded, feature.transpose(1, 2))
    assert torch.equal(as_map(feature.transpose(0, 1), View("sequence_first")), unfolded)


def test_a_map_has_its_channels_first_and_shares_the_memory_of_the_output() -> None:
    feature = features(2, 3, 4, 5)
    for layout, output in (("channels_first", feature), ("channels_last", feature.permute(0, 2, 3, 1))):
        unfolded = as_map(output, View(layout))
        assert torch.equal(unfolded, feature)
        assert unfolded.data_ptr() == feature.data_ptr()


@pytest.mark.parametrize(
    ("count", "grid", "expected"),
    [
        (196, (14, 14), (14, 14)),
        (49, (14, 14), (7, 7)),
        (50, (14, 14), (50,)),
        (32, (4, 8), (4, 8)),
        (8, (4, 8), (2, 4)),
        (27, (6, 6, 6), (3, 3, 3)),
        (12, (12,), (12,)),
        (12, (), (12,)),
    ],
)
def test_grid_of_tokens_has_the_proportions_of_the_map(count: int, grid: Grid, expected: Grid) -> None:
    assert token_grid(count, grid) == expected


def test_node_of_a_vector_is_the_vector() -> None:
    feature = features(2, 5)
    assert torch.equal(to_nodes(as_map(feature, View("vector")), ()), feature[:, None, :])


def test_nodes_do_not_depend_on_the_memory_format() -> None:
    feature = features(2, 3, 8, 8)
    strided = feature.to(memory_format=torch.channels_last)
    torch.testing.assert_close(to_nodes(strided, (4, 4)), to_nodes(feature, (4, 4)))


@pytest.mark.parametrize(
    ("shape", "layout", "grid"),
    [
        ((2, 3, 8), "channels_first", (4,)),
        ((2, 3, 8, 8), "channels_first", (4, 4)),
        ((2, 3, 4, 4, 4), "channels_first", (2, 2, 2)),
        ((2, 8, 8, 3), "channels_last", (8, 8)),
        ((2, 9, 3), "tokens", (4,)),
        ((2, 3), "vector", ()),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_nodes_are_float64_for_a_float64_map_and_float32_otherwise(
    shape: tuple[int, ...], layout: Any, grid: Grid, dtype: torch.dtype, expected: torch.dtype
) -> None:
    assert to_nodes(as_map(torch.ones(shape, dtype=dtype), View(layout)), grid).dtype == expected


def test_gradient_of_a_node_is_spread_evenly_over_its_cell() -> None:
    feature = features(1, 1, 4, 4).requires_grad_()
    to_nodes(feature, (2, 2))[0, 3, 0].backward()
    expected = torch.zeros(1, 1, 4, 4)
    expected[0, 0, 2:, 2:] = 0.25
    assert torch.equal(feature.grad, expected)


def test_nodes_of_an_empty_batch_are_empty() -> None:
    assert to_nodes(torch.zeros(0, 3, 8, 8), (4, 4)).shape == (0, 16, 3)


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((2, 5), "vector", ()),
        ((2, 7, 5), "tokens", (7,)),
        ((2, 5, 7), "channels_first", (7,)),
        ((2, 5, 7, 8), "channels_first", (7, 8)),
        ((2, 5, 7, 8, 9), "channels_first", (7, 8, 9)),
        ((2, 7, 5), "channels_last", (7,)),
        ((2, 7, 8, 5), "channels_last", (7, 8)),
        ((2, 7, 8, 9, 5), "channels_last", (7, 8, 9)),
    ],
)
def test_spatial_shape_is_what_is_neither_batch_nor_channels(
    shape: tuple[int, ...], layout: Any, expected: Grid
) -> None:
    assert spatial_shape(torch.zeros(shape), layout) == expected


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2,), "vector"),
        ((2, 3, 4), "vector"),
        ((2, 3), "tokens"),
        ((2, 3, 4, 5), "tokens"),
        ((2, 3), "channels_first"),
        ((2, 3, 4, 5, 6, 7), "channels_first"),
        ((2, 3), "channels_last"),
        ((2, 3, 4, 5, 6, 7), "channels_last"),
    ],
)
def test_map_with_a_wrong_number_of_axes_is_refused_with_its_shape(shape: tuple[int, ...], layout: Any) -> None:
    with pytest.raises(ValueError, match=f"layout '{layout}' needs") as caught:
        as_map(torch.zeros(shape), View(layout))
    assert f"got shape {shape}" in str(caught.value)


@pytest.mark.parametrize(
    ("shallow", "deep", "max_grid", "expected"),
    [
        ((32, 32), (4, 4), 8, ((4, 4), (4, 4))),
        ((32, 32), (16, 16), 8, ((8, 8), (8, 8))),
        ((8, 8), (4, 4), 1, ((1, 1), (1, 1))),
        ((2, 2), (4, 4), 8, ((2, 2), (4, 4))),
        ((8, 4), (4, 8), 8, ((4, 4), (4, 8))),
        ((32, 16), (8, 2), 4, ((4, 2), (4, 2))),
        ((8, 8, 8), (4, 4, 2), 3, ((3, 3, 2), (3, 3, 2))),
        ((196,), (49,), 4, ((16,), (16,))),
        ((196,), (49,), 8, ((49,), (49,))),
        ((10,), (49,), 4, ((10,), (16,))),
        ((16, 16), (49,), 4, ((4, 4), (16,))),
        ((49,), (16, 16), 4, ((16,), (4, 4))),
        ((16, 16), (), 4, ((4, 4), ())),
        ((), (2, 2), 4, ((), (2, 2))),
        ((), (), 4, ((), ())),
    ],
)
def test_common_grids_of_a_pair(shallow: Grid, deep: Grid, max_grid: int, expected: tuple[Grid, Grid]) -> None:
    assert common_grids(shallow, deep, max_grid) == expected


shapes = st.lists(st.integers(1, 40), max_size=3).map(tuple)


@PROFILE
@given(shapes, shapes, st.integers(1, 9))
def test_no_map_is_ever_enlarged(shallow: Grid, deep: Grid, max_grid: int) -> None:
    for shape, grid in zip((shallow, deep), common_grids(shallow, deep, max_grid), strict=True):
        assert len(grid) == len(shape)
        assert all(1 <= count <= size for count, size in zip(grid, shape, strict=True))


@PROFILE
@given(shapes, shapes, st.integers(1, 9))
def test_no_axis_has_more_cells_than_allowed(shallow: Grid, deep: Grid, max_grid: int) -> None:
    for grid in common_grids(shallow, deep, max_grid):
        assert all(count <= (max_grid**2 if len(grid) == 1 else max_grid) for count in grid)


@pytest.mark.parametrize(("grid", "expected"), [((), 1), ((7,), 7), ((3, 4), 12), ((2, 3, 4), 24)])
def test_cells_of_a_grid(grid: Grid, expected: int) -> None:
    assert cells(grid) == expected


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 12])
def test_segments_are_runs_of_consecutive_channels(channels: int) -> None:
    nodes = features(2, 3, 12)
    expected = torch.zeros(2, 12 // channels, 3, channels)
    for g in range(12 // channels):
        for c in range(channels):
            expected[:, g, :, c] = nodes[:, :, g * channels + c]
    assert torch.equal(channel_segments(nodes, channels), expected)


@pytest.mark.parametrize(("width", "channels"), [(7, 3), (11, 4), (5, 4), (9, 2)])
def test_segments_of_channels_that_do_not_divide_are_of_the_pooled_channels(width: int, channels: int) -> None:
    nodes = features(2, 3, width)
    groups = width // channels
    expected = torch.zeros(2, groups, 3, channels)
    for b in range(2):
        for n in range(3):
            pooled = pooled_vector(nodes[b, n].tolist(), groups * channels)
            for g in range(groups):
                for c in range(channels):
                    expected[b, g, n, c] = pooled[g * channels + c]
    torch.testing.assert_close(channel_segments(nodes, channels), expected)


def test_segment_as_wide_as_the_nodes_is_the_nodes() -> None:
    nodes = features(2, 3, 5)
    assert torch.equal(channel_segments(nodes, 5)[:, 0], nodes)


@pytest.mark.parametrize("channels", [0, -1, 6])
def test_segment_width_out_of_range_is_refused_with_the_range(channels: int) -> None:
    with pytest.raises(ValueError, match=rf"channels must lie in \[1, 5\].*got {channels}"):
        channel_segments(features(2, 3, 5), channels)


@pytest.mark.parametrize(("shallow_width", "deep_width"), [(2, 6), (3, 7), (4, 4)])
def test_each_segment_gets_its_own_problem_next_to_its_image(shallow_width: int, deep_width: int) -> None:
    shallow, deep = features(2, 3, shallow_width, seed=1), features(2, 5, deep_width, seed=2)
    students, teachers = match_channels(shallow, deep, "segments")
    groups = deep_width // shallow_width
    segments = channel_segments(deep, shallow_width)
    assert len(students) == len(teachers) == 2 * groups
    for b in range(2):
        for g in range(groups):
            assert torch.equal(students[b * groups + g], shallow[b])
            assert torch.equal(teachers[b * groups + g], segments[b, g])


def test_mean_grouping_gives_the_mean_of_the_segments() -> None:
    shallow, deep = features(2, 3, 2, seed=1), features(2, 5, 6, seed=2)
    students, teachers = match_channels(shallow, deep, "mean")
    assert torch.equal(students, shallow)
    torch.testing.assert_close(teachers, (deep[:, :, 0:2] + deep[:, :, 2:4] + deep[:, :, 4:6]) / 3)


@pytest.mark.parametrize("grouping", ["segments", "mean"])
def test_wider_shallow_nodes_are_averaged_over_their_segments(grouping: Any) -> None:
    shallow, deep = features(2, 3, 6, seed=1), features(2, 5, 2, seed=2)
    students, teachers = match_channels(shallow, deep, grouping)
    torch.testing.assert_close(students, (shallow[:, :, 0:2] + shallow[:, :, 2:4] + shallow[:, :, 4:6]) / 3)
    torch.testing.assert_close(teachers, deep)


@pytest.mark.parametrize(("shallow_width", "deep_width"), [(2, 6), (6, 2), (3, 7), (4, 4)])
def test_crop_keeps_the_first_channels_both_sides_have(shallow_width: int, deep_width: int) -> None:
    shallow, deep = features(2, 3, shallow_width, seed=1), features(2, 5, deep_width, seed=2)
    students, teachers = match_channels(shallow, deep, "crop")
    width = min(shallow_width, deep_width)
    assert torch.equal(students, shallow[:, :, :width])
    assert torch.equal(teachers, deep[:, :, :width])


@PROFILE
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(["segments", "mean", "crop"]))
def test_matched_sides_have_equal_problems_and_channels(shallow: int, deep: int, grouping: Any) -> None:
    students, teachers = match_channels(torch.zeros(2, 3, shallow), torch.zeros(2, 5, deep), grouping)
    assert students.shape[::2] == teachers.shape[::2]
    assert students.shape[2] == min(shallow, deep)


@pytest.mark.parametrize("grouping", ["segments", "mean", "crop"])
def test_matching_keeps_float64(grouping: Any) -> None:
    students, teachers = match_channels(torch.zeros(2, 3, 2).double(), torch.zeros(2, 5, 7).double(), grouping)
    assert students.dtype == teachers.dtype == torch.float64
