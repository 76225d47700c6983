"""Deploy the student: one ONNX file, image in, mask out; checked against PyTorch, run without it.

    python export.py                   # newest student.pt -> student.onnx and student.fp16.onnx
    python export.py --int8            # and student.int8.onnx, calibrated on training images
    python export.py --threshold 0.5   # pixels whose best probability is below 0.5 are background
    python export.py --square 112      # stretch images to a square: for TensorRT and CUDA graphs
    python export.py --web site        # and a page that runs student.onnx in a browser
    python export.py --run student.onnx --image photo.jpg --mask mask.png --overlay overlay.png
    python export.py --run student.onnx --image photos/ --mask masks/

--run is for the machine of deployment: it imports onnxruntime, numpy and pillow, nothing else.

A student of Emoji VOC (seed 0): size; median at batch 1 on 1 core of an AMD EPYC with VNNI;
agreement with PyTorch; mIoU on the 400 validation images (distill.py: 71.2).

    student.onnx        16.26 MB    5.4 ms    100.00 %    71.2
    student.fp16.onnx    8.27 MB    5.6 ms     99.92 %    71.2
    student.int8.onnx    4.36 MB    2.2 ms     98.29 %    71.0

1 run a file, 2 the graph that is exported, 3 the files, 4 the check, 5 the rest and main.
B images of H×W px; C classes; K values in a mask, with background; Q channels of the student.
"""
import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageOps

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")             # the import below reads it
import onnxruntime  # noqa: E402

DECIDED = 512           # px: a longer image's mask is decided at this size, and enlarged
LARGEST = 2048          # px: --run shrinks a longer image to this, so that memory is bounded
CHECKED = 400           # images, evenly spread, on which a new file is compared with PyTorch
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}

class UserError(Exception):
    """An error that the user can mend. rectify.UserError would bring PyTorch."""

# ===================================================================================== 1 run a file
# HEURISTIC picks a convolution at once; the default times all of them, anew for every shape.
CUDA = {"cudnn_conv_algo_search": "HEURISTIC", "prefer_nhwc": "1", "use_tf32": "1"}
PROVIDERS = {"cpu": ["CPU"], "cuda": ["CUDA", "CPU"], "tensorrt": ["Tensorrt", "CUDA", "CPU"]}

def open_model(path, provider="cpu", cuda=CUDA):
    """An ONNX Runtime session. provider: of PROVIDERS, or "auto": CUDA where there is a GPU.
    ONNX Runtime falls back to the CPU without an exception. Here that is an error where the
    provider was named, else a warning. cuda: options of the CUDA provider. Raises UserError."""
    wanted = provider if provider != "auto" else "cuda" if shutil.which("nvidia-smi") else "cpu"
    options = onnxruntime.SessionOptions()
    cores = getattr(os, "sched_getaffinity", lambda process: [])    # Linux knows which are ours
    options.intra_op_num_threads = len(cores(0))        # 0: ONNX Runtime takes all
    # An idle session whose threads spin slows the others down, twofold.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False                # it grows with every new size of an image
    options.log_severity_level = 3                      # its errors are raised below, once
    if wanted != "cpu":
        onnxruntime.preload_dlls()                      # CUDA's libraries, where pip has put them
    providers = [(f"{name}ExecutionProvider", cuda if name == "CUDA" else {})
                 for name in PROVIDERS[wanted]]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:                          # ONNX Runtime has a class for each error
        raise UserError(f"{path}: ONNX Runtime does not open it ({str(error).splitlines()[0]})")
    runs = session.get_providers()[0]
    if not runs.lower().startswith(wanted):
        problem = (f"ONNX Runtime runs on {runs}, not on {wanted}; CUDA needs a driver from "
                   "580 on and `pip install 'onnxruntime-gpu[cuda,cudnn]'`, TensorRT also "
                   "'tensorrt-cu13<11'")
        if provider != "auto":
            raise UserError(f"--provider {provider}: {problem}")
        print(f"WARNING: {problem}", file=sys.stderr)
    return session

def classes_of(session, path):
    """(names, palette) of a file's values: K words, K colours [r, g, b]. Raises UserError."""
    meta = session.get_modelmeta().custom_metadata_map
    if not {"names", "palette"} <= meta.keys():
        raise UserError(f"{path}: not a file of export.py; write one with `python export.py`")
    return json.loads(meta["names"]), json.loads(meta["palette"])

def read_image(path):
    """(RGB image of at most LARGEST px a side, the file's own size (W, H) in px).
    As rectify.load_image reads it: EXIF rotation is applied, 16-bit greys are cut to 8 bits,
    transparency is laid on white. Raises UserError, also beyond Pillow's limit of 179 megapixels.
    """
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            size = image.size
            if image.mode.startswith(("I", "F")):
                grey = np.asarray(image)                                            # H W
                if image.mode == "F" or grey.min() < 0 or not 0xFF < grey.max() <= 0xFFFF:
                    raise ValueError("holds greys that are not of 16 bits; convert it to 8 bits")
                image = Image.fromarray((grey >> 8).astype(np.uint8))
            mode = "RGBA" if image.has_transparency_data else "RGB"
            image = image if image.mode == mode else image.convert(mode)
            image.thumbnail((LARGEST, LARGEST))         # before the steps that copy the image
            if mode == "RGBA":
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB"), size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}")

def palette_png(mask, palette):
    """A mask with VOC's values and colours: 0 is background, black, and class c is c + 1."""
    if palette[0] != [0, 0, 0]:                         # the file has no background
        mask, palette = mask.point([*range(1, 256), 0]), [[0, 0, 0], *palette]
    mask.putpalette(sum(palette, []))
    return mask

def run_files(args):
    """--run: write the mask, and where asked for the overlay, of every image. Raises UserError."""
    session = open_model(args.run, args.provider)
    names, palette = classes_of(session, args.run)
    print(f"running {args.run} on {session.get_providers()[0]}")
    many, images = len(args.image) > 1 or Path(args.image[0]).is_dir(), []
    for path in map(Path, args.image):
        inside = path.iterdir() if path.is_dir() else []
        images += sorted(p for p in inside if p.suffix.lower() in SUFFIXES) or [path]
    places = [Path(p) for p in (args.mask or ("masks" if many else "mask.png"), args.overlay) if p]
    targets = [[p / f"{image.stem}.png" if many else p for p in places] for image in images]
    files = [path.resolve() for path in sum(targets, images)]
    if len(set(files)) < len(files):
        raise UserError("two of the files to read and write are the same; give --mask and "
                        "--overlay places of their own, and images of different names")
    for path, paths in zip(images, targets):
        image, size = read_image(path)
        mask = session.run(["mask"], {"image": np.asarray(image)[None]})[0][0]      # H W
        colours = Image.fromarray(np.array(palette, np.uint8)[mask])                # H W 3
        mask = Image.fromarray(mask).resize(size, Image.NEAREST)
        most = sorted(zip(mask.histogram(), names), reverse=True)[:4]
        pages = palette_png(mask, palette), Image.blend(image, colours, 0.55)
        for page, target in zip(pages, paths):
            write(target, lambda temporary: page.save(temporary, "PNG"))
        shares = [f"{name} {n / (size[0] * size[1]):.0%}" for n, name in most if n]
        print(f"{paths[0]}: {', '.join(shares)}")

# ===================================================================== 2 the graph that is exported
def centres(size, target, device=None):
    """Where the centres of `target` equal pixels lie on an axis of `size` px: a vector, target."""
    import torch
    return (torch.arange(target, device=device) + 0.5) * (size / target)

def resize_matrix(size, target, device=None):
    """A, target×size, rows of sum 1: A x resizes x as PyTorch's antialiased bilinear resize does.
    Each row is a triangle around the centre of its pixel, which ends a pixel of the smaller image
    away: A_ij ∝ max(0, 1 − |j + ½ − c_i| / max(1, size / target)). ONNX's Resize has this filter as
    an attribute, antialias, which some runtimes ignore; they all multiply matrices."""
    import torch
    pixels = torch.arange(size, device=device) + 0.5                                # size
    distance = (pixels - centres(size, target, device)[:, None]).abs()              # target size
    A = (1 - distance / torch.sym_max(1.0, size / target)).clamp(min=0)             # target size
    return A / A.sum(1, keepdim=True)

def resize(x, h, w):
    """Resize x, float B×C×H×W, to B×C×h×w."""
    H, W = x.shape[2:]
    return resize_matrix(H, h, x.device) @ x @ resize_matrix(W, w, x.device).T

def image_to_mask(student, size, classes, threshold=0.0, probabilities=False):
    """The module that is exported: uint8 RGB images B×H×W×3 to uint8 masks B×H×W.
    size: (long, short) in px, from which distill.student_size makes what the network sees; or the
    side of a square to which images are stretched: convolutions then have one shape. The mask is
    decided at a long side of at most DECIDED px (or the network's, where that is longer) and
    enlarged by nearest neighbour, so memory hardly grows with H·W·C.

    classes: C; of the student's Q channels those beyond C are background words. With such words or
    a threshold > 0 the mask is 0 for background and c + 1 for class c, else c. With `probabilities`
    the module returns (mask, B×K×h×w float32), h×w the size at which the mask is decided. The
    background's probability is the larger of its words' best and the threshold."""
    import torch
    from distill import student_size
    from rectify import normalize

    class ImageToMask(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.student = student

        def forward(self, image):
            H, W = image.shape[1:3]
            h, w = (size, size) if isinstance(size, int) else student_size(H, W, size)
            x = normalize(student, resize(image.permute(0, 3, 1, 2).float(), h, w))  # B 3 h w
            logits, _ = self.student(x.to(student.aspp[0].weight.dtype))            # B Q h/8 w/8
            most = torch.sym_max(torch.sym_max(h, w), DECIDED)
            longest = torch.sym_max(torch.sym_max(H, W), most)
            h, w = (torch.sym_max(n * most // longest, 1) for n in (H, W))
            logits = resize(logits, h, w)                                           # B Q h w
            total = logits.logsumexp(1, keepdim=True)                               # B 1 h w
            if threshold > 0 or len(student.T) > classes:
                least = total + math.log(max(threshold, 1e-30))                     # B 1 h w
                background = torch.cat([least, logits[:, classes:]], 1).amax(1, keepdim=True)
                logits = torch.cat([background, logits[:, :classes]], 1)            # B 1+C h w
            mask = logits.argmax(1).to(torch.uint8)                                 # B h w
            mask = mask.index_select(1, centres(h, H, mask.device).long())          # B H w
            mask = mask.index_select(2, centres(w, W, mask.device).long())          # B H W
            return (mask, (logits - total).exp()) if probabilities else mask

    return ImageToMask().eval()

# ====================================================================================== 3 the files
def save_onnx(model, path, meta):
    """Write a ModelProto with metadata {key: str}, after ONNX's own check."""
    import onnx
    onnx.helper.set_model_props(model, meta)
    model.ir_version = 8                                # ONNX Runtime 1.17 opens it, and opset 18
    domains = {node.domain for node in model.graph.node}        # the quantiser declares eight more
    used = [opset for opset in model.opset_import if opset.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(used)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)

def write_onnx(module, path, meta):
    """Trace an image_to_mask into one file; batch, height and width stay free. meta: {key: str}."""
    import torch
    example = torch.zeros(2, 101, 87, 3, dtype=torch.uint8)     # odd sizes, met nowhere else
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # the exporter warns of its own internals
        program = torch.onnx.export(
            module, (example,), input_names=["image"], output_names=["mask"], dynamo=True,
            dynamic_shapes=({0: "batch", 1: "height", 2: "width"},), opset_version=18,
            external_data=False, verbose=False)
    save_onnx(program.model_proto, path, meta)

def write_int8(source, path, samples, meta):
    """Quantise an fp32 file of ours, calibrated on the samples' images.
    QDQ format; uint8 activations; int8 weights with a scale a channel. Weights keep 7 bits
    (reduce_range): processors without VNNI add two products in 16 bits, which 8 bits overflow; with
    VNNI the eighth bit gains no speed. Only convolutions: more would gain none and lose accuracy.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    images = ({"image": np.asarray(read_image(s.image)[0])[None]} for s in samples)     # 1 H W 3
    reader = SimpleNamespace(get_next=lambda: next(images, None))
    prepared = path.with_suffix(".prepared")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(path), reader, per_channel=True, reduce_range=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                    op_types_to_quantize=["Conv"])
    save_onnx(onnx.load(path), path, meta)

# ====================================================================================== 4 the check
# file: what may differ from PyTorch: a share of the pixels; the largest margin, a probability, by
# which PyTorch prefers its own value to the file's; mIoU points that are lost
BOUNDS = {"student.onnx": (0.001, 0.01, 0.1), "student.fp16.onnx": (0.02, 0.2, 0.5),
          "student.int8.onnx": (0.1, 1.0, 1.0)}

def check(module, sessions, train, val, names, base=1):
    """Compare files with PyTorch on real images: ({file: numbers}, rectify.evaluate's results).
    module: an image_to_mask with probabilities. sessions: {file: session}. names, base: as
    rectify.evaluate's. Without labelled images training images serve, and there is no mIoU."""
    import torch
    from rectify import evaluate, subsample
    found, results = {name: [] for name in sessions}, {}
    first = int("background" in names)                  # the value of the first class in masks

    @torch.no_grad()
    def predict(images):
        x = images.permute(0, 2, 3, 1).contiguous()                                 # B H W 3
        mask, p = module(x)                                                         # B H W, B K h w
        p = torch.nn.functional.interpolate(p, mask.shape[1:], mode="nearest-exact")    # B K H W
        masks = {"pytorch": mask.long()}
        for name, session in sessions.items():
            masks[name] = torch.from_numpy(session.run(["mask"], {"image": x.numpy()})[0]).long()
            differs = (masks[name] != masks["pytorch"]).float()                     # B H W
            margin = differs * (p.amax(1) - p.gather(1, masks[name][:, None])[:, 0])    # B H W
            found[name].append(torch.stack([differs.mean((1, 2)), margin.amax((1, 2))]))  # 2 B
        return {name: (mask - first) % len(names) for name, mask in masks.items()}

    if val:
        results = evaluate(predict, subsample(val, CHECKED), names, base)[0]
    for sample in [] if val else subsample(train, CHECKED):
        predict(torch.from_numpy(np.array(read_image(sample.image)[0])).permute(2, 0, 1)[None])
    for name, parts in found.items():
        different, margin = torch.cat(parts, 1)                                     # N each
        lost = results["pytorch"]["mIoU"] - results[name]["mIoU"] if val else 0.0
        numbers = different.mean().item(), margin.max().item(), lost
        sound = all(n <= bound for n, bound in zip(numbers, BOUNDS[name]))
        found[name] = {"agreement": 1 - numbers[0], "margin": numbers[1], "lost": lost,
                       "sound": sound}
        print(f"{name}: agrees with PyTorch on {1 - numbers[0]:.4%} of the pixels, PyTorch's "
              f"margin elsewhere is at most {numbers[1]:.4f}"
              + (f", mIoU {results[name]['mIoU']:.2f}, lost {lost:+.2f}" if val else "")
              + ("" if sound else f"; LEFT OUT, may differ by {BOUNDS[name]}"))
    return found, results

# ============================================================================== 5 the rest and main
def write(path, save):
    """Make a file that appears whole: save(temporary) writes it beside, then it is renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save(temporary)
    temporary.replace(path)

def write_page(model, folder):
    """--web: a page beside a copy of the model, which the browser runs with onnxruntime-web."""
    names, palette = classes_of(open_model(model), model)
    text = json.dumps({"names": names, "palette": palette})
    page = Path(__file__).resolve().parent / "tests/web/index.html"
    write(folder / "names.json", lambda path: path.write_text(text, "utf-8"))
    write(folder / "student.onnx", lambda path: shutil.copyfile(model, path))
    write(folder / "index.html", lambda path: shutil.copyfile(page, path))
    print(f"Wrote {folder}/index.html; `python -m http.server -d {folder}` shows it")

def export(args):
    """Write the files, after checking them. Returns the first one's path. Raises UserError."""
    from distill import load_student
    from rectify import colour, configure, dataset_folder, load, newest, splits, subsample, versions
    folder = args.out or (args.dataset and f"runs/{args.dataset}")
    path = Path(folder) / "student.pt" if folder else newest("student.pt")
    print(f"exporting {path}")
    state, out = load(path, "student"), path.parent
    student, half = load_student(state), load_student(state)
    half.backbone.half()
    half.aspp.half()                            # the classifier stays fp32: its squares overflow
    train, val = splits(dataset_folder(configure(state["rectify"])))
    names, size = [n.split(", ")[0] for n in state["names"]], args.square or state["config"]["size"]
    threshold = state["rectify"]["threshold"] if args.threshold is None else args.threshold
    background = ["background"] * (bool(state["background"]) or threshold > 0)
    palette = [(0, 0, 0) for _ in background] + [colour(c) for c in range(len(names))]
    meta = {"names": json.dumps(background + names), "palette": json.dumps(palette),
            "size": json.dumps(size), "threshold": str(threshold)}
    module = image_to_mask(student, size, len(names), threshold, probabilities=True)
    with tempfile.TemporaryDirectory(dir=out) as place:
        new = {name: Path(place) / name for name in list(BOUNDS)[:2 + args.int8]}
        for net, file in zip((student, half), new.values()):
            write_onnx(image_to_mask(net, size, len(names), threshold), file, meta)
        if args.int8:
            write_int8(new["student.onnx"], new["student.int8.onnx"], subsample(train, 128), meta)
        sessions = {name: open_model(file) for name, file in new.items()}
        found, results = check(module, sessions, train, val, names + background,
                               state["config"]["label_base"])
        written = [name for name in new if found[name]["sound"]]
        for name in written:
            new[name].replace(out / name)
    if not written:
        raise UserError(f"{path}: no file computes what PyTorch computes; nothing was written")
    report = {"results": results, "check": found, "versions": versions()} | meta
    write(out / "export.json", lambda path: path.write_text(json.dumps(report, indent=1)))
    print(f"Wrote {out}/: " + ", ".join([*written, "export.json"]))
    return out / written[0]

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("write files").add_argument
    add("--dataset", help="export runs/<dataset>/student.pt (default: the newest)")
    add("--out", help="folder of the student.pt; the files are written there too")
    add("--square", type=int, metavar="SIDE", help="stretch images to a square (default: do not)")
    add("--threshold", type=float, metavar="P",
        help="pixels whose best probability is below P are background (default: as in the run)")
    add("--int8", action="store_true", help="write student.int8.onnx too")
    add("--web", type=Path, metavar="FOLDER", help="write a page that runs the file in a browser")
    add = parser.add_argument_group("run a file").add_argument
    add("--run", metavar="FILE", help="run this ONNX file on --image; needs no PyTorch")
    add("--image", nargs="+", help="images, or folders of them")
    add("--mask", help="PNG to write, for many images a folder (default mask.png or masks)")
    add("--overlay", help="likewise, of the image with the mask over it")
    add("--provider", default="auto", choices=["auto", *PROVIDERS], help="where to compute")
    args, known = parser.parse_args(argv), (UserError, OSError)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)     # see `read_image`
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("torchrun: export.py runs in one process; start it with python")
        if args.image and not args.run or args.run and not (args.image or args.web):
            raise UserError("--run FILE and --image IMAGE go together")
        if not (32 <= (args.square or 32) <= LARGEST and 0 <= (args.threshold or 0) < 1):
            raise UserError(f"--square is from 32 to {LARGEST}, --threshold from 0 to below 1")
        if not args.run:
            from rectify import UserError as Theirs
            known += (Theirs,)
        model = args.run or export(args)
        if args.image:
            run_files(args)
        if args.web:
            write_page(model, args.web)
    except known as error:
        name = getattr(error, "filename", None)
        print(f"error: {name}: {error.strerror}" if name else f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; what was written is whole")

if __name__ == "__main__":
    main()
