"""What a norm costs in the exported graph: group norm as an operator, as means and roots, those of large maps folded away, and all.

    python scripts/bench/norm_export.py [--model unet] [--width 16] [--side 256] [--rounds 15]

ONNX Runtime on one thread, the sessions interleaved; medians in ms, and their ratio to the folded graph."""
import argparse
import os
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from edge.optional import need  # noqa: E402
from export import to_onnx  # noqa: E402
from train_lite.models import build, norm  # noqa: E402


def session(net, side, folder, name):
    torch, ort = need("torch"), need("onnxruntime")
    path = os.path.join(folder, name + ".onnx")
    to_onnx.write_stage(path, net.encoder, {"pixels": torch.zeros(1, 3, side, side)}, "features")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unet", choices=["unet", "deeplabv3"])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    group, large, frozen = (build(args.model, args.width, kind, 1, "none").eval() for kind in ("group", "group", "frozen"))
    black = need("torch").zeros(1, 3, args.side, args.side)
    norm.put_frozen(large, norm.of_large_maps(large, lambda: large.encoder(black)))
    with tempfile.TemporaryDirectory() as folder:
        sessions = {"operator": session(group, args.side, folder, "a"),
                    "means and roots": session(to_onnx.folded(group), args.side, folder, "b"),
                    "large folded": session(to_onnx.folded(large), args.side, folder, "c"),
                    "folded": session(to_onnx.folded(frozen), args.side, folder, "d")}
        pixels, times = np.random.RandomState(0).randn(1, 3, args.side, args.side).astype(np.float32), {}
        for _ in range(args.rounds):
            for name, one in sessions.items():
                began = time.time()
                one.run(None, {"pixels": pixels})
                times.setdefault(name, []).append(time.time() - began)
    base = np.median(times["folded"])
    print("%s width %d, %d px, ONNX Runtime %s" % (args.model, args.width, args.side, need("onnxruntime").__version__))
    for name, values in times.items():
        print("%-16s %8.1f ms  %.2f" % (name, 1000 * np.median(values), np.median(values) / base))


if __name__ == "__main__":
    main()
