"""Pixels in and out on a GPU: each step's time beside the time that its bytes need at the memory's own speed.

    python scripts/bench/device_pixels.py [--frame 1920x1080] [--res 1024] [--tile 512] [--classes 19] [--runs 50]

The floor of a step is (bytes read + bytes written) / the speed of a copy inside the device's memory, measured first. Columns:
MB moved, ms (median of --runs, by CUDA events), floor ms, ms / floor, and the same step on the host (edge.scores.Host), ms."""
import argparse
import os
import sys
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from edge import images, scores, tiles  # noqa: E402
from edge.gpu import Gpu  # noqa: E402
from edge.kernels.device import Device  # noqa: E402

COPY_BYTES = 64 << 20


def on_device(gpu, step, runs):
    """Median time of step() in ms."""
    start, stop, took = gpu.driver.Event(), gpu.driver.Event(), []
    for _ in range(runs + 3):
        start.record(gpu.stream)
        step()
        stop.record(gpu.stream)
        stop.synchronize()
        took.append(stop.time_since(start))
    return float(np.median(took[3:]))


def on_host(step, runs):
    took = []
    for _ in range(max(3, runs // 10)):
        began = time.perf_counter()
        step()
        took.append((time.perf_counter() - began) * 1000)
    return float(np.median(took))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frame", default="1920x1080")
    for name, value in (("res", 1024), ("tile", 512), ("classes", 19), ("runs", 50)):
        parser.add_argument("--" + name, type=int, default=value)
    given = parser.parse_args()
    width, height = map(int, given.frame.split("x"))
    outputs, side = 1 if given.classes == 2 else given.classes, given.tile
    gpu = Gpu()
    try:
        copy = gpu.room(2 * COPY_BYTES)
        took = on_device(gpu, lambda: gpu.driver.memcpy_dtod_async(int(copy) + COPY_BYTES, int(copy), COPY_BYTES, gpu.stream),
                         given.runs)
        speed = 2 * COPY_BYTES / took  # bytes per ms
        gpu.free(copy)
        print("%s, compute capability %s, copy %.1f GB/s; frame %s, long side to %d px, tiles of %d px, %d classes" % (
            gpu.name, gpu.capability, speed / 1e6, given.frame, given.res, side, given.classes))

        recipe = scores.Recipe("long", given.res, side, 0, 1, 0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        net_input, net_output = gpu.buffer((1, 3, side, side), np.float32), gpu.buffer((1, outputs, side, side), np.float32)
        rng = np.random.RandomState(0)
        net_output.put(rng.normal(0, 1, net_output.host.shape).astype(np.float32))
        frame = images.ArrayPicture(rng.randint(0, 256, (height, width, 3)).astype(np.uint8))
        labels = rng.randint(0, given.classes, (height, width)).astype(np.uint8)
        palette = [tuple(colour) for colour in rng.randint(0, 256, (given.classes, 3)).tolist()]
        h, w = images.fitted_size(height, width, "long", given.res)
        laid = tiles.plan(h, w, side)
        device, host = Device(gpu, net_input, outputs, "device"), scores.Host()
        there = device.fitted(frame, height, width)  # the frame as it is: sent once
        view, held = device.fitted(there, h, w), host.fitted(frame, h, w)
        canvases = [one.canvas(laid, (height, width)) for one in (device, host)]
        parts = [net_output[0], net_output.get()[0]]

        def add(which):
            canvases[which].add(parts[which], 0, 0)

        add(0), add(1)
        band = canvases[0].take(0, min(h, side))
        count = band.count * w
        steps = [
            ("resize", 3 * (height * width + 2 * height * w + h * w), lambda: device.fitted(there, h, w),
             lambda: images.whole(images.resized(frame, h, w))),
            ("prepare", side * side * (3 + 12), lambda: device.prepared(view, [(0, 0, side, side)], recipe),
             lambda: host.prepared(held, [(0, 0, side, side)], recipe)),
            ("add tile", 12 * outputs * side * side, lambda: add(0), lambda: add(1)),
            ("decode", count * (4 * outputs + 1), lambda: device.labels(band),
             lambda: host.labels(canvases[1].take(0, min(h, side)))),
            ("overlay", height * width * 7, lambda: device.blend(frame.array, labels, palette),
             lambda: host.blend(frame.array, labels, palette)),
        ]
        print("| step | MB | ms | floor, ms | ms / floor | host, ms |\n|---|---|---|---|---|---|")
        for name, moved, there_step, here_step in steps:
            took = on_device(gpu, there_step, given.runs)
            print("| %s | %.1f | %.3f | %.3f | %.2f | %.1f |" % (
                name, moved / 1e6, took, moved / speed, took * speed / moved, on_host(here_step, given.runs)))
        print("decode and overlay include the way to the host and back")
    finally:
        gpu.close()


if __name__ == "__main__":
    main()
