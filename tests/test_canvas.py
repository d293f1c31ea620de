"""Canvases: a grid of small images, and their boxes with them."""
import errno
import json
import os

import numpy as np
import pytest
from PIL import Image

from conftest import command, real_data
from edge.errors import BadFile
from edge.images import PngWriter
from test_boxed import coco, put
from train_lite.data import boxed, canvas
from train_lite.data.dataset import Box

SIDES = ((20, 40), (90, 60), (32, 32), (16, 100), (33, 10))  # height, width


def source(folder, sides=SIDES, val=0):
    """A COCO set of images, each grey with one white rectangle in rows h/4..h/2 and columns w/5..w: its box."""
    stored = {split: coco((), (), ((2, "cat"), (9, "dog"))) for split in ("train", "val")}
    for at, (height, width) in enumerate(sides):
        own, name = stored["val" if at >= len(sides) - val else "train"], "%d.png" % at
        pixels = np.full((height, width, 3), 20 + 10 * at, np.uint8)
        pixels[height // 4:height // 2, width // 5:] = 255
        os.makedirs(os.path.join(str(folder), "images"), exist_ok=True)
        Image.fromarray(pixels).save(os.path.join(str(folder), "images", name))
        own["images"].append({"id": at, "file_name": name, "width": width, "height": height})
        own["annotations"].append({"id": at, "image_id": at, "category_id": 9 if at % 2 else 2, "iscrowd": int(at == 2),
                                   "bbox": [width // 5, height // 4, width - width // 5, height // 2 - height // 4]})
    return put(folder, {split + ".json": own for split, own in stored.items() if split == "train" or val})


def made(folder, data, *words):
    out = str(folder / "out")
    assert canvas.main(["--data", data, "--out", out, "--grid", "2", "--cell", "32"] + list(words)) == 0
    return out


def stored(out, split="train"):
    with open(os.path.join(out, split + ".json")) as handle:
        return json.load(handle)


def test_round_trip(tmp_path):
    """Every box of the canvas lies on the white of its image, in its cell, with its class; find() reads it back."""
    data = source(tmp_path / "set")
    originals = {pair.name: pair for pair in boxed.find(data, 0.0)[0]}
    out = made(tmp_path, data, "--count", "3")
    pairs, classes = boxed.find(out, 0.0)
    entries = stored(out)["images"]
    assert classes.names == ("cat", "dog") and [pair.name for pair in pairs] == ["images/train_00000%d" % at for at in range(3)]
    for pair, entry in zip(pairs, entries):
        pixels = np.asarray(Image.open(pair.image)).astype(int)
        assert pixels.shape == (64, 64, 3) and len(pair.boxes) == len(entry["cells"]) == 4
        for at, (box, cell) in enumerate(zip(pair.boxes, entry["cells"])):
            origin, (top, left) = originals[cell["source"]], (32 * (at // 2), 32 * (at % 2))
            assert (cell["row"], cell["col"]) == (at // 2, at % 2)
            assert (box.label, box.crowd) == (origin.boxes[0].label, origin.boxes[0].crowd)
            height, width = SIDES[int(os.path.basename(cell["source"]))]
            scale = min(1.0, 32.0 / max(height, width))
            assert (cell["height"], cell["width"]) == (round(height * scale), round(width * scale))
            assert abs(box.x0 * 64 - left - origin.boxes[0].x0 * cell["width"]) < 1e-9
            assert abs(box.y1 * 64 - top - origin.boxes[0].y1 * cell["height"]) < 1e-9
            inside = pixels[top:top + 32, left:left + 32]
            y0, x0, y1, x1 = box.y0 * 64 - top, box.x0 * 64 - left, box.y1 * 64 - top, box.x1 * 64 - left
            assert inside[int((y0 + y1) / 2), int(np.ceil(x0)) + 1:int(x1) - 1].min() > 150  # white in the middle of the box
            if y1 + 2 < cell["height"]:
                assert inside[int(np.ceil(y1)) + 1, :cell["width"]].max() < 90  # dark below it
            assert (inside[cell["height"]:] == 250).all() and (inside[:, cell["width"]:] == 250).all()


def test_small_images_keep_their_pixels(tmp_path):
    data = source(tmp_path / "set", [(20, 31)])
    out = made(tmp_path, data, "--count", "1")
    want = np.asarray(Image.open(os.path.join(data, "images", "0.png")))
    got = np.asarray(Image.open(os.path.join(out, "images", "train_000000.png")))
    assert all((got[y:y + 20, x:x + 31] == want).all() for y in (0, 32) for x in (0, 32))  # not enlarged


def test_every_image_before_any_again():
    order = canvas.drawn(list("abcdefg"), 17, np.random.RandomState(1))
    assert sorted(order[:7]) == sorted(order[7:14]) == list("abcdefg") and len(set(order[14:])) == 3
    assert order[:7] != order[7:14] and order != canvas.drawn(list("abcdefg"), 17, np.random.RandomState(2))


def test_count_seed_and_what_is_printed(tmp_path, capsys):
    data = source(tmp_path / "set")
    texts = []
    for seed in (4, 4, 5):
        out = made(tmp_path / ("%d%d" % (seed, len(texts))), data, "--seed", str(seed), "--json")
        texts.append([cell["source"] for image in stored(out)["images"] for cell in image["cells"]])
        assert json.loads(capsys.readouterr().out)["train"] == 2  # five images, four cells
    assert texts[0] == texts[1] != texts[2] and set(texts[0]) == set(texts[2]) and len(set(texts[0])) == 5


@pytest.mark.parametrize("val", [0, 2])
def test_validation_shares_no_image(val, tmp_path):
    """From the split val where there is one, else from a fifth of the training images."""
    out = made(tmp_path, source(tmp_path / "set", val=val), "--val", "2")
    used = {split: {cell["source"] for image in stored(out, split)["images"] for cell in image["cells"]}
            for split in ("train", "val")}
    assert [len(used[split]) for split in ("train", "val")] == ([3, 2] if val else [4, 1])
    assert not used["train"] & used["val"] and (not val or used["val"] == {"images/3", "images/4"})
    pairs, _classes = boxed.find(out)
    assert [pair.split for pair in pairs] == ["train"] + ["val"] * 2
    assert not os.path.exists(os.path.join(made(tmp_path / "b", source(tmp_path / "b" / "set", val=val)), "val.json"))


def test_of_another_split(tmp_path):
    out = made(tmp_path, source(tmp_path / "set", val=2), "--split", "val", "--count", "1")
    assert {cell["source"] for cell in stored(out)["images"][0]["cells"]} == {"images/3", "images/4"}


def test_no_more_than_a_row_of_cells_is_held(tmp_path, monkeypatch):
    heights, write = [], PngWriter.write
    monkeypatch.setattr(PngWriter, "write", lambda self, rows: heights.append(len(rows)) or write(self, rows))
    made(tmp_path, source(tmp_path / "set"), "--count", "1", "--grid", "5")
    assert heights == [32] * 5


def test_moved():
    assert canvas.moved(Box(0, 0.25, 0.5, 0.75, 1.0), {"row": 1, "col": 2, "height": 20, "width": 40}, 50) == [110, 60, 20, 10]


@pytest.mark.parametrize("words, code, said", [
    (["--grid", "0"], 2, "--grid is 0, expected 1 to 256"), (["--cell", "9"], 2, "--cell is 9"),
    (["--cell", "40000"], 2, "--cell is 40000"),
    (["--val", "-1"], 2, "--val is -1"), (["--seed", "-1"], 2, "--seed is -1"), (["--count", "-1"], 2, "--count is -1"),
    (["--split", "val", "--val", "1"], 2, "same images"), (["--split", "test"], 5, "no images of the split test"),
    (["--split", "x"], 2, "invalid choice"),
    (["--data", "nothing"], 2, "does not exist"), (["--data", ""], 2, "--data is missing"),
    (["--out", ""], 2, "--out is missing")])
def test_usage(words, code, said, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert canvas.main(["--data", source(tmp_path / "set"), "--out", out, "--grid", "2", "--cell", "32"] + words) == code
    assert said in capsys.readouterr().err and not os.path.exists(out)


def test_nothing_is_overwritten(tmp_path, capsys):
    data = source(tmp_path / "set")
    put(tmp_path / "out", {"mine.txt": "x"})
    assert canvas.main(["--data", data, "--out", str(tmp_path / "out")]) == 2
    assert "holds something already" in capsys.readouterr().err
    assert canvas.main(["--data", data, "--out", str(tmp_path / "out" / "mine.txt")]) == 2
    assert os.listdir(str(tmp_path / "out")) == ["mine.txt"]


def test_a_damaged_image_leaves_nothing_behind(tmp_path, capsys):
    data = source(tmp_path / "set")
    for name, length in (("3.png", 60), ("4.png", 0), ("2.png", 3)):
        with open(os.path.join(data, "images", name), "r+b") as handle:
            handle.truncate(length)
    words = ["--data", data, "--out", str(tmp_path / "out"), "--grid", "2", "--cell", "32"]
    assert canvas.main(words) == BadFile.exit_code
    said = capsys.readouterr().err
    assert "cannot be opened (2)" in said and "4.png" in said and "2.png" in said and not os.path.exists(str(tmp_path / "out"))
    source(tmp_path / "set")
    with open(os.path.join(data, "images", "3.png"), "r+b") as handle:
        handle.truncate(60)
    assert canvas.main(words) == BadFile.exit_code and "3.png is truncated" in capsys.readouterr().err
    assert os.listdir(str(tmp_path / "out")) == []
    source(tmp_path / "set")
    assert canvas.main(words) == 0  # the same command again


def test_a_full_disk_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    words = ["--data", source(tmp_path / "set"), "--out", str(tmp_path / "out"), "--grid", "2", "--cell", "32", "--val", "1"]
    written = []

    def full(stored, handle):
        if written:  # val.json is there, train.json is not
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(handle.write("{}"))
    monkeypatch.setattr(canvas.json, "dump", full)
    assert canvas.main(words) == 5 and "the disk is full, while writing" in capsys.readouterr().err
    assert os.listdir(str(tmp_path / "out")) == []


def test_real_photographs(tmp_path):
    """As typed: 36 photographs on a canvas; every box of the chosen ones is there."""
    data, out = real_data("coco_small"), tmp_path / "out"
    done = command("train_lite.data.canvas", "--data", data, "--out", out, "--count", 1, "--grid", 6, "--cell", 100)
    assert done.returncode == 0 and "1 canvases of 600 px" in done.stderr, done.stderr
    entry, = stored(str(out))["images"]
    (pair,), classes = boxed.find(str(out), 0.0)
    own = {pair.name: pair for pair in boxed.find(data, 0.0)[0]}
    assert len({cell["source"] for cell in entry["cells"]}) == 36 and len(classes.names) == 80
    assert [box.label for box in pair.boxes] == [box.label for cell in entry["cells"] for box in own[cell["source"]].boxes]
    assert Image.open(pair.image).size == (600, 600)
