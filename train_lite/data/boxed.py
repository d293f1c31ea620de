"""Files on disk -> images with boxes, their split and their classes. Reads no pixels."""
import os
import re
from xml.etree import ElementTree

from edge.command import read_json, say
from edge.errors import BadFile, UsageError, raise_all
from edge.images import READABLE
from train_lite.data.dataset import CALLED_VAL, MOST_CLASSES, SHADES, SPLITS, Box, Classes, Pair, by_stem, hold_out, split_folders, voc_lists, warn_of_deeper

BEYOND_PX, BEYOND_SHARE = 1.0, 0.005  # by so much a box may leave its image, and is cut off; the share where sizes are not known
LARGEST = 1e9                         # a number that is not below it is no size and no place; nor is NaN
LAYOUTS = """expected one of
  COCO: FILE.json, DIR/train.json (and val.json, test.json), DIR/annotations/instances_train*.json (and val, test),
    or the only .json of DIR and DIR/annotations; images beside the file or in images, ../images, ../train2017, ../train,
  YOLO: DIR/images + DIR/labels, DIR/train/images + DIR/train/labels or DIR/images/train + DIR/labels/train (and val, test),
    with DIR/classes.txt, or
  Pascal VOC: JPEGImages, Annotations/*.xml, ImageSets/Main/{train,val,test,trainval}.txt"""


def find(data, val_share=0.2, group_by=""):
    """(list of Pair, Classes) behind --data: COCO, Pascal VOC or YOLO, the first in this order whose files are there. Class ids
    follow COCO's category ids, the lines of classes.txt, or else the names in their order. Where no split says otherwise,
    `val_share` of the training images is held out.
    Raises UsageError for a wrong path and one BadFile that names every image and box that cannot be used."""
    if not os.path.exists(data):
        raise UsageError("--data %s does not exist; %s" % (data, LAYOUTS))
    if os.path.isfile(data) and not data.lower().endswith(".json"):
        raise UsageError("--data %s is a file, but no .json; %s" % (data, LAYOUTS))
    problems = []
    files, places = _coco_files(data), _yolo_places(data)
    voc = os.path.isdir(os.path.join(data, "JPEGImages")) or os.path.isdir(os.path.join(data, "Annotations"))
    if not (files or voc or any(os.path.isdir(labels) for _images, labels, _split in places)):
        files = _only_json(data)
    if files:
        pairs, names = _coco(os.path.dirname(data) if os.path.isfile(data) else data, files, problems)
    elif voc:
        pairs, names = _voc(data, problems)
    elif places:
        pairs, names = _yolo(data, places, problems)
    else:
        raise BadFile("%s holds no images with boxes; %s" % (data, LAYOUTS))
    seen = {}
    for pair in pairs:
        other = seen.setdefault(pair.name, pair)
        if other is not pair:
            problems.append("two images called %s: %s (%s) and %s (%s); expected one" % (
                pair.name, other.image, other.split, pair.image, pair.split))
    raise_all(problems, "%s has images or boxes that cannot be used" % data,
              "Correct or remove the entries named: a set with holes would teach and score the wrong thing.")
    train = [pair for pair in pairs if pair.split == "train"]
    for what, count in (("classes", len(names)), ("training images", len(train)),
                        ("boxes on its training images", sum(not box.crowd for pair in train for box in pair.boxes))):
        if not count:
            raise BadFile("%s has no %s; expected one or more. Add them, or give another --data; %s" % (data, what, LAYOUTS))
    if len(names) > MOST_CLASSES:
        raise BadFile("%s has %d classes, expected up to %d. Merge or remove some" % (data, len(names), MOST_CLASSES))
    palette = tuple(SHADES[1 + i % (len(SHADES) - 1)] for i in range(len(names)))
    return hold_out(pairs, val_share, group_by), Classes(tuple(names), palette, len(names), False, ())


def _number(value):
    return type(value) in (int, float) and abs(value) < LARGEST


def _box(label, corners, width, height, beyond, crowd=False):
    """Box of the corners (x0, y0, x1, y1), given in the unit of width, height and beyond. Raises ValueError."""
    if not all(_number(value) for value in corners):
        raise ValueError("has numbers that are not finite; expected finite ones")
    if corners[2] <= corners[0] or corners[3] <= corners[1]:
        raise ValueError("has no area; expected a width and a height above 0")
    inside = [min(max(value / float(side), 0.0), 1.0) for value, side in zip(corners, (width, height, width, height))]
    if (min(corners[:2]) < -beyond or corners[2] > width + beyond or corners[3] > height + beyond
            or inside[2] <= inside[0] or inside[3] <= inside[1]):
        raise ValueError("lies outside; expected 0 to %g across and 0 to %g down, give or take %g" % (width, height, beyond))
    return Box(label, inside[0], inside[1], inside[2], inside[3], crowd)


def _pair(root, image, split, boxes=(), size=()):
    return Pair(os.path.splitext(os.path.relpath(image, root or "."))[0], image, "", split, boxes=tuple(boxes), size=tuple(size))


def _lines(path, problems):
    """The lines of a text file, without what is blank at their ends, and without the empty ones at its end."""
    return [line.strip() for line in _text(path, problems).rstrip().splitlines()]


def _text(path, problems):
    try:
        with open(path, encoding="utf-8-sig") as handle:
            return handle.read()
    except (OSError, UnicodeDecodeError) as exc:
        problems.append("%s: cannot be read as text: %s; expected UTF-8" % (path, exc))
        return ""


def _names(path, problems):
    """The class names of a classes.txt."""
    names = _lines(path, problems)
    problems += ["%s line %d: got %r; expected one name per line, each once" % (path, at + 1, name) for at, name in _unfit(names)]
    return names


def _unfit(names):
    """[(number, name)] of those that are empty or there already."""
    return [(at, name) for at, name in enumerate(names) if not isinstance(name, str) or not name or name in names[:at]]


# --- COCO -----------------------------------------------------------------------------------------------------------

def _coco_files(data):
    """[(path, split)] of a set's JSON files."""
    if os.path.isfile(data):
        return [(data, "train")]
    found, folder = [], os.path.join(data, "annotations")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for split in SPLITS:
        plain = [os.path.join(data, name + ".json") for name in (CALLED_VAL if split == "val" else (split,))]
        own = [path for path in plain if os.path.isfile(path)] or [
            os.path.join(folder, name) for name in names if name.startswith("instances_" + split) and name.endswith(".json")]
        if len(own) > 1:
            raise BadFile("%s has several files of the split %s: %s; expected one. Remove the others, or give one: "
                          "--data FILE.json" % (data, split, ", ".join(own)))
        found += [(path, split) for path in own]
    return found


def _only_json(data):
    """[(path, "train")] of a folder's only JSON file, whatever its name: programs have their own."""
    found = [os.path.join(folder, name) for folder in (data, os.path.join(data, "annotations")) if os.path.isdir(folder)
             for name in sorted(os.listdir(folder)) if name.lower().endswith(".json") and name[0] != "."]
    return [(found[0], "train")] if len(found) == 1 else []


def _coco(root, files, problems):
    pairs, known, first = [], None, ""
    for path, split in files:
        stored = read_json(path, "the boxes")
        images, notes, kinds = (_indexed(path, stored, key, problems) for key in ("images", "annotations", "categories"))
        labels = {number: label for label, number in enumerate(sorted(kinds))}
        names = [kinds[number].get("name") for number in sorted(kinds)]
        problems += ["%s: category %d has the name %.60r; expected one of its own" % (path, sorted(kinds)[at], name)
                     for at, name in _unfit(names)]
        here = dict(zip(sorted(kinds), names))
        known, first = (here, path) if known is None else (known, first)
        problems += ["%s: category %d is %.60r, but %.60r in %s; expected equal categories"
                     % (path, number, here.get(number), known.get(number), first)
                     for number in sorted(set(here) | set(known)) if here.get(number) != known.get(number)]
        boxes = {number: [] for number in images}
        flat = [number for number, note in notes.items() if _flat(note.get("bbox"))]
        if flat:  # COCO's own train2017 has two
            say("warning: %s: %d of %d boxes have no width or no height and are left out, the first is annotation %d"
                % (path, len(flat), len(notes), flat[0]))
        for number, note in notes.items():
            if _flat(note.get("bbox")):
                continue
            try:
                _coco_box(note, images, labels, boxes)
            except ValueError as exc:
                problems.append("%s: annotation %d: %s" % (path, number, exc))
        places = _coco_places(path, split)
        for number, entry in images.items():
            image = _looked_for(places, entry.get("file_name"))
            if image:
                pairs.append(_pair(root, image, split, boxes[number], (entry["width"], entry["height"]) if _sized(entry) else ()))
            else:
                problems.append("%s: image %d: no such file: %.200r; expected it in one of %s" % (
                    path, number, entry.get("file_name"), ", ".join(places)))
            if not _sized(entry):
                problems.append("%s: image %d has the width %.20r and the height %.20r; expected its size in px" % (
                    path, number, entry.get("width"), entry.get("height")))
    return pairs, [known[number] for number in sorted(known)]


def _indexed(path, stored, key, problems):
    """{id: entry} of one of the lists in a COCO file."""
    entries = stored.get(key) if isinstance(stored, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BadFile('%s has no list of objects "%s"; expected a COCO file: {"images": [...], "annotations": [...], '
                      '"categories": [...]}. Give the file of the boxes' % (path, key))
    found = {}
    for at, entry in enumerate(entries):
        number = entry.get("id")
        if type(number) is not int or number in found:
            problems.append("%s: %s[%d] has the id %.60r%s; expected a whole number, each once"
                            % (path, key, at, number, " again" if type(number) is int else ""))
        else:
            found[number] = entry
    return found


def _sized(entry):
    return all(_number(entry.get(side)) and entry[side] > 0 for side in ("width", "height"))


def _flat(bbox):
    return isinstance(bbox, list) and len(bbox) == 4 and all(map(_number, bbox)) and min(bbox[2:]) == 0


def _coco_box(note, images, labels, boxes):
    """Adds one annotation to the boxes of its image. Raises ValueError."""
    for key, known, what in (("image_id", images, "images"), ("category_id", labels, "categories")):
        if type(note.get(key)) is not int or note[key] not in known:
            raise ValueError("%s %.60r is unknown; expected the id of one of the %d %s" % (key, note.get(key), len(known), what))
    if note.get("iscrowd", 0) not in (0, 1):
        raise ValueError("iscrowd is %.60r; expected 0 or 1" % (note["iscrowd"],))
    bbox, image = note.get("bbox"), images[note["image_id"]]
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_number(value) for value in bbox):
        raise ValueError("bbox %.80r; expected four finite numbers: [x, y, width, height] in px" % (bbox,))
    if not _sized(image):
        return  # said of the image, once
    x, y, width, height = bbox
    try:
        boxes[note["image_id"]].append(_box(labels[note["category_id"]], (x, y, x + width, y + height), image["width"],
                                            image["height"], BEYOND_PX, bool(note.get("iscrowd"))))
    except ValueError as exc:
        raise ValueError("bbox %s %s" % (bbox, exc)) from exc


def _coco_places(path, split):
    """Folders in which the images of a COCO file may lie."""
    here = os.path.dirname(path) or "."
    stem = os.path.splitext(os.path.basename(path))[0].replace("instances_", "")
    names = ["images", stem] + [name for name in (split + "2017", split) if name != stem]
    return [here] + [os.path.normpath(os.path.join(base, name)) for base in (here, os.path.join(here, "..")) for name in names]


def _looked_for(places, name):
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    try:
        paths = (os.path.normpath(os.path.join(place, name)) for place in places)
        return next((path for path in paths if os.path.isfile(path)), None)
    except ValueError:  # a lone surrogate: Python 3.6 does not say "no such file"
        return None


# --- YOLO -----------------------------------------------------------------------------------------------------------

def _yolo_places(data):
    """[(folder of images, folder of labels, split)], one of the two is there."""
    inner = split_folders(os.path.join(data, "images"))
    layouts = [[(os.path.join(place, "images"), os.path.join(place, "labels"), split) for place, split in split_folders(data)],
               [(place, os.path.join(data, "labels", os.path.basename(place)), split) for place, split in inner],
               [(os.path.join(data, "images"), os.path.join(data, "labels"), "train")]]
    found = [[place for place in layout if os.path.isdir(place[0]) or os.path.isdir(place[1])] for layout in layouts]
    return next((places for places in found if places), [])


def _yolo(data, places, problems):
    (names, source), pairs = _yolo_names(data, places, problems), []
    for images, labels, split in places:
        missing = [folder for folder in (images, labels) if not os.path.isdir(folder)]
        if missing:
            problems.append("no such folder: %s; expected images and labels side by side" % missing[0])
            continue
        warn_of_deeper([images])
        photos, texts = by_stem(images, READABLE, problems), by_stem(labels, (".txt",), problems)
        if "classes" not in photos:
            texts.pop("classes", None)  # where some programs put the names
        problems += ["%s: no image for it in %s; expected one of the same name" % (texts[stem], images)
                     for stem in texts if stem not in photos]
        for stem, image in photos.items():
            boxes = []
            for at, line in enumerate(_lines(texts[stem], problems) if stem in texts else (), 1):
                try:
                    boxes += [_yolo_box(line, names, source)] if line else []
                except ValueError as exc:
                    problems.append("%s line %d: %.80r %s" % (texts[stem], at, line, exc))
            pairs.append(_pair(data, image, split, boxes))
    return pairs, names


def _yolo_names(data, places, problems):
    """The class names and the file that they are from: lines of a classes.txt, in the folder or beside the labels, or the `names` of
    a data.yaml. Where there are several, they must be the same."""
    yaml, paths = os.path.join(data, "data.yaml"), [os.path.join(folder, "classes.txt") for folder in [data] + [place[1] for place in places]]
    found = [(_names(path, problems), path) for path in paths if os.path.isfile(path)]
    if os.path.isfile(yaml):
        found.append((_yaml_names(yaml, [] if found else problems), yaml))
        lists = re.findall(r"^(?:train|val|test)\s*:\s*(.+\.txt)\W*$", _text(yaml, []), re.MULTILINE)
        problems += ["%s: its splits are lists, such as %s; expected folders: train/images, train/labels, val/images, ..." % (yaml, lists[0])
                     ] if lists else []
    if not found:
        problems.append("%s: no such file; expected one class name per line, or a data.yaml with names" % paths[0])
        return [], yaml
    names, source = found[0]
    problems += ["%s: its classes are not those of %s; expected the same, in the same order" % (path, source)
                 for other, path in found[1:] if other and other != names]
    return names, source


def _yaml_names(path, problems):
    """The `names` of a data.yaml: a list, in one line or several, or a number for each."""
    found, inside, count = {}, False, None
    for line in _text(path, problems).splitlines():
        line = (" " + line).split(" #")[0].rstrip()[1:]
        if not line:
            continue
        if re.match(r"names\s*:", line):
            inside, listed = True, re.match(r"names\s*:\s*\[(.*)\]$", line)
            parts = re.findall(r"""\s*('(?:[^']|'')*'|"[^"]*"|[^,]+|(?=,))\s*(?:,|$)""", listed.group(1)) if listed else []
            found.update(enumerate(_unquoted(part) for part in parts))
        elif inside:
            entry = re.match(r"\s*(?:-|(\d+)\s*:)\s+(.+)$", line)
            if entry:
                found[int(entry.group(1)) if entry.group(1) else len(found)] = _unquoted(entry.group(2))
            inside = bool(entry)
        counted = re.match(r"nc\s*:\s*(\d+)$", line)
        count = int(counted.group(1)) if counted else count
    if sorted(found) != list(range(len(found))) or not found:
        problems.append("%s: its names are no list; expected names: [one, two], or a line for each" % path)
        return []
    if count not in (None, len(found)):
        problems.append("%s: nc is %d, and there are %d names: %s; expected as many" % (path, count, len(found), ", ".join(found.values())))
    names = [found[index] for index in range(len(found))]
    problems += ["%s: class %d is called %r; expected a name of its own" % (path, at, name) for at, name in _unfit(names)]
    return names


def _unquoted(text):
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace("''", "'") if text[0] == "'" else text[1:-1]
    return text


def _yolo_box(line, names, source):
    try:
        label, x, y, width, height = line.split()
        label, x, y, width, height = int(label), float(x), float(y), float(width), float(height)
    except ValueError as exc:
        raise ValueError("is no box; expected five numbers: class x y width height, the centre and size as fractions") from exc
    if names and not 0 <= label < len(names):  # without names that is what is wrong
        raise ValueError("has the class %d; expected 0 to %d, the names in %s" % (label, len(names) - 1, source))
    return _box(label, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), 1, 1, BEYOND_SHARE)


# --- Pascal VOC -----------------------------------------------------------------------------------------------------

def _voc(data, problems):
    folders = [os.path.join(data, name) for name in ("JPEGImages", "Annotations")]
    problems += ["no such folder: %s; expected JPEGImages and Annotations" % folder
                 for folder in folders if not os.path.isdir(folder)]
    photos, texts = (by_stem(folder, endings, problems) if os.path.isdir(folder) else {}
                     for folder, endings in zip(folders, (READABLE, (".xml",))))
    lists = [(path, split, [stem for stem in _lines(path, problems) if stem])
             for path, split in voc_lists(os.path.join(data, "ImageSets", "Main"))]
    held = {stem for path, split, stems in lists for stem in stems if split != "train"}  # a trainval.txt has them too
    wanted = [(stem, split, " (%s)" % path) for path, split, stems in lists for stem in stems
              if not (path.endswith("trainval.txt") and stem in held)]
    if not lists:
        wanted = [(stem, "train", "") for stem in sorted(set(photos) | set(texts))]
    pairs, found = [], set()
    for stem, split, where in wanted:
        if stem not in photos or stem not in texts:
            problems.append("%s%s: no %s for it; expected both" % (stem, where, "image" if stem not in photos else "annotation"))
            continue
        boxes, size = _voc_boxes(texts[stem], problems)
        found |= {box.label for box in boxes}
        pairs.append(_pair(data, photos[stem], split, boxes, size))
    path = os.path.join(data, "classes.txt")
    names = _names(path, problems) if os.path.isfile(path) else sorted(found)
    problems += ["%s: an object is called %.60r; expected a name in %s" % (texts[os.path.basename(pair.name)], name, path)
                 for pair in pairs for name in sorted({box.label for box in pair.boxes} - set(names))]
    labels = dict(zip(names, range(len(names))))
    pairs = [pair._replace(boxes=tuple(box._replace(label=labels.get(box.label, -1)) for box in pair.boxes)) for pair in pairs]
    return pairs, names


def _voc_boxes(path, problems):
    """The boxes of an annotation, labelled by their names, and the image's size (width, height)."""
    boxes = []
    try:
        root = _xml(path)
        width, height = (_float(root.findtext("size/" + side)) for side in ("width", "height"))
        if root.tag != "annotation" or not (_number(width) and _number(height) and width > 0 and height > 0):
            raise ValueError("is a <%.40s> of %g x %g px; expected an <annotation> with its <size> in px"
                             % (root.tag, width, height))
    except ValueError as exc:
        problems.append("%s %s" % (path, exc))
        return boxes, ()
    for at, thing in enumerate(root.findall("object"), 1):
        name, hard = (thing.findtext("name") or "").strip(), (thing.findtext("difficult") or "0").strip()
        x0, y0, x1, y1 = corners = [_float(thing.findtext("bndbox/" + key)) for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            if not name or hard not in ("0", "1"):
                raise ValueError("has the name %.60r and difficult %.20r; expected a name, and 0 or 1" % (name, hard))
            boxes.append(_box(name, (x0 - 1, y0 - 1, x1, y1), width, height, BEYOND_PX, hard == "1"))  # its first pixel is 1
        except ValueError as exc:
            problems.append("%s object %d: %s %s" % (path, at, corners, exc))
    return boxes, (width, height)


def _float(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return float("nan")


def _xml(path):
    """The root of an XML file. Raises ValueError, also for one with entities: a few lines of them can become gigabytes."""
    try:
        with open(path, "rb") as handle:
            text = handle.read()
        if b"\0" not in text and b"<!DOCTYPE" not in text:  # no entity without one
            return ElementTree.fromstring(text)
    except (OSError, LookupError, ValueError, ElementTree.ParseError) as exc:
        raise ValueError("is cut short or no XML: %s; expected a whole file. Copy it again from its source" % exc) from exc
    raise ValueError("declares a DOCTYPE or is no 8-bit text; expected plain XML. Remove the declaration")
