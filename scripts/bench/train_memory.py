"""Memory and time of one training step, each way in a process of its own, interleaved:

    python scripts/bench/train_memory.py [--res 1024] [--width 64] [--rounds 2] [--ways patch-exact,full,...]

patch-exact, patch-sampled: train_lite's two gradients; full: the whole image as one batch; full-checkpointed: the
same with every U-Net level recomputed in the backward pass. AdamW in all. Peak is VmHWM of the whole process: torch,
net, optimizer, file-backed pages. Time is that of the last of --steps steps over one image (patch-sampled: 16 of its
patches, in 4 rounds). Prints a table and, with --json, an object."""
import argparse
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WAYS = ("patch-exact", "patch-sampled", "full", "full-checkpointed")


def one_step(way, res, width, folder, steps, threads):
    """Runs in the child: some steps of `way` on one demo image. Prints peak MiB and seconds of the last."""
    import time

    import numpy as np
    import torch

    from jetson.memory import peak_rss_mib
    from train_lite.config import TrainConfig
    from train_lite.data import dataset, store
    from train_lite.state import State
    from train_lite.tasks.segmentation import Segmentation
    torch.set_num_threads(threads)
    config = TrainConfig(res=res, width=width, model="unet", epochs=1, augment=False, norm="group", freeze_at=1.0,
                         recompute=way == "full-checkpointed",
                         mode="full" if way.startswith("full") else "patch",
                         gradient=way.split("-")[-1] if way.startswith("patch") else "exact")
    classes = dataset.read_classes(folder, config)
    pair, = dataset.find_pairs(folder, 0.0)
    stored = store.ingest([pair], classes, config.fit, config.res, os.path.join(folder, "cache"), 16, (config.patch, config.patch), 0, [])
    problem = Segmentation(config, classes, stored, [], [], torch.device("cpu"))
    state = State(problem)
    gradient = problem.gradient(state)
    for _ in range(steps):
        batch, rng = problem.batch(0, 0)
        start = time.time()
        for _loss in gradient.rounds(batch, rng):
            pass
        gradient.finish(config.clip)
        state.optimizer.step(config.lr)
        for parameter in state.net.parameters():
            parameter.grad = None
        seconds = time.time() - start
    assert all(np.isfinite(p.detach().numpy()).all() for p in state.net.parameters())
    print(json.dumps({"peak_mib": peak_rss_mib(), "seconds": seconds}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--res", type=int, default=1024)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--steps", type=int, default=2, help="per process; the last one is timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return one_step(args.child[0], args.res, args.width, args.child[1], args.steps, args.threads)
    sys.path.insert(0, ROOT)
    from train_lite.data import demo
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("images", "masks"):
            os.makedirs(os.path.join(folder, kind))
        demo.draw(os.path.join(folder, "images", "0.png"), os.path.join(folder, "masks", "0.png"), args.res, (0, 0))
        for _ in range(args.rounds):
            for way in args.ways.split(","):
                out = subprocess.check_output(
                    [sys.executable, os.path.abspath(__file__), "--child", way, folder, "--res", str(args.res), "--width",
                     str(args.width), "--steps", str(args.steps), "--threads", str(args.threads)], env=dict(os.environ, PYTHONPATH=ROOT))
                results.setdefault(way, []).append(json.loads(out.decode().strip().splitlines()[-1]))
    base = min(r["seconds"] for r in results["full"]) if "full" in results else None
    print("U-Net width %d, %d px, one image, %d rounds" % (args.width, args.res, args.rounds))
    print("%-18s %10s %10s %14s" % ("way", "peak MiB", "seconds", "time / full"))
    for way, rows in results.items():
        seconds = min(row["seconds"] for row in rows)
        print("%-18s %10.0f %10.1f %14s" % (way, max(row["peak_mib"] for row in rows), seconds,
                                          "%.2f" % (seconds / base) if base else "-"))
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
