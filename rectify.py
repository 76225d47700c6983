"""Rectify the bias of CLIP for unsupervised semantic segmentation.

ReCLIP (CVPR 2024) and ReCLIP++ (IJCV 2025): unlabelled images and a list of class names go in,
masks come out. CLIP's dense predictions are biased: CLIP prefers some classes (a cow becomes
"horse") and fails far from the image's centre. This script learns both biases from the images
alone, subtracts them, and measures what that gains.

    python rectify.py                     # Emoji VOC ships with the repository: no GPU, no internet
    python rectify.py --method reclip         # the CVPR paper's bias model instead of the journal's
    python rectify.py --dataset voc        # PASCAL VOC 2012 with OpenAI's ViT-B/16; or context, ade
    python rectify.py --data photos --names names.txt                       # images of your own
    python rectify.py --image photo.jpg --names "dog, horse"                # one image, any words
    torchrun --nproc-per-node 4 rectify.py --dataset ade                    # several GPUs

The first two give ReCLIP++ 56.1 ± 0.6 and ReCLIP 43.6 ± 0.4 mIoU over seeds 0, 1, 2; MaskCLIP,
which is CLIP untrained, has 39.2. Each takes two or three minutes of one core, one or two of two.

Read it from top to bottom: 1 recipes and configuration, 2 CLIP, 3 the method, 4 training,
5 prediction. Below the ruler stands what serves the method: 6 metric, 7 datasets, 8 images,
9 figures, 10 loading CLIP, 11 files, 12 processes, 13 command line, 14 modes and main.

The letters are the paper's: f dense feature, T text feature, V learnable prompt, R Reference
feature, PE positional embedding, P space-preference bias, B bias logit map, M mask, y image-level
hypothesis. Shapes: N images, a batch of B (in a formula B is the bias), K views of each; C classes,
counting the background words that stand behind them; D dimensions of f, T and R, d of a token in
its tower; L tokens of the prompt, n of a class name; h×w patches, H×W pixels.
"""
import argparse
import collections
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import platform
import shutil
import signal
import sys
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

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: idle threads soon yield their core

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import ExifTags, Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import distributed, nn
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2
from tqdm import tqdm

# ====================================================================== 1 recipes and configuration

# One row per dataset: Table 12 and the authors' released configurations for the real ones, what
# measures best on Emoji VOC's dev split for itself. Under a method's name: its own settings.
PAPER = dict(
    method="reclip", clip="ViT-B-16-quickgelu", pretrained="openai", normalization="clip",
    jitter=(0.5, 2.0), hypothesis="threshold", view="center", norm="frobenius", prompt="shared",
    pool="grid", start="authors", optimizer="sgd", lr_encoder=1e-4, weight_decay=5e-4, views=4,
    ring=40)
RECIPES = {
    "emoji": {
        **dict(PAPER, method="reclip++", clip="local-dir:tests/emoji/clip", pretrained="",
               size=(2048, 192), jitter=(0.8, 1.25), crop=192, hypothesis="softmax", view="whole",
               tile=96, t=0.2, top_k=1, prompt="per-class", start="ours", optimizer="adam", lr=1e-2,
               lr_conv=3e-3, weight_decay=0.0, epochs=8, batch=16, views=2, ring=10),
        "reclip": dict(alpha=100.0, sharpness=100.0, denoise=0.0),
        # alpha: the decoder's logits have unit variance; at 100 they leave Gumbel's noise no say
        "reclip++": dict(alpha=10.0, sharpness=10.0, denoise=0.0)},
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


def option(help, choices=None, default=MISSING, free=False):
    """A field of Config; the recipe gives what has no default. free: a checkpoint's may change."""
    return field(default=default, metadata={"help": help, "choices": choices, "free": free})


@dataclass(kw_only=True)
class Config:
    """All that a run depends on. `configure` makes it complete; every checkpoint holds it."""
    dataset: str = option("recipe, and the data unless --data is given", list(RECIPES))
    recipe: str = option("2024: the CVPR paper's regime, GELU and ImageNet's mean", ["2024"], "")
    root: str = option("folder that holds the datasets", default="data", free=True)
    data: str = option("a folder of your own: VOC's layout, or just images", None, "", free=True)
    names: str = option("class names: a file, one a line, or words and commas", None, "", free=True)
    background: str = option("words that are no class: 'sky, wall'; field: VOC21's; first: the "
                             "first line of --names", None, "", free=True)
    label_base: int = option("value of the first class in label PNGs", [0, 1], 1, free=True)
    out: str = option("folder of the run (default runs/<dataset>)", free=True)
    method: str = option("bias model; maskclip: none", ["maskclip", "reclip", "reclip++"])
    clip: str = option("open_clip's name of the model, or local-dir:FOLDER")
    pretrained: str = option("open_clip's tag of the weights, or a file")
    normalization: str = option("mean and std of images", ["clip", "imagenet"])
    attention: str = option("attention of CLIP's last block", ATTENTION, "maskclip")
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
    space: str = option("the space-preference bias P; off: reclip++ has no B", ["on", "off"], "on")
    pool: str = option("mean of masked features over grid or mask", ["grid", "mask"])
    start: str = option("ours: V random, P near 0; authors: V of word 0, P random",
                        ["ours", "authors"])
    alpha: float = option("scale of the logits before Gumbel-Softmax")
    sharpness: float = option("scale of the logits before probabilities are compared", free=True)
    denoise: float = option("drop classes that nowhere in an image are as probable; 0: off",
                            free=True)
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
    threshold: float = option("less probable pixels are background; 0: off", None, 0.0, free=True)
    window: int = option("side of prediction's sliding window, px; 0: none", None, 0, free=True)
    stride: int = option("step of that window, px; 0: half its side", None, 0, free=True)
    ring: int = option("width of the rings of Fig. 1(a), px", free=True)
    device: str = option("where to compute", ["auto", "cpu", "cuda"], "auto", free=True)
    precision: str = option("of CLIP's image tower; auto: bf16 where the hardware has it",
                            ["auto", "fp32", "bf16"], "auto", free=True)
    resume: bool = option("go on with the interrupted run in --out", None, False, free=True)
    eval: str = option("measure this checkpoint, or segment --image by it", None, "", free=True)
    image: str = option("segment this image, or all in this folder", None, "", free=True)


def configure(trained=None, **typed):
    """The complete Config: what was typed, over the method's settings, over the dataset's. For
    images of your own (data) VOC's, unless a dataset was typed.

    trained: the configuration in a checkpoint, which then takes the recipe's place; what was typed
    must agree with it, but in the free fields. Raises UserError.
    """
    if trained is None:
        dataset = typed.get("dataset", "voc" if typed.get("data") else "emoji")
        row = RECIPES[dataset]
        of_method = row.get(typed.get("method", row["method"]), row["reclip"])  # maskclip has none
        settings = {k: v for k, v in row.items() if k not in ("reclip", "reclip++")} | of_method
        settings |= REGIME_2024 if typed.get("recipe") else {}
        settings |= {"pretrained": ""} if "clip" in typed else {}      # another CLIP, other weights
        place = Path(typed["data"]).resolve().name if typed.get("data") else dataset
        place += "-maskclip" * (typed.get("method") == "maskclip")  # a trained run's files stay
        settings |= {"dataset": dataset, "out": f"runs/{place}"}
    else:
        check_trained(Config, trained, typed)
        settings = trained | {"resume": False}
    cfg = Config(**settings | typed)
    refuse_nonsense(cfg)
    return cfg


# =========================================================================================== 2 CLIP

def normalize(clip, images):
    """uint8 B×3×H×W to what CLIP takes: (x / 255 - mean) / std."""
    return (images.float() / 255 - clip.mean) / clip.std


def positional_embedding(clip, grid):
    """PE: 1×d×h×w, CLIP's positional embedding without CLS, bicubic-resized to the grid (h, w)."""
    visual = clip.visual
    pe = visual.positional_embedding[1:].T.reshape(1, -1, *visual.grid_size)  # 1 d h w
    return pe if grid == tuple(visual.grid_size) else F.interpolate(pe, grid, mode="bicubic")


def attention_block(block, x, grid, attention):
    """A block of CLIP's image tower, B×(1+hw)×d to the same; the last one's attention is a choice.

    "stock": CLIP's own. maskclip: each token attends to itself alone (Zhou 2022). sclip: q·q + k·k
    (Wang 2024). clearclip: q·q, no residual, no MLP (Lan 2024). naclip: k·k and a Gaussian around
    each patch, likewise (Hajimiri 2025). "stock" is open_clip's block, written out here since
    nn.MultiheadAttention copies its weights for every token in bfloat16.
    """
    attn = block.attn
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)   # B 1+hw 3d
    q, k, v = qkv.chunk(3, dim=-1)                                          # B 1+hw d
    if attention != "maskclip":                                             # maskclip: v as it is
        q, k, v = (y.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        scale = q.size(-1) ** -0.5                                   # q, k, v: B heads 1+hw d/heads
        if attention == "sclip":
            A = (q @ q.mT * scale).softmax(-1) + (k @ k.mT * scale).softmax(-1)
        elif attention == "clearclip":
            A = (q @ q.mT * scale).softmax(-1)
        elif attention == "naclip":
            yx = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in grid))  # hw 2
            distance = torch.cdist(yx.float(), yx.float())                  # hw hw
            near = torch.exp(-distance.square() / (2 * 5 ** 2))             # std 5 patches
            A = (k @ k.mT * scale + F.pad(near, (1, 0, 1, 0))).softmax(-1)
        v = F.scaled_dot_product_attention(q, k, v) if attention == "stock" else A @ v
        v = v.transpose(1, 2).flatten(2)                                    # B 1+hw d
    v = block.ls_1(attn.out_proj(v))                    # ls: LayerScale, the identity in most CLIPs
    if attention in ("clearclip", "naclip"):
        return v
    v = v + x
    return v + block.ls_2(block.mlp(block.ln_2(v)))


def earlier_blocks(clip, x):
    """All of CLIP's image tower but its last block: (tokens B×(1+hw)×d, grid (h, w)).

    x: B×3×H×W of any size, normalized; padded to whole patches.
    """
    visual = clip.visual
    p_h, p_w = visual.patch_size
    x = F.pad(x, (0, -x.size(-1) % p_w, 0, -x.size(-2) % p_h))
    x = visual.conv1(x)                                                     # B d h w
    grid = tuple(x.shape[-2:])
    x = (x + positional_embedding(clip, grid)).flatten(2).mT                # B hw d
    cls = visual.class_embedding + visual.positional_embedding[0]
    x = visual.ln_pre(torch.cat([cls.expand(len(x), 1, -1), x], dim=1))     # B 1+hw d
    for block in visual.transformer.resblocks[:-1]:
        x = attention_block(block, x, grid, "stock")
    return x, grid


def encode_image(clip, x, attention):
    """CLIP's image tower for images x: B×3×H×W of any size, normalized.

    attention: of the last block. "stock" gives CLIP's own image feature, B×D; the others the dense
    feature f, B×D×h×w. Both of unit norm.
    """
    visual = clip.visual
    x, grid = earlier_blocks(clip, x)
    x = attention_block(visual.transformer.resblocks[-1], x, grid, attention)
    if attention == "stock":
        return F.normalize((visual._pool(x)[0] @ visual.proj).float(), dim=-1)  # B D
    f = (visual.ln_post(x[:, 1:]) @ visual.proj).float()                # B hw D; normalized in fp32
    return F.normalize(f, dim=-1).mT.unflatten(-1, grid)                    # B D h w


def templates():
    """The 85 sentences that T is averaged over: OpenAI's 80 for ImageNet and five of a scene."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES
    scene = ["there is a", "there is the", "this is a", "this is the", "this is one"]
    return [*OPENAI_IMAGENET_TEMPLATES, *(f"{start} {{}} in the scene.".format for start in scene)]


def text_features(clip, tokenizer, names):
    """T: C×D, unit rows: the mean over 85 sentences, then over synonyms ("person, woman, man")."""
    from open_clip import build_zero_shot_classifier
    words, device = [name.split(", ") for name in names], clip.logit_scale.device
    T = build_zero_shot_classifier(clip, tokenizer, sum(words, []), templates(), device=device).T
    groups = T.split([*map(len, words)])
    return torch.cat([g if len(g) == 1 else F.normalize(g.mean(0, True), dim=1) for g in groups])


# ===================================================================================== 3 the method

def multi_label(s, t, top_k):
    """The hypothesis y: B×C bool of scores s: B×C, y_c = [s_c ≥ t]; if none is, the best top_k."""
    top = F.one_hot(s.topk(min(top_k, s.size(1)), dim=1).indices, s.size(1)).amax(1).bool()
    return torch.where((s >= t).any(1, keepdim=True), s >= t, top)          # B C


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
        return segmenter.encode(clip, x, "stock") @ T.T                     # B C

    if cfg.hypothesis == "windows":
        x = resize_to_fit(images, cfg.size)
        tops, lefts = (window_starts(n, cfg.tile, cfg.tile // 2) for n in x.shape[-2:])
        tiles = [x[..., i:i + cfg.tile, j:j + cfg.tile] for i in tops for j in lefts]
        best = [scores(v2.functional.resize(tile, [side, side])).argmax(1) for tile in tiles]
        return torch.stack([F.one_hot(c, len(T)) for c in best]).amax(0).bool()
    s = scores(clip_view(images, side, cfg.view))
    s = (segmenter.scale * s).softmax(1) if cfg.hypothesis == "softmax" else s
    return multi_label(s, cfg.t, cfg.top_k)


def reference_features(clip, V, tokens):
    """The prompt [SOS][v1..vL][name][EOT] of each class through CLIP's text encoder: C×D.

    V: L×d, learnable tokens shared by all classes, or C×L×d. tokens: C×n, the names and EOT.
    Differentiable in V. `pack_prompts` makes C sequences of S = 1+L+n tokens, or where V is shared
    one of S = 1+L+C·n: the prompt once and all names behind it, hidden from each other.
    """
    text = clip.text
    x, place, mask = pack_prompts(text, V, tokens)                          # prompts S d, S, S S
    x = text.ln_final(text.transformer(x + text.positional_embedding[place], attn_mask=mask))
    x = x[:, 1 + V.size(-2):].reshape(*tokens.shape, -1)                    # C n d, the names alone
    x = x[torch.arange(len(x), device=x.device), tokens.argmax(1)]  # C d, at EOT: the largest token
    return x @ text.text_projection                                         # C D


def set_norm(R, norm):
    """R: C×D with unit Frobenius norm (authors' code; rows shrink as 1/√C) or with unit rows."""
    return R / R.norm() if norm == "frobenius" else F.normalize(R, dim=1)


def similarity(f, T):
    """f·Tᵀ at every patch: B×D×h×w and C×D to B×C×h×w, cosines in [-1, 1] where both are unit."""
    return torch.einsum("bdhw,cd->bchw", f, T)


class ReCLIP(nn.Module):
    """Rectified logits f·Tᵀ − B, with B = f·Rᵀ + P: class- and space-preference bias (CVPR 2024).

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
        P = self.g(PE)[0] if self.space else 0                              # C h w
        B = similarity(f, R) + P                                            # B C h w
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
        if start == "ours":                                                 # P = 0: f·T decides
            nn.init.zeros_(self.g.weight)
            nn.init.zeros_(self.g.bias)

    def forward(self, f, T, R, PE):
        P = self.g(PE)[0]                                                   # D h w
        B = torch.einsum("dhw,cd->chw", P, R) if self.space else 0          # C h w
        return self.decoder(torch.cat([f, similarity(f, T) - B], dim=1))


def gumbel_mask(logits, alpha):
    """M = GumbelSoftmax(alpha · logits, τ = 1, hard): B×C×h×w, one-hot over C, differentiable."""
    return F.gumbel_softmax(alpha * logits, tau=1, hard=True, dim=1)


def contrastive_loss(M, f, T, y, scale, valid, pool):
    """CE(scale · z_c·Tᵀ, c), z_c = pool(M_c ⊙ f), averaged over the classes of y and the batch.

    M: B×C×h×w masks. f: B×D×h×w. T: C×D. y: B×C bool. scale: CLIP's exp(logit_scale). valid: B×h×w
    bool, false where the crop is padding. pool: "grid" divides by the number of valid patches,
    "mask" by the mask's area.
    """
    M = M * valid[:, None]
    z = torch.einsum("bchw,bdhw->bcd", M, f)                                # B C D
    grid, mask = valid.sum((1, 2)).view(-1, 1, 1), M.sum((2, 3))[..., None].clamp(min=1)
    logits = scale * (z / (mask if pool == "mask" else grid)) @ T.T         # B C C
    own = -logits.log_softmax(-1).diagonal(dim1=1, dim2=2)                  # B C
    return ((own * y).sum(1) / y.sum(1).clamp(min=1)).mean()


class Segmenter(nn.Module):
    """CLIP, its text features T, and the rectifier (ReCLIP or ReCLIPpp), which is all that is
    learned (with finetune CLIP's image tower, too). background: words that are learned as classes
    are, and mean none of them.

    forward(x), a training step's: dense features B×D×h×w (with finetune uint8 views B×3×H×W) ->
    rectified logits B×C×h×w and f.
    """

    def __init__(self, cfg, names, device, T=None, background=()):
        super().__init__()
        self.cfg, self.names, self.background, self.device = cfg, names, [*background], device
        self.clip, self.tokenizer = load_clip(cfg, device)
        self.frozen = copy.deepcopy(self.clip) if cfg.finetune else self.clip  # MaskCLIP's
        queries = [*names, *background]
        self.tokens, L = name_tokens(self.clip, self.tokenizer, [q.split(", ")[0] for q in queries])
        self.T = text_features(self.clip, self.tokenizer, queries) if T is None else T.to(device)
        self.scale = self.clip.logit_scale.exp().item()
        self.rectifier, self.images = None, ""          # images: digest of the training list
        if cfg.method != "maskclip":
            words = self.clip.text.token_embedding.weight                   # 49408 d
            shape = (L, words.size(1))                                      # L d
            V = 0.02 * torch.randn((len(queries), *shape) if cfg.prompt == "per-class" else shape)
            if cfg.start == "authors":
                V[:] = words[0]
            model = ReCLIP if cfg.method == "reclip" else ReCLIPpp
            d, (C, D) = self.clip.visual.conv1.out_channels, self.T.shape
            self.rectifier = model(V, d, D, C, cfg.space == "on", cfg.start).to(device)

    @property
    def classes(self):
        """What a mask may hold, in order: the classes, and "background" where there is one."""
        titles = [name.split(", ")[0] for name in self.names]
        return titles + ["background"] * bool(self.background or self.cfg.threshold)

    @property
    def sharpness(self):
        """{method: scale of its logits before a softmax}. MaskCLIP's are cosines, as ReCLIP's."""
        cosines = RECIPES[self.cfg.dataset]["reclip"]["sharpness"]
        return {"maskclip": cosines, self.cfg.method: self.cfg.sharpness}

    @functools.cached_property
    def stock(self):
        """(CLIP, T) of the hypothesis: CLIP as its weights were trained, in either regime."""
        if not self.cfg.recipe:
            return self.frozen, self.T
        name = RECIPES[self.cfg.dataset]["clip"]
        cfg = replace(self.cfg, recipe="", clip=name, normalization="clip")
        clip, tokenizer = load_clip(cfg, self.device)
        return clip, text_features(clip, tokenizer, [*self.names, *self.background])

    def encode(self, clip, images, attention):
        """encode_image of uint8 images B×3×H×W, on the device and in the precision of the run."""
        with in_bf16(self.device, self.cfg.precision):
            return encode_image(clip, normalize(clip, images.to(self.device)), attention)

    def features(self, images):
        """f: B×D×h×w of uint8 images B×3×H×W."""
        return self.encode(self.clip, images, self.cfg.attention)

    def both_features(self, images):
        """(f, MaskCLIP's f): with finetune of CLIP's image tower as trained and as it was."""
        f = self.features(images)
        return f, self.encode(self.frozen, images, self.cfg.attention) if self.cfg.finetune else f

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

def draw_view():
    """What is random in a view: four numbers in [0, 1), and how colours are distorted."""
    return torch.rand(4).tolist(), PhotometricDistort().make_params([torch.empty(3, 1, 1)])


def augment(image, cfg, drawn):
    """A view of an image 3×H×W, as `draw_view` drew it: resized, flipped, colours distorted,
    cropped and padded.

    Returns (3×crop×crop uint8, the (height, width) in it that is not padding). The authors redraw a
    crop until no ground-truth class fills three quarters of it; ours never asks.
    """
    (low, high), ((factor, mirror, *corner), colours) = cfg.jitter, drawn
    image = resize_to_fit(image, cfg.size, factor=low + (high - low) * factor)
    if mirror < 0.5:
        image = image.flip(-1)
    image = PhotometricDistort().transform(image, colours)
    top, left = (int(u * (max(n - cfg.crop, 0) + 1)) for u, n in zip(corner, image.shape[1:]))
    image = image[:, top:top + cfg.crop, left:left + cfg.crop]
    height, width = image.shape[1:]
    return F.pad(image, (0, cfg.crop - width, 0, cfg.crop - height)), (height, width)


@torch.no_grad()
def training_data(segmenter, samples):
    """All that is frozen, computed once: x, valid, y.

    x: K×N×D×h×w half, the dense features f of K augmented views of each image (with finetune the
    views themselves, K×N×3×crop×crop uint8). valid: K×N×h×w bool, the patches that are not padding.
    y: N×C bool, the hypothesis. A view depends on the seed and its numbers alone. Of WORLD
    processes (without torchrun one) each computes every WORLD-th image; N are its own. Cost: K·N
    passes of CLIP, and N for y (windows: one a tile); K·N·D·h·w·2 bytes, where `allocate` finds
    room.
    """
    cfg, device = segmenter.cfg, segmenter.device
    numbers, samples = range(RANK, len(samples), WORLD), samples[RANK::WORLD]
    K, N = cfg.views, len(samples)
    first = torch.arange(0, cfg.crop, segmenter.clip.visual.patch_size[0])  # pixel of every patch
    h = len(first)
    shape = (3, cfg.crop, cfg.crop) if cfg.finetune else (segmenter.T.size(1), h, h)
    x = allocate((K, N, *shape), torch.uint8 if cfg.finetune else torch.half, device, Path(cfg.out))
    valid = torch.empty(K, N, h, h, dtype=torch.bool, device=x.device)

    def draw(n, k):
        torch.manual_seed(int(np.random.SeedSequence([cfg.seed, n, k]).generate_state(1)[0]))
        return draw_view()

    def views(work):                                    # in a thread, while CLIP sees others
        sample, drawn = work
        image = limit(load_image(sample.image)).to(device)
        return [augment(image, cfg, one) for one in drawn]                  # K (crop, extent)

    work = ((sample, [draw(n, k) for k in range(K)]) for sample, n in zip(samples, numbers))
    ready = read_ahead(views, work)
    for start in tqdm(range(0, N, AT_ONCE), "dense features", leave=False):
        group = [*itertools.islice(ready, AT_ONCE)]
        rows = slice(start, start + len(group))
        for k in range(K):
            crops, extents = zip(*(of_one[k] for of_one in group))
            height, width = torch.tensor(extents).T[..., None]              # B 1, B 1
            valid[k, rows] = (first < height)[:, :, None] & (first < width)[:, None]
            crops = torch.stack(crops)
            x[k, rows] = crops if cfg.finetune else segmenter.features(crops).half()
    return x, valid, hypotheses(segmenter, samples).to(x.device)


def make_optimizer(segmenter):
    """(optimizer, its poly schedule): a learning rate for the prompt and one for convolutions."""
    cfg, rectifier = segmenter.cfg, segmenter.rectifier
    convs = [p for p in rectifier.parameters() if p is not rectifier.V]
    groups = [{"params": [rectifier.V], "lr": cfg.lr}, {"params": convs, "lr": cfg.lr_conv}]
    if cfg.finetune:
        encoder = segmenter.clip.visual.requires_grad_()
        groups.append({"params": list(encoder.parameters()), "lr": cfg.lr_encoder})
    sgd = functools.partial(torch.optim.SGD, momentum=0.9)
    kind = sgd if cfg.optimizer == "sgd" else torch.optim.Adam
    optimizer = kind(groups, weight_decay=cfg.weight_decay)
    return optimizer, torch.optim.lr_scheduler.PolynomialLR(optimizer, cfg.epochs, power=0.9)


def train(segmenter, data, N, out, state=None):
    """Learn the rectifier from hypotheses alone; each epoch is logged, and saved for --resume.

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
        # i: this process's images of a batch; size: of the whole batch; weight: 1 for one process
        for i, size, weight in rank_batches(epoch_order(cfg.seed, epoch, N), cfg.batch, x.device):
            present, inside = y[i].to(device), valid[k, i].to(device)       # B C, B h w
            logits, f = model(x[k, i].to(device))                           # B C h w, B D h w
            M = gumbel_mask(logits, cfg.alpha)                              # B C h w
            loss = contrastive_loss(M, f, segmenter.T, present, segmenter.scale, inside, cfg.pool)
            optimizer.zero_grad()
            (weight * loss).backward()
            optimizer.step()
            losses += weight * size / N * loss.detach()
            masks += (weight > 0) * (M.detach() * inside[:, None]).sum(0)   # C h w, for `agreement`
            bar.update()
        finish_epoch(segmenter, optimizer, schedule, losses, masks, log, bar, out)
    bar.close()
    segmenter.rectifier.eval()
    segmenter.clip.requires_grad_(False)


# ===================================================================================== 5 prediction

def denoise(logits, sharpness, least):
    """Prompt denoising: a class nowhere more probable than `least` in an image leaves it.

    logits: B×C×h×w, probabilities softmax(sharpness · logits). A class that leaves gets -1e4: -inf
    would become NaN in interpolation (0 · inf). Where none is left all stay (authors: class 0).
    """
    if not least:
        return logits
    gone = (sharpness * logits).softmax(1).amax((2, 3), keepdim=True) < least  # B C 1 1
    return logits.masked_fill(gone & ~gone.all(1, keepdim=True), -1e4)


def upsample(logits, patch, resized, original):
    """Grid logits B×C×h×w, bilinear to the resized image (padding cut off), then the original."""
    h, w = logits.shape[-2:]
    logits = F.interpolate(logits, (h * patch, w * patch), mode="bilinear")
    return F.interpolate(logits[..., :resized[0], :resized[1]], original, mode="bilinear")


def decide(logits, patch, resized, original, classes, sharpness=1.0, threshold=0.0):
    """The mask B×H×W uint8 of grid logits B×C×h×w: the best class of every pixel.

    classes: how many of the C are classes; the rest, behind them, are background words. A pixel is
    background, which is the value `classes`, where its best is such a word or its probability
    softmax(sharpness · logits) is below the threshold. resized, original: (height, width) of the
    image that CLIP saw and of the file. Memory is bounded: a few classes at a time, LARGEST_MASK
    pixels at most; a larger mask is enlarged by nearest neighbour.
    """
    shrink = min(1, (LARGEST_MASK / math.prod(original)) ** 0.5)
    size = [max(1, round(shrink * n)) for n in original]
    most = max(1, 8 * LARGEST_MASK // (len(logits) * math.prod(size)))      # classes at a time
    best, mask, total = (torch.full((len(logits), *size), v, device=logits.device)
                         for v in (-torch.inf, 0, -torch.inf))              # B H W each
    for first in range(0, logits.size(1), most):
        full = upsample(logits[:, first:first + most], patch, resized, size)
        value, index = full.max(1)
        mask = torch.where(value > best, index + first, mask)
        best = torch.maximum(value, best)
        if threshold:
            total = torch.logaddexp(total, (sharpness * full).logsumexp(1))
    mask = mask.clamp(max=classes)
    if threshold:
        mask = mask.masked_fill((sharpness * best - total).exp() < threshold, classes)
    return F.interpolate(mask[:, None].byte(), original, mode="nearest-exact")[:, 0]


@torch.no_grad()
def predictor(segmenter):
    """The function from uint8 images B×3×H×W to masks {"maskclip": B×H×W, and the method's own}."""
    cfg, patch = segmenter.cfg, segmenter.clip.visual.patch_size[0]
    R = segmenter.reference() if segmenter.rectifier else None

    def dense(x):
        f, baseline = segmenter.both_features(x)
        logits = {"maskclip": similarity(baseline, segmenter.T)}
        if segmenter.rectifier:
            logits[cfg.method] = segmenter.rectified(f, R)
        return logits

    @torch.no_grad()
    def predict(images):
        x = resize_to_fit(images.to(segmenter.device), cfg.size)
        logits, step = slide(dense, x, patch, cfg)
        if segmenter.rectifier:
            logits[cfg.method] = denoise(logits[cfg.method], cfg.sharpness, cfg.denoise)
        return {name: decide(l, step, x.shape[-2:], images.shape[-2:], len(segmenter.names),
                             segmenter.sharpness[name], cfg.threshold)
                for name, l in logits.items()}

    return predict


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
    """IoU in percent of each class, C; NaN for one that neither truth nor prediction has."""
    hit = matrix.diagonal().double()
    return 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)


class Found(NamedTuple):
    """An object of Fig. 1(a) and 5: an image's pixels of a class (VOC tells no instances)."""
    distance: float                                    # of its centroid from the image's centre, px
    iou: float                                                              # percent
    label: int                                                              # its class
    sample: "Sample"
    whole: bool                                                         # the image does not cut it


def objects(label, prediction, sample):
    """The `Found` objects of one label H×W in its prediction H×W."""
    centre = torch.tensor([(n - 1) / 2 for n in label.shape])
    known, found = label != VOID, []
    for c in label[known].unique():
        truth, guess = label == c, (prediction == c) & known
        distance = (truth.nonzero().float().mean(0).cpu() - centre).norm()
        hit = (truth & guess).sum() / (truth | guess).sum()
        edge = torch.cat([truth[0], truth[-1], truth[:, 0], truth[:, -1]])
        found.append(Found(distance.item(), 100 * hit.item(), c.item(), sample, not edge.any()))
    return found


def evaluate(predict, samples, names, base=1):
    """Measure masks against ground truth, in one pass. predict: uint8 B×3×H×W -> {method: B×H×W}.

    names: the classes; where the last is "background" VOC's 0 counts as that, else it is void.
    base: the first class's value in label files. Returns ({method: {"mIoU": percent, "IoU":
    {name: percent}}}, {method: [Found]}, the classes that each label shows: N×C bool, in the order
    in which `predict` saw the images); a class that never occurs has IoU None.
    """
    C, matrices, found, truth = len(names), {}, {}, []
    bar = tqdm(total=len(samples), desc="evaluating", unit="img", leave=False)
    for batch, images, labels in batches_of_one_size(samples, AT_ONCE, names, base):
        truth += [torch.isin(torch.arange(C), label) for label in labels]   # C each
        for method, masks in predict(images).items():
            labels = labels.to(masks.device)
            matrices[method] = matrices.get(method, 0) + confusion(labels, masks, C)
            for triple in zip(labels, masks, batch):
                found.setdefault(method, []).extend(
                    thing for thing in objects(*triple) if names[thing.label] != "background")
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
    return results, found, torch.stack(truth)


def assess(segmenter, samples):
    """Measure masks and hypotheses, each image read once. Returns (`evaluate`'s results and
    objects, `precision_recall` of the hypotheses).
    """
    predict, y, C = predictor(segmenter), [], len(segmenter.names)

    def name_and_predict(images):
        y.append(hypothesize(segmenter, images).cpu())
        return predict(images)

    base = segmenter.cfg.label_base
    results, found, truth = evaluate(name_and_predict, samples, segmenter.classes, base)
    return results, found, precision_recall(torch.cat(y)[:, :C], truth[:, :C])


def precision_recall(y, truth):
    """How good hypotheses are, N×C bool both: {"precision", "recall", "classes_per_image"}."""
    hits = (y & truth).sum().item()
    return {"precision": round(hits / max(1, y.sum().item()), 4),
            "recall": round(hits / max(1, truth.sum().item()), 4),
            "classes_per_image": round(y.sum().item() / len(y), 3)}


def print_table(results, names):
    """IoU of every class and the mean, a column a method, and the last gain over the first."""
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

# What is background in VOC21, by the lists that SCLIP, ClearCLIP and NACLIP share.
VOC_BACKGROUND = (
    "sky, wall, tree, wood, grass, road, sea, river, mountain, sands, desk, bed, building, cloud, "
    "lamp, door, window, wardrobe, ceiling, shelf, curtain, stair, floor, hill, rail, fence")
VOC_NAMES = (
    "airplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse, "
    "motorbike, person, potted plant, sheep, sofa, train, tv monitor").split(", ")
CONTEXT_NAMES = (
    "airplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, "
    "cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, "
    "floor, flower, food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse, "
    "person, plate, platform, potted plant, road, rock, sheep, shelves, sidewalk, sign, sky, "
    "snow, sofa, table, track, train, tree, truck, tv monitor, wall, water, window, "
    "wood").split(", ")
# The category ids of these 59 among the 459 of trainval_merged.json, which are alphabetical too.
CONTEXT_IDS = [
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113,
    115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326,
    347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458]
ADE_NAMES = (
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, "
    "person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, "
    "shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, "
    "bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, "
    "sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, "
    "pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, "
    "toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, "
    "swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, "
    "awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, "
    "bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, "
    "conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, "
    "tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, "
    "animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, "
    "traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, "
    "radiator, glass, clock, flag").split(", ")
HERE = Path(__file__).resolve().parent
OXFORD = "http://host.robots.ox.ac.uk/pascal/VOC"
# dataset: (its files and their md5, the archive first; the folder in it that holds the images;
# class names)
DATASETS = {
    "emoji": ([(HERE / "tests/emoji/emoji-voc.tar", "d9da859f2209886288f26aa5c80ceff4")],
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
MASK_ENDINGS = ("_mask", "_masks", "_label", "_labels", "_gt", "_seg", ".mask", ".overlay")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
EXPORTED = {"student.onnx", "student.fp16.onnx", "student.int8.onnx", "export.json", "bench.png",
            "bench.json"}
MADE = EXPORTED | {"student.pt", "distill.json", "distill.partial.pt", "rectify.json",
                   "figure1a.png", "figure4.png", "figure5.png"}
VOID = 255
SLOWEST = 1000                                          # bytes a second; a slower download gives up
LARGEST_MASK = 2 ** 23                                           # pixels at which a mask is decided
LONGEST = 4096                                        # px; training sees larger images at this size
AT_ONCE = 16                        # images that CLIP sees at once; 32 overflow a CPU's caches
LARGEST_BATCH = 2 ** 22                # pixels evaluated at once: 1.7 GB of logits with 100 classes


@dataclass
class Sample:
    """An image: its name (path in the list or folder, no suffix), its file, its label's or None."""
    name: str
    image: Path
    label: Path | None


def download(url, md5, path):
    """Fetch a file to `path`, unless it is there; `path`.part is what a cut connection left.

    Raises UserError with address, md5 and path for fetching by hand.
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
                have = have if reply.status == 206 else 0    # a server that ignores Range sends all
                total, started = have + int(reply.headers["Content-Length"]), time.time()
                bar = tqdm(total=total, initial=have, desc=path.name, unit="B", unit_scale=True,
                           leave=False)
                with bar, open(part, "ab" if have else "wb") as file:
                    while piece := reply.read1(1 << 20):
                        bar.update(file.write(piece))                  # a disabled bar counts none
                        if file.tell() > total:
                            raise OSError("the server sends more than it announced")
                        if file.tell() - have < SLOWEST * (time.time() - started - 60):
                            raise OSError(f"less than {SLOWEST} bytes a second")
                    if file.tell() < total:
                        raise OSError("the connection was cut; the same command goes on from there")
        except HTTPError as error:
            if error.code != 416:                              # 416: there is nothing left to fetch
                raise
        if not check_integrity(part, md5):
            part.unlink()
            raise OSError("what came is not the published file")
        part.rename(path)
    except (OSError, HTTPException, TypeError, ValueError) as error:     # the last two: odd headers
        raise UserError(f"{path}: not downloaded ({error}); fetch {url} yourself (md5 {md5}) "
                        "and put it there")


def unpack(archive, md5, target):
    """Check a tar or zip against its md5 and unpack it to `target`, which appears whole; its file
    `md5` says what was unpacked.

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
        safe = {} if archive.suffix == ".zip" else {"filter": "data"}  # zips leave such members out
        shutil.unpack_archive(archive, partial, **safe)
        (partial / "md5").write_text(md5)
        partial.rename(target)
    except Exception as error:     # damaged archives raise a dozen classes that have none in common
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{archive}: not unpacked: {error}")


def decode_rle(counts, size):
    """H×W bool of COCO's run-length code: false and true in turns, down column after column.

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
                value -= (bits & 16) << (shift - 4)                    # its highest bit is the sign
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
    """The folder with a dataset's images; gets what is not there yet. Raises UserError."""
    if cfg.data:
        if not Path(cfg.data).is_dir():
            raise UserError(f"{cfg.data}: no such folder; --data wants a folder of images")
        return Path(cfg.data)
    files, inside, _ = DATASETS[cfg.dataset]
    root, target = Path(cfg.root), Path(cfg.root) / cfg.dataset
    folder, context = target / inside, target / inside / "ImageSets/SegmentationContext"
    (archive, md5), stamp = files[0], target / "md5"
    same = stamp.is_file() and stamp.read_bytes() == md5.encode()
    if isinstance(archive, Path) and folder.is_dir() and not same:
        raise UserError(f"{target}: was not unpacked from this version of {archive.name}; delete "
                        "it, and start again")
    if folder.is_dir() and (context.is_dir() or not files[1:]):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / f".{cfg.dataset}.lock", wait=True):                  # two first runs at once
        fetch_dataset(files, root, target, folder, context)
    return folder


def fetch_dataset(files, root, target, folder, context):
    """Download, unpack and convert what `dataset_folder` misses. Raises UserError."""
    needed = ([] if folder.is_dir() else files[:1]) + ([] if context.is_dir() else files[1:])
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
    if not folder.is_dir():
        raise UserError(f"{target}: holds no {folder.relative_to(target)}; delete it, and the "
                        "archive, and start again")


def name_lines(cfg):
    """The lines of --names, a file or words, else the dataset's own names. Raises UserError."""
    if not cfg.names:
        return DATASETS[cfg.dataset][2]
    is_file = os.path.isfile(cfg.names)     # os.path: a long list of words is no path, and no error
    looks_like_file = os.sep in cfg.names or Path(cfg.names).suffix in (".txt", ".csv")
    if not is_file and "," not in cfg.names and looks_like_file:
        raise UserError(f"{cfg.names}: no such file; --names wants a file with one class name a "
                        "line, or words and commas")
    lines = read_text(cfg.names).splitlines() if is_file else cfg.names.split(",")
    lines = [", ".join(w.strip() for w in line.split(",") if w.strip()) for line in lines]
    return [line for line in lines if line not in ("", "__ignore__", "_background_")]  # labelme's


def class_names(cfg):
    """The class names, each with its synonyms: "person, woman, man". Raises UserError."""
    lines = name_lines(cfg)[1:] if cfg.background == "first" else name_lines(cfg)
    names = [line for line in lines if not line.lower().startswith("background:")]
    titles = [name.split(", ")[0] for name in names]
    twice = "".join([title for title in titles if titles.count(title) > 1][:1])
    numbered = "".join([title for title in titles if title.isdigit()][:1])
    for bad, message in [
            (not names, "holds no class name"),
            (twice, f"'{twice}' is named twice"),
            (numbered, f"a line begins with {numbered}; write one class name a line"),
            ("background" in map(str.lower, titles), "a class 'background': write 'background: "
             "sky, wall, ...', the words that it stands for"),
            (not all(map(str.isprintable, lines)), "holds control characters"),
            (len(names) >= VOID, f"{len(names)} names; a mask of 8 bits holds {VOID - 1}")]:
        if bad:
            raise UserError(f"{cfg.names}: {message}")
    return names


def background_words(cfg, names=None):
    """The words that stand for none of the classes: --background's, or those of a line "background:
    sky, wall" of --names. field: VOC21's of SCLIP's protocol. first: the first line of --names.
    names: the classes, where they are not cfg's.
    """
    lines = [line.partition(":")[2] for line in name_lines(cfg)
             if line.lower().startswith("background:")]
    if cfg.background == "first":
        lines = name_lines(cfg)[:1]
    elif cfg.background:
        lines = [VOC_BACKGROUND if cfg.background == "field" else cfg.background]
    own = {word for name in names or class_names(cfg) for word in name.split(", ")}
    words = [word.strip() for line in lines for word in line.split(",")]
    return [word for word in words if word and word not in own]


def list_samples(folder, split):
    """The samples of a split: the listed ones where ImageSets/ exists (PASCAL Context's lists
    before VOC's), those of images/ and annotations/ in ADE20K's layout, else every image in the
    folder, without labels.

    Images meet their labels by name; a training image may have none, it needs none. A plain folder
    is all train and no val. Raises UserError.
    """
    kind = "Context" if (folder / "ImageSets/SegmentationContext").is_dir() else ""
    where, labels = folder / "JPEGImages", folder / f"SegmentationClass{kind}"
    index = folder / f"ImageSets/Segmentation{kind}" / f"{split}.txt"
    if (folder / "ImageSets").is_dir():
        if split == "val" and not index.is_file():
            return []
        if not index.is_file():
            raise UserError(f"{index}: missing; write the {split} images' names there, one a line")
        images = find_images(where, say=split == "train")
        lines = [line for line in read_text(index).splitlines() if line.strip()]
        names = [listed_name(line, images) for line in lines]
        if not names:
            raise UserError(f"{index}: empty; write the {split} images' names there, one a line")
    else:
        ade = {"train": "training", "val": "validation"}[split]
        if (folder / "annotations").is_dir() and (folder / "images" / ade).is_dir():
            where, labels = folder / "images" / ade, folder / "annotations" / ade
        elif split == "val":
            return []
        else:
            where, labels = where if where.is_dir() else folder, None
        images, index = find_images(where), where
        names = list(images)
    labelled = labels is not None and labels.is_dir()
    label = lambda name: labels / f"{name}.png"
    needed = lambda name: labelled and (split == "val" or label(name).is_file())
    samples = [Sample(name, images.get(name, where / f"{name}.jpg"),
                      label(name) if needed(name) else None) for name in names]
    for path in [p for s in samples for p in (s.image, s.label) if p and not p.is_file()]:
        raise UserError(f"{path}: missing, though {index} lists it; restore it or take it off the "
                        "list")
    return samples


def find_images(folder, say=True):
    """The images in a folder and below, {name: path}: the path without its suffix is the name.

    Hidden files and folders are nobody's images, and neither is a mask beside its image: x_mask.png
    beside x.jpg. Says what else it skips. Raises UserError where no image is left.
    """
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not any(
        part.startswith(".") for part in p.relative_to(folder).parts)]
    images, skipped = {}, collections.Counter()
    for path in files:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if path.suffix.lower() not in SUFFIXES:
            skipped[path.suffix.lower() or path.name] += 1
        elif images.setdefault(name, path) != path:     # x.jpg and x.png: the first
            skipped["of the same name"] += 1
    masks = [name for name in images if any(name.lower().endswith(ending)
             and name[:-len(ending)] in images for ending in MASK_ENDINGS)]
    skipped.update({"masks": len(masks)} if masks else {})
    what = printable(", ".join(f"{count} {kind}" for kind, count in skipped.most_common(5)))
    heic = "; convert HEIC to JPEG first" if {".heic", ".heif"} & skipped.keys() else ""
    images = {name: path for name, path in images.items() if name not in masks}
    if not images:
        raise UserError(f"{folder}: holds no images ({' '.join(SUFFIXES)})"
                        + (f", only {what}{heic}" if what else ""))
    if what and say:
        print(printable(f"{folder}: skipped {what}{heic}"))
    return images


def listed_name(line, images):
    """The image's name in a line of a list: a name, or a name with a suffix, a path or a flag."""
    line, (first, *rest) = line.strip(), line.split()
    column = Path(first).suffix.lower() in SUFFIXES or all(w.lstrip("-").isdigit() for w in rest)
    text = first if column and line not in images else line            # names may have spaces
    tails = [text.split("/", k)[-1] for k in range(text.count("/") + 1)]    # the longest first
    names = [name for tail in tails for name in (tail, tail.rpartition(".")[0])]
    return next((name for name in names if name in images), text)


def splits(folder):
    """(training samples, labelled validation samples). Raises UserError."""
    train = list_samples(folder, "train")
    val = [sample for sample in list_samples(folder, "val") if sample.label]
    if len(train) < WORLD:
        raise UserError(f"{folder}: {len(train)} images are too few for {WORLD} processes")
    return train, val


# ============================================================================== 8 images and labels

@contextlib.contextmanager
def opened(path, what):
    """A PIL image of a file. Raises UserError, also beyond Pillow's limit of 179 megapixels."""
    try:
        if not Path(path).is_file():                                    # a pipe would be waited for
            raise UserError(f"{path}: no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from 89 on
            image = Image.open(path)
        with image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable {what} ({error}); replace or remove it")


def check_labels(samples, names, cfg):
    """Look at every label before training: it can be read, fits its image, and holds known values.

    Raises UserError; warns of values that seem to begin at 0, and of images that EXIF rotates.
    """
    C, values, rotated = len(names), set(), 0

    def read(sample):
        with opened(sample.image, "image") as image:
            turn = image.getexif().get(ExifTags.Base.Orientation, 1)
            size = image.size if turn in (5, 6, 7, 8) else image.size[::-1]
        return turn > 1, load_label(sample.label, size, C, cfg.label_base).unique().tolist()

    for turned, found in read_ahead(read, samples):
        rotated += turned
        values |= {c + cfg.label_base for c in found if c != VOID}
    if samples and not values:
        raise UserError(f"{samples[0].label.parent}: the validation masks hold no class, only "
                        "background or void")
    if rotated:
        print(f"warning: {rotated} images are rotated by EXIF; their labels are taken to be of the "
              "rotated image")
    if cfg.label_base and C > 1 and values == set(range(1, C)):
        print(f"labels: 0 background, 1 {names[0]}, ..., {C} {names[-1]}; found {sorted(values)}. "
              f"If 0 is meant to be {names[0]}, give --label-base 0")


def load_image(path):
    """Any image as 3×H×W uint8 RGB: EXIF applied, 16 bits cut to 8, transparency laid on white."""
    with opened(path, "image") as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):                    # 16-bit greys, which convert("RGB") clips
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def load_label(path, size, classes, base=1, background=VOID):
    """A palette PNG as H×W uint8 in {0..C-1, 255}: VOC's background (0) becomes `background`, void
    by default, class c becomes c - 1. base: the first class's value; 0: there is no background.
    """
    with opened(path, "mask") as image:
        mode, label = image.mode, np.array(image)
    if mode not in ("P", "L"):
        raise UserError(f"{path}: a mask holds one class number a pixel (palette PNG), this one is "
                        f"{mode}; convert it")
    if label.shape != tuple(size):
        raise UserError(f"{path}: the mask is {label.shape[1]}×{label.shape[0]}, its image "
                        f"{size[1]}×{size[0]}")
    wrong = label[(label >= classes + base) & (label != VOID)]
    if wrong.size:
        raise UserError(f"{path}: the mask holds {wrong[0]}, with {classes} classes (0 is "
                        "background, 255 void)")
    values = np.arange(256, dtype=np.uint8) - base                         # of 0 and 255: see below
    values[VOID] = VOID
    if base:
        values[0] = background
    return torch.from_numpy(values[label])


def read_ahead(read, items, ahead=32, threads=min(8, os.cpu_count())):
    """Yield read(item) of each, in order, while threads read the next ones, `ahead` at most.

    Each thread computes alone: a team of OpenMP's would wait for its slowest at the end of every
    small operation. From Python 3.14 on, Executor.map can bound that itself.
    """
    torch.get_num_threads()             # settles the caller's own number, before readers set theirs
    with ThreadPoolExecutor(threads, "reader", torch.set_num_threads, [1]) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def resize_to_fit(image, size, mode=v2.InterpolationMode.BILINEAR, factor=1.0):
    """Resize ..×3×H×W to the largest that factor · `size`, (long, short side in px), holds."""
    height, width = image.shape[-2:]
    scale = factor * min(size[0] / max(height, width), size[1] / min(height, width))
    new = [max(1, round(n * scale)) for n in (height, width)]
    return v2.functional.resize(image, new, mode, antialias=True)


def limit(image):
    """An image 3×H×W, smaller where it is longer than LONGEST: dozens of them wait in memory."""
    return resize_to_fit(image, (LONGEST, LONGEST)) if max(image.shape) > LONGEST else image


def subsample(samples, count):
    """At most `count` of the samples, evenly spread over the list."""
    return samples[::math.ceil(len(samples) / count)]


def window_starts(n, side, step):
    """Where windows of `side` px begin on an axis of n px; the last ends with it; one if n is less.
    """
    return [*range(0, n - side, max(1, step)), max(n - side, 0)]


def batches_of_one_size(samples, batch, names=(), base=1):
    """Yield (samples, images B×3×H×W uint8, labels B×H×W uint8 or None), each batch of one image
    size. names, base: as `evaluate`'s; without names no labels are read, and images have `limit`'s
    size.

    No more than 4 · batch images wait for others of their size. A batch ends early at LARGEST_BATCH
    pixels.
    """
    C = len(names) - ("background" in names)

    def read(sample):
        image, zero = load_image(sample.image), C if "background" in names else VOID
        if not names:
            return sample, limit(image), None
        return sample, image, load_label(sample.label, image.shape[1:], C, base, zero)

    def stack(group):
        samples, images, labels = zip(*group)
        return samples, torch.stack(images), torch.stack(labels) if names else None

    waiting = {}
    for sample, image, label in read_ahead(read, samples):
        group = waiting.setdefault(image.shape, [])
        group.append((sample, image, label))
        if len(group) == batch or (len(group) + 1) * image[0].numel() > LARGEST_BATCH:
            yield stack(waiting.pop(image.shape))
        elif sum(map(len, waiting.values())) > 4 * batch:
            yield stack(waiting.pop(max(waiting, key=lambda size: len(waiting[size]))))
    yield from map(stack, waiting.values())


def clip_view(images, side, view):
    """What CLIP's image feature is made of: images ..×3×H×W, the shorter side `side` px, and of
    that the square in the middle unless view is "whole".
    """
    if max(images.shape[-2:]) > 8 * min(images.shape[-2:]):                 # cost is bounded
        images = v2.functional.center_crop(images, [8 * min(images.shape[-2:])] * 2)
    x = resize_to_fit(images, (10 ** 6, side), v2.InterpolationMode.BICUBIC)  # as CLIP's own
    return x if view == "whole" else v2.functional.center_crop(x, side)


def each_image(compute, samples, about):
    """A list, for every sample the result of compute(images B×3×H×W), which gives B of them.

    about: the progress bar's label.
    """
    found = {}
    with tqdm(total=len(samples), desc=about, unit="img", leave=False) as bar:
        for batch, images, _ in batches_of_one_size(samples, AT_ONCE):
            found |= zip([sample.image for sample in batch], compute(images))
            bar.update(len(batch))
    return [found[sample.image] for sample in samples]                # an image may be listed twice


def hypotheses(segmenter, samples):
    """y: N×C bool, the hypothesis of every sample."""
    return torch.stack(each_image(functools.partial(hypothesize, segmenter), samples,
                                  "hypothesis")).cpu()


class PhotometricDistort(v2.RandomPhotometricDistort):
    """torchvision's, but channels change places without an index that a GPU would wait for."""

    def transform(self, image, params):
        image = super().transform(image, params | {"channel_permutation": None})
        order = params["channel_permutation"]
        return image if order is None else torch.stack([image[c] for c in order.tolist()])


# ======================================================================================== 9 figures

TITLES = {"maskclip": "MaskCLIP", "reclip": "ReCLIP", "reclip++": "ReCLIP++",
          "maskclip+": "MaskCLIP+", "student": "DeepLabV2"}
LINES = [dict(color="0.5", marker="o", linestyle="--"), dict(color="#c83c28", marker="s"),
         dict(color="#285ab4", marker="^"), dict(color="#288c50", marker="D", linestyle=":")]


@functools.cache
def palette():
    """VOC's colours, 256 RGB triples in one list: the index's bits, spread over the channels."""
    return [sum(((i >> (3 * j + channel)) & 1) << (7 - j) for j in range(8))
            for i in range(256) for channel in range(3)]


def colour(c, names=()):
    """RGB of class c (0..C-1), each 0..255: VOC's, whose palette starts with the background's."""
    start = 0 if names and names[c] == "background" else 3 * (c + 1)
    return tuple(palette()[start:start + 3])


def paint(mask, names, image=None, pale=None):
    """A mask H×W in the colours of the classes `names`, void white: H×W×3 uint8. Over an image
    3×H×W where given, pale where `pale` H×W says so.
    """
    colours = torch.full((VOID + 1, 3), 255.0)
    colours[:len(names)] = torch.tensor([colour(c, names) for c in range(len(names))]).float()
    painted = colours[mask.long()]                                          # H W 3
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
    axis = figure.subplots()               # one, with cells of 1×1: dozens would take a second more
    for r, images in enumerate(rows.values()):
        for k, image in enumerate(images):
            h, w = image.shape[:2]
            cell = 0.95 / max(h, w)                                         # a pixel's side
            x, y = k - w / 2 * cell, r - h / 2 * cell                       # the top left corner
            axis.imshow(image, extent=(x, x + w * cell, y + h * cell, y),
                        interpolation="nearest" if max(h, w) < 200 else "antialiased")
            if boxes:
                left, top, right, bottom = boxes[k]
                for style in (dict(edgecolor="white"), dict(edgecolor="blue", linestyle="--")):
                    axis.add_patch(Rectangle(
                        (x + left * cell, y + top * cell), (right - left + 1) * cell,
                        (bottom - top + 1) * cell, fill=False, linewidth=2, **style))
    axis.set(xlim=(-0.5, columns - 0.5), ylim=(len(rows) - 0.5, -0.5), aspect="equal")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xticks(range(columns), titles or [""] * columns)
    axis.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    patches = [Patch(facecolor=[v / 255 for v in colour(c, names)], edgecolor="black",
                     label=names[c]) for c in classes]
    figure.legend(handles=patches, loc="outside lower center", ncols=per_line, frameon=False)
    return figure


def draw_gallery(predict, samples, names, classes=None, base=1):
    """Fig. 4 and 5: rows image, ground truth, one a method of `predict`; a column per sample.

    Where ground truth says background or void nothing is scored, and predictions are shown pale.
    classes: of each sample the class around whose pixels a box is drawn.
    """
    rows, seen, boxes = {}, set(), []
    for k, sample in enumerate(samples):
        _, images, (label,) = next(batches_of_one_size([sample], 1, names, base))
        masks = {method: mask[0].cpu() for method, mask in predict(images).items()}
        cells = {"image": images[0].permute(1, 2, 0).numpy(), "ground truth": paint(label, names)}
        cells |= {TITLES.get(m, m): paint(mask, names, pale=label == VOID)
                  for m, mask in masks.items()}
        for title, cell in cells.items():
            rows.setdefault(title, []).append(cell)
        if classes:
            y, x = (label == classes[k]).nonzero().T
            boxes.append((x.min().item(), y.min().item(), x.max().item(), y.max().item()))
        for mask in (label, *masks.values()):
            seen.update(mask[label != VOID].unique().tolist())
    return draw_rows(rows, names, sorted(seen), boxes)


def figure4(predict, samples, names, base=1):
    """Fig. 4: eight images, evenly spread over the list."""
    return draw_gallery(predict, subsample(samples, 8), names, base=base)


def figure5(predict, found, names, base=1):
    """Fig. 5: eight objects, the farthest from their images' centres, each in another image."""
    farthest = {}
    for thing in sorted(found, key=lambda thing: -thing.distance):
        farthest.setdefault(thing.sample.image, thing)
    eight = list(farthest.values())[:8]
    samples, classes = [thing.sample for thing in eight], [thing.label for thing in eight]
    return draw_gallery(predict, samples, names, classes, base)


def figure1a(found, ring):
    """Fig. 1(a): mean IoU of the objects in each ring around the image's centre, a line per method.

    ring: px. Pale: all objects. What the image cuts is farther out and worse for that alone, so the
    strong lines are of whole objects, where there are any.
    """
    from matplotlib.figure import Figure
    things = [t for t in found["maskclip"] if t.whole] or found["maskclip"]
    ring *= max(1, math.ceil(max(t.distance for t in things) / ring / 8))   # eight rings at most
    rings, counts = np.unique([t.distance // ring for t in things], return_counts=True)
    figure = Figure((8, 4.6), layout="constrained")
    axis = figure.subplots()
    for style, (method, every) in zip(LINES, found.items()):
        whole = [t for t in every if t.whole] or every
        for things, look in ((every, dict(alpha=0.25)),
                             (whole, dict(linewidth=2.5, label=TITLES.get(method, method)))):
            means = [np.mean([t.iou for t in things if t.distance // ring == r]) for r in rings]
            axis.plot(range(len(rings)), means, markersize=8, **style, **look)
    ticks = [f"{r * ring:.0f}-{(r + 1) * ring:.0f}\nn={n}" for r, n in zip(rings, counts)]
    axis.set_xticks(range(len(rings)), ticks)
    axis.set(xlabel="distance of the object from the image's centre, px; n whole objects",
             ylabel="mean IoU, %", ylim=(0, None), title="Fig. 1(a): whole objects (pale: all)")
    axis.grid(axis="y", alpha=0.4)
    axis.legend()
    return figure


def save_figure(figure, path):
    """Write a matplotlib Figure as a PNG."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


# ================================================================= 10 loading CLIP, packing prompts

def load_clip(cfg, device):
    """(open_clip's model, frozen, with buffers `mean` and `std` (3×1×1); its tokenizer).

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
    if scheme != "local-dir" and cfg.pretrained and not Path(cfg.pretrained).is_file():
        print(f"loading CLIP {name} {cfg.pretrained}; the first time it is downloaded", flush=True)
    logging.disable(logging.ERROR)                       # open_clip tells every step of its loading
    try:
        with warnings.catch_warnings():
            meant = "ignore" if cfg.recipe else "default"
            warnings.filterwarnings(meant, "QuickGELU mismatch")
            check_towers(open_clip.get_model_config(name) or {})            # {}: an unknown name
            clip = open_clip.create_model(
                name, cfg.pretrained or None, device=device, require_pretrained=bool(scheme),
                force_custom_text=True)                            # so that clip.text always exists
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:      # open_clip, torch and safetensors have no error class in common
        why = (str(error) or repr(error)).splitlines()[0][:200]
        mend = ("; where there is internet, run `python -c \"import open_clip; open_clip."
                f"create_model('{name}', '{cfg.pretrained}')\"` and copy ~/.cache/huggingface, or "
                "give these weights with --pretrained FILE; --dataset emoji needs neither, but its "
                "CLIP knows emoji only") if "download" in why.lower() else ""
        raise UserError(f"cannot load CLIP {cfg.clip} {cfg.pretrained}: {why}{mend}")
    finally:
        logging.disable(logging.NOTSET)
    imagenet = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    values = imagenet if cfg.normalization == "imagenet" else clip.visual.preprocess_cfg
    for name in imagenet:
        value = torch.tensor(values[name], device=device)[:, None, None]    # 3 1 1
        clip.register_buffer(name, value, persistent=False)
    return clip.eval().requires_grad_(False), tokenizer


def check_towers(config):
    """Raise ValueError where a CLIP's configuration has towers that section 2 does not compute."""
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
    """(the names' tokens and EOT, C×n int, padded with 0; the prompt's longest length L).

    Raises UserError for a name that leaves no room for a prompt.
    """
    tokens = tokenizer(names)[:, 1:]                                        # drop SOS
    context = clip.text.positional_embedding.size(0)
    lengths = tokens.argmax(1) + 1                                          # EOT is the largest
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
    """For `reference_features`: embeddings prompts×S×d, their places S, the attention mask S×S.

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
    sees = (place <= place[:, None]) & ((name == -1) | (name == name[:, None]))  # row sees column
    return x, place, torch.zeros(sees.shape, device=device).masked_fill(~sees, -torch.inf)


# ========================================================================= 11 files and checkpoints

@contextlib.contextmanager
def whole_file(path):
    """A temporary path that becomes `path` when the block ends, whole or not. Raises UserError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def locked(path, wait):
    """Let one process at a time into the block: the next one waits, or is refused by UserError."""
    owner = path.with_suffix(".pid")
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        who = f"process {read_text(owner).strip()}" if owner.is_file() else "another process"
        raise UserError(f"{path.parent}: {who} is writing there; wait for its end, or give another "
                        "--out")
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def output_folder(out):
    """Make the folder of a run and keep other runs out of it. Raises UserError."""
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if RANK == 0:
                stack.enter_context(locked(out / ".lock", wait=False))
        except PermissionError as error:
            raise UserError(f"{out}: cannot be written to ({error.strerror}); give another --out")
        yield


def read_text(path):
    """A text file in UTF-8, with or without a byte-order mark. Raises UserError."""
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text in UTF-8; save it as UTF-8")


def save(path, state):
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()                              # torch reports a full disk as a RuntimeError
    torch.save(state, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def list_files(folder):
    """The names of the files in a folder, for the last line of a run."""
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return printable(", ".join(names))


def list_digest(samples):
    """A short name of a list of images: equal lists have equal digests."""
    names = "\n".join(sample.name for sample in samples)
    return hashlib.md5(names.encode("utf-8", "surrogateescape")).hexdigest()


def digest(module):
    """A short name of a module's weights: equal weights have equal digests."""
    found = hashlib.md5()
    for tensor in module.state_dict().values():
        found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()


def state_of(segmenter):
    """What a checkpoint holds: tensors and plain values only."""
    return {"config": asdict(segmenter.cfg), "names": segmenter.names,
            "background": segmenter.background, "images": segmenter.images, "T": segmenter.T,
            "rectifier": segmenter.rectifier.state_dict(),
            "clip": segmenter.clip.visual.state_dict() if segmenter.cfg.finetune else None}


def restore(segmenter, state):
    """Give a segmenter the weights of a checkpoint, in eval mode. Raises UserError."""
    try:
        segmenter.rectifier.load_state_dict(state["rectifier"])
        if state["clip"]:
            segmenter.clip.visual.load_state_dict(state["clip"])
    except (RuntimeError, KeyError, TypeError, AttributeError):
        raise UserError("the checkpoint's weights do not fit its settings; "
                        "make it again with `python rectify.py`")
    segmenter.rectifier.eval()


def load_checkpoint(path, part="rectifier"):
    """A checkpoint of ours with this part: tensors and plain values alone. Raises UserError."""
    maker = {"rectifier": "rectify.py", "student": "distill.py"}[part]
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; make it with `python {maker}`")
    try:
        with open(path, "rb") as file:
            damaged = zipfile.ZipFile(file).testzip()        # compares the checksum of every member
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        T = state["T"] if part == "rectifier" else state[part]["T"]
        weights = [T, *state[part].values(), *(state.get("clip") or {}).values()]
        finite = all(w.isfinite().all() for w in weights)
        queries = [name.strip() for name in [*state["names"], *state["background"]]]
        sound = finite and not damaged and T.ndim == 2 and len(T) == len(queries) and all(
            name.isprintable() for name in queries)
        state["config"]["seed"], state["images" if part == "rectifier" else "taught_by"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})")
    except Exception as error:      # torch.load has no error class of its own for files not its own
        raise UserError(f"{path}: not a checkpoint of {maker} ({type(error).__name__}); "
                        "make it again")
    if not sound:
        raise UserError(f"{path}: damaged, or its weights are not finite; make it again with "
                        f"`python {maker}`")
    return state


def resume(segmenter, optimizer, schedule, state):
    """Take all of an interrupted run from its checkpoint; returns its log, one entry per epoch."""
    restore(segmenter, state)
    try:
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        print(f"resuming after epoch {len(state['log'])} of {segmenter.cfg.epochs}")
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{segmenter.cfg.out}/rectify.partial.pt: does not fit its settings; leave "
                        "out --resume")
    return state["log"]


def agreement(masks):
    """How often two images have the same class at the same patch; at 1 masks ignore the images.

    masks: C×h×w, the masks M of all images, summed. Returns a number from 1/C to 1.
    """
    count = masks.sum(0)                                                    # h w
    same = (masks / count.clamp(min=1)).square().sum(0)                     # h w
    return ((same * count).sum() / count.sum()).item()


def finish_epoch(segmenter, optimizer, schedule, losses, masks, log, bar, out):
    """Log an epoch, warn of a collapse, stop at a loss not finite, save what --resume needs."""
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
    if same > (1 + 1 / len(masks)) / 2:               # midway between masks of noise and a collapse
        bar.write("warning: the masks hardly depend on the image: two images have the same class "
                  f"on {same:.0%} of their patches. Lower --lr-conv, --lr or --alpha",
                  file=sys.stderr)
    write_text(out / "log.jsonl", "\n".join(map(json.dumps, log)))
    save(out / "rectify.partial.pt", state_of(segmenter) | {
        "log": log, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})


def load_segmenter(path, **typed):
    """The Segmenter of a checkpoint, in eval mode. typed: free fields of its Config to change."""
    state = load_checkpoint(path)
    try:
        cfg = configure(state["config"], **typed)
        segmenter = Segmenter(cfg, state["names"], pick_device(cfg), state["T"],
                              state["background"])
        restore(segmenter, state)
    except UserError as error:
        raise UserError(f"{path}: {error}")
    return segmenter


# ============================================================================= 12 processes, memory

# Rank, world size and local rank from torchrun; 0, 1, 0 without it.
RANK, WORLD, LOCAL = (int(number) if (number := os.environ.get(name, "")).isdecimal() else 0
                      for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
RANK, WORLD, LOCAL = (RANK, WORLD, LOCAL) if WORLD > 1 else (0, 1, 0)
if RANK > 0:                                                        # elsewhere TQDM_DISABLE decides
    tqdm = functools.partial(tqdm, disable=True)


def pick_device(cfg):
    """The torch device that --device means, under torchrun this process's. Raises UserError."""
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
    auto: where the hardware has it.

    Not for the text encoder: a step has few tokens for it, and would cast its frozen weights anew
    each time.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))


def uses_bf16(device, precision="auto"):
    """Whether to compute in bfloat16: as asked, or where the hardware has it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = getattr(torch.cpu, "get_capabilities", dict)()                # older torch does not tell
    return any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 runs the block first, and may download; the others wait, and then find it done."""
    if RANK > 0:
        distributed.barrier()
    try:
        yield
    finally:
        if RANK == 0 and WORLD > 1:
            distributed.barrier()


def wrap_ddp(module, **options):
    """The module, in DDP where there are several processes: the mean of all their gradients."""
    if WORLD == 1:
        return module
    gpu = next(module.parameters()).get_device()                            # -1 on the CPU
    return nn.parallel.DistributedDataParallel(module, [gpu] if gpu >= 0 else None, **options)


def epoch_order(seed, epoch, N):
    """The order of an epoch's N images, the same on every rank; later draws are each rank's own.

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
    """An empty tensor on the device, in RAM, or in a file in the folder `out`; prints which.

    It takes at most 0.7 of what is free on a GPU, half of the RAM. Raises UserError without room.
    """
    size = math.prod(shape)
    need = size * dtype.itemsize / 1e9                                      # GB
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


# ================================================================================== 13 command line

class UserError(Exception):
    """Something that the person at the keyboard can mend: shown as one line, exit code 2."""


def flag(name):
    """The command line's spelling of a field of Config."""
    return "--" + name.replace("_", "-")


FROM_0 = ("weight_decay", "lr_encoder", "head", "floor", "seed", "window", "stride")
POSITIVE = ("jitter", "ring", "rates", "stretch", "crop", "size", "batch", "views", "top_k", "tile",
            "lr", "lr_conv", "alpha", "width")


def refuse_odd_numbers(cfg):
    """Raise UserError for what a number in a Config of either script may not be."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        for number in value if isinstance(value, tuple) else [value]:
            limit = 2 ** 32 if isinstance(number, int) else math.inf
            if isinstance(number, (int, float)) and not abs(number) < limit:
                raise UserError(f"{flag(f.name)} {number}: not a sensible number")
            if f.name in FROM_0 and number < 0:
                raise UserError(f"{flag(f.name)} {number}: from 0 on")
            if f.name in POSITIVE and number <= 0:
                raise UserError(f"{flag(f.name)} {number}: must be positive")


def refuse_nonsense(cfg):
    """Raise UserError for values that make no sense, alone or together."""
    refuse_odd_numbers(cfg)
    for bad, message in [
            (not -1 < cfg.t < 1, f"--t {cfg.t}: a cosine's threshold lies in (-1, 1)"),
            (cfg.epochs < 1, f"--epochs {cfg.epochs}: starts at 1"),
            (max(cfg.lr, cfg.lr_conv) >= 1e6, "--lr and --lr-conv must be below a million"),
            (not 0 <= cfg.threshold < 1, f"--threshold {cfg.threshold}: a probability, from 0 on"),
            (0 < cfg.window < cfg.stride, f"--stride {cfg.stride}: leaves gaps between windows of "
             f"{cfg.window} px; give at most --window"),
            (cfg.recipe and cfg.dataset == "emoji", "--recipe 2024 is not for Emoji VOC"),
            (cfg.recipe and cfg.clip != REGIME_2024["clip"],
             f"--clip {cfg.clip}: --recipe 2024 means {REGIME_2024['clip']}; leave out --clip"),
            (":" not in cfg.clip and not cfg.pretrained,
             f"--clip {cfg.clip} needs --pretrained: open_clip's tag, or a file"),
            (cfg.data and not cfg.names, "--data needs --names: a file, one class name a line")]:
        if bad:
            raise UserError(message)


def check_trained(config, trained, typed):
    """Raise UserError where a checkpoint's configuration is not of this dataclass, or where what
    was typed contradicts it in a field that is not free.
    """
    kinds = {f.name: typing.get_origin(f.type) or f.type for f in fields(config)}
    if kinds.keys() != trained.keys() or not all(
            isinstance(trained[name], kind) for name, kind in kinds.items()) or not all(
            isinstance(v, (int, float)) for vs in trained.values() if isinstance(vs, tuple)
            for v in vs):
        raise UserError("the checkpoint's settings are of another version of this script; train "
                        "anew")
    for f in fields(config):
        was, now = trained[f.name], typed.get(f.name, trained[f.name])
        if now != was and not f.metadata["free"]:
            raise UserError(f"{flag(f.name)} {now}: the checkpoint was trained with {was}; leave "
                            f"out {flag(f.name)}, or train anew")


def command_line(config, doc, recipes, argv=None):
    """What was typed, {field: value}: a command line made of a dataclass of `option`s.

    recipes: {dataset: row}, for the defaults that --help shows.
    """
    parser = argparse.ArgumentParser(description=doc, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = {dataset: row | row.get(row.get("method"), {}) for dataset, row in recipes.items()}
    for f in fields(config):
        about, choices, several = f.metadata["help"], f.metadata["choices"], typing.get_args(f.type)
        if f.type is bool:
            parser.add_argument(flag(f.name), action="store_true", help=about)
            continue
        values = {dataset: row[f.name] for dataset, row in rows.items() if f.name in row}
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


# ================================================================================ 14 modes and main

def open_run(typed):
    """(Config, checkpoint or None) of the run to evaluate, resume or begin. Raises UserError."""
    if "eval" in typed:
        kept = [Path(typed["eval"])]
        typed = {"out": str(kept[0].parent)} | typed
    else:
        out = Path(typed.get("out") or configure(**typed).out)
        kept = [out / "rectify.partial.pt", out / "rectify.pt"] if "resume" in typed else []
        kept = [path for path in kept if path.is_file()]
    if not kept:
        return configure(**typed), None
    state = load_checkpoint(kept[0])
    cfg = configure(state["config"], **typed)
    if "eval" in typed and not typed.keys() & {"names", "background"}:      # the checkpoint's then
        return cfg, state
    if (state["names"], state["background"]) != (class_names(cfg), background_words(cfg)):
        raise UserError(f"{kept[0]}: was trained with other class names; give the same, or leave "
                        f"out {'--names and --background' if 'eval' in typed else '--resume'}")
    return cfg, state


def learn(segmenter, samples, state):
    """Train, or go on with `state`; rank 0 writes rectify.pt. Returns {stage: seconds}."""
    started, out = time.time(), Path(segmenter.cfg.out)
    segmenter.images = list_digest(samples)
    data = training_data(segmenter, samples)
    print(f"hypothesis: {data[2].float().sum(1).mean():.2f} classes an image")
    prepared = time.time()
    train(segmenter, data, len(samples), out, state)
    if RANK == 0:
        save(out / "rectify.pt", state_of(segmenter))
        remove_stale(out, digest(segmenter.rectifier))
        (out / "rectify.partial.pt").unlink()
    return {"features": round(prepared - started, 1), "training": round(time.time() - prepared, 1)}


def remove_stale(out, weights):
    """Remove what other weights made in a run's folder: it would be taken for this run's."""
    with contextlib.suppress(UserError):                # one that cannot be read is not of this run
        if load_checkpoint(out / "student.pt", "student")["taught_by"] == weights:
            return
    seen = {path.name for path in out.iterdir()}
    shown = {name.removesuffix(".overlay.png") for name in seen if name.endswith(".overlay.png")}
    pairs = {stem + end for stem in shown for end in (".mask.png", ".overlay.png")
             if {stem + ".mask.png", stem + ".overlay.png"} <= seen}
    remove(out, pairs | MADE, "run")


def remove(folder, names, maker):
    """Remove these files where they are, and say so. maker: what else made them, "run"."""
    there = sorted(name for name in names if (folder / name).is_file())
    for name in there:
        (folder / name).unlink()
    if there:
        print(f"removed an earlier {maker}'s {', '.join(there)}")


def measure(segmenter, val, seconds):
    """Measure on labelled images: the table, rectify.json, and the figures. seconds: what the
    stages before took.
    """
    cfg, names, started = segmenter.cfg, segmenter.classes, time.time()
    out, predict = Path(cfg.out), predictor(segmenter)
    results, found, quality = assess(segmenter, val)
    seconds["evaluation"] = round(time.time() - started, 1)
    report = {"results": results, "hypothesis": quality, "config": asdict(cfg),
              "versions": versions(), "seconds": seconds}
    write_text(out / "rectify.json", json.dumps(report, indent=1))
    save_figure(figure1a(found, cfg.ring), out / "figure1a.png")
    save_figure(figure4(predict, val, names, cfg.label_base), out / "figure4.png")
    save_figure(figure5(predict, found["maskclip"], names, cfg.label_base), out / "figure5.png")
    print_table(results, names)
    print(f"hypothesis on val: precision {quality['precision']:.3f}, recall "
          f"{quality['recall']:.3f}, {quality['classes_per_image']:.2f} classes an image")


def describe(segmenter, samples, seconds):
    """What can be known without labels, of 100 training images: the share of each class and how
    many pixels the rectification changed. Writes rectify.json, so that runs can be compared.
    """
    names, some = segmenter.classes, subsample(samples, 100)
    predict, shares, changed = predictor(segmenter), np.zeros(len(names)), 0
    for sample in tqdm(some, "describing", unit="img", leave=False):
        masks = predict(limit(load_image(sample.image))[None])
        mask = masks[segmenter.cfg.method].cpu()
        changed += (mask != masks["maskclip"].cpu()).sum().item()
        shares += mask.flatten().long().bincount(minlength=len(names)).numpy()
    pixels = shares.sum().item()
    share = {name: round(n / pixels, 4) for name, n in zip(names, shares.tolist())}
    changed = round(changed / pixels, 4)
    report = {"images": len(some), "share": share, "changed": changed,
              "config": asdict(segmenter.cfg), "versions": versions(), "seconds": seconds}
    write_text(Path(segmenter.cfg.out) / "rectify.json", json.dumps(report, indent=1))
    print(f"no labels, so no mIoU. On {len(some)} training images rectification changes "
          f"{changed:.1%} of MaskCLIP's pixels; share of the pixels:")
    for name, value in sorted(share.items(), key=lambda pair: -pair[1]):
        print(f"  {name:<20}{value:>7.1%}")


def slide(dense, x, patch, cfg):
    """({method: logits of images x: B×3×H×W}, px of a step of their grid).

    dense: from images to their {method: logits B×C×h×w on CLIP's grid}. With cfg.window it sees
    windows, and the logits, B×C×H×W, are the mean over those that see a pixel: the protocol of
    SCLIP, ClearCLIP and NACLIP (window 224, stride 112, short side 336).
    """
    if not cfg.window:
        return dense(x), patch
    side, total, count = cfg.window, {}, 0
    tops, lefts = (window_starts(n, side, cfg.stride or side // 2) for n in x.shape[-2:])
    for i, j in itertools.product(tops, lefts):
        window = x[..., i:i + side, j:j + side]
        place = j, x.size(-1) - j - window.size(-1), i, x.size(-2) - i - window.size(-2)
        for name, logits in dense(window).items():
            pixels = upsample(logits, patch, window.shape[-2:], window.shape[-2:])
            total[name] = total.get(name, 0) + F.pad(pixels, place)
        count = count + F.pad(torch.ones(window.shape[-2:], device=x.device), place)
    return {name: sum_ / count for name, sum_ in total.items()}, 1


@torch.no_grad()
def rectify_words(segmenter, words):
    """(T, the function from dense features f: B×D×h×w to rectified logits B×C×h×w, their sharpness)
    of any C words.

    Words that are not classes of the training get a Reference from the learned prompt (the mean
    prompt, where each class has one). ReCLIP's P and ReCLIP++'s decoder have one output per class
    of the training and are left out for them.
    """
    clip, rectifier, sharpness = segmenter.clip, segmenter.rectifier, segmenter.cfg.sharpness
    trained = [*segmenter.names, *segmenter.background]
    if not rectifier:                                              # nothing was trained: MaskCLIP's
        return segmenter.T, lambda f: similarity(f, segmenter.T), sharpness
    if set(words) <= set(trained):
        R, chosen = segmenter.reference(), [trained.index(word) for word in words]
        return segmenter.T[chosen], lambda f: segmenter.rectified(f, R)[:, chosen], sharpness
    new = [word for word in words if word not in trained]
    print(f"{', '.join(new)}: not among the {len(trained)} classes of the training; the Reference "
          "prompt alone rectifies")
    T = text_features(clip, segmenter.tokenizer, words)
    tokens, L = name_tokens(clip, segmenter.tokenizer, [word.split(", ")[0] for word in words])
    V = rectifier.V if segmenter.cfg.prompt == "shared" else rectifier.V.mean(0)
    R = F.normalize(reference_features(clip, V[:L], tokens), dim=1)
    R = R / len(trained) ** 0.5 if segmenter.cfg.norm == "frobenius" else R  # as long as trained
    if segmenter.cfg.method == "reclip":
        return T, lambda f: similarity(f, T) - similarity(f, R), sharpness
    sharpness = segmenter.sharpness["maskclip"]                 # cosines, without the decoder
    if segmenter.cfg.space == "off":
        return T, lambda f: similarity(f, T), sharpness
    P = lambda f: rectifier.g(positional_embedding(clip, tuple(f.shape[-2:])))[0]
    return T, lambda f: similarity(f, T) - torch.einsum("dhw,cd->chw", P(f), R), sharpness


@torch.no_grad()
def segment(typed):
    """--image: for an image, or each in a folder, the mask (a palette PNG with VOC's values) and an
    overlay, MaskCLIP's beside the rectified one. Without a run, or with --method maskclip: CLIP's.

    Nothing is denoised: who names the classes knows that they are there.
    """
    other = ("image", "eval", "out", "names", "background")
    given = typed.get("eval") or "out" in typed and f"{typed['out']}/rectify.pt"
    trained = given or any(Path("runs").glob("*/rectify.pt"))
    if "eval" in typed or trained and typed.get("method") != "maskclip":
        run = Path(given or newest("rectify.pt"))
        segmenter = load_segmenter(run, **{k: v for k, v in typed.items() if k not in other})
        out = Path(typed.get("out", run.parent))
        emoji = segmenter.cfg.clip == RECIPES["emoji"]["clip"]
        print(f"segmenting with {run}" + emoji * (
            ", whose CLIP knows emoji only; for photographs --method maskclip takes OpenAI's CLIP"))
    else:
        print("nothing was trained under runs/: " * (not trained) + "CLIP alone, not rectified")
        wanted = {"dataset": "voc"} | typed | {"method": "maskclip"}
        cfg = configure(**{k: v for k, v in wanted.items() if k != "image"})
        out = Path(typed.get("out", "."))
        names, background = class_names(cfg), background_words(cfg)
        segmenter = Segmenter(cfg, names, pick_device(cfg), background=background)
    out.mkdir(parents=True, exist_ok=True)
    cfg, patch = segmenter.cfg, segmenter.clip.visual.patch_size[0]
    names, background = segmenter.names, segmenter.background
    if typed.keys() & {"names", "background"}:
        asked = replace(cfg, names=typed.get("names", ""), background=typed.get("background", ""))
        names = class_names(asked) if asked.names else names
        kept = [] if "background" in typed else [w for w in background if w not in names]
        background = background_words(asked, names) or kept
    classes = [name.split(", ")[0] for name in names] + ["background"]
    source = Path(typed["image"])
    paths = [*find_images(source).values()] if source.is_dir() else [source]
    T, rectified, sharpness = rectify_words(segmenter, [*names, *background])
    sharpness = segmenter.sharpness | {cfg.method: sharpness}

    def dense(x):
        f, baseline = segmenter.both_features(x)
        return {"maskclip": similarity(baseline, T), cfg.method: rectified(f)}

    for path in paths:
        inside = path.relative_to(source) if source.is_dir() else Path(path.name)
        name = inside.with_suffix("").as_posix().replace("/", "_")
        image = load_image(path)
        x = resize_to_fit(image[None].to(segmenter.device), cfg.size)
        maps, step = slide(dense, x, patch, cfg)
        masks = {TITLES[name]: decide(logits, step, x.shape[-2:], image.shape[-2:], len(names),
                                      sharpness[name], cfg.threshold)[0].cpu()
                 for name, logits in maps.items()}
        write_mask(masks[TITLES[cfg.method]], len(names), out / f"{name}.mask.png")
        show_masks(image, masks, classes, out / f"{name}.overlay.png")
        print(f"wrote {printable(str(out / name))}.mask.png and .overlay.png")


def write_mask(mask, C, path):
    """A mask H×W as VOC stores it: a palette PNG, class c as c + 1, the background (C) as 0."""
    png = Image.fromarray(((mask + 1) % (C + 1)).numpy())
    png.putpalette(palette())
    with whole_file(path) as temporary:
        png.save(temporary, "PNG")


def show_masks(image, masks, classes, path):
    """Draw an image 3×H×W and {title: mask H×W} over it in a row, at 800 px at most."""
    step = max(1, math.ceil(max(image.shape) / 800))
    small = image[:, ::step, ::step]
    masks = {title: mask[::step, ::step] for title, mask in masks.items()}
    row = [small.permute(1, 2, 0).numpy(), *(paint(m, classes, small) for m in masks.values())]
    seen = torch.stack([*masks.values()]).unique().tolist()
    save_figure(draw_rows({"": row}, classes, seen, titles=["image", *masks], side=3.2), path)


def main(argv=None):
    started, typed = time.time(), command_line(Config, __doc__, RECIPES, argv)
    if "image" in typed:
        return segment(typed)
    cfg, state = open_run(typed)
    if "eval" in typed:
        names, background = state["names"], state["background"]
    else:
        names, background = class_names(cfg), background_words(cfg)
    device, out = pick_device(cfg), Path(cfg.out)
    torch.manual_seed(cfg.seed)
    with output_folder(out):
        with rank_zero_first():                              # what is downloaded is downloaded here
            folder = dataset_folder(cfg)
            samples, val = splits(folder)
            if cfg.resume and state and state["images"] != list_digest(samples):
                raise UserError(f"{folder}: its list of training images changed since {out} was "
                                "trained; leave out --resume")
            check_labels(val, names, cfg)
            print(f"{cfg.method} on {folder}: {len(samples)} images to learn from, {len(val)} "
                  f"labelled ones to measure on, {len(names)} classes, {device}"
                  + ", bf16" * uses_bf16(device, cfg.precision)
                  + f", {WORLD} processes" * (WORLD > 1))
            if cfg.data and cfg.clip == RECIPES["emoji"]["clip"]:
                print(f"warning: {cfg.clip} knows emoji only; on photographs it finds nothing")
            segmenter = Segmenter(cfg, names, device, state and state["T"], background)
            segmenter.stock
        seconds = {}
        if state and ("eval" in typed or "optimizer" not in state):
            restore(segmenter, state)
            print("measuring", "an interrupted run" if "optimizer" in state else "a complete run")
        elif cfg.method != "maskclip":
            seconds = learn(segmenter, samples, state)
        if RANK == 0:
            measure(segmenter, val, seconds) if val else describe(segmenter, samples, seconds)
            print(f"{time.time() - started:.0f} s in all. Wrote {out}/: {list_files(out)}")


def run(main):
    """Call a script's main. What the user can mend is one line and exit code 2.

    Where torchrun started several processes they meet first; but for errors only rank 0 talks.
    """
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):                   # Windows has no SIGHUP
        if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:       # nohup
            signal.signal(getattr(signal, name), interrupt)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w")               # `>&-`
                              for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                                 # a terminal may be ASCII
            stream.reconfigure(errors="backslashreplace")
    try:
        if WORLD > 1:
            sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            patience = timedelta(days=1)                            # the others wait for a download
            distributed.init_process_group(backend, timeout=patience)
        main()
        if WORLD > 1:
            distributed.barrier()                            # rank 0 measures while the others wait
            distributed.destroy_process_group()
        return sys.stdout.flush()
    except BrokenPipeError:                                                 # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message, code = "", 141
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        message, code = "interrupted; the same command with --resume goes on", 128 + number
    except Exception as error:
        mend = mendable(error)
        if mend is None and WORLD == 1:
            raise
        message, code = (f"error: {printable(mend)}", 2) if mend else (traceback.format_exc(), 1)
    if message and sys.stderr:
        print(message, file=sys.stderr, flush=True)           # out here open progress bars are gone
    if WORLD > 1:
        os._exit(code)                                        # the others may wait for this process
    sys.exit(code)


def mendable(error):
    """One line for an error that a person can mend, else None."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}"
    if isinstance(error, MemoryError) or "allocate" in str(error) or "out of memory" in str(error):
        return "out of memory; give a smaller --batch, --views or --size, or a smaller image"
    if isinstance(error, ValueError) and "environment variable" in str(error):
        return f"WORLD_SIZE is {WORLD}, but {error}; start several processes with torchrun"
    return None


def printable(text, most=600):
    """A text in one line without control characters, which could drive a terminal."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= most else f"{text[:most // 2]} .. {text[-most // 2:]}"


if __name__ == "__main__":
    run(main)
