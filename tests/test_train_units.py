"""The parts of training by themselves: scores, tile store, views, data layouts, checkpoints, nets, demo set, export."""
import hashlib
import inspect
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from conftest import write_set  # noqa: E402
from edge import images, tiles  # noqa: E402
from edge.errors import BadFile, UsageError, raise_all  # noqa: E402
from train_lite import checkpoint, evaluate, metrics, state  # noqa: E402
from train_lite.config import TrainConfig, mode_settings  # noqa: E402
from train_lite.data import dataset, demo, store  # noqa: E402
from train_lite.models import MODELS, build, norm  # noqa: E402
from train_lite.patches import View  # noqa: E402

# --- metrics, counted by hand ---------------------------------------------------------------------------------------


def confusion(truth, predicted, classes=2):
    return metrics.confusion(np.array(truth, np.uint8), np.array(predicted, np.uint8), classes)


def test_confusion_leaves_out_ignored_pixels():
    assert confusion([0, 1, 255, 1, 255], [1, 1, 1, 0, 0]).tolist() == [[0, 1], [1, 1]]


def test_pooled_and_paper_compat_differ_as_defined():
    """Image 1: TP 1, FN 1, FP 1, TN 1. Image 2 has no foreground: FP 1, TN 3; what is undefined counts 0."""
    got = metrics.summarise([confusion([1, 1, 0, 0], [1, 0, 1, 0]), confusion([0, 0, 0, 0], [0, 0, 0, 1])])
    assert got["pooled"] == pytest.approx({"acc": 5 / 8, "f1": 0.4, "iou": 1 / 4, "bacc": (1 / 2 + 4 / 6) / 2,
                                           "plr": 1.5, "nlr": 75.0})
    assert got["paper_compat"] == pytest.approx({"acc": 0.625, "f1": 0.25, "iou": 1 / 6, "bacc": 0.25, "plr": 0.5,
                                                 "nlr": 50.0})
    assert got["plr_clamped"] == 0


def test_absent_class_and_infinite_plr():
    """Class 0: TP 1, FN 1, FP 0, TN 2, so PLR is infinite. Class 1: one of each. Class 2 never occurs: FP 1."""
    got = metrics.summarise([confusion([0, 0, 1, 1], [0, 1, 1, 2], 3)])
    assert got["pooled"]["f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert got["pooled"]["iou"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert got["pooled"]["plr"] == pytest.approx((metrics.PLR_LIMIT + 1) / 2) and got["plr_clamped"] == 1
    assert got["pooled"]["nlr"] == pytest.approx((50 + 100) / 2)
    assert got["paper_compat"]["f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert got["per_class_iou"] == pytest.approx([1 / 2, 1 / 3, 0])


# --- tile store -----------------------------------------------------------------------------------------------------

def stored(tmp_path, image, save_mask, rule="none", px=0, **flags):
    """One pair through the store. image: array; save_mask: function of a path."""
    Image.fromarray(image).save(str(tmp_path / "image.png"))
    save_mask(str(tmp_path / "mask.png"))
    pair = dataset.Pair("a", str(tmp_path / "image.png"), str(tmp_path / "mask.png"), "train")
    classes = dataset.read_classes(str(tmp_path), TrainConfig(**flags))
    problems = []
    found = store.ingest([pair], classes, rule, px, str(tmp_path / "cache"), 1.0, (24, 24), since=0, problems=problems)
    raise_all(problems, "", "")
    return found[0]


def noise(height, width, top=256, channels=3, seed=0):
    array = np.random.RandomState(seed).randint(0, top, (height, width, channels)).astype(np.uint8)
    return array if channels > 1 else array[..., 0]


@pytest.mark.parametrize("rule,px", [("none", 0), ("long", 150), ("long", 400), ("stretch", 128)])
@pytest.mark.parametrize("height,width", [(200, 300), (129, 40)])
def test_store_windows(tmp_path, rule, px, height, width):
    """Every window of the store is cut out of the whole image and mask, resized in one go and mirrored outside."""
    image, mask = noise(height, width), noise(height, width, 5, 1)
    entry = stored(tmp_path, image, Image.fromarray(mask).save, rule, px, classes=5)
    high, wide = images.fitted_size(height, width, rule, px)
    assert (entry.height, entry.width) == (high, wide)
    sized = np.asarray(Image.fromarray(image).resize((wide, high), Image.BILINEAR)).astype(int)
    rows = [(2 * i + 1) * height // (2 * high) for i in range(high)]
    cols = [(2 * i + 1) * width // (2 * wide) for i in range(wide)]
    labels, rng = mask[rows][:, cols], np.random.RandomState(1)
    sized, labels = np.pad(sized, ((30, 30), (30, 30), (0, 0)), mode="reflect"), np.pad(labels, 30, mode="reflect")
    for _ in range(40):
        y, x = int(rng.randint(-30, high + 29)), int(rng.randint(-30, wide + 29))
        box = y, x, int(rng.randint(y + 1, high + 31)), int(rng.randint(x + 1, wide + 31))
        part = slice(box[0] + 30, box[2] + 30), slice(box[1] + 30, box[3] + 30)
        assert abs(entry.picture.window(*box).astype(int) - sized[part]).max() <= (1 if px else 0), box
        assert np.array_equal(entry.labels.window(*box), labels[part]), box
    small = Image.fromarray(sized[30:-30, 30:-30].astype(np.uint8)).resize((24, 24), Image.BILINEAR)
    assert abs(entry.overview(24, 24).astype(int) - np.asarray(small)).max() <= 2


def save_palette(ids):
    def save(path):
        image = Image.fromarray(ids, "P")
        image.putpalette([(10 * i + 7) % 256 for i in range(3 * (int(ids.max()) + 1))])  # its length sets the depth
        image.save(path)
    return save


BINARY = noise(40, 33, 2, 1)


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("save", [
    Image.fromarray(BINARY).save, Image.fromarray(BINARY * 255).save, save_palette(BINARY),
    Image.fromarray(BINARY * 255).convert("1").save, Image.fromarray(np.stack([BINARY * 255] * 3, axis=2)).save,
    Image.fromarray(np.where(BINARY, 180, 12).astype(np.uint8)).save,
], ids=["0-1", "0-255", "palette", "1-bit", "white RGB", "soft"])
def test_binary_masks(tmp_path, save, classes):
    entry = stored(tmp_path, noise(40, 33), save, classes=classes)
    assert np.array_equal(entry.labels.window(0, 0, 40, 33), BINARY)


@pytest.mark.parametrize("classes", [1, 2])
def test_binary_ids_with_ignored_pixels_are_not_turned_around(tmp_path, classes):
    """0, 1 and 255 in one mask: 255 is --ignore's value, so 1 must not become background and 255 not foreground."""
    ids = np.where(noise(40, 33, 9, 1, 1) == 0, 255, BINARY).astype(np.uint8)
    try:
        entry = stored(tmp_path, noise(40, 33), Image.fromarray(ids).save, classes=classes)
    except BadFile:
        return
    assert np.array_equal(entry.labels.window(0, 0, 40, 33), ids)


@pytest.mark.parametrize("values, flags", [((0, 3, 255), {}), ((0, 1, 2, 255), {}), ((0, 1, 2, 3), {}), ((0, 1, 255), {"ignore": 77})])
def test_class_ids_are_no_binary_mask(tmp_path, values, flags):
    """Pascal VOC's masks without --classes: all things would become background, and their outlines, 255, foreground."""
    ids = np.array(values, np.uint8)[noise(40, 33, len(values), 1)]
    with pytest.raises(BadFile, match=r"holds the values \[0, .*--classes %d" % (max(v for v in values if v < 255) + 1)):
        stored(tmp_path, noise(40, 33), Image.fromarray(ids).save, **flags)


def test_255_means_one_thing_in_a_set(tmp_path):
    """A mask of 0 and 255 beside one of 0, 1 and 255: foreground in the first, ignored in the second, would train the wrong thing."""
    for name, values in (("a", (0, 255)), ("b", (0, 1, 255)), ("c", (0, 1))):
        Image.fromarray(noise(40, 33)).save(str(tmp_path / (name + ".png")))
        Image.fromarray(np.array(values, np.uint8)[noise(40, 33, len(values), 2)]).save(str(tmp_path / (name + ".mask.png")))
    classes = dataset.read_classes(str(tmp_path), TrainConfig())
    for _cached in range(2):
        problems, found = [], {}
        for name in "abc":
            pair = dataset.Pair(name, str(tmp_path / (name + ".png")), str(tmp_path / (name + ".mask.png")), "train")
            found[name], = store.ingest([pair], classes, "none", 0, str(tmp_path / "store"), 1, None, 0, problems)
        assert not problems and [found[name].white for name in "abc"] == ["foreground", "ignored", ""]
        said, = store.contradictions(list(found.values()))
        assert "b.mask.png holds 0, 1 and 255" in said and "a.mask.png holds 0 and 255" in said and "classes.json" in said
        assert not store.contradictions([found["a"], found["c"]]) and not store.contradictions([found["b"], found["c"]])
    (tmp_path / "classes.json").write_text(said[said.index("{"):])  # the cure as it is typed
    classes = dataset.read_classes(str(tmp_path), TrainConfig())
    entry, = store.ingest([found["a"].pair], classes, "none", 0, str(tmp_path / "store"), 1, None, 0, problems)
    assert not problems and set(np.unique(entry.labels.window(0, 0, 40, 33))) == {0, dataset.IGNORE}


def test_the_store_knows_which_classes_it_holds(tmp_path):
    """From the labels as they are stored, on the first reading and on the next; ignored pixels are no class."""
    ids = np.full((200, 140), 255, np.uint8)
    ids[150:, 130:], ids[0, 0] = 3, 1
    entry = stored(tmp_path, noise(200, 140), Image.fromarray(ids).save, classes=5)
    again, = store.ingest([entry.pair], dataset.read_classes(str(tmp_path), TrainConfig(classes=5)), "none", 0, str(tmp_path / "cache"), 1.0, None,
                          0, [])
    assert again.ids == entry.ids == (1, 3) and store.absent([again], "abcde") == ["a", "c", "e"]
    other = stored(tmp_path, noise(40, 33), Image.fromarray(noise(40, 33, 3, 1)).save, classes=5)
    assert other.ids == (0, 1, 2) and store.absent([entry, other], "abcde") == ["e"]


@pytest.mark.parametrize("turn, mask_turn, shape, mask_shape, hint", [
    (3, 3, (40, 33), (40, 33), None), (6, 1, (40, 33), (40, 33), None), (3, 1, (40, 33), (40, 33), "says whether"), (1, 2, (40, 33), (40, 33), "says whether"),
    (8, 6, (40, 33), (40, 33), "says whether"), (6, 1, (40, 40), (40, 40), "says whether"), (6, 1, (40, 33), (33, 40), "expected the same size"),
    (1, 1, (40, 33), (33, 40), "expected the same size$")])
def test_masks_of_images_turned_by_a_flag(tmp_path, turn, mask_turn, shape, mask_shape, hint):
    """A mask painted on what a viewer shows would lie upside down on the pixels as stored, without a word."""
    for name, size, own in (("image", shape, turn), ("mask", mask_shape, mask_turn)):
        exif = Image.Exif()
        exif[274] = own
        Image.fromarray(noise(*size + (2,)) if name == "image" else noise(*size + (2, 1))).save(str(tmp_path / (name + ".png")), exif=exif)
    pair, problems = dataset.Pair("a", str(tmp_path / "image.png"), str(tmp_path / "mask.png"), "train"), []
    found = store.ingest([pair], dataset.read_classes(str(tmp_path), TrainConfig()), "none", 0, str(tmp_path / "store"), 1.0, None, 0, problems)
    assert (len(found), len(problems)) == ((1, 0) if hint is None else (0, 1))
    if hint:
        assert re.search(hint, problems[0]) and "image.png" in problems[0] and ("auto-orient" in problems[0]) == (turn != mask_turn)


def test_a_full_store_deletes_its_own_files_only(tmp_path):
    """--cache may be any folder: what else lies there is somebody's."""
    (tmp_path / "cache" / "photos").mkdir(parents=True)
    others = [tmp_path / "cache" / name for name in ("holiday.mp4", "photos/a.tiles", "0123456789abcdef.tiles")]
    for path in others:
        path.write_bytes(bytes(3 << 20))
        os.utime(str(path), (1, 1))
    entry = stored(tmp_path, noise(200, 140), Image.fromarray(noise(200, 140, 2, 1)).save)
    for name in (entry.path, entry.overview_path(24, 24)):
        os.utime(name, (2, 2))
    store._make_room(str(tmp_path / "cache"), 1e-6, 10)
    assert all(path.stat().st_size == 3 << 20 for path in others)
    assert not os.path.exists(entry.path) and not [name for name in os.listdir(str(tmp_path / "cache")) if name.startswith(os.path.basename(entry.path))]


def test_id_masks_with_ignore(tmp_path):
    ids = noise(40, 33, 3, 1)
    ids[:4] = 255
    for save in (Image.fromarray(ids).save, save_palette(ids)):
        entry = stored(tmp_path, noise(40, 33), save, classes=3)
        assert np.array_equal(entry.labels.window(0, 0, 40, 33), ids)
    ids[:4] = 77
    entry = stored(tmp_path, noise(40, 33), Image.fromarray(ids).save, classes=3, ignore=77)
    assert (entry.labels.window(0, 0, 4, 33) == dataset.IGNORE).all() and entry.labels.window(4, 0, 40, 33).max() == 2


def test_colour_masks(tmp_path):
    colours = np.array([[0, 0, 0], [110, 193, 228], [1, 2, 3], [9, 9, 9]], np.uint8)
    (tmp_path / "classes.json").write_text(json.dumps({"ignore": [[9, 9, 9]], "classes": [
        {"name": n, "colour": c.tolist()} for n, c in zip("abc", colours)]}))
    ids = noise(40, 33, 4, 1)
    entry = stored(tmp_path, noise(40, 33), Image.fromarray(colours[ids]).save)
    assert np.array_equal(entry.labels.window(0, 0, 40, 33), np.where(ids == 3, dataset.IGNORE, ids))
    with pytest.raises(BadFile) as caught:
        stored(tmp_path, noise(40, 34), Image.fromarray(np.full((40, 34, 3), 50, np.uint8)).save)
    assert "[50, 50, 50]" in str(caught.value) and "mask.png" in str(caught.value)


# --- views ----------------------------------------------------------------------------------------------------------

class Memory:
    """A Stored whose pixels are arrays."""

    def __init__(self, height, width):
        self.image, self.ids = noise(height, width), noise(height, width, 3, 1)
        self.height, self.width = height, width
        self.picture, self.labels = images.ArrayPicture(self.image), images.ArrayPicture(self.ids)
        self.small = noise(16, 16, seed=2)

    def overview(self, height, width):
        assert height == width == 16
        return self.small


@pytest.mark.parametrize("turn", range(8))
@pytest.mark.parametrize("height,width", [(37, 50), (11, 40), (16, 16)])
def test_view_is_the_turned_image_cut_into_patches(height, width, turn):
    entry = Memory(height, width)
    view = View(entry, turn, 16)

    def turned(array):
        return np.rot90(np.fliplr(array) if turn > 3 else array, turn % 4)
    image, ids = turned(entry.image), turned(entry.ids)
    assert (view.height, view.width) == image.shape[:2]
    laid = tiles.plan(view.height, view.width, 16)
    reach = [(0, max(0, 16 - n)) for n in image.shape[:2]]
    padded, seen = np.pad(image, reach + [(0, 0)], mode="reflect"), np.full(ids.shape, dataset.IGNORE, np.uint8)
    for index, box in enumerate(laid.boxes()):
        pixels, labels = view.patch(index)
        assert np.array_equal(pixels, padded[box[0]:box[2], box[1]:box[3]])
        inside = labels[:view.height - box[0], :view.width - box[1]]
        assert (labels == dataset.IGNORE).sum() == labels.size - (inside != dataset.IGNORE).sum()
        target = seen[box[0]:box[2], box[1]:box[3]]
        assert (target[inside != dataset.IGNORE] == dataset.IGNORE).all(), "a pixel counts twice"
        target[inside != dataset.IGNORE] = inside[inside != dataset.IGNORE]
    assert np.array_equal(seen, ids) and np.array_equal(view.overview(16), turned(entry.small))


# --- layouts --------------------------------------------------------------------------------------------------------

def touch(folder, *names):
    for name in names:
        path = os.path.join(str(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").close()


def splits(pairs):
    return {pair.name: pair.split for pair in pairs}


def test_layouts(tmp_path):
    a, b, c, d = (tmp_path / name for name in "abcd")
    touch(a, "train/image/1.jpg", "train/mask/1.png", "val/image/2.png", "val/mask/2.png", "test/image/3.png",
          "test/mask/3.png")
    pairs = dataset.find_pairs(str(a))
    assert [(p.split, os.path.relpath(p.image, str(a)), os.path.relpath(p.mask, str(a))) for p in pairs] == [
        (s, os.path.join(s, "image", i), os.path.join(s, "mask", m))
        for s, i, m in (("train", "1.jpg", "1.png"), ("val", "2.png", "2.png"), ("test", "3.png", "3.png"))]
    touch(b, *["%s/%d.png" % (kind, i) for kind in ("images", "masks") for i in range(10)])
    assert sorted(splits(dataset.find_pairs(str(b), 0.2)).values()) == ["train"] * 8 + ["val"] * 2
    assert set(splits(dataset.find_pairs(str(b), 0.0)).values()) == {"train"}
    touch(c, *["JPEGImages/%d.jpg" % i for i in range(5)])
    touch(c, *["SegmentationClass/%d.png" % i for i in range(4)])
    touch(c, "ImageSets/Segmentation/x")
    (c / "ImageSets/Segmentation/train.txt").write_text("0\n1\n")
    (c / "ImageSets/Segmentation/val.txt").write_text("2\n")
    assert splits(dataset.find_pairs(str(c))) == {"0": "train", "1": "train", "2": "val"}
    (c / "ImageSets/Segmentation/val.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(BadFile, match="val.txt cannot be read as text.*UTF-8"):
        dataset.find_pairs(str(c))
    touch(d, *["Tile %d/%s/part.%s" % (i, k, e) for i in range(1, 5) for k, e in (("images", "jpg"), ("masks", "png"))])
    pairs = dataset.find_pairs(str(d), 0.25)
    assert len({pair.name for pair in pairs}) == 4 and sum(pair.split == "val" for pair in pairs) == 1
    assert all("Tile %d" % i in pair.image and "Tile %d" % i in pair.mask for i, pair in enumerate(pairs, 1))


def test_pairs_csv(tmp_path):
    touch(tmp_path, "in/a.png", "out/a.png", "in/b.png", "out/c.png")
    (tmp_path / "pairs.csv").write_text("image,mask,split\nin/a.png,out/a.png,train\nin/b.png,out/c.png,val\n")
    pairs = dataset.find_pairs(str(tmp_path))
    assert pairs == dataset.find_pairs(str(tmp_path / "pairs.csv")) and [p.split for p in pairs] == ["train", "val"]
    assert os.path.samefile(pairs[1].mask, str(tmp_path / "out" / "c.png"))
    (tmp_path / "pairs.csv").write_text("image,mask,split\nin/a.png,,train\nin/b.png,none.png,val\n"
                                        "in/b.png,out/c.png,often\n")
    with pytest.raises(BadFile) as caught:
        dataset.find_pairs(str(tmp_path))
    assert all("line %d" % n in str(caught.value) for n in (2, 3, 4))
    (tmp_path / "pairs.csv").write_text("image,mask,split\nin/a.png,out/a.png,train\n./in/a.png,out/c.png,test\n")
    with pytest.raises(BadFile, match="line 3: ./in/a.png a second time, as on line 2"):
        dataset.find_pairs(str(tmp_path))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_groups_stay_together(tmp_path, share):
    touch(tmp_path, *["%s/%02d%s.png" % (k, i, eye) for k in ("images", "masks") for i in range(7) for eye in "LR"])
    found = splits(dataset.find_pairs(str(tmp_path), share, r"^\d+"))
    assert all(found["%02dL" % i] == found["%02dR" % i] for i in range(7)) and set(found.values()) == {"train", "val"}
    assert abs(sum(v == "val" for v in found.values()) / 14.0 - share) <= 1 / 7.0
    assert found == splits(dataset.find_pairs(str(tmp_path), share, r"^(\d+)[LR]$"))
    for pattern in ("(", "never"):
        with pytest.raises(UsageError):
            dataset.find_pairs(str(tmp_path), share, pattern)


# --- checkpoints ----------------------------------------------------------------------------------------------------

TENSORS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(7, np.int64),
           "c": np.random.RandomState(0).rand(5), "d": np.arange(9, dtype=np.uint8).reshape(3, 3).T,
           "e": np.ones((2, 1, 4), np.float16)}


def same(left, right):
    assert set(left) == set(right)
    for name in left:
        a, b = np.asarray(left[name]), np.asarray(right[name])
        assert a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b), name


def test_checkpoint_opens_in_the_public_library_and_back(tmp_path):
    public = pytest.importorskip("safetensors.numpy")
    path = str(tmp_path / "a.safetensors")
    checkpoint.write(path, TENSORS, {"step": 3})
    same(public.load_file(path), TENSORS)
    public.save_file({name: np.array(v, order="C") for name, v in TENSORS.items()}, path, metadata={"format": "pt"})
    same(checkpoint.read(path, ours=False)[0], TENSORS)
    with pytest.raises(BadFile):
        checkpoint.read(path)


def test_checkpoint_round_trip_generations_and_damage(tmp_path):
    path = str(tmp_path / "a.safetensors")
    checkpoint.write(path, TENSORS, {"step": 1})
    checkpoint.write(path, TENSORS, {"step": 2})
    tensors, meta = checkpoint.read(path)
    same(tensors, TENSORS)
    assert meta == {"step": 2} and checkpoint.read(checkpoint.previous(path))[1] == {"step": 1}
    with open(path, "rb") as handle:
        blob = handle.read()
    for at in list(range(0, len(blob), 7)) + [len(blob) - 1]:
        for bad in (blob[:at], blob[:at] + bytes(bytearray([blob[at] ^ 4])) + blob[at + 1:]):
            with open(path, "wb") as handle:
                handle.write(bad)
            with pytest.raises(BadFile):
                checkpoint.read(path)
            assert checkpoint.read_newest(path)[1] == {"step": 1, "file": checkpoint.previous(path)}
    assert sorted(os.listdir(str(tmp_path))) == ["a.1.safetensors", "a.safetensors"]


# --- nets -----------------------------------------------------------------------------------------------------------

def parameters(net):
    return sum(p.numel() for p in net.parameters())


def test_published_sizes():
    assert round(parameters(MODELS["unet"](8, 64, "group")) / 1e6, 2) == 31.04
    auxiliary = 1024 * 256 * 9 + 2 * 256 + 256 * 21 + 21  # torchvision counts its auxiliary head in 42,004,074
    net = MODELS["deeplabv3"](21, 64, "batch")
    assert parameters(net) == 42004074 - auxiliary
    names = set(net.state_dict())
    assert {"backbone.conv1.weight", "backbone.layer1.0.downsample.1.running_var", "backbone.layer4.2.bn3.bias",
            "classifier.0.convs.4.1.weight", "classifier.0.project.0.weight", "classifier.4.bias"} <= names


def seeded(model="unet", kind="group", outputs=1, fusion="none", width=4):
    """A net whose norms are not trivial."""
    torch.manual_seed(0)
    net = build(model, width, kind, outputs, fusion).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, tuple(norm.NORMS.values())):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
            if hasattr(module, "running_var"):
                module.running_var.uniform_(0.5, 2)
                module.running_mean.uniform_(-0.3, 0.3)
    return net


def freeze(net, *chunks):
    while norm.group_norms(net):
        norm.freeze_first(net, norm.group_norms(net), [("", lambda: [net.encoder(chunk) for chunk in chunks])])


@pytest.mark.parametrize("model", ["unet", "deeplabv3"])
def test_freeze_then_fold(model):
    """Frozen on one patch, that patch's output is group norm's; folding changes no output at all."""
    net, x, other = seeded(model), torch.randn(1, 3, 64, 64), torch.randn(2, 3, 64, 64)
    before = {id(p) for p in net.parameters()}
    with torch.no_grad():
        group = net(x)
        freeze(net, x)
        assert before == {id(p) for p in net.parameters()}, "the optimizer must keep its state"
        frozen, frozen_other = net(x), net(other)
        assert (frozen - group).abs().max() < 1e-3 * group.abs().max()
        count = sum(isinstance(module, norm.FrozenNorm) for module in net.modules())
        assert norm.fold(net) == count > 0 and not any(isinstance(module, norm.FrozenNorm) for module in net.modules())
        for a, b in ((net(x), frozen), (net(other), frozen_other)):
            assert (a - b).abs().max() < 1e-5 * max(1, float(b.abs().max()))


def test_frozen_statistics_are_those_of_all_chunks():
    """The first norm sees the first convolution's output: its mean and variance per group, over all patches."""
    net, chunks = seeded(width=16), (torch.randn(3, 3, 32, 32), 2 * torch.randn(1, 3, 32, 32) + 1)
    first, layer = net.encoder.down[0][0], net.encoder.down[0][1]
    groups = layer.num_groups
    with torch.no_grad():
        y = first(torch.cat(chunks)).double().numpy()
    y = y.transpose(1, 0, 2, 3).reshape(groups, -1)
    name = norm.freeze_first(net, norm.group_norms(net), [("", lambda: [net.encoder(chunk) for chunk in chunks])])
    frozen = net.encoder.down[0][1]
    assert name == "encoder.down.0.1" and isinstance(frozen, norm.FrozenNorm)
    assert np.allclose(frozen.running_mean.numpy().reshape(groups, -1), y.mean(axis=1)[:, None], atol=1e-5)
    assert np.allclose(frozen.running_var.numpy().reshape(groups, -1), y.var(axis=1)[:, None], rtol=1e-4)


def test_norms_of_large_maps():
    """A U-Net's maps double in channels and halve in size: 4, 2, 1, 1/2 parts of the norms' work and one of 1/8 at the bottom."""
    net = seeded()
    run = [("", lambda: net.encoder(torch.zeros(1, 3, 32, 32)))]
    large = norm.of_large_maps(net, run)
    assert sorted(large) == ["encoder.%s.%d.%d" % (part, level, at) for part in ("down", "merge") for level in (0, 1) for at in (1, 4)]
    norm.put_frozen(net, large[:2])
    assert norm.of_large_maps(net, run) == large[2:], "what is frozen already counts"
    assert norm.fold(net) == 2 and sum(isinstance(module, norm.PlainGroupNorm) for module in net.modules()) == 16


def test_batch_norms_are_measured_in_forward_order():
    """To the pooled mean and variance of what comes in in eval mode, the ones before measured already; no others."""
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            made = [norm.BatchNorm(3) for _ in range(5)]  # named against the order of the forward pass
            self.last, self.second, self.first, self.apart, self.held = made
            self.conv = torch.nn.ModuleList([torch.nn.Conv2d(3, 3, 3) for _ in range(3)])
            self.seen = {}

        def forward(self, x):
            for conv, name in zip(self.conv, ("first", "held", "second")):
                x = torch.relu(self.through(name, conv(x)))
            return self.through("last", x.mean((2, 3), keepdim=True))  # one value per channel and patch

        def through(self, name, x):
            self.seen.setdefault(name, []).append(x.detach().double().permute(1, 0, 2, 3).reshape(3, -1).numpy())
            return getattr(self, name)(x)

    torch.manual_seed(0)
    net, chunks = Net().eval(), [torch.randn(3, 3, 16, 12), 2 * torch.randn(1, 3, 9, 20) + 1]
    for module in net.modules():
        if isinstance(module, norm.BatchNorm):
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    net.held.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    norm.measure(net, [("", lambda: [net(chunk) for chunk in chunks])])
    net.seen.clear()
    with torch.no_grad():
        for chunk in chunks:
            net(chunk)
    for name in ("first", "second", "last"):
        values, layer = np.concatenate(net.seen[name], axis=1), getattr(net, name)
        assert np.allclose(layer.running_mean.numpy(), values.mean(axis=1), rtol=1e-5, atol=1e-6), name
        assert np.allclose(layer.running_var.numpy(), values.var(axis=1), rtol=1e-4, atol=1e-6), name
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"%s.running_%s" % (name, what) for name in ("first", "second", "last") for what in ("mean", "var")}
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_pretrained_weights(tmp_path):
    """torchvision's names in a .pth: by the safe loader; refused without --allow-pickle where there is none."""
    source, net = seeded("deeplabv3", "batch"), seeded("deeplabv3", "frozen")
    weights = dict(source.encoder.state_dict())
    weights["classifier.4.weight"], weights["classifier.4.bias"] = torch.zeros(21, 16, 1, 1), torch.zeros(21)
    weights["aux_classifier.0.weight"] = torch.zeros(3)
    path, last = str(tmp_path / "w.pth"), net.encoder.classifier[4].weight.clone()
    torch.save(weights, path)
    if "weights_only" not in inspect.signature(torch.load).parameters:
        with pytest.raises(UsageError) as caught:
            state.read_weights(path, False)
        assert "--allow-pickle" in str(caught.value)
    trusted = "weights_only" not in inspect.signature(torch.load).parameters
    found = state.read_weights(path, trusted)
    loaded, total = state.load_encoder(net, found, path)
    own = net.encoder.state_dict()
    assert total == len(own) and loaded == total - 2 and torch.equal(net.encoder.classifier[4].weight, last)
    assert all(torch.equal(own[name], weights[name]) for name in own if not name.startswith("classifier.4."))
    with pytest.raises(BadFile):
        state.load_encoder(seeded("unet"), found, path)
    assert state.load_encoder(net, dict(found, **{"backbone.conv1.weight": 7}), path) == (total - 3, total)  # no tensor of that name
    detector = {"backbone.body." + name[len("backbone."):]: value for name, value in source.encoder.state_dict().items() if name.startswith("backbone.")}
    torch.save(dict(detector, **{"backbone.fpn.inner_blocks.0.0.bias": torch.zeros(3), "head.x": torch.zeros(1)}), path)
    found = state.read_weights(path, trusted)  # torchvision's detectors
    assert "fpn.inner_blocks.0.0.bias" in found and "layer1.0.conv1.weight" in found
    torch.save([1, 2], path)
    with pytest.raises(BadFile, match="holds a list"):
        state.read_weights(path, trusted)
    if "weights_only" in inspect.signature(torch.load).parameters:
        torch.save({"code": os.system}, path)
        with pytest.raises(BadFile):
            state.read_weights(path, True)


# --- demo set -------------------------------------------------------------------------------------------------------

def files_of(folder):
    found = {}
    for place, _dirs, names in os.walk(str(folder)):
        for name in names:
            with open(os.path.join(place, name), "rb") as handle:
                digest = hashlib.sha256(handle.read()).hexdigest()
            found[os.path.join(os.path.relpath(place, str(folder)), name)] = digest
    return found


def test_demo_set(tmp_path, monkeypatch):
    demo.make(str(tmp_path / "a"), 200, 5)
    demo.make(str(tmp_path / "b"), 200, 5)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    pairs = dataset.find_pairs(str(tmp_path / "a"))
    assert sorted(splits(pairs).values()) == ["test", "train", "train", "train", "val"]
    masks = []
    for pair in pairs:
        with Image.open(pair.image) as image, Image.open(pair.mask) as mask:
            assert image.format == "PNG" and image.mode == "RGB" and image.size == mask.size == (200, 200)
            masks.append(np.asarray(mask).copy())
        assert set(np.unique(masks[-1])) == {0, 1}
    assert len({mask.tobytes() for mask in masks}) == 5
    monkeypatch.setattr(demo, "BAND", 37)  # the vessels, though not the grain, are the same however the bands lie
    demo.make(str(tmp_path / "c"), 200, 5)
    for pair, mask in zip(dataset.find_pairs(str(tmp_path / "c")), masks):
        with Image.open(pair.mask) as other:
            assert np.array_equal(np.asarray(other), mask)
    with pytest.raises(BadFile):
        demo.make(str(tmp_path / "a"), 208, 5)


# --- export ---------------------------------------------------------------------------------------------------------

TRT_8_2 = set("""Add AveragePool Cast Clip Concat Constant ConstantOfShape Conv ConvTranspose Div Expand Flatten Gather
GlobalAveragePool Identity MatMul Max MaxPool Min Mul Pad Pow ReduceMean Relu Reshape Resize Shape Sigmoid Slice Softmax
Split Sqrt Squeeze Sub Sum Transpose Unsqueeze Upsample Where""".split())  # what our nets may need of what it imports


@pytest.mark.parametrize("model", ["unet", "deeplabv3"])
@pytest.mark.parametrize("mode,fusion,outputs", [("full", "none", 3), ("tiled", "none", 1), ("patch", "concat", 1),
                                                 ("patch", "add", 4)])
def test_exported_pipeline_gives_the_net_s_answers(tmp_path, model, mode, fusion, outputs):
    onnx, _ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from edge import contract, schema
    from edge.backends import ort
    from edge.pipeline import Segmenter
    from export import to_onnx
    config = TrainConfig(model=model, mode=mode, global_patch=fusion, width=4, patch=32, overlap=0, fit="none")
    net, tile, (height, width) = seeded(model, "group", outputs, fusion), 32, (64, 96)
    freeze(net, torch.randn(4, 3, 32, 32))
    if mode == "full":
        tile, height, width = 64, 64, 64
    count = max(2, outputs)
    classes = dataset.Classes(tuple(map(str, range(count))), dataset.SHADES[:count], outputs, False, (255,))
    how, pipeline = evaluate.recipe(mode_settings(config), tile, 2), {"full": "whole"}.get(mode, mode)
    assert to_onnx.pipeline_of(config, fusion) == pipeline
    made, files = to_onnx.write(str(tmp_path), "model", to_onnx.folded(net), config, classes, how, pipeline)
    assert schema.violations(made, schema.load("contract")) == [] and list(files) == contract.STAGES[pipeline]
    for path in files.values():
        graph = onnx.load(path)
        assert [(o.domain, o.version) for o in graph.opset_import] == [("", 13)] and graph.ir_version <= 8
        assert {node.op_type for node in graph.graph.node} <= TRT_8_2
        assert all(d.dim_value > 0 for value in graph.graph.input for d in value.type.tensor_type.shape.dim)
    image = noise(height, width)
    x = torch.from_numpy(np.moveaxis(((image / 255.0 - how.mean) / how.std), 2, 0).astype(np.float32))[None]
    small = np.asarray(Image.fromarray(image).resize((tile, tile), Image.BILINEAR))
    small = torch.from_numpy(np.moveaxis(((small / 255.0 - how.mean) / how.std), 2, 0).astype(np.float32))[None]
    expected = torch.zeros(outputs, height, width)
    with torch.no_grad():  # the whole image with torch's own interpolation of the global feature
        if fusion != "none":
            spread = torch.nn.functional.interpolate(net.encoder(small), size=(height, width), mode="bilinear",
                                                     align_corners=False)
        for y in range(0, height, tile):
            for left in range(0, width, tile):
                part = (slice(None), slice(None), slice(y, y + tile), slice(left, left + tile))
                features = net.encoder(x[part])
                if fusion == "concat":
                    features = torch.cat([features, spread[part]], dim=1)
                elif fusion == "add":
                    features = features + spread[part]
                expected[part[1:]] = net.head(features)[0]
    from edge import scores
    with Segmenter(made, files, ort) as segmenter:
        bands = scores.score_bands(images.ArrayPicture(image), segmenter.recipe, segmenter.encode, segmenter.score)
        got = np.concatenate([band.copy() for _y, band in bands], axis=1)
        mask = segmenter.mask(images.ArrayPicture(image))
    assert abs(got - expected.numpy()).max() < 1e-4
    labels = expected.numpy().argmax(axis=0) if outputs > 1 else (expected.numpy()[0] > 0)
    assert (mask == labels).mean() > 0.999


def test_patches_for_frozen_norms_are_drawn_from_all_images(monkeypatch):
    """The same as from a list of every patch of every image, which is long for a set of large ones."""
    import torch
    from train_lite import patches
    from train_lite.tasks.segmentation import CALIBRATION_PATCHES, Segmentation

    class Plain:
        def __init__(self, height, width):
            self.height, self.width = height, width
            self.picture, self.labels = (images.ArrayPicture(np.full((height, width) + more, height % 251, np.uint8)) for more in ((3,), ()))

        def overview(self, height, width):
            return np.zeros((height, width, 3), np.uint8)

    stored = [Plain(40 + 23 * at, 90) for at in range(9)]
    classes = dataset.Classes(("a", "b"), ((0, 0, 0), (9, 9, 9)), 1, False, ())
    made = Segmentation(TrainConfig(width=4, patch=32, overlap=0, seed=3, micro_batch=3), classes, stored, [], [], torch.device("cpu"))
    net = Segmentation.build(made.config, 1, "group")
    seen, real = [], patches.Batch.chunk
    monkeypatch.setattr(patches.Batch, "chunk", lambda batch, picks, net: seen.extend(
        (batch.views[v].height, batch.views[v].width, t) for v, t in picks) or real(batch, picks, net))
    (_prefix, forward), = made.calibrate(net)
    with torch.no_grad():
        forward()
    rng = np.random.RandomState(3)
    views = [View(one, int(rng.randint(8)), 32) for one in stored]
    every = [(view.height, view.width, t) for view in views for t in range(len(view.boxes))]
    assert seen == [every[i] for i in rng.permutation(len(every))[:CALIBRATION_PATCHES]] and len(seen) == 32


# --- what people's folders are like ----------------------------------------------------------------------------------

@pytest.mark.parametrize("folders", [("training", "val", "test"), ("Train", "Val", "Test"), ("train", "validation", "Test"), ("train", "val", "valid")])
def test_folders_called_much_like_splits(tmp_path, folders):
    """All of them would be trained on, or some left out without a word."""
    for folder in folders:
        write_set(tmp_path / folder, count=2)
    with pytest.raises(BadFile, match="has the folders .*%s.*expected" % folders[2]):
        dataset.find_pairs(str(tmp_path))


@pytest.mark.parametrize("folder", ["training", "tile 1"])
def test_one_folder_of_tiles_may_be_called_anything(tmp_path, folder):
    write_set(tmp_path / folder, count=5)
    assert [pair.split for pair in dataset.find_pairs(str(tmp_path))].count("val") == 1


@pytest.mark.parametrize("header, hint", [
    ("Image,Mask", "begins with the line 'Image,Mask'"), ("image;mask", "expected the names of its columns: image,mask"), ("a.png,b.png", "columns"),
    ("", "columns"), (" image , mask,split ", None)])
def test_the_header_of_a_csv(tmp_path, header, hint):
    write_set(tmp_path, count=4)
    lines = ["images/%02d.png,masks/%02d.png,train" % (i, i) for i in range(4)]
    (tmp_path / "pairs.csv").write_text("\n".join([header] + lines))
    if hint:
        with pytest.raises(BadFile, match=hint):
            dataset.find_pairs(str(tmp_path))
        return
    assert len(dataset.find_pairs(str(tmp_path))) == 4
    (tmp_path / "pairs.csv").write_text("\n".join([header, "", lines[0], "", "", "images/9.png,masks/00.png"]))
    with pytest.raises(BadFile, match="line 6: no such file: .*9.png"):
        dataset.find_pairs(str(tmp_path))


@pytest.mark.parametrize("names, ignore, hint", [
    (["land", "road", "road"], [255], "two classes are called 'road'"), (["land", ""], [255], "'' is no name"), (["land", None], [255], "None is no name"),
    (["land", "e\n"], [255], "is no name"), (["land", "road"], [True], "True is no mask value"), (["land", "road"], ["255"], "'255' is no mask value")])
def test_wrong_class_lists(tmp_path, names, ignore, hint):
    (tmp_path / "classes.json").write_text(json.dumps({"classes": [{"name": name} for name in names], "ignore": ignore}))
    with pytest.raises(BadFile, match=re.escape(hint)):
        dataset.read_classes(str(tmp_path), TrainConfig())


def test_a_demo_set_that_was_cut_off_leaves_nothing_in_another(tmp_path, monkeypatch):
    """Its numbers go on from split to split: what was drawn for training would be what another count tests on."""
    def cut_off(path, *_rest):
        raise KeyboardInterrupt
    monkeypatch.setattr(demo, "written", cut_off)
    with pytest.raises(KeyboardInterrupt):
        demo.make(str(tmp_path), 16, 9)
    monkeypatch.undo()
    demo.make(str(tmp_path), 16, 4)
    found = {split: sorted(os.listdir(str(tmp_path / split / kind))) for split in ("train", "val", "test") for kind in ("mask", "image")}
    assert found == {"train": ["000.png", "001.png"], "val": ["002.png"], "test": ["003.png"]}


@pytest.mark.parametrize("flags, step", [
    (dict(inner=4, accumulation=1), 12), (dict(inner=4, accumulation=2), 6), (dict(inner=1, accumulation=2), 1), (dict(inner=3, accumulation=2), 3),
    (dict(inner=1, accumulation=8), 1), (dict(inner=4, accumulation=1, epochs=1), 4), (dict(inner=4, accumulation=1, freeze_at=0.25), 4),
    (dict(inner=4, accumulation=1, freeze_at=1.0), 16)])
def test_norms_are_frozen_in_front_of_the_last_batch_at_the_latest(tmp_path, flags, step):
    """--freeze-at 0.99 of a short run: a net whose norms do not fold would come out, without a word."""
    from train_lite.loop import train_epoch
    from train_lite.tasks.segmentation import Segmentation
    write_set(tmp_path / "set", count=4, height=32, width=32)
    config = TrainConfig(**dict(dict(patch=16, overlap=4, width=4, res=32, patches=1, epochs=2, freeze_at=0.99, batch=2, save_every=1e9), **flags))
    pairs, classes = Segmentation.find(config._replace(val_share=0.0), str(tmp_path / "set"))
    entries = store.ingest(pairs, classes, "long", 32, str(tmp_path / "store"), 1.0, (16, 16), 0, [])
    problem = Segmentation(config, classes, entries, [], [], torch.device("cpu"))
    assert problem.freeze_step == step
    start = state.State(problem)

    class Log:
        def log(self, **_facts):
            pass

    for epoch in range(config.epochs):
        start.epoch, start.batch = epoch, 0
        train_epoch(problem, Log(), start, [])
    assert start.step == problem.steps and (start.frozen_at is not None) == (config.freeze_at < 1) and (step == 16 or start.frozen_at >= step)


def test_norms_of_large_maps_come_through_export(tmp_path):
    """ONNX Runtime adds up a mean in a row, in float32: over a million values in one go it is off by 1e-4 of the result, and no net of
    whole images would pass the parity gate."""
    import onnxruntime
    from export.to_onnx import write_stage
    torch.manual_seed(0)
    x = torch.rand(1, 8, 768, 768) + 3
    group = norm.GroupNorm(8)
    with torch.no_grad():
        want = group.double()(x.double()).numpy()
    write_stage(str(tmp_path / "a.onnx"), norm.PlainGroupNorm(group.float()), {"x": x}, "y")
    got, = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    assert abs(got - want).max() < 3e-6
