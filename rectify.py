"""Rectify the bias of CLIP for unsupervised semantic segmentation.

ReCLIP (CVPR 2024) and ReCLIP++ (IJCV 2025): unlabelled images and a list of class names go in,
masks come out. CLIP's dense predictions are biased: CLIP prefers some classes (a cow becomes
"horse") and fails far from the image's centre. This script learns both biases from the images
alone, subtracts them, and measures what that gains.

    python rectify.py                     # Emoji VOC ships with the repository: no GPU, no internet
    python rectify.py --method reclip      # the CVPR paper's bias model instead of the journal's
    python rectify.py --dataset voc        # PASCAL VOC 2012 with OpenAI's ViT-B/16; or context, ade
    python rectify.py --dataset voc --data photos --names names.txt     # images of your own
    python rectify.py --image photo.jpg --names "dog, horse"            # one image, any words
    torchrun --nproc-per-node 4 rectify.py --dataset ade                # several GPUs

The first two give, in mIoU over seeds 0, 1, 2: MaskCLIP 53.6, ReCLIP 60.1 ± 0.3, ReCLIP++
72.0 ± 0.3, each in about 80 s on 2 CPU cores.

Read it from top to bottom: 1 recipes and configuration, 2 CLIP, 3 the method, 4 training,
5 prediction. Below the ruler stands what serves the method: 6 metric, 7 datasets, 8 figures,
9 loading CLIP, 10 checkpoints, 11 processes and memory, 12 command line and main.

The letters are the paper's: f dense feature, T text feature, V learnable prompt, R Reference
feature, PE positional embedding, P space-preference bias, B bias logit map, M mask, y image-level
hypothesis. Shapes: N images, B of them in a batch, K views of each; C classes; D dimensions of f,
T and R, d of a token in its tower; L tokens of the prompt, n of a class name; h×w patches, H×W
pixels.
"""
import argparse
import collections
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import shutil
import sys
import tarfile
import time
import traceback
import typing
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import timedelta
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import distributed, nn
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
# Rank, world size and local rank from torchrun; 0, 1, 0 without it.
RANK, WORLD, LOCAL = (int(os.environ.get(name, default)) for name, default in
                      (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
if RANK > 0:                                            # elsewhere TQDM_DISABLE decides
    tqdm = functools.partial(tqdm, disable=True)


class UserError(Exception):
    """Something that the person at the keyboard can mend: shown as one line, exit code 2."""


# ====================================================================== 1 recipes and configuration

# One row per dataset: Table 12 and the authors' released configurations for the real ones, what
# measures best on Emoji VOC for itself. Under a method's name stands what differs for it.
PAPER = dict(
    method="reclip", clip="ViT-B-16-quickgelu", pretrained="openai", normalization="clip",
    jitter=(0.5, 2.0), hypothesis="threshold", view="center", norm="frobenius", prompt="shared",
    pool="grid", start="authors", optimizer="sgd", lr_encoder=1e-4, weight_decay=5e-4, views=4,
    ring=40)
RECIPES = {
    "emoji": {
        **dict(method="reclip++", clip="local-dir:tests/emoji/clip", pretrained="",
               normalization="clip", size=(2048, 192), jitter=(0.8, 1.25), crop=192,
               hypothesis="softmax", view="whole", tile=96, t=0.1, top_k=1,
               norm="frobenius", prompt="per-class", pool="grid", start="ours",
               optimizer="adam", lr=1e-2, lr_encoder=1e-4, weight_decay=0.0,
               epochs=8, batch=16, views=2, ring=10),
        "reclip": dict(alpha=100.0, lr_conv=1e-4, sharpness=100.0, denoise=0.0),
        "reclip++": dict(alpha=100.0, lr_conv=1e-3, sharpness=10.0, denoise=0.0)},
    # lr: the released 0.01 belongs to batch 1, here scaled to the batch. tile: a sixth of the crop.
    "voc": {
        **dict(PAPER, size=(2048, 512), crop=520, tile=86, t=0.23, top_k=2, epochs=200, batch=12,
               lr=0.12, lr_conv=0.12),
        "reclip": dict(alpha=1000.0, sharpness=100.0, denoise=0.5),
        "reclip++": dict(alpha=100.0, sharpness=10.0, denoise=1.0)},
    "context": {
        **dict(PAPER, size=(520, 520), crop=480, tile=80, t=0.20, top_k=6, epochs=400, batch=12,
               lr=0.12, lr_conv=0.12),
        "reclip": dict(alpha=1000.0, sharpness=100.0, denoise=0.6),
        "reclip++": dict(alpha=100.0, sharpness=10.0, denoise=0.85)},
    "ade": {
        **dict(PAPER, size=(2048, 512), crop=512, tile=85, t=0.21, top_k=5, epochs=300, batch=8,
               lr=0.08, lr_conv=0.08),
        "reclip": dict(alpha=1000.0, sharpness=100.0, denoise=0.5),
        "reclip++": dict(alpha=100.0, sharpness=10.0, denoise=0.5)},
}
# --recipe 2024: the regime of the CVPR paper's numbers. OpenAI's weights, trained with QuickGELU,
# are computed with GELU on images normalized by ImageNet's mean and std. The hypothesis alone comes
# from CLIP as it was trained.
REGIME_2024 = dict(clip="ViT-B-16", normalization="imagenet")
ATTENTION = ["maskclip", "sclip", "clearclip", "naclip"]
COLLAPSED = 0.5                         # an `agreement` above it is a collapse; sound runs have 0.1


def option(help, choices=None, default=MISSING, free=False):
    """A field of Config: its sentence in --help, its choices, its default (else the recipe gives
    it).

    free: may differ between a checkpoint and a later use of it.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "free": free})


@dataclass(kw_only=True)
class Config:
    """All that a run depends on. `configure` makes it complete; every checkpoint holds it."""
    dataset: str = option("recipe, and the data unless --data is given", list(RECIPES))
    recipe: str = option("2024: the CVPR paper's regime, GELU and ImageNet's mean", ["2024"], "")
    root: str = option("folder that holds the datasets", default="data", free=True)
    data: str = option("a folder of your own: VOC's layout, or just images", None, "", free=True)
    names: str = option("class names: a file, one a line, or words and commas", None, "", free=True)
    out: str = option("folder of the run (default runs/<dataset>)", free=True)
    method: str = option("bias model; maskclip: none", ["maskclip", "reclip", "reclip++"])
    clip: str = option("open_clip's name of the model, or local-dir:FOLDER")
    pretrained: str = option("open_clip's tag of the weights, or a file")
    normalization: str = option("mean and std of images", ["clip", "imagenet"])
    attention: str = option("of CLIP's last block", ATTENTION, "maskclip")
    size: tuple[int, int] = option("longest and shortest side of an image at most, px")
    jitter: tuple[float, float] = option("range of the random factor on that size in training")
    crop: int = option("side of a training crop, px")
    hypothesis: str = option("how images get classes", ["threshold", "softmax", "windows"])
    view: str = option("what the hypothesis sees of an image", ["center", "whole"])
    tile: int = option("side of the sliding tile of --hypothesis windows, px")
    t: float = option("threshold of the hypothesis, on the cosine or its softmax")
    top_k: int = option("classes of an image in which none reaches t")
    norm: str = option("length of R: of the matrix, or of each row", ["frobenius", "rows"])
    prompt: str = option("one for all classes, or one each", ["shared", "per-class"])
    space: str = option("the space-preference bias P", ["on", "off"], "on")
    pool: str = option("mean of masked features over grid or mask", ["grid", "mask"])
    start: str = option("V, P at first: ours random, 0; authors word 0, random",
                        ["ours", "authors"])
    alpha: float = option("scale of the logits before Gumbel-Softmax")
    sharpness: float = option("scale of the logits in prompt denoising", free=True)
    denoise: float = option("drop classes nowhere more probable than this; 0: off", free=True)
    optimizer: str = option("optimizer", ["sgd", "adam"])
    lr: float = option("learning rate of the prompt")
    lr_conv: float = option("learning rate of the convolutions of P and of the decoder")
    lr_encoder: float = option("learning rate of CLIP's image encoder with --finetune")
    weight_decay: float = option("weight decay")
    epochs: int = option("passes over the training images")
    batch: int = option("images in a training step")
    views: int = option("augmented views of an image, computed once; an epoch uses one of them")
    finetune: bool = option("train CLIP's image encoder too (Table 8)", default=False)
    seed: int = option("seed of everything random", default=0)
    ring: int = option("width of the rings of Fig. 1(a), px", free=True)
    device: str = option("where to compute", ["auto", "cpu", "cuda"], "auto", free=True)
    precision: str = option("of CLIP's image tower; auto: bf16 on a GPU that has it",
                            ["auto", "fp32", "bf16"], "auto", free=True)
    resume: bool = option("go on with the interrupted run in --out", None, False, free=True)
    eval: str = option("measure this checkpoint instead of training", None, "", free=True)
    image: str = option("segment this image with the newest run, or --out's", None, "", free=True)


def configure(trained=None, **typed):
    """The complete Config: what was typed, over the method's settings, over the dataset's.

    trained: the configuration in a checkpoint, which then takes the recipe's place; what was typed
    must agree with it, but in the free fields. Raises UserError.
    """
    if trained is None:
        dataset = typed.get("dataset", "emoji")
        row = RECIPES[dataset]
        of_method = row.get(typed.get("method", row["method"]), row["reclip"])  # maskclip: either's
        trained = {k: v for k, v in row.items() if k not in ("reclip", "reclip++")} | of_method
        trained |= REGIME_2024 if typed.get("recipe") else {}
        trained |= {"pretrained": ""} if "clip" in typed else {}       # another CLIP, other weights
        place = Path(typed["data"]).resolve().name if typed.get("data") else dataset
        trained |= {"dataset": dataset, "out": f"runs/{place}"}
    else:
        for f in fields(Config):
            was, now = trained[f.name], typed.get(f.name, trained[f.name])
            if now != was and not f.metadata["free"]:
                raise UserError(f"{flag(f.name)} {now}: the checkpoint was trained with {was}; "
                                f"leave out {flag(f.name)}, or train anew")
    cfg = Config(**trained | typed)
    for bad, message in [
            (not -1 < cfg.t < 1, f"--t {cfg.t}: a cosine's threshold lies in (-1, 1)"),
            (min(cfg.epochs, cfg.batch, cfg.views, cfg.top_k, cfg.crop, cfg.tile, *cfg.size) < 1,
             "--epochs, --batch, --views, --top-k, --crop, --tile and --size start at 1"),
            (not (0 < cfg.lr < 1e6 and 0 < cfg.lr_conv < 1e6 and 0 < cfg.alpha < math.inf),
             "--lr, --lr-conv and --alpha must be positive, and the rates below a million"),
            (not 0 <= cfg.seed < 2 ** 32, f"--seed {cfg.seed}: from 0 to 2^32 - 1"),
            (cfg.recipe and cfg.dataset == "emoji", "--recipe 2024 is not for Emoji VOC"),
            (cfg.recipe and cfg.clip != REGIME_2024["clip"],
             f"--clip {cfg.clip}: --recipe 2024 means {REGIME_2024['clip']}; leave out --clip"),
            (":" not in cfg.clip and not cfg.pretrained,
             f"--clip {cfg.clip} needs --pretrained: open_clip's tag, or a file"),
            (cfg.data and not cfg.names, "--data needs --names: a file, one class name a line")]:
        if bad:
            raise UserError(message)
    return cfg


# =========================================================================================== 2 CLIP

def normalize(clip, images):
    """uint8 B×3×H×W to what CLIP takes: (x / 255 - mean) / std."""
    return (images.float() / 255 - clip.mean) / clip.std


def positional_embedding(clip, grid):
    """PE: 1×d×h×w, CLIP's positional embedding without CLS, bicubic-resized to the grid (h, w)."""
    visual = clip.visual
    pe = visual.positional_embedding[1:].T.reshape(1, -1, *visual.grid_size)        # 1 d h w
    return pe if grid == tuple(visual.grid_size) else F.interpolate(pe, grid, mode="bicubic")


def last_block(block, x, grid, attention):
    """CLIP's last transformer block, B×(1+hw)×d to the same, with an attention made for dense
    prediction.

    "stock": CLIP's own. maskclip: each token attends to itself alone (Zhou 2022). sclip: q·q + k·k
    (Wang 2024). clearclip: q·q, no residual, no MLP (Lan 2024). naclip: k·k and a Gaussian around
    each patch, likewise (Hajimiri 2025).
    """
    if attention == "stock":
        return block(x)
    attn = block.attn
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)           # B 1+hw 3d
    q, k, v = qkv.chunk(3, dim=-1)                                                  # B 1+hw d
    if attention != "maskclip":
        q, k, v = (y.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        scale = q.size(-1) ** -0.5                                  # q, k, v: B heads 1+hw d/heads
        if attention == "sclip":
            A = (q @ q.mT * scale).softmax(-1) + (k @ k.mT * scale).softmax(-1)
        elif attention == "clearclip":
            A = (q @ q.mT * scale).softmax(-1)
        else:
            yx = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in grid))    # hw 2
            distance = torch.cdist(yx.float(), yx.float())                              # hw hw
            near = torch.exp(-distance.square() / (2 * 5 ** 2))         # std 5 patches
            A = (k @ k.mT * scale + F.pad(near, (1, 0, 1, 0))).softmax(-1)
        v = (A @ v).transpose(1, 2).flatten(2)                                          # B 1+hw d
    v = block.ls_1(attn.out_proj(v))                    # ls: LayerScale, the identity in most CLIPs
    if attention in ("clearclip", "naclip"):
        return v
    v = v + x
    return v + block.ls_2(block.mlp(block.ln_2(v)))


def encode_image(clip, x, attention):
    """CLIP's image tower for images of any size. x: B×3×H×W, normalized, padded here to whole
    patches.

    attention: of the last block. "stock" gives CLIP's own image feature, B×D; the others the dense
    feature f, B×D×h×w. Both of unit norm.
    """
    visual = clip.visual
    p_h, p_w = visual.patch_size
    x = F.pad(x, (0, -x.size(-1) % p_w, 0, -x.size(-2) % p_h))
    x = visual.conv1(x)                                                                 # B d h w
    grid = tuple(x.shape[-2:])
    x = (x + positional_embedding(clip, grid)).flatten(2).mT                            # B hw d
    cls = visual.class_embedding + visual.positional_embedding[0]
    x = visual.ln_pre(torch.cat([cls.expand(len(x), 1, -1), x], dim=1))                 # B 1+hw d
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    x = last_block(visual.transformer.resblocks[-1], x, grid, attention)
    if attention == "stock":
        return F.normalize((visual._pool(x)[0] @ visual.proj).float(), dim=-1)          # B D
    f = (visual.ln_post(x[:, 1:]) @ visual.proj).float()                # B hw D; normalized in fp32
    return F.normalize(f, dim=-1).mT.unflatten(-1, grid)                                # B D h w


def templates():
    """The 85 sentences that T is averaged over: OpenAI's 80 for ImageNet and five of a scene."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES
    scene = ["there is a {} in the scene.", "there is the {} in the scene.",
             "this is a {} in the scene.", "this is the {} in the scene.",
             "this is one {} in the scene."]
    return [*OPENAI_IMAGENET_TEMPLATES, *(sentence.format for sentence in scene)]


def text_features(clip, tokenizer, names):
    """T: C×D, unit rows. Each name in 85 sentences, encoded, averaged, normalized."""
    from open_clip import build_zero_shot_classifier
    device = clip.logit_scale.device
    return build_zero_shot_classifier(clip, tokenizer, names, templates(), device=device).T


# ===================================================================================== 3 the method

def multi_label(s, t, top_k):
    """The hypothesis y: B×C bool, y_c = [s_c ≥ t] (Sec. 3.4); where no class reaches t, the top K.
    s: B×C.
    """
    top = F.one_hot(s.topk(min(top_k, s.size(1)), dim=1).indices, s.size(1)).amax(1).bool()
    return torch.where((s >= t).any(1, keepdim=True), s >= t, top)                  # B C


@torch.no_grad()
def hypothesize(segmenter, images):
    """y: B×C bool, the classes that CLIP believes to see; of uint8 images B×3×H×W.

    threshold: on the cosine of CLIP's image feature with T. softmax (ours): on the softmax of scale
    · cosine. windows (ReCLIP++): a tile slides over the image at half its side; y is the union of
    each tile's best class. The image is CLIP's center crop for the real datasets; Emoji VOC's is
    seen whole, since objects stand at the edges.
    """
    cfg, (clip, T) = segmenter.cfg, segmenter.stock
    images, side = images.to(segmenter.device), clip.visual.image_size[0]

    def scores(x):
        return segmenter.encode(clip, x, "stock") @ T.T                                 # B C

    if cfg.hypothesis == "windows":
        x = resize_to_fit(images, cfg.size)
        tops, lefts = ([*range(0, n - cfg.tile, cfg.tile // 2), max(n - cfg.tile, 0)]
                       for n in x.shape[-2:])
        tiles = [x[..., i:i + cfg.tile, j:j + cfg.tile] for i in tops for j in lefts]
        best = [scores(v2.functional.resize(tile, [side, side])).argmax(1) for tile in tiles]
        return torch.stack([F.one_hot(c, len(T)) for c in best]).amax(0).bool()
    x = resize_to_fit(images, (10 ** 6, side), v2.InterpolationMode.BICUBIC)        # as CLIP's own
    s = scores(x if cfg.view == "whole" else v2.functional.center_crop(x, side))
    s = (segmenter.scale * s).softmax(1) if cfg.hypothesis == "softmax" else s
    return multi_label(s, cfg.t, cfg.top_k)


def reference_features(clip, V, tokens):
    """The Reference features before `set_norm`: C×D, the prompt [SOS][v1..vL][name][EOT] through
    CLIP's text encoder.

    V: L×d, learnable tokens shared by all classes, or C×L×d. tokens: C×n, the names and EOT.
    Differentiable in V.
    """
    text = clip.text
    x, place, mask = pack_prompts(text, V, tokens)                             # prompts S d, S, S S
    x = text.ln_final(text.transformer(x + text.positional_embedding[place], attn_mask=mask))
    x = x[:, 1 + V.size(-2):].reshape(*tokens.shape, -1)                    # C n d, the names alone
    x = x[torch.arange(len(x)), tokens.argmax(1)]                   # C d, at EOT: the largest token
    return x @ text.text_projection                                                 # C D


def set_norm(R, norm):
    """R: C×D with unit Frobenius norm (the authors' code; a row's length falls as 1/√C) or with
    unit rows.
    """
    return R / R.norm() if norm == "frobenius" else F.normalize(R, dim=1)


def similarity(f, T):
    """f·Tᵀ at every patch: B×D×h×w and C×D to B×C×h×w, cosines in [-1, 1] where both are unit."""
    return torch.einsum("bdhw,cd->bchw", f, T)


class ReCLIP(nn.Module):
    """Rectified logits f·Tᵀ − B with B = f·Rᵀ + P, the class- and the space-preference bias (CVPR
    2024).

    P = g(PE): C×h×w. forward(f: B×D×h×w, T: C×D, R: C×D, PE: 1×d×h×w) -> B×C×h×w.
    """

    def __init__(self, V, d, D, C, space, start):
        super().__init__()
        self.V, self.space = nn.Parameter(V), space
        self.g = nn.Sequential(       # widths of the released checkpoints; the code has 512 and 256
            nn.Conv2d(d, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
            nn.Conv2d(256, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, C, 3, padding=1, bias=False), nn.BatchNorm2d(C), nn.ReLU())
        for m in self.g[::3]:
            nn.init.kaiming_normal_(m.weight, mode="fan_out")
        if start == "ours":               # P near 0, where f·T decides; at 0 the ReLU would be dead
            nn.init.constant_(self.g[7].weight, 0.01)

    def forward(self, f, T, R, PE):
        P = self.g(PE)[0] if self.space else 0                                          # C h w
        B = similarity(f, R) + P                                                        # B C h w
        return similarity(f, T) - B


class ReCLIPpp(nn.Module):
    """Rectified logits decoder([f; f·Tᵀ − B]) with B = P·Rᵀ, the same for every image (IJCV 2025).

    P = conv1×1(PE): D×h×w. forward(f: B×D×h×w, T: C×D, R: C×D, PE: 1×d×h×w) -> B×C×h×w.
    """

    def __init__(self, V, d, D, C, space, start):
        super().__init__()
        self.V, self.space = nn.Parameter(V), space
        self.g = nn.Conv2d(d, D, 1)
        self.decoder = nn.Sequential(
            nn.Conv2d(D + C, C, 5, padding=2, bias=False), nn.BatchNorm2d(C))
        nn.init.kaiming_normal_(self.decoder[0].weight, mode="fan_out")
        if start == "ours":                             # P = 0: f·T decides
            nn.init.zeros_(self.g.weight)
            nn.init.zeros_(self.g.bias)

    def forward(self, f, T, R, PE):
        P = self.g(PE)[0]                                                               # D h w
        B = torch.einsum("dhw,cd->chw", P, R) if self.space else 0                      # C h w
        return self.decoder(torch.cat([f, similarity(f, T) - B], dim=1))


def gumbel_mask(logits, alpha):
    """M = GumbelSoftmax(alpha · logits, τ = 1, hard): B×C×h×w, one-hot over the classes at every
    patch, differentiable.
    """
    return F.gumbel_softmax(alpha * logits, tau=1, hard=True, dim=1)


def contrastive_loss(M, f, T, y, scale, valid, pool):
    """CE(scale · z_c·Tᵀ, c) with z_c = pool(M_c ⊙ f), averaged over the classes of y, then over the
    batch.

    M: B×C×h×w masks. f: B×D×h×w. T: C×D. y: B×C bool. scale: CLIP's exp(logit_scale). valid: B×h×w
    bool, false where the crop is padding. pool: "grid" divides by the number of valid patches,
    "mask" by the mask's area.
    """
    M = M * valid[:, None]
    z = torch.einsum("bchw,bdhw->bcd", M, f)                                            # B C D
    grid, mask = valid.sum((1, 2)).view(-1, 1, 1), M.sum((2, 3))[..., None].clamp(min=1)
    logits = scale * (z / (mask if pool == "mask" else grid)) @ T.T                     # B C C
    own = -logits.log_softmax(-1).diagonal(dim1=1, dim2=2)                              # B C
    return ((own * y).sum(1) / y.sum(1).clamp(min=1)).mean()


class Segmenter(nn.Module):
    """CLIP, its text features T, and the rectifier (ReCLIP or ReCLIPpp), which is all that is
    learned.

    forward(x), a training step's: dense features B×D×h×w (with finetune uint8 views B×3×H×W) ->
    rectified logits B×C×h×w and f. distill.py uses it as the teacher.
    """

    def __init__(self, cfg, names, device, T=None):
        super().__init__()
        self.cfg, self.names, self.device = cfg, names, device
        self.clip, self.tokenizer = load_clip(cfg, device)
        self.frozen = copy.deepcopy(self.clip) if cfg.finetune else self.clip           # MaskCLIP's
        self.tokens, L = name_tokens(self.clip, self.tokenizer, names)
        self.T = text_features(self.clip, self.tokenizer, names) if T is None else T.to(device)
        self.scale = self.clip.logit_scale.exp().item()
        self.rectifier = None
        if cfg.method != "maskclip":
            words = self.clip.text.token_embedding.weight                               # 49408 d
            V = 0.02 * torch.randn(*[len(names)] * (cfg.prompt == "per-class"), L, words.size(1))
            if cfg.start == "authors":
                V[:] = words[0]
            model = ReCLIP if cfg.method == "reclip" else ReCLIPpp
            d, (C, D) = self.clip.visual.conv1.out_channels, self.T.shape
            self.rectifier = model(V, d, D, C, cfg.space == "on", cfg.start).to(device)

    @functools.cached_property
    def stock(self):
        """(CLIP, T) of the hypothesis: CLIP as its weights were trained, in either regime."""
        if not self.cfg.recipe:
            return self.frozen, self.T
        name = RECIPES[self.cfg.dataset]["clip"]
        cfg = replace(self.cfg, recipe="", clip=name, normalization="clip")
        clip, tokenizer = load_clip(cfg, self.device)
        return clip, text_features(clip, tokenizer, self.names)

    def encode(self, clip, images, attention):
        """encode_image of uint8 images B×3×H×W, on the device and in the precision that the
        configuration asks for.
        """
        with in_bf16(self.device, self.cfg.precision):
            return encode_image(clip, normalize(clip, images.to(self.device)), attention)

    def features(self, images):
        """f: B×D×h×w of uint8 images B×3×H×W."""
        return self.encode(self.clip, images, self.cfg.attention)

    def reference(self):
        """R: C×D, the Reference feature of each class."""
        return set_norm(reference_features(self.clip, self.rectifier.V, self.tokens), self.cfg.norm)

    def rectified(self, f, R):
        """Rectified logits B×C×h×w of dense features f: B×D×h×w."""
        return self.rectifier(f, self.T, R, positional_embedding(self.clip, tuple(f.shape[-2:])))

    def forward(self, x):
        f = self.features(x) if self.cfg.finetune else x.float()
        return self.rectified(f, self.reference()), f


# ======================================================================================= 4 training

class PhotometricDistort(v2.RandomPhotometricDistort):
    """torchvision's, but channels change places without an index from the host, for which a GPU
    would wait.
    """

    def transform(self, image, params):
        image = super().transform(image, params | {"channel_permutation": None})
        order = params["channel_permutation"]
        return image if order is None else torch.stack([image[c] for c in order.tolist()])


def augment(image, cfg):
    """A random view of an image 3×H×W: resized, flipped, colours distorted, cropped; a small one is
    padded bottom right.

    Returns (3×crop×crop uint8, the (height, width) in it that is not padding). The authors redraw a
    crop until no ground-truth class fills three quarters of it; ours never asks.
    """
    (low, high), (factor, mirror, *corner) = cfg.jitter, torch.rand(4).tolist()
    image = resize_to_fit(image, cfg.size, factor=low + (high - low) * factor)
    if mirror < 0.5:
        image = image.flip(-1)
    image = PhotometricDistort()(image)
    top, left = (int(u * (max(n - cfg.crop, 0) + 1)) for u, n in zip(corner, image.shape[1:]))
    image = image[:, top:top + cfg.crop, left:left + cfg.crop]
    height, width = image.shape[1:]
    return F.pad(image, (0, cfg.crop - width, 0, cfg.crop - height)), (height, width)


@torch.no_grad()
def training_data(segmenter, samples):
    """All that is frozen, computed once: x, valid, y.

    x: K×N×D×h×w half, the dense features f of K augmented views of each image (with finetune the
    views themselves, K×N×3×crop×crop uint8). valid: K×N×h×w bool, the patches that are not padding.
    y: N×C bool, the hypothesis. A view depends on the seed and its numbers alone. Of several
    processes each computes every WORLD-th image. Cost: K·N passes of CLIP, and N for y (windows:
    one a tile); K·N·D·h·w·2 bytes, where `allocate` finds room.
    """
    cfg, device = segmenter.cfg, segmenter.device
    numbers, samples = range(RANK, len(samples), WORLD), samples[RANK::WORLD]
    K, N = cfg.views, len(samples)
    first = torch.arange(0, cfg.crop, segmenter.clip.visual.patch_size[0])    # pixel of every patch
    h = len(first)
    shape = (3, cfg.crop, cfg.crop) if cfg.finetune else (segmenter.T.size(1), h, h)
    x = allocate((K, N, *shape), torch.uint8 if cfg.finetune else torch.half, device, Path(cfg.out))
    valid = torch.empty(K, N, h, h, dtype=torch.bool, device=x.device)

    def view(image, n, k):
        torch.manual_seed(int(np.random.SeedSequence([cfg.seed, n, k]).generate_state(1)[0]))
        return augment(image, cfg)

    images = read_ahead(lambda sample: load_image(sample.image), samples)
    for start in tqdm(range(0, N, 32), "dense features", leave=False):
        group = [image.to(device) for image in itertools.islice(images, 32)]
        rows = slice(start, start + len(group))
        for k in range(K):
            crops, extents = zip(*(view(image, n, k) for image, n in zip(group, numbers[rows])))
            height, width = torch.tensor(extents).T[..., None]                          # B 1, B 1
            valid[k, rows] = (first < height)[:, :, None] & (first < width)[:, None]
            crops = torch.stack(crops)
            x[k, rows] = crops if cfg.finetune else segmenter.features(crops).half()
    return x, valid, hypotheses(segmenter, samples).to(x.device)


def make_optimizer(segmenter):
    """(optimizer, its poly schedule per epoch): one learning rate for the prompt, one for the
    convolutions.
    """
    cfg, rectifier = segmenter.cfg, segmenter.rectifier
    convs = [p for p in rectifier.parameters() if p is not rectifier.V]
    groups = [{"params": [rectifier.V], "lr": cfg.lr}, {"params": convs, "lr": cfg.lr_conv}]
    if cfg.finetune:
        encoder = segmenter.clip.visual.requires_grad_()
        groups.append({"params": list(encoder.parameters()), "lr": cfg.lr_encoder})
    if cfg.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=cfg.weight_decay)
    else:
        optimizer = torch.optim.Adam(groups, weight_decay=cfg.weight_decay)
    return optimizer, torch.optim.lr_scheduler.PolynomialLR(optimizer, cfg.epochs, power=0.9)


def agreement(masks):
    """How often two images have the same class at the same patch, from 1/C to 1: at 1 the masks
    ignore the images.

    masks: C×h×w, the masks M of all images, summed.
    """
    count = masks.sum(0)                                                                # h w
    same = (masks / count.clamp(min=1)).square().sum(0)                                 # h w
    return ((same * count).sum() / count.sum()).item()


def train(segmenter, data, N, out, state=None):
    """Learn the rectifier from hypotheses alone. Writes a line per epoch to out/log.jsonl, and a
    checkpoint to resume from.

    data: x, valid, y of `training_data`, computed from N images. An epoch goes through one view of
    every image. Of several processes each takes its own images out of every batch. state: the
    checkpoint of an interrupted run to go on with.
    """
    cfg, device, (x, valid, y) = segmenter.cfg, segmenter.device, data
    steps = math.ceil(N / cfg.batch)
    optimizer, schedule = make_optimizer(segmenter)
    log = resume(segmenter, optimizer, schedule, state) if state else []
    model = wrap_ddp(segmenter, find_unused_parameters=cfg.space == "off" or cfg.finetune)
    bar = tqdm(total=cfg.epochs * steps, initial=len(log) * steps, desc=cfg.method, unit="step")
    for epoch in range(len(log), cfg.epochs):
        k, losses, masks = epoch % cfg.views, 0, 0
        segmenter.rectifier.train()
        for i, size, weight in rank_batches(epoch_order(cfg.seed, epoch, N), cfg.batch, x.device):
            present, inside = y[i].to(device), valid[k, i].to(device)               # B C, B h w
            logits, f = model(x[k, i].to(device))                                 # B C h w, B D h w
            M = gumbel_mask(logits, cfg.alpha)                                      # B C h w
            loss = contrastive_loss(M, f, segmenter.T, present, segmenter.scale, inside, cfg.pool)
            optimizer.zero_grad()
            (weight * loss).backward()
            optimizer.step()
            losses += weight * size / N * loss.detach()
            masks += (M.detach() * inside[:, None]).sum(0)                              # C h w
            bar.update()
        finish_epoch(segmenter, optimizer, schedule, losses, masks, log, bar, out)
    bar.close()
    segmenter.rectifier.eval()
    segmenter.clip.requires_grad_(False)


# ===================================================================================== 5 prediction

def denoise(logits, sharpness, least):
    """Prompt denoising: a class whose best probability softmax(sharpness · logits) in an image is
    below `least` leaves it.

    logits: B×C×h×w. Returns them with -1e4 for those classes, since -inf becomes NaN in
    interpolation (0 · inf). Where no class is left all stay (in the authors' code argmax falls to
    class 0).
    """
    if not least:
        return logits
    gone = (sharpness * logits).softmax(1).amax((2, 3), keepdim=True) < least           # B C 1 1
    return logits.masked_fill(gone & ~gone.all(1, keepdim=True), -1e4)


def upsample(logits, patch, resized, original):
    """Grid logits B×C×h×w to the resized image's size (padding cut off), then to the original's:
    bilinear, twice.
    """
    h, w = logits.shape[-2:]
    logits = F.interpolate(logits, (h * patch, w * patch), mode="bilinear")
    return F.interpolate(logits[..., :resized[0], :resized[1]], original, mode="bilinear")


@torch.no_grad()
def predictor(segmenter):
    """The function from uint8 images B×3×H×W to masks: {"maskclip": B×H×W, and the method's own}. R
    is computed once.
    """
    cfg, patch = segmenter.cfg, segmenter.clip.visual.patch_size[0]
    R = segmenter.reference() if segmenter.rectifier else None

    @torch.no_grad()
    def predict(images):
        x = resize_to_fit(images.to(segmenter.device), cfg.size)
        f = segmenter.features(x)
        baseline = segmenter.encode(segmenter.frozen, x, cfg.attention) if cfg.finetune else f
        logits = {"maskclip": similarity(baseline, segmenter.T)}
        if segmenter.rectifier:
            logits[cfg.method] = denoise(segmenter.rectified(f, R), cfg.sharpness, cfg.denoise)
        return {name: upsample(l, patch, x.shape[-2:], images.shape[-2:]).argmax(1)
                for name, l in logits.items()}

    return predict


@torch.no_grad()
def rectify_words(segmenter, f, words):
    """(T, rectified logits B×C×h×w) of any words, for dense features f: B×D×h×w.

    Words that are not classes of the training get a Reference from the learned prompt (the mean
    prompt, where each class has one). ReCLIP's P and ReCLIP++'s decoder have one output per class
    of the training and are left out for them.
    """
    clip, names, method = segmenter.clip, segmenter.names, segmenter.cfg.method
    if set(words) <= set(names):
        chosen = [names.index(word) for word in words]
        return segmenter.T[chosen], segmenter.rectified(f, segmenter.reference())[:, chosen]
    print(f"{', '.join(w for w in words if w not in names)}: not among the {len(names)} classes of "
          "the training; the Reference prompt alone rectifies")
    T = text_features(clip, segmenter.tokenizer, words)
    tokens, L = name_tokens(clip, segmenter.tokenizer, words)
    V = segmenter.rectifier.V if segmenter.cfg.prompt == "shared" else segmenter.rectifier.V.mean(0)
    R = F.normalize(reference_features(clip, V[:L], tokens), dim=1)
    R = R / len(names) ** 0.5 if segmenter.cfg.norm == "frobenius" else R   # as long as in training
    if method == "reclip":
        return T, similarity(f, T) - similarity(f, R)
    if segmenter.cfg.space == "off":
        return T, similarity(f, T)
    P = segmenter.rectifier.g(positional_embedding(clip, tuple(f.shape[-2:])))[0]       # D h w
    return T, similarity(f, T) - torch.einsum("dhw,cd->chw", P, R)


# ==================================================================================================
# The method ends here. Everything below serves it.
# ==================================================================================================


# ========================================================================================= 6 metric

def confusion(label, prediction, classes):
    """C×C int64, rows the truth, columns the prediction; pixels labelled 255 do not count."""
    known = label != VOID
    pairs = label[known].long() * classes + prediction[known]
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def iou(matrix):
    """IoU in percent of each class, C; NaN for a class that neither the truth nor the prediction
    has.
    """
    hit = matrix.diagonal().double()
    return 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)


class Found(NamedTuple):
    """An object: what an image holds of a class (VOC's layout tells classes, not instances). For
    Fig. 1(a) and 5.
    """
    distance: float                                    # of its centroid from the image's centre, px
    iou: float                                          # percent
    label: int                                          # its class
    sample: "Sample"


def objects(label, prediction, sample):
    """The `Found` objects of one label H×W in its prediction H×W."""
    centre = torch.tensor([(n - 1) / 2 for n in label.shape])
    known, found = label != VOID, []
    for c in label[known].unique():
        truth, guess = label == c, (prediction == c) & known
        distance = (truth.nonzero().float().mean(0).cpu() - centre).norm()
        hit = (truth & guess).sum() / (truth | guess).sum()
        found.append(Found(distance.item(), 100 * hit.item(), c.item(), sample))
    return found


def evaluate(predict, samples, names):
    """Measure masks against ground truth, in one pass. predict: uint8 B×3×H×W -> {method: B×H×W}.

    Returns ({method: {"mIoU": percent, "IoU": {name: percent}}}, {method: [Found]}); a class that
    never occurs has IoU None.
    """
    C, matrices, found = len(names), {}, {}
    bar = tqdm(total=len(samples), desc="evaluating", unit="img", leave=False)
    for batch, images, labels in batches_of_one_size(samples, 16, C):
        for method, masks in predict(images).items():
            labels = labels.to(masks.device)
            matrices[method] = matrices.get(method, 0) + confusion(labels, masks, C)
            for triple in zip(labels, masks, batch):
                found.setdefault(method, []).extend(objects(*triple))
        bar.update(len(batch))
    bar.close()
    if not any(found.values()):
        raise UserError(f"{samples[0].label.parent}: the validation masks hold no class, only "
                        "background or void")
    results = {}
    for method, matrix in matrices.items():
        each = [None if np.isnan(v) else round(v, 3) for v in iou(matrix).tolist()]
        mean = round(iou(matrix).nanmean().item(), 3)
        results[method] = {"mIoU": mean, "IoU": dict(zip(names, each))}
    return results, found


def precision_recall(y, truth):
    """How good hypotheses are, N×C bool both: {"precision", "recall", "classes_per_image"}."""
    hits = (y & truth).sum().item()
    return {"precision": round(hits / max(1, y.sum().item()), 4),
            "recall": round(hits / max(1, truth.sum().item()), 4),
            "classes_per_image": round(y.sum().item() / len(y), 3)}


def classes_present(samples, C):
    """N×C bool, the classes that ground truth shows in each sample."""
    labels = read_ahead(lambda s: load_label(s.label, load_image(s.image).shape[1:], C), samples)
    counts = [label.flatten().long().bincount(minlength=VOID + 1)[:C] for label in labels]
    return torch.stack(counts) > 0


def print_table(results, names):
    """IoU of every class and the mean, a column a method; of several, with the gain of the last
    over the first.
    """
    several, wide = len(results) > 1, max(len(n) for n in [*names, "mIoU"])
    rows = {name: [r["IoU"][name] for r in results.values()] for name in names}
    rows["mIoU"] = [r["mIoU"] for r in results.values()]
    print("\n" + " " * wide + "".join(f"{m:>11}" for m in results) + "       gain" * several)
    for name, values in rows.items():
        if name == "mIoU":
            print("-" * (wide + 11 * (len(results) + several)))
        cells = ["-" if v is None else f"{v:.1f}" for v in values]
        cells += [f"{values[-1] - values[0]:+.1f}"] if several and None not in values else []
        print(f"{name:<{wide}}" + "".join(f"{cell:>11}" for cell in cells))
    print()


# ======================================================================================= 7 datasets

VOC_NAMES = [
    "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train",
    "tv monitor"]
CONTEXT_NAMES = [
    "airplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book", "bottle",
    "building", "bus", "cabinet", "car", "cat", "ceiling", "chair", "cloth", "computer", "cow",
    "cup", "curtain", "dog", "door", "fence", "floor", "flower", "food", "grass", "ground", "horse",
    "keyboard", "light", "motorbike", "mountain", "mouse", "person", "plate", "platform",
    "potted plant", "road", "rock", "sheep", "shelves", "sidewalk", "sign", "sky", "snow", "sofa",
    "table", "track", "train", "tree", "truck", "tv monitor", "wall", "water", "window", "wood"]
# The category ids of these 59 among the 459 of trainval_merged.json, which are alphabetical too.
CONTEXT_IDS = [
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113,
    115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326,
    347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458]
ADE_NAMES = [
    "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass",
    "cabinet", "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain",
    "chair", "car", "water", "painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field",
    "armchair", "seat", "fence", "desk", "rock", "wardrobe", "lamp", "bathtub", "railing",
    "cushion", "base", "box", "column", "signboard", "chest of drawers", "counter", "sand", "sink",
    "skyscraper", "fireplace", "refrigerator", "grandstand", "path", "stairs", "runway", "case",
    "pool table", "pillow", "screen door", "stairway", "river", "bridge", "bookcase", "blind",
    "coffee table", "toilet", "flower", "book", "hill", "bench", "countertop", "stove", "palm",
    "kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine", "hovel", "bus",
    "towel", "light", "truck", "tower", "chandelier", "awning", "streetlight", "booth",
    "television receiver", "airplane", "dirt track", "apparel", "pole", "land", "bannister",
    "escalator", "ottoman", "bottle", "buffet", "poster", "stage", "van", "ship", "fountain",
    "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool", "barrel", "basket",
    "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank",
    "trade name", "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen",
    "blanket", "sculpture", "hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan",
    "pier", "crt screen", "plate", "monitor", "bulletin board", "shower", "radiator", "glass",
    "clock", "flag"]
OXFORD = "http://host.robots.ox.ac.uk/pascal/VOC"
# dataset: (its files and their md5, the archive first; the folder in it that holds the images;
# class names)
DATASETS = {
    "emoji": ([(HERE / "tests/emoji/emoji-voc.tar", "551b084098f476f71b41547dad04d51a")],
              "VOCdevkit/VOC2012", VOC_NAMES),
    "voc": ([(f"{OXFORD}/voc2012/VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd")],
            "VOCdevkit/VOC2012", VOC_NAMES),
    "context": ([(f"{OXFORD}/voc2010/VOCtrainval_03-May-2010.tar",
                  "da459979d0c395079b5c75ee67908abb"),
                 ("https://codalabuser.blob.core.windows.net/public/trainval_merged.json",
                  "3c2d0c0656b7be9eb61928ffe885d8ce")],
                "VOCdevkit/VOC2010", CONTEXT_NAMES),
    "ade": ([("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
              "7328b3957e407ddae1d3cbf487f149ef")],
            "ADEChallengeData2016", ADE_NAMES)}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VOID = 255
LARGEST_BATCH = 2 ** 22                # pixels evaluated at once: 1.7 GB of logits with 100 classes


@dataclass
class Sample:
    """An image: its name (path in the list or folder, no suffix), its file, and its label's (None
    without one).
    """
    name: str
    image: Path
    label: Path | None


def download(url, md5, path):
    """Fetch a file to `path`, where it appears once its md5 is right; `path`.part is what a cut
    connection left.

    A right file at `path` is taken as it is. Raises UserError with address, md5 and path for
    fetching by hand.
    """
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.is_file() else 0
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        if path.is_file():
            if check_integrity(path, md5):
                return
            raise OSError("another file is there")
        try:
            with urlopen(request, timeout=60) as reply:
                have = have if reply.status == 206 else 0   # a server that ignores Range sends all
                left = int(reply.headers.get("Content-Length", 0))
                free = shutil.disk_usage(path.parent).free
                if left > free:
                    raise OSError(f"{left / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB of disk free")
                bar = tqdm(total=have + left, initial=have, desc=path.name, unit="B",
                           unit_scale=True, leave=False)
                with bar, open(part, "ab" if have else "wb") as file:
                    while piece := reply.read(1 << 20):
                        bar.update(file.write(piece))
                if part.stat().st_size < have + left:
                    raise OSError("the connection was cut; the same command goes on from there")
        except HTTPError as error:
            if error.code != 416:                              # 416: there is nothing left to fetch
                raise
        if not check_integrity(part, md5):
            part.unlink()
            raise OSError("what came is not the published file")
        part.rename(path)
    except (OSError, HTTPException) as error:
        raise UserError(f"{path}: not downloaded ({error}); fetch {url} yourself (md5 {md5}) "
                        "and put it there")


def unpack(archive, md5, target):
    """Check an archive (tar or zip) against its md5 and unpack it to `target`, which appears only
    when it is whole.

    Raises UserError, also for a tar's member that would leave the folder; a zip's is not unpacked.
    """
    if target.exists():
        raise UserError(f"{target}: is in the way of unpacking {archive.name}; move it, or give "
                        "another --root")
    if not archive.is_file():
        raise UserError(f"{archive}: missing; it comes with the repository")
    if not check_integrity(archive, md5):
        raise UserError(f"{archive}: not the published file (its md5 is not {md5}); delete it and "
                        "fetch it again")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.unpack_archive(archive, partial, filter="data")
    except (OSError, tarfile.TarError, zipfile.BadZipFile, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{archive}: not unpacked: {error}")
    partial.rename(target)


def decode_rle(counts, size):
    """A mask in COCO's run-length code: H×W bool. Runs of false and true take turns, down one
    column after the other.

    counts: the lengths of the runs, or COCO's string of them: 5 bits a character, the lowest first,
    in two's complement; from the fourth run on the difference from the run before the last. size:
    (H, W). Raises ValueError where they do not fill it.
    """
    if isinstance(counts, str):
        runs, value, shift = [], 0, 0
        for character in counts:
            bits = ord(character) - 48
            value, shift = value | (bits & 31) << shift, shift + 5
            if not bits & 32:                                       # the last character of a number
                value -= (bits & 16) << (shift - 4)                 # its highest bit is the sign
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))
                value = shift = 0
        counts = runs
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[::-1]).T


def convert_context(folder, annotations):
    """Write PASCAL Context's 59 classes into VOC2010's folder: SegmentationClassContext/*.png
    (class c as c + 1, all else 0), ImageSets/SegmentationContext/{train,val}.txt. The lists appear
    last: where they are, the masks are whole.

    annotations: trainval_merged.json. Its fields are taken from public readers of it, the file
    itself was not at hand: images (image_id, file_name, height, width, phase: the split),
    annos_segmentation (image_id, category_id, segmentation: RLE), where a later one lies over the
    earlier ones. Raises UserError where it is not so.
    """
    masks, lists = folder / "SegmentationClassContext", folder / "ImageSets/SegmentationContext"
    partial = lists.with_name(lists.name + ".partial")
    for path in (masks, partial):
        path.mkdir(parents=True, exist_ok=True)
    value, pieces, names = {c: k + 1 for k, c in enumerate(CONTEXT_IDS)}, {}, {}
    try:
        data = json.loads(annotations.read_text("utf-8"))
        for piece in data["annos_segmentation"]:
            pieces.setdefault(piece["image_id"], []).append(piece)
        for image in tqdm(data["images"], "converting masks", unit="img", leave=False):
            mask = np.zeros((image["height"], image["width"]), np.uint8)
            for piece in pieces.get(image["image_id"], []):
                pixels = decode_rle(piece["segmentation"]["counts"], mask.shape)
                mask[pixels] = value.get(piece["category_id"], 0)
            name, png = Path(image["file_name"]).stem, Image.fromarray(mask)
            png.putpalette(palette())
            png.save(masks / f"{name}.png")
            names.setdefault(image["phase"], []).append(name)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{annotations}: not PASCAL Context's annotations ({error!r}); delete it "
                        "and fetch it again")
    for phase, listed in names.items():
        (partial / f"{phase}.txt").write_text("\n".join(sorted(listed)) + "\n")
    partial.rename(lists)


def dataset_folder(cfg):
    """The folder with a dataset's images; downloads, unpacks and converts what is not there yet.
    Raises UserError.
    """
    if cfg.data:
        if not Path(cfg.data).is_dir():
            raise UserError(f"{cfg.data}: no such folder; --data wants a folder of images")
        return Path(cfg.data)
    files, inside, _ = DATASETS[cfg.dataset]
    root, target = Path(cfg.root), Path(cfg.root) / cfg.dataset
    folder, context = target / inside, target / inside / "ImageSets/SegmentationContext"
    needed = ([] if folder.is_dir() else files[:1]) + ([] if context.is_dir() else files[1:])
    root.mkdir(parents=True, exist_ok=True)
    paths, failed = [], []
    for address, md5 in needed:
        paths.append(address if isinstance(address, Path) else root / Path(address).name)
        try:
            if paths[-1] != address:
                download(address, md5, paths[-1])
        except UserError as error:             # go on, so that one message names every missing file
            failed.append(str(error))
    if failed:
        raise UserError("; ".join(failed))
    if not folder.is_dir():
        print(f"unpacking {paths[0].name} to {target}")
        unpack(paths[0], files[0][1], target)
    if files[1:] and not context.is_dir():
        convert_context(folder, paths[-1])
    return folder


def class_names(cfg):
    """The class names: --names (a file, or words with commas between) or the dataset's own. Raises
    UserError.
    """
    if not cfg.names:
        return DATASETS[cfg.dataset][2]
    is_file = os.path.isfile(cfg.names)     # os.path: a long list of words is no path, and no error
    looks_like_file = os.sep in cfg.names or Path(cfg.names).suffix == ".txt"
    if not is_file and "," not in cfg.names and looks_like_file:
        raise UserError(f"{cfg.names}: no such file; --names wants a file with one class name a "
                        "line, or words and commas")
    try:
        words = Path(cfg.names).read_text("utf-8").splitlines() if is_file else cfg.names.split(",")
    except UnicodeDecodeError:
        raise UserError(f"{cfg.names}: not a text in UTF-8; --names wants one class name a line")
    names = [w.strip() for w in words if w.strip()]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice or not names:
        what = f"'{twice[0]}' is named twice" if twice else "holds no class name"
        raise UserError(f"{cfg.names}: {what}")
    if len(names) >= VOID:
        raise UserError(f"{cfg.names}: {len(names)} names; a mask of 8 bits holds {VOID - 1}")
    return names


def list_samples(folder, split):
    """The samples of a split: the listed ones where ImageSets/ exists (PASCAL Context's lists
    before VOC's), those of images/ and annotations/ in ADE20K's layout, else every image in the
    folder, without labels.

    Images meet their labels by name. A plain folder is all train and no val. Raises UserError.
    """
    kind = "Context" if (folder / "ImageSets/SegmentationContext").is_dir() else ""
    where, labels = folder / "JPEGImages", folder / f"SegmentationClass{kind}"
    index = folder / f"ImageSets/Segmentation{kind}" / f"{split}.txt"
    if (folder / "ImageSets").is_dir():
        if not index.is_file():
            raise UserError(f"{index}: missing; write the {split} images' names there, one a line")
        names = [line.strip() for line in index.read_text().splitlines() if line.strip()]
        if not names:
            raise UserError(f"{index}: empty; write the {split} images' names there, one a line")
        candidates = [[where / f"{name}{suffix}" for suffix in SUFFIXES] for name in names]
        images = [next(filter(Path.is_file, paths), paths[0]) for paths in candidates]
    else:
        ade = {"train": "training", "val": "validation"}[split]
        if (folder / "annotations").is_dir() and (folder / "images" / ade).is_dir():
            where, labels = folder / "images" / ade, folder / "annotations" / ade
        elif split == "val":
            return []
        else:
            where, labels = where if where.is_dir() else folder, None    # not the masks beside them
        images, index = sorted(p for p in where.rglob("*") if p.suffix.lower() in SUFFIXES), where
        if not images:
            raise UserError(f"{where}: holds no images ({' '.join(sorted(SUFFIXES))})")
        names = [p.relative_to(where).with_suffix("").as_posix() for p in images]
    labelled = labels is not None and labels.is_dir()
    samples = [Sample(name, image, labels / f"{name}.png" if labelled else None)
               for name, image in zip(names, images)]
    for path in [p for s in samples for p in (s.image, s.label) if p and not p.is_file()]:
        raise UserError(f"{path}: missing, though {index} lists it; restore it or take it off the "
                        "list")
    return samples


def splits(folder):
    """(training samples, labelled validation samples). Raises UserError, also where processes
    outnumber images.
    """
    train = list_samples(folder, "train")
    val = [sample for sample in list_samples(folder, "val") if sample.label]
    if len(train) < WORLD:
        raise UserError(f"{folder}: {len(train)} images are too few for {WORLD} processes")
    return train, val


def load_image(path):
    """Any image as 3×H×W uint8 RGB: EXIF rotation applied, 16 bits cut to 8, transparency laid on
    white.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):    # 16-bit greys, which convert("RGB") would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error}); replace or remove it")


def load_label(path, size, classes):
    """A palette PNG as H×W uint8 in {0..C-1, 255}: VOC's background (0) becomes void, class c
    becomes c - 1.
    """
    try:
        with Image.open(path) as image:
            mode, label = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a readable mask ({error})")
    if mode not in ("P", "L"):
        raise UserError(f"{path}: a mask holds one class number a pixel (palette PNG), this one is "
                        f"{mode}; convert it")
    if label.shape != tuple(size):
        raise UserError(f"{path}: the mask is {label.shape[1]}×{label.shape[0]}, its image "
                        f"{size[1]}×{size[0]}")
    wrong = label[(label > classes) & (label != VOID)]
    if wrong.size:
        raise UserError(f"{path}: the mask holds {wrong[0]}, with {classes} classes (0 is "
                        "background, 255 void)")
    return torch.from_numpy(np.where(label == 0, VOID, label - (label != VOID)).astype(np.uint8))


def read_ahead(read, samples, ahead=32):
    """Yield read(sample) of each, in order, while threads read the next ones: decoding leaves
    Python's lock alone.

    No more than `ahead` wait in memory (from Python 3.14 on, Executor.map can promise that itself).
    """
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        waiting = collections.deque()
        for sample in samples:
            waiting.append(pool.submit(read, sample))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def resize_to_fit(image, size, mode=v2.InterpolationMode.BILINEAR, factor=1.0):
    """Resize ..×3×H×W to the largest that `size` = (long, short side in px), times `factor`,
    holds.
    """
    height, width = image.shape[-2:]
    scale = factor * min(size[0] / max(height, width), size[1] / min(height, width))
    new = [max(1, round(n * scale)) for n in (height, width)]
    return v2.functional.resize(image, new, mode, antialias=True)


def subsample(samples, count):
    """At most `count` of the samples, evenly spread over the list."""
    return samples[::math.ceil(len(samples) / count)]


def batches_of_one_size(samples, batch, classes=None):
    """Yield (samples, images B×3×H×W uint8, labels B×H×W uint8 or None), each batch of one image
    size.

    No more than 4 · batch images wait for others of their size. A batch ends early at LARGEST_BATCH
    pixels.
    """
    def read(sample):
        image = load_image(sample.image)
        label = load_label(sample.label, image.shape[1:], classes) if classes else None
        return sample, image, label

    def stack(group):
        samples, images, labels = zip(*group)
        return samples, torch.stack(images), torch.stack(labels) if classes else None

    waiting = {}
    for sample, image, label in read_ahead(read, samples):
        group = waiting.setdefault(image.shape, [])
        group.append((sample, image, label))
        if len(group) == batch or (len(group) + 1) * image[0].numel() > LARGEST_BATCH:
            yield stack(waiting.pop(image.shape))
        elif sum(map(len, waiting.values())) > 4 * batch:
            yield stack(waiting.pop(max(waiting, key=lambda size: len(waiting[size]))))
    yield from map(stack, waiting.values())


def hypotheses(segmenter, samples):
    """y: N×C bool, the hypothesis of every sample."""
    found = {}
    for batch, images, _ in batches_of_one_size(samples, 16):
        found.update(zip([sample.image for sample in batch], hypothesize(segmenter, images).cpu()))
    return torch.stack([found[sample.image] for sample in samples])   # an image may be listed twice


# ======================================================================================== 8 figures

TITLES = {"maskclip": "MaskCLIP", "reclip": "ReCLIP", "reclip++": "ReCLIP++",
          "maskclip+": "MaskCLIP+", "student": "DeepLabV2"}
LINES = [dict(color="0.5", marker="o", linestyle="--"), dict(color="#c83c28", marker="s"),
         dict(color="#285ab4", marker="^"), dict(color="#288c50", marker="D", linestyle=":")]


@functools.cache
def palette():
    """VOC's colours: 256 RGB triples in one list, made by spreading the bits of the index over the
    channels.
    """
    return [sum(((i >> (3 * j + channel)) & 1) << (7 - j) for j in range(8))
            for i in range(256) for channel in range(3)]


def colour(c):
    """RGB of class c (0..C-1), each 0..255; VOC's palette starts with the background."""
    return tuple(palette()[3 * (c + 1):3 * (c + 2)])


def paint(mask, image=None, pale=None):
    """A mask H×W in class colours, void white: H×W×3 uint8. Over an image 3×H×W where given, pale
    where `pale` H×W says so.
    """
    colours = torch.tensor([colour(c) for c in range(VOID)] + [(255, 255, 255)], dtype=torch.float)
    painted = colours[mask.long()]                                                      # H W 3
    if image is not None:
        painted = 0.65 * painted + 0.35 * image.permute(1, 2, 0)
    if pale is not None:
        painted[pale] = 0.25 * painted[pale] + 0.75 * 255
    return painted.byte().numpy()


def draw_rows(rows, names, classes, boxes=None, titles=None, side=1.5):
    """A matplotlib Figure from rows {title: [H×W×3 uint8]}, with a legend of the classes.

    boxes: (left, top, right, bottom) px of each column, dashed. titles: of the columns. side: of a
    cell, inches.
    """
    from matplotlib.figure import Figure              # here: half a second that --help does without
    from matplotlib.patches import Patch, Rectangle
    columns = len(next(iter(rows.values())))
    per_line = max(1, int(columns * side / 1.3))
    lines = -(-len(classes) // per_line)
    height = len(rows) * side + 0.25 * lines + 0.3
    figure = Figure((columns * side + 1.1, height), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (title, images) in zip(grid, rows.items()):
        axes[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for k, (axis, image) in enumerate(zip(axes, images)):
            axis.imshow(image, interpolation="nearest" if max(image.shape) < 200 else "antialiased")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if boxes:
                left, top, right, bottom = boxes[k]
                for style in (dict(edgecolor="white"), dict(edgecolor="blue", linestyle="--")):
                    axis.add_patch(Rectangle(
                        (left - 0.5, top - 0.5), right - left + 1, bottom - top + 1, fill=False,
                        linewidth=2, clip_on=False, **style))
            if titles:
                axis.set_title(titles[k], fontsize=10)
    patches = [Patch(facecolor=[v / 255 for v in colour(c)], edgecolor="black", label=names[c])
               for c in classes]
    figure.legend(handles=patches, loc="outside lower center", ncols=per_line, frameon=False)
    return figure


def draw_gallery(predict, samples, names, classes=None):
    """Rows image, ground truth, one row a method of `predict`; a column per sample. For Fig. 4 and
    5.

    Where ground truth says background or void nothing is scored, and predictions are shown pale.
    classes: of each sample the class around whose pixels a box is drawn.
    """
    rows, seen, boxes = {}, set(), []
    for k, sample in enumerate(samples):
        image = load_image(sample.image)
        label = load_label(sample.label, image.shape[1:], len(names))
        masks = {method: mask[0].cpu() for method, mask in predict(image[None]).items()}
        cells = {"image": image.permute(1, 2, 0).numpy(), "ground truth": paint(label)}
        cells |= {TITLES.get(m, m): paint(mask, pale=label == VOID) for m, mask in masks.items()}
        for title, cell in cells.items():
            rows.setdefault(title, []).append(cell)
        if classes:
            y, x = (label == classes[k]).nonzero().T
            boxes.append((x.min().item(), y.min().item(), x.max().item(), y.max().item()))
        for mask in (label, *masks.values()):
            seen.update(mask[label != VOID].unique().tolist())
    return draw_rows(rows, names, sorted(seen), boxes)


def figure4(predict, samples, names):
    """Fig. 4: eight images, evenly spread over the list."""
    return draw_gallery(predict, subsample(samples, 8), names)


def figure5(predict, found, names):
    """Fig. 5: the eight objects farthest from the centre of their images, in a box, each in another
    image.
    """
    farthest = {}
    for thing in sorted(found, key=lambda thing: -thing.distance):
        farthest.setdefault(thing.sample.image, thing)
    eight = list(farthest.values())[:8]
    samples, classes = [thing.sample for thing in eight], [thing.label for thing in eight]
    return draw_gallery(predict, samples, names, classes)


def figure1a(found, ring):
    """Fig. 1(a): mean IoU of the objects in each ring around the image's centre, a line per method.
    ring: px.
    """
    from matplotlib.figure import Figure
    distances = np.array([thing.distance for thing in found["maskclip"]])
    ring *= max(1, math.ceil(distances.max() / ring / 8))                      # eight rings at most
    rings, counts = np.unique(distances // ring, return_counts=True)
    figure = Figure((8, 4.6), layout="constrained")
    axis = figure.subplots()
    for style, (method, things) in zip(LINES, found.items()):
        means = [np.mean([t.iou for t in things if t.distance // ring == r]) for r in rings]
        label = TITLES.get(method, method)
        axis.plot(range(len(rings)), means, label=label, linewidth=2.5, markersize=8, **style)
    ticks = [f"{r * ring:.0f}-{(r + 1) * ring:.0f}\nn={n}" for r, n in zip(rings, counts)]
    axis.set_xticks(range(len(rings)), ticks)
    axis.set(xlabel="distance of the object from the image's centre, px; n objects",
             ylabel="mean IoU of the objects, %", ylim=(0, None), title="Fig. 1(a)")
    axis.grid(axis="y", alpha=0.4)
    axis.legend()
    return figure


def save_figure(figure, path):
    """Write a matplotlib Figure as a PNG."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


# =================================================================== 9 CLIP's files and checkpoints

def load_clip(cfg, device):
    """open_clip's model, frozen and in eval mode, with buffers `mean` and `std` (3×1×1), and its
    tokenizer.

    Raises UserError where it cannot be had, and before anything is fetched where its towers are not
    CLIP's own.
    """
    import open_clip                               # here, not at the top: a student runs without it
    plain = cfg.clip.startswith("ViT") and "quickgelu" not in cfg.clip
    if not cfg.recipe and plain and cfg.pretrained == "openai":
        print(f"warning: the openai weights were trained with QuickGELU, {cfg.clip} computes GELU; "
              f"you may want {cfg.clip}-quickgelu")
    scheme, _, folder = cfg.clip.rpartition(":")
    name = cfg.clip if scheme else cfg.clip.replace("/", "-")         # ViT-B/16, as papers write it
    if scheme == "local-dir" and not Path(folder).is_dir():
        name = f"{scheme}:{HERE / folder}"
    logging.disable(logging.WARNING)                    # open_clip tells every step of its loading
    try:
        with warnings.catch_warnings():
            meant = "ignore" if cfg.recipe else "default"
            warnings.filterwarnings(meant, "QuickGELU mismatch")
            check_towers(open_clip.get_model_config(name) or {})               # {}: an unknown name
            clip = open_clip.create_model(
                name, cfg.pretrained or None, device=device, require_pretrained=bool(scheme),
                force_custom_text=True)                 # so that clip.text always exists
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:      # open_clip, torch and safetensors have no error class in common
        why = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"cannot load CLIP {cfg.clip} {cfg.pretrained}: {why}")
    finally:
        logging.disable(logging.NOTSET)
    imagenet = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    values = imagenet if cfg.normalization == "imagenet" else clip.visual.preprocess_cfg
    for name in imagenet:
        value = torch.tensor(values[name], device=device)[:, None, None]                # 3 1 1
        clip.register_buffer(name, value, persistent=False)
    return clip.eval().requires_grad_(False), tokenizer


def check_towers(config):
    """Raise ValueError where open_clip's configuration of a CLIP has towers that section 2 does not
    compute.
    """
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    vit = isinstance(vision.get("layers", 12), int) and not any(vision.get(key) for key in (
        "timm_model_name", "attentional_pool", "qk_norm", "scaled_cosine_attn", "scale_heads",
        "scale_attn_inner", "scale_attn", "scale_fc"))
    clips = text.get("pool_type", "argmax") == "argmax" and text.get("vocab_size", 49408) == 49408
    clips = clips and not any(text.get(key) for key in (
        "hf_model_name", "hf_tokenizer_name", "no_causal_mask", "embed_cls", "proj_bias"))
    for right, wrong in [
            (vit, "image tower is not open_clip's own ViT with a class token"),
            (clips, "text tower is not CLIP's own: its tokens, a causal mask, the feature at EOT")]:
        if not right:
            raise ValueError(f"its {wrong}; take a CLIP like ViT-B-16-quickgelu")


def name_tokens(clip, tokenizer, names):
    """The bare names as tokens, C×n int, n the longest name and EOT, padded with 0; and the
    prompt's longest length L.

    Raises UserError for a name that leaves no room for a prompt.
    """
    tokens = tokenizer(names)[:, 1:]                                                    # drop SOS
    context = clip.text.positional_embedding.size(0)
    lengths = tokens.argmax(1) + 1                                              # EOT is the largest
    longest = int(lengths.max())
    if longest + 1 >= context:          # the tokenizer has cut it, and no learnable token would fit
        name = names[int(lengths.argmax())]
        raise UserError(f"class name '{name}' is too long for this CLIP's {context} tokens; "
                        "shorten it")
    tokens = tokens[:, :longest].to(clip.logit_scale.device)
    unmet = (clip.text.token_embedding(tokens) == 0).all(-1).any(1)   # rows the tiny CLIP never had
    new = [name for name, row in zip(names, unmet) if row]
    if new:
        print(f"warning: this CLIP has never met the words of {', '.join(new)}; expect nonsense "
              "for them")
    return tokens, context - 1 - longest


def pack_prompts(text, V, tokens):
    """The input of `reference_features`: embeddings (prompts×S×d), their places (S), the attention
    mask (S×S).

    A token sees only what stands before it, so a shared [SOS][v1..vL] is the same for every name:
    all names stand behind it in one sequence, and the mask hides them from each other. Cost:
    1+L+C·n tokens instead of C·(1+L+n).
    """
    (C, n), L, device = tokens.shape, V.size(-2), tokens.device
    arange = functools.partial(torch.arange, device=device)
    prompts, behind = (1, C) if V.ndim == 2 else (C, 1)            # how many, and names behind each
    # two names behind a shared prompt:   SOS v1..vL | cat EOT 0        | potted plant EOT
    # place, for the positional embedding: 0   1..L  | L+1 L+2 L+3      | L+1 L+2 L+3
    # name, whose token it is:            -1  -1..   | 0   0   0        | 1   1   1
    # (0: padding, which EOT does not see)
    sos = text.token_embedding.weight[-2].expand(prompts, 1, -1)      # SOS is the last but one word
    names = text.token_embedding(tokens).view(prompts, behind * n, -1)
    x = torch.cat([sos, V.view(prompts, L, -1), names], dim=1)              # prompts 1+L+behind·n d
    place = torch.cat([arange(1 + L), (1 + L + arange(n)).repeat(behind)])
    name = torch.cat([torch.full((1 + L,), -1, device=device), arange(behind).repeat_interleave(n)])
    sees = (place <= place[:, None]) & ((name == -1) | (name == name[:, None]))    # row sees column
    return x, place, torch.zeros(sees.shape, device=device).masked_fill(~sees, -torch.inf)


@contextlib.contextmanager
def whole_file(path):
    """The path of a temporary file that becomes `path` when the block ends: it is there whole or
    not at all.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path, state):
    """torch.save, whole or not at all."""
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def list_files(folder):
    """The names of the files in a folder, for the last line of a run."""
    return ", ".join(sorted(p.name for p in folder.iterdir() if p.is_file()))


def digest(module):
    """A short name of a module's weights: equal weights have equal digests."""
    found = hashlib.md5()
    for tensor in module.state_dict().values():
        found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()


def state_of(segmenter):
    """What a checkpoint holds: tensors and plain values only."""
    return {"config": asdict(segmenter.cfg), "names": segmenter.names, "T": segmenter.T,
            "rectifier": segmenter.rectifier.state_dict(),
            "clip": segmenter.clip.visual.state_dict() if segmenter.cfg.finetune else None}


def restore(segmenter, state):
    """Give a segmenter the weights of a checkpoint, in eval mode."""
    segmenter.rectifier.load_state_dict(state["rectifier"])
    segmenter.rectifier.eval()
    if state["clip"]:
        segmenter.clip.visual.load_state_dict(state["clip"])


def load_checkpoint(path, part="rectifier"):
    """A checkpoint of ours with the weights of this part: tensors and plain values, nothing that
    could run.

    Raises UserError.
    """
    maker = {"rectifier": "rectify.py", "student": "distill.py"}[part]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["names"], state["config"], state[part]
        return state
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; make it with `python {maker}`")
    except Exception as error:      # torch.load has no error class of its own for files not its own
        raise UserError(f"{path}: not a checkpoint of {maker} ({type(error).__name__}); "
                        "make it again")


def resume(segmenter, optimizer, schedule, state):
    """Take all of an interrupted run from its checkpoint; returns its log, one entry per epoch."""
    restore(segmenter, state)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    print(f"resuming after epoch {len(state['log'])} of {segmenter.cfg.epochs}")
    return state["log"]


def finish_epoch(segmenter, optimizer, schedule, losses, masks, log, bar, out):
    """Log an epoch, warn of a collapse, stop where the loss is not finite, and save what --resume
    needs.
    """
    if WORLD > 1:
        for total in (losses, masks):
            distributed.all_reduce(total)
    loss, same = losses.item() / WORLD, agreement(masks)
    log.append({"epoch": len(log) + 1, "loss": round(loss, 5), "agreement": round(same, 4),
                "lr": schedule.get_last_lr()[0]})
    schedule.step()
    bar.set_postfix(epoch=len(log), loss=f"{loss:.3f}", agreement=f"{same:.2f}")
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} in epoch {len(log)}; lower --lr, or --alpha")
    if RANK > 0:
        return
    if same > COLLAPSED:
        bar.write("warning: the masks hardly depend on the image: two images have the same class "
                  f"on {same:.0%} of their patches. Lower --lr-conv, --lr or --alpha",
                  file=sys.stderr)
    write_text(out / "log.jsonl", "\n".join(map(json.dumps, log)))
    save(out / "rectify.partial.pt", state_of(segmenter) | {
        "log": log, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})


def load_segmenter(path, **typed):
    """The Segmenter of a checkpoint, in eval mode. typed: free fields of its configuration to
    change (device, out, ..).
    """
    state = load_checkpoint(path)
    cfg = configure(state["config"], **typed)
    segmenter = Segmenter(cfg, state["names"], pick_device(cfg), state["T"])
    restore(segmenter, state)
    return segmenter


# =============================================================== 10 processes, precision and memory

def pick_device(cfg):
    """The torch device that --device means, under torchrun this process's own. Raises UserError
    without it.
    """
    gpus = torch.cuda.device_count()
    if cfg.device == "cpu" or cfg.device == "auto" and not gpus:
        return torch.device("cpu")
    if LOCAL >= gpus:
        raise UserError(f"--device {cfg.device}: torch finds {gpus} CUDA devices here, and this is "
                        f"process {LOCAL + 1}")
    torch.cuda.set_device(LOCAL)
    torch.set_float32_matmul_precision("high")        # TF32: as many bits as features are kept with
    return torch.device("cuda", LOCAL)


def in_bf16(device, precision="auto"):
    """Autocast to bfloat16 for what is large: CLIP's image tower, and the student in training.
    auto: on a GPU that has it.

    Not for the text encoder: a step has few tokens for it, and would cast its frozen weights anew
    each time.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    wanted = has_bf16 if precision == "auto" else precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 runs the block first, and may download and convert; the others wait, and then find it
    done.
    """
    if RANK > 0:
        distributed.barrier()
    try:
        yield
    finally:
        if RANK == 0 and WORLD > 1:
            distributed.barrier()


def wrap_ddp(module, **options):
    """The module as training calls it: with the mean of all processes' gradients (DDP) where there
    are several.
    """
    if WORLD == 1:
        return module
    gpu = next(module.parameters()).get_device()        # -1 on the CPU
    return nn.parallel.DistributedDataParallel(module, [gpu] if gpu >= 0 else None, **options)


def epoch_order(seed, epoch, N):
    """The order of an epoch's N images, the same on every rank; what is drawn after it is each
    rank's own.

    An epoch's randomness depends on the seed and the epoch alone, so that a resumed run repeats it.
    """
    torch.manual_seed(100_003 * seed + epoch)
    order = torch.randperm(N)
    if RANK > 0:
        torch.manual_seed(hash((seed, epoch, RANK)))
    return order


def rank_batches(order, batch, device):
    """An epoch's batches as this rank sees them, an iterator of (i, size, weight).

    i: where it keeps its own images of the batch. size: of the whole batch. weight: 1 for a fair
    share of it. A rank without an image in a batch uses its first one at weight 0, so that every
    rank joins the all-reduce. All i go to the device at once: a copy in each step would make the
    host wait.
    """
    batches = order.split(batch)
    own = [i[i % WORLD == RANK] // WORLD for i in batches]
    weights = [len(i) * WORLD / len(whole) for i, whole in zip(own, batches)]
    own = [i if len(i) else torch.zeros(1, dtype=torch.long) for i in own]
    return zip(torch.cat(own).to(device).split([*map(len, own)]), map(len, batches), weights)


def allocate(shape, dtype, device, out):
    """An empty tensor on the device, in RAM, or in a file in the folder `out`: the first with room
    for it; prints which.

    It takes at most 0.7 of what is free on a GPU, half of the RAM. Raises UserError where there is
    no room at all.
    """
    size = math.prod(shape)
    need = size * dtype.itemsize / 1e9                                                  # GB
    if device.type == "cuda" and need <= 0.7 * torch.cuda.mem_get_info(device)[0] / 1e9:
        print(f"features: {need:.3g} GB in the GPU's memory")
        return torch.empty(shape, dtype=dtype, device=device)
    if need * WORLD <= 0.5 * ram() / 1e9:
        print(f"features: {need:.3g} GB in RAM")
        return torch.empty(shape, dtype=dtype)
    missing = WORLD * need - 0.7 * shutil.disk_usage(out).free / 1e9
    if missing > 0:
        raise UserError(f"{out}: {WORLD * need:.3g} GB of features fit neither memory nor this "
                        f"disk, which lacks {missing:.3g} GB; give fewer --views, or another --out")
    print(f"features: {need:.3g} GB in a file in {out}")
    file = out / f"features.{RANK}.tmp"
    x = torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)
    file.unlink()                                       # only its name: the space is free when x is
    return x


def ram():
    """Bytes of RAM in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ========================================================================= 11 command line and main

def flag(name):
    """The command line's spelling of a field of Config."""
    return "--" + name.replace("_", "-")


def command_line(config, doc, recipes, argv=None):
    """What was typed, {field: value}, on a command line made of a dataclass of `option`s: --field
    VALUE, or a bare flag.

    recipes: {dataset: row}, for the defaults that --help shows.
    """
    parser = argparse.ArgumentParser(description=doc, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(config):
        about, choices, several = f.metadata["help"], f.metadata["choices"], typing.get_args(f.type)
        if f.type is bool:
            parser.add_argument(flag(f.name), action="store_true", help=about)
            continue
        values = {dataset: row[f.name] for dataset, row in recipes.items() if f.name in row}
        if f.default not in (MISSING, ""):
            about += f" (default {f.default})"
        elif values:
            about += f" ({', '.join(f'{dataset} {value}' for dataset, value in values.items())})"
        kind = several[0] if several else f.type
        parser.add_argument(flag(f.name), help=about, type=kind, nargs=len(several) or None,
                            choices=choices, metavar=None if choices else kind.__name__.upper())
    typed = vars(parser.parse_args(argv))
    return {name: tuple(v) if isinstance(v, list) else v for name, v in typed.items()}


def newest(name, root="runs"):
    """The newest file of this name in a run's folder. Raises UserError where there is none."""
    runs = sorted(Path(root).glob(f"*/{name}"), key=lambda p: p.stat().st_mtime)
    if not runs:
        maker = {"rectify.pt": "rectify.py", "student.pt": "distill.py"}[name]
        raise UserError(f"no {name} under {root}/; make one with `python {maker}`")
    return runs[-1]


def versions():
    """What computed a result: Python, the libraries and the machine."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "open_clip": version("open_clip_torch"), "numpy": np.__version__,
            "platform": platform.platform(), "processors": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


@torch.no_grad()
def segment(typed):
    """--image: the image, MaskCLIP's and the rectified mask side by side in one PNG.

    Nothing is denoised: who names the classes knows that they are there.
    """
    path = Path(typed["out"]) / "rectify.pt" if "out" in typed else newest("rectify.pt")
    chosen = {name: typed[name] for name in ("device", "precision") if name in typed}
    segmenter = load_segmenter(path, **chosen)
    cfg, image = segmenter.cfg, load_image(typed["image"])
    words = class_names(replace(cfg, names=typed["names"])) if "names" in typed else segmenter.names
    print(f"segmenting {typed['image']} with {path}")
    x = resize_to_fit(image[None], cfg.size)
    f = segmenter.features(x)
    T, rectified = rectify_words(segmenter, f, words)
    baseline = segmenter.encode(segmenter.frozen, x, cfg.attention) if cfg.finetune else f
    patch = segmenter.clip.visual.patch_size[0]
    maps = {"MaskCLIP": similarity(baseline, T), TITLES[cfg.method]: rectified}
    masks = {title: upsample(logits, patch, x.shape[-2:], image.shape[-2:]).argmax(1)[0].cpu()
             for title, logits in maps.items()}
    row = [image.permute(1, 2, 0).numpy(), *(paint(mask, image) for mask in masks.values())]
    seen = sorted(set(torch.stack([*masks.values()]).unique().tolist()))
    target = path.parent / f"{Path(typed['image']).stem}.overlay.png"
    save_figure(draw_rows({"": row}, words, seen, titles=["image", *masks], side=3.2), target)
    print(f"wrote {target}")


def open_run(typed):
    """(Config, checkpoint or None): of the run to evaluate, to go on with, or to begin. Raises
    UserError.
    """
    if "eval" in typed:
        state = load_checkpoint(Path(typed["eval"]))
        return configure(state["config"], **{"out": str(Path(typed["eval"]).parent)} | typed), state
    cfg = configure(**typed)
    kept = [Path(cfg.out) / name for name in ("rectify.partial.pt", "rectify.pt")]
    kept = [path for path in kept if path.is_file()] if cfg.resume else []
    if not kept:
        return cfg, None
    state = load_checkpoint(kept[0])
    cfg = configure(state["config"], **typed)
    if state["names"] != class_names(cfg):
        raise UserError(f"{kept[0]}: was trained with other class names; give the same, or leave "
                        "out --resume")
    return cfg, state


def learn(segmenter, samples, state):
    """Train, or go on with the partial checkpoint `state`; rank 0 writes rectify.pt. Returns
    seconds of the two stages.
    """
    started, out = time.time(), Path(segmenter.cfg.out)
    data = training_data(segmenter, samples)
    print(f"hypothesis: {data[2].float().sum(1).mean():.2f} classes an image")
    prepared = time.time()
    train(segmenter, data, len(samples), out, state)
    if RANK == 0:
        save(out / "rectify.pt", state_of(segmenter))
        (out / "rectify.partial.pt").unlink()
    return {"features": round(prepared - started, 1), "training": round(time.time() - prepared, 1)}


def measure(segmenter, val, seconds):
    """Measure on labelled images: the table, rectify.json, and the figures. seconds: what the
    stages before took.
    """
    cfg, names, out, started = segmenter.cfg, segmenter.names, Path(segmenter.cfg.out), time.time()
    predict = predictor(segmenter)
    results, found = evaluate(predict, val, names)
    quality = precision_recall(hypotheses(segmenter, val), classes_present(val, len(names)))
    seconds["evaluation"] = round(time.time() - started, 1)
    report = {"results": results, "hypothesis": quality, "config": asdict(cfg),
              "versions": versions(), "seconds": seconds}
    write_text(out / "rectify.json", json.dumps(report, indent=1))
    save_figure(figure1a(found, cfg.ring), out / "figure1a.png")
    save_figure(figure4(predict, val, names), out / "figure4.png")
    save_figure(figure5(predict, found["maskclip"], names), out / "figure5.png")
    print_table(results, names)
    print(f"hypothesis on val: precision {quality['precision']:.3f}, recall "
          f"{quality['recall']:.3f}, {quality['classes_per_image']:.2f} classes an image")


def main(argv=None):
    started, typed = time.time(), command_line(Config, __doc__, RECIPES, argv)
    if "image" in typed:
        return segment(typed)
    cfg, state = open_run(typed)
    names, device = state["names"] if state else class_names(cfg), pick_device(cfg)
    out = Path(cfg.out)
    torch.manual_seed(cfg.seed)
    with rank_zero_first():
        folder = dataset_folder(cfg)
        samples, val = splits(folder)
        print(f"{cfg.method} on {folder}: {len(samples)} images to learn from, {len(val)} labelled "
              f"ones to measure on, {len(names)} classes, {device}"
              + f", {WORLD} processes" * (WORLD > 1))
        segmenter = Segmenter(cfg, names, device, state and state["T"])
        segmenter.stock                    # now, where a download is safe and a failure comes early
        out.mkdir(parents=True, exist_ok=True)
    seconds = {}
    if state and "optimizer" not in state:
        restore(segmenter, state)
        print("measuring a complete run")
    elif cfg.method != "maskclip":
        seconds = learn(segmenter, samples, state)
    if RANK == 0 and val:
        measure(segmenter, val, seconds)
    elif RANK == 0:
        print(f"no labelled validation images in {folder}: nothing to measure. Look at one with "
              f"`python rectify.py --image IMAGE --out {out}`")
    print(f"{time.time() - started:.0f} s in all. Wrote {out}/: {list_files(out)}")


def run(main):
    """Call a script's main. What the user can mend is one line and exit code 2; an interrupt says
    how to go on.

    Where torchrun started several processes they meet first; but for errors only rank 0 talks.
    """
    if WORLD > 1:
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
        patience = timedelta(days=1)                    # the others wait for a download
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=patience)
    try:
        main()
    except UserError as error:
        message, code = f"error: {error}", 2
    except KeyboardInterrupt:
        message, code = "\ninterrupted; a training goes on with the same command and --resume", 130
    except Exception:
        if WORLD == 1:
            raise
        message, code = traceback.format_exc(), 1
    else:
        if WORLD > 1:
            distributed.barrier()                   # the others are done before rank 0 has measured
            distributed.destroy_process_group()
        return
    print(message, file=sys.stderr, flush=True)         # out here open progress bars are gone
    if WORLD > 1:
        os._exit(code)              # an orderly end would wait for processes that wait for this one
    sys.exit(code)


if __name__ == "__main__":
    run(main)
