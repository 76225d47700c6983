"""The rivals do what their equations say: each loss and each assignment against a slow loop, what
learns and what stays frozen, and the command line, to which ground truth tells nothing.
"""
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import rectify
import rivals
import tables
import torch
import torch.nn.functional as F
from PIL import Image

RATES = {name: replace(how, epochs=1, batch=8) for name, how in rivals.TRAINING.items()}


def unit(*shape):
    return F.normalize(torch.randn(shape), dim=-1)


@pytest.fixture
def segmenter():
    torch.manual_seed(0)
    cfg = rectify.configure(method="maskclip")
    return rectify.Segmenter(cfg, rectify.class_names(cfg), torch.device("cpu"))


@pytest.fixture
def batch(segmenter):
    """Four images of 96 px, two of them with the same sentence, the last one half padding."""
    x, y = torch.randn(4, 3, 96, 96), torch.zeros(4, 20, dtype=torch.bool)
    y[[0, 1, 1, 2, 3], [3, 4, 5, 3, 9]] = True
    valid = torch.ones(4, 8, 8, dtype=torch.bool)
    valid[3, 4:] = False
    return rivals.Batch(x, valid, segmenter.T[[3, 4, 9]], torch.tensor([0, 1, 0, 2]), y)


def test_sentence():
    y = torch.tensor([[0, 1, 0], [1, 1, 0], [1, 1, 1]]).bool()
    said = [rivals.sentence(["cat", "dog, hound", "sheep"], row) for row in y]
    assert said == ["a photo of a dog.", "a photo of a cat and a dog.",
                    "a photo of a cat, a dog and a sheep."]


def test_info_nce_is_its_equation():
    """Against loops: several texts an image, several images a text, a text of no image."""
    logits, P = torch.randn(4, 5), torch.tensor(
        [[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]).bool()

    def one_way(logits, P):
        losses = []
        for row, own in zip(logits.tolist(), P.tolist()):
            total = sum(map(math.exp, row))
            each = [-math.log(math.exp(v) / total) for v, mine in zip(row, own) if mine]
            losses += [sum(each) / len(each)] if each else []
        return sum(losses) / len(losses)

    expected = (one_way(logits, P) + one_way(logits.T, P.T)) / 2
    assert rivals.info_nce(logits, P).item() == pytest.approx(expected, rel=1e-5)
    eye = torch.eye(4).bool()
    both = sum(F.cross_entropy(part, torch.arange(4)) for part in (logits[:, :4], logits[:, :4].T))
    torch.testing.assert_close(rivals.info_nce(logits[:, :4], eye), both / 2)


def test_reco_seeds_are_its_equation():
    """Images of different sizes; the seed is a loop's over patches, images and their patches."""
    torch.manual_seed(1)
    phi, T_c, ctx = [unit(n, 8) for n in (5, 7, 3)], unit(8), unit(2, 8)
    w = [rivals.patch_weights(part, T_c, ctx) for part in phi]
    sigma = lambda v: 1 / (1 + math.exp(-v))
    for part, weights in zip(phi, w):
        for patch, weight in zip(part, weights):
            expected = sigma(10 * (patch @ T_c).item())
            for r in ctx:
                expected *= 1 - sigma((patch @ r).item())
            assert weight.item() == pytest.approx(expected, rel=1e-5)
    seeds = []
    for own in phi:
        support = [np.mean([max((p @ q).item() * v.item() for q, v in zip(other, weights))
                            for other, weights in zip(phi, w)]) for p in own]
        seeds.append(own[int(np.argmax(support))])
    expected = F.normalize(sum(seeds), dim=0)
    torch.testing.assert_close(rivals.co_segment(phi, w), expected)
    f, r, T = unit(1, 2, 2, 8).permute(0, 3, 1, 2), unit(3, 8), unit(3, 8)
    found = rivals.reco_logits(f, T, r)
    value = sigma((f[0, :, 1, 0] @ r[2]).item()) * sigma(10 * (f[0, :, 1, 0] @ T[2]).item())
    assert found[0, 2, 1, 0].item() == pytest.approx(value, rel=1e-5)


def test_clippy_max_is_over_patches_that_are_not_padding():
    features, valid = torch.randn(2, 6, 4), torch.ones(2, 2, 3, dtype=torch.bool)
    valid[1, 1] = False
    features[1, 5] = 100.0                                              # padding
    z = rivals.max_pool(features, valid)
    for b in range(2):
        expected = [max(features[b, i, d].item() for i in range(6) if valid[b].flatten()[i])
                    for d in range(4)]
        torch.testing.assert_close(z[b], F.normalize(torch.tensor(expected), dim=0))


def test_patch_features_are_the_patches_after_clips_own_blocks(segmenter):
    clip, x = segmenter.clip, torch.randn(2, 3, 100, 130)
    before, grid = rectify.earlier_blocks(clip, x)
    after = clip.visual.transformer.resblocks[-1](before)                   # open_clip's own code
    own = F.normalize(clip.visual._pool(after)[0] @ clip.visual.proj, dim=-1)
    torch.testing.assert_close(own, rectify.encode_image(clip, x, "stock"))
    patches = clip.visual.ln_post(after[:, 1:]) @ clip.visual.proj
    torch.testing.assert_close(rivals.patch_features(clip, x), patches)
    assert grid == rivals.grid_of(clip, x)
    assert rivals.patch_features(clip, x).shape == (2, math.prod(rivals.grid_of(clip, x)), 128)


def test_tcl_starts_at_maskclip_and_its_losses_are_their_equations(segmenter):
    clip, x = segmenter.clip, torch.randn(2, 3, 96, 96)
    e, f = rivals.TCL(clip)(clip, x), rectify.encode_image(clip, x, "maskclip")
    torch.testing.assert_close(e, F.interpolate(f, scale_factor=4), msg="the gates are shut")
    m, valid = torch.rand(2, 3, 4, 4), torch.ones(2, 4, 4)
    valid[1, 2:] = 0
    m, P = m * valid[:, None], torch.tensor([[1, 0, 0], [0, 1, 0]]).bool()
    means = {(b, u): m[b, u].sum().item() / valid[b].sum().item() for b in (0, 1) for u in range(3)}
    positive, negative = [[v for k, v in means.items() if bool(P[k]) == own] for own in (1, 0)]
    expected = abs(np.mean(positive) - 0.4) + np.mean(negative)
    assert rivals.area_loss(m, P, valid).item() == pytest.approx(expected, rel=1e-5)
    v, e = rivals.pooled(m, e[:, :, :4, :4]), e[:, :, :4, :4]
    slow = sum(m[1, 2, i, j] * e[1, :, i, j] for i in range(4) for j in range(4))
    torch.testing.assert_close(v[1, 2], F.normalize(slow, dim=0))
    g = torch.tensor([[1.0, 3.0], [2.0, 7.0]])
    assert rivals.total_variation(g).item() == (1 + 4) / 2 + (2 + 5) / 2
    mask = rivals.hard(torch.tensor([-50.0, 50.0]))
    assert mask.tolist() == [0, 1], "far from the threshold noise changes nothing"


def test_groupvit_assigns_each_patch_to_one_group():
    """The grouping against loops, and the hierarchy: a patch's class is its segment's."""
    torch.manual_seed(2)
    block, g, x = rivals.Grouping(8).eval(), torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    found, A = block(g, x)
    q, k, v = (p(n)[0] for p, n in ((block.q, block.norm_g(g)), (block.k, block.norm_x(x)),
                                    (block.v, block.norm_x(x))))
    chosen = [max(range(3), key=lambda G: (q[G] @ k[i]).item()) for i in range(5)]
    assert A[0].argmax(0).tolist() == chosen and (A.sum(1) == 1).all()
    for G in range(3):
        members = [v[i] for i in range(5) if chosen[i] == G]
        mean = sum(members) / len(members) if members else torch.zeros(8)
        token = g[0, G] + block.out(mean)
        torch.testing.assert_close(found[0, G], token + block.mlp(block.norm(token)))
    segments, T, A = torch.randn(1, 2, 8), unit(4, 8), torch.tensor([[[1., 0, 1, 0], [0, 1, 0, 1]]])
    logits = rivals.group_logits(segments, A, T, (2, 2))
    for i, G in enumerate([0, 1, 0, 1]):
        cosines = F.normalize(segments[0, G], dim=0) @ T.T
        torch.testing.assert_close(logits[0, :, i // 2, i % 2], cosines)
    logits = torch.randn(2, 3, 5, requires_grad=True)
    A = rivals.assign(logits, noisy=True)
    (A * torch.randn(2, 3, 5)).sum().backward()
    assert ((A == 0) | (A == 1)).logical_or((A - 1).abs() < 1e-6).all() and logits.grad.any()


def test_gradients_reach_what_learns_and_nothing_else(segmenter, batch):
    """TCL: all of its own parts once the gates are open, nothing of CLIP. GroupViT likewise."""
    clip, model = segmenter.clip, rivals.TCL(segmenter.clip)
    for block in model.decoder:
        torch.nn.init.constant_(block.g, 0.5)
    rivals.tcl_loss(model, clip, batch, segmenter.scale).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any(), name
    D = clip.visual.proj.size(1)
    vit = rivals.GroupViT(clip.visual, D).train()
    rivals.groupvit_loss(vit(batch.x)[0], batch, segmenter.T, segmenter.scale).backward()
    for name, p in vit.named_parameters():
        assert p.grad is not None and p.grad.any(), name
    assert all(p.grad is None for p in clip.parameters()), "CLIP is frozen"


def test_clippy_trains_a_copy_and_reco_trains_nothing(segmenter, mini, monkeypatch):
    samples, before = rectify.list_samples(mini, "train"), rectify.digest(segmenter.clip)
    images = torch.randint(256, (1, 3, 96, 96), dtype=torch.uint8)
    taken = {}

    def keep(segmenter, samples, parameters, loss, how):
        taken["parameters"] = list(parameters)

    monkeypatch.setattr(rivals, "train", keep)
    dense = rivals.clippy(segmenter, samples, RATES["clippy"])
    trained, own = taken.pop("parameters"), [*segmenter.clip.visual.parameters()]
    assert len(trained) == len(own) and not {*map(id, trained)} & {*map(id, own)}
    assert dense(images).shape == (1, 20, 8, 8)
    monkeypatch.setattr(rivals, "EXAMPLES", 2)
    assert rivals.reco(segmenter, samples)(images).shape == (1, 20, 8, 8)
    assert not taken and rectify.digest(segmenter.clip) == before


@pytest.fixture(scope="module")
def worlds(mini, tmp_path_factory):
    """(folder, --out) of `mini`, and of a copy with scrambled labels. All rivals share --out, and
    the ReCLIP that the first of them trains there.
    """
    scrambled = tmp_path_factory.mktemp("worlds") / "mini"
    shutil.copytree(mini, scrambled)
    for path in (scrambled / "SegmentationClass").glob("*.png"):
        png = Image.open(path)
        label = np.asarray(png)
        other = Image.fromarray(np.where((label > 0) & (label < 255), label % 20 + 1, label)
                                .astype(np.uint8))
        other.putpalette(png.getpalette())
        other.save(path)
    return [(mini, scrambled.parent / "out"), (scrambled, scrambled.parent / "scrambled-out")]


@pytest.mark.parametrize("name", list(rivals.RIVALS))
def test_the_command_line_writes_masks_that_ground_truth_cannot_change(
        name, worlds, monkeypatch, capsys):
    """On scrambled labels a rival writes the same masks, and has another mIoU."""
    monkeypatch.setattr(rivals, "EXAMPLES", 2)
    monkeypatch.setattr(rivals, "TRAINING", RATES)
    reports, written = [], []
    for folder, out in worlds:
        rivals.main([name, "--data", str(folder), "--names", str(folder / "names.txt"),
                     "--dataset", "emoji", "--out", str(out), "--epochs", "1", "--views", "1"])
        reports.append(json.loads((out / name / "rivals.json").read_text())["results"])
        written.append({p.name: np.asarray(Image.open(p)) for p in (out / name).glob("*.png")
                        if p.name != "figure4.png"})
        assert (out / name / "figure4.png").is_file()
    with pytest.raises(rectify.UserError, match="--seed 1.*--out takes another folder"):
        rivals.main([name, "--data", str(folder), "--names", str(folder / "names.txt"),
                     "--dataset", "emoji", "--out", str(out), "--seed", "1"])
    title = rivals.RIVALS[name][0]
    assert list(reports[0]) == ["maskclip", "reclip", title]
    assert reports[0][title] != reports[1][title]
    assert len(written[0]) == 32 and written[0].keys() == written[1].keys()
    assert all((mask == written[1][file]).all() for file, mask in written[0].items())
    assert all(1 <= mask.min() and mask.max() <= 20 for mask in written[0].values())
    assert title in capsys.readouterr().out


def test_tables_10_and_11_have_every_row_and_the_published_numbers():
    rows = tables.rows_of("table10", "emoji", "", [])
    assert list(rows) == ["GroupViT", "TCL", "ReCLIP"]
    text = tables.markdown("table10", "emoji", "", [0], {row: [{"mIoU": 1.0}] for row in rows})
    assert "| GroupViT | 1.0 | very low |" in text and "published, on VOC" in text
    rows = tables.rows_of("table11", "emoji", "", [])
    assert list(rows) == ["CLIPpy+", "ReCo+", "MaskCLIP+", "ReCLIP", "ReCLIP++"]
