"""A picture of the live page for the documents: edge-run as its users run it, seen by headless Chromium, which must be installed.

    python -m train_lite --res 512 --width 8 --epochs 24 --lr 3e-3
    python -m export runs/train/last --out model.onnx
    python scripts/bench/live_page.py model.onnx 'gst://multifilesrc location=runs/demo-512/train/image/%03d.png loop=true
        caps=image/png,framerate=1/1 ! pngdec ! videoconvert' --out docs/live.jpg [--seconds 60]

A desk's width on the left, in light; a phone's on the right, in dark."""
import argparse
import contextlib
import io
import os
import signal
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HEIGHT_PX, GAP_PX = 1180, 16
DESK = {"width": 1240, "height": HEIGHT_PX}
PHONE = {"width": 390, "height": HEIGHT_PX, "scale": 2, "phone": True, "dark": True}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("input")
    parser.add_argument("--out", default="live.jpg")
    parser.add_argument("--seconds", type=float, default=60.0, help="before the picture is taken: the charts fill")
    args = parser.parse_args()
    sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
    from PIL import Image

    import chromium
    command = [sys.executable, "-m", "edge.cli", "--engine", args.model, "--input", args.input, "--frames", "1000000",
               "--output", "http://127.0.0.1:0"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=ROOT))
    try:
        said = ""
        while not said.startswith("live page: "):
            said = run.stderr.readline().decode()
            if not said:
                sys.exit("edge-run has ended; try it alone: %s" % " ".join(command))
        with contextlib.ExitStack() as stack:
            pages = [stack.enter_context(chromium.Page(**options)) for options in (DESK, PHONE)]
            for page in pages:
                page.open(said.split()[-1])
                page.wait("document.getElementById('stream').naturalWidth > 0")
            time.sleep(args.seconds)
            desk, phone = [Image.open(io.BytesIO(page.screenshot())).convert("RGB") for page in pages]
            assert not pages[0].complaints + pages[1].complaints, pages[0].complaints + pages[1].complaints
    finally:
        run.send_signal(signal.SIGINT)
        run.communicate()
    phone = phone.resize((PHONE["width"], HEIGHT_PX), Image.LANCZOS)
    both = Image.new("RGB", (desk.width + GAP_PX + phone.width, HEIGHT_PX), (255, 255, 255))
    both.paste(desk, (0, 0))
    both.paste(phone, (desk.width + GAP_PX, 0))
    both.save(args.out, quality=85)
    print("%s: %dx%d, %d kB" % (args.out, both.width, both.height, os.path.getsize(args.out) // 1000))


if __name__ == "__main__":
    main()
