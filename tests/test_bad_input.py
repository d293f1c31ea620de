"""Bad input ends in one clear error and the documented exit code: never in a traceback, never in half a file.

Commands are called in this process, by the function that is their entry point: torch is then imported once."""
import hashlib
import json
import os
import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image

from conftest import command, write_set
from edge import errors, schema
from edge.cli import main as edge_run
from edge.command import guarded
from edge.sources.stills import from_files
from export.__main__ import main as export
from train_lite import checkpoint
from train_lite.run import main as train

DEEP = "[" * 100000  # JSON nested so deep that a naive reader overflows its stack
TINY = ("--res", 48, "--patch", 16, "--overlap", 4, "--width", 4, "--patches", 1, "--inner", 1, "--epochs", 1,
        "--threads", 1)


@pytest.fixture
def refused(capsys):
    """refused(main, code, *words) runs a command, demands that exit code and one error, and returns its text."""
    def run(main, code, *words):
        capsys.readouterr()
        got = main([str(word) for word in words])
        text = capsys.readouterr().err
        assert got == code, text
        assert "Traceback" not in text and "bug in nanopatch" not in text
        assert sum(line.startswith("error:") for line in text.splitlines()) == 1, text
        return text[text.index("error:"):]
    return run


@pytest.fixture
def data(tmp_path):
    write_set(tmp_path / "set", count=5)  # 02 is held out for validation
    return tmp_path / "set"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)], stderr=subprocess.PIPE)
    except OSError as exc:
        pytest.skip("no small disk to fill: %s" % exc)
    if done.returncode:
        pytest.skip("no small disk to fill: " + done.stderr.decode().strip())
    yield path
    subprocess.call(["umount", "-l", str(path)])  # lazily: a log may still be open in this process


def files_in(folder):
    return sorted(os.path.join(top, name) for top, _folders, names in os.walk(str(folder)) for name in names)


def cut(path, share=0.6):
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole) * share)])


def flip(path, at):
    whole = bytearray(path.read_bytes())
    whole[at] ^= 1
    path.write_bytes(bytes(whole))


# --- exit codes ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, code", [
    (ZeroDivisionError(), 1), (errors.UsageError("x"), 2), (errors.MissingPart("x", "y"), 2),
    (errors.OverBudget("x"), 3), (MemoryError(), 3), (errors.ParityError("x"), 4), (errors.BadFile("x"), 5),
    (OSError(28, "full", "f"), 5), (PermissionError(13, "denied", "f"), 5), (FileExistsError(17, "exists", "f"), 5), (OSError(30, "read-only"), 5),
    (OSError(36, "name too long", "f"), 5), (OSError(5, "card is dying"), 5), (OSError(98, "in use"), 1), (errors.SourceLost("x"), 6),
    (errors.EngineMismatch("x"), 7), (KeyboardInterrupt(), 130)])
def test_exit_code(error, code, capsys):
    def main(argv):
        raise error
    assert guarded(main)([]) == code
    text = capsys.readouterr().err
    assert "Traceback" not in text and text.startswith("interrupted" if code == 130 else "error: ")
    assert guarded(main)(["--debug"]) == code
    assert code == 130 or "Traceback" in capsys.readouterr().err


def test_the_process_ends_with_the_code(tmp_path):
    for words in (["train_lite", "--patch", 100], ["export", tmp_path]):
        done = command(*words, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and not done.stdout, done.stderr


# --- train_lite: flags ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, code, hint", [
    ("--pach 64", 2, "--patch"), ("--epoch 3", 2, "--epochs"), ("--patch 100", 2, "96"),
    ("--patch 32 --overlap 32", 2, "32"), ("--res big", 2, "big"), ("--res 0", 2, "--res"),
    ("--model resnet", 2, "unet"), ("--val-share 2", 2, "0.9"), ("--data absent", 2, "absent"),
    ("--config absent.json", 5, "absent.json"), ("--resume absent", 2, "run folder"),
    ("--resume absent --epochs 3", 2, "absent"), ("--seed -1", 2, "--seed is -1"), ("--head patchgd", 2, "--head patchgd and --model unet"),
    ("--max-boxes 7", 2, "fcos-resnet50"), ("--model deeplabv3 --focal 1", 2, "glnet"), ("--model fcos-resnet50 --classes 3", 2, "deeplabv3"),
    ("--model glnet --dice 0.5", 2, "that is a flag for unet"),
    ("--model glnet --patches 8", 2, "that is a flag for unet"),
    ("--model glnet --gradient exact", 2, "that is a flag for unet"),
    ("--gradient exact --patches 9", 2, "--gradient exact and --patches 9: every patch is in every step"),
    ("--gradient exact --fill image", 2, "leave one out"), ("--mode full --global-patch add", 2, "--mode full and --global-patch add"),
    ("--norm batch --freeze-at 0.5", 2, "--norm batch and --freeze-at 0.5"), ("--freeze all", 2, "--freeze all without --freeze-at: nothing would be frozen. Add --freeze-at 0.5"),
    ("--model resnet50 --fill image", 2, "that is a flag for unet"),
    ("--model glnet --base runs/train/x", 2, "--stage 123 begins from nothing"),
    ("--model glnet --mode tiled --coarse 0.1", 2, "--coarse 0.1 and --mode tiled")])
def test_wrong_flag(words, code, hint, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hint in refused(train, code, *words.split())
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("content, code, hint", [
    (b"no json", 5, "config"), (b"\xff\xfe\0", 5, "config"), (b'{"pach": 64}', 2, "'patch'"),
    (b'{"patch": "64"}', 2, "patch"), (b"[1]", 2, "config"), (DEEP.encode(), 5, "config")],
    ids=["text", "binary", "key", "type", "list", "deep"])
def test_wrong_config_file(content, code, hint, refused, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert hint in refused(train, code, "--config", tmp_path / "config.json")


def test_name_is_taken(trained, refused):
    text = refused(train, 2, "--data", trained["data"], "--out", trained["run"].parent, "--name", "run", *TINY)
    assert "--resume" in text and "--name" in text


def test_resume_takes_no_other_flag(trained, refused):
    assert "--epochs" in refused(train, 2, "--resume", trained["run"], "--epochs", 9)
    assert "smallest budget that would do" in refused(train, 3, "--resume", trained["run"], "--budget", "60MB")


@pytest.mark.parametrize("content", ["", "[]", '{"pach": 1}', '{"res": "big"}'], ids=["empty", "list", "key", "type"])
def test_resume_of_a_run_with_a_damaged_config(content, trained, refused, tmp_path):
    (tmp_path / "config.json").write_text(content)
    shutil.copy(str(trained["run"] / "last.safetensors"), str(tmp_path))
    got = train(["--resume", str(tmp_path)])
    assert got in (2, 5)
    assert "config.json" in refused(train, got, "--resume", tmp_path)


# --- train_lite: images and masks ----------------------------------------------------------------------------------

def truncated_png(path):
    cut(path)
    return path


def jpeg(path, mode="RGB"):
    Image.open(str(path)).convert(mode).save(str(path.with_suffix(".jpg")))
    path.unlink()
    return path.with_suffix(".jpg")


def truncated_jpeg(path):
    return truncated_png(jpeg(path))


def cmyk_jpeg(path):
    return jpeg(path, "CMYK")


def empty(path):
    path.write_bytes(b"")
    return path


def text_file(path):
    path.write_text("this is no picture\n" * 20)
    return path


def sixteen_bits(path):
    Image.fromarray(np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 20).save(str(path))
    return path


def palette_photo(path):
    Image.open(str(path)).convert("P").save(str(path))
    return path


def other_size(path):
    Image.new("RGB", (56, 41)).save(str(path))
    return path


def boasting_png(path):
    """A PNG that says it is 2,147,483,647 px square."""
    whole = bytearray(path.read_bytes())
    whole[16:24] = struct.pack(">II", 2 ** 31 - 1, 2 ** 31 - 1)
    whole[29:33] = struct.pack(">I", zlib.crc32(bytes(whole[12:29])) & 0xffffffff)
    path.write_bytes(bytes(whole))
    return path


@pytest.mark.parametrize("spoil, hint", [
    (truncated_png, "truncated"), (truncated_jpeg, "truncated"), (cmyk_jpeg, "CMYK"), (empty, "0 bytes"),
    (text_file, "no image"), (sixteen_bits, "16 bit"), (palette_photo, "palette"), (other_size, "56x41"),
    (boasting_png, "")])
def test_bad_image(spoil, hint, data, refused, tmp_path):
    bad = spoil(data / "images" / "00.png")
    text = refused(train, 5, "--data", data, "--out", tmp_path / "runs", *TINY)
    assert str(bad) in text and hint in text
    assert not (tmp_path / "runs").exists() and not [f for f in files_in(tmp_path) if f.endswith(".part")]


def test_every_image_is_bad(data, refused, tmp_path):
    """Such as pointers of Git LFS in the place of files."""
    for path in (data / "images").iterdir():
        text_file(path)
    text = refused(train, 5, "--data", data, "--out", tmp_path / "runs", *TINY)
    assert [name for name in ("%02d.png" % at for at in range(5)) if str(data / "images" / name) not in text] == []


@pytest.mark.parametrize("spoil", [truncated_png, empty, sixteen_bits])
def test_bad_mask(spoil, data, refused, tmp_path):
    assert str(spoil(data / "masks" / "00.png")) in refused(train, 5, "--data", data, "--out", tmp_path / "runs", *TINY)


def test_one_error_names_every_bad_file(data, refused, tmp_path):
    bad = [truncated_png(data / "images" / "00.png"), text_file(data / "images" / "02.png"),
           empty(data / "masks" / "04.png")]
    text = refused(train, 5, "--data", data, "--out", tmp_path / "runs", *TINY)
    assert [str(path) for path in bad if str(path) not in text] == []  # 02 is a validation image


def test_one_error_names_images_without_mask_and_masks_without_image(data, refused):
    for name in ("masks/00.png", "masks/01.png", "images/03.png"):
        (data / name).unlink()
    text = refused(train, 5, "--data", data)
    assert [name for name in ("images/00.png", "images/01.png", "masks/03.png") if str(data / name) not in text] == []


@pytest.mark.parametrize("words, value, hint", [
    ([], 11, "--classes 12"), (["--classes", 3], 7, "7"), (["--classes", 2], 7, "7"), (["--classes", 11], 11, "11")])
def test_label_out_of_range(words, value, hint, data, refused, tmp_path):
    values = np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) % (value + 1)
    Image.fromarray(values.astype(np.uint8)).save(str(data / "masks" / "00.png"))
    text = refused(train, 5, "--data", data, "--out", tmp_path / "runs", *(TINY + tuple(words)))
    assert str(data / "masks" / "00.png") in text and hint in text


def test_unknown_colours(data, refused, tmp_path):
    (data / "classes.json").write_text(json.dumps({"classes": [
        {"name": "ground", "colour": [0, 0, 0]}, {"name": "road", "colour": [1, 1, 1]}]}))
    Image.new("RGB", (56, 40), (9, 8, 7)).save(str(data / "masks" / "00.png"))
    text = refused(train, 5, "--data", data, "--out", tmp_path / "runs", *TINY)
    assert "[9, 8, 7]" in text and str(data / "masks" / "00.png") in text


@pytest.mark.parametrize("words, said", [
    ((), []), (("--classes", 5), ["warning: none of the 4 training masks holds class 2, class 4: what is never seen is not learned"])])
def test_classes_that_no_training_mask_holds(words, said, data, tmp_path, capsys):
    if said:
        ids = np.asarray(Image.open(str(data / "masks" / "00.png")))
        Image.fromarray(ids * 3).save(str(data / "masks" / "00.png"))
    assert train([str(word) for word in ("--data", data, "--out", tmp_path / "runs", "--name", "run") + TINY + words]) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: none of")] == said


COLOURED = '{"classes": [{"name": "a", "colour": [0, 0, 0]}, {"name": "b", "colour": [%s]}], "ignore": %s}'


@pytest.mark.parametrize("content", [
    "no json", "[]", "{}", '{"classes": 3}', '{"classes": ["a", "b"]}', '{"classes": [{"name": "a"}]}', DEEP,
    COLOURED % ("1, 1", "[]"), COLOURED % ("1, 1, 300", "[]"), COLOURED % ("1, 1, 1", "[[1, 2]]"),
    COLOURED % ("1, 1, 1", '[["r", "g", "b"]]'), COLOURED % ("1, 1, 1", "{}")],
    ids=["text", "list", "empty", "number", "names", "one", "deep", "colour short", "colour 300", "ignore short",
         "ignore text", "ignore object"])
def test_malformed_classes_json(content, data, refused, tmp_path):
    (data / "classes.json").write_text(content)
    text = refused(train, 5, "--data", data, "--out", tmp_path / "runs", *TINY)
    assert "classes.json: " in text and "does not name" not in text  # it is the list that is wrong, not the masks


@pytest.mark.parametrize("folders", [[], ["images", "masks"], ["images"]], ids=["nothing", "both empty", "no masks"])
def test_empty_folder(folders, refused, tmp_path):
    for name in ["set"] + ["set/" + name for name in folders]:
        (tmp_path / name).mkdir()
    assert str(tmp_path / "set") in refused(train, 5, "--data", tmp_path / "set")


def test_pairs_csv_names_its_bad_lines(data, refused):
    (data / "pairs.csv").write_text("image,mask,split\nimages/00.png,masks/00.png,train\nimages/01.png,,train\n"
                                    "images/02.png,masks/02.png,holiday\nimages/absent.png,masks/03.png,val\n")
    text = refused(train, 5, "--data", data)
    assert [hint for hint in ("line 3", "line 4", "line 5", "absent.png") if hint not in text] == []
    assert "line 2" not in text


def test_a_size_that_the_patch_does_not_divide(tmp_path):
    write_set(tmp_path / "set", count=3, height=53, width=71)
    words = ["--data", tmp_path / "set", "--fit", "none", "--out", tmp_path / "runs", "--name", "odd"] + list(TINY)
    assert train([str(word) for word in words]) == 0
    assert export([str(tmp_path / "runs" / "odd")]) == 0
    words = ["--engine", tmp_path / "runs" / "odd" / "model.onnx", "--input", tmp_path / "set" / "images" / "00.png",
             "--output", tmp_path / "mask.png"]
    assert edge_run([str(word) for word in words]) == 0
    assert Image.open(str(tmp_path / "mask.png")).size == (71, 53)


# --- a full disk ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("foreseen", [True, False], ids=["foreseen", "met"])
def test_tile_store_on_a_full_disk(foreseen, small_disk, refused, tmp_path, monkeypatch):
    write_set(tmp_path / "set", count=3, height=900, width=900)  # 4 MB in the store, each
    if not foreseen:  # the check before the first byte sees plenty of room
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10 ** 12}))
    text = refused(train, 5, "--data", tmp_path / "set", "--cache", small_disk / "cache", "--fit", "none", "--out",
                   tmp_path / "runs")
    assert "disk" in text and files_in(small_disk) == []


def test_run_folder_on_a_full_disk(small_disk, data, refused):
    (small_disk / "filler").write_bytes(bytes(1 << 20))
    text = refused(train, 5, "--data", data, "--out", small_disk / "runs", "--name", "run", *TINY)
    assert "disk" in text and "go on: python -m train_lite --resume %s" % (small_disk / "runs" / "run") in text
    assert not [f for f in files_in(small_disk) if f.endswith(".part")]
    for file in files_in(small_disk):  # what bears a checkpoint's name is whole
        assert not file.endswith(".safetensors") or checkpoint.read(file)


@pytest.mark.parametrize("room", [0, 1], ids=["full", "fills up"])
def test_edge_run_on_a_full_disk(room, small_disk, trained, refused, tmp_path):
    noise = np.random.RandomState(0).randint(0, 256, (900, 900, 3)).astype(np.uint8)  # its overlay takes 2.4 MB
    picture = Image.fromarray(noise) if room else Image.new("RGB", (64, 48))  # so small that it is written at the end
    picture.save(str(tmp_path / "noise.png"))
    if not room:
        with pytest.raises(OSError):
            (small_disk / "filler").write_bytes(bytes(3 << 20))
    text = refused(edge_run, 5, "--engine", trained["model"], "--input", tmp_path / "noise.png",
                   "--output", small_disk / "out")
    assert "disk" in text
    left = [file for file in files_in(small_disk) if not file.endswith("filler")]
    assert [file for file in left if not file.endswith((".mask.png", "results.jsonl"))] == []  # no overlay, no .part
    for file in left:
        assert Image.open(file).load() if file.endswith(".png") else not open(file).read()


# --- checkpoints ---------------------------------------------------------------------------------------------------

def header_says(text):
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text.encode())


@pytest.mark.parametrize("spoil", [
    cut, lambda path: flip(path, -1), lambda path: flip(path, path.stat().st_size // 2), lambda path: flip(path, 500),
    empty, lambda path: flip(path, 7), lambda path: path.write_bytes(os.urandom(5000)), header_says(DEEP),
    header_says("[]"), header_says('{"a": 1}'), header_says('{"__metadata__": 1}')],
    ids=["cut", "last bit", "tensor bit", "header bit", "empty", "header size", "garbage", "deep", "list", "number",
         "metadata"])
def test_damaged_checkpoint(spoil, trained, refused, tmp_path):
    path = tmp_path / "alone.safetensors"
    shutil.copy(str(trained["run"] / "last.safetensors"), str(path))
    spoil(path)
    assert "alone.safetensors" in refused(export, 5, path, "--out", tmp_path / "model.onnx")
    assert files_in(tmp_path) == [str(path)]


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "tiny.safetensors"
    checkpoint.write(str(path), {"net.a": np.arange(3, dtype=np.float32), "b": np.ones((2, 1), np.int64)}, {"x": 0.5})
    whole = path.read_bytes()
    unseen = []
    for bit in range(8 * len(whole)):
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(spoilt))
        try:
            checkpoint.read(str(path))
            unseen.append(bit)
        except errors.BadFile:
            pass
    assert unseen == []


@pytest.mark.slow
def test_resume_falls_back_to_the_older_generation(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(str(trained["run"]), str(run))
    flip(run / "last.safetensors", -1)
    done = command("train_lite", "--resume", run, cwd=tmp_path)  # not in this process: as many threads as `trained` had
    assert done.returncode == 0 and "warning: " in done.stderr and "last.1.safetensors" in done.stderr, done.stderr
    ours, theirs = (checkpoint.read(str(folder / "last.safetensors"))[0] for folder in (run, trained["run"]))
    assert [name for name in theirs if not np.array_equal(ours[name], theirs[name])] == []


def test_both_generations_are_damaged(trained, refused, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(str(trained["run"]), str(run))
    for name in ("last.safetensors", "last.1.safetensors"):
        cut(run / name)
    assert "best.safetensors beside it" in refused(train, 5, "--resume", run)


def test_a_table_that_a_spreadsheet_has_saved(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(str(trained["run"]), str(run))
    text = (run / "metrics.csv").read_text().replace(",", ";")
    (run / "metrics.csv").write_text(text)
    done = command("train_lite", "--resume", run, cwd=tmp_path)
    assert done.returncode == 0 and "metrics.csv.old" in done.stderr, done.stderr
    assert (run / "metrics.csv.old").read_text() == text


def test_a_run_goes_on_with_its_own_images_wherever_they_are(trained, refused, tmp_path):
    """With fewer the schedule would be over before its end, with others held out scores would be of images that were trained on."""
    run = tmp_path / "run"
    shutil.copytree(str(trained["run"]), str(run))
    moved = tmp_path / "moved"
    shutil.copytree(str(trained["data"]), str(moved), ignore=shutil.ignore_patterns(".nanopatch"))
    done = command("train_lite", "--resume", run, "--data", "moved", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(str(moved / ".nanopatch"))
    moved.rename(tmp_path / "again")
    text = refused(train, 2, "--resume", run)
    assert str(moved) in text and "--resume %s --data DIR" % run in text
    for kind in ("images", "masks"):
        (tmp_path / "again" / kind / "00.png").unlink()
    assert "was trained on 4 images with 1 held out, --data now has 3 and 1. Bring the old ones back" in refused(
        train, 2, "--resume", run, "--data", tmp_path / "again")


@pytest.mark.parametrize("left", [None, b"", b'{"run": "x", "sec'])
def test_a_summary_that_was_cut_short_is_written_anew(left, trained, tmp_path):
    """The disk was full as the run ended; it is not trained again."""
    run = shutil.copytree(str(trained["run"]), str(tmp_path / "run"))
    path = os.path.join(run, "summary.json")
    os.remove(path)
    if left is not None:
        with open(path, "wb") as handle:
            handle.write(left)
    done = command("train_lite", "--resume", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(path) as handle:
        assert json.load(handle)["steps"] > 0


@pytest.mark.parametrize("change", [{"width": 8}, {"global_patch": "add"}, {"model": "deeplabv3"}])
def test_a_checkpoint_of_another_net(change, trained, refused, tmp_path):
    """Its config.json was edited: what is wrong is named, not the package's version."""
    run = shutil.copytree(str(trained["run"]), str(tmp_path / "run"))
    with open(os.path.join(run, "config.json")) as handle:
        config = json.load(handle)
    with open(os.path.join(run, "config.json"), "w") as handle:
        json.dump(dict(config, **change), handle)
    text = refused(train, 5, "--resume", run)
    assert "does not fit the net that its config describes" in text and "config.json" in text


@pytest.mark.parametrize("words, code", [
    (["absent"], 2), ([], 2), (["."], 2), (["{run}", "--out", "model.txt"], 2), (["{run}", "--tolerance", 0], 2),
    (["{run}", "--tolerance", "inf"], 2), (["{run}", "--tolerance", "nan"], 2), (["{run}", "--frames", "absent.png"], 5)])
def test_export_refuses(words, code, trained, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(export, code, *[str(word).replace("{run}", str(trained["run"])) for word in words])
    assert files_in(trained["folder"]) and os.listdir(str(tmp_path)) == []


def test_parity_failure_writes_nothing(trained, refused, tmp_path):
    refused(export, 4, trained["run"], "--out", tmp_path / "model.onnx", "--tolerance", 1e-12)
    assert os.listdir(str(tmp_path)) == []


def test_export_on_a_full_disk(small_disk, trained, refused):
    (small_disk / "filler").write_bytes(bytes((2 << 20) - 65536))
    assert "disk" in refused(export, 5, trained["run"], "--out", small_disk / "model.onnx")
    assert os.listdir(str(small_disk)) == ["filler"]


# --- edge-run ------------------------------------------------------------------------------------------------------

@pytest.fixture
def model(trained, tmp_path):
    """A copy of the exported model that a test may spoil."""
    (tmp_path / "model").mkdir()
    for file in trained["folder"].glob("model*"):
        shutil.copy(str(file), str(tmp_path / "model"))
    return tmp_path / "model" / "model.onnx"


@pytest.mark.parametrize("name, output", [("a.png", "a.png"), ("a.overlay.png", "a.png"), ("a.samples.png", "a.png")])
def test_a_picture_is_not_replaced_by_its_mask(name, output, model, refused, tmp_path):
    image = Image.new("RGB", (40, 40), (9, 90, 190))
    image.save(str(tmp_path / name))
    text = refused(edge_run, 2, "--engine", model, "--input", tmp_path / name, "--output", tmp_path / output)
    assert "is the input itself" in text and np.array_equal(np.asarray(Image.open(str(tmp_path / name))), np.asarray(image))


@pytest.mark.parametrize("words", [["--input-flip", "rotate-180"], ["--input-width", 64, "--input-height", 64]])
def test_flags_for_cameras_are_not_for_pictures(words, model, refused, tmp_path):
    Image.new("RGB", (40, 40)).save(str(tmp_path / "a.png"))
    assert "is for cameras and video" in refused(edge_run, 2, "--engine", model, "--input", tmp_path / "a.png", "--output", tmp_path / "out", *words)


def test_results_have_names_of_their_own():
    names = [frame.name for frame in from_files(["x/a-2.png", "x/a.jpg", "x/a.png", "y/a.png", "x/a-2.jpg", "y/b.png"])]
    assert names == ["a-2", "a", "a-2-2", "a-3", "a-2-4", "b"]


def rewrite(model, change):
    """change(contract) edits the contract of `model`; the hashes are then put right."""
    path = model.with_suffix(".json")
    made = json.loads(path.read_text())
    for stage in made["stages"]:
        stage["sha256"] = hashlib.sha256((model.parent / stage["file"]).read_bytes()).hexdigest()
    change(made)
    path.write_text(json.dumps(made))


def setting(*keys_and_value):
    """A change that sets contract[key][key]... to the value."""
    def change(made):
        for key in keys_and_value[:-2]:
            made = made[key]
        made[keys_and_value[-2]] = keys_and_value[-1]
    return change


CHANGES = {
    "schema version": setting("schema_version", 2), "unknown key": setting("surprise", 1), "task": setting("task", "x"),
    "lacks tile": lambda made: made.pop("tile"), "sha256": setting("stages", 0, "sha256", "0" * 64),
    "slash": setting("stages", 1, "file", "../model/model.head.onnx"), "dots": setting("stages", 1, "file", ".."),
    "nul": setting("stages", 1, "file", "model\0.onnx"), "one stage": lambda made: made["stages"].pop(),
    "shape": lambda made: made["stages"][0]["inputs"][0]["shape"].reverse(),
    "dtype": setting("stages", 0, "inputs", 0, "dtype", "int8"),
    "tensor name": setting("stages", 0, "inputs", 0, "name", "x"), "no tensor": setting("stages", 0, "inputs", 0, {}),
    "shape is 5": setting("stages", 0, "inputs", 0, "shape", 5), "tile size": setting("tile", "size", 64),
    "tile batch": setting("tile", "batch", 2), "overview size": setting("overview", "size", 64),
    "overlap": setting("tile", "overlap", 48), "mean is not a number": setting("image", "mean", [float("nan")] * 3),
    "a third class": lambda made: made["classes"].append({"name": "c", "colour": [1, 2, 3]}),
    "colour 300": setting("classes", 1, "colour", [300, 0, 0]),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_contract_that_disagrees(name, model, trained, refused, tmp_path):
    rewrite(model, CHANGES[name])
    text = refused(edge_run, 5, "--engine", model, "--input", trained["data"] + "/images", "--output", tmp_path / "out")
    assert "model" in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", DEEP.encode()],
                         ids=["missing", "empty", "cut", "list", "binary", "deep"])
def test_contract_that_is_none(content, model, refused):
    model.with_suffix(".json").unlink()
    if content is not None:
        model.with_suffix(".json").write_bytes(content)
    assert "model.json" in refused(edge_run, 5, "--engine", model, "--input", "synthetic://64x48", "--output", "-")


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(os.urandom(5000)), cut, empty],
                         ids=["noise", "cut", "empty"])
def test_model_that_is_none(spoil, model, refused):
    spoil(model)
    assert "sha256" in refused(edge_run, 5, "--engine", model, "--input", "synthetic://64x48", "--output", "-")
    rewrite(model, lambda made: None)  # now the hash is right: the runtime itself must refuse
    assert "model.onnx" in refused(edge_run, 5, "--engine", model, "--input", "synthetic://64x48", "--output", "-")


@pytest.mark.parametrize("words, code, hint", [
    ("--input synthetic://64x48", 2, "--engine"), ("--engine {model}", 2, "--input"),
    ("--engine absent.onnx --input .", 2, "absent"),
    ("--engine {model} --input absent.png", 5, "absent.png"), ("--engine {model} --input empty", 5, "empty"),
    ("--engine {model} --input absent*.png", 5, "absent*"), ("--engine {model} --input synthetic://64", 2, "1280x720"),
    ("--engine {model} --input synthetic://0x48", 2, "720"), ("--engine {model} --input synthetic://axb", 2, "720"),
    ("--engine {model} --input gopher://me:secret@host", 2, "gopher"), ("--engine {model} --inptu a.png", 2, "--input"),
    ("--engine {model} --input . --runs 0", 2, "--runs"), ("--engine {model} --input . --frames -1", 2, "--frames"),
    ("--engine {model} --input . --still nan", 2, "--still is nan"), ("--engine {model} --input . --still -0.5", 2, "--still is -0.5")])
def test_edge_run_refuses(words, code, hint, trained, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    text = refused(edge_run, code, *words.format(model=trained["model"]).split())
    assert hint in text and "secret" not in text
    assert os.listdir(str(tmp_path)) == ["empty"]  # above all, an earlier run's results are not cut to nothing


def test_several_images_into_one_mask(trained, refused, tmp_path):
    text = refused(edge_run, 2, "--engine", trained["model"], "--input", trained["data"] + "/images",
                   "--output", tmp_path / "x.png")
    assert "folder" in text


def test_one_bad_image_among_good_ones(trained, capsys, tmp_path):
    write_set(tmp_path / "set", count=3)
    bad = truncated_png(tmp_path / "set" / "images" / "01.png")
    words = ["--engine", trained["model"], "--input", tmp_path / "set" / "images", "--output", tmp_path / "out"]
    assert edge_run([str(word) for word in words]) == 5
    assert capsys.readouterr().err.count("error: %s" % bad) == 1
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [bool(result["error"]) for result in results] == [False, True, False] and str(bad) in results[1]["error"]
    assert [schema.violations(result, schema.load("result")) for result in results] == [[], [], []]
    assert sorted(os.listdir(str(tmp_path / "out"))) == [
        "00.mask.png", "00.overlay.png", "02.mask.png", "02.overlay.png", "results.jsonl"]


def test_large_png_that_ends_early(trained, refused, tmp_path):
    Image.new("L", (4200, 4000), 90).save(str(tmp_path / "large.png"))  # read band by band: the damage shows late
    cut(tmp_path / "large.png", 0.9)
    refused(edge_run, 5, "--engine", trained["model"], "--input", tmp_path / "large.png", "--output", tmp_path / "out")
    assert files_in(tmp_path / "out") == [str(tmp_path / "out" / "results.jsonl")]
