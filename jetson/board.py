"""What the files below a root directory say about the board. Standard library only.

Any file may be missing, unreadable or nonsense: the fact is then None (or an empty list or dict), never an exception.
No root rights, no process started, nothing written."""
import errno
import glob
import itertools
import os
import re

# first L4T release of every JetPack; a release between two lines belongs to the line before it
JETPACKS = [("32.4.2", "4.4 DP"), ("32.4.3", "4.4"), ("32.4.4", "4.4.1"), ("32.5.0", "4.5"), ("32.5.1", "4.5.1"),
            ("32.6.1", "4.6"), ("32.7.1", "4.6.1"), ("32.7.2", "4.6.2"), ("32.7.3", "4.6.3"), ("32.7.4", "4.6.4"),
            ("32.7.5", "4.6.5"), ("32.7.6", "4.6.6"), ("34.1.0", "5.0 DP"), ("34.1.1", "5.0.1 DP"),
            ("35.1.0", "5.0.2"), ("35.2.1", "5.1"), ("35.3.1", "5.1.1"), ("35.4.1", "5.1.2"), ("35.5.0", "5.1.3"),
            ("35.6.0", "5.1.4"), ("35.6.1", "5.1.5"), ("35.6.4", "5.1.6"), ("36.2.0", "6.0 DP"), ("36.3.0", "6.0"),
            ("36.4.0", "6.1"), ("36.4.3", "6.2"), ("36.4.4", "6.2.1"), ("36.5.0", "6.2.2"), ("38.2.0", "7.0"),
            ("38.4.0", "7.1"), ("39.2.0", "7.2")]
NEWER = "newer than this program knows"
DESKTOPS = {"Xorg", "Xwayland", "gnome-shell", "lxsession", "gdm3", "lightdm"}
KERNEL_LOG = "/var/log/kern.log"
OVER_CURRENT = re.compile("soctherm: OC ALARM|throttled due to over-current", re.I)
_GPU = re.compile(r"gpu|g[pvab]1[0-9]b")  # 57000000.gpu, 17000000.ga10b, gpu-gpc-0


def read(root, path, limit=1 << 20, tail=False):
    """Printable ASCII text of the first (tail: last) `limit` bytes of a file below root, stripped, or None."""
    try:
        # a pipe that stands where a file should be must not block us
        with open(_below(root, path), "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as handle:
            if tail:
                handle.seek(max(0, os.fstat(handle.fileno()).st_size - limit))
            data = handle.read(limit) or b""
    except (OSError, ValueError):
        return None
    return _printable(data.rstrip(b"\0\n ").decode("ascii", "replace"))


def line(root, path):
    """The first line of a short file, or None when it is absent or empty."""
    return (read(root, path, 200) or "").split("\n")[0].replace("\t", " ").strip() or None


def inside(root, path, follow=True):
    """Where a path of the system below root lies on this machine. Links lead where they would on the board, never out of the root.
    follow: the last name too. Raises OSError for links that go in circles."""
    done, left, hops = [], path.strip("/").split("/")[::-1], 0
    while left:
        name = left.pop()
        here = os.path.join(root, *(done + [name]))
        if name == "..":
            done = done[:-1]
        elif (left or follow) and os.path.islink(here):
            hops += 1
            if hops > 40:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = os.readlink(here)
            done = [] if target.startswith("/") else done
            left += target.split("/")[::-1]
        elif name not in ("", "."):
            done.append(name)
    return os.path.join(root, *done)


def _below(root, path):
    return path if root == "/" else inside(root, path)


def _printable(text):
    """Bytes that are not for a terminal become '?': these texts end up on one, and in JSON."""
    return re.sub(r"[^\n\t -~]", "?", text).strip()


def _paths(root, pattern):
    """Sorted paths below root that match, written as seen from root."""
    names = pattern.split("/")
    fixed = "/".join(itertools.takewhile(lambda name: not glob.has_magic(name), names))
    try:
        here = _below(root, fixed)
    except OSError:
        return []
    return sorted(fixed + path[len(here):] for path in glob.glob(glob.escape(here) + pattern[len(fixed):]))


def integer(text):
    """A whole number of a kernel file, or None."""
    return int(text) if text and re.fullmatch(r"-?[0-9]{1,18}", text) else None


def model(root="/"):
    """The board's own name, or None off a device tree."""
    return line(root, "/proc/device-tree/model")


def l4t(root="/"):
    """The L4T release as '32.7.1', or None."""
    match = re.match(r"# R(\d{1,4}) \(release\), REVISION: (\d{1,4}(?:\.\d{1,4}){0,2})\b",
                     read(root, "/etc/nv_tegra_release", 1000) or "")
    if match:
        return ".".join(match.groups())
    packages = read(root, "/var/lib/dpkg/status", 1 << 25) or ""
    match = re.search(r"^Package: nvidia-l4t-core\n(?:.+\n)*?Version: (\d{1,4}(?:\.\d{1,4}){1,3})\b", packages, re.M)
    return match.group(1) if match else None


def version(text):
    """'4.6.1' as (4, 6, 1), for comparing; words such as DP are left out. None: ()."""
    return tuple(int(word) for word in re.findall(r"[0-9]{1,9}", text or ""))


def jetpack(release):
    """The JetPack that an L4T release belongs to: its name, NEWER, or None for no release or one before 4.4."""
    name = None
    for first, line in JETPACKS:
        if release and version(release) + (0, 0) >= version(first):
            name = line
    last = version(JETPACKS[-1][0])
    return NEWER if name == JETPACKS[-1][1] and version(release)[:2] > last[:2] else name


def is_jetson(root="/"):
    """Is this a Jetson, as far as files tell? A release file counts, for containers may hide the device tree."""
    names = "%s %s" % (model(root), read(root, "/proc/device-tree/compatible", 1000))
    return bool(re.search("jetson|tegra", names, re.I)) or bool(_paths(root, "/etc/nv_tegra_release"))


def meminfo(root="/"):
    """Dict of /proc/meminfo, kB; NvMapMemUsed (memory the GPU holds) is there on some kernels only."""
    lines = re.findall(r"^(\w{1,40}):\s+(\d{1,15}) kB", read(root, "/proc/meminfo") or "", re.M)
    wanted = ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree", "NvMapMemUsed")
    return {name: int(value) for name, value in lines if name in wanted}


def swaps(root="/"):
    """List of {name, kind: zram|file|partition, size_kb, used_kb}; None when /proc/swaps cannot be read."""
    text = read(root, "/proc/swaps")
    if text is None or not text.startswith("Filename"):
        return None
    rows = re.findall(r"^(\S+)\s+(file|partition)\s+(\d{1,15})\s+(\d{1,15})\s", text, re.M)
    return [{"name": name, "kind": "zram" if "/zram" in name else kind, "size_kb": int(size), "used_kb": int(used)}
            for name, kind, size, used in rows]


def power_modes(root="/", path="/etc/nvpmodel.conf"):
    """List of {id, name, gpu_hz, cores}: the modes of nvpmodel's config. gpu_hz: the highest GPU clock allowed, None
    when the mode sets none (then the hardware's own limit holds); cores: how many are on, None when not said."""
    modes = []
    blocks = re.split(r"^\s*<\s*POWER_MODEL\b", read(root, path) or "", flags=re.M)[1:]
    for block in blocks:
        head = re.match(r"[^>\n]*\bID=(\d{1,4})\b[^>\n]*\bNAME=([^\s>]{1,60})", block)
        if head:
            body = block.split("\n<")[0]
            clock = re.search(r"^\s*GPU\s+MAX_FREQ\s+(\d{2,15})\s*$", body, re.M)
            cores = re.findall(r"^\s*CPU_ONLINE\s+CORE_\d+\s+([01])\s*$", body, re.M)
            modes.append({"id": int(head.group(1)), "name": head.group(2), "cores": cores.count("1") or None,
                          "gpu_hz": int(clock.group(1)) if clock else None})
    return modes


def power_mode(root="/"):
    """The entry of power_modes that is active ({id} alone when the config does not name it), or None."""
    match = re.search(r"\bpmode:(\d{1,6})\b", read(root, "/var/lib/nvpmodel/status", 1000) or "")
    if not match:
        return None
    number = int(match.group(1))
    return next((mode for mode in power_modes(root) if mode["id"] == number), {"id": number})


def clocks(root="/", wanted=("now", "low", "high", "top")):
    """{'gpu': ..., 'cpu0': ...}: {now, low, high, top} in kHz or None. The clock floats between low and high; top: the
    hardware's own limit. wanted: those to read; on some kernels `now` of a CPU takes milliseconds."""
    found = {}
    for folder in _paths(root, "/sys/class/devfreq/*"):
        if _GPU.search(os.path.basename(folder)):
            files = {"now": "cur_freq", "low": "min_freq", "high": "max_freq", "top": "available_frequencies"}
            rows = [[integer(word) for word in (read(root, "%s/%s" % (folder, files[name])) or "").split()] for name in wanted]
            most = [max([hz for hz in row if hz] or [0]) // 1000 or None for row in rows]
            found.setdefault("gpu", dict(zip(wanted, most)))
    for folder in _paths(root, "/sys/devices/system/cpu/cpu[0-9]*/cpufreq"):
        files = {"now": "scaling_cur_freq", "low": "scaling_min_freq", "high": "scaling_max_freq", "top": "cpuinfo_max_freq"}
        found[os.path.basename(os.path.dirname(folder))] = {
            name: integer(line(root, "%s/%s" % (folder, files[name]))) for name in wanted}
    return found


def gpu_load(root="/"):
    """Load of the GPU now, percent, or None."""
    for pattern in ("/sys/devices/gpu.0/load", "/sys/devices/platform/gpu.0/load", "/sys/class/devfreq/*/device/load"):
        for path in _paths(root, pattern):
            value = integer(line(root, path))
            if value is not None and 0 <= value <= 1000 and _GPU.search(path):
                return value / 10
    return None


def zones(root="/", with_trips=True):
    """List of {name, celsius, trips: {kind: celsius}}; of several trip points of a kind the lowest. Left out: sensors
    that are off, and PMIC, a constant. Trip points are most of the reading; without them trips is {}."""
    found = []
    for folder in _paths(root, "/sys/class/thermal/thermal_zone*"):
        name, now = line(root, folder + "/type"), integer(line(root, folder + "/temp"))
        if not name or now is None or now <= -256000 or "pmic" in name.lower():
            continue
        trips = {}
        for path in _paths(root, folder + "/trip_point_*_temp") if with_trips else ():
            kind = line(root, path[:-len("temp")] + "type")
            limit = integer(line(root, path))
            if kind and limit is not None and limit > 0:
                trips[kind] = min(limit / 1000, trips.get(kind, limit / 1000))
        found.append({"name": name, "celsius": now / 1000, "trips": trips})
    return found


def rails(root="/"):
    """List of {name, millivolt, milliwatt} of the board's power meter (INA3221), as far as it can be read."""
    found = []
    for path in _paths(root, "/sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*"):  # JetPack 4
        folder, index = os.path.split(path)[0], path.rsplit("_", 1)[1]
        found.append((path, integer(line(root, "%s/in_voltage%s_input" % (folder, index))),
                      integer(line(root, "%s/in_power%s_input" % (folder, index)))))
    for path in _paths(root, "/sys/class/hwmon/hwmon*/in*_label"):  # JetPack 5 and later
        if line(root, os.path.dirname(path) + "/name") != "ina3221":
            continue
        folder, index = os.path.split(path)[0], re.sub("[^0-9]", "", os.path.basename(path))
        volt, ampere = (integer(line(root, "%s/%s%s_input" % (folder, kind, index))) for kind in ("in", "curr"))
        found.append((path, volt, volt * ampere // 1000 if volt is not None and ampere is not None else None))
    return [{"name": line(root, path), "millivolt": volt, "milliwatt": watt} for path, volt, watt in found
            if line(root, path) and volt is not None]


def over_currents(root="/"):
    """{'oc1': count, ...} of throttling by the power supply since boot, as far as it can be read. On Orin oc1 is too low a
    voltage, oc2 and oc3 too high a current."""
    found = {_printable(os.path.basename(path).split("_")[0]): integer(line(root, path))
             for path in _paths(root, "/sys/class/hwmon/hwmon*/oc*_event_cnt")}
    return {name: count for name, count in found.items() if count is not None}


def last_over_current(root="/"):
    """The last line about throttling by the power supply within the last 4 KiB of the kernel's log, or None."""
    lines = (read(root, KERNEL_LOG, 1 << 12, tail=True) or "").split("\n")
    return next((text for text in reversed(lines) if OVER_CURRENT.search(text)), None)


def alarms(root="/"):
    """over_currents(), and from the end of the kernel's log, which may be older than the boot: 'log' (lines of such
    throttling), 'killed' (processes killed for want of memory). What cannot be read is left out."""
    found = over_currents(root)
    log = read(root, KERNEL_LOG, 1 << 18, tail=True)
    if log is not None:
        found["log"] = len(OVER_CURRENT.findall(log))
        found["killed"] = len(re.findall("out of memory: Kill", log, re.I))  # a control group's too
    return found


def target(root="/"):
    """The default systemd target: 'graphical.target' (a desktop), 'multi-user.target' (none), or None."""
    for path in ("/etc/systemd/system/default.target", "/lib/systemd/system/default.target"):
        try:
            return _printable(os.path.basename(os.readlink(inside(root, path, follow=False)))) or None
        except OSError:
            pass
    return None


def processes(root="/"):
    """Set of the names of running processes, each cut to 15 characters by the kernel."""
    return {name for name in (line(root, path) for path in _paths(root, "/proc/[0-9]*/comm")) if name}


def cameras(root="/"):
    """Dict '/dev/videoN' -> the driver's name for it."""
    names = {path: line(root, path) for path in _paths(root, "/sys/class/video4linux/video*/name")}
    return {"/dev/" + _printable(path.split("/")[-2]): name for path, name in names.items() if name}


def gpu_devices(root="/"):
    """Dict of the GPU's device files that exist -> may this user open them?"""
    paths = [path for name in ("nvmap", "nvhost-gpu", "nvhost-ctrl", "nvhost-ctrl-gpu", "nvgpu/igpu0/ctrl")
             for path in _paths(root, "/dev/" + name)]
    return {path: os.access(_below(root, path), os.R_OK | os.W_OK) for path in paths}


def disk(path):
    """{total_mb, free_mb, read_only} of the file system that holds path, or None; free: what this user may take."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    block = found.f_frsize / (1 << 20)
    return {"total_mb": int(found.f_blocks * block), "free_mb": int(found.f_bavail * block),
            "read_only": bool(found.f_flag & os.ST_RDONLY)}


def disk_wear(root="/"):
    """Dict of eMMC device -> percent of its rated life used at most (tens; 110: over). SD cards do not tell: {}."""
    found = {}
    for path in _paths(root, "/sys/block/mmcblk*/device/life_time"):
        steps = [int(word, 16) for word in re.findall(r"\b0x([0-9a-fA-F]{1,2})\b", line(root, path) or "")]
        if steps and 0 < max(steps) <= 11:  # 0: not defined
            found[_printable(path.split("/")[3])] = 10 * max(steps)
    return found


def cuda(root="/"):
    """{version or None, nvcc: path or None} of the CUDA toolkit in its usual place."""
    text = "%s %s" % (read(root, "/usr/local/cuda/version.txt", 1000), read(root, "/usr/local/cuda/version.json", 1000))
    match = re.search(r'(?:CUDA Version |"cuda"[^}]*"version"\s*:\s*")(\d{1,4}(?:\.\d{1,4}){1,2})', text)
    nvcc = _paths(root, "/usr/local/cuda/bin/nvcc")
    return {"version": match.group(1) if match else None, "nvcc": nvcc[0] if nvcc else None}


def facts(root="/"):
    """All of the above as one dict that JSON can hold. Keys: the names of the functions."""
    release = l4t(root)
    return {"is_jetson": is_jetson(root) or release is not None, "model": model(root), "l4t": release,
            "jetpack": jetpack(release), "meminfo_kb": meminfo(root), "swaps": swaps(root),
            "power_mode": power_mode(root), "power_modes": power_modes(root), "clocks_khz": clocks(root),
            "gpu_load": gpu_load(root), "zones": zones(root), "rails": rails(root), "alarms": alarms(root),
            "target": target(root),
            "desktop": sorted(DESKTOPS & processes(root)), "argus": "nvargus-daemon" in processes(root),
            "cameras": cameras(root), "gpu_devices": gpu_devices(root), "disk": disk(root),
            "disk_wear_percent": disk_wear(root), "cuda": cuda(root)}
