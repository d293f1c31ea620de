"""Look at the board and the installation, change nothing, and name the command that cures what is wrong.

Exit code 0: nothing is bad (warnings are no failure); 2: a check is bad; 5: the --root folder is missing."""
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Dict, NamedTuple, Optional

from edge.command import banner, guarded, parse, say
from edge.errors import BadFile
from jetson import board, tegrastats


class DoctorConfig(NamedTuple):
    root: str = "/"
    json: bool = False
    debug: bool = False


HELPS = {
    "root": "look at the files of a board below this folder; nothing is started then, so packages are not tried",
    "json": "print one JSON object on stdout: board (facts), checks (name, status, found, cure)",
    "debug": "show the traceback of an error",
}
ABOUT = ("Look at the board and the installation and name the command that cures what is wrong. Changes nothing. "
         "Packages are imported in processes of their own, which takes seconds, on a cold SD card up to %d.")


class Check(NamedTuple):
    name: str
    status: str  # ok, warn, bad, unknown
    found: str
    cure: str    # a command to type; empty when there is nothing to cure


class Ran(NamedTuple):
    code: Optional[int]  # None: killed after the time limit; 127: there is no such program; -N: died of signal N
    text: str            # stdout and stderr, ASCII


class Machine(NamedTuple):
    facts: dict           # board.facts
    live: bool            # this very machine, not a folder of its files
    ran: Dict[str, Ran]   # what the probes said; empty unless live


LIMIT_S = 40
PROBES = {  # the slow ones first: four run at a time
    "torch": "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())",
    "tensorrt": "import tensorrt; print(tensorrt.__version__)",
    "onnxruntime": "import onnxruntime; print(onnxruntime.__version__)",
    "onnx": "import onnx; print(onnx.__version__)",
    "pycuda": "import pycuda, pycuda.driver; print(pycuda.VERSION_TEXT)",
    "numpy": "import numpy; print(numpy.__version__)",
    "PIL": "import PIL.Image; print(PIL.__version__)",
    "pip": "import pip; print(pip.__version__)",
}
OLD = sys.version_info < (3, 7)
PIP = "python3 -m pip install "
VENV = "/usr/bin/python3 -m venv --system-site-packages ~/nanopatch && . ~/nanopatch/bin/activate"
ARMV8 = "echo 'export OPENBLAS_CORETYPE=ARMV8' >> ~/.bashrc && export OPENBLAS_CORETYPE=ARMV8"
GOMP = "export LD_PRELOAD=/usr/lib/aarch64-linux-gnu/libgomp.so.1"
APT_LINE = "/etc/apt/sources.list.d/nvidia-l4t-apt-source.list"
UPGRADE = ("sudo sed -i 's/r32\\.[0-9]*/r32.7/' %s && sudo apt update && sudo apt dist-upgrade   # or flash a new card"
           % APT_LINE)
SWAP = ("sudo fallocate -l 4G /mnt/4GB.swap && sudo chmod 600 /mnt/4GB.swap && sudo mkswap /mnt/4GB.swap && "
        "sudo swapon /mnt/4GB.swap && echo '/mnt/4GB.swap none swap sw 0 0' | sudo tee -a /etc/fstab")
NVCC = ("export PATH=/usr/local/cuda/bin:$PATH CPATH=/usr/local/cuda/include:$CPATH "
        "LIBRARY_PATH=/usr/local/cuda/lib64:$LIBRARY_PATH")
ARGUS = "sudo systemctl restart nvargus-daemon"
VIDEO = "sudo usermod -aG video $USER   # then log out and in"
GST = ("sudo apt install gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-good "
       "gstreamer1.0-plugins-bad gstreamer1.0-libav")
GST_JETSON = "sudo apt install nvidia-l4t-gstreamer && rm -rf ~/.cache/gstreamer-1.0"
ELEMENTS = ["filesrc", "qtdemux", "h264parse", "decodebin", "jpegdec", "rtspsrc", "v4l2src", "videoconvert",
            "videotestsrc", "fdsink"]
ELEMENTS_JETSON = ["nvarguscamerasrc", "nvvidconv", "nvv4l2decoder"]
SYSTEM_PYTHON = {4: (3, 6), 5: (3, 8), 6: (3, 10), 7: (3, 12)}  # by JetPack; TensorRT's bindings exist for no other

CHECKS = []  # (name, needs, function), in the order they are shown


def check(name, needs=""):
    """Register a check: function(machine) -> (status, found, cure). needs: words 'jetson' and 'live', without which the
    check is not made."""
    def register(function):
        CHECKS.append((name, needs.split(), function))
        return function
    return register


@check("board")
def _board(m):
    if not m.facts["is_jetson"]:
        return "unknown", "not a Jetson: %s" % (m.facts["model"] or platform.machine()), ""
    return "ok", m.facts["model"] or "a Jetson that does not tell its model", ""


@check("L4T", "jetson")
def _l4t(m):
    if m.facts["l4t"]:
        return "ok", m.facts["l4t"], ""
    return "unknown", "no release that this program can read", ""


@check("JetPack", "jetson")
def _jetpack(m):
    release, name = m.facts["l4t"], m.facts["jetpack"]
    if release is None:
        return "unknown", "cannot be told without the L4T release", ""
    if board.version(release) < (32, 7, 1):
        return "bad", "%s (L4T %s); the first with TensorRT 8.2 is 4.6.1" % (name or "older than 4.4", release), UPGRADE
    return ("unknown" if name == board.NEWER else "ok"), "%s (L4T %s)" % (name, release), ""


@check("Python", "live")
def _python(m):
    have = "%d.%d.%d" % sys.version_info[:3]
    if sys.version_info < (3, 6, 9):
        return "bad", "%s, expected 3.6.9 or later" % have, "sudo apt update && sudo apt install python3"
    wanted = SYSTEM_PYTHON.get((board.version(m.facts["jetpack"]) or (0,))[0])
    if m.facts["is_jetson"] and wanted and sys.version_info[:2] != wanted:
        return "warn", "%s; this JetPack's TensorRT can be imported by Python %d.%d only" % ((have,) + wanted), VENV
    return "ok", have, ""


@check("our packages", "live")
def _packages(m):
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    specs = {name: importlib.util.find_spec(name) for name in ("edge", "train_lite", "export")}
    wrong = [name for name, spec in specs.items()
             if not spec or not spec.origin or os.path.dirname(os.path.dirname(os.path.abspath(spec.origin))) != home]
    if wrong:
        return "bad", "other packages of that name, or none: %s" % ", ".join(wrong), "cd %s" % shlex.quote(home)
    return "ok", "all from one place", ""


@check("pip", "live")
def _pip(m):
    cure = PIP + ('--upgrade "pip<22" "setuptools<60" wheel' if OLD else "--upgrade pip")
    text, verdict = _part(m, "pip", "warn", "sudo apt install python3-pip")
    if text and board.version(text) < (19, 3):
        return "warn", "%s knows no ready wheels for this board and would compile numpy for hours" % text, cure
    return verdict or ("ok", text, "")


def _package(name, module, status, wanted, why=""):
    """A check that a package can be imported, and no more."""
    @check(name, "live")
    def one(m):
        text, verdict = _part(m, module, status, PIP + wanted, why)
        return verdict or ("ok", text, "")


_package("numpy", "numpy", "bad", "numpy==1.19.4" if OLD else "numpy")
_package("Pillow", "PIL", "bad", "pillow")
_package("ONNX Runtime", "onnxruntime", "warn", "onnxruntime==1.10.0" if OLD else "onnxruntime")
_package("onnx", "onnx", "warn", "onnx==1.11.0" if OLD else "onnx", "only export needs it")


@check("torch", "live")
def _torch(m):
    cure = PIP + ("torch==1.10.2" if OLD else "torch")
    if m.facts["is_jetson"]:
        wheel = "torch-1.10.0-cp36-cp36m-linux_aarch64.whl" if OLD else "TORCH.whl"
        cure = ("sudo apt install libopenblas-base libopenmpi-dev; %s%s   # NVIDIA's wheel for JetPack %s, thread "
                "'PyTorch for Jetson'; pip's own has no CUDA" % (PIP, wheel, m.facts["jetpack"] or "of this board"))
    text, verdict = _part(m, "torch", "warn", cure, "only training and export need it")
    if verdict:
        return verdict
    words = text.split()
    if words[-1] == "True":
        return "ok", "%s with CUDA %s" % tuple(words[:2]), ""
    if m.facts["is_jetson"]:
        return "bad", "%s does not reach the GPU" % words[0], cure
    return "ok", "%s, CPU" % words[0], ""


@check("TensorRT", "jetson live")
def _tensorrt(m):
    cure = "sudo apt install python3-libnvinfer"
    settings = os.path.join(sys.prefix, "pyvenv.cfg")
    if "include-system-site-packages = false" in (board.read("/", settings) or ""):
        cure = "sed -i '/^include-system-site-packages/s/false/true/' " + shlex.quote(settings)
    text, verdict = _part(m, "tensorrt", "bad", cure, "it exists for the system's Python only; pip cannot install it")
    if text and board.version(text) < (8, 2):
        return "bad", "%s, expected 8.2 or later" % text, UPGRADE
    return verdict or ("ok", text, "")


@check("pycuda", "jetson live")
def _pycuda(m):
    cure = "%s && %s" % (NVCC, PIP + ('"pycuda<2022.2"' if OLD else "pycuda"))
    text, verdict = _part(m, "pycuda", "warn", cure, "TensorRT engines need it; minutes to build")
    return verdict or ("ok", text, "")


@check("CUDA toolkit", "jetson")
def _cuda(m):
    if not m.facts["cuda"]["nvcc"]:
        return "warn", "no nvcc in /usr/local/cuda/bin", "sudo apt update && sudo apt install nvidia-jetpack"
    found = "CUDA %s" % (m.facts["cuda"]["version"] or "of a version it does not tell")
    if m.live and not shutil.which("nvcc"):
        return "warn", "%s, but nvcc is not on the PATH: pycuda would not build" % found, NVCC
    return "ok", found, ""


@check("libgomp", "live")
def _libgomp(m):
    hit = [name for name in PROBES if "static TLS" in m.ran[name].text]
    if hit:
        return "bad", "comes too late for its static TLS block in: %s" % ", ".join(hit), GOMP
    return "ok", "no import failed for it", ""


@check("GStreamer", "live")
def _gstreamer(m):
    ran = m.ran["gst"]
    if ran.code != 0:
        return "warn", "%s; cameras and video need it" % _outcome(ran, "gst-inspect-1.0"), GST
    return "ok", "%d elements" % len(_elements(ran.text)), ""


@check("GStreamer elements", "live")
def _gst_elements(m):
    have = _elements(m.ran["gst"].text)
    if m.ran["gst"].code != 0:
        return "unknown", "cannot be listed", ""
    missing = [name for name in ELEMENTS if name not in have]
    ours = [name for name in ELEMENTS_JETSON if name not in have] if m.facts["is_jetson"] else []
    if missing or ours:
        return "warn", "missing: %s" % ", ".join(missing + ours), GST if missing else GST_JETSON
    return "ok", "all that cameras and video need", ""


@check("memory")
def _memory(m):
    info = m.facts["meminfo_kb"]
    if "MemAvailable" not in info:
        return "unknown", "cannot be read", ""
    free = info["MemAvailable"] // 1024
    found = "%d of %d MB free" % (free, info.get("MemTotal", 0) // 1024)
    if "NvMapMemUsed" in info:
        found += ", %d MB held by the GPU (these cannot be swapped)" % (info["NvMapMemUsed"] // 1024)
    # a TensorRT process takes 600 to 900 MB before the first engine is loaded
    status = "bad" if free < 400 else "warn" if free < 1000 else "ok"
    return status, found, "" if status == "ok" else "ps -eo rss,pid,comm --sort=-rss | head   # end what is not needed"


@check("largest free block", "jetson live")
def _block(m):
    for line in m.ran["tegrastats"].text.splitlines():
        stats = tegrastats.parse(line)
        if stats.largest_free_blocks is not None:
            found = "%d of %g MB" % (stats.largest_free_blocks, stats.largest_free_block_mb)
            if stats.largest_free_blocks * stats.largest_free_block_mb < 32:
                return "warn", "%s: memory is in splinters, large buffers may fail" % found, \
                    "sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory'"
            return "ok", found, ""
    return "unknown", "tegrastats does not say", ""


@check("killed", "jetson")
def _killed(m):
    count = m.facts["alarms"].get("killed")
    if count:
        return "warn", "%d in the kernel's log, for want of memory" % count, \
            "grep -a -i 'out of memory' /var/log/kern.log | tail -3"
    return ("ok", "nothing in the kernel's log", "") if count == 0 else ("unknown", "the log cannot be read", "")


@check("swap", "jetson")
def _swap(m):
    if m.facts["swaps"] is None:
        return "unknown", "cannot be read", ""
    size = sum(swap["size_kb"] for swap in m.facts["swaps"]) // 1024
    if size < 3700:  # 4 GB are 3814 MiB
        return "warn", ("%d MB, expected 4 GB" % size) if size else "none", _swap_cure(m)
    return "ok", "%d MB" % size, ""


@check("zram", "jetson")
def _zram(m):
    if m.facts["swaps"] is None:
        return "unknown", "cannot be read", ""
    kinds = {swap["kind"] for swap in m.facts["swaps"]}
    if kinds == {"zram"}:
        return "warn", "the only swap is zram, which takes the memory it is meant to spare", _swap_cure(m)
    return "ok", "beside swap on disk" if "zram" in kinds else "not used", ""


def _swap_cure(m):
    zram = any(swap["kind"] == "zram" for swap in m.facts["swaps"])
    return ("sudo systemctl disable nvzramconfig; " if zram else "") + SWAP


@check("desktop", "jetson")
def _desktop(m):
    cure = "sudo systemctl set-default multi-user.target && sudo init 3"
    if m.facts["desktop"]:
        return "warn", "running (%s): 250 to 1500 MB" % ", ".join(m.facts["desktop"]), cure
    if m.facts["target"] == "graphical.target":
        return "warn", "starts with the board: 250 to 1500 MB", cure
    return ("ok", "none (%s)" % m.facts["target"], "") if m.facts["target"] else ("unknown", "cannot be told", "")


@check("power mode", "jetson")
def _power_mode(m):
    now, modes = m.facts["power_mode"], m.facts["power_modes"]
    if not now or "name" not in now:
        return "unknown", "mode %d, which no config names" % now["id"] if now else "cannot be read", ""
    best = max(modes, key=_strength)
    if _strength(now) < _strength(best):
        found = "%s; %s lets the GPU or the CPU do more" % (now["name"], best["name"])
        return "warn", found, "sudo nvpmodel -m %d" % best["id"]
    return "ok", "%s, the strongest of %s" % (now["name"], ", ".join(mode["name"] for mode in modes)), ""


def _strength(mode):
    return mode["gpu_hz"] or float("inf"), mode["cores"] or 0


@check("clocks", "jetson")
def _clocks(m):
    gpu = m.facts["clocks_khz"].get("gpu")
    if not gpu or not gpu["low"] or not gpu["high"]:
        return "unknown", "the GPU's cannot be read", ""
    if gpu["low"] < gpu["high"]:
        return "warn", "the GPU's float between %d and %d MHz: times vary two- to threefold" % (
            gpu["low"] // 1000, gpu["high"] // 1000), "sudo jetson_clocks"
    return "ok", "the GPU's is held at %d MHz" % (gpu["high"] // 1000), ""


@check("heat", "jetson")
def _heat(m):
    limits = [(min([limit for kind, limit in zone["trips"].items() if kind in ("passive", "hot", "critical")] or [1000])
               - zone["celsius"], zone) for zone in m.facts["zones"]]
    if not limits:
        return "unknown", "no sensor can be read", ""
    room, zone = min(limits, key=lambda pair: pair[0])
    if room > 900:
        hottest = max(m.facts["zones"], key=lambda row: row["celsius"])
        return "ok", "%s %.0f C, no limit given" % (hottest["name"], hottest["celsius"]), ""
    found = "%s %.0f C, limit %.0f C" % (zone["name"], zone["celsius"], zone["celsius"] + room)
    return ("ok", found, "") if room > 5 else ("warn", found, "sudo jetson_clocks --fan   # and give it a fan")


@check("power supply", "jetson")
def _supply(m):
    counts = {name: count for name, count in m.facts["alarms"].items() if name != "killed"}
    low = [rail for rail in m.facts["rails"] if rail["name"] in ("POM_5V_IN", "VDD_IN", "VIN_SYS_5V0")
           and 3000 < rail["millivolt"] < 4750]
    cure = "sudo dmesg | grep -i -e soctherm -e over-current   # then a better supply; Nano: 5 V 4 A, barrel jack, J48"
    if low:
        return "bad", "%s is at %.2f V, expected 4.75 V or more" % (low[0]["name"], low[0]["millivolt"] / 1000), cure
    if any(counts.values()):
        return "warn", "the board was slowed down for its supply: %s" % ", ".join(
            "%s %d times" % pair for pair in sorted(counts.items()) if pair[1]), cure
    return ("ok", "no complaint", "") if counts or m.facts["rails"] else ("unknown", "no meter or log can be read", "")


@check("GPU access", "jetson")
def _gpu_access(m):
    devices = m.facts["gpu_devices"]
    shut = [path for path, may in devices.items() if not may]
    if shut:
        return "bad", "this user may not open %s" % ", ".join(shut), VIDEO
    return ("ok", ", ".join(sorted(devices)), "") if devices else ("unknown", "no device file of a known name", "")


@check("disk space")
def _disk(m):
    places = [m.facts["disk"]] + ([board.disk(".")] if m.live else [])
    free = min([place["free_mb"] for place in places if place] or [-1])
    if free < 0:
        return "unknown", "cannot be read", ""
    status = "bad" if free < 300 else "warn" if free < 2000 else "ok"
    return status, "%d MB free" % free, "" if status == "ok" else "sudo apt clean; du -xh ~ | sort -h | tail"


@check("disk writable", "jetson")
def _writable(m):
    if not m.facts["disk"]:
        return "unknown", "cannot be read", ""
    if m.facts["disk"]["read_only"]:
        return "bad", "mounted read-only, as the kernel does when a card fails", \
            "sudo dmesg | grep -i -e mmc -e ext4; sudo mount -o remount,rw /   # and copy your runs elsewhere"
    return "ok", "yes", ""


@check("disk wear", "jetson")
def _wear(m):
    wear = m.facts["disk_wear_percent"]
    if not wear:
        return "unknown", "n/a (SD cards do not tell)", ""
    name, percent = max(wear.items(), key=lambda pair: pair[1])
    found = "%s: up to %d %% of its life is used" % (name, percent)
    status = "bad" if percent > 100 else "warn" if percent >= 80 else "ok"
    return status, found, "" if status == "ok" else "rsync -a runs/ USER@HOST:runs/   # and put swap on another disk"


@check("cameras")
def _cameras(m):
    cameras = m.facts["cameras"]
    if not cameras:
        return "unknown", "none seen", ""
    found = ", ".join("%s %s" % pair for pair in sorted(cameras.items()))
    csi = any("vi-output" in name for name in cameras.values())
    if m.facts["is_jetson"] and csi and not m.facts["argus"]:
        return "warn", "%s, but nvargus-daemon does not run" % found, ARGUS
    return "ok", found + (" (take vi-output as csi://0)" if csi else ""), ""


@check("display", "jetson live")
def _display(m):
    if os.environ.get("SSH_CONNECTION") and os.environ.get("DISPLAY"):
        return "warn", "ssh lends its display, which breaks nvarguscamerasrc", "unset DISPLAY"
    return "ok", "not lent by ssh", ""


@check("time", "live")
def _time(m):
    # boards without a battery wake in the past: certificates, `make` and the order of runs go wrong
    if time.time() < os.path.getmtime(os.path.abspath(__file__)) - 86400:
        return "bad", "%s, before this program was installed" % time.strftime("%Y-%m-%d %H:%M"), \
            "sudo timedatectl set-ntp true"
    return "ok", time.strftime("%Y-%m-%d %H:%M"), ""


def _part(m, name, absent, cure, note=""):
    """(what the probe of a package printed, None), or (None, verdict). absent: status of a package that is missing."""
    ran = m.ran[name]
    if ran.code == 0 and ran.text:
        return ran.text.splitlines()[-1], None
    if ran.code == -signal.SIGILL:
        return None, ("bad", "dies of an illegal instruction: OpenBLAS mistakes the processor", ARMV8)
    if "static TLS" in ran.text:
        return None, ("bad", _outcome(ran, name), GOMP)
    if "No module named '%s'" % name in ran.text:
        return None, (absent, "not installed" + (" (%s)" % note if note else ""), cure)
    return None, ("bad", _outcome(ran, name), cure)


def _outcome(ran, name):
    """In words, how a probe failed."""
    if ran.code is None:
        return "%s gave no answer in %d s" % (name, LIMIT_S)
    if ran.code < 0:
        return "%s died of signal %d" % (name, -ran.code)
    if ran.code == 127:
        return "%s is not installed" % name
    return (ran.text.splitlines() or ["%s failed" % name])[-1][:200]


def _elements(text):
    """Names of the elements in a listing of gst-inspect-1.0."""
    return set(re.findall(r"^[^\s:]+:\s+([^\s:]+):", text, re.M))


def run(words, limit_s):
    """Run a program, kill it after limit_s. Returns Ran, whatever becomes of the program."""
    try:
        with tempfile.TemporaryFile() as out:  # no pipe: a grandchild that lives on would keep it open
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
                process.kill()
                with suppress(subprocess.TimeoutExpired):  # one stuck in the kernel dies later
                    process.wait(1)
            out.seek(0)
            return Ran(code, re.sub(r"[^\n\t -~]", "?", out.read(1 << 20).decode("ascii", "replace")).strip())
    except FileNotFoundError:
        return Ran(127, "")
    except OSError as exc:
        return Ran(126, str(exc))


def probe():
    """Try packages and programs, four at a time. Returns dict name -> Ran."""
    jobs = {"gst": (["gst-inspect-1.0"], LIMIT_S), "tegrastats": (["tegrastats", "--interval", "100"], 1.0)}
    jobs.update((name, ([sys.executable, "-c", code], LIMIT_S)) for name, code in PROBES.items())
    with ThreadPoolExecutor(4) as pool:
        waiting = {name: pool.submit(run, *job) for name, job in jobs.items()}
        return {name: future.result() for name, future in waiting.items()}


def examine(root="/"):
    """Look at the machine below root; packages and programs are tried only when that is '/'.
    Returns (board.facts, list of Check)."""
    live = os.path.abspath(root) == "/"
    machine = Machine(board.facts(root), live, probe() if live else {})
    checks = []
    for name, needs, function in CHECKS:
        if "jetson" in needs and not machine.facts["is_jetson"]:
            verdict = "unknown", "not a Jetson", ""
        elif "live" in needs and not live:
            verdict = "unknown", "skipped: --root shows files only", ""
        else:
            verdict = function(machine)
        checks.append(Check(name, *verdict))
    return machine.facts, checks


@guarded
def main(argv):
    config = parse(DoctorConfig, argv, "python -m jetson doctor", ABOUT % LIMIT_S, HELPS)
    if not os.path.isdir(config.root):
        raise BadFile("there is no folder %s. Type: python -m jetson doctor" % config.root)
    banner("doctor", board.model(config.root) or platform.machine(), "none")
    facts, checks = examine(config.root)
    if config.json:
        print(json.dumps({"board": facts, "checks": [one._asdict() for one in checks]}))
    else:
        _show(checks)
    counts = {status: sum(one.status == status for one in checks) for status in ("ok", "warn", "bad", "unknown")}
    say("%(ok)d ok, %(warn)d to improve, %(bad)d bad, %(unknown)d not known" % counts)
    return 2 if counts["bad"] else 0


def _show(checks):
    for one in checks:
        print("%-8s %-18s %s" % (one.status, one.name, one.found))
    cures = {}
    for one in checks:
        if one.status in ("bad", "warn"):
            cures.setdefault(one.cure, []).append(one.name)
    for cure, names in cures.items():
        print("\n%s:\n  %s" % (", ".join(names), cure))
