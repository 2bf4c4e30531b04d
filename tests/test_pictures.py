"""Figures hold the pixels, colours and numbers they were given."""

import io

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from lagm.core.errors import InputError
from lagm.data.labels import CELEBA8, LabelSet
from lagm.evaluation.curves import curves, moving_average, spread
from lagm.evaluation.features import feature_pyramid, k_means, pca_colours, principal_components
from lagm.evaluation.figures import panels
from lagm.evaluation.grids import comparison_grid, fit_tile, image_grid, labelled_grid, to_bytes, worst_gallery
from lagm.evaluation.metrics import ConfusionMatrix
from lagm.evaluation.tables import confusion_figure, iou_bars, iou_table

TWO = LabelSet("two", ("background", "thing"), ((10, 20, 30), (200, 100, 50)))


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(0)
    return torch.rand(5, 3, 16, 16, generator=rng) * 2 - 1, torch.randint(0, 2, (5, 16, 16), generator=rng)


def mosaic(figure):
    """The bytes shown by a grid figure, and the pixels actually drawn at that place."""
    (ax,) = figure.axes
    shown = ax.images[0].get_array()
    file = io.BytesIO()
    figure.savefig(file)
    drawn = np.asarray(Image.open(file).convert("RGB"))
    box = ax.get_window_extent()
    left, top = round(box.x0), round(drawn.shape[0] - box.y1)
    return np.asarray(shown), drawn[top : top + shown.shape[0], left : left + shown.shape[1]]


def results(n_classes=8):
    matrix = ConfusionMatrix(n_classes)
    matrix.update(torch.arange(n_classes).repeat(2),
                  torch.cat([torch.arange(n_classes), torch.zeros(n_classes, dtype=int)]))
    return matrix.compute()


def test_bytes():
    x = torch.tensor([-1.0, 1.0, -3.0, 2.0, float("nan")]).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    assert to_bytes(x)[:, 0, 0, 0].tolist() == [0, 255, 0, 255, 128]
    with pytest.raises(InputError, match="channels before"):
        to_bytes(torch.zeros(4, 8, 8, 3))


@pytest.mark.parametrize("side, wanted, got",
                         [(64, 128, 128), (50, 128, 150), (256, 128, 128), (4, 128, 128), (127, 128, 127)])
def test_tiles_grow_by_whole_factors(side, wanted, got):
    tile = fit_tile(np.random.default_rng(0).integers(0, 255, (side, side, 3)).astype(np.uint8), wanted)
    assert tile.shape == (got, got, 3)


def test_masks_are_never_blended():
    pixels = np.zeros((200, 200, 3), np.uint8)
    pixels[:, ::3] = 255
    assert set(np.unique(fit_tile(pixels, 77, smooth=False))) == {0, 255}
    assert len(np.unique(fit_tile(pixels, 77))) > 2


def test_one_mosaic_pixel_is_one_figure_pixel(batch):
    images, masks = batch
    for figure in (
        image_grid(images, columns=2, tile=32, title="faces"),
        labelled_grid(images, masks, TWO, rows=2, tile=32),
        comparison_grid(images, {"a long name\nwith a score": masks}, TWO, tile=48),
    ):
        shown, drawn = mosaic(figure)
        assert np.array_equal(shown, drawn)


def test_image_grid_places(batch):
    images, _ = batch
    shown, _ = mosaic(image_grid(images, columns=3, tile=16))
    assert shown.shape == (36, 56, 3)
    expected = to_bytes(images)
    assert np.array_equal(shown[:16, 20:36], expected[1]) and np.array_equal(shown[20:, :16], expected[3])
    assert (shown[20:, 40:] == 255).all()  # no sixth picture


def test_labelled_grid_puts_each_mask_below_its_picture(batch):
    images, masks = batch
    masks[0, 0, 0] = 255
    shown, _ = mosaic(labelled_grid(images, masks, TWO, tile=16))
    below = shown[18:34, 20:36]
    assert np.array_equal(below, np.array(TWO.palette, np.uint8)[masks[1].numpy()])
    assert (shown[18, 0] == 255).all()  # a pixel without a label is white


def test_legend_names_every_class(batch):
    images, masks = batch
    legend = labelled_grid(images, masks, CELEBA8, tile=160).legends[0]
    assert tuple(text.get_text() for text in legend.get_texts()) == CELEBA8.classes
    legend = labelled_grid(images[:2], masks[:2], CELEBA8).legends[0]
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(CELEBA8.classes)
    colours = {text.get_text(): patch.get_facecolor()
               for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)}
    assert all(np.allclose(np.array(colours[name][:3]) * 255, colour)
               for name, colour in zip(CELEBA8.classes, CELEBA8.palette, strict=True))
    assert not labelled_grid(images, masks, CELEBA8, legend=False).legends


def test_nothing_reaches_beyond_the_figure(batch):
    images, masks = batch
    many = LabelSet("many", tuple(f"part {i}" for i in range(34)), tuple((i, i, 255) for i in range(34)))
    for figure in (
        labelled_grid(images, masks, many, tile=64),
        comparison_grid(images, {"gradient matching": masks}, CELEBA8, title="A long title that is wider than that"),
        labelled_grid(images[:1], masks[:1], CELEBA8, title="One picture, two labels in all"),
        feature_pyramid(images, [torch.randn(5, 4, 4, 4), torch.randn(5, 6, 8, 8)], clusters=3),
    ):
        width, height = figure.get_size_inches() * figure.dpi
        box = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1


def test_numbers_must_agree(batch):
    images, masks = batch
    for call in (
        lambda: labelled_grid(images, masks[:3], TWO),
        lambda: comparison_grid(images, {"x": masks[:3]}, TWO),
        lambda: feature_pyramid(images, [torch.zeros(2, 3, 4, 4)]),
        lambda: image_grid(images[:0]),
        lambda: curves({"x": ([1, 2], [1])}),
        lambda: iou_bars({"x": results()}, ["only", "two"]),
        lambda: k_means(torch.zeros(3, 2), 4),
    ):
        with pytest.raises(InputError):
            call()


def test_a_single_picture(batch):
    assert isinstance(image_grid(batch[0][0]), Figure)
    assert isinstance(labelled_grid(batch[0][0], batch[1][0], TWO), Figure)


def test_principal_components():
    x = (torch.randn(3, 5, 7, 6, generator=torch.Generator().manual_seed(0))
         * torch.tensor([1.0, 4, 2, 1, 3]).view(5, 1, 1))
    parts = principal_components(x).movedim(1, -1).reshape(-1, 3)
    covariance = parts.T @ parts / len(parts)
    expected = torch.linalg.eigvalsh(torch.cov(x.movedim(1, -1).reshape(-1, 5).T, correction=0)).flip(0)[:3]
    torch.testing.assert_close(covariance, torch.diag(expected), rtol=1e-3, atol=1e-3)
    assert pca_colours(x).shape == (3, 7, 6, 3)
    assert pca_colours(x[:, :2]).shape == (3, 7, 6, 3)  # fewer channels than colours
    assert principal_components(x).equal(principal_components(x.clone()))


def test_k_means_finds_blobs_and_repeats():
    rng = torch.Generator().manual_seed(3)
    points = torch.cat([torch.randn(50, 4, generator=rng) + 9 * i for i in range(4)])
    group, centres = k_means(points, 4, seed=1)
    assert all(len(set(group[50 * i : 50 * i + 50].tolist())) == 1 for i in range(4)) and len(set(group.tolist())) == 4
    assert group.equal(k_means(points, 4, seed=1)[0]) and centres.shape == (4, 4)


def test_global_randomness_is_left_alone(batch):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    feature_pyramid(batch[0], [torch.ones(5, 3, 4, 4), batch[0]], clusters=4)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("side", [8, 20, 32, 64, 100, 300])
def test_heads_of_feature_maps_do_not_run_into_each_other(side):
    maps = [torch.randn(2, channels, 4, 4) for channels in (512, 64, 1024)]
    figure = feature_pyramid(torch.zeros(2, 3, side, side), maps, tile=64)
    renderer, (ax,) = FigureCanvasAgg(figure).get_renderer(), figure.axes
    boxes = sorted((text.get_window_extent(renderer) for text in ax.texts), key=lambda box: box.x0)
    assert len(boxes) == 4 and all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))


def test_names_move_apart_as_little_as_possible():
    assert spread([], 5) == []
    assert spread([0, 100], 10) == [0, 100]
    assert spread([2, 0], 10) == [6, -4]
    places = spread([0, 1, 2, 50, 51], 10)
    assert (np.diff(places).min() >= 10 - 1e-9 and np.isclose(np.mean(places[:3]), 1)
            and np.isclose(np.mean(places[3:]), 50.5))


def test_curves_show_the_values():
    figure = curves({"a": ([0, 1, 2], torch.tensor([0.1, 0.2, 0.4])), "b": ([0, 2], [0.1, float("nan")])}, percent=True,
                    ylabel="IoU")
    (ax,) = figure.axes
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [10, 20, 40], rtol=1e-6)
    assert ax.get_ylabel() == "IoU (%)" and [t.get_text() for t in ax.texts] == ["a"]
    _, axes = panels(2)
    assert curves({"a": ([0, 1], [1, 2])}, ax=axes[1], smooth=5) is axes[1].figure and not axes[0].lines


def test_moving_average():
    y = np.array([1.0, 5, np.nan, 3, 7])
    np.testing.assert_allclose(moving_average(y, 3), [3, 3, 4, 5, 5])
    np.testing.assert_allclose(moving_average(y[:2], 9), [3, 3])


def test_bars_and_table_hold_the_numbers():
    metrics = results()
    results_ = {"first": metrics, "second": metrics}
    (ax,) = iou_bars(results_, CELEBA8.classes).axes
    heights = sorted(round(bar.get_height(), 4) for bar in ax.containers[1])
    assert heights == sorted(round(100 * v, 4) for v in [*metrics.iou, metrics.fg_miou])
    (ax,) = iou_table(results_, CELEBA8.classes, title="All").axes
    texts = [text.get_text() for text in ax.texts]
    assert (texts.count(f"{100 * metrics.iou[0]:.1f}") >= 2
            and {"first", "second", "FG-mIoU", "mIoU", "pixel acc.", "hair"} <= set(texts))


def test_nothing_is_left_behind(batch):
    before, shown = dict(mpl.rcParams), plt.get_fignums()
    image_grid(batch[0])
    curves({"a": ([0, 1], [1, 2])})
    iou_bars({"x": results()}, CELEBA8.classes)
    assert plt.get_fignums() == shown
    assert {k: v for k, v in mpl.rcParams.items() if before[k] != v} == {}


def test_a_confusion_figure_writes_the_shares_of_each_true_class():
    figure = confusion_figure(torch.tensor([[75, 25, 0], [0, 0, 0], [1, 0, 999]]), ["back", "never", "thing"])
    texts = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in figure.axes[0].texts}
    # rows are the truth; a class without pixels is empty, 0.1 % is left out
    assert texts == {(0, 0): "75", (0, 1): "25", (2, 2): "100"}
    with pytest.raises(InputError, match="2, 3"): confusion_figure(torch.zeros(2, 3), ["a", "b"])


def test_the_worst_gallery_begins_with_the_worst(batch):
    images, masks = batch
    masks = masks.clone()
    masks[:, 0] = 1
    masks[4] = 0  # shows no foreground: not ranked
    predictions = masks.clone()
    predictions[2] = 1 - masks[2]  # all wrong
    predictions[1, :8] = 0
    figure = worst_gallery(images, predictions, masks, TWO, number=3)
    heads = [t.get_text() for t in [*figure.texts, *(t for ax in figure.axes for t in ax.texts)]
             if t.get_text().startswith("no. ")]
    assert (heads[0] == "no. 2: 0" and heads[1].startswith("no. 1: ") and heads[2].endswith(": 100")
            and not any(h.startswith("no. 4") for h in heads))
    with pytest.raises(InputError, match="no picture shows a foreground class"):
        worst_gallery(images, masks * 0, masks * 0, TWO)
