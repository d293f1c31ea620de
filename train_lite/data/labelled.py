"""Folders on disk -> images with one label each, their split and their classes. Reads no pixels."""
import glob
import os

from edge.command import say
from edge.errors import BadFile, UsageError, raise_all
from edge.images import listed
from train_lite.data.dataset import MOST_CLASSES, SHADES, Classes, Pair, csv_rows, hold_out, split_folders, warn_of_deeper

LAYOUTS = """expected one of
  DIR/train/CLASS/*.jpg (and val/CLASS, test/CLASS), DIR/CLASS/*.jpg,
  or a labels.csv with the columns image,label[,split]"""


def find(data, val_share=0.2, group_by=""):
    """(list of Pair, Classes) behind --data. Class ids follow the names in their order, numbers in theirs. Where no split says
    otherwise, `val_share` of the training images of every class is held out; with `group_by`, of all groups.
    Raises UsageError for a wrong path, BadFile for classes or files that cannot be used."""
    if not os.path.exists(data):
        raise UsageError("--data %s does not exist; %s" % (data, LAYOUTS))
    path = data if os.path.isfile(data) else os.path.join(data, "labels.csv")
    found = _from_csv(path) if os.path.isfile(path) else _from_folders(data)
    names = sorted({label for _pair, label in found}, key=_in_order)
    if not 2 <= len(names) <= MOST_CLASSES:
        raise BadFile("%s holds %d class%s, expected 2 to %d; %s" % (data, len(names), "" if len(names) == 1 else "es", MOST_CLASSES, LAYOUTS))
    pairs, problems = [], []
    held = val_share and not any(pair.split == "val" for pair, _label in found)
    for index, name in enumerate(names):
        own = [pair._replace(label=index) for pair, label in found if label == name]
        train = [pair for pair in own if pair.split == "train"]
        if len(train) < (2 if held and not group_by else 1):
            problems.append("class %s has %d training image%s" % (name, len(train), "" if len(train) == 1 else "s"))
            continue
        pairs += hold_out(own, val_share, "") if held and not group_by else own
    if held and group_by and not problems:  # a group is on one side for all classes
        pairs = hold_out(pairs, val_share, group_by)
        left = {pair.label for pair in pairs if pair.split == "train"}
        problems = ["class %s has no training image outside of the groups held out" % name
                    for index, name in enumerate(names) if index not in left]
    raise_all(problems, "%s has classes that cannot be learned" % data,
              "Expected one training image or more of every class, and one to hold out: add images, remove the class, or type --val-share 0.")
    return pairs, Classes(tuple(names), tuple(SHADES[i % len(SHADES)] for i in range(len(names))), len(names), False, ())


def _in_order(name):
    """Sorts numbers by value, before all other names."""
    try:
        value = float(name)
    except ValueError:
        value = float("nan")
    return (0, value, name) if abs(value) < float("inf") else (1, 0.0, name)


def _from_csv(path):
    """(Pair, label) of every line."""
    return [(Pair(os.path.splitext(row["image"])[0], image, "", row["split"]), row["label"])
            for row, (image,) in csv_rows(path, ("image",), ("label",), LAYOUTS)]


def _is_ours(folder):
    """Whether runs, or results of edge-run, lie in a folder: runs/, where the commands were typed beside the classes."""
    depths = [os.path.join(glob.escape(folder), *("*",) * depth) for depth in range(1 if listed(folder) else 3)]
    if not any(glob.glob(os.path.join(path, name)) for path in depths for name in ("lock", "results.jsonl")):
        return False
    say("%s holds runs or results, and is no class" % folder)
    return True


def _from_folders(data):
    places = split_folders(data)
    if not os.path.isdir(places[0][0]):
        places = [(data, "train")]
    found, problems, known = [], [], set()
    for place, split in places:
        classes = [name for name in (sorted(os.listdir(place)) if os.path.isdir(place) else [])
                   if os.path.isdir(os.path.join(place, name)) and name[0] != "." and not _is_ours(os.path.join(place, name))]
        known = known or set(classes)
        problems += ["%s: no such class in %s" % (os.path.join(place, name), places[0][0]) for name in sorted(set(classes) - known)]
        warn_of_deeper([os.path.join(place, name) for name in classes])
        for name in classes:
            paths = listed(os.path.join(place, name))
            if not paths:
                problems.append("%s holds no image" % os.path.join(place, name))
            found += [(Pair(os.path.splitext(os.path.relpath(path, data))[0], path, "", split), name) for path in paths]
    raise_all(problems, "%s has folders that are no classes" % data, "Remove or fill the folders named; " + LAYOUTS)
    return found
