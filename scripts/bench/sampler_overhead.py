"""What looking where to sample adds to a frame: one exported model against another, such as pipeline `deform` against `uniform`.

    python -m train_lite --res 1024 --sampler uniform --task-size 256x256 --width 16 --name uniform, and the same for deform
    python -m export runs/train/uniform --out uniform.onnx, and the same for deform
    python scripts/bench/sampler_overhead.py uniform.onnx deform.onnx [--input synthetic://2048x1024] [--rounds 30] [--threads 1]

Frames of the two alternate in one process, through ONNX Runtime: medians in ms, every stage's share of its frame, and the ratio."""
import argparse
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WARM_UP = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=2, help="the base, and what is held against it")
    parser.add_argument("--input", default="synthetic://2048x1024")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))  # numpy's, before it is needed
    sys.path.insert(0, ROOT)
    import numpy as np

    from edge import contract
    from edge.backends import ort
    from edge.pipeline import Segmenter
    from edge.loop import Stopwatch
    from edge.sources import open_source
    frame = next(open_source(args.input, 1)).open()
    pipelines = [Segmenter(*contract.load(model), ort, args.threads) for model in args.models]
    laps = [[], []]
    for _ in range(args.rounds + WARM_UP):
        for one, booked in zip(pipelines, laps):
            watch = Stopwatch()
            for _labels in one.bands(frame, watch.lap):
                pass
            booked.append(dict(watch.ms, total=sum(watch.ms.values())))
    for one in pipelines:
        one.close()
    medians = [{stage: float(np.median([lap[stage] for lap in booked[WARM_UP:]])) for stage in booked[0]} for booked in laps]
    ratio = medians[1]["total"] / medians[0]["total"]
    if args.json:
        print(json.dumps({"ms": dict(zip(args.models, medians)), "ratio": ratio}))
        return
    print("frame of %dx%d, %d thread(s), medians of %d alternating frames" % (frame.width, frame.height, args.threads, args.rounds))
    for model, stages in zip(args.models, medians):
        print("%-16s %8.2f ms: %s" % (model, stages["total"], ", ".join(
            "%s %.2f (%.0f %%)" % (stage, ms, 100 * ms / stages["total"]) for stage, ms in stages.items() if stage != "total")))
    print("%s / %s: %.2f" % (args.models[1], args.models[0], ratio))


if __name__ == "__main__":
    main()
