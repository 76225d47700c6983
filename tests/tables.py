"""Measure the tables of tests/RESULTS.md and write them there, with the published numbers.

    python tests/tables.py all              # every table, about five hours on two cores
    python tests/tables.py main             # ReCLIP and ReCLIP++; the other names: --help
    python tests/tables.py main --dataset voc --recipe 2024     # with the CVPR paper's CLIP

What is measured is kept in runs/tables/, a JSON a row and seed, so the same command goes on after
an interrupt; delete the folder to measure again. In RESULTS.md a table stands between the lines
<!-- NAME --> and <!-- /NAME -->, and the text around stays. ± is the sample's standard deviation
(n − 1) over seeds, whose mIoU stand in brackets; what one seed shows has none.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "emoji")]
import rectify  # noqa: E402  (after the path to it, and before torch)
import distill  # noqa: E402
import export  # noqa: E402
import make  # noqa: E402
import numpy as np  # noqa: E402
import rivals  # noqa: E402
import torch  # noqa: E402

RECLIP, RECLIPPP = dict(method="reclip"), dict(method="reclip++")
BOTH = {"ReCLIP": RECLIP, "ReCLIP++": RECLIPPP}
PAPERS = (0.21, 0.22, 0.23, 0.24, 0.25)                 # thresholds t on the cosine
THRESHOLDS = {"emoji": (0.05, 0.1, 0.2, 0.4, 0.7)}      # on the softmax; the others have PAPERS
GROUND = "grass, sky, sea, road, room, sand"            # what Emoji VOC's backgrounds show

def published(method):
    """The options of rectify.py that learn with a method as VOC's row of RECIPES says. Emoji VOC
    keeps its CLIP, its sizes, its hypothesis and no denoising, which belong to the CLIP."""
    learning = ("optimizer", "lr", "lr_conv", "weight_decay", "batch", "prompt", "start", "epochs")
    paper = rectify.configure(dataset="voc", method=method)
    return {"method": method, "alpha": paper.alpha} | {k: getattr(paper, k) for k in learning}


# table: {row: the options of rectify.py}
RECTIFIED = {
    "luck": lambda dataset: {                           # on dev; the recipe comes first
        title: RECLIPPP | options for title, options in (
            ("the recipe, α = 10", {}), ("α = 3", dict(alpha=3.0)), ("α = 5", dict(alpha=5.0)),
            ("α = 3, 2 views, 8 epochs", dict(alpha=3.0, views=2, epochs=8)))},
    "readings": lambda dataset: {
        "ReCLIP++": RECLIPPP, "ReCLIP++, without the bias B": RECLIPPP | dict(space="off"),
        "ReCLIP++, one prompt for all classes": RECLIPPP | dict(prompt="shared"),
        "ReCLIP++, α = 1": RECLIPPP | dict(alpha=1.0),
        "ReCLIP++, α = 100": RECLIPPP | dict(alpha=100.0),
        "ReCLIP": RECLIP, "ReCLIP, without the space term P": RECLIP | dict(space="off"),
        "ReCLIP, one prompt for all classes": RECLIP | dict(prompt="shared"),
        "ReCLIP, threshold on the cosine": RECLIP | dict(hypothesis="threshold", t=0.33),
        "ReCLIP, α = 1000": RECLIP | dict(alpha=1000.0)},
    "attention": lambda dataset: {
        f"{attention}, {title}": options | dict(attention=attention)
        for attention in ("sclip", "clearclip", "naclip") for title, options in BOTH.items()},
    "table8": lambda dataset: {"frozen": RECLIP, "fine-tuned": RECLIP | dict(finetune=True)},
    "table9": lambda dataset: {
        f"t = {t}": RECLIP | dict(t=t) for t in THRESHOLDS.get(dataset, PAPERS)},
    "background": lambda dataset: {
        title: options | dict(background=GROUND) for title, options in BOTH.items()},
    "published": lambda dataset: {title: published(o["method"]) for title, o in BOTH.items()},
}
MAIN = {"MaskCLIP": "maskclip", "ReCLIP": "reclip", "ReCLIP++": "reclip++",
        "student of ReCLIP++": "student"}
SEEDS = {"luck": [0, 1, 2, 3, 4], "table8": [0], "published": [0]}  # of the other tables 0, 1, 2
TEACHERS = {
    "table10": {"GroupViT": "groupvit", "TCL": "tcl", "ReCLIP": "reclip"},
    "table11": {"CLIPpy+": "clippy", "ReCo+": "reco", "MaskCLIP+": "maskclip", "ReCLIP": "reclip",
                "ReCLIP++": "reclip++"}}
LOSSES = {"mask, feature, text": {}, "mask, feature": dict(text_weight=0.0),
          "mask, text": dict(feature_weight=0.0), "mask": dict(feature_weight=0.0, text_weight=0.0)}
WHOLE = ["headroom", "export", "rehearsal", "bench", "bench-export", "bench-busy"]  # in one go
TABLES = ["main", *RECTIFIED, *TEACHERS, "losses", *WHOLE]
# (table, dataset, regime): {row: mIoU}, as the papers have it
PUBLISHED = {
    ("main", "voc", "2024"): {"ReCLIP": 58.5, "ReCLIP++": 73.5},
    ("main", "voc", ""): {"ReCLIP++": 85.4}, ("main", "context", ""): {"ReCLIP++": 36.1},
    ("main", "context", "2024"): {"ReCLIP": 25.8, "ReCLIP++": 34.0},
    ("main", "ade", "2024"): {"ReCLIP": 11.1, "ReCLIP++": 13.5},
    ("main", "ade", ""): {"ReCLIP++": 16.4},
    ("table8", "voc", "2024"): {"frozen": 58.5, "fine-tuned": 54.3},
    ("table8", "context", "2024"): {"frozen": 25.8, "fine-tuned": 21.7},
    ("table9", "voc", "2024"): dict(zip(map("t = {}".format, PAPERS),
                                        (57.6, 57.9, 58.5, 57.6, 57.2))),
    ("table10", "voc", "2024"): {"GroupViT": "very low", "TCL": 32.6, "ReCLIP": 58.5},
    ("table10", "context", "2024"): {"TCL": 12.0, "ReCLIP": 25.8},
    ("table11", "voc", "2024"): {"CLIPpy+": 59.4, "ReCo+": 69.7, "MaskCLIP+": 70.0,
                                 "ReCLIP": 75.4, "ReCLIP++": 79.2},
    ("table11", "context", "2024"): {"ReCLIP": 33.8, "ReCLIP++": 34.5},
    ("table11", "ade", "2024"): {"ReCLIP": 14.3, "ReCLIP++": 14.5}}

# ================================================================== what a row is, {column: value}

def command(options):
    """The command line of rectify.py that does the same."""
    defaults, typed = {"dataset": "emoji", "recipe": "", "method": "reclip++"}, "python rectify.py"
    for name, value in options.items():
        if defaults.get(name) != value:
            value = "" if value is True else f' "{value}"' if " " in str(value) else f" {value}"
            typed += f" --{name.replace('_', '-')}{value}"
    return f"`{typed}`"

def rectified(options, seed, kept, split="val"):
    """A variant that rectifies, trained and measured. kept: a seed's features, to be shared."""
    folder = tempfile.TemporaryDirectory()
    cfg = rectify.configure(seed=seed, **options | {"out": folder.name})
    train, val = (rectify.list_samples(rectify.dataset_folder(cfg), s) for s in ("train", split))
    torch.manual_seed(seed)
    segmenter = rectify.Segmenter(cfg, *rectify.class_names(cfg))
    name_images = lambda images: rectify.hypothesize(segmenter, images)
    shared = cfg.finetune, cfg.attention, cfg.views
    with folder as out:
        if kept.get("of") != shared:
            kept |= dict(of=shared, x=rectify.training_data(segmenter, train)[:2])
        x, valid = kept["x"]
        y = torch.stack(rectify.each_image(name_images, train, "hypothesis")).to(x.device)
        rectify.train(segmenter, (x, valid, y), train, Path(out))
    predict = rectify.predictor(segmenter)
    results, _, quality = rectify.evaluate(predict, val, segmenter.classes, 1, name_images)
    mine, clips = (results[method]["IoU"] for method in (cfg.method, "maskclip"))
    columns = {"command": command(options), **over_clip(results, cfg.method)}
    if split == "dev":
        lost = [name for name, value in mine.items() if value < 10 and clips[name] > 40]
        return columns | {"classes lost": len(lost)}
    if segmenter.background:
        columns["IoU of the background"] = mine["background"]
    return columns | {f"{k} of y": 100 * quality[k] for k in ("precision", "recall")}

def run_of(dataset, recipe, method, seed):
    """(Its folder, the options of rectify.py) of the run that the tables of teachers share."""
    out = Path("runs/tables/runs") / "-".join(filter(None, [dataset, recipe, method, str(seed)]))
    regime = ["--recipe", recipe] if recipe else []
    return out, ["--dataset", dataset, *regime, "--out", str(out), "--seed", str(seed)]

def trained(dataset, recipe, method, seed):
    """The folder of that run, trained and measured unless it is. Raises UserError."""
    out, options = run_of(dataset, recipe, method, seed)
    if not (out / "rectify.json").is_file():
        rectify.main([*options, "--method", method, "--resume"])
    today = rectify.configure(dataset=dataset, recipe=recipe, method=method, seed=seed)
    path = out / "rectify.pt"
    rectify.compare(path, rectify.load(path), rectify.Config, rectify.FREE, asdict(today))
    return out

def over_clip(results, method):
    """The columns of a method: its mIoU, and what that is above CLIP without training."""
    found, baseline = (results[m]["mIoU"] for m in (method, "maskclip"))
    return {"mIoU": found, "gain": found - baseline}

def main_row(dataset, recipe, method, seed):
    """A row of the main table, by the command lines of rectify.py and distill.py."""
    out = trained(dataset, recipe, "reclip" if method == "reclip" else "reclip++", seed)
    if method == "student":
        distilled(dataset, recipe, "reclip++", seed)
    report = out / ("distill.json" if method == "student" else "rectify.json")
    return over_clip(json.loads(report.read_text())["results"], method)

def teacher_of(dataset, recipe, teacher, seed):
    """(The run's folder, --teacher of distill.py, {title: result}, the teacher's title)."""
    method = teacher if teacher == "reclip++" else "reclip"
    out, name = trained(dataset, recipe, method, seed), teacher
    report = out / "rectify.json"
    if teacher in rivals.RIVALS:
        report, (name, *_) = out / teacher / "rivals.json", rivals.RIVALS[teacher]
        if not report.is_file():
            rivals.main([teacher, *run_of(dataset, recipe, method, seed)[1]])
        teacher = str(out / teacher)
    return out, teacher, json.loads(report.read_text())["results"], name

def undistilled(*what):
    """A teacher of Table 10, measured."""
    *_, results, name = teacher_of(*what)
    return over_clip(results, name)

def distilled(dataset, *what):
    """A student of Table 11, measured, by the command lines of all three scripts."""
    out, teacher, results, name = teacher_of(dataset, *what)
    distill.main(["--dataset", dataset, "--out", str(out), "--seed", str(what[-1]), "--resume",
                  "--teacher", teacher])
    report = (out if teacher in ("reclip", "reclip++") else out / Path(teacher).name)
    student = json.loads((report / "distill.json").read_text())["results"]["student"]
    return {"mIoU": student["mIoU"], "its teacher": results[name]["mIoU"]}

def taught(dataset, recipe, weights, seed, kept, epochs=4):
    """A student of four epochs with these weights of the losses, of seed 0's ReCLIP++, measured."""
    if "labeller" not in kept:
        state = rectify.load(trained(dataset, recipe, "reclip++", 0) / "rectify.pt")
        cfg = rectify.configure(state["config"])
        segmenter = rectify.Segmenter(cfg, state["names"], state["background"], state)
        kept["labeller"] = distill.Labeller(segmenter, distill.configure(cfg))
    labeller, segmenter = kept["labeller"], kept["labeller"].segmenter
    train, val = rectify.splits(rectify.dataset_folder(segmenter.cfg))
    cfg = distill.configure(segmenter.cfg, epochs=epochs, seed=seed, **weights)
    torch.manual_seed(seed)
    student = distill.DeepLabV2(cfg, segmenter.T, None, segmenter.scale).to(segmenter.device)
    with tempfile.TemporaryDirectory() as out:
        distill.train(student, labeller, train, cfg, {"names": segmenter.names}, Path(out))
    labeller.see_all = lambda samples: None             # it has
    masks = lambda images: {"student": distill.predict_student(
        student, images, cfg, len(segmenter.names))}
    results, *_ = rectify.evaluate(masks, val, segmenter.classes)
    return {"mIoU": results["student"]["mIoU"]}

# =========================================================== tables of several rows, {row: columns}

def exported(dataset, recipe):
    """export.py's files of seed 0's student: size, agreement with PyTorch and mIoU."""
    out = trained(dataset, recipe, "reclip++", 0)
    distill.main(["--dataset", dataset, "--out", str(out), "--resume"])
    export.main(["--out", str(out), "--int8"])
    report = json.loads((out / "export.json").read_text())
    return {name: {"MB": (out / name).stat().st_size / 1e6, "agreement, %":
                   100 * found["agreement"], "mIoU": report["results"][name]["mIoU"]}
            for name, found in report["check"].items() if (out / name).is_file()}

def benched(table, dataset, recipe):
    """The rows of bench.py, in a process of its own."""
    out, what = Path("runs/tables/bench"), table.removeprefix("bench").strip("-") or "training"
    if what == "export":
        out = trained(dataset, recipe, "reclip++", 0)
        exported(dataset, recipe)
    subprocess.run([sys.executable, HERE / "bench.py", what, "--out", out], check=True)
    return {row.pop("what"): row for row in json.loads((out / f"{table}.json").read_text())["rows"]}

def rehearsed():
    """The rows of rehearsal.py, in a process of its own; in 6 GB it needs that batch."""
    subprocess.run([sys.executable, HERE / "rehearsal.py", "--batch", "4"], check=True)
    return json.loads(Path("runs/rehearsal/rehearsal.json").read_text())["rows"]

# ===================================================================================== the Markdown

def units(table, dataset, recipe):
    """{row or group of rows: a function of (seed, what a seed shares) to {row: {column: value}}}"""
    alone = lambda title, measure: lambda seed, kept: {title: measure(seed, kept)}
    if table in RECTIFIED:
        common, split = dict(dataset=dataset, recipe=recipe), "dev" if table == "luck" else "val"
        rows = {title: lambda seed, kept, o=options: rectified(o | common, seed, kept, split)
                for title, options in RECTIFIED[table](dataset).items()}
    elif table == "main":
        rows = {title: lambda seed, kept, m=method: main_row(dataset, recipe, m, seed)
                for title, method in MAIN.items()}
    elif table in TEACHERS:
        measure = undistilled if table == "table10" else distilled
        rows = {title: lambda seed, kept, t=teacher: measure(dataset, recipe, t, seed)
                for title, teacher in TEACHERS[table].items()}
    elif table == "losses":
        rows = {title: lambda seed, kept, w=weights: taught(dataset, recipe, w, seed, kept)
                for title, weights in LOSSES.items()}
    else:
        measures = {"headroom": make.headroom, "rehearsal": rehearsed,
                    "export": lambda: exported(dataset, recipe)}
        measure = measures.get(table, lambda: benched(table, dataset, recipe))
        return {table: lambda seed, kept: measure()}
    return {title: alone(title, measure) for title, measure in rows.items()}

def measure(table, dataset, recipe, seeds):
    """{row: [{column: value} of each seed]}; what runs/tables/ has is not measured again."""
    measured = {}
    for seed in seeds:
        kept = {}
        for title, unit in units(table, dataset, recipe).items():
            name = re.sub(r"[^\w+.]+", "-", f"{table} {dataset} {recipe} {title} {seed}")
            path, started = Path("runs/tables") / f"{name}.json", time.time()
            if not path.is_file():
                rows = unit(seed, kept)
                rectify.write(path, json.dumps(rows, indent=1, ensure_ascii=False))
                print(f"{name}: {time.time() - started:.0f} s, {rows}", flush=True)
            for row, columns in json.loads(path.read_text("utf-8")).items():
                measured.setdefault(row, []).append(columns)
    return measured

def cell(column, values):
    """A cell of Markdown: the mean over the seeds, of mIoU with its deviation."""
    values = [v for v in values if v is not None] or [""]
    if isinstance(values[0], str):
        return values[0]
    percent = column.startswith(("mIoU", "gain", "precision", "recall", "IoU", "its"))
    text = f"{np.mean(values):{'+' * column.startswith('gain')}{'.1f' if percent else '.4g'}}"
    if column == "mIoU" and values[1:]:
        text += f" ± {np.std(values, ddof=1):.1f} ({' '.join(f'{v:.1f}' for v in values)})"
    return text

def markdown(table, dataset, recipe, seeds, measured):
    """The table, with a column of published numbers where there are any."""
    published, column = PUBLISHED.get((table, dataset, recipe), {}), "published"
    if (table, "voc", "2024") in PUBLISHED and table != "table9" and dataset == "emoji":
        published, column = PUBLISHED[table, "voc", "2024"], "published, on VOC"
    columns = list(dict.fromkeys(c for runs in measured.values() for c in runs[0]))
    head = ["", *columns, *[column] * bool(published)]
    what = (f"python tests/tables.py {table}" + f" --dataset {dataset}" * (dataset != "emoji")
            + f" --recipe {recipe}" * bool(recipe))
    seeds = ", ".join(map(str, seeds))
    lines = [f"`{what}`, seeds: {seeds}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for title, runs in measured.items():
        cells = [cell(c, [run.get(c) for run in runs]) for c in columns]
        cells += [str(published.get(title, "-"))] * bool(published)
        lines.append(f"| {' | '.join([title, *cells])} |")
    return "\n".join(lines)

def machine():
    """What measured: a line for the head of RESULTS.md."""
    info, device = Path("/proc/cpuinfo"), rectify.pick_device(rectify.configure())
    name = re.search(r"model name\s*: (.*)", info.read_text() if info.is_file() else "")
    git = subprocess.run(["git", "-C", HERE, "log", "-1", "--format=%h"], text=True,
                         capture_output=True)
    half = torch.no_grad()(rectify.in_half)(device)
    precision = str(half.fast_dtype).removeprefix("torch.") if half._enabled else "fp32"
    return (f"Measured on: {name[1] if name else sys.platform}, {os.cpu_count()} cores, GPU: "
            f"{rectify.versions()['gpu']}; CLIP's image tower in {precision}; "
            f"{torch.get_num_threads()} threads; PyTorch {torch.__version__}; commit "
            f"{git.stdout.strip()}; {time.strftime('%Y-%m-%d')}.")

def put(path, name, text):
    """Put a text between the lines <!-- name --> and <!-- /name --> of a file, or at its end."""
    old = path.read_text("utf-8") if path.is_file() else "# Results\n"
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in old:
        old += f"\n{'' if name == 'machine' else f'## {name}'}\n\n{begin}\n{end}\n"
    before, rest = old.split(begin, 1)
    rectify.write(path, (before + f"{begin}\n{text}\n" + end + rest.split(end, 1)[1]).rstrip("\n"))

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["all", *TABLES])
    parser.add_argument("--dataset", default="emoji", choices=list(rectify.RECIPES))
    parser.add_argument("--recipe", default="", choices=["", "2024"], help="as rectify.py's")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2; of some tables 0")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md", help="file to write")
    args = parser.parse_args(argv)
    for table in TABLES if args.table == "all" else [args.table]:
        seeds = args.seeds or ([0] if table in WHOLE else SEEDS.get(table, [0, 1, 2]))
        what = table, args.dataset, args.recipe
        text = markdown(*what, seeds, measure(*what, seeds))
        own = [part for part in what if part not in ("emoji", "")]
        put(args.results, "machine", machine())
        put(args.results, " ".join(own), text)
        print(f"\n{text}\n\nwritten to {args.results}")


if __name__ == "__main__":
    rectify.run(main)
