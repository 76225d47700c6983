"""Distil a rectified CLIP into DeepLabV2, a plain convolutional segmenter (ReCLIP, CVPR 2024; Tables 11 and 12).

A rectified CLIP is slow. The student learns from its masks, its dense features and its text
features, on unlabelled pictures, and then needs no CLIP at all.

    python distill.py                                # goes on with the newest rectify.pt under runs/
    python distill.py --dataset voc                  # the one in runs/voc: Table 12's schedule, ResNet-50 with ImageNet's weights
    python distill.py --teacher maskclip             # MaskCLIP+, to compare with: the teacher is not rectified
    python distill.py --teacher DIR                  # any other method's masks, PNGs named as the pictures, VOC's values
    python distill.py --eval runs/emoji/student.pt --tta

Read it top to bottom: 1 configuration, 2 data, 3 teacher, 4 student, 5 losses, 6 training, 7 evaluation, 8 main.
The letters are rectify.py's, and: u the student's pixel feature, B×D×s×s on a grid of 8 px; S side of a crop, s = ⌈S/8⌉.
"""
import contextlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import rectify
from rectify import (HERE, RANK, VOID, WORLD, PhotometricDistort, Segmenter, UserError, command_line, contrastive_loss,
                     dataset_folder, denoise, evaluate, figure4, figure5, first_alone, fit, hypothesise, in_bf16, in_step,
                     lacks_compiler, load_checkpoint, load_image, load_label, newest, option, order_of, predict, print_table,
                     read_ahead, refuse_other_run, run, save, similarity, splits, tqdm, versions, write_text)

# ================================================================================================== 1 configuration

# What each dataset needs beside rectify.RECIPES, whose size, crop, jitter and batch hold here too unless they are named again
# (Table 12 gives both stages the same). rates: the dilations of ASPP; on the 8×8 grid of an emoji crop the paper's 6/12/18/24
# read mostly padding. width: of the backbone, as a share of its own. weights: what it starts from, timm's "imagenet" or a file
# (Emoji VOC ships one, trained on 1,249 emoji that it does not show). head: learning rate of ASPP, times lr. targets: the
# teacher sees each training crop (paper), or each whole picture and its mirror image once, from which crops are then cut:
# three passes of CLIP for a picture in all; the teacher does not see how the crop looks. least: prompt denoising of the teacher.
# doubt: `ask_once`. stretch: how far the shape of a picture may change in training, since export.py shows the student every
# picture as a square. floor: no learning rate falls below it.
PUBLISHED = dict(backbone="resnet50c", width=1.0, weights="imagenet", rates=(6, 12, 18, 24), targets="crop", least=0.5, stretch=1,
             doubt=0, optimizer="sgd", weight_decay=5e-4, lr=0.01, head=10, floor=1e-4)
RECIPES = {
    "emoji": dict(backbone="resnet18", width=0.5, weights="tests/emoji/resnet18.safetensors", rates=(1, 2, 4, 6), targets="once",
                  least=0, stretch=1.4, doubt=0.5, optimizer="adam", weight_decay=0.01, lr=3e-4, head=6, floor=0,
                  epochs=14, batch=16, size=(2048, 96), crop=64, jitter=(0.7, 1.4)),
    "voc": dict(PUBLISHED, epochs=100), "context": dict(PUBLISHED, epochs=50), "ade": dict(PUBLISHED, epochs=20),
}
SHARPNESS = 10                                          # denoising the teacher: softmax(10 · logits), as the authors distil
MAX_GRAD_NORM = 10.0                                    # norm(u) is steep where u is short
TTA_SCALES = (0.75, 1.0, 1.25)


@dataclass
class Config:
    dataset: str = option("", "go on with runs/<dataset> (default: the newest run)", list(RECIPES))
    out: str = option("", "folder of the rectify.pt to go on with; the student goes there too (another --teacher's in a folder)")
    teacher: str = option("", "reclip, reclip++, maskclip, or a folder of mask PNGs (default: the checkpoint's method)")
    backbone: str = option("", "a timm backbone: resnet50c, resnet101c, resnet18, .. (default by dataset)")
    width: float = option(None, "width of a ResNet, as a share of its own; another than the recipe's starts from scratch")
    mask_weight: float = option(1.0, "weight of the mask-guided loss")
    feature_weight: float = option(0.5, "weight of the feature-guided loss")
    text_weight: float = option(0.5, "weight of the text-guided loss")
    targets: str = option("", "the teacher sees every crop, or every picture once", ["crop", "once"])
    ignore_gt_background: bool = option(False, "published protocol: learn only where ground truth is foreground (a leak)")
    lr: float = option(None, "learning rate of the backbone")
    epochs: int = option(None, "passes over the training images")
    batch: int = option(None, "images a step")
    tta: bool = option(False, "measure with flips and three scales")
    seed: int = option(0, "seed of everything random")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda"])
    compile: bool = option(False, "torch.compile the student in training: a minute at the start, for long runs on a GPU")
    resume: bool = option(False, "go on with the interrupted run")
    eval: str = option("", "evaluate this student.pt instead of training")


def find_checkpoint(cfg):
    """The rectify.pt to go on with: --out's, --dataset's, or the newest. Raises UserError where there is none."""
    if not (cfg.out or cfg.dataset):
        return newest("rectify.pt")
    path = Path(cfg.out or f"runs/{cfg.dataset}") / "rectify.pt"
    if not path.is_file():
        flags = (f" --dataset {cfg.dataset}" if cfg.dataset else "") + (f" --out {cfg.out}" if cfg.out else "")
        raise UserError(f"{path}: no such checkpoint; make it with `python rectify.py{flags}`")
    return path


def recipe_of(segmenter):
    """The recipe for a teacher's data: the row of rectify.py that it was trained with, and over it the one here."""
    return {**rectify.recipe_of(segmenter.cfg), **RECIPES[segmenter.cfg.dataset]}


def complete(cfg, segmenter):
    """Fill what the command line left open from the teacher and its recipe, and refuse what makes no sense.

    Returns a Config in which every field has its value. Raises UserError.
    """
    recipe, theirs = recipe_of(segmenter), segmenter.cfg
    chosen = {f.name: recipe[f.name] for f in fields(cfg) if getattr(cfg, f.name) in (None, "") and f.name in recipe}
    if cfg.dataset and (theirs.data or theirs.dataset != cfg.dataset):
        raise UserError(f"{theirs.out}/rectify.pt: was trained on {theirs.data or theirs.dataset}, not on {cfg.dataset}")
    chosen["dataset"] = "" if theirs.data else theirs.dataset
    cfg = replace(cfg, **chosen, out=theirs.out, teacher=cfg.teacher or theirs.method)
    weights = (cfg.mask_weight, cfg.text_weight, 0 if is_folder(cfg.teacher) else cfg.feature_weight)
    for bad, message in [
            (cfg.teacher in ("reclip", "reclip++") and cfg.teacher != theirs.method,
             f"--teacher {cfg.teacher}: {cfg.out}/rectify.pt is {theirs.method}; make one with "
             f"`python rectify.py --method {cfg.teacher} --out FOLDER` and give --out FOLDER"),
            (is_folder(cfg.teacher) and not cfg.eval and not Path(cfg.teacher).is_dir(),
             f"--teacher {cfg.teacher}: neither reclip, reclip++ or maskclip nor a folder of masks"),
            (is_folder(cfg.teacher) and Path(cfg.teacher).resolve().name == "maskclip",
             f"--teacher {cfg.teacher}: a folder of this name would be taken for MaskCLIP+; rename it"),
            (cfg.epochs < 1 or cfg.batch < WORLD, f"--epochs starts at 1, and --batch at {WORLD}, an image for each process"),
            lacks_compiler(cfg),
            (not 0 < cfg.lr < 1e6 or not 0 < cfg.width < 1e6, "--lr and --width must be positive, and below a million"),
            (min(*weights, cfg.feature_weight) < 0 or max(weights) == 0,
             "the weights of the losses: none below 0, one above (masks have no feature-guided loss)")]:
        if bad:
            raise UserError(message)
    return cfg


def is_folder(teacher):
    """True for a --teacher that names a folder of masks, false for a method."""
    return teacher not in ("reclip", "reclip++", "maskclip")


# =========================================================================================================== 2 data

class Pictures(Dataset):
    """What a step needs of each training picture: (index, picture 3×H×W uint8, mask H×W or None, truth H×W or None).

    The mask is another method's, from `folder`; the truth is read only for --ignore-gt-background. Both uint8 with 255 void,
    of the file's size, while the picture has the recipe's. A DataLoader's workers decode and resize; the device does all else.
    """

    def __init__(self, samples, size, folder, classes, ignore_background):
        self.samples, self.size, self.folder = samples, size, folder
        self.classes, self.ignore_background = classes, ignore_background

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        sample = self.samples[i]
        try:
            image = load_image(sample.image)
            mask = self.folder and load_label(self.folder / f"{sample.name}.png", image.shape[1:], self.classes)
            truth = load_label(sample.label, image.shape[1:], self.classes) if self.ignore_background else None
        except UserError as error:                      # a worker's exception would arrive with its traceback as the message
            return error
        return i, fit(image, self.size), mask, truth


def check_masks(folder, samples, classes):
    """Look at every mask of a folder before training: there, one picture's own, readable, of its size, values 1..C, 0 and 255.

    Raises UserError for the first that is not as it must be.
    """
    owner = {}
    for sample in samples:
        if owner.setdefault(sample.name, sample.image) != sample.image:
            raise UserError(f"{sample.image}: has its mask {sample.name}.png in common with {owner[sample.name].name}; rename it")
    missing = [s.name for s in samples if not (folder / f"{s.name}.png").is_file()]
    if missing:
        raise UserError(f"{folder}: {len(missing)} of {len(samples)} training pictures have no mask; first {missing[0]}.png")
    for sample in tqdm(samples, "checking masks", unit="img", leave=False):
        load_label(folder / f"{sample.name}.png", load_image(sample.image).shape[1:], classes)


def random_window(size, recipe):
    """θ: 2×3, the random window that a square crop of S px shows of a picture of (height, width) px, half of them mirrored.

    In affine_grid's units: [-1, 1] is the picture. The picture is first scaled by U(jitter) and the ratio of its sides changed
    by a factor in [1/stretch, stretch]; a crop that is larger than the picture holds all of it somewhere.
    """
    (low, high), (scale, ratio, x, y, mirror) = recipe["jitter"], torch.rand(5).tolist()
    scale, ratio = low + (high - low) * scale, recipe["stretch"] ** (2 * ratio - 1)
    a = recipe["crop"] / (size[1] * scale * ratio ** 0.5)                               # the crop's share of the width
    b = recipe["crop"] / (size[0] * scale / ratio ** 0.5)                               # and of the height
    sign = 1 if mirror < 0.5 else -1
    return torch.tensor([[sign * a, 0, (1 - a) * (2 * x - 1)], [0, b, (1 - b) * (2 * y - 1)]])


def grid_of(theta, side):
    """Where windows θ B×2×3 look, B×side×side×2; on a GPU by way of doubles, since the product would be rounded to TF32."""
    theta = theta.double() if theta.is_cuda else theta
    return F.affine_grid(theta, (len(theta), 1, side, side), align_corners=False).float()


def look(maps, theta, side, mode="bilinear"):
    """What windows show of maps: a list of B maps C×h×w (any sizes, any grid of the picture) and θ B×2×3 to B×C×side×side.

    Beyond a map's edge its border is repeated.
    """
    return torch.cat([F.grid_sample(m[None].float(), g[None], mode, padding_mode="border", align_corners=False)
                      for m, g in zip(maps, grid_of(theta, side))])


# ======================================================================================================== 3 teacher

class Teacher:
    """A frozen teacher, in eval mode and with its CLIP's normalisation; `known` is what `ask_once` heard, if it was called."""

    @torch.no_grad()
    def __init__(self, segmenter, method, least, doubt):
        self.segmenter, self.method, self.least, self.doubt, self.known = segmenter, method, least, doubt, None
        self.R = None if method == "maskclip" else segmenter.reference()

    @torch.no_grad()
    def __call__(self, images):
        """Logits B×C×h×w, denoised where they are rectified, and dense features f B×D×h×w of uint8 pictures B×3×H×W.

        The picture is resized to whole patches, so that the maps cover just what the picture covers.
        """
        segmenter, patch = self.segmenter, self.segmenter.clip.visual.patch_size[0]
        f = segmenter.features(v2.functional.resize(images, [max(1, round(n / patch)) * patch for n in images.shape[-2:]]))
        if self.method == "maskclip":
            return similarity(f, segmenter.T), f
        return denoise(segmenter.rectified(f, self.R), SHARPNESS, self.least), f

    def ask_once(self, samples):
        """Keep (logits C×h×w, f D×h×w), half precision, of every whole picture: the mean over the picture and its mirror image.

        The picture has the size of rectify.py's recipe, not the student's. Ours, for better pseudo-labels: the logits are also
        smoothed over 3×3 patches, and a class that the picture's hypothesis does not name loses `doubt` standard deviations of
        the logits, which leaves it a chance where the hypothesis is wrong.
        Cost: 3·N passes of CLIP; N·(C + D)·h·w·2 bytes; of several processes in each, since any may need any picture.
        """
        size, self.known = rectify.recipe_of(self.segmenter.cfg)["size"], []
        images = read_ahead(lambda sample: fit(load_image(sample.image), size), samples)
        for image in tqdm(images, "teacher", len(samples), unit="img", leave=False):
            logits, f = (m[:1] / 2 + m[1:].flip(-1) / 2 for m in self(torch.stack([image, image.flip(-1)])))
            unnamed = ~hypothesise(self.segmenter, image[None])[0, :, None, None]       # C 1 1
            logits = logits - self.doubt * logits.std() * unnamed
            logits = F.avg_pool2d(logits, 3, 1, 1, count_include_pad=False)             # 1 C h w
            self.known.append((logits[0].half(), f[0].half()))


def lesson(teacher, batch, recipe, device):
    """A step's crops and what the teacher says of them.

    teacher: a Teacher, or None where the masks come from a folder. batch: items of Pictures. Returns
    x: B×3×S×S in [0, 1], colours distorted for the student alone (authors: the teacher sees the distorted ones too);
    label: B×S×S int64, the pseudo-label of every pixel; void where there is no picture, or a mask or ground truth says so;
    f: B×D×s×s, the teacher's dense feature, or None where there is no Teacher.
    """
    indices, images, masks, truths = zip(*batch)
    S, f = recipe["crop"], None
    on_device = lambda maps: [m.to(device, non_blocking=True) for m in maps]
    theta = torch.stack([random_window(image.shape[1:], recipe) for image in images]).to(device, non_blocking=True)
    cut = lambda labels: look([label[None] for label in on_device(labels)], theta, S, "nearest")[:, 0].long()       # B S S
    inside = grid_of(theta, S).abs().amax(-1) <= 1                                                                  # B S S
    x = look(on_device(images), theta, S) * inside[:, None]                                                         # B 3 S S
    if teacher is None:
        label = cut(masks)
    else:
        if teacher.known:
            logits, f = zip(*(teacher.known[i] for i in indices))
            window = theta
        else:                                           # these maps are the crop's own, the window is all of them
            logits, f = teacher(x.round().byte())
            window = torch.eye(2, 3, device=device).expand_as(theta)
        label = look(logits, window, S).argmax(1)                                       # B S S
        f = look(f, window, -(-S // 8))                                                 # B D s s
    label.masked_fill_(~inside, VOID)
    if truths[0] is not None:
        label.masked_fill_(cut(truths) == VOID, VOID)
    return torch.stack([PhotometricDistort()(crop) for crop in x / 255]), label, f


# ======================================================================================================== 4 student

def stage_channels(width):
    """The channels of a ResNet's four stages, as a share of its own."""
    return [int(width * c) for c in (64, 128, 256, 512)]


def make_backbone(name, width=1.0, weights=""):
    """A timm backbone of output stride 8 that gives its last stage.

    width: the ResNet's channels, as a share of 64/128/256/512. weights: "imagenet", a file, or "" for none; where they cannot be
    had the backbone starts from scratch, and says so. Raises UserError for what timm cannot make.
    """
    options = dict(features_only=True, output_stride=8, out_indices=(4,))
    if width != 1:
        options["channels"] = stage_channels(width)
    if weights:
        source = {} if weights == "imagenet" else dict(pretrained_cfg_overlay=dict(file=str(HERE / weights)))
        try:
            return timm.create_model(name, pretrained=True, **source, **options)
        except Exception as error:                      # timm, its hub and the hub's network library have no error in common
            print(f"no pretrained weights for {name}, width {width}, to be had ({type(error).__name__}): it starts from scratch")
    try:
        return timm.create_model(name, **options)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--backbone {name}: timm cannot make it with output stride 8 and width {width} ({error})")


def classify(u, T, R, scale):
    """scale · (norm(u)·Tᵀ − norm(u)·Rᵀ): B×D×s×s to B×C×s×s. scale: CLIP's exp(logit_scale).

    Authors' code: no scale, so a cosine's difference, which cannot become confident.
    """
    return scale * similarity(F.normalize(u, dim=1), T - R)


class DeepLabV2(nn.Module):
    """DeepLabV2 (Chen 2018) into CLIP's text space: a dilated backbone, and ASPP, the sum of four dilated convolutions.

    forward(x): B×3×H×W, normalised by `prepare`, to (logits B×C×⌈H/8⌉×⌈W/8⌉, u B×D×⌈H/8⌉×⌈W/8⌉). T, R and the scale are
    buffers: frozen, and saved with the weights. Authors' branches end in BatchNorm and ReLU; ours do not, since u is to be f,
    which has signs.
    """

    def __init__(self, backbone, T, R=None, scale=1.0, rates=(6, 12, 18, 24), width=1.0, weights=""):
        super().__init__()
        self.backbone = make_backbone(backbone, width, weights)
        channels = self.backbone.feature_info.channels()[-1]
        self.aspp = nn.ModuleList(nn.Conv2d(channels, T.size(1), 3, padding=r, dilation=r) for r in rates)
        self.register_buffer("T", T.clone())
        self.register_buffer("R", torch.zeros_like(T) if R is None else R.clone())      # zero: norm(u)·Tᵀ alone
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, x):
        with in_bf16(x.device) if self.training else contextlib.nullcontext():
            x = self.backbone(x)[0]                                                     # B channels s s
            u = sum(conv(x) for conv in self.aspp)                                      # B D s s
        u = u.float()
        return classify(u, self.T, self.R, self.scale), u


def prepare(x):
    """B×3×H×W in [0, 1] to what the student takes: ImageNet's mean and standard deviation."""
    return v2.functional.normalize(x, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def make_student(cfg, segmenter):
    """The DeepLabV2 that a Config asks for, in the text space of the teacher's CLIP; at most its backbone has been trained."""
    recipe = recipe_of(segmenter)
    with torch.no_grad():
        R = segmenter.reference() if cfg.teacher == "reclip" else None
    return DeepLabV2(cfg.backbone, segmenter.T, R, segmenter.scale, recipe["rates"], cfg.width,
                     recipe["weights"]).to(segmenter.device)


def load_student(path, device="cpu"):
    """(DeepLabV2 in eval mode, the dict of student.pt). No CLIP is loaded. Raises UserError."""
    state = load_checkpoint(Path(path), "student", Config)
    config, weights = state["config"], state["student"]
    try:
        student = DeepLabV2(config["backbone"], weights["T"], rates=state["rates"], width=config["width"])
        student.load_state_dict(weights)
    except (KeyError, RuntimeError):
        raise UserError(f"{path}: not a finished student; make it with `python distill.py`")
    return student.eval().to(device), state


# ========================================================================================================= 5 losses

def mask_guided(logits, label):
    """CE(logits, pseudo-label), the mean over the pixels that are not void. logits: B×C×s×s, upsampled; label: B×S×S."""
    logits = F.interpolate(logits, label.shape[-2:], mode="bilinear")                   # B C S S
    return F.cross_entropy(logits, label, ignore_index=VOID, reduction="sum") / (label != VOID).sum().clamp(min=1)


def feature_guided(u, f, label):
    """√D · mean |norm(u) − norm(f)| over D and the pixels that are not void. u, f: B×D×s×s; label: B×s×s.

    Paper: features of CLIP's own length, on the crop's pixels. Ours: unit length, which is all that the classifier sees,
    times √D, which makes an element about as large as CLIP's own; on the student's grid.
    """
    gap = (F.normalize(u, dim=1) - F.normalize(f, dim=1)).abs().mean(1) * u.size(1) ** 0.5      # B s s
    known = label != VOID
    return (gap * known).sum() / known.sum().clamp(min=1)


def text_guided(u, T, label, scale):
    """CE(scale · z_c·Tᵀ, c) with z_c the mean of norm(u) over the pixels that the pseudo-label calls c.

    Averaged over an image's classes, then over the batch. u: B×D×s×s; T: C×D; label: B×s×s; scale: CLIP's exp(logit_scale)
    (authors' code: its logarithm).
    """
    M = (label[:, None] == torch.arange(len(T), device=label.device).view(-1, 1, 1)).float()    # B C s s
    y = M.amax((2, 3)).bool()                                                                   # B C
    return contrastive_loss(M, F.normalize(u, dim=1), T, y, scale, valid=label != VOID, pool="mask")


def on_grid(label, size):
    """A label B×S×S on a coarser grid: the value at the middle of each cell."""
    return F.interpolate(label[:, None].float(), size, mode="nearest-exact")[:, 0].long()


def losses(logits, u, label, f, T, scale):
    """The losses of a step's crops, {"mask", "text", "feature"}; the last only where there is a teacher's feature.

    logits: B×C×s×s and u: B×D×s×s of the student. label: B×S×S; f: B×D×s×s or None, as `lesson` gives them. T: C×D.
    """
    coarse = on_grid(label, u.shape[-2:])                                               # B s s
    found = {"mask": mask_guided(logits, label), "text": text_guided(u, T, coarse, scale)}
    return found if f is None else found | {"feature": feature_guided(u, f, coarse)}


# ======================================================================================================= 6 training

def poly(step, steps, lr, floor):
    """The learning rate at a step: floor + (lr − floor) · (1 − step/steps)^0.9; a rate below the floor stays as it is."""
    floor = min(floor, lr)
    return floor + (lr - floor) * (1 - step / steps) ** 0.9


def step(model, optimizer, x, label, f, weights, share=1.0):
    """A step on a lesson's crops. Returns its losses by name.

    model: the DeepLabV2, or `in_step` with other processes'; share: what part of the batch is here, times their number.
    """
    student, x = getattr(model, "module", model), prepare(x)
    logits, u = model(x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x)
    found = losses(logits, u, label, f, student.T, student.scale)
    optimizer.zero_grad()
    (share * sum(weights[name] * loss for name, loss in found.items())).backward()
    nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    return {name: loss.detach() for name, loss in found.items()}


def train(student, teacher, pictures, cfg, names, recipe, out):
    """Learn the student from the teacher alone; a line an epoch in out/log.jsonl, after rectify.py's where that is there.

    out/distill.partial.pt is for --resume. Of several processes each takes its part of every batch.
    """
    device, N = student.T.device, len(pictures)
    if device.type == "cuda":
        student = student.to(memory_format=torch.channels_last)
        student = timm.layers.convert_sync_batchnorm(student) if WORLD > 1 else student
    torch.backends.cudnn.benchmark = True               # all crops have one size
    base = [cfg.lr, cfg.lr * recipe["head"]]
    groups = [{"params": list(student.backbone.parameters())}, {"params": list(student.aspp.parameters())}]
    optimizer = (torch.optim.SGD(groups, cfg.lr, momentum=0.9, weight_decay=recipe["weight_decay"])
                 if recipe["optimizer"] == "sgd" else torch.optim.AdamW(groups, cfg.lr, weight_decay=recipe["weight_decay"]))
    weights = {"mask": cfg.mask_weight, "feature": cfg.feature_weight, "text": cfg.text_weight}
    partial, begin, log = out / "distill.partial.pt", 0, []
    before = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").is_file() else []
    rectifying = [entry for entry in before if '"stage": "distill"' not in entry]
    if cfg.resume and partial.is_file():
        state = load_checkpoint(partial, "student", Config)
        refuse_other_run(state, cfg, names, partial)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        begin, log = state["epoch"], state["log"]
        print(f"resuming after epoch {begin} of {cfg.epochs}")
    else:
        partial.unlink(missing_ok=True)
    if teacher and cfg.targets == "once" and teacher.known is None:
        teacher.ask_once(pictures.samples)

    model, per_epoch = in_step(student, device, cfg.compile), -(-N // cfg.batch)
    bar = tqdm(total=cfg.epochs * per_epoch, initial=begin * per_epoch, desc="student", unit="step")
    for epoch in range(begin, cfg.epochs):
        batches = [i for i in order_of(cfg.seed, epoch, N).split(cfg.batch) if len(i) >= WORLD]
        started, total = time.time(), {}                # of each loss, the mean of the epoch
        loader = DataLoader(pictures, batch_sampler=[i[RANK::WORLD].tolist() for i in batches], collate_fn=list,
                            pin_memory=device.type == "cuda",
                            num_workers=min(8, os.cpu_count() // WORLD) if device.type == "cuda" else 0)
        student.train()
        for k, batch in enumerate(loader):
            for group, lr in zip(optimizer.param_groups, base):
                group["lr"] = poly(epoch * per_epoch + k, cfg.epochs * per_epoch, lr, recipe["floor"])
            for broken in (item for item in batch if isinstance(item, UserError)):
                raise broken
            share = len(batch) * WORLD / len(batches[k])
            for name, loss in step(model, optimizer, *lesson(teacher, batch, recipe, device), weights, share).items():
                total[name] = total.get(name, 0) + loss * len(batch) / N
            bar.update()
        if WORLD > 1:
            for part in total.values():
                distributed.all_reduce(part)
        line = {"epoch": epoch + 1, "loss": sum(weights[name] * total[name].item() for name in total),
                **{name: total[name].item() for name in total}, "lr": optimizer.param_groups[0]["lr"]}
        if not math.isfinite(line["loss"]):
            raise UserError(f"the loss is {line['loss']} in epoch {epoch + 1}; lower --lr (log: {out / 'log.jsonl'})")
        speed = {"images_per_second": round(N / (time.time() - started), 1)}
        log.append({"stage": "distill"} | {k: round(v, 6) for k, v in line.items()} | speed)
        bar.set_postfix(epoch=epoch + 1, loss=f"{line['loss']:.3f}")
        if RANK == 0:
            write_text(out / "log.jsonl", "\n".join(rectifying + [json.dumps(entry) for entry in log]))
            save(partial, {"config": asdict(cfg), "names": names, "student": student.state_dict(), "epoch": epoch + 1,
                           "log": log, "optimizer": optimizer.state_dict()})
    bar.close()
    student.eval()
    torch.backends.cudnn.benchmark = False              # from here on sizes change


# ======================================================================================================= 7 evaluation

@torch.no_grad()
def predict_student(student, images, size, tta=False):
    """Masks B×H×W of uint8 pictures B×3×H×W. size: (long, short) px, the recipe's. tta: mean logits of flips and scales."""
    images, total = images.to(student.T.device), 0
    for factor in TTA_SCALES if tta else (1.0,):
        x = prepare(fit(images, size, factor).float() / 255)
        for mirror in (False, True) if tta else (False,):
            logits = student(x.flip(-1) if mirror else x)[0]
            total = total + F.interpolate(logits.flip(-1) if mirror else logits, images.shape[-2:], mode="bilinear")
    return total.argmax(1)


def measure(student, segmenter, cfg, val):
    """The validation pictures through CLIP, its rectification, MaskCLIP+ where that was run before, and the student.

    Returns (rectify.evaluate's results, its objects, the function that makes the masks).
    """
    size, students = recipe_of(segmenter)["size"], {}
    plus = Path(cfg.out) / "maskclip/student.pt"
    if cfg.teacher != "maskclip" and plus.is_file():
        other, state = load_student(plus, segmenter.device)
        schedule = ("epochs", "batch", "lr", "backbone", "width")
        if state["names"] == segmenter.names and all(state["config"][k] == getattr(cfg, k) for k in schedule):
            students["maskclip+"] = other
        else:
            print(f"{plus}: has other classes or another schedule than this student, and is left out")
    students["student"] = student
    masks = lambda images: predict(segmenter, images) | {name: predict_student(net, images, size, cfg.tta)
                                                         for name, net in students.items()}
    return *evaluate(masks, val, segmenter.names), masks


# ============================================================================================================= 8 main

def main(argv=None):
    started, seconds = time.time(), {}
    cfg = command_line(Config, __doc__, argv)
    if cfg.eval:
        home = Path(cfg.eval).parent
        home = home if (home / "rectify.pt").is_file() else home.parent                 # MaskCLIP+ lies in a folder of its own
        config = load_checkpoint(Path(cfg.eval), "student", Config)["config"]
        cfg = replace(Config(**config), eval=cfg.eval, tta=cfg.tta, device=cfg.device, resume=False, compile=False,
                      out=cfg.out or str(home))
    checkpoint = find_checkpoint(cfg)
    print(f"distilling {checkpoint}")
    with first_alone():
        segmenter = Segmenter.load(checkpoint, device=cfg.device, out=str(checkpoint.parent))
        folder = dataset_folder(segmenter.cfg)
    cfg, recipe, names, device = complete(cfg, segmenter), recipe_of(segmenter), segmenter.names, segmenter.device
    samples, val = splits(folder)
    masks = Path(cfg.teacher) if is_folder(cfg.teacher) else None
    out = Path(cfg.out) / (Path(cfg.teacher).resolve().name if cfg.teacher != segmenter.cfg.method else "")
    torch.manual_seed(cfg.seed)
    resumed = cfg.resume and (out / "student.pt").is_file() and not (out / "distill.partial.pt").is_file()
    finished = Path(cfg.eval) if cfg.eval else out / "student.pt" if resumed else None
    for old in (out / "student.pt", out / "distill.partial.pt"):
        if cfg.resume and old.is_file() and old.stat().st_mtime < checkpoint.stat().st_mtime:
            raise UserError(f"{old}: is older than its teacher {checkpoint}; leave out --resume")
    if finished:
        student, state = load_student(finished, device)
        refuse_other_run(state, cfg, names, finished)
        print(f"that student is there: measuring {finished}")
        out.mkdir(parents=True, exist_ok=True)
    else:
        if masks:
            check_masks(masks, samples, len(names))
            print(f"{masks}: {len(samples)} masks, all sound. Masks have no features: no feature-guided loss")
        if cfg.ignore_gt_background:
            if not all(s.label for s in samples):
                raise UserError("--ignore-gt-background: the training pictures have no ground truth")
            print("warning: --ignore-gt-background learns only where GROUND TRUTH is foreground. That is the published protocol, "
                  "and it is not unsupervised")
        out.mkdir(parents=True, exist_ok=True)
        teacher = None if masks else Teacher(segmenter, cfg.teacher, recipe["least"], recipe["doubt"])
        with first_alone():                             # the backbone's weights may be a download
            student = make_student(cfg, segmenter)
        size = sum(p.numel() for p in student.parameters()) / 1e6
        print(f"{cfg.teacher} teaches {cfg.backbone}, {size:.2f} M parameters: "
              f"{len(samples)} images to learn from, {len(val)} labelled ones to measure on, {len(names)} classes, {device}")
        pictures = Pictures(samples, recipe["size"], masks, len(names), cfg.ignore_gt_background)
        train(student, teacher, pictures, cfg, names, recipe, out)
    if RANK > 0:
        return                                          # the first process writes and measures
    if not finished:
        state = {"config": asdict(cfg), "names": names, "student": student.state_dict(), "size": recipe["size"],
                 "rates": recipe["rates"], "mIoU": None, "rectify": asdict(segmenter.cfg)}
        save(out / "student.pt", state)
        (out / "distill.partial.pt").unlink()
    seconds["training"] = round(time.time() - started, 1)

    if not val:
        print(f"no labelled validation images in {folder}: nothing to measure. Wrote {out}/student.pt")
        return
    results, found, predictions = measure(student, segmenter, cfg, val)
    seconds["evaluation"] = round(time.time() - started - seconds["training"], 1)
    if state["mIoU"] is None and not cfg.tta:
        save(finished or out / "student.pt", {**state, "mIoU": results["student"]["mIoU"]})
    report = {"results": results, "config": asdict(cfg), "versions": versions(), "seconds": seconds}
    write_text(out / "distill.json", json.dumps(report, indent=1))
    figure4(predictions, val, names, out / "figure4.png")
    figure5(predictions, found["maskclip"], names, out / "figure5.png")
    print_table(results, names)
    print(f"{time.time() - started:.0f} s in all. Wrote {out}/: distill.json, figure4.png, figure5.png"
          + ("" if finished else ", student.pt, log.jsonl"))


if __name__ == "__main__":
    run(main)
