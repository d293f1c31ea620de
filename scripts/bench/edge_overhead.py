"""What edge-run adds to a bare ONNX Runtime session on the same graph:

    python scripts/bench/edge_overhead.py [--width 16] [--side 256] [--rounds 60]

One frame of side x side px through the bare session (its input ready) and through edge's whole path (resize, tiles,
normalise, session, blend, decode), alternating in one process. Prints p50, p95, p99 of both and the ratio at p50."""
import argparse
import json
import os
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, ROOT)
    import numpy as np
    import onnxruntime

    from edge.backends import ort
    from edge.pipeline import Segmenter
    from edge.sources import open_source
    from export import to_onnx
    from train_lite.config import TrainConfig, mode_settings
    from train_lite.data.dataset import read_classes
    from train_lite.evaluate import recipe
    from train_lite.models import build
    config = TrainConfig(mode="full", fit="none", res=args.side)
    net = to_onnx.folded(build("unet", args.width, "frozen", 1, "none"))
    with tempfile.TemporaryDirectory() as folder:
        made, files = to_onnx.write(folder, "net", net, config, read_classes(folder, config),
                                    recipe(mode_settings(config), args.side, 1), "whole")
        frame = next(open_source("synthetic://%dx%d" % (args.side, args.side))).open()
        options = onnxruntime.SessionOptions()
        bare = onnxruntime.InferenceSession(files["net"], options, providers=["CPUExecutionProvider"])
        ready = np.random.rand(1, 3, args.side, args.side).astype(np.float32)
        with Segmenter(made, files, ort) as segmenter:
            times = {"bare": [], "edge": []}
            for index in range(args.rounds + 5):
                for name, call in (("bare", lambda: bare.run(None, {"pixels": ready})),
                                   ("edge", lambda: segmenter.mask(frame))):
                    start = time.perf_counter()
                    call()
                    if index >= 5:  # warm-up
                        times[name].append((time.perf_counter() - start) * 1000)
    result = {name: dict(zip(("p50", "p95", "p99"), np.percentile(ms, [50, 95, 99]).tolist())) for name, ms in times.items()}
    result["ratio_p50"] = result["edge"]["p50"] / result["bare"]["p50"]
    if args.json:
        print(json.dumps(result))
        return
    print("U-Net width %d, %d px, ONNX Runtime %s, %d rounds, ms" % (args.width, args.side, onnxruntime.__version__, args.rounds))
    for name in ("bare", "edge"):
        print("%-5s p50 %8.2f  p95 %8.2f  p99 %8.2f" % ((name,) + tuple(result[name][p] for p in ("p50", "p95", "p99"))))
    print("edge / bare at p50: %.3f" % result["ratio_p50"])


if __name__ == "__main__":
    main()
