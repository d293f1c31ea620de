"""Memory as the kernel counts it. Standard library only."""
import os
import re

from jetson.board import integer

UNITS = {"": 1, "B": 1, "KB": 10 ** 3, "MB": 10 ** 6, "GB": 10 ** 9, "TB": 10 ** 12,
         "KIB": 2 ** 10, "MIB": 2 ** 20, "GIB": 2 ** 30, "TIB": 2 ** 40, "K": 2 ** 10, "M": 2 ** 20, "G": 2 ** 30}


def parse_bytes(text):
    """'4GB' (10^9), '512MiB' (2^20), '1.5G' (2^30), '4000000000' -> bytes, int. Raises ValueError saying what is wrong."""
    match = re.match(r"^\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([a-zA-Z]*)\s*$", text)
    if not match or match.group(2).upper() not in UNITS:
        raise ValueError("%r is no amount of memory; expected a number and a unit, such as 4GB, 512MiB or 1.5G" % text)
    size = int(float(match.group(1)) * UNITS[match.group(2).upper()])
    if size <= 0:
        raise ValueError("%r is nothing; expected more than 0, such as 4GB" % text)
    if size < 1 << 10 and not match.group(2):
        raise ValueError("%r is a few bytes; expected a unit, such as %sGB" % (text, match.group(1)))
    return size


def field_mib(text, key):
    """One field, such as VmHWM or MemAvailable, of the text of /proc/PID/status or /proc/meminfo. MiB, or None."""
    for line in text.splitlines():
        if line.startswith(key + ":"):
            try:
                return float(line.split()[1]) / 1024  # the kernel writes kB
            except (IndexError, ValueError):
                return None
    return None


def read_text(path):
    """The text of a small file; '' when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


_before_reset = [0.0]  # MiB


def peak_rss_mib(since_reset=False):
    """Largest resident set of this process so far, or since reset_peak(), in MiB (VmHWM: file-backed pages counted).
    None off Linux."""
    peak = field_mib(read_text("/proc/self/status"), "VmHWM")
    return peak if since_reset or peak is None else max(peak, _before_reset[0])


def reset_peak():
    """Begin the peak anew from what is resident now. False where the kernel does not let us."""
    before = peak_rss_mib()
    try:
        with open("/proc/self/clear_refs", "w") as handle:
            handle.write("5")
    except OSError:
        return False
    _before_reset[0] = before or 0.0
    return True


def rss_mib():
    """Resident set of this process now, in MiB. None off Linux."""
    return field_mib(read_text("/proc/self/status"), "VmRSS")


def limit_mib():
    """What this machine, or the control group this process is in, may hold in MiB: the smaller of MemTotal and the
    group's limit (version 1 or 2). None off Linux."""
    total = field_mib(read_text("/proc/meminfo"), "MemTotal")
    return min([mib for _folder, mib in _groups()] + ([] if total is None else [total]), default=None)


def control_groups(process="self", root="/"):
    """The memory control group of a process and all above it, the nearest first: list of (version 1 or 2, folder)."""
    found = []
    for line in read_text(os.path.join(root, "proc", str(process), "cgroup")).splitlines():
        kinds, _, group = line.partition(":")[2].partition(":")
        if kinds and "memory" not in kinds.split(","):
            continue
        top = "/sys/fs/cgroup/memory" if kinds else "/sys/fs/cgroup"
        folder = os.path.normpath(top + "/" + group)
        while len(folder) >= len(top):
            found.append((1 if kinds else 2, folder))
            folder = os.path.dirname(folder)
    return found


def _groups(root="/"):
    """(folder, limit in MiB) of those of our control groups that have a limit."""
    read = [(folder, read_text(_below(root, folder, "memory.limit_in_bytes" if version == 1 else "memory.max")).strip())
            for version, folder in control_groups(root=root)]
    return [(folder, int(text) / 2.0 ** 20) for folder, text in read if re.match("[0-9]{1,19}$", text)]


def _below(root, folder, name):
    return os.path.join(root, folder.lstrip("/"), name)


def rooms_mib(root="/"):
    """What can still be taken, of the machine and of each of our control groups with a smaller limit: list of (left, limit) in
    MiB. Page cache counts as left, for the kernel drops it first. What cannot be read is left out; never raises."""
    info = read_text(os.path.join(root, "proc/meminfo"))
    total = field_mib(info, "MemTotal")
    found = [(field_mib(info, "MemAvailable"), total)]
    for folder, limit in [(folder, limit) for folder, limit in _groups(root) if total is None or not limit >= total]:
        used = [integer(read_text(_below(root, folder, name)).strip()) for name in ("memory.usage_in_bytes", "memory.current")]
        stat = dict(line.partition(" ")[::2] for line in read_text(_below(root, folder, "memory.stat")).splitlines())
        cache = sum(integer(stat.get("total_" + name, stat.get(name))) or 0 for name in ("inactive_file", "active_file"))
        found += [(max(0.0, limit - (count - cache) / 2.0 ** 20), limit) for count in used if count is not None]
    return [(left, limit) for left, limit in found if None not in (left, limit) and left >= 0 < limit]


def in_use_mib():
    """What others hold of limit_mib() now: of the control group that sets the limit, else of the machine; page cache
    that the kernel can drop, and this process, not counted. None off Linux."""
    info = read_text("/proc/meminfo")
    total, available, own = field_mib(info, "MemTotal"), field_mib(info, "MemAvailable"), rss_mib()
    if None in (total, available, own):
        return None
    group, limit = min(_groups(), key=lambda pair: pair[1], default=(None, total))
    if limit < total:
        stat = dict(line.split()[:2] for line in read_text(os.path.join(group, "memory.stat")).splitlines())
        return max(0.0, int(stat.get("total_rss", stat.get("anon", 0))) / 2.0 ** 20 - own)
    return max(0.0, total - available - own)


def oom_kills():
    """How often the kernel has killed for want of memory so far. A dict name -> count: this control group and those above it;
    the whole machine where no group says (what others suffer on a shared machine is not ours); empty where the kernel does
    not say at all (before Linux 4.13, as on the Nano)."""
    files = [os.path.join(folder, name) for folder, _mib in _groups() for name in ("memory.oom_control", "memory.events")]
    counts = {path: _counter(path, "oom_kill") for path in files}
    said = {path: count for path, count in counts.items() if count is not None}
    machine = _counter("/proc/vmstat", "oom_kill")
    return said or ({} if machine is None else {"machine": machine})


def _counter(path, key):
    for line in read_text(path).splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == key and words[1].isdigit():
            return int(words[1])
    return None
