"""Peak memory of a GLNet's inference on one large picture, beside the published figure:

    sudo python scripts/bench/glnet_memory.py [--width 64] [--megapixels 30] [--patch 512] [--overlap 50] [--classes 7]
        [--limit 2GB] [--threads 1]

GLNet of ResNet50, all three branches (stage 3), torch on the CPU, random weights: memory does not depend on them. The picture is
synthetic, as wide to high as 6 to 5, a PNG file; above 16 megapixels it is read in bands. The net runs in a child in a memory
control group of --limit without swap (scripts/nano-sim): the kernel kills what takes more. Where no group can be made, as without
root, it says so and runs without limit. Peak is VmHWM of the child: Python, torch, weights, picture and maps. The published
figure is of a GPU."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SIM = os.path.join(ROOT, "scripts", "nano-sim")
PUBLISHED_MB = 1865  # Chen et al. 2019, arXiv 1905.06368, DeepGlobe


def draw(path, height, width):
    """A PNG of height x width px, band by band: slow waves of colour under noise."""
    import numpy as np

    from edge.images import PngWriter
    rng, x = np.random.RandomState(0), np.arange(width)[:, None] / 97.0 + np.arange(3)
    with PngWriter(path, height, width, 3) as png:
        for y0 in range(0, height, 128):
            y = np.arange(y0, min(height, y0 + 128))[:, None, None] / 61.0
            png.write((128 + 80 * np.sin(x) * np.cos(y) + rng.randint(-20, 21, y.shape[:1] + x.shape)).astype(np.uint8))


def infer(path, width, patch, overlap, classes, threads):
    """Runs in the child: the picture through the net. Prints seconds and peak MiB, of the whole and before the first tile."""
    import numpy as np
    import torch

    from edge import glnet, images, tiles
    from jetson.memory import peak_rss_mib
    from train_lite import evaluate
    from train_lite.models.glnet import build
    from train_lite.patches import MEAN, STD
    torch.set_num_threads(threads)
    net = build(3, "glnet", width, "group", classes)
    recipe = glnet.Recipe("none", 0, patch, overlap, 1, patch, MEAN, STD, True, 0.0)
    picture, loaded, began, rows = images.open_photo(path), peak_rss_mib(), time.time(), 0
    for _y0, band in glnet.score_bands(picture, recipe, evaluate.Branches(net, torch.device("cpu"))):
        assert np.isfinite(band).all()
        rows += band.shape[1]
    assert rows == picture.height
    print(json.dumps({"seconds": time.time() - began, "peak_mib": peak_rss_mib(), "loaded_mib": loaded,
                      "parameters": sum(parameter.numel() for parameter in net.parameters()),
                      "tiles": len(tiles.plan(picture.height, picture.width, patch, overlap).boxes())}))


def limited(limit):
    """The words that put a command into a group of `limit`, [] where no group can be made."""
    words = [sys.executable, SIM, "--memory", limit, "--swap", "0", "--"]
    tried = subprocess.run(words + [sys.executable, "-c", ""], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return [] if tried.returncode else words


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 64), ("patch", 512), ("overlap", 50), ("classes", 7), ("threads", 1)):
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("--megapixels", type=float, default=30)
    parser.add_argument("--limit", default="2GB")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return infer(args.child, args.width, args.patch, args.overlap, args.classes, args.threads)
    sys.path.insert(0, ROOT)
    wide = int(round((args.megapixels * 1e6 * 6 / 5) ** 0.5))
    high = int(round(args.megapixels * 1e6 / wide))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "picture.png")
        draw(path, high, wide)
        words = limited(args.limit)
        print("limit: %s" % ("a memory control group of %s, no swap" % args.limit if words else
                             "none, no memory control group can be made here"))
        done = subprocess.run(words + [sys.executable, os.path.abspath(__file__), "--child", path] + [
            "--%s=%d" % (name, getattr(args, name)) for name in ("width", "patch", "overlap", "classes", "threads")],
            env=dict(os.environ, PYTHONPATH=ROOT), stdout=subprocess.PIPE)
        if done.returncode:
            sys.exit("the child ended with exit code %d%s" % (
                done.returncode, ": the kernel killed it" if done.returncode in (137, -9) else ""))
        found = json.loads(done.stdout.decode().strip().splitlines()[-1])
    print("picture %dx%d px (%.1f megapixels), %d tiles of %d px, overlap %d px" % (
        wide, high, wide * high / 1e6, found["tiles"], args.patch, args.overlap))
    print("GLNet of ResNet50, width %d, %d classes, %.1f M parameters, random weights, %d thread(s)" % (
        args.width, args.classes, found["parameters"] / 1e6, args.threads))
    print("| | seconds | peak |\n|---|---|---|")
    print("| CPU, host memory | %.0f | %.0f MiB (%.0f MB), %.0f MiB of them before the first tile |" % (
        found["seconds"], found["peak_mib"], found["peak_mib"] * 2 ** 20 / 1e6, found["loaded_mib"]))
    print("| published: GPU memory, 2448x2448 px, patches of 508 px | | %d MB |" % PUBLISHED_MB)


if __name__ == "__main__":
    main()
