"""The system that is worked on, its files, and the journal: what was there before, so that undo puts it back.

Whatever is to be changed is first given to `remember`; then a kill at any moment leaves what `put` can mend."""
import base64
import contextlib
import fcntl
import json
import os
import shutil
import stat
import subprocess
from typing import NamedTuple

from edge.command import read_json, sync_folder
from edge.errors import BadFile, UsageError
from jetson import board

FOLDER = "/var/lib/nanopatch"  # in the tree, as all paths in capitals
JOURNAL = FOLDER + "/setup.json"
UNITS = ("/etc/systemd/system", "/lib/systemd/system", "/usr/lib/systemd/system")
PART = ".nanopatch-part"  # ends the name of whatever is not finished: undo knows what to sweep
TO_DO, DONE = "to do", "already done"


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
    """Where a path of the tree lies on this machine, as board.inside. Raises BadFile for links that go in circles."""
    try:
        return board.inside(tree.root, path, follow)
    except OSError as exc:
        raise BadFile("%s: its links go in circles" % path) from exc


def listed(tree, place):
    """The path in the tree of a place on this machine."""
    return "/" + os.path.relpath(place, tree.root)


def unit(tree, name):
    """Path in the tree of a systemd unit, or None."""
    paths = [folder + "/" + name for folder in UNITS]
    return next((path for path in paths if os.path.lexists(inside(tree, path, follow=False))), None)


def content(path):
    """Bytes of a file of the tree, b'' when there is none."""
    try:
        with open(path, "rb") as handle:
            return handle.read()
    except FileNotFoundError:
        return b""


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
    return dict(state, kind="file", mode=stat.S_IMODE(info.st_mode), content=packed(content(path)))


def packed(data):
    """Bytes as a state holds them."""
    return base64.b64encode(data).decode()


def unpacked(state):
    """The bytes that a state holds, b'' when it is no file."""
    return base64.b64decode(state.get("content", ""))


def put(path, state):
    """Make `path` what a state says, in one move: it is the old thing or the new one, whatever stops us."""
    part = path + PART
    clear(part)
    try:
        if state["kind"] == "absent":
            clear(path)
        else:
            _prepare(part, state)
            os.replace(part, path)
        sync_folder(os.path.dirname(path))
    except OSError as exc:
        exc.filename = exc.filename or path  # a failed write() does not know its file
        raise


def _prepare(part, state):
    if state["kind"] == "link":
        os.symlink(state["target"], part)
    else:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(base64.b64decode(state["content"]))
            file.flush()
            os.fsync(file.fileno())
    if "uid" in state and os.lstat(part)[4:6] != (state["uid"], state["gid"]):
        os.lchown(part, state["uid"], state["gid"])
    if state["kind"] == "file":
        os.chmod(part, state["mode"])  # after the owner: a change of owner clears set-id bits
    if "mtime_ns" in state:
        os.utime(part, ns=(state["mtime_ns"], state["mtime_ns"]), follow_symlinks=False)


def rewrite(path, data):
    """New content (bytes) for a file; owner and mode stay. A file that is not there is made, mode 644."""
    kept = {key: value for key, value in state_of(path).items() if key in ("uid", "gid", "mode")}
    put(path, dict({"mode": 0o644}, kind="file", content=packed(data), **kept))


def clear(path):
    """Remove a file, a link, or a folder that holds nothing. What is not there is fine."""
    if os.path.isdir(path) and not os.path.islink(path):
        if not os.listdir(path):
            os.rmdir(path)
    elif os.path.lexists(path):
        os.remove(path)


# --- commands of the system, for a tree that is live

def call(*words):
    """Run a command of the system. Returns its output. Raises BadFile with its last line when it fails."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=dict(os.environ, LC_ALL="C", PATH=search_path()))
    except OSError as exc:
        raise BadFile("cannot run `%s`: %s" % (" ".join(words), exc)) from exc
    output = done.stdout.decode("utf-8", "replace").strip()
    if done.returncode:
        raise BadFile("`%s` failed with exit status %d: %s"
                      % (" ".join(words), done.returncode, output.split("\n")[-1] or "it says nothing"))
    return output


def have(name):
    return shutil.which(name, path=search_path()) is not None


def search_path():
    return os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"  # where a user's PATH does not look


# --- the journal

@contextlib.contextmanager
def alone(tree):
    """Nobody else changes the tree meanwhile. Raises UsageError when somebody does."""
    folder = os.open(inside(tree, "/etc"), os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as exc:
        raise UsageError("another setup is at work on %s. Wait for its end and type this command again" % tree.root) from exc
    finally:
        os.close(folder)


def load(tree):
    """The journal of a tree, an empty one when there is none. Raises BadFile when it is damaged."""
    path = inside(tree, JOURNAL)
    if not os.path.lexists(path):
        return {"version": 1, "made": False, "records": []}
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


def remember(tree, journal, path, step, **more):
    """Write down what stands at a place of the tree, before it is changed. What was first there stays in the journal;
    more: what undo needs besides, the newest counts."""
    place = inside(tree, path, follow=False)
    known = next((record for record in journal["records"] if record["path"] == listed(tree, place)), None)
    if known is None:
        journal["records"].append(dict(more, path=listed(tree, place), step=step, was=state_of(place)))
    elif more:
        known.update(more)
    else:
        return
    save(tree, journal)


def save(tree, journal):
    """Write the journal; its folder appears together with it, so that a kill leaves no folder without one."""
    folder = inside(tree, FOLDER)
    fresh = not os.path.isdir(folder)
    if fresh:
        journal["made"] = True
        shutil.rmtree(folder + PART, ignore_errors=True)
        os.mkdir(folder + PART, 0o755)
    put(os.path.join(folder + PART if fresh else folder, os.path.basename(JOURNAL)),
        {"kind": "file", "mode": 0o600, "content": packed((json.dumps(journal, indent=1) + "\n").encode())})
    if fresh:
        os.rename(folder + PART, folder)
        sync_folder(os.path.dirname(folder))


def forget(tree, journal):
    """The last act of undo. What a kill left unfinished goes, then the journal, and its folder when we made it and it
    holds nothing else."""
    folder, name = inside(tree, FOLDER), os.path.basename(JOURNAL)
    shutil.rmtree(folder + PART, ignore_errors=True)
    clear(os.path.join(folder, name + PART))
    if journal["made"] and os.listdir(folder) == [name]:
        os.rename(folder, folder + PART)  # folder and journal go in one move
        shutil.rmtree(folder + PART)
    else:
        clear(os.path.join(folder, name))
