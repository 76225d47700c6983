"""Deploy the student: one ONNX file, pictures in and masks out, checked against PyTorch; and a runner that needs no PyTorch.

    python export.py                                 # the newest student.pt -> student.onnx, student.fp16.onnx beside it
    python export.py --int8                          # and student.int8.onnx, calibrated on training pictures
    python export.py --bench                         # how fast each of them is here: a table and bench.png
    python export.py --run runs/emoji/student.onnx --image photo.jpg --mask mask.png --overlay overlay.png

The last line is for the machine of deployment: it imports onnxruntime, numpy and pillow, nothing else.

Read it top to bottom: 1 run a file, 2 the graph, 3 the files, 4 check, 5 benchmark, 6 main.
"""
import argparse
import copy
import functools
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont, ImageOps

VOID = 255
LARGEST = 2048                  # px: a longer picture is segmented at this size, so that memory is bounded (20 classes: 0.4 GB)
CHECKED = 400                   # pictures, evenly spread over the list, that a new file is compared with PyTorch on
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class BadInput(Exception):
    """What the person at the keyboard can mend, as rectify.UserError, which would bring PyTorch with it."""


# ===================================================================================================== 1 run a file

# cuDNN: HEURISTIC chooses an algorithm at once; the default measures all of them, anew for every new shape of input.
CUDA = {"cudnn_conv_algo_search": "HEURISTIC", "prefer_nhwc": "1", "use_tf32": "1"}
PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
             "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]}


def open_model(path, provider="cpu", graph=False):
    """An ONNX Runtime session on a file of ours, on "cpu", "cuda", "tensorrt", or "auto": CUDA where there is a GPU.

    graph: record the work as a CUDA graph at the first call; such a session wants `bound`. ONNX Runtime falls back to the CPU
    without an exception: here that is a warning, and an error where the provider was named. Raises BadInput.
    """
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; write it with `python export.py`")
    wanted = provider if provider != "auto" else "cuda" if shutil.which("nvidia-smi") else "cpu"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")    # or idle sessions slow each other down twofold
    options.log_severity_level = 3                      # what goes wrong is said below, once
    if wanted != "cpu" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()                      # CUDA's own libraries, where pip has put them
    cuda = CUDA | ({"enable_cuda_graph": "1"} if graph else {})
    available = [(name, cuda if name == "CUDAExecutionProvider" else {}) for name in PROVIDERS[wanted]
                 if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=available)
    except Exception as error:                          # ONNX Runtime has an error class for each of its states
        how, why = " as a CUDA graph" * graph, str(error).splitlines()[0][:120]
        raise BadInput(f"{path}: not an ONNX file that ONNX Runtime opens{how} ({why}); "
                       "write it again with `python export.py`")
    if not {"names", "palette", "inner"} <= session.get_modelmeta().custom_metadata_map.keys():
        raise BadInput(f"{path}: an ONNX file, but not one of export.py's: it does not name its classes")
    runs = session.get_providers()[0]
    if not runs.lower().startswith(wanted):
        problem = (f"{wanted} was asked for and ONNX Runtime runs on {runs}; install its libraries with "
                   "`pip install 'onnxruntime-gpu[cuda,cudnn]'`" + (" and tensorrt-cu13" if wanted == "tensorrt" else ""))
        if provider != "auto":
            raise BadInput(f"--provider {provider}: {problem}")
        print(f"WARNING: {problem}", file=sys.stderr)
    return session


def bound(session, x):
    """A function that segments pictures of one shape, uint8 B×H×W×3, in buffers kept on the session's device.

    No buffer is allocated for a call, and their addresses stay, as a CUDA graph needs. x: an example.
    """
    device = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
    image = onnxruntime.OrtValue.ortvalue_from_numpy(x, device)
    mask = onnxruntime.OrtValue.ortvalue_from_shape_and_type(x.shape[:3], np.uint8, device)
    binding = session.io_binding()
    binding.bind_ortvalue_input("image", image)
    binding.bind_ortvalue_output("mask", mask)

    def call(pictures):
        image.update_inplace(pictures)
        session.run_with_iobinding(binding)
        return mask.numpy()

    return call


def read_picture(path):
    """Any picture as RGB, EXIF rotation applied. Raises BadInput, also for one so enormous that it may be an attack."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):          # as rectify.load_image: 16-bit greys cut to 8, transparency on white
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                if "A" in image.getbands() or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadInput(f"{path}: not a readable image ({error})")


def segment(session, picture):
    """The mask of a PIL picture: H×W uint8, indices into the file's class names."""
    shrink = min(1, LARGEST / max(picture.size))
    seen = picture.resize([max(1, round(shrink * n)) for n in picture.size]) if shrink < 1 else picture
    mask = session.run(["mask"], {"image": np.asarray(seen)[None]})[0][0]
    return np.asarray(Image.fromarray(mask).resize(picture.size, Image.NEAREST))


def palette_png(mask, palette):
    """A mask as VOC stores it: a palette picture in which class c has the value c + 1, and 0 is a background that never comes."""
    image = Image.fromarray(mask + 1, "P")
    image.putpalette([0, 0, 0, *(value for colour in palette for value in colour)])
    return image


def overlay(picture, mask, names, palette):
    """The mask's colours over the picture, and the name of each class of at least 1 % in the middle of its pixels."""
    scale = max(1, round(640 / max(picture.size)))      # room for the names on a small picture
    colours = np.array(palette, np.uint8)[mask]
    page = Image.blend(picture, Image.fromarray(colours), 0.55).resize([scale * n for n in picture.size])
    font = ImageFont.load_default(max(16, min(page.size) // 22))
    for c in np.unique(mask):
        y, x = np.median(np.argwhere(mask == c), axis=0) * scale
        if (mask == c).mean() >= 0.01:
            ImageDraw.Draw(page).text((x, y), names[c], "white", font, "mm", stroke_width=3, stroke_fill="black")
    return page


def write_picture(image, path):
    """Save a PNG that is there whole or not at all. Raises BadInput where it cannot be written."""
    temporary = path.parent / (path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, "PNG")
        temporary.replace(path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise BadInput(f"{path}: cannot be written ({error.strerror or error})")


def run_file(args):
    """--run: the mask, and where asked for the overlay, of a picture or of every picture in a folder."""
    session = open_model(args.run, args.provider)
    meta = session.get_modelmeta().custom_metadata_map
    names, palette = json.loads(meta["names"]), json.loads(meta["palette"])
    print(f"running {args.run} on {session.get_providers()[0]}")
    source, many = Path(args.image), Path(args.image).is_dir()
    pictures = sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES) if many else [source]
    target = lambda path, place: Path(place) / f"{path.stem}.png" if many else Path(place)
    written = [target(path, place).resolve() for path in pictures for place in (args.mask, args.overlay) if place]
    if not pictures:
        raise BadInput(f"{source}: holds no images ({' '.join(sorted(SUFFIXES))})")
    if len(set(written)) < len(written) or {path.resolve() for path in pictures} & set(written):
        raise BadInput("two of the files to read and write are the same: give --mask and --overlay places of their own")
    for path in pictures:
        picture = read_picture(path)
        mask = segment(session, picture)
        write_picture(palette_png(mask, palette), target(path, args.mask))
        if args.overlay:
            write_picture(overlay(picture, mask, names, palette), target(path, args.overlay))
        shares = sorted(((np.mean(mask == c), names[c]) for c in np.unique(mask)), reverse=True)
        print(f"{target(path, args.mask)}: " + ", ".join(f"{name} {share:.0%}" for share, name in shares[:4]))


# ======================================================================================================= 2 the graph

def square(samples, size):
    """The side in px, a multiple of 8, of the square that has as many pixels as a training picture at the student's own size.

    size: (long, short), the sides in px that the student's pictures may have.
    """
    from rectify import spread

    areas = []
    for sample in spread(samples, CHECKED):
        short, long = sorted(read_picture(sample.image).size)
        areas.append(short * long * min(size[0] / long, size[1] / short) ** 2)
    return -(-round(np.mean(areas) ** 0.5) // 8) * 8


def make_product(student, inner, probabilities=False):
    """The student as what is deployed, one module: uint8 pictures B×H×W×3 (RGB) to uint8 masks B×H×W.

    Resizing, normalising and argmax are inside. Whatever size comes in, the network sees inner×inner, so that its convolutions
    always have the same shapes (cuDNN and ONNX Runtime prepare themselves anew for new ones); the picture is stretched, not cut.
    With `probabilities` it returns (mask, B×C×H×W float32) instead.
    """
    import torch
    import torch.nn.functional as F
    from distill import prepare

    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.outputs = student, ["mask", "probabilities"] if probabilities else ["mask"]

        def forward(self, image):
            x = image.permute(0, 3, 1, 2).float() / 255                                 # B 3 H W
            x = prepare(F.interpolate(x, (inner, inner), mode="bilinear", antialias=True))
            logits, _ = self.student(x.to(self.student.aspp[0].weight.dtype))           # B C inner/8 inner/8
            logits = F.interpolate(logits, image.shape[1:3], mode="bilinear")           # B C H W
            mask = logits.argmax(1).to(torch.uint8)
            return (mask, logits.softmax(1)) if probabilities else mask

    return Product().eval()


# ======================================================================================================= 3 the files

def save_onnx(model, path, meta):
    """Write a model (a proto, or the path of one) with its metadata {key: str}, after ONNX's own check of it."""
    import onnx

    model = onnx.load(model) if isinstance(model, Path) else model
    onnx.helper.set_model_props(model, meta)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def write_onnx(product, path, meta):
    """Trace a product and write it as one file; batch, height and width stay free. meta: {key: str}."""
    import torch

    example = torch.zeros(2, 101, 87, 3, dtype=torch.uint8)                             # sizes that nobody could mistake
    free = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # the exporter warns of its own internals
        program = torch.onnx.export(product, (example,), dynamic_shapes=({0: free, 1: free, 2: free},), input_names=["image"],
                                    output_names=product.outputs, dynamo=True, external_data=False, verbose=False)
    save_onnx(program.model_proto, path, meta)


def write_int8(source, path, samples, meta):
    """Quantise an fp32 file of ours: QDQ, uint8 activations, int8 weights with a scale a channel, calibrated on pictures.

    Weights keep 7 bits (reduce_range): processors without VNNI add two products in 16 bits, which 8 bits overflow.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.paths = iter([sample.image for sample in samples])

        def get_next(self):
            path = next(self.paths, None)
            return path and {"image": np.asarray(read_picture(path))[None]}

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=True,
                        op_types_to_quantize=["Conv", "Add", "MaxPool"], calibrate_method=CalibrationMethod.MinMax)
    save_onnx(path, path, meta)


# =========================================================================================================== 4 check

# file: (smallest share of pixels on which it must agree with PyTorch, most points of mIoU that it may lose)
BOUNDS = {"student.onnx": (0.9999, 0.1), "student.fp16.onnx": (0.998, 0.5), "student.int8.onnx": (0.9, 1.0)}


def check(product, sessions, train, val, names):
    """Run files beside PyTorch on real pictures: whole batches of one size, and crops of odd sizes that no picture has.

    product: gives probabilities. sessions: {file name: session}. Returns {file name: {"agreement": share of the pixels, "margin":
    the largest by which PyTorch preferred its own class where they differ, a probability, "lost": points of mIoU}} and what
    rectify.evaluate says. Without labelled pictures training pictures serve, and no mIoU. Raises BadInput beyond BOUNDS.
    """
    import torch
    from rectify import evaluate, fit, load_image, spread

    found = {name: {"different": 0, "pixels": 0, "margin": 0.0} for name in sessions}

    def compare(images):
        x = images.permute(0, 2, 3, 1).contiguous()                                     # B H W 3
        with torch.no_grad():
            mask, p = product(x)
        masks = {"pytorch": mask.long()}
        for name, session in sessions.items():
            other = torch.from_numpy(session.run(["mask"], {"image": x.numpy()})[0]).long()
            differs = mask != other
            found[name]["different"] += differs.sum().item()
            found[name]["pixels"] += differs.numel()
            if differs.any():
                gap = p.amax(1) - p.gather(1, other[:, None])[:, 0]
                found[name]["margin"] = max(found[name]["margin"], gap[differs].max().item())
            masks[name] = other
        return masks

    def predict(images):
        H, W = images.shape[-2:]
        compare(images[:1, :, :max(1, H - 2 | 1), :max(1, W - 4 | 1)])                  # odd sizes, that tracing has not seen
        return compare(images)

    if val:
        results, _ = evaluate(predict, spread(val, CHECKED), names)
    else:
        results = {}
        for sample in spread(train, CHECKED):
            image = load_image(sample.image)
            image = fit(image, (LARGEST, LARGEST)) if max(image.shape) > LARGEST else image
            predict(torch.stack([image, image.flip(-1)]))
    for name, f in found.items():
        f["agreement"] = 1 - f.pop("different") / f.pop("pixels")
        f["lost"] = results["pytorch"]["mIoU"] - results[name]["mIoU"] if val else 0.0
        print(f"{name}: agrees with PyTorch on {f['agreement']:.4%} of the pixels, where not PyTorch's margin was at most "
              f"{f['margin']:.4f}" + (f"; mIoU {results[name]['mIoU']:.2f}, lost {f['lost']:+.2f}" if val else ""))
        agreement, lost = BOUNDS[name]
        if f["agreement"] < agreement or f["lost"] > lost:
            raise BadInput(f"{name}: is not what PyTorch computes (at least {agreement:.2%} of the pixels must agree and at most "
                           f"{lost} points of mIoU may be lost); nothing was written")
    return found, results


# ======================================================================================================= 5 benchmark

# TFLOP/s of dense bf16 matrix products, as the vendor's data sheets state them.
PEAK = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "T4": 65}


def interleaved(calls, seconds=15.0, least=3):
    """Time calls in turn, so that a machine that slows down slows all of them. Returns {name: (first call s, median s)}.

    A turn is one call that does not count, since threads of the one before still spin, and three that do. A call that fails is
    left out and named.
    """
    first, times = {}, {}
    for name, call in calls.items():
        started = time.perf_counter()
        try:
            call()
        except Exception as error:                      # torch.compile wants a C++ compiler, for one
            print(f"left out: {name} ({(str(error) or repr(error)).splitlines()[0]})")
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


def candidates(product, files, network, x, device):
    """The calls to compare on one device, each from uint8 pictures B×H×W×3 in memory to masks in memory: {name: call}.

    On a GPU each file runs twice: as --run does it, and with buffers of its own and its work recorded as a CUDA graph.
    """
    import torch

    image, model = torch.from_numpy(x), copy.deepcopy(product).to(device)
    compiled = torch.compile(model)

    def bf16():
        with torch.autocast(device, torch.bfloat16):
            return compiled(image.to(device)).cpu()

    calls = {"PyTorch eager fp32": lambda: model(image.to(device)).cpu(), "PyTorch compiled bf16": bf16}
    ways = [("ONNX Runtime", "cpu", False)] if device == "cpu" else [
        ("ONNX Runtime", "cuda", False), ("CUDA graph", "cuda", True), ("TensorRT", "tensorrt", False)]
    for title, provider, graph in ways:
        for name, path in files.items():
            try:
                session = open_model(path, provider, graph)
            except BadInput as error:
                print(f"left out: {error}")
                continue
            calls[f"{title} {name}"] = (functools.partial(bound(session, x), x) if graph else
                                        functools.partial(session.run, ["mask"], {"image": x}))
    if device == "cpu":
        alone = onnxruntime.InferenceSession(str(network), open_model(files["fp32"]).get_session_options())
        inner = np.zeros((len(x), 3, *alone.get_inputs()[0].shape[2:]), np.float32)
        calls["the network alone fp32"] = lambda: alone.run(None, {"x": inner})
    return calls


def bench(student, inner, files, out):
    """Time every way to run the student, batch 1 and 8; print a table, draw bench.png, and return what export.json keeps.

    files: {"fp32": path, ..}. Also here: what resizing, normalising and argmax add to the network, and what it costs when the
    pictures' sizes change from call to call.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    product, report, rng = make_product(student, inner), [], np.random.default_rng(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        product.student(torch.zeros(1, 3, inner, inner))
    flop = counter.get_total_flops()
    print(f"{flop / 1e9:.2f} GFLOP a picture at {inner}×{inner}\n")
    print(f"{'':34}{'batch':>6}{'first call':>12}{'median':>12}{'pictures/s':>12}{'of the peak':>13}")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        network = Path(folder) / "network.onnx"
        torch.onnx.export(student, (torch.zeros(2, 3, inner, inner),), network, dynamo=True, verbose=False, input_names=["x"],
                          dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), external_data=False)
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            gpu = torch.cuda.get_device_name() if device == "cuda" else ""
            peak = next((tera * 1e12 for name, tera in PEAK.items() if name in gpu), None)
            for batch in (1, 8):
                x = rng.integers(256, size=(batch, inner, inner, 3), dtype=np.uint8)
                for name, (first, median) in interleaved(candidates(product, files, network, x, device)).items():
                    row = {"name": name, "device": gpu or "CPU", "batch": batch, "first_call_s": round(first, 3),
                           "median_ms": round(1000 * median, 3), "pictures_per_s": round(batch / median, 2),
                           "of_peak": peak and round(flop * batch / median / peak, 4)}
                    report.append(row)
                    print(f"{name + ', ' + row['device']:<34}{batch:>6}{first:>10.2f} s{1000 * median:>9.2f} ms"
                          f"{batch / median:>12.1f}" + (f"{row['of_peak']:>13.0%}" if peak else f"{'-':>13}"))
    session = open_model(files["fp32"])
    pictures = [rng.integers(256, size=(1, inner + k, inner - k, 3), dtype=np.uint8) for k in range(8)]
    turn = lambda order: [session.run(["mask"], {"image": picture}) for picture in order]
    orders = interleaved({"changing": lambda: turn(pictures), "same": lambda: turn(pictures[:1] * 8)}, 5)
    ms = {(row["name"], row["batch"]): row["median_ms"] for row in report if row["device"] == "CPU"}
    ratios = {"ONNX Runtime fp32 against PyTorch eager": ms["PyTorch eager fp32", 1] / ms["ONNX Runtime fp32", 1],
              "end to end against the network alone": ms["ONNX Runtime fp32", 1] / ms["the network alone fp32", 1],
              "eight sizes in turn against one size": orders["changing"][1] / orders["same"][1]}
    if "int8" in files:
        ratios["int8 against fp32"] = ms["ONNX Runtime fp32", 1] / ms["ONNX Runtime int8", 1]
    print("\n" + "\n".join(f"{name}, CPU, batch 1: {ratio:.2f}×" for name, ratio in ratios.items()))
    bar_chart(report, out / "bench.png")
    return {"rows": report, "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()}}


def bar_chart(rows, path):
    """Pictures a second of every row: a bar for batch 1 and one for batch 8 under each name."""
    font, colours = ImageFont.load_default(20), {1: (200, 60, 40), 8: (40, 90, 180)}
    rows = sorted(rows, key=lambda row: (row["device"] != "CPU", row["name"], row["batch"]))
    left = 40 + int(max(font.getlength(f"{row['name']}, {row['device']}") for row in rows))
    page = Image.new("RGB", (left + 620, 70 + 38 * len(rows)), "white")
    draw, top = ImageDraw.Draw(page), max(row["pictures_per_s"] for row in rows)
    draw.text((20, 16), "pictures a second, higher is better", "black", font)
    for k, (batch, colour) in enumerate(colours.items()):
        draw.rectangle([left + 180 * k + 140, 20, left + 180 * k + 160, 38], fill=colour)
        draw.text((left + 180 * k + 168, 16), f"batch {batch}", "black", font)
    for k, row in enumerate(rows):
        y = 60 + 38 * k
        draw.text((left - 12, y + 12), f"{row['name']}, {row['device']}", "black", font, "rm")
        wide = 500 * row["pictures_per_s"] / top
        draw.rectangle([left, y, left + wide, y + 24], fill=colours[row["batch"]])
        draw.text((left + wide + 8, y + 12), f"{row['pictures_per_s']:.1f}", "black", font, "lm")
    page.save(path)


# ============================================================================================================ 6 main

def export(args):
    """Write the files, check them, and measure them where asked to."""
    from distill import load_student
    from rectify import Config, colour, dataset_folder, newest, splits, spread, versions, write_text

    path = Path(args.out or f"runs/{args.dataset}") / "student.pt" if args.out or args.dataset else newest("student.pt")
    print(f"exporting {path}")
    student, state = load_student(path)
    names, out = state["names"], path.parent
    folder = dataset_folder(Config(**state["rectify"]))
    train, val = splits(folder)
    inner = args.inner or square(train, state["size"])
    if inner < 32:
        raise BadInput(f"--inner {inner}: the side in px of what the network sees, from 32 on")
    meta = {"names": json.dumps(names), "palette": json.dumps([colour(c) for c in range(len(names))]), "ignore_index": str(VOID),
            "inner": str(inner), "mask": "uint8, an index into names"}
    halved = copy.deepcopy(student)
    halved.backbone.half()
    halved.aspp.half()                                  # the classifier stays in fp32: a half's squares overflow
    probabilities = args.output == "probs"
    with tempfile.TemporaryDirectory(dir=out) as place:
        new = {"student.onnx": Path(place) / "student.onnx", "student.fp16.onnx": Path(place) / "student.fp16.onnx"}
        write_onnx(make_product(student, inner, probabilities), new["student.onnx"], meta)
        write_onnx(make_product(halved, inner, probabilities), new["student.fp16.onnx"], meta)
        if args.int8:
            new["student.int8.onnx"] = Path(place) / "student.int8.onnx"
            write_int8(new["student.onnx"], new["student.int8.onnx"], spread(train, 128), meta)
        sessions = {name: open_model(p) for name, p in new.items()}
        found, results = check(make_product(student, inner, True), sessions, train, val, names)
        for name, temporary in new.items():
            if val:
                measured = {"mIoU": str(results[name]["mIoU"]), "measured_on": f"{len(spread(val, CHECKED))} validation pictures"}
                save_onnx(temporary, temporary, meta | measured)
            temporary.replace(out / name)
    for name in {"student.int8.onnx", "bench.png"} - new.keys():        # of an earlier student
        (out / name).unlink(missing_ok=True)
    if val:
        print(f"PyTorch, pictures stretched to {inner}×{inner}: mIoU {results['pytorch']['mIoU']:.2f}"
              + (f"; at their own shape (distill.py): {state['mIoU']:.2f}" if state["mIoU"] else ""))
    files = {name.removeprefix("student").removesuffix(".onnx").strip(".") or "fp32": out / name for name in new}
    report = {"results": results, "check": found, "config": vars(args) | {"inner": inner}, "versions": versions(),
              "bytes": {name: (out / name).stat().st_size for name in new}}
    if args.bench:
        report["bench"] = bench(student, inner, files, out)
    write_text(out / "export.json", json.dumps(report, indent=1))
    print(f"Wrote {out}/: " + ", ".join([*new, "export.json"] + ["bench.png"] * args.bench))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="", help="export runs/<dataset>/student.pt (default: the newest)")
    parser.add_argument("--out", default="", help="folder of the student.pt to export; the files are written there too")
    parser.add_argument("--inner", type=int, default=0, help="px of the square that the network sees (default: a picture's area)")
    parser.add_argument("--output", default="mask", choices=["mask", "probs"], help="probs: probabilities too")
    parser.add_argument("--int8", action="store_true", help="write student.int8.onnx too")
    parser.add_argument("--bench", action="store_true", help="time every way to run the student")
    parser.add_argument("--run", default="", metavar="FILE", help="run this ONNX file on --image instead; needs no PyTorch")
    parser.add_argument("--image", default="", help="a picture, or a folder of them")
    parser.add_argument("--mask", default="mask.png", help="PNG of the mask, or a folder for a folder (default mask.png)")
    parser.add_argument("--overlay", default="", help="where the picture with the mask over it goes, likewise")
    parser.add_argument("--provider", default="auto", choices=["auto", *PROVIDERS], help="where ONNX Runtime computes")
    args = parser.parse_args(argv)
    try:
        if bool(args.run) != bool(args.image):
            raise BadInput("--run FILE and --image PICTURE go together")
        if args.run:
            return run_file(args)
        from rectify import run
        return run(lambda: export(args))
    except BadInput as error:
        message = error
    except OSError as error:                            # a folder that cannot be written to, a full disk
        message = f"{error.filename}: {error.strerror}"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
