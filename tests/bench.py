"""How fast each part is, against what others do in the same run, and how the cost of an epoch
grows: a table and bench.json.

    python tests/bench.py             # half a minute on 2 cores
    python tests/bench.py export      # export.py's files beside PyTorch, about 2 minutes
    python tests/bench.py busy        # rectify.py and distill.py beside endless loops, 12 minutes

On a CPU: the tiny CLIP on images of Emoji VOC. On a GPU: true sizes, ViT-B/16 with
random weights on 1,464 made images and crops of VOC's size. Times are medians of calls that take
turns, after one call of each that is not counted.
"""
import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import distill  # noqa: E402  (after the path to it)
import export  # noqa: E402
import rectify  # noqa: E402

# images: of an epoch. batch: of dense CLIP. steps: of the authors' recipe. repeats: calls that a
# median is taken of. grow: the sizes over which a cost is measured, each with the others at `base`.
SIZES = {
    "cpu": dict(images=96, batch=16, steps=24, repeats=5,
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
                with quiet():                   # of words that the tiny CLIP has never met
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
        make = lambda image: rectify.augment(image, cfg, rectify.draw_view())[0]
        return ready if gpu else (make(rectify.load_image(sample.image)) for sample in some)

    def anew():
        with mock.patch.object(rectify, "hypotheses", lambda *_: data[2]):      # computed but once
            rectify.training_data(segmenter, samples)

    def frozen(tower, *args, **options):
        with torch.no_grad(), rectify.in_bf16(device):
            tower(*args, **options)

    steps = 4                   # of the student in a call: the host may prepare the next meanwhile

    def student_steps():
        make = lambda _: distill.training_batch(teacher, batch, course, device)
        ready = rectify.read_ahead(make, range(steps), 1, threads=1) if gpu else map(make, range(steps))
        for x, label, f in ready:                                           # as distill.train
            distill.step(student, descent, x, label, f, weights)

    epoch = lambda learner: rectify.train(learner, data, N, folder)
    tasks = {"dense": lambda: frozen(rectify.encode_image, clip, x, "maskclip"),
             "open_clip": lambda: frozen(clip.encode_image, x, normalize=True),
             "cached": lambda: epoch(paper), "own": lambda: epoch(segmenter), "anew": anew,
             "authors": lambda: authors_steps(paper, sgd, crops(), data[2]),
             "student": student_steps,
             "teacher": lambda: teacher(taught)}
    n, fast = 8192 if gpu else 2048, rectify.uses_bf16(device)
    square = torch.randn(n, n, device=device, dtype=torch.bfloat16 if fast else torch.float)
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
    peak, kind = 2 * n ** 3 / t["peak"], "bf16" if fast else "fp32"
    add(f"{kind} matmul peak", peak / 1e12, "TFLOP/s")
    for what, compute, seconds in (
            ("dense CLIP", tasks["dense"], t["dense"]),
            ("student step", lambda: sum(out.sum() for out in student(taught.float())).backward(),
             t["student"])):
        with FlopCounterMode(display=False) as counter:
            compute()
        add(f"{what}, of the {kind} peak", 100 * counter.get_total_flops() / seconds / peak, "%")

    rows += growth(paper, sizes, folder)
    if gpu:
        add("peak memory of the GPU", torch.cuda.max_memory_allocated() / 1e9, "GB")
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    add("peak memory of the process", rss * (1 if sys.platform == "darwin" else 1024) / 1e9, "GB")
    return rows


# ================================================================================== bench.py busy

def quarter(folder):
    """A quarter of Emoji VOC for --data, in VOC's layout; returns the options that take it."""
    cfg = rectify.configure()
    source, lists = rectify.dataset_folder(cfg), folder / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for part in ("JPEGImages", "SegmentationClass"):
        (folder / part).symlink_to((source / part).resolve())
    for split in ("train", "val"):
        names = [sample.name for sample in rectify.list_samples(source, split)[::4]]
        (lists / f"{split}.txt").write_text("\n".join(names))
    (folder / "names.txt").write_text("\n".join(rectify.VOC_NAMES))
    return ["--dataset", "emoji", "--data", str(folder), "--names", str(folder / "names.txt")]


def bench_busy(repeats=3):
    """Seconds of whole runs of rectify.py and distill.py (3 epochs) on a quarter of Emoji VOC: on a
    quiet machine, beside one endless loop and beside three, in turn.
    """
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        out = ["--out", f"{folder}/run"]
        commands = {"rectify.py": [*quarter(Path(folder) / "data"), *out],
                    "distill.py": [*out, "--epochs", "3"]}
        for _, (script, options), loops in itertools.product(
                range(repeats), commands.items(), (0, 1, 3)):
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                    for _ in range(loops)]
            started = time.perf_counter()
            try:
                subprocess.run([sys.executable, str(rectify.HERE / script), *options],
                               check=True, capture_output=True)
            finally:
                for loop in busy:
                    loop.kill()
            times.setdefault((script, loops), []).append(time.perf_counter() - started)
            print(f"{script}, {loops} loops beside it: {times[script, loops][-1]:.1f} s", flush=True)
    print(f"\n{'median seconds':<14}{'quiet':>9}{'one loop':>17}{'three loops':>17}")
    for script in commands:
        quiet, *busy = (float(np.median(times[script, loops])) for loops in (0, 1, 3))
        print(f"{script:<14}{quiet:>9.1f}" + "".join(f"{b:>9.1f} ({b / quiet:.1f}×)" for b in busy))


# ================================================================================ bench.py export

# TFLOP/s of dense bf16 matrix products, as the vendor's data sheets state them.
PEAK = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "T4": 65}


def interleaved(calls, seconds=15.0, least=3):
    """Time calls in turn, so that a machine that slows down slows all of them.

    Returns {name: (first call, median)} in s. A turn is one call that does not count, since threads of
    the call before still spin, and three that do. A call that fails is left out and named.
    """
    first, times = {}, {}
    for name, call in calls.items():
        started = time.perf_counter()
        try:
            call()
        except Exception as error:                      # torch.compile wants a C++ compiler, for one
            print(f"left out: {name} ({export.first_line(error)})")
            continue
        first[name], times[name] = time.perf_counter() - started, []
        call()                                          # warm-up
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or min(map(len, times.values())) < least:
        for name in times:
            calls[name]()
            for _ in range(3):
                started = time.perf_counter()
                calls[name]()
                times[name].append(time.perf_counter() - started)
    return {name: (first[name], float(np.median(times[name]))) for name in times}


def bound(session, x):
    """A function that segments uint8 images B×H×W×3 of one shape in buffers on the session's device.

    No buffer is allocated for a call, and their addresses stay, as a CUDA graph needs. x: an example.
    """
    device = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
    image = onnxruntime.OrtValue.ortvalue_from_numpy(x, device)
    mask = onnxruntime.OrtValue.ortvalue_from_shape_and_type(x.shape[:3], np.uint8, device)
    binding = session.io_binding()
    binding.bind_ortvalue_input("image", image)
    binding.bind_ortvalue_output("mask", mask)

    def call(images):
        image.update_inplace(images)
        session.run_with_iobinding(binding)
        return mask.numpy()

    return call


def runtimes(module, files, network, x, device):
    """The calls to compare on one device, uint8 images B×H×W×3 in memory to masks in memory: {name: call}.

    On a GPU each file runs twice: as --run does it, and with its own buffers as a CUDA graph.
    """
    image, model = torch.from_numpy(x), copy.deepcopy(module).to(device)
    compiled = torch.compile(model)

    def bf16():
        with torch.autocast(device, torch.bfloat16):
            return compiled(image.to(device)).cpu()

    calls = {"PyTorch eager fp32": lambda: model(image.to(device)).cpu(), "PyTorch compiled bf16": bf16}
    ways = [("ONNX Runtime", "cpu", {})] if device == "cpu" else [
        ("ONNX Runtime", "cuda", export.CUDA), ("TensorRT", "tensorrt", export.CUDA),
        ("CUDA graph", "cuda", export.CUDA | {"enable_cuda_graph": "1"})]
    for title, provider, cuda in ways:
        for name, path in files.items():
            try:
                session = export.open_model(path, provider, cuda)
            except export.BadInput as error:
                print(f"left out: {error}")
                continue
            calls[f"{title} {name}"] = (
                functools.partial(bound(session, x), x) if title == "CUDA graph" else
                functools.partial(session.run, ["mask"], {"image": x}))
    if device == "cpu":
        options = export.open_model(files["fp32"]).get_session_options()
        alone = onnxruntime.InferenceSession(str(network), options, providers=["CPUExecutionProvider"])
        inner = np.zeros((len(x), 3, *alone.get_inputs()[0].shape[2:]), np.float32)
        calls["the network alone fp32"] = lambda: alone.run(None, {"x": inner})
        calls |= other_runtimes(files, x)
    return calls


def other_runtimes(files, x):
    """The same for OpenVINO, at fp32 and as it comes, and OpenCV, each where it is installed."""
    calls = {}
    with contextlib.suppress(ImportError):
        import openvino
        for name, path in files.items():
            for title, hint in ("", {}), (" at f32", {"INFERENCE_PRECISION_HINT": "f32"}):
                try:
                    model = openvino.Core().compile_model(path, "CPU", hint | {"PERFORMANCE_HINT": "LATENCY"})
                except RuntimeError as error:           # int8 in a processor's bfloat16, for one
                    print(f"left out: OpenVINO{title} {name} ({export.first_line(error)})")
                    continue
                calls[f"OpenVINO{title} {name}"] = lambda model=model: model(x)[0]
    with contextlib.suppress(ImportError):
        import cv2
        for name, path in files.items():
            net = cv2.dnn.readNetFromONNX(str(path))
            net.setInput(x, "image")
            calls[f"OpenCV {name}"] = lambda net=net: net.forward("mask")
    return calls


LARGE = """
import sys, time, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
image = np.random.default_rng(0).integers(256, size=(1, 3000, 4000, 3), dtype=np.uint8)
for _ in range(3):
    started = time.perf_counter()
    session.run(["mask"], {"image": image})
print(time.perf_counter() - started, open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def twelve_megapixels(path):
    """(s, GB) of a process that segments 12 megapixels with an ONNX file: its third call, its peak memory. Linux only."""
    done = subprocess.run([sys.executable, "-c", LARGE, str(path)], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stdout.split())
    return seconds, kilobytes / 1e6


def more_classes(student, C):
    """A copy of a student with C random classes."""
    student = copy.deepcopy(student)
    student.T = F.normalize(torch.randn(C, student.T.size(1), generator=torch.Generator().manual_seed(0)), dim=1)
    student.R = torch.zeros_like(student.T)
    return student


def bench_export(out, seconds=15.0):
    """Time every way to run the student of `out`, a folder with student.pt and export.py's files.

    Batch 1 and 8 of validation images; a table with the share of pixels that agree with PyTorch, and
    bench.png and bench.json there. Also: what resizing, normalising and argmax add to the network, and
    what it costs when the images' sizes change from call to call; and 12 megapixels.
    """
    files = {name: out / f"student{kind}.onnx" for name, kind in
             (("fp32", ""), ("fp16", ".fp16"), ("int8", ".int8")) if (out / f"student{kind}.onnx").is_file()}
    if "fp32" not in files:
        raise rectify.UserError(f"{out}: holds no student.onnx; write it with `python export.py`")
    state = rectify.load_checkpoint(out / "student.pt", "student")
    student = distill.load_student(state)
    meta = export.open_model(files["fp32"]).get_modelmeta().custom_metadata_map
    inner, threshold = int(meta["inner"]), float(meta["threshold"])
    module = export.image_to_mask(student, inner, len(state["names"]), threshold)
    train, val = rectify.splits(rectify.dataset_folder(rectify.configure(state["rectify"])))
    images = [np.asarray(export.read_image(sample.image)[0].resize((inner, inner)))
              for sample in (rectify.subsample(val or train, 8) * 8)[:8]]              # inner inner 3 each
    report, rng = [], np.random.default_rng(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student(torch.zeros(1, 3, inner, inner))
    flop = counter.get_total_flops()
    print(f"{flop / 1e9:.2f} GFLOP an image at {inner}×{inner}\n")
    print(f"{'':34}{'batch':>6}{'first call':>12}{'median':>12}{'images/s':>12}{'of the peak':>13}{'agrees':>10}")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        network = Path(folder) / "network.onnx"
        torch.onnx.export(student, (torch.zeros(2, 3, inner, inner),), network, dynamo=True, verbose=False,
                          input_names=["x"], dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                          external_data=False)
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            gpu = torch.cuda.get_device_name() if device == "cuda" else ""
            peak = next((tera * 1e12 for name, tera in PEAK.items() if name in gpu), None)
            for batch in (1, 8):
                x = np.stack(images[:batch])                                        # B inner inner 3
                exact = module(torch.from_numpy(x)).numpy()
                calls = runtimes(module, files, network, x, device)
                for name, (first, median) in interleaved(calls, seconds).items():
                    share = peak and flop * batch / median / peak
                    mask = None if "alone" in name else np.asarray(calls[name]()).reshape(exact.shape)
                    agrees = None if mask is None else float((mask == exact).mean())
                    report.append({"name": name, "device": gpu or "CPU", "batch": batch, "of_peak": share,
                                   "first_call_s": first, "median_ms": 1000 * median,
                                   "images_per_s": batch / median, "agrees": agrees})
                    print(f"{name + ', ' + (gpu or 'CPU'):<34}{batch:>6}{first:>10.2f} s{1000 * median:>9.2f} ms"
                          f"{batch / median:>12.1f}" + (f"{share:>13.0%}" if peak else f"{'-':>13}")
                          + (f"{'-':>10}" if agrees is None else f"{agrees:>10.2%}"))
    session = export.open_model(files["fp32"])
    sizes = [rng.integers(256, size=(1, inner + k, inner - k, 3), dtype=np.uint8) for k in range(8)]
    turn = lambda order: [session.run(["mask"], {"image": image}) for image in order]
    orders = interleaved({"changing": lambda: turn(sizes), "same": lambda: turn(sizes[:1] * 8)}, seconds / 3)
    ms = {(r["name"], r["batch"]): r["median_ms"] for r in report if r["device"] == "CPU"}
    ratios = {"ONNX Runtime fp32 against PyTorch eager": ms["PyTorch eager fp32", 1] / ms["ONNX Runtime fp32", 1],
              "end to end against the network alone": ms["ONNX Runtime fp32", 1] / ms["the network alone fp32", 1],
              "eight sizes in turn against one size": orders["changing"][1] / orders["same"][1]}
    if "int8" in files:
        ratios["int8 against fp32"] = ms["ONNX Runtime fp32", 1] / ms["ONNX Runtime int8", 1]
    print("\n" + "\n".join(f"{name}, CPU, batch 1: {ratio:.2f}×" for name, ratio in ratios.items()))
    large = {}
    with tempfile.TemporaryDirectory() as folder:
        many = Path(folder) / "150.onnx"
        export.write_onnx(export.image_to_mask(more_classes(student, 150), inner, 150), many, {})
        for C, path in ((len(state["names"]), files["fp32"]), (150, many)) if Path("/proc/self/status").exists() else ():
            large[C] = twelve_megapixels(path)
            print(f"12 megapixels, {C} classes, CPU: {large[C][0]:.2f} s, peak memory of the process {large[C][1]:.2f} GB")
    bar_chart(report, out / "bench.png")
    rectify.write_text(out / "bench.json", json.dumps({"rows": report, "ratios": ratios, "large": large}, indent=1))
    print(f"Wrote {out}/: bench.png, bench.json")


def bar_chart(rows, path):
    """Images a second of every row: a bar for batch 1 and one for batch 8 at each name."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(f"{r['name']}, {r['device']}" for r in rows))[::-1]
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.55 * len(names)), layout="constrained")
    for batch, offset, colour in ((1, 0.2, "0.35"), (8, -0.2, "0.75")):
        some = [r for r in rows if r["batch"] == batch]
        at = [names.index(f"{r['name']}, {r['device']}") + offset for r in some]
        bars = axis.barh(at, [r["images_per_s"] for r in some], 0.38, color=colour, edgecolor="black",
                         label=f"batch {batch}")
        axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="images/s, higher is better", title="The student, image in memory to mask in memory")
    axis.margins(x=0.12)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="training",
                        choices=["training", "export", "busy"])
    parser.add_argument("--out", type=Path,
                        help="folder for bench.json (default runs/bench); for export the folder of "
                             "student.pt and its files (default: the newest)")
    args = parser.parse_args(argv)
    if args.what == "export":
        return bench_export(args.out or rectify.newest("student.pt").parent)
    if args.what == "busy":
        return bench_busy()
    out, device = args.out or Path("runs/bench"), rectify.pick_device(rectify.configure())
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
