"""Folders on disk -> pairs of image and mask, with their split and their classes. Reads no pixels."""
import csv
import os
import re
from typing import NamedTuple

from edge.command import read_json, say
from edge.errors import BadFile, UsageError, raise_all
from edge.images import READABLE, listed, orientation

IGNORE = 255  # class id of pixels that count nowhere: unlabelled, or owned by another tile
TURNED = ("Where %s drawn on what a viewer shows, turn the pixels: mogrify -auto-orient FILE. Where on the pixels as stored, take the flag "
          "away: exiftool -Orientation= FILE.")
SPLITS = ("train", "val", "test")
CALLED_VAL = ("val", "valid", "validation")
MOST_CLASSES = 250  # masks hold class ids in a byte, contracts as many names
IMAGE_FOLDERS = ("image", "images", "JPEGImages")
MASK_FOLDERS = ("mask", "masks", "labels", "SegmentationClass")
LAYOUTS = """expected one of
  DIR/train/image + DIR/train/mask (and val/..., test/...), DIR/images + DIR/masks,
  Pascal VOC (JPEGImages, SegmentationClass, ImageSets/Segmentation), DIR/*/images + DIR/*/masks,
  or a pairs.csv with the columns image,mask[,split]"""


class Box(NamedTuple):
    label: int           # class id, from 0: there is no background
    x0: float            # left, top, right, bottom as fractions of the image's width and height: 0 to 1, x0 < x1, y0 < y1
    y0: float
    x1: float
    y1: float
    crowd: bool = False  # a group, or too hard to tell: finding it is neither right nor wrong


class Pair(NamedTuple):
    name: str    # unique in the set
    image: str   # path
    mask: str    # path; '' where the whole image has a label
    split: str   # 'train' | 'val' | 'test'
    label: int = -1  # class id of the whole image
    boxes: tuple = ()  # of Box
    size: tuple = ()   # (width, height) px that the boxes were drawn on, where that is written down


class Classes(NamedTuple):
    """What mask values mean. names, palette: one entry per class, background first."""
    names: tuple
    palette: tuple            # (r, g, b) for pictures
    outputs: int              # score maps of the net: 1 when binary
    by_colour: bool           # masks are RGB pictures in the palette's colours
    ignore: tuple             # values, or colours when by_colour


SHADES = ((0, 0, 0), (255, 64, 64), (64, 160, 255), (255, 200, 0), (64, 200, 96), (200, 96, 255), (255, 128, 192),
          (0, 200, 200), (160, 112, 64), (176, 176, 176), (128, 128, 255), (192, 224, 64))


def read_classes(data, config):
    """Classes from DIR/classes.json when it is there, else from --classes and --ignore.

    classes.json: {"classes": [{"name": "road", "colour": [110, 193, 228]}, ...], "ignore": [values or colours]}.
    Colours are optional; with them masks are read as RGB pictures. Raises BadFile when it is malformed."""
    folder = data if os.path.isdir(data) else os.path.dirname(data)
    path = os.path.join(folder, "classes.json")
    if not os.path.isfile(path):
        count = max(2, config.classes)
        names = ("background", "foreground") if config.classes == 1 else tuple("class %d" % i for i in range(count))
        return Classes(names, tuple(SHADES[i % len(SHADES)] for i in range(count)),
                       1 if config.classes <= 2 else count, False, (config.ignore,))
    stored = read_json(path, "the class list")
    try:
        if not isinstance(stored, dict):
            raise TypeError("it holds a %s" % type(stored).__name__)
        entries = stored["classes"]
        names = tuple(_name(entry["name"]) for entry in entries)
        colours = [_colour(entry["colour"]) for entry in entries if "colour" in entry]
        ignore = stored.get("ignore", [255])
        ignore = tuple(_colour(v) if isinstance(v, list) else _value(v) for v in (ignore if isinstance(ignore, list) else [ignore]))
        twice = sorted(name for name in set(names) if names.count(name) > 1)
        if twice:
            raise ValueError("two classes are called %r" % twice[0])
        if not 2 <= len(names) <= MOST_CLASSES or len(colours) not in (0, len(names)):
            raise ValueError("it has %d classes, %d with a colour; expected 2 to %d, all or none" % (len(names), len(colours), MOST_CLASSES))
    except (KeyError, TypeError, ValueError) as exc:
        raise BadFile('%s: %s; expected {"classes": [{"name": ..., "colour": [r, g, b]}, ...], "ignore": [...]}'
                      % (path, exc)) from exc
    return Classes(names, tuple(colours) or tuple(SHADES[i % len(SHADES)] for i in range(len(names))),
                   1 if len(names) == 2 else len(names), bool(colours), ignore)


def _name(text):
    if not isinstance(text, str) or not text.strip() or not text.isprintable():
        raise ValueError("%r is no name" % (text,))
    return text


def _value(number):
    if type(number) is not int:
        raise ValueError("%r is no mask value: a whole number" % (number,))
    return number


def _colour(values):
    if len(values) != 3 or any(type(v) is not int or not 0 <= v <= 255 for v in values):
        raise ValueError("%r is no colour: three whole numbers from 0 to 255" % (values,))
    return tuple(values)


def find_pairs(data, val_share=0.2, group_by=""):
    """All pairs behind --data, in the order of their names, each with its split. Where no split says otherwise,
    `val_share` of the training images is held out for validation, whole groups at a time.
    Raises UsageError for a wrong path and one BadFile that names every image without mask and the reverse."""
    if not os.path.exists(data):
        raise UsageError("--data %s does not exist; %s" % (data, LAYOUTS))
    if os.path.isfile(data) or os.path.isfile(os.path.join(data, "pairs.csv")):
        pairs = _from_csv(data if os.path.isfile(data) else os.path.join(data, "pairs.csv"))
    else:
        pairs = _from_folders(data)
    if not pairs:
        raise BadFile("%s holds no images; %s" % (data, LAYOUTS))
    return hold_out(pairs, val_share, group_by)


def _from_csv(path):
    return [Pair(os.path.splitext(row["image"])[0], image, mask, row["split"])
            for row, (image, mask) in csv_rows(path, ("image", "mask"), (), LAYOUTS)]


def csv_rows(path, files, others, layouts):
    """Lines of a CSV file as (dict of the columns asked for and split, list of absolute paths). files: columns that name files,
    relative to it; others: further columns that every line fills; layouts: what was expected. One BadFile names all bad lines."""
    problems, found, seen = [], [], {}
    folder = os.path.dirname(os.path.abspath(path))
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:  # Excel's begin with a mark
            reader = csv.reader(handle)
            columns = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, dict(zip(columns, values))) for values in reader if values]
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise BadFile("cannot read %s: %s; %s" % (path, exc, layouts)) from exc
    if not set(files + others) <= set(columns):
        raise BadFile("%s begins with the line %r; expected the names of its columns: %s[,split]" % (
            path, ",".join(columns), ",".join(files + others)))
    for number, row in rows:
        own = {key: (row.get(key) or "").strip() for key in files + others + ("split",)}
        own["split"] = "val" if own["split"] in CALLED_VAL else own["split"] or "train"
        if not all(own[key] for key in files + others) or own["split"] not in SPLITS:
            problems.append("line %d: %s" % (number, ",".join(row.values())))
            continue
        paths = [os.path.normpath(os.path.join(folder, own[key])) for key in files]
        problems += ["line %d: no such file: %s" % (number, p) for p in paths if not os.path.isfile(p)]
        if seen.setdefault(paths[0], number) != number:
            problems.append("line %d: %s a second time, as on line %d" % (number, own[files[0]], seen[paths[0]]))
        found.append((own, paths))
    raise_all(problems, "%s has lines that name no %s" % (path, "pair" if len(files) > 1 else "image and label"),
              "Expected each image once, and the columns %s[,split] with split train, val or test; paths relative to the file." % ",".join(files + others))
    return found


def split_folders(data):
    """[(folder, split)] of a folder's train, val and test, there or not. val may be called valid or validation. Raises BadFile where
    it is there twice, and where other folders are called much the same: their images would be trained on, or left out."""
    names = [name for name in CALLED_VAL if os.path.isdir(os.path.join(data, name))] or ["val"]
    if len(names) > 1:
        raise BadFile("%s has the folders %s; expected one for validation. Remove or merge the others" % (data, " and ".join(names)))
    known = ("train", names[0], "test")
    alike = [name for name in (sorted(os.listdir(data)) if os.path.isdir(data) else [])
             if name.lower() in SPLITS + CALLED_VAL + ("training", "testing") and os.path.isdir(os.path.join(data, name))]
    if len(alike) > 1 and not set(alike) <= set(known):
        raise BadFile("%s has the folders %s; expected train, val and test in these letters, as many of them as there are. Rename them"
                      % (data, ", ".join(alike)))
    return [(os.path.join(data, name), split) for name, split in zip(known, SPLITS)]


def demand_empty(out, hint=""):
    """Raise UsageError where the folder of a new set holds anything: it would be mixed into the set."""
    if os.path.isfile(out) or os.path.isdir(out) and os.listdir(out):
        raise UsageError("%s holds something already%s; delete it, or give another --out" % (out, hint))


def demand_sizes(pairs, headers):
    """Raise BadFile where boxes were drawn on an image of another shape than the file has (another size alone is the same picture), and
    where a file is turned by a flag and nothing says whether its boxes are.
    headers: of images.photo_header, None where that is not known."""
    problems, unclear = [], []
    for pair, header in zip(pairs, headers):
        if not header or not (pair.size or pair.boxes):
            continue
        height, width = header[:2]
        drawn_w, drawn_h = pair.size or (width, height)
        if abs(drawn_w * height - drawn_h * width) > max(drawn_w, drawn_h, width, height):  # more than rounding
            problems.append("%s is %dx%d px, its boxes were drawn on %gx%g px" % (pair.image, width, height, drawn_w, drawn_h))
        elif pair.boxes:
            turn = orientation(pair.image)
            if turn != 1 and (turn < 5 or not pair.size or width == height):
                unclear.append("%s: orientation %d" % (pair.image, turn))
    raise_all(problems, "some images do not have the shape that their boxes were drawn on",
              "Is it turned by a flag in the file (EXIF), which is not followed here? Turn its pixels, such as with mogrify -auto-orient, "
              "or correct the size in the annotation.")
    raise_all(unclear, "some images are turned by a flag in the file (EXIF), and nothing says whether their boxes are",
              TURNED % "boxes were")


def voc_lists(folder):
    """[(path, split)] of a Pascal VOC folder of lists. trainval.txt serves where there is no train.txt; what val.txt names is not
    trained on then."""
    first = "train" if os.path.isfile(os.path.join(folder, "train.txt")) else "trainval"
    paths = [(os.path.join(folder, name + ".txt"), split) for name, split in zip((first,) + SPLITS[1:], SPLITS)]
    return [(path, split) for path, split in paths if os.path.isfile(path)]


def warn_of_deeper(folders):
    """Say which of the folders of images hold folders: what is in those is not used."""
    found = sorted(os.path.join(folder, name) for folder in folders for name in os.listdir(folder)
                   if name[0] != "." and os.path.isdir(os.path.join(folder, name)))
    if found:
        say("warning: what is in %s%s is not used: images are looked for one folder up" % (
            found[0], " and %d more folders" % (len(found) - 1) if len(found) > 1 else ""))


def _from_folders(data):
    problems, pairs = [], []
    places = split_folders(data)
    if not os.path.isdir(places[0][0]):
        places = [(data, "train")]
        if not _folder(data, IMAGE_FOLDERS):  # the tiles layout: DIR/*/images + DIR/*/masks
            places = [(os.path.join(data, part), "train") for part in sorted(os.listdir(data))]
    for place, split in places:
        images, masks = _folder(place, IMAGE_FOLDERS), _folder(place, MASK_FOLDERS)
        if images and masks:
            pairs += _match(data, images, masks, split, problems)
        elif images or masks:
            problems.append("%s: has %s but no folder of %s" % (place, os.path.basename(images or masks),
                                                                "masks" if images else "images"))
    raise_all(problems, "%s has images without mask or masks without image" % data,
              "A mask has its image's name, the ending apart. Add or remove the files named.")
    return _voc_splits(data, pairs)


def _folder(place, names):
    found = [os.path.join(place, name) for name in names if os.path.isdir(os.path.join(place, name))]
    return found[0] if found else None


def by_stem(folder, endings, problems):
    """{name without ending: path} of a folder's files, in order. endings: as of edge.images.listed()."""
    found = {}
    for path in listed(folder, endings):
        stem = os.path.splitext(os.path.basename(path))[0]
        if stem in found:
            problems.append("%s: two files called %s: %s and %s; expected one"
                            % (folder, stem, os.path.basename(found[stem]), os.path.basename(path)))
        found.setdefault(stem, path)
    return found


def _match(data, images, masks, split, problems):
    left, right = (by_stem(folder, READABLE, problems) for folder in (images, masks))
    if os.path.basename(masks) == "SegmentationClass":  # Pascal VOC: most of its images have no mask
        left = {stem: path for stem, path in left.items() if stem in right}
    problems += ["no mask for %s" % left[s] for s in sorted(set(left) - set(right))]
    problems += ["no image for %s" % right[s] for s in sorted(set(right) - set(left))]
    where = os.path.relpath(os.path.dirname(images), data)
    return [Pair(stem if where == "." else "%s/%s" % (where, stem), left[stem], right[stem], split)
            for stem in sorted(set(left) & set(right))]


def _voc_splits(data, pairs):
    lists = os.path.join(data, "ImageSets", "Segmentation")
    found, named = voc_lists(lists), {}
    if not found:
        return pairs
    for path, split in found:
        try:
            with open(path, encoding="utf-8-sig") as handle:
                named.update((line.strip(), split) for line in handle if line.strip())
        except (OSError, UnicodeDecodeError) as exc:
            raise BadFile("%s cannot be read as text: %s; expected one image name per line, in UTF-8" % (path, exc)) from exc
    raise_all(["%s (%s)" % (n, s) for n, s in sorted(named.items()) if n not in {p.name for p in pairs}],
              "%s lists images that have no image or mask file" % lists, "Add the files, or take the names off the lists.")
    return [pair._replace(split=named[pair.name]) for pair in pairs if pair.name in named]


def hold_out(pairs, share, group_by):
    """The pairs, `share` of the training groups moved to 'val' where nothing is there yet."""
    if any(pair.split == "val" for pair in pairs) or share == 0:
        return pairs
    train = [pair for pair in pairs if pair.split == "train"]
    groups = sorted({_group(pair, group_by) for pair in train})
    if len(groups) < 2:
        raise BadFile("%d training image(s) in %d group(s): nothing can be held out for validation. Add images, a val "
                      "folder, or type --val-share 0" % (len(train), len(groups)))
    count = min(len(groups) - 1, max(1, int(round(share * len(groups)))))
    held = {groups[(2 * i + 1) * len(groups) // (2 * count)] for i in range(count)}  # evenly spaced
    return [pair._replace(split="val") if pair.split == "train" and _group(pair, group_by) in held else pair
            for pair in pairs]


def _group(pair, pattern):
    if not pattern:
        return pair.name
    try:
        match = re.search(pattern, pair.name)
    except re.error as exc:
        raise UsageError("--group-by %r is no regular expression: %s" % (pattern, exc)) from exc
    if not match:
        raise UsageError("--group-by %r does not match the image name %r" % (pattern, pair.name))
    return match.group(1) if match.groups() else match.group(0)
