"""What watching for pressure costs, and what each level saves:

    python scripts/bench/pressure_cost.py [--width 4] [--patch 256] [--frames 6] [--rounds 5]

A U-Net in tiles on a frame of 1280x720 px, from picture to mask. Looking reads this machine's files, and a tree of files as a
Nano has them (simulated: 8 thermal zones of 3 trip points, 4 cores, a GPU, a control group, a log). Frames with pressure off and
auto, and then those of each level, take turns in one process. Prints CPU time, for that is what a busy machine leaves true; only
"working" is wall time, of a frame against that frame and its pause."""
import argparse
import json
import os
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def nano(root):
    """Write the tree of a calm Nano below root."""
    files = {"proc/meminfo": "MemTotal: 4059272 kB\nMemAvailable: 3000000 kB\n", "proc/self/cgroup": "4:memory:/box\n",
             "sys/fs/cgroup/memory/box/memory.limit_in_bytes": 3 << 30, "sys/fs/cgroup/memory/box/memory.usage_in_bytes": 1 << 30,
             "sys/fs/cgroup/memory/box/memory.stat": "total_inactive_file 1\ntotal_active_file 1\n",
             "var/lib/nvpmodel/status": "pmode:0000", "var/log/kern.log": "a line of the kernel's log\n" * 10000,
             "sys/class/devfreq/57000000.gpu/max_freq": 921600000}
    for core in range(4):
        files["sys/devices/system/cpu/cpu%d/cpufreq/scaling_max_freq" % core] = 1479000
    for zone in range(8):
        files.update({"sys/class/thermal/thermal_zone%d/%s" % (zone, name): value for name, value in (
            ("type", "zone-%d" % zone), ("temp", 45000), ("trip_point_0_temp", 102500), ("trip_point_0_type", "critical"),
            ("trip_point_1_temp", 100500), ("trip_point_1_type", "hot"), ("trip_point_2_temp", 97000),
            ("trip_point_2_type", "passive"))})
    for path, value in files.items():
        os.makedirs(os.path.join(root, os.path.dirname(path)), exist_ok=True)
        with open(os.path.join(root, path), "w") as handle:
            handle.write(str(value))
    return root


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--patch", type=int, default=256)
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, ROOT)
    import numpy as np

    from edge import loop, pressure
    from edge.backends import ort
    from edge.pipeline import Segmenter
    from edge.sinks import Memory
    from edge.sources import open_source
    from export import to_onnx
    from train_lite.config import TrainConfig, mode_settings
    from train_lite.data.dataset import read_classes
    from train_lite.evaluate import recipe
    from train_lite.models import build

    class Clock:
        """Time for looks that need not wait."""
        now = 0.0

        def monotonic(self):
            return self.now

    def look_ms(root):
        clock = Clock()
        one, start = pressure.Pressure(True, root=root, clock=clock), time.process_time()
        for _ in range(200):
            clock.now += pressure.LOOK_S
            one.begin()
        return (time.process_time() - start) * 1000 / 200

    def frames(segmenter, frame, one):
        """(CPU ms of a frame, share of the wall time that is work), of some frames with their pauses."""
        sinks, work, busy_s, wall_s = Memory(), 0.0, time.process_time(), time.perf_counter()
        for _frame, line in loop.steps([frame] * args.frames, segmenter, sinks, one):
            work += sum(line["latency_ms"].values())
        return (time.process_time() - busy_s) * 1000 / args.frames, work / 1000 / (time.perf_counter() - wall_s)

    def in_turns(segmenter, frame, makers):
        """frames() with what each of `makers` makes, a round after the other, without the first: (rounds, makers, 2)."""
        rows = [[frames(segmenter, frame, maker()) for maker in makers] for _ in range(args.rounds + 1)]
        return np.array(rows[1:])

    def held(index):
        """A Pressure that stays at a level."""
        one = pressure.Pressure(True, "off", least_rate=0.0)
        one.levels, one.level = pressure.LEVELS, index
        return one

    config = TrainConfig(mode="tiled", fit="none", patch=args.patch, overlap=32)
    net = to_onnx.folded(build("unet", args.width, "frozen", 1, "none"))
    with tempfile.TemporaryDirectory() as folder:
        made, files = to_onnx.write(folder, "net", net, config, read_classes(folder, config),
                                    recipe(mode_settings(config), args.patch, 1), "tiled")
        board = nano(os.path.join(folder, "nano"))
        result = {"look_ms": {"this machine": look_ms("/"), "Nano, simulated": look_ms(board)}}
        frame = next(open_source("synthetic://1280x720"))
        with Segmenter(made, files, ort, args.threads) as segmenter:
            off, auto = in_turns(segmenter, frame, [
                lambda mode=mode: pressure.Pressure(True, mode, root=board) for mode in ("off", "auto")])[..., 0].T
            result.update(off_ms=float(np.median(off)), auto_ms=float(np.median(auto)), auto_by_off=float(np.median(auto / off)))
            levels = in_turns(segmenter, frame, [lambda index=index: held(index) for index in range(len(pressure.LEVELS))])
            ratios = np.median(levels[..., 0] / levels[:, :1, 0], axis=0)
            result["levels"] = [{"cpu_ms": ms, "of_full": ratio, "working": share} for (ms, share), ratio in zip(
                np.median(levels, axis=0).tolist(), ratios.tolist())]
    if args.json:
        print(json.dumps(result))
        return
    print("U-Net width %d, tiles of %d px, 1280x720, %d threads, %d rounds of %d frames, CPU ms" % (
        args.width, args.patch, args.threads, args.rounds, args.frames))
    for name, ms in result["look_ms"].items():
        print("a look at %-15s %7.2f, of a frame %.2f %%, of the time at most %.2f %%" % (
            name, ms, 100 * ms / result["off_ms"], 100 * ms / (1000 * pressure.LOOK_S)))
    print("a frame with pressure off %(off_ms).1f, auto %(auto_ms).1f, auto / off %(auto_by_off).3f" % result)
    for index, row in enumerate(result["levels"]):
        print("level %d: %7.1f, %.2f of full, working %3.0f %% of the time" % (
            index, row["cpu_ms"], row["of_full"], 100 * row["working"]))


if __name__ == "__main__":
    main()
