"""Figures of shapes, by what is drawn in them."""

import sys

import numpy as np
import pytest
import torch
from matplotlib.collections import EllipseCollection, PathCollection
from matplotlib.patches import Rectangle
from PIL import Image
from torch import nn

from icnn_zoo import IrregularConv2d, convert
from icnn_zoo.analysis import layer_shapes, plot_shapes, plot_shapes_3d, shape_statistics
from icnn_zoo.analysis.colors import tap_colors
from icnn_zoo.analysis.shape_animation import read_record, save_record
from icnn_zoo.analysis.shape_figures import MOST_POINTS, reach
from icnn_zoo.cli.pictures import save_figure
from icnn_zoo.io.files import replacing


@pytest.fixture
def model():
    layers = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 5, groups=8), nn.Conv2d(8, 4, (1, 3), dilation=2))
    model = convert(layers, "", epsilon=0.0)
    with torch.no_grad():
        for layer in model:
            layer.displacement.normal_(std=0.3)
    return model


def taps_of(axes):
    return next(item for item in axes.collections if isinstance(item, PathCollection) and item.get_label() == "taps")


def test_a_panel_for_every_layer_with_every_tap_at_its_place(model):
    figure = plot_shapes(model)
    assert len(figure.axes) == 3
    for axes, shapes in zip(figure.axes, layer_shapes(model), strict=True):
        points = taps_of(axes)
        assert np.allclose(points.get_offsets(), shapes.positions.reshape(-1, 2)[:, ::-1])
        number, taps = shapes.positions.shape[:2]
        colors = points.get_facecolors()[:, :3].reshape(number, taps, 3)
        assert (colors == colors[0]).all()  # a tap has one color in all shapes,
        assert len(np.unique(colors[0].round(4), axis=0)) == taps  # and each tap its own
        grid = next(item for item in axes.collections if item.get_label() == "regular grid")
        assert np.allclose(grid.get_offsets(), shapes.grid[:, ::-1])


def test_limits_hold_the_regular_box_and_nearly_all_taps_with_rows_downwards(model):
    for axes, shapes in zip(plot_shapes(model).axes, layer_shapes(model), strict=True):
        left, right = axes.get_xlim()
        bottom, top = axes.get_ylim()
        assert left == -right
        assert bottom == right  # rows grow downwards
        assert top == left
        box = next(patch for patch in axes.patches if isinstance(patch, Rectangle))
        assert left < box.get_x()
        assert box.get_x() + box.get_width() < right
        assert (abs(shapes.positions).max(axis=-1) <= right).mean() >= 0.995


def test_ellipses_are_two_standard_deviations_of_each_cloud(model):
    statistics = shape_statistics(model)
    for axes, shapes, entry in zip(plot_shapes(model).axes, layer_shapes(model), statistics, strict=True):
        ellipses = next(item for item in axes.collections if isinstance(item, EllipseCollection))
        assert np.allclose(ellipses.get_offsets(), shapes.positions.mean(axis=0)[:, ::-1])
        lengths, widths = ellipses.get_widths(), ellipses.get_heights()
        for tap, covariance in enumerate(entry.tap_covariance):
            expected = 4 * np.sqrt(np.linalg.eigvalsh(covariance))  # diameters
            assert (widths[tap], lengths[tap]) == pytest.approx(tuple(expected))


def test_spreads_are_dotted_ellipses_around_the_means_of_their_clouds():
    layer = IrregularConv2d(6, 2, 3, interpolation="gaussian")
    nn.init.uniform_(layer.widening, 0.1, 0.6)
    axes = plot_shapes(layer).axes[0]
    spreads = next(item for item in axes.collections if item.get_label() == "spread")
    assert np.allclose(spreads.get_offsets(), layer.positions.detach().mean(0).flip(-1))
    radii = np.stack([spreads.get_heights(), spreads.get_widths()], axis=-1) / 2
    assert np.allclose(radii, layer.spread.detach().mean(0))


def test_free_taps_are_drawn_in_their_extent_each_with_its_spread(tmp_path):
    layer = IrregularConv2d(4, 4, (9, 17), groups=4, taps=5, interpolation="triangle", shapes="kernel")
    axes = plot_shapes(layer).axes[0]
    assert len(taps_of(axes).get_offsets()) == 20
    (spreads,) = (item for item in axes.collections if isinstance(item, EllipseCollection))
    assert np.allclose(spreads.get_offsets(), layer.positions.detach().reshape(-1, 2).flip(-1))
    box = next(patch for patch in axes.patches if isinstance(patch, Rectangle))
    assert (box.get_y(), box.get_height(), box.get_width()) == (-4.5, 9, 17)
    assert len(plot_shapes_3d(layer).axes[0].lines) == 1
    assert shape_statistics(layer)[0].outside == 0
    (shapes,) = layer_shapes(layer)
    (kept,) = read_record(save_record(tmp_path, 0, [shapes]))[1]
    assert np.allclose(kept.spread, shapes.spread)
    assert kept.has_free_taps


def test_far_taps_are_counted_not_drawn_smaller():
    layer = IrregularConv2d(400, 1, 3, epsilon=0.0)
    with torch.no_grad():
        layer.displacement[0, :3] = 50.0
    axes = plot_shapes(layer).axes[0]
    assert axes.get_xlim()[1] < 3
    assert [text.get_text() for text in axes.texts] == ["3 farther away"]


def test_2048_channels_stay_readable():
    layer = IrregularConv2d(2048, 8, 5, epsilon=0.3)
    axes = plot_shapes(layer).axes[0]
    points = taps_of(axes)
    assert len(points.get_offsets()) <= MOST_POINTS
    assert points.get_alpha() <= 0.3
    assert points.get_rasterized()
    assert "2048 shapes, 800 drawn" in axes.get_title()
    in_space = plot_shapes_3d(layer).axes[0]
    assert in_space.get_zlim() == (0, 2047)


def test_the_view_in_space_has_channels_upright_and_a_line_a_tap(model):
    figure = plot_shapes_3d(model, ["0"])
    (axes,) = figure.axes
    assert len(axes.lines) == 9
    assert axes.get_zlim() == (0, 5)
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_zlabel()) == ("column (px)", "row (px)", "channel")


def test_one_shape_and_the_full_version_are_drawn():
    single = plot_shapes(IrregularConv2d(1, 4, 3)).axes[0]
    assert not any(isinstance(item, EllipseCollection) for item in single.collections)  # one point has no spread
    full = plot_shapes(IrregularConv2d(3, 4, 3, shapes="kernel")).axes[0]
    assert len(taps_of(full).get_offsets()) == 3 * 4 * 9


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (1, 7), (7, 7), (2, 2)])
def test_colors_of_neighboring_taps_can_be_told_apart(kernel):
    colors = tap_colors(kernel).reshape(*kernel, 3)
    assert ((colors >= 0) & (colors <= 1)).all()
    for axis in (0, 1):
        if kernel[axis] > 1:
            assert np.linalg.norm(np.diff(colors, axis=axis), axis=-1).min() > 0.1


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_figures_are_saved_whole_and_without_pyplot(model, tmp_path, suffix):
    path = tmp_path / f"shapes{suffix}"
    save_figure(plot_shapes(model), path)
    if suffix == ".png":
        with Image.open(path) as picture:
            assert picture.size[0] > 600
    else:
        assert "</svg>" in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def write():
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"must end in .png or .svg; got .*Try 'shapes.png'"):
        save_figure(plot_shapes(IrregularConv2d(1, 1, 3)), tmp_path / "shapes.pdf")


def test_reach_follows_shapes_that_grow():
    layer = IrregularConv2d(8, 1, 3, epsilon=0.0)
    regular = reach(layer_shapes(layer)[0])
    with torch.no_grad():
        layer.displacement.mul_(0).add_(layer.regular_grid)  # twice the size
    assert reach(layer_shapes(layer)[0]) > regular
