"""Distil a rectified CLIP into DeepLabV2, a plain convolutional segmenter (ReCLIP, CVPR 2024).

A rectified CLIP is slow. The student learns from its masks, its dense features and its text
features, on unlabelled images, and then needs no CLIP at all (Tables 11 and 12).

    python distill.py                               # goes on with the newest rectify.pt under runs/
    python distill.py --dataset voc                 # the one in runs/voc: ResNet-50, Table 12
    python distill.py --teacher maskclip            # MaskCLIP+, to compare with: not rectified
    python distill.py --teacher FOLDER              # any other method's masks, PNGs of VOC's values
    python distill.py --eval runs/emoji/student.pt --tta

On Emoji VOC the student has 72.2 ± 1.1 mIoU (seeds 0, 1, 2) and its teachers 58.4.
1 recipes and configuration, 2 the teacher, 3 the student and its losses, 4 training, 5 prediction;
below the ruler files and main. The letters are rectify.py's. u is the student's feature, B×D×s×s,
on a grid of 8 px; S is the side of a crop in px, s = ⌈S/8⌉.
"""
import contextlib
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import rectify
from rectify import (
    RANK, VOID, WORLD, UserError, contrastive_loss, decide, denoise, draw_view, each_image,
    end_epoch, hypothesize, in_half, load_image, load_label, normalize, over_ranks, read_ahead,
    resize_to_fit, similarity, tqdm)

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.transforms import v2

# ====================================================================== 1 recipes and configuration
# A row per dataset; what it lacks is as in Config, which is Table 12. On the 8×8 grid of an Emoji
# VOC crop the paper's rates would read padding; the backbone was trained on 1,249 other emoji.
RECIPES = {
    "voc": dict(epochs=100), "context": dict(epochs=50), "ade": dict(epochs=20),
    "emoji": dict(backbone="resnet18", width=0.5, weights="tests/emoji/resnet18.safetensors",
                  rates=(1, 2, 4, 6), size=(2048, 96), jitter=(0.7, 1.4), stretch=1.4, crop=64,
                  targets="once", denoise=0.0, penalty=0.5, optimizer="adam", lr=3e-4, head=6.0,
                  floor=0.0, weight_decay=0.01, epochs=14, batch=16),
}
TAUGHT_BY = ("dataset", "label_base", "size", "jitter", "crop", "batch")  # rectify.pt's, by default
METHODS = ("reclip", "reclip++", "maskclip")            # --teacher is one of them, or a folder
SHARPNESS = 10.0                        # of the teacher's logits in `denoise`, as the authors have
FREE = {"out", "label_base", "tta", "device", "resume", "eval"}  # may differ from a checkpoint's

@dataclass(kw_only=True)
class Config:
    """All that a student depends on beside rectify.pt; every checkpoint holds it."""
    # data
    dataset: Literal["emoji", "voc", "context", "ade"] = "emoji"  # go on with runs/DATASET
    out: str = ""                               # folder of the rectify.pt (default: the newest)
    label_base: Literal[0, 1] = 1               # value of the first class in label PNGs
    size: tuple[int, int] = (2048, 512)         # longest and shortest side of an image at most, px
    jitter: tuple[float, float] = (0.5, 2.0)    # range of the random factor on the size
    stretch: float = 1.0                        # the sides' ratio changes by this factor at most
    crop: int = 520                             # side of a training crop, px
    # teacher
    teacher: str = ""                           # reclip, reclip++, maskclip, or a folder of masks
    targets: Literal["crop", "once"] = "crop"   # it sees every crop, or every image once
    denoise: float = 0.5                        # drop classes nowhere as probable; 0: off
    penalty: float = 0.0                        # of classes not in the hypothesis, with once
    ignore_gt_background: bool = False          # learn only where GROUND TRUTH is foreground
    # student
    backbone: str = "resnet50c"                 # timm's name: resnet50c, resnet101c, resnet18, ...
    width: float = 1.0                          # channels of a ResNet, as a share of its own
    weights: str = "imagenet"                   # what the backbone starts from: timm's, or a file
    rates: tuple[int, int, int, int] = (6, 12, 18, 24)  # dilations of ASPP
    # training
    mask_weight: float = 1.0                    # weight of the mask-guided loss
    feature_weight: float = 0.5                 # weight of the feature-guided loss
    text_weight: float = 0.5                    # weight of the text-guided loss
    optimizer: Literal["sgd", "adam"] = "sgd"   # optimizer
    lr: float = 0.01                            # learning rate of the backbone
    head: float = 10.0                          # learning rate of ASPP, times lr
    floor: float = 1e-4                         # no learning rate falls below it
    weight_decay: float = 5e-4                  # weight decay
    epochs: int = 100                           # passes over the training images
    batch: int = 12                             # images in a training step
    seed: int = 0                               # seed of everything random
    # run
    tta: bool = False                           # measure with flips and three scales
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to compute
    resume: bool = False                        # go on with the interrupted run
    eval: str = ""                              # measure this student.pt instead of training

# ==================================================================================== 2 the teacher
class Labeller:
    """A frozen CLIP that teaches: rectified, or with --teacher maskclip as nobody trained it."""

    @torch.no_grad()
    def __init__(self, segmenter, cfg):
        self.segmenter, self.penalty, self.seen = segmenter, cfg.penalty, None
        self.R = None if cfg.teacher == "maskclip" else segmenter.reference()
        self.least = 0 if self.R is None else cfg.denoise

    @torch.no_grad()
    def look(self, images):
        """uint8 images B×3×H×W, resized to whole patches, to (logits B×C×h×w, f B×D×h×w)."""
        segmenter, patch = self.segmenter, self.segmenter.clip.visual.patch_size[0]
        whole = [max(1, round(n / patch)) * patch for n in images.shape[-2:]]
        clip = segmenter.clip_before if self.R is None else segmenter.clip
        f = segmenter.features(v2.functional.resize(images, whole), clip)
        return similarity(f, segmenter.T) if self.R is None else segmenter.rectified(f, self.R), f

    @torch.no_grad()
    def see_all(self, samples):
        """Fill `seen`: of each image (logits C×h×w, f D×h×w), half, the mean of it and its mirror
        image. Cost: 3·N passes of CLIP, N·(C + D)·h·w·2 bytes.
        Ours, for better labels: the image has the size of rectify.py's recipe, logits are smoothed
        over 3×3 patches, and a class that the hypothesis does not name loses `penalty` standard
        deviations of the logits, which leaves it a chance where the hypothesis is wrong. Denoising
        comes last, so that its -1e4 is no part of that deviation."""
        def targets(images):
            x = resize_to_fit(images.to(self.segmenter.device), self.segmenter.cfg.size)
            logits, f = ((maps + mirrored.flip(-1)) / 2                     # B C h w, B D h w
                         for maps, mirrored in zip(self.look(x), self.look(x.flip(-1))))
            absent = ~hypothesize(self.segmenter, x)[:, :, None, None]      # B C 1 1
            logits = logits - self.penalty * logits.std((1, 2, 3), keepdim=True) * absent
            logits = F.avg_pool2d(logits, 3, 1, 1, count_include_pad=False)
            return zip(denoise(logits, SHARPNESS, self.least).half(), f.half())

        self.seen = each_image(targets, samples, "teacher")

# =================================================================== 3 the student and its losses
def classify(u, T, R, scale):
    """scale · (norm(u)·Tᵀ − norm(u)·Rᵀ): B×D×s×s to B×C×s×s. The scale is CLIP's exp(logit_scale);
    authors' code: none, so a difference of cosines, which cannot become confident."""
    return scale * similarity(F.normalize(u, dim=1), T - R)

class DeepLabV2(nn.Module):
    """DeepLabV2 (Chen 2018) into CLIP's text space: a dilated backbone, and ASPP, a sum of convs.
    forward(x): B×3×H×W, normalized by mean and std, to (logits B×C×⌈H/8⌉×⌈W/8⌉, u B×D×⌈H/8⌉×⌈W/8⌉).
    R: ReCLIP's Reference; other teachers have no bias f·Rᵀ, so R = 0. The authors' branches end in
    BatchNorm and ReLU; ours do not, since u is to be f, which has signs."""

    def __init__(self, cfg, T, R=None, scale=1.0):
        super().__init__()
        self.backbone = make_backbone(cfg.backbone, cfg.width, cfg.weights)
        channels, D = self.backbone.feature_info.channels()[-1], T.size(1)
        self.aspp = nn.ModuleList(nn.Conv2d(channels, D, 3, padding=r, dilation=r)
                                  for r in cfg.rates)
        self.register_buffer("T", T.clone())
        self.register_buffer("R", torch.zeros_like(T) if R is None else R.clone())
        self.register_buffer("scale", torch.tensor(float(scale)))
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, x):
        with in_half(x.device) if self.training else contextlib.nullcontext():
            x = self.backbone(x)[0]                                         # B channels s s
            u = sum(conv(x) for conv in self.aspp).float()                  # B D s s
        return classify(u, self.T, self.R, self.scale), u

def mask_guided(logits, label):
    """CE(logits, pseudo-label), mean over what is not void. logits: B×C×s×s. label: B×S×S."""
    logits = F.interpolate(logits, label.shape[-2:], mode="bilinear")       # B C S S
    loss = F.cross_entropy(logits, label, ignore_index=VOID, reduction="sum")
    return loss / (label != VOID).sum().clamp(min=1)

def feature_guided(u, f, label):
    """√D · mean |norm(u) − norm(f)| where the label is not void. u, f: B×D×s×s. label: B×s×s.
    Paper: features of CLIP's own length, on the crop's pixels. Ours: on the student's grid, of unit
    length, which is all that the classifier sees; times √D elements are as large as CLIP's own."""
    gap = (F.normalize(u, dim=1) - F.normalize(f, dim=1)).abs().mean(1) * u.size(1) ** 0.5  # B s s
    known = label != VOID
    return (gap * known).sum() / known.sum().clamp(min=1)

def text_guided(u, T, label, scale):
    """CE(scale · z_c·Tᵀ, c), z_c the mean of norm(u) over the pixels with pseudo-label c; the mean
    over an image's classes, then over the batch. u: B×D×s×s. T: C×D. label: B×s×s. scale: CLIP's
    exp(logit_scale); authors' code: its logarithm."""
    classes = torch.arange(len(T), device=label.device)[:, None, None]      # C 1 1
    M = (label[:, None] == classes).float()                                 # B C s s
    area = M.sum((2, 3))                                                    # B C
    z = torch.einsum("bcij,bdij->bcd", M, F.normalize(u, dim=1)) / area.clamp(min=1)[:, :, None]
    return contrastive_loss(z, T, area > 0, scale)

# ======================================================================================= 4 training
def random_window(size, cfg):
    """θ: 2×3, where in an image of (height, width) px a random crop lies; half are mirrored.
    In affine_grid's units: [-1, 1] is the image. It is first scaled by U(jitter), the ratio of its
    sides changed by a factor in [1/stretch, stretch]. A larger crop has all of it, at random."""
    (low, high), (scale, ratio, x, y, mirror) = cfg.jitter, torch.rand(5).tolist()
    scale, ratio = low + (high - low) * scale, cfg.stretch ** (2 * ratio - 1)
    a = cfg.crop / (size[1] * scale * ratio ** 0.5)                         # its share of the width
    b = cfg.crop / (size[0] * scale / ratio ** 0.5)                         # and of the height
    mirrored = -a if mirror < 0.5 else a
    return torch.tensor([[mirrored, 0, (1 - a) * (2 * x - 1)], [0, b, (1 - b) * (2 * y - 1)]])

def sampled(maps, grid, mode="bilinear"):
    """What a grid B×s×s×2 sees of B maps C×h×w of any sizes: B×C×s×s. Borders go on outside."""
    return torch.cat([
        F.grid_sample(m[None].float(), g[None], mode, padding_mode="border", align_corners=False)
        for m, g in zip(maps, grid)])

def training_batch(student, labeller, examples, cfg):
    """A step's crops and what the teacher says of them: (x, label, f).
    labeller: a Labeller, or None where a folder's masks teach. examples: of `read_example`.
    x: B×3×S×S, normalized for the student, 0 outside the image; colours are distorted for it alone
    (authors: for the teacher too). label: B×S×S int64, the pseudo-label, void outside the image and
    where an example's mask is. f: B×D×s×s, the teacher's dense feature, or None without a Labeller.
    """
    (indices, *maps), device, B, S = zip(*examples), student.T.device, len(examples), cfg.crop
    theta = torch.stack([random_window(image.shape[1:], cfg) for image in maps[0]])
    theta, s, f = theta.to(device, non_blocking=True).double(), math.ceil(S / 8), None
    fine, coarse = (F.affine_grid(theta, (B, 1, n, n), align_corners=False).float()     # B n n 2
                    for n in (S, s))                    # doubles, since TF32 would round
    images, masks = ([m.to(device, non_blocking=True) for m in some] for some in maps)
    inside = fine.abs().amax(-1) <= 1                                       # B S S
    crops = sampled(images, fine).round().byte()                            # B 3 S S
    label = sampled(masks, fine, "nearest")[:, 0].long()                    # B S S
    void = ~inside | (label == VOID)                                        # B S S
    if labeller and labeller.seen:
        logits, f = zip(*(labeller.seen[i] for i in indices))
        label = sampled(logits, fine).max(1).indices                        # argmax is slow
        f = sampled(f, coarse)                                              # B D s s
    elif labeller:
        colour = (255 * labeller.segmenter.clip.mean).round().byte()        # as rectify.py pads
        logits, f = labeller.look(torch.where(inside[:, None], crops, colour))
        logits = denoise(logits, SHARPNESS, labeller.least)                 # B C h w
        label = F.interpolate(logits, (S, S), mode="bilinear").max(1).indices
        f = F.interpolate(f, (s, s), mode="bilinear")                       # B D s s
    distort = v2.RandomPhotometricDistort().transform
    x = normalize(student, torch.stack([distort(crop, draw_view()[1]) for crop in crops]))
    return x * inside[:, None], label.masked_fill(void, VOID), f

def step(model, optimizer, x, label, f, weights):
    """A step on a `training_batch`; its losses by name. model: the student, or DDP around it."""
    student = getattr(model, "module", model)
    logits, u = model(x)                                                    # B C s s, B D s s
    coarse = F.interpolate(label[:, None].float(), u.shape[-2:], mode="nearest-exact")[:, 0].long()
    losses = {"mask": mask_guided(logits, label),
              "text": text_guided(u, student.T, coarse, student.scale)}
    if f is not None:
        losses["feature"] = feature_guided(u, f, coarse)
    optimizer.zero_grad()
    sum(weights[name] * loss for name, loss in losses.items()).backward()
    nn.utils.clip_grad_norm_(student.parameters(), 10.0)    # norm(u) is steep where u is short
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}

def make_optimizer(student, cfg):
    """The optimizer of two groups, the backbone and ASPP; `train` sets their learning rates."""
    groups = [{"params": [*part.parameters()]} for part in (student.backbone, student.aspp)]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, cfg.lr, momentum=0.9, weight_decay=cfg.weight_decay)
    return torch.optim.AdamW(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=True)

def train(student, labeller, samples, cfg, kept, out, state=None):
    """Learn the student from the teacher alone: a Labeller, or with None a folder's masks.
    samples: this process's own; the gradient is the mean over the processes. kept: what checkpoints
    hold beside weights. out: the student's folder. state: the checkpoint to go on with."""
    if student.T.is_cuda:
        student.to(memory_format=torch.channels_last)
        student = timm.layers.convert_sync_batchnorm(student) if WORLD > 1 else student
    N, batch, optimizer = len(samples), max(1, cfg.batch // WORLD), make_optimizer(student, cfg)
    log = rectify.resume(state, optimizer) if state else []
    steps, first, floor = math.ceil(N / batch), len(log), min(cfg.floor, cfg.lr)
    weights = {"mask": cfg.mask_weight, "feature": cfg.feature_weight, "text": cfg.text_weight}
    if labeller and cfg.targets == "once":
        labeller.see_all(samples)

    def batches():
        for epoch in range(first, cfg.epochs):
            rectify.reseed(cfg.seed, 1 + epoch)
            read = lambda i: read_example(samples[i], i, cfg, kept)
            examples = read_ahead(read, torch.randperm(N).tolist())
            while some := [*itertools.islice(examples, batch)]:
                yield training_batch(student, labeller, some, cfg)

    made = ready = batches()
    # The next batch is made while the student steps, by one thread, since it draws random numbers.
    # Where CLIP sees every crop on a CPU it is made in between, on all cores.
    if not labeller or labeller.seen or student.T.is_cuda:
        ready = read_ahead(lambda _: next(made), range((cfg.epochs - first) * steps), 1, threads=1)
    torch.backends.cudnn.benchmark = True                                   # crops have one size
    model, crops = rectify.wrap_ddp(student), student.mean.expand(4, 3, cfg.crop, cfg.crop)

    @torch.no_grad()
    def piece():                                        # of a step, for `tune_threads`
        with in_half(crops.device):
            student.backbone(crops)

    bar = tqdm(total=cfg.epochs * steps, initial=first * steps, desc="student", unit="step")
    for epoch in range(first, cfg.epochs):
        student.eval()                                  # the piece is no lesson
        threads, means = rectify.tune_threads(piece, crops.device), {}      # mean of each loss
        student.train()
        for k, (x, label, f) in enumerate(itertools.islice(ready, steps), epoch * steps):
            left = 1 - k / (cfg.epochs * steps)         # from 1 to 0: the share of steps to come
            for group, lr in zip(optimizer.param_groups, (cfg.lr, cfg.lr * cfg.head)):
                group["lr"] = floor + (lr - floor) * left ** 0.9
            for name, loss in step(model, optimizer, x, label, f, weights).items():
                means[name] = means.get(name, 0) + loss * len(x) / N
            bar.update()
        means = {name: over_ranks(mean).item() / WORLD for name, mean in means.items()}
        entry = {"loss": sum(weights[name] * mean for name, mean in means.items()), **means,
                 "lr": optimizer.param_groups[0]["lr"], "threads": threads}
        end_epoch(out, "distill", entry, log, bar, epoch + 1 == cfg.epochs, lambda: kept | {
            "student": student.state_dict(), "optimizer": optimizer.state_dict()})
    bar.close()
    student.eval()
    torch.backends.cudnn.benchmark = False                                  # from here sizes change

# ===================================================================================== 5 prediction
def student_size(H, W, size, factor=1.0):
    """[h, w] in px at which the student sees an image of H×W px; export.py calls it in its graph.
    The image keeps its shape and fits factor · `size`, (long, short side); sides are multiples of
    8, so that the student's grid covers it. At factor 1 the short side is below the recipe's: an
    image of just that size would not be resampled, and so be sharper than all crops in training."""
    long, short = (round(factor * n) for n in size)
    short = (short - 1) // 8 * 8 if factor == 1 else short
    longest, shortest = torch.sym_max(H, W), torch.sym_min(H, W)
    fit = [torch.sym_min(n * long // longest, n * short // shortest) for n in (H, W)]
    return [torch.sym_max(8, (n + 4) // 8 * 8) for n in fit]

@torch.no_grad()
def predict_student(student, images, cfg, classes, threshold=0.0):
    """Masks B×H×W uint8 of uint8 images B×3×H×W, as `decide` makes them of the logits; with cfg.tta
    of their mean over flips and three scales."""
    images, original, maps = images.to(student.T.device), images.shape[-2:], []
    for factor in (1.0, 0.75, 1.25) if cfg.tta else (1.0,):
        seen = student_size(*original, cfg.size, factor)
        x = normalize(student, v2.functional.resize(images.float(), seen, antialias=True))
        maps.append(student(x)[0])                                          # B C h/8 w/8
        maps += [student(x.flip(-1))[0].flip(-1)] if cfg.tta else []
    grid = maps[0].shape[-2:]                           # of the first scale, the image's own
    mean = torch.stack([F.interpolate(m, grid, mode="bilinear") for m in maps]).mean(0)
    return decide(mean, 1, grid, original, classes, threshold=threshold)

# ==================================================================================================
# The method ends here. Everything below serves it.
# ==================================================================================================

def read_example(sample, i, cfg, kept):
    """For a step: (i, image 3×H×W uint8 of the recipe's size, mask 1×H×W of the file's): another
    method's, or 0 in one pixel where CLIP teaches. With --ignore-gt-background it is void where
    ground truth is void or background, and nothing else is used of that."""
    image, mask = load_image(sample.image), torch.zeros(1, 1, dtype=torch.uint8)
    if cfg.teacher not in METHODS:
        words = kept["names"] + ["background"] * bool(kept["background"])   # its first word has 0
        mask = load_label(Path(cfg.teacher) / f"{sample.name}.png", image.shape[1:], words)
    if cfg.ignore_gt_background:
        path = sample.label or f"ground truth of {sample.name}"
        truth = load_label(path, image.shape[1:], kept["names"], cfg.label_base)
        mask = torch.where(truth == VOID, VOID, mask).byte()
    maps = resize_to_fit(image, cfg.size), mask[None]
    return i, *(m.pin_memory() if torch.cuda.is_available() else m for m in maps)

def make_backbone(name, width, weights):
    """A timm backbone of output stride 8 that gives its last stage; width: a share of a ResNet's
    channels. weights: "imagenet" (from scratch, with a warning, where they cannot be had), a file
    (here or beside this script), or "". Raises UserError."""
    options = dict(features_only=True, output_stride=8, out_indices=(4,), pretrained=bool(weights))
    options |= {} if width == 1 else {"channels": [int(width * c) for c in (64, 128, 256, 512)]}
    if weights not in ("", "imagenet"):
        file = Path(weights) if Path(weights).is_file() else rectify.HERE / weights
        options["pretrained_cfg_overlay"] = dict(file=str(file))
    try:
        return timm.create_model(name, **options)
    except Exception as error:          # timm, its hub and the network share no class of errors
        if weights != "imagenet":
            raise UserError(f"--backbone {name} --width {width} --weights {weights}: timm cannot "
                            f"make it with output stride 8 ({error!r:.160})")
    print(f"WARNING: ImageNet's weights of {name}, width {width}, cannot be had here: the backbone "
          "STARTS FROM SCRATCH and learns less; give --weights FILE", file=sys.stderr)
    return make_backbone(name, width, "")

def load_student(state, device="cpu"):
    """The DeepLabV2 of a checkpoint, in eval mode. No CLIP is loaded."""
    cfg = Config(**state["config"] | {"weights": ""})
    student = DeepLabV2(cfg, state["student"]["T"])
    student.load_state_dict(state["student"])
    return student.eval().to(device)

def configure(taught_by, kept=None, /, **typed):
    """The complete Config: what was typed, over the dataset's recipe (or over `kept`, the settings
    of a student's checkpoint), over rectify.py's Config `taught_by`. Raises UserError."""
    if kept is None:
        kept = {name: getattr(taught_by, name) for name in TAUGHT_BY}
        kept |= {"teacher": taught_by.method} | RECIPES[taught_by.dataset]
        own = kept.get("backbone", Config.backbone)
        if typed.get("backbone", own) != own:           # another network, its own weights
            kept |= dict(width=Config.width, weights=Config.weights)
    kept = kept | dict(tta=False, resume=False, eval="")        # these are of one command
    cfg = Config(**kept | typed | {"out": taught_by.out})
    given = taught_by.method, "maskclip"
    if cfg.teacher not in given and not cfg.eval and not Path(cfg.teacher).is_dir():
        raise UserError(f"--teacher {cfg.teacher}: {cfg.out}/rectify.pt has {' and '.join(given)}, "
                        "and it is no folder of masks")
    return cfg

def find_checkpoint(typed):
    """The rectify.pt to go on with: --eval's, --out's, --dataset's, or the newest."""
    if "eval" in typed:                                 # another teacher's student lies one deeper
        home = Path(typed["eval"]).parent
        return (home if (home / "rectify.pt").is_file() else home.parent) / "rectify.pt"
    if not typed.keys() & {"out", "dataset"}:
        return rectify.newest("rectify.pt")
    return Path(typed.get("out") or f"runs/{typed['dataset']}") / "rectify.pt"

def take_up(path, kept, typed):
    """A student's checkpoint. Raises UserError where it contradicts what was typed, or `kept`."""
    state = rectify.load(path, "student")
    rectify.compare(path, state, Config, FREE, typed)
    taught_by = {"config": state["rectify"]}
    rectify.compare(path, taught_by, rectify.Config, rectify.FREE, kept["rectify"])
    for name in ("names", "background", "images"):
        if state[name] != kept[name]:
            raise UserError(f"{path}: its teacher had other {name}; distil again in another --out")
    return state

def learn(cfg, segmenter, samples, kept, out, state):
    """Train a student, or go on with `state`; every file is read first. Returns it."""
    labeller = Labeller(segmenter, cfg) if cfg.teacher in METHODS else None
    if cfg.ignore_gt_background:
        print("warning: --ignore-gt-background learns only where GROUND TRUTH is foreground. That "
              "is the published protocol, and it is not unsupervised")
    if not labeller or cfg.ignore_gt_background:        # the first bad mask ends it here
        read = lambda sample: read_example(sample, 0, cfg, kept)
        for _ in tqdm(read_ahead(read, samples), "masks", len(samples), leave=False):
            pass
    R = labeller.R if cfg.teacher == "reclip" else None
    student = DeepLabV2(cfg, segmenter.T, R, segmenter.scale).to(segmenter.device)
    if state:
        student.load_state_dict(state["student"])
    print(f"{cfg.teacher} teaches {cfg.backbone}: {len(samples)} images, {len(segmenter.names)} "
          f"classes, {segmenter.device}, {WORLD} processes")
    train(student, labeller, rectify.own_share(samples), cfg, kept, out, state)
    return student

def measure(student, segmenter, cfg, val, kept, out):
    """Measure CLIP, its rectification, MaskCLIP+ where it was run before, and the student: the
    table, distill.json and the figures. Returns the student's mIoU."""
    plus, students = Path(cfg.out) / "maskclip/student.pt", {}
    if cfg.teacher != "maskclip" and plus.is_file():
        settings = {k: v for k, v in asdict(cfg).items() if k not in ("teacher", "seed")}
        try:
            state = take_up(plus, kept, settings)
            students["maskclip+"] = load_student(state, segmenter.device)
        except UserError as error:
            print(f"MaskCLIP+ is left out. {error}")
    students["student"] = student
    rectified, C = rectify.predictor(segmenter), len(segmenter.names)
    names, base, threshold = segmenter.classes, cfg.label_base, segmenter.cfg.threshold
    predict = lambda images: rectified(images) | {
        name: predict_student(net, images, cfg, C, threshold) for name, net in students.items()}
    results, found, _ = rectify.evaluate(predict, val, names, base)
    rectify.write(out / "distill.json", json.dumps({
        "results": results, "config": asdict(cfg), "versions": rectify.versions()}, indent=1))
    rectify.save_galleries(predict, val, found, names, base, out)
    rectify.print_table(results, names)
    return results["student"]["mIoU"]

def main(argv=None):
    shown = lambda **typed: configure(
        rectify.configure(dataset=typed.get("dataset", "emoji")), **typed)
    started, typed = time.time(), rectify.command_line(Config, __doc__, shown, argv)
    path = find_checkpoint(typed)
    print(f"distilling {path}")
    state, told = rectify.load(path), {name: typed[name] for name in typed if name == "dataset"}
    rectify.compare(path, state, rectify.Config, rectify.FREE, told)
    taught_by = rectify.configure(state["config"], out=str(path.parent),
                                  device=typed.get("device", "auto"))
    samples, val = rectify.splits(rectify.dataset_folder(taught_by))
    kept = {"names": state["names"], "background": state["background"],
            "images": [sample.name for sample in samples], "rectify": asdict(taught_by)}
    cfg, before = configure(taught_by, **typed), None
    own = "" if cfg.teacher == taught_by.method else Path(cfg.teacher).resolve().name
    out = Path(cfg.eval).parent if cfg.eval else Path(cfg.out) / own
    found = [p for p in (out / "distill.partial.pt", out / "student.pt") if p.is_file()]
    if cfg.eval or cfg.resume and found:
        before = take_up(cfg.eval or found[0], kept, typed)
        cfg = configure(taught_by, before["config"], **typed)
        print(f"going on with {cfg.eval or found[0]}")
    torch.manual_seed(cfg.seed)
    segmenter = rectify.Segmenter(taught_by, state["names"], state["background"], state)
    if val:
        rectify.check_labels(val, segmenter.classes, cfg.label_base)
    out.mkdir(parents=True, exist_ok=True)
    kept["config"], trained = asdict(cfg), before and (cfg.eval or "optimizer" not in before)
    student = (load_student(before, segmenter.device) if trained else
               learn(cfg, segmenter, samples, kept, out, before))
    mIoU = measure(student, segmenter, cfg, val, kept, out) if val and RANK == 0 else None
    if not trained and RANK == 0:
        rectify.save(out / "student.pt", kept | {"student": student.state_dict(), "mIoU": mIoU})
        (out / "distill.partial.pt").unlink()
    print(f"{time.time() - started:.0f} s in all. Wrote {out}/: {', '.join(os.listdir(out))}")

if __name__ == "__main__":
    rectify.run(main)
