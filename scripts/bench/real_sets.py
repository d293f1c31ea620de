"""Write the pairs of a real set, and beside them its classes.json when it has more than two classes:

    python scripts/bench/real_sets.py chasedb1|hrf_av|dubai_aerial|camvid_small FOLDER_OF_THE_SETS OUT.csv

chasedb1: children 01-07 train, 08-10 test, both eyes of a child on one side. hrf_av: numbers 05-10 train, 11-12 test.
dubai_aerial: tiles 3 and 7 test, the others train. camvid_small: drive 0016E5 tests, the other two train. There is no validation part: nothing is chosen on the test images, the last epoch's net is scored."""
import csv
import json
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


def dubai_aerial(folder):
    for tile in range(1, 9):
        images = os.path.join(folder, "Tile %d" % tile, "images")
        for name in sorted(os.listdir(images)):
            mask = os.path.join(folder, "Tile %d" % tile, "masks", os.path.splitext(name)[0] + ".png")
            yield os.path.join(images, name), mask, "test" if tile in (3, 7) else "train"


def camvid_small(folder):
    for name in sorted(os.listdir(os.path.join(folder, "images"))):
        yield (os.path.join(folder, "images", name), os.path.join(folder, "labels", name),
               "test" if name.startswith("0016E5") else "train")


SETS = {"chasedb1": chasedb1, "hrf_av": hrf_av, "dubai_aerial": dubai_aerial, "camvid_small": camvid_small}
CLASSES = {
    "dubai_aerial": {"classes": [{"name": "building", "colour": [60, 16, 152]}, {"name": "land", "colour": [132, 41, 246]},
                                 {"name": "road", "colour": [110, 193, 228]}, {"name": "vegetation", "colour": [254, 221, 58]},
                                 {"name": "water", "colour": [226, 169, 41]}], "ignore": [[155, 155, 155], [0, 0, 0]]},
    "camvid_small": {"classes": [{"name": name} for name in ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence",
                                                             "car", "pedestrian", "cyclist")], "ignore": [11]}}


def write(name, root, out):
    """Write the pairs of set `name` under `root` to the csv `out`, and its classes."""
    if name in CLASSES:
        with open(os.path.join(os.path.dirname(os.path.abspath(out)), "classes.json"), "w") as handle:
            json.dump(CLASSES[name], handle)
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["image", "mask", "split"])
        writer.writerows((os.path.abspath(i), os.path.abspath(m), s) for i, m, s in SETS[name](os.path.join(root, name)))


def written(name, root, work):
    """write() to a folder of its own in `work`, for not every set has a classes.json. Returns the csv."""
    out = os.path.join(os.path.abspath(work), name, "pairs.csv")
    os.makedirs(os.path.dirname(out), exist_ok=True)
    write(name, root, out)
    return out


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in SETS:
        sys.exit(__doc__)
    write(*sys.argv[1:])
