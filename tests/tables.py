"""The tables of the paper and of README.md, with the published numbers beside ours; appended to runs/tables.md.

    python tests/tables.py main             # ReCLIP and ReCLIP++
    python tests/tables.py readings         # what each reading of the method is worth (Emoji VOC's)
    python tests/tables.py table8           # the encoder frozen or trained too
    python tests/tables.py table9           # the threshold t of the hypothesis
    python tests/tables.py table11          # DeepLabV2, taught by MaskCLIP, ReCLIP, ReCLIP++ and folders of masks (--masks)
    python tests/tables.py losses           # DeepLabV2 with some of its three losses, after four epochs, of runs/<dataset>
    python tests/tables.py views            # augmented views computed once, against new ones in every epoch
    python tests/tables.py precision        # CLIP's image tower in fp32 and in bfloat16, which is the default on a GPU

Each takes --dataset voc, context or ade too (not `readings`), with --recipe 2024 in the regime of the CVPR paper, and --seeds.
Fig. 1(a), 4 and 5 are drawn by every run of rectify.py.

A variant that rectifies does what `python rectify.py` does; features are computed once a seed and shared. table11 calls
rectify.py and distill.py, in runs/table11/, and goes on there after an interrupt.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import distill  # noqa: E402  (after the path to it)
import rectify  # noqa: E402

RECLIP, BOTH = dict(method="reclip"), {"ReCLIP": dict(method="reclip"), "ReCLIP++": dict(method="reclip++")}
THRESHOLDS = {"emoji": (0.02, 0.05, 0.1, 0.3, 0.6)}     # on the softmax; for the others the paper's, on the cosine
PAPERS = (0.21, 0.22, 0.23, 0.24, 0.25)
# what each table compares: {row: the options of rectify.py}
VARIANTS = {
    "main": lambda dataset: BOTH,
    "readings": lambda dataset: {
        **BOTH,
        "ReCLIP, one prompt for all classes": RECLIP | dict(prompt="shared"),
        "ReCLIP, unit rows of R": RECLIP | dict(norm="rows"),
        "ReCLIP, without the space term P": RECLIP | dict(space="off"),
        "ReCLIP, mean over the mask": RECLIP | dict(pool="mask"),
        "ReCLIP, threshold on the cosine": RECLIP | dict(hypothesis="threshold", t=0.33)},
    "table8": lambda dataset: {"frozen": RECLIP, "fine-tuned": RECLIP | dict(finetune=True)},
    "table9": lambda dataset: {f"t = {t}": RECLIP | dict(t=t) for t in THRESHOLDS.get(dataset, PAPERS)},
    "views": lambda dataset: {
        f"{title}, views: {K}": options | dict(views=K) for title, options in BOTH.items()
        for K in (1, 2, rectify.RECIPES["emoji"]["epochs"])},                           # the last: there, new ones in every epoch
    "precision": lambda dataset: {
        f"{title}, {precision}": options | dict(precision=precision) for title, options in BOTH.items()
        for precision in ("fp32", "bf16")},
}
# (table, dataset, regime): {row: mIoU}; Tables 8, 9 and 11, and for `main` the methods' own
PUBLISHED = {
    ("main", "voc", "2024"): {"ReCLIP": 58.5, "ReCLIP++": 73.5}, ("main", "voc", ""): {"ReCLIP++": 85.4},
    ("main", "context", "2024"): {"ReCLIP": 25.8, "ReCLIP++": 34.0}, ("main", "context", ""): {"ReCLIP++": 36.1},
    ("main", "ade", "2024"): {"ReCLIP": 11.1, "ReCLIP++": 13.5}, ("main", "ade", ""): {"ReCLIP++": 16.4},
    ("table8", "voc", "2024"): {"frozen": 58.5, "fine-tuned": 54.3},
    ("table8", "context", "2024"): {"frozen": 25.8, "fine-tuned": 21.7},
    ("table9", "voc", "2024"): {f"t = {t}": v for t, v in zip(PAPERS, (57.6, 57.9, 58.5, 57.6, 57.2))},
    ("table11", "voc", "2024"): {"MaskCLIP+": 70.0, "ReCLIP": 75.4, "ReCLIP++": 79.2, "CLIPpy+": 59.4, "ReCo+": 69.7},
    ("table11", "context", "2024"): {"ReCLIP": 33.8, "ReCLIP++": 34.5},
    ("table11", "ade", "2024"): {"ReCLIP": 14.3, "ReCLIP++": 14.5},
}
LOSSES = {"mask, feature, text": {}, "mask, feature": dict(text_weight=0), "mask, text": dict(feature_weight=0),
          "mask": dict(feature_weight=0, text_weight=0)}


def rectified(options, seed, most_views, kept):
    """A variant that rectifies, measured: {column: value}. kept: the seed's training data, filled by the first variant."""
    cfg = rectify.complete(rectify.Config(seed=seed, **options))
    names, (train, val) = rectify.class_names(cfg), rectify.splits(rectify.dataset_folder(cfg))
    torch.manual_seed(seed)
    segmenter = rectify.Segmenter(cfg, names, rectify.pick_device(cfg))
    with tempfile.TemporaryDirectory() as out:
        shared = cfg.finetune, cfg.precision
        if shared not in kept:
            segmenter.cfg = rectify.replace(cfg, views=max(most_views, cfg.views), out=out)
            kept[shared] = rectify.training_data(segmenter, train)[:2]
            segmenter.cfg = cfg
        x, valid = kept[shared]
        y = rectify.hypotheses(segmenter, train).to(x.device)
        rectify.train(segmenter, (x, valid, y), len(y), Path(out), resume=False)
    results, _ = rectify.evaluate(lambda images: rectify.predict(segmenter, images), val, names)
    quality = rectify.judge(rectify.hypotheses(segmenter, val), rectify.classes_present(val, len(names)))
    mine, base = (results[method]["mIoU"] for method in (cfg.method, "maskclip"))
    return {"mIoU": mine, "gain over MaskCLIP": mine - base,
            "precision of y": 100 * quality["precision"], "recall of y": 100 * quality["recall"]}


def distilled(dataset, recipe, teacher, seed):
    """A student, measured, by the command lines of rectify.py and distill.py; teacher: a method, or a folder of masks."""
    method = teacher if teacher == "reclip++" else "reclip"
    out = Path(f"runs/table11/{'-'.join(filter(None, [dataset, recipe, method, str(seed)]))}")
    regime = ["--recipe", recipe] if recipe else []
    rectify.main(["--dataset", dataset, *regime, "--method", method, "--seed", str(seed), "--out", str(out), "--resume"])
    distill.main(["--dataset", dataset, "--out", str(out), "--teacher", teacher, "--seed", str(seed), "--resume"])
    report = (out if teacher == method else out / Path(teacher).resolve().name) / "distill.json"
    results = {name: result["mIoU"] for name, result in json.loads(report.read_text())["results"].items()}
    return {"mIoU": results["student"], "its teacher": results.get(teacher, np.nan)}


def taught(dataset, weights, seed, kept, epochs=4):
    """A student of so many epochs with these weights of the losses, measured. kept: its teacher, of runs/<dataset>."""
    if not kept:
        checkpoint = distill.find_checkpoint(distill.Config(dataset=dataset))
        segmenter = rectify.Segmenter.load(checkpoint, out=str(checkpoint.parent))
        recipe = distill.recipe_of(segmenter)
        kept["teacher"] = distill.Teacher(segmenter, segmenter.cfg.method, recipe["least"], recipe["doubt"])
    teacher, segmenter = kept["teacher"], kept["teacher"].segmenter
    recipe, names = distill.recipe_of(segmenter), segmenter.names
    train, val = rectify.splits(rectify.dataset_folder(segmenter.cfg))
    cfg = distill.complete(distill.Config(dataset=dataset, epochs=epochs, seed=seed, **weights), segmenter)
    torch.manual_seed(seed)
    student = distill.make_student(cfg, segmenter)
    with tempfile.TemporaryDirectory() as out:
        pictures = distill.Pictures(train, recipe["size"], None, len(names), False)
        distill.train(student, teacher, pictures, cfg, names, recipe, Path(out))
    masks = lambda images: {"student": distill.predict_student(student, images, recipe["size"])}
    return {"mIoU": rectify.evaluate(masks, val, names)[0]["student"]["mIoU"]}


def rows_of(table, dataset, recipe, masks):
    """{row: a function of (seed, what the rows of a seed share) that measures it}."""
    if table == "losses":
        return {title: lambda seed, kept, w=weights: taught(dataset, w, seed, kept) for title, weights in LOSSES.items()}
    if table == "table11":
        teachers = {"MaskCLIP+": "maskclip", "ReCLIP": "reclip", "ReCLIP++": "reclip++"} | {f"{Path(m).name}+": m for m in masks}
        return {title: lambda seed, kept, t=teacher: distilled(dataset, recipe, t, seed) for title, teacher in teachers.items()}
    variants = VARIANTS[table](dataset)
    most = max(options.get("views", 0) for options in variants.values())
    common = {"dataset": dataset, "recipe": recipe}
    return {title: lambda seed, kept, o=options: rectified(o | common, seed, most, kept) for title, options in variants.items()}


def markdown(table, dataset, recipe, seeds, measured):
    """The table as Markdown: means over the seeds, the spread of mIoU, and the published numbers where there are any."""
    published = PUBLISHED.get((table, dataset, recipe), {})
    columns = list(next(iter(measured.values()))[0])
    head = ["", *columns, *["published"] * bool(published)]
    what = " ".join(filter(None, [table, dataset, recipe]))
    lines = [f"### {what}, seeds {' '.join(map(str, seeds))}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for title, runs in measured.items():
        means = [np.mean([run[c] for run in runs]) for c in columns]
        cells = [f"{m:+.1f}" if c.startswith("gain") else "" if np.isnan(m) else f"{m:.1f}" for c, m in zip(columns, means)]
        cells[0] += f" ± {np.std([run['mIoU'] for run in runs]):.1f}" if runs[1:] else ""
        lines.append(f"| {' | '.join([title, *cells, *[str(published.get(title, '-'))] * bool(published)])} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*VARIANTS, "table11", "losses"])
    parser.add_argument("--dataset", default="emoji", choices=list(rectify.RECIPES))
    parser.add_argument("--recipe", default="", choices=["2024"], help="as rectify.py's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--masks", nargs="+", default=[], metavar="DIR", help="table11: masks of other methods")
    args = parser.parse_args(argv)
    if rectify.WORLD > 1 or args.table == "readings" and args.dataset != "emoji":
        raise rectify.UserError("tables.py runs in one process, and `readings` are Emoji VOC's")
    rows, measured = rows_of(args.table, args.dataset, args.recipe, args.masks), {}
    for seed in args.seeds:
        kept = {}
        for title, measure in rows.items():
            measured.setdefault(title, []).append(measure(seed, kept))
            print(f"seed {seed}, {title}: " + ", ".join(f"{c} {v:.2f}" for c, v in measured[title][-1].items()), flush=True)
    text = markdown(args.table, args.dataset, args.recipe, args.seeds, measured)
    Path("runs").mkdir(exist_ok=True)
    with open("runs/tables.md", "a") as file:
        file.write(text + "\n")
    print("\n" + text + "\nappended to runs/tables.md")


if __name__ == "__main__":
    rectify.run(main)
