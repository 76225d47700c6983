"""PASCAL VOC at its true size, without PASCAL VOC: what a first run costs, stage by stage.

    python tests/rehearsal.py               # about a quarter of an hour on one core
    python tests/rehearsal.py --batch 4     # distill.py with less memory; --share 100: faster

Made photographs of VOC's number and size come in VOC's own tar from a server on this machine, and
CLIP has random weights in the hub's cache, so that the default command lines run without internet:
`rectify.py --dataset voc` on every tenth image with one epoch and one view, then `distill.py` and
`export.py` on a tenth of these, one epoch. Of each stage the seconds, the peak of the process's
memory, and the hours that VOC's full schedule would take on the same machine: the seconds times the
images, views and epochs left out. Also in runs/rehearsal/rehearsal.json.
"""
import argparse
import functools
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import re
import sys
import tarfile
import threading
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(Path("runs/rehearsal/hub").resolve())}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rectify  # noqa: E402  (after the path to it, and before torch)
import distill  # noqa: E402
import export  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

OUT, IMAGES = Path("runs/rehearsal"), {"train": 1464, "val": 1449}          # VOC's lists
fork = multiprocessing.get_context("fork")              # a child knows what is replaced here
rows = fork.Manager().dict()                            # all processes write into it

def made(number, size=(500, 375)):
    """(A JPEG, its mask's PNG): coarse noise and an ellipse of one class."""
    draw = np.random.default_rng(number)
    image = Image.fromarray(draw.integers(0, 256, (30, 40, 3), np.uint8)).resize(size)
    y, x = np.indices(size[::-1])
    near = (x / size[0] - draw.uniform(0.3, 0.7)) ** 2 + (y / size[1] - 0.5) ** 2
    mask = np.where(near < 0.04, 1 + number % 20, 0)
    mask[(near > 0.04) & (near < 0.045)] = rectify.VOID
    image.save(buffer := io.BytesIO(), "JPEG", quality=90)
    return buffer.getvalue(), rectify.palette_png(mask.astype(np.uint8))

def make_archive(path):
    """VOC's tar, with the files of all images on its lists."""
    with tarfile.open(path, "w") as tar:
        def add(name, content):
            info = tarfile.TarInfo(f"VOCdevkit/VOC2012/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for split, count in IMAGES.items():
            names = [f"2007_{split}{k:06}" for k in range(count)]
            add(f"ImageSets/Segmentation/{split}.txt", "\n".join(names).encode())
            for k, name in enumerate(names):
                image, mask = made(k)
                add(f"JPEGImages/{name}.jpg", image)
                add(f"SegmentationClass/{name}.png", mask)

def make_clip():
    """OpenAI's ViT-B/16 with random weights, where the hub keeps what it has downloaded."""
    model = rectify.open_clip.create_model("ViT-B-16-quickgelu", load_weights=False)
    about = rectify.open_clip.get_pretrained_cfg("ViT-B-16-quickgelu", "openai")["hf_hub"]
    home = OUT / "hub" / ("models--" + about.strip("/").replace("/", "--"))
    rectify.write(home / "refs/main", b"0")
    (home / "snapshots/0").mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), home / "snapshots/0/open_clip_pytorch_model.bin")

def serve(folder):
    """The address of a server of this folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.func.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None               # torchvision asks first, and hangs up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"

def alone(function, *args):
    """Call it in a process of its own, as a user calls a script: its memory begins anew."""
    process = fork.Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)

def timed(title, function, whole):
    """The function, which also notes its seconds, the process's peak of memory meanwhile, and what
    the whole of VOC would take: `whole` times as long."""
    @functools.wraps(function)
    def call(*args, **options):
        Path("/proc/self/clear_refs").write_text("5")               # the peak begins anew
        started = time.time()
        result = function(*args, **options)
        seconds, status = time.time() - started, Path("/proc/self/status").read_text()
        rows.setdefault(title, {             # a later call finds the work done
            "seconds": seconds, "GB": int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2 ** 20,
            "hours of VOC": seconds * whole / 3600})
        print(title, {k: round(v, 3) for k, v in rows[title].items()}, flush=True)
        return result
    return call

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--share", type=int, default=10, help="every so many images (default 10)")
    parser.add_argument("--batch", default="12", help="of distill.py (default 12, as for VOC)")
    args = parser.parse_args()
    share = args.share
    OUT.mkdir(parents=True, exist_ok=True)
    (file, _, address), splits = rectify.DATASETS["voc"][0][0], rectify.splits
    served = OUT / "served" / address.partition("://")[2]           # under thor's own path
    served.parent.mkdir(parents=True, exist_ok=True)
    if not served.is_file():
        alone(make_archive, served)
        alone(make_clip)
    md5 = hashlib.file_digest(open(served, "rb"), "md5").hexdigest()
    url = serve(OUT / "served") + address.partition("://")[2]
    rectify.DATASETS["voc"] = ([(file, md5, url)], *rectify.DATASETS["voc"][1:])
    rectify.splits = lambda folder: [samples[::share] for samples in splits(folder)]
    epochs, measures = rectify.RECIPES["voc"]["epochs"], (rectify.evaluate, rectify.save_galleries)
    for name, title, whole in (
            ("dataset_folder", "fetch and unpack", 1), ("check_labels", "check the labels", share),
            ("training_data", "features", share * rectify.Config.views),
            ("train", "training", share * epochs), ("evaluate", "evaluation", share),
            ("save_galleries", "figures", 1)):
        setattr(rectify, name, timed(title, getattr(rectify, name), whole))
    folder = ["--root", str(OUT), "--out", str(OUT / "run")]
    alone(rectify.main, ["--dataset", "voc", "--epochs", "1", "--views", "1", *folder])
    share *= 10
    epochs = distill.RECIPES["voc"]["epochs"]
    distill.train = timed("distilling", distill.train, share * epochs)
    for function, title, whole in zip(measures, ("student: evaluation", "student: figures"),
                                      (share, 1)):
        setattr(rectify, function.__name__, timed(title, function, whole))
    alone(distill.main, ["--epochs", "1", "--batch", args.batch, "--out", str(OUT / "run")])
    checked = share * export.CHECKED / IMAGES["val"]    # as many times the photographs of today
    alone(timed("export", export.main, checked), ["--out", str(OUT / "run")])
    report = {"rows": dict(rows), **rectify.versions()}
    rectify.write(OUT / "rehearsal.json", json.dumps(report, indent=1))
    print("\n| stage | seconds | GB | hours of VOC |\n|---|---|---|---|")
    for title, row in rows.items():
        print(f"| {title} | {row['seconds']:.0f} | {row['GB']:.1f} | {row['hours of VOC']:.2f} |")

if __name__ == "__main__":
    main()
