"""The cameras of this machine, for --list-sources: nodes, names and modes."""
import os
import re
import subprocess

from edge.sources.video import RAW_CAMERAS

QUERY_S = 5


def list_cameras(root="/sys/class/video4linux", tool="v4l2-ctl"):
    """List of dicts: uri, name, node, modes (list of texts such as 'MJPG 1280x720 @ 30'; None: unknown) and note."""
    nodes = sorted((f for f in _names(root) if re.match(r"^video\d+$", f)), key=lambda f: int(f[5:]))
    found, sensors = [], 0
    for node in nodes:
        name, device = _read(os.path.join(root, node, "name")), "/dev/" + node
        camera = {"uri": device, "node": device, "name": name, "modes": None, "note": ""}
        if any(word in name for word in RAW_CAMERAS):
            camera["uri"], sensors = "csi://%d" % sensors, sensors + 1
            camera["note"] = "raw: use csi://, not the node"
        elif _read(os.path.join(root, node, "index")) not in ("", "0"):
            camera["note"] = "describes another node, gives no pictures"
        camera["modes"] = _modes(device, tool)
        found.append(camera)
    return found


def as_text(cameras):
    """The lines that --list-sources prints."""
    if not cameras:
        return "no camera found. A USB camera shows up as /dev/videoN; a CSI one needs its ribbon cable and, on an Orin, " \
               "/opt/nvidia/jetson-io/jetson-io.py"
    lines = []
    for camera in cameras:
        lines.append("%-14s %s%s" % (camera["uri"], camera["name"] or "no name", ": " + camera["note"] if camera["note"] else ""))
        if camera["uri"] != camera["node"]:
            lines.append("  node %s" % camera["node"])
        lines += ["  %s" % mode for mode in camera["modes"] or []]
    if all(camera["modes"] is None for camera in cameras):
        lines.append("modes are shown with v4l2-ctl. Type: sudo apt install v4l-utils")
    return "\n".join(lines)


def parse_modes(text):
    """Modes from the output of v4l2-ctl --list-formats-ext."""
    modes, pixels, size = [], "", ""
    for line in text.splitlines():
        kind = re.search(r"'(\w{4})\s*'", line)
        where = re.search(r"Size: \w+ (\d+x\d+)", line)
        rate = re.search(r"\(([\d.]+) fps\)", line)
        if kind:
            pixels, size = kind.group(1), ""
        elif where:
            size = where.group(1)
            modes.append("%s %s" % (pixels, size))
        elif rate and size:
            text = "%g" % float(rate.group(1))
            modes[-1] += (", " if " @ " in modes[-1] else " @ ") + text
    return modes


def _modes(device, tool):
    try:
        done = subprocess.run([tool, "-d", device, "--list-formats-ext"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, timeout=QUERY_S, env=dict(os.environ, LC_ALL="C"))
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_modes(done.stdout.decode(errors="replace")) if done.returncode == 0 else None


def _names(folder):
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _read(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return handle.read().strip()
    except OSError:
        return ""
