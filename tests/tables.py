"""The tables of the paper and of README.md, with the published numbers beside ours; appended to
runs/tables.md.

    python tests/tables.py main             # ReCLIP and ReCLIP++
    python tests/tables.py readings         # what each reading of the method is worth (Emoji VOC's)
    python tests/tables.py published        # VOC's published settings on Emoji VOC's images
    python tests/tables.py attention        # attentions for dense prediction, rectified or not
    python tests/tables.py table8           # the encoder frozen or trained too
    python tests/tables.py table9           # the threshold t of the hypothesis
    python tests/tables.py table10          # teachers in the unsupervised setting: GroupViT, TCL,
                                            # ReCLIP
    python tests/tables.py table11          # DeepLabV2, taught by CLIPpy, ReCo, MaskCLIP, ReCLIP,
                                            # ReCLIP++ and folders of masks (--masks)
    python tests/tables.py losses           # DeepLabV2 with some of its three losses, after four
                                            # epochs, of runs/<dataset>
    python tests/tables.py views            # augmented views computed once, against new ones in
                                            # every epoch
    python tests/tables.py precision        # CLIP's image tower in fp32 and in bfloat16, which is
                                            # the default on a GPU

Each takes --dataset voc, context or ade too (not `readings` and `published`), with --recipe 2024 in
the regime of the CVPR paper, and --seeds: 0, 1, 2 by default, of `published` 0 alone, which trains
400 epochs a seed. Fig. 1(a), 4 and 5 are drawn by every run of rectify.py.

A variant that rectifies does what `python rectify.py` does; features are computed once a seed and
shared. table10 and table11 call rectify.py, tests/rivals.py and distill.py, in runs/table11/, and
go on there after an interrupt.
"""
import argparse
import contextlib
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import distill  # noqa: E402  (after the path to it, and before torch, as in distill.py)
import rectify  # noqa: E402
import rivals  # noqa: E402
import torch  # noqa: E402

RECLIP = dict(method="reclip")
BOTH = {"ReCLIP": RECLIP, "ReCLIP++": dict(method="reclip++")}
PAPERS = (0.21, 0.22, 0.23, 0.24, 0.25)                 # thresholds on the cosine
THRESHOLDS = {"emoji": (0.05, 0.1, 0.2, 0.4, 0.7)}     # on the softmax; the others have PAPERS
# What VOC's row says of learning. Emoji VOC keeps its CLIP, its sizes, its softmax hypothesis and
# no denoising: a cosine's threshold and a probability belong to the CLIP that they were tuned for.
LEARNING = ("optimizer", "lr", "lr_conv", "weight_decay", "batch", "prompt", "norm", "pool",
            "start", "epochs")
MARKS = (10,)                   # epochs of `published` after which it measures before the last one


def published(method):
    """The options of rectify.py that learn with a method as VOC's row of RECIPES says."""
    row = rectify.RECIPES["voc"]
    return {"method": method, "alpha": row[method]["alpha"]} | {key: row[key] for key in LEARNING}


# what each table compares: {row: the options of rectify.py}
VARIANTS = {
    "main": lambda dataset: BOTH,
    "readings": lambda dataset: {
        **BOTH,
        "ReCLIP++, α = 100": BOTH["ReCLIP++"] | dict(alpha=100.0),
        "ReCLIP, one prompt for all classes": RECLIP | dict(prompt="shared"),
        "ReCLIP, unit rows of R": RECLIP | dict(norm="rows"),
        "ReCLIP, without the space term P": RECLIP | dict(space="off"),
        "ReCLIP, mean over the mask": RECLIP | dict(pool="mask"),
        "ReCLIP, threshold on the cosine": RECLIP | dict(hypothesis="threshold", t=0.33)},
    "attention": lambda dataset: {
        f"{attention}, {title}": options | dict(attention=attention)
        for attention in rectify.ATTENTION for title, options in BOTH.items()},
    "table8": lambda dataset: {"frozen": RECLIP, "fine-tuned": RECLIP | dict(finetune=True)},
    "published": lambda dataset: BOTH | {
        f"{title}, VOC's published settings": published(options["method"])
        for title, options in BOTH.items()},
    "table9": lambda dataset: {
        f"t = {t}": RECLIP | dict(t=t) for t in THRESHOLDS.get(dataset, PAPERS)},
    "views": lambda dataset: {          # as many as epochs: on Emoji VOC new ones in every epoch
        f"{title}, views: {K}": options | dict(views=K) for title, options in BOTH.items()
        for K in (1, 2, rectify.RECIPES["emoji"]["epochs"])},
    "precision": lambda dataset: {
        f"{title}, {precision}": options | dict(precision=precision)
        for title, options in BOTH.items() for precision in ("fp32", "bf16")},
}
# (table, dataset, regime): {row: mIoU}; Tables 8 to 11, and for `main` the methods' own
PUBLISHED = {
    ("main", "voc", "2024"): {"ReCLIP": 58.5, "ReCLIP++": 73.5},
    ("main", "voc", ""): {"ReCLIP++": 85.4},
    ("main", "context", "2024"): {"ReCLIP": 25.8, "ReCLIP++": 34.0},
    ("main", "context", ""): {"ReCLIP++": 36.1},
    ("main", "ade", "2024"): {"ReCLIP": 11.1, "ReCLIP++": 13.5},
    ("main", "ade", ""): {"ReCLIP++": 16.4},
    ("table8", "voc", "2024"): {"frozen": 58.5, "fine-tuned": 54.3},
    ("table8", "context", "2024"): {"frozen": 25.8, "fine-tuned": 21.7},
    ("table9", "voc", "2024"): {
        f"t = {t}": v for t, v in zip(PAPERS, (57.6, 57.9, 58.5, 57.6, 57.2))},
    ("table10", "voc", "2024"): {"GroupViT": "very low", "TCL": 32.6, "ReCLIP": 58.5},
    ("table10", "context", "2024"): {"TCL": 12.0, "ReCLIP": 25.8},
    ("table11", "voc", "2024"): {"MaskCLIP+": 70.0, "ReCLIP": 75.4, "ReCLIP++": 79.2,
                                 "CLIPpy+": 59.4, "ReCo+": 69.7},
    ("table11", "context", "2024"): {"ReCLIP": 33.8, "ReCLIP++": 34.5},
    ("table11", "ade", "2024"): {"ReCLIP": 14.3, "ReCLIP++": 14.5},
}
LOSSES = {"mask, feature, text": {}, "mask, feature": dict(text_weight=0.0),
          "mask, text": dict(feature_weight=0.0), "mask": dict(feature_weight=0.0, text_weight=0.0)}


@contextlib.contextmanager
def measured_after(marks, segmenter, val):
    """While this trains, measure at the ends of these epochs too. Yields {column: mIoU}, filled
    meanwhile; training draws the same random numbers as without.
    """
    finish, found = rectify.finish_epoch, {}

    def finish_and_measure(segmenter, optimizer, schedule, losses, masks, log, *rest):
        finish(segmenter, optimizer, schedule, losses, masks, log, *rest)
        if len(log) in marks:
            segmenter.rectifier.eval()
            predict = rectify.predictor(segmenter)
            results, *_ = rectify.evaluate(predict, val, segmenter.classes)
            found[f"after epoch {len(log)}"] = results[segmenter.cfg.method]["mIoU"]

    with mock.patch.object(rectify, "finish_epoch", finish_and_measure):
        yield found


def rectified(options, seed, most_views, kept, marks=()):
    """A variant that rectifies, measured: {column: value}. kept: the seed's training data, filled
    by the first variant. marks: epochs after which it is measured, beside the last.
    """
    cfg = rectify.configure(seed=seed, **options)
    names, (train, val) = rectify.class_names(cfg), rectify.splits(rectify.dataset_folder(cfg))
    torch.manual_seed(seed)
    segmenter = rectify.Segmenter(cfg, names, rectify.pick_device(cfg))
    with tempfile.TemporaryDirectory() as out, measured_after(marks, segmenter, val) as earlier:
        shared = cfg.finetune, cfg.precision, cfg.attention
        if shared not in kept:
            segmenter.cfg = replace(cfg, views=max(most_views, cfg.views), out=out)
            kept[shared] = rectify.training_data(segmenter, train)[:2]
            segmenter.cfg = cfg
        x, valid = kept[shared]
        y = rectify.hypotheses(segmenter, train).to(x.device)
        rectify.train(segmenter, (x, valid, y), len(y), Path(out))
    results, _, quality = rectify.assess(segmenter, val)
    found, baseline = (results[method]["mIoU"] for method in (cfg.method, "maskclip"))
    earlier = {f"after epoch {mark}": earlier.get(f"after epoch {mark}", np.nan) for mark in marks}
    return {"mIoU": found, "gain over MaskCLIP": found - baseline,
            "precision of y": 100 * quality["precision"],
            "recall of y": 100 * quality["recall"]} | earlier


def run_of(dataset, recipe, method, seed):
    """(Its folder, the options of rectify.py) of the run that tables 10 and 11 share."""
    out = Path("runs/table11") / "-".join(filter(None, [dataset, recipe, method, str(seed)]))
    regime = ["--recipe", recipe] if recipe else []
    return out, ["--dataset", dataset, *regime, "--out", str(out), "--seed", str(seed)]


def trained(dataset, recipe, method, seed):
    """The folder of that run, trained and measured unless it is."""
    out, options = run_of(dataset, recipe, method, seed)
    if not (out / "rectify.json").is_file():
        rectify.main([*options, "--method", method, "--resume"])
    today = rectify.configure(dataset=dataset, recipe=recipe, method=method, seed=seed)
    try:
        kept = rectify.load_checkpoint(out / "rectify.pt")["config"]
        rectify.check_trained(rectify.Config, kept, asdict(today))
    except rectify.UserError as error:
        raise rectify.UserError(f"{out}: is not of today's recipe, delete it ({error})")
    return out


def rival(dataset, recipe, name, seed):
    """{title: result} of MaskCLIP, ReCLIP and a rival, by the command line of rivals.py."""
    out, options = run_of(dataset, recipe, "reclip", seed)
    report = out / name / "rivals.json"
    if not report.is_file():
        rivals.main([name, *options])
    return json.loads(report.read_text())["results"]


def undistilled(dataset, recipe, name, seed):
    """A teacher of Table 10, measured: a rival, or "reclip"."""
    if name == "reclip":
        out, title = trained(dataset, recipe, name, seed), name
        results = json.loads((out / "rectify.json").read_text())["results"]
    else:
        results, title = rival(dataset, recipe, name, seed), rivals.RIVALS[name][0]
    found = results[title]["mIoU"]
    return {"mIoU": found, "gain over MaskCLIP": found - results["maskclip"]["mIoU"]}


def distilled(dataset, recipe, teacher, seed):
    """A student, measured, by the command lines of rectify.py, rivals.py and distill.py; teacher: a
    method, a rival, or a folder of masks.
    """
    method, own = teacher if teacher == "reclip++" else "reclip", np.nan
    out = trained(dataset, recipe, method, seed)
    folder = out / teacher if teacher in rivals.RIVALS else teacher
    if teacher in rivals.RIVALS:
        own = rival(dataset, recipe, teacher, seed)[rivals.RIVALS[teacher][0]]["mIoU"]
    distill.main(["--dataset", dataset, "--out", str(out), "--seed", str(seed), "--resume",
                  "--teacher", str(folder)])
    report = (out if teacher == method else out / Path(folder).resolve().name) / "distill.json"
    results = json.loads(report.read_text())["results"]
    return {"mIoU": results["student"]["mIoU"],
            "its teacher": results[teacher]["mIoU"] if teacher in results else own}


def taught(dataset, weights, seed, kept, epochs=4):
    """A student of so many epochs with these weights of the losses, measured. kept: its teacher, of
    runs/<dataset>.
    """
    if not kept:
        checkpoint = distill.find_checkpoint({"dataset": dataset})
        segmenter = rectify.load_segmenter(checkpoint, out=str(checkpoint.parent))
        kept["teacher"] = distill.Teacher(segmenter, distill.configure(segmenter.cfg))
    teacher, segmenter = kept["teacher"], kept["teacher"].segmenter
    train, val = rectify.splits(rectify.dataset_folder(segmenter.cfg))
    cfg = distill.configure(segmenter.cfg, epochs=epochs, seed=seed, **weights)
    torch.manual_seed(seed)
    student, C = distill.make_student(cfg, segmenter), len(segmenter.names)
    with tempfile.TemporaryDirectory() as out:
        distill.train(student, teacher, train, cfg, {}, Path(out))
    masks = lambda images: {"student": distill.predict_student(student, images, cfg, C)}
    results, *_ = rectify.evaluate(masks, val, segmenter.classes)
    return {"mIoU": results["student"]["mIoU"]}


def rows_of(table, dataset, recipe, masks):
    """{row: a function of (seed, what the rows of a seed share) that measures it}."""
    if table == "losses":
        return {title: lambda seed, kept, w=weights: taught(dataset, w, seed, kept)
                for title, weights in LOSSES.items()}
    if table == "table10":
        teachers = {"GroupViT": "groupvit", "TCL": "tcl", "ReCLIP": "reclip"}
        return {title: lambda seed, kept, t=teacher: undistilled(dataset, recipe, t, seed)
                for title, teacher in teachers.items()}
    if table == "table11":
        teachers = {"CLIPpy+": "clippy", "ReCo+": "reco", "MaskCLIP+": "maskclip",
                    "ReCLIP": "reclip", "ReCLIP++": "reclip++"}
        teachers |= {f"{Path(folder).name}+": folder for folder in masks}
        return {title: lambda seed, kept, t=teacher: distilled(dataset, recipe, t, seed)
                for title, teacher in teachers.items()}
    variants = VARIANTS[table](dataset)
    most = max(options.get("views", 0) for options in variants.values())
    common = {"dataset": dataset, "recipe": recipe}
    marks = MARKS if table == "published" else ()
    return {title: lambda seed, kept, o=options: rectified(o | common, seed, most, kept, marks)
            for title, options in variants.items()}


def markdown(table, dataset, recipe, seeds, measured):
    """The table as Markdown: means over the seeds, the spread of mIoU, and the published numbers
    where there are any.
    """
    published, column = PUBLISHED.get((table, dataset, recipe), {}), "published"
    if table in ("table10", "table11") and dataset == "emoji":                # another world
        published, column = PUBLISHED[table, "voc", "2024"], "published, on VOC"
    columns = list(next(iter(measured.values()))[0])
    head = ["", *columns, *[column] * bool(published)]
    what = " ".join(filter(None, [table, dataset, recipe]))
    lines = [f"### {what}, seeds {' '.join(map(str, seeds))}", "", f"| {' | '.join(head)} |",
             "|---" * len(head) + "|"]
    for title, runs in measured.items():
        means = {c: np.mean([run[c] for run in runs]) for c in columns}
        cells = [f"{m:+.1f}" if c.startswith("gain") else "" if np.isnan(m) else f"{m:.1f}"
                 for c, m in means.items()]
        cells[0] += f" ± {np.std([run['mIoU'] for run in runs]):.1f}" if runs[1:] else ""
        cells += [str(published.get(title, "-"))] * bool(published)
        lines.append(f"| {' | '.join([title, *cells])} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*VARIANTS, "table10", "table11", "losses"])
    parser.add_argument("--dataset", default="emoji", choices=list(rectify.RECIPES))
    parser.add_argument("--recipe", default="", choices=["2024"], help="as rectify.py's")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2; of `published` 0")
    parser.add_argument("--masks", nargs="+", default=[], metavar="DIR",
                        help="table11: masks of other methods")
    args = parser.parse_args(argv)
    if rectify.WORLD > 1 or args.table in ("readings", "published") and args.dataset != "emoji":
        raise rectify.UserError("tables.py runs in one process, and `readings` and `published` are "
                                "Emoji VOC's")
    seeds = args.seeds or ([0] if args.table == "published" else [0, 1, 2])
    rows, measured = rows_of(args.table, args.dataset, args.recipe, args.masks), {}
    for seed in seeds:
        kept = {}
        for title, measure in rows.items():
            found = measure(seed, kept)
            measured.setdefault(title, []).append(found)
            values = ", ".join(f"{column} {value:.2f}" for column, value in found.items())
            print(f"seed {seed}, {title}: {values}", flush=True)
    text = markdown(args.table, args.dataset, args.recipe, seeds, measured)
    Path("runs").mkdir(exist_ok=True)
    with open("runs/tables.md", "a") as file:
        file.write(text + "\n")
    print("\n" + text + "\nappended to runs/tables.md")


if __name__ == "__main__":
    rectify.run(main)
