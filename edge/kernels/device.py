"""Pixels and scores in a GPU's memory: what edge.scores.Host does in the host's, with the same results bit for bit.

A frame goes to the device once, as bytes. There it is resized, cut into tiles and normalised into the net's own input; scores
are blended and decoded where the net left them, and class ids come back as bytes."""
import os
from typing import NamedTuple

import numpy as np

from edge import images, scores, tiles
from edge.gpu import Rooms
from edge.kernels import FOLDER, Kernels, resample

PIXELS_IN = {"prepare_float": "PiiiiiffffffP", "prepare_half": "PiiiiiffffffP", "resample_cols_u8": "PiiiPPiP",
             "resample_rows_u8": "PiiPPiP"}
PIXELS_OUT = {"add_tile": "PiiPPPiiiii", "decode": "PiiiiiiP", "resample_cols_float": "PiiiPPiP",
              "resample_rows_float": "PiiiiiPPiP", "blend": "PPPfiP"}
MOST_BYTES = 256 << 20   # of scores held on the device; larger images are blended in the host's memory


class Picture(NamedTuple):
    """(height, width, 3) uint8 on the device."""
    height: int
    width: int
    address: int


class Band(NamedTuple):
    """Image rows y0 .. y0 + count of (channels, held, width) float32 scores on the device, row y in y % held."""
    address: int
    channels: int
    held: int
    width: int
    y0: int
    count: int
    clear: int


class Device(Rooms):
    """gpu: an edge.gpu.Gpu; pixels: the Buffer of the net's input (n, 3, p, p), float32 or float16; channels: of its scores;
    kind: of memory that the host writes (edge.gpu.KINDS). Raises MissingPart when the kernels cannot be compiled."""

    def __init__(self, gpu, pixels, channels, kind):
        super().__init__(gpu, kind)
        self._pixels, self.channels, self._host = pixels, channels, scores.Host()
        self.launch_in = Kernels(gpu, os.path.join(FOLDER, "pixels_in.cu"), PIXELS_IN).launch
        self.launch_out = Kernels(gpu, os.path.join(FOLDER, "pixels_out.cu"), PIXELS_OUT).launch

    def timed(self, lap):
        """`lap`, called only when the work before it is done."""
        def when_done(stage):
            self.gpu.stream.synchronize()
            lap(stage)
        return when_done

    def fitted(self, picture, height, width):
        """`picture` at another size: on the device, unless it is so large that it is read in bands."""
        name = "overview" if isinstance(picture, Picture) else "view"  # of a view that stays while it is cut
        if isinstance(picture, images.ArrayPicture) and picture.array.size <= 3 * images.STREAM_ABOVE_PX:
            picture = Picture(picture.height, picture.width, self.sent("picture", picture.array))
        if not isinstance(picture, Picture):
            return self._host.fitted(picture, height, width)
        return self._resized(picture, height, width, name)

    def _resized(self, picture, height, width, name):
        address = picture.address
        if width != picture.width:
            first, weights, taps = self._table(resample.table, picture.width, width, resample.fixed)
            target = self.room(name + " columns", picture.height * width * 3)
            self.launch_in("resample_cols_u8", (width, picture.height), address, picture.height, picture.width, width, first,
                            weights, taps, target)
            address = target
        if height != picture.height:
            first, weights, taps = self._table(resample.row_table, picture.height, height, resample.fixed)
            target = self.room(name, height * width * 3)
            self.launch_in("resample_rows_u8", (width, height), address, width, height, first, weights, taps, target)
            address = target
        return Picture(height, width, address)

    def prepared(self, view, boxes, recipe):
        """The windows `boxes` (n, 4) of a picture in the net's input buffer, the last one repeated to fill it."""
        side, boxes = recipe.tile, list(boxes) + [boxes[-1]] * (len(self._pixels) - len(boxes))
        if not isinstance(view, Picture):
            windows = np.stack([view.window(*box) for box in boxes])
            address = self.sent("tiles", windows)
            places = [(Picture(side, side, address + index * windows[0].size), 0, 0) for index in range(len(boxes))]
        else:
            places = [(view, int(box[0]), int(box[1])) for box in boxes]
        kernel = "prepare_half" if self._pixels.host.dtype == np.float16 else "prepare_float"
        scale, shift = images.scale_shift(recipe.mean, recipe.std)
        for part, (picture, y0, x0) in zip(self._pixels, places):
            self.launch_in(kernel, (side, side), picture.address, picture.height, picture.width, y0, x0, side, *(
                [float(v) for v in scale] + [float(v) for v in shift] + [part.address]))
        return self._pixels

    def canvas(self, laid, size=None):
        """What tiles.stitch blends the tiles of `laid` on. size: (height, width) that at_size() will be asked for."""
        held = max(laid.tile, laid.height) if size else laid.tile
        columns = laid.width + (size[1] if size else 0)
        if 4 * self.channels * held * columns > MOST_BYTES:
            return tiles.Band(laid)
        return Canvas(self, laid, held, bool(size))

    def at_size(self, bands, canvas, height, width):
        """The whole of `canvas`, resized to height x width by the filter that resizes pictures, in bands."""
        if isinstance(canvas, tiles.Band):
            for band in self._host.at_size(bands, canvas, height, width):
                yield band
            return
        for _band in bands:
            pass
        laid, source = canvas.laid, canvas.address
        if width != laid.width:
            first, weights, taps = self._table(resample.table, laid.width, width)
            target = self.room("scores columns", 4 * self.channels * canvas.held * width)
            self.launch_out("resample_cols_float", (width, self.channels * canvas.held), source, self.channels * canvas.held,
                             laid.width, width, first, weights, taps, target)
            source = target
        rows, resize = scores.BAND_ROWS, height != laid.height
        if resize:
            first, weights, taps = self._table(resample.row_table, laid.height, height)
            target = self.room("scores rows", 4 * self.channels * rows * width)
        for y0 in range(0, height, rows):
            band = Band(source, self.channels, canvas.held, width, y0, min(rows, height - y0), 0)
            if resize:
                self.launch_out("resample_rows_float", (width, band.count), source, canvas.held, self.channels, width, y0,
                                band.count, first, weights, taps, target)
                band = band._replace(address=target, held=band.count, y0=0)
            yield y0, band

    def scores(self, band):
        """(C, h, W) float32 of what score_bands yields, fetched."""
        if not isinstance(band, Band):
            return self._host.scores(band)
        whole = np.empty((band.channels, band.held, band.width), np.float32)
        self.gpu.stream.synchronize()
        self.gpu.driver.memcpy_dtoh(whole, band.address)
        return whole[:, np.arange(band.y0, band.y0 + band.count) % band.held]

    def labels(self, band):
        """Class ids (h, W) uint8 of what score_bands yields, once for each."""
        if not isinstance(band, Band):
            return self._host.labels(band)
        labels = self.buffer("labels", band.count * band.width)
        self.launch_out("decode", (band.width, band.count), band.address, band.channels, band.held, band.width, band.y0,
                        band.count, band.clear, labels.address)
        return labels.get_first((band.count, band.width))

    def blend(self, pixels, labels, palette):
        """images.blend."""
        colours = np.zeros((256, 3), np.uint8)
        colours[:len(palette)] = palette
        out = self.buffer("blended", pixels.size)
        self.launch_out("blend", (labels.size, 1), self.sent("under", pixels), self.sent("classes", labels),
                         self.sent("palette", colours), images.OVERLAY_OPACITY, labels.size, out.address)
        return out.get_first(pixels.shape)

    def _table(self, function, n_in, n_out, convert=lambda weights: weights):
        """Addresses of a table's first indices and weights, and its taps; see edge.kernels.resample."""
        first, weights = function(n_in, n_out)
        return self.sent("first", first), self.sent("weights", convert(weights)), weights.shape[1]


class Canvas:
    """The weighted sum of tiles' scores on the device: of the tile row at work, or of the whole image."""

    def __init__(self, device, laid, held, whole):
        self.laid, self.held, self._device, self._whole, self._taken = laid, held, device, whole, None
        channels, size = device.channels, 4 * device.channels * held * laid.width
        self.address = device.room("canvas", size)
        device.gpu.driver.memset_d8_async(self.address, 0, size, device.gpu.stream)
        rows = tiles.blend_weights(laid.ys, laid.tile, laid.overlap, laid.height)
        cols = tiles.blend_weights(laid.xs, laid.tile, laid.overlap, laid.width)
        self._rows, self._cols = device.sent("row weights", rows), device.sent("column weights", cols)
        self._blank = Band(self.address, channels, held, laid.width, 0, 0, 1)

    def add(self, scores, index, column):
        """Blend in a tile's scores, a Part (C, tile, tile) of a Buffer."""
        laid, step = self.laid, 4 * self.laid.tile
        self._device.launch_out("add_tile", (laid.tile, laid.tile), scores.address, self._device.channels, laid.tile,
                                self._rows + index * step, self._cols + column * step, self.address, self.held, laid.height,
                                laid.width, laid.ys[index], laid.xs[column])

    def take(self, y, stop):
        """The finished image rows y .. stop, a Band. Unless the whole is kept, labels() of it makes room for the next."""
        return self._blank._replace(y0=y, count=stop - y, clear=int(not self._whole))
