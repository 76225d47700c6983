"""What rectify.py promises, in its own order: equations are compared with slow loops, CLIP with
open_clip's, and what trains does so on 24 images (`mini`).

    python -m pytest -q tests/test_rectify.py           # with -m slow: what takes minutes
"""
import inspect
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from types import SimpleNamespace
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import noise, own, run, write_mask
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2

import rectify
from rectify import VOC_NAMES, VOID, Config, Segmenter, UserError, configure, main

METHODS = ["reclip", "reclip++"]

# of a run's folder: what was learned, the log, the numbers; and whether tensors are bitwise equal
weights = lambda out: torch.load(out / "rectify.pt", weights_only=True)["rectifier"]
log = lambda out: [json.loads(line) for line in (out / "rectify.jsonl").read_text().splitlines()]
results = lambda out: json.loads((out / "rectify.json").read_text())["results"]
same = lambda a, b: a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# ===================================================================== CLIP is open_clip's own CLIP
def smaller(name):
    """open_clip's settings of a model, with two narrow layers in both towers."""
    config = open_clip.get_model_config(name)
    config["vision_cfg"] |= dict(layers=2, width=64, head_width=32)
    if "ls_init_value" in config["vision_cfg"]:
        config["vision_cfg"]["ls_init_value"] = 0.5     # LayerScale, as after a training
    config["text_cfg"] |= dict(layers=2, width=48, heads=2)
    return config

@pytest.fixture(scope="module")
def towers(tiny):
    """CLIPs by name: the tiny one, and VOC's and one with LayerScale with random weights."""
    torch.manual_seed(0)
    large = open_clip.create_model("ViT-B-16-quickgelu", force_custom_text=True).eval()
    layerscale = open_clip.model.CustomTextCLIP(**smaller("ViT-M-16-alt")).eval()
    for clip in (large, layerscale):
        nn.init.normal_(clip.visual.positional_embedding, std=0.1)
    return {"tiny": tiny[0], "ViT-B-16-quickgelu": large, "LayerScale": layerscale}

@pytest.mark.parametrize("name", ["tiny", "ViT-B-16-quickgelu", "LayerScale"])
@torch.no_grad()
def test_the_towers_are_open_clips(towers, name):
    """CLIP's own attention gives open_clip's image feature; `maskclip_block` is the block in which
    a token sees itself alone; PE on its own grid is open_clip's to the bit."""
    visual, x = towers[name].visual, torch.randn(2, 3, *towers[name].visual.image_size)
    assert torch.allclose(rectify.encode_image(towers[name], x, "clip"),
                          towers[name].encode_image(x, normalize=True), atol=1e-5)
    block, tokens = visual.transformer.resblocks[-1], torch.randn(2, 5, visual.conv1.out_channels)
    expected = block(tokens, attn_mask=torch.full((5, 5), -torch.inf).fill_diagonal_(0))
    assert torch.allclose(rectify.maskclip_block(block, tokens), expected, atol=1e-4)
    h, w = visual.grid_size
    PE = rectify.positional_embedding(towers[name], (h, w))
    for i, j in [(0, 0), (0, w - 1), (h - 1, 0), (h // 2, w // 3)]:
        assert torch.equal(PE[0, :, i, j], visual.positional_embedding[1 + i * w + j])
    assert rectify.positional_embedding(towers[name], (h + 3, w - 2)).shape[2:] == (h + 3, w - 2)

def slow_dense(clip, x, attention):
    """f of one image of CLIP's own size: a loop over patches, heads and tokens, from the papers."""
    visual = clip.visual
    p, (h, w), block = visual.patch_size[0], visual.grid_size, visual.transformer.resblocks[-1]
    tokens = [visual.class_embedding + visual.positional_embedding[0]]
    for i, j in itertools.product(range(h), range(w)):
        patch = x[:, i * p:(i + 1) * p, j * p:(j + 1) * p]
        tokens.append((visual.conv1.weight * patch).sum((1, 2, 3))
                      + visual.positional_embedding[1 + i * w + j])
    x = visual.ln_pre(torch.stack(tokens))
    for earlier in visual.transformer.resblocks[:-1]:
        x = earlier(x[None])[0]
    W, b = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
    q, k, v = ([W[s] @ block.ln_1(token) + b[s] for token in x] for s in range(3))
    d, at, f = len(v[0]) // block.attn.num_heads, lambda m: divmod(m - 1, w), []
    for n in range(1, len(x)):
        parts = []
        for head in (slice(s, s + d) for s in range(0, len(v[0]), d)):
            scores = lambda u: torch.stack([u[n][head] @ other[head] for other in u]) / math.sqrt(d)
            if attention == "maskclip":
                A = F.one_hot(torch.tensor(n), len(x))
            elif attention == "sclip":
                A = scores(q).softmax(0) + scores(k).softmax(0)
            elif attention == "clearclip":
                A = scores(q).softmax(0)
            elif attention == "naclip":
                near = [math.exp(-math.dist(at(n), at(m)) ** 2 / 50) for m in range(1, len(x))]
                A = (scores(k) + torch.tensor([0.] + near)).softmax(0)
            parts.append(sum(a * value[head] for a, value in zip(A, v)))
        y = block.attn.out_proj(torch.cat(parts))
        if attention in ("maskclip", "sclip"):
            y = y + x[n]
            y = y + block.mlp(block.ln_2(y))
        y = visual.ln_post(y) @ visual.proj
        f.append(y / y.norm())
    return torch.stack(f).T.view(-1, h, w)

@pytest.mark.parametrize("attention", Config.__annotations__["attention"].__args__)
@torch.no_grad()
def test_dense_features_equal_a_loop_over_tokens(tiny, attention):
    """On CLIP's own grid. On any other size f has unit norm, and the last patch of a row or column
    is filled with 0, the mean colour."""
    clip = tiny[0]
    p, x = clip.visual.patch_size[0], torch.randn(1, 3, *clip.visual.image_size)
    f = rectify.encode_image(clip, x, attention)[0]
    assert torch.allclose(f, slow_dense(clip, x[0], attention), atol=1e-4)
    for H, W in [(2 * p + 1, 5 * p - 1), (7, 5)]:
        x, h, w = torch.randn(2, 3, H, W), math.ceil(H / p), math.ceil(W / p)
        f, whole = rectify.encode_image(clip, x, attention), torch.zeros(2, 3, h * p, w * p)
        whole[..., :H, :W] = x
        assert f.shape == (2, clip.visual.proj.size(1), h, w)
        assert torch.allclose(f.norm(dim=1), torch.ones(()), atol=1e-5)
        assert torch.allclose(f, rectify.encode_image(clip, whole, attention), atol=1e-5)

def test_text_features_are_unit_means_of_85_sentences(tiny):
    """Each row is the direction of the mean of 85 unit text features; synonyms are averaged."""
    sentences = [template("dog") for template in rectify.TEMPLATES]
    assert len(set(sentences)) == 85 and all("dog" in s for s in sentences)
    T = rectify.text_features(*tiny, ["cat", "dog", "cat, dog"])
    with torch.no_grad():
        features = tiny[0].encode_text(tiny[1](sentences), normalize=True)
    assert torch.allclose(T[1], F.normalize(features.mean(0), dim=0), atol=1e-5)
    assert torch.allclose(T[2], F.normalize(T[0] + T[1], dim=0), atol=1e-6)

@pytest.mark.parametrize("prompt", ["shared", "per-class"])
@torch.no_grad()
def test_the_reference_prompt_goes_through_the_true_text_encoder(tiny, prompt):
    """With a sentence's embeddings in place of the learnable tokens, R is open_clip's encode_text
    of sentence and name; the prompt fills the context and cuts no name."""
    clip, tokenizer = tiny
    names, starts = ["dog", "potted plant"], ["a picture of one small red"] * 2
    if prompt == "per-class":
        starts[1] = "there is no very large blue"
    (tokens, L), embed = rectify.name_tokens(clip, tokenizer, names), clip.text.token_embedding
    V = torch.stack([embed(tokenizer([s])[0, 1:1 + len(s.split())]) for s in starts])
    R = rectify.reference_features(clip, V[0] if prompt == "shared" else V, tokens)
    theirs = clip.encode_text(tokenizer([f"{s} {n}" for s, n in zip(starts, names)]))
    assert torch.allclose(R, theirs, atol=1e-5)
    assert (tokens == tokenizer(["dog"]).max()).any(1).all(), "a name lost its end"
    assert 1 + L + tokens.size(1) == len(clip.text.positional_embedding)
    with pytest.raises(UserError, match="very very.*too long"):
        rectify.name_tokens(clip, tokenizer, ["dog", "very " * 90 + "old dog"])

# ========================================================================= equations are slow loops
@pytest.fixture
def case():
    """Random f, T, R, y, masks and padding: B=3 C=3 D=4, 3×5 patches."""
    g = torch.Generator().manual_seed(1)
    f = F.normalize(torch.randn(3, 4, 3, 5, generator=g), dim=1)
    T, R = F.normalize(torch.randn(3, 4, generator=g), dim=1), torch.randn(3, 4, generator=g)
    M = F.one_hot(torch.randint(2, (3, 3, 5), generator=g), 3).movedim(3, 1).float()    # none of 2
    valid = torch.ones(3, 3, 5, dtype=torch.bool)
    valid[1, 2], valid[1, :, 3:] = False, False
    y = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])
    return SimpleNamespace(f=f, T=T, R=R, M=M, valid=valid, y=y, B=3, C=3, D=4, h=3, w=5)

def test_the_loss_equals_a_loop(case):
    """The mean over an image's classes of CE(scale · z·Tᵀ, c), then over images, also those without
    a class; z is the mean over the grid of masked features, without padding."""
    scale, total = 12.5, 0
    for b in range(case.B):
        losses = []
        for c in case.y[b].nonzero()[:, 0].tolist():
            z, patches = torch.zeros(case.D), 0
            for i, j in itertools.product(range(case.h), range(case.w)):
                if case.valid[b, i, j]:
                    z, patches = z + case.M[b, c, i, j] * case.f[b, :, i, j], patches + 1
            e = [math.exp(scale * float(z / patches @ case.T[k])) for k in range(case.C)]
            losses.append(-math.log(e[c] / sum(e)))
        total += sum(losses) / max(1, len(losses)) / case.B
    z = rectify.pool(case.M, case.f, case.valid)
    loss = rectify.contrastive_loss(z, case.T, case.y, scale)
    assert loss.item() == pytest.approx(total, rel=1e-5)

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("space", ["on", "off"])
def test_rectified_logits_equal_a_loop(case, method, space):
    """ReCLIP: f·Tᵀ − B, B = f·Rᵀ + P. ReCLIP++: the decoder of [f; f·Tᵀ − B], B = P·Rᵀ. With
    space off P is gone."""
    torch.manual_seed(0)
    model = rectify.ReCLIP if method == "reclip" else rectify.ReCLIPpp
    rectifier = model(torch.zeros(2, 5), d=6, D=case.D, C=case.C, space=space == "on").eval()
    PE = torch.randn(1, 6, case.h, case.w)
    rectified = torch.zeros(case.B, case.C, case.h, case.w)
    with torch.no_grad():
        P = rectifier.g(PE)[0]
        for b, c, i, j in itertools.product(*map(range, rectified.shape)):
            f, place = case.f[b, :, i, j], P[:, i, j] * (space == "on")
            B = f @ case.R[c] + place[c] if method == "reclip" else place @ case.R[c]
            rectified[b, c, i, j] = f @ case.T[c] - B
        if method == "reclip++":
            rectified = rectifier.decoder(torch.cat([case.f, rectified], 1))
        assert torch.allclose(rectifier(case.f, case.T, case.R, PE), rectified, atol=1e-5)
    assert P.abs().max() > 0.01, "a P of 0 would show nothing"

@pytest.mark.parametrize("start", ["ours", "authors"])
def test_the_space_bias_at_the_start(case, start):
    """ReCLIP: P ≥ 0, and all of g has a gradient; with `ours` P is far smaller than f·T's spread.
    ReCLIP++: P is 0 with `ours`, else small, PyTorch's own start of a convolution."""
    torch.manual_seed(0)
    PE, d = torch.randn(1, 768, case.h, case.w), 768
    reclip, reclip_pp = (model(torch.zeros(2, 5), d=d, D=case.D, C=case.C, start=start)
                         for model in (rectify.ReCLIP, rectify.ReCLIPpp))
    P, Q = reclip.g(PE), reclip_pp.g(PE)
    assert P.min() == 0 and P.max() > 0 and (P.max() < 0.1) == (start == "ours")
    P.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in reclip.g.parameters())
    assert Q.abs().max() == 0 if start == "ours" else 0.3 < Q.std() < 0.9

@pytest.mark.parametrize("prompt", ["shared", "per-class"])
@pytest.mark.parametrize("start", ["ours", "authors"])
def test_the_prompt_at_the_start(tiny, prompt, start):
    """The authors' tokens are all CLIP's word 0; ours are random. R has Frobenius norm 1."""
    segmenter = Segmenter(configure(prompt=prompt, start=start), VOC_NAMES)
    V, R = segmenter.rectifier.V, segmenter.reference()
    word = tiny[0].text.token_embedding.weight[0]
    assert (V == word).all() == (start == "authors") and V.requires_grad
    assert V.shape[:-2] == (() if prompt == "shared" else (20,))
    raw = rectify.reference_features(segmenter.clip, V, segmenter.tokens)
    assert R.square().sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(R / R[0, 0], raw / raw[0, 0], rtol=1e-3, atol=1e-4)

def test_gumbel_masks_are_one_hot(case):
    """One class a patch; at a large α the best one, at a small one as often as its softmax says;
    and the gradient passes through."""
    torch.manual_seed(0)
    logits = torch.randn(case.B, case.C, case.h, case.w, requires_grad=True)
    M = rectify.gumbel_mask(logits, 1.0)
    assert torch.allclose(M, F.one_hot(M.argmax(1), case.C).permute(0, 3, 1, 2).float(), atol=1e-6)
    M[:, 0].sum().backward()
    assert (logits.grad != 0).any()
    assert torch.equal(rectify.gumbel_mask(logits, 1e6).argmax(1), logits.argmax(1))
    often = rectify.gumbel_mask(logits.detach().repeat(2000, 1, 1, 1), 2.0).unflatten(0, (2000, -1))
    assert torch.allclose(often.mean(0), (2 * logits).softmax(1), atol=0.06)

def test_denoising_drops_what_is_nowhere_probable():
    """A class whose best probability in the image stays below `least` gets -1e4; where all would
    go, all stay."""
    logits = torch.tensor([
        [[[5., 0.]], [[0., 5.]], [[1., 1.]]],           # 0 and 1 each sure of a pixel, 2 nowhere
        [[[.1, .1]], [[.1, .1]], [[.1, .1]]]])          # nobody sure of anything
    clean = rectify.denoise(logits, 1.0, 0.5)
    assert torch.equal(clean[0, :2], logits[0, :2]) and (clean[0, 2] == -1e4).all()
    assert torch.equal(clean[1], logits[1])
    assert torch.equal(rectify.denoise(logits, 1.0, 0), logits)                     # 0 is off
    assert (rectify.denoise(logits, 0.1, 0.5) == logits).all(), "sharpness is not used"

def bilinear(a, H, W):
    """A h×w array at H×W: bilinear between pixel centres, by hand."""
    (h, w), out = a.shape, np.empty((H, W))
    for i, j in itertools.product(range(H), range(W)):
        y, x = (min(max((k + 0.5) * n / N - 0.5, 0), n - 1) for k, n, N in ((i, h, H), (j, w, W)))
        y0, x0 = int(y), int(x)
        y1, x1, dy, dx = min(y0 + 1, h - 1), min(x0 + 1, w - 1), y - y0, x - x0
        top = (1 - dx) * a[y0, x0] + dx * a[y0, x1]
        out[i, j] = (1 - dy) * top + dy * ((1 - dx) * a[y1, x0] + dx * a[y1, x1])
    return out

def test_upsampling_in_two_steps():
    """Grid -> resized image (padding cut off) -> original size, each bilinear."""
    logits = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    for original in [(31, 17), (8, 9)]:
        big = rectify.upsample(logits, 4, (11, 14), original)
        for c in range(2):
            by_hand = bilinear(bilinear(logits[0, c].numpy(), 12, 16)[:11, :14], *original)
            np.testing.assert_allclose(big[0, c].numpy(), by_hand, atol=1e-5)

@pytest.mark.parametrize("words, threshold", [(0, 0), (2, 0), (0, 0.5), (2, 0.5)])
def test_decide_equals_a_loop_over_pixels(monkeypatch, words, threshold):
    """The best class of each pixel. Where a background word is best, or no class is as probable as
    the threshold, background, the value behind the classes. A huge mask is enlarged."""
    C, sharpness, resized, original = 3, 2.0, (11, 14), (24, 34)
    logits = torch.randn(2, C + words, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2, *original)
    full = rectify.upsample(logits, 4, resized, original)
    for b, i, j in itertools.product(*map(range, expected.shape)):
        e = [math.exp(sharpness * x) for x in full[b, :, i, j].tolist()]
        best = max(range(len(e)), key=e.__getitem__)
        sure = best < C and e[best] / sum(e) >= threshold
        expected[b, i, j] = best if sure else C
    settings = 4, resized, original, C, sharpness, threshold
    mask = rectify.decide(logits, *settings)
    assert mask.dtype == torch.uint8 and torch.equal(mask, expected.byte())
    assert (mask == C).any() == (words + threshold > 0)
    half = rectify.decide(logits, 4, resized, (12, 17), *settings[3:])
    monkeypatch.setattr(rectify, "LARGEST_MAP", (C + words) * math.prod(original) / 4)
    enlarged = half.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(rectify.decide(logits, *settings), enlarged)

# ==================================================================== the hypothesis, and the views
@pytest.fixture
def seen(tiny):
    """A Segmenter that does not train, four square images, and open_clip's cosines of images."""
    clip, segmenter = tiny[0], Segmenter(configure(method="maskclip"), VOC_NAMES[:6])
    s = lambda x: clip.encode_image(rectify.normalize(clip, x), normalize=True) @ segmenter.T.T
    return segmenter, noise(4, 3, *clip.visual.image_size), torch.no_grad()(s)

@pytest.mark.parametrize("rule", ["threshold", "softmax"])
def test_hypothesis_by_threshold(seen, rule):
    """y_c = [cos ≥ t], or [softmax(scale · cos) ≥ t]; where none passes the best K."""
    segmenter, images, cosines = seen
    segmenter.cfg.hypothesis, s = rule, cosines(images)
    if rule == "softmax":
        e = (segmenter.clip.logit_scale.exp() * s).exp()
        s = e / e.sum(1, keepdim=True)
    segmenter.cfg.t = s[0].sort().values[2:4].mean().item()     # three of six pass in image 0
    expected = s >= segmenter.cfg.t
    for row, score in zip(expected, s):
        row[score.topk(segmenter.cfg.top_k).indices] |= not row.any()
    y = rectify.hypothesize(segmenter, images)
    assert y[0].sum() == 3 and torch.equal(y, expected)
    segmenter.cfg.t, segmenter.cfg.top_k = 1.01, 2              # which nothing can pass
    best = s.topk(2).indices.sort(1).values
    assert torch.equal(rectify.hypothesize(segmenter, images).nonzero()[:, 1].view(4, 2), best)

def test_hypothesis_by_windows(seen, mini):
    """Tiles of a sixth of the crop move by half their side; y: every class that is best in one."""
    segmenter, _, cosines = seen
    segmenter.cfg.hypothesis, segmenter.cfg.size = "windows", (2048, 96)    # crop: 192
    images = torch.stack([v2.functional.resize(rectify.load_image(s.image), [96, 96])
                          for s in rectify.list_samples(mini, "train")[:8]])
    coarse, expected = torch.zeros(2, 8, 6).bool()
    for i, j in itertools.product(range(0, 65, 16), repeat=2):
        x = images[..., i:i + 32, j:j + 32]
        x = v2.functional.resize(x, segmenter.clip.visual.image_size)
        best = F.one_hot(cosines(x).argmax(1), 6).bool()
        expected, coarse = expected | best, coarse | best & (i % 32 == j % 32 == 0)
    assert torch.equal(rectify.hypothesize(segmenter, images), expected)
    assert coarse.sum() < expected.sum() < 30, "the steps make no difference here"

@pytest.mark.parametrize("normalization", ["clip", "imagenet"])
def test_crops_are_padded_with_the_mean_colour(mini, tmp_path, normalization):
    """After normalization padding is 0, to within a rounding of uint8, as the authors have it; and
    `valid` is false where a patch is nothing but padding."""
    cfg = configure(finetune=True, views=2, out=str(tmp_path), normalization=normalization)
    segmenter, samples = Segmenter(cfg, VOC_NAMES), rectify.list_samples(mini, "train")[:8]
    x, valid, _ = rectify.training_data(segmenter, samples)             # K N 3 crop crop uint8
    clip, p = segmenter.clip, segmenter.clip.visual.patch_size[0]
    padding = ~valid.repeat_interleave(p, 2).repeat_interleave(p, 3)
    normalized = torch.stack([rectify.normalize(clip, view) for view in x])
    assert padding.any() and x.shape == (2, 8, 3, cfg.crop, cfg.crop)
    off = normalized.movedim(2, -1)[padding].abs()
    assert (off <= 0.5001 / 255 / clip.std.flatten()).all()
    pixels = (x != (255 * clip.mean).round().byte()).any(2).float().flatten(0, 1)
    assert torch.equal(F.max_pool2d(pixels, p).bool(), valid.flatten(0, 1))

def test_a_view_is_what_was_drawn():
    """crop×crop whatever the image, the same from the same draws, padded below and right."""
    cfg, image, fill = configure(), noise(3, 100, 110), torch.full((3, 1, 1), 7).byte()
    for seed in range(8):
        torch.manual_seed(seed)
        drawn = rectify.draw_view()
        (view, extent), (again, _) = (rectify.augment(image, cfg, drawn, fill) for _ in range(2))
        factor = 0.8 + 0.45 * drawn[0][0]
        assert extent == tuple(min(192, round(192 * factor * n / 100)) for n in (100, 110))
        assert view.shape == (3, 192, 192) and torch.equal(view, again)
        assert (view[:, extent[0]:] == 7).all() and (view[:, :, extent[1]:] == 7).all()

# ========================================================================================= learning
@pytest.mark.parametrize("method", METHODS)
def test_gradient_reaches_exactly_the_learnable_parts(mini, method):
    """Every tensor of the rectifier gets a gradient from the loss, and nothing of CLIP."""
    torch.manual_seed(0)
    segmenter = Segmenter(configure(method=method, start="authors"), VOC_NAMES)
    segmenter.rectifier.train()
    images = torch.stack([rectify.load_image(s.image)[:, :84, :84]
                          for s in rectify.list_samples(mini, "train")[:4]])
    logits, f = segmenter(segmenter.features(images))
    M = rectify.gumbel_mask(logits, segmenter.cfg.alpha)
    z = rectify.pool(M, f, torch.ones_like(M[:, 0]).bool())
    y = rectify.hypothesize(segmenter, images)
    rectify.contrastive_loss(z, segmenter.T, y, segmenter.scale).backward()
    for name, p in segmenter.rectifier.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, f"{name} learns nothing"
    for name, p in segmenter.clip.named_parameters():
        assert p.grad is None and not p.requires_grad, f"{name} of CLIP is not frozen"

@pytest.mark.parametrize("method", METHODS)
def test_a_short_run(trained, method):
    """The log has a line an epoch, the last loss is below the first, the rate falls. rectify.pt
    loads without running anything and holds all settings; no unfinished file stays."""
    lines, out = log(trained[method].out), trained[method].out
    state = torch.load(out / "rectify.pt", weights_only=True)
    assert [line["epoch"] for line in lines] == [*range(1, 7)]
    assert lines[-1]["loss"] < lines[0]["loss"]
    rates = [1e-2 * (1 - epoch / 6) ** 0.9 for epoch in range(6)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    assert {f.name for f in fields(Config)} == state["config"].keys()
    assert state["names"] == VOC_NAMES and state["clip"] is None
    assert {p.name for p in out.iterdir()} == {
        "rectify.pt", "rectify.json", "rectify.jsonl", "figure1a.png", "figure4.png", "figure5.png"}

def test_the_real_command_line(emoji, tmp_path):
    """All of Emoji VOC, two epochs, in a process of its own: it gains, and rectify.json, the
    figures and the printed table are as promised."""
    command = [sys.executable, rectify.__file__, "--root", emoji, "--out", tmp_path,
               "--epochs", "2", "--views", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    report = json.loads((tmp_path / "rectify.json").read_text())
    assert list(report) == ["results", "hypothesis", "config", "versions", "seconds"]
    assert list(report["results"]) == ["maskclip", "reclip++"]
    for result in report["results"].values():
        assert list(result["IoU"]) == VOC_NAMES
        assert result["mIoU"] == pytest.approx(np.mean([*result["IoU"].values()]), abs=0.01)
    baseline, rectified = (r["mIoU"] for r in report["results"].values())
    assert 30 < baseline < 60 and baseline + 1 < rectified < 100, "two epochs already gain"
    assert report["hypothesis"]["precision"] > 0.75 and report["hypothesis"]["recall"] > 0.65
    row = re.search(r"^mIoU +([\d.]+) +([\d.]+) +([-+][\d.]+)$", printed, re.M).groups()
    expected = [baseline, rectified, rectified - baseline]
    assert [*map(float, row)] == pytest.approx(expected, abs=0.051)
    assert "labels: 0 background, 1 airplane, ..., 20 tv monitor, 255 void" in printed
    for figure in ("figure1a.png", "figure4.png", "figure5.png"):
        with Image.open(tmp_path / figure) as image:
            assert min(image.size) > 300 and len(image.convert("RGB").getcolors(2 ** 20)) > 5

def test_maskclip_alone(mini, trained, tmp_path):
    """--method maskclip trains nothing and reports the baseline that the other runs show."""
    run(main, *own(mini, tmp_path, "--method", "maskclip"))
    assert results(tmp_path) == {"maskclip": trained["reclip"].json["results"]["maskclip"]}
    assert not (tmp_path / "rectify.pt").exists()

def test_finetune_trains_the_encoder_and_compares_with_stock_clip(mini, trained, tiny, tmp_path):
    """Table 8: the encoder moves and is in the checkpoint; MaskCLIP and the hypothesis stay stock
    CLIP's; --eval loads it."""
    run(main, *own(mini, tmp_path, "--finetune", "--epochs", 1))
    stock, tuned = tiny[0].visual.state_dict(), rectify.load(tmp_path / "rectify.pt")["clip"]
    assert tuned.keys() == stock.keys() and not same(tuned, stock)
    report = json.loads((tmp_path / "rectify.json").read_text())
    assert report["results"]["maskclip"] == trained["reclip++"].json["results"]["maskclip"]
    assert report["hypothesis"] == trained["reclip++"].json["hypothesis"]
    run(main, "--eval", tmp_path / "rectify.pt", "--out", tmp_path / "again")
    assert results(tmp_path / "again") == report["results"]

@pytest.mark.parametrize("masks", ["scrambled", "missing"])
def test_ground_truth_changes_nothing_that_is_learned(mini, trained, tmp_path, masks):
    """Unsupervised: with other classes in every mask, or with none at all, to the bit the same
    weights."""
    copy, random, out = tmp_path / "copy", np.random.default_rng(0), tmp_path / "out"
    shutil.copytree(mini, copy)
    for path in (copy / "SegmentationClass").iterdir():
        write_mask(path, random.integers(0, 21, Image.open(path).size[::-1]))
    if masks == "missing":
        shutil.rmtree(copy / "SegmentationClass")
    printed = run(main, *own(copy, out, "--method", "reclip++"))
    assert same(weights(out), weights(trained["reclip++"].out))
    if masks == "missing":
        assert "24 images to learn from, 0 to measure on" in printed
        assert {p.name for p in out.iterdir()} == {"rectify.pt", "rectify.jsonl", "figure4.png"}
    else:
        assert results(out) != trained["reclip++"].json["results"]

def test_a_collapse_and_a_class_without_patches_are_told():
    """agreement: how often two images, drawn with replacement, have the same class at a patch,
    padding left out. Masks that ignore the images and classes without a patch are warned of."""
    M = torch.randint(3, (5, 3, 4), generator=torch.Generator().manual_seed(2))
    M, said = F.one_hot(M, 4).movedim(3, 1).float(), []
    M[4, :, 2] = 0                                                          # padding
    pairs, bar = [], SimpleNamespace(write=lambda text, file: said.append(text))
    for i, j in itertools.product(range(3), range(4)):
        classes = [M[b, :, i, j].argmax().item() for b in range(5) if M[b, :, i, j].sum()]
        pairs += [[a == b for a in classes for b in classes]]
    mean = np.average([np.mean(p) for p in pairs], weights=[len(p) ** 0.5 for p in pairs])
    look = rectify.look_at_masks(M.sum(0), ["cat", "dog", "cow", "hen"], bar)
    assert look == {"agreement": pytest.approx(mean, abs=1e-4), "never": ["hen"]}
    assert said == ["warning: no patch was given to: hen"]
    look = rectify.look_at_masks(M[:1].repeat(5, 1, 1, 1).sum(0), ["cat", "dog", "cow", "hen"], bar)
    assert look["agreement"] == 1 and re.search("have 100% of .* in common; lower --lr", said[1])

@pytest.mark.slow
def test_the_published_settings_learn(emoji, tmp_path):
    """With VOC's settings ReCLIP is near MaskCLIP after a thousand steps, and its masks follow the
    images. (Without the last ReLU of g it fell below 1.)"""
    voc = configure(dataset="voc", method="reclip")
    learning = "alpha optimizer lr lr_conv weight_decay batch prompt start".split()
    cfg = configure(root=str(emoji), out=str(tmp_path), method="reclip", epochs=30, views=1,
                    **{name: getattr(voc, name) for name in learning})
    train, val = rectify.splits(rectify.dataset_folder(cfg))
    torch.manual_seed(0)
    segmenter = Segmenter(cfg, VOC_NAMES)
    rectify.train(segmenter, rectify.training_data(segmenter, train[::3]), train[::3], tmp_path)
    measured, *_ = rectify.evaluate(rectify.predictor(segmenter), val[::4], VOC_NAMES)
    assert measured["reclip"]["mIoU"] > measured["maskclip"]["mIoU"] - 3, measured
    assert log(tmp_path)[-1]["agreement"] < 0.3

# ============================================================================== the same bits again
@pytest.mark.parametrize("seed", [0, -1])
def test_the_seed_decides_the_weights(mini, trained, tmp_path, seed):
    """Same seed, same weights to the bit; another seed, others."""
    run(main, *own(mini, tmp_path, "--method", "reclip", "--seed", seed))
    assert same(weights(tmp_path), weights(trained["reclip"].out)) == (seed == 0)

def test_kill_and_resume(mini, tmp_path, fp32, monkeypatch):
    """kill -9 in the middle, then --resume: the weights and the log of a run that nothing
    interrupted, on a plain folder of images."""
    monkeypatch.setattr(rectify, "in_half", fp32)       # as the process that is killed decides
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    args = lambda out: [*map(str, own(mini / "JPEGImages", out, "--names", "cow, dog, horse",
                                      "--epochs", 30))]
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, rectify.__file__, *args(killed)], **silent)
    while not (killed / "rectify.partial.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9, "it was to be killed in the middle"
    done = len(torch.load(killed / "rectify.partial.pt", weights_only=True)["log"])
    assert 1 <= done < 30 and not (killed / "rectify.pt").exists()
    assert f"resuming after epoch {done}" in run(main, *args(killed), "--resume")
    run(main, *args(whole))
    assert same(weights(killed), weights(whole)) and not (killed / "rectify.partial.pt").exists()
    assert log(killed) == log(whole) and len(log(whole)) == 30

@pytest.mark.parametrize("method, how", [
    ("reclip", "--eval"), ("reclip++", "--eval"), ("reclip", "--resume")])
def test_a_checkpoint_repeats_the_numbers(mini, trained, tmp_path, monkeypatch, method, how):
    """--eval CHECKPOINT prints the table of the run and writes its results; so does --resume where
    nothing is left to do. T and the names are the checkpoint's own."""
    monkeypatch.setattr(rectify, "text_features", lambda *_: pytest.fail("T was computed again"))
    out = shutil.copytree(trained[method].out, tmp_path / "out")
    (out / "rectify.json").unlink()
    printed = run(main, *(("--eval", out / "rectify.pt") if how == "--eval" else
                          own(mini, out, "--method", method, "--resume")))
    rows = lambda text: re.findall(r"^(?:mIoU|airplane|dog|tv monitor) .*$", text, re.M)
    assert rows(printed) == rows(trained[method].printed) and len(rows(printed)) == 4
    assert results(out) == trained[method].json["results"]
    assert same(weights(out), weights(trained[method].out))

@pytest.mark.parametrize("how, changed, message", [
    ("--resume", ["--epochs", 7], "has epochs 6, not 7; give another --out"),
    ("--resume", ["--method", "reclip++"], r"has method reclip, not reclip\+\+"),
    ("--resume", ["--names", "dog, cat"], "has other class names; for any words .* maskclip"),
    ("--resume", [], "the training images are not those of"),
    ("--eval", ["--seed", 1], "has seed 0, not 1"),
    ("--eval", ["--background", "sky"], "has other class names")])
def test_a_checkpoint_of_another_run_is_refused(mini, trained, tmp_path, how, changed, message):
    """Settings, names and the list of images are compared; the run is left as it is."""
    out = shutil.copytree(trained["reclip"].out, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.iterdir()}
    data = mini if changed else mini / "JPEGImages"     # other images, and more of them
    argv = ["--eval", out / "rectify.pt"] if how == "--eval" else own(
        data, out, "--method", "reclip", "--resume")
    with pytest.raises(UserError, match=message):
        run(main, *argv, *changed)
    assert {path: path.read_bytes() for path in out.iterdir()} == before

def test_moments_of_another_memory_layout_are_mended():
    """Channels last, as a GPU saves them: fused on the CPU they would be read wrong."""
    p, moment = nn.Parameter(torch.randn(4, 3, 5, 5)), torch.randn(4, 3, 5, 5)
    optimizer = torch.optim.Adam([p])
    last = {"step": torch.tensor(1.), "exp_avg": moment.to(memory_format=torch.channels_last)}
    state = optimizer.state_dict() | {"state": {0: last | {"exp_avg_sq": last["exp_avg"]}}}
    assert rectify.resume({"optimizer": state, "log": ["an epoch"]}, optimizer) == ["an epoch"]
    for key in ("exp_avg", "exp_avg_sq"):
        mended = optimizer.state[p][key]
        assert mended.stride() == p.stride() and torch.equal(mended, moment)

TELL = """
import sys
sys.path.insert(0, {folder!r})
import rectify, torch

def train(segmenter, data, samples, out, state=None):
    steps, loss = [], rectify.contrastive_loss
    rectify.contrastive_loss = lambda *args: steps.append(1) or loss(*args)
    learn(segmenter, data, samples, out, state)
    mine = [sample.name for sample in rectify.own_share(samples)], len(steps), len(data[2])
    parameters = {{k: p.detach() for k, p in segmenter.rectifier.named_parameters()}}
    torch.save((*mine, parameters), out / f"{{rectify.RANK}}.pt")

learn, rectify.train = rectify.train, train
rectify.run(rectify.main)
"""

def test_two_processes_are_one_run(mini, tmp_path):
    """torchrun: each process has images of its own, as many steps, to the bit the same weights; one
    of them prints and writes."""
    copy, out = shutil.copytree(mini, tmp_path / "copy"), tmp_path / "out"
    index = copy / "ImageSets/Segmentation/train.txt"
    names = index.read_text().split()[:-1]
    index.write_text("\n".join(names))                  # 23 images: one is left out
    (tmp_path / "go.py").write_text(TELL.format(folder=str(rectify.HERE)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               tmp_path / "go.py", *own(copy, out, "--epochs", 2, "--batch", 5)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first[0]) == len(second[0]) == first[2] == second[2] == 11
    assert not {*first[0]} & {*second[0]} and {*first[0], *second[0]} < {*names}
    assert first[1] == second[1] == 2 * math.ceil(11 / 2)
    assert same(first[3], second[3])
    assert done.stdout.count("mIoU") == 1 and "2 processes" in done.stdout
    assert len(log(out)) == 2 and {*first[3]} < {*weights(out)}

# ====================================================================================== the measure
def test_iou_of_a_confusion_matrix_counted_by_hand():
    """Hits / (truth + prediction - hits) in percent, void left out; an absent class is NaN."""
    label = torch.tensor([[0, 0, 1], [1, 2, VOID]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1], [1, 0, 3]])
    matrix = rectify.confusion(label, prediction, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    expected = [100 / 3, 200 / 3, 0, math.nan]
    assert rectify.iou(matrix).tolist() == pytest.approx(expected, nan_ok=True)

def test_evaluate_streams_one_matrix_over_all_images(mini, monkeypatch):
    """mIoU of a made-up predictor, precision and recall of a made-up hypothesis equal sets of
    pixels and classes compared over the split, of which every image is read once."""
    samples, read, load = rectify.list_samples(mini, "val"), [], rectify.load_image
    guess = lambda images: {"made-up": images[:, 0] % 20}
    named = lambda images: torch.arange(20).expand(len(images), -1) < 5     # the first five
    monkeypatch.setattr(rectify, "load_image", lambda path: read.append(path) or load(path))
    measured, found, quality = rectify.evaluate(guess, samples, VOC_NAMES, 1, named)
    assert sorted(read) == sorted(sample.image for sample in samples)
    both, either, there, hits = np.zeros(20), np.zeros(20), 0, 0
    for sample in samples:
        truth = np.array(Image.open(sample.label)).astype(int) - 1
        predicted = np.where((truth < 0) | (truth == 254), -2, load(sample.image)[0].numpy() % 20)
        for c in range(20):
            both[c] += ((truth == c) & (predicted == c)).sum()
            either[c] += ((truth == c) | (predicted == c)).sum()
            there += (truth == c).any()
            hits += c < 5 and (truth == c).any()
    IoU = measured["made-up"]["IoU"]
    assert [*IoU] == VOC_NAMES and [*IoU.values()] == pytest.approx(100 * both / either, abs=1e-3)
    assert quality == {"precision": pytest.approx(hits / 40, abs=1e-4), "classes_per_image": 5.0,
                       "recall": pytest.approx(hits / there, abs=1e-4)}

def test_objects_know_their_distance_from_the_centre():
    """Centroid to the image's centre in px, IoU in percent and the sample of each class that the
    edge does not cut; void is no object and does not count."""
    label = torch.full((7, 9), VOID, dtype=torch.uint8)
    label[3, 4], label[1, 1:4], label[6, 5] = 3, 1, 0           # centre; top left; at the edge
    prediction = torch.zeros(7, 9, dtype=torch.long)
    prediction[3, 4], prediction[1, 1:3], prediction[6, 5], prediction[0, 0] = 3, 1, 1, 3
    found = [*rectify.objects(label, prediction, "sample", 20)]
    assert found == [(pytest.approx(math.hypot(2, 2)), pytest.approx(100 * 2 / 4), "sample"),
                     (0, 100, "sample")]

@pytest.mark.parametrize("count", [7, 39, 40, 500])
def test_the_rings_of_figure_1a(count):
    """Each has at least 20 objects, or is the only one; together they hold all, at the mean IoU."""
    random = np.random.default_rng(0)
    things = [(90 * u * u, 100 * v, "") for u, v in random.random((count, 2)).tolist()]
    axis, = rectify.figure1a({"maskclip": things, "reclip": things}).axes
    labels = [label.get_text() for label in axis.get_xticklabels()]
    sizes = [int(label.split("n=")[1]) for label in labels]
    edges = [int(re.search(r"\d+", label)[0]) for label in labels] + [math.inf]
    assert sum(sizes) == count and (len(sizes) == 1 if count < 40 else min(sizes) >= 20)
    assert (len(sizes) > 4) == (count == 500)
    for line, (k, (a, b)) in itertools.product(axis.lines, enumerate(itertools.pairwise(edges))):
        mean = np.mean([iou for distance, iou, _ in things if a <= distance < b])
        assert line.get_ydata()[k] == pytest.approx(mean)

def test_figures_4_and_5(mini, tmp_path, monkeypatch):
    """Fig. 5 has the images with the objects farthest from the centre, each once. Without labels
    there is no row of ground truth."""
    samples, drawn, draw = rectify.list_samples(mini, "val"), [], rectify.figure4
    guess = lambda images: {"maskclip": torch.zeros_like(images[:, 0])}
    for some, rows in ((samples[:3], ["image", "ground truth", "maskclip"]),
                       ([samples[0]._replace(label=None)], ["image", "maskclip"])):
        axis, = draw(guess, some, VOC_NAMES).axes
        assert [label.get_text() for label in axis.get_yticklabels()] == rows
        assert len(axis.images) == len(rows) * len(some)
    found = {"maskclip": [(d, 0, samples[n]) for d, n in ((3, 2), (9, 0), (8, 0), (5, 1))]}
    monkeypatch.setattr(rectify, "figure4", lambda _, some, *more: (
        drawn.append(some) or draw(guess, some, *more)))
    rectify.save_galleries(guess, samples[:4], found, VOC_NAMES, 1, tmp_path)
    assert drawn == [samples[:4], samples[:3]]

# ============================================================================================ speed
def test_bfloat16_moves_features_and_masks_but_little(mini, monkeypatch):
    """Features turn by less than two degrees; hardly a pixel of MaskCLIP's changes its class."""
    segmenter = Segmenter(configure(method="maskclip"), VOC_NAMES)
    images = [rectify.load_image(s.image)[None] for s in rectify.list_samples(mini, "val")[:4]]
    exact = [(segmenter.features(x), rectify.predictor(segmenter)(x)["maskclip"]) for x in images]
    monkeypatch.setattr(rectify, "in_half", lambda device: torch.autocast("cpu", torch.bfloat16))
    for x, (f, mask) in zip(images, exact):
        g = segmenter.features(x)
        assert g.dtype == torch.float32 and not torch.equal(f, g)
        assert (f * g).sum(1).min() > 0.9994                                            # cos 2°
        assert (mask == rectify.predictor(segmenter)(x)["maskclip"]).float().mean() > 0.98

def test_reading_ahead_keeps_the_order_and_its_bound():
    """Results come in order, an error in its place; at most `ahead` are read before they are
    wanted, each by one thread, and the caller keeps all of his."""
    begun, got, threads = [], [], torch.get_num_threads()

    def read(k):
        begun.append(torch.get_num_threads())
        return 1 // (50 - k)

    with pytest.raises(ZeroDivisionError):
        for value in rectify.read_ahead(read, range(100), ahead=8):
            got.append(value)
            assert len(begun) <= len(got) + 8
    assert got == [1 // (50 - k) for k in range(50)] and {*begun} == {1}
    assert torch.get_num_threads() == threads

# ======================================================================================== its files
def test_on_a_full_disk_the_earlier_file_stays(trained, tmp_path, monkeypatch, capsys):
    """Every file is written whole or not at all, and main says which in one line."""
    def full(path, content):
        open(path, "wb").write(bytes(content)[:9])
        raise OSError(28, "No space left on device", str(path))

    out = shutil.copytree(trained["reclip"].out, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(rectify.Path, "write_bytes", full)
    with pytest.raises(OSError):
        rectify.save(out / "rectify.pt", {"weights": torch.ones(3)})
    with pytest.raises(SystemExit) as end:
        rectify.run(lambda: main(["--eval", str(out / "rectify.pt")]))
    last = capsys.readouterr().err.split("\r")[-1].strip()              # behind progress bars
    assert end.value.code == 2 and re.fullmatch(
        r"error: \S*/rectify\.json\S*: No space left on device", last)
    assert {path: path.read_bytes() for path in out.iterdir()} == before

def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    """Neither a text nor other tensors; and a pickle that would run something is not run."""
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "tensors.pt")
    torch.save(Trap(), tmp_path / "trap.pt")
    for name in ("text", "tensors", "trap", "absent"):
        with pytest.raises(UserError, match=rf"{name}\.pt: no checkpoint with a rectifier"):
            main(["--eval", str(tmp_path / f"{name}.pt")])
    assert not (tmp_path / "sprung").exists()

def test_a_loss_that_is_not_finite_stops_the_training(mini, tmp_path):
    with pytest.raises(UserError, match="the loss is (nan|inf) in epoch 1; lower --lr"):
        run(main, *own(mini, tmp_path, "--alpha", 1e39))
    assert not (tmp_path / "rectify.pt").exists()

@pytest.mark.parametrize("error, line, code", [
    (UserError("a.jpg: cut off; replace it"), "error: a.jpg: cut off; replace it", 2),
    (FileNotFoundError(2, "No such file or directory", "b.txt"),
     "error: b.txt: No such file or directory", 2),
    (OSError("the network is away"), "error: the network is away", 2),
    (KeyboardInterrupt(), "interrupted; the same command with --resume goes on", 130)])
def test_what_a_user_can_mend_is_one_line(capsys, error, line, code):
    """Anything else is a bug and shows its traceback."""
    with pytest.raises(SystemExit) as end:
        rectify.run(mock.Mock(side_effect=error))
    assert (end.value.code, capsys.readouterr().err) == (code, f"{line}\n")
    with pytest.raises(ZeroDivisionError):
        rectify.run(lambda: 1 / 0)

# ================================================================================= the command line
@pytest.mark.parametrize("argv, values", [
    ("--dataset voc", dict(clip="ViT-B-16-quickgelu", pretrained="openai", crop=520, t=0.23,
                           prompt="shared", start="authors", optimizer="sgd", lr=0.12, batch=12,
                           alpha=1000.0, epochs=200, method="reclip", out="runs/voc")),
    ("--dataset voc --method reclip++ --t 0.3", dict(alpha=100.0, hypothesis="windows", t=0.3)),
    ("--dataset ade --method maskclip", dict(t=0.21, crop=512, out="runs/ade-maskclip")),
    ("", dict(crop=192, epochs=12, method="reclip++", lr=0.01))])
def test_help_shows_the_datasets_own_values(capsys, argv, values):
    """The paper's or the authors', what is typed before them; and behind each field of Config its
    comment."""
    with pytest.raises(SystemExit):
        main([*argv.split(), "--help"])
    printed, source = " ".join(capsys.readouterr().out.split()), inspect.getsource(Config)
    for f in fields(Config):
        about = re.search(rf"^    {f.name}: .*?  # (.+)", source, re.M)[1]
        value = re.escape(f"{about} (default {values.get(f.name, '')}" + ")" * (f.name in values))
        assert re.search(rf"--{f.name.replace('_', '-')} [^()]*?{value}", printed), f.name
    for group in ("data", "method", "training", "prediction", "run"):
        assert f" {group}: --" in printed

@pytest.mark.parametrize("argv, message", [
    (["--epoch", "3"], "unrecognized arguments: --epoch"),
    (["--method", "clipseg"], "argument --method: invalid"),
    (["--epochs", "0"], "--epochs.*start at 1"), (["--threshold", "1"], "--threshold 1"),
    (["--window", "96", "--stride", "97"], "--stride 97: leaves gaps"),
    (["--dataset", "voc", "--clip", "ViT-L-14"], "--clip ViT-L-14: needs --pretrained"),
    (["--dataset", "emoji", "--recipe", "2024", "--clip", "local-dir:x"], "has its own --clip"),
    (["--data", "images"], "--data: needs --names")])
def test_senseless_settings_are_refused(capsys, argv, message):
    with pytest.raises(SystemExit) as end:
        rectify.run(lambda: main(argv))
    assert end.value.code == 2 and re.search(message, capsys.readouterr().err)

# ==================================================================================== --recipe 2024
@pytest.fixture
def openai(monkeypatch, tmp_path):
    """Small random weights, which open_clip "downloads" as OpenAI's; their file."""
    for name in ("ViT-B-16", "ViT-B-16-quickgelu"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, smaller(name))
    torch.manual_seed(0)
    clip, file = open_clip.create_model("ViT-B-16"), tmp_path / "openai.safetensors"
    nn.init.normal_(clip.visual.positional_embedding, std=0.1)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, file)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(file))
    return file

@torch.no_grad()
def test_the_regime_of_2024_has_two_clips(openai):
    """Dense features, T and MaskCLIP: GELU, ImageNet's mean and std. The hypothesis: QuickGELU,
    CLIP's own mean and std, the center crop, with T of its own."""
    def by_hand(name, mean, std):
        clip = open_clip.create_model(name, pretrained=str(openai)).eval()
        T = rectify.text_features(clip, open_clip.get_tokenizer(name), VOC_NAMES[:3])
        return clip, T, lambda x: v2.functional.normalize(x.float() / 255, mean, std)

    cfg = configure(dataset="voc", recipe="2024", method="maskclip")
    segmenter, images = Segmenter(cfg, VOC_NAMES[:3]), noise(2, 3, 512, 640)
    clip, T, prepare = by_hand("ViT-B-16", rectify.IMAGENET_DEFAULT_MEAN,
                               rectify.IMAGENET_DEFAULT_STD)
    f = rectify.encode_image(clip, prepare(images), "maskclip")
    assert torch.allclose(segmenter.T, T, atol=1e-5)
    assert torch.allclose(segmenter.features(images), f, atol=1e-5)
    clip, stock_T, prepare = by_hand("ViT-B-16-quickgelu", open_clip.OPENAI_DATASET_MEAN,
                                     open_clip.OPENAI_DATASET_STD)
    crop = v2.functional.center_crop(
        v2.functional.resize(images, [224, 280], v2.InterpolationMode.BICUBIC), 224)
    s = clip.encode_image(prepare(crop), normalize=True) @ stock_T.T
    segmenter.cfg.t, segmenter.cfg.top_k = s.flatten().sort().values[2:4].mean().item(), 1
    y = s >= segmenter.cfg.t
    y[~y.any(1), s.argmax(1)[~y.any(1)]] = True
    assert torch.equal(rectify.hypothesize(segmenter, images), y)
    assert not torch.allclose(stock_T, T, atol=1e-3), "the two regimes are alike here"
