"""What the live page adds to a frame of edge-run: no page, a page that nobody watches, a page with one viewer.

    python scripts/bench/live_overhead.py model.onnx [--input synthetic://1280x720] [--frames 20] [--rounds 9] [--threads 1]

Blocks of frames of the three alternate in one process, nothing else is written; the viewer is a process of its own. Prints the
median over the rounds of a frame's ms, with the ratio to no page in the same round, and how many pictures the viewer got."""
import argparse
import contextlib
import json
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
VIEWER = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
connection.request("GET", "/stream")
answer, pictures = connection.getresponse(), 0
while True:
    line = answer.readline()
    if not line:
        break
    if line.startswith(b"Content-Length"):
        answer.readline()
        answer.read(int(line.split()[1]))
        pictures += 1
print(pictures)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--input", default="synthetic://1280x720")
    parser.add_argument("--frames", type=int, default=20, help="of a block")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))  # numpy's, before it is needed
    sys.path.insert(0, ROOT)
    import numpy as np

    from edge import contract, loop
    from edge.backends import ort
    from edge.pipeline import Segmenter
    from edge.pressure import Pressure
    from edge.sinks import Sinks
    from edge.sinks.live import Live
    from edge.sources import open_source

    def block(source, pipeline, live):
        """ms per frame."""
        frames = loop.steps(source, pipeline, Sinks("http://", pipeline.palette, True, live=live), Pressure(False, "off"))
        next(frames)
        began_s = time.perf_counter()
        for _ in range(args.frames):
            next(frames)
        return (time.perf_counter() - began_s) * 1000 / args.frames

    rows, pictures, seconds = [], 0, 0.0
    source = open_source(args.input)
    with Segmenter(*contract.load(args.model), ort, args.threads) as pipeline:
        for _ in range(args.rounds):
            row = [block(source, pipeline, None)]
            with contextlib.closing(Live("http://127.0.0.1:0", "", "", pipeline.classes, pipeline.palette)) as live:
                row.append(block(source, pipeline, live))
                viewer = subprocess.Popen([sys.executable, "-c", VIEWER, live.url.rstrip("/").rpartition(":")[2]],
                                          stdout=subprocess.PIPE)
                while not live.status()["viewers"]:
                    time.sleep(0.01)
                row.append(block(source, pipeline, live))
                seconds += row[-1] * args.frames / 1000
            pictures += int(viewer.communicate()[0])
            rows.append(row)
    ms, ratios = np.median(rows, axis=0).tolist(), np.median([[v / row[0] for v in row] for row in rows], axis=0).tolist()
    names = ("no page", "no viewer", "one viewer")
    if args.json:
        print(json.dumps({"ms": dict(zip(names, ms)), "ratio": dict(zip(names, ratios)), "pictures_per_s": pictures / seconds}))
        return
    print("%s, %s, %d thread(s), medians of %d rounds of %d frames" % (
        os.path.basename(args.model), args.input, args.threads, args.rounds, args.frames))
    for name, one, ratio in zip(names, ms, ratios):
        print("%-10s %8.2f ms  %.3f" % (name, one, ratio))
    print("the viewer got %.1f pictures a second" % (pictures / seconds))


if __name__ == "__main__":
    main()
