"""Does the runtime stay as it is over many frames?

    python scripts/bench/steady.py [--frames 10000] [--engine-ms 10] [--side 128]

Frames of the synthetic source go through edge's loop into a file of JSON lines; the engine is a stand-in that takes a fixed
time. Prints p50, p95 and p99 of a frame, in ms and as a share of p50; p50 over that of the stand-in alone, called in the same
run; and what the process gained from one tenth of the frames to the last: resident memory and blocks of Python's allocator."""
import argparse
import array
import gc
import json
import os
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BARE_EVERY = 10  # frames between two calls of the stand-in alone


class FixedTime:
    """A backend whose net takes `seconds`: it sleeps, and gives scores made beforehand."""

    def __init__(self, seconds, side):
        import numpy as np

        from edge.warp.path import WarpHost
        self._seconds, self.pixels = seconds, WarpHost()
        self._scores = {"scores": np.random.RandomState(0).randn(1, 2, side, side).astype(np.float32)}

    def Session(self, _contract, _files, _threads):
        return self

    def tensors(self, stage, side):
        size = self._scores["scores"].shape[-1]
        return {"pixels": ("float32", [1, 3, size, size])} if side == "inputs" else {"scores": ("float32", [1, 2, size, size])}

    def run(self, _stage, _inputs, keep=False):
        time.sleep(self._seconds)
        return self._scores

    def close(self):
        pass


def contract(side):
    """Of a net that sees the whole frame."""
    tensors = {"inputs": [{"name": "pixels", "dtype": "float32", "shape": [1, 3, side, side]}],
               "outputs": [{"name": "scores", "dtype": "float32", "shape": [1, 2, side, side]}]}
    return {"pipeline": "whole", "stages": [dict(name="net", **tensors)],
            "image": {"colour": "RGB", "mean": [0.5] * 3, "std": [0.25] * 3, "resize": "none", "resize_px": side},
            "tile": {"size": side, "overlap": 0, "batch": 1}, "overview": None,
            "classes": [{"name": "ground", "colour": [0, 0, 0]}, {"name": "thing", "colour": [255, 0, 0]}]}


def steady(frames, engine_ms, side, folder):
    """Dict of what was measured over that many frames."""
    import numpy as np

    from edge import loop
    from edge.pipeline import Segmenter
    from edge.pressure import Pressure
    from edge.sinks import Sinks
    from edge.sources import open_source
    from jetson.memory import rss_mib
    fake, begin = FixedTime(engine_ms / 1000.0, side), max(1, frames // 10)
    times_ms, bare_ms = array.array("d", bytes(8 * frames)), array.array("d", bytes(8 * frames))  # room for all: none is taken later
    sinks = Sinks(os.path.join(folder, "results.jsonl"), [(0, 0, 0), (255, 0, 0)], False)
    with Segmenter(contract(side), {}, fake) as pipeline:
        steps = loop.steps(open_source("synthetic://%dx%d" % (side, side), frames), pipeline, sinks, Pressure(True))
        for index in range(frames):
            if index == begin:
                gc.collect()
                before = rss_mib(), sys.getallocatedblocks()
            start = time.perf_counter()
            next(steps)
            times_ms[index] = (time.perf_counter() - start) * 1000
            if index % BARE_EVERY == 0:
                start = time.perf_counter()
                fake.run("net", None)
                bare_ms[index] = (time.perf_counter() - start) * 1000
        gc.collect()
        after = rss_mib(), sys.getallocatedblocks()
    sinks.close()
    p50, p95, p99 = np.percentile(times_ms[begin:], [50, 95, 99]).tolist()
    bare = float(np.median([ms for ms in bare_ms[begin:] if ms]))
    return {"frames": frames, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "p99_over_p50": p99 / p50, "bare_p50_ms": bare,
            "p50_over_bare": p50 / bare, "rss_gained_mib": after[0] - before[0], "blocks_gained": after[1] - before[1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=10000)
    parser.add_argument("--engine-ms", type=float, default=10)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, ROOT)
    with tempfile.TemporaryDirectory() as folder:
        result = steady(args.frames, args.engine_ms, args.side, folder)
    if args.json:
        print(json.dumps(result))
        return
    print("%(frames)d frames, ms: p50 %(p50_ms).2f  p95 %(p95_ms).2f  p99 %(p99_ms).2f, p99 / p50 %(p99_over_p50).2f" % result)
    print("engine alone p50 %(bare_p50_ms).2f ms, p50 / engine %(p50_over_bare).3f" % result)
    print("gained from a tenth of the frames on: %(rss_gained_mib).2f MiB resident, %(blocks_gained)d blocks of Python's "
          "allocator" % result)


if __name__ == "__main__":
    main()
