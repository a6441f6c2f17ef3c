"""Coordinates: anchors, deltas, and the way from a frame into the search crop and back."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmv_fast.vision import boxes
from dmv_fast.vision.crop import CROP_SIZE, Window, cut, normalise, search_window
from dmv_fast.vision.shrink import shrink, shrink_reference

sizes = st.floats(2, 900)
places = st.floats(-200, 1500)


def test_iou_by_hand():
    a = torch.tensor([0.0, 0, 10, 10])
    others = torch.tensor([[0.0, 0, 10, 10], [5, 0, 10, 10], [10, 0, 10, 10], [2, 2, 5, 5]])
    assert boxes.iou(a, others).tolist() == pytest.approx([1, 50 / 150, 0, 25 / 100])


@given(x=places, y=places, w=sizes, h=sizes)
@settings(max_examples=50, deadline=None)
def test_decode_inverts_encode(x, y, w, h):
    anchors = boxes.anchor_grid(16, CROP_SIZE, (0.5, 1.0, 2.0), 64.0).double()
    box = torch.tensor([x, y, w, h], dtype=torch.float64)
    deltas = boxes.encode(box, anchors)
    inside = deltas[..., 2:].abs().amax(-1) < 4
    assert torch.allclose(boxes.decode(deltas, anchors)[inside], box, atol=1e-6)


def test_anchor_grid_has_an_anchor_on_the_exemplar():
    for grid in (16, 32):
        anchors = boxes.anchor_grid(grid, CROP_SIZE, (1 / 3, 1.0, 3.0), 64.0)
        assert anchors.shape == (3, grid, grid, 4)
        assert anchors[1, grid // 2, grid // 2].tolist() == [96, 96, 64, 64]
        assert torch.allclose(anchors[..., 2:].prod(-1), torch.tensor(64.0**2))
        assert torch.allclose(anchors[0, 0, 0, 3] / anchors[0, 0, 0, 2], torch.tensor(1 / 3))


@given(x=places, y=places, w=sizes, h=sizes)
@settings(max_examples=100, deadline=None)
def test_crop_and_back_is_the_identity(x, y, w, h):
    window = search_window((x, y, w, h))
    there = window.to_crop((x, y, w, h))
    assert np.abs(window.to_frame(there) - (x, y, w, h)).max() < 1e-3


@pytest.mark.parametrize("size", [(64, 64), (20, 80), (200, 50)])
def test_target_is_centred_and_about_64_pixels_large(size):
    w, h = size
    window = search_window((300.25, 200.5, w, h))
    x, y, cw, ch = window.to_crop((300.25, 200.5, w, h))
    p = (w + h) / 2
    assert x + cw / 2 == pytest.approx(128, abs=2 + 256 / window.side)
    assert y + ch / 2 == pytest.approx(128, abs=2 + 256 / window.side)
    assert window.side == pytest.approx(2 * ((w + p) * (h + p)) ** 0.5, rel=2 ** (1 / 32) - 1 + 1e-9, abs=0.5)
    assert 40 < (cw * ch) ** 0.5 <= 67


@given(x=places, y=places, w=sizes, h=sizes)
@settings(max_examples=100, deadline=None)
def test_boxes_nearly_alike_have_one_window(x, y, w, h):
    """At most a boundary or two lie within a thousandth of a box: its window is one of few, not of many."""
    steps = np.linspace(-1, 1, 9)
    alike = [(x + s * w / 1000, y + s * h / 1000, w * (1 + s / 2000), h * (1 + s / 2000)) for s in steps]
    windows = {search_window(box) for box in alike}
    assert len(windows) <= 4 and len({window.side for window in windows}) <= 2
    larger = np.linspace(1, 2, 500, endpoint=False)
    assert len({search_window((x, y, w * f, h * f)).side for f in larger}) <= 17


@pytest.mark.parametrize("box", [(0, 0, 1e-3, 1e-3), (5, 5, 0, 0), (-40, 900, 3, 4000), (1e6, 1e6, 2, 2)])
def test_any_box_has_a_window_around_it(box):
    window = search_window(box)
    x, y, w, h = window.to_crop(box)
    assert window.side >= 4 and abs(x + w / 2 - 128) <= 34 and abs(y + h / 2 - 128) <= 34


@pytest.mark.parametrize("side", [128, 300, 512, 1000])
def test_pixels_land_where_boxes_do(side):
    """A bright square in the frame is bright in the crop exactly inside its box: no half-pixel shift."""
    image = np.zeros((1500, 1500, 3), np.uint8)
    image[500:600, 450:650] = 255
    window = Window(400, 420, side)
    crop = cut(image, window)[..., 0].astype(float) / 255
    x, y, w, h = window.to_crop((450, 500, 200, 100))
    w, h = min(w, 256 - x), min(h, 256 - y)
    mass = crop.sum()
    assert mass == pytest.approx(w * h, rel=0.02)
    yy, xx = np.mgrid[:256, :256] + 0.5
    assert (crop * xx).sum() / mass == pytest.approx(x + w / 2, abs=0.3)
    assert (crop * yy).sum() / mass == pytest.approx(y + h / 2, abs=0.3)


def test_shrinking_does_not_alias():
    """One-pixel stripes average to grey."""
    image = np.zeros((800, 800, 3), np.uint8)
    image[:, ::2] = 255
    crop = cut(image, Window(0, 0, 640))
    assert 90 < crop.min() and crop.max() < 166


@pytest.mark.parametrize("size", [16, 256])
def test_shrinking_is_opencv_s_to_the_bit(size):
    """A crop must not depend on whether the C++ extension is there; multiples of the size among the rest."""
    frame = np.random.default_rng(0).integers(0, 256, (800, 1100, 3), np.uint8)
    for width in [size, *range(size + 1, 3 * size, max(1, size // 9)), 2 * size, 3 * size]:
        for height in {width, max(size, width - 3)}:
            part = frame[5 : 5 + height, 7 : 7 + width]
            expected = shrink_reference(np.ascontiguousarray(part), size)
            assert np.array_equal(shrink(part, size), expected), (height, width)


def test_shrinking_takes_any_memory():
    """Mirrored, of other colour order, and not to be written."""
    image = np.random.default_rng(0).integers(0, 256, (300, 310, 3), np.uint8)
    for view in (image[::-1], image[:, ::-1], image[..., ::-1], image.swapaxes(0, 1)):
        assert np.array_equal(shrink(view, 256), shrink_reference(np.ascontiguousarray(view), 256))
    expected = shrink(image, 256)
    image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(shrink(image, 256), expected)


@pytest.mark.parametrize(
    "corner", [(-40, 10), (10, -40), (-30, -20), (150, 10), (10, 90), (140, 80), (-60, -70)]
)
@pytest.mark.parametrize("side", [120, 300])
def test_each_side_of_the_frame_is_filled_where_it_is(corner, side):
    """Against NumPy, with a mean colour that is no whole number."""
    image = np.random.default_rng(3).integers(0, 256, (130, 190, 3), np.uint8)
    (x, y), colour = corner, image.reshape(-1, 3).mean(0).round()
    patch = np.empty((side, side, 3), np.uint8)
    patch[:] = colour
    rows, columns = np.arange(y, y + side), np.arange(x, x + side)
    rows_in, columns_in = (rows >= 0) & (rows < 130), (columns >= 0) & (columns < 190)
    patch[np.ix_(rows_in, columns_in)] = image[np.ix_(rows[rows_in], columns[columns_in])]
    assert np.array_equal(cut(image, Window(x, y, side), side), patch)


def test_outside_is_the_mean_colour():
    image = np.full((50, 60, 3), (10, 200, 90), np.uint8)
    crop = cut(image, Window(-100, -100, 256))
    assert (crop == (10, 200, 90)).all()
    assert cut(image, Window(5000, 5000, 64)).shape == (256, 256, 3)


def test_normalise_turns_bgr_to_rgb():
    crop = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    crop[..., 2] = 255  # red, the last channel of BGR
    rgb = normalise(crop)
    assert rgb.shape == (1, 3, 4, 4)
    assert rgb[0, 0, 0, 0].item() == pytest.approx((1 - 0.485) / 0.229)
    assert rgb[0, 2, 0, 0].item() == pytest.approx(-0.406 / 0.225)
