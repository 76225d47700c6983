"""README's tables on Emoji VOC: what each reading of the method is worth, over several seeds.

    python tests/ablations.py readings      # mean and spread of mIoU on val over seeds 0, 1, 2
    python tests/ablations.py t             # the sweep of the hypothesis's threshold (Table 9)
    python tests/ablations.py teachers      # DeepLabV2 after each teacher (Table 11)
    python tests/ablations.py losses        # and with some of its three losses

The first two compute the augmented views once a seed and share them among all variants; all else is what `python rectify.py`
does. The last two run `rectify.py` once a seed and `distill.py` for every row.
"""
import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import distill  # noqa: E402  (after the path to it)
import rectify  # noqa: E402

TABLES = {
    "readings": {
        "ReCLIP": dict(method="reclip"),
        "ReCLIP++": dict(method="reclip++"),
        "ReCLIP, one prompt for all classes": dict(method="reclip", prompt="shared"),
        "ReCLIP, unit rows of R": dict(method="reclip", norm="rows"),
        "ReCLIP, without the space term P": dict(method="reclip", space="off"),
        "ReCLIP, mean over the mask": dict(method="reclip", pool="mask"),
        "ReCLIP, threshold on the cosine": dict(method="reclip", hypothesis="threshold", t=0.33)},
    "t": {f"ReCLIP, t = {t}": dict(method="reclip", t=t) for t in (0.02, 0.05, 0.1, 0.3, 0.6)},
}
STUDENTS = {
    "teachers": {"ReCLIP++": [], "MaskCLIP (MaskCLIP+)": ["--teacher", "maskclip"]},
    "losses": {"mask, feature, text": [], "mask, feature": ["--text-weight", "0"], "mask, text": ["--feature-weight", "0"],
               "mask": ["--feature-weight", "0", "--text-weight", "0"]},
}


def measure(options, seed, views):
    """mIoU of a variant and of MaskCLIP, precision and recall of its hypothesis. views: {seed: (x, valid)}, filled here."""
    cfg = rectify.complete(rectify.Config(seed=seed, **options))
    folder = rectify.dataset_folder(cfg)
    train, val = (rectify.list_samples(folder, split) for split in ("train", "val"))
    np.random.seed(seed)
    torch.manual_seed(seed)
    segmenter = rectify.Segmenter(cfg, rectify.VOC_NAMES, rectify.pick_device(cfg))
    if seed not in views:
        views[seed] = rectify.training_data(segmenter, train)[:2]
    y = rectify.hypotheses(segmenter, train).to(segmenter.device)
    with tempfile.TemporaryDirectory() as out:
        rectify.train(segmenter, (*views[seed], y), Path(out), resume=False)
    results, _ = rectify.evaluate(lambda images: rectify.predict(segmenter, images), val, segmenter.names)
    quality = rectify.judge(rectify.hypotheses(segmenter, val), rectify.classes_present(val, len(segmenter.names)))
    return results[cfg.method]["mIoU"], results["maskclip"]["mIoU"], quality["precision"], quality["recall"]


def student(options, seed, runs):
    """mIoU of a student and of its teacher. runs: folder of a run of rectify.py for each seed, filled here."""
    out = runs / str(seed)
    with open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):
        if not out.is_dir():
            rectify.main(["--seed", str(seed), "--out", str(out)])
        distill.main(["--seed", str(seed), "--out", str(out), *options])
    report = out / ("maskclip" if "maskclip" in options else "") / "distill.json"
    results = json.loads(report.read_text())["results"]
    return results["student"]["mIoU"], results["maskclip" if "maskclip" in options else "reclip++"]["mIoU"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=[*TABLES, *STUDENTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if args.table in STUDENTS:
        print("| | student | teacher | gain |\n|---|---|---|---|")
        with tempfile.TemporaryDirectory() as runs:
            for title, options in STUDENTS[args.table].items():
                found = np.array([student(options, seed, Path(runs)) for seed in args.seeds])
                mine, theirs = found.mean(0)
                print(f"| {title} | {mine:.1f} ± {found[:, 0].std():.1f} | {theirs:.1f} | {mine - theirs:+.1f} |", flush=True)
        return
    views = {}
    print("| | mIoU | gain over MaskCLIP | precision / recall of y |\n|---|---|---|---|")
    for title, options in TABLES[args.table].items():
        runs = np.array([measure(options, seed, views) for seed in args.seeds])
        mine, base, precision, recall = runs.mean(0)
        print(f"| {title} | {mine:.1f} ± {runs[:, 0].std():.1f} | {mine - base:+.1f} | {precision:.2f} / {recall:.2f} |", flush=True)


if __name__ == "__main__":
    main()
