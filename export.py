"""Deploy the student: one ONNX file, image in, mask out; checked against PyTorch, run without it.

    python export.py                   # newest student.pt -> student.onnx and student.fp16.onnx
    python export.py --int8            # and student.int8.onnx, calibrated on training images
    python export.py --threshold 0.5   # pixels whose best probability is below 0.5 are background
    python export.py --web site        # and a page that runs student.onnx in a browser
    python export.py --run student.onnx --image photo.jpg --mask mask.png --overlay overlay.png
    python export.py --run student.onnx --image photos/ --mask masks/      # or - : paths from stdin

--run is for the machine of deployment: it imports onnxruntime, numpy and pillow, nothing else.

A student of Emoji VOC (seed 0): size; median at batch 1 on 1 core of an AMD EPYC (Zen 4), ONNX
Runtime 1.31 (`tests/bench.py export`, an earlier student of the same shapes); agreement with
PyTorch; mIoU on 400 validation images:

    student.onnx        16.2 MB     14.9 ms     100.00 %     64.44 mIoU
    student.fp16.onnx    8.2 MB     15.3 ms      99.91 %     64.45 mIoU
    student.int8.onnx    4.3 MB      5.7 ms      96.18 %     63.97 mIoU

1 run a file, 2 the graph that is exported, 3 the files, 4 the check; the rest serves them.
"""
import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps

VOID = 255
DECIDED = 512           # px: a longer image's mask is decided at this size, and enlarged
LARGEST = 2048          # px: --run shrinks a longer image to this, so that memory is bounded
CHECKED = 400           # images, evenly spread, on which a new file is compared with PyTorch
ORT_WEB = "1.30.0"      # the version of onnxruntime-web that --web is tested with
ORT_CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{ORT_WEB}/dist"
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class BadInput(Exception):
    """What the user can mend: one line and exit code 2. rectify.UserError would bring PyTorch."""


# ===================================================================================== 1 run a file

# HEURISTIC picks a convolution at once; the default times all of them, anew for every shape.
CUDA = {"cudnn_conv_algo_search": "HEURISTIC", "prefer_nhwc": "1", "use_tf32": "1"}
PROVIDERS = {"cpu": ["CPU"], "cuda": ["CUDA", "CPU"], "tensorrt": ["Tensorrt", "CUDA", "CPU"]}


def open_model(path, provider="cpu", cuda=CUDA):
    """An ONNX Runtime session on a file of ours.

    provider: "cpu", "cuda", "tensorrt", or "auto": CUDA where there is a GPU. cuda: options of the
    CUDA provider. ONNX Runtime falls back to the CPU without an exception: here that is a warning,
    and an error where the provider was named. Raises BadInput.
    """
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; write it with `python export.py`")
    wanted = provider if provider != "auto" else "cuda" if shutil.which("nvidia-smi") else "cpu"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = (len(os.sched_getaffinity(0))
                                    if hasattr(os, "sched_getaffinity") else os.cpu_count())
    # An idle session whose threads spin slows the others down, twofold.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3                      # its errors are raised below, once
    if wanted != "cpu" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()                      # CUDA's libraries, where pip has put them
    providers = [(f"{name}ExecutionProvider", cuda if name == "CUDA" else {})
                 for name in PROVIDERS[wanted]]
    available = [p for p in providers if p[0] in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=available)
    except Exception as error:                          # ONNX Runtime has a class for each error
        raise BadInput(f"{path}: ONNX Runtime does not open it ({first_line(error)}); "
                       "write it again with `python export.py`")
    runs = session.get_providers()[0]
    if not runs.lower().startswith(wanted):
        problem = (f"{wanted} was asked for and ONNX Runtime runs on {runs}; install its libraries "
                   "with `pip install 'onnxruntime-gpu[cuda,cudnn]'`"
                   + (" and tensorrt-cu13" if wanted == "tensorrt" else ""))
        if provider != "auto":
            raise BadInput(f"--provider {provider}: {problem}")
        print(f"WARNING: {problem}", file=sys.stderr)
    return session


def classes_of(session, path):
    """(names, palette) of the values in a file's masks, from its metadata. Raises BadInput."""
    try:
        meta = session.get_modelmeta().custom_metadata_map
        with open(path, "rb") as file:
            whole = hashlib.md5(file.read(int(meta["bytes"]))).hexdigest() == meta["md5"]
        names, palette = json.loads(meta["names"]), json.loads(meta["palette"])
        colours = np.array(palette)
        kinds = lambda values: {(value.name, value.type) for value in values}
        sound = (whole and all(isinstance(name, str) and name.isprintable() for name in names)
                 and colours.shape == (len(names), 3) and colours.dtype.kind == "i"
                 and 0 <= colours.min() and colours.max() <= 255 and len(names) <= 256
                 and kinds(session.get_inputs()) == {("image", "tensor(uint8)")}
                 and ("mask", "tensor(uint8)") in kinds(session.get_outputs()))
    except (KeyError, TypeError, ValueError, RecursionError):
        sound = False
    if not sound:
        raise BadInput(f"{path}: damaged, or not one of export.py's ONNX files: its checksum, "
                       "names, palette, image or mask are missing or broken; write it again with "
                       "`python export.py`")
    return names, palette


def read_image(path, longest=LARGEST):
    """(RGB image of at most `longest` px a side, the file's own size (W, H) in px).

    EXIF rotation is applied, 16-bit greys are cut to 8, transparency is laid on white, all as in
    rectify.load_image. Raises BadInput, also beyond Pillow's limit of 179 megapixels.
    """
    if not Path(path).is_file():                        # opening a FIFO would wait for its writer
        raise BadInput(f"{path}: no such file")
    try:
        quiet = warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)
        with quiet, Image.open(path) as image:          # beyond Pillow's limit it is an error
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            size = image.size[::-1] if turned else image.size
            if image.mode.startswith("I"):
                grey = np.asarray(ImageOps.exif_transpose(image)) >> 8
                image = Image.fromarray(grey.astype(np.uint8))
            elif "transparency" in image.info or image.mode in ("LA", "PA"):
                image = image.convert("RGBA")
            elif image.mode not in ("L", "RGB", "RGBA"):
                image = image.convert("RGB")
            image.thumbnail((longest, longest))         # first: the steps below copy the image
            image = ImageOps.exif_transpose(image)
            if image.mode == "RGBA":
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB"), size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: not a readable image ({error})")


def segment(session, image, size=None):
    """The mask of an RGB image, enlarged to `size` (W, H) in px: a Pillow image of mode L.

    Its values are indices into the file's class names. Raises BadInput.
    """
    try:
        mask = session.run(["mask"], {"image": np.asarray(image)[None]})[0][0]          # h w
    except Exception as error:                          # ONNX Runtime has a class for each error
        raise BadInput(f"the model fails on an image of {image.width}×{image.height} px "
                       f"({first_line(error)})")
    return Image.fromarray(mask).resize(size or image.size, Image.NEAREST)


def palette_png(mask, palette):
    """A mask with VOC's values and colours: 0 is background, black, and class c is c + 1."""
    if palette[0] == [0, 0, 0]:                         # the file's own 0 is background
        image = mask.copy()
    else:
        image, palette = mask.point([*range(1, 256), 0]), [[0, 0, 0], *palette]
    image.putpalette(sum(palette, []))
    return image


def overlay(image, mask, names, palette):
    """The mask's colours over the image, with the name of each class of at least 1 % of it.

    A name stands at the median of its class's pixels.
    """
    scale = max(1, round(640 / max(image.size)))        # room for the names on a small image
    mask = np.asarray(mask.resize(image.size, Image.NEAREST))
    page = Image.blend(image, Image.fromarray(np.array(palette, np.uint8)[mask]), 0.55)
    page = page.resize([scale * n for n in image.size])
    font = ImageFont.load_default(max(16, min(page.size) // 22))
    for c in np.unique(mask):
        y, x = np.median(np.argwhere(mask == c), axis=0) * scale
        if (mask == c).mean() >= 0.01 and palette[c] != [0, 0, 0]:
            ImageDraw.Draw(page).text((x, y), names[c], "white", font, "mm", stroke_width=3,
                                      stroke_fill="black")
    return page


def run_files(args):
    """--run: write the mask, and where asked for the overlay, of every image. Raises BadInput."""
    session = open_model(args.run, args.provider)
    names, palette = classes_of(session, args.run)
    print(f"running {args.run} on {session.get_providers()[0]}")
    images, many = list_images(args.image)
    places = [Path(p) for p in (args.mask or ("masks" if many else "mask.png"), args.overlay) if p]
    targets = [[p / f"{image.stem}.png" if many else p for p in places] for image in images]
    written = [path.resolve() for paths in targets for path in paths]
    if len({*written, *(path.resolve() for path in images)}) < len(written) + len(images):
        raise BadInput("two of the files to read and write are the same; give --mask and --overlay "
                       "places of their own, and images of different names")
    started = time.perf_counter()
    for n, (path, paths) in enumerate(zip(images, targets), 1):
        image, size = read_image(path)
        mask = segment(session, image, size)
        count = mask.histogram()                        # pixels of each value
        if any(count[len(names):]):
            raise BadInput(f"{args.run}: its masks hold values that it does not name")
        pages = [palette_png(mask, palette)]
        pages += [overlay(image, mask, names, palette)] if args.overlay else []
        for page, target in zip(pages, paths):
            write_whole(target, lambda temporary: page.save(temporary, "PNG"))
        if many and sys.stderr.isatty():
            print(f"{n}/{len(images)} images", end="\r", file=sys.stderr, flush=True)
    if many:
        rate = len(images) / (time.perf_counter() - started)
        print(f"{places[0]}: {len(images)} masks, {rate:.1f} images/s with reading and writing")
    else:
        most = sorted(zip(count, names), reverse=True)[:4]
        print(f"{paths[0]}: " + ", ".join(f"{name} {n / sum(count):.0%}" for n, name in most if n))


# ===================================================================== 2 the graph that is exported

def centres(size, target):
    """Where the centres of `target` equal pixels lie on an axis of `size` px: a vector, target."""
    import torch

    return (torch.arange(target) + 0.5) * (size / target)


def resize_matrix(size, target):
    """A, target×size, rows of sum 1: A x resizes x as PyTorch's antialiased bilinear resize does.

    Each row is a triangle around the centre of its pixel, which ends a pixel of the smaller image
    away: A_ij ∝ max(0, 1 − |j + ½ − c_i| / max(1, size / target)). ONNX's Resize has this filter as
    an attribute, antialias, which some runtimes ignore; they all multiply matrices.
    """
    import torch

    distance = (torch.arange(size) + 0.5 - centres(size, target)[:, None]).abs()    # target size
    A = (1 - distance / torch.sym_max(1.0, size / target)).clamp(min=0)
    return A / A.sum(1, keepdim=True)


def image_to_mask(student, inner, classes, threshold=0.0, probabilities=False):
    """The module that is exported: uint8 RGB images B×H×W×3 to uint8 masks B×H×W.

    The network sees inner×inner px whatever comes in, so its convolutions always have the same
    shapes; the image is stretched, not cut. The mask is decided at a long side of at most
    max(inner, DECIDED) px and enlarged by nearest neighbour, so memory hardly grows with H·W·C.

    classes: C; of the student's Q channels those beyond C are background words. With such words or
    a threshold > 0 the mask is 0 for background and c + 1 for class c, else c. With `probabilities`
    the module returns (mask, B×K×h×w float32) instead, h×w the size at which the mask is decided, K
    the number of values; background's is the larger of its words' best and the threshold.
    """
    import torch
    from distill import prepare

    class ImageToMask(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.student = student
            self.has_background = threshold > 0 or len(student.T) > classes
            self.outputs = ["mask", "probabilities"] if probabilities else ["mask"]

        def forward(self, image):
            B, H, W, _ = image.shape
            x = resize_matrix(H, inner) @ image.float().reshape(B, H, W * 3)        # B inner W·3
            x = x.reshape(B, inner, W, 3).permute(0, 3, 1, 2)                       # B 3 inner W
            x = x @ resize_matrix(W, inner).T / 255                           # B 3 inner inner
            logits, _ = self.student(prepare(x).to(student.aspp[0].weight.dtype))   # B Q s s
            side, s = max(inner, DECIDED), logits.shape[2]
            longest = torch.sym_max(torch.sym_max(H, W), side)
            h, w = (torch.sym_max(n * side // longest, 1) for n in (H, W))
            logits = resize_matrix(s, h) @ logits @ resize_matrix(s, w).T           # B Q h w
            total = logits.logsumexp(1, keepdim=True)                               # B 1 h w
            if self.has_background:
                least = total + math.log(max(threshold, 1e-30))                     # B 1 h w
                background = torch.cat([least, logits[:, classes:]], 1).amax(1, keepdim=True)
                logits = torch.cat([background, logits[:, :classes]], 1)            # B 1+C h w
            mask = logits.argmax(1).to(torch.uint8)                                 # B h w
            mask = mask.index_select(1, centres(h, H).long())                       # B H w
            mask = mask.index_select(2, centres(w, W).long())                       # B H W
            return (mask, (logits - total).exp()) if probabilities else mask

    return ImageToMask().eval()


# ====================================================================================== 3 the files

# ONNX Runtime 1.17 and newer open these versions, as do OpenVINO, OpenCV 5 and onnxruntime-web.
OPSET, IR_VERSION = 18, 8


def save_onnx(model, path, meta):
    """Write a model (a proto, or the path of one) with metadata {key: str}, after ONNX's check.

    ONNX has no checksum: the metadata, written last, holds the MD5 of the bytes before it, see
    `classes_of`.
    """
    import onnx

    model = onnx.load(model) if isinstance(model, Path) else model
    del model.metadata_props[:]
    model.ir_version = IR_VERSION
    domains = {node.domain for node in model.graph.node}        # the quantiser declares eight more
    used = [opset for opset in model.opset_import if opset.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(used)
    onnx.checker.check_model(model, full_check=True)
    body, tail = model.SerializeToString(), onnx.ModelProto()   # protobuf reads the two as one
    checksum = {"md5": hashlib.md5(body).hexdigest(), "bytes": str(len(body))}
    onnx.helper.set_model_props(tail, meta | checksum)
    Path(path).write_bytes(body + tail.SerializeToString())


def write_onnx(module, path, meta):
    """Trace an image_to_mask into one file; batch, height and width stay free. meta: {key: str}."""
    import torch

    example = torch.zeros(2, 101, 87, 3, dtype=torch.uint8)     # odd sizes, met nowhere else
    free = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # the exporter warns of its own internals
        program = torch.onnx.export(module, (example,), input_names=["image"],
                                    output_names=module.outputs, opset_version=OPSET, dynamo=True,
                                    dynamic_shapes=({0: free, 1: free, 2: free},),
                                    external_data=False, verbose=False)
    save_onnx(program.model_proto, path, meta)


def halved(student):
    """A copy with fp16 convolutions; the classifier stays fp32, since a half's squares overflow."""
    student = copy.deepcopy(student)
    student.backbone.half()
    student.aspp.half()
    return student


def write_int8(source, path, samples, meta):
    """Quantise an fp32 file of ours, calibrated on the samples' images.

    QDQ format; uint8 activations; int8 weights with a scale a channel. Weights keep 7 bits
    (reduce_range): processors without VNNI add two products in 16 bits, which 8 bits overflow; with
    VNNI the eighth bit gains no speed. Only convolutions: more would gain none and lose accuracy.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self):
            self.paths = iter([sample.image for sample in samples])

        def get_next(self):
            path = next(self.paths, None)
            return path and {"image": np.asarray(read_image(path)[0])[None]}

    prepared = path.with_suffix(".prepared")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(path), Images(), per_channel=True, reduce_range=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                    op_types_to_quantize=["Conv"])
    save_onnx(path, path, meta)


# ====================================================================================== 4 the check

# file: (smallest share of pixels on which it must agree with PyTorch, mIoU points it may lose)
BOUNDS = {"student.onnx": (0.9999, 0.1), "student.fp16.onnx": (0.998, 0.5),
          "student.int8.onnx": (0.9, 1.0)}


def check(module, sessions, train, val, names, base=1):
    """Run files beside PyTorch on real images: whole batches of one size, and crops of odd sizes.

    module: an image_to_mask with probabilities. sessions: {file name: session}. names: C classes.
    base: the first class's value in label files.
    Returns {file name: {"agreement": share of the pixels, "margin": the most by which PyTorch
    prefers its own value where they differ, a probability, "lost": mIoU points}} and what
    rectify.evaluate says. Without labelled images, training images serve and there is no mIoU.
    Raises BadInput beyond BOUNDS.
    """
    import torch
    import torch.nn.functional as F
    from rectify import evaluate, limit, load_image, subsample

    found = {name: {"different": 0, "pixels": 0, "margin": 0.0} for name in sessions}
    first, K = int(module.has_background), len(names) + module.has_background

    def compare(images):
        x = images.permute(0, 2, 3, 1).contiguous()                                 # B H W 3
        with torch.no_grad():
            mask, p = module(x)                                                     # B H W, B K h w
        p = F.interpolate(p, mask.shape[1:], mode="nearest-exact")                  # B K H W
        masks = {"pytorch": mask.long()}
        for name, session in sessions.items():
            masks[name] = torch.from_numpy(session.run(["mask"], {"image": x.numpy()})[0]).long()
            differs = mask != masks[name]
            found[name]["different"] += differs.sum().item()
            found[name]["pixels"] += differs.numel()
            if differs.any():
                margin = p.amax(1) - p.gather(1, masks[name][:, None])[:, 0]        # B H W
                found[name]["margin"] = max(found[name]["margin"], margin[differs].max().item())
        return {name: (mask - first) % K for name, mask in masks.items()}  # as `evaluate` has them

    def predict(images):
        H, W = images.shape[-2:]
        compare(images[:1, :, :max(1, (H - 2) | 1), :max(1, (W - 4) | 1)])  # odd sizes, not traced
        return compare(images)

    results = {}
    if val:
        classes = names + ["background"] * module.has_background
        results, *_ = evaluate(predict, subsample(val, CHECKED), classes, base)
    else:
        for sample in subsample(train, CHECKED):
            image = limit(load_image(sample.image))
            predict(torch.stack([image, image.flip(-1)]))
    for name, f in found.items():
        f["agreement"] = 1 - f.pop("different") / f.pop("pixels")
        f["lost"] = results["pytorch"]["mIoU"] - results[name]["mIoU"] if val else 0.0
        print(f"{name}: agrees with PyTorch on {f['agreement']:.4%} of the pixels; where not, "
              f"PyTorch's margin is at most {f['margin']:.4f}"
              + (f"; mIoU {results[name]['mIoU']:.2f}, lost {f['lost']:+.2f}" if val else ""))
        agreement, lost = BOUNDS[name]
        if f["agreement"] < agreement or f["lost"] > lost:
            raise BadInput(f"{name}: is not what PyTorch computes (at least {agreement:.2%} of the "
                           f"pixels must agree, at most {lost} points of mIoU may be lost); "
                           "nothing was written")
    return found, results


# ================================================= everything below serves the export and is not it

def first_line(error):
    """The beginning of an exception's message, for an error line of ours."""
    return (str(error) or repr(error)).splitlines()[0][:160]


def list_images(arguments):
    """(paths, whether masks go to a folder) of --image: files, folders, or - for standard input."""
    many = len(arguments) > 1 or arguments == ["-"] or Path(arguments[0]).is_dir()
    lines = filter(str.strip, sys.stdin.read().splitlines()) if arguments == ["-"] else arguments
    images = []
    for path in map(Path, lines):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()
                        ) if path.is_dir() else [path]
        if not inside:
            raise BadInput(f"{path}: holds no images ({' '.join(sorted(SUFFIXES))})")
        images += inside
    if not images:
        raise BadInput("--image -: standard input names no images")
    return images, many


def write_whole(path, save):
    """Make a file that is there whole or not at all: save(temporary) writes it. Raises BadInput."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise BadInput(f"{path}: cannot be written ({error.strerror or error})")


@contextlib.contextmanager
def workplace(folder):
    """A folder for unfinished files, gone afterwards; what a killed run left in it is cleared."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def inner_size(samples, size):
    """The side in px, a multiple of 8, of a square with as many pixels as a mean training image.

    size: (long, short), the sides in px to which the student's training images are resized.
    """
    from rectify import subsample

    areas = []
    for sample in subsample(samples, CHECKED):
        short, long = sorted(read_image(sample.image)[1])
        areas.append(short * long * min(size[0] / long, size[1] / short) ** 2)
    return -(-round(np.mean(areas) ** 0.5) // 8) * 8


PAGE = """<!doctype html><meta charset="utf-8"><title>Segmentation in the browser</title>
<style>
body { font: 16px system-ui, sans-serif; max-width: 1000px; margin: 1em auto; padding: 0 1em }
canvas { display: block; width: min(100%, 640px); margin: 1em 0 }
ul { padding: 0 }
li { display: inline-block; margin-right: 1.5em }
i { display: inline-block; width: 1em; height: 1em; margin-right: .4em; vertical-align: middle }
</style>
<h1>What is where?</h1>
<p>Drop an image here or choose one. It stays in this browser. <input type="file" accept="image/*">
<p id="status">loading the model</p><canvas width="0" height="0"></canvas><ul></ul>
<script src="ORT/ort.wasm.min.js"></script>
<script>
const names = NAMES, palette = PALETTE, longest = 1024, $ = q => document.querySelector(q);
ort.env.wasm.numThreads = 1;                // more would need headers that a plain server lacks
const model = ort.InferenceSession.create("student.onnx");

async function show(blob) {
  const bitmap = await createImageBitmap(blob), canvas = $("canvas");
  const scale = Math.min(1, longest / Math.max(bitmap.width, bitmap.height));
  const W = canvas.width = Math.max(1, Math.round(scale * bitmap.width));
  const H = canvas.height = Math.max(1, Math.round(scale * bitmap.height));
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.fillStyle = "white";
  context.fillRect(0, 0, W, H);
  context.drawImage(bitmap, 0, 0, W, H);
  const pixels = context.getImageData(0, 0, W, H), rgba = pixels.data;
  const rgb = new Uint8Array(3 * W * H).map((_, i) => rgba[4 * Math.floor(i / 3) + i % 3]);
  const started = performance.now();
  const image = new ort.Tensor("uint8", rgb, [1, H, W, 3]);
  const mask = (await (await model).run({image})).mask.data;
  $("#status").textContent = `${W}×${H} px, ${Math.round(performance.now() - started)} ms`;
  const count = new Array(names.length).fill(0);
  mask.forEach((c, i) => {
    count[c]++;
    for (let k = 0; k < 3; k++) rgba[4 * i + k] = 0.45 * rgba[4 * i + k] + 0.55 * palette[c][k];
  });
  context.putImageData(pixels, 0, 0);
  const most = [...names.keys()].filter(c => count[c]).sort((a, b) => count[b] - count[a]);
  $("ul").replaceChildren(...most.map(c => {
    const item = document.createElement("li"), colour = document.createElement("i");
    colour.style.background = `rgb(${palette[c]})`;
    item.append(colour, `${names[c]} ${(100 * count[c] / mask.length).toFixed(1)} %`);
    return item;
  }));
}

const report = error => { $("#status").textContent = error.message; };
model.then(() => { $("#status").textContent = "ready"; }).catch(report);
$("input").onchange = event => show(event.target.files[0]).catch(report);
document.ondragover = event => event.preventDefault();
document.ondrop = event => {
  event.preventDefault();
  show(event.dataTransfer.files[0]).catch(report);
};
if (location.hash)                          // index.html#photo.jpg shows an image of its folder
  fetch(location.hash.slice(1)).then(r => r.blob()).then(show).catch(report);
</script>
"""


def write_page(model, folder, ort=""):
    """--web: index.html beside a copy of the model, which the browser runs with onnxruntime-web.

    ort: a folder with its files, onnxruntime-web/dist, which are copied; without one the page loads
    them from a public CDN. A web server of static files is enough. Raises BadInput.
    """
    names, palette = classes_of(open_model(model), model)
    runtime = ["ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]
    missing = [name for name in runtime if ort and not (Path(ort) / name).is_file()]
    if missing:
        raise BadInput(f"--ort {ort}: holds no {missing[0]}; name onnxruntime-web's folder dist")
    text = json.dumps(names).replace("<", "\\u003c")     # no name can end the script
    page = PAGE.replace("ORT", "." if ort else ORT_CDN, 1)
    page = page.replace("PALETTE", json.dumps(palette), 1).replace("NAMES", text, 1)
    files = {"student.onnx": model} | {name: Path(ort) / name for name in runtime if ort}
    for name, source in files.items():
        write_whole(Path(folder) / name, lambda path: shutil.copyfile(source, path))
    write_whole(Path(folder) / "index.html", lambda path: path.write_text(page, "utf-8"))
    print(f"Wrote {folder}/index.html; `python -m http.server -d {folder}` shows it")


def export(args):
    """Write the files, after checking them. Raises BadInput, or rectify.UserError."""
    from distill import Config, load_student
    from rectify import (check_trained, colour, configure, dataset_folder, load_checkpoint, newest,
                         output_folder, splits, subsample, versions, write_text)

    folder = args.out or (args.dataset and f"runs/{args.dataset}")
    path = Path(folder) / "student.pt" if folder else newest("student.pt")
    print(f"exporting {path}")
    state = load_checkpoint(path, "student")
    check_trained(Config, state["config"], {})
    student, cfg, out = load_student(state), configure(state["rectify"]), path.parent
    names = [name.split(", ")[0] for name in state["names"]]                # without synonyms
    train, val = splits(dataset_folder(cfg))
    inner = args.inner or inner_size(train, state["config"]["size"])
    if not 32 <= inner <= LARGEST:
        raise BadInput(f"--inner {inner}: the side in px of what the network sees, 32 to {LARGEST}")
    if not 0 <= args.threshold < 1:
        raise BadInput(f"--threshold {args.threshold}: a probability, from 0 to below 1")
    colours = [colour(c) for c in range(len(names))]
    background = bool(state["background"]) or args.threshold > 0
    meta = {"names": json.dumps(["background"] * background + names),
            "palette": json.dumps([(0, 0, 0)] * background + colours),
            "ignore_index": str(VOID), "inner": str(inner), "threshold": str(args.threshold),
            "mask": "uint8, an index into names"}
    build = lambda net, p: image_to_mask(net, inner, len(names), args.threshold, probabilities=p)
    with output_folder(out), workplace(out / "export.tmp") as place:
        new = {f"student{kind}.onnx": place / f"student{kind}.onnx"
               for kind in ("", ".fp16", ".int8")[:2 + args.int8]}
        fp32, fp16, *int8 = new.values()
        write_onnx(build(student, args.output == "probs"), fp32, meta)
        write_onnx(build(halved(student), args.output == "probs"), fp16, meta)
        for smallest in int8:
            write_int8(fp32, smallest, subsample(train, 128), meta)
        sessions = {name: open_model(p) for name, p in new.items()}
        found, results = check(build(student, True), sessions, train, val, names,
                               state["config"]["label_base"])
        for name, temporary in new.items():
            if val:
                on = f"{len(subsample(val, CHECKED))} validation images"
                measured = {"mIoU": str(results[name]["mIoU"]), "measured_on": on}
                save_onnx(temporary, temporary, meta | measured)
            temporary.replace(out / name)
    of_earlier = {"student.int8.onnx", "bench.png", "bench.json"} - new.keys()
    for name in of_earlier:
        (out / name).unlink(missing_ok=True)
    if val:
        own = f"; at their own shape (distill.py): {state['mIoU']:.2f}" if state.get("mIoU") else ""
        print(f"PyTorch, images stretched to {inner}×{inner}: "
              f"mIoU {results['pytorch']['mIoU']:.2f}{own}")
    report = {"results": results, "check": found, "config": vars(args) | {"inner": inner},
              "versions": versions(), "bytes": {name: (out / name).stat().st_size for name in new}}
    write_text(out / "export.json", json.dumps(report, indent=1))
    print(f"Wrote {out}/: " + ", ".join([*new, "export.json"]))
    if args.web:
        write_page(out / "student.onnx", args.web, args.ort)


def export_or_explain(args):
    """export, with every error that the user can mend as BadInput."""
    from rectify import mendable

    try:
        export(args)
    except Exception as error:
        if mendable(error) is None:
            raise
        raise BadInput(mendable(error))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="", help="export runs/<dataset>/student.pt (default: the newest)")
    add("--out", default="", help="folder of the student.pt; the files are written there too")
    add("--inner", type=int, default=0,
        help="px of the square that the network sees (default: the area of a training image)")
    add("--threshold", type=float, default=0.0,
        help="pixels whose best probability is below this are background (default 0: none)")
    add("--output", default="mask", choices=["mask", "probs"], help="probs: probabilities too")
    add("--int8", action="store_true", help="write student.int8.onnx too")
    add("--run", default="", metavar="FILE", help="run this ONNX file on --image; needs no PyTorch")
    add("--image", default=[], nargs="+", help="images, folders of them, or - for paths from stdin")
    add("--mask", default="", help="PNG of the mask, or a folder where there may be many images "
        "(default mask.png or masks)")
    add("--overlay", default="", help="likewise, of the image with the mask over it")
    add("--web", default="", metavar="FOLDER", help="write a page that runs the file in a browser")
    add("--ort", default="", help="for --web: onnxruntime-web's dist folder (default: a CDN)")
    add("--provider", default="auto", choices=["auto", *PROVIDERS], help="where --run computes")
    args = parser.parse_args(argv)
    try:
        if args.image and not args.run or args.run and not (args.image or args.web):
            raise BadInput("--run FILE and --image IMAGE (or --web FOLDER) go together")
        baked = ("dataset", "out", "inner", "threshold", "output", "int8")
        typed = [name for name in baked if getattr(args, name) != parser.get_default(name)]
        if args.run and typed:
            raise BadInput(f"--{typed[0]} is for writing a file; {args.run} has its own")
        if not args.run:
            return export_or_explain(args)
        if args.image:
            run_files(args)
        return write_page(args.run, args.web, args.ort) if args.web else None
    except BadInput as error:
        message, code = f"error: {error}", 2
    except OSError as error:                            # a folder without permission, a full disk
        message, code = f"error: {error.filename or 'writing'}: {error.strerror or error}", 2
    except KeyboardInterrupt:
        message, code = "interrupted; no file is half-written", 130
    print("".join(c if c.isprintable() else "?" for c in message), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):             # names in any alphabet, on any terminal
        stream.reconfigure(errors="backslashreplace")
    if hasattr(signal, "SIGPIPE"):                      # as every Unix tool: `| head -1` ends it
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
