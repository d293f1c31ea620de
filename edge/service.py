"""edge-run under systemd: what it tells the service manager, and the unit that --write-service prints.

sd_notify(3) is a datagram to the socket that NOTIFY_SOCKET names. Nothing is sent where that is unset."""
import contextlib
import getpass
import os
import re
import socket
import sys
import time

from edge.command import say
from edge.errors import UsageError
from edge.sinks import is_film, is_page
from edge.sources import uri
from jetson import memory

BEAT_S = 1.0         # between two signs of life
WATCHDOG_S = 60      # without one, systemd ends us: longer than any one call of an engine
START_S = 900        # for loading: the first load of a large model is tried in a child
RESTART_S = 2        # what Argus needs to let go of a sensor
STOP_S = 20          # to end videos and let go of cameras
RESERVE_MIB = 512    # of the machine's memory that the service may not have: kernel, ssh, journal, nvargus-daemon
UNIT, INPUT_FILE, INPUT_VARIABLE = "/etc/systemd/system/edge-run.service", "/etc/edge-run.env", "NANOPATCH_INPUT"
NOT_AGAIN = "2 7"    # wrong usage and an engine of another device do not change by trying again; all else may,
NOT_AGAIN_FILES = "2 5 7"  # but not damaged files
PLAIN = re.compile(r"^[\w@+=:,./-]+$", re.ASCII)

_last_beat_s = [-BEAT_S]


def notify(*lines):
    """Send "READY=1", "STATUS=text" and the like to the service manager, if there is one. Never raises, never waits."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto("\n".join(line.replace("\n", " ") for line in lines).encode("utf-8", "replace"), socket.MSG_DONTWAIT, address)
    except OSError:
        pass  # the next one may arrive; without any the watchdog acts


def alive():
    """A sign of life, at most every BEAT_S. Call it where work goes on, in the thread that works: not from one of its own,
    which would beat on while an engine hangs."""
    now_s = time.monotonic()
    if now_s - _last_beat_s[0] >= BEAT_S:
        _last_beat_s[0] = now_s
        notify("WATCHDOG=1")


def is_ours():
    """Whether a service manager started this process."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


@contextlib.contextmanager
def running(text):
    """Ready when the block begins, stopping when it ends."""
    notify("READY=1", "STATUS=" + text)
    try:
        yield
    finally:
        notify("STOPPING=1")


def quoted(word, expands=True):
    """A word of ExecStart= or Environment= by systemd's rules. expands: whether $ is special there."""
    word = word.replace("%", "%%")
    if PLAIN.match(word):
        return word
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$" if expands else "$")
    return '"%s"' % re.sub(r"[\x00-\x1f\x7f]", lambda match: "\\x%02x" % ord(match.group()), word)


def absolute_input(text):
    """An input as it is understood from any folder."""
    place = uri.parse(text)
    return os.path.abspath(place.where) if place.kind in ("file", "stills") else text


def words_of(config, left_out):
    """The flags that make `config`, a NamedTuple with defaults; those of `left_out` and of default values are not among them."""
    words = []
    for name, default in config._field_defaults.items():
        value, flag = getattr(config, name), name.replace("_", "-")
        if value != default and name not in left_out:
            words += ["--" + flag if value else "--no-" + flag] if isinstance(default, bool) else ["--" + flag, str(value)]
    return words


def memory_most_mib(text, root="/"):
    """MiB that the service may hold: of --memory-max, or the machine's without a reserve. Raises UsageError."""
    if text:
        try:
            return memory.parse_bytes(text) >> 20 or 1
        except ValueError as exc:
            raise UsageError("--memory-max: %s" % exc) from exc
    total = memory.field_mib(memory.read_text(os.path.join(root, "proc/meminfo")), "MemTotal")
    if total is None:
        raise UsageError("this machine does not say how much memory it has; give --memory-max, such as 3GiB")
    return int(max(total - RESERVE_MIB, total / 2))


def user():
    """Whose service it is: who typed the command, behind sudo too. Raises UsageError for root."""
    name = os.environ.get("SUDO_USER") if os.getuid() == 0 else getpass.getuser()
    if not name or name == "root":
        raise UsageError("--write-service: the service must not run as root. Type the command as the user that shall run it, one of "
                         "the group video")
    return name


def check_output(output):
    """Raise UsageError where results cannot be written. output: an absolute path."""
    folder = output
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.access(folder, os.W_OK):
        raise UsageError("--output %s: %s cannot be written by this user; expected a place that can, such as %s"
                         % (output, folder, os.path.join(os.path.expanduser("~"), "edge")))


def is_seen(config):
    """Whether there is a live page that other machines see."""
    from edge.sinks.live import LOOPBACK, parse_address  # a server costs nothing where there is none
    address = config.live or config.output
    return is_page(address) and parse_address(address)[0].lower() not in LOOPBACK


def unit(config, hidden, machine=None, root="/"):
    """Text of the unit that runs edge-run as `config` says, an EdgeConfig with absolute paths. hidden: the input is read from
    INPUT_FILE. machine: of os.uname(), such as 'aarch64'. Raises UsageError."""
    kind = uri.parse(config.input).kind
    words = words_of(config, ("write_service", "memory_max", "update") + (("input",) if hidden else ()))
    seen = is_seen(config)
    wants = " ".join(["nvargus-daemon.service"] * (kind == "csi") + ["network-online.target"] * (kind == "rtsp" or seen))
    environment = [("PYTHONPATH", os.environ.get("PYTHONPATH")), ("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME")),
                   # without it numpy dies of an illegal instruction on a Nano
                   ("OPENBLAS_CORETYPE", "ARMV8" if (machine or os.uname().machine) == "aarch64" else None)]
    limit = "%dM" % memory_most_mib(config.memory_max, root)
    old_groups = any(version == 1 for version, _folder in memory.control_groups(root=root))
    lines = ["[Unit]", "Description=nanopatch edge-run", "StartLimitIntervalSec=0"]  # a lost camera is waited for without end
    lines += ["%s=%s" % (key, wants) for key in ("Wants", "After") if wants]
    lines += ["", "[Service]", "Type=notify", "User=%s" % user(), "WorkingDirectory=%s" % os.getcwd().replace("%", "%%")]
    lines += ["Environment=" + quoted("%s=%s" % (name, value), expands=False) for name, value in environment if value]
    # the page's token may be there, so that it outlives a restart
    lines += ["EnvironmentFile=%s%s" % ("" if hidden else "-", INPUT_FILE)] if hidden or seen else []
    lines += ["ExecStart=" + " ".join([quoted(sys.executable, expands=False), "-m", "edge.cli"] + [quoted(word) for word in words]),
              # files come to an end that is no fault
              "Restart=%s" % ("on-failure" if kind in ("file", "stills") else "always"), "RestartSec=%d" % RESTART_S,
              "RestartPreventExitStatus=" + (NOT_AGAIN_FILES if kind in ("file", "stills") else NOT_AGAIN), "SuccessExitStatus=143", "TimeoutStartSec=%d" % START_S,
              "WatchdogSec=%d" % WATCHDOG_S, "KillSignal=SIGTERM",
              "KillMode=mixed",  # GStreamer must outlive the signal: it has a video to end
              "TimeoutStopSec=%d" % STOP_S, "MemoryMax=" + limit]
    lines += ["MemoryLimit=" + limit] if old_groups else []  # JetPack 4: systemd 237 on control groups of version 1
    # no PrivateTmp (Argus' socket is in /tmp), no PrivateDevices (cameras, GPU), no MemoryDenyWriteExecute (CUDA compiles)
    lines += ["LimitCORE=0", "NoNewPrivileges=yes", "ProtectSystem=full", "ProtectControlGroups=yes", "",
              "[Install]", "WantedBy=multi-user.target"]
    return "\n".join(lines) + "\n"


def write(config, hidden):
    """Print the unit, and on stderr what to type to install it. As unit()."""
    config = config._replace(engine=os.path.abspath(config.engine), input=absolute_input(config.input))
    if config.output != "-" and "://" not in config.output:
        config = config._replace(output=os.path.abspath(config.output))
        check_output(config.output)
        say("note: %s with every start; --output - keeps the lines of results in the journal" % (
            "a video of the start before is kept, and the new one gets a name with the date" if is_film(config.output) else
            "results begin anew, masks too"))
    text = unit(config, hidden)
    sys.stdout.write(text)
    sys.stdout.flush()
    steps = ["put the text above there: the same command | sudo tee %s" % UNIT]
    if hidden:
        steps.insert(0, "sudo sh -c 'umask 077; cat > %s'   # then type %s='%s' with the password, and Ctrl-D; only root reads it"
                     % (INPUT_FILE, INPUT_VARIABLE, uri.parse(config.input).shown))
    if is_seen(config):
        steps.insert(0, "sudo sh -c 'umask 077; cat >> %s'   # then type NANOPATCH_TOKEN= and 16 characters or more, and Ctrl-D; without "
                     "it the page asks for another token after every start" % INPUT_FILE)
    say("\n".join(["to install it:"] + ["  " + step for step in steps + [
        "sudo systemctl daemon-reload", "sudo systemctl enable --now edge-run"]]))
