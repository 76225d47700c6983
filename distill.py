"""Distil a rectified CLIP into DeepLabV2, a plain convolutional segmenter (ReCLIP, CVPR 2024).

A rectified CLIP is slow. The student learns from its masks, its dense features and its text
features, on unlabelled images, and then needs no CLIP at all (Tables 11 and 12).

    python distill.py                               # goes on with the newest rectify.pt under runs/
    python distill.py --dataset voc            # the one in runs/voc: ResNet-50, Table 12's schedule
    python distill.py --teacher maskclip  # MaskCLIP+, to compare with: the teacher is not rectified
    python distill.py --teacher DIR               # any other method's masks, PNGs with VOC's values
    python distill.py --eval runs/emoji/student.pt --tta

The first gives 67.3 ± 0.8 mIoU on Emoji VOC over seeds 0, 1, 2; its teachers have 56.1. README has
other teachers'.

Read it from top to bottom: 1 recipes and configuration, 2 the teacher, 3 the student, 4 the losses,
5 training. Below the ruler: 6 files and checkpoints, 7 evaluation, 8 main.
The letters are rectify.py's, and u is the student's feature, B×D×s×s on a grid of 8 px; S is the
side of a crop, s = ⌈S/8⌉.
"""
import contextlib
import itertools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

# before torch, for which it sets GOMP_SPINCOUNT
from rectify import (
    EXPORTED, HERE, RANK, VOID, WORLD, PhotometricDistort, UserError, check_trained, command_line,
    contrastive_loss, dataset_folder, decide, denoise, digest, each_image, epoch_order, evaluate,
    figure4, figure5, flag, hypothesize, in_bf16, list_digest, list_files, load_checkpoint,
    load_image, load_label, load_segmenter, newest, option, output_folder, predictor, print_table,
    rank_zero_first, read_ahead, refuse_odd_numbers, remove, resize_to_fit, run, save, save_figure,
    similarity, splits, tqdm, versions, wrap_ddp, write_text)

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.scheduler import PolyLRScheduler
from torch import distributed, nn
from torchvision.transforms import v2

# ====================================================================== 1 recipes and configuration

# One row per dataset; size, crop, jitter and batch are the teacher's unless they stand here (Table
# 12 gives both stages the same). Emoji VOC: on the 8×8 grid of its crops the paper's rates
# 6/12/18/24 would read mostly padding; its backbone starts from a file that ships, trained on 1,249
# other emoji.
PAPER = dict(backbone="resnet50c", width=1.0, weights="imagenet", rates=(6, 12, 18, 24),
             targets="crop", denoise=0.5, penalty=0.0, stretch=1.0, optimizer="sgd",
             weight_decay=5e-4, lr=0.01, head=10.0, floor=1e-4)
RECIPES = {
    "emoji": dict(backbone="resnet18", width=0.5, weights="tests/emoji/resnet18.safetensors",
                  rates=(1, 2, 4, 6), targets="once", denoise=0.0, penalty=0.5, stretch=1.4,
                  optimizer="adam", weight_decay=0.01, lr=3e-4, head=6.0, floor=0.0,
                  epochs=14, batch=16, size=(2048, 96), crop=64, jitter=(0.7, 1.4)),
    "voc": dict(PAPER, epochs=100),
    "context": dict(PAPER, epochs=50),
    "ade": dict(PAPER, epochs=20),
}
SHARPNESS = 10                         # denoising the teacher: softmax(10 · logits), as the authors
MAX_GRAD_NORM = 10.0                                             # norm(u) is steep where u is short
TTA_SCALES = (1.0, 0.75, 1.25)
METHODS = ("reclip", "reclip++", "maskclip")


@dataclass(kw_only=True)
class Config:
    """All that a student depends on beside its teacher. `configure` makes it complete."""
    dataset: str = option("go on with runs/<dataset> (default: the newest run)", list(RECIPES), "")
    out: str = option("folder of the rectify.pt to go on with, and of the student", free=True)
    teacher: str = option("a method, or a folder of masks (default: the run's method)")
    backbone: str = option("a timm backbone: resnet50c, resnet101c, resnet18, ..")
    width: float = option("width of a ResNet, as a share of its own")
    weights: str = option("what the backbone starts from: imagenet (timm's), or a file")
    rates: tuple[int, int, int, int] = option("dilations of ASPP")
    size: tuple[int, int] = option("longest and shortest side of an image at most, px")
    jitter: tuple[float, float] = option("range of the random factor on that size in training")
    label_base: int = option("value of the first class in label PNGs", [0, 1], free=True)
    stretch: float = option("sides' ratio changes by this factor at most; export.py shows squares")
    crop: int = option("side of a training crop, px")
    targets: str = option("the teacher sees every crop, or every image once", ["crop", "once"])
    denoise: float = option("prompt denoising of the teacher; 0: off")
    penalty: float = option("of classes that the hypothesis does not name; see `cache_targets`")
    mask_weight: float = option("weight of the mask-guided loss", default=1.0)
    feature_weight: float = option("weight of the feature-guided loss", default=0.5)
    text_weight: float = option("weight of the text-guided loss", default=0.5)
    ignore_gt_background: bool = option(
        "published protocol: learn only where GROUND TRUTH is foreground", default=False)
    optimizer: str = option("optimizer", ["sgd", "adam"])
    weight_decay: float = option("weight decay")
    lr: float = option("learning rate of the backbone")
    head: float = option("learning rate of ASPP, times lr")
    floor: float = option("no learning rate falls below it")
    epochs: int = option("passes over the training images")
    batch: int = option("images in a training step")
    tta: bool = option("measure with flips and three scales", default=False, free=True)
    seed: int = option("seed of everything random", default=0)
    device: str = option("where to compute", ["auto", "cpu", "cuda"], "auto", free=True)
    resume: bool = option("go on with the interrupted run", default=False, free=True)
    eval: str = option("measure this student.pt instead of training", default="", free=True)


def configure(teacher, trained=None, /, **typed):
    """The complete Config: what was typed, over the dataset's recipe, over the teacher's sizes.

    teacher: the Config of rectify.pt. trained: the configuration in a student's checkpoint, which
    then takes the recipe's place. Raises UserError.
    """
    if trained is None:
        shared = ("size", "crop", "jitter", "batch", "dataset", "label_base")
        trained = {name: getattr(teacher, name) for name in shared} | {"teacher": teacher.method}
        trained |= RECIPES[teacher.dataset]
        if typed.get("backbone", trained["backbone"]) != trained["backbone"]:
            trained |= {"width": 1.0, "weights": "imagenet"}      # another network, its own weights
    else:
        check_trained(Config, trained, typed)
        trained = trained | {"resume": False, "tta": False}
    cfg = Config(**trained | typed | {"out": teacher.out})
    refuse_odd_numbers(cfg)
    by_folder = cfg.teacher not in METHODS
    weights = (cfg.mask_weight, cfg.text_weight, 0 if by_folder else cfg.feature_weight)
    for bad, message in [
            ("dataset" in typed and (teacher.data or cfg.dataset != teacher.dataset),
             f"{cfg.out}/rectify.pt: was trained on {teacher.data or teacher.dataset}, "
             f"not on {cfg.dataset}"),
            (cfg.teacher in METHODS[:2] and cfg.teacher != teacher.method,
             f"--teacher {cfg.teacher}: {cfg.out}/rectify.pt is {teacher.method}; make one with "
             f"`python rectify.py --method {cfg.teacher} --out FOLDER` and give --out FOLDER"),
            (by_folder and not cfg.eval and not Path(cfg.teacher).is_dir(),
             f"--teacher {cfg.teacher}: neither {', '.join(METHODS)} nor a folder of masks"),
            (by_folder and Path(cfg.teacher).resolve().name in ("", "maskclip"),
             f"--teacher {cfg.teacher}: the student's folder would take its name, which is "
             "MaskCLIP+'s or none; give a folder of another name"),
            (cfg.epochs < 1 or cfg.batch < WORLD,
             f"--epochs starts at 1, and --batch at {WORLD}, an image for each process"),
            (max(cfg.lr, cfg.width) >= 1e6, "--lr and --width must be below a million"),
            (min(*weights, cfg.feature_weight) < 0 or max(weights) == 0,
             "the losses' weights: none below 0, one above (masks have no feature-guided loss)")]:
        if bad:
            raise UserError(message)
    return cfg


# ==================================================================================== 2 the teacher

class Teacher:
    """A frozen teacher; `cache` holds its targets of every training image after `cache_targets`."""

    @torch.no_grad()
    def __init__(self, segmenter, cfg):
        self.segmenter, self.cfg, self.cache = segmenter, cfg, None
        self.R = None if cfg.teacher == "maskclip" else segmenter.reference()
        self.least = 0 if self.R is None else cfg.denoise                   # of denoising

    @torch.no_grad()
    def look(self, images):
        """Logits B×C×h×w, rectified unless the teacher is maskclip, and dense features f B×D×h×w of
        uint8 images B×3×H×W.

        The image is resized to whole patches, so that the maps cover just what the image covers.
        """
        segmenter, patch = self.segmenter, self.segmenter.clip.visual.patch_size[0]
        clip = segmenter.frozen if self.R is None else segmenter.clip
        whole = [max(1, round(n / patch)) * patch for n in images.shape[-2:]]
        x = v2.functional.resize(images, whole)
        f = segmenter.encode(clip, x, segmenter.cfg.attention)
        return similarity(f, segmenter.T) if self.R is None else segmenter.rectified(f, self.R), f

    def __call__(self, images):
        """`look`, denoised."""
        logits, f = self.look(images)
        return denoise(logits, SHARPNESS, self.least), f

    @torch.no_grad()
    def cache_targets(self, samples):
        """Keep (logits C×h×w, f D×h×w), half, of every image: the mean of it and its mirror image.

        Ours, for better pseudo-labels: the image has the size of rectify.py's recipe, the logits
        are smoothed over 3×3 patches, and a class that the hypothesis does not name loses `penalty`
        standard deviations of the logits, which leaves it a chance where the hypothesis is wrong.
        Denoising comes last, so that its -1e4 is no part of that deviation.
        Cost: 3·N passes of CLIP, N·(C + D)·h·w·2 bytes in every process, since any may need any
        image.
        """
        def targets(images):
            x = resize_to_fit(images.to(self.segmenter.device), self.segmenter.cfg.size)
            logits, f = ((maps + mirrored.flip(-1)) / 2                     # B C h w, B D h w
                         for maps, mirrored in zip(self.look(x), self.look(x.flip(-1))))
            absent = ~hypothesize(self.segmenter, x)[:, :, None, None]      # B C 1 1
            logits = logits - self.cfg.penalty * logits.std((1, 2, 3), keepdim=True) * absent
            logits = F.avg_pool2d(logits, 3, 1, 1, count_include_pad=False)
            return zip(denoise(logits, SHARPNESS, self.least).half(), f.half())

        self.cache = each_image(targets, samples, "teacher")


# ==================================================================================== 3 the student

def stage_channels(width):
    """The channels of a ResNet's four stages, as a share of its own."""
    return [int(width * c) for c in (64, 128, 256, 512)]


def make_backbone(name, width=1.0, weights=""):
    """A timm backbone of output stride 8 that gives its last stage.

    width: the ResNet's channels, as a share of 64/128/256/512. weights: "imagenet" (where it cannot
    be fetched the backbone starts from scratch, and says so), a file (here or beside this script),
    or "" for none. Raises UserError for what timm cannot make or read.
    """
    options = dict(features_only=True, output_stride=8, out_indices=(4,))
    if width != 1:
        options["channels"] = stage_channels(width)
    if ":" in name or "/" in name:                                     # would be fetched from a hub
        raise UserError(f"--backbone {name}: not one of timm's own names")
    path = weights if Path(weights).is_file() else HERE / weights
    file = dict(file=str(path)) if weights not in ("", "imagenet") else None
    if weights:
        with contextlib.suppress(Exception):    # timm, its hub and the network share no error class
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=file, **options)
    try:
        network = timm.create_model(name, **options)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--backbone {name}: timm cannot make it with output stride 8 and width "
                        f"{width} ({error})")
    if file:
        raise UserError(f"--weights {weights}: cannot be read as weights of {name}, width {width}")
    if weights:
        print(f"WARNING: ImageNet's weights of {name}, width {width}, cannot be had here: the "
              "backbone STARTS FROM SCRATCH and learns less; --weights FILE takes them from a file",
              file=sys.stderr)
    return network


def classify(u, T, R, scale):
    """scale · (norm(u)·Tᵀ − norm(u)·Rᵀ): B×D×s×s to B×C×s×s. scale: CLIP's exp(logit_scale).

    Authors' code: no scale, so a cosine's difference, which cannot become confident.
    """
    return scale * similarity(F.normalize(u, dim=1), T - R)


class DeepLabV2(nn.Module):
    """DeepLabV2 (Chen 2018) into CLIP's text space: a dilated backbone, and ASPP, a sum of convs.

    forward(x): B×3×H×W, normalized by `prepare`, to (logits B×C×⌈H/8⌉×⌈W/8⌉, u B×D×⌈H/8⌉×⌈W/8⌉). T,
    R and the scale are buffers: frozen, and saved with the weights. R: ReCLIP's Reference; other
    teachers have no bias f·Rᵀ, so None, which is 0. Authors' branches end in BatchNorm and ReLU;
    ours do not, since u is to be f, which has signs.
    """

    def __init__(self, backbone, T, R=None, scale=1.0, rates=(6, 12, 18, 24), width=1.0,
                 weights=""):
        super().__init__()
        self.backbone = make_backbone(backbone, width, weights)
        channels, D = self.backbone.feature_info.channels()[-1], T.size(1)
        self.aspp = nn.ModuleList(nn.Conv2d(channels, D, 3, padding=r, dilation=r) for r in rates)
        self.register_buffer("T", T.clone())
        self.register_buffer("R", torch.zeros_like(T) if R is None else R.clone())
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, x):
        with in_bf16(x.device) if self.training else contextlib.nullcontext():
            x = self.backbone(x)[0]                                         # B channels s s
            u = sum(conv(x) for conv in self.aspp)                          # B D s s
        u = u.float()
        return classify(u, self.T, self.R, self.scale), u


def prepare(x):
    """B×3×H×W in [0, 1] to what the student takes: ImageNet's mean and standard deviation."""
    return v2.functional.normalize(x, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


# ===================================================================================== 4 the losses

def mask_guided(logits, label):
    """CE(logits, pseudo-label), the mean over the pixels that are not void.

    logits: B×C×s×s, upsampled here; label: B×S×S.
    """
    logits = F.interpolate(logits, label.shape[-2:], mode="bilinear")       # B C S S
    loss = F.cross_entropy(logits, label, ignore_index=VOID, reduction="sum")
    return loss / (label != VOID).sum().clamp(min=1)


def feature_guided(u, f, label):
    """√D · mean |norm(u) − norm(f)|, void left out. u, f: B×D×s×s; label: B×s×s.

    Paper: features of CLIP's own length, on the crop's pixels. Ours: unit length, which is all that
    the classifier sees, times √D, which makes an element about as large as CLIP's own; on the
    student's grid.
    """
    gap = (F.normalize(u, dim=1) - F.normalize(f, dim=1)).abs().mean(1) * u.size(1) ** 0.5  # B s s
    known = label != VOID
    return (gap * known).sum() / known.sum().clamp(min=1)


def text_guided(u, T, label, scale):
    """CE(scale · z_c·Tᵀ, c), z_c the mean of norm(u) over the pixels with pseudo-label c.

    Averaged over an image's classes, then over the batch. u: B×D×s×s; T: C×D; label: B×s×s; scale:
    CLIP's exp(logit_scale) (authors' code: its logarithm).
    """
    classes = torch.arange(len(T), device=label.device).view(-1, 1, 1)      # C 1 1
    M = (label[:, None] == classes).float()                                 # B C s s
    y = M.amax((2, 3)).bool()                                               # B C
    u = F.normalize(u, dim=1)
    return contrastive_loss(M, u, T, y, scale, valid=label != VOID, pool="mask")


def on_grid(label, size):
    """A label B×S×S on a coarser grid: the value at the middle of each cell."""
    return F.interpolate(label[:, None].float(), size, mode="nearest-exact")[:, 0].long()


def losses(logits, u, label, f, T, scale):
    """The losses of a step, {"mask", "text", and where the teacher has features "feature"}.

    logits: B×C×s×s and u: B×D×s×s of the student. label: B×S×S and f: B×D×s×s (or None) of
    `training_batch`. T: C×D.
    """
    coarse = on_grid(label, u.shape[-2:])                                   # B s s
    found = {"mask": mask_guided(logits, label), "text": text_guided(u, T, coarse, scale)}
    return found if f is None else found | {"feature": feature_guided(u, f, coarse)}


# ======================================================================================= 5 training

def random_window(size, cfg):
    """θ: 2×3, where in an image of (height, width) px a random crop lies; half are mirrored.

    In affine_grid's units: [-1, 1] is the image. The image is first scaled by U(jitter) and the
    ratio of its sides changed by a factor in [1/stretch, stretch]. A crop that is larger than the
    image has all of it at a random place.
    """
    (low, high), (scale, ratio, x, y, mirror) = cfg.jitter, torch.rand(5).tolist()
    scale, ratio = low + (high - low) * scale, cfg.stretch ** (2 * ratio - 1)
    a = cfg.crop / (size[1] * scale * ratio ** 0.5)                         # its share of the width
    b = cfg.crop / (size[0] * scale / ratio ** 0.5)                         # and of the height
    sign = 1 if mirror < 0.5 else -1
    return torch.tensor([[sign * a, 0, (1 - a) * (2 * x - 1)], [0, b, (1 - b) * (2 * y - 1)]])


def grid_of(theta, side):
    """Where windows θ: B×2×3 look, B×side×side×2. On a GPU in doubles: TF32 would round."""
    theta = theta.double() if theta.is_cuda else theta
    return F.affine_grid(theta, (len(theta), 1, side, side), align_corners=False).float()


def sample_windows(maps, theta, side, mode="bilinear"):
    """What windows show of maps: a list of B maps C×h×w of any sizes and θ B×2×3 to B×C×side×side.

    Beyond a map's edge its border is repeated.
    """
    return torch.cat([
        F.grid_sample(m[None].float(), g[None], mode, padding_mode="border", align_corners=False)
        for m, g in zip(maps, grid_of(theta, side))])


def training_batch(teacher, batch, cfg, device):
    """A step's crops and what the teacher says of them.

    teacher: a Teacher, or None where the masks come from a folder. batch: of `read_example`.
    Returns x: B×3×S×S in [0, 1], colours distorted for the student alone (authors: for the teacher
    too); label: B×S×S int64, the pseudo-label; void outside the image, and where a mask or ground
    truth says so; f: B×D×s×s, the teacher's dense feature, or None where there is no Teacher.
    """
    indices, images, masks, truths = zip(*batch)
    S, f = cfg.crop, None
    on_device = lambda maps: [m.to(device, non_blocking=True) for m in maps]
    theta = torch.stack([random_window(image.shape[1:], cfg) for image in images])
    theta = theta.to(device, non_blocking=True)
    cut = lambda labels: sample_windows([label[None] for label in on_device(labels)], theta, S,
                                        "nearest")[:, 0].long()             # B S S
    inside = grid_of(theta, S).abs().amax(-1) <= 1                          # B S S
    x = sample_windows(on_device(images), theta, S) * inside[:, None]       # B 3 S S
    if teacher is None:
        label = cut(masks)
    else:
        if teacher.cache:
            logits, f = zip(*(teacher.cache[i] for i in indices))
            window = theta
        else:                                     # these maps are the crop's own: the window is all
            logits, f = teacher(x.round().byte())
            window = torch.eye(2, 3, device=device).expand_as(theta)
        label = sample_windows(logits, window, S).max(1).indices            # B S S; argmax is slow
        f = sample_windows(f, window, math.ceil(S / 8))                     # B D s s
    label.masked_fill_(~inside, VOID)
    if truths[0] is not None:
        label.masked_fill_(cut(truths) == VOID, VOID)
    return torch.stack([PhotometricDistort()(crop) for crop in x / 255]), label, f


def step(model, optimizer, x, label, f, weights, share=1.0):
    """A step on a `training_batch`. Returns its losses by name.

    model: the DeepLabV2, or DDP's wrapper of it; share: this rank's part of the batch, times WORLD.
    """
    student, x = getattr(model, "module", model), prepare(x)
    logits, u = model(x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x)
    found = losses(logits, u, label, f, student.T, student.scale)
    optimizer.zero_grad()
    (share * sum(weights[name] * loss for name, loss in found.items())).backward()
    nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    return {name: loss.detach() for name, loss in found.items()}


def make_optimizer(student, cfg):
    """The optimizer: ASPP's learning rate is `head` times the backbone's."""
    groups = [{"params": list(student.backbone.parameters()), "lr": cfg.lr},
              {"params": list(student.aspp.parameters()), "lr": cfg.lr * cfg.head}]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=cfg.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=cfg.weight_decay, fused=True)


def train(student, teacher, samples, cfg, fixed, out, state=None):
    """Learn the student from the teacher alone; each epoch is logged, and saved for --resume, in
    the folder `out`.

    teacher: a Teacher, or None where the masks lie in the folder cfg.teacher. Of several processes
    each takes its part of every batch; a last batch with fewer images than processes is left out.
    fixed: what every checkpoint of this student holds. state: the checkpoint of an interrupted run
    to go on with.
    """
    device, N = student.T.device, len(samples)
    if device.type == "cuda":
        student = student.to(memory_format=torch.channels_last)
        student = timm.layers.convert_sync_batchnorm(student) if WORLD > 1 else student
    torch.backends.cudnn.benchmark = True                                  # all crops have one size
    optimizer, steps = make_optimizer(student, cfg), math.ceil(N / cfg.batch)
    schedule = PolyLRScheduler(optimizer, cfg.epochs * steps, power=0.9, t_in_epochs=False,
                               lr_min=min(cfg.floor, cfg.lr))
    weights = {"mask": cfg.mask_weight, "feature": cfg.feature_weight, "text": cfg.text_weight}
    log = resume(student, optimizer, state, cfg, out) if state else []
    if teacher and cfg.targets == "once" and teacher.cache is None:
        teacher.cache_targets(samples)
    model = wrap_ddp(student)
    bar = tqdm(total=cfg.epochs * steps, initial=len(log) * steps, desc="student", unit="step")
    for epoch in range(len(log), cfg.epochs):
        started, total = time.time(), {}                     # of each loss, the mean over the epoch
        batches = [i for i in epoch_order(cfg.seed, epoch, N).split(cfg.batch) if len(i) >= WORLD]
        own = [i[RANK::WORLD].tolist() for i in batches]
        read = lambda i: read_example(samples[i], i, cfg, len(student.T))
        examples = read_ahead(read, itertools.chain(*own))
        prepare_batch = lambda i: training_batch(
            teacher, [*itertools.islice(examples, len(i))], cfg, device)
        student.train()
        # The next batch is made while the student steps, by one thread, since it draws random
        # numbers. Where CLIP sees every crop on a CPU it is made in between, on all cores.
        ahead = not teacher or teacher.cache or device.type == "cuda"
        ready = read_ahead(prepare_batch, own, 1, threads=1) if ahead else map(prepare_batch, own)
        for k, (whole, i, (x, label, f)) in enumerate(zip(batches, own, ready)):
            schedule.step_update(epoch * steps + k)
            share = len(i) * WORLD / len(whole)
            for name, loss in step(model, optimizer, x, label, f, weights, share).items():
                total[name] = total.get(name, 0) + loss * len(i) / N
            bar.update()
        speed = N / (time.time() - started)
        finish_epoch(student, optimizer, fixed, total, weights, speed, log, bar, out)
    bar.close()
    student.eval()
    torch.backends.cudnn.benchmark = False                               # from here on sizes change


# ==================================================================================================
# The method ends here. Everything below serves it.
# ==================================================================================================


# ========================================================================== 6 files and checkpoints

def read_example(sample, i, cfg, classes):
    """For a step: (i, image 3×H×W uint8, mask H×W or None, truth H×W or None).

    The mask is another method's, from the folder cfg.teacher; the truth is read for
    --ignore-gt-background alone. Both have the file's size, while the image has the recipe's.
    """
    mask = truth = None
    image = load_image(sample.image)
    if cfg.teacher not in METHODS:
        mask = load_label(Path(cfg.teacher) / f"{sample.name}.png", image.shape[1:], classes)
    if cfg.ignore_gt_background:
        truth = load_label(sample.label, image.shape[1:], classes, cfg.label_base)
    return i, resize_to_fit(image, cfg.size), mask, truth


def check_masks(folder, samples, classes):
    """Look at every mask of a folder before training. Raises UserError for the first bad one."""
    missing = [s.name for s in samples if not (folder / f"{s.name}.png").is_file()]
    if missing:
        raise UserError(f"{folder}: {len(missing)} of {len(samples)} training images have no mask; "
                        f"first {missing[0]}.png")
    fits = lambda s: load_label(folder / f"{s.name}.png", load_image(s.image).shape[1:], classes)
    for _ in tqdm(read_ahead(fits, samples), "checking masks", len(samples), False, unit="img"):
        pass


def make_student(cfg, segmenter):
    """The DeepLabV2 that a Config asks for, in the text space of the teacher's CLIP."""
    with torch.no_grad():
        R = segmenter.reference() if cfg.teacher == "reclip" else None
    student = DeepLabV2(cfg.backbone, segmenter.T, R, segmenter.scale, cfg.rates, cfg.width,
                        cfg.weights)
    return student.to(segmenter.device)


def load_student(state, device="cpu"):
    """The DeepLabV2 of a checkpoint, in eval mode. No CLIP is loaded."""
    config, weights = state["config"], state["student"]
    try:
        student = DeepLabV2(config["backbone"], weights["T"], rates=config["rates"],
                            width=config["width"])
        student.load_state_dict(weights)
    except (KeyError, RuntimeError, TypeError):
        raise UserError("the student's weights do not fit its settings; make it again with "
                        "`python distill.py`")
    return student.eval().to(device)


def resume(student, optimizer, state, cfg, out):
    """Take all of an interrupted run from its checkpoint; returns its log, one entry per epoch."""
    try:
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, RuntimeError, TypeError, ValueError):
        raise UserError(f"{out}/distill.partial.pt: does not fit its settings; leave out --resume")
    print(f"resuming after epoch {len(state['log'])} of {cfg.epochs}")
    return state["log"]


def finish_epoch(student, optimizer, fixed, total, weights, speed, log, bar, out):
    """Log an epoch, stop where the loss is not finite, and save what --resume needs."""
    if WORLD > 1:
        for part in total.values():
            distributed.all_reduce(part)
    total = {name: part.item() for name, part in total.items()}
    loss = sum(weights[name] * part for name, part in total.items())
    entry = {"epoch": len(log) + 1, "loss": loss, **total, "lr": optimizer.param_groups[0]["lr"]}
    if not math.isfinite(entry["loss"]):
        raise UserError(f"the loss is {entry['loss']} in epoch {entry['epoch']}; lower --lr "
                        f"(log: {out / 'log.jsonl'})")
    log.append({"stage": "distill"} | {k: round(v, 6) for k, v in entry.items()}
               | {"images_per_second": round(speed, 1)})
    bar.set_postfix(epoch=entry["epoch"], loss=f"{entry['loss']:.3f}")
    if RANK > 0:
        return
    path = out / "log.jsonl"
    before = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    before = [line for line in before if '"stage": "distill"' not in line]  # rectify.py's
    write_text(path, "\n".join(before + [json.dumps(entry) for entry in log]))
    save(out / "distill.partial.pt", fixed | {
        "student": student.state_dict(), "log": log, "optimizer": optimizer.state_dict()})


# ===================================================================================== 7 evaluation

@torch.no_grad()
def predict_student(student, images, cfg, classes, threshold=0.0):
    """Masks B×H×W uint8 of uint8 images B×3×H×W, as `decide` makes them.

    With cfg.tta the mean of the logits over flips and three scales.
    """
    images, size, maps = images.to(student.T.device), images.shape[-2:], []
    for factor in TTA_SCALES if cfg.tta else (1.0,):
        x = prepare(resize_to_fit(images, cfg.size, factor=factor).float() / 255)
        for mirror in (False, True) if cfg.tta else (False,):
            logits = student(x.flip(-1) if mirror else x)[0]
            maps.append(logits.flip(-1) if mirror else logits)
    grid = maps[0].shape[-2:]                                  # of the first scale, the image's own
    mean = torch.stack([F.interpolate(m, grid, mode="bilinear") for m in maps]).mean(0)
    return decide(mean, 1, grid, size, classes, threshold=threshold)


def measure(student, segmenter, cfg, val, out):
    """Measure CLIP, its rectification, MaskCLIP+ where it was run before, and the student, on val.

    Writes distill.json and the figures, prints the table. Returns the student's mIoU.
    """
    students, plus, started = {}, Path(cfg.out) / "maskclip/student.pt", time.time()
    if cfg.teacher != "maskclip" and plus.is_file():
        state = load_checkpoint(plus, "student")
        same = ("epochs", "batch", "lr", "backbone", "width")
        eyes = ("recipe", "clip", "pretrained", "normalization", "attention", "size")
        if (all(state["config"].get(k) == getattr(cfg, k) for k in same)
                and all(state.get("rectify", {}).get(k) == getattr(segmenter.cfg, k) for k in eyes)
                and state["names"] == segmenter.names and state.get("images") == segmenter.images):
            students["maskclip+"] = load_student(state, segmenter.device)
        else:
            print(f"{plus}: has other classes, images, CLIP or schedule than this student; "
                  "left out")
    students["student"] = student
    rectified, C, p = predictor(segmenter), len(segmenter.names), segmenter.cfg.threshold
    names, base = segmenter.classes, cfg.label_base
    predict = lambda images: rectified(images) | {
        name: predict_student(net, images, cfg, C, p) for name, net in students.items()}
    results, found, _ = evaluate(predict, val, names, base)
    report = {"results": results, "config": asdict(cfg), "versions": versions(),
              "seconds": {"evaluation": round(time.time() - started, 1)}}
    write_text(out / "distill.json", json.dumps(report, indent=1))
    save_figure(figure4(predict, val, names, base), out / "figure4.png")
    save_figure(figure5(predict, found["maskclip"], names, base), out / "figure5.png")
    print_table(results, names)
    return results["student"]["mIoU"]


# =========================================================================================== 8 main

def find_checkpoint(typed):
    """The rectify.pt to go on with: --out's, --dataset's, or the newest. Raises UserError."""
    if "eval" in typed:                          # MaskCLIP+ and others lie in a folder of their own
        if "out" in typed:
            raise UserError("--out: --eval measures in the student's own folder; leave out --out")
        home = Path(typed["eval"]).parent
        return (home if (home / "rectify.pt").is_file() else home.parent) / "rectify.pt"
    if not typed.keys() & {"out", "dataset"}:
        return newest("rectify.pt")
    path = Path(typed.get("out", f"runs/{typed.get('dataset')}")) / "rectify.pt"
    if not path.is_file():
        flags = "".join(f" {flag(k)} {typed[k]}" for k in ("dataset", "out") if k in typed)
        raise UserError(f"{path}: no such checkpoint; make it with `python rectify.py{flags}`")
    return path


def learn(cfg, segmenter, samples, out, state):
    """Train, or go on with the partial checkpoint `state`; rank 0 writes student.pt."""
    names, by_folder = segmenter.names, cfg.teacher not in METHODS
    if by_folder:
        check_masks(Path(cfg.teacher), samples, len(names))
        print(f"{cfg.teacher}: {len(samples)} masks, all sound; they have no feature-guided loss")
    if cfg.ignore_gt_background:
        if not all(sample.label for sample in samples):
            raise UserError("--ignore-gt-background: the training images have no ground truth")
        print("warning: --ignore-gt-background learns only where GROUND TRUTH is foreground. That "
              "is the published protocol, and it is not unsupervised")
    teacher = None if by_folder else Teacher(segmenter, cfg)
    with rank_zero_first():                               # the backbone's weights may be a download
        student = make_student(cfg, segmenter)
    size = sum(p.numel() for p in student.parameters()) / 1e6
    print(f"{cfg.teacher} teaches {cfg.backbone}, {size:.2f} M parameters: {len(samples)} images, "
          f"{len(names)} classes, {segmenter.device}")
    fixed = {"config": asdict(cfg), "names": names, "background": segmenter.background,
             "rectify": asdict(segmenter.cfg), "taught_by": digest(segmenter.rectifier),
             "images": segmenter.images}
    train(student, teacher, samples, cfg, fixed, out, state)
    state = fixed | {"student": student.state_dict(), "mIoU": None}
    if RANK == 0:
        save(out / "student.pt", state)
        remove(out, EXPORTED, "student")
        (out / "distill.partial.pt").unlink()
    return student, state


def place_of(cfg, segmenter):
    """The folder of a student: the run's, and in it one for another teacher than the run's."""
    other = cfg.teacher != segmenter.cfg.method
    return Path(cfg.out) / (Path(cfg.teacher).resolve().name if other else "")


def open_student(segmenter, typed):
    """(Config, folder, checkpoint or None) of the student to measure, resume or begin."""
    cfg = configure(segmenter.cfg, **typed)
    kept = [place_of(cfg, segmenter) / name for name in ("distill.partial.pt", "student.pt")]
    kept = [path for path in kept if path.is_file()] if cfg.resume else []
    kept = [Path(cfg.eval)] if cfg.eval else kept
    if not kept:
        return cfg, place_of(cfg, segmenter), None
    state = load_checkpoint(kept[0], "student")
    if (state["names"], state["taught_by"]) != (segmenter.names, digest(segmenter.rectifier)):
        raise UserError(f"{kept[0]}: has another teacher than {cfg.out}/rectify.pt; leave out "
                        "--resume, or distil again")
    cfg = configure(segmenter.cfg, state["config"], **typed)
    return cfg, place_of(cfg, segmenter), state


def main(argv=None):
    started, typed = time.time(), command_line(Config, __doc__, RECIPES, argv)
    checkpoint = find_checkpoint(typed)
    print(f"distilling {checkpoint}")
    with rank_zero_first():
        chosen = {"device": typed["device"]} if "device" in typed else {}
        segmenter = load_segmenter(checkpoint, out=str(checkpoint.parent), **chosen)
        folder = dataset_folder(segmenter.cfg)
    samples, val = splits(folder)
    segmenter.images = list_digest(samples)
    cfg, out, state = open_student(segmenter, typed)
    if cfg.resume and state and state.get("images") != segmenter.images:
        raise UserError(f"{folder}: its list of training images changed since {out} was "
                        "trained; leave out --resume")
    torch.manual_seed(cfg.seed)
    with output_folder(out):
        path = Path(cfg.eval or out / "student.pt")
        if state and (cfg.eval or "optimizer" not in state):
            student = load_student(state, segmenter.device)
            kind = "an interrupted" if "optimizer" in state else "a complete"
            print(f"measuring {kind} student, {path}")
        else:
            student, state = learn(cfg, segmenter, samples, out, state)
        if RANK > 0:
            return                                                      # rank 0 writes and measures
        if val:
            mIoU = measure(student, segmenter, cfg, val, out)
            if state.get("mIoU", 0) is None and not cfg.tta:
                save(path, state | {"mIoU": mIoU})
        else:
            print(f"no labelled validation images in {folder}: nothing to measure")
        print(f"{time.time() - started:.0f} s in all. Wrote {out}/: {list_files(out)}")


if __name__ == "__main__":
    run(main)
