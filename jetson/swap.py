"""Swap on disk in place of zram: the swap file, its line in fstab, and zram's unit.

mkswap and systemctl are not called: a tree that does not run is prepared in the same way."""
import errno
import glob
import os
import re
import struct

from edge.command import say, sync_folder
from edge.errors import BadFile, UsageError
from jetson.journal import (DONE, PART, TO_DO, UNITS, Step, call, clear, content, inside, listed, packed, put, remember,
                            rewrite, state_of, unit, unpacked)
from jetson.memory import parse_bytes, read_text

SWAP_FILE = "/mnt/nanopatch.swap"
FSTAB = "/etc/fstab"
ZRAM = "nvzramconfig.service"
PAGE = 4096           # bytes, of every Jetson's kernel; a building machine's may differ
LEAST_SWAP = 1 << 20  # bytes
SPARE = 10 ** 9       # bytes that stay free on the disk, or a tenth of it when that is less
NO_SWAP = {"tmpfs", "ramfs", "overlay", "overlayfs", "aufs", "squashfs", "nfs", "nfs4", "cifs", "9p", "zfs"}


# --- the steps

def swap_steps(config, tree, journal):
    """Swap file, its line in fstab, zram off: in this order, so that there is never less swap than before."""
    if config.swap == "none":
        return []
    size, path = swap_wanted(config, tree)
    return [_file_step(tree, journal, path, size), _fstab_step(config, tree, listed(tree, path)), _zram_step(tree)]


def swap_wanted(config, tree):
    """(bytes, place on this machine) of the wanted swap file. Raises UsageError for a size or a path that is none."""
    try:
        size = parse_bytes(config.swap) // PAGE * PAGE
    except ValueError as exc:
        raise UsageError("--swap: %s. Type --swap 4GB, or --swap none to leave swap as it is" % exc) from exc
    if size < LEAST_SWAP:
        raise UsageError("--swap is %s; expected 1MiB or more, such as --swap 4GB" % config.swap)
    path = inside(tree, config.swap_file)
    for place in (config.swap_file, listed(tree, path)):  # it goes into fstab, and into commands to copy
        if not re.fullmatch(r"/[\w./+-]*[\w.+-]", place, re.ASCII):
            raise UsageError("--swap-file is %r; expected the full path of a file, of letters, digits and . _ + - /, such as %s"
                             % (place, SWAP_FILE))
    if not os.path.isdir(os.path.dirname(path)):
        raise UsageError("--swap-file %s: there is no folder %s. Make it, or name another place"
                         % (config.swap_file, os.path.dirname(path)))
    return size, path


def _file_step(tree, journal, path, size):
    place, ready = listed(tree, path), False
    if not os.path.lexists(path):
        check_place(tree, path, size)
    else:
        ours = any(record["path"] == place for record in journal["records"])
        ready = not tree.live or swapped_on(path)
        if not os.path.isfile(path) or swap_size(path) != size or not (ours or ready):
            raise UsageError("%s is there already, and is not a swap file of %d bytes in use. Type --undo first if "
                             "this command made it, else another --swap-file" % (path, size))

    def run(journal):
        if not os.path.lexists(path):
            remember(tree, journal, place, "swap")
            make_swap(path, size)
        if tree.live:
            use_swap(path, size)
    return Step("swap file", "make %s, %s (%d bytes), and swap to it" % (place, _size(size), size),
                "training and building need more memory than the board has; the GPU's own pages are never swapped",
                ("sudo fallocate -l %d %s" % (size, place), "sudo chmod 600 " + place, "sudo mkswap " + place,
                 "sudo swapon " + place), DONE if ready else TO_DO, run)


def _fstab_step(config, tree, swap_file):
    path, line = inside(tree, FSTAB), "%s none swap sw 0 0" % swap_file
    words = [text.split() for text in content(path).decode("utf-8", "replace").splitlines()]
    state = DONE if any(w and w[0] in (swap_file, config.swap_file) for w in words) else TO_DO

    def run(journal):
        place, text = listed(tree, path), content(path)
        added = ("\n" if text and not text.endswith(b"\n") else "") + line + "\n"
        before = [r["added"] for r in journal["records"] if r["path"] == place and text != unpacked(r["was"])]
        remember(tree, journal, place, "fstab", added=sum(before, []) + [added])
        rewrite(path, text + added.encode())
    return Step("swap at boot", "add '%s' to %s" % (line, FSTAB), "the swap file is in use after the next boot too",
                ("echo '%s' | sudo tee -a %s" % (line, FSTAB),), state, run)


def fstab_before(path, record):
    """The state to put fstab back to: what it was; when others edited it since, what it is without our lines."""
    was, added = unpacked(record["was"]), [text.encode() for text in record["added"]]
    if content(path) in [was + b"".join(added[:count]) for count in range(len(added) + 1)]:  # a kill came before the last
        return record["was"]
    say("%s was edited since: only our line is taken out" % record["path"])
    now, ours = state_of(path), [text.strip(b"\n") for text in added]
    lines = [line for line in unpacked(now).splitlines(True) if line.rstrip(b"\r\n") not in ours]
    return dict(now, content=packed(b"".join(lines)))


def _zram_step(tree):
    links = [listed(tree, link) for kind in ("wants", "requires")
             for link in sorted(glob.glob(os.path.join(glob.escape(inside(tree, UNITS[0])), "*." + kind, ZRAM)))]

    def run(journal):
        for link in links:
            remember(tree, journal, link, "zram")
            put(inside(tree, link, follow=False), {"kind": "absent"})
    return Step("zram off", "disable " + ZRAM, "zram takes memory to give memory; a file on disk does not",
                ("sudo systemctl disable " + ZRAM,),
                TO_DO if links else DONE if unit(tree, ZRAM) else "left out: no %s here" % ZRAM, run)


# --- the file

def check_place(tree, path, size):
    """Raise BadFile when a new swap file of `size` bytes cannot be there, with some bytes to spare."""
    folder = os.path.dirname(path)
    kind, disk = file_system(folder), os.statvfs(folder)
    if tree.live and (kind in NO_SWAP or kind.startswith("fuse")):
        raise BadFile("%s is on %s, which cannot carry swap. Type --swap-file with a place on an ext4 disk"
                      % (folder, kind))
    of_killed = os.lstat(path + PART).st_blocks * 512 if os.path.lexists(path + PART) else 0
    free, spare = disk.f_bavail * disk.f_frsize + of_killed, min(SPARE, disk.f_blocks * disk.f_frsize // 10)
    if size + spare > free:
        raise BadFile("the swap file needs %s, and %s must stay free, but the disk of %s has %s free. Free some space, "
                      "type a smaller --swap, or another disk with --swap-file"
                      % (_size(size), _size(spare), folder, _size(max(free, 0))))


def _size(count):
    return "%.1f GB" % (count / 1e9) if count >= 10 ** 9 else "%.0f MB" % (count / 1e6)


def file_system(path, mounts=None):
    """Kind of the file system that holds a path, such as ext4, by the text of /proc/mounts; 'unknown' off Linux."""
    path, best, kind = os.path.realpath(path), -1, "unknown"
    for line in (read_text("/proc/mounts") if mounts is None else mounts).splitlines():
        folder, this = line.split()[1:3]
        folder = folder.replace("\\040", " ").rstrip("/") + "/"
        if (path + "/").startswith(folder) and len(folder) >= best:  # of two mounts on one place the later is seen
            best, kind = len(folder), this
    return kind


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


def make_swap(path, size, zeros=False):
    """Make a swap file of `size` bytes, mode 600. zeros: write every block, for file systems whose reserved blocks the
    kernel takes for holes. What is not finished is removed, unless we are killed."""
    head = bytearray(PAGE)  # as mkswap writes it (linux/swap.h: union swap_header)
    struct.pack_into("<III", head, 1024, 1, size // PAGE - 1, 0)  # version, last page, bad pages
    head[1052:1061] = b"nanopatch"                                # the label
    head[-10:] = b"SWAPSPACE2"
    part = path + PART
    clear(part)
    try:
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b", buffering=0) as file:
            os.fchmod(file.fileno(), 0o600)
            _fill(file, size, zeros)
            os.pwrite(file.fileno(), head, 0)
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(os.path.dirname(path))
    except OSError as exc:
        exc.filename = exc.filename or path  # a failed write() does not know its file
        raise
    finally:
        clear(part)


def _fill(file, left, zeros):
    """Reserve `left` bytes; write them when zeros is true or the file system cannot reserve."""
    if not zeros:
        try:
            return os.posix_fallocate(file.fileno(), 0, left)
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    block = memoryview(bytes(1 << 20))
    while left:
        left -= file.write(block[:left])  # an unbuffered write may take a part only


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
    names = [line.split()[0].replace("\\040", " ") for line in read_text("/proc/swaps").splitlines()[1:]]
    return os.path.realpath(path) in names
