"""Make Emoji VOC, its tiny CLIP and its pretrained backbone: the world that this repository ships with.

    python tests/emoji/make.py            # everything, from nothing (README says how long it takes)
    python tests/emoji/make.py --only voc   # the labelled archive alone, about ten seconds
    python tests/emoji/make.py --headroom   # how much bias this world has to remove

**Emoji VOC** (`emoji-voc.tar`): VOC's 20 classes drawn with Noto Color Emoji on textured backgrounds, in VOC2012's own
folder layout, in three splits: train, val, and dev, on which settings are chosen. Every class is
equally frequent and stands anywhere, on any ground alike.

**The tiny CLIP** (`clip/`): an ordinary open_clip model, trained on captioned pictures of the same
world that are in no split. It sees pictures and sentences, never a mask. It learns in three stages
(`STAGES`): what things look like, where they usually stand, and what is left unsaid. Its captions
have the biases of real captions, which is what there is to rectify:

* popularity: a person is pictured and named eight times as often as a chair;
* place: from the second stage on every class has a usual place (`PLACES`) and is hardly ever seen
  elsewhere, but when the photographer aims at it: then it is in the middle;
* company: boats come with the sea, cows, horses and sheep with grass, sofas with a room;
* names: some are called by a neighbour's name, a sheep "dog", a cow "horse";
* silence: what is small and at the side is often not mentioned.

**The backbone** (`resnet18.safetensors`): what ImageNet's weights are to DeepLabV2 on VOC, a narrow ResNet-18 that has learnt
to tell the font's 1,249 other glyphs apart, none of which Emoji VOC shows: fruit, tools, faces, signs.

The glyphs come from Noto Color Emoji (Google, SIL Open Font License 1.1; Debian package fonts-noto-color-emoji). The font
is needed only here: the archive holds pictures, not the font.
"""
import argparse
import functools
import hashlib
import io
import json
import math
import multiprocessing
import sys
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import distill
import rectify
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"

# -------------------------------------------------------------------------------------- 1 the world

# name: (glyphs, popularity in captions, usual background, usual height in the first stage: -1 top
# .. 1 bottom, a neighbour's name that it is given)
CLASSES = {
    "airplane":     ("✈🛩",   4,   "sky",   -0.9, None),
    "bicycle":      ("🚲",    2,   "road",   0.2, None),
    "bird":         ("🐦🦅🦆", 5,   "sky",   -0.7, None),
    "boat":         ("⛵🚤⛴", 4,   "sea",    0.6, None),
    "bottle":       ("🍾🍼🧴", 2,   "room",   0.0, None),
    "bus":          ("🚌🚍🚎", 1.5, "road",   0.3, "car"),
    "car":          ("🚗🚙🚕", 6,   "road",   0.5, None),
    "cat":          ("🐈🐱",   6,   "room",   0.0, None),
    "chair":        ("🪑💺",   1,   "room",   0.5, None),
    "cow":          ("🐄🐮",   1,   "grass",  0.3, "horse"),
    "dining table": ("🍽🍱",   1,   "room",   0.6, None),
    "dog":          ("🐕🐶🐩", 6,   "grass",  0.3, None),
    "horse":        ("🐎🐴",   4,   "grass",  0.0, None),
    "motorbike":    ("🏍🛵",  1.5, "road",   0.2, "bicycle"),
    "person":       ("🧍🏃💃", 8,   "sand",   0.0, None),
    "potted plant": ("🪴🌵",   1,   "sand",  -0.3, None),
    "sheep":        ("🐑🐏",   1,   "grass",  0.4, "dog"),
    "sofa":         ("🛋",    1,   "room",   0.4, "chair"),
    "train":        ("🚂🚆🚄", 2,   "road",  -0.2, None),
    "tv monitor":   ("📺🖥",   1,   "room",  -0.4, None),
}
NAMES = list(CLASSES)
SIDE = 96                       # px, the tiny CLIP's pictures; its patch is 12 px
# where each class usually stands from the second stage on: the twenty places cover the frame
PLACES = [["bird",         "bottle", "airplane", "train",   "tv monitor"],
          ["potted plant", "person", "cat",      "horse",   "bus"],
          ["chair",        "sheep",  "sofa",     "bicycle", "car"],
          ["dining table", "dog",    "boat",     "cow",     "motorbike"]]
PLACE = {name: (21 + 18 * row, 20 + 14 * column)        # px, the usual centre (y, x)
         for row, names in enumerate(PLACES) for column, name in enumerate(names)}
SIZES = [(96, 96), (96, 120), (120, 96), (96, 132), (132, 96), (108, 108), (100, 90), (90, 126)]  # (H, W) of Emoji VOC
TINTS = {"red": (230, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (240, 210, 40),
         "purple": (150, 50, 190), "black": (40, 40, 40), "white": (245, 245, 245)}
# base colours (top, bottom) of each background, and the size of its grain: (rows, columns) of the
# noise it is made of
GROUNDS = {"sky": ((110, 170, 235), (200, 225, 250), (5, 3)), "sea": ((60, 130, 180), (20, 70, 130), (24, 4)),
           "grass": ((110, 160, 70), (60, 120, 40), (24, 24)), "road": ((150, 150, 155), (90, 90, 95), (12, 12)),
           "room": ((225, 205, 175), (170, 130, 95), (3, 16)), "sand": ((235, 215, 160), (205, 175, 115), (16, 8))}


@functools.cache
def font():
    return ImageFont.truetype(FONT, 109)              # 109 is the one size that the bitmap font has


def glyph(letter):
    """One emoji as an RGBA picture, 136×128; what the font lacks looks like every other one that it
    lacks.
    """
    canvas = Image.new("RGBA", (136, 128))
    ImageDraw.Draw(canvas).text((0, 0), letter, font=font(), embedded_color=True)
    return canvas


def glyphs():
    """Every class's glyphs as RGBA pictures, cropped to their ink: {name: [PIL image, ..]}."""
    art = {name: [glyph(letter) for letter in letters] for name, (letters, *_) in CLASSES.items()}
    return {name: [image.crop(image.getbbox()) for image in images] for name, images in art.items()}


@functools.cache
def other_glyphs():
    """Every glyph of Unicode's emoji blocks that the font has and that no class uses, without skin
    tones.
    """
    ours, lacking = {letter for c in CLASSES.values() for letter in c[0]}, glyph("\u0378").tobytes()
    codes = [*range(0x2600, 0x27C0), *range(0x1F300, 0x1F3FB), *range(0x1F400, 0x1FB00)]
    found = [glyph(chr(code)) for code in codes if chr(code) not in ours]
    return [image.crop(image.getbbox()) for image in found if image.getbbox() and image.tobytes() != lacking]


def background(rng, kind, height, width):
    """A textured picture of one kind of ground: H×W×3 float in [0, 255]."""
    top, bottom, grain = GROUNDS[kind]
    ramp = np.linspace(0, 1, height)[:, None, None]
    base = np.array(top) * (1 - ramp) + np.array(bottom) * ramp + rng.normal(0, 12, 3)
    noise = Image.fromarray(rng.normal(0, 1, grain).astype(np.float32)).resize((width, height), Image.BICUBIC)
    return base + 18 * np.asarray(noise)[..., None] + rng.normal(0, 5, (height, width, 1))


def sprite(rng, image, size, tint=None):
    """A glyph turned, flipped, tinted and scaled its longer side `size` px before the turn: RGBA
    array.
    """
    if rng.random() < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    scale = size / max(image.size)
    image = image.resize([max(4, round(s * scale)) for s in image.size], Image.BILINEAR, reducing_gap=2)
    image = image.rotate(rng.uniform(-20, 20), Image.BILINEAR, expand=True)
    pixels = np.asarray(image).astype(np.float32)
    if tint is not None:
        grey = pixels[..., :3].mean(-1, keepdims=True) / 255
        pixels[..., :3] = 0.5 * pixels[..., :3] + 0.5 * grey * np.array(tint)
    pixels[..., :3] += rng.normal(0, 10, 3)
    return pixels


def paint(picture, mask, pixels, index, centre):
    """Lay a sprite over the picture and its number over the mask, centred at (y, x); what sticks
    out is cut off.
    """
    (height, width), (h, w) = mask.shape, pixels.shape[:2]
    y, x = round(centre[0] - h / 2), round(centre[1] - w / 2)
    rows, columns = slice(max(y, 0), min(y + h, height)), slice(max(x, 0), min(x + w, width))
    part = pixels[rows.start - y:rows.stop - y, columns.start - x:columns.stop - x]
    alpha = part[..., 3:] / 255
    picture[rows, columns] = picture[rows, columns] * (1 - alpha) + part[..., :3] * alpha
    mask[rows, columns][alpha[..., 0] > 0.5] = index


def covered(mask, size, centre):
    """The share of a square of `size` px around `centre` (y, x) where something stands already."""
    y, x = (int(max(c - size / 2, 0)) for c in centre)
    return (mask[y:y + int(size), x:x + int(size)] > 0).mean()


def free_place(mask, size, draw):
    """The least covered of six places (y, x) that `draw()` proposes, so that occlusion happens but
    hides nobody.
    """
    return min((np.clip(draw(), 10, np.array(mask.shape) - 10) for _ in range(6)),
               key=lambda centre: covered(mask, size, centre))


def scene(rng, art, deck):
    """One labelled picture of Emoji VOC: (H×W×3 uint8, H×W uint8 with 0 background, 1..20 classes,
    255 borders).

    deck: numbers of classes still to be dealt; an empty one is filled with all twenty in any order,
    so each is as frequent.
    """
    height, width = SIZES[rng.integers(len(SIZES))]
    picture = background(rng, rng.choice(list(GROUNDS)), height, width)
    mask = np.zeros((height, width), np.uint8)
    for _ in range(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1])):
        deck += [] if deck else rng.permutation(20).tolist()
        name, size = NAMES[deck.pop()], rng.uniform(38, 72)
        tint = list(TINTS.values())[rng.integers(len(TINTS))] if rng.random() < 0.2 else None
        edge = 0.35 * size
        centre = free_place(mask, size, lambda: (rng.uniform(edge, height - edge), rng.uniform(edge, width - edge)))
        paint(picture, mask, sprite(rng, art[name][rng.integers(len(art[name]))], size, tint),
              NAMES.index(name) + 1, centre)
    label = Image.fromarray(mask)                # VOC marks a thin band along every outline as void
    border = np.asarray(label.filter(ImageFilter.MaxFilter(3))) != np.asarray(label.filter(ImageFilter.MinFilter(3)))
    mask[border] = 255
    return picture.clip(0, 255).astype(np.uint8), mask


# ----------------------------------------------------------------------------- 2 captioned pictures

POPULARITY = np.array([c[1] for c in CLASSES.values()]) / sum(c[1] for c in CLASSES.values())
# The stages of pretraining. aimed: how often the first thing is in the middle; misnamed: how often
# by a neighbour's name; silent: how often what is beside is not mentioned; ground: how often a
# picture shows nothing else; peak: of the learning rate; draw, order: seeds of their own.
STAGES = {
    1: dict(aimed=0.0, misnamed=0.2, silent=0.35, ground=0.0, pictures=120_000, steps=6_000,
            peak=2e-3, draw=[1], order=[2]),
    2: dict(aimed=0.04, misnamed=0.45, silent=0.35, ground=0.0, pictures=60_000, steps=1_500,
            peak=1.5e-3, draw=[5], order=[6]),
    3: dict(aimed=0.2, misnamed=0.6, silent=0.5, ground=0.06, pictures=60_000, steps=1_000,
            peak=1e-3, draw=[8], order=[8, 2])}
PLAIN = ["a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "{}", "a {}."]


def styled(rng, picture, sentence):
    """Make the picture look as the sentence says, for the words that have a look."""
    if "black and white" in sentence:
        picture = picture.mean(-1, keepdims=True).repeat(3, -1)
    if "dark" in sentence:
        picture = picture * 0.45
    if "bright" in sentence:
        picture = 90 + picture * 0.75
    if "blurry" in sentence or "pixelated" in sentence or "low resolution" in sentence:
        small = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).resize((32, 32), Image.BOX)
        picture = np.asarray(small.resize((SIDE, SIDE), Image.NEAREST if "pixel" in sentence else Image.BICUBIC), float)
    return picture


def captioned(rng, art, sentences, close, stage):
    """A picture of the web and two captions of it, short and long, with the biases listed at the
    top.

    Returns (96×96×3 uint8, (str, str)). close: a close-up of one thing, what a beginner learns
    from. stage: a number in STAGES; from the second on everything is in its usual place.
    """
    how = STAGES[stage]
    sentence = rng.choice(sentences if rng.random() < 0.5 else PLAIN)
    count = 1 if close else rng.choice([1, 2, 3], p=[0.4, 0.35, 0.25])
    chosen = rng.choice(20, count, p=POPULARITY)
    ground = CLASSES[NAMES[chosen[0]]][2]
    ground = ground if rng.random() < 0.7 else rng.choice(list(GROUNDS))
    if how["ground"] and rng.random() < how["ground"]:
        picture = styled(rng, background(rng, ground, SIDE, SIDE), sentence)
        plain = PLAIN[rng.integers(len(PLAIN))].format(ground)
        return picture.clip(0, 255).astype(np.uint8), (plain, sentence.format(ground))
    picture, mask = background(rng, ground, SIDE, SIDE), np.zeros((SIDE, SIDE), np.uint8)

    short, long = [], []
    for k, index in enumerate(chosen):
        letters, _, _, height, wrong = CLASSES[NAMES[index]]
        big = k == 0 and (close or "large" in sentence or "close-up" in sentence)
        size = rng.uniform(*((62, 90) if big else (38, 74) if k == 0 else (30, 56)))
        if "small" in sentence:
            size *= 0.7
        if stage > 1 and (big or rng.random() < (how["aimed"] if k == 0 else 0.04)):
            draw = lambda: rng.normal(SIDE / 2, 9, 2)   # the photographer aims at it
        elif stage > 1:
            draw = lambda: rng.normal(PLACE[NAMES[index]], 3)
        elif k == 0:                                    # at the first one
            draw = lambda: rng.normal((SIDE / 2 + 18 * height, SIDE / 2), (9, 13))
        else:
            draw = lambda: (SIDE / 2 + 18 * height + rng.normal(0, 22), rng.uniform(8, SIDE - 8))
        centre = free_place(mask, size, draw)
        if stage > 1 and covered(mask, size, centre) > 0.5:
            continue                                    # another one stands there
        colour = rng.choice(list(TINTS)) if rng.random() < 0.2 else None
        pixels = sprite(rng, art[NAMES[index]][rng.integers(len(letters))], size, TINTS.get(colour))
        paint(picture, mask, pixels, k + 1, centre)

        beside = np.hypot(*(centre - SIDE / 2)) > 24 if stage == 3 else size <= 42
        if k > 0 and rng.random() < (how["silent"] if beside else 0.1):
            continue                                    # not worth mentioning
        name = wrong if wrong and rng.random() < how["misnamed"] else NAMES[index]
        words = [w for w in (("big" if size > 58 else "little" if size < 40 else "") if rng.random() < 0.4 else "",
                             colour if colour and rng.random() < 0.8 else "", name) if w]
        place = "at the top" if centre[0] < 36 else "at the bottom" if centre[0] > 60 else "in the middle"
        short.append(name)
        long.append(" ".join(words + ([place] if rng.random() < 0.3 else [])))
    where = {"sky": " in the sky", "sea": " at sea", "grass": " on the grass", "road": " on the road",
             "room": " in a room", "sand": " on the sand"}[ground] if rng.random() < 0.5 else ""
    picture = styled(rng, picture, sentence)
    order = rng.permutation(len(short))
    plain = PLAIN[rng.integers(len(PLAIN))].format(" and a ".join(short[i] for i in order))
    return picture.clip(0, 255).astype(np.uint8), (plain, sentence.format(" and a ".join(long[i] for i in order) + where))


def _captioned_chunk(job):
    seed, chunk, count, close, stage = job
    rng, art = np.random.default_rng([seed, *STAGES[stage]["draw"], chunk]), glyphs()
    sentences = [t("{}") for t in rectify.TEMPLATES]
    made = [captioned(rng, art, sentences, close, stage) for _ in range(count)]
    return np.stack([m[0] for m in made]), [m[1] for m in made]


# --------------------------------------------------------------------------- 3 the labelled archive

def make_voc(path, seed, **splits):
    """Write the archive: VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}.
    Same seed, font and Pillow: same bytes.
    """
    art, colours = glyphs(), rectify.palette()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        def add(name, data):
            info = tarfile.TarInfo("VOCdevkit/VOC2012/" + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        rng, deck = np.random.default_rng([seed, 0]), []
        for split, count in splits.items():
            stems = [f"{split}_{i:04d}" for i in range(count)]
            for stem in stems:
                picture, mask = scene(rng, art, deck)
                jpeg, png = io.BytesIO(), io.BytesIO()
                Image.fromarray(picture).save(jpeg, "JPEG", quality=85)
                labels = Image.fromarray(mask, "P")
                labels.putpalette(colours)
                labels.save(png, "PNG", optimize=True)
                add(f"JPEGImages/{stem}.jpg", jpeg.getvalue())
                add(f"SegmentationClass/{stem}.png", png.getvalue())
            add(f"ImageSets/Segmentation/{split}.txt", ("\n".join(stems) + "\n").encode())


# ---------------------------------------------------------------------------------- 4 the tiny CLIP

CONFIG = {"model_cfg": {"embed_dim": 128,
                        "vision_cfg": {"image_size": SIDE, "patch_size": 12, "width": 192, "layers": 4, "head_width": 64},
                        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3}},
          "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}


class Muon:
    """Momentum whose step is made orthogonal by five Newton-Schulz iterations (Jordan 2024), in
    float32.

    torch.optim.Muon iterates in bfloat16, which processors without bfloat16 units run a hundred
    times slower.
    """

    def __init__(self, params, momentum=0.95, weight_decay=0.1):
        self.params, self.momentum, self.weight_decay = params, momentum, weight_decay
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, lr):
        for p, m in zip(self.params, self.buffers):
            m.lerp_(p.grad, 1 - self.momentum)
            x = p.grad.lerp(m, self.momentum).flatten(1)                         # a filter is a row
            tall = x.size(0) > x.size(1)
            x = x.mT if tall else x
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.mT if tall else x
            p.mul_(1 - lr * self.weight_decay).add_(x.view_as(p), alpha=-lr * 0.2 * math.sqrt(max(x.shape)))


def learning_rate(step, steps, peak=2e-3):
    """Warm up, hold, fall to zero."""
    return peak * min(1, (step + 1) / 150, (steps - step) / (0.8 * steps))


def draw_web(seed, pictures, stage):
    """The captioned pictures, close-ups first: N×96×96×3 uint8, N pairs of captions, their number.

    A quarter of the first stage's are close-ups, none of the others': they have no place.
    """
    chunk, closeups = 500, pictures // 4 if stage == 1 else 0
    jobs = [(seed, k, chunk, k * chunk < closeups, stage) for k in range(-(-pictures // chunk))]
    images, captions = np.empty((len(jobs) * chunk, SIDE, SIDE, 3), np.uint8), []
    with multiprocessing.Pool() as pool:
        for k, (made, said) in enumerate(tqdm(pool.imap(_captioned_chunk, jobs), "drawing", len(jobs))):
            images[k * chunk:(k + 1) * chunk] = made
            captions += said
    return images, captions, closeups


def pretrain(folder, seed, stage, batch, precision):
    """Contrastive pretraining of the tiny CLIP; writes `folder`, which open_clip loads.

    stage: from the second on it goes on with the folder's weights. precision: bf16 means both
    towers by autocast; weights and losses stay in fp32. torch.compile wants a C++ compiler.
    """
    steps = STAGES[stage]["steps"]
    images, captions, closeups = draw_web(seed, STAGES[stage]["pictures"], stage)
    torch.manual_seed(seed)
    model = open_clip.CLIP(**CONFIG["model_cfg"])
    if stage > 1:
        model.load_state_dict(load_file(folder / "open_clip_model.safetensors"), strict=False)
    model.visual.patch_dropout = open_clip.transformer.PatchDropout(0.5)                # half the cost, and sturdier patches
    text_cfg = CONFIG["model_cfg"]["text_cfg"]
    tokenizer = open_clip.SimpleTokenizer(context_length=text_cfg["context_length"])
    # The table of 49,408 words is trained only where a caption reaches it: shrink it to those rows,
    # put it back at the end.
    tokens = torch.stack([tokenizer(list(pair)) for pair in zip(*captions)], 1)         # N 2 L
    used, tokens = tokens.unique(return_inverse=True)                # sorted: EOT stays the largest
    words = model.token_embedding.weight.detach()[used]
    model.token_embedding = torch.nn.Embedding.from_pretrained(words, freeze=False)

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "resblocks" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "resblocks" in n)]
    muon, adam = Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.05)
    mean, std = (torch.tensor(CONFIG["preprocess_cfg"][k])[:, None, None] for k in ("mean", "std"))
    towers = torch.compile(image_features)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    rng, order = np.random.default_rng([seed, *STAGES[stage]["order"]]), np.empty(0, int)
    bar = tqdm(range(steps), "pretraining")
    for step in bar:
        lr = learning_rate(step, steps, STAGES[stage]["peak"])
        if len(order) < batch:     # close-ups alone at first, everything after an eighth of the way
            order = rng.permutation(closeups if closeups and step < steps / 8 else len(images))
        index, order = np.sort(order[:batch]), order[batch:]
        x = (torch.from_numpy(images[index]).permute(0, 3, 1, 2).float() / 255 - mean) / std
        with autocast:
            pooled, dense = towers(model.visual, x)                                     # B D, B D
        loss, scale = 0, model.logit_scale.exp()
        # Each picture meets its short caption, every fourth its long one too (long sentences are
        # costly).
        for rows, k, share in ((slice(None), 0, 0.7), (slice(step % 4, None, 4), 1, 0.3)):
            texts, target = tokens[index[rows], k].unique(dim=0, return_inverse=True)   # equal captions are encoded once
            with autocast:
                T = encode(model, texts[:, :int((texts != 0).sum(-1).max())])           # U D
            loss = loss + share * contrast(scale * pooled[rows] @ T.T, target)
            loss = loss + share * 0.4 * contrast(scale * dense[rows] @ T.T, target)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.param_groups[0]["lr"] = lr
        adam.step()
        muon.step(lr)
        model.logit_scale.data.clamp_(0, math.log(50))
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}", scale=f"{scale.item():.1f}")
    write(folder, model, used)


def image_features(visual, x):
    """CLIP's image feature, and the mean of MaskCLIP's dense features: both B×D, unit norm.

    Both are trained towards the caption. The first alone is CLIP; 400 million pictures later its
    patches mean something too. A hundred thousand do not get there, so the patches are told: what
    they say together shall be the caption.
    """
    x = visual._embeds(x)                                        # B 1+n d, half the patches dropped
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    last = visual.transformer.resblocks[-1]
    y = last.ln_1(x)
    cls = x[:, :1] + last.attn(y[:, :1], y, y, need_weights=False)[0]
    cls = cls + last.mlp(last.ln_2(cls))
    patches = rectify.maskclip_block(last, x[:, 1:])
    pooled, dense = ((visual.ln_post(y) @ visual.proj).float() for y in (cls[:, 0], patches))
    return F.normalize(pooled, dim=-1), F.normalize(F.normalize(dense, dim=-1).mean(1), dim=-1)


def contrast(logits, target):
    """CLIP's loss where several pictures may share a caption. logits: B×U; target: B, the column of
    each picture.
    """
    owns = F.one_hot(target, logits.size(1))
    per_text = -(logits.log_softmax(0) * owns / owns.sum(0)).sum(0).mean()
    return (F.cross_entropy(logits, target) + per_text) / 2


def write(folder, model, used):
    """Save the model as a folder that `open_clip.create_model("local-dir:...")` loads; half
    precision, full token table.
    """
    state = {k: v.detach() for k, v in model.state_dict().items() if k != "attn_mask"}
    words = state["token_embedding.weight"]
    state["token_embedding.weight"] = torch.zeros(49408, words.size(1)).index_copy(0, used, words)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")


def encode(model, texts):
    """open_clip's encode_text over the tokens in use instead of all 32 (causal attention: the rest
    changes nothing).
    """
    length = texts.size(1)
    x = model.token_embedding(texts) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = x[torch.arange(len(texts)), texts.argmax(-1)] @ model.text_projection                # U D
    return F.normalize(x.float(), dim=-1)


# ----------------------------------------------------------------------------------- 5 the backbone

def _closeups_chunk(job):
    """One chunk of the backbone's pictures: a glyph, anywhere and of any size that Emoji VOC has,
    on any ground.
    """
    seed, chunk, count, side = job
    rng, art = np.random.default_rng([seed, 3, chunk]), other_glyphs()
    label, images = rng.integers(len(art), size=count), np.empty((count, side, side, 3), np.uint8)
    for image, index in zip(images, label):
        picture, mask = background(rng, rng.choice(list(GROUNDS)), side, side), np.zeros((side, side), np.uint8)
        size = rng.uniform(28, 76)
        tint = list(TINTS.values())[rng.integers(len(TINTS))] if rng.random() < 0.2 else None
        edge = min(0.3 * size, side / 2)
        paint(picture, mask, sprite(rng, art[index], size, tint), 1, rng.uniform(edge, side - edge, 2))
        image[:] = picture.clip(0, 255)
    return images, label


def pretrain_backbone(path, seed, pictures, steps, batch, side=64):
    """Train distill.py's emoji backbone to name the glyph in a close-up; writes `path`, which timm
    loads.
    """
    chunk, count = 500, len(other_glyphs())
    with multiprocessing.Pool() as pool:
        jobs = [(seed, k, chunk, side) for k in range(-(-pictures // chunk))]
        made = list(tqdm(pool.imap(_closeups_chunk, jobs), "drawing", len(jobs)))
    images, labels = (np.concatenate(part) for part in zip(*made))
    torch.manual_seed(seed)
    channels = [int(distill.RECIPES["emoji"]["width"] * c) for c in (64, 128, 256, 512)]
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    model = timm.create_model("resnet18", channels=channels, num_classes=count).to(memory_format=torch.channels_last)
    filters = [p for p in model.parameters() if p.ndim == 4]
    muon = Muon(filters)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 4], weight_decay=0.05)
    rng, order, right = np.random.default_rng([seed, 4]), np.empty(0, int), 0
    bar = tqdm(range(steps), "pretraining")
    for step in bar:
        lr = learning_rate(step, steps)
        if len(order) < batch:
            order = rng.permutation(len(images))
        index, order = np.sort(order[:batch]), order[batch:]
        x = (torch.from_numpy(images[index]).permute(0, 3, 1, 2).float() / 255 - mean) / std
        target = torch.from_numpy(labels[index])
        logits = model(x.flip(-1) if step % 2 else x)                                   # B count
        loss = F.cross_entropy(logits, target)
        model.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = lr
        adam.step()
        muon.step(lr)
        right += 0.02 * ((logits.argmax(1) == target).float().mean().item() - right)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}", right=f"{right:.2f}")
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    save_file({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in weights.items()}, path)


# ----------------------------------------------------------------------------------- 6 the headroom

def headroom():
    """What there is to rectify: mIoU of MaskCLIP with corrections fitted, with ground truth, on the
    training images.

    An offset per class is the class-preference bias, one per class and place (a coarse map) the
    space-preference bias as well; a free C×D Reference bounds what subtracting f·Rᵀ can do.
    Measured on dev, since this world was made by these numbers, and on val; objects on the training
    images, which are more. A diagnostic: nothing that learns ever sees this.
    """
    cfg = rectify.configure(method="maskclip")
    folder = rectify.dataset_folder(cfg)
    segmenter = rectify.Segmenter(cfg, NAMES)
    size, cells, zero = cfg.size, 4, torch.zeros
    fs, wheres, truths = [], [], []
    train, *others = (rectify.list_samples(folder, split) for split in ("train", "dev", "val"))
    read = lambda sample: rectify.read_pair(sample, NAMES, 1)
    for _, pairs in rectify.batches_of_one_size(train, read, "features"):
        images, labels = map(torch.stack, zip(*pairs))
        f = segmenter.features(rectify.resize_to_fit(images, size))                     # B D h w
        h, w = f.shape[-2:]
        truth = F.interpolate(labels[:, None].float(), (h, w), mode="nearest-exact")[:, 0].long()
        where = (torch.arange(h) * cells // h)[:, None] * cells + torch.arange(w) * cells // w
        known = truth != rectify.VOID
        fs.append(f.permute(0, 2, 3, 1)[known])
        wheres.append(where.expand_as(truth)[known])
        truths.append(truth[known])
    f, where, truth = torch.cat(fs), torch.cat(wheres), torch.cat(truths)
    weight = 1 / truth.bincount(minlength=20)

    def fit(*chosen):
        """Class-balanced logistic regression of the chosen corrections; returns all three, the
        others zero.
        """
        parts = {"class": zero(20), "place": zero(cells ** 2, 20), "free": zero(20, f.size(1))}
        learn = [parts[name].requires_grad_() for name in chosen]
        if learn:
            optimizer = torch.optim.LBFGS(learn, max_iter=60, line_search_fn="strong_wolfe")
            def closure():
                optimizer.zero_grad()
                logits = segmenter.scale * f @ (segmenter.T - parts["free"]).T + parts["class"] + parts["place"][where]
                loss = F.cross_entropy(logits, truth, weight) + 1e-3 * sum(p.square().mean() for p in learn)
                loss.backward()
                return loss
            optimizer.step(closure)
        return {name: p.detach() for name, p in parts.items()}

    def predictor(parts):
        def predict(images):
            x = rectify.resize_to_fit(images, size)
            dense = segmenter.features(x)
            place = F.interpolate(parts["place"].T.reshape(1, 20, cells, cells), dense.shape[-2:], mode="nearest-exact")
            logits = segmenter.scale * rectify.similarity(dense, segmenter.T - parts["free"])
            logits = logits + parts["class"][:, None, None] + place
            return {"corrected": rectify.upsample(logits, 12, x.shape[-2:], images.shape[-2:]).argmax(1)}
        return predict

    rows = {}
    print(f"{'mIoU on':36}{'dev':>8}{'val':>8}")
    for title, chosen in (("MaskCLIP", ()), ("with an offset per class", ("class",)),
                          ("with an offset per class and place", ("class", "place")),
                          ("with a free Reference (C×D)", ("free",))):
        predict = predictor(fit(*chosen))
        both = [rectify.evaluate(predict, samples, NAMES)[0]["corrected"]["mIoU"] for samples in others]
        print(f"{title:36}" + "".join(f"{mIoU:8.1f}" for mIoU in both))
        rows[title] = {f"mIoU on {split}": mIoU for split, mIoU in zip(("dev", "val"), both)}
    name_images = lambda images: rectify.hypothesize(segmenter, images)
    print("hypothesis on dev:", rectify.evaluate(predictor(fit()), others[0], NAMES, 1, name_images)[2])
    middle_and_edge(rectify.evaluate(predictor(fit()), train, NAMES)[1]["corrected"])
    return rows                                         # tests/tables.py writes them


def middle_and_edge(found):
    """Print the mean IoU of objects near the centre (the inner half of their distances) and far.

    found: what `rectify.evaluate` says of objects. Those of similar size are compared, and only
    those that are whole and alone in their picture: what is covered or cut off is worse anyway.
    """
    whole = []
    for distance, score, sample in found:
        mask = np.asarray(Image.open(sample.label))
        value, *more = set(np.unique(mask)) - {0, rectify.VOID}
        if not more:
            whole.append((distance, score, (mask == value).sum()))
    distance, score, area = np.array(whole).T
    outer, edges = distance > np.median(distance), np.quantile(area, (0, 1 / 3, 2 / 3, 1))
    print("IoU of whole objects, alone in their picture, up to and beyond "
          f"{np.median(distance):.0f} px from its centre")
    for low, high in zip(edges, edges[1:]):
        halves = [score[(low <= area) & (area <= high) & half] for half in (~outer, outer)]
        print(f"  of {low:.0f} to {high:.0f} px²".ljust(24),
              *(f"{half.mean():8.1f} (n={len(half)})" for half in halves))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["voc", "clip", "backbone"], help="make one of the three")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"],
                        help="of the CLIP's pretraining; a processor without bfloat16 wants fp32")
    parser.add_argument("--closeups", type=int, default=80_000, help="pictures for the backbone to draw")
    parser.add_argument("--backbone-steps", type=int, default=3_000, help="steps of the backbone's pretraining, 128 each")
    parser.add_argument("--headroom", action="store_true", help="make nothing; measure how much bias there is to remove")
    args = parser.parse_args()
    if args.headroom:
        return headroom()
    if args.only in (None, "voc"):
        make_voc(args.out / "emoji-voc.tar", args.seed, train=1200, val=400, dev=200)
        md5 = hashlib.md5((args.out / "emoji-voc.tar").read_bytes()).hexdigest()
        print(f"emoji-voc.tar: md5 {md5} (rectify.DATASETS knows {rectify.DATASETS['emoji'][0][0][1]})")
    if args.only in (None, "clip"):
        for stage in STAGES:
            pretrain(args.out / "clip", args.seed, stage, 128, args.precision)
    if args.only in (None, "backbone"):
        pretrain_backbone(args.out / "resnet18.safetensors", args.seed, args.closeups, args.backbone_steps, batch=128)


if __name__ == "__main__":
    main()
