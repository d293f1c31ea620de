"""Folders on disk -> images with one label each, their split and their classes. Reads no pixels."""
import os

from edge.errors import BadFile, UsageError, raise_all
from edge.images import READABLE
from train_lite.dataset import SHADES, Classes, Pair, csv_rows, hold_out

LAYOUTS = """expected one of
  DIR/train/CLASS/*.jpg (and val/CLASS, test/CLASS), DIR/CLASS/*.jpg,
  or a labels.csv with the columns image,label[,split]"""


def find(data, val_share=0.2, group_by=""):
    """(list of Pair, Classes) behind --data. Class ids follow the names in their order, numbers in theirs. Where no split says
    otherwise, `val_share` of the training images of every class is held out.
    Raises UsageError for a wrong path, BadFile for classes or files that cannot be used."""
    if not os.path.exists(data):
        raise UsageError("--data %s does not exist; %s" % (data, LAYOUTS))
    path = data if os.path.isfile(data) else os.path.join(data, "labels.csv")
    found = _from_csv(path) if os.path.isfile(path) else _from_folders(data)
    names = sorted({label for _pair, label in found}, key=lambda name: (0, int(name), name) if name.isdigit() else (1, 0, name))
    if len(names) < 2:
        raise BadFile("%s holds %d class%s; %s" % (data, len(names), "" if len(names) == 1 else "es", LAYOUTS))
    pairs, problems = [], []
    for index, name in enumerate(names):
        own = [pair._replace(label=index) for pair, label in found if label == name]
        train = [pair for pair in own if pair.split == "train"]
        held = val_share and not any(pair.split == "val" for pair, _label in found)
        if len(train) < (2 if held else 1):
            problems.append("class %s has %d training image%s" % (name, len(train), "" if len(train) == 1 else "s"))
            continue
        pairs += hold_out(own, val_share, group_by) if held else own
    raise_all(problems, "%s has classes that cannot be learned" % data,
              "Expected one training image or more of every class, and one to hold out: add images, remove the class, or type --val-share 0.")
    return pairs, Classes(tuple(names), tuple(SHADES[i % len(SHADES)] for i in range(len(names))), len(names), False, ())


def _from_csv(path):
    """(Pair, label) of every line."""
    found, seen, problems = [], {}, []
    for number, (row, (image,)) in enumerate(csv_rows(path, ("image",), ("label",), LAYOUTS), 2):
        if image in seen:
            problems.append("%s is on lines %d and %d" % (row["image"], seen[image], number))
        seen[image] = number
        found.append((Pair(os.path.splitext(row["image"])[0], image, "", row.get("split") or "train"), row["label"].strip()))
    raise_all(problems, "%s names images twice" % path, "Expected each image once. Remove the lines named.")
    return found


def _from_folders(data):
    places = [(os.path.join(data, split), split) for split in ("train", "val", "test")]
    if not os.path.isdir(places[0][0]):
        places = [(data, "train")]
    found, problems, known = [], [], set()
    for place, split in places:
        classes = [name for name in sorted(os.listdir(place)) if os.path.isdir(os.path.join(place, name)) and name[0] != "."] \
            if os.path.isdir(place) else []
        known = known or set(classes)
        problems += ["%s: no such class in %s" % (os.path.join(place, name), places[0][0]) for name in sorted(set(classes) - known)]
        for name in classes:
            files = [file for file in sorted(os.listdir(os.path.join(place, name))) if file.lower().endswith(READABLE)]
            if not files:
                problems.append("%s holds no image" % os.path.join(place, name))
            stem = os.path.relpath(os.path.join(place, name), data)
            found += [(Pair(os.path.join(stem, os.path.splitext(file)[0]), os.path.join(place, name, file), "", split), name)
                      for file in files]
    raise_all(problems, "%s has folders that are no classes" % data, "Remove or fill the folders named; " + LAYOUTS)
    return found
