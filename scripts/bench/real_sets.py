"""Write the pairs.csv of a real set: python scripts/bench/real_sets.py chasedb1|hrf_av FOLDER_OF_THE_SETS OUT.csv

chasedb1: children 01-07 train, 08-10 test, both eyes of a child on one side. hrf_av: numbers 05-10 train, 11-12 test.
There is no validation part: nothing is chosen on the test images, the last epoch's net is scored."""
import csv
import os
import re
import sys


def chasedb1(folder):
    for name in sorted(os.listdir(folder)):
        if name.endswith(".jpg"):
            child = int(re.match(r"Image_(\d\d)", name).group(1))
            mask = name.replace(".jpg", "_1stHO.png")
            yield os.path.join(folder, name), os.path.join(folder, mask), "train" if child <= 7 else "test"


def hrf_av(folder):
    for name in sorted(os.listdir(os.path.join(folder, "images"))):
        stem = os.path.splitext(name)[0]
        mask = os.path.join(folder, "manual_av", stem + "_AVmanual.png")
        yield os.path.join(folder, "images", name), mask, "train" if int(stem[:2]) <= 10 else "test"


SETS = {"chasedb1": chasedb1, "hrf_av": hrf_av}


def write(name, root, out):
    """Write the pairs of set `name` under `root` to the csv `out`."""
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["image", "mask", "split"])
        writer.writerows((os.path.abspath(i), os.path.abspath(m), s) for i, m, s in SETS[name](os.path.join(root, name)))


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in SETS:
        sys.exit(__doc__)
    write(*sys.argv[1:])
