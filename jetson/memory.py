"""Memory of a process as the kernel counts it. Standard library only."""


def status_mib(text, key):
    """Read one field, such as VmHWM, out of the text of /proc/PID/status. Returns MiB, or None when absent."""
    for line in text.splitlines():
        if line.startswith(key + ":"):
            return float(line.split()[1]) / 1024  # the kernel writes kB
    return None


def peak_rss_mib():
    """Largest resident set of this process so far, in MiB (VmHWM: file-backed pages counted). None off Linux."""
    try:
        with open("/proc/self/status") as handle:
            return status_mib(handle.read(), "VmHWM")
    except OSError:
        return None
