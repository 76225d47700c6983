"""How fast each part is, against what others do in the same run, and how costs grow.

    python tests/bench.py             # the parts of training, a minute on 2 cores: bench.json
    python tests/bench.py export      # export.py's files beside PyTorch, 2 min: bench-export.json
    python tests/bench.py busy        # whole runs beside other programs, 30 min: bench-busy.json

On a CPU: the tiny CLIP on Emoji VOC. On a GPU: ViT-B/16 with random weights, 1,464 made images and
crops of VOC's size. Times are medians of calls that take turns, without the first.
"""
import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rectify  # noqa: E402  (after the path to it, and before torch)
import distill  # noqa: E402
import export  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from export import onnxruntime  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

# images: of an epoch. batch: of dense CLIP. steps: of the authors' recipe. repeats: calls that a
# median is taken of. grow: sizes over which a cost is measured, each with the others at `base`.
SIZES = {
    "cpu": dict(images=96, batch=16, steps=24, repeats=5,
                base=dict(images=64, classes=20, side=192),
                grow=dict(images=(64, 128, 256), classes=(20, 59, 150), side=(96, 192, 384))),
    "cuda": dict(images=1464, batch=64, steps=64, repeats=3,
                 base=dict(images=366, classes=20, side=512),
                 grow=dict(images=(366, 732, 1464), classes=(20, 59, 150), side=(256, 512, 1024)))}
LOOP = "while True: pass"
JOB = "import torch; torch.set_num_threads(1); a = torch.randn(999, 999)\nwhile True: a @ a"
GPU_WAYS = {"ONNX Runtime": ("CUDA", export.CUDA), "TensorRT": ("Tensorrt", {}),
            "CUDA graph": ("CUDA", export.CUDA | {"enable_cuda_graph": "1"})}
noise = lambda *shape: torch.randint(256, shape, dtype=torch.uint8)

def medians(tasks, repeats):
    """{name: (seconds of the first call, median of the others)} of functions, called in turn."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = {name: [] for name in tasks}
    for turn, (name, task) in itertools.product(range(1 + repeats), tasks.items()):
        if turn and not times[name]:
            continue
        try:
            with open(os.devnull, "w") as void, contextlib.redirect_stdout(void), \
                    contextlib.redirect_stderr(void):
                wait()
                started = time.perf_counter()
                task()
                wait()
                times[name].append(time.perf_counter() - started)
        except Exception as error:                      # torch.compile wants a C++ compiler, say
            print(f"left out: {name} ({error!r:.160})")
    return {name: (t[0], float(np.median(t[1:]))) for name, t in times.items() if t}

# ======================================================================================= training

def make_world(folder, count):
    """JPEGs of 500×375 px, decoded as fast as a camera's, and random weights; their path."""
    for k in range(count):
        image = export.Image.fromarray(noise(12, 16, 3).numpy()).resize((500, 375))
        image.save(folder / f"{k}.jpg")
    model = rectify.open_clip.create_model("ViT-B-16-quickgelu", load_weights=False)
    torch.save(model.state_dict(), folder / "random.pt")
    return str(folder / "random.pt")

def make_features(segmenter, images, side):
    """What training_data would give for one view of images of two classes: random features."""
    (C, D), device = segmenter.T.shape, segmenter.device
    h = math.ceil(side / segmenter.clip.visual.patch_size[0])
    x = F.normalize(torch.randn(1, images, D, h, h, device=device), dim=2).half()
    y = F.one_hot(torch.randint(C, (images, 2), device=device), C).amax(1).bool()
    return x, torch.ones_like(x[:, :, 0], dtype=torch.bool), y

def authors_steps(segmenter, optimizer, crops, y):
    """The authors' recipe: one crop a step, through CLIP, and the prompt of every class through the
    text encoder; fp32 (TF32, as ours), SGD. crops: of images 3×S×S uint8. y: N×C bool."""
    clip, T = segmenter.clip, segmenter.T
    for image, classes in zip(crops, y):
        with torch.no_grad():
            x = rectify.normalize(clip, image[None].to(segmenter.device))
            f = rectify.encode_image(clip, x, "maskclip")                               # 1 D h w
        V = segmenter.rectifier.V.expand(len(T), -1, -1)                                # C L d
        R = rectify.reference_features(clip, V, segmenter.tokens)                       # C D
        M = rectify.gumbel_mask(segmenter.rectified(f, R / R.norm()), 1000)
        z = rectify.pool(M, f, torch.ones_like(M[:, 0], dtype=torch.bool))
        loss = rectify.contrastive_loss(z, T, classes[None], segmenter.scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

def growth(segmenter, samples, sizes, folder):
    """Yield (what, exponent, how): how costs grow with one size while the others stay."""
    for axis, values in sizes["grow"].items():
        tasks = {}
        for value in values:
            size, grown = {**sizes["base"], axis: value}, segmenter
            if axis == "classes":       # T's values cost nothing: random ones, not of 85 sentences
                T = F.normalize(torch.randn(value, segmenter.T.size(1)), dim=1).to(segmenter.device)
                with mock.patch.object(rectify, "text_features", lambda *_: T):
                    names = [f"thing{k}" for k in range(value)]
                    grown = rectify.Segmenter(segmenter.cfg, names)
            data = make_features(grown, size["images"], size["side"]), samples, folder
            tasks["cached epoch", value] = functools.partial(rectify.train, grown, *data)
            if axis == "side":
                dense = functools.partial(segmenter.features, noise(4, 3, value, value))
                tasks["dense CLIP", value] = torch.no_grad()(dense)
        t = medians(tasks, sizes["repeats"])
        for what in dict.fromkeys(name for name, _ in t):
            seconds = [t[what, value][1] for value in values]
            each = ", ".join(f"{value}: {s:.3g} s" for value, s in zip(values, seconds))
            exponent = np.polyfit(np.log(values), np.log(seconds), 1)[0]    # a line in logarithms
            yield f"{what}, growth with {axis}", exponent, f"fitted: {each}"

def bench_training(folder):
    """The rows of training: {"what", "value", "unit", "how"}."""
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # no tuning in an epoch
    gpu, rows = torch.cuda.is_available(), []
    sizes = SIZES["cuda" if gpu else "cpu"]
    add = lambda what, value, unit, how="measured": rows.append(
        dict(what=what, value=float(value), unit=unit, how=how))
    options = dict(dataset="voc" if gpu else "emoji", method="reclip", epochs=1, views=1)
    if gpu:
        options |= dict(data=str(folder), pretrained=make_world(folder, sizes["images"]))
    cfg = rectify.configure(**options | {"out": str(folder)})
    samples = rectify.list_samples(rectify.dataset_folder(cfg), "train")[:sizes["images"]]
    configs, names = (cfg, replace(cfg, prompt="shared", start="authors")), rectify.VOC_NAMES
    segmenter, paper = (rectify.Segmenter(c, names) for c in configs)
    clip, device, N, some = segmenter.clip, segmenter.device, len(samples), samples[:sizes["steps"]]
    data, steps = rectify.training_data(segmenter, samples), 4
    x = rectify.normalize(clip, noise(sizes["batch"], 3, *clip.visual.image_size).to(device))
    ready = noise(len(some), 3, cfg.crop, cfg.crop).to(device)
    sgd = torch.optim.SGD(paper.rectifier.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    course = distill.configure(cfg, targets="crop", **{"weights": ""} if gpu else {})
    labeller = distill.Labeller(segmenter, course)
    student = distill.DeepLabV2(course, segmenter.T, None, segmenter.scale).to(device).train()
    student.to(memory_format=torch.channels_last if gpu else torch.preserve_format)     # as train
    torch.backends.cudnn.benchmark = True
    descent = distill.make_optimizer(student, course)
    kept = {"names": names, "background": []}
    batch = [distill.read_example(samples[k], k, course, kept) for k in range(course.batch)]
    weights = {part: getattr(course, f"{part}_weight") for part in ("mask", "feature", "text")}
    taught = noise(course.batch, 3, course.crop, course.crop).to(device)
    fill = (255 * clip.mean).round().byte()
    crop = lambda s: rectify.augment(rectify.load_image(s.image), cfg, rectify.draw_view(), fill)[0]
    crops = lambda: ready if gpu else map(crop, some)   # beside a GPU other cores would make them
    half = torch.no_grad()(rectify.in_half)(device)
    frozen = lambda tower: torch.no_grad()(half(tower))
    y_once = mock.patch.object(rectify, "each_image", lambda *_: [*data[2]])
    def student_steps():
        make = lambda _: distill.training_batch(student, labeller, batch, course)
        ahead = functools.partial(rectify.read_ahead, ahead=1, threads=1) if gpu else map
        for x, label, f in ahead(make, range(steps)):                       # as distill.train
            distill.step(student, descent, x, label, f, weights)
    n, dtype = 8192 if gpu else 2048, half.fast_dtype if half._enabled else torch.float
    square = torch.randn(n, n, device=device, dtype=dtype)
    epoch = lambda learner: rectify.train(learner, data, samples, folder)
    tasks = {"dense": lambda: frozen(rectify.encode_image)(clip, x, "maskclip"),
             "open_clip": lambda: frozen(clip.encode_image)(x, normalize=True),
             "cached": lambda: epoch(paper), "own": lambda: epoch(segmenter),
             "anew": lambda: y_once(rectify.training_data)(segmenter, samples),
             "authors": lambda: authors_steps(paper, sgd, crops(), data[2]),
             "student": student_steps, "teacher": lambda: labeller.look(taught),
             "peak": lambda: square @ square}
    t = {name: median for name, (_, median) in medians(tasks, sizes["repeats"]).items()}
    t["student"] /= steps
    authors = t["authors"] / len(some) * N
    how = f"projected: {len(some)} steps measured, {'without' if gpu else 'with'} augmenting"
    add("dense CLIP against open_clip's forward", t["open_clip"] / t["dense"], "×")
    add(f"epoch of {N} images, cached features", t["cached"], "s")
    add("cached epoch against the one that recomputes", 1 + t["anew"] / t["cached"], "×")
    add("cached epoch against the authors' recipe", authors / t["cached"], "×", how)
    add(f"the same, prompt: {cfg.prompt}", authors / t["own"], "×", how)
    add(f"student step, {course.backbone}, {course.batch}×{course.crop} px", t["student"], "s")
    add("teacher, of that step", 100 * t["teacher"] / t["student"], "%")
    kinds = {torch.bfloat16: "bf16", torch.half: "fp16", torch.float: "fp32"}
    peak, kind = 2 * n ** 3 / t["peak"], kinds[dtype]
    add(f"{kind} matmul peak", peak / 1e12, "TFLOP/s")
    both = lambda: sum(out.sum() for out in student(taught.float())).backward()
    for what, compute in (("dense", tasks["dense"]), ("student", both)):
        with FlopCounterMode(display=False) as counter:
            compute()
        add(f"{what}, of the {kind} peak", 100 * counter.get_total_flops() / t[what] / peak, "%")
    for what, exponent, each in growth(paper, samples, sizes, folder):
        add(what, exponent, "exponent", each)
    if gpu:
        add("peak memory of the GPU", torch.cuda.max_memory_allocated() / 1e9, "GB")
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss                # kB on Linux
    add("peak memory of the process", rss * 1024 / 1e9, "GB")
    return rows

# =========================================================================================== export

def session_of(path, shape, provider, options, settings=None):
    """An ONNX Runtime session for images of one shape (B, H, W): no node computes shapes on the
    CPU then, so that a CUDA graph can capture all and TensorRT builds one engine."""
    settings = settings or onnxruntime.SessionOptions()
    for name, n in zip(("batch", "height", "width"), shape):
        settings.add_free_dimension_override_by_name(name, n)
    if provider == "Tensorrt":
        import tensorrt_libs  # noqa: F401  (loads libnvinfer.so.10: pip install 'tensorrt-cu13<11')
        sides = "image:" + "x".join(map(str, (*shape, 3)))
        options = {f"trt_profile_{k}_shapes": sides for k in ("min", "opt", "max")} | {
            "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(path.parent / "trt")}
    onnxruntime.preload_dlls()
    name = f"{provider}ExecutionProvider"
    session = onnxruntime.InferenceSession(str(path), settings, providers=[(name, options)])
    if session.get_providers()[0] != name:
        raise rectify.UserError(f"{provider}: ONNX Runtime does not load it here")
    return session

def bound(session, x):
    """A call in buffers on the GPU, whose addresses stay, as a CUDA graph needs them."""
    image = onnxruntime.OrtValue.ortvalue_from_numpy(x, "cuda")
    mask = onnxruntime.OrtValue.ortvalue_from_shape_and_type(x.shape[:3], np.uint8, "cuda")
    binding = session.io_binding()
    binding.bind_ortvalue_input("image", image)
    binding.bind_ortvalue_output("mask", mask)
    return lambda: (image.update_inplace(x), session.run_with_iobinding(binding), mask.numpy())[2]

def ways(module, files, x, device):
    """{name: call}, uint8 images B×H×W×3 in memory to masks in memory, on one device."""
    image, model = torch.from_numpy(x), copy.deepcopy(module).to(device)
    compiled, run = torch.compile(model), lambda session: session.run(["mask"], {"image": x})[0]
    bf16 = torch.autocast(device, torch.bfloat16)
    calls = {"PyTorch": lambda: model(image.to(device)).cpu().numpy(),
             "PyTorch compiled, bf16": lambda: bf16(compiled)(image.to(device)).cpu().numpy()}
    for name, path in files.items():
        if device == "cpu":
            calls[f"ONNX Runtime {name}"] = functools.partial(run, export.open_model(path))
            with contextlib.suppress(ImportError, RuntimeError):    # int8 in bfloat16, say
                import openvino
                net = openvino.Core().compile_model(path, "CPU")
                calls[f"OpenVINO {name}"] = lambda net=net: net(x)[0]
        elif name != "int8":            # TensorRT takes symmetric int8 alone, CUDA runs Q and DQ
            for title, (provider, options) in GPU_WAYS.items():
                try:
                    session = session_of(path, x.shape[:3], provider, options)
                    calls[f"{title} {name}"] = (bound(session, x) if title == "CUDA graph" else
                                                functools.partial(run, session))
                except Exception as error:              # ONNX Runtime has a class for each error
                    print(f"left out: {title} {name} ({str(error).splitlines()[0]:.160})")
    return calls

def bench_export(out):
    """The rows of every way to run the student of the folder `out`, batch 1 and 8."""
    files = {name: path for name, kind in (("fp32", ""), ("fp16", ".fp16"), ("int8", ".int8"))
             if (path := out / f"student{kind}.onnx").is_file()}
    state, rows = rectify.load(out / "student.pt", "student"), []
    meta = export.open_model(out / "student.onnx").get_modelmeta().custom_metadata_map
    module = export.image_to_mask(distill.load_student(state), json.loads(meta["size"]),
                                  len(state["names"]), float(meta["threshold"]))
    train, val = rectify.splits(rectify.dataset_folder(rectify.configure(state["rectify"])))
    images = [export.read_image(s.image)[0] for s in rectify.subsample(val or train, 8)]
    images = [np.asarray(image.resize(images[0].size)) for image in images]     # H W 3 each
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for batch in (1, 8):
        x = np.stack((images * 8)[:batch])                                      # B H W 3
        with torch.no_grad():
            exact, calls = module(torch.from_numpy(x)).numpy(), ways(module, files, x, device)
            for name, (first, median) in medians(calls, 15).items():
                agrees = 100 * float((calls[name]() == exact).mean())
                rows.append({"what": f"{name}, {device}, batch {batch}", "first call, s": first,
                             "ms": 1000 * median, "images/s": batch / median, "agrees, %": agrees})
    return rows

# ============================================================================================= busy

def bench_busy(folder):
    """The rows of whole runs on a quiet machine, beside a loop and beside a PyTorch job."""
    beside, times = {"quiet": "", "beside a loop": LOOP, "beside a PyTorch job": JOB}, {}
    runs = {"rectify.py": ["--out", folder], "distill.py": ["--out", folder, "--epochs", "3"]}
    turns = itertools.product(range(3), runs.items(), beside.items())
    for _, (script, options), (load, code) in turns:
        other, started = subprocess.Popen([sys.executable, "-c", code]), time.perf_counter()
        try:
            subprocess.run([sys.executable, rectify.HERE / script, *options], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        finally:
            other.kill()
        times.setdefault((script, load), []).append(time.perf_counter() - started)
    t = {key: float(np.median(seconds)) for key, seconds in times.items()}
    return [{"what": f"{script}, {load}", "seconds": seconds, "times quiet":
             seconds / t[script, "quiet"]} for (script, load), seconds in t.items()]

BENCHES = {"training": bench_training, "export": bench_export, "busy": bench_busy}

def main(argv=None):
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("what", nargs="?", default="training", choices=BENCHES)
    parser.add_argument("--out", type=Path, help="folder of the JSON (default runs/bench); for "
                        "export that of student.pt (default: the newest)")
    args, started = parser.parse_args(argv), time.time()
    own = args.what == "export"
    out = args.out or (rectify.newest("student.pt").parent if own else Path("runs/bench"))
    with tempfile.TemporaryDirectory() as folder:
        rows = BENCHES[args.what](out if own else Path(folder))
    for what, *values in map(dict.values, rows):
        print(f"{what:<52}", *(f"{v:<11.4g}" if isinstance(v, float) else v for v in values))
    path = out / ("bench.json" if args.what == "training" else f"bench-{args.what}.json")
    rectify.write(path, json.dumps({"rows": rows, "versions": rectify.versions(), "seconds":
                                    round(time.time() - started, 1)}, indent=1))
    print(f"{time.time() - started:.0f} s in all. Wrote {path}")

if __name__ == "__main__":
    rectify.run(main)
