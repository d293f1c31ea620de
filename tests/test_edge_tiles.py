"""Geometry, tiles, blending and the one path from pixels to scores, against torch's interpolation and plain loops."""
import numpy as np
import pytest
from PIL import Image

from edge import geometry, scores, tiles
from edge.images import ArrayPicture, BandPicture, fitted_size

torch = pytest.importorskip("torch")

SIZES = [1, 2, 3, 7, 16, 33, 100]


def torch_matrix(n_out, n_in):
    """Linear interpolation as torch defines it, one unit sample at a time: (n_out, n_in) float64."""
    units = torch.eye(n_in, dtype=torch.float64)[None]
    return torch.nn.functional.interpolate(units, size=n_out, mode="linear", align_corners=False)[0].numpy().T


@pytest.mark.parametrize("n_in", SIZES)
@pytest.mark.parametrize("n_out", SIZES)
def test_bilinear_matrix_is_torch_interpolate(n_out, n_in):
    got, expected = geometry.bilinear_matrix(n_out, n_in), torch_matrix(n_out, n_in)
    assert got.dtype == np.float32 and abs(got - expected).max() < 1e-5
    assert abs(got.sum(axis=1) - 1).max() < 1e-6


@pytest.mark.parametrize("n_out,n_in", [(33, 7), (7, 33), (5, 1), (100, 16)])
def test_bilinear_matrix_of_a_part(n_out, n_in):
    """A tile sees the rows of the whole; beyond the border the border's value goes on."""
    expected = torch_matrix(n_out, n_in)
    start, stop = -4, n_out + 6
    got = geometry.bilinear_matrix(n_out, n_in, start, stop)
    assert got.shape == (stop - start, n_in)
    for row, out in zip(got, range(start, stop)):
        if 0 <= out < n_out:
            assert abs(row - expected[out]).max() < 1e-5
        u = (out + 0.5) / n_out
        at = min(max(u * n_in - 0.5, 0), n_in - 1)
        assert abs(row @ np.arange(n_in) - at) < 1e-4 and abs(row.sum() - 1) < 1e-6 and row.min() >= 0


@pytest.mark.parametrize("n_in", SIZES)
@pytest.mark.parametrize("n_out", SIZES)
def test_nearest_index_is_nearest(n_out, n_in):
    got = geometry.nearest_index(n_out, n_in)
    for i, j in enumerate(got):  # distances of centres, in units of 1 / (2 n_in n_out): integers
        distances = [abs((2 * k + 1) * n_out - (2 * i + 1) * n_in) for k in range(n_in)]
        assert distances[j] == min(distances)
    low, high = n_out // 3, n_out // 2 + 1
    assert np.array_equal(geometry.nearest_index(n_out, n_in, low, high), got[low:high])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_reflect_bounces(size):
    def bounce(index):
        while size > 1 and not 0 <= index < size:
            index = -index if index < 0 else 2 * (size - 1) - index
        return index if size > 1 else 0
    index = np.arange(-40, 41)
    assert geometry.reflect(index, size).tolist() == [bounce(int(i)) for i in index]


# --- tiles ----------------------------------------------------------------------------------------------------------

LAYOUTS = [(height, width, tile, overlap) for height, width in (
    (1, 1), (1, 50), (50, 1), (5, 7), (16, 16), (17, 33), (31, 48), (64, 64), (101, 47))
    for tile, overlap in ((16, 0), (16, 1), (16, 5), (16, 8), (16, 11), (16, 15), (1, 0), (3, 2), (48, 20))
    if tile > 1 or height * width < 1000]


@pytest.mark.parametrize("height,width,tile,overlap", LAYOUTS)
def test_plan_owned_and_weights(height, width, tile, overlap):
    laid = tiles.plan(height, width, tile, overlap)
    boxes, owned = laid.boxes(), tiles.owned(laid)
    cover, owners = np.zeros((2, height, width), int)
    for box, own in zip(boxes, owned):
        assert (box[2] - box[0], box[3] - box[1]) == (tile, tile)
        cover[box[0]:box[2], box[1]:box[3]] += 1
        owners[own[0]:own[2], own[1]:own[3]] += 1
        assert (own[:2] >= box[:2]).all() and (own[2:] <= box[2:]).all(), "a tile owns pixels that it does not see"
    assert cover.min() >= 1 and (owners == 1).all()
    for origins, size in ((laid.ys, height), (laid.xs, width)):
        assert origins[0] == 0 and (origins[-1] == 0 or origins[-1] + tile == size)
        steps = np.diff(origins)
        assert (steps > 0).all() and (steps <= tile - overlap).all()
        weights, total = tiles.blend_weights(origins, tile, overlap, size), np.zeros(size)
        for origin, row in zip(origins, weights):
            assert row.dtype == np.float32 and (row >= 0).all() and (row[max(0, size - origin):] == 0).all()
            total[origin:origin + tile] += row[:size - origin]
        assert abs(total - 1).max() < 1e-6


@pytest.mark.parametrize("height,width,tile,overlap", LAYOUTS)
def test_stitch_gives_every_row_once(height, width, tile, overlap):
    """Scores that depend on the place only come back as they are; outside the image a tile holds rubbish."""
    y, x = np.mgrid[:height + tile, :width + tile]
    field = np.stack([np.sin(y / 5.0) + x / 30.0, np.full(y.shape, 2.5), (7 * y + 3 * x) % 11]).astype(np.float32)
    field[:, height:], field[:, :, width:] = 1e6, -1e6
    laid = tiles.plan(height, width, tile, overlap)
    asked = []

    def scores_of(boxes):
        asked.extend(map(tuple, boxes))
        return (field[:, b[0]:b[2], b[1]:b[3]] for b in boxes)
    at, parts = 0, []
    for y0, band in tiles.stitch(laid, scores_of):
        assert y0 == at and band.shape[0] == 3 and band.shape[2] == width and band.dtype == np.float32
        parts.append(band.copy())
        at += band.shape[1]
    assert at == height and asked == list(map(tuple, laid.boxes()))
    whole = np.concatenate(parts, axis=1)
    assert abs(whole - field[:, :height, :width]).max() < 5e-5  # float32 sums of up to 225 tiles, values to 10


def test_overlap_blends_linearly():
    """Two tiles that disagree: the score crosses from one to the other without a step."""
    laid = tiles.plan(8, 24, 16, 8)
    assert laid.xs == (0, 8)
    bands = tiles.stitch(laid, lambda boxes: [np.full((1, 16, 16), float(b[1] > 0), np.float32) for b in boxes])
    whole = np.concatenate([band.copy() for _y, band in bands], axis=1)[0]
    assert np.allclose(whole[:, :8], 0) and np.allclose(whole[:, 16:], 1)
    assert np.allclose(whole[3, 8:16], (np.arange(8) + 0.5) / 8, atol=1e-6)


# --- scores ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [2, 3, 19])
def test_labels_are_argmax(classes):
    values = np.random.RandomState(0).randint(-3, 4, (classes, 40, 50)).astype(np.float32)  # full of ties
    labels = scores.labels_of(values)
    assert labels.dtype == np.uint8 and np.array_equal(labels, values.argmax(axis=0))


def test_labels_of_one_channel():
    values = np.array([[[-1, 0, 1e-30, -1e-30, 5]]], np.float32)
    assert scores.labels_of(values).tolist() == [[0, 0, 1, 0, 1]]


def recipe(resize="none", px=0, tile=32, overlap=8, batch=3, overview=0):
    return scores.Recipe(resize, px, tile, overlap, batch, overview, (0.0,) * 3, (1.0 / 255,) * 3)  # scores are 0..255


def noise(height, width):
    y, x = np.mgrid[:height, :width]
    grain = np.random.RandomState(0).randint(0, 40, (height, width, 3))
    return (grain + np.stack([y * 200 // height, x * 200 // width, (x + y) % 200], axis=2)).astype(np.uint8)


def collect(picture, how, encode=None, score=None):
    """score_bands, with the order and size of the bands checked: (C, H, W)."""
    def same(pixels, g, rows, cols):
        assert pixels.shape[1:] == (3, how.tile, how.tile) and 1 <= len(pixels) <= how.batch
        assert g is rows is cols is None
        return pixels
    parts, at = [], 0
    for y0, band in scores.score_bands(picture, how, encode, score or same):
        assert y0 == at and band.shape[2] == picture.width
        parts.append(np.array(band))
        at += band.shape[1]
    assert at == picture.height
    return np.concatenate(parts, axis=1)


def streamed(array, rows=10):
    return BandPicture(array.shape[0], array.shape[1], lambda: (array[y:y + rows] for y in range(0, len(array), rows)))


@pytest.mark.parametrize("size", [(75, 101), (20, 33), (1, 1), (300, 20)])
def test_scores_at_the_picture_s_own_size(size):
    array = noise(*size)
    for picture in (ArrayPicture(array), streamed(array)):
        assert abs(collect(picture, recipe()) - np.moveaxis(array, 2, 0)).max() < 1e-3


@pytest.mark.parametrize("rule,px", [("long", 70), ("long", 400), ("stretch", 48), ("long", 150)])
@pytest.mark.parametrize("size", [(75, 150), (310, 64), (9, 200)])
def test_scores_come_back_to_the_picture_s_size(rule, px, size):
    """Resized down and up again, each in one go by Pillow."""
    array = noise(*size)
    height, width = fitted_size(size[0], size[1], rule, px)
    small = np.asarray(Image.fromarray(array).resize((width, height), Image.BILINEAR)).astype(np.float32)
    planes = [Image.fromarray(np.ascontiguousarray(small[..., c])) for c in range(3)]
    expected = np.stack([np.asarray(plane.resize(size[::-1], Image.BILINEAR)) for plane in planes])
    for picture in (ArrayPicture(array), streamed(array)):
        got = collect(picture, recipe(rule, px))
        assert got.dtype == np.float32 and abs(got - expected).max() < 1.01


@pytest.mark.parametrize("rule,px", [("none", 0), ("long", 70)])
def test_overview_reaches_every_tile_at_its_place(rule, px):
    """A head that shows only the global feature draws the picture's thumbnail, enlarged as torch does it."""
    array, asked = noise(75, 101), []

    def encode(pixels):
        asked.append(pixels.shape)
        return pixels

    def score(pixels, g, rows, cols):
        assert rows.shape == cols.shape == (len(pixels), 32, 24)
        return rows[:, None] @ g @ np.swapaxes(cols[:, None], 2, 3)
    got = collect(ArrayPicture(array), recipe(rule, px, overview=24), encode, score)
    height, width = fitted_size(75, 101, rule, px)
    view = Image.fromarray(array).resize((width, height), Image.BILINEAR) if px else Image.fromarray(array)
    small = np.moveaxis(np.asarray(view.resize((24, 24), Image.BILINEAR)), 2, 0).astype(np.float32)
    large = torch.nn.functional.interpolate(torch.from_numpy(small)[None], size=(height, width), mode="bilinear",
                                            align_corners=False)[0].numpy()
    if px:
        large = np.stack([np.asarray(Image.fromarray(plane).resize((101, 75), Image.BILINEAR)) for plane in large])
    assert asked == [(1, 3, 24, 24)] and abs(got - large).max() < 1.01
