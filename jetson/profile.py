"""Run a command and record what memory it takes, phase by phase: samples.csv, summary.json, memory.png.

RSS counts a page once for each process that maps it, PSS once in all. Neither sees what a Jetson's GPU holds, which
comes out of the same memory: the fall of MemAvailable since before the start does, NvMapMemUsed tells it apart. The
watch ends with the command, not with what it leaves running. Exit code: the command's; 128 + n when signal n killed
it."""
import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from typing import NamedTuple

from edge.command import banner, guarded, held, on_signals, parse, say, written
from edge.errors import BadFile, UsageError
from jetson import board, memory, tegrastats
from jetson.phases import VARIABLE
from jetson.timeline import draw


class ProfileConfig(NamedTuple):
    out: str = ""
    interval: int = 50  # ms
    json: bool = False
    debug: bool = False


HELPS = {
    "out": "folder for samples.csv, summary.json and memory.png; none: runs/profile/TIME",
    "interval": "milliseconds from sample to sample, 10 to 1000",
    "json": "print the summary on stdout; what the command itself prints there goes to stderr then",
    "debug": "show the traceback of an error",
}
EXAMPLE = "python -m jetson profile -- python -m train_lite --res 1024"
ABOUT = "Run a command and record what memory it takes, phase by phase. Flags, then -- and the command: " + EXAMPLE
SOURCES = {  # a column of samples.csv -> where it comes from
    "rss_mib": "VmRSS of /proc/PID/status, sum over the processes",
    "hwm_mib": "VmHWM of /proc/PID/status, the largest process: the kernel's own peak; of one that ends between samples, ru_maxrss",
    "pss_mib": "Pss of /proc/PID/smaps_rollup or smaps, sum over the processes; read less often",
    "available_drop_mib": "MemAvailable of /proc/meminfo, fall since the baseline: the whole machine",
    "swap_mib": "SwapTotal - SwapFree of /proc/meminfo, rise since the baseline: the whole machine",
    "nvmap_mib": "NvMapMemUsed of /proc/meminfo, rise since the baseline: what all processes hold of the GPU's",
    "gpu_mib": "/sys/kernel/debug/nvmap/iovmm/clients (for root), sum over the processes",
    "gpu_percent": "GR3D_FREQ of tegrastats",
    "tegrastats_ram_mib": "RAM of tegrastats, the whole machine; no baseline taken off",
}
COLUMNS = ["seconds", "phase", "processes"] + list(SOURCES)
FIRST = "(start)"  # the phase before the first mark
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def tree(top, known, root="/"):
    """PIDs of `top`, of its descendants and of what else is in its session. known: dict PID -> ours?, kept from call
    to call: strangers are read once, and one of ours stays ours when its parent dies."""
    alive = {int(name) for name in os.listdir(os.path.join(root, "proc")) if re.match("[0-9]+$", name)}
    for pid in set(known) - alive:
        del known[pid]
    known[top] = True
    new = {}
    for pid in alive - set(known):
        # state, parent, group, session; the name before them may hold brackets and spaces itself
        words = memory.read_text(os.path.join(root, "proc", str(pid), "stat")).rpartition(")")[2].split()
        if len(words) > 3:
            new[pid] = board.integer(words[1]), board.integer(words[3])
    found = True
    while found:
        found = {pid: True for pid, (parent, session) in new.items()
                 if pid not in known and (session == top or known.get(parent))}
        known.update(found)
    known.update({pid: False for pid in new if pid not in known})
    return sorted(pid for pid, ours in known.items() if ours)


def process(pid, root="/"):
    """(name, RSS, VmHWM in MiB) of a process, None when it is gone."""
    text = memory.read_text(os.path.join(root, "proc", str(pid), "status"))
    rss, hwm = memory.field_mib(text, "VmRSS"), memory.field_mib(text, "VmHWM")
    return None if rss is None else (_clean(text.split("\n")[0].partition(":")[2]), rss, hwm or rss)


def pss_mib(pid, root="/"):
    """Share of a process in the memory it maps, MiB; None when it is gone or not ours to read."""
    folder = os.path.join(root, "proc", str(pid))
    rollup = memory.field_mib(memory.read_text(os.path.join(folder, "smaps_rollup")), "Pss")
    if rollup is not None:
        return rollup
    parts = re.findall(r"^Pss:\s+(\d{1,12}) kB", memory.read_text(os.path.join(folder, "smaps")), re.M)  # before 4.14
    return sum(map(int, parts)) / 1024 if parts else None


def machine(root="/"):
    """Dict of available, swap, nvmap: MiB of the whole machine, None where the kernel does not say."""
    info = board.meminfo(root)
    found = {"available": info.get("MemAvailable"), "nvmap": info.get("NvMapMemUsed"),
             "swap": info["SwapTotal"] - info["SwapFree"] if {"SwapTotal", "SwapFree"} <= set(info) else None}
    return {name: None if kb is None else kb / 1024 for name, kb in found.items()}


def gpu_clients(root="/"):
    """Dict PID -> MiB of the GPU's memory that it holds; None without root, and off a Jetson."""
    text = board.read(root, "/sys/kernel/debug/nvmap/iovmm/clients")
    if text is None:
        return None
    found = {}
    for pid, size, unit in re.findall(r"^\s*\S+\s+\S.*?\s(\d{1,9})\s+(\d{1,12})([KMG]?)\s*$", text, re.M):
        found[int(pid)] = found.get(int(pid), 0.0) + int(size) * memory.UNITS[unit] / 2.0 ** 20
    return found


def group_peak(pid, root="/"):
    """(file, MiB): the kernel's peak of the memory control group that a process is in, or of the nearest above that has
    one; page cache and whatever else ran there counted. None without."""
    for version, folder in memory.control_groups(pid, root):
        path = folder + ("/memory.max_usage_in_bytes" if version == 1 else "/memory.peak")
        size = board.integer(board.line(root, path))
        if size is not None:
            return path, size / 2.0 ** 20
    return None


def _clean(text):
    return re.sub("[^ -~]", "?", text.strip())[:60] or "?"  # it ends up on a terminal and in a picture


class Watch:
    """What one command has done so far. top: its PID; start: time.time() when it began; marks: the open file of its
    phases; baseline: machine() before it began."""

    def __init__(self, top, start, interval_s, baseline, marks, root="/"):
        self.top, self.start, self.interval_s, self.baseline = top, start, interval_s, baseline
        self.marks, self.root, self.rest = marks, root, b""
        self.known, self.names, self.owners, self.phases, self.group, self.pss_due = {}, {}, {}, {}, None, 0.0
        self.phase = self._begin(FIRST, 0.0)

    def _begin(self, name, seconds):
        one = self.phases.setdefault(name, {"name": name, "seconds": 0.0, "samples": 0, "peak": {}, "owners": {}})
        one["seconds"] -= seconds  # the end of its stay is added when the next one begins
        return one

    def read_marks(self):
        """Take in the phases that began since the last call. Lines that are no marks are passed over."""
        lines = (self.rest + self.marks.read()).split(b"\n")
        self.rest = lines.pop()  # not yet written to its end
        for line in lines:
            match = re.match(r"([0-9]{1,12}\.[0-9]{1,9}) [0-9]+ (.+)", line.decode("utf-8", "replace"))
            if match:
                seconds = float(match.group(1)) - self.start
                self.phase["seconds"] += seconds
                self.phase = self._begin(_clean(match.group(2)), seconds)

    def sample(self, stats=None):
        """One row of samples.csv, a dict; None: not seen. stats: a tegrastats.Stats, when there is a new one."""
        self.read_marks()  # before memory is read: what a phase takes must not count for the one before it
        pids = tree(self.top, self.known, self.root)
        found = {pid: one for pid, one in ((pid, process(pid, self.root)) for pid in pids) if one}
        # just forked, a process is its parent's pages under its parent's name: it counts from its second sample on
        here = {pid: one for pid, one in found.items() if pid in self.names or one[0] not in self.names.values()}
        self.names = {pid: one[0] for pid, one in found.items()}
        clients, now = gpu_clients(self.root), machine(self.root)
        rise = {name: None if None in (now[name], was) else now[name] - was for name, was in self.baseline.items()}
        row = {"seconds": time.time() - self.start, "phase": self.phase["name"], "processes": len(here),
               "rss_mib": sum(rss for _name, rss, _hwm in here.values()), "pss_mib": None,
               "hwm_mib": max([hwm for _name, _rss, hwm in here.values()], default=0.0),
               "available_drop_mib": rise["available"] and 0.0 - rise["available"],
               "swap_mib": rise["swap"], "nvmap_mib": rise["nvmap"],
               "gpu_mib": None if clients is None else sum(clients.get(pid, 0.0) for pid in here),
               "gpu_percent": stats and stats.gpu_percent, "tegrastats_ram_mib": stats and stats.ram_used_mb}
        begun = time.perf_counter()
        if begun >= self.pss_due:
            parts = [pss_mib(pid, self.root) for pid in here]
            row["pss_mib"] = None if None in parts else sum(parts)  # a part of the sum would be a wrong sum
            self.group = group_peak(self.top, self.root) or self.group
            # the kernel walks all pages for it, and holds the command up meanwhile: at most 2 % of the time
            self.pss_due = begun + max(4.5 * self.interval_s, 50 * (time.perf_counter() - begun))
        self._count(row, here, clients or {})
        return row

    def _count(self, row, here, clients):
        peak = self.phase["peak"]
        if row["rss_mib"] >= peak.get("rss_mib", 0.0):
            self.phase["owners"] = {"%s %d" % (name, pid): rss for pid, (name, rss, _hwm) in here.items()}
            self.phase["owners"].update({} if row["nvmap_mib"] is None else {"GPU": row["nvmap_mib"]})
        peak.update((name, max(row[name], peak.get(name, row[name]))) for name in SOURCES if row[name] is not None)
        self.phase["samples"] += 1
        for pid, (name, rss, hwm) in here.items():
            most = self.owners.get((pid, name), (0.0, 0.0, 0.0))
            self.owners[pid, name] = tuple(map(max, most, (rss, hwm, clients.get(pid, 0.0))))

    def summary(self, end):
        """Dict for summary.json, taken once. end: time.time() when the command had ended. All in MiB and seconds."""
        self.read_marks()
        self.phase["seconds"] += end - self.start
        peaks = [one["peak"] for one in self.phases.values()]
        whole = {name: max([peak[name] for peak in peaks if name in peak], default=None) for name in SOURCES}
        owners = sorted(self.owners.items(), key=lambda pair: -max(pair[1]))[:20]
        return {"seconds": end - self.start, "baseline_mib": self.baseline, "peak": whole,
                "phases": list(self.phases.values()),
                "owners": [{"name": name, "pid": pid, "rss_mib": rss, "hwm_mib": hwm, "gpu_mib": gpu or None}
                           for (pid, name), (rss, hwm, gpu) in owners],
                "control_group": self.group and {"file": self.group[0], "peak_mib": self.group[1]},
                "counters": SOURCES,
                "missing": [text.split(",")[0] for name, text in SOURCES.items() if whole[name] is None]}


@guarded
def main(argv):
    cut = argv.index("--") if "--" in argv else len(argv)
    words = argv[cut + 1:]
    if not words and not {"--help", "-h", "--version"} & set(argv):
        raise UsageError("there is no command to watch after --. Type: " + EXAMPLE)
    config = parse(ProfileConfig, argv[:cut], "python -m jetson profile", ABOUT, HELPS)
    if not 10 <= config.interval <= 1000:
        raise UsageError("--interval is %d, expected 10 to 1000 milliseconds" % config.interval)
    if not shutil.which(words[0]):
        raise UsageError("there is no program %s. Type, for example: %s" % (words[0], EXAMPLE))
    banner("profile", board.model() or "not a Jetson", "none")
    out = config.out
    try:
        out = _new_folder(out)
        table = held(os.path.join(out, "samples.csv"), newline="")
    except BlockingIOError as exc:
        raise UsageError("another profile writes to %s now. Give another folder: --out FOLDER" % out) from exc
    except OSError as exc:
        raise BadFile("cannot write to %s: %s. Give another folder: --out FOLDER" % (out, exc.strerror)) from exc
    summary, problem = run(words, config.interval / 1000, table, 2 if config.json else None)
    try:  # whatever becomes of the files, the figures are shown
        if problem:
            raise problem
        table.close()
        reason = draw(table.name, os.path.join(out, "memory.png"), summary["seconds"])
        summary["missing"] += [reason] if reason else []
        with written(os.path.join(out, "summary.json")) as handle:
            json.dump(summary, handle, indent=1)
    finally:
        _show(summary, out)
        if config.json:
            print(json.dumps(summary))
    return summary["exit_code"]


def _new_folder(asked):
    """Makes the folder that was asked for; none asked for: one that nobody else has."""
    if asked:
        os.makedirs(asked, exist_ok=True)
        return asked
    while True:
        folder = os.path.join("runs", "profile", time.strftime("%Y%m%d-%H%M%S"))
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:  # of one that began in this second
            time.sleep(0.1)


def run(words, interval_s, table, stdout=None):
    """Run a command to its end, whatever becomes of the watch. Rows go to table, an open file. Returns (summary, what stopped the
    rows or None)."""
    signals, problem, rows = [], None, csv.writer(table)
    rows.writerow(COLUMNS)
    meter = _tegrastats(interval_s)
    try:
        with on_signals(lambda got, _frame: signals.append(got), *PASSED_ON), tempfile.NamedTemporaryFile() as marks:
            time.sleep(2 * interval_s)  # tegrastats has begun: it is part of the baseline
            baseline, own_group, start, cpu_s = machine(), group_peak(os.getpid()), time.time(), time.process_time()
            try:  # a session of its own: Ctrl-C in a terminal reaches us only, and is passed on once
                child = subprocess.Popen(words, stdout=stdout, start_new_session=True,
                                         env=dict(os.environ, **{VARIABLE: marks.name}))
            except OSError as exc:
                raise UsageError("cannot run %s: %s. Type: %s" % (words[0], exc.strerror, EXAMPLE)) from exc
            watch, due = Watch(child.pid, start, interval_s, baseline, marks), time.monotonic()
            while child.poll() is None:
                _pass_on(signals, child)
                try:
                    row = watch.sample(_latest(meter))
                    if not problem:
                        rows.writerow(["%.3f" % v if isinstance(v, float) else v for v in map(row.get, COLUMNS)])
                except Exception as exc:  # a full disk ends the rows, not the command
                    problem = exc
                due = max(due + interval_s, time.monotonic())
                time.sleep(max(0.0, due - time.monotonic()))
            summary = watch.summary(time.time())
            _count_ended(summary["peak"])
    finally:
        if meter:
            meter.kill()
            meter.wait()
    if summary["control_group"] and own_group and own_group[0] == summary["control_group"]["file"]:
        summary["control_group"]["before_mib"] = own_group[1]
    samples = sum(one["samples"] for one in summary["phases"])
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode
    return dict(summary, command=words, exit_code=code,
                cost={"cpu_s": time.process_time() - cpu_s, "rss_mib": memory.peak_rss_mib(), "samples": samples,
                      "interval_ms": 1000 * summary["seconds"] / max(samples, 1)}), problem


def _count_ended(peak):
    """The largest process that ended, however short it was. Before it became the command it was a copy of ours: less than that
    says nothing."""
    most, ours = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, memory.peak_rss_mib()
    if ours is not None and most > ours + 1:
        peak["hwm_mib"] = max(most, peak["hwm_mib"] or 0.0)


def _pass_on(signals, child):
    while signals:
        number = signals.pop(0)
        with suppress(OSError):  # another user's (sudo), or over: then there is nothing we can do
            # what a terminal sends goes to a whole process group, the others to the command alone
            (os.killpg if number in (signal.SIGINT, signal.SIGQUIT) else os.kill)(child.pid, number)


def _tegrastats(interval_s):
    """A running tegrastats, or None where there is none."""
    try:
        words = ["tegrastats", "--interval", "%d" % max(100, 1000 * interval_s)]
        meter = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                 start_new_session=True)  # Ctrl-C does not end it before the command
    except OSError:
        return None
    os.set_blocking(meter.stdout.fileno(), False)
    return meter


def _latest(meter):
    """The last whole line that tegrastats printed since the last call, as Stats; None without."""
    lines = ((meter.stdout.read() if meter else None) or b"").split(b"\n")[:-1]
    return tegrastats.parse(lines[-1].decode("ascii", "replace")) if lines else None


def _show(summary, out):
    """The table, on stderr: stdout belongs to the command."""
    columns = ["rss_mib", "pss_mib", "hwm_mib", "available_drop_mib", "swap_mib", "nvmap_mib"]
    say("%-28s %9s %7s " % ("peak, MiB", "seconds", "samples")
        + " ".join("%9s" % title for title in ("RSS", "PSS", "VmHWM", "MemAvail.", "swap", "GPU")))
    whole = dict(summary["cost"], name="all", seconds=summary["seconds"], peak=summary["peak"])
    for one in summary["phases"] + [whole]:
        cells = [one["peak"].get(name) for name in columns]
        say("%-28.28s %9.1f %7d " % (one["name"], one["seconds"], one["samples"])
            + " ".join("%9s" % ("n/a" if cell is None else "%.1f" % cell) for cell in cells))
    say("not seen: %s" % ("; ".join(summary["missing"]) or "nothing; all counters were read"))
    say("the watch took %(cpu_s).2f s of CPU, %(rss_mib).0f MiB; a sample every %(interval_ms).0f ms" % summary["cost"])
    say("exit code %d; the files are in %s" % (summary["exit_code"], out))
