"""Prepare a board for training and building: swap on disk, no desktop, full power. Undone byte for byte.

Every change is written down in a journal before it is made; undo reads the journal backwards."""
import base64
import errno
import functools
import glob
import json
import os
import re
import shlex
import shutil
import stat
import struct
import subprocess
import sys
from typing import NamedTuple

from edge.command import banner, guarded, parse, read_json, say
from edge.errors import BadFile, EdgeError, UsageError, raise_all
from jetson.memory import parse_bytes

FOLDER = "/var/lib/nanopatch"  # in the tree, as all paths in capitals here
JOURNAL = FOLDER + "/setup.json"
CLOCKS = FOLDER + "/clocks.conf"
FSTAB = "/etc/fstab"
TARGET = "/etc/systemd/system/default.target"
UNITS = ("/etc/systemd/system", "/lib/systemd/system", "/usr/lib/systemd/system")
ZRAM = "nvzramconfig.service"
POWER_MODES, POWER_STATUS = "/etc/nvpmodel.conf", "/var/lib/nvpmodel/status"
PART = ".nanopatch-part"  # ends the name of whatever is not finished: undo knows what to sweep
PAGE = 4096               # bytes, of every Jetson's kernel; a building machine's may differ
LEAST_SWAP = 1 << 20      # bytes
SPARE = 10 ** 9           # bytes that stay free on the disk, or a tenth of it when that is less
NO_SWAP = {"tmpfs", "ramfs", "overlay", "overlayfs", "aufs", "squashfs", "nfs", "nfs4", "cifs", "9p", "zfs"}
TO_DO, DONE = "to do", "already done"


class SetupConfig(NamedTuple):
    dry_run: bool = False
    apply: bool = False
    undo: bool = False
    root: str = ""
    swap: str = "4GB"
    swap_file: str = "/mnt/nanopatch.swap"
    keep_desktop: bool = False
    power_mode: str = "max"
    clocks: bool = False
    json: bool = False
    debug: bool = False


HELPS = {
    "dry_run": "only say what would be done; this is what happens without --apply and --undo too",
    "apply": "do it",
    "undo": "put everything back as it was before --apply",
    "root": "work on the system's files below this folder and run no command: for who builds an image",
    "swap": "size of the swap file in place of zram, such as 4GB (10^9 bytes) or 4GiB; none: leave swap as it is",
    "swap_file": "where the swap file is made; an SSD lasts longer than an SD card",
    "keep_desktop": "go on starting the desktop at boot",
    "power_mode": "an id or a name of /etc/nvpmodel.conf; max: the greatest of them; keep: leave it as it is",
    "clocks": "also pin the clocks to their maximum until the next boot",
    "json": "print one JSON object on stdout",
    "debug": "show the traceback of an error",
}


class Tree(NamedTuple):
    """The system worked on: its root folder, and whether it is the one that runs (so that commands may be called)."""
    root: str
    live: bool


class Step(NamedTuple):
    name: str
    what: str
    why: str
    shell: tuple       # the same by hand, for the person who reads
    state: str         # TO_DO, DONE, or why it is left out
    run: object = None  # called with the journal


# --- files of the tree

def inside(tree, path, follow=True):
    """Where a path of the tree lies on this machine. Links lead where they would on the board, never out of the tree.
    follow: the last name too. Raises BadFile for links that go in circles."""
    done, left, hops = [], path.strip("/").split("/")[::-1], 0
    while left:
        name = left.pop()
        here = os.path.join(tree.root, *(done + [name]))
        if name == "..":
            done = done[:-1]
        elif name in ("", "."):
            continue
        elif (left or follow) and os.path.islink(here):
            hops += 1
            if hops > 40:
                raise BadFile("%s: its links go in circles" % path)
            target = os.readlink(here)
            done = [] if target.startswith("/") else done
            left += target.split("/")[::-1]
        else:
            done.append(name)
    return os.path.join(tree.root, *done)


def listed(tree, place):
    """The path in the tree of a place on this machine."""
    return "/" + os.path.relpath(place, tree.root)


def state_of(path):
    """What stands at a place, as JSON can hold it: enough for `put` to make it again."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return {"kind": "absent"}
    state = {"uid": info.st_uid, "gid": info.st_gid, "mtime_ns": info.st_mtime_ns}
    if stat.S_ISLNK(info.st_mode):
        return dict(state, kind="link", target=os.readlink(path))
    if not stat.S_ISREG(info.st_mode):
        raise BadFile("%s is neither a file nor a link; nothing was changed there" % path)
    return dict(state, kind="file", mode=stat.S_IMODE(info.st_mode), content=_text(_bytes(path)))


def put(path, state):
    """Make `path` what a state says, in one move: it is the old thing or the new one, whatever stops us."""
    clear(path + PART)
    if state["kind"] == "absent":
        clear(path)
    elif state["kind"] == "link":
        os.symlink(state["target"], path + PART)
    else:
        handle = os.open(path + PART, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(base64.b64decode(state["content"]))
            file.flush()
            os.fsync(file.fileno())
    if state["kind"] != "absent":
        if "uid" in state and os.lstat(path + PART)[4:6] != (state["uid"], state["gid"]):
            os.lchown(path + PART, state["uid"], state["gid"])
        if state["kind"] == "file":
            os.chmod(path + PART, state["mode"])  # after the owner: a change of owner clears set-id bits
        if "mtime_ns" in state:
            os.utime(path + PART, ns=(state["mtime_ns"], state["mtime_ns"]), follow_symlinks=False)
        os.replace(path + PART, path)
    _settle(os.path.dirname(path))


def clear(path):
    """Remove a file, a link, or a folder that holds nothing. What is not there is fine."""
    if os.path.isdir(path) and not os.path.islink(path):
        if not os.listdir(path):
            os.rmdir(path)
    elif os.path.lexists(path):
        os.remove(path)


def _settle(folder):
    """What a folder lists reaches the disk; else a power cut could bring the old list back."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes(path):
    """Content of a file of the tree, b'' when there is none."""
    try:
        with open(path, "rb") as handle:
            return handle.read()
    except FileNotFoundError:
        return b""


def _text(content):
    return base64.b64encode(content).decode()


def _content(state):
    return base64.b64decode(state.get("content", ""))


def rewrite(path, content):
    """New content (bytes) for a file; owner and mode stay. A file that is not there is made, mode 644."""
    old = state_of(path)
    put(path, dict({k: old[k] for k in ("uid", "gid") if k in old}, kind="file", mode=old.get("mode", 0o644),
                   content=_text(content)))


# --- the journal

def load(tree):
    """The journal of a tree, or None when there is none. Raises BadFile when it is damaged."""
    path = inside(tree, JOURNAL)
    if not os.path.lexists(path):
        return None
    journal = read_json(path, "the journal of what was changed")
    try:
        fine = journal["version"] == 1 and isinstance(journal["made"], bool) and all(
            record["path"].startswith("/") and record["was"]["kind"] in ("absent", "link", "file")
            for record in journal["records"])
    except (KeyError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise BadFile("%s is no journal of this version of nanopatch; look into it, undo by hand, and remove it" % path)
    return journal


def save(tree, journal):
    """Write the journal; its folder appears together with it, so that a kill leaves no folder without one."""
    folder = inside(tree, FOLDER)
    fresh = not os.path.isdir(folder)
    if fresh:
        journal["made"] = True
        shutil.rmtree(folder + PART, ignore_errors=True)
        os.mkdir(folder + PART, 0o755)
    content = _text((json.dumps(journal, indent=1) + "\n").encode())
    put(os.path.join(folder + PART if fresh else folder, os.path.basename(JOURNAL)),
        {"kind": "file", "mode": 0o600, "content": content})
    if fresh:
        os.rename(folder + PART, folder)
        _settle(os.path.dirname(folder))


def remember(tree, journal, path, step, **more):
    """Write down what stands at a place of the tree, before it is changed. What was first there stays in the journal;
    more: what undo needs besides, the newest counts."""
    place = inside(tree, os.path.dirname(path)), os.path.basename(path)
    path = listed(tree, os.path.join(*place))
    known = [record for record in journal["records"] if record["path"] == path]
    if not known:
        journal["records"].append(dict(more, path=path, step=step, was=state_of(os.path.join(*place))))
    elif more:
        known[0].update(more)
    else:
        return
    save(tree, journal)


def forget(tree, journal):
    """The last act of undo: the journal goes, and its folder when we made it and it holds nothing else."""
    folder = inside(tree, FOLDER)
    name = os.path.basename(JOURNAL)
    if journal["made"] and os.listdir(folder) == [name]:
        os.rename(folder, folder + PART)  # folder and journal go in one move
        shutil.rmtree(folder + PART)
    else:
        clear(os.path.join(folder, name))


def sweep(tree):
    """Remove what a run killed at its first or last moment left: the journal's own unfinished files."""
    shutil.rmtree(inside(tree, FOLDER) + PART, ignore_errors=True)
    clear(inside(tree, JOURNAL) + PART)


# --- commands

def call(*words):
    """Run a command of the system. Returns its output. Raises BadFile with its last line when it fails."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=dict(os.environ, LC_ALL="C", PATH=_search_path()))
    except OSError as exc:
        raise BadFile("cannot run `%s`: %s" % (" ".join(words), exc)) from exc
    output = done.stdout.decode("utf-8", "replace").strip()
    if done.returncode:
        raise BadFile("`%s` failed with exit status %d: %s"
                      % (" ".join(words), done.returncode, output.split("\n")[-1] or "it says nothing"))
    return output


def have(name):
    return shutil.which(name, path=_search_path()) is not None


def _search_path():
    return os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"  # where a user's PATH does not look


# --- swap

def swap_size(path):
    """Bytes of a swap file by its header, or None when it is none."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(PAGE)
    except FileNotFoundError:
        return None
    if len(head) < PAGE or head[-10:] != b"SWAPSPACE2":
        return None
    version, last_page = struct.unpack_from("<II", head, 1024)
    return (last_page + 1) * PAGE if version == 1 and (last_page + 1) * PAGE <= os.path.getsize(path) else None


def swap_header(size):
    """First page of a swap file of `size` bytes, as mkswap writes it (linux/swap.h: union swap_header)."""
    head = bytearray(PAGE)
    struct.pack_into("<III", head, 1024, 1, size // PAGE - 1, 0)  # version, last page, bad pages
    head[1052:1061] = b"nanopatch"                                # the label
    head[-10:] = b"SWAPSPACE2"
    return bytes(head)


def make_swap(path, size, zeros=False):
    """Make a swap file of `size` bytes, mode 600. zeros: write every block, for file systems whose reserved blocks the
    kernel takes for holes. What is not finished is removed, unless we are killed."""
    part = path + PART
    clear(part)
    try:
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "r+b", buffering=0) as file:
            os.fchmod(file.fileno(), 0o600)
            if zeros or not _reserve(file.fileno(), size):
                _write_zeros(file, size)
            os.pwrite(file.fileno(), swap_header(size), 0)
            os.fsync(file.fileno())
        os.replace(part, path)
        _settle(os.path.dirname(path))
    except OSError as exc:
        exc.filename = exc.filename or path  # a failed write() does not know its file
        raise
    finally:
        clear(part)


def _reserve(handle, size):
    try:
        os.posix_fallocate(handle, 0, size)
        return True
    except OSError as exc:
        if exc.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return False
        raise


def _write_zeros(file, size):
    block = bytes(1 << 20)
    for start in range(0, size, len(block)):
        left = memoryview(block)[:size - start]
        while left:  # an unbuffered write may take a part only
            left = left[file.write(left):]


def use_swap(path, size):
    """swapon; once more with a file of zeros when the kernel sees holes in the reserved one. A file that the kernel
    will not take is removed."""
    try:
        return call("swapon", path)
    except BadFile as exc:
        if "Invalid argument" not in str(exc) and "holes" not in str(exc):
            raise
    say("the kernel refuses reserved blocks here: writing zeros instead, which takes minutes on a card")
    os.remove(path)
    make_swap(path, size, zeros=True)
    try:
        return call("swapon", path)
    except BadFile as exc:
        os.remove(path)
        raise BadFile("%s. %s is on %s, which may not carry swap. Type --swap-file with a place on an ext4 disk"
                      % (exc, path, file_system(path))) from exc


def swapped_on(path):
    """Is this file in use as swap?"""
    names = [line.split()[0].replace("\\040", " ") for line in _bytes("/proc/swaps").decode().splitlines()[1:]]
    return os.path.realpath(path) in names


def file_system(path, mounts=None):
    """Kind of the file system that holds a path, such as ext4, by the text of /proc/mounts; 'unknown' off Linux."""
    path, best, kind = os.path.realpath(path), -1, "unknown"
    for line in (_bytes("/proc/mounts").decode("utf-8", "replace") if mounts is None else mounts).splitlines():
        folder, this = line.split()[1:3]
        folder = folder.replace("\\040", " ").rstrip("/") + "/"
        if (path + "/").startswith(folder) and len(folder) >= best:  # of two mounts on one place the later is seen
            best, kind = len(folder), this
    return kind


def check_space(folder, size, reclaimed=0):
    """Raise BadFile unless `size` bytes fit into a folder's disk with some to spare."""
    disk = os.statvfs(folder)
    free, spare = disk.f_bavail * disk.f_frsize + reclaimed, min(SPARE, disk.f_blocks * disk.f_frsize // 10)
    if size + spare > free:
        raise BadFile("the swap file needs %s, and %s must stay free, but the disk of %s has %s free. Free some space, "
                      "type a smaller --swap, or another disk with --swap-file"
                      % (_size(size), _size(spare), folder, _size(max(free, 0))))


def _size(count):
    return "%.1f GB" % (count / 1e9) if count >= 10 ** 9 else "%.0f MB" % (count / 1e6)


def swap_steps(config, tree, journal):
    """Swap file, its line in fstab, zram off: in this order, so that there is never less swap than before."""
    if config.swap == "none":
        return []
    size, path = swap_wanted(config, tree)
    place = listed(tree, path)
    if os.path.lexists(path):
        ours = any(record["path"] == place for record in journal["records"])
        active = not tree.live or swapped_on(path)
        if not os.path.isfile(path) or swap_size(path) != size or not (ours or active):
            raise UsageError("%s is there already, and is not a swap file of %d bytes in use. Type --undo first if "
                             "this command made it, else another --swap-file" % (path, size))
        ready = active
    else:
        check_place(tree, path, size)
        ready = False
    line = "%s none swap sw 0 0" % place
    words = [text.split() for text in _bytes(inside(tree, FSTAB)).decode("utf-8", "replace").splitlines()]
    return [
        Step("swap file", "make %s, %s (%d bytes), and swap to it" % (place, _size(size), size),
             "training and building need more memory than the board has; the GPU's own pages are never swapped",
             ("sudo fallocate -l %d %s" % (size, place), "sudo chmod 600 " + place, "sudo mkswap " + place,
              "sudo swapon " + place), DONE if ready else TO_DO, functools.partial(_swap_file, tree, place, size)),
        Step("swap at boot", "add '%s' to %s" % (line, FSTAB), "the swap file is in use after the next boot too",
             ("echo '%s' | sudo tee -a %s" % (line, FSTAB),),
             DONE if any(w and w[0] in (place, config.swap_file) for w in words) else TO_DO,
             functools.partial(_fstab_line, tree, line)),
        zram_step(tree)]


def swap_wanted(config, tree):
    """(bytes, place on this machine) of the wanted swap file. Raises UsageError for a size or a path that is none."""
    try:
        size = parse_bytes(config.swap) // PAGE * PAGE
    except ValueError as exc:
        raise UsageError("--swap: %s. Type --swap 4GB, or --swap none to leave swap as it is" % exc) from exc
    if size < LEAST_SWAP:
        raise UsageError("--swap is %s; expected 1MiB or more, such as --swap 4GB" % config.swap)
    if not re.match(r"/[^\s#\\]*[^\s#\\/]$", config.swap_file):
        raise UsageError("--swap-file is %r; expected the full path of a file, without blanks, such as %s"
                         % (config.swap_file, SetupConfig().swap_file))
    path = inside(tree, config.swap_file)
    if not os.path.isdir(os.path.dirname(path)):
        raise UsageError("--swap-file %s: there is no folder %s. Make it, or name another place"
                         % (config.swap_file, os.path.dirname(path)))
    return size, path


def check_place(tree, path, size):
    """Raise BadFile when a new swap file of `size` bytes cannot be there."""
    kind = file_system(os.path.dirname(path))
    if tree.live and (kind in NO_SWAP or kind.startswith("fuse")):
        raise BadFile("%s is on %s, which cannot carry swap. Type --swap-file with a place on an ext4 disk"
                      % (os.path.dirname(path), kind))
    of_killed = os.lstat(path + PART).st_blocks * 512 if os.path.lexists(path + PART) else 0
    check_space(os.path.dirname(path), size, of_killed)


def _swap_file(tree, place, size, journal):
    path = inside(tree, place)
    if not os.path.lexists(path):
        remember(tree, journal, place, "swap")
        make_swap(path, size)
    if tree.live:
        use_swap(path, size)


def _fstab_line(tree, line, journal):
    path = inside(tree, FSTAB)
    place, content = listed(tree, path), _bytes(path)
    added = ("\n" if content and not content.endswith(b"\n") else "") + line + "\n"
    before = [r["added"] for r in journal["records"] if r["path"] == place and content != _content(r["was"])]
    remember(tree, journal, place, "fstab", added="".join(before) + added)
    rewrite(path, content + added.encode())


def zram_step(tree):
    links = [listed(tree, path) for kind in ("wants", "requires")
             for path in sorted(glob.glob(os.path.join(glob.escape(inside(tree, UNITS[0])), "*." + kind, ZRAM)))]
    state = TO_DO if links else DONE if unit(tree, ZRAM) else "left out: no %s here" % ZRAM
    return Step("zram off", "disable " + ZRAM, "zram takes memory to give memory; a file on disk does not",
                ("sudo systemctl disable " + ZRAM,), state, functools.partial(_unlink, tree, links))


def unit(tree, name):
    """Path in the tree of a systemd unit, or None."""
    paths = [folder + "/" + name for folder in UNITS]
    return next((path for path in paths if os.path.lexists(inside(tree, path, follow=False))), None)


def _unlink(tree, links, journal):
    for link in links:
        remember(tree, journal, link, "zram")
        put(inside(tree, link, follow=False), {"kind": "absent"})


# --- desktop, power, clocks

def desktop_step(tree):
    path, wanted = inside(tree, TARGET, follow=False), unit(tree, "multi-user.target")
    now = os.path.basename(os.readlink(path)) if os.path.islink(path) else ""
    if not wanted or not os.path.isdir(os.path.dirname(path)):
        state = "left out: no systemd here"
    else:
        state = DONE if now in ("multi-user.target", "runlevel3.target") else TO_DO
    return Step("no desktop", "boot to a text console", "the desktop takes 250 to 800 MB that nets then lack",
                ("sudo systemctl set-default multi-user.target",), state, functools.partial(_no_desktop, tree, wanted))


def _no_desktop(tree, wanted, journal):
    remember(tree, journal, TARGET, "desktop", now=wanted)
    put(inside(tree, TARGET, follow=False), {"kind": "link", "target": wanted})


def power_modes(text):
    """(dict id -> name, id that holds until one is chosen or None) out of the text of /etc/nvpmodel.conf."""
    modes = re.findall(r"^[ \t]*<[ \t]*POWER_MODEL[ \t]+ID=(\d+)[ \t]+NAME=([^\s>]+)", text, re.MULTILINE)
    default = re.search(r"^[ \t]*<[ \t]*PM_CONFIG[ \t]+DEFAULT=(\d+)", text, re.MULTILINE)
    return {int(number): name for number, name in modes}, int(default.group(1)) if default else None


def chosen_mode(wanted, modes):
    """Id of the wanted mode; max: MAXN, else the most watts in a name, None when no name tells. Raises UsageError
    naming the modes there are."""
    def rank(number):
        name = modes[number].upper()
        watts = re.search(r"(\d+)W", name)
        return name.startswith("MAXN"), "SUPER" in name, int(watts.group(1)) if watts else 0
    if wanted == "max":
        best = max(sorted(modes), key=rank)
        return best if any(rank(best)) else None
    fits = [n for n in sorted(modes) if wanted.upper() in (str(n), modes[n].upper())]
    if not fits:
        raise UsageError("--power-mode is %s; expected one of %s, max or keep"
                         % (wanted, ", ".join("%d (%s)" % pair for pair in sorted(modes.items()))))
    return fits[0]


def power_now(status, default):
    """Id of the mode in the bytes of nvpmodel's status file, else the default."""
    found = re.search(br"pmode:(\d+)", status)
    return int(found.group(1)) if found else default


def _modes(tree):
    return power_modes(_bytes(inside(tree, POWER_MODES)).decode("utf-8", "replace"))


def power_step(config, tree):
    (modes, default), now = _modes(tree), _bytes(inside(tree, POWER_STATUS))
    why = "the board computes as fast as it may; the supply must carry it (a Nano: barrel jack, 5 V 4 A)"
    if config.power_mode == "keep" or not modes or tree.live and not have("nvpmodel"):
        reason = "--power-mode keep" if config.power_mode == "keep" else "no nvpmodel here"
        return Step("power mode", "keep it", why, (), "left out: " + reason)
    mode = chosen_mode(config.power_mode, modes)
    if mode is None:
        return Step("power mode", "keep it", why, (), "left out: no name in %s tells which is greatest" % POWER_MODES)
    return Step("power mode", "set mode %d (%s)" % (mode, modes[mode]), why, ("sudo nvpmodel -m %d" % mode,),
                DONE if power_now(now, default) == mode else TO_DO, functools.partial(_power, tree, mode))


def _power(tree, mode, journal):
    path = inside(tree, POWER_STATUS)
    if not os.path.isdir(os.path.dirname(path)):
        remember(tree, journal, listed(tree, os.path.dirname(path)), "power folder")
        os.mkdir(os.path.dirname(path), 0o755)
    remember(tree, journal, listed(tree, path), "power")
    if tree.live:
        call("nvpmodel", "-m", str(mode))
        if power_now(_bytes(path), None) != mode:
            raise BadFile("nvpmodel did not take mode %d; it may have a question first. Type sudo nvpmodel -m %d, then "
                          "this command again" % (mode, mode))
    elif b"pmode:" in _bytes(path):
        rewrite(path, re.sub(br"pmode:\d+", b"pmode:%04d" % mode, _bytes(path)))
    else:
        rewrite(path, b"pmode:%04d\n" % mode)


def clocks_step(tree, journal):
    boot = _bytes("/proc/sys/kernel/random/boot_id").decode().strip()
    if not tree.live or not have("jetson_clocks"):
        state = "left out: " + ("no jetson_clocks here" if tree.live else "clocks are pinned on a running board only")
    else:
        state = DONE if any(r.get("boot") == boot for r in journal["records"]) else TO_DO
    return Step("clocks", "pin the clocks to their maximum until the next boot",
                "times no longer depend on what ran before",
                ("sudo jetson_clocks --store " + CLOCKS, "sudo jetson_clocks"), state,
                functools.partial(_clocks, tree, boot))


def _clocks(tree, boot, journal):
    path = inside(tree, CLOCKS)
    remember(tree, journal, CLOCKS, "clocks")
    if not os.path.exists(path):
        clear(path + PART)  # jetson_clocks asks before it writes over a file
        call("jetson_clocks", "--store", path + PART)
        os.replace(path + PART, path)
    call("jetson_clocks")
    remember(tree, journal, CLOCKS, "clocks", boot=boot)  # only now: a failed one is tried again


# --- do and undo

def plan(config, tree, journal):
    steps = swap_steps(config, tree, journal)
    if not config.keep_desktop:
        steps.append(desktop_step(tree))
    steps.append(power_step(config, tree))
    if config.clocks:
        steps.append(clocks_step(tree, journal))
    return steps


def apply(tree, journal, steps):
    """Do what is to do. Returns the steps as they then stand. Raises BadFile saying how far it came."""
    ended = []
    for step in steps:
        if step.state == TO_DO:
            say("%s: %s" % (step.name, step.what))
            try:
                step.run(journal)
            except (OSError, EdgeError, KeyboardInterrupt) as exc:
                done = ", ".join(s.name for s in ended if s.state == "done") or "nothing"
                say("stopped at: %s. Done before it: %s. To go back type: %s"
                    % (step.name, done, typed(tree, "--undo")))
                raise
            step = step._replace(state="done")
        ended.append(step)
    return ended


def trouble(exc):
    """A refusal of the operating system as an error that says what to do."""
    cure = {errno.ENOSPC: "the disk is full. Free some space, or type a smaller --swap",
            errno.EDQUOT: "the disk quota is used up. Free some space, or type a smaller --swap",
            errno.EFBIG: "the file system takes no file so large. Type a smaller --swap, or another --swap-file",
            errno.EROFS: "the file system is read-only. Mount it for writing, or name another place"}
    return BadFile("cannot use %s: %s" % (exc.filename, cure.get(exc.errno, exc.strerror)))


def undo(tree, journal):
    """Put back what the journal holds, last change first. Returns the paths. Raises BadFile naming what would not go
    back; the journal then stays, and undo can be tried again."""
    problems, restored = [], []
    for record in reversed(journal["records"]):
        try:
            _put_back(tree, record)
            restored.append(record["path"])
        except (OSError, EdgeError) as exc:
            problems.append("%s: %s" % (record["path"], trouble(exc) if isinstance(exc, OSError) else exc))
        except (KeyError, TypeError, ValueError) as exc:
            problems.append("%s: the journal is damaged there: %r" % (record["path"], exc))
    raise_all(problems, "these could not be put back", "The rest was. Mend this and type: " + typed(tree, "--undo"))
    forget(tree, journal)
    return restored


def _put_back(tree, record):
    step, was = record["step"], record["was"]
    path = inside(tree, record["path"], follow=False)
    if not os.path.isdir(os.path.dirname(path)):
        return say("%s: its folder is no longer there" % record["path"])
    if step == "swap" and tree.live and swapped_on(path):
        call("swapoff", path)
    elif step == "fstab" and _bytes(path) not in (_content(was), _content(was) + record["added"].encode()):
        say("%s was edited since: only our line is taken out" % record["path"])
        was = _without(path, record["added"])
    elif step == "desktop" and state_of(path).get("target") not in (was.get("target"), record["now"]):
        return say("%s was changed since: left as it is" % record["path"])
    elif step == "power" and tree.live and have("nvpmodel"):
        default = _modes(tree)[1]
        old = power_now(_content(was), default)
        if old not in (None, power_now(_bytes(path), default)):
            call("nvpmodel", "-m", str(old))
    elif step == "clocks" and tree.live and os.path.exists(path):
        call("jetson_clocks", "--restore", path)
    put(path, was)


def _without(path, added):
    state, ours = state_of(path), added.encode().splitlines()
    lines = _content(state).splitlines(True)
    return dict(state, content=_text(b"".join(line for line in lines if line.rstrip(b"\r\n") not in ours)))


def typed(tree, *words):
    """What the user types next."""
    own = [] if tree.live else ["--root", tree.root]
    return " ".join((["sudo"] if tree.live else []) + [shlex.quote(w) for w in [sys.executable, "-m", "jetson", "setup"]
                                                       + list(words) + own])


def check(config):
    given = [flag for flag in ("--dry-run", "--apply", "--undo") if getattr(config, flag[2:].replace("-", "_"))]
    if len(given) > 1:
        raise UsageError("%s exclude each other; give one of them" % " and ".join(given))
    if config.root and not all(os.path.isdir(os.path.join(config.root, name)) for name in ("etc", "var/lib")):
        raise UsageError("--root %s holds no etc and var/lib; expected the folder that a board's system lies in"
                         % config.root)


@guarded
def main(argv):
    config = parse(SetupConfig, argv, "python -m jetson setup", __doc__, HELPS)
    check(config)
    tree = Tree(os.path.realpath(config.root or "/"), not config.root)
    if tree.live and os.geteuid() != 0 and (config.apply or config.undo or os.path.lexists(JOURNAL)):
        raise UsageError("this needs root, for system files that it reads and changes. Type: " + typed(tree, *argv))
    banner("setup", "this machine" if tree.live else tree.root, "none")
    try:
        journal = load(tree)
        if config.undo:
            return _undo(config, tree, journal)
        journal = journal or {"version": 1, "made": False, "records": []}
        steps = plan(config, tree, journal)
        if config.apply:
            steps = apply(tree, journal, steps)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise trouble(exc) from exc
    _report(config, "apply" if config.apply else "dry run", tree, steps)
    return 0


def _report(config, mode, tree, steps):
    if config.json:
        print(json.dumps({"mode": mode, "root": tree.root, "steps": [
            {"name": s.name, "what": s.what, "why": s.why, "shell": list(s.shell), "state": s.state} for s in steps]}))
        return
    for step in steps:
        if step.state == TO_DO:
            print("%s: %s\n  why: %s" % (step.name, step.what, step.why))
            print("\n".join("  $ " + line for line in step.shell))
        else:
            print("%s: %s" % (step.name, step.state))
    if any(step.state == TO_DO for step in steps):
        say("nothing was changed. To do it type: " + typed(tree, "--apply", *_flags(config)))
    elif any(step.state == "done" for step in steps):
        reboot = " Reboot for all of it to hold." if tree.live else ""
        say("done.%s To go back type: %s" % (reboot, typed(tree, "--undo")))
    else:
        say("already done: nothing to change")


def _flags(config):
    """The flags that make this config, those left at their default and what is done with it aside."""
    words = []
    for name, default in config._field_defaults.items():
        value, flag = getattr(config, name), "--" + name.replace("_", "-")
        if value != default and name not in ("dry_run", "apply", "undo", "root", "json", "debug"):
            words += [flag] if isinstance(default, bool) else [flag, value]
    return words


def _undo(config, tree, journal):
    sweep(tree)
    restored = undo(tree, journal) if journal else []
    if config.json:
        print(json.dumps({"mode": "undo", "root": tree.root, "restored": restored}))
    else:
        print("\n".join("put back " + path for path in restored) or "nothing to undo")
    if restored and tree.live:
        say("reboot for all of it to hold")
    return 0
