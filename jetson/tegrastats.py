"""One line of tegrastats as numbers: L4T 32 to 39, with and without root. Standard library only.

Every field is optional: boards, releases and the rights of the caller decide what a line shows."""
import re
from typing import Dict, List, NamedTuple, Optional, Tuple

_MB = {"kB": 1 / 1024, "MB": 1.0, "GB": 1024.0}
_RAM = re.compile(r"\bRAM (\d{1,9})/(\d{1,9})([kMG]B)(?: ?\(lfb (\d{1,9})x(\d{1,9})([kMG]B)\))?")
_SWAP = re.compile(r"\bSWAP (\d{1,9})/(\d{1,9})([kMG]B)(?: ?\(cached (\d{1,9})([kMG]B)\))?")
_CPU = re.compile(r"\bCPU \[([^\[\]]*)\]")
_CORE = re.compile(r"(\d{1,3})%(?:@(\d{1,6}))?")
# the last (?!\S) of these keeps a form from matching the first half of a longer one, or of a line that was cut
_LOAD = re.compile(r"\b(EMC|GR3D|GR3D2)_FREQ (?:(\d{1,3})%)?(?:@(\d{1,6}|\[[\d,]{0,99}\]))?(?!\S)")
_TEMPERATURE = re.compile(r"(?<!\S)([^\s@]{1,40})@(-?\d{1,4}(?:[.,]\d{1,6})?)C(?:/-?[\d.,]{1,12}C)?(?!\S)")
_POWER = re.compile(r"(?<!\S)([A-Za-z]\w{0,40}) (\d{1,9})(?:mW)?/(\d{1,9})(?:mW)?(?:/\d{1,9}(?:mW)?)?(?!\S)")


class Stats(NamedTuple):
    ram_used_mb: Optional[float] = None
    ram_total_mb: Optional[float] = None
    largest_free_blocks: Optional[int] = None     # how many blocks of the largest free size there are
    largest_free_block_mb: Optional[float] = None
    swap_used_mb: Optional[float] = None
    swap_total_mb: Optional[float] = None
    swap_cached_mb: Optional[float] = None
    cpu: Optional[List[Optional[Tuple[int, Optional[int]]]]] = None  # per core (load %, MHz or None); None: core is off
    emc_percent: Optional[int] = None             # load of the memory controller
    emc_mhz: Optional[int] = None
    gpu_percent: Optional[int] = None
    gpu_mhz: List[int] = []                       # one clock per GPU cluster; empty without root
    celsius: Dict[str, float] = {}                # by lower-cased sensor
    milliwatt: Dict[str, Tuple[int, int]] = {}    # by rail as written: (now, average)


def parse(line):
    """A line of tegrastats as Stats. Never raises: what is absent, cut off or not understood stays None or empty.
    A number that ends with a cut line cannot be told from a whole one."""
    found = {}
    match = _RAM.search(line)
    if match:
        used, total, unit, blocks, size, block_unit = match.groups()
        found.update(ram_used_mb=int(used) * _MB[unit], ram_total_mb=int(total) * _MB[unit])
        if blocks:
            found.update(largest_free_blocks=int(blocks), largest_free_block_mb=int(size) * _MB[block_unit])
    match = _SWAP.search(line)
    if match:
        used, total, unit, cached, cached_unit = match.groups()
        found.update(swap_used_mb=int(used) * _MB[unit], swap_total_mb=int(total) * _MB[unit])
        if cached:
            found.update(swap_cached_mb=int(cached) * _MB[cached_unit])
    match = _CPU.search(line)
    return Stats(cpu=_cores(match.group(1)) if match else None, celsius=_temperatures(line), milliwatt=_powers(line),
                 **dict(found, **_loads(line)))


def _cores(text):
    """[(percent, MHz), None for off, ...], or None when one entry is not understood: a shifted list would mislead."""
    cores = []
    for entry in text.split(","):
        match = _CORE.fullmatch(entry.strip())
        if not match and entry.strip() != "off":
            return None
        cores.append((int(match.group(1)), int(match.group(2)) if match.group(2) else None) if match else None)
    return cores


def _loads(line):
    found = {"gpu_mhz": []}
    for name, percent, clocks in _LOAD.findall(line):
        mhz = [int(word) for word in re.findall(r"\d{1,6}", clocks)]
        if name == "EMC":
            found.update(emc_percent=int(percent) if percent else None, emc_mhz=mhz[0] if mhz else None)
        else:  # GR3D2 is the second cluster of the same GPU: one load, one more clock
            found["gpu_mhz"] += mhz
            if name == "GR3D":
                found["gpu_percent"] = int(percent) if percent else None
    return found


def _temperatures(line):
    values = {name.lower(): float(value.replace(",", ".")) for name, value in _TEMPERATURE.findall(line)}
    # PMIC is a constant that no sensor measures; -256 is a sensor that is switched off
    return {name: value for name, value in values.items() if name != "pmic" and value > -256}


def _powers(line):
    return {name: (int(now), int(average)) for name, now, average in _POWER.findall(line)
            if name not in ("NC", "RAM", "SWAP", "IRAM")}  # NC: not connected; the others: a line cut before its MB
