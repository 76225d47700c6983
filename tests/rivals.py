"""The rivals of the paper's Tables 10 and 11, re-run in the same unsupervised setting: ReCo, CLIPpy,
TCL and GroupViT.

    python tests/rivals.py reco                        # on Emoji VOC; clippy, tcl, groupvit
    python tests/rivals.py tcl --dataset voc --seed 1
    python distill.py --teacher runs/rivals/emoji-reco-0/masks      # a student of its masks

All see what ReCLIP sees: unlabelled images and the class names. Where a method wants captions, its
text is what the hypothesis y says of the image: "a photo of a dog and a sheep." So these rows are
not the methods' own numbers, which come from millions of captions. Written from the equations of
the papers; each section names its paper and where it departs from it.

Settings are the papers' own where they fit a thousand images; rates and epochs, which do not, were
chosen on the training loss alone. No ground truth is read but to measure.
"""
import argparse
import copy
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rectify  # noqa: E402  (after the path to it)
from rectify import similarity  # noqa: E402

# ================================================================================= 1 what they share


def sentence(names):
    """What the hypothesis says of an image: "a photo of a dog and a sheep." """
    return f"a photo of {' and '.join(f'a {name}' for name in names)}."


def info_nce(v, t, positive, scale):
    """InfoNCE of images and texts, both ways, where an image may have several texts and a text
    several images.

    v: B×D and t: U×D of unit norm. positive: B×U bool, at least one in every row and column.
    """
    logits, positive = scale * v @ t.T, positive.float()                    # B U
    by_image = F.cross_entropy(logits, positive / positive.sum(1, keepdim=True))
    by_text = F.cross_entropy(logits.T, positive.T / positive.T.sum(1, keepdim=True))
    return (by_image + by_text) / 2


class Setting:
    """What every rival is given: CLIP, T, the images, the hypothesis y: N×C of the training images
    and their sentences t: N×D.
    """

    @torch.no_grad()
    def __init__(self, cfg):
        self.cfg, names = cfg, rectify.class_names(cfg)
        self.train, self.val = rectify.splits(rectify.dataset_folder(cfg))
        self.segmenter = rectify.Segmenter(cfg, names, rectify.pick_device(cfg))
        self.clip, self.T, self.scale = (getattr(self.segmenter, name)
                                         for name in ("clip", "T", "scale"))
        self.device, self.side = self.segmenter.device, self.clip.visual.image_size[0]
        self.y = rectify.hypotheses(self.segmenter, self.train)             # N C
        titles = [name.split(", ")[0] for name in names]
        said = [sentence([titles[c] for c in row.nonzero()[:, 0]]) for row in self.y]
        tokens = self.segmenter.tokenizer(said).to(self.device)
        self.t = torch.cat([self.clip.encode_text(part, normalize=True)
                            for part in tokens.split(256)])                 # N D

    def batches(self, batch):
        """An epoch: (x B×3×s×s normalized crops of CLIP's own size, sentences t B×D, y B×C)."""
        order = torch.randperm(len(self.train)).split(batch)
        images = rectify.read_ahead(lambda i: rectify.load_image(self.train[i].image),
                                    torch.cat(order).tolist())
        for rows in order:
            with rectify.one_thread():
                x = torch.stack([self.crop(next(images)) for _ in rows]).to(self.device)
            y = self.y[rows].to(self.device)
            yield rectify.normalize(self.clip, x), self.t[rows.to(self.device)], y

    def crop(self, image):
        """A random square of an image 3×H×W, half of them mirrored."""
        larger = 1 + torch.rand(()).item() / 4
        image = rectify.resize_to_fit(image, (10 ** 6, self.side), factor=larger)
        top, left = (int(torch.randint(n - self.side + 1, ())) for n in image.shape[1:])
        image = image[:, top:top + self.side, left:left + self.side]
        return image.flip(-1) if torch.rand(()) < 0.5 else image

    def fit(self, learned, loss, lr, epochs, batch):
        """Learn the parameters `learned` by AdamW and a cosine schedule. loss(x, t, y) of a batch,
        as `batches` gives it. Returns the mean loss of the last epoch.
        """
        optimizer = torch.optim.AdamW(learned, lr, weight_decay=0.05)
        steps = epochs * -(-len(self.train) // batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        bar = rectify.tqdm(total=steps, desc="learning", unit="step", leave=False)
        for _ in range(epochs):
            seen = []
            for x, t, y in self.batches(batch):
                value = loss(x, t, y)
                optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
                schedule.step()
                seen.append(value.detach())
                bar.update()
            bar.set_postfix(loss=f"{torch.stack(seen).mean().item():.3f}")
        bar.close()
        return torch.stack(seen).mean().item()


def same_text(y):
    """B×B bool: which images have the same sentence; y: B×C."""
    return (y[:, None] == y[None]).all(-1)


# =========================================================================== 2 ReCo (Shin et al. 2022)

CONTEXT = ["tree", "sky", "building", "road", "person"]
GROUNDS = ["sky", "sea", "grass", "road", "room", "sand"]       # Emoji VOC's, which its CLIP knows


def support(phi, w):
    """How well each patch is matched in the other images: n×p.

    phi: n×p×D, unit features of n images. w: n×p, weights of the patches as partners. For each
    patch the mean, over the images, of max over their patches of w·(φ·φ'); an image at a time, so
    memory is n·p·p.
    """
    best = [(phi.flatten(0, 1) @ other.T * weight).amax(1) for other, weight in zip(phi, w)]
    return torch.stack(best).mean(0).view(w.shape)                          # n p


def reference_of(phi, w):
    """r: D, the normalized mean of the seeds: of every image its best supported patch."""
    seeds = phi[torch.arange(len(phi)), support(phi, w).argmax(1)]          # n D
    return F.normalize(seeds.mean(0), dim=0)


@torch.no_grad()
def reco(setting, k=50):
    """Retrieve, then co-segment; nothing is trained. Returns (function from f: B×D×h×w to class
    scores B×C×h×w, None).

    The archive of a class are the k images whose CLIP feature is nearest to T_c. Scores: σ(cos(φ,
    r_c)) · σ(10·cos(f, T_c)). Here φ is CLIP's dense feature f, theirs a DeiT's; no CRF. Cost: k
    passes of CLIP a class; memory k·p² numbers for p patches.
    """
    segmenter, clip, T, cfg = setting.segmenter, setting.clip, setting.T, setting.cfg
    words = GROUNDS if cfg.dataset == "emoji" else CONTEXT
    words = [word for word in words if word not in segmenter.names]
    v, nearest = {}, (10 ** 6, setting.side)
    for batch, images, _ in rectify.batches_of_one_size(setting.train, 16):
        whole = rectify.resize_to_fit(images, nearest)
        v.update(zip([s.image for s in batch], segmenter.encode(clip, whole, "stock")))
    v = torch.stack([v[s.image] for s in setting.train])                    # N D

    def refer(T_c, context):
        archive = [setting.train[i].image for i in (v @ T_c).topk(min(k, len(v))).indices.tolist()]
        phi = torch.cat([segmenter.features(v2.functional.resize(image, [cfg.crop] * 2)[None])
                         for image in rectify.read_ahead(rectify.load_image, archive)])
        phi = phi.flatten(2).mT                                             # k p D
        w = (10 * phi @ T_c).sigmoid()                                      # k p
        for r in context:
            w = w * (1 - (phi @ r).sigmoid())
        return reference_of(phi, w)

    W = rectify.text_features(clip, segmenter.tokenizer, words)
    context = [refer(word, []) for word in W]
    r = torch.stack([refer(T_c, context) for T_c in rectify.tqdm(T, "co-segmenting", leave=False)])
    return lambda f: similarity(f, r).sigmoid() * (10 * similarity(f, T)).sigmoid(), None


# =================================================================== 3 CLIPpy (Ranasinghe et al. 2023)

def patches(visual, x):
    """Patch features B×D×h×w of an image tower with its ordinary attention, not normalized."""
    x, grid = rectify.earlier_blocks(SimpleNamespace(visual=visual), x)
    x = visual.transformer.resblocks[-1](x)[:, 1:]
    return (visual.ln_post(x) @ visual.proj).float().mT.unflatten(-1, grid)


def max_pool(f):
    """v: B×D, over the patches the maximum of each channel of f: B×D×h×w, normalized."""
    return F.normalize(f.amax((2, 3)), dim=1)


def clippy(setting, lr=1e-4, epochs=12, batch=64):
    """CLIP's image tower trained on, with the maximum over the patches in place of CLS. Returns
    (function from images x to class scores B×C×h×w, the last loss).

    Paper: trained from ImageNet's and a language model's weights on 134 million captions.
    """
    T, visual = setting.T, copy.deepcopy(setting.clip.visual).requires_grad_()

    def loss(x, t, y):
        return info_nce(max_pool(patches(visual, x)), t, same_text(y), setting.scale)

    last = setting.fit(list(visual.parameters()), loss, lr, epochs, batch)
    return lambda x: similarity(F.normalize(patches(visual, x), dim=1), T), last


# ============================================================================ 4 TCL (Cha et al. 2023)

class Gated(nn.Module):
    """x to twice its height and width, and a convolution whose gate is shut at first: x +
    tanh(g)·conv(GELU(LN(x))), twice.
    """

    def __init__(self, D):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, D) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(D, D, 3, padding=1) for _ in range(2))
        self.gates = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        for norm, conv, gate in zip(self.norms, self.convs, self.gates):
            x = x + gate.tanh() * conv(F.gelu(norm(x)))
        return x


class Grounder(nn.Module):
    """Unit embeddings e: B×D×4h×4w of images x: B×3×H×W: CLIP's frozen earlier blocks, a copy of
    its last block that learns, two gated blocks.
    """

    def __init__(self, clip):
        super().__init__()
        self.frozen = [clip]                            # in a list: not among this one's parameters
        self.block = copy.deepcopy(clip.visual.transformer.resblocks[-1]).requires_grad_()
        D = clip.visual.proj.size(1)
        self.decoder = nn.Sequential(Gated(D), Gated(D))

    def forward(self, x):
        clip, = self.frozen
        x, grid = rectify.earlier_blocks(clip, x)
        x = rectify.last_block(self.block, x, grid, "maskclip")[:, 1:]
        f = (clip.visual.ln_post(x) @ clip.visual.proj).mT.unflatten(-1, grid)
        return F.normalize(self.decoder(F.normalize(f, dim=1)), dim=1)


def soft_mask(e, t):
    """m = σ(10·e·t − 2.5): B×U×h×w, where in each image each text is."""
    return (10 * similarity(e, t) - 2.5).sigmoid()


def variation(m):
    """Total variation of maps ..×h×w: the mean step between neighbours, both ways."""
    return (m.diff(dim=-1).abs().mean() + m.diff(dim=-2).abs().mean())


def tcl_loss(clip, e, x, t, y, scale):
    """0.1 InfoNCE of CLIP on the masked image, 0.1 of e under the mask, 0.4 of the masks' areas (an
    image's own is to fill 0.4 of it, another's nothing), and the total variations.

    e: B×D×h×w, x: B×3×H×W, t: B×D, y: B×C. The hard mask passes the gradient of the soft one.
    """
    m, same = soft_mask(e, t), same_text(y)                                 # B B h w, B B
    own = m.diagonal().permute(2, 0, 1)                                     # B h w
    hard = (own > 0.5).float() + own - own.detach()
    seen = x * F.interpolate(hard[:, None], x.shape[-2:], mode="nearest")
    masked = rectify.encode_image(clip, seen, "stock")                      # B D
    pooled = torch.einsum("bhw,bdhw->bd", own, e) / own.sum((1, 2))[:, None].clamp(min=1e-6)
    others = m.mean((2, 3))[~same]
    area = (own.mean() - 0.4).abs() + (others.mean() if len(others) else 0)
    return (0.1 * info_nce(masked, t, same, scale)
            + 0.1 * info_nce(F.normalize(pooled, dim=1), t, same, scale)
            + 0.4 * area + variation(e) + variation(m))


def tcl(setting, lr=5e-4, epochs=6, batch=32):
    """Text-grounded masks from contrasts alone. Returns (function from images x to class scores
    B×C×4h×4w, the last loss).

    Scores: 0.7 of the learned mask and 0.3 of the frozen CLIP's. Left out: the refinement PAMR.
    """
    clip, T = setting.clip, setting.T
    grounder = Grounder(clip).to(setting.device)

    def loss(x, t, y):
        return tcl_loss(clip, grounder(x), x, t, y, setting.scale)

    def score(x):
        m, f = soft_mask(grounder(x), T), rectify.encode_image(clip, x, "maskclip")
        return 0.7 * m + 0.3 * F.interpolate(soft_mask(f, T), m.shape[-2:], mode="bilinear")

    return score, setting.fit(list(grounder.parameters()), loss, lr, epochs, batch)


# ======================================================================== 5 GroupViT (Xu et al. 2022)

class Grouping(nn.Module):
    """Gives each token to one group: hard Gumbel-Softmax over the groups of (W_q·group)·(W_k·token).

    forward(groups: B×G×d, x: B×n×d) -> the groups with the mean of their tokens' values added,
    B×G×d, and the assignment A: B×G×n, one-hot over G. Outside of training the best group is taken.
    """

    def __init__(self, d):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, groups, x):
        g, x = self.norms[0](groups), self.norms[1](x)
        s = self.q(g) @ self.k(x).mT * g.size(-1) ** -0.5                   # B G n
        if self.training:
            A = F.gumbel_softmax(s, hard=True, dim=1)
        else:
            A = F.one_hot(s.argmax(1), s.size(1)).mT.to(s.dtype)
        mean = A @ self.v(x) / A.sum(-1, keepdim=True).clamp(min=1)         # B G d
        groups = groups + self.out(mean)
        return groups + self.mlp(self.norms[2](groups)), A


class GroupViT(nn.Module):
    """A ViT whose patches gather in 16 and then 8 groups: forward(x) -> (features of the last
    groups B×8×D, assignment of the patches B×8×h×w, one-hot).

    In the size of the CLIP at hand: its width and depth, half of the layers before each grouping.
    """

    def __init__(self, clip, groups=(16, 8)):
        super().__init__()
        visual = clip.visual
        d, heads = visual.conv1.out_channels, visual.transformer.resblocks[0].attn.num_heads
        self.conv = nn.Conv2d(3, d, visual.patch_size, visual.patch_size)
        self.pe = nn.Parameter(0.02 * torch.randn(1, d, *visual.grid_size))
        self.tokens = nn.ParameterList(0.02 * torch.randn(1, G, d) for G in groups)
        depth = max(1, len(visual.transformer.resblocks) // 2)
        layer = lambda: nn.TransformerEncoderLayer(d, heads, 4 * d, 0.0, "gelu", batch_first=True,
                                                   norm_first=True)
        self.layers = nn.ModuleList(nn.Sequential(*(layer() for _ in range(depth))) for _ in groups)
        self.groupings = nn.ModuleList(Grouping(d) for _ in groups)
        self.norm, self.proj = nn.LayerNorm(d), nn.Linear(d, visual.proj.size(1), bias=False)

    def forward(self, x):
        p_h, p_w = self.conv.kernel_size
        x = self.conv(F.pad(x, (0, -x.size(-1) % p_w, 0, -x.size(-2) % p_h)))    # B d h w
        grid = x.shape[-2:]
        x = (x + F.interpolate(self.pe, grid, mode="bicubic")).flatten(2).mT     # B hw d
        whole = None
        for tokens, layers, grouping in zip(self.tokens, self.layers, self.groupings):
            n = x.size(1)
            x = layers(torch.cat([x, tokens.expand(len(x), -1, -1)], 1))
            x, A = grouping(x[:, n:], x[:, :n])                             # B G d, B G n
            whole = A if whole is None else A @ whole                       # B G hw
        return self.proj(self.norm(x)), whole.unflatten(-1, grid)


def groupvit(setting, lr=5e-4, epochs=20, batch=64):
    """A GroupViT from scratch, with the frozen text tower. Returns (function from images x to class
    scores B×C×h×w, the last loss).

    Loss: InfoNCE of the mean of the last groups with the sentence, and with each of its nouns. A
    patch has the class whose text is nearest to its group's feature.
    """
    T = setting.T
    network = GroupViT(setting.clip).to(setting.device)

    def loss(x, t, y):
        v = F.normalize(network(x)[0].mean(1), dim=1)                       # B D
        there = y.any(0)                                                    # C: nouns of this batch
        return (info_nce(v, t, same_text(y), setting.scale)
                + info_nce(v, T[there], y[:, there], setting.scale))

    last = setting.fit(list(network.parameters()), loss, lr, epochs, batch)
    network.eval()

    def score(x):
        groups, A = network(x)
        return torch.einsum("bgc,bghw->bchw", F.normalize(groups, dim=-1) @ T.T, A)

    return score, last


# ============================================================================= 6 masks and the numbers

RIVALS = {"reco": reco, "clippy": clippy, "tcl": tcl, "groupvit": groupvit}
TITLES = {"reco": "ReCo", "clippy": "CLIPpy", "tcl": "TCL", "groupvit": "GroupViT"}


def predictor(setting, name, score):
    """The function from uint8 images B×3×H×W to masks {"maskclip": B×H×W, the rival's title: same}.
    """
    patch, C = setting.clip.visual.patch_size[0], len(setting.T)

    @torch.no_grad()
    def predict(images):
        x = rectify.resize_to_fit(images.to(setting.device), setting.cfg.size)
        f = setting.segmenter.features(x)
        own = score(f if name == "reco" else rectify.normalize(setting.clip, x))
        own = F.interpolate(own, [n * patch for n in f.shape[-2:]], mode="bilinear")  # finer: TCL's
        sizes = x.shape[-2:], images.shape[-2:], C
        return {"maskclip": rectify.decide(similarity(f, setting.T), patch, *sizes),
                TITLES[name]: rectify.decide(own, 1, *sizes)}

    return predict


def write_masks(predict, name, C, samples, folder):
    """The masks of all samples as palette PNGs, which `distill.py --teacher FOLDER` learns from."""
    for batch, images, _ in rectify.batches_of_one_size(samples, 16):
        for sample, mask in zip(batch, predict(images)[TITLES[name]].cpu()):
            path = folder / f"{sample.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            rectify.write_mask(mask, C, path)


def run_rival(name, out=None, **options):
    """Learn and measure a rival. Returns its report: {"results", "loss", "seconds", "config"}.

    Writes masks/, figure4.png and rivals.json in `out`, by default runs/rivals/<dataset>-<name>-
    <seed>. ReCLIP is measured beside it where runs/<dataset>/rectify.pt is there.
    """
    started, cfg = time.time(), rectify.configure(**options, method="maskclip")
    out = Path(out or f"runs/rivals/{cfg.dataset}-{name}-{cfg.seed}")
    torch.manual_seed(cfg.seed)
    setting = Setting(cfg)
    score, loss = RIVALS[name](setting)
    predict, trained = predictor(setting, name, score), Path(cfg.out) / "rectify.pt"
    seconds = round(time.time() - started, 1)
    results, _ = rectify.evaluate(predict, setting.val, setting.segmenter.classes, cfg.label_base)
    if trained.is_file():
        beside = rectify.predictor(rectify.load_segmenter(trained))
        results |= rectify.evaluate(beside, setting.val, setting.segmenter.classes,
                                    cfg.label_base)[0]
    write_masks(predict, name, len(setting.T), [*setting.train, *setting.val], out / "masks")
    report = {"results": results, "loss": loss, "seconds": seconds, "config": asdict(cfg),
              "versions": rectify.versions()}
    rectify.write_text(out / "rivals.json", json.dumps(report, indent=1))
    rectify.save_figure(rectify.figure4(predict, setting.val, setting.segmenter.classes,
                                        cfg.label_base), out / "figure4.png")
    rectify.print_table(results, setting.segmenter.classes)
    print(f"{TITLES[name]}: {seconds:.0f} s. Wrote {out}/: masks/, figure4.png, rivals.json")
    return report


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rival", choices=list(RIVALS))
    parser.add_argument("--dataset", default="emoji", choices=list(rectify.RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clip", help="open_clip's name of the model, or local-dir:FOLDER")
    parser.add_argument("--pretrained", help="open_clip's tag of the weights, or a file")
    parser.add_argument("--out", help="folder (default runs/rivals/<dataset>-<rival>-<seed>)")
    typed = {name: v for name, v in vars(parser.parse_args(argv)).items() if v is not None}
    run_rival(typed.pop("rival"), **typed)


if __name__ == "__main__":
    rectify.run(main)
