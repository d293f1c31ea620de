"""What proposals of the whole image's net save, and what they cost: one GLNet (stages 1 and 2) on the vessels of hrf_av, scored
with several --coarse.

    python scripts/bench/coarse_table.py --sets FOLDER --work FOLDER [--set hrf_av] [--coarse 0.1,0.2,0.3,0.4] [--rounds 3]
        [--model glnet-mobilenetv2] [--res 1024] [--patch 128] [--width 8] [--epochs 6] [--seed 0] [--threads 1]
        [-- further words for train_lite]

Scored is the last epoch's net on the test images: nothing is chosen on them. Time is that of an evaluation, from stored pixels
to counts, over that with every tile worked on in the same round: medians over rounds in turns. Skipped: tiles that the net of
tiles did not see. A training that is finished in --work is read, not repeated."""
import argparse
import os
import sys
import time

import numpy as np

import real_sets
from trainings import ROOT, summary

sys.path.insert(0, ROOT)
from edge.optional import need  # noqa: E402
from train_lite import evaluate, state  # noqa: E402
from train_lite.config import micro_batch, mode_settings  # noqa: E402
from train_lite.data import dataset, store  # noqa: E402


def counted(net):
    """A list to which net.work() from now on adds how many tiles it is given."""
    seen, work = [], net.work

    def counting(pixels, *rest):
        seen.append(len(pixels))
        return work(pixels, *rest)
    net.work = counting
    return seen


def test_images(config, classes):
    """The test images of a run, list of Stored."""
    pairs, problems = [pair for pair in dataset.find_pairs(config.data, 0.0) if pair.split == "test"], []
    stored = store.ingest(pairs, classes, config.fit, config.res, config.cache, config.cache_gb, (), 0, problems)
    if problems:
        sys.exit("\n".join(str(problem) for problem in problems))
    return stored


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", required=True, help="folder that holds the real sets")
    parser.add_argument("--work", required=True)
    parser.add_argument("--set", choices=sorted(set(real_sets.SETS) - set(real_sets.CLASSES)), default="hrf_av",
                        help="of one class and background")
    parser.add_argument("--coarse", default="0.1,0.2,0.3,0.4", help="beside 0, every tile, which the others are held against")
    parser.add_argument("--model", default="glnet-mobilenetv2")
    for name, value in (("res", 1024), ("patch", 128), ("width", 8), ("epochs", 6), ("rounds", 3), ("seed", 0), ("threads", 1)):
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args()
    given.work = os.path.abspath(given.work)
    pairs = real_sets.written(given.set, given.sets, given.work)
    done = summary(os.path.join(given.work, "runs"), "%s-coarse-%d" % (given.set, given.seed), [
        "--data", pairs, "--val-share", 0, "--cache", os.path.join(given.work, "cache"), "--model", given.model, "--stage", "12",
        "--width", given.width, "--res", given.res, "--patch", given.patch, "--epochs", given.epochs, "--seed", given.seed,
        "--threads", given.threads] + given.rest, ("", "-2"))
    torch = need("torch")
    torch.set_num_threads(given.threads)
    net, config, classes, tile, _meta = state.restore(os.path.join(done["run"], "best.safetensors"))
    stored, seen = test_images(config, classes), counted(net)
    recipe = evaluate.recipe(mode_settings(config), tile, micro_batch(config))
    found = {coarse: {"seconds": []} for coarse in [0.0] + [float(word) for word in given.coarse.split(",")]}
    for _ in range(given.rounds):
        for coarse, one in found.items():
            del seen[:]
            began = time.time()
            one["scores"] = evaluate.evaluate(net, stored, recipe._replace(coarse=coarse), len(classes.names),
                                              torch.device("cpu"))
            one["seconds"].append(time.time() - began)
            one["tiles"] = sum(seen)
    every = found[0.0]
    print("%s, %d px, patch %d px, %s width %d, %d epochs of each stage, seed %d, %s" % (
        given.set, config.res, tile, config.model, config.width, config.epochs, config.seed,
        " ".join(given.rest) or "other flags at their defaults"))
    print("%d test images, %d tiles, %.1f s for all of them" % (len(stored), every["tiles"], np.median(every["seconds"])))
    print("| coarse | F1 | IoU | time / every tile | tiles skipped |\n|---|---|---|---|---|")
    for coarse, one in found.items():
        pooled, ratio = one["scores"]["pooled"], np.median(np.array(one["seconds"]) / every["seconds"])
        print("| %g | %.1f | %.1f | %.2f | %.0f %% |" % (coarse, 100 * pooled["f1"], 100 * pooled["iou"], ratio,
                                                        100 * (1 - one["tiles"] / float(every["tiles"]))))


if __name__ == "__main__":
    main()
