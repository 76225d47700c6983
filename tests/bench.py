"""How fast each part is, against what others do in the same run, and how the cost of an epoch
grows: a table and bench.json.

    python tests/bench.py --out runs/bench

On a CPU: the tiny CLIP on images of Emoji VOC, about 90 s. On a GPU: true sizes, ViT-B/16 with
random weights on 1,464 made images and crops of VOC's size. Times are medians of calls that take
turns, after one call of each that is not counted.
"""
import argparse
import contextlib
import functools
import io
import json
import math
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import distill  # noqa: E402  (after the path to it)
import rectify  # noqa: E402

# images: of an epoch. batch: of dense CLIP. steps: of the authors' recipe. repeats: calls that a
# median is taken of. grow: the sizes over which a cost is measured, each with the others at `base`.
SIZES = {
    "cpu": dict(images=96, batch=32, steps=24, repeats=5,
                base=dict(images=64, classes=20, side=192),
                grow=dict(images=(64, 128, 256), classes=(20, 59, 150), side=(96, 192, 384))),
    "cuda": dict(images=1464, batch=64, steps=64, repeats=3,
                 base=dict(images=366, classes=20, side=512),
                 grow=dict(images=(366, 732, 1464), classes=(20, 59, 150), side=(256, 512, 1024))),
}
EPOCHS = 200                                            # of VOC's schedule (Table 12)
TARGETS = {                                             # of a row: (which side is good, the bound)
    "cpu": {"cached epoch against the authors' recipe": (">=", 20),
            "dense CLIP against open_clip's forward": (">=", 0.9)},
    "cuda": {"cached epoch against the authors' recipe": (">=", 50),
             "dense CLIP against open_clip's forward": (">=", 0.9),
             f"{EPOCHS} cached epochs": ("<=", 180),
             "student step, of the bf16 peak": (">=", 40), "teacher, of that step": ("<=", 10)},
}


@contextlib.contextmanager
def quiet():
    """No progress bars and no messages of what is measured."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@quiet()
def medians(tasks, repeats):
    """{name: median seconds of a call} of {name: function}; they are called in turn."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = {name: [] for name in tasks}
    for _ in range(1 + repeats):
        for name, task in tasks.items():
            wait()
            started = time.perf_counter()
            task()
            wait()
            times[name].append(time.perf_counter() - started)
    return {name: float(np.median(t[1:])) for name, t in times.items()}


def noise(*shape):
    """Images of noise, uint8."""
    return torch.randint(256, shape, dtype=torch.uint8)


def make_images(folder, count):
    """`count` JPEGs of 500×375 px, smooth enough to be decoded as fast as a camera's."""
    for k in range(count):
        image = Image.fromarray(noise(12, 16, 3).numpy()).resize((500, 375), Image.BICUBIC)
        image.save(folder / f"{k}.jpg")


def make_features(segmenter, images, side):
    """What training_data would give for one view of made images: random unit features, no padding,
    two classes an image.
    """
    h, (C, D) = math.ceil(side / segmenter.clip.visual.patch_size[0]), segmenter.T.shape
    x = F.normalize(torch.randn(1, images, D, h, h, device=segmenter.device), dim=2).half()
    valid = torch.ones(1, images, h, h, dtype=torch.bool, device=segmenter.device)
    y = F.one_hot(torch.randint(C, (images, 2), device=segmenter.device), C).amax(1).bool()
    return x, valid, y


def authors_steps(segmenter, optimizer, crops, y):
    """The authors' recipe: one crop a step, through CLIP, and the prompt of every class through the
    text encoder; fp32 (TF32, as ours), SGD.

    crops: what gives one image 3×S×S uint8 after the other. y: N×C bool. Unlike theirs, nothing
    sleeps between the steps.
    """
    clip, T = segmenter.clip, segmenter.T
    for image, classes in zip(crops, y):
        with torch.no_grad():
            x = rectify.normalize(clip, image[None].to(segmenter.device))
            f = rectify.encode_image(clip, x, "maskclip")                               # 1 D h w
        V = segmenter.rectifier.V.expand(len(T), -1, -1)                                # C L d
        R = rectify.reference_features(clip, V, segmenter.tokens)                       # C D
        M = rectify.gumbel_mask(segmenter.rectified(f, rectify.set_norm(R, "frobenius")), 1000)
        valid = torch.ones_like(M[:, 0], dtype=torch.bool)
        loss = rectify.contrastive_loss(M, f, T, classes[None], segmenter.scale, valid, "grid")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def row(what, value, unit, how="measured"):
    return {"what": what, "value": float(value), "unit": unit, "how": how}


def growth(segmenter, sizes, folder):
    """How costs grow, each with one size while the others stay: rows with the exponent, fitted to
    the logarithms.
    """
    rows = []
    for axis, values in sizes["grow"].items():
        tasks = {}
        for value in values:
            size, grown = {**sizes["base"], axis: value}, segmenter
            if axis == "classes":       # T's values cost nothing: random ones, not of 85 sentences
                T = F.normalize(torch.randn(value, segmenter.T.size(1)), dim=1)
                names = [f"thing {k}" for k in range(value)]
                grown = rectify.Segmenter(segmenter.cfg, names, segmenter.device, T)
            data = make_features(grown, size["images"], size["side"])
            tasks["cached epoch", value] = functools.partial(
                rectify.train, grown, data, len(data[2]), folder)
            if axis == "side":
                views = noise(4, 3, size["side"], size["side"])
                tasks["dense CLIP", value] = functools.partial(
                    torch.no_grad()(segmenter.features), views)
        t = medians(tasks, sizes["repeats"])
        for what in dict.fromkeys(name for name, _ in t):
            seconds = [t[what, value] for value in values]
            exponent = np.polyfit(np.log(values), np.log(seconds), 1)[0]
            each = ", ".join(f"{value}: {s:.3g} s" for value, s in zip(values, seconds))
            rows.append(row(f"{what}, growth with {axis}", exponent, "exponent", f"fitted: {each}"))
    return rows


def bench(sizes, device, folder):
    """Measure everything. folder: for what is written meanwhile. Returns rows {"what", "value",
    "unit", "how"}.
    """
    gpu, rows = device.type == "cuda", []
    add = lambda *args: rows.append(row(*args))
    cfg = rectify.configure(dataset="voc" if gpu else "emoji", method="reclip", epochs=1, views=1,
                            out=str(folder))
    if gpu:
        cfg = replace(cfg, pretrained="", data=str(folder / "images"))
        Path(cfg.data).mkdir()
        make_images(Path(cfg.data), sizes["images"])
    samples = rectify.list_samples(rectify.dataset_folder(cfg), "train")[:sizes["images"]]
    names, shared = rectify.VOC_NAMES, dict(prompt="shared", start="authors", norm="frobenius")
    segmenter, paper = (rectify.Segmenter(c, names, device)     # Emoji VOC's has a prompt a class
                        for c in (cfg, replace(cfg, **shared)))
    clip, N, some = segmenter.clip, len(samples), samples[:sizes["steps"]]
    with quiet():
        data = rectify.training_data(segmenter, samples)
    x = rectify.normalize(clip, noise(sizes["batch"], 3, *clip.visual.image_size).to(device))
    ready = noise(len(some), 3, cfg.crop, cfg.crop).to(device)
    sgd = torch.optim.SGD(paper.rectifier.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)

    course = distill.configure(cfg, targets="crop")
    course = replace(course, weights="") if gpu else course             # values cost no time
    teacher, student = distill.Teacher(segmenter, course), distill.make_student(course, segmenter)
    student.train().to(memory_format=torch.channels_last if gpu else torch.preserve_format)
    torch.backends.cudnn.benchmark = True               # as distill.train has it
    descent = distill.make_optimizer(student, course)
    read = lambda k: distill.read_example(samples[k], k, course, len(names))
    pin = lambda image: image.pin_memory() if gpu else image
    batch = [(k, pin(image), *rest) for k, image, *rest in
             (read(k % N) for k in range(course.batch))]
    weights = {"mask": course.mask_weight, "feature": course.feature_weight,
               "text": course.text_weight}
    taught = noise(course.batch, 3, course.crop, course.crop).to(device)

    def crops():
        """Beside a GPU other cores would make them meanwhile, and they lie ready; on a CPU it is
        the same cores' work.
        """
        return ready if gpu else (
            rectify.augment(rectify.load_image(sample.image), cfg)[0] for sample in some)

    def anew():
        with mock.patch.object(rectify, "hypotheses", lambda *_: data[2]):      # computed but once
            rectify.training_data(segmenter, samples)

    def frozen(tower, *args, **options):
        with torch.no_grad(), rectify.in_bf16(device):
            tower(*args, **options)

    steps = 4                   # of the student in a call: the host may prepare the next meanwhile

    def student_steps():
        for _ in range(steps):
            x, label, f = distill.training_batch(teacher, batch, course, device)
            distill.step(student, descent, x, label, f, weights)

    epoch = lambda learner: rectify.train(learner, data, N, folder)
    tasks = {"dense": lambda: frozen(rectify.encode_image, clip, x, "maskclip"),
             "open_clip": lambda: frozen(clip.encode_image, x, normalize=True),
             "cached": lambda: epoch(paper), "own": lambda: epoch(segmenter), "anew": anew,
             "authors": lambda: authors_steps(paper, sgd, crops(), data[2]),
             "student": student_steps,
             "teacher": lambda: teacher(taught)}
    if gpu:
        square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        tasks["peak"] = lambda: square @ square
    t = medians(tasks, sizes["repeats"])
    t["student"] /= steps
    own, authors = "×".join(map(str, clip.visual.image_size)), t["authors"] / len(some) * N
    how = f"projected: {len(some)} steps measured, {'without' if gpu else 'with'} augmenting"
    add(f"dense CLIP, batch of {len(x)}, {own} px", len(x) / t["dense"], "images/s")
    add("open_clip's own forward, same batch", len(x) / t["open_clip"], "images/s")
    add("dense CLIP against open_clip's forward", t["open_clip"] / t["dense"], "×")
    add(f"epoch of {N} images, cached features", t["cached"], "s")
    add("epoch that augments and recomputes them", t["cached"] + t["anew"], "s")
    add("epoch of the authors' recipe", authors, "s", how)
    add("cached epoch against the one that recomputes", 1 + t["anew"] / t["cached"], "×")
    add("cached epoch against the authors' recipe", authors / t["cached"], "×", how)
    if cfg.prompt == "per-class":
        add("the same with a prompt a class, as on Emoji VOC", authors / t["own"], "×", how)
    add(f"{EPOCHS} cached epochs", EPOCHS * t["cached"], "s", f"projected: epoch × {EPOCHS}")
    add(f"{EPOCHS} epochs of the authors' recipe", EPOCHS * authors, "s",
        f"projected: step × {EPOCHS * N}")
    add(f"student step, {course.backbone}, {course.batch} crops of {course.crop} px",
        t["student"], "s")
    add("teacher, of that step", 100 * t["teacher"] / t["student"], "%")
    if gpu:
        with FlopCounterMode(display=False) as counter:
            sum(out.sum() for out in student(taught.float())).backward()
        peak = 2 * 8192 ** 3 / t["peak"]
        add("bf16 matmul peak", peak / 1e12, "TFLOP/s")
        add("student step, of the bf16 peak",
            100 * counter.get_total_flops() / t["student"] / peak, "%")

    rows += growth(paper, sizes, folder)
    if gpu:
        add("peak memory of the GPU", torch.cuda.max_memory_allocated() / 1e9, "GB")
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    add("peak memory of the process", rss * (1 if sys.platform == "darwin" else 1024) / 1e9, "GB")
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"),
                        help="folder for bench.json (default runs/bench)")
    out, device = parser.parse_args(argv).out, rectify.pick_device(rectify.configure())
    sizes, started = SIZES[device.type], time.time()
    print(f"measuring on {device}, {torch.get_num_threads()} threads; this takes a while")
    torch.manual_seed(0)
    np.random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = bench(sizes, device, Path(folder))
    wide = max(len(r["what"]) for r in rows)
    for r in rows:
        side, bound = TARGETS[device.type].get(r["what"], (None, None))
        if side:
            r["target"] = f"{side} {bound}"
            r["met"] = r["value"] >= bound if side == ">=" else r["value"] <= bound
        verdict = f"; target {r['target']}: {'met' if r['met'] else 'MISSED'}" if side else ""
        print(f"{r['what']:<{wide}}{r['value']:>10.4g} {r['unit']:<9} {r['how']}{verdict}")
    out.mkdir(parents=True, exist_ok=True)
    report = {"rows": rows, "sizes": sizes, "versions": rectify.versions(),
              "seconds": round(time.time() - started, 1)}
    rectify.write_text(out / "bench.json", json.dumps(report, indent=1))
    print(f"{report['seconds']:.0f} s in all. Wrote {out}/bench.json")


if __name__ == "__main__":
    rectify.run(main)
