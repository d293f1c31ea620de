"""Images with boxes: COCO, YOLO and Pascal VOC files, and everything that can be wrong in them."""
import json
import os

import pytest
from PIL import Image

from conftest import real_data
from edge.errors import BadFile, UsageError
from train_lite.data import boxed
from train_lite.data.dataset import SHADES, Box, Pair, demand_sizes

SIZE = "<size><width>200</width><height>100</height></size>"


def put(folder, files):
    """{path: text or object for JSON}; an image is an empty file: find() opens none."""
    for name, content in files.items():
        path = os.path.join(str(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as handle:
            handle.write(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def coco(names=("a.jpg", "b.jpg"), boxes=((0, 7, [20, 10, 100, 50]), (1, 3, [0, 0, 200, 100])), kinds=((7, "dog"), (3, "cat"))):
    """A COCO object: images of 200 x 100 px with the ids 10, 11, ...; boxes (index of the image, category, bbox)."""
    return {"images": [{"id": 10 + at, "file_name": name, "width": 200, "height": 100} for at, name in enumerate(names)],
            "annotations": [{"id": 90 + at, "image_id": 10 + image, "category_id": kind, "bbox": bbox, "iscrowd": 0, "area": 1}
                            for at, (image, kind, bbox) in enumerate(boxes)],
            "categories": [{"id": number, "name": name} for number, name in kinds]}


def voc(*things, size=SIZE, tail="</annotation>"):
    """An annotation; things: (name, xmin, ymin, xmax, ymax[, difficult])."""
    return "<annotation>" + size + "".join(
        "<object><name>%s</name>%s<part><bndbox><xmin>-9</xmin></bndbox></part><bndbox><xmin>%s</xmin><ymin>%s</ymin>"
        "<xmax>%s</xmax><ymax>%s</ymax></bndbox></object>" % (
            thing[0], "".join("<difficult>%s</difficult>" % d for d in thing[5:]), *thing[1:5])
        for thing in things) + tail


def close(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want):
        assert (one.label, one.crowd) == (other.label, other.crowd)
        assert max(abs(a - b) for a, b in zip(one[1:5], other[1:5])) < 1e-12


def refused(data, *words):
    with pytest.raises(BadFile) as caught:
        boxed.find(data, 0.0)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


# --- COCO -----------------------------------------------------------------------------------------------------------

def test_coco_file_with_sparse_categories_and_a_crowd(tmp_path):
    stored = coco(boxes=((0, 7, [20, 10, 100, 50]), (1, 3, [-0.5, 0, 201, 100]), (0, 3, [0, 0, 10, 10])))
    stored["annotations"][2]["iscrowd"] = 1
    put(tmp_path, {"set.json": stored, "a.jpg": "", "images/b.jpg": ""})
    pairs, classes = boxed.find(str(tmp_path / "set.json"), 0.0)
    assert classes == (("cat", "dog"), SHADES[1:3], 2, False, ())  # category 3 before 7
    assert [pair[:5] for pair in pairs] == [("a", str(tmp_path / "a.jpg"), "", "train", -1),
                                            ("images/b", str(tmp_path / "images" / "b.jpg"), "", "train", -1)]
    close(pairs[0].boxes, [Box(1, 0.1, 0.1, 0.6, 0.6), Box(0, 0, 0, 0.05, 0.1, True)])
    assert pairs[1].boxes == (Box(0, 0.0, 0.0, 1.0, 1.0),)  # half a pixel is cut off


def test_coco_folders(tmp_path, monkeypatch):
    plain = put(tmp_path / "a",
                {split + ".json": coco([split + ".jpg"], [(0, 3, [0, 0, 9, 9])]) for split in ("train", "val", "test")})
    put(tmp_path / "a", {"images/%s.jpg" % split: "" for split in ("train", "val", "test")})
    pairs, _classes = boxed.find(plain)
    assert [(pair.name, pair.split) for pair in pairs] == [("images/" + split, split) for split in ("train", "val", "test")]
    wide = put(tmp_path / "b", {"annotations/instances_train2014.json": coco(["1.jpg"], [(0, 3, [0, 0, 9, 9])]),
                                "annotations/instances_val2017.json": coco(["1.jpg", "2.jpg"], []),
                                "train2014/1.jpg": "", "val2017/1.jpg": "", "val/2.jpg": ""})
    pairs, _classes = boxed.find(wide)
    assert [(pair.name, pair.split, len(pair.boxes)) for pair in pairs] == [
        ("train2014/1", "train", 1), ("val2017/1", "val", 0), ("val/2", "val", 0)]
    monkeypatch.chdir(os.path.join(wide, "annotations"))
    pairs, _classes = boxed.find("instances_train2014.json", 0.0)
    assert [pair.name for pair in pairs] == ["../train2014/1"]
    assert os.path.samefile(pairs[0].image, os.path.join(wide, "train2014", "1.jpg"))


@pytest.mark.parametrize("name", ["annotations.json", "annotations/instances_default.json"])
def test_the_only_json_of_a_folder_whatever_its_name(name, tmp_path):
    data = put(tmp_path, {name: coco(["1.jpg"], [(0, 3, [0, 0, 9, 9])]), "images/1.jpg": ""})
    pairs, _classes = boxed.find(data, 0.0)
    assert [(pair.name, pair.split, len(pair.boxes)) for pair in pairs] == [("images/1", "train", 1)]
    put(tmp_path, {"other.json": coco()})  # which of the two?
    refused(data, "classes.txt", "labels")
    put(tmp_path, {"classes.txt": "thing\n", "labels/1.txt": "0 0.5 0.5 0.2 0.2\n"})
    (tmp_path / "other.json").unlink()
    pairs, classes = boxed.find(data, 0.0)
    assert classes.names == ("thing",)  # YOLO's labels are there: no JSON is guessed at


@pytest.mark.parametrize("bbox, words", [
    ([-1.5, 0, 50, 50], "lies outside"), ([160, 0, 41.5, 50], "lies outside"), ([0, -2, 50, 50], "lies outside"),
    ([0, 60, 50, 42], "lies outside; expected 0 to 200 across and 0 to 100 down"), ([200, 0, 0.9, 50], "lies outside"),
    ([5, 5, -1, 0], "has no area"), ([5, 5, 5, -1], "has no area"), ([5, 5, 5], "four finite numbers"),
    ("5 5 5 5", "four finite numbers"),
    (None, "four finite numbers"), ([5, 5, "5", 5], "four finite numbers"), ([5, 5, 10 ** 400, 5], "four finite numbers"),
    ([True, 5, 5, 5], "four finite numbers"), ([5, 5, 1e9, 5], "four finite numbers")])
def test_coco_boxes_that_cannot_be_used(bbox, words, tmp_path):
    put(tmp_path, {"train.json": coco(boxes=((0, 7, [0, 0, 9, 9]), (1, 3, bbox))), "a.jpg": "", "b.jpg": ""})
    said = refused(str(tmp_path), words, "annotation 91", "(1):", "Correct or remove")
    assert "annotation 90" not in said


@pytest.mark.parametrize("text, words", [('[0, 0, 1e999, 5]', "four finite numbers"), ("[0, 0, NaN, 5]", "no number of JSON")])
def test_coco_numbers_that_are_not_finite(text, words, tmp_path):
    put(tmp_path, {"train.json": json.dumps(coco()).replace("[20, 10, 100, 50]", text), "a.jpg": "", "b.jpg": ""})
    refused(str(tmp_path), words)


def change(key, at, **values):
    def apply(stored):
        stored[key][at].update(values)
    return apply


@pytest.mark.parametrize("breakage, words", [
    (change("annotations", 0, image_id=99), "annotation 90: image_id 99 is unknown"),
    (change("annotations", 0, image_id=[10]), "image_id [10] is unknown"),
    (change("annotations", 0, category_id=4), "category_id 4 is unknown; expected the id of one of the 2 categories"),
    (change("annotations", 1, id=90), "annotations[1] has the id 90 again"),
    (change("annotations", 1, id=None), "annotations[1] has the id None"),
    (change("annotations", 1, iscrowd=2), "iscrowd is 2; expected 0 or 1"),
    (change("images", 1, id=10), "images[1] has the id 10 again"),
    (change("images", 1, file_name="a.jpg"), "two images called a"),
    (change("images", 1, file_name="./x/../a.jpg"), "two images called a"),
    (change("images", 1, file_name="c.jpg"), "no such file: 'c.jpg'"),
    (change("images", 1, file_name=5), "no such file: 5"), (change("images", 1, file_name="\0"), "no such file"),
    (change("images", 1, file_name="\ud800"), "no such file"),
    (change("images", 1, width=0), "image 11 has the width 0"), (change("images", 1, height=None), "the height None"),
    (change("categories", 1, id=7), "categories[1] has the id 7 again"),
    (change("categories", 1, name="dog"), "category 7 has the name 'dog'"),
    (change("categories", 1, name=None), "has the name None")])
def test_coco_entries_that_cannot_be_used(breakage, words, tmp_path):
    stored = coco()
    breakage(stored)
    put(tmp_path, {"train.json": stored, "a.jpg": "", "b.jpg": ""})
    refused(str(tmp_path), words, "expected")


def test_coco_boxes_without_area_are_left_out_and_counted(tmp_path, capsys):
    """COCO's own train2017 has two of them."""
    put(tmp_path, {"train.json": coco(boxes=((0, 7, [5, 5, 9, 0]), (0, 7, [0, 0, 9, 9]), (1, 3, [7, 7, 0, 3.0]))), "a.jpg": "", "b.jpg": ""})
    pairs, _classes = boxed.find(str(tmp_path), 0.0)
    assert [len(pair.boxes) for pair in pairs] == [1, 0]
    assert "2 of 3 boxes have no width or no height and are left out, the first is annotation 90" in capsys.readouterr().err


def test_every_bad_entry_is_named(tmp_path):
    put(tmp_path,
        {"train.json": coco(["a.jpg", "x.jpg"], [(0, 7, [0, 0, -1, 0]), (5, 7, [0, 0, 9, 9]), (0, 8, [0, 0, 9, 9])]), "a.jpg": ""})
    refused(str(tmp_path), "(4):", "annotation 90", "annotation 91", "annotation 92", "x.jpg")


def test_splits_need_equal_categories(tmp_path):
    put(tmp_path, {"train.json": coco(["a.jpg"], [(0, 7, [0, 0, 9, 9])]),
                   "val.json": coco(["b.jpg"], [], [(7, "dog"), (3, "cow"), (9, "pig")]), "a.jpg": "", "b.jpg": ""})
    refused(str(tmp_path), "(2):", "category 3 is 'cow', but 'cat'", "category 9 is 'pig', but None")


def test_an_image_in_two_splits(tmp_path):
    put(tmp_path, {"train.json": coco(), "val.json": coco(["b.jpg"], []), "a.jpg": "", "b.jpg": ""})
    refused(str(tmp_path), "two images called b", "(train)", "(val)")


@pytest.mark.parametrize("stored", [
    [], {}, {"images": [], "annotations": []}, {"images": {}, "annotations": [], "categories": []},
    {"images": [1], "annotations": [], "categories": []}, "x"])
def test_json_of_another_structure(stored, tmp_path):
    put(tmp_path, {"train.json": json.dumps(stored)})
    refused(str(tmp_path), "has no list of objects", "expected a COCO file")


def test_json_cut_short(tmp_path):
    text = json.dumps(coco())
    for length in list(range(0, len(text), 37)) + [len(text) - 1]:
        put(tmp_path, {"train.json": text[:length], "a.jpg": "", "b.jpg": ""})
        refused(str(tmp_path), "cannot read the boxes", "train.json")


def test_two_files_of_one_split(tmp_path):
    put(tmp_path, {"annotations/instances_train2014.json": coco(), "annotations/instances_train2017.json": coco()})
    refused(str(tmp_path), "several files of the split train", "--data FILE.json")


@pytest.mark.parametrize("stored, words", [
    (coco(boxes=(), kinds=()), "has no classes"), (coco((), ()), "has no training images"),
    (coco(boxes=()), "has no boxes on its training")])
def test_sets_with_nothing_to_learn(stored, words, tmp_path):
    put(tmp_path, {"train.json": stored, "a.jpg": "", "b.jpg": ""})
    refused(str(tmp_path), words)


def test_a_crowd_is_nothing_to_learn(tmp_path):
    stored = coco()
    for note in stored["annotations"]:
        note["iscrowd"] = 1
    put(tmp_path, {"train.json": stored, "a.jpg": "", "b.jpg": ""})
    refused(str(tmp_path), "has no boxes on its training")


def test_only_a_validation_file(tmp_path):
    put(tmp_path, {"val.json": coco(), "a.jpg": "", "b.jpg": ""})
    refused(str(tmp_path), "has no training images")


# --- YOLO -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("images, labels, splits", [
    ("images", "labels", ["train"]), ("%s/images", "%s/labels", ["train", "val", "test"]),
    ("images/%s", "labels/%s", ["train", "val"])])
def test_yolo_layouts(images, labels, splits, tmp_path):
    put(tmp_path, {"classes.txt": "\ufeffcat\ndog\n\n"})
    for split in splits:
        image, label = (name % split if "%" in name else name for name in (images, labels))
        put(tmp_path, {image + "/1.jpg": "", image + "/2.PNG": "", image + "/note.md": "", image + "/._1.jpg": "",
                       label + "/1.txt": "1 0.5 0.25 0.5 0.5\n\n0 .1 .1 .2 .2", label + "/mask.png": ""})
    pairs, classes = boxed.find(str(tmp_path), 0.0)
    assert classes.names == ("cat", "dog") and classes.outputs == 2
    assert [(pair.split, os.path.basename(pair.image)) for pair in pairs] == [(s, n) for s in splits for n in ("1.jpg", "2.PNG")]
    assert pairs[0].name == os.path.join(images % "train" if "%" in images else images, "1")
    for first, second in zip(pairs[::2], pairs[1::2]):
        close(first.boxes, [Box(1, 0.25, 0, 0.75, 0.5), Box(0, 0, 0, 0.2, 0.2)])
        assert second.boxes == ()  # no label file


@pytest.mark.parametrize("line, words", [
    ("0 0.5 0.5 0.5", "is no box"), ("0 0.5 0.5 0.5 0.5 0.9", "is no box"), ("cat 0.5 0.5 0.5 0.5", "is no box"),
    ("0 a 0.5 0.5 0.5", "is no box"),
    ("2 0.5 0.5 0.5 0.5", "has the class 2; expected 0 to 1"), ("-1 0.5 0.5 0.5 0.5", "has the class -1"),
    ("0 nan 0.5 0.5 0.5", "not finite"), ("0 0.5 0.5 inf 0.5", "not finite"), ("0 0.5 0.5 0 0.5", "no area"),
    ("0 0.5 0.5 0.5 -0.5", "no area"),
    ("0 0.5 0.5 1.02 0.5", "lies outside"), ("0 0.1 0.5 0.22 0.5", "lies outside"), ("0 0.5 1.002 0.5 0.004", "lies outside"),
    ("0 32 32 16 16", "lies outside")])
def test_yolo_lines_that_cannot_be_used(line, words, tmp_path):
    put(tmp_path,
        {"classes.txt": "cat\ndog", "images/1.jpg": "", "labels/1.txt": "0 0.5 0.5 1.004 1\n" + line + "\n1 .5 .5 .1 .1"})
    refused(str(tmp_path), "(1):", "1.txt line 2", words)


@pytest.mark.parametrize("files, words", [
    ({"labels/9.txt": ""}, "9.txt: no image for it"), ({"images/1.png": ""}, "two files called 1"),
    ({"classes.txt": "cat\n\ndog"}, "line 2: got ''"),
    ({"classes.txt": "cat\ncat"}, "line 2: got 'cat'"), ({"classes.txt": "\n"}, "expected")])
def test_yolo_files_that_cannot_be_used(files, words, tmp_path):
    put(tmp_path, {"classes.txt": "cat\ndog", "images/1.jpg": "", "labels/1.txt": "0 .5 .5 .5 .5"})
    put(tmp_path, files)
    refused(str(tmp_path), words)


def test_yolo_folders_and_texts_that_are_missing(tmp_path):
    put(tmp_path / "a",
        {"train/images/1.jpg": "", "train/labels/1.txt": "0 .5 .5 .5 .5", "val/images/2.jpg": "", "test/labels/3.txt": ""})
    refused(str(tmp_path / "a"), "(3):", "classes.txt: no such file; expected one class name per line", os.path.join("val", "labels"),
            os.path.join("test", "images"))
    put(tmp_path / "b", {"classes.txt": "cat", "images/1.jpg": "", "labels/1.txt": ""})
    refused(str(tmp_path / "b"), "has no boxes on its training images")
    with open(str(tmp_path / "b" / "labels" / "1.txt"), "wb") as handle:
        handle.write(b"\xff\xfe0 1")
    refused(str(tmp_path / "b"), "1.txt: cannot be read as text", "UTF-8")


def test_yolo_names_elsewhere(tmp_path):
    """classes.txt beside the labels, as labelImg writes it, or the names of a data.yaml in its three forms."""
    files = {"images/1.jpg": "", "labels/1.txt": "1 .5 .5 .5 .5"}
    put(tmp_path / "beside", dict(files, **{"labels/classes.txt": "cat\ndog"}))
    for name, text in (("list", "path: .\nnc: 2\nnames: ['cat', \"dog\"]\n"), ("lines", "names:\n  - cat  # first\n  - dog\ntrain: images\n"),
                       ("numbers", "names:\n  1: dog\n  0: cat\nnc: 2\n")):
        put(tmp_path / name, dict(files, **{"data.yaml": text}))
    for name in ("beside", "list", "lines", "numbers"):
        pairs, classes = boxed.find(str(tmp_path / name), 0.0)
        assert classes.names == ("cat", "dog") and pairs[0].boxes[0].label == 1, name
    put(tmp_path / "none", dict(files, **{"data.yaml": "nc: 2\nnames: two"}))
    refused(str(tmp_path / "none"), "data.yaml: its names are no list")
    for text in ("names:\n  # two of them\n  - cat\n\n  - dog # the second\n", "names: ['cat', 'dog',]"):
        put(tmp_path / "gaps", dict(files, **{"data.yaml": text}))
        assert boxed.find(str(tmp_path / "gaps"), 0.0)[1].names == ("cat", "dog")
    for text in ("names: []", "names: [cat, cat]", "names: [cat, '', dog]", "names: [cat,,dog]", "names: [cat, , dog]"):
        put(tmp_path / "unfit", dict(files, **{"data.yaml": text}))
        refused(str(tmp_path / "unfit"), "data.yaml")
    for text, names in (("names: ['cat, wild', 'dog''s']", ("cat, wild", "dog's")), ("names: [cat, dog]\nold:\n  names: [x, y]", ("cat", "dog"))):
        put(tmp_path / "quoted", dict(files, **{"data.yaml": text}))
        assert boxed.find(str(tmp_path / "quoted"), 0.0)[1].names == names
    put(tmp_path / "count", dict(files, **{"data.yaml": "nc: 3\nnames: [cat, dog]"}))
    refused(str(tmp_path / "count"), "nc is 3, and there are 2 names: cat, dog")
    put(tmp_path / "few", dict(files, **{"data.yaml": "names: [cat]"}))
    refused(str(tmp_path / "few"), "has the class 1; expected 0 to 0, the names in", "data.yaml")


# --- Pascal VOC -----------------------------------------------------------------------------------------------------

def test_voc(tmp_path):
    put(tmp_path, {"JPEGImages/1.jpg": "", "JPEGImages/2.jpg": "",
                   "Annotations/1.xml": voc(("dog", 1, 1, 200, 100), ("cat", 21, "11.0", 120, 60, 1)),
                   "Annotations/2.xml": voc(("bee", 0, 1, 201, 50, 0))})
    pairs, classes = boxed.find(str(tmp_path), 0.0)
    assert classes.names == ("bee", "cat", "dog") and [pair.split for pair in pairs] == ["train", "train"]
    assert [pair.name for pair in pairs] == ["JPEGImages/1", "JPEGImages/2"]
    close(pairs[0].boxes, [Box(2, 0, 0, 1, 1), Box(1, 0.1, 0.1, 0.6, 0.6, True)])  # its first pixel is 1
    close(pairs[1].boxes, [Box(0, 0, 0, 1, 0.5)])  # one pixel too far is cut off
    put(tmp_path, {"ImageSets/Main/train.txt": "2\n", "ImageSets/Main/val.txt": " 1 \n\n", "ImageSets/Main/dog_train.txt": "1 -1",
                   "classes.txt": "dog\ncat\nbee\nowl", "JPEGImages/unlisted.jpg": ""})
    pairs, classes = boxed.find(str(tmp_path))
    assert classes.names == ("dog", "cat", "bee", "owl")
    assert [(pair.name, pair.split, [box.label for box in pair.boxes]) for pair in pairs] == [
        ("JPEGImages/2", "train", [2]), ("JPEGImages/1", "val", [0, 1])]


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>' + voc(("&b;", 1, 1, 9, 9))


@pytest.mark.parametrize("text, words", [
    (voc(("dog", 1, 1, 202, 50)), "lies outside"), (voc(("dog", -1, 1, 20, 50)), "lies outside"),
    (voc(("dog", 9, 9, 8, 20)), "no area"),
    (voc(("dog", 9, 9, "nan", 20)), "not finite"), (voc(("dog", 9, 9, "", 20)), "not finite"),
    (voc(("", 1, 1, 9, 9)), "has the name ''"),
    (voc(("dog", 1, 1, 9, 9, 2)), "difficult '2'"), (voc(("cow", 1, 1, 9, 9)), "called 'cow'"), (voc(size=""), "nan x nan px"),
    (voc(size=SIZE.replace("200", "0")), "0 x 100 px"), ("<html></html>", "<html>"), (voc(tail=""), "cut short"),
    ("", "cut short"), (BOMB, "DOCTYPE"),
    ("<?xml version='1.0' encoding='no-such'?><a/>", "no XML"), ("\0", "8-bit"),
    ("<?xml version='1.0' encoding='utf-7'?><a/>", "2.xml")])
def test_voc_annotations_that_cannot_be_used(text, words, tmp_path):
    put(tmp_path, {"JPEGImages/1.jpg": "", "JPEGImages/2.jpg": "", "Annotations/1.xml": voc(("dog", 1, 1, 9, 9)),
                   "Annotations/2.xml": text, "classes.txt": "dog"})
    said = refused(str(tmp_path), "(1):", words, "expected")
    assert "2.xml" in said and "1.xml" not in said


def test_voc_entities_hide_in_no_encoding(tmp_path):
    put(tmp_path, {"JPEGImages/1.jpg": "", "Annotations/1.xml": ""})
    with open(str(tmp_path / "Annotations" / "1.xml"), "wb") as handle:
        handle.write(BOMB.replace('"1.0"', '"1.0" encoding="utf-16"').encode("utf-16"))
    refused(str(tmp_path), "DOCTYPE")


def test_voc_cut_short_anywhere(tmp_path):
    text = voc(("dog", 1, 1, 9, 9), ("cat", 2, 2, 9, 9, 1))
    for length in range(0, len(text), 23):
        put(tmp_path, {"JPEGImages/1.jpg": "", "Annotations/1.xml": text[:length]})
        refused(str(tmp_path), "1.xml")


def test_voc_files_that_are_missing(tmp_path):
    put(tmp_path, {"JPEGImages/1.jpg": "", "JPEGImages/2.jpg": "", "Annotations/1.xml": voc(("dog", 1, 1, 9, 9)),
         "Annotations/3.xml": voc()})
    refused(str(tmp_path), "(2):", "2: no annotation", "3: no image")
    put(tmp_path, {"ImageSets/Main/train.txt": "1\n5\n2", "ImageSets/Main/val.txt": "1"})
    refused(str(tmp_path), "(3):", "5 (", "train.txt): no image", "2 (", "two images called JPEGImages/1")
    put(tmp_path / "b", {"JPEGImages/1.jpg": ""})
    refused(str(tmp_path / "b"), "no such folder", "no annotation for it")


# --- all ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, words", [("x", "does not exist"), ("a.csv", "no .json")])
def test_wrong_paths(name, words, tmp_path):
    put(tmp_path, {"a.csv": ""})
    with pytest.raises(UsageError, match=words):
        boxed.find(str(tmp_path / name))


def test_a_folder_of_something_else(tmp_path):
    put(tmp_path, {"cat/1.jpg": ""})
    refused(str(tmp_path), "holds no images with boxes", "YOLO")


def test_held_out(tmp_path):
    put(tmp_path,
        {"train.json": coco(["s%d_%d.jpg" % (at // 2, at) for at in range(10)], [(at, 3, [0, 0, 9, 9]) for at in range(10)])})
    put(tmp_path, {"s%d_%d.jpg" % (at // 2, at): "" for at in range(10)})
    assert [sum(pair.split == "val" for pair in boxed.find(str(tmp_path), share)[0]) for share in (0.0, 0.1, 0.4)] == [0, 1, 4]
    pairs, _classes = boxed.find(str(tmp_path), 0.2, r"(s\d)_")
    held = [pair.name for pair in pairs if pair.split == "val"]
    assert len(held) == 2 and held[0][:2] == held[1][:2]  # both of one group


def test_more_classes_than_can_be_told_apart(tmp_path):
    put(tmp_path, {"train.json": coco(boxes=((0, 1, [0, 0, 9, 9]),), kinds=[(at, "c%d" % at) for at in range(1, 252)]), "a.jpg": "", "b.jpg": ""})
    refused(str(tmp_path), "has 251 classes, expected up to 250")


@pytest.mark.parametrize("images, labels", [("%s/images", "%s/labels"), ("images/%s", "labels/%s")])
def test_yolo_folders_called_valid(images, labels, tmp_path):
    files = {"classes.txt": "cat"}
    for split in ("train", "valid"):
        files[images % split + "/%s.jpg" % split], files[labels % split + "/%s.txt" % split] = "", "0 0.5 0.5 0.2 0.2"
    pairs, _classes = boxed.find(put(tmp_path, files))
    assert [(os.path.basename(pair.name), pair.split, len(pair.boxes)) for pair in pairs] == [("train", "train", 1), ("valid", "val", 1)]


@pytest.mark.parametrize("orientation, size, shape, fits", [
    (1, (), (60, 100), True), (6, (), (60, 100), False), (3, (), (60, 100), False), (3, (100, 60), (60, 100), False),
    (6, (100, 60), (60, 100), True), (6, (60, 60), (60, 60), False), (8, (200, 120), (60, 100), True)])
def test_images_turned_by_a_flag(orientation, size, shape, fits, tmp_path):
    """Where nothing says whether the boxes are turned too, nobody may guess."""
    path = str(tmp_path / "a.jpg")
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", shape[::-1]).save(path, exif=exif)
    pair = Pair("a", path, "", "train", boxes=(Box(0, 0.1, 0.1, 0.5, 0.5),), size=size)
    demand_sizes([pair._replace(boxes=(), size=())], [shape + (False,)])
    if fits:
        demand_sizes([pair], [shape + (False,)])
    else:
        with pytest.raises(BadFile, match=r"a\.jpg: orientation %d(.|\n)*auto-orient(.|\n)*exiftool" % orientation):
            demand_sizes([pair], [shape + (False,)])


def test_splits_that_are_written_down_are_taken(tmp_path):
    """COCO's valid.json, Pascal VOC's trainval.txt; lists in a data.yaml are refused."""
    pairs, _classes = boxed.find(put(tmp_path / "coco", dict({"train.json": coco(), "validation.json": coco(("c.jpg", "d.jpg"))},
                                                             **{stem + ".jpg": "" for stem in "abcd"})), 0.0)
    assert [pair.split for pair in pairs] == ["train", "train", "val", "val"]
    files = {"%s/%s%s" % (folder, stem, ending): text for stem in "abcd" for folder, ending, text in (
        ("JPEGImages", ".jpg", ""), ("Annotations", ".xml", voc(("x", 1, 1, 5, 5))))}
    for lists, splits in (({"trainval": "a\nb"}, {"a": "train", "b": "train"}),
                          ({"trainval": "a\nb\nc", "val": "b", "test": "d"}, {"a": "train", "b": "val", "c": "train", "d": "test"}),
                          ({"train": "a", "trainval": "a\nb"}, {"a": "train"})):
        place = put(tmp_path / str(len(lists)) / "-".join(lists), dict(files, **{"ImageSets/Main/%s.txt" % name: text for name, text in lists.items()}))
        pairs, _classes = boxed.find(place, 0.0)
        assert {os.path.basename(pair.name): pair.split for pair in pairs} == splits
    yolo = put(tmp_path / "yolo", {"images/a.jpg": "", "labels/a.txt": "0 0.5 0.5 0.2 0.2", "data.yaml": "names: [cat]\ntrain: lists/train.txt\n"})
    with pytest.raises(BadFile, match="its splits are lists, such as lists/train.txt; expected folders"):
        boxed.find(yolo)


def test_class_lists_that_disagree(tmp_path):
    files = {"%s/%s/a%s" % (split, folder, ending): text for split in ("train", "val") for folder, ending, text in (
        ("images", split + ".jpg", ""), ("labels", split + ".txt", "1 0.5 0.5 0.2 0.2"))}
    files.update({"train/labels/classes.txt": "cat\ndog", "val/labels/classes.txt": "dog\ncat"})
    with pytest.raises(BadFile, match="val/labels/classes.txt: its classes are not those of .*train/labels/classes.txt"):
        boxed.find(put(tmp_path / "two", files))
    files.update({"val/labels/classes.txt": "cat\ndog", "data.yaml": "names: [horse, cow]"})
    with pytest.raises(BadFile, match="data.yaml: its classes are not those of"):
        boxed.find(put(tmp_path / "yaml", files))
    pairs, _classes = boxed.find(put(tmp_path / "same", dict(files, **{"data.yaml": "nc: 2\nnames: [cat, 'dog']"})))
    assert len(pairs) == 2


def test_images_in_deeper_folders_are_spoken_of(tmp_path, capsys):
    boxed.find(put(tmp_path, {"classes.txt": "cat", "images/a.jpg": "", "images/more/b.jpg": "", "labels/a.txt": "0 0.5 0.5 0.2 0.2"}), 0.0)
    assert "images/more is not used" in capsys.readouterr().err


def test_boxes_drawn_on_an_image_of_another_shape(tmp_path):
    """A photograph that is turned by its EXIF flag: the boxes were drawn on what a viewer shows. Another scale is the same picture."""
    put(tmp_path, {"train.json": coco(), "a.jpg": "", "b.jpg": ""})
    pairs, _classes = boxed.find(str(tmp_path), 0.0)
    assert [pair.size for pair in pairs] == [(200, 100)] * 2
    demand_sizes(pairs, [(100, 200, False), (50, 100, False)])
    demand_sizes(pairs, [(33, 66, False), None])
    with pytest.raises(BadFile, match="EXIF") as caught:
        demand_sizes(pairs, [(200, 100, False), (100, 190, False)])
    assert "a.jpg is 100x200 px, its boxes were drawn on 200x100 px" in str(caught.value) and "b.jpg" in str(caught.value)


def test_more_classes_than_shades(tmp_path):
    put(tmp_path, {"train.json": coco(kinds=[(number, "c%d" % number) for number in range(30)]), "a.jpg": "", "b.jpg": ""})
    _pairs, classes = boxed.find(str(tmp_path), 0.0)
    assert len(classes.palette) == 30 and SHADES[0] not in classes.palette
    assert classes.palette[11] == classes.palette[0] == SHADES[1]


def test_a_pair_has_no_boxes_unless_told():
    assert Pair("x", "", "", "train").boxes == ()


def test_real_photographs():
    pairs, classes = boxed.find(real_data("coco_small"))
    assert len(pairs) == 70 and sum(len(pair.boxes) for pair in pairs) == 581 and sum(not pair.boxes for pair in pairs) == 2
    assert len(classes.names) == 80 and classes.names[0] == "person" and sum(pair.split == "val" for pair in pairs) == 14
    first = pairs[0]
    assert first.name == "images/000000000025" and [classes.names[box.label] for box in first.boxes] == ["giraffe", "giraffe"]
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for pair in pairs for box in pair.boxes)
