"""README's tables on Emoji VOC: what each reading of the method is worth, over several seeds.

    python tests/ablations.py readings      # mean and spread of mIoU on val over seeds 0, 1, 2
    python tests/ablations.py t             # the sweep of the hypothesis's threshold (Table 9)
    python tests/ablations.py losses        # DeepLabV2 with some of its three losses, after four epochs; goes on with the newest run

The augmented views are computed once a seed and shared by all variants, and what the teacher says once for all students; all
else is what `python rectify.py` and `python distill.py` do.
"""
import argparse
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


def measure(options, seed, views):
    """mIoU of a variant and of MaskCLIP, precision and recall of its hypothesis. views: {seed: (x, valid)}, filled here."""
    cfg = rectify.complete(rectify.Config(seed=seed, **options))
    folder = rectify.dataset_folder(cfg)
    train, val = (rectify.list_samples(folder, split) for split in ("train", "val"))
    torch.manual_seed(seed)
    segmenter = rectify.Segmenter(cfg, rectify.VOC_NAMES, rectify.pick_device(cfg))
    if seed not in views:
        views[seed] = rectify.training_data(segmenter, train)[:2]
    y = rectify.hypotheses(segmenter, train).to(segmenter.device)
    with tempfile.TemporaryDirectory() as out:
        rectify.train(segmenter, (*views[seed], y), len(y), Path(out), resume=False)
    results, _ = rectify.evaluate(lambda images: rectify.predict(segmenter, images), val, segmenter.names)
    quality = rectify.judge(rectify.hypotheses(segmenter, val), rectify.classes_present(val, len(segmenter.names)))
    return results[cfg.method]["mIoU"], results["maskclip"]["mIoU"], quality["precision"], quality["recall"]


LOSSES = {"mask, feature, text": {}, "mask, feature": dict(text_weight=0), "mask, text": dict(feature_weight=0),
          "mask": dict(feature_weight=0, text_weight=0)}


def losses(seeds, epochs=4):
    """A row for each set of losses: mIoU of students of so many epochs, all of the teacher in the newest rectify.pt."""
    checkpoint = rectify.newest("rectify.pt")
    segmenter = rectify.Segmenter.load(checkpoint, out=str(checkpoint.parent))
    folder, recipe, names = rectify.dataset_folder(segmenter.cfg), distill.recipe_of(segmenter), segmenter.names
    pictures = distill.Pictures(rectify.list_samples(folder, "train"), recipe["size"], None, len(names), False)
    teacher = distill.Teacher(segmenter, segmenter.cfg.method, recipe["least"], recipe["doubt"])
    print(f"{checkpoint}, {epochs} epochs\n\n| losses | mIoU |\n|---|---|")
    for title, weights in LOSSES.items():
        found = []
        for seed in seeds:
            cfg = distill.complete(distill.Config(epochs=epochs, seed=seed, **weights), segmenter)
            torch.manual_seed(seed)
            R = teacher.R if cfg.teacher == "reclip" else None
            student = distill.DeepLabV2(cfg.backbone, segmenter.T, R, segmenter.scale, recipe["rates"], cfg.width, recipe["weights"])
            with tempfile.TemporaryDirectory() as out:
                distill.train(student, teacher, pictures, cfg, names, recipe, Path(out))
            masks = lambda images: {"student": distill.predict_student(student, images, recipe["size"])}
            found.append(rectify.evaluate(masks, rectify.list_samples(folder, "val"), names)[0]["student"]["mIoU"])
        print(f"| {title} | {np.mean(found):.1f}{f' ± {np.std(found):.1f}' if found[1:] else ''} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=[*TABLES, "losses"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if args.table == "losses":
        return losses(args.seeds)
    views = {}
    print("| | mIoU | gain over MaskCLIP | precision / recall of y |\n|---|---|---|---|")
    for title, options in TABLES[args.table].items():
        runs = np.array([measure(options, seed, views) for seed in args.seeds])
        mine, base, precision, recall = runs.mean(0)
        print(f"| {title} | {mine:.1f} ± {runs[:, 0].std():.1f} | {mine - base:+.1f} | {precision:.2f} / {recall:.2f} |", flush=True)


if __name__ == "__main__":
    main()
