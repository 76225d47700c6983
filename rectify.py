"""Rectify the bias of CLIP for unsupervised semantic segmentation: ReCLIP (CVPR 2024), ReCLIP++.

Unlabelled images and a list of class names go in, masks come out. CLIP's dense predictions are
biased: CLIP prefers some classes (a cow becomes "sheep") and fails far from the image's centre.
This script learns both biases from the images alone, subtracts them, and measures the gain.

    python rectify.py                               # Emoji VOC, which ships here; no GPU needed
    python rectify.py --method reclip               # the CVPR paper's bias model
    python rectify.py --dataset voc                 # PASCAL VOC 2012, OpenAI's CLIP; context, ade
    python rectify.py --data photos --names names.txt                       # your own images
    python rectify.py --method maskclip --image photo.jpg --names "dog, horse"      # no training
    torchrun --nproc-per-node 4 rectify.py --dataset ade                    # several GPUs

The first gives ReCLIP++ 58.4 ± 0.2 mIoU, the second ReCLIP 45.2 ± 0.2 (seeds 0, 1, 2), each in a
minute of two cores; MaskCLIP, which is CLIP without training, has 39.3.

Read it from top to bottom: 1 recipes and configuration, 2 CLIP, 3 the method, 4 training,
5 prediction. Below the ruler stands what serves the method: 6 metric, 7 datasets, 8 images,
9 figures, 10 loading CLIP, 11 checkpoints, 12 processes, 13 command line, 14 main.

The letters are the paper's: f dense feature, T text feature, V learnable prompt, R Reference
feature, PE positional embedding, P space-preference bias, B bias logit map, M mask, y image-level
hypothesis. Shapes: N images, a batch of B (in an equation B is the bias), K views of an image;
C classes, background words included; D dimensions of f, T and R, d of a token; L tokens of the
prompt, n of a class name; h×w patches, H×W pixels.
"""
import argparse
import copy
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

os.environ.setdefault("GOMP_SPINCOUNT", "1000")     # before torch: waiting threads leave their core

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from filelock import FileLock
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import distributed, nn
from torchvision.datasets import utils, voc
from torchvision.transforms import v2
from tqdm import tqdm

# ====================================================================== 1 recipes and configuration
# A row per dataset: Table 12 and the released settings for the real ones (lr was released as 0.01
# for one image a step, and grows with the batch); what measures best on dev for Emoji VOC.
RECIPES = {
    "voc": dict(size=(2048, 512), crop=520, t=0.23, top_k=2, epochs=200, batch=12, lr=0.12),
    "context": dict(size=(520, 520), crop=480, t=0.20, top_k=6, epochs=400, batch=12, lr=0.12),
    "ade": dict(size=(2048, 512), crop=512, t=0.21, top_k=5, epochs=300, batch=8, lr=0.08),
    "emoji": dict(method="reclip++", clip="local-dir:tests/emoji/clip", pretrained="",
                  size=(2048, 192), jitter=(0.8, 1.25), crop=192, hypothesis="softmax",
                  view="whole", t=0.2, top_k=1, prompt="per-class", start="ours", optimizer="adam",
                  lr=1e-2, lr_conv=3e-3, weight_decay=0.0, epochs=12, batch=16)}
# ReCLIP's logits are differences of cosines; those of ReCLIP++ leave a BatchNorm with variance 1.
METHODS = {
    ("voc", "reclip"): dict(alpha=1000.0, sharpness=100.0, denoise=0.5),
    ("context", "reclip"): dict(alpha=1000.0, sharpness=100.0, denoise=0.6),
    ("ade", "reclip"): dict(alpha=1000.0, sharpness=100.0, denoise=0.5),
    ("emoji", "reclip"): dict(alpha=100.0, sharpness=100.0, denoise=0.0),
    ("voc", "reclip++"): dict(alpha=100.0, sharpness=10.0, denoise=1.0, hypothesis="windows"),
    ("context", "reclip++"): dict(alpha=100.0, sharpness=10.0, denoise=0.85, hypothesis="windows"),
    ("ade", "reclip++"): dict(alpha=100.0, sharpness=10.0, denoise=0.5, hypothesis="windows"),
    ("emoji", "reclip++"): dict(alpha=10.0, sharpness=10.0, denoise=0.0)}
# As the CVPR paper ran CLIP: with GELU, though its weights were trained with QuickGELU.
RECIPE_2024 = dict(clip="ViT-B-16", normalization="imagenet")
COSINE_SHARPNESS = 100.0                # of MaskCLIP's logits, which are cosines: CLIP's own scale
# What may differ between a checkpoint and the command that goes on with it.
FREE = {"root", "data", "names", "background", "label_base", "out", "sharpness", "denoise",
        "threshold", "window", "stride", "device", "resume", "eval", "image"}

@dataclass(kw_only=True)
class Config:
    """All that a run depends on. The command line is made of these lines and their comments."""
    # data
    dataset: Literal["emoji", "voc", "context", "ade"] = "emoji"  # recipe, and data without --data
    recipe: Literal["", "2024"] = ""            # 2024: GELU and ImageNet's mean, the CVPR regime
    root: str = "data"                          # folder that holds the datasets
    data: str = ""                              # a folder of your own images instead
    names: str = ""                             # class names: a file, one a line, or "dog, cat"
    background: str = ""                        # words that are no class: "sky, wall"
    label_base: Literal[0, 1] = 1               # value of the first class in label PNGs
    # method
    method: Literal["maskclip", "reclip", "reclip++"] = "reclip"  # bias model; maskclip: none
    clip: str = "ViT-B-16-quickgelu"            # open_clip's name of the model, local-dir:FOLDER
    pretrained: str = "openai"                  # open_clip's tag of the weights, or a file
    normalization: Literal["clip", "imagenet"] = "clip"  # mean and std of images
    attention: Literal["maskclip", "sclip", "clearclip", "naclip"] = "maskclip"  # in the last block
    size: tuple[int, int] = (2048, 512)         # longest and shortest side of an image at most, px
    hypothesis: Literal["threshold", "softmax", "windows"] = "threshold"  # how images get classes
    view: Literal["center", "whole"] = "center"  # what the hypothesis sees of an image
    t: float = 0.23                             # threshold of the hypothesis
    top_k: int = 2                              # classes of an image in which none reaches t
    prompt: Literal["shared", "per-class"] = "shared"  # one prompt for all classes, or one each
    space: Literal["on", "off"] = "on"          # the space-preference bias P
    start: Literal["authors", "ours"] = "authors"  # V token 0, P random; ours: V random, P near 0
    # training
    jitter: tuple[float, float] = (0.5, 2.0)    # range of the random factor on the size
    crop: int = 520                             # side of a training crop, px
    views: int = 4                              # augmented views of an image; an epoch uses one
    alpha: float = 1000.0                       # scale of the logits before Gumbel-Softmax
    optimizer: Literal["sgd", "adam"] = "sgd"   # optimizer
    lr: float = 0.12                            # learning rate of the prompt
    lr_conv: float = 0.0                        # learning rate of the convolutions; 0: as lr
    weight_decay: float = 5e-4                  # weight decay
    epochs: int = 200                           # passes over the training images
    batch: int = 12                             # images in a training step
    finetune: bool = False                      # train CLIP's image tower too (Table 8)
    seed: int = 0                               # seed of everything random
    # prediction
    sharpness: float = COSINE_SHARPNESS         # scale of the logits before their softmax
    denoise: float = 0.5                        # leave out classes below it everywhere; 0: off
    threshold: float = 0.0                      # less probable pixels are background; 0: off
    window: int = 0                             # side of a sliding window, px; 0: none
    stride: int = 0                             # step of that window, px; 0: half its side
    # run
    out: str = ""                               # folder of the run (default runs/DATASET)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to compute
    resume: bool = False                        # go on with the interrupted run in --out
    eval: str = ""                              # measure this checkpoint instead of training
    image: str = ""                             # segment this image, or all in this folder

# =========================================================================================== 2 CLIP
def normalize(clip, images):
    """uint8 B×3×H×W to what CLIP takes: (x / 255 - mean) / std."""
    return (images.float() / 255 - clip.mean) / clip.std

def maskclip_block(block, x):
    """CLIP's last block as MaskCLIP has it (Zhou 2022): each token attends to itself alone."""
    W, b = block.attn.in_proj_weight.chunk(3)[2], block.attn.in_proj_bias.chunk(3)[2]
    v = F.linear(block.ln_1(x), W, b)                   # B 1+hw d, the values
    x = x + block.ls_1(block.attn.out_proj(v))          # ls: LayerScale, the identity in most CLIPs
    return x + block.ls_2(block.mlp(block.ln_2(x)))

def attention_block(block, x, grid, attention):
    """A block of CLIP's image tower with any other attention: B×(1+hw)×d to the same.
    clip: CLIP's own (nn.MultiheadAttention would copy its weights for every token in bfloat16).
    sclip: q·q + k·k (Wang 2024). clearclip: q·q, no residual, no MLP (Lan 2024). naclip: k·k and a
    Gaussian around each patch, of 5 patches' deviation, no residual, no MLP (Hajimiri 2025)."""
    attn = block.attn
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)   # B 1+hw 3d
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scale = q.size(-1) ** -0.5                          # q, k, v: B heads 1+hw d/heads
    if attention == "clip":
        v = F.scaled_dot_product_attention(q, k, v)
    elif attention == "sclip":
        v = (q @ q.mT * scale).softmax(-1) @ v + (k @ k.mT * scale).softmax(-1) @ v
    elif attention == "clearclip":
        v = (q @ q.mT * scale).softmax(-1) @ v
    elif attention == "naclip":
        yx = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in grid)).float()
        near = torch.exp(-(yx[:, None] - yx).square().sum(-1) / (2 * 5 ** 2))           # hw hw
        v = (k @ k.mT * scale + F.pad(near, (1, 0, 1, 0))).softmax(-1) @ v
    v = block.ls_1(attn.out_proj(v.transpose(1, 2).flatten(2)))             # B 1+hw d
    if attention in ("clearclip", "naclip"):
        return v
    x = x + v
    return x + block.ls_2(block.mlp(block.ln_2(x)))

def positional_embedding(clip, grid):
    """PE: 1×d×h×w, CLIP's positional embedding without CLS, bicubic-resized to the grid (h, w)."""
    visual = clip.visual
    pe = visual.positional_embedding[1:].T.reshape(1, -1, *visual.grid_size)  # 1 d h w
    return pe if grid == tuple(visual.grid_size) else F.interpolate(pe, grid, mode="bicubic")

def first_blocks(clip, x):
    """All of CLIP's image tower but its last block: (tokens B×(1+hw)×d, grid (h, w)) of x: B×3×H×W
    of any size, normalized, which is padded to whole patches with 0, the mean colour."""
    visual = clip.visual
    p_h, p_w = visual.patch_size
    x = visual.conv1(F.pad(x, (0, -x.size(-1) % p_w, 0, -x.size(-2) % p_h)))  # B d h w
    grid = tuple(x.shape[-2:])
    x = (x + positional_embedding(clip, grid)).flatten(2).mT                # B hw d
    cls = visual.class_embedding + visual.positional_embedding[0]
    x = visual.ln_pre(torch.cat([cls.expand(len(x), 1, -1), x], dim=1))     # B 1+hw d
    for block in visual.transformer.resblocks[:-1]:
        x = attention_block(block, x, grid, "clip")
    return x, grid

def encode_image(clip, x, attention):
    """CLIP's image tower for x: B×3×H×W of any size, normalized; attention: of the last block.
    The dense feature f, B×D×h×w; with "clip" CLIP's own image feature, B×D. Of unit norm."""
    visual, last = clip.visual, clip.visual.transformer.resblocks[-1]
    x, grid = first_blocks(clip, x)
    if attention == "maskclip":
        x = maskclip_block(last, x)
    else:
        x = attention_block(last, x, grid, attention)
    if attention == "clip":
        return F.normalize((visual._pool(x)[0] @ visual.proj).float(), dim=-1)  # B D
    f = (visual.ln_post(x[:, 1:]) @ visual.proj).float()                    # B hw D
    return F.normalize(f, dim=-1).mT.unflatten(-1, grid)                    # B D h w

def text_features(clip, tokenizer, names):
    """T: C×D, unit rows: the mean over 85 sentences, then over synonyms ("person, woman, man")."""
    words = [name.split(", ") for name in names]
    T = open_clip.build_zero_shot_classifier(clip, tokenizer, sum(words, []), TEMPLATES,
                                             device=clip.logit_scale.device).T
    each = T.split([*map(len, words)])                                      # C of synonyms×D
    return torch.stack([F.normalize(rows.mean(0), dim=0) for rows in each])

# ===================================================================================== 3 the method
def multi_label(s, t, top_k):
    """The hypothesis y: B×C bool of scores s: B×C, y_c = [s_c ≥ t]; if none is, the best top_k."""
    best = F.one_hot(s.topk(min(top_k, s.size(1)), dim=1).indices, s.size(1)).amax(1).bool()
    return torch.where((s >= t).any(1, keepdim=True), s >= t, best)         # B C

@torch.no_grad()
def hypothesize(segmenter, images):
    """y: B×C bool, the classes that CLIP finds in uint8 images B×3×H×W: by a threshold on cosines
    of its image feature with T; by one on the softmax of scale · cosine (ours); or by windows
    (ReCLIP++): the union of the best class of each tile, a sixth of a crop, at half steps."""
    cfg, (clip, T) = segmenter.cfg, segmenter.hypothesis_clip
    images, side = images.to(segmenter.device), clip.visual.image_size[0]
    scores = lambda x: segmenter.features(x, clip, "clip") @ T.T            # B C
    if cfg.hypothesis == "windows":
        x, edge = resize_to_fit(images, cfg.size), max(2, cfg.crop // 6)
        tops, lefts = (window_starts(n, edge, edge // 2) for n in x.shape[-2:])
        tiles = [x[..., i:i + edge, j:j + edge] for i in tops for j in lefts]
        best = [scores(v2.functional.resize(tile, [side, side])).argmax(1) for tile in tiles]
        return torch.stack([F.one_hot(c, len(T)) for c in best]).amax(0).bool()
    s = scores(clip_view(images, side, cfg.view))
    s = (segmenter.scale * s).softmax(1) if cfg.hypothesis == "softmax" else s
    return multi_label(s, cfg.t, cfg.top_k)

def reference_features(clip, V, tokens):
    """The prompt [SOS][v1..vL][name][EOT] of each class through CLIP's text encoder: C×D.
    V: L×d, learnable tokens that all classes share, or C×L×d. tokens: C×n, the names and EOT."""
    text = clip.text
    x, place, mask = pack_prompts(text, V, tokens)                          # prompts S d, S, S S
    x = text.ln_final(text.transformer(x + text.positional_embedding[place], attn_mask=mask))
    x = x[:, 1 + V.size(-2):].reshape(*tokens.shape, -1)                    # C n d, the names alone
    eot = tokens.argmax(1)                                                  # C, the largest token
    return x[torch.arange(len(x), device=x.device), eot] @ text.text_projection  # C D

def pack_prompts(text, V, tokens):
    """What the text encoder reads: (embeddings prompts×S×d, their places S, attention mask S×S).
    A token sees only what stands before it, so a shared [SOS][v1..vL] is the same for every name.
    All names stand behind it in one sequence, hidden from each other: 1+L+C·n tokens instead of
    C·(1+L+n). With a prompt for each class there are C sequences.

    two names behind a shared prompt:   SOS v1..vL | cat EOT 0        | potted plant EOT
    place, for the positional embedding: 0  1..L   | L+1 L+2 L+3      | L+1 L+2 L+3
    owner, the name of a token:         -1 -1..    | 0   0   0        | 1   1   1
    (0: padding, which EOT does not see)"""
    (C, n), L, device = tokens.shape, V.size(-2), tokens.device
    prompts, behind = (1, C) if V.ndim == 2 else (C, 1)             # sequences, names in each
    sos = text.token_embedding.weight[-2].expand(prompts, 1, -1)    # SOS is the last but one word
    names = text.token_embedding(tokens).view(prompts, behind * n, -1)
    x = torch.cat([sos, V.view(prompts, L, -1), names], dim=1)              # prompts S d
    place = torch.cat([torch.arange(1 + L, device=device),
                       torch.arange(1 + L, 1 + L + n, device=device).repeat(behind)])  # S
    owner = torch.cat([torch.full((1 + L,), -1, device=device),
                       torch.arange(behind, device=device).repeat_interleave(n)])      # S
    sees = (place <= place[:, None]) & ((owner == -1) | (owner == owner[:, None]))  # row column
    return x, place, torch.zeros(sees.shape, device=device).masked_fill(~sees, -torch.inf)

def similarity(f, T):
    """f·Tᵀ at every patch: B×D×h×w and C×D to B×C×h×w, cosines in [-1, 1] where both are unit."""
    return (T @ f.flatten(2)).unflatten(2, f.shape[2:])

def conv_bn_relu(c_in, c_out):
    """3×3 convolution, BatchNorm, ReLU; the weights start as kaiming-normal, fan-out."""
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())

class ReCLIP(nn.Module):
    """Rectified logits f·Tᵀ − B, with B = f·Rᵀ + P: class- and space-preference bias (CVPR 2024).
    V and g get a gradient through the masks alone, so R and P become what has to be subtracted for
    a mask's features to be nearest to its class's text. P = g(PE): C×h×w.
    forward(f: B×D×h×w, T: C×D, R: C×D, PE: 1×d×h×w) -> B×C×h×w."""
    def __init__(self, V, *, d, D, C, start="authors", space=True):
        super().__init__()
        self.V, self.space = nn.Parameter(V), space
        # released checkpoints have these widths; the authors' code has 512 and 256
        self.g = nn.Sequential(conv_bn_relu(d, 256), conv_bn_relu(256, 64), conv_bn_relu(64, C))
        if start == "ours":           # P near 0, so that f·T decides; at 0 the ReLU would be dead
            conv, bn, relu = self.g[-1]
            nn.init.constant_(bn.weight, 0.01)

    def forward(self, f, T, R, PE):
        P = self.g(PE)[0] if self.space else 0                              # C h w
        B = similarity(f, R) + P                                            # B C h w
        return similarity(f, T) - B

class ReCLIPpp(nn.Module):
    """Rectified logits decoder([f; f·Tᵀ − B]) with B = P·Rᵀ, the same for every image (IJCV 2025).
    P = g(PE): D×h×w. forward(f: B×D×h×w, T: C×D, R: C×D, PE: 1×d×h×w) -> B×C×h×w."""
    def __init__(self, V, *, d, D, C, start="authors", space=True):
        super().__init__()
        self.V, self.space = nn.Parameter(V), space
        self.g = nn.Conv2d(d, D, 1)
        conv = nn.Conv2d(D + C, C, 5, padding=2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out")
        self.decoder = nn.Sequential(conv, nn.BatchNorm2d(C))
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

def pool(M, f, valid):
    """z_c = the mean of M_c ⊙ f over all patches that are no padding: B×C×D. It is not divided by
    the mask's area, so a small mask has a short z. M: B×C×h×w, f: B×D×h×w, valid: B×h×w bool."""
    z = torch.einsum("bchw,bdhw->bcd", M * valid[:, None], f)               # B C D
    return z / valid.sum((1, 2)).view(-1, 1, 1)

def contrastive_loss(z, T, y, scale):
    """CE(scale · z_c·Tᵀ, c) over all C classes, the mean over the classes in y, then the batch.
    z: B×C×D. T: C×D. y: B×C bool. scale: CLIP's exp(logit_scale)."""
    own = -(scale * z @ T.T).log_softmax(-1).diagonal(dim1=1, dim2=2)       # B C
    return ((own * y).sum(1) / y.sum(1).clamp(min=1)).mean()

class Segmenter(nn.Module):
    """CLIP, its text features T, and the rectifier (ReCLIP or ReCLIPpp), all that is learned.
    background: words that are learned as classes are and stand behind them; their pixels are
    background. state: a checkpoint, whose T and weights are taken. forward(x), a training step's:
    f: B×D×h×w (with finetune uint8 views B×3×H×W) to (rectified logits B×C×h×w, f)."""
    def __init__(self, cfg, names, background=(), state=None):
        super().__init__()
        self.cfg, self.names, self.background = cfg, names, [*background]
        self.words = words = [*names, *background]                          # C
        self.classes = [name.split(", ")[0] for name in names]              # of a mask
        self.classes += ["background"] * bool(background or cfg.threshold)
        self.device = pick_device(cfg)
        self.clip, self.tokenizer = load_clip(cfg, self.device)
        self.clip_before = copy.deepcopy(self.clip) if cfg.finetune else self.clip  # untrained
        self.tokens, L = name_tokens(self.clip, self.tokenizer, [w.split(", ")[0] for w in words])
        T = state["T"] if state else text_features(self.clip, self.tokenizer, words)    # C D
        self.T, self.rectifier = T.to(self.device), None
        self.hypothesis_clip = self.clip_before, self.T
        if cfg.recipe:                      # the hypothesis is CLIP's as its weights were trained
            trained_as = replace(cfg, recipe="", clip=Config.clip, normalization="clip")
            clip, tokenizer = load_clip(trained_as, self.device)
            self.hypothesis_clip = clip, text_features(clip, tokenizer, words)
        self.scale = self.clip.logit_scale.exp().item()
        if cfg.method != "maskclip":
            (C, D), token0 = T.shape, self.clip.text.token_embedding.weight[0].cpu()    # d
            shape = (L, len(token0)) if cfg.prompt == "shared" else (C, L, len(token0))
            V = 0.02 * torch.randn(shape) if cfg.start == "ours" else token0.repeat(*shape[:-1], 1)
            model = ReCLIP if cfg.method == "reclip" else ReCLIPpp
            self.rectifier = model(V, d=self.clip.visual.conv1.out_channels, D=D, C=C,
                                   start=cfg.start, space=cfg.space == "on").to(self.device).eval()
        if state:
            self.rectifier.load_state_dict(state["rectifier"])
            if state["clip"]:
                self.clip.visual.load_state_dict(state["clip"])

    def features(self, images, clip=None, attention=None):
        """encode_image of uint8 images B×3×H×W, in the precision of `in_half`: f."""
        clip, attention = clip or self.clip, attention or self.cfg.attention
        with in_half(self.device):
            return encode_image(clip, normalize(clip, images.to(self.device)), attention)

    def reference(self):
        """R: C×D, of unit Frobenius norm as in the authors' code: a row is about 1/√C long."""
        R = reference_features(self.clip, self.rectifier.V, self.tokens)
        return R / R.norm()

    def rectified(self, f, R):
        """Rectified logits B×C×h×w of dense features f: B×D×h×w."""
        return self.rectifier(f, self.T, R, positional_embedding(self.clip, tuple(f.shape[-2:])))

    def forward(self, x):
        f = self.features(x) if self.cfg.finetune else x.float()
        return self.rectified(f, self.reference()), f

# ======================================================================================= 4 training
@torch.no_grad()
def training_data(segmenter, samples):
    """All that is frozen, computed once: (x, valid, y).
    x: K×N×D×h×w half, the dense features f of K augmented views of each image (with finetune the
    views themselves, K×N×3×crop×crop uint8). valid: K×N×h×w bool, the patches that are not padding.
    y: N×C bool. Cost: (K + 1)·N passes of CLIP (windows: one a tile); K·N·D·h·w·2 bytes."""
    cfg, clip, device = segmenter.cfg, segmenter.clip, segmenter.device
    K, N, fill = cfg.views, len(samples), (255 * clip.mean).round().byte()  # padding, normalized 0
    first = torch.arange(0, cfg.crop, clip.visual.patch_size[0])            # pixel of every patch
    h = len(first)
    shape = (3, cfg.crop, cfg.crop) if cfg.finetune else (segmenter.T.size(1), h, h)
    x = allocate((K, N, *shape), np.uint8 if cfg.finetune else np.float16, device, cfg.out)
    valid = torch.empty(K, N, h, h, dtype=torch.bool, device=x.device)

    def views(work):                                    # in a thread, while CLIP sees others
        sample, drawn = work
        image = load_image(sample.image, LONGEST).to(device)
        return [augment(image, cfg, one, fill) for one in drawn]            # K of (crop, extent)

    tune_threads(lambda: segmenter.features(fill.expand(4, 3, cfg.crop, cfg.crop)), device)
    reseed(cfg.seed, 0)
    work = ((sample, [draw_view() for _ in range(K)]) for sample in samples)
    ready = read_ahead(views, work)
    for start in tqdm(range(0, N, AT_ONCE), "dense features", leave=False):
        group = [*itertools.islice(ready, AT_ONCE)]
        rows = slice(start, start + len(group))
        for k in range(K):
            crops, extents = zip(*(of_one[k] for of_one in group))
            height, width = torch.tensor(extents).T[..., None]              # B 1 each
            valid[k, rows] = (first < height)[:, :, None] & (first < width)[:, None]
            crops = torch.stack(crops)                                      # B 3 crop crop
            x[k, rows] = crops if cfg.finetune else segmenter.features(crops).half()
    y = each_image(functools.partial(hypothesize, segmenter), samples, "hypothesis")
    return x, valid, torch.stack(y).to(x.device)

def make_optimizer(segmenter):
    """The optimizer: a learning rate for the prompt, one for convolutions, one for CLIP's tower."""
    cfg, rectifier = segmenter.cfg, segmenter.rectifier
    convs = [p for p in rectifier.parameters() if p is not rectifier.V]
    groups = [{"params": [rectifier.V]}, {"params": convs, "lr": cfg.lr_conv or cfg.lr}]
    if cfg.finetune:                                                    # the paper tells no rate
        tower = segmenter.clip.visual.requires_grad_()
        groups.append({"params": [*tower.parameters()], "lr": 1e-4})
    kind = torch.optim.Adam if cfg.optimizer == "adam" else functools.partial(
        torch.optim.SGD, momentum=0.9)
    return kind(groups, lr=cfg.lr, weight_decay=cfg.weight_decay)

def train(segmenter, data, samples, out, state=None):
    """Learn the rectifier from the hypotheses alone. An epoch sees one view of every image.
    data: `training_data` of this process. samples: all. state: an interrupted run's checkpoint."""
    cfg, device, (x, valid, y) = segmenter.cfg, segmenter.device, data
    N, batch = len(y), max(1, cfg.batch // WORLD)
    optimizer, steps = make_optimizer(segmenter), math.ceil(N / batch)
    log = resume(state, optimizer) if state else []
    poly = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: (1 - epoch / cfg.epochs) ** 0.9, len(log) - 1)
    model = wrap_ddp(segmenter, find_unused_parameters=cfg.space == "off" or cfg.finetune)
    bar = tqdm(total=cfg.epochs * steps, initial=len(log) * steps, desc=cfg.method, unit="step")
    for epoch in range(len(log), cfg.epochs):
        threads = tune_threads(torch.no_grad()(segmenter.reference), device)
        reseed(cfg.seed, 1 + epoch)
        k, mean, masks = epoch % cfg.views, 0, 0        # mean loss; M of all images, summed
        segmenter.rectifier.train()
        for i in torch.randperm(N).to(x.device).split(batch):
            inside, present = valid[k, i].to(device), y[i].to(device)       # B h w, B C
            logits, f = model(x[k, i].to(device))                           # B C h w, B D h w
            M = gumbel_mask(logits, cfg.alpha)                              # B C h w
            z = pool(M, f, inside)                                          # B C D
            loss = contrastive_loss(z, segmenter.T, present, segmenter.scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mean += loss.detach() * len(i) / N
            masks += (M.detach() * inside[:, None]).sum(0)                  # C h w
            bar.update()
        entry = dict(loss=over_ranks(mean).item() / WORLD, lr=poly.get_last_lr()[0],
                     threads=threads, **look_at_masks(over_ranks(masks), segmenter.words, bar))
        poly.step()
        end_epoch(out, "rectify", entry, log, bar, epoch + 1 == cfg.epochs, lambda: contents(
            segmenter, samples) | {"optimizer": optimizer.state_dict()})
    bar.close()
    segmenter.rectifier.eval()

# ===================================================================================== 5 prediction
def denoise(logits, sharpness, least):
    """Prompt denoising: a class that is nowhere as probable as `least` leaves the image.
    logits: B×C×h×w, probabilities softmax(sharpness · logits). A class that leaves gets -1e4, since
    -inf interpolates to NaN. Where all would leave, all stay (authors: class 0 alone)."""
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
    classes: how many of the C are classes; background words stand behind them. The value `classes`
    is background: such a word is best, or no class is as probable as the threshold θ. That is one
    more logit to lose against: exp(s·logit − logsumexp) < θ, so (logsumexp + log θ) / s. resized,
    original: (height, width) that CLIP saw, and of the file. Above LARGEST_MAP by nearest pixel."""
    shrink = min(1, (LARGEST_MAP / (logits.size(1) * math.prod(original))) ** 0.5)
    size, masks = [max(1, round(shrink * n)) for n in original], []
    for one in logits.split(1):
        full = upsample(one, patch, resized, size)                          # 1 C H W
        rest = [full[:, classes:]] if full.size(1) > classes else []
        if threshold:
            total = (sharpness * full).logsumexp(1, keepdim=True)           # 1 1 H W
            rest.append((total + math.log(threshold)) / sharpness)
        if rest:
            full = torch.cat([full[:, :classes], torch.cat(rest, 1).amax(1, keepdim=True)], 1)
        masks.append(full.max(1).indices.byte())                            # 1 H W; argmax is slow
    return F.interpolate(torch.cat(masks)[:, None], original, mode="nearest-exact")[:, 0]

@torch.no_grad()
def predictor(segmenter):
    """The one chain of prediction: uint8 images B×3×H×W to {"maskclip" and cfg.method: B×H×W}."""
    cfg, patch = segmenter.cfg, segmenter.clip.visual.patch_size[0]
    sharpness = {"maskclip": COSINE_SHARPNESS, cfg.method: cfg.sharpness}
    R = segmenter.reference() if segmenter.rectifier else None

    def dense(x):
        f = segmenter.features(x, segmenter.clip_before)
        logits = {"maskclip": similarity(f, segmenter.T)}
        if segmenter.rectifier:
            f = segmenter.features(x) if cfg.finetune else f
            logits[cfg.method] = segmenter.rectified(f, R)
        return logits

    @torch.no_grad()
    def predict(images):
        if cfg.window and len(images) > 1:              # logits of whole images: one at a time
            each = [predict(image[None]) for image in images]
            return {name: torch.cat([masks[name] for masks in each]) for name in each[0]}
        x = resize_to_fit(images.to(segmenter.device), cfg.size)
        logits, step = slide(dense, x, patch, cfg)
        if segmenter.rectifier:
            logits[cfg.method] = denoise(logits[cfg.method], cfg.sharpness, cfg.denoise)
        return {name: decide(l, step, x.shape[-2:], images.shape[-2:], len(segmenter.names),
                             sharpness[name], cfg.threshold) for name, l in logits.items()}

    return predict

# ================================================ The method ends here. Everything below serves it.

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

def objects(label, prediction, sample, classes):
    """Yield (px from its centroid to the image's centre, IoU in percent, sample) of each object of
    Fig. 1(a): all pixels of a class in a label H×W, unless the image's edge cuts it."""
    centre = torch.tensor([(n - 1) / 2 for n in label.shape])
    edge = torch.cat([label[0], label[-1], label[:, 0], label[:, -1]])
    for c in sorted(set(label[label < classes].tolist()) - set(edge.tolist())):
        truth, guess = label == c, (prediction == c) & (label != VOID)
        distance = (truth.nonzero().float().mean(0) - centre).norm().item()
        yield distance, 100 * ((truth & guess).sum() / (truth | guess).sum()).item(), sample

def evaluate(predict, samples, names, base=1, name_images=None):
    """Measure masks. predict: uint8 B×3×H×W to {method: B×H×W}. names, base: see `load_label`.
    name_images: uint8 B×3×H×W to the hypothesis y, B×C. Returns ({method: {"mIoU": percent, "IoU":
    {name: percent, None where it never occurs}}}, {method: [`objects`]}, how good y is)."""
    C, results, found, matrices, hits, named, shown = len(names), {}, {}, {}, 0, 0, 0
    real = C - (names[-1] == "background")              # the background is no object
    read = lambda sample: read_pair(sample, names, base)
    for batch, pairs in batches_of_one_size(samples, read, "evaluating"):
        images, labels = map(torch.stack, zip(*pairs))                      # B 3 H W, B H W
        parts = [predict(part) for part in images.split(max(1, LARGEST_PART // labels[0].numel()))]
        for method in parts[0]:
            masks = torch.cat([part[method].cpu() for part in parts])       # B H W
            matrices[method] = matrices.get(method, 0) + confusion(labels, masks, C)
            for n, label, mask in zip(batch, labels, masks):
                found.setdefault(method, []).extend(objects(label, mask, samples[n], real))
        if name_images:
            y = name_images(images).cpu()[:, :real]                         # B C
            truth = torch.stack([torch.isin(torch.arange(real), label) for label in labels])
            hits, named, shown = hits + (y & truth).sum(), named + y.sum(), shown + truth.sum()
    for method, matrix in matrices.items():
        each = [None if math.isnan(v) else round(v, 3) for v in iou(matrix).tolist()]
        results[method] = {"mIoU": round(iou(matrix).nanmean().item(), 3),
                           "IoU": dict(zip(names, each))}
    quality = {"precision": (hits, named), "recall": (hits, shown),
               "classes_per_image": (named, len(samples))}
    return results, found, {k: round(float(a / max(1, b)), 4) for k, (a, b) in quality.items()}

def print_table(results, names):
    """IoU of every class and the mean, a column a method, and the last gain over the first."""
    wide = max(map(len, [*names, "mIoU"]))
    print(f"\n{'':{wide}}" + "".join(f"{head:>11}" for head in [*results, "gain"]))
    for name in [*names, "mIoU"]:
        values = [r["mIoU"] if name == "mIoU" else r["IoU"][name] for r in results.values()]
        cells = ["-" if v is None else f"{v:.1f}" for v in values]
        cells.append("-" if None in values else f"{values[-1] - values[0]:+.1f}")
        line = f"{name:<{wide}}" + "".join(f"{cell:>11}" for cell in cells)
        print(f"{'-' * len(line)}\n{line}\n" if name == "mIoU" else line)

# ======================================================================================= 7 datasets
VOC_NAMES = """\
airplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse,
motorbike, person, potted plant, sheep, sofa, train, tv monitor""".replace("\n", " ").split(", ")
CONTEXT_NAMES = """\
airplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet,
car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower,
food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse, person, plate, platform,
potted plant, road, rock, sheep, shelves, sidewalk, sign, sky, snow, sofa, table, track, train,
tree, truck, tv monitor, wall, water, window, wood""".replace("\n", " ").split(", ")
CONTEXT_IDS = [       # of these among the 459 categories of trainval_merged.json, alphabetical too
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113,
    115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326,
    347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458]
ADE_NAMES = """\
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion,
base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace,
refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway,
river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove,
palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light,
truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track,
apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket,
waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot,
animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light,
tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass,
clock, flag""".replace("\n", " ").split(", ")
HERE = Path(__file__).resolve().parent
OXFORD = "https://thor.robots.ox.ac.uk/pascal/VOC/"     # VOC's permanent address since 2026
ARCHIVE = "https://web.archive.org/web/0id_/"           # the Internet Archive's raw copy of a file
VOC12, VOC10 = (voc.DATASET_YEAR_DICT[year] for year in ("2012", "2010"))       # file names and md5
# dataset: ([(file, its md5, its address), ...], the folder that holds its images, names)
DATASETS = {
    "emoji": ([(str(HERE / "tests/emoji/emoji-voc.tar"), "d9da859f2209886288f26aa5c80ceff4", "")],
              "VOCdevkit/VOC2012", VOC_NAMES),          # it lies there, and needs no address
    "voc": ([(VOC12["filename"], VOC12["md5"], f"{OXFORD}voc2012/{VOC12['filename']}")],
            "VOCdevkit/VOC2012", VOC_NAMES),
    "context": ([(VOC10["filename"], VOC10["md5"], f"{OXFORD}voc2010/{VOC10['filename']}"),
                 ("trainval_merged.json", "3c2d0c0656b7be9eb61928ffe885d8ce",
                  "https://codalabuser.blob.core.windows.net/public/trainval_merged.json")],
                "VOCdevkit/VOC2010", CONTEXT_NAMES),
    "ade": ([("ADEChallengeData2016.zip", "7328b3957e407ddae1d3cbf487f149ef",
              "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip")],
            "ADEChallengeData2016", ADE_NAMES)}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
KINDS = re.compile(                     # what tells an image from its mask in the name of a file
    "(label(train)?id|leftimg8bit|groundtruth|annotation|segmentation|overlay|original|figure|"
    "image|colou?r|label|photo|truth|mask|fine|orig|pred|segm|anno?|img|lbl|msk|rgb|seg|viz|gt)s?")
VOID = 255
NO_CLASS = "background void unlabeled unlabelled ignore other none class classes name names".split()

Sample = namedtuple("Sample", "name image label")       # image, label: files; label may be None

def dataset_folder(cfg):
    """The folder with a dataset's images; fetches and unpacks what is missing. Raises UserError."""
    if cfg.data:
        return Path(cfg.data)
    (files, inside, _), root = DATASETS[cfg.dataset], Path(cfg.root)
    target = root / f"{cfg.dataset}-{files[0][1][:6]}"  # another version unpacks to another folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{cfg.dataset}.lock"):        # a second first run waits for the first
        if not target.is_dir():
            archive, *annotations = fetch(files, root)
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            print(f"unpacking {archive.name} to {target}")
            safe = {} if archive.suffix == ".zip" else {"filter": "data"}   # zip is always safe
            shutil.unpack_archive(archive, partial, **safe)
            for path in annotations:
                convert_context(partial / inside, path)
            partial.rename(target)
    return target / inside

def fetch(files, root):
    """The paths of files [(name, md5, address)] in `root`, fetched where missing, or UserError."""
    paths, missing = [root / name for name, *_ in files], []
    for path, (name, md5, address) in zip(paths, files):
        tried = ""
        for url in (address, ARCHIVE + address):
            try:
                utils.download_url(url, root, name, md5)
                break
            except Exception as error:                  # urllib and torchvision have many classes
                tried += f"; tried {url} ({error})"
        else:
            missing.append(f"{path}: fetch it yourself, md5 {md5}{tried}")
    if missing:
        raise UserError("; ".join(missing))
    return paths

def decode_rle(counts, size):
    """H×W bool, size (H, W), of COCO's run-length code: false and true in turns, down the columns.
    counts: the lengths as a string, 5 bits a character, the lowest first, in two's complement;
    from the fourth on the difference from the length before the last."""
    runs, value, shift = [], 0, 0
    for bits in (ord(character) - 48 for character in counts):
        value, shift = value | (bits & 31) << shift, shift + 5
        if not bits & 32:                                           # the last character of a number
            value -= (bits & 16) << (shift - 4)                     # its highest bit is the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T

def convert_context(folder, annotations):
    """Write PASCAL Context's 59 classes into VOC2010's folder: SegmentationClassContext/*.png
    (class c as c + 1, all else 0), ImageSets/SegmentationContext/{train,val}.txt. annotations:
    trainval_merged.json, whose fields have the names that public readers use."""
    value, pieces, names = {c: k + 1 for k, c in enumerate(CONTEXT_IDS)}, {}, {}
    data = json.loads(annotations.read_text("utf-8"))
    for piece in data["annos_segmentation"]:
        pieces.setdefault(piece["image_id"], []).append(piece)
    for image in tqdm(data["images"], "converting masks", unit="img", leave=False):
        mask = np.zeros((image["height"], image["width"]), np.uint8)
        for piece in pieces.get(image["image_id"], []):         # a later one covers earlier ones
            pixels = decode_rle(piece["segmentation"]["counts"], mask.shape)
            mask[pixels] = value.get(piece["category_id"], 0)
        name = Path(image["file_name"]).stem
        write(folder / f"SegmentationClassContext/{name}.png", palette_png(mask))
        names.setdefault(image["phase"], []).append(name)
    for phase, listed in names.items():
        write(folder / f"ImageSets/SegmentationContext/{phase}.txt", "\n".join(sorted(listed)))

def class_names(cfg):
    """(the classes, each with its synonyms: "person, woman, man"; the background words).
    --names is a file with one class a line, or words and commas; a line "background: sky, wall"
    names what is no class, and so does --background. Raises UserError."""
    source, lines = cfg.names, DATASETS[cfg.dataset][2]
    if os.path.isfile(cfg.names):
        lines = Path(cfg.names).read_text("utf-8-sig", "replace").splitlines()
    elif cfg.names:
        words, colon, rest = cfg.names.partition("background:")
        source, lines = f"--names {source} (no file)", [*words.split(","), colon + rest]
    names, background = [], []
    for number, line in enumerate([*map(str.strip, lines), f"background:{cfg.background}"], 1):
        words = line.removeprefix("background:").split(",")
        words = [word.strip() for word in words if word.strip()]
        for word in words:
            if not re.fullmatch(r"[^\W\d_]([^\W\d_]|[ '&+-])*", word) or word.lower() in NO_CLASS:
                raise UserError(f"{source}, line {number}: '{word}' is no class name; write words, "
                                "one class a line, synonyms after commas, or 'background: sky'")
        if line.startswith("background:"):
            background += words
        elif words:
            names.append(", ".join(words))
    own = ", ".join(names).lower().split(", ")
    background = [word for word in dict.fromkeys(background) if word.lower() not in own]
    if not 0 < len(names) < VOID or len({*own}) < len(own):
        raise UserError(f"{source}: name 1 to {VOID - 1} classes, each word once; what is no class "
                        "stands in a line 'background: sky, wall'")
    if len(names) == 1 and not (background or cfg.threshold):
        raise UserError(f"{source}: one class alone wins every pixel; add classes, one a line, or "
                        "'background: sky, wall', or --threshold 0.5")
    return names, background

def list_samples(folder, split):
    """The samples of a split, "train" or "val": VOC's layout (ImageSets/, PASCAL Context's lists
    before VOC's), ADE20K's (images/ and annotations/), or a plain folder of images, all train.
    Images meet their labels by name; a training image may have none. Raises UserError."""
    kind = "Context" if (folder / "ImageSets/SegmentationContext").is_dir() else ""
    where, labels = folder / "JPEGImages", folder / f"SegmentationClass{kind}"
    index = folder / f"ImageSets/Segmentation{kind}" / f"{split}.txt"
    ade = {"train": "training"}.get(split, "validation")
    if index.is_file() or split == "train" and (folder / "ImageSets").is_dir():
        images, names = find_images(where), index.read_text("utf-8-sig", "replace").split("\n")
    elif (folder / "annotations").is_dir() and (folder / "images" / ade).is_dir():
        where, labels = folder / "images" / ade, folder / "annotations" / ade
        images = names = find_images(where)
    else:
        labels, images = folder / "none", find_images(folder) if split == "train" else {}
        names = images
        list(tqdm(read_ahead(refuse_mask, images.values()), "images", len(images), leave=False))
    samples = []
    for name in filter(None, map(str.strip, names)):
        image, label = images.get(name, where / f"{name}.jpg"), labels / f"{name}.png"
        needed = labels.is_dir() and (split == "val" or label.is_file())
        for path in [image, label] if needed else [image]:
            if not path.is_file():
                raise UserError(f"{path}: missing, though {index} lists {name}")
        samples.append(Sample(name, image, label if needed else None))
    if not samples and split == "train":
        raise UserError(f"{index}: lists no image")
    return samples

def find_images(folder):
    """{path without its suffix: path} of the images in a folder and below, no hidden ones. Raises
    UserError where two names are equal but for the folder, the suffix, or a word like "mask"."""
    images, seen = {}, {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).with_suffix("")
        if path.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in inside.parts):
            words = re.findall(r"[^\W\d_]+|\d+", KINDS.sub(" ", inside.name.lower()))
            first = seen.setdefault(tuple(words) or inside.parent, path)
            if first != path:
                raise UserError(f"{path}: may be the mask of {first}; give images, no name twice")
            images[inside.as_posix()] = path
    if not images:
        raise UserError(f"{folder}: holds no images ({' '.join(SUFFIXES)})")
    return images

def splits(folder):
    """(training samples, labelled validation samples). Raises UserError."""
    return list_samples(folder, "train"), [s for s in list_samples(folder, "val") if s.label]

def check_labels(samples, names, base):
    """Read every validation image and its label before training, and print how labels are read.
    Raises UserError for the first that cannot be read, or holds a value that is no class."""
    if base == 0 and names[-1] == "background":
        raise UserError("--label-base 0: no label is background; drop its words and --threshold")
    read, found = lambda sample: read_pair(sample, names, base)[1].unique().tolist(), set()
    for values in tqdm(read_ahead(read, samples), "labels", len(samples), leave=False):
        found |= {*values} - {VOID}
    C = len(names) - (names[-1] == "background")
    if not found - {C}:
        raise UserError(f"{samples[0].label.parent}: the labels hold no class, only background")
    values = sorted(0 if c == C else c + base for c in found)               # as in the files
    print(f"labels: {'0 background, ' * base}{base} {names[0]}, ..., {C - 1 + base} {names[C - 1]},"
          f" {VOID} void; found {values[0]} to {values[-1]}")

# ============================================================================== 8 images and labels
LONGEST = 4096                          # px of a side; training sees larger images at this size
AT_ONCE = 16                            # images that CLIP sees at once; 32 overflow a CPU's caches
LARGEST_BATCH, LARGEST_PART, LARGEST_MAP = 2 ** 22, 2 ** 20, 2 ** 27    # pixels, pixels, logits

def open_image(path, what):
    """A decoded PIL image. Raises UserError, also beyond Pillow's limit of 179 megapixels."""
    try:
        with Image.open(path) as image:
            image.load()
        return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable {what} ({error}); replace or remove it")

def refuse_mask(path):
    """Raise UserError for an image of at most 64 colours, as masks are; a JPEG has always more."""
    image = open_image(path, "image") if path.suffix.lower() not in (".jpg", ".jpeg") else None
    if image and image.mode[0] not in "FI" and image.convert("RGB").getcolors(64):
        raise UserError(f"{path}: few colours, as in a mask; give photographs (drawings as JPEG)")

def load_image(path, longest=None):
    """Any image as 3×H×W uint8 RGB: EXIF applied, 16 bits cut to 8, white behind transparency,
    smaller where a side has more than `longest` px."""
    image = ImageOps.exif_transpose(open_image(path, "image"))
    low, high = image.getextrema() if image.mode[0] in "FI" else (0, 0xFFFF)
    if image.mode == "F" or low < 0 or not 0xFF < high <= 0xFFFF:
        raise UserError(f"{path}: holds greys that are not of 16 bits; convert it to 8 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    too_long = longest and max(image.shape) > longest
    return resize_to_fit(image, (longest, longest)) if too_long else image

def load_label(path, size, names, base=1):
    """A palette PNG as H×W uint8, indices into names, void 255. Raises UserError.
    size: (height, width) of its image. base: the first class's value. With 1, VOC's background (0)
    is the last of names where that is "background", else void."""
    image = open_image(path, "mask")
    mode = "JPEG" if image.format == "JPEG" else image.mode             # JPEG moves the values
    label, colours = np.array(image), image.getpalette() or []
    C, used = len(names) - (names[-1] == "background"), np.unique(label).tolist()
    wrong = [v for v in used if v >= C + base and v != VOID]
    entry = lambda flat, v: tuple(flat[3 * v:3 * v + 3])
    vocs = {entry(palette(), v): v for v in [*range(C + 1), VOID]}
    meant = [vocs.get(entry(colours, v)) for v in used]             # by the colours in its palette
    for bad, message in [
            (mode not in ("P", "L"), f"holds {mode}, not one class number a pixel (palette PNG)"),
            (label.shape[:2] != tuple(size), "has another size than its image"),
            (wrong, f"holds {wrong[:1]}, with {C} classes from {base} on (255: void)"),
            (meant.count(None) < 2 and any(m and m != v for m, v in zip(meant, used)),
             "has VOC's colours under other numbers; save it with VOC's palette")]:
        if bad:
            raise UserError(f"{path}: the mask {message}")
    values = np.arange(256, dtype=np.uint8) - base
    values[VOID], values[0] = VOID, values[0] if base == 0 else C if len(names) > C else VOID
    return torch.from_numpy(values[label])

def read_pair(sample, names, base):
    """(image 3×H×W, label H×W or None) of a sample, as `load_image` and `load_label` give them."""
    image = load_image(sample.image)
    return image, sample.label and load_label(sample.label, image.shape[1:], names, base)

def read_ahead(read, items, ahead=AT_ONCE, threads=min(8, os.cpu_count())):
    """Yield read(item) of each, in order, while threads read the next ones, `ahead` at most. Each
    thread computes alone: in a team every small operation would wait for its slowest member."""
    torch.get_num_threads()             # settles the caller's own number, before readers set theirs
    with ThreadPoolExecutor(threads, "reader", torch.set_num_threads, [1]) as executor:
        waiting = deque()
        for item in items:
            waiting.append(executor.submit(read, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

def batches_of_one_size(samples, read, about):
    """Yield (indices of samples, [read(sample), ...]), each batch of images of one size, at most
    AT_ONCE images and LARGEST_BATCH pixels. about: the label of the progress bar."""
    def size(sample):                                   # from the header, as EXIF turns it
        with Image.open(sample.image) as image:
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8) and image.format != "TIFF"
            return image.size if turned else image.size[::-1]
    sizes, batches = list(read_ahead(size, samples)), []
    order = sorted(range(len(samples)), key=sizes.__getitem__)
    for (h, w), group in itertools.groupby(order, sizes.__getitem__):
        group, most = list(group), max(1, min(AT_ONCE, LARGEST_BATCH // (h * w)))
        batches += [group[i:i + most] for i in range(0, len(group), most)]
    ready = read_ahead(read, (samples[n] for n in itertools.chain(*batches)))
    with tqdm(total=len(samples), desc=about, unit="img", leave=False) as bar:
        for batch in batches:
            yield batch, list(itertools.islice(ready, len(batch)))
            bar.update(len(batch))

def each_image(compute, samples, about):
    """A list, for every sample the result of compute(images B×3×H×W), which gives B of them."""
    read, found = lambda sample: load_image(sample.image, LONGEST), {}
    for batch, images in batches_of_one_size(samples, read, about):
        found |= zip(batch, compute(torch.stack(images)))
    return [found[n] for n in range(len(samples))]

def resize_to_fit(image, size, mode=v2.InterpolationMode.BILINEAR, factor=1.0):
    """Resize ..×3×H×W to the largest that factor · `size`, (long, short side in px), holds."""
    height, width = image.shape[-2:]
    scale = factor * min(size[0] / max(height, width), size[1] / min(height, width))
    new = [max(1, round(n * scale)) for n in (height, width)]
    return v2.functional.resize(image, new, mode, antialias=True)

def subsample(samples, count):
    """At most `count` of the samples, evenly spread over the list."""
    return samples[::math.ceil(len(samples) / count)]

def clip_view(images, side, view):
    """What CLIP's image feature sees: short side `side` px, the middle square or view "whole"."""
    most = 8 * min(images.shape[-2:])                                       # cost is bounded
    images = v2.functional.center_crop(images, [min(n, most) for n in images.shape[-2:]])
    x = resize_to_fit(images, (10 ** 6, side), v2.InterpolationMode.BICUBIC)    # as CLIP's own
    return x if view == "whole" else v2.functional.center_crop(x, side)

def window_starts(n, side, step):
    """Where windows of `side` px begin on an axis of n px; the last ends with it, or is alone."""
    return [*range(0, n - side, step), max(n - side, 0)]

def slide(dense, x, patch, cfg):
    """({method: logits of images x: B×3×H×W}, px of a step of their grid).
    dense: images to {method: logits B×C×h×w} on CLIP's grid. With cfg.window it sees windows, and
    a pixel has the mean of those that see it, B×C×H×W: the protocol of SCLIP, ClearCLIP, NACLIP."""
    if not cfg.window:
        return dense(x), patch
    side, total, count = cfg.window, {}, torch.zeros_like(x[:1, :1]).float()    # 1 1 H W
    tops, lefts = (window_starts(n, side, cfg.stride or -(-side // 2)) for n in x.shape[-2:])
    for i, j in itertools.product(tops, lefts):
        at = ..., slice(i, i + side), slice(j, j + side)
        count[at] += 1
        for name, logits in dense(x[at]).items():
            B, C = logits.shape[:2]
            full = total.setdefault(name, logits.new_zeros(B, C, *x.shape[-2:]))
            full[at] += upsample(logits, patch, x[at].shape[-2:], x[at].shape[-2:])
    return {name: logits / count for name, logits in total.items()}, 1

def draw_view():
    """What is random in a view: four numbers in [0, 1), and how colours are distorted."""
    colours = v2.RandomPhotometricDistort().make_params([torch.empty(3, 1, 1)])
    return torch.rand(4).tolist(), colours | {"channel_permutation": None}  # authors: none

def augment(image, cfg, drawn, fill):
    """A view of an image 3×H×W, as `draw_view` drew it: resized, flipped, colours distorted,
    cropped, and padded with the colour `fill`: 3×1×1 uint8.
    Returns (3×crop×crop uint8, the (height, width) in it that is not padding). The authors draw a
    crop again where one ground-truth class fills three quarters of it; ours never looks."""
    (low, high), ((factor, mirror, *corner), colours) = cfg.jitter, drawn
    image = resize_to_fit(image, cfg.size, factor=low + (high - low) * factor)
    image = image.flip(-1) if mirror < 0.5 else image
    image = v2.RandomPhotometricDistort().transform(image, colours)
    top, left = (int(u * (max(n - cfg.crop, 0) + 1)) for u, n in zip(corner, image.shape[1:]))
    image = image[:, top:top + cfg.crop, left:left + cfg.crop]
    height, width = image.shape[1:]
    view = fill.repeat(1, cfg.crop, cfg.crop)                               # 3 crop crop
    view[:, :height, :width] = image
    return view, (height, width)

# ======================================================================================== 9 figures
@functools.cache
def palette():
    """VOC's colours, 256 RGB triples in one list: the index's bits, spread over the channels."""
    return [sum(((i >> (3 * j + channel)) & 1) << (7 - j) for j in range(8))
            for i in range(256) for channel in range(3)]

def palette_png(mask):
    """A mask H×W uint8 as the bytes of a PNG with VOC's palette."""
    image = Image.fromarray(mask)
    image.putpalette(palette())
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()

def colour(c, names=()):
    """RGB of class c (0..C-1), each 0..255: VOC's, whose palette starts with the background's."""
    start = 0 if names and names[c] == "background" else 3 * (c + 1)
    return tuple(palette()[start:start + 3])

def paint(mask, names, pale):
    """A mask H×W in the colours of `names`, void white, pale where `pale` H×W is: H×W×3 uint8."""
    colours = [colour(c, names) for c in range(len(names))] + (256 - len(names)) * [(255,) * 3]
    painted = torch.tensor(colours).float()[mask.long()]                    # H W 3
    painted[pale] = 0.25 * painted[pale] + 0.75 * 255
    return painted.byte().numpy()

def figure4(predict, samples, names, base=1):
    """Fig. 4: rows image, ground truth (where there is one), one a method of `predict`; a column
    per sample. Where ground truth is void nothing is scored, and predictions are pale."""
    figure, seen, side = Figure(layout="constrained"), set(), 12 / max(3, len(samples))     # inches
    axis = figure.subplots()                            # one, of cells 1×1: dozens would be slow
    for k, sample in enumerate(samples):
        image, label = read_pair(sample, names, base)
        cells, void = {"image": image.permute(1, 2, 0).numpy()}, torch.zeros_like(image[0]).bool()
        if label is not None:
            cells["ground truth"], void = paint(label, names, void), label == VOID
        for method, (mask, *_) in predict(image[None]).items():
            cells[method] = paint(mask.cpu(), names, void)
            seen.update(mask.cpu()[~void].unique().tolist())
        h, w = (0.475 * n / max(image.shape) for n in image.shape[1:])
        for r, cell in enumerate(cells.values()):
            axis.imshow(cell, extent=(k - w, k + w, r + h, r - h), interpolation="nearest")
    axis.set(xlim=(-0.5, len(samples) - 0.5), ylim=(len(cells) - 0.5, -0.5), aspect="equal",
             xticks=[], yticks=range(len(cells)), yticklabels=cells, frame_on=False)
    axis.tick_params(length=0)
    patches = [Patch(facecolor=[v / 255 for v in colour(c, names)], edgecolor="black",
                     label=names[c]) for c in sorted(seen)]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False)
    figure.set_size_inches(max(8, side * len(samples) + 1), side * len(cells) + len(seen) / 24 + 1)
    return figure

def figure1a(found, least=20):
    """Fig. 1(a): mean IoU of {method: objects} in rings around the image's centre, 40 px wide as in
    the paper, 10 on small images; one of fewer than `least` objects is merged with the next."""
    figure = Figure((8, 4.6), layout="constrained")
    axis = figure.subplots()
    for marker, (method, things) in zip("os^D", found.items()):
        far, ious = np.array([thing[:2] for thing in things]).reshape(-1, 2).T
        edges, step = [0], 40 if far.max(initial=0) > 160 else 10
        for edge in range(step, int(far.max(initial=0)), step):
            if min(((far >= edges[-1]) & (far < edge)).sum(), (far >= edge).sum()) >= least:
                edges.append(edge)
        rings = [(far >= a) & (far < b) for a, b in zip(edges, [*edges[1:], np.inf])]
        axis.plot([ious[r].mean() if r.any() else 0 for r in rings], marker=marker, label=method)
    axis.set_xticks(range(len(rings)), [f"from {a}\nn={r.sum()}" for a, r in zip(edges, rings)])
    axis.set(xlabel="distance of the object from the image's centre, px", ylabel="mean IoU, %",
             ylim=(0, None), title="Fig. 1(a): objects that the image does not cut")
    axis.legend()
    return figure

def save_figure(figure, path):
    """Write a matplotlib Figure as a PNG."""
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=120)
    write(path, buffer.getvalue())

def save_galleries(predict, val, found, names, base, out):
    """Fig. 4, and Fig. 5: the same of the eight objects farthest from the centre of their image."""
    far = sorted(found["maskclip"], key=lambda thing: -thing[0])
    far = [*dict.fromkeys(sample for *_, sample in far)] or val
    for number, samples in (4, subsample(val, 8)), (5, far[:8]):
        save_figure(figure4(predict, samples, names, base), out / f"figure{number}.png")

# ================================================================================== 10 loading CLIP
# The 85 sentences that T is averaged over: OpenAI's 80 for ImageNet and five of a scene.
SCENE = [f"{start} {{}} in the scene.".format for start in (
    "there is a", "there is the", "this is a", "this is the", "this is one")]
TEMPLATES = [*open_clip.OPENAI_IMAGENET_TEMPLATES, *SCENE]

def load_clip(cfg, device):
    """(open_clip's model, frozen, with buffers mean and std 3×1×1; its tokenizer) or UserError."""
    scheme, _, folder = cfg.clip.rpartition(":")
    name, file = cfg.clip, Path(cfg.pretrained)
    if scheme == "local-dir" and not Path(folder).is_dir():
        name = f"{scheme}:{HERE / folder}"
    weights = dict(pretrained=cfg.pretrained or None, require_pretrained=True)
    try:
        from_file = cfg.pretrained and (scheme or file.suffix or file.is_file())
        state, openai = weights_of(file) if from_file else (None, False)
        if state:
            weights = dict(load_weights=False, force_quick_gelu=openai and not cfg.recipe)
        clip = open_clip.create_model(name, **weights, device=device, force_custom_text=True)
        if state:
            clip.load_state_dict(state)
        tokenizer, towers = open_clip.get_tokenizer(name), [clip.visual, clip.text]
        if [type(tower).__name__ for tower in towers] != ["VisionTransformer", "TextTransformer"]:
            raise ValueError("its towers are not CLIP's own ViT and text transformer")
    except Exception as error:      # open_clip, torch and safetensors have no error class in common
        why = " ".join((str(error) or repr(error)).split())[:160]
        raise UserError(f"{cfg.pretrained or cfg.clip}: not loaded as CLIP {cfg.clip}: {why}; give "
                        "OpenAI's ViT-B-16.pt or a file of open_clip with --pretrained FILE")
    imagenet = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    for name in imagenet:
        values = imagenet if cfg.normalization == "imagenet" else clip.visual.preprocess_cfg
        clip.register_buffer(name, torch.tensor(values[name], device=device)[:, None, None], False)
    return clip.eval().requires_grad_(False), tokenizer

def weights_of(file):
    """(the state dict in a file, whether it is OpenAI's TorchScript, trained with QuickGELU)."""
    try:
        state = torch.jit.load(file, map_location="cpu").state_dict()
        state, openai = {k: v for k, v in state.items() if v.ndim or k == "logit_scale"}, True
    except RuntimeError:                                # not TorchScript, but a file of open_clip
        state, openai = open_clip.factory.load_state_dict(str(file)), False
    return open_clip.model.convert_to_custom_text_state_dict(state), openai

def name_tokens(clip, tokenizer, names):
    """(the names' tokens and EOT, C×n int, padded with 0; L, how many prompt tokens fit)."""
    tokens = tokenizer(names)[:, 1:]                                        # drop SOS
    context = clip.text.positional_embedding.size(0)
    longest = int(tokens.argmax(1).max()) + 1                               # EOT is the largest
    if longest + 1 >= context:
        raise UserError(f"{max(names, key=len)}: too long for this CLIP's {context} tokens")
    tokens = tokens[:, :longest].to(clip.logit_scale.device)
    unmet = (clip.text.token_embedding(tokens) == 0).all(-1).any(1)     # the tiny CLIP never had it
    if unmet.any():
        new = ", ".join(name for name, row in zip(names, unmet) if row)
        print(f"warning: this CLIP has never met the words of {new}; expect nonsense for them")
    return tokens, context - 1 - longest

# =================================================================================== 11 checkpoints
def write(path, content):
    """Write a file of text or bytes, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(f"{content}\n".encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

def save(path, state):
    """torch.save, whole or not at all."""
    torch.save(state, buffer := io.BytesIO())   # torch would report a full disk as a RuntimeError
    write(path, buffer.getbuffer())

def load(path, part="rectifier"):
    """A checkpoint of rectify.py, or with part "student" of distill.py. Raises UserError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        [state[key] for key in ("config", "names", "background", "images", part)]
    except Exception as error:      # torch.load has no error class of its own for other files
        raise UserError(f"{path}: no checkpoint with a {part} ({type(error).__name__}); make it "
                        "with rectify.py or distill.py")
    return state

def compare(path, state, config, free, typed):
    """Raise UserError where what was typed contradicts a checkpoint in a field that is not free, or
    where its settings are of another version of `config`, their dataclass."""
    kept = state["config"]
    if kept.keys() != {f.name for f in fields(config)}:
        raise UserError(f"{path}: was made by another version of this script; train anew")
    for name, now in typed.items():
        if name not in free and now != kept[name]:
            raise UserError(f"{path}: has {name} {kept[name]}, not {now}; give another --out")

def contents(segmenter, samples):
    """What a checkpoint of rectify.py holds: plain values and tensors."""
    return {"config": asdict(segmenter.cfg) | {"resume": False}, "names": segmenter.names,
            "background": segmenter.background, "images": [sample.name for sample in samples],
            "T": segmenter.T, "rectifier": segmenter.rectifier.state_dict(),
            "clip": segmenter.clip.visual.state_dict() if segmenter.cfg.finetune else None}

def resume(state, optimizer):
    """Take the optimizer of an interrupted run from its checkpoint; returns its log."""
    optimizer.load_state_dict(state["optimizer"])
    for p, values in optimizer.state.items():   # moments laid out in memory as p, or fused AdamW
        for name, v in values.items():          # computes nonsense where another device saved them
            if v.shape == p.shape:
                values[name] = torch.empty_like(p).copy_(v)
    print(f"resuming after epoch {len(state['log'])}")
    return state["log"]

def end_epoch(out, stage, entry, log, bar, last, state):
    """The end of an epoch of either script: log it to OUT/STAGE.jsonl, stop where the loss is not
    finite, save state() as OUT/STAGE.partial.pt for --resume, once a minute and at the end."""
    log.append({"epoch": len(log) + 1, **entry})
    bar.set_postfix(epoch=len(log), loss=f"{entry['loss']:.3f}")
    if not math.isfinite(entry["loss"]):
        raise UserError(f"{out}: the loss is {entry['loss']} in epoch {len(log)}; lower --lr")
    if RANK == 0:
        write(out / f"{stage}.jsonl", "\n".join(map(json.dumps, log)))
        partial = out / f"{stage}.partial.pt"
        if last or len(log) == 1 or time.time() - partial.stat().st_mtime > 60:
            save(partial, state() | {"log": log})

def look_at_masks(masks, words, bar):
    """Warn of a failed training, without labels, from an epoch's masks M, summed: C×h×w. Returns
    {"agreement": how often two images have the same class at the same patch, 1/C to 1, where masks
    ignore the images; "never": classes without a patch, which get next to no gradient}."""
    count = masks.sum(0)                                                    # h w
    same = ((masks / count.clamp(min=1)).square().sum(0) * count).sum().item() / count.sum().item()
    never = [word for word, n in zip(words, masks.sum((1, 2)).tolist()) if n == 0]
    if same > (1 + 1 / len(masks)) / 2:                 # midway between noise and a collapse
        bar.write(f"warning: images have {same:.0%} of their patches' classes in common; lower "
                  "--lr-conv, --lr or --alpha", file=sys.stderr)
    if never:
        bar.write(f"warning: no patch was given to: {'; '.join(never)}", file=sys.stderr)
    return {"agreement": round(same, 4), "never": never}

# ===================================================================================== 12 processes
RANK, WORLD, LOCAL = (int(os.environ.get(name, default)) for name, default in (     # of torchrun
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
tqdm = functools.partial(tqdm, disable=True) if RANK > 0 else tqdm

def pick_device(cfg):
    """The torch device that --device means, under torchrun this process's. Raises UserError."""
    with warnings.catch_warnings(action="ignore"):      # PyTorch's own of ten lines
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cfg.device == "auto" and torch.cuda.device_count() > gpus:
        print(f"warning: the GPU's driver is too old for PyTorch {torch.__version__}: CPU it is")
    if cfg.device == "cpu" or cfg.device == "auto" and not gpus:
        return torch.device("cpu")
    if LOCAL >= gpus:
        raise UserError(f"--device {cfg.device}: process {LOCAL + 1}, {gpus} GPUs; driver too old?")
    torch.cuda.set_device(LOCAL)
    torch.set_float32_matmul_precision("high")          # TF32: as many bits as features are kept in
    torch.backends.cuda.enable_cudnn_sdp(False)         # it plans anew for every size of an image
    return torch.device("cuda", LOCAL)

def in_half(device):
    """Autocast what is large, CLIP's image tower and the student in training, to bfloat16 where the
    hardware has it. A GPU without it (Turing) takes float16 where nothing learns."""
    can = getattr(torch.cpu, "get_capabilities", dict)()                # older torch does not tell
    has = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
           any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")))
    frozen = device.type == "cuda" and not torch.is_grad_enabled()
    return torch.autocast(device.type, torch.bfloat16 if has else torch.half, has or frozen)

ALL_THREADS = torch.get_num_threads()

def tune_threads(work, device):
    """Compute on the CPU with all, half or one thread, whichever does `work` fastest: beside other
    programs all wait for the one whose core is taken. OMP_NUM_THREADS has its way. Returns it."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        seconds = {}
        for n in 2 * sorted({ALL_THREADS, -(-ALL_THREADS // 2), 1}, reverse=True):
            torch.set_num_threads(n)
            started = time.perf_counter()
            work()
            seconds[n] = min(seconds.get(n, math.inf), time.perf_counter() - started)
        seconds[ALL_THREADS] *= 0.9                                     # fewer must clearly pay
        torch.set_num_threads(min(seconds, key=seconds.get))
    return torch.get_num_threads()

def over_ranks(tensor):
    """The sum of a tensor over all processes."""
    if WORLD > 1:
        distributed.all_reduce(tensor)
    return tensor

def wrap_ddp(module, **options):
    """The module, in DDP where there are several processes: the mean of all their gradients."""
    return nn.parallel.DistributedDataParallel(module, **options) if WORLD > 1 else module

def own_share(samples):
    """This process's samples, as many as every other has, one at least; a few are left out."""
    return (WORLD * samples)[RANK::WORLD][:max(1, len(samples) // WORLD)]

def reseed(seed, number):
    """Seed torch in each process, so that a resumed run repeats what an uninterrupted one does."""
    torch.manual_seed(int(np.random.SeedSequence([abs(seed), RANK, number]).generate_state(1)[0]))

def allocate(shape, dtype, device, out):
    """An empty tensor of a NumPy dtype: on the GPU where 3 GB stay free (for --finetune 9), else
    in a nameless file in the folder `out`, which the system keeps in memory. Raises UserError."""
    need = math.prod(shape) * np.dtype(dtype).itemsize                      # bytes
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if need < torch.cuda.mem_get_info(device)[0] - (9e9 if dtype == np.uint8 else 3e9):
            return torch.from_numpy(np.empty(0, dtype)).to(device).new_empty(shape)
    if need * WORLD > shutil.disk_usage(out).free:
        raise UserError(f"{out}: features need {need * WORLD / 1e9:.3g} GB; give fewer --views")
    return torch.from_numpy(np.memmap(tempfile.TemporaryFile(dir=out), dtype, "w+", shape=shape))

# ================================================================================== 13 command line
class UserError(Exception):
    """Something that the user can mend: shown as one line, exit code 2."""

def configure(kept=None, /, **typed):
    """The complete Config: what was typed, over the recipe of the dataset and the method.
    kept: the settings of a checkpoint, which then replace the recipe. Raises UserError."""
    if kept is None:
        dataset = typed.get("dataset", "voc" if typed.keys() & {"data", "image"} else "emoji")
        method = typed.get("method", RECIPES[dataset].get("method", "reclip"))
        name = Path(typed["data"]).resolve().name if typed.get("data") else dataset
        name += "-maskclip" if method == "maskclip" else ""         # beside a trained run
        kept = RECIPES[dataset] | METHODS.get((dataset, method), {}) | dict(
            dataset=dataset, method=method, out=f"runs/{name}")
        kept |= RECIPE_2024 if typed.get("recipe") else {}
        kept |= {"pretrained": ""} if "clip" in typed else {}       # another CLIP, other weights
    cfg = Config(**kept | typed)
    least = min(cfg.epochs, cfg.batch, cfg.views, cfg.crop, cfg.top_k, *cfg.size)
    for wrong, message in [
            (least < 1, "--epochs, --batch, --views, --crop, --top-k, --size: start at 1"),
            (not 0 <= cfg.threshold < 1, f"--threshold {cfg.threshold}: a probability below 1"),
            (cfg.stride > cfg.window, f"--stride {cfg.stride}: leaves gaps between the windows"),
            (cfg.recipe and cfg.clip != RECIPE_2024["clip"], "--recipe 2024: has its own --clip"),
            (":" not in cfg.clip and not cfg.pretrained, f"--clip {cfg.clip}: needs --pretrained")]:
        if wrong:
            raise UserError(message)
    return cfg

def command_line(config, doc, settings, argv=None):
    """What was typed, {field: value}. The options are the lines of the dataclass `config`: a
    comment line opens a group, the comment behind a field is its help.
    settings: from what was typed to the complete config, whose values --help shows."""
    parser = argparse.ArgumentParser(
        description=doc, allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    group, kinds = parser, {f.name: f.type for f in fields(config)}
    for line in inspect.getsource(config).splitlines():
        if title := re.fullmatch(r"    # (\w+)", line):
            group = parser.add_argument_group(title[1])
        elif option := re.match(r"    (\w+): .* = .*?  # (.+)", line):
            kind = kinds[option[1]]
            values = get_args(kind)                     # of a Literal; of a tuple its types
            about = (dict(action="store_true") if kind is bool else
                     dict(type=values[0], nargs=len(values)) if get_origin(kind) is tuple else
                     dict(type=type(values[-1]), choices=values) if values else dict(type=kind))
            group.add_argument("--" + option[1].replace("_", "-"), **about,
                               help=f"{option[2]} (default %(default)s)")
    parser.add_argument("-h", "--help", action="store_true", help="show this page and exit")
    typed = {name: tuple(v) if isinstance(v, list) else v
             for name, v in vars(parser.parse_args(argv)).items()}
    if typed.pop("help", False):
        parser.set_defaults(**asdict(settings(**typed)))
        parser.print_help()
        sys.exit()
    return typed

def newest(name, root="runs"):
    """The newest file of this name in a run's folder. Raises UserError where there is none."""
    runs = sorted(Path(root).glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(f"{root}/: holds no {name}; run rectify.py, then distill.py")
    return runs[-1]

def versions():
    """What computed a result: Python, PyTorch and the machine."""
    return {"python": sys.version, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}

def run(main):
    """Call a script's main. What the user can mend is one line and exit code 2."""
    if WORLD > 1:
        distributed.init_process_group("cpu:gloo" + ",cuda:nccl" * torch.cuda.is_available())
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    try:
        main()
    except (UserError, OSError, NotImplementedError) as error:      # the last: no locks here
        what = f"{error.filename}: {error.strerror}" if getattr(error, "filename", "") else error
        print(f"error: {what}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on", file=sys.stderr)
        sys.exit(130)

# ========================================================================================== 14 main
def checkpoint(cfg, typed):
    """The checkpoint to measure, to segment images by, or to go on with; None for a new run."""
    if cfg.eval or cfg.method == "maskclip" or not (cfg.image or cfg.resume):
        return cfg.eval or None
    last, partial = Path(cfg.out, "rectify.pt"), Path(cfg.out, "rectify.partial.pt")
    if cfg.image:
        return last if {"out", "dataset"} & typed.keys() else newest("rectify.pt")
    return next(filter(Path.is_file, [partial, last]), None)

def segment(segmenter):
    """--image: of an image, or each in a folder, NAME.mask.png, a palette PNG with VOC's values,
    and NAME.figure.png, MaskCLIP's mask and the rectified one."""
    cfg, C, predict = segmenter.cfg, len(segmenter.names), predictor(segmenter)
    source, out = Path(cfg.image), Path(cfg.out)
    images = find_images(source) if source.is_dir() else {source.stem: source}
    for name, path in tqdm(images.items(), "segmenting", unit="img"):
        masks = predict(load_image(path)[None])
        mask = (masks[cfg.method][0].cpu() + 1) % (C + 1)
        write(out / f"{name}.mask.png", palette_png(mask.numpy()))
        figure = figure4(lambda _: masks, [Sample(name, path, None)], segmenter.classes)
        save_figure(figure, out / f"{name}.figure.png")
    print(f"wrote {out}/{name}.mask.png and .figure.png, for each of {len(images)} images")

def measure(segmenter, samples, val, out, started):
    """Measure on labelled images: the table, rectify.json, figures; without labels Fig. 4 alone."""
    cfg, names = segmenter.cfg, segmenter.classes
    predict, name_images = predictor(segmenter), functools.partial(hypothesize, segmenter)
    if not val:
        some = [sample._replace(label=None) for sample in subsample(samples, 8)]
        return save_figure(figure4(predict, some, names), out / "figure4.png")
    results, found, y = evaluate(predict, val, names, cfg.label_base, name_images)
    write(out / "rectify.json", json.dumps({
        "results": results, "hypothesis": y, "config": asdict(cfg), "versions": versions(),
        "seconds": round(time.time() - started, 1)}, indent=1))
    save_figure(figure1a(found), out / "figure1a.png")
    save_galleries(predict, val, found, names, cfg.label_base, out)
    print_table(results, names)
    print("hypothesis on val: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in y.items()))

def main(argv=None):
    started, typed = time.time(), command_line(Config, __doc__, configure, argv)
    cfg = configure(**typed)
    if cfg.image and WORLD > 1:
        raise UserError("--image: runs in one process; start it without torchrun")
    vocs = cfg.dataset == "context" and not Path(cfg.data, "ImageSets/SegmentationContext").is_dir()
    if cfg.data and not (cfg.names or cfg.eval) and ("dataset" not in typed or vocs):
        raise UserError("--data: needs --names, a file with one class name a line")
    state = load(path) if (path := checkpoint(cfg, typed)) else None
    if state:
        print(f"going on with {path}")
        compare(path, state, Config, FREE, typed)
        cfg = configure(state["config"], **{"out": str(Path(path).parent)} | typed)
    names, background = (state["names"], state["background"]) if state else class_names(cfg)
    asked = state and typed.keys() & {"names", "background", "resume"}
    if asked and class_names(cfg) != (names, background):
        raise UserError(f"{path}: has other class names; for any words give --method maskclip")
    if cfg.names:
        print(f"{len(names)} classes: {'; '.join(names)}; background: {', '.join(background)}")
    torch.manual_seed(cfg.seed)
    if cfg.image:
        return segment(Segmenter(cfg, names, background, state))
    folder, out = dataset_folder(cfg), Path(cfg.out)
    samples, val = splits(folder)
    if cfg.resume and state and state["images"] != [sample.name for sample in samples]:
        raise UserError(f"{folder}: the training images are not those of {out}; leave out --resume")
    out.mkdir(parents=True, exist_ok=True)
    segmenter = Segmenter(cfg, names, background, state)
    if val:
        check_labels(val, segmenter.classes, cfg.label_base)
    print(f"{cfg.method} on {folder}: {len(samples)} images to learn from, {len(val)} to measure "
          f"on, {len(names)} classes, {segmenter.device}, {WORLD} processes")
    if not cfg.eval and segmenter.rectifier and (not state or "optimizer" in state):
        data = training_data(segmenter, own_share(samples))
        print(f"hypothesis: {data[2].float().sum(1).mean():.2f} classes an image")
        train(segmenter, data, samples, out, state)
        if RANK == 0:
            save(out / "rectify.pt", contents(segmenter, samples))
            (out / "rectify.partial.pt").unlink()
    if RANK == 0:
        measure(segmenter, samples, val, out, started)
        print(f"{time.time() - started:.0f} s in all. Wrote {out}/: {', '.join(os.listdir(out))}")

if __name__ == "__main__":
    run(main)
