"""Prepare a board for training and building: swap on disk, no desktop, full power. Undone byte for byte.

Every change is written down in a journal before it is made; undo reads the journal backwards."""
import contextlib
import errno
import json
import os
import re
import shlex
import sys
from typing import NamedTuple

from edge.command import banner, guarded, parse, say
from edge.errors import BadFile, EdgeError, UsageError, raise_all
from jetson import board
from jetson.journal import (DONE, FOLDER, JOURNAL, PART, TO_DO, Step, Tree, alone, call, clear, content, forget, have, inside,
                            listed, load, put, remember, rewrite, state_of, unit, unpacked)
from jetson.memory import read_text
from jetson.swap import SWAP_FILE, fstab_before, swap_size, swap_steps, swapped_on

TARGET = "/etc/systemd/system/default.target"
POWER_MODES, POWER_STATUS = "/etc/nvpmodel.conf", "/var/lib/nvpmodel/status"
CLOCKS = FOLDER + "/clocks.conf"


class SetupConfig(NamedTuple):
    dry_run: bool = False
    apply: bool = False
    undo: bool = False
    root: str = ""
    swap: str = "4GB"
    swap_file: str = SWAP_FILE
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


# --- desktop, power, clocks

def desktop_step(tree):
    path, wanted = inside(tree, TARGET, follow=False), unit(tree, "multi-user.target")
    now = os.path.basename(os.readlink(path)) if os.path.islink(path) else ""
    state = DONE if now in ("multi-user.target", "runlevel3.target") else TO_DO
    if not wanted or not os.path.isdir(os.path.dirname(path)):
        state = "left out: no systemd here"

    def run(journal):
        remember(tree, journal, TARGET, "desktop", now=wanted)
        put(path, {"kind": "link", "target": wanted})
    return Step("no desktop", "boot to a text console", "the desktop takes 250 to 800 MB that nets then lack",
                ("sudo systemctl set-default multi-user.target",), state, run)


def power_modes(tree):
    """(dict id -> name, id that holds until one is chosen or None) of the tree's /etc/nvpmodel.conf."""
    path = listed(tree, inside(tree, POWER_MODES))
    default = re.search(r"^[ \t]*<[ \t]*PM_CONFIG[ \t]+DEFAULT=(\d+)", board.read(tree.root, path) or "", re.MULTILINE)
    modes = {mode["id"]: mode["name"] for mode in board.power_modes(tree.root, path)}
    return modes, int(default.group(1)) if default else None


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


def power_step(config, tree):
    (modes, default), mode, path = power_modes(tree), None, inside(tree, POWER_STATUS)
    if config.power_mode == "keep":
        state = "left out: --power-mode keep"
    elif not modes or tree.live and not have("nvpmodel"):
        state = "left out: no nvpmodel here"
    else:
        mode = chosen_mode(config.power_mode, modes)
        state = DONE if power_now(content(path), default) == mode else TO_DO
        if mode is None:
            state = "left out: no name in %s tells which is greatest" % POWER_MODES

    def run(journal):
        if not os.path.isdir(os.path.dirname(path)):
            remember(tree, journal, listed(tree, os.path.dirname(path)), "power folder")
            os.mkdir(os.path.dirname(path), 0o755)
        remember(tree, journal, listed(tree, path), "power")
        if not tree.live:
            text, found = re.subn(br"pmode:\d+", b"pmode:%04d" % mode, content(path))
            return rewrite(path, text if found else b"pmode:%04d\n" % mode)
        call("nvpmodel", "-m", str(mode))
        if power_now(content(path), None) != mode:
            raise BadFile("nvpmodel did not take mode %d; it may have a question first. Type sudo nvpmodel -m %d, then "
                          "this command again" % (mode, mode))
    return Step("power mode", "keep it" if mode is None else "set mode %d (%s)" % (mode, modes[mode]),
                "the board computes as fast as it may; the supply must carry it (a Nano: barrel jack, 5 V 4 A)",
                () if mode is None else ("sudo nvpmodel -m %d" % mode,), state, run)


def clocks_step(tree, journal):
    boot = read_text("/proc/sys/kernel/random/boot_id").strip()
    state = DONE if any(record.get("boot") == boot for record in journal["records"]) else TO_DO
    if not tree.live or not have("jetson_clocks"):
        state = "left out: " + ("no jetson_clocks here" if tree.live else "clocks are pinned on a running board only")

    def run(journal):
        path = inside(tree, CLOCKS)
        remember(tree, journal, CLOCKS, "clocks")
        if not os.path.exists(path):
            clear(path + PART)  # jetson_clocks asks before it writes over a file
            call("jetson_clocks", "--store", path + PART)
            os.replace(path + PART, path)
        call("jetson_clocks")
        remember(tree, journal, CLOCKS, "clocks", boot=boot)  # only now: a failed one is tried again
    return Step("clocks", "pin the clocks to their maximum until the next boot",
                "times no longer depend on what ran before",
                ("sudo jetson_clocks --store " + CLOCKS, "sudo jetson_clocks"), state, run)


# --- do and undo

def plan(config, tree, journal):
    """The steps, in the order in which they are done."""
    return (swap_steps(config, tree, journal) + ([] if config.keep_desktop else [desktop_step(tree)])
            + [power_step(config, tree)] + ([clocks_step(tree, journal)] if config.clocks else []))


def apply(tree, journal, steps):
    """Do what is to do. Returns the steps as they then stand. Raises BadFile saying how far it came."""
    ended = []
    for step in steps:
        if step.state == TO_DO:
            say("%s: %s" % (step.name, step.what))
            try:
                step.run(journal)
            except (OSError, EdgeError, KeyboardInterrupt):
                done = ", ".join(s.name for s in ended if s.state == "done") or "nothing"
                say("stopped at: %s. Done before it: %s. To go back type: %s"
                    % (step.name, done, typed(tree, "--undo")))
                raise
            step = step._replace(state="done")
        ended.append(step)
    return ended


def undo(tree, journal):
    """Put back what the journal holds, last change first. Returns the paths. Raises BadFile naming what would not go
    back; the journal then stays, and undo can be tried again."""
    problems, restored = [], []
    for record in reversed(journal["records"]):
        try:
            restored += [record["path"]] if _put_back(tree, record) else []
        except (OSError, EdgeError) as exc:
            problems.append("%s: %s" % (record["path"], trouble(exc) if isinstance(exc, OSError) else exc))
        except (KeyError, TypeError, ValueError) as exc:
            problems.append("%s: the journal is damaged there: %r" % (record["path"], exc))
    raise_all(problems, "these could not be put back", "The rest was. Mend this and type: " + typed(tree, "--undo"))
    forget(tree, journal)
    return restored


def _put_back(tree, record):
    """False: what stands there is not ours any more, and stays."""
    step, was = record["step"], record["was"]
    path = inside(tree, record["path"], follow=False)
    if not os.path.isdir(os.path.dirname(path)):
        return say("%s: its folder is no longer there" % record["path"])
    if step == "swap" and os.path.lexists(path) and swap_size(path) is None:
        return say("%s was changed since: left as it is" % record["path"])
    if step == "swap" and tree.live and swapped_on(path):
        call("swapoff", path)
    elif step == "fstab":
        was = fstab_before(path, record)
    elif step == "desktop" and state_of(path).get("target") not in (was.get("target"), record["now"]):
        return say("%s was changed since: left as it is" % record["path"])
    elif step == "power" and tree.live and have("nvpmodel"):
        default = power_modes(tree)[1]
        old = power_now(unpacked(was), default)
        if old not in (None, power_now(content(path), default)):
            call("nvpmodel", "-m", str(old))
    elif step == "clocks" and tree.live and os.path.exists(path):
        call("jetson_clocks", "--restore", path)
    put(path, was)
    return True


def trouble(exc):
    """A refusal of the operating system as an error that says what to do."""
    cure = {errno.ENOSPC: "the disk is full. Free some space and type the command again",
            errno.EDQUOT: "the disk quota is used up. Free some space and type the command again",
            errno.EFBIG: "the file system takes no file so large. Type a smaller --swap, or another --swap-file",
            errno.EROFS: "the file system is read-only. Mount it for writing, or name another place"}
    return BadFile("cannot use %s: %s" % (exc.filename, cure.get(exc.errno, exc.strerror)))


def typed(tree, *words):
    """What the user types next."""
    words = (sys.executable, "-m", "jetson", "setup") + words + (() if tree.live else ("--root", tree.root))
    return ("sudo " if tree.live else "") + " ".join(shlex.quote(word) for word in words)


# --- the command line

@guarded
def main(argv):
    config = parse(SetupConfig, argv, "python -m jetson setup", __doc__, HELPS)
    given = [flag for flag in ("--dry-run", "--apply", "--undo") if getattr(config, flag[2:].replace("-", "_"))]
    if len(given) > 1:
        raise UsageError("%s exclude each other; give one of them" % " and ".join(given))
    if config.root and not all(os.path.isdir(os.path.join(config.root, name)) for name in ("etc", "var/lib")):
        raise UsageError("--root %s holds no etc and var/lib; expected the folder that a board's system lies in"
                         % config.root)
    tree = Tree(os.path.realpath(config.root or "/"), not config.root)
    if tree.live and os.geteuid() != 0 and (config.apply or config.undo or os.path.lexists(JOURNAL)):
        raise UsageError("this needs root, for system files that it reads and changes. Type: " + typed(tree, *argv))
    banner("setup", "this machine" if tree.live else tree.root, "none")
    try:
        with alone(tree) if config.apply or config.undo else contextlib.suppress():
            journal = load(tree)
            if config.undo:
                restored = undo(tree, journal)
            else:
                steps = plan(config, tree, journal)
                if config.apply:
                    steps = apply(tree, journal, steps)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise trouble(exc) from exc
    if not config.undo:
        return _report(config, tree, steps)
    if config.json:
        print(json.dumps({"mode": "undo", "root": tree.root, "restored": restored}))
    else:
        print("\n".join("put back " + path for path in restored) or "nothing to undo")
    if restored and tree.live:
        say("reboot for all of it to hold")


def _report(config, tree, steps):
    if config.json:
        print(json.dumps({"mode": "apply" if config.apply else "dry run", "root": tree.root, "steps": [
            {name: value for name, value in step._asdict().items() if name != "run"} for step in steps]}))
        return
    for step in steps:
        if step.state == TO_DO:
            print("\n  $ ".join(("%s: %s\n  why: %s" % (step.name, step.what, step.why),) + step.shell))
        else:
            print("%s: %s" % (step.name, step.state))
    if any(step.state == TO_DO for step in steps):
        own = ("dry_run", "apply", "undo", "root", "json", "debug")
        flags = [("--" + name.replace("_", "-"), getattr(config, name), default)
                 for name, default in config._field_defaults.items() if name not in own]
        words = [word for flag, value, default in flags if value != default
                 for word in ([flag] if isinstance(default, bool) else [flag, value])]
        say("nothing was changed. To do it type: " + typed(tree, "--apply", *words))
    elif any(step.state == "done" for step in steps):
        reboot = " Reboot for all of it to hold." if tree.live else ""
        say("done.%s To go back type: %s" % (reboot, typed(tree, "--undo")))
    else:
        say("already done: nothing to change")
