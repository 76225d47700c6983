"""The rivals of Tables 10 and 11: other ways from unlabelled images and class names to masks, each
on the CLIP, the images and the hypothesis that ReCLIP has.

    python tests/rivals.py reco --dataset emoji --seed 0    # or clippy, clippy-cls, tcl, groupvit
    python distill.py --out runs/rivals --teacher runs/rivals/reco          # its student (Table 11)
    python tests/tables.py table10          # GroupViT, TCL and ReCLIP; table11: the students

ReCo finds example patches of every class and trains nothing; CLIPpy fine-tunes CLIP's image tower
with another pooling; TCL learns a decoder that cuts out what a sentence says; GroupViT learns from
scratch to group patches. The last three learn from captions. In the setting of Table 10 there are
none: the caption of an image is what the hypothesis y says, "a photo of a dog and a sheep.". Ground
truth measures, and does nothing else. Every other option is one of rectify.py (its --help shows
them).

It trains ReCLIP in --out (runs/rivals) unless it is there, prints all three beside each other, and
writes to --out/<rival>/ the masks of train and val (PNGs with VOC's values), figure4.png and
rivals.json.

Read it from top to bottom: 1 settings, 2 sentences and training, 3 ReCo, 4 CLIPpy, 5 TCL,
6 GroupViT, 7 masks and main. The letters are rectify.py's; those of each paper stand in its
section. U: the sentences of a batch, equal ones counted once.
"""
import argparse
import copy
import functools
import itertools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rectify  # noqa: E402  (after the path to it, and before torch, as in distill.py)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from rectify import encode_image, similarity, tqdm  # noqa: E402
from timm.layers import LayerNorm2d  # noqa: E402
from torch import nn  # noqa: E402

# ======================================================================================= 1 settings

@dataclass(frozen=True)
class Training:
    """AdamW; its rate goes up to lr in the first tenth of the steps, then down along a cosine."""
    epochs: int
    batch: int
    lr: float
    weight_decay: float
    clip_grad: float = 5.0                              # TCL's and GroupViT's largest norm


# The papers' batches of 1,024 to 16,384 captions for up to 120,000 steps are not to be had from
# some thousand images. TCL's weight decay is its own, CLIPpy has it too; batch and
# epochs are what a few minutes on two cores allow on Emoji VOC. CLIPpy's rate is rectify.py's
# lr_encoder; the other two have AdamW's usual 1e-3, and nothing here was tuned.
TRAINING = {
    "clippy": Training(epochs=8, batch=64, lr=1e-4, weight_decay=0.2),
    "tcl": Training(epochs=4, batch=32, lr=1e-3, weight_decay=0.2),         # theirs: 1024, 4e-5
    "groupvit": Training(epochs=12, batch=64, lr=1e-3, weight_decay=0.05)}

# ========================================================================= 2 sentences and training

class Batch(NamedTuple):
    """What a rival learns from: views of images, and what the hypothesis says of them."""
    x: torch.Tensor                         # B 3 S S, normalized; S is the side of CLIP's own input
    valid: torch.Tensor                     # B h w bool, false where a view is padding
    t: torch.Tensor                         # U D, unit rows: the features of the batch's sentences
    own: torch.Tensor                       # B, which of them is the image's
    y: torch.Tensor                         # B C bool, the hypothesis

def sentence(names, y):
    """What the hypothesis y: C bool says, as a caption: "a photo of a dog and a sheep."."""
    things = [f"a {name.split(', ')[0]}" for name, present in zip(names, y.tolist()) if present]
    return f"a photo of {' and '.join(filter(None, [', '.join(things[:-1]), things[-1]]))}."

def info_nce(logits, P):
    """InfoNCE both ways, where an image may have several texts and a text several images.

    ½ Σ over the two ways of the mean of −Σ_j p_ij · log softmax_j(logits_ij); p_i is uniform over
    the texts of image i (the images of text i); who has none does not count. logits: B×U, with the
    temperature in them; P: B×U bool, the pairs that belong together.
    """
    def one_way(logits, P):
        own = (-logits.log_softmax(1) * P).sum(1) / P.sum(1).clamp(min=1)   # B
        return own.sum() / P.any(1).sum().clamp(min=1)

    return (one_way(logits, P) + one_way(logits.T, P.T)) / 2

def pairs(own, U):
    """P: B×U bool, which sentence is whose. own: B, the number of each image's sentence."""
    return F.one_hot(own, U).bool()

def batches(segmenter, samples, how):
    """Yield the `Batch`es of all epochs: every image once an epoch, augmented as by rectify.py."""
    cfg, clip, names = segmenter.cfg, segmenter.clip, [*segmenter.names, *segmenter.background]
    name_images = functools.partial(rectify.hypothesize, segmenter)
    y = torch.stack(rectify.each_image(name_images, samples, "hypothesis")).cpu()   # N C
    y_of, who = y.unique(dim=0, return_inverse=True)                        # sentences C, N
    texts = segmenter.tokenizer([sentence(names, row) for row in y_of]).to(segmenter.device)
    with torch.no_grad():
        t = torch.cat([clip.encode_text(part, normalize=True) for part in texts.split(256)])
    side, patch = clip.visual.image_size[0], clip.visual.patch_size[0]
    view, first = replace(cfg, size=(10 ** 6, side), crop=side), torch.arange(0, side, patch)
    fill = (255 * clip.mean.cpu()).round().byte()                           # the mean colour, as 0

    read = lambda work: rectify.augment(
        rectify.load_image(samples[work[0]].image, rectify.LONGEST), view, work[1], fill)
    for epoch in range(how.epochs):
        rectify.reseed(cfg.seed, 1 + epoch)
        order = torch.randperm(len(samples))
        ready = rectify.read_ahead(read, ((i, rectify.draw_view()) for i in order.tolist()))
        for i in order.split(how.batch):
            crops, extents = zip(*itertools.islice(ready, len(i)))
            height, width = torch.tensor(extents).T[..., None]              # B 1, B 1
            valid = (first < height)[:, :, None] & (first < width)[:, None]
            used, own = who[i].unique(return_inverse=True)                  # U, B
            x = rectify.normalize(clip, torch.stack(crops).to(segmenter.device))
            yield Batch(x, *(part.to(segmenter.device) for part in (valid, t[used], own, y[i])))

def train(segmenter, samples, parameters, loss, how):
    """Minimize loss(Batch) over the parameters; prints its mean over every epoch."""
    parameters, steps = list(parameters), math.ceil(len(samples) / how.batch)
    optimizer = torch.optim.AdamW(parameters, how.lr, weight_decay=how.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, how.lr, how.epochs * steps, pct_start=0.1, cycle_momentum=False)
    total, bar = 0, tqdm(total=how.epochs * steps, unit="step")
    for step, batch in enumerate(batches(segmenter, samples, how), 1):
        value = loss(batch)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, how.clip_grad)
        optimizer.step()
        schedule.step()
        total += value.item() / steps
        bar.update()
        if step % steps == 0:
            if not math.isfinite(total):
                raise rectify.UserError(f"the loss is {total} in epoch {step // steps}")
            tqdm.write(f"epoch {step // steps}: loss {total:.4f}")
            total = 0
    bar.close()

def grid_of(clip, x):
    """(h, w) of images x: ..×H×W, the last patch padded."""
    return tuple(-(-n // p) for n, p in zip(x.shape[-2:], clip.visual.patch_size))

# =============================================================================== 3 ReCo (Shin 2022)

CONTEXT = ["tree", "sky", "building", "road", "person"]     # what shows up with everything
EXAMPLES = 50                                                           # k

@torch.no_grad()
def image_scores(segmenter, samples, T):
    """N×C, cos(CLIP's image feature, T_c) of every sample, seen as the hypothesis sees it."""
    clip = segmenter.clip

    def scores(images):
        x = rectify.clip_view(images, clip.visual.image_size[0], segmenter.cfg.view)
        return segmenter.features(x, clip, "clip") @ T.T

    return torch.stack(rectify.each_image(scores, samples, "scores")).cpu()

def patch_weights(f, T_c, r_ctx):
    """w = σ(10·cos(f, T_c)) · Π (1 − σ(cos(φ, r_ctx))): K of patches f = φ: K×D; T_c: D."""
    return (10 * f @ T_c).sigmoid() * (1 - (f @ r_ctx.T).sigmoid()).prod(1)

def co_segment(phi, w):
    """r: D, the reference of a class; phi: its k images' patches, hw×D unit rows each; w: hw each.

    A = φφᵀ, its columns weighted by w. A patch's support is its best weighted match in an image,
    averaged over the k images; an image's seed is its best supported patch; r is the seeds'
    normalized mean. One image's columns at a time: k·hw×hw of memory. (Authors' code takes the
    columns j..2j for image j; ours takes its own.)
    """
    every = torch.cat(phi)                                                  # k·hw D
    support = sum((every @ part.T * weight).amax(1) for part, weight in zip(phi, w)) / len(phi)
    seeds = [part[s.argmax()] for part, s in zip(phi, support.split([*map(len, phi)]))]
    return F.normalize(torch.stack(seeds).mean(0), dim=0)

@torch.no_grad()
def references(segmenter, samples, T, r_ctx):
    """C×D, the reference of each class of T from its k training images that CLIP is surest of."""
    best = image_scores(segmenter, samples, T).topk(min(EXAMPLES, len(samples)), dim=0).indices
    read = lambda n: rectify.resize_to_fit(
        rectify.load_image(samples[n].image, rectify.LONGEST), segmenter.cfg.size)
    found = []
    for T_c, numbers in zip(tqdm(T, "co-segmentation", leave=False), best.T.tolist()):
        phi = [segmenter.features(image[None])[0].flatten(1).T
               for image in rectify.read_ahead(read, numbers)]              # hw D each
        found.append(co_segment(phi, [patch_weights(part, T_c, r_ctx) for part in phi]))
    return torch.stack(found)

def reco_logits(f, T, r):
    """σ(cos(φ, r_c)) · σ(10·cos(f, T_c)), with φ = f: B×D×h×w to B×C×h×w; T, r: C×D."""
    return similarity(f, r).sigmoid() * (10 * similarity(f, T)).sigmoid()

def reco(segmenter, samples):
    """ReCo: retrieve and co-segment. Nothing is trained.

    Paper: φ from a DeiT-S trained on Stylized ImageNet. Here φ = f, as nobody brings another
    network; its CRF is left out. A context word that is a class is not context.
    """
    titles = {word for name in segmenter.names for word in name.split(", ")}
    context, none = [word for word in CONTEXT if word not in titles], segmenter.T[:0]
    T_ctx = none
    if context:
        T_ctx = rectify.text_features(segmenter.clip, segmenter.tokenizer, context)
    r_ctx = references(segmenter, samples, T_ctx, none) if context else none
    r = references(segmenter, samples, segmenter.T, r_ctx)
    return lambda x: reco_logits(segmenter.features(x), segmenter.T, r)

# ======================================================================= 4 CLIPpy (Ranasinghe 2023)

def patch_features(clip, x):
    """B×hw×D of normalized images: the patches after CLIP's own last block, in text space."""
    tokens, grid = rectify.first_blocks(clip, x)
    last = clip.visual.transformer.resblocks[-1]
    tokens = rectify.attention_block(last, tokens, grid, "clip")           # B 1+hw d
    return clip.visual.ln_post(tokens[:, 1:]) @ clip.visual.proj

def max_pool(features, valid):
    """z: B×D, unit norm, each channel's maximum over valid patches; features: B×hw×D; valid: B×h×w.
    """
    z = features.masked_fill(~valid.flatten(1)[..., None], -torch.inf).amax(1)
    return F.normalize(z, dim=-1)

def clippy(segmenter, samples, how, pool="max"):
    """CLIPpy: fine-tune the image tower so that the max over patches meets the sentence.

    pool: "cls" is the control, the same steps with CLIP's own pooling. Paper: both towers, from
    DINO's and T5's weights, on 134 M captions. Here: CLIP's image tower, its text tower frozen.
    """
    clip = copy.deepcopy(segmenter.clip)
    clip.visual.requires_grad_()

    def loss(b):
        z = (encode_image(clip, b.x, "clip") if pool == "cls"
             else max_pool(patch_features(clip, b.x), b.valid))             # B D
        return info_nce(segmenter.scale * z @ b.t.T, pairs(b.own, len(b.t)))

    train(segmenter, samples, clip.visual.parameters(), loss, how)

    def dense(images):
        x = rectify.normalize(clip, images)
        f = F.normalize(patch_features(clip, x), dim=-1)                    # B hw D
        return similarity(f.mT.unflatten(-1, grid_of(clip, x)), segmenter.T)

    return dense

# ================================================================================= 5 TCL (Cha 2023)

class GatedUpsampling(nn.Module):
    """B×D×h×w to B×D×2h×2w: nearest ×2, then twice x + tanh(g)·conv3×3(GELU(LN x)); g = 0 first."""

    def __init__(self, D):
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm2d(D) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(D, D, 3, padding=1) for _ in range(2))
        self.g = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        for norm, conv, g in zip(self.norms, self.convs, self.g):
            x = x + g.tanh() * conv(F.gelu(norm(x)))
        return x

class TCL(nn.Module):
    """forward(clip, x: B×3×H×W) -> e: B×D×4h×4w of unit norm. It learns a copy of CLIP's last block
    (its value path), the decoder, and w and b of the masks σ(w·e·t + b).
    """

    def __init__(self, clip):
        super().__init__()
        D = clip.visual.proj.size(1)
        self.block = copy.deepcopy(clip.visual.transformer.resblocks[-1]).requires_grad_()
        self.decoder = nn.Sequential(GatedUpsampling(D), GatedUpsampling(D))
        self.w, self.b = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-2.5))

    def forward(self, clip, x):
        with torch.no_grad():
            tokens, grid = rectify.first_blocks(clip, x)
        v = rectify.maskclip_block(self.block, tokens)[:, 1:]               # B hw d
        v = (clip.visual.ln_post(v) @ clip.visual.proj).mT.unflatten(-1, grid)  # B D h w
        return F.normalize(self.decoder(v), dim=1)

def hard(s):
    """The mask of logits s as 0 or 1, drawn with Gumbel noise; its gradient is the soft one's."""
    return F.gumbel_softmax(torch.stack([s, torch.zeros_like(s)]), tau=1, hard=True, dim=0)[0]

def pooled(m, e):
    """v: B×U×D of unit norm, the mean of e: B×D×h×w under each mask m: B×U×h×w."""
    return F.normalize(torch.einsum("buhw,bdhw->bud", m, e), dim=-1)

def area_loss(m, P, valid):
    """|mean positive mask − 0.4| + mean negative mask; m: B×U×h×w, P: B×U bool, valid: B×h×w."""
    area = (m * valid[:, None]).sum((2, 3)) / valid.sum((1, 2))[:, None]    # B U
    negative = area[~P].mean() if (~P).any() else 0
    return (area[P].mean() - 0.4).abs() + negative

def total_variation(x):
    """Mean |x_i − x_j| over vertical neighbours, and the same over horizontal ones; x: ..×h×w."""
    return x.diff(dim=-2).abs().mean() + x.diff(dim=-1).abs().mean()

def tcl_loss(model, clip, b, scale):
    """0.1 · InfoNCE(CLIP(hard mask ⊙ image), t) + 0.1 · InfoNCE(e pooled by the masks, t)
    + 0.4 · area + total variation of e and of the masks.
    """
    P, rows = pairs(b.own, len(b.t)), torch.arange(len(b.x), device=b.x.device)
    e = model(clip, b.x)                                                    # B D 4h 4w
    s = model.w * similarity(e, b.t) + model.b                              # B U 4h 4w
    valid = F.interpolate(b.valid[:, None].float(), e.shape[-2:])[:, 0]     # B 4h 4w
    m = s.sigmoid() * valid[:, None]
    cut = F.interpolate(hard(s[rows, b.own])[:, None], b.x.shape[-2:]) * b.x  # B 3 S S; 0: grey
    by_image = encode_image(clip, cut, "clip") @ b.t.T                     # B U
    by_feature = torch.einsum("bud,ud->bu", pooled(m, e), b.t)              # B U
    return (0.1 * info_nce(scale * by_image, P) + 0.1 * info_nce(scale * by_feature, P)
            + 0.4 * area_loss(m, P, valid) + total_variation(e) + total_variation(m))

def tcl(segmenter, samples, how):
    """TCL: learn to cut out what the sentence says.

    Inference: 0.3 · dense CLIP + 0.7 · mask, both as σ(w·cos + b). Paper: 15 M captions; PAMR is
    left out.
    """
    clip, T = segmenter.clip, segmenter.T
    model = TCL(clip).to(segmenter.device)
    loss = functools.partial(tcl_loss, model, clip, scale=segmenter.scale)
    train(segmenter, samples, model.parameters(), lambda b: loss(b=b), how)

    def dense(images):
        x = rectify.normalize(clip, images)
        e, f = model(clip, x), encode_image(clip, x, "maskclip")            # B D 4h 4w, B D h w
        m, m_f = ((model.w * similarity(u, T) + model.b).sigmoid() for u in (e, f))
        return 0.3 * F.interpolate(m_f, m.shape[-2:], mode="bilinear") + 0.7 * m

    return dense

# ============================================================================= 6 GroupViT (Xu 2022)

def assign(logits, noisy):
    """One-hot over G, of logits B×G×n: hard Gumbel-Softmax (straight through), or the largest."""
    if noisy:
        return F.gumbel_softmax(logits, tau=1, hard=True, dim=1)
    return F.one_hot(logits.argmax(1), logits.size(1)).mT.to(logits)

class Grouping(nn.Module):
    """Assign each of n tokens to one of G groups and make a token of each group's.

    A = assign((W_q g)·(W_k x)): B×G×n; g' = g + W_o(A·W_v x / count), then + MLP(LN g'). forward(g:
    B×G×d, x: B×n×d) -> g': B×G×d, A.
    """

    def __init__(self, d):
        super().__init__()
        self.norm_g, self.norm_x, self.norm = (nn.LayerNorm(d) for _ in range(3))
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, g, x):
        q, x = self.norm_g(g), self.norm_x(x)
        logits = self.q(q) @ self.k(x).mT * x.size(-1) ** -0.5              # B G n
        A = assign(logits, self.training)
        g = g + self.out(A @ self.v(x) / A.sum(-1, keepdim=True).clamp(min=1))
        return g + self.mlp(self.norm(g)), A

class GroupViT(nn.Module):
    """A ViT of CLIP's width, depth and heads, from scratch, with 16, then 8 groups (theirs: 64, 8).

    forward(x: B×3×H×W) -> features of the 8 segments, B×8×D, and one-hot A: B×8×hw, whose patch is
    whose. Half of the layers stand before the first grouping, a quarter after each, as the 6, 3
    and 3 of the paper.
    """

    def __init__(self, visual, D, groups=(16, 8)):
        super().__init__()
        patch, d = visual.conv1.kernel_size, visual.conv1.out_channels
        blocks = visual.transformer.resblocks
        heads, L = blocks[0].attn.num_heads, len(blocks)
        self.patches = nn.Conv2d(3, d, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn(1, d, *visual.grid_size))
        self.groups = nn.ParameterList(0.02 * torch.randn(1, G, d) for G in groups)
        layer = functools.partial(nn.TransformerEncoderLayer, d, heads, 4 * d, dropout=0.0,
                                  activation="gelu", batch_first=True, norm_first=True)
        depths = (L // 2, L // 4, L - L // 2 - L // 4)
        self.stages = nn.ModuleList(nn.Sequential(*(layer() for _ in range(n))) for n in depths)
        self.grouping = nn.ModuleList(Grouping(d) for _ in groups)
        self.norm, self.proj = nn.LayerNorm(d), nn.Linear(d, D)

    def forward(self, x):
        p_h, p_w = self.patches.kernel_size
        x = self.patches(F.pad(x, (0, -x.size(-1) % p_w, 0, -x.size(-2) % p_h)))  # B d h w
        place = F.interpolate(self.place, x.shape[-2:], mode="bicubic")
        x, A = (x + place).flatten(2).mT, None                              # B hw d
        for stage, grouping, g in zip(self.stages, self.grouping, self.groups):
            n = x.size(1)
            x = stage(torch.cat([x, g.expand(len(x), -1, -1)], dim=1))      # B n+G d
            x, chosen = grouping(x[:, n:], x[:, :n])                        # B G d, B G n
            A = chosen if A is None else chosen @ A                         # B G hw
        return self.proj(self.norm(self.stages[-1](x))), A

def groupvit_loss(segments, b, T, scale):
    """InfoNCE of the image with its sentence, and with each noun alone: one text per class of y.

    The image is the mean of its segments: B×8×D. T: C×D.
    """
    v = F.normalize(segments.mean(1), dim=-1)                               # B D
    return (info_nce(scale * v @ b.t.T, pairs(b.own, len(b.t)))
            + info_nce(scale * v @ T.T, b.y))

def group_logits(segments, A, T, grid):
    """A patch has its group's cosines with T: B×C×h×w; segments: B×G×D; A: B×G×hw, one-hot."""
    cosines = F.normalize(segments, dim=-1) @ T.T                           # B G C
    return (cosines.mT @ A).unflatten(-1, grid)

def groupvit(segmenter, samples, how):
    """GroupViT: learn to group, from scratch. Paper: 29 M captions, and a text tower of its own;
    here CLIP's, frozen.
    """
    T, visual = segmenter.T, segmenter.clip.visual
    model = GroupViT(visual, T.size(1)).to(segmenter.device).train()
    loss = lambda b: groupvit_loss(model(b.x)[0], b, T, segmenter.scale)
    train(segmenter, samples, model.parameters(), loss, how)
    model.eval()

    def dense(images):
        x = rectify.normalize(segmenter.clip, images)
        return group_logits(*model(x), T, grid_of(segmenter.clip, x))

    return dense

# ================================================================================= 7 masks and main

# name: (title, the function of (segmenter, training samples) that makes the dense classifier, its
# Training). A dense classifier makes logits B×C×h×w of uint8 images B×3×H×W.
RIVALS = {"reco": ("ReCo", reco, None), "clippy": ("CLIPpy", clippy, "clippy"),
          "clippy-cls": ("CLIPpy, CLS", functools.partial(clippy, pool="cls"), "clippy"),
          "tcl": ("TCL", tcl, "tcl"), "groupvit": ("GroupViT", groupvit, "groupvit")}

def masks(segmenter, dense, images):
    """B×H×W uint8 of uint8 images B×3×H×W, decided as ReCLIP's; nothing is denoised."""
    x = rectify.resize_to_fit(images.to(segmenter.device), segmenter.cfg.size)
    with torch.no_grad():
        logits = dense(x)
    step = grid_of(segmenter.clip, x)[0] * segmenter.clip.visual.patch_size[0] // logits.size(-2)
    cfg = segmenter.cfg
    return rectify.decide(logits, step, x.shape[-2:], images.shape[-2:], len(segmenter.names),
                          cfg.sharpness, cfg.threshold)

def write_masks(segmenter, dense, samples, folder):
    """The masks of samples as folder/<name>.png, with VOC's values, as distill.py reads them."""
    images = rectify.read_ahead(lambda sample: rectify.load_image(sample.image), samples)
    for sample, image in zip(samples, images):
        path = folder / f"{sample.name}.png"
        mask = masks(segmenter, dense, image[None])[0].cpu()
        mask = (mask + 1) % (len(segmenter.names) + 1)                      # 0: background
        rectify.write(path, rectify.palette_png(mask.numpy()))

def reclip(argv, out):
    """The Segmenter of ReCLIP in `out`; trained there first unless it is. Raises UserError."""
    options, path = [*argv, "--method", "reclip", "--out", str(out)], out / "rectify.pt"
    if not path.is_file():
        rectify.main([*options, "--resume"])
    typed = rectify.command_line(rectify.Config, rectify.__doc__, rectify.configure, options)
    state = rectify.load(path)
    rectify.compare(path, state, rectify.Config, rectify.FREE, typed)
    cfg = rectify.configure(state["config"], **typed)
    return rectify.Segmenter(cfg, state["names"], state["background"], state)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rival", choices=list(RIVALS))
    parser.add_argument("--out", type=Path, default=Path("runs/rivals"), help="default %(default)s")
    args, rest = parser.parse_known_args(argv)
    if rectify.WORLD > 1:
        raise rectify.UserError("rivals.py runs in one process")
    segmenter = reclip(rest, args.out)
    cfg, names = segmenter.cfg, segmenter.classes
    train_samples, val = rectify.splits(rectify.dataset_folder(cfg))
    title, rival, key = RIVALS[args.rival]
    torch.manual_seed(cfg.seed)
    started, how = time.time(), TRAINING.get(key)
    dense = rival(segmenter, train_samples, *([how] if how else []))
    learned, folder = time.time(), args.out / args.rival
    write_masks(segmenter, dense, [*train_samples, *val], folder)
    seconds = {"rival": round(learned - started, 1), "masks": round(time.time() - learned, 1)}
    results = {}
    if val:
        both = rectify.predictor(segmenter)
        predict = lambda images: both(images) | {title: masks(segmenter, dense, images)}
        results, *_ = rectify.evaluate(predict, val, names, cfg.label_base)
        figure = rectify.figure4(predict, rectify.subsample(val, 8), names, cfg.label_base)
        rectify.save_figure(figure, folder / "figure4.png")
        rectify.print_table(results, names)
    report = {"results": results, "training": asdict(how) if how else {}, "config": asdict(cfg),
              "versions": rectify.versions(), "seconds": seconds}
    rectify.write(folder / "rivals.json", json.dumps(report, indent=1))
    print(f"{title}: {seconds['rival']} s, and {seconds['masks']} s for {len(train_samples)} + "
          f"{len(val)} masks. Wrote {folder}/")


if __name__ == "__main__":
    rectify.run(main)
