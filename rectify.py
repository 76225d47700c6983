"""Rectify the bias of CLIP for unsupervised semantic segmentation (ReCLIP, CVPR 2024; ReCLIP++, IJCV 2025).

Unlabelled pictures and a list of class names go in. CLIP's dense predictions are biased: it prefers some classes and fails
far from the centre. This script learns that bias from the pictures alone, subtracts it, and measures what that gains.

    python rectify.py                                    # Emoji VOC, ships with the repository: no GPU, no internet
    python rectify.py --method reclip                    # the CVPR paper's bias model instead of the journal's
    python rectify.py --dataset voc                      # PASCAL VOC 2012 with OpenAI's ViT-B/16; or context, ade
    python rectify.py --dataset voc --data photos --names names.txt     # your own photographs, no labels needed
    python rectify.py --image photo.jpg --names "dog, horse"    # one picture, any words that the newest run's CLIP knows
    torchrun --nproc-per-node 4 rectify.py --dataset ade        # several GPUs; distill.py too

Read it top to bottom: 1 configuration, 2 CLIP, 3 method, 4 training, 5 prediction; below the ruler is what serves the method.
The letters are the paper's: f dense feature, T text feature, V learnable prompt, R Reference feature, PE positional embedding,
P space-preference bias (C×h×w in ReCLIP, D×h×w in ReCLIP++), B bias logit map, M mask, y image-level hypothesis.
In shapes: N images, B of them in a batch, K views of each; C classes; D dimensions of f, T and R, d of a token in its tower;
L and n tokens of a prompt and of a name; h×w patches, H×W pixels.
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
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed, nn
from torchvision.transforms import v2
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
# of the WORLD processes that torchrun started this one is number RANK, number LOCAL on its machine; without it 0 of 1
RANK, WORLD, LOCAL = (int(os.environ.get(name, default)) for name, default in
                      (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
if RANK > 0:                                            # elsewhere TQDM_DISABLE decides
    tqdm = functools.partial(tqdm, disable=True)


class UserError(Exception):
    """Something that the person at the keyboard can mend: shown as one line, exit code 2."""


# ============================================================================================================ 1 configuration

# What each dataset needs. The published settings for the real ones (supplement, Table 12, and the released configs); what
# measures best on Emoji VOC for itself and for folders of your own. size: (long, short), the sides in px that an image is
# fitted into. jitter, crop: augmentation. window: px of the sliding hypothesis. whole: the hypothesis sees all of the image, not
# CLIP's centre crop. ring: px, the bins of Fig. 1(a). Where the methods differ, a dict holds the value of each.
PUBLISHED = dict(
    clip="ViT-B-16-quickgelu", pretrained="openai", jitter=(0.5, 2.0), ring=40, whole=False, hypothesis="threshold",
    method="reclip", norm="frobenius", prompt="shared", pool="grid", start="authors", alpha={"reclip": 1000, "reclip++": 100},
    optimizer="sgd", lr_encoder=1e-4, weight_decay=5e-4, views=4)
RECIPES = {
    "emoji": dict(
        clip="local-dir:tests/emoji/clip", pretrained="",
        size=(2048, 192), jitter=(0.8, 1.25), crop=192, window=96, ring=10, whole=True,
        hypothesis="softmax", t=0.1, top_k=1,
        method="reclip++", norm="frobenius", prompt="per-class", pool="grid", start="ours", alpha=100, denoise=0,
        optimizer="adam", lr=1e-2, lr_conv={"reclip": 1e-4, "reclip++": 1e-3}, lr_encoder=1e-4, weight_decay=0,
        epochs=8, batch=16, views=2),
    # window: a sixth of the crop. lr: 0.01 was released for batch 1; scaled to the batch
    "voc": dict(PUBLISHED, size=(2048, 512), crop=520, window=86, t=0.23, top_k=2, denoise={"reclip": 0.5, "reclip++": 1.0},
                epochs=200, batch=12, lr=0.12, lr_conv=0.12),
    "context": dict(PUBLISHED, size=(520, 520), crop=480, window=80, t=0.20, top_k=6, denoise={"reclip": 0.6, "reclip++": 0.85},
                    epochs=400, batch=12, lr=0.12, lr_conv=0.12),
    "ade": dict(PUBLISHED, size=(2048, 512), crop=512, window=85, t=0.21, top_k=5, denoise={"reclip": 0.5, "reclip++": 0.5},
                epochs=300, batch=8, lr=0.08, lr_conv=0.08),
}
# --recipe 2024, laid over the row of a real dataset: the regime of the CVPR paper's numbers (VOC: 58.5, distilled 75.4). OpenAI's
# weights, trained with QuickGELU, are computed with GELU, on pictures normalised by ImageNet's mean and standard deviation. The
# hypothesis alone comes from the row's own CLIP (`Segmenter.stock`).
REGIME_2024 = dict(clip="ViT-B-16", preprocess=dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))
COLLAPSED = 0.5                                         # an `agreement` above it is a collapse; sound runs have 0.1 to 0.2
SHARPNESS = {"reclip": 100, "reclip++": 10}             # of prompt denoising: softmax(sharpness · logits), authors' code


def option(default, help, choices=None):
    """A field of a configuration: its default, the sentence shown by --help, and what it may be."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    dataset: str = option("", "which recipe and data to use (default emoji)", list(RECIPES))
    recipe: str = option("", "2024: the CVPR paper's regime, GELU and ImageNet's mean and std (voc, context, ade)", ["2024"])
    root: str = option("data", "folder that holds the datasets")
    data: str = option("", "a folder of your own instead: VOC's layout, or just images")
    names: str = option("", "class names: a file with one a line, or words separated by commas")
    out: str = option("", "folder for everything written (default runs/<dataset>)")
    method: str = option("", "bias model; maskclip is the baseline alone", ["maskclip", "reclip", "reclip++"])
    features: str = option("maskclip", "attention of CLIP's last block", ["maskclip", "sclip", "clearclip", "naclip"])
    clip: str = option("", "open_clip model name, or local-dir:FOLDER (default by dataset)")
    pretrained: str = option("", "open_clip's tag of the weights, or a file (default by dataset)")
    hypothesis: str = option("", "how images get their classes", ["threshold", "softmax", "windows"])
    t: float = option(None, "threshold of the hypothesis on the cosine (or its softmax), in (-1, 1)")
    top_k: int = option(None, "classes of an image in which none passes t")
    norm: str = option("", "length of R: of the whole matrix, or of each row", ["frobenius", "rows"])
    prompt: str = option("", "the learnable tokens: one prompt for all classes, or one for each", ["shared", "per-class"])
    space: str = option("on", "the space-preference term P; off leaves ReCLIP++ its decoder alone", ["on", "off"])
    pool: str = option("", "mean of masked features over the grid, or over the mask", ["grid", "mask"])
    start: str = option("", "V and P at first: ours, random and 0; the authors', word 0 and random", ["ours", "authors"])
    alpha: float = option(None, "scale of the logits before Gumbel-Softmax")
    denoise: float = option(None, "drop a class whose best probability in the image is lower; 0 is off")
    optimizer: str = option("", "optimiser", ["sgd", "adam"])
    lr: float = option(None, "learning rate of the prompt")
    lr_conv: float = option(None, "learning rate of the convolutions: positional projection and mask decoder")
    epochs: int = option(None, "passes over the training images")
    batch: int = option(None, "images a step")
    views: int = option(None, "augmented views computed once for each image; each epoch uses one of them")
    finetune: bool = option(False, "train CLIP's image encoder too (the ablation of Table 8)")
    seed: int = option(0, "seed of everything random")
    device: str = option("auto", "where to compute", ["auto", "cpu", "cuda"])
    precision: str = option("auto", "of CLIP's image tower; auto: bf16 on a GPU that has it", ["auto", "fp32", "bf16"])
    compile: bool = option(False, "torch.compile the training step: a minute at the start, for long runs on a GPU")
    resume: bool = option(False, "go on with the interrupted run in --out")
    eval: str = option("", "evaluate this checkpoint instead of training")
    image: str = option("", "segment this picture instead of training, with the newest run, or --out's; --names: other words")


def recipe_of(cfg):
    """The row of RECIPES that a configuration belongs to, and over it --recipe's regime.

    A folder of one's own takes Emoji VOC's unless --dataset says else.
    """
    return RECIPES[cfg.dataset or "emoji"] | (REGIME_2024 if cfg.recipe else {})


def complete(cfg):
    """Fill what the command line left open from the recipe of the data, and refuse what makes no sense.

    Returns a Config in which every field that a recipe knows has its value. Raises UserError.
    """
    recipe, chosen = recipe_of(cfg), {"dataset": cfg.dataset or "emoji"}
    method = cfg.method or recipe["method"]
    for f in fields(cfg):
        if getattr(cfg, f.name) in (None, "") and f.name in recipe:
            value = recipe[f.name]                      # maskclip trains nothing: of what differs by method it takes either
            chosen[f.name] = value.get(method, value["reclip"]) if isinstance(value, dict) else value
    if cfg.clip:
        chosen["pretrained"] = cfg.pretrained           # another CLIP does not take the recipe's weights
    if not cfg.out:
        chosen["out"] = f"runs/{Path(cfg.data).resolve().name if cfg.data else chosen['dataset']}"
    cfg = replace(cfg, **chosen)
    for bad, message in [
            (not -1 < cfg.t < 1, f"--t {cfg.t}: a cosine's threshold lies in (-1, 1)"),
            (cfg.epochs < 1 or cfg.batch < 1 or cfg.views < 1 or cfg.top_k < 1,
             "--epochs, --batch, --views and --top-k start at 1"),
            (not (0 < cfg.lr < 1e6 and 0 < cfg.lr_conv < 1e6 and 0 < cfg.alpha < float("inf")),
             "--lr, --lr-conv and --alpha must be positive, and the rates below a million"),
            (not 0 <= cfg.seed < 2 ** 32, f"--seed {cfg.seed}: a seed is a whole number from 0 on"),
            (cfg.recipe and cfg.dataset == "emoji", "--recipe 2024 is a regime of --dataset voc, context or ade, not of emoji"),
            (cfg.recipe and cfg.clip != recipe["clip"],
             f"--clip {cfg.clip}: --recipe 2024 is {recipe['clip']}'s; leave out one of the two (--pretrained FILE may stay)"),
            (":" not in cfg.clip and not cfg.pretrained, f"--clip {cfg.clip} needs --pretrained: open_clip's tag, or a file"),
            lacks_compiler(cfg),
            (cfg.data and not cfg.names, "--data needs --names: a file with one class name a line")]:
        if bad:
            raise UserError(message)
    return cfg


# ===================================================================================================================== 2 CLIP

def normalise(clip, images):
    """uint8 B×3×H×W to what CLIP takes: (x / 255 - mean) / std, those of its training but with --recipe 2024."""
    mean, std = (clip.visual.preprocess_cfg[k] for k in ("mean", "std"))                # numbers: a GPU would wait for tensors
    return torch.stack([(x - m) / s for x, m, s in zip((images.float() / 255).unbind(1), mean, std)], dim=1)


def positional_embedding(clip, grid):
    """PE: 1×d×h×w, CLIP's positional embedding without CLS, bicubic-resized to the grid (h, w)."""
    visual = clip.visual
    pe = visual.positional_embedding[1:].T.reshape(1, -1, *visual.grid_size)            # 1 d h w
    return pe if grid == tuple(visual.grid_size) else F.interpolate(pe, grid, mode="bicubic", antialias=False)


def last_block(block, x, grid, features):
    """CLIP's last transformer block, B×(1+hw)×d to the same, with the attention that dense prediction wants.

    "stock" is CLIP's own; maskclip: each token is its own value (Zhou 2022); sclip: q·q + k·k (Wang 2024);
    clearclip: q·q, without residual and MLP (Lan 2024); naclip: k·k and a Gaussian around each patch, likewise (Hajimiri 2025).
    """
    if features == "stock":
        return block(x)
    attn = block.attn
    q, k, v = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)     # B 1+hw d
    if features != "maskclip":
        q, k, v = (y.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for y in (q, k, v))       # B heads 1+hw d/heads
        scale = q.size(-1) ** -0.5
        if features == "sclip":
            A = (q @ q.mT * scale).softmax(-1) + (k @ k.mT * scale).softmax(-1)
        elif features == "clearclip":
            A = (q @ q.mT * scale).softmax(-1)
        else:
            yx = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in grid)).float()   # hw 2
            near = torch.exp(-torch.cdist(yx, yx).square() / (2 * 5 ** 2))                          # std 5 patches
            A = (k @ k.mT * scale + F.pad(near, (1, 0, 1, 0))).softmax(-1)
        v = (A @ v).transpose(1, 2).flatten(2)                                                     # B 1+hw d
    v = block.ls_1(attn.out_proj(v))                    # ls: LayerScale, the identity in most CLIPs
    if features in ("clearclip", "naclip"):
        return v
    v = v + x
    return v + block.ls_2(block.mlp(block.ln_2(v)))


def encode_image(clip, x, features):
    """CLIP's image tower on pictures of any size.

    x: B×3×H×W, normalised; padded at the bottom and right to whole patches.
    features: the attention of the last block. "stock" gives open_clip's own pooled image feature B×D; any other the dense
    feature f, B×D×h×w. Unit norm.
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
    x = last_block(visual.transformer.resblocks[-1], x, grid, features)
    if features == "stock":
        return F.normalize((visual._pool(x)[0] @ visual.proj).float(), dim=-1)          # B D
    f = (visual.ln_post(x[:, 1:]) @ visual.proj).float()                                # B hw D; normalised in fp32, also in_bf16
    return F.normalize(f, dim=-1).mT.unflatten(-1, grid)                                # B D h w


def templates():
    """The 85 sentences that T is averaged over, as functions of the name: OpenAI's 80 for ImageNet and five of a scene."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES
    scene = ["there is a {} in the scene.", "there is the {} in the scene.", "this is a {} in the scene.",
             "this is the {} in the scene.", "this is one {} in the scene."]
    return [*OPENAI_IMAGENET_TEMPLATES, *(sentence.format for sentence in scene)]


@torch.no_grad()
def text_features(clip, tokenizer, names):
    """T: C×D, unit rows. Each name in 85 sentences, encoded, averaged, normalised."""
    device, rows = clip.logit_scale.device, []
    for name in names:
        tokens = tokenizer([template(name) for template in templates()]).to(device)
        rows.append(F.normalize(clip.encode_text(tokens, normalize=True).mean(0), dim=0))
    return torch.stack(rows)


# =================================================================================================================== 3 method

@torch.no_grad()
def hypothesise(segmenter, images):
    """y: B×C bool, the classes that stock CLIP believes an image to hold; of uint8 pictures B×3×H×W.

    threshold: the cosine of the image's feature with T is at least t. softmax (ours): the softmax over the classes of
    scale · cosine is. Where none passes, the top K. windows (ReCLIP++): a window slides over the image at half its side; y is
    the union of each window's best class. The picture is CLIP's centre crop for the real datasets, and the whole of it
    (positional embedding resized) in Emoji VOC, where things stand at the edges.
    """
    cfg, recipe, (clip, T) = segmenter.cfg, recipe_of(segmenter.cfg), segmenter.stock
    images, side = images.to(segmenter.device), clip.visual.image_size[0]

    def see(x):
        return segmenter.encode(clip, x, "stock") @ T.T                                                         # B C

    if cfg.hypothesis == "windows":
        x, window = fit(images, recipe["size"]), recipe["window"]
        corners = [[*range(0, n - window, window // 2), max(n - window, 0)] for n in x.shape[-2:]]
        tiles = [v2.functional.resize(x[..., top:top + window, left:left + window], [side, side])
                 for top in corners[0] for left in corners[1]]
        return torch.stack([F.one_hot(see(tile).argmax(1), len(segmenter.names)) for tile in tiles]).amax(0).bool()
    x = fit(images, (10 ** 6, side), mode=v2.InterpolationMode.BICUBIC)                 # as CLIP itself is shown an image
    s = see(x if recipe["whole"] else v2.functional.center_crop(x, side))
    if cfg.hypothesis == "softmax":
        s = (segmenter.scale * s).softmax(1)
    best = F.one_hot(s.topk(min(cfg.top_k, s.size(1)), dim=1).indices, s.size(1)).amax(1).bool()
    return torch.where((s >= cfg.t).any(1, keepdim=True), s >= cfg.t, best)


def reference_features(clip, V, tokens):
    """R: C×D before its norm is set. The prompt [SOS][v1..vL][name][EOT] of each class, through the frozen text encoder.

    V: L×d, learnable tokens that all classes share, or C×L×d. tokens: C×n, the names and EOT. Differentiable in V.
    Text sees what stands before it only, so a shared [SOS][v1..vL] is the same for every name: all names stand behind it in one
    sequence, and the mask hides them from each other. Cost: 1+L+C·n tokens instead of C·(1+L+n).
    """
    text, (C, n), L, device = _text(clip), tokens.shape, V.size(-2), tokens.device
    arange = functools.partial(torch.arange, device=device)
    prompts, behind = (1, C) if V.ndim == 2 else (C, 1)                                 # how many, and names behind each
    # two names behind a shared prompt:  SOS v1..vL | cat EOT 0         | potted plant EOT
    # place, for the positional embedding: 0   1..L | L+1 L+2 L+3       | L+1 L+2 L+3       (0: padding, which EOT does not see)
    # name, whose token it is:            -1  -1..  | 0   0   0         | 1   1   1
    sos = text.token_embedding.weight[-2].expand(prompts, 1, -1)                        # SOS is the last but one word
    names = text.token_embedding(tokens).view(prompts, behind * n, -1)
    x = torch.cat([sos, V.view(prompts, L, -1), names], dim=1)                          # prompts 1+L+behind·n d
    place = torch.cat([arange(1 + L), (1 + L + arange(n)).repeat(behind)])
    name = torch.cat([torch.full((1 + L,), -1, device=device), arange(behind).repeat_interleave(n)])
    seen = (place <= place[:, None]) & ((name == -1) | (name == name[:, None]))         # row sees column
    mask = torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)
    x = text.ln_final(text.transformer(x + text.positional_embedding[place], attn_mask=mask))
    ends = x[:, 1 + L:].reshape(C, n, -1)[arange(C), tokens.argmax(1)]                  # at EOT, which has the largest number
    return ends @ text.text_projection                                                  # C D


def set_norm(R, norm):
    """R: C×D with unit Frobenius norm (the authors' code; a row's length falls as 1/√C) or with unit rows."""
    return R / R.norm() if norm == "frobenius" else F.normalize(R, dim=1)


def similarity(f, T):
    """f·Tᵀ at every pixel: B×D×h×w and C×D to B×C×h×w, cosines in [-1, 1] where both are unit."""
    return torch.einsum("bdhw,cd->bchw", f, T)


def bias_reclip(f, R, P):
    """ReCLIP's bias logit map, B = f·Rᵀ + P: B×C×h×w. f·Rᵀ is the class-preference bias, P: C×h×w the space-preference bias."""
    return similarity(f, R) + P


def bias_reclip_pp(R, P):
    """ReCLIP++'s bias logit map, B = P·Rᵀ: C×h×w, the same for every image. P: D×h×w."""
    return torch.einsum("dhw,cd->chw", P, R)


class Rectifier(nn.Module):
    """Everything that is learned: the Reference prompt V, the positional projection g, and ReCLIP++'s mask decoder.

    forward(f, T, R, PE): f B×D×h×w, T and R C×D, PE 1×d×h×w -> rectified logits B×C×h×w.
    """

    def __init__(self, cfg, classes, dim, d_image, d_text, L):
        super().__init__()
        self.method, self.space = cfg.method, cfg.space == "on"
        shape = (L, d_text) if cfg.prompt == "shared" else (classes, L, d_text)
        self.V = nn.Parameter(0.02 * torch.randn(shape))                                # CLIP's own scale of token embeddings
        if self.method == "reclip":
            self.g = nn.Sequential(                                                     # widths of the released checkpoints
                nn.Conv2d(d_image, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
                nn.Conv2d(256, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
                nn.Conv2d(64, classes, 3, padding=1, bias=False), nn.BatchNorm2d(classes), nn.ReLU())
        else:
            self.g = nn.Conv2d(d_image, dim, 1)
            self.decoder = nn.Sequential(nn.Conv2d(dim + classes, classes, 5, padding=2, bias=False),
                                         nn.BatchNorm2d(classes))
        convs = self.g[::3] if self.method == "reclip" else self.decoder[:1]            # ReCLIP++'s g starts as PyTorch's
        for m in convs:
            nn.init.kaiming_normal_(m.weight, mode="fan_out")
        if cfg.start == "ours" and self.method == "reclip":
            nn.init.constant_(self.g[7].weight, 0.01)   # P near 0, where f·T decides; at 0 the ReLU would be dead
        elif cfg.start == "ours":                       # P = 0 at first, and B is nothing
            nn.init.zeros_(self.g.weight)
            nn.init.zeros_(self.g.bias)

    def forward(self, f, T, R, PE):
        logits = similarity(f, T)
        P = self.g(PE)[0] if self.space else torch.zeros((), device=f.device)
        if self.method == "reclip":
            return logits - bias_reclip(f, R, P)
        rectified = logits - bias_reclip_pp(R, P) if self.space else logits
        return self.decoder(torch.cat([f, rectified], dim=1))


def gumbel_mask(logits, alpha):
    """M: B×C×h×w, one-hot over the classes at every pixel; GumbelSoftmax(alpha · logits, τ = 1, hard), differentiable."""
    return F.gumbel_softmax(alpha * logits, tau=1, hard=True, dim=1)


def contrastive_loss(M, f, T, y, scale, valid, pool):
    """CE(scale · z_c·Tᵀ, c) with z_c = pool(M_c ⊙ f), averaged over an image's classes, then over the batch.

    M: B×C×h×w masks. f: B×D×h×w. T: C×D. y: B×C bool, the hypothesis. scale: CLIP's exp(logit_scale).
    valid: B×h×w bool, false where the crop is padding. pool: "grid" divides by the number of valid patches (authors' code: of
    all), "mask" by the mask's area.
    """
    M = M * valid[:, None]
    z = torch.einsum("bchw,bdhw->bcd", M, f)                                            # B C D
    area = M.sum((2, 3))[..., None].clamp(min=1) if pool == "mask" else valid.sum((1, 2)).view(-1, 1, 1)
    logits = scale * (z / area) @ T.T                                                   # B C C
    own = -logits.log_softmax(-1).diagonal(dim1=1, dim2=2)                              # B C
    return ((own * y).sum(1) / y.sum(1).clamp(min=1)).mean()


class Segmenter(nn.Module):
    """CLIP, its text features T, and a Rectifier, whose prompt gives R. Built for training, or by `load` from a checkpoint.

    A Module so that `in_step` can wrap a training step, which is its forward(x): dense features f B×D×h×w, or with finetune
    the uint8 views that they are computed from -> rectified logits B×C×h×w, f. distill.py uses it as the teacher.
    """

    def __init__(self, cfg, names, device):
        super().__init__()
        self.cfg, self.names, self.device = cfg, names, device
        self.clip, self.tokenizer = load_clip(cfg, device)
        self.frozen = copy.deepcopy(self.clip) if cfg.finetune else self.clip    # MaskCLIP's, the baseline
        self.tokens, L = name_tokens(self.clip, self.tokenizer, names)
        self.T = kept_text_features(self.clip, self.tokenizer, names, cfg)
        self.scale = self.clip.logit_scale.exp().item()
        self.rectifier = self.R = None                  # R: kept by `reference` where nothing trains
        if cfg.method != "maskclip":
            self.rectifier = Rectifier(cfg, len(names), self.T.size(1), self.clip.visual.conv1.out_channels,
                                       _text(self.clip).token_embedding.embedding_dim, L).to(device)
            if cfg.start == "authors":
                self.rectifier.V.data[:] = _text(self.clip).token_embedding.weight[0]

    @functools.cached_property
    def stock(self):
        """(CLIP, T) of the hypothesis: as its weights were trained, and its own text features, in either regime."""
        if not self.cfg.recipe:
            return self.frozen, self.T
        cfg = replace(self.cfg, recipe="", clip=RECIPES[self.cfg.dataset]["clip"])
        clip, tokenizer = load_clip(cfg, self.device)
        return clip, kept_text_features(clip, tokenizer, self.names, cfg)

    def encode(self, clip, images, features):
        """encode_image of uint8 pictures B×3×H×W, on the device and in the precision that were asked for."""
        with in_bf16(self.device, self.cfg.precision):
            return encode_image(clip, normalise(clip, images.to(self.device)), features)

    def features(self, images):
        """f: B×D×h×w of uint8 pictures B×3×H×W."""
        return self.encode(self.clip, images, self.cfg.features)

    def maskclip(self, images, f):
        """MaskCLIP's dense features, the baseline's, of pictures whose own are f: the same where the encoder was not trained."""
        return self.encode(self.frozen, images, self.cfg.features) if self.cfg.finetune else f

    def reference(self):
        """R: C×D, with its norm. Where nothing trains it goes through the text encoder once, and not for every batch."""
        make = lambda: set_norm(reference_features(self.clip, self.rectifier.V, self.tokens), self.cfg.norm)
        if self.rectifier.training or torch.is_grad_enabled():
            self.R = None
            return make()
        self.R = make() if self.R is None else self.R
        return self.R

    def rectified(self, f, R):
        """Rectified logits B×C×h×w of dense features."""
        return self.rectifier(f, self.T, R, positional_embedding(self.clip, tuple(f.shape[-2:])))

    def forward(self, x):
        f = self.features(x) if self.cfg.finetune else x.float()
        return self.rectified(f, self.reference()), f

    @classmethod
    def load(cls, path, **changes):
        """The Segmenter of a checkpoint, in eval mode; `changes` to its configuration (device, out, ..)."""
        state = load_checkpoint(path)
        cfg = replace(Config(**state["config"]), **changes)
        segmenter = cls(cfg, state["names"], pick_device(cfg))
        segmenter.restore(state)
        return segmenter

    def state(self):
        """What a checkpoint holds: tensors and plain values only."""
        return {"config": asdict(self.cfg), "names": self.names, "rectifier": self.rectifier.state_dict(),
                "clip": self.clip.visual.state_dict() if self.cfg.finetune else None}

    def restore(self, state):
        """Take the weights of a checkpoint, in place and in eval mode."""
        self.R = None
        self.rectifier.load_state_dict(state["rectifier"])
        self.rectifier.eval()
        if state["clip"]:
            self.clip.visual.load_state_dict(state["clip"])


# ================================================================================================================= 4 training

class PhotometricDistort(v2.RandomPhotometricDistort):
    """torchvision's, but that channels change places without an index from the host, for which a GPU would wait."""

    def transform(self, image, params):
        image = super().transform(image, params | {"channel_permutation": None})
        order = params["channel_permutation"]
        return image if order is None else torch.stack([image[c] for c in order.tolist()])


def augmented(image, recipe):
    """A random view of a picture 3×H×W: resized, flipped, colours distorted, cropped; small ones padded at the bottom right.

    Returns (3×crop×crop uint8, (height, width) of what is picture in it). The authors redraw a crop until no ground-truth
    class fills three quarters of it; ours never asks.
    """
    crop, (low, high), (factor, mirror, *corner) = recipe["crop"], recipe["jitter"], torch.rand(4).tolist()
    image = fit(image, recipe["size"], low + (high - low) * factor)
    if mirror < 0.5:
        image = image.flip(-1)
    image = PhotometricDistort()(image)
    top, left = (int(u * (max(n - crop, 0) + 1)) for u, n in zip(corner, image.shape[1:]))
    image = image[:, top:top + crop, left:left + crop]
    height, width = image.shape[1:]
    return F.pad(image, (0, crop - width, 0, crop - height)), (height, width)


@torch.no_grad()
def training_data(segmenter, samples):
    """Everything frozen, computed once: x, valid, y.

    x: K×N×D×h×w half, the dense features f of K augmented views of each image; K×N×3×crop×crop uint8, the views themselves,
    where the encoder is trained too. valid: K×N×h×w bool, patches that are picture. y: N×C bool, the hypothesis. All lie where
    `make_room` finds room for x. Of several processes each computes and keeps every WORLD-th image.
    A view depends on the seed and its numbers alone. Cost: K·N passes of CLIP, and N for y (windows: one each); K·N·D·h·w·2 B.
    """
    cfg, recipe, device = segmenter.cfg, recipe_of(segmenter.cfg), segmenter.device
    numbers, samples = range(RANK, len(samples), WORLD), samples[RANK::WORLD]
    K, N, crop = cfg.views, len(samples), recipe["crop"]
    first = torch.arange(0, crop, segmenter.clip.visual.patch_size[0])                  # first pixel of every patch
    shape = (3, crop, crop) if cfg.finetune else (segmenter.T.size(1), len(first), len(first))
    x = make_room((K, N, *shape), torch.uint8 if cfg.finetune else torch.half, device, Path(cfg.out))
    valid = torch.empty(K, N, len(first), len(first), dtype=torch.bool, device=x.device)

    def view(image, n, k):
        torch.manual_seed(int(np.random.SeedSequence([cfg.seed, n, k]).generate_state(1)[0]))
        return augmented(image, recipe)

    images = read_ahead(lambda sample: load_image(sample.image), samples)
    for start in tqdm(range(0, N, 32), "dense features", leave=False):
        some = [image.to(device) for image in itertools.islice(images, 32)]             # what follows is the device's work
        rows = slice(start, start + len(some))
        for k in range(K):
            crops, extents = zip(*(view(image, n, k) for image, n in zip(some, numbers[rows])))
            height, width = torch.tensor(extents).T[..., None]                          # B 1, B 1
            valid[k, rows] = (first < height)[:, :, None] & (first < width)[:, None]
            crops = torch.stack(crops)
            x[k, rows] = crops if cfg.finetune else segmenter.features(crops).half()
    return x, valid, hypotheses(segmenter, samples).to(x.device)


def agreement(masks):
    """How often two images have the same class at the same patch, from 1/C to 1: at 1 the masks ignore the images.

    masks: C×h×w, the masks M of all images, summed.
    """
    count = masks.sum(0)                                                                # h w
    same = (masks / count.clamp(min=1)).square().sum(0)                                 # h w
    return ((same * count).sum() / count.sum()).item()


def train(segmenter, data, N, out, resume):
    """Learn the Rectifier (and with finetune CLIP's image encoder) from hypotheses alone; log a line an epoch.

    data: x, valid, y of training_data, computed from N images. Each epoch goes through one view of every image. Of several
    processes each takes its own images out of every batch, and the weighted mean of their gradients is the batch's.
    """
    cfg, recipe, rectifier, device = segmenter.cfg, recipe_of(segmenter.cfg), segmenter.rectifier, segmenter.device
    x, valid, y = data
    groups = [{"params": [rectifier.V], "lr": cfg.lr},
              {"params": [p for p in rectifier.parameters() if p is not rectifier.V], "lr": cfg.lr_conv}]
    if cfg.finetune:
        segmenter.clip.visual.requires_grad_(True)
        groups.append({"params": list(segmenter.clip.visual.parameters()), "lr": recipe["lr_encoder"]})
    optimizer = (torch.optim.SGD(groups, momentum=0.9, weight_decay=recipe["weight_decay"]) if cfg.optimizer == "sgd"
                 else torch.optim.Adam(groups, weight_decay=recipe["weight_decay"]))
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, cfg.epochs, power=0.9)
    partial, begin = out / "rectify.partial.pt", 0
    if resume and partial.is_file():
        state = load_checkpoint(partial)
        refuse_other_run(state, cfg, segmenter.names, partial)
        segmenter.restore(state)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        begin = state["epoch"]
        log = out / "log.jsonl"
        if RANK == 0 and log.is_file():                 # an epoch that was logged and not saved runs again
            log.write_text("".join(log.read_text().splitlines(keepends=True)[:begin]))
        print(f"resuming after epoch {begin} of {cfg.epochs}")
    else:
        for old in (partial, out / "log.jsonl"):
            old.unlink(missing_ok=True)

    if device.type == "cuda" and WORLD > 1:             # BatchNorm sees the whole batch, which it can on GPUs only
        nn.SyncBatchNorm.convert_sync_batchnorm(rectifier)
    model = in_step(segmenter, device, cfg.compile, find_unused_parameters=cfg.space == "off" or cfg.finetune)
    steps = -(-N // cfg.batch)
    bar = tqdm(total=cfg.epochs * steps, initial=begin * steps, desc=cfg.method, unit="step")
    for epoch in range(begin, cfg.epochs):
        k, total, masks = epoch % cfg.views, torch.zeros((), device=device), 0
        rectifier.train()
        for i, size, weight in own_batches(order_of(cfg.seed, epoch, N), cfg.batch, x.device):
            logits, f = model(x[k, i].to(device))
            M = gumbel_mask(logits, cfg.alpha)
            present, picture = y[i].to(device), valid[k, i].to(device)
            loss = weight * contrastive_loss(M, f, segmenter.T, present, segmenter.scale, picture, cfg.pool)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            masks += (M.detach() * picture[:, None]).sum(0)                             # C h w
            total += loss.detach() * size               # weight · size = WORLD · own images: over N · WORLD it is the mean
            bar.update()
        if WORLD > 1:
            distributed.all_reduce(total)
            distributed.all_reduce(masks)
        mean, same, lr = total.item() / N / WORLD, agreement(masks), schedule.get_last_lr()[0]
        schedule.step()
        bar.set_postfix(epoch=epoch + 1, loss=f"{mean:.3f}", agreement=f"{same:.2f}")
        if RANK == 0 and epoch == 0 and same > COLLAPSED:
            bar.write(f"warning: the masks hardly depend on the image: two images have the same class on {same:.0%} of their "
                      "patches. This run has collapsed; lower --lr-conv, --lr or --alpha", file=sys.stderr)
        if not np.isfinite(mean):
            raise UserError(f"the loss is {mean} in epoch {epoch + 1}; lower --lr, or --alpha (log: {out / 'log.jsonl'})")
        if RANK == 0:
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps({"epoch": epoch + 1, "loss": round(mean, 5), "agreement": round(same, 4), "lr": lr}) + "\n")
            save(partial, {**segmenter.state(), "epoch": epoch + 1, "optimizer": optimizer.state_dict(),
                           "schedule": schedule.state_dict()})
    bar.close()
    rectifier.eval()
    segmenter.clip.requires_grad_(False)


# =============================================================================================================== 5 prediction

def denoise(logits, sharpness, least):
    """Prompt denoising: a class whose best probability softmax(sharpness · logits) in an image is below `least` leaves it.

    logits: B×C×h×w. Returns them with -1e4 for those classes, which interpolation bears and -inf does not (0 · inf is NaN).
    Where no class is left all stay (the authors' argmax falls to class 0).
    """
    if not least:
        return logits
    gone = (sharpness * logits).softmax(1).amax((2, 3), keepdim=True) < least           # B C 1 1
    return logits.masked_fill(gone & ~gone.all(1, keepdim=True), -1e4)


def upsample(logits, patch, resized, original):
    """Grid logits B×C×h×w to the size of the resized picture (padding cut off), then to the original's: bilinear, twice."""
    h, w = logits.shape[-2:]
    logits = F.interpolate(logits, (h * patch, w * patch), mode="bilinear")[..., :resized[0], :resized[1]]
    return F.interpolate(logits, original, mode="bilinear")


@torch.no_grad()
def predict(segmenter, images):
    """Masks of uint8 pictures B×3×H×W: {"maskclip": B×H×W, and the method's own, where there is one}."""
    cfg, recipe = segmenter.cfg, recipe_of(segmenter.cfg)
    x = fit(images.to(segmenter.device), recipe["size"])
    f = segmenter.features(x)
    logits = {"maskclip": similarity(segmenter.maskclip(x, f), segmenter.T)}
    if segmenter.rectifier is not None:
        rectified = segmenter.rectified(f, segmenter.reference())
        logits[cfg.method] = denoise(rectified, SHARPNESS[cfg.method], cfg.denoise)
    patch = segmenter.clip.visual.patch_size[0]
    return {name: upsample(l, patch, x.shape[-2:], images.shape[-2:]).argmax(1) for name, l in logits.items()}


# ============================================================================================================================
# The method ends here. Everything below serves it.
# ============================================================================================================================


# =============================================================================================================== 6 evaluation

def confusion(label, prediction, classes):
    """C×C int64, rows the truth, columns the prediction; pixels labelled 255 do not count."""
    known = label != VOID
    return torch.bincount(label[known].long() * classes + prediction[known], minlength=classes ** 2).view(classes, classes)


def iou(matrix):
    """IoU in percent of each class, C; NaN for a class that neither the truth nor the prediction has."""
    hit = matrix.diagonal().double()
    return 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)


def objects(label, prediction):
    """(distance in px of its centroid from the picture's centre, IoU in percent, class) of each object in one H×W mask.

    An object is what the picture holds of a class (VOC's layout tells classes, not instances). For Fig. 1(a) and 5.
    """
    centre = torch.tensor([(n - 1) / 2 for n in label.shape])
    known, found = label != VOID, []
    for c in label[known].unique():
        truth, guess = label == c, (prediction == c) & known
        distance = (truth.nonzero().float().mean(0).cpu() - centre).norm()
        found.append((distance.item(), 100 * ((truth & guess).sum() / (truth | guess).sum()).item(), c.item()))
    return found


def evaluate(predict, samples, names):
    """Measure masks against ground truth, streamed. predict: uint8 B×3×H×W -> {method: B×H×W}.

    Returns ({method: {"mIoU": percent, "IoU": {name: percent}}}, {method: what `objects` says, and the Sample});
    a class that never occurs has IoU None.
    """
    C, matrices, found = len(names), {}, {}
    bar = tqdm(total=len(samples), desc="evaluating", unit="img", leave=False)
    for batch, images, labels in batches_of_one_size(samples, 16, C):
        for method, masks in predict(images).items():
            labels = labels.to(masks.device)
            matrices[method] = matrices.get(method, 0) + confusion(labels, masks, C)
            for sample, label, mask in zip(batch, labels, masks):
                found.setdefault(method, []).extend((*thing, sample) for thing in objects(label, mask))
        bar.update(len(batch))
    bar.close()
    if not any(found.values()):
        raise UserError(f"{samples[0].label.parent}: the masks of the validation images hold no class, only background or void")
    results = {}
    for method, matrix in matrices.items():
        each = iou(matrix)
        results[method] = {"mIoU": round(each.nanmean().item(), 3),
                           "IoU": {n: None if np.isnan(v) else round(v, 3) for n, v in zip(names, each.tolist())}}
    return results, found


def judge(y, truth):
    """How good hypotheses are, N×C bool both: {"precision", "recall", "classes_per_image"}."""
    hits = (y & truth).sum().item()
    return {"precision": round(hits / max(1, y.sum().item()), 4), "recall": round(hits / max(1, truth.sum().item()), 4),
            "classes_per_image": round(y.sum().item() / len(y), 3)}


def classes_present(samples, C):
    """N×C bool, the classes that ground truth shows in each sample."""
    labels = read_ahead(lambda s: load_label(s.label, load_image(s.image).shape[1:], C), samples)
    return torch.stack([torch.bincount(label.flatten().long(), minlength=VOID + 1)[:C] > 0 for label in labels])


def print_table(results, names):
    """IoU of every class and the mean, a column a method; of several, with the gain of the last over the first."""
    methods, wide = list(results), max(len(n) for n in [*names, "mIoU"])
    print("\n" + " " * wide + "".join(f"{m:>11}" for m in methods) + ("       gain" if len(methods) > 1 else ""))
    rows = [(n, [results[m]["IoU"][n] for m in methods]) for n in names] + [("mIoU", [results[m]["mIoU"] for m in methods])]
    for name, values in rows:
        if name == "mIoU":
            print("-" * (wide + 11 * (len(methods) + (len(methods) > 1))))
        print(f"{name:<{wide}}" + "".join("          -" if v is None else f"{v:11.1f}" for v in values)
              + (f"{values[-1] - values[0]:+11.1f}" if len(values) > 1 and None not in values else ""))
    print()


# ===================================================================================================================== 7 data

VOC_NAMES = ["airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
             "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"]
CONTEXT_NAMES = [
    "airplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book", "bottle", "building", "bus", "cabinet",
    "car", "cat", "ceiling", "chair", "cloth", "computer", "cow", "cup", "curtain", "dog", "door", "fence", "floor", "flower",
    "food", "grass", "ground", "horse", "keyboard", "light", "motorbike", "mountain", "mouse", "person", "plate", "platform",
    "potted plant", "road", "rock", "sheep", "shelves", "sidewalk", "sign", "sky", "snow", "sofa", "table", "track", "train",
    "tree", "truck", "tv monitor", "wall", "water", "window", "wood"]
# The category ids of these 59 among the 459 of trainval_merged.json, which are alphabetical too.
CONTEXT_IDS = [
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159, 162, 187,
    189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424,
    427, 440, 445, 454, 458]
ADE_NAMES = [
    "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet", "sidewalk", "person",
    "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water", "painting", "sofa", "shelf", "house",
    "sea", "mirror", "rug", "field", "armchair", "seat", "fence", "desk", "rock", "wardrobe", "lamp", "bathtub", "railing",
    "cushion", "base", "box", "column", "signboard", "chest of drawers", "counter", "sand", "sink", "skyscraper", "fireplace",
    "refrigerator", "grandstand", "path", "stairs", "runway", "case", "pool table", "pillow", "screen door", "stairway", "river",
    "bridge", "bookcase", "blind", "coffee table", "toilet", "flower", "book", "hill", "bench", "countertop", "stove", "palm",
    "kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine", "hovel", "bus", "towel", "light", "truck",
    "tower", "chandelier", "awning", "streetlight", "booth", "television receiver", "airplane", "dirt track", "apparel", "pole",
    "land", "bannister", "escalator", "ottoman", "bottle", "buffet", "poster", "stage", "van", "ship", "fountain",
    "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool", "barrel", "basket", "waterfall", "tent", "bag",
    "minibike", "cradle", "oven", "ball", "food", "step", "tank", "trade name", "microwave", "pot", "animal", "bicycle", "lake",
    "dishwasher", "screen", "blanket", "sculpture", "hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan", "pier",
    "crt screen", "plate", "monitor", "bulletin board", "shower", "radiator", "glass", "clock", "flag"]
PASCAL = "http://host.robots.ox.ac.uk/pascal/VOC"
# dataset: (its files with their md5, the archive first; folder in the archive that holds the pictures; class names)
DATASETS = {
    "emoji": ([(HERE / "tests/emoji/emoji-voc.tar", "551b084098f476f71b41547dad04d51a")], "VOCdevkit/VOC2012", VOC_NAMES),
    "voc": ([(f"{PASCAL}/voc2012/VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd")],
            "VOCdevkit/VOC2012", VOC_NAMES),
    "context": ([(f"{PASCAL}/voc2010/VOCtrainval_03-May-2010.tar", "da459979d0c395079b5c75ee67908abb"),
                 ("https://codalabuser.blob.core.windows.net/public/trainval_merged.json", "3c2d0c0656b7be9eb61928ffe885d8ce")],
                "VOCdevkit/VOC2010", CONTEXT_NAMES),
    "ade": ([("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip", "7328b3957e407ddae1d3cbf487f149ef")],
            "ADEChallengeData2016", ADE_NAMES)}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VOID = 255
LARGEST_BATCH = 2 ** 22                                 # pixels that are evaluated at once: 1.7 GB of logits with 100 classes


@dataclass
class Sample:
    """One picture: its name (its path in the list or folder, no suffix), its file, and its label's (None where there is none)."""
    name: str
    image: Path
    label: Path | None


def md5_of(path):
    """The md5 of a file, read in pieces: VOC's archive has 2 GB."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def download(url, md5, path):
    """Fetch a file to `path`, where it appears once its md5 is right; what a cut connection left in `path`.part is gone on with.

    A right file at `path` is taken as it is. Raises UserError, which tells address, md5 and path to whoever must fetch by hand.
    """
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.is_file() else 0
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        if path.is_file():
            if md5_of(path) == md5:
                return
            raise OSError("another file is there")
        try:
            with urlopen(request, timeout=60) as reply:
                have = have if reply.status == 206 else 0           # a server that ignores Range sends all of it again
                left, free = int(reply.headers.get("Content-Length", 0)), shutil.disk_usage(path.parent).free
                if left > free:
                    raise OSError(f"{left / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB of disk free")
                bar = tqdm(total=have + left, initial=have, desc=path.name, unit="B", unit_scale=True, leave=False)
                with bar, open(part, "ab" if have else "wb") as file:
                    while piece := reply.read(1 << 20):
                        bar.update(file.write(piece))
                if part.stat().st_size < have + left:
                    raise OSError("the connection was cut; the same command goes on from there")
        except HTTPError as error:
            if error.code != 416:                                   # 416: there is nothing left to fetch
                raise
        if md5_of(part) != md5:
            part.unlink()
            raise OSError("what came is not the published file")
        part.rename(path)
    except (OSError, HTTPException) as error:
        raise UserError(f"{path}: not downloaded ({error}); fetch {url} yourself (md5 {md5}) and put it there")


def unpack(archive, md5, target):
    """Check an archive (tar or zip) against its md5 and unpack it to `target`, which appears only when it is whole.

    Raises UserError, also for a member that would leave the folder.
    """
    if target.exists():
        raise UserError(f"{target}: is in the way of unpacking {archive.name}; move it, or give another --root")
    if not archive.is_file():
        raise UserError(f"{archive}: missing; it comes with the repository")
    if md5_of(archive) != md5:
        raise UserError(f"{archive}: not the published file (its md5 is not {md5}); delete it and fetch it again")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                for name in file.namelist():
                    if not (partial / name).resolve().is_relative_to(partial.resolve()):
                        raise OSError(f"{name} would leave the folder")
                file.extractall(partial)
        else:
            with tarfile.open(archive) as file:
                file.extractall(partial, filter="data")             # refuses members that would leave the folder
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{archive}: not unpacked: {error}")
    partial.rename(target)


def decode_rle(counts, size):
    """A mask in COCO's run-length code: H×W bool. The runs of false and true take turns, down one column after the other.

    counts: the lengths of the runs, or COCO's string of them: 5 bits a character, the lowest first, in two's complement; from
    the fourth run on the difference from the run before the last. size: (H, W). Raises ValueError where they do not fill it.
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
    """Write PASCAL Context's 59 classes into VOC2010's folder: SegmentationClassContext/*.png (class c as c + 1, all else 0),
    ImageSets/SegmentationContext/{train,val}.txt. The lists appear last: where they are, the masks are whole.

    annotations: trainval_merged.json. Its fields are taken from public readers of it, the file itself was not at hand: images
    (image_id, file_name, height, width, phase: the split), annos_segmentation (image_id, category_id, segmentation: RLE), where
    a later one lies over the earlier ones. Raises UserError where it is not so.
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
                mask[decode_rle(piece["segmentation"]["counts"], mask.shape)] = value.get(piece["category_id"], 0)
            name, picture = Path(image["file_name"]).stem, Image.fromarray(mask)
            picture.putpalette(palette())
            picture.save(masks / f"{name}.png")
            names.setdefault(image["phase"], []).append(name)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{annotations}: not PASCAL Context's annotations ({error!r}); delete it and fetch it again")
    for phase, listed in names.items():
        (partial / f"{phase}.txt").write_text("\n".join(sorted(listed)) + "\n")
    partial.rename(lists)


def dataset_folder(cfg):
    """The folder that holds a dataset's pictures; downloads, unpacks and converts what is not there yet. Raises UserError."""
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
        except UserError as error:                      # go on, so that one message names every file that is missing
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
    """The class names: --names (a file, or words with commas between) or the dataset's own. Raises UserError."""
    if not cfg.names:
        return DATASETS[cfg.dataset][2]
    is_file = os.path.isfile(cfg.names)                 # os.path: a long list of words is no path, and no error
    if not is_file and "," not in cfg.names and (os.sep in cfg.names or Path(cfg.names).suffix == ".txt"):
        raise UserError(f"{cfg.names}: no such file; --names wants a file with one class name a line, or words and commas")
    try:
        words = Path(cfg.names).read_text("utf-8").splitlines() if is_file else cfg.names.split(",")
    except UnicodeDecodeError:
        raise UserError(f"{cfg.names}: not a text in UTF-8; --names wants one class name a line")
    names = [w.strip() for w in words if w.strip()]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice or not names:
        raise UserError(f"{cfg.names}: " + (f"'{twice[0]}' is named twice" if twice else "holds no class name"))
    if len(names) >= VOID:
        raise UserError(f"{cfg.names}: {len(names)} names; a mask of 8 bits holds {VOID - 1} at most")
    return names


def list_samples(folder, split):
    """The samples of a split: the listed ones where ImageSets/ exists (PASCAL Context's lists before VOC's), those of
    images/ and annotations/ in ADE20K's layout, else every image in the folder, without labels.

    Images meet their labels by name. A plain folder is all train and no val. Raises UserError.
    """
    kind = "Context" if (folder / "ImageSets/SegmentationContext").is_dir() else ""
    pictures, labels = folder / "JPEGImages", folder / f"SegmentationClass{kind}"
    index = folder / f"ImageSets/Segmentation{kind}" / f"{split}.txt"
    if (folder / "ImageSets").is_dir():
        if not index.is_file():
            raise UserError(f"{index}: missing; write the names of the {split} images there, one a line")
        names = [line.strip() for line in index.read_text().splitlines() if line.strip()]
        if not names:
            raise UserError(f"{index}: empty; write the names of the {split} images there, one a line")
        images = [next((p for p in (pictures / f"{n}{suffix}" for suffix in SUFFIXES) if p.is_file()), pictures / f"{n}.jpg")
                  for n in names]
    else:
        ade = {"train": "training", "val": "validation"}[split]
        if (folder / "annotations").is_dir() and (folder / "images" / ade).is_dir():
            pictures, labels = folder / "images" / ade, folder / "annotations" / ade
        elif split == "val":
            return []
        else:
            pictures, labels = pictures if pictures.is_dir() else folder, None      # not the masks beside them
        images, index = sorted(p for p in pictures.rglob("*") if p.suffix.lower() in SUFFIXES), pictures
        if not images:
            raise UserError(f"{pictures}: holds no images ({' '.join(sorted(SUFFIXES))})")
        names = [p.relative_to(pictures).with_suffix("").as_posix() for p in images]    # equal stems may lie in two sub-folders
    labelled = labels is not None and labels.is_dir()
    samples = [Sample(n, p, labels / f"{n}.png" if labelled else None) for n, p in zip(names, images)]
    for path in [p for s in samples for p in (s.image, s.label) if p and not p.is_file()]:
        raise UserError(f"{path}: missing, though {index} lists it; restore the file or take it off the list")
    return samples


def splits(folder):
    """(training samples, labelled validation samples) of a folder. Raises UserError, also where processes outnumber images."""
    train, val = list_samples(folder, "train"), [sample for sample in list_samples(folder, "val") if sample.label]
    if len(train) < WORLD:
        raise UserError(f"{folder}: {len(train)} images are too few for {WORLD} processes")
    return train, val


def load_image(path):
    """Any picture as 3×H×W uint8 RGB: EXIF rotation applied, 16 bits cut to 8, transparency laid on white."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):              # 16-bit greys, which convert("RGB") would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error}); replace it or take it off the list")


def load_label(path, size, classes):
    """A palette PNG as H×W uint8 in {0..C-1, 255}: VOC's background (0) becomes void, class c becomes c - 1."""
    try:
        with Image.open(path) as image:
            mode, label = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a readable mask ({error})")
    if mode not in ("P", "L"):
        raise UserError(f"{path}: a mask holds one class number a pixel (palette PNG), this one is {mode}; convert it")
    if label.shape != tuple(size):
        raise UserError(f"{path}: the mask is {label.shape[1]}×{label.shape[0]}, its image {size[1]}×{size[0]}")
    wrong = label[(label > classes) & (label != VOID)]
    if wrong.size:
        raise UserError(f"{path}: the mask holds {wrong[0]}, with {classes} classes (0 is background, 255 void)")
    return torch.from_numpy(np.where(label == 0, VOID, label - (label != VOID)).astype(np.uint8))


def read_ahead(read, samples, ahead=32):
    """Yield read(sample) of each, in order, while threads read the next ones: decoding a picture leaves Python's lock alone.

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


def fit(image, size, factor=1.0, mode=v2.InterpolationMode.BILINEAR):
    """Resize ..×3×H×W to the largest that `size` = (long, short side in px), times `factor`, holds."""
    height, width = image.shape[-2:]
    scale = factor * min(size[0] / max(height, width), size[1] / min(height, width))
    return v2.functional.resize(image, [max(1, round(height * scale)), max(1, round(width * scale))], mode, antialias=True)


def spread(samples, count):
    """At most `count` of the samples, evenly spread over the list."""
    return samples[::math.ceil(len(samples) / count)]


def batches_of_one_size(samples, batch, classes=None):
    """Yield (samples, images B×3×H×W uint8, labels B×H×W uint8 or None), each batch of one image size.

    Streamed: no more than 4 · batch pictures wait for others of their size. A batch ends early at LARGEST_BATCH pixels.
    """
    def read(sample):
        image = load_image(sample.image)
        return sample, image, load_label(sample.label, image.shape[1:], classes) if classes else None

    waiting = {}
    for sample, image, label in read_ahead(read, samples):
        group = waiting.setdefault(image.shape, [])
        group.append((sample, image, label))
        if len(group) == batch or (len(group) + 1) * image[0].numel() > LARGEST_BATCH:
            yield _stack(waiting.pop(image.shape))
        elif sum(map(len, waiting.values())) > 4 * batch:
            yield _stack(waiting.pop(max(waiting, key=lambda size: len(waiting[size]))))
    yield from (_stack(group) for group in waiting.values())


def _stack(group):
    samples, images, labels = zip(*group)
    return samples, torch.stack(images), None if labels[0] is None else torch.stack(labels)


def hypotheses(segmenter, samples):
    """y: N×C bool, the hypothesis of every sample."""
    found = {}
    for batch, images, _ in batches_of_one_size(samples, 16):
        found.update(zip([sample.image for sample in batch], hypothesise(segmenter, images).cpu()))
    return torch.stack([found[sample.image] for sample in samples])         # an image may be listed twice


# ================================================================================================================== 8 figures

INK, WHITE = (30, 30, 30), (255, 255, 255)
SERIES = [(130, 130, 130), (200, 60, 40), (40, 90, 180), (40, 140, 80)]             # of a plot, in order; the tutorial uses all


@functools.cache
def palette():
    """VOC's colours: 256 RGB triples in one list, made by spreading the bits of the index over the channels."""
    return [sum(((i >> (3 * j + channel)) & 1) << (7 - j) for j in range(8)) for i in range(256) for channel in range(3)]


def colour(c):
    """RGB of class c (0..C-1); VOC's palette starts with the background."""
    return tuple(palette()[3 * (c + 1):3 * (c + 2)])


def paint(mask, photo=None, faint=None):
    """A mask H×W in class colours as a picture; over a photo 3×H×W where given, and pale where `faint` (H×W bool) says so."""
    colours = torch.tensor(palette()[3:] + list(WHITE), dtype=torch.float).view(-1, 3)   # class c has VOC's colour c + 1
    painted = colours[mask.long()]                                                      # H W 3
    if photo is not None:
        painted = 0.65 * painted + 0.35 * photo.permute(1, 2, 0)
    if faint is not None:
        painted[faint] = 0.25 * painted[faint] + 0.75 * 255
    return Image.fromarray(painted.byte().numpy())


def legend(names, classes, width):
    """A strip of colour patches and class names, `width` px wide."""
    font = ImageFont.load_default(20)
    spots, x, y = [], 10, 8
    for c in classes:
        wide = 44 + font.getlength(names[c])
        if x + wide > width and x > 10:
            x, y = 10, y + 32
        spots.append((x, y, c))
        x += wide
    strip = Image.new("RGB", (width, y + 36), WHITE)
    draw = ImageDraw.Draw(strip)
    for x, y, c in spots:
        draw.rectangle([x, y, x + 22, y + 22], fill=colour(c), outline=INK)
        draw.text((x + 28, y), names[c], fill=INK, font=font)
    return strip


def contact_sheet(rows, names, classes, cell=150):
    """A figure from rows of (title, [PIL images]): equal cells, titles at the left, the legend below."""
    font, margin = ImageFont.load_default(20), 8
    left = 20 + int(max(font.getlength(title) for title, _ in rows))
    width = left + (cell + margin) * len(rows[0][1])
    strip = legend(names, classes, width)
    height = (cell + margin) * len(rows)
    page = Image.new("RGB", (width, height + strip.height), WHITE)
    for r, (title, pictures) in enumerate(rows):
        ImageDraw.Draw(page).text((8, r * (cell + margin) + cell / 2), title, fill=INK, font=font, anchor="lm")
        for k, picture in enumerate(pictures):
            picture = ImageOps.contain(picture, (cell, cell), Image.NEAREST if picture.height < cell else Image.LANCZOS)
            page.paste(picture, (left + k * (cell + margin) + (cell - picture.width) // 2,
                                 r * (cell + margin) + (cell - picture.height) // 2))
    page.paste(strip, (0, height))
    return page


TITLES = {"maskclip": "MaskCLIP", "reclip": "ReCLIP", "reclip++": "ReCLIP++", "maskclip+": "MaskCLIP+", "student": "DeepLabV2"}


def frame(picture, box):
    """Draw a dashed blue box (left, top, right, bottom) into a picture."""
    draw, (left, top, right, bottom) = ImageDraw.Draw(picture), box
    wide, dash = max(1, min(picture.size) // 60), max(3, min(picture.size) // 20)
    draw.rectangle(box, outline=WHITE, width=wide)
    for x in range(left, right, 2 * dash):
        for y in (top, bottom - wide + 1):
            draw.rectangle([x, y, min(x + dash, right), y + wide - 1], fill=(0, 60, 255))
    for y in range(top, bottom, 2 * dash):
        for x in (left, right - wide + 1):
            draw.rectangle([x, y, x + wide - 1, min(y + dash, bottom)], fill=(0, 60, 255))


def gallery(predict, samples, names, path, classes=None):
    """Rows image / ground truth / a row each method of `predict`, a column a sample. For Fig. 4 and 5.

    Where ground truth says background or void nothing is scored, and the predictions are shown pale. classes: the class of
    each sample around whose pixels a box is drawn.
    """
    rows, seen = {"image": [], "ground truth": []}, set()
    for k, sample in enumerate(samples):
        image = load_image(sample.image)
        label = load_label(sample.label, image.shape[1:], len(names))
        masks = {method: mask[0].cpu() for method, mask in predict(image[None]).items()}
        if classes:
            y, x = (label == classes[k]).nonzero().T
            box = x.min().item(), y.min().item(), x.max().item(), y.max().item()
        cells = {"image": Image.fromarray(image.permute(1, 2, 0).numpy()), "ground truth": paint(label),
                 **{method: paint(mask, faint=label == VOID) for method, mask in masks.items()}}
        for row, cell in cells.items():
            if classes:
                frame(cell, box)
            rows.setdefault(row, []).append(cell)
        seen.update(label.unique().tolist(), *(mask[label != VOID].unique().tolist() for mask in masks.values()))
    contact_sheet([(TITLES.get(k, k), v) for k, v in rows.items()], names, sorted(seen - {VOID})).save(path)


def figure4(predict, samples, names, path):
    """Fig. 4: eight images spread evenly over the list."""
    gallery(predict, spread(samples, 8), names, path)


def figure5(predict, found, names, path):
    """Fig. 5: the eight objects farthest from the centre of their pictures, in a box, each in another picture."""
    farthest = {}
    for _, _, c, sample in sorted(found, key=lambda thing: -thing[0]):
        farthest.setdefault(sample.image, (sample, c))
    samples, classes = zip(*list(farthest.values())[:8])
    gallery(predict, samples, names, path, classes)


def figure1a(found, ring, path):
    """Fig. 1(a): mean IoU of the objects in each ring around the picture's centre, a line a method, objects counted below."""
    big, small, W, H = ImageFont.load_default(24), ImageFont.load_default(19), 900, 560
    page = Image.new("RGB", (W, H), WHITE)
    draw = ImageDraw.Draw(page)
    distances = [d for d, *_ in found["maskclip"]]
    ring *= max(1, int(np.ceil(max(distances) / ring / 8)))                             # eight rings at most
    rings = sorted({int(d // ring) for d in distances})
    means = {m: [np.mean([v for d, v, *_ in things if d // ring == k]) for k in rings] for m, things in found.items()}
    top = max(10, 10 * np.ceil(max(max(v) for v in means.values()) / 10))
    spot = lambda k, v: (110 + (W - 160) * (k + 0.5) / len(rings), H - 130 - (H - 200) * v / top)
    for v in np.arange(0, top + 1, 10 if top <= 60 else 20):
        y = spot(0, v)[1]
        draw.line([(100, y), (W - 40, y)], fill=(220, 220, 220), width=2)
        draw.text((90, y), f"{v:.0f}", fill=INK, font=small, anchor="rm")
    for k, r in enumerate(rings):
        draw.text((spot(k, 0)[0], H - 118), f"{ring * r}-{ring * (r + 1)}", fill=INK, font=small, anchor="ma")
        draw.text((spot(k, 0)[0], H - 92), f"n={sum(d // ring == r for d in distances)}",
                  fill=(120, 120, 120), font=small, anchor="ma")
    draw.text((W / 2, H - 36), "distance of the object from the picture's centre, px", fill=INK, font=big, anchor="mm")
    draw.text((24, 22), "IoU of objects, %", fill=INK, font=big)
    for s, (method, line) in enumerate(means.items()):
        points = [spot(k, v) for k, v in enumerate(line)]
        draw.line(points, fill=SERIES[s], width=5)
        for k, (x, y) in enumerate(points):
            box = [x - 8, y - 8, x + 8, y + 8]
            draw.ellipse(box, fill=SERIES[s]) if s == 0 else draw.rectangle(box, fill=SERIES[s])
        draw.line([(360 + 200 * s, 36), (400 + 200 * s, 36)], fill=SERIES[s], width=5)
        draw.text((410 + 200 * s, 36), TITLES.get(method, method), fill=INK, font=big, anchor="lm")
    page.save(path)


@torch.no_grad()
def segment_image(cfg):
    """--image: the picture, MaskCLIP's and the rectified mask side by side in one PNG. Returns its path.

    Words that are not classes of the training get a Reference of their own from the learned prompt (the mean prompt, where
    each class has one), and B from it; ReCLIP's P and ReCLIP++'s decoder have an output a class and stay out for them.
    Nothing is denoised: who names the classes knows that they are there.
    """
    path = Path(cfg.out) / "rectify.pt" if cfg.out else newest("rectify.pt")
    segmenter = Segmenter.load(path, device=cfg.device)
    clip, trained, method, rectifier = segmenter.clip, segmenter.names, segmenter.cfg.method, segmenter.rectifier
    words = class_names(cfg) if cfg.names else trained
    print(f"segmenting {cfg.image} with {path}")
    image = load_image(cfg.image)[None]
    x = fit(image, recipe_of(segmenter.cfg)["size"])
    f = segmenter.features(x)
    if set(words) <= set(trained):
        chosen = [trained.index(word) for word in words]
        T, rectified = segmenter.T[chosen], segmenter.rectified(f, segmenter.reference())[:, chosen]
    else:
        print(f"{', '.join(w for w in words if w not in trained)}: not among the {len(trained)} classes of the training; "
              "the Reference prompt alone rectifies")
        tokens, L = name_tokens(clip, segmenter.tokenizer, words)
        V = (rectifier.V if rectifier.V.ndim == 2 else rectifier.V.mean(0))[:L]         # a long name takes the last ones' place
        R = F.normalize(reference_features(clip, V, tokens), dim=1)
        if segmenter.cfg.norm == "frobenius":
            R = R / len(trained) ** 0.5                 # the length that a row had in training, on average
        T = text_features(clip, segmenter.tokenizer, words)
        rectified = similarity(f, T)
        if method == "reclip":
            rectified = rectified - bias_reclip(f, R, 0)
        elif rectifier.space:
            rectified = rectified - bias_reclip_pp(R, rectifier.g(positional_embedding(clip, tuple(f.shape[-2:])))[0])
    maps = {"MaskCLIP": similarity(segmenter.maskclip(x, f), T), TITLES[method]: rectified}
    patch, photo, cell = clip.visual.patch_size[0], image[0], 360
    masks = [upsample(logits, patch, x.shape[-2:], image.shape[-2:]).argmax(1)[0].cpu() for logits in maps.values()]
    row = [Image.fromarray(photo.permute(1, 2, 0).numpy())] + [paint(mask, photo) for mask in masks]
    sheet = contact_sheet([("", row)], words, sorted(set(torch.stack(masks).flatten().tolist())), cell)
    page = Image.new("RGB", (sheet.width, sheet.height + 36), WHITE)
    page.paste(sheet, (0, 36))
    for k, title in enumerate(["picture", *maps]):
        centre = (20 + k * (cell + 8) + cell / 2, 18)
        ImageDraw.Draw(page).text(centre, title, fill=INK, font=ImageFont.load_default(22), anchor="mm")
    target = path.parent / f"{Path(cfg.image).stem}.overlay.png"
    page.save(target)
    return target


# ============================================================================================= 9 CLIP's files and checkpoints

def load_clip(cfg, device):
    """open_clip's model, frozen and in eval mode, with its tokenizer.

    Raises UserError where it cannot be had, and before anything is fetched where its towers are not CLIP's own.
    """
    import open_clip                                    # here, not at the top: a student is run without it
    if not cfg.recipe and cfg.clip.startswith("ViT") and cfg.pretrained == "openai" and "quickgelu" not in cfg.clip:
        print(f"warning: the openai weights were trained with QuickGELU, {cfg.clip} computes GELU; "
              f"you may want {cfg.clip}-quickgelu")
    scheme, _, folder = cfg.clip.rpartition(":")
    name = cfg.clip if scheme else cfg.clip.replace("/", "-")                           # ViT-B/16, as papers write it
    if scheme == "local-dir" and not Path(folder).is_dir():
        name = f"{scheme}:{HERE / folder}"
    logging.disable(logging.WARNING)                    # open_clip tells every step of its loading
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore" if cfg.recipe else "default", "QuickGELU mismatch")        # there it is meant
            check_towers(open_clip.get_model_config(name) or {})                        # {}: an unknown name
            clip = open_clip.create_model(name, cfg.pretrained or None, device=device, require_pretrained=bool(scheme),
                                          force_preprocess_cfg=recipe_of(cfg).get("preprocess"))
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:                          # open_clip, torch and safetensors have no error class in common
        raise UserError(f"cannot load CLIP {cfg.clip} {cfg.pretrained}: {(str(error) or repr(error)).splitlines()[0]}")
    finally:
        logging.disable(logging.NOTSET)
    return clip.eval().requires_grad_(False), tokenizer


def check_towers(config):
    """Raise ValueError where open_clip's configuration of a CLIP has towers that this section does not compute."""
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    vit = isinstance(vision.get("layers", 12), int) and not any(vision.get(key) for key in (
        "timm_model_name", "attentional_pool", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn",
        "scale_fc"))
    clips = (text.get("pool_type", "argmax"), text.get("vocab_size", 49408)) == ("argmax", 49408) and not any(
        text.get(key) for key in ("hf_model_name", "hf_tokenizer_name", "no_causal_mask", "embed_cls", "proj_bias"))
    for right, wrong in [(vit, "image tower is not open_clip's own ViT with a class token"),
                         (clips, "text tower is not CLIP's own, with CLIP's tokens, a causal mask and the feature at EOT")]:
        if not right:
            raise ValueError(f"its {wrong}; take a CLIP like ViT-B-16-quickgelu")


def kept_text_features(clip, tokenizer, names, cfg):
    """text_features, kept in <root>/cache/ for later runs with the same CLIP, weights, names and templates."""
    weights = [p.sum(dtype=torch.double).item() for p in clip.parameters()]             # tells weights apart, without a slow hash
    key = repr((cfg.clip, weights, names, [template("") for template in templates()]))
    path = Path(cfg.root) / f"cache/text-{hashlib.md5(key.encode()).hexdigest()}.pt"
    with contextlib.suppress(Exception):                # not there, or broken: torch.load has no error class of its own
        return torch.load(path, map_location=clip.logit_scale.device, weights_only=True)
    T = text_features(clip, tokenizer, names)
    with contextlib.suppress(OSError):                  # a root that cannot be written to costs time and nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, T)
    return T


def _text(clip):
    """The text tower: a part of its own in some open_clip models, the model itself in others."""
    return getattr(clip, "text", clip)


def name_tokens(clip, tokenizer, names):
    """The bare names as tokens, C×n int, n the longest name and EOT; padded with 0. Returns (tokens, longest prompt L)."""
    tokens = tokenizer(names)[:, 1:]                                                    # drop SOS
    lengths, context = tokens.argmax(1) + 1, _text(clip).positional_embedding.size(0)   # EOT has the largest number
    longest = int(lengths.max())
    if longest + 1 >= context:                          # the tokenizer has cut it, and no learnable token would fit
        name = names[int(lengths.argmax())]
        raise UserError(f"class name '{name}' is too long for this CLIP's {context} tokens; shorten it")
    tokens = tokens[:, :longest].to(clip.logit_scale.device)
    unmet = (_text(clip).token_embedding(tokens) == 0).all(-1).any(1)                       # rows the tiny CLIP never trained
    new = [name for name, row in zip(names, unmet) if row]
    if new:
        print(f"warning: this CLIP has never met the words of {', '.join(new)}; expect nonsense for them")
    return tokens, context - 1 - longest


def save(path, state):
    """torch.save that is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def write_text(path, text):
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n")
    temporary.replace(path)


def load_checkpoint(path, part="rectifier", config=Config):
    """A checkpoint of ours, which holds the weights of this part: tensors and plain values, nothing that could run.

    config: the dataclass that its configuration must fit. Raises UserError.
    """
    maker = {"rectifier": "rectify.py", "student": "distill.py"}[part]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["names"], state[part], config(**state["config"])      # KeyError where one is missing, TypeError where another
        return state                                                # version wrote it
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; make it with `python {maker}`")
    except Exception as error:                          # torch.load has no error class of its own for files not its own
        raise UserError(f"{path}: not a checkpoint of {maker} ({type(error).__name__}); make it again")


def refuse_other_run(state, cfg, names, path):
    """Raise UserError where a checkpoint was trained with other settings than those asked for now."""
    ours = asdict(cfg)
    free = {"device", "precision", "compile", "resume", "eval", "image", "out", "root", "tta"}      # tta is distill.py's
    other = [k for k, v in state["config"].items() if k not in free and v != ours.get(k)]
    if other or state["names"] != names:
        what = f"--{other[0]} {state['config'][other[0]]}, not {ours.get(other[0])}" if other else "other class names"
        raise UserError(f"{path}: was trained with {what}; give the same settings, or leave out --resume")


# ========================================================================================= 10 processes, precision and memory

@contextlib.contextmanager
def first_alone():
    """What is in it runs in the first process alone, which may download and convert, and then in the others, which find it."""
    if RANK > 0:
        distributed.barrier()
    try:
        yield
    finally:
        if RANK == 0 and WORLD > 1:
            distributed.barrier()


def order_of(seed, epoch, N):
    """The order of an epoch's N images, the same in every process; what is drawn after it is each process's own.

    An epoch's randomness is its own too, so that a resumed run repeats it.
    """
    torch.manual_seed(100_003 * seed + epoch)
    order = torch.randperm(N)
    if RANK > 0:
        torch.manual_seed(hash((seed, epoch, RANK)))
    return order


def own_batches(order, batch, device):
    """An epoch's batches as one of several processes sees them, an iterator of (i, size, weight).

    i: where it keeps its own images of the batch. size: of the whole batch. weight: 1 for a fair share of it; who has no image
    in it goes along with its first one, at 0. All i go to the device at once: a copy in each step would make the host wait.
    """
    batches = order.split(batch)
    own = [i[i % WORLD == RANK] // WORLD for i in batches]
    weights = [len(i) * WORLD / len(whole) for i, whole in zip(own, batches)]
    own = [i if len(i) else torch.zeros(1, dtype=torch.long) for i in own]
    return zip(torch.cat(own).to(device).split([*map(len, own)]), map(len, batches), weights)


def in_step(module, device, compile, **options):
    """The module as training calls it: of several processes with the mean of their gradients (DDP), and compiled where asked."""
    if WORLD > 1:
        gpu = [device.index] if device.type == "cuda" else None
        module = nn.parallel.DistributedDataParallel(module, gpu, **options)
    return torch.compile(module) if compile else module


def in_bf16(device, precision="auto"):
    """Autocast to bfloat16 for what is large: CLIP's image tower, and the student in training. auto: on a GPU that has it.

    Not for the text encoder: a training step has few tokens for it, and would cast its frozen weights anew each time.
    """
    enabled = has_bf16(device.type) if precision == "auto" else precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@torch.compiler.assume_constant_result                  # or --compile would start anew with every step
def has_bf16(kind):
    """Whether devices of this kind compute with bfloat16 themselves; CPUs are not asked."""
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def free_memory(device):
    """Bytes free on a device; of RAM, where the system does not tell (macOS), half of what the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:                                                # with what the system's file cache would give back
        return 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def make_room(shape, dtype, device, out):
    """An empty tensor where it fits: on the device, else in RAM, else in a file in the folder `out`. It prints where.

    It takes no more than a share of what is free: training needs some too. Raises UserError where there is no room at all.
    """
    size = math.prod(shape)
    need, share = size * dtype.itemsize / 1e9, 0.7
    for place in dict.fromkeys([device, torch.device("cpu")]):
        users = WORLD if place.type == "cpu" else 1
        if need * users <= share * free_memory(place) / 1e9:
            print(f"features: {need:.3g} GB in " + ("RAM" if place.type == "cpu" else "the GPU's memory"))
            return torch.empty(shape, dtype=dtype, device=place)
    missing = WORLD * need - share * shutil.disk_usage(out).free / 1e9
    if missing > 0:
        raise UserError(f"{out}: {WORLD * need:.3g} GB of features fit neither memory nor this disk, which lacks "
                        f"{missing:.3g} GB; fewer --views need less, or give --out on a larger disk")
    print(f"features: {need:.3g} GB in a file in {out}")
    file = out / f"features.{RANK}.tmp"
    x = torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)
    file.unlink()                                       # only its name: the space is free when x is, however the run ends
    return x


# =================================================================================================== 11 command line and main

def lacks_compiler(cfg):
    """(Whether --compile was asked for where torch.compile finds no compiler, the message for it)."""
    compilers = "g++", "clang++", "cl"
    return cfg.compile and not any(map(shutil.which, compilers)), f"--compile wants a C++ compiler ({', '.join(compilers)})"


def pick_device(cfg):
    """The torch device that --device means, under torchrun this process's own. Raises UserError where it is not there."""
    gpus = torch.cuda.device_count()
    if cfg.device == "cpu" or cfg.device == "auto" and not gpus:
        return torch.device("cpu")
    if LOCAL >= gpus:
        raise UserError(f"--device {cfg.device}: torch finds {gpus} CUDA devices here, and this is process {LOCAL + 1}")
    torch.cuda.set_device(LOCAL)
    torch.set_float32_matmul_precision("high")          # TF32: 10 bits of mantissa, as many as the features are kept with
    return torch.device("cuda", LOCAL)


def command_line(config, doc, argv=None):
    """Turn a dataclass of `option`s into a command line: --field-name VALUE, or a bare flag for a bool."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(config):
        flag, about = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=about)
        else:
            default = "" if f.default in (None, "") else f" (default {f.default})"
            parser.add_argument(flag, type=f.type, default=f.default, choices=f.metadata["choices"], help=about + default,
                                metavar=f.type.__name__.upper() if f.metadata["choices"] is None else None)
    return config(**vars(parser.parse_args(argv)))


def newest(name, root="runs"):
    """The newest file of this name in a run's folder. Raises UserError where there is none."""
    runs = sorted(Path(root).glob(f"*/{name}"), key=lambda p: p.stat().st_mtime)
    if not runs:
        maker = {"rectify.pt": "rectify.py", "student.pt": "distill.py"}[name]
        raise UserError(f"no {name} under {root}/; make one with `python {maker}`")
    return runs[-1]


def versions():
    """What computed a result: Python, the libraries and the machine."""
    return {"python": platform.python_version(), "torch": torch.__version__, "open_clip": version("open_clip_torch"),
            "numpy": np.__version__, "platform": platform.platform(), "processors": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def main(argv=None):
    started = time.time()
    cfg = command_line(Config, __doc__, argv)
    if cfg.image:
        print(f"wrote {segment_image(cfg)}")
        return
    if cfg.eval:
        state = load_checkpoint(Path(cfg.eval))
        theirs = Config(**state["config"])
        free = {"eval": cfg.eval, "device": cfg.device, "precision": cfg.precision, "compile": cfg.compile, "root": cfg.root,
                "names": theirs.names, "data": cfg.data or theirs.data, "out": cfg.out or str(Path(cfg.eval).parent),
                "denoise": theirs.denoise if cfg.denoise is None else cfg.denoise}
        for f in fields(cfg):
            asked, trained = getattr(cfg, f.name), getattr(theirs, f.name)
            if f.name not in free and asked not in (f.default, trained):
                raise UserError(f"{cfg.eval}: was trained with --{f.name.replace('_', '-')} {trained or 'left out'}, not {asked}")
        cfg = replace(theirs, **free)
    cfg = complete(cfg)
    names, device, out = state["names"] if cfg.eval else class_names(cfg), pick_device(cfg), Path(cfg.out)
    torch.manual_seed(cfg.seed)
    with first_alone():
        folder = dataset_folder(cfg)
        samples, val = splits(folder)
        print(f"{cfg.method} on {folder}: {len(samples)} images to learn from, {len(val)} labelled ones to measure on, "
              f"{len(names)} classes, {device}" + f", {WORLD} processes" * (WORLD > 1))
        segmenter = Segmenter(cfg, names, device)
        segmenter.stock                                 # now, where a download is safe and a failure comes early
        out.mkdir(parents=True, exist_ok=True)
    seconds, trained, written = {}, False, ["rectify.json", "figure1a.png", "figure4.png", "figure5.png"]

    if cfg.eval:
        segmenter.restore(state)
    elif cfg.resume and (out / "rectify.pt").is_file() and not (out / "rectify.partial.pt").is_file():
        state = load_checkpoint(out / "rectify.pt")
        refuse_other_run(state, cfg, names, out / "rectify.pt")
        segmenter.restore(state)
        print("that run is complete; measuring it again")
    elif cfg.method != "maskclip":
        data = training_data(segmenter, samples)
        print(f"hypothesis: {data[2].float().sum(1).mean():.2f} classes an image")
        seconds["features"] = round(time.time() - started, 1)
        train(segmenter, data, len(samples), out, cfg.resume)
        del data                                        # gives its room back
        trained = True
    if RANK > 0:
        return                                          # the first process writes and measures
    if trained:
        written += ["rectify.pt", "log.jsonl"]
        save(out / "rectify.pt", segmenter.state())
        (out / "rectify.partial.pt").unlink()
    seconds["training"] = round(time.time() - started - sum(seconds.values()), 1)

    if not val:
        print(f"no labelled validation images in {folder}: nothing to measure. Look at one with "
              f"`python rectify.py --image PICTURE --out {out}`")
        return
    masks = lambda images: predict(segmenter, images)
    results, found = evaluate(masks, val, names)
    hypothesis = judge(hypotheses(segmenter, val), classes_present(val, len(names)))
    seconds["evaluation"] = round(time.time() - started - sum(seconds.values()), 1)
    report = {"results": results, "hypothesis": hypothesis, "config": asdict(cfg), "versions": versions(), "seconds": seconds}
    write_text(out / "rectify.json", json.dumps(report, indent=1))
    figure1a(found, recipe_of(cfg)["ring"], out / "figure1a.png")
    figure4(masks, val, names, out / "figure4.png")
    figure5(masks, found["maskclip"], names, out / "figure5.png")
    print_table(results, names)
    print("hypothesis on val: precision {precision:.3f}, recall {recall:.3f}, {classes_per_image:.2f} classes an image"
          .format(**hypothesis))
    print(f"{time.time() - started:.0f} s in all. Wrote {out}/: {', '.join(written)}")


def run(main):
    """Call a script's main; what the user can mend is one line and exit code 2, an interrupt says how to go on.

    Where torchrun started several processes they meet first; but for errors only the first one talks.
    """
    if WORLD > 1:
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
        patience = timedelta(days=1)                    # the others wait for a download
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
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
            distributed.barrier()                       # the others are done before the first one has measured
            distributed.destroy_process_group()
        return
    print(message, file=sys.stderr, flush=True)         # out here the frames are gone, and with them open progress bars
    if WORLD > 1:
        os._exit(code)                                  # an orderly end would wait for processes that wait for this one
    sys.exit(code)


if __name__ == "__main__":
    run(main)
