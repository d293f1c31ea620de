"""Whole-image labels from grids of patches: gradients, data, UltraMNIST, scores."""
import gzip
import json
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import BLOCKS, LOOK, STEP, command, peaks_kib, real_data, write_large
from doubles import api_folder
from edge.errors import BadFile, UsageError
from edge.images import ArrayPicture
from train_lite import metrics, patches
from train_lite.config import ModeSettings
from train_lite.data import labelled, ultramnist
from train_lite.data.dataset import Pair
from train_lite.gradient import Gradient, varies
from train_lite.losses import GridLoss, GridTable
from train_lite.models import gridnet
from train_lite.patches import View
from train_lite.tasks.classification import GridBatch
from test_engine import board

TILE = 32


class Memory:
    """A Stored whose pixels are arrays."""

    def __init__(self, rng, side, label):
        self.pair, self.height, self.width = Pair("x", "", "", "train", label), side, side
        self.picture = ArrayPicture(rng.randint(0, 256, (side, side, 3)).astype(np.uint8))
        self._overview = rng.randint(0, 256, (TILE, TILE, 3)).astype(np.uint8)

    def overview(self, height, width):
        assert height == width == TILE
        return self._overview


def problem(model="mobilenetv2", head="small", norm="group", fusion="add", labels=(2, 0, 1), side=64, seed=0):
    """(net, batch) of toy size in float64, the views turned in different ways; no dropout."""
    rng = np.random.RandomState(seed)
    torch.manual_seed(seed)
    net = gridnet.build(model, head, 4, norm, 3, (side // TILE,) * 2, fusion).double()
    for module in net.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_()
        if isinstance(module, (torch.nn.Dropout, torch.nn.Dropout2d)):
            module.p = 0.0
    for ending in net.encoder.residual_ends():  # they begin at zero, and then nothing behind them has a gradient
        torch.nn.init.uniform_(ending.weight, 0.5, 1.5)
    views = [View(Memory(rng, side, label), turn, TILE) for label, turn in zip(labels, (0, 5, 2))]
    return net, GridBatch(views, TILE if fusion != "none" else 0, torch.device("cpu"), torch.float64)


def plain(net, batch):
    """(loss, {name: gradient}): every patch and global patch in one pass, one graph."""
    every, (rows, cols) = batch.every_patch(), batch.grid()
    vectors = net.encoder(batch.chunk(every).pixels)
    cells = torch.stack([torch.stack([vectors[v * rows * cols + t] for t in range(rows * cols)], 1).reshape(-1, rows, cols)
                         for v in range(len(batch.views))])
    g = net.encoder(batch.overviews(list(range(len(batch.views))))) if batch.side else None
    if net.fusion == "add":
        cells = cells + g.reshape(g.shape + (1, 1))
    elif net.fusion == "concat":
        cells = torch.cat([cells, g.reshape(g.shape + (1, 1)) * torch.ones(1, 1, rows, cols).double()], 1)
    logits = net.last(cells)
    loss = -torch.log_softmax(logits, 1)[torch.arange(len(logits)), [view.stored.pair.label for view in batch.views]].mean()
    loss.backward()
    return float(loss.detach()), taken(net)


def taken(net):
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    for p in net.parameters():
        p.grad = None
    return found


def ours(net, batch, how="exact", micro=2, patches=1, inner=1):
    """(losses, {name: gradient}) as training computes them."""
    made = Gradient(net, GridLoss(), ModeSettings("none", 0, TILE, net.fusion, how, "image", 0), patches, inner, micro)
    losses = list(made.rounds(batch, np.random.RandomState(0)))
    made.finish(clip=0)
    return losses, taken(net)


def assert_same(got, want):
    assert sorted(got) == sorted(want)
    scale = max(float(g.abs().max()) for g in want.values())
    for name in want:
        assert float((got[name] - want[name]).abs().max()) <= 1e-9 * max(float(want[name].abs().max()), 1e-3 * scale), name


CASES = [("mobilenetv2", "small", "group", "add", 2), ("mobilenetv2", "patchgd", "frozen", "concat", 1), ("resnet50", "small", "group", "none", 5),
         ("resnet50", "patchgd", "group", "add", 100)]


@pytest.mark.parametrize("model, head, norm, fusion, micro", CASES)
def test_exact_equals_plain_autograd(model, head, norm, fusion, micro):
    net, batch = problem(model, head, norm, fusion)
    value, want = plain(net, batch)
    (got_value,), got = ours(net, batch, micro=micro)
    assert abs(got_value - value) < 1e-12 * abs(value)
    assert_same(got, want)


def test_sampled_with_every_patch_is_exact():
    net, batch = problem()
    _value, want = plain(net, batch)
    _losses, got = ours(net, batch, "sampled", patches=4)
    assert_same(got, want)


@pytest.mark.parametrize("model", ["mobilenetv2", "resnet50"])
def test_either_path_alone_trains_all_of_the_backbone(model):
    """The local patches without a global one; the global patch where no local one carries gradient."""
    net, batch = problem(model, fusion="none")
    _losses, local = ours(net, batch, "sampled", patches=1)
    assert all(float(local["encoder." + name].abs().max()) > 0 for name, _p in net.encoder.named_parameters())
    net, batch = problem(model, fusion="add")
    made = Gradient(net, GridLoss(), ModeSettings("none", 0, TILE, "add", "sampled", "image", 0), 1, 1, 4)
    table = made.objective.table(batch)
    made.fill(batch, batch.every_patch(), table, 0)
    table.surrogate = lambda _picks, kept, _factor: 0 * kept.sum()
    made.add(batch, batch.every_patch()[:1], table, 0, filled=True)
    assert all(float(p.grad.abs().max()) > 0 for p in net.encoder.parameters())


def test_draws():
    """once: every patch before any comes again; again: each group anew, so that some come twice."""
    _net, batch = problem(labels=(1,), side=128)
    for again, most in ((False, 1), (True, 9)):
        groups = list(patches.draw(np.random.RandomState(3), batch, 4, 4, again))
        counts = np.bincount([tile for group in groups for _v, tile in group], minlength=16)
        assert [len(set(group)) for group in groups] == [4] * 4 and counts.sum() == 16
        assert counts.max() == 1 if not again else 1 < counts.max() <= most


def test_stale_cells_keep_their_vectors():
    """One patch of four is fresh: the loss is that of all four, three of them as the first pass left them."""
    net, batch = problem(fusion="none", labels=(1,))
    (value,), got = ours(net, batch, "sampled", patches=1)
    whole, want = plain(net, batch)
    assert abs(value - whole) < 1e-12 and float((got["last.last.weight"] - want["last.last.weight"]).abs().max()) < 1e-12
    assert float((got["encoder.features.0.0.weight"] - want["encoder.features.0.0.weight"]).abs().max()) > 1e-9


def test_published_sizes_and_names():
    """torchvision's parameter counts, its classifier apart; and its names, from its documentation."""
    resnet, mobile = (gridnet.build(name, "patchgd", width, "batch", 28, (2, 2), "add").encoder
                      for name, width in (("resnet50", 64), ("mobilenetv2", 32)))
    counts = [sum(p.numel() for name, p in net.named_parameters() if name.split(".")[0] not in ("fc", "classifier"))
              for net in (resnet, mobile)]
    assert counts == [25557032 - 2049000, 3504872 - 1281000]
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.1.bias", "layer4.2.conv3.weight", "fc.weight"} <= set(resnet.state_dict())
    assert {"features.0.0.weight", "features.1.conv.1.weight", "features.2.conv.1.0.weight", "features.17.conv.3.running_var",
            "features.18.1.bias", "classifier.1.weight"} <= set(mobile.state_dict())


# --- scores ---------------------------------------------------------------------------------------------------------

def test_quadratic_kappa():
    assert metrics.quadratic_kappa(np.diag([3, 4, 5])) == 1
    assert abs(metrics.quadratic_kappa(np.outer([2, 4], [3, 6]))) < 1e-12 and metrics.quadratic_kappa([[0, 5], [5, 0]]) == -1
    # by hand: weights 1 for neighbours and 4 for the ends; 1 - (1 * 2 + 4 * 1) / (sum of the products of the margins over 10)
    matrix = np.array([[3, 1, 1], [0, 2, 0], [0, 1, 2]])
    chance = np.outer([5, 2, 3], [3, 4, 3]) / 10.0
    weights = np.array([[0, 1, 4], [1, 0, 1], [4, 1, 0]])
    assert abs(metrics.quadratic_kappa(matrix) - (1 - 6 / (weights * chance).sum())) < 1e-12
    assert np.isnan(metrics.quadratic_kappa([[4, 0], [0, 0]]))


# --- data -----------------------------------------------------------------------------------------------------------

def put(folder, *names, side=40):
    for index, name in enumerate(names):
        path = os.path.join(str(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.fromarray(np.full((side, side + index % 2, 3), 10 * index % 256, np.uint8)).save(path)


def test_layouts(tmp_path):
    put(tmp_path / "a", "train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "val/dog/3.png", "test/cat/9.png")
    pairs, classes = labelled.find(str(tmp_path / "a"))
    assert classes.names == ("cat", "dog") and classes.outputs == 2
    assert sorted((p.name, p.split, p.label) for p in pairs) == [
        ("test/cat/9", "test", 0), ("train/cat/1", "train", 0), ("train/cat/2", "train", 0), ("train/dog/1", "train", 1), ("val/dog/3", "val", 1)]
    put(tmp_path / "b", *["%d/%d.png" % (label, index) for label in (2, 10, 1) for index in range(5)])
    pairs, classes = labelled.find(str(tmp_path / "b"), 0.2)
    assert classes.names == ("1", "2", "10")  # by number
    assert [sum(p.split == "val" and p.label == label for p in pairs) for label in range(3)] == [1, 1, 1]  # of every class
    (tmp_path / "b" / "labels.csv").write_text("image,label,split\n1/0.png,yes,\n1/1.png,no,train\n2/0.png,no,valid\n")
    pairs, classes = labelled.find(str(tmp_path / "b"))
    assert classes.names == ("no", "yes") and [(p.label, p.split) for p in pairs] == [(0, "train"), (0, "val"), (1, "train")]


@pytest.mark.parametrize("files, share, words", [
    (["cat/1.png", "cat/2.png", "dog/1.png"], 0.2, "class dog has 1 training image"), (["cat/1.png", "cat/2.png"], 0.2, "holds 1 class"),
    (["train/a/1.png", "train/b/1.png", "val/c/1.png"], 0.0, "no such class")])
def test_class_folders_that_cannot_be_used(files, share, words, tmp_path):
    put(tmp_path, *files)
    with pytest.raises(BadFile, match=words):
        labelled.find(str(tmp_path), share)


def test_hidden_files_are_no_images(tmp_path):
    put(tmp_path, "cat/1.png", "cat/2.png", "cat/3.png/deeper.png", "dog/1.png", "dog/2.png")
    (tmp_path / "cat" / "._1.png").write_bytes(b"what macOS leaves beside an image")
    assert [pair.name for pair in labelled.find(str(tmp_path), 0.0)[0]] == ["cat/1", "cat/2", "dog/1", "dog/2"]


@pytest.mark.slow
def test_commands_typed_beside_the_classes(tmp_path):
    put(tmp_path, *["%s/%d.png" % (name, index) for name in ("cat", "dog") for index in range(3)])
    words = ("train_lite", "--data", ".", "--model", "mobilenetv2", "--width", 4, "--res", 64, "--patch", 64, "--epochs", 1, "--name")
    for more in (words + ("one",), words + ("two", "--out", "."), ("train_lite", "--resume", "runs/train/one"),
                 ("export", "runs/train/one", "--out", "model.onnx")):
        done = command(*more, cwd=tmp_path)
        assert done.returncode == 0 and ("%s holds runs or results, and is no class" % (tmp_path / "runs") in done.stderr) == ("one" not in more), done.stderr
    assert "parity with torch on dog/" in done.stderr or "parity with torch on cat/" in done.stderr
    assert "%s holds runs" % (tmp_path / "two") in done.stderr


@pytest.mark.parametrize("text, words", [
    ("image,label\na.png,x\na.png,y\n", "second time"), ("image,label\nb.png,x\n", "no such file"), ("image,label\na.png,\n", "line 2"), ("image\na.png\n", "columns: image,label"),
    ("image,label,split\na.png,x,dev\n", "line 2"), ("image,label\na.png,  \n", "line 2"), ("image,label\na.png,x\n./a.png,y\n", "second time")])
def test_csv_lines_that_cannot_be_used(text, words, tmp_path):
    put(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(BadFile, match=words):
        labelled.find(str(tmp_path), 0.0)


@pytest.mark.parametrize("labels, order", [
    (("10.0", "1.0", "2.0"), ("1.0", "2.0", "10.0")), (("0", "1", "-1"), ("-1", "0", "1")), (("b", "3", "\u00b2", "nan"), ("3", "b", "nan", "\u00b2"))])
def test_classes_that_are_numbers_are_in_their_order(labels, order, tmp_path):
    """The quadratic kappa counts how far apart they are. The file begins with Excel's mark."""
    put(tmp_path, *["%d.png" % at for at in range(len(labels))])
    (tmp_path / "labels.csv").write_text("image,label\n" + "".join("%d.png,%s\n" % line for line in enumerate(labels)), encoding="utf-8-sig")
    assert labelled.find(str(tmp_path), 0.0)[1].names == order


def test_more_classes_than_can_be_told_apart(tmp_path):
    put(tmp_path, *["%d/1.png" % at for at in range(251)])
    with pytest.raises(BadFile, match="holds 251 classes, expected 2 to 250"):
        labelled.find(str(tmp_path), 0.0)


def test_groups_are_held_out_for_all_classes_at_once(tmp_path):
    """The same people in two classes: each on one side only."""
    put(tmp_path / "a", *["sick/p%02d_a.png" % at for at in range(10)] + ["well/p%02d_b.png" % at for at in range(3, 13)])
    pairs, _classes = labelled.find(str(tmp_path / "a"), 0.2, r"(p\d+)_")
    held = [{pair.name.split("/")[1][:3] for pair in pairs if pair.split == split} for split in ("train", "val")]
    assert len(held[0]) == 10 and len(held[1]) == 3 and not held[0] & held[1] and len(pairs) == 20
    put(tmp_path / "b", "sick/p1_a.png", "sick/p1_b.png", "well/p0_a.png", "well/p2_b.png")
    with pytest.raises(BadFile, match="class sick has no training image outside"):
        labelled.find(str(tmp_path / "b"), 0.3, r"(p\d+)_")


def test_a_folder_called_valid(tmp_path):
    put(tmp_path, "train/a/1.png", "train/b/1.png", "valid/a/2.png", "valid/b/2.png")
    pairs, _classes = labelled.find(str(tmp_path))
    assert [pair.split for pair in pairs] == ["train", "val", "train", "val"]
    put(tmp_path, "val/a/3.png")
    with pytest.raises(BadFile, match="val and valid"):
        labelled.find(str(tmp_path))


def test_no_such_data(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        labelled.find(str(tmp_path / "x"))


@pytest.mark.parametrize("norm, dropout", [("batch", 0.0), ("group", 0.5)])
def test_what_is_pushed_back_is_what_the_table_holds(norm, dropout):
    """An encoder that gives a patch other vectors in another chunk, by batch norm or dropout: also in the first inner iteration, where all
    patches have just been put in the table by chunks of their own."""
    net, batch = problem(norm=norm, fusion="none")
    net.train()
    for module in net.encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    assert varies(net.encoder) and not varies(problem()[0].encoder)
    held, apart = {}, []

    class Table(GridTable):
        def put(self, picks, kept):
            held.update(zip(picks, kept.detach().clone()))
            GridTable.put(self, picks, kept)

        def surrogate(self, picks, kept, factor):
            apart.extend(float((held[pick] - one.detach()).abs().max()) for pick, one in zip(picks, kept))
            return GridTable.surrogate(self, picks, kept, factor)

    objective = GridLoss()
    objective.table = Table
    list(Gradient(net, objective, ModeSettings("none", 0, TILE, "none", "sampled", "image", 0), 2, 2, 2).rounds(batch, np.random.RandomState(0)))
    assert len(apart) == 12 and max(apart) == 0


# --- UltraMNIST -----------------------------------------------------------------------------------------------------

def write_idx(folder, part, images, labels, packed):
    for name, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
        with (gzip.open if packed else open)(os.path.join(str(folder), "%s-%s-ubyte%s" % (part, name, ".gz" if packed else "")), "wb") as handle:
            handle.write(struct.pack(">" + "I" * (1 + array.ndim), magic, *array.shape) + array.tobytes())


def fake_mnist(folder):
    """Digits that are full squares of their own shade: 100 + 10 * digit in train, one more in test."""
    os.makedirs(str(folder), exist_ok=True)
    labels = np.arange(40).astype(np.uint8) % 10
    for part, more, packed in (("train", 0, True), ("t10k", 1, False)):
        write_idx(folder, part, np.ones((40, 28, 28), np.uint8) * (100 + 10 * labels + more)[:, None, None].astype(np.uint8), labels, packed)
    return str(folder)


def test_multisets_are_those_of_the_definition():
    counts = [[sum(len(chosen) == size for chosen in ultramnist.multisets(total)) for size in (3, 4, 5)] for total in (0, 10, 20, 27)]
    assert counts == [[1, 1, 1], [13, 22, 29], [8, 41, 98], [1, 18, 88]]


def test_digits_sum_up_and_do_not_touch(tmp_path):
    pool, rng, sizes = ultramnist.digits(fake_mnist(tmp_path), "train"), np.random.RandomState(0), []
    for total in list(range(28)) * 4:
        canvas = ultramnist.draw(total, pool, 512, rng)
        seen, values = canvas > 0, []
        while seen.any():  # squares, one by one
            y, x = np.argwhere(seen)[0]
            side = int(np.argmin(np.append(seen[y, x:], False)))
            assert (canvas[y:y + side, x:x + side] == canvas[y, x]).all() and side in {14} | {28 * f for f in range(1, 10)}
            around = canvas[max(0, y - 1):y + side + 1, max(0, x - 1):x + side + 1]
            assert (around > 0).sum() == side * side, "another digit touches"
            seen[y:y + side, x:x + side] = False
            values.append((int(canvas[y, x]) - 100) // 10)
            sizes.append(side)
        assert sum(values) == total and 3 <= len(values) <= 5
    assert min(sizes) == 14 and max(sizes) > 200


def test_scales_have_the_weights_of_the_definition():
    rng, digit = np.random.RandomState(1), np.ones((28, 28), np.uint8)
    sides = [len(ultramnist.enlarged(digit, rng)) for _ in range(4000)]
    for side, share in ((14, 0.1), (28, 0.1), (56, 0.16), (140, 0.04), (252, 0.16)):
        assert abs(np.mean(np.array(sides) == side) - share) < 0.025, side


def test_the_set_is_written(tmp_path):
    words = ("train_lite.data.ultramnist", "--mnist", fake_mnist(tmp_path / "mnist"), "--out", tmp_path / "out", "--side", 256, "--canvas", 512, "--sums", 10,
             "--train", 20, "--val", 10, "--test", 10, "--json")
    done = command(*words)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts == json.loads((tmp_path / "out" / "ultramnist.json").read_text()) and facts["canvas"] == 512 and facts["side"] == 256
    pairs, classes = labelled.find(str(tmp_path / "out"))
    assert classes.names == tuple(map(str, range(10))) and [sum(p.split == s for p in pairs) for s in ("train", "val", "test")] == [20, 10, 10]
    shades = {split: {int(v) for p in pairs if p.split == split for v in np.unique(np.array(Image.open(p.image)))} for split in ("train", "test")}
    assert 101 in shades["test"] and 101 not in shades["train"] and 100 in shades["train"]  # the test set has test digits
    again = command(*words)
    assert again.returncode == 2 and "holds something already; delete" in again.stderr
    (tmp_path / "out" / "ultramnist.json").unlink()  # as if it had been stopped
    again = command(*words)
    assert again.returncode == 2 and "perhaps a set that was stopped" in again.stderr


@pytest.mark.parametrize("words, code, said", [
    (["--side", "20"], 2, "--side is 20"), (["--seed", "-1"], 2, "--seed is -1"), (["--canvas", "100"], 2, "--canvas is 100"), (["--sums", "30"], 2, "--sums"), (["--train", "9"], 2, "--train is 9, expected 28 to"), (["--mnist", "nowhere"], 5, "no train")])
def test_ultramnist_usage(words, code, said, tmp_path):
    done = command("train_lite.data.ultramnist", "--mnist", fake_mnist(tmp_path / "mnist"), "--out", tmp_path / "out", *words)
    assert done.returncode == code and said in done.stderr and done.stderr.count("error:") == 1


def test_a_canvas_that_was_too_small_can_be_drawn_larger(tmp_path):
    words = ("train_lite.data.ultramnist", "--mnist", fake_mnist(tmp_path / "mnist"), "--out", tmp_path / "out", "--train", 60, "--val", 0, "--test", 0)
    small = command(*words, "--side", 64)
    assert small.returncode == 2 and "--canvas 64 is too small for" in small.stderr and not os.listdir(str(tmp_path / "out"))
    assert command(*words, "--side", 512).returncode == 0


def test_damaged_idx(tmp_path):
    folder = fake_mnist(tmp_path)
    path = os.path.join(folder, "t10k-images-idx3-ubyte")
    with open(path, "rb") as handle:
        content = handle.read()
    for damaged in (content[:-5], content[:3], b"\0\0\0\0" + content[4:]):
        with open(path, "wb") as handle:
            handle.write(damaged)
        with pytest.raises(BadFile, match="damaged or no idx file"):
            ultramnist.digits(folder, "t10k")
    packed = os.path.join(folder, "train-images-idx3-ubyte.gz")
    with open(packed, "rb") as handle:
        content = bytearray(handle.read())
    refused = 0
    for at in range(10, len(content)):  # a flipped bit is one error, or in the name that gzip keeps
        content[at] ^= 64
        with open(packed, "wb") as handle:
            handle.write(bytes(content))
        try:
            ultramnist.digits(folder, "train")
        except BadFile:
            refused += 1
        content[at] ^= 64
    assert refused > 0.6 * len(content)


@pytest.mark.parametrize("labels", [np.arange(40).astype(np.uint8) % 9, np.zeros((40, 28, 28), np.uint8), np.arange(40).astype(np.uint8) % 11])
def test_idx_files_of_something_else(labels, tmp_path):
    write_idx(tmp_path, "train", np.ones((40, 28, 28), np.uint8), labels, False)
    if labels.ndim == 3:
        (tmp_path / "train-labels-idx1-ubyte").write_bytes((tmp_path / "train-images-idx3-ubyte").read_bytes())
    with pytest.raises(BadFile, match="every digit from 0 to 9"):
        ultramnist.digits(str(tmp_path), "train")


def test_real_mnist_reads():
    pool = ultramnist.digits(real_data("mnist"), "t10k")
    assert [len(digit) for digit in pool] == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


# --- the command ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    """A set that a net learns in seconds: red images and green ones, of several shapes."""
    folder, rng = tmp_path_factory.mktemp("shades"), np.random.RandomState(0)
    for split, count in (("train", 12), ("test", 4)):
        for index in range(count):
            name = ("green", "red")[index % 2]
            os.makedirs(str(folder / split / name), exist_ok=True)
            colour = np.array([(60, 180, 90), (180, 60, 90)][index % 2])
            Image.fromarray((colour + rng.randint(-40, 41, (64, 64 + 16 * (index % 3), 3))).astype(np.uint8)).save(
                str(folder / split / name / ("%d.png" % index)))
    return folder


@pytest.mark.slow
def test_trains_and_resumes(shades, tmp_path):
    words = ["--data", shades, "--res", 64, "--patch", 32, "--model", "mobilenetv2", "--width", 8, "--global-patch", "add", "--epochs", 8,
             "--val-share", 0.3, "--validate-every", 4, "--out", tmp_path, "--name", "run", "--json"]
    done = command("train_lite", *words)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["test"]["accuracy"] == 1 and summary["test"]["confusion"] == [[2, 0], [0, 2]] and summary["best_val_accuracy"] == 1
    assert "patch 32 px, 2x2 of them" in done.stderr and os.listdir(str(tmp_path / "run" / "samples"))
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert header == "epoch,step,loss,lr,seconds,peak_mib,accuracy,kappa,val_loss"
    done = command("train_lite", "--resume", tmp_path / "run")
    assert done.returncode == 0 and "test  accuracy 1.000" in done.stderr


@pytest.mark.parametrize("flags, code, said", [
    (["--sampler", "deform"], 2, "--sampler deform and --model mobilenetv2"), (["--overlap", "16"], 2, "--overlap 16 and --model mobilenetv2: that is a flag for"),
    (["--seed", "4294967296"], 2, "--seed is 4294967296"), (["--fit", "none"], 2, "Leave --fit out"), (["--data", "nowhere"], 2, "does not exist")])
def test_usage(flags, code, said, shades, tmp_path):
    done = command("train_lite", "--data", shades, "--res", 64, "--patch", 32, "--model", "mobilenetv2", "--width", 4, "--out", tmp_path, *flags)
    assert done.returncode == code and said in done.stderr and done.stderr.count("error:") == 1, done.stderr


# --- export and edge-run --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(shades, tmp_path_factory):
    """Folder of a run, and of its model.onnx, made by the commands."""
    folder = tmp_path_factory.mktemp("classified")
    done = command("train_lite", "--data", shades, "--res", 64, "--patch", 32, "--model", "mobilenetv2", "--width", 4, "--global-patch", "add", "--epochs", 2,
                   "--val-share", 0.3, "--out", folder, "--name", "run")
    assert done.returncode == 0, done.stderr
    done = command("export", folder / "run", "--out", folder / "model.onnx")
    assert done.returncode == 0, done.stderr
    assert "grid pipeline" in done.stderr and "operators, all of them known to nano" in done.stderr
    return folder


def test_edge_run_gives_trainings_own_answers(trained, shades, tmp_path):
    """The labels, and the shares to 1e-4, of every test image; its oblong ones too."""
    from edge import schema
    from train_lite import state
    from train_lite.data import store
    from train_lite.tasks.classification import Classification
    net, config, classes, _tile, _meta = state.restore(str(trained / "run" / "best.safetensors"))
    pairs, _classes = labelled.find(str(shades))
    stored = store.ingest(pairs, classes, "stretch", 64, str(tmp_path / "cache"), 1, (32, 32), 0, [])
    problem = Classification(config, classes, stored, [], [], torch.device("cpu"))
    for split in ("train", "test"):
        for name in classes.names:
            done = command("edge.cli", "--engine", trained / "model.onnx", "--input", shades / split / name, "--output", tmp_path / "out")
            assert done.returncode == 0, done.stderr
            for line in [json.loads(text) for text in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]:
                assert schema.violations(line, schema.load("result")) == []
                entry, = [s for s in stored if s.pair.image == line["source"]]
                shares = problem.probabilities(net, entry)
                assert np.abs(np.array([line["scores"][n] for n in classes.names]) - shares).max() < 1e-4
                assert line["label"] == classes.names[int(shares.argmax())] and abs(sum(line["scores"].values()) - 1) < 1e-5
                assert Image.open(line["overlay"]).size[0] >= 64 and line["mask"] is None


@pytest.mark.parametrize("model, head, fusion", [("mobilenetv2", "patchgd", "concat"), ("mobilenetv2", "small", "none"), ("resnet50", "small", "add")])
def test_exports_pass_the_target_check_and_the_gate(model, head, fusion, tmp_path):
    from edge import pipeline, proof
    from edge.backends import ort
    from export import parity, targets, to_onnx
    from train_lite import evaluate
    from train_lite.config import TrainConfig, mode_settings
    from train_lite.data.dataset import Classes
    config = TrainConfig(model=model, head=head, global_patch=fusion, width=4, res=64, patch=32)
    torch.manual_seed(0)
    net = gridnet.build(model, head, 4, "group", 3, (2, 2), fusion).eval()
    for ending in net.encoder.residual_ends():
        torch.nn.init.uniform_(ending.weight, 0.5, 1.5)
    classes = Classes(("a", "b", "c"), ((0, 0, 0), (9, 9, 9), (99, 9, 9)), 3, False, ())
    recipe = evaluate.recipe(mode_settings(config), 32, 1)
    made, files = to_onnx.write(str(tmp_path), "model", to_onnx.folded(net), config, classes, recipe, to_onnx.pipeline_of(config, fusion))
    for file in files.values():
        targets.demand(file, "nano")
    kind = pipeline.of(made)
    with kind(made, files, ort) as candidate, kind(made, files, parity.TorchBackend(net)) as reference:
        reference.recipe = recipe
        frame = parity.Frame("frame", ArrayPicture(np.random.RandomState(3).randint(0, 256, (61, 83, 3)).astype(np.uint8)))
        report, _calls = parity.compare(reference, candidate, [frame])
        parity.demand(report, 1e-4, "model.onnx")
        made["proof"] = proof.make(reference, 1e-4)
        assert proof.demand(candidate, made, "model.onnx") < 1
        candidate.recipe = candidate.recipe._replace(mean=candidate.recipe.mean[::-1])
        report, _calls = parity.compare(reference, candidate, [frame])
        with pytest.raises(Exception, match="begins in stage prepare"):
            parity.demand(report, 1e-4, "model.onnx")


@pytest.mark.slow
def test_images_taken_as_they_are(tmp_path):
    """--fit none: trained, exported, and run; names in any script."""
    rng = np.random.RandomState(0)
    for name in (u"\u732b", u"\u017eelva"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(rng.randint(0, 256, (64, 64, 3)).astype(np.uint8)).save(str(tmp_path / "set" / name / ("%d.png" % index)))
    done = command("train_lite", "--data", tmp_path / "set", "--res", 64, "--patch", 32, "--model", "mobilenetv2", "--width", 4, "--fit", "none",
                   "--epochs", 1, "--out", tmp_path, "--name", "run")
    assert done.returncode == 0, done.stderr
    done = command("export", tmp_path / "run", "--out", tmp_path / "model.onnx")
    assert done.returncode == 0, done.stderr
    done = command("edge.cli", "--engine", tmp_path / "model.onnx", "--input", tmp_path / "set" / name, "--output", tmp_path / "out")
    assert done.returncode == 0 and "3 frames done, 0 failed" in done.stderr, done.stderr


@pytest.mark.parametrize("head, patches", [("small", 128 + 2), ("patchgd", 2 * (64 + 1))])
def test_norms_are_measured_on_a_bounded_number_of_patches(head, patches):
    """A grid of 64 patches, 40 images: patches of many images, or the whole grids of two."""
    from train_lite.config import TrainConfig
    from train_lite.data.dataset import Classes
    from train_lite.tasks.classification import Classification
    config = TrainConfig(model="mobilenetv2", head=head, norm="batch", global_patch="add", width=4, res=8 * TILE, patch=TILE)
    stored = [Memory(np.random.RandomState(at), 8 * TILE, at % 2) for at in range(40)]
    made = Classification(config, Classes(("a", "b"), ((0, 0, 0), (9, 9, 9)), 2, False, ()), stored, [], [], torch.device("cpu"))
    net = Classification.build(config, 2, "batch").eval()
    seen = []
    net.encoder.register_forward_hook(lambda _net, given, _out: seen.append(len(given[0])))
    (_prefix, forward), = made.calibrate(net)
    with torch.no_grad():
        forward()
    assert sum(seen) == patches


def test_norms_without_statistics_in_the_weights_are_measured(tmp_path):
    """--norm frozen --weights: the encoder's come from the file, those of PatchGD's head from images."""
    from train_lite import state
    from train_lite.config import TrainConfig
    from train_lite.data.dataset import Classes
    from train_lite.tasks.classification import Classification
    torch.manual_seed(0)
    source = gridnet.build("mobilenetv2", "small", 4, "batch", 2, (2, 2), "add")
    for module in source.encoder.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(3, 4)
    torch.save(source.encoder.state_dict(), str(tmp_path / "w.pth"))
    config = TrainConfig(model="mobilenetv2", head="patchgd", norm="frozen", global_patch="add", width=4, res=2 * TILE, patch=TILE, epochs=2,
                         weights=str(tmp_path / "w.pth"), allow_pickle=True)
    stored = [Memory(np.random.RandomState(at), 2 * TILE, at % 2) for at in range(3)]
    made = Classification(config, Classes(("a", "b"), ((0, 0, 0), (9, 9, 9)), 2, False, ()), stored, [], [], torch.device("cpu"))
    begun = state.new(made)
    assert begun.frozen and all(name.startswith("encoder.") for name in begun.frozen)
    begun.freeze_if_due(made)
    heads = [name for name in begun.frozen if name.startswith("last.")]
    assert len(heads) == 4 and all(not torch.equal(begun.net.get_submodule(name).running_var, torch.ones(8)) for name in heads)
    kept = [begun.net.get_submodule(name).running_var for name in begun.frozen if name.startswith("encoder.")]
    assert all(3 <= float(var.min()) and float(var.max()) <= 4 for var in kept)


def test_a_label_where_masks_would_go(trained, shades, tmp_path):
    image = shades / "test" / "red" / "1.png"
    done = command("edge.cli", "--engine", trained / "model.onnx", "--input", image, "--output", tmp_path / "one.png")
    assert done.returncode == 0 and Image.open(str(tmp_path / "one.png")).size[0] >= 64, done.stderr
    done = command("edge.cli", "--engine", trained / "model.onnx", "--input", image, "--resize", "none", "--output", "-")
    assert done.returncode == 2 and "Leave --resize out" in done.stderr
    import edge
    (_frame, result), = edge.run(str(trained / "model.onnx"), str(image))
    assert result.mask is None and result.label in ("green", "red") and abs(sum(result.scores.values()) - 1) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir(api_folder()), reason="the listed names of TensorRT's bindings are not in %s; set NANOPATCH_DATA" % api_folder())
@pytest.mark.parametrize("generation", ["8.2", "11.4"])
def test_engine_gives_the_scores_of_onnx_runtime(generation, trained, shades, tmp_path):
    """On the doubles, through the kernels that prepare pixels on the device."""
    images, env = shades / "test" / "red", board(generation, tmp_path)
    done = command("export", trained / "model.onnx", "--out", tmp_path / "model.plan", "--frames", images, env=env)
    assert done.returncode == 0, done.stderr
    lines = []
    for engine, more in ((trained / "model.onnx", {}), (tmp_path / "model.plan", env)):
        done = command("edge.cli", "--engine", engine, "--input", images, "--output", "-", env=more)
        assert done.returncode == 0, done.stderr
        lines.append([json.loads(text) for text in done.stdout.splitlines()])
    assert len(lines[0]) == len(lines[1]) == 2
    for one, other in zip(*lines):
        assert one["label"] == other["label"] and max(abs(one["scores"][name] - other["scores"][name]) for name in one["scores"]) < 1e-4


READ = """
import os, sys
import torch
from train_lite.config import TrainConfig, mode_settings
from train_lite.data import labelled, store
from train_lite.state import State
from train_lite.tasks.classification import Classification
torch.set_num_threads(1)
folder, res = sys.argv[1], int(sys.argv[2])
config = TrainConfig(model="mobilenetv2", width=8, res=res, patch=256, patches=2, inner=2, global_patch="add", epochs=1)
pairs, classes = labelled.find(folder, 0.0)
stored = store.ingest(pairs, classes, "stretch", res, os.path.join(folder, ".cache"), 16, (256, 256), 0, [])
"""
ONE_BATCH = """
problem = Classification(config, classes, stored, [], [], torch.device("cpu"))
state = State(problem)
""" + STEP + LOOK


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(tmp_path):
    """16 times the pixels, at most 5 % more at the peak of filling the grid, a step and a look at a validation image."""
    folders = []
    for res in (1024, 4096):
        folder = tmp_path / str(res)
        for name in ("a", "b"):
            (folder / name).mkdir(parents=True)
            write_large(BLOCKS, res, folder / name / "0.png")
        folders.append(folder)
    small, large = peaks_kib(READ, ONE_BATCH, (folders[0], 1024), 2), peaks_kib(READ, ONE_BATCH, (folders[1], 4096), 1)
    assert large[0] <= 1.05 * small[-1], (small, large)  # processes that do the same differ by 5 % themselves
