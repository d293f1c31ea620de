"""The doctor and what it reads: tegrastats lines and boards of all generations, real, invented, cut, damaged."""
import builtins
import json
import os
import random
import stat
import subprocess
import sys
import time

import pytest

from conftest import ROOT, real_data
from jetson import board, doctor, tegrastats
from jetson.doctor import Ran, examine

NANO = ("RAM 717/3964MB (lfb 140x4MB) SWAP 0/1982MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [18%@102,2%@102,off,off] "
        "EMC_FREQ 2%@204 GR3D_FREQ 0%@76 APE 25 PLL@26C CPU@29.5C iwlwifi@33C PMIC@100C GPU@29C AO@38.5C thermal@29.5C "
        "POM_5V_IN 1057/1060 POM_5V_GPU 0/0 POM_5V_CPU 126/127")
L4T_35 = ("01-03-2023 16:07:54 RAM 2257/30536MB (lfb 5392x4MB) SWAP 3/15268MB (cached 1MB) CPU [1%@729,0%@730] "
          "EMC_FREQ 0%@204 GR3D_FREQ 7%@300 GR3D2_FREQ 0%@301 NVJPG1 729 VIC_FREQ 115 APE 233 CV0@-256C CPU@41.437C "
          "Tboard@29C GPU@-256C tj@41.656C VDD_GPU_SOC 2390mW/2391mW NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/302mW NC 0mW/0mW")
L4T_36 = ("05-09-2026 18:42:06 RAM 18207/62841MB (lfb 466x4MB) SWAP 86/31420MB (cached 0MB) CPU [14%@2188,5%@2112] "
          "EMC_FREQ 3%@2133 GR3D_FREQ 9%@[306,307] NVENC 79%@166 NVDEC off VIC 36%@115 PVA0_FREQ off APE 174 "
          "cpu@52.562C tj@52.5C VDD_GPU_SOC 2412mW/2413mW VDD_IN 913mW/598")
L4T_39 = ("07-01-2026 10:00:00 RAM 2000/7620MB (lfb 1x512kB) SWAP 0/3810MB (cached 0MB) CPU [3%@1344] "
          "GR3D_FREQ 12%@[1300,1300] cpu@52.968C/53.5C gpu@50C/50C VDD_GPU_SOC 5139mW/5140mW/6000mW")
THOR = "RAM 5000/125772MB (lfb 20x4MB) CPU [1%@2601] GR3D_FREQ @[1000,1001,1002] cpu@40.5C"

# the same lines, read by hand
LINES = [
    (NANO, (717, 3964, 140, 4, 0, 1982, 0, [(18, 102), (2, 102), None, None], 2, 204, 0, [76],
            {"pll": 26, "cpu": 29.5, "iwlwifi": 33, "gpu": 29, "ao": 38.5, "thermal": 29.5},
            {"POM_5V_IN": (1057, 1060), "POM_5V_GPU": (0, 0), "POM_5V_CPU": (126, 127)})),
    (L4T_35, (2257, 30536, 5392, 4, 3, 15268, 1, [(1, 729), (0, 730)], 0, 204, 7, [300, 301],
              {"cpu": 41.437, "tboard": 29, "tj": 41.656},
              {"VDD_GPU_SOC": (2390, 2391), "VDDQ_VDD2_1V8AO": (301, 302)})),
    (L4T_36, (18207, 62841, 466, 4, 86, 31420, 0, [(14, 2188), (5, 2112)], 3, 2133, 9, [306, 307],
              {"cpu": 52.562, "tj": 52.5}, {"VDD_GPU_SOC": (2412, 2413), "VDD_IN": (913, 598)})),
    (L4T_39, (2000, 7620, 1, 0.5, 0, 3810, 0, [(3, 1344)], None, None, 12, [1300, 1300],
              {"cpu": 52.968, "gpu": 50}, {"VDD_GPU_SOC": (5139, 5140)})),
    (THOR, (5000, 125772, 20, 4, None, None, None, [(1, 2601)], None, None, None, [1000, 1001, 1002],
            {"cpu": 40.5}, {})),
    # as boards printed them
    ("RAM 1409/3964MB (lfb 28x4MB) SWAP 0/1982MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [22%@518,67%@518,off,off] EMC_FREQ 0%@1600 "
     "GR3D_FREQ 0%@76 APE 25 PLL@28.5C CPU@32C PMIC@50C GPU@30.5C AO@39.5C thermal@31.25C POM_5V_IN 2003/2003 POM_5V_GPU 0/0 POM_5V_CPU 320/320",
     (1409, 3964, 28, 4, 0, 1982, 0, [(22, 518), (67, 518), None, None], 0, 1600, 0, [76],
      {"pll": 28.5, "cpu": 32, "gpu": 30.5, "ao": 39.5, "thermal": 31.25},
      {"POM_5V_IN": (2003, 2003), "POM_5V_GPU": (0, 0), "POM_5V_CPU": (320, 320)})),
    ("04-11-2025 10:36:27 RAM 4321/62801MB (lfb 1759x4MB) SWAP 19/31400MB (cached 0MB) CPU [0%@729,0%@729] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[0,0] "
     "VIC_FREQ 729 APE 174 CV0@-256C CPU@44.562C Tboard@32C tj@44.343C GPU@-256C VDD_GPU_SOC 2340mW/2340mW VDD_CPU_CV 390mW/390mW "
     "VIN_SYS_5V0 4025mW/4025mW NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW",
     (4321, 62801, 1759, 4, 19, 31400, 0, [(0, 729), (0, 729)], 0, 2133, 0, [0, 0], {"cpu": 44.562, "tboard": 32, "tj": 44.343},
      {"VDD_GPU_SOC": (2340, 2340), "VDD_CPU_CV": (390, 390), "VIN_SYS_5V0": (4025, 4025), "VDDQ_VDD2_1V8AO": (301, 301)})),
    ("RAM 3821/7337MB (lfb 21x1MB) SWAP 1/3668MB (cached 0MB) CPU [30%@1651,53%@1651,70%@1651,30%@1651,off,off] EMC_FREQ 0% GR3D_FREQ 0% "
     "GR3D2_FREQ 0%@0 cpu@45.5C gpu@44.9C",
     (3821, 7337, 21, 1, 1, 3668, 0, [(30, 1651), (53, 1651), (70, 1651), (30, 1651), None, None], 0, None, 0, [0],
      {"cpu": 45.5, "gpu": 44.9}, {})),
    ("08-10-2026 21:39:51 RAM 2513/7620MB (lfb 1x4MB) SWAP 25/3810MB (cached 0MB) CPU [11%@729,7%@729,8%@729,4%@729,3%@729,14%@729] "
     "GR3D_FREQ 0% cpu@51.218C soc2@51.093C gpu@51.593C tj@51.718C VDD_IN 4744mW/6179mW VDD_CPU_GPU_CV 1273mW/2369mW VDD_SOC 1234mW/1392mW",
     (2513, 7620, 1, 4, 25, 3810, 0, [(11, 729), (7, 729), (8, 729), (4, 729), (3, 729), (14, 729)], None, None, 0, [],
      {"cpu": 51.218, "soc2": 51.093, "gpu": 51.593, "tj": 51.718},
      {"VDD_IN": (4744, 6179), "VDD_CPU_GPU_CV": (1273, 2369), "VDD_SOC": (1234, 1392)})),
    # without root: no clocks; the oldest form has neither swap nor loads
    ("RAM 613/3964MB (lfb 634x4MB) SWAP 0/1982MB (cached 0MB) CPU [2%@102,0%@102] EMC_FREQ 0% GR3D_FREQ 4% PLL@39C",
     (613, 3964, 634, 4, 0, 1982, 0, [(2, 102), (0, 102)], 0, None, 4, [], {"pll": 39}, {})),
    ("RAM 2630/7850MB (lfb 3x4MB) CPU [3%@2035,0%@2035] BCPU@35C PMIC@100C VDD_IN 3585/3618",
     (2630, 7850, 3, 4, None, None, None, [(3, 2035), (0, 2035)], None, None, None, [], {"bcpu": 35},
      {"VDD_IN": (3585, 3618)})),
    # a locale with decimal commas
    ("RAM 1/2MB CPU [1%@2] cpu@45,5C VDD_IN 5mW/6mW",
     (1, 2, None, None, None, None, None, [(1, 2)], None, None, None, [], {"cpu": 45.5}, {"VDD_IN": (5, 6)})),
]


@pytest.mark.parametrize("line,numbers", LINES, ids=range(len(LINES)))
def test_line_read_by_hand(line, numbers):
    assert tuple(tegrastats.parse(line)) == numbers
    assert tuple(tegrastats.parse(line + "\n")) == numbers


# first line of each log that has numbers, read by hand: all that parse() may find in it
LOGS = {
    "nano_10w_stress.log": (
        2020, 3964, 19, 4, 43, 1982, 1, [(100, 1479)] * 4, 0, None, 99, [],
        {"pll": 41.5, "cpu": 48, "gpu": 63, "ao": 54.5, "thermal": 48.25},
        {"POM_5V_GPU": (8949, 8742), "POM_5V_IN": (3227, 3086), "POM_5V_CPU": (3148, 3134)}),
    "tx2_b.log": (
        896, 7859, 26, 4, 0, 3929, 0, [(4, 2035), (4, 345), (4, 345), (1, 2035), (0, 2035), (0, 2035)], 0, None, 0, [],
        {"pll": 34.5, "mcpu": 34.5, "tboard": 29, "gpu": 31, "bcpu": 34.5, "thermal": 32.8, "tdiode": 30.5},
        {"VDD_SYS_GPU": (153, 153), "VDD_SYS_SOC": (383, 383), "VDD_4V0_WIFI": (0, 0), "VDD_IN": (1840, 1840),
         "VDD_SYS_CPU": (306, 306), "VDD_SYS_DDR": (269, 269)}),
    "tx2_a.log": (
        2630, 7850, 3, 4, None, None, None, [(3, 2035), (0, 2035), (8, 2035), (3, 2035), (42, 2035), (14, 2035)], None,
        None, None, [],
        {"bcpu": 35, "mcpu": 35, "gpu": 41, "pll": 35, "ao": 32.5, "tboard": 29, "tdiode": 31.25, "thermal": 34},
        {"VDD_IN": (3585, 3618), "VDD_CPU": (697, 698), "VDD_GPU": (371, 370), "VDD_SOC": (651, 650),
         "VDD_WIFI": (0, 9), "VDD_DDR": (881, 880)}),
    "xavier_nx_stress.log": (
        1802, 7772, 357, 4, 0, 3886, 0, [(100, 1420)] * 6, 0, None, 99, [],
        {"ao": 42.5, "gpu": 44.5, "aux": 43.5, "cpu": 44.5, "thermal": 44.25},
        {"VDD_IN": (14703, 14683), "VDD_CPU_GPU_CV": (10874, 10893), "VDD_SOC": (1405, 1405)}),
    "xavier_nx_timestamped.log": (
        2274, 6834, 27, 4, 542, 3417, 2, [(99, 1189), (100, 1188), (100, 1189), (98, 1189), None, None], 0, None, 22,
        [],
        {"aux": 36.5, "cpu": 40, "thermal": 37.85, "ao": 37.5, "gpu": 38},
        {"VDD_IN": (5542, 5542), "VDD_CPU_GPU_CV": (1594, 1594), "VDD_SOC": (1234, 1234)}),
    "agx_orin_64gb.log": (
        7012, 62841, 4, 4, 0, 31421, 0, [(load, 729) for load in (1, 5, 1, 1, 1, 7, 0, 0, 1, 0, 3, 0)], 0, 2133, 0,
        [305, 305],
        {"cpu": 48.281, "tboard": 37, "soc2": 44.437, "tdiode": 37.75, "soc0": 45.781, "gpu": 43.468, "tj": 48.062,
         "soc1": 45.125},
        {"VDD_GPU_SOC": (2801, 2794), "VDD_CPU_CV": (400, 1909), "VIN_SYS_5V0": (4421, 4659),
         "VDDQ_VDD2_1V8AO": (601, 726)}),
    "orin_nano_sample.log": (
        3162, 7620, 4, 2, 0, 3810, 0, [(1, 729), (0, 729), (0, 729), (0, 729), None, None], None, None, 1, [],
        {"cpu": 62.843, "soc2": 61.968, "soc0": 60.625, "gpu": 61.687, "tj": 62.843, "soc1": 61.687},
        {"VDD_IN": (3913, 3922), "VDD_CPU_GPU_CV": (598, 598), "VDD_SOC": (1238, 1237)}),
}


def log_lines(name):
    with open(os.path.join(real_data("tegrastats"), name), encoding="ascii") as handle:
        return [line for line in handle if "RAM" in line]


@pytest.mark.parametrize("name", sorted(LOGS))
def test_first_line_of_a_real_log(name):
    assert tuple(tegrastats.parse(log_lines(name)[0])) == LOGS[name]


def by_words(line):
    """The same numbers by another way, which knows only well-formed lines: a walk over the words."""
    got, words = {"celsius": {}, "milliwatt": {}, "gpu_mhz": []}, line.split()
    for word, after in zip(words, words[1:] + [""]):
        if word in ("RAM", "SWAP"):
            kind = word.lower()
            got[kind + "_used_mb"], got[kind + "_total_mb"] = (float(n) for n in after.replace("MB", "").split("/"))
        elif word == "(lfb":
            count, size = after.rstrip(")").split("x")
            got["largest_free_blocks"] = int(count)
            got["largest_free_block_mb"] = float(size[:-2]) / (1 if size.endswith("MB") else 1024)
        elif word == "(cached":
            got["swap_cached_mb"] = float(after.rstrip("MB)"))
        elif word == "CPU":
            got["cpu"] = [None if core == "off" else tuple(int(n) for n in core.split("%@"))
                          for core in after.strip("[]").split(",")]
        elif word in ("EMC_FREQ", "GR3D_FREQ"):
            load, _, clock = after.partition("@")
            key = "emc" if word == "EMC_FREQ" else "gpu"
            got[key + "_percent"] = int(load.rstrip("%"))
            if clock:
                got[key + "_mhz"] = json.loads(clock if key == "emc" or clock[0] == "[" else "[%s]" % clock)
        elif "@" in word and word.endswith("C"):
            sensor, _, value = word[:-1].lower().partition("@")
            if sensor != "pmic" and float(value) != -256:
                got["celsius"][sensor] = float(value)
        elif word.isupper() and "/" in after and word.startswith(("V", "P")):
            got["milliwatt"][word] = tuple(int(n) for n in after.replace("mW", "").split("/"))
    return tegrastats.Stats(**got)


def test_every_line_of_the_real_logs():
    seen = 0
    for name in LOGS:
        for line in log_lines(name):
            assert tegrastats.parse(line) == by_words(line), line
            seen += 1
    assert seen > 1400


@pytest.mark.parametrize("line", [line for line, _ in LINES], ids=range(len(LINES)))
def test_a_cut_line_has_fewer_numbers_not_others(line):
    whole = tegrastats.parse(line)
    for end in range(len(line)):
        cut = tegrastats.parse(line[:end])
        for name in ("ram_used_mb", "ram_total_mb", "largest_free_blocks", "largest_free_block_mb", "swap_used_mb",
                     "swap_total_mb", "swap_cached_mb", "cpu", "gpu_percent", "emc_percent"):
            assert getattr(cut, name) in (None, getattr(whole, name)), (name, line[:end])
        assert set(cut.celsius.items()) <= set(whole.celsius.items()), line[:end]
        assert set(cut.milliwatt) <= set(whole.milliwatt), line[:end]


def test_noise_and_other_formats_never_raise():
    rng = random.Random(3)
    letters = "RAMSWPCUEDG3_FQ0123456789%@[],.()/xMBkC moff-\u0663\u00b2\x00\n"
    for _ in range(3000):
        tegrastats.parse("".join(rng.choice(letters) for _ in range(rng.randrange(80))))
        text = list(NANO if rng.random() < 0.5 else L4T_36)
        for _ in range(rng.randrange(1, 6)):
            text[rng.randrange(len(text))] = rng.choice(letters)
        tegrastats.parse("".join(text))
    nothing = tegrastats.parse("")
    assert nothing == tegrastats.Stats() and nothing.cpu is None
    torn = tegrastats.parse("EMC_FREQ 3%@21x3 GR3D_FREQ 5%@[13,1x] GR3D2_FREQ 7%@1300,1300")
    assert torn == tegrastats.Stats()  # no half of a number
    assert tegrastats.parse("CPU [1%@2,?,3%@4]").cpu is None  # not a list with a hole that shifts the cores
    start = time.time()
    tegrastats.parse("RAM " + "9" * 200000 + " CPU [" + "1%@2," * 50000 + " cpu@" * 50000)
    assert time.time() - start < 2


# --- trees of files, as boards have them

def tree(root, files, links=()):
    for path, content in files.items():
        full = os.path.join(str(root), path.lstrip("/"))
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, "wb") as handle:
            handle.write(content if isinstance(content, bytes) else content.encode())
    for path, goal in dict(links).items():
        full = os.path.join(str(root), path.lstrip("/"))
        os.makedirs(os.path.dirname(full), exist_ok=True)
        os.symlink(goal, full)
    return str(root)


def release(major, revision):
    return "# R%d (release), REVISION: %s, GCID: 29818004, BOARD: t210ref, EABI: aarch64, DATE: Sat Feb 19 2022\n" % (
        major, revision)


def meminfo(total, available, more=""):
    return "MemTotal:  %d kB\nMemFree:   1000 kB\nMemAvailable:  %d kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n%s" % (
        total, available, more)


def thermal(index, kind, milli, trips=()):
    folder = "/sys/class/thermal/thermal_zone%d/" % index
    files = {folder + "type": kind + "\n", folder + "temp": "%d\n" % milli}
    for number, (name, limit) in enumerate(trips):
        files[folder + "trip_point_%d_type" % number] = name + "\n"
        files[folder + "trip_point_%d_temp" % number] = "%d\n" % limit
    return files


def devfreq(name, now, low, high, steps):
    folder = "/sys/class/devfreq/%s/" % name
    return {folder + "cur_freq": "%d\n" % now, folder + "min_freq": "%d\n" % low, folder + "max_freq": "%d\n" % high,
            folder + "available_frequencies": " ".join(map(str, steps)) + "\n"}


SWAP_HEAD = "Filename\t\t\t\tType\t\tSize\tUsed\tPriority\n"
ZRAM = SWAP_HEAD + "".join("/dev/zram%d                   partition\t506532\t%d\t5\n" % (n, n) for n in range(4))
NANO_CONF = """< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_0 1
CPU_ONLINE CORE_1 1
CPU_ONLINE CORE_2 1
CPU_ONLINE CORE_3 1
CPU_A57 MAX_FREQ -1
GPU MAX_FREQ -1
EMC MAX_FREQ 0

< POWER_MODEL ID=1 NAME=5W >
CPU_ONLINE CORE_0 1
CPU_ONLINE CORE_1 1
CPU_ONLINE CORE_2 0
CPU_ONLINE CORE_3 0
CPU_A57 MAX_FREQ 918000
GPU MAX_FREQ 640000000
# mandatory section to configure the default mode
< PM_CONFIG DEFAULT=0 >
"""
ORIN_CONF = "".join("< POWER_MODEL ID=%d NAME=%s >\nCPU_ONLINE CORE_0 1\nGPU MAX_FREQ %s\n\n" % row for row in (
    (0, "15W", 612000000), (1, "25W", 918000000), (2, "MAXN_SUPER", -1), (3, "7W", 408000000)))


def nano_44(root):
    """JetPack 4.4 as flashed, with a desktop, too hot, on a weak supply: all that can be wrong."""
    power = "/sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/"
    files = {
        "/proc/device-tree/model": b"NVIDIA Jetson Nano Developer Kit\0",
        "/proc/device-tree/compatible": b"nvidia,p3449-0000-b00+p3448-0000-b00\0nvidia,jetson-nano\0nvidia,tegra210\0",
        "/etc/nv_tegra_release": release(32, "4.3"), "/proc/swaps": ZRAM,
        "/proc/meminfo": meminfo(4059272, 350000, "NvMapMemUsed:  204800 kB\n"),
        "/var/lib/nvpmodel/status": "pmode:0001\n", "/etc/nvpmodel.conf": NANO_CONF,
        "/proc/900/comm": "Xorg\n", "/proc/901/comm": "bash\n", "/sys/devices/gpu.0/load": "995\n",
        power + "rail_name_0": "POM_5V_IN\n", power + "in_voltage0_input": "4560\n",
        power + "in_power0_input": "3227\n",
        "/var/log/kern.log": "soctherm: OC ALARM 0x00000001\nOut of memory: Kill process 77 (python3)\n",
        "/sys/class/video4linux/video0/name": "vi-output, imx219 7-0010\n",
        "/sys/block/mmcblk0/device/life_time": "0x01 0x09\n", "/dev/nvmap": "", "/dev/nvhost-gpu": "",
    }
    files.update(thermal(0, "AO-therm", 54500))
    files.update(thermal(1, "CPU-therm", 95000, [("critical", 102500), ("hot", 100500), ("passive", 97000)]))
    files.update(thermal(2, "PMIC-Die", 100000, [("passive", 90000)]))
    files.update(devfreq("57000000.gpu", 76800000, 76800000, 640000000, [76800000, 640000000, 921600000]))
    return tree(root, files, {"/etc/systemd/system/default.target": "/lib/systemd/system/graphical.target"})


def nano_461(root):
    """JetPack 4.6.1 set up with care."""
    files = {
        "/proc/device-tree/model": b"NVIDIA Jetson Nano Developer Kit\0", "/etc/nv_tegra_release": release(32, "7.1"),
        "/proc/meminfo": meminfo(4059272, 3300000),
        "/proc/swaps": SWAP_HEAD + "/mnt/4GB.swap                           file\t\t3906244\t0\t-2\n",
        "/var/lib/nvpmodel/status": "pmode:0000 fmode:quiet\n", "/etc/nvpmodel.conf": NANO_CONF,
        "/proc/901/comm": "bash\n", "/proc/902/comm": "nvargus-daemon\n", "/var/log/kern.log": "all is well\n",
        "/sys/class/video4linux/video0/name": "vi-output, imx219 7-0010\n",
        "/sys/class/video4linux/video1/name": "HD Pro Webcam C920\n",
        "/usr/local/cuda/bin/nvcc": "", "/usr/local/cuda/version.txt": "CUDA Version 10.2.300\n",
        "/sys/block/mmcblk0/device/life_time": "0x00 0x00\n", "/dev/nvmap": "", "/dev/nvhost-gpu": "",
    }
    files.update(thermal(1, "CPU-therm", 48000, [("passive", 97000)]))
    files.update(devfreq("57000000.gpu", 921600000, 921600000, 921600000, [76800000, 921600000]))
    return tree(root, files, {"/etc/systemd/system/default.target": "/lib/systemd/system/multi-user.target"})


def orin_51(root):
    """JetPack 5.1, known by its package only."""
    files = {
        "/proc/device-tree/model": b"NVIDIA Orin Nano Developer Kit\0",
        "/proc/device-tree/compatible": b"nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0",
        "/var/lib/dpkg/status": "Package: nvidia-l4t-cuda\nStatus: install ok installed\nVersion: 1.2.3-4\n\n"
                                "Package: nvidia-l4t-core\nStatus: install ok installed\nArchitecture: arm64\n"
                                "Version: 35.2.1-20230124153320\n\nPackage: zlib\nVersion: 9.9.9\n",
        "/proc/meminfo": meminfo(7513088, 5000000), "/proc/swaps": SWAP_HEAD,
        "/sys/class/devfreq/17000000.ga10b/device/load": "123\n",
        "/sys/class/hwmon/hwmon3/name": "ina3221\n", "/sys/class/hwmon/hwmon3/in1_label": "VDD_IN\n",
        "/sys/class/hwmon/hwmon3/in1_input": "5040\n", "/sys/class/hwmon/hwmon3/curr1_input": "1856\n",
        "/sys/class/hwmon/hwmon4/name": "soctherm_oc\n", "/sys/class/hwmon/hwmon4/oc1_event_cnt": "0\n",
        "/sys/class/hwmon/hwmon4/oc3_event_cnt": "37\n",
        "/usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "11.4.19"}}',
    }
    files.update(devfreq("17000000.ga10b", 306000000, 306000000, 612000000, [306000000, 624750000]))
    files.update(thermal(0, "CPU-therm", -256000))
    return tree(root, files)


def orin_62(root):
    files = {
        "/proc/device-tree/model": b"NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        "/etc/nv_tegra_release": release(36, "4.3"), "/proc/meminfo": meminfo(7802880, 6000000),
        "/proc/swaps": SWAP_HEAD + "/dev/zram0 partition 650240 0 5\n/dev/nvme0n1p3 partition 8388604 10 -2\n",
        "/var/lib/nvpmodel/status": "pmode:0001", "/etc/nvpmodel.conf": ORIN_CONF,
        "/sys/devices/platform/gpu.0/load": "7",
    }
    files.update(devfreq("17000000.gpu", 306000000, 306000000, 918000000, [306000000, 1020000000]))
    return tree(root, files, {"/etc/systemd/system/default.target": "/usr/lib/systemd/system/graphical.target"})


def orin_72(root):
    return tree(root, {"/proc/device-tree/model": b"NVIDIA Jetson Orin Nano Developer Kit Super\0",
                       "/etc/nv_tegra_release": release(39, "2.0"), "/proc/meminfo": meminfo(7802880, 6000000)})


def future(root):
    """A board of which every file has another format than ours."""
    files = {"/proc/device-tree/model": b"NVIDIA Jetson Zephyr Mini\0",
             "/etc/nv_tegra_release": "BSP 51 build 2.0-rc\n",
             "/proc/meminfo": "Total: 16 GiB\n", "/proc/swaps": "{}\n", "/var/lib/nvpmodel/status": "mode=turbo\n",
             "/etc/nvpmodel.conf": "[turbo]\ngpu=max\n", "/sys/class/thermal/thermal_zone0/type": "core\n",
             "/sys/class/thermal/thermal_zone0/temp": "hot\n", "/sys/class/devfreq/gpu-core/cur_freq": "1.2 GHz\n"}
    return tree(root, files)


BOARDS = {"4.4": nano_44, "4.6.1": nano_461, "5.1": orin_51, "6.2": orin_62, "7.2": orin_72, None: future}


def verdicts(root):
    """Dict name -> Check of a tree, in under two seconds."""
    start = time.time()
    facts, checks = examine(root)
    assert time.time() - start < 2
    json.dumps(facts, allow_nan=False)
    assert all(one.status in ("ok", "warn", "bad", "unknown") and one.found for one in checks)
    assert all(bool(one.cure) == (one.status in ("warn", "bad")) for one in checks)
    return {one.name: one for one in checks}


@pytest.mark.parametrize("name", list(BOARDS), ids=str)
def test_every_board(tmp_path, name, capsys):
    root = BOARDS[name](tmp_path)
    found = verdicts(root)
    assert len(found) >= 20 and found["board"].status == "ok"
    assert board.facts(root)["jetpack"] == name
    start = time.time()
    code = doctor.main(["--root", root, "--json"])
    assert time.time() - start < 2
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert sorted(shown) == ["board", "checks"] and shown["board"]["jetpack"] == name
    assert [one["name"] for one in shown["checks"]] == list(found)
    assert code == (2 if any(one["status"] == "bad" for one in shown["checks"]) else 0)
    assert err.startswith("nanopatch ") and board.model(root) in err.splitlines()[0]
    for one in ("numpy", "torch", "GStreamer", "largest free block", "time"):
        assert found[one].status == "unknown" and "--root" in found[one].found


def test_absolute_links_stay_in_the_tree(tmp_path):
    """As JetPack has them."""
    root = tree(nano_44(tmp_path), {"/usr/local/cuda-10.2/version.txt": "CUDA Version 10.2.300\n", "/usr/local/cuda-10.2/bin/nvcc": "",
                                    "/sys/class/hwmon/hwmon4/oc\x1b[31m_event_cnt": "1\n",
                                    "/var/log/kern.log": "Memory cgroup out of memory: Killed process 7 (python3)\n"},
                {"/usr/local/cuda": "/etc/alternatives/cuda", "/etc/alternatives/cuda": "/usr/local/cuda-10.2"})
    for name, goal in (("proc/device-tree", "/sys/firmware/devicetree/base"), ("etc/nvpmodel.conf", "/etc/nvpmodel/nano.conf")):
        os.makedirs(os.path.dirname(root + goal), exist_ok=True)
        os.rename(os.path.join(root, name), root + goal)
        os.symlink(goal, os.path.join(root, name))
    os.symlink("/a", root + "/a")
    facts = board.facts(root)
    assert facts["model"].startswith("NVIDIA Jetson Nano") and facts["power_mode"]["name"] == "5W"
    assert facts["cuda"] == {"version": "10.2.300", "nvcc": "/usr/local/cuda/bin/nvcc"}
    assert facts["alarms"]["oc?[31m"] == 1 and facts["alarms"]["killed"] == 1
    assert board.read(root, "/a/b") is None and board._paths(root, "/a/*") == []


def test_nano_44_is_ill(tmp_path, capsys):
    root = nano_44(tmp_path)
    found = verdicts(root)
    want = {"JetPack": ("bad", "4.4 (L4T 32.4.3)", "r32.7"), "memory": ("bad", "341 of 3964 MB", "ps "),
            "swap": ("warn", "1978 MB", "fallocate"), "zram": ("warn", "only swap", "disable nvzramconfig"),
            "desktop": ("warn", "Xorg", "multi-user.target"), "power mode": ("warn", "5W; MAXN", "nvpmodel -m 0"),
            "clocks": ("warn", "76 and 640 MHz", "jetson_clocks"),
            "heat": ("warn", "CPU-therm 95 C, limit 97 C", "--fan"),
            "power supply": ("bad", "4.56 V", "5 V 4 A"), "killed": ("warn", "1 in the", "kern.log"),
            "disk wear": ("warn", "90 %", "rsync"), "cameras": ("warn", "nvargus", "restart nvargus-daemon"),
            "CUDA toolkit": ("warn", "no nvcc", "nvidia-jetpack")}
    for name, (status, words, cure) in want.items():
        one = found[name]
        assert one.status == status and words in one.found and cure in one.cure, one
    assert "200 MB held by the GPU" in found["memory"].found
    assert found["GPU access"].status == found["L4T"].status == "ok"
    assert board.gpu_load(root) == 99.5 and board.meminfo(root)["NvMapMemUsed"] == 204800
    assert [zone["name"] for zone in board.zones(root)] == ["AO-therm", "CPU-therm"]
    assert board.rails(root) == [{"name": "POM_5V_IN", "millivolt": 4560, "milliwatt": 3227}]
    assert doctor.main(["--root", root]) == 2
    out = capsys.readouterr().out
    assert "bad      JetPack" in out and out.count("fallocate") == 1 and "swap, zram:" in out  # one cure for both


def test_nano_461_is_well(tmp_path):
    root = nano_461(tmp_path)
    found = verdicts(root)
    assert {name: one.found for name, one in found.items() if one.status in ("bad", "warn")} == {}
    assert found["power mode"].found.startswith("MAXN") and found["CUDA toolkit"].found == "CUDA 10.2.300"
    assert all(found[name].status == "ok" for name in ("desktop", "zram", "clocks", "power supply", "heat", "killed"))
    assert "/dev/video1 HD Pro Webcam C920" in found["cameras"].found and "csi://0" in found["cameras"].found
    assert found["disk wear"].status == "unknown"  # 0x00: the card does not say
    assert doctor.main(["--root", root]) == 0


def test_orins(tmp_path):
    found = verdicts(orin_51(tmp_path / "5"))
    assert found["L4T"].found == "35.2.1" and found["JetPack"].status == "ok"
    assert found["swap"].status == "warn" and found["swap"].found == "none" and "nvzramconfig" not in found["swap"].cure
    assert found["power supply"].status == "warn" and "oc3 37 times" in found["power supply"].found
    assert board.rails(str(tmp_path / "5")) == [{"name": "VDD_IN", "millivolt": 5040, "milliwatt": 9354}]
    assert board.gpu_load(str(tmp_path / "5")) == 12.3 and board.zones(str(tmp_path / "5")) == []
    assert board.cuda(str(tmp_path / "5"))["version"] == "11.4.19"
    found = verdicts(orin_62(tmp_path / "6"))
    assert found["power mode"].cure == "sudo nvpmodel -m 2" and "25W" in found["power mode"].found
    assert found["swap"].status == found["zram"].status == "ok" and found["desktop"].status == "warn"
    assert board.gpu_load(str(tmp_path / "6")) == 0.7
    found = verdicts(orin_72(tmp_path / "7"))
    assert found["JetPack"].found == "7.2 (L4T 39.2.0)"


def test_a_future_board_is_unknown_not_ill(tmp_path):
    found = verdicts(future(tmp_path))
    assert found["board"].found == "NVIDIA Jetson Zephyr Mini"
    seen = ("board", "disk space", "disk writable", "CUDA toolkit")
    assert {one.status for name, one in found.items() if name not in seen} == {"unknown"}


def test_off_a_jetson_nothing_frightens(tmp_path):
    found = verdicts(tree(tmp_path, {"/proc/meminfo": meminfo(16000000, 9000000),
                                     "/proc/device-tree/model": b"Board Of Pi\0"}))
    assert found["board"].status == "unknown" and "not a Jetson: Board Of Pi" == found["board"].found
    assert found["swap"].found == "not a Jetson" and found["memory"].status == "ok"
    assert not [one for one in found.values() if one.status in ("bad", "warn")]


@pytest.mark.parametrize("release,name", [
    ("32.4.3", "4.4"), ("32.6.1", "4.6"), ("32.7.1", "4.6.1"), ("32.7.6", "4.6.6"), ("35.6.2", "5.1.5"),
    ("36.4.7", "6.2.1"), ("38.4.0", "7.1"), ("39.2.0", "7.2"), ("39.2", "7.2"), ("39.3.0", board.NEWER),
    ("51.0", board.NEWER), ("32.3.1", None), (None, None)])
def test_jetpack_of_a_release(release, name):
    assert board.jetpack(release) == name


def test_a_newer_release_is_not_bad(tmp_path):
    root = tree(tmp_path, {"/etc/nv_tegra_release": release(51, "1.0")})
    found = verdicts(root)["JetPack"]
    assert found.status == "unknown" and found.found == "newer than this program knows (L4T 51.1.0)"
    old = tree(tmp_path / "old", {"/etc/nv_tegra_release": release(28, "2.1")})
    assert verdicts(old)["JetPack"].status == "bad"


# --- damage

def every_path(root):
    return [os.path.join(folder, name) for folder, _dirs, names in os.walk(root) for name in names]


@pytest.mark.parametrize("seed", range(4))
def test_garbage_in_every_file(tmp_path, seed, capsys):
    rng = random.Random(seed)
    root = nano_44(tmp_path)
    orin_51(tmp_path / "5")
    for path in every_path(root):
        if not os.path.islink(path):
            kind = rng.randrange(5)
            with open(path, "rb") as handle:
                before = handle.read()
            noise = bytes(rng.randrange(256) for _ in range(rng.randrange(400)))
            with open(path, "wb") as handle:
                handle.write([noise, b"", b"9" * 5000, before[:len(before) // 2] + noise, b"-1\n"][kind])
    for place in (root, root + "/5"):
        verdicts(place)
        for flag in ([], ["--json"]):
            assert doctor.main(["--root", place] + flag) in (0, 2)
            out = capsys.readouterr().out
            assert all(char == "\n" or " " <= char <= "~" for char in out)  # nothing that steers a terminal


def test_folders_pipes_and_loops_where_files_should_be(tmp_path):
    root = nano_44(tmp_path)
    for index, path in enumerate(sorted(every_path(root))):
        os.remove(path)
        if index % 3 == 0:
            os.mkdir(path)
        elif index % 3 == 1:
            os.mkfifo(path)
        else:
            os.symlink(path, path)
    found = verdicts(root)
    assert not [one for one in found.values() if one.status == "bad"]


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
    """Root may read anything, and tests run as root at places: the refusal is made by hand."""
    root = nano_44(tmp_path)
    for path in every_path(root):
        if not os.path.islink(path):
            os.chmod(path, 0)
    real = builtins.open

    def refuse(path, *rest, **options):
        if str(path).startswith(root) and stat.S_IMODE(os.stat(path).st_mode) == 0:
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = verdicts(root)
    assert found["GPU access"].status == "bad" and "video" in found["GPU access"].cure
    assert found["memory"].status == found["heat"].status == found["killed"].status == "unknown"
    assert doctor.main(["--root", root]) == 2


def test_an_unreadable_tree_as_another_user(tmp_path):
    if os.getuid():
        pytest.skip("needs root, to become nobody")
    root = nano_44(tmp_path)  # below a folder that nobody may enter
    verdicts(root)            # imports what it needs while it may
    os.seteuid(65534)
    try:
        found = verdicts(root)
    finally:
        os.seteuid(0)
    assert found["board"].found.startswith("not a Jetson") and found["disk space"].status == "unknown"


# --- this machine, by probes that answer as boards do

def sick(root, **ran):
    """Verdicts on the board below root as if it were this machine and the probes had said this."""
    answers = {name: Ran(0, "1.0") for name in doctor.PROBES}
    answers.update(gst=Ran(127, ""), tegrastats=Ran(None, ""), torch=Ran(0, "1.10.0 10.2 True"),
                   tensorrt=Ran(0, "8.2.1.8"), pip=Ran(0, "21.3.1"))
    answers.update(ran)
    machine = doctor.Machine(board.facts(root), True, answers)
    return {name: doctor.Check(name, *function(machine)) for name, _needs, function in doctor.CHECKS}


def test_what_imports_die_of(tmp_path):
    root = nano_461(tmp_path)
    found = sick(root)
    assert all(found[name].status == "ok" for name in ("numpy", "torch", "TensorRT", "libgomp", "pip", "pycuda"))
    tls = Ran(1, "Traceback\nImportError: libgomp.so.1: cannot allocate memory in static TLS block")
    found = sick(root, numpy=Ran(-4, ""), torch=tls)
    assert found["numpy"].status == "bad" and "OPENBLAS_CORETYPE=ARMV8" in found["numpy"].cure
    assert found["torch"].status == found["libgomp"].status == "bad" and "LD_PRELOAD=" in found["libgomp"].cure
    assert "torch" in found["libgomp"].found and found["torch"].cure == found["libgomp"].cure
    absent = Ran(1, "Traceback\nModuleNotFoundError: No module named 'tensorrt'")
    found = sick(root, torch=Ran(0, "2.1.0+cpu None False"), tensorrt=absent,
                 pycuda=Ran(1, "No module named 'pycuda'"), onnx=Ran(None, ""), onnxruntime=Ran(-11, ""))
    assert found["torch"].status == "bad" and "NVIDIA's wheel" in found["torch"].cure
    assert found["TensorRT"].status == "bad"
    assert found["pycuda"].status == "warn" and "/usr/local/cuda/bin" in found["pycuda"].cure
    assert "no answer" in found["onnx"].found and "signal 11" in found["ONNX Runtime"].found
    assert sick(root, tensorrt=Ran(0, "8.0.1.6"))["TensorRT"].status == "bad"
    assert sick(root, pip=Ran(0, "9.0.1"))["pip"].status == "warn"
    assert sick(root, numpy=Ran(1, "ModuleNotFoundError: No module named 'numpy'"))["numpy"].found == "not installed"


@pytest.mark.parametrize("shut,cure", [("false", "/venv/pyvenv.cfg"), ("true", "apt install python3-libnvinfer")])
def test_a_venv_that_hides_tensorrt(tmp_path, monkeypatch, shut, cure):
    venv = tree(tmp_path / "venv", {"pyvenv.cfg": "home = /usr/bin\ninclude-system-site-packages = %s\n" % shut})
    monkeypatch.setattr(sys, "prefix", venv)
    found = sick(nano_461(tmp_path / "board"), tensorrt=Ran(1, "ModuleNotFoundError: No module named 'tensorrt'"))
    assert found["TensorRT"].status == "bad" and cure in found["TensorRT"].cure


def test_gstreamer_elements(tmp_path):
    root = nano_461(tmp_path)
    names = doctor.ELEMENTS + doctor.ELEMENTS_JETSON
    listing = "".join("some:  %s: What it does\n" % name for name in names) + "typefindfunctions: text/plain: txt\n"
    found = sick(root, gst=Ran(0, listing))
    assert found["GStreamer"].status == found["GStreamer elements"].status == "ok"
    found = sick(root, gst=Ran(0, listing.replace(" nvarguscamerasrc:", " nvother:")))["GStreamer elements"]
    assert (found.status, found.found) == ("warn", "missing: nvarguscamerasrc") and "nvidia-l4t-gstreamer" in found.cure
    pc = tree(tmp_path / "pc", {"/proc/meminfo": ""})
    assert sick(pc, gst=Ran(0, listing.replace(" nvarguscamerasrc:", " nvother:")))["GStreamer elements"].status == "ok"
    assert sick(root)["GStreamer"].status == "warn"


def test_largest_free_block(tmp_path):
    root = nano_461(tmp_path)
    assert sick(root, tegrastats=Ran(None, NANO + "\n" + NANO[:40]))["largest free block"].found == "140 of 4 MB"
    found = sick(root, tegrastats=Ran(None, L4T_39))["largest free block"]
    assert found.status == "warn" and "drop_caches" in found.cure
    assert sick(root, tegrastats=Ran(127, ""))["largest free block"].status == "unknown"


def test_display_and_time(tmp_path, monkeypatch):
    root = nano_461(tmp_path)
    monkeypatch.setenv("SSH_CONNECTION", "1 2 3 4")
    monkeypatch.setenv("DISPLAY", "localhost:10.0")
    monkeypatch.setattr(time, "time", lambda: 86400.0)
    found = sick(root)
    assert found["display"].cure == "unset DISPLAY"
    assert found["time"].status == "bad" and "set-ntp" in found["time"].cure


def test_a_program_that_never_ends_is_killed():
    start = time.time()
    code = "import os, time; print('\\x1b[31m', os.getpid(), flush=True); time.sleep(60)"
    ran = doctor.run([sys.executable, "-c", code], 1.5)
    assert time.time() - start < 10 and ran.code is None and "\x1b" not in ran.text
    with pytest.raises(ProcessLookupError):
        os.kill(int(ran.text.split()[1]), 0)
    assert doctor.run(["no-such-program-here"], 1) == Ran(127, "")
    ran = doctor.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 4)"], 20)
    assert ran.code == -4


MAIN = ("import sys; from jetson.doctor import main; code = main(sys.argv[1:]); "
        "print([n for n in ('numpy', 'PIL', 'torch') if n in sys.modules], file=sys.stderr); sys.exit(code)")


@pytest.mark.slow
def test_this_machine():
    """As a user types it, in a process of its own, which must not itself import what it examines."""
    done = subprocess.run([sys.executable, "-c", MAIN, "--json"], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=120)
    assert done.returncode in (0, 2), done.stderr
    shown = json.loads(done.stdout.decode())
    found = {one["name"]: one for one in shown["checks"]}
    assert found["numpy"]["status"] == "ok" and found["Pillow"]["status"] == "ok", found
    assert found["our packages"]["status"] == found["time"]["status"] == "ok"
    assert done.stderr.decode().splitlines()[-1] == "[]"


def test_wrong_usage(tmp_path, capsys):
    assert doctor.main(["--rot", str(tmp_path)]) == 2
    assert "--root" in capsys.readouterr().err
    assert doctor.main(["--root", str(tmp_path / "gone")]) == 5
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--help"])
    assert stopped.value.code == 0 and "seconds" in capsys.readouterr().out
