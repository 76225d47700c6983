"""README's tables on Emoji VOC: what each reading of the method is worth, over several seeds.

    python tests/ablations.py readings      # mean and spread of mIoU on val over seeds 0, 1, 2
    python tests/ablations.py t             # the sweep of the hypothesis's threshold (Table 9)

The augmented views are computed once a seed and shared by all variants; all else is what `python rectify.py` does.
"""
import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rectify  # noqa: E402  (after the path to it)

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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    views = {}
    print("| | mIoU | gain over MaskCLIP | precision / recall of y |\n|---|---|---|---|")
    for title, options in TABLES[args.table].items():
        runs = np.array([measure(options, seed, views) for seed in args.seeds])
        mine, base, precision, recall = runs.mean(0)
        print(f"| {title} | {mine:.1f} ± {runs[:, 0].std():.1f} | {mine - base:+.1f} | {precision:.2f} / {recall:.2f} |", flush=True)


if __name__ == "__main__":
    main()
