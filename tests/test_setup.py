"""Preparing a board: a copy of a Nano's files is changed and put back, also when it is killed at any moment.

Only the tests named real touch this machine: a small swap file of their own, and a small tmpfs."""
import json
import os
import stat
import subprocess
import tempfile
import traceback

import pytest

from edge.errors import BadFile, UsageError
from jetson import setup, swap
from jetson.journal import FOLDER, JOURNAL, PART, Tree, alone, call, have, inside, load, remember, save, search_path

CONF = """# < POWER_MODEL ID=9 NAME=COMMENT >
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=5W >
CPU_ONLINE CORE_2 0
# mandatory section to configure the default mode
< PM_CONFIG DEFAULT=0 >
"""
ROOT_LINE = "/dev/root            /                     ext4           defaults              0 1\n"
SWAP_LINE = "/mnt/nanopatch.swap none swap sw 0 0\n"


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """No waiting for the disk: what fsync does shows after a power cut only. The real tests wait."""
    if "real" not in request.node.name:
        monkeypatch.setattr(os, "fsync", lambda handle: None)


def write(path, text, mode=0o644):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as handle:
        handle.write(text)
    os.chmod(path, mode)
    os.utime(path, (1600000000, 1600000000))


def read(*words):
    with open(os.path.join(*words)) as handle:
        return handle.read()


def make_nano(root, fstab=ROOT_LINE):
    """The files of JetPack 4.6.1 that setup knows, in 5W mode. Links are absolute, as on the board."""
    root = str(root)
    write(root + "/etc/fstab", fstab, 0o640)
    write(root + "/etc/nvpmodel/nvpmodel_t210_jetson-nano.conf", CONF)
    os.symlink("/etc/nvpmodel/nvpmodel_t210_jetson-nano.conf", root + "/etc/nvpmodel.conf")
    write(root + "/var/lib/nvpmodel/status", "pmode:0001 fmode:quiet\n")
    units = root + "/etc/systemd/system"
    write(units + "/nvzramconfig.service", "[Service]\nExecStart=/etc/systemd/nvzramconfig.sh\n")
    os.makedirs(units + "/multi-user.target.wants")
    os.symlink("/etc/systemd/system/nvzramconfig.service", units + "/multi-user.target.wants/nvzramconfig.service")
    for name in ("graphical.target", "multi-user.target"):
        write(root + "/lib/systemd/system/" + name, "[Unit]\n")
    os.symlink("/lib/systemd/system/graphical.target", units + "/default.target")
    os.mkdir(root + "/mnt")
    return root


@pytest.fixture
def nano(tmp_path):
    return make_nano(tmp_path / "nano")


def picture(root, folder_times=False):
    """Everything below a folder: kind, mode, owner, time, and content or target."""
    seen = {}
    for folder, dirs, files in os.walk(root):
        for path in [folder] + [os.path.join(folder, name) for name in dirs + files]:
            info = os.lstat(path)
            kind = stat.S_IFMT(info.st_mode)
            what = (os.readlink(path) if kind == stat.S_IFLNK else
                    open(path, "rb").read() if kind == stat.S_IFREG else None)
            time = info.st_mtime_ns if folder_times or kind != stat.S_IFDIR else None
            seen[os.path.relpath(path, root)] = (info.st_mode, info.st_uid, info.st_gid, time, what)
    return seen


def run(root, *words):
    return setup.main(["--root", str(root), "--swap", "1MiB"] + list(words))


def steps(capsys, root, *words):
    """The steps that --json tells, name -> state."""
    capsys.readouterr()
    assert run(root, "--json", *words) == 0
    return {step["name"]: step["state"] for step in json.loads(capsys.readouterr().out)["steps"]}


# --- dry run, apply, undo

@pytest.mark.parametrize("words", [[], ["--dry-run"], ["--json"], ["--clocks", "--keep-desktop"]])
def test_dry_run_changes_nothing(nano, words):
    before = picture(nano, folder_times=True)
    assert run(nano, *words) == 0
    assert picture(nano, folder_times=True) == before


def test_dry_run_says_what_why_and_the_command(nano, capsys):
    assert run(nano) == 0
    out, err = capsys.readouterr()
    for text in ("swap file: make /mnt/nanopatch.swap, 1 MB (1048576 bytes)", "why: ",
                 "$ sudo mkswap /mnt/nanopatch.swap", "$ sudo systemctl disable nvzramconfig.service",
                 "$ sudo systemctl set-default multi-user.target", "set mode 0 (MAXN)", "$ sudo nvpmodel -m 0"):
        assert text in out
    assert "--apply --swap 1MiB --root " + nano in err


def test_apply_does_what_it_says(nano, capsys):
    assert run(nano, "--apply", "--power-mode", "maxn") == 0
    swap, units = nano + "/mnt/nanopatch.swap", nano + "/etc/systemd/system"
    assert os.stat(swap).st_size == 1 << 20 and stat.S_IMODE(os.stat(swap).st_mode) == 0o600
    assert read(nano, "etc/fstab") == ROOT_LINE + SWAP_LINE
    assert stat.S_IMODE(os.stat(nano + "/etc/fstab").st_mode) == 0o640
    assert not os.path.lexists(units + "/multi-user.target.wants/nvzramconfig.service")
    assert os.path.exists(units + "/nvzramconfig.service")
    assert os.readlink(units + "/default.target") == "/lib/systemd/system/multi-user.target"
    assert read(nano, "var/lib/nvpmodel/status") == "pmode:0000 fmode:quiet\n"
    assert not [path for path in picture(nano) if path.endswith(PART)]


@pytest.mark.parametrize("fstab", [ROOT_LINE, ROOT_LINE.rstrip("\n"), "", None])
def test_apply_and_undo_twice_is_as_never(tmp_path, fstab):
    nano = make_nano(tmp_path / "nano", fstab or "")
    if fstab is None:
        os.remove(nano + "/etc/fstab")
    before = picture(nano)
    for _ in range(2):
        assert run(nano, "--apply") == 0
        assert picture(nano) != before
        assert read(nano, "etc/fstab").endswith("\n" + SWAP_LINE if fstab else SWAP_LINE)
        assert run(nano, "--undo") == 0
        assert picture(nano) == before
    assert run(nano, "--undo") == 0
    assert picture(nano) == before


def test_apply_twice_is_as_once(nano, capsys):
    assert run(nano, "--apply") == 0
    once = picture(nano, folder_times=True)
    capsys.readouterr()
    assert run(nano, "--apply") == 0
    out, err = capsys.readouterr()
    assert out.count(": already done") == 5 and "already done: nothing to change" in err
    assert picture(nano, folder_times=True) == once


def test_undo_twice_is_as_once(nano, capsys):
    assert run(nano, "--apply") == 0 and run(nano, "--undo") == 0
    capsys.readouterr()
    assert run(nano, "--undo") == 0
    assert "nothing to undo" in capsys.readouterr().out


def test_json_of_undo(nano, capsys):
    run(nano, "--apply")
    capsys.readouterr()
    assert run(nano, "--undo", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["mode"] == "undo" and told["restored"][-1] == "/mnt/nanopatch.swap" and "/etc/fstab" in told["restored"]


def test_a_folder_that_was_there_stays(nano):
    os.mkdir(nano + FOLDER)
    before = picture(nano)
    assert run(nano, "--apply") == 0 and run(nano, "--undo") == 0
    assert picture(nano) == before


def test_what_others_changed_meanwhile_stays(nano):
    assert run(nano, "--apply") == 0
    with open(nano + "/etc/fstab", "a") as handle:
        handle.write("/dev/sda1 /media/ssd ext4 defaults 0 2\n")
    target = nano + "/etc/systemd/system/default.target"
    os.remove(target)
    os.symlink("/lib/systemd/system/rescue.target", target)
    assert run(nano, "--undo") == 0
    assert read(nano, "etc/fstab") == ROOT_LINE + "/dev/sda1 /media/ssd ext4 defaults 0 2\n"
    assert os.readlink(target).endswith("rescue.target")
    assert not os.path.exists(nano + "/mnt/nanopatch.swap")


def test_an_edited_fstab_keeps_its_blank_lines(tmp_path):
    text = ROOT_LINE + "\n# by hand\n\nproc /proc proc"
    nano = make_nano(tmp_path / "nano", text)
    assert run(nano, "--apply") == 0
    with open(nano + "/etc/fstab", "a") as handle:
        handle.write("# later\n")
    assert run(nano, "--undo") == 0
    assert read(nano, "etc/fstab") == text + "\n# later\n"


def test_undo_leaves_what_is_not_ours_any_more_and_says_so(nano, capsys):
    assert run(nano, "--apply") == 0
    write(nano + "/mnt/nanopatch.swap", "somebody's file")
    wants = nano + "/etc/systemd/system/multi-user.target.wants"
    os.rmdir(wants)
    capsys.readouterr()
    assert run(nano, "--undo") == 0
    out, err = capsys.readouterr()
    assert read(nano, "mnt/nanopatch.swap") == "somebody's file" and "put back /etc/fstab" in out
    assert "/mnt/nanopatch.swap was changed since: left" in err and "its folder is no longer there" in err
    assert "nanopatch.swap" not in out and "nvzramconfig" not in out


def test_two_at_once_wait_for_each_other(nano, capsys):
    with alone(Tree(nano, False)):
        assert run(nano, "--apply") == 2 and "another setup is at work" in capsys.readouterr().err
        assert run(nano) == 0
    assert run(nano, "--apply") == 0


def test_a_second_swap_file_joins_and_both_go(nano):
    before = picture(nano)
    assert run(nano, "--apply") == 0 and run(nano, "--apply", "--swap-file", "/mnt/more.swap") == 0
    assert read(nano, "etc/fstab") == ROOT_LINE + SWAP_LINE + SWAP_LINE.replace("nanopatch", "more")
    assert run(nano, "--undo") == 0
    assert picture(nano) == before


def test_an_fstab_line_that_is_there_is_left_alone(tmp_path):
    nano = make_nano(tmp_path / "nano", ROOT_LINE + "/mnt/nanopatch.swap swap swap defaults,pri=5 0 0\n")
    before = picture(nano)["etc/fstab"]
    assert run(nano, "--apply") == 0
    assert picture(nano)["etc/fstab"] == before


def test_flags_leave_steps_out(nano, capsys):
    assert set(steps(capsys, nano, "--swap", "none", "--keep-desktop")) == {"power mode"}
    assert "left out" in steps(capsys, nano, "--power-mode", "keep")["power mode"]
    assert "running board" in steps(capsys, nano, "--clocks")["clocks"]
    assert steps(capsys, nano, "--power-mode", "5W")["power mode"] == "already done"


def test_a_board_without_any_of_it(tmp_path, capsys):
    bare = str(tmp_path / "bare")
    for name in ("etc", "var/lib", "mnt"):
        os.makedirs(os.path.join(bare, name))
    before = picture(bare)
    states = steps(capsys, bare)
    assert states["swap file"] == states["swap at boot"] == "to do"
    assert all(states[name].startswith("left out: ") for name in ("zram off", "no desktop", "power mode"))
    assert run(bare, "--apply") == 0
    assert read(bare, "etc/fstab") == SWAP_LINE
    assert run(bare, "--undo") == 0
    assert picture(bare) == before


def test_power_folder_that_is_not_there_is_made_and_goes(nano):
    os.remove(nano + "/var/lib/nvpmodel/status")
    os.rmdir(nano + "/var/lib/nvpmodel")
    before = picture(nano)
    assert run(nano, "--apply", "--power-mode", "1") == 0
    assert read(nano, "var/lib/nvpmodel/status") == "pmode:0001\n"
    assert run(nano, "--undo") == 0
    assert picture(nano) == before


def test_links_of_the_tree_never_lead_out_of_it(tmp_path):
    nano, outside = make_nano(tmp_path / "nano"), tmp_path / "outside"
    outside.mkdir()
    write(str(outside / "fstab"), "ours\n")
    os.remove(nano + "/etc/fstab")
    os.symlink("../../../../../.." + str(outside / "fstab"), nano + "/etc/fstab")
    os.makedirs(nano + str(outside))
    before, there = picture(nano), picture(str(outside))
    assert run(nano, "--apply") == 0
    assert read(nano + str(outside), "fstab") == SWAP_LINE and picture(str(outside)) == there
    assert run(nano, "--undo") == 0
    assert picture(nano) == before
    os.symlink("b", nano + "/etc/a")
    os.symlink("a", nano + "/etc/b")
    with pytest.raises(BadFile, match="circles"):
        inside(Tree(nano, False), "/etc/a")


# --- killed at every step

CALLS = ("open", "mkdir", "rename", "replace", "remove", "unlink", "rmdir", "symlink", "chmod", "fchmod", "utime",
         "fsync", "posix_fallocate", "pwrite")


def killed(after, action):
    """Run action in a child that dies at its `after`-th change of the file system (before it for even numbers, behind
    it for odd ones). True when it died there, False when it ended first."""
    child = os.fork()
    if child == 0:
        try:
            ticks = [after]

            def tick():
                if ticks[0] == 0:
                    os._exit(9)
                ticks[0] -= 1

            def wrapped(real):
                def call(*words, **more):
                    tick()
                    result = real(*words, **more)
                    tick()
                    return result
                return call
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            for name in CALLS:
                setattr(os, name, wrapped(getattr(os, name)))
            os._exit(action())
        except BaseException:  # noqa: B902 - a child must never come back into pytest
            traceback.print_exc()
            os._exit(8)
    code = os.WEXITSTATUS(os.waitpid(child, 0)[1])
    assert code in (0, 9), "the child failed of itself at %d with %d" % (after, code)
    return code == 9


@pytest.mark.slow
@pytest.mark.parametrize("fstab,folder", [(ROOT_LINE, False), (ROOT_LINE.rstrip("\n"), True)])
def test_killed_at_any_step_it_can_be_undone(tmp_path, fstab, folder):
    nano = make_nano(tmp_path / "nano", fstab)
    if folder:
        os.mkdir(nano + FOLDER)
    before, after = picture(nano), 0
    while killed(after, lambda: run(nano, "--apply")):
        assert run(nano, "--undo") == 0
        assert picture(nano) == before, "killed at %d" % after
        after += 1
    assert after > 100  # it did die, many times
    assert run(nano, "--undo") == 0
    assert picture(nano) == before


@pytest.mark.slow
def test_a_second_apply_killed_at_any_step_can_be_undone(tmp_path):
    nano, more, after = make_nano(tmp_path / "nano", ROOT_LINE + "\n# no end"), True, 0
    before = picture(nano)
    while more:
        assert run(nano, "--apply") == 0
        more = killed(after, lambda: run(nano, "--apply", "--swap-file", "/mnt/more.swap", "--power-mode", "1"))
        assert run(nano, "--undo") == 0
        assert picture(nano) == before, "killed at %d" % after
        after += 1
    assert after > 30


def test_killed_at_any_step_it_can_be_applied_again(tmp_path):
    whole = make_nano(tmp_path / "whole", ROOT_LINE.rstrip("\n"))
    run(whole, "--apply")
    nano = make_nano(tmp_path / "nano", ROOT_LINE.rstrip("\n"))

    def outcome(root):
        return {path: state[:3] + state[4:] for path, state in picture(root).items() if "lib/nanopatch" not in path}
    before, after, wanted = picture(nano), 0, outcome(whole)
    while killed(after, lambda: run(nano, "--apply")):
        assert run(nano, "--apply") == 0
        assert outcome(nano) == wanted, "killed at %d" % after
        assert run(nano, "--undo") == 0
        assert picture(nano) == before, "killed at %d" % after
        after += 3


def test_an_undo_killed_at_any_step_can_be_undone(nano):
    before, after, more = picture(nano), 0, True
    while more:
        assert run(nano, "--apply") == 0
        more = killed(after, lambda: run(nano, "--undo"))
        assert run(nano, "--undo") == 0
        assert picture(nano) == before, "killed at %d" % after
        after += 1
    assert after > 50


def test_an_interrupt_says_how_to_go_back(nano, monkeypatch, capsys):
    def interrupt(path, state):
        raise KeyboardInterrupt
    monkeypatch.setattr(setup, "put", interrupt)
    assert run(nano, "--apply") == 130
    err = capsys.readouterr().err
    assert "Done before it: swap file, swap at boot, zram off" in err and "--undo --root " + nano in err


def test_a_damaged_journal_is_refused(nano, capsys):
    assert run(nano, "--apply") == 0
    for text in ("{", "[]", '{"version": 2}', '{"version": 1, "made": true, "records": [{"path": "etc"}]}'):
        write(nano + JOURNAL, text)
        assert run(nano, "--undo") == 5
        assert JOURNAL in capsys.readouterr().err


def test_a_hostile_journal_stays_in_the_tree(tmp_path):
    nano = make_nano(tmp_path / "nano")
    write(str(tmp_path / "victim"), "old\n")
    os.mkdir(nano + FOLDER)
    write(nano + JOURNAL, json.dumps({"version": 1, "made": True, "records": [
        {"path": "/../victim", "step": "x", "was": {"kind": "absent"}}]}))
    assert run(nano, "--undo") == 0
    assert read(str(tmp_path), "victim") == "old\n"


# --- the swap file

def test_header_is_that_of_mkswap(tmp_path):
    path = str(tmp_path / "a.swap")
    swap.make_swap(path, 3 << 20)
    with open(path, "rb") as handle:
        content = handle.read()
    assert len(content) == 3 << 20 and content[4086:4096] == b"SWAPSPACE2"
    assert content[1024:1036] == bytes([1, 0, 0, 0, 255, 2, 0, 0, 0, 0, 0, 0])  # version 1, last page 767, none bad
    assert swap.swap_size(path) == 3 << 20
    if not have("mkswap"):
        pytest.skip("no mkswap to compare with")
    made = str(tmp_path / "b.swap")
    with open(made, "wb") as handle:
        handle.truncate(3 << 20)
    os.chmod(made, 0o600)
    subprocess.check_call(["mkswap", made], stdout=subprocess.DEVNULL, env=dict(os.environ, PATH=search_path()))
    with open(made, "rb") as handle:
        theirs = handle.read(4096)
    mine = content[:4096]
    named = slice(1036, 1068)  # uuid and label
    assert mine[:named.start] + mine[named.stop:] == theirs[:named.start] + theirs[named.stop:]
    assert swap.swap_size(made) == 3 << 20


def test_zeros_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", None)  # not asked
    path = str(tmp_path / "a.swap")
    swap.make_swap(path, (5 << 20) + 4096, zeros=True)
    assert os.path.getsize(path) == (5 << 20) + 4096 == swap.swap_size(path)
    assert os.stat(path).st_blocks * 512 >= 5 << 20
    assert not os.path.exists(path + PART)


def test_what_is_no_swap_file(tmp_path):
    path = str(tmp_path / "a")
    assert swap.swap_size(path) is None
    write(path, "x" * 5000)
    assert swap.swap_size(path) is None
    swap.make_swap(path + ".swap", 1 << 20)
    os.truncate(path + ".swap", 1 << 19)
    assert swap.swap_size(path + ".swap") is None


@pytest.mark.parametrize("size", ["4 potatoes", "0", "-1GB", "GB", "", "1kB", "nan", "1e3GB", "4GB4"])
def test_sizes_that_are_none(nano, capsys, size):
    before = picture(nano)
    assert setup.main(["--root", nano, "--apply", "--swap=" + size]) == 2
    err = capsys.readouterr().err
    assert "--swap" in err and size in err and "4GB" in err
    assert picture(nano) == before


@pytest.mark.parametrize("place", ["relative.swap", "/mnt/with blank", "/mnt/", "", "/no/a.swap", "/mnt/a#b", "/mnt", "/mnt/x\n", "/mnt/\u00fc.swap", "/mnt/\udcff", "/mnt/$(reboot)"])
def test_places_that_are_none(nano, capsys, place):
    before = picture(nano)
    assert run(nano, "--apply", "--swap-file", place) == 2
    err = capsys.readouterr().err
    assert (place in err or repr(place) in err) and "--swap-file" in err
    assert picture(nano) == before


def test_a_file_that_is_there_is_not_overwritten(nano, capsys):
    write(nano + "/mnt/nanopatch.swap", "a diary\n")
    before = picture(nano)
    assert run(nano, "--apply") == 2
    assert "--swap-file" in capsys.readouterr().err and picture(nano) == before
    os.remove(nano + "/mnt/nanopatch.swap")
    assert run(nano, "--apply") == 0 and run(nano, "--apply", "--swap", "2MiB") == 2
    assert "--undo first" in capsys.readouterr().err


def test_space_is_looked_at_first_and_some_is_left(nano, capsys, monkeypatch):
    before = picture(nano)
    assert run(nano, "--apply", "--swap", "8000TB") == 5
    assert "must stay free" in capsys.readouterr().err and picture(nano) == before
    disk = os.statvfs(nano)
    with pytest.raises(BadFile):
        swap.check_place(Tree(nano, False), nano + "/a.swap", disk.f_bavail * disk.f_frsize - 1000)
    swap.check_place(Tree(nano, False), nano + "/a.swap", 1000)


def test_a_disk_that_fills_meanwhile(nano, capsys, monkeypatch):
    def full(handle, start, size):
        os.ftruncate(handle, size // 2)
        raise OSError(28, "No space left on device")
    before = picture(nano)
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert run(nano, "--apply") == 5
    err = capsys.readouterr().err
    assert "disk is full" in err and "nanopatch.swap" in err and "--undo" in err
    assert os.listdir(nano + "/mnt") == []
    assert run(nano, "--undo") == 0
    assert picture(nano) == before


def test_file_system_of_a_path():
    mounts = ("/dev/root / ext4 rw 0 0\ntmpfs /media/my\\040disk tmpfs rw 0 0\n"
              "b /media btrfs rw 0 0\nnfs /media nfs4 rw 0 0\n")
    assert swap.file_system("/mediator/x", mounts) == "ext4"
    assert swap.file_system("/media/x", mounts) == "nfs4"  # mounted over the btrfs
    assert swap.file_system("/media/my disk/x", mounts) == "tmpfs"
    assert swap.file_system("/x", "") == "unknown"


# --- power modes

def test_modes_are_those_of_the_file(nano):
    assert setup.power_modes(Tree(nano, False)) == ({0: "MAXN", 1: "5W"}, 0)
    os.remove(nano + "/etc/nvpmodel.conf")
    assert setup.power_modes(Tree(nano, False)) == ({}, None)


@pytest.mark.parametrize("modes,best", [
    ({0: "MAXN", 1: "5W"}, 0), ({0: "15W", 1: "25W", 2: "MAXN_SUPER", 3: "7W"}, 2), ({0: "15W", 1: "7W"}, 0),
    ({0: "MODE_10W_2CORE", 5: "MODE_20W_4CORE"}, 5), ({3: "SLOW", 4: "FAST"}, None)])
def test_the_greatest_mode(modes, best):
    assert setup.chosen_mode("max", modes) == best


@pytest.mark.parametrize("wanted", ["7", "10W", "", "MAX N"])
def test_a_mode_that_is_not_there(nano, capsys, wanted):
    assert run(nano, "--apply", "--power-mode", wanted) == 2
    assert "0 (MAXN), 1 (5W)" in capsys.readouterr().err
    with pytest.raises(UsageError):
        setup.chosen_mode("x", {0: "MAXN"})


# --- the command line

def test_flags_that_exclude_each_other(nano, capsys):
    assert run(nano, "--apply", "--undo") == 2
    assert "--apply and --undo" in capsys.readouterr().err


@pytest.mark.parametrize("root", ["/nonexistent", "."])
def test_a_root_that_is_none(tmp_path, capsys, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    assert setup.main(["--root", root, "--apply"]) == 2
    assert "etc and var/lib" in capsys.readouterr().err
    assert os.listdir(str(tmp_path)) == []


def test_live_needs_root_and_says_what_to_type(capsys, monkeypatch):
    def never(*words):
        raise AssertionError("must not come so far")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(setup, "plan", never)
    monkeypatch.setattr(setup, "undo", never)
    for word in ("--apply", "--undo"):
        assert setup.main([word, "--swap", "6GB"]) == 2
        err = capsys.readouterr().err
        assert "Type: sudo " in err and "-m jetson setup %s --swap 6GB" % word in err


def test_unwritable_root(capsys):
    """As an ordinary user on root's files, in a child process: root may write everywhere."""
    if os.geteuid() != 0:
        pytest.skip("not root: cannot make files of another user")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        nano = make_nano(os.path.join(folder, "nano"))
        os.chmod(nano + "/etc/fstab", 0o644)
        before = picture(nano)
        child = os.fork()
        if child == 0:
            os.setgid(65534)
            os.setuid(65534)
            os._exit(run(nano, "--apply"))
        assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 5
        assert picture(nano) == before


# --- the running machine: faked commands, then real swap

def config(**words):
    return setup.SetupConfig(**dict({"swap": "none", "keep_desktop": True, "power_mode": "keep"}, **words))


@pytest.fixture
def board(nano, tmp_path, monkeypatch):
    """The tree as if it were running: nvpmodel and jetson_clocks are scripts that write down what they are asked."""
    log, folder = str(tmp_path / "log"), str(tmp_path / "bin")
    for name, text in (("nvpmodel", "printf 'pmode:%%04d\\n' $2 > %s/var/lib/nvpmodel/status\n" % nano),
                       ("jetson_clocks", '[ "$1" != --store ] || { [ ! -e "$2" ] && echo stored > "$2"; }\n')):
        write(os.path.join(folder, name), '#!/bin/sh\necho "%s $*" >> %s\n%s' % (name, log, text), 0o755)
    monkeypatch.setenv("PATH", folder + ":" + os.environ["PATH"])
    write(log, "")
    return Tree(nano, True), log


def applied(tree, wanted):
    journal = load(tree)
    return setup.apply(tree, journal, setup.plan(wanted, tree, journal))


def test_live_power_and_clocks_go_and_come_back(board):
    tree, log = board
    before, store = picture(tree.root), tree.root + setup.CLOCKS
    wanted = config(power_mode="max", clocks=True)
    assert [step.state for step in applied(tree, wanted)] == ["done", "done"]
    assert read(log).splitlines() == ["nvpmodel -m 0", "jetson_clocks --store " + store + PART, "jetson_clocks "]
    assert [step.state for step in applied(tree, wanted)] == ["already done", "already done"]
    write(log, "")
    setup.undo(tree, load(tree))
    assert read(log).splitlines() == ["jetson_clocks --restore " + store, "nvpmodel -m 1"]
    assert picture(tree.root) == before


def test_live_clocks_are_pinned_again_after_a_boot(board):
    tree, log = board
    applied(tree, config(clocks=True))
    journal = load(tree)
    journal["records"][0]["boot"] = "an earlier one"
    save(tree, journal)
    write(log, "")
    applied(tree, config(clocks=True))
    assert read(log).splitlines() == ["jetson_clocks "]  # what was stored is what was there before the first time


def test_live_clocks_killed_while_stored_are_stored_again(board):
    tree, _log = board
    before, journal = picture(tree.root), {"version": 1, "made": False, "records": []}
    remember(tree, journal, setup.CLOCKS, "clocks")
    write(tree.root + setup.CLOCKS + PART, "half")
    applied(tree, config(clocks=True))
    assert read(tree.root + setup.CLOCKS) == "stored\n"
    setup.undo(tree, load(tree))
    assert picture(tree.root) == before


def test_live_command_that_fails_stops_and_tells(board, capsys):
    tree, log = board
    write(os.path.join(os.path.dirname(log), "bin", "nvpmodel"), "#!/bin/sh\necho NVPM ERROR: no\nexit 3\n", 0o755)
    before = picture(tree.root)
    with pytest.raises(BadFile, match="exit status 3: NVPM ERROR: no"):
        applied(tree, config(keep_desktop=False, power_mode="max"))
    assert "Done before it: no desktop" in capsys.readouterr().err
    setup.undo(tree, load(tree))
    assert picture(tree.root) == before


def test_live_command_that_does_not_do_it_is_noticed(board):
    tree, log = board
    write(os.path.join(os.path.dirname(log), "bin", "nvpmodel"), "#!/bin/sh\nexit 0\n", 0o755)
    with pytest.raises(BadFile, match="did not take mode 0"):
        applied(tree, config(power_mode="max"))


def test_undo_does_the_rest_when_one_thing_fails(board):
    tree, log = board
    before = picture(tree.root)
    applied(tree, config(keep_desktop=False, power_mode="max"))
    command = os.path.join(os.path.dirname(log), "bin", "nvpmodel")
    good = read(command)
    write(command, "#!/bin/sh\nexit 1\n", 0o755)
    with pytest.raises(BadFile, match="nvpmodel"):
        setup.undo(tree, load(tree))
    assert os.readlink(tree.root + setup.TARGET).endswith("graphical.target")
    write(command, good, 0o755)
    setup.undo(tree, load(tree))
    assert picture(tree.root) == before


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("not root: cannot mount a small disk")
    folder = str(tmp_path / "disk")
    os.mkdir(folder)
    if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "tmpfs", folder], stderr=subprocess.DEVNULL):
        pytest.skip("this machine mounts no tmpfs")
    try:
        yield folder
    finally:
        subprocess.check_call(["umount", "-l", folder])


def test_real_full_disk(small_disk, capsys, monkeypatch):
    nano = make_nano(os.path.join(small_disk, "nano"))
    before = picture(nano)
    assert run(nano, "--apply", "--swap", "16MiB") == 5
    assert "free" in capsys.readouterr().err and picture(nano) == before
    monkeypatch.setattr(swap, "check_place", lambda *words: None)
    assert run(nano, "--apply", "--swap", "16MiB") == 5
    assert "disk is full" in capsys.readouterr().err and os.listdir(nano + "/mnt") == []
    assert run(nano, "--undo") == 0
    assert picture(nano) == before


def test_real_read_only_disk(small_disk, capsys):
    nano = make_nano(os.path.join(small_disk, "nano"))
    subprocess.check_call(["mount", "-o", "remount,ro", small_disk])
    assert run(nano, "--apply") == 5
    assert "read-only" in capsys.readouterr().err


def test_real_disk_that_carries_no_swap(small_disk, capsys):
    nano = make_nano(os.path.join(small_disk, "nano"))
    with pytest.raises(BadFile, match="on tmpfs, which cannot carry swap"):
        setup.plan(config(swap="1MiB"), Tree(nano, True), {"records": []})
    if not have("swapon"):
        pytest.skip("no swapon")
    path = nano + "/mnt/a.swap"
    swap.make_swap(path, 1 << 20)
    with pytest.raises(BadFile, match="(on tmpfs, which may not carry swap|not permitted)"):
        swap.use_swap(path, 1 << 20)


@pytest.mark.parametrize("holes", [False, True])
def test_real_swap_goes_on_and_off(nano, capsys, monkeypatch, holes):
    """The live path with 64 MiB on this machine's own disk. holes: the reserved file has some, so zeros are written."""
    tree, path, wanted = Tree(nano, True), nano + "/mnt/nanopatch.swap", config(swap="64MiB")
    if os.geteuid() != 0 or not have("swapon"):
        pytest.skip("not root, or no swapon: swap cannot be tried")
    if holes:
        monkeypatch.setattr(os, "posix_fallocate", lambda handle, start, size: os.ftruncate(handle, size))
    before = picture(nano)
    try:
        try:
            done = applied(tree, wanted)
        except BadFile as exc:
            if swap.file_system(nano) in ("ext3", "ext4", "xfs") and "not permitted" not in str(exc):
                raise
            pytest.skip("this machine takes no swap file: %s" % exc)
        assert [step.state for step in done[:2]] == ["done", "done"] and swap.swapped_on(path)
        assert ("writing zeros" in capsys.readouterr().err) == holes
        assert os.stat(path).st_blocks * 512 >= 64 << 20
        assert all(step.state == "already done" for step in applied(tree, wanted)[:3])
        call("swapoff", path)
        assert applied(tree, wanted)[0].state == "done" and swap.swapped_on(path)  # ours, only switched off
        setup.undo(tree, load(tree))
        assert not swap.swapped_on(path)
        assert picture(nano) == before
    finally:
        if swap.swapped_on(path):
            subprocess.call(["swapoff", path])
