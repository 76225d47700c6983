"""What the tests share: Emoji VOC unpacked once, a miniature of it, the tiny CLIP, short runs."""
import contextlib
import functools
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# before torch, and for child processes: bits depend on the threads, which must not spin in vain
os.environ.update(OMP_NUM_THREADS="2", GOMP_SPINCOUNT="1000")
if not os.environ.get("RECTIFY_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "emoji")]

import numpy as np
import open_clip
import pytest
import rectify
import torch

torch.set_num_threads(2)
once = functools.partial(pytest.fixture, scope="session")

def run(main, *args):
    """A script's main in this process; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([str(a) for a in args])
    return printed.getvalue()

# the arguments of a short run on a folder like `mini`; repeatable images; a mask as VOC has it
own = lambda data, out, *more: [
    *"--dataset emoji --epochs 6 --views 1".split(), "--data", data, "--out", out, *more]
noise = lambda *shape: torch.from_numpy(
    np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8))
write_mask = lambda path, array: rectify.write(path, rectify.palette_png(np.uint8(array)))

@once(autouse=True)
def fp32():
    """No bfloat16: equal bits on every processor. Gives the function that would decide."""
    decides, distill = rectify.in_half, sys.modules.get("distill", rectify)
    off = lambda device: torch.autocast(device.type, torch.bfloat16, enabled=False)
    with mock.patch.object(rectify, "in_half", off), mock.patch.object(distill, "in_half", off):
        yield decides

@once(autouse=True)
def text_features_once():
    """T once for equal names and an equal CLIP, a second in dozens of runs; a tokenizer once."""
    compute, known, get = rectify.text_features, {}, functools.cache(open_clip.get_tokenizer)

    def remembered(clip, tokenizer, names):             # repr: which GELU
        key = repr(clip), *names, *(p.double().sum().item() for p in clip.parameters())
        known[key] = known[key] if key in known else compute(clip, tokenizer, names)
        return known[key]

    with mock.patch.object(rectify, "text_features", remembered), mock.patch.object(
            open_clip, "get_tokenizer", get):
        yield

@once
def emoji(tmp_path_factory):
    """The folder to give as --root: Emoji VOC, unpacked by the very code that a user runs."""
    root = tmp_path_factory.mktemp("data")
    rectify.dataset_folder(rectify.configure(root=str(root)))
    return root

@once
def mini(emoji, tmp_path_factory):
    """A folder for --data: VOC's layout, 24 training and 8 validation images, names.txt."""
    source = rectify.dataset_folder(rectify.configure(root=str(emoji)))
    folder = tmp_path_factory.mktemp("own") / "mini"
    for split, count in (("train", 24), ("val", 8)):
        samples = sorted(rectify.list_samples(source, split))
        samples = samples[::len(samples) // count][:count]
        for path in [path for sample in samples for path in sample[1:]]:
            rectify.write(folder / path.relative_to(source), path.read_bytes())
        rectify.write(folder / f"ImageSets/Segmentation/{split}.txt",
                      "\n".join(sample.name for sample in samples))
    rectify.write(folder / "names.txt", "\n".join(rectify.VOC_NAMES))
    return folder

@once
def tiny():
    """The tiny CLIP that ships with the repository, and its tokenizer."""
    return rectify.load_clip(rectify.configure(), torch.device("cpu"))

@once
def trained(mini, tmp_path_factory):
    """A finished short run of each method on `mini`: {method: its out, printed and json}."""
    runs = {}
    for method in ("reclip", "reclip++"):
        out = tmp_path_factory.mktemp("runs") / method
        printed = run(rectify.main, *own(mini, out, "--method", method))
        report = json.loads((out / "rectify.json").read_text())
        runs[method] = SimpleNamespace(out=out, printed=printed, json=report)
    return runs

@once
def taught(trained, tmp_path_factory):
    """A folder with the rectify.pt of a short run and its student of eight epochs."""
    import distill
    out = tmp_path_factory.mktemp("taught")
    shutil.copy(trained["reclip++"].out / "rectify.pt", out)
    run(distill.main, "--out", out, "--epochs", 8)
    return out
