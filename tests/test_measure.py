"""What measures: the rivals, whom ground truth tells nothing; tables.py; bench.py."""
import json
import math
import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import rectify
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import bench  # noqa: E402  (after the path to it)
import export  # noqa: E402
import rivals  # noqa: E402
import tables  # noqa: E402

RATES = {name: replace(how, epochs=1, batch=8) for name, how in rivals.TRAINING.items()}
unit = lambda *shape: F.normalize(torch.randn(shape), dim=-1)
sigma = lambda v: 1 / (1 + math.exp(-v))
close = torch.testing.assert_close

@pytest.fixture(scope="module")
def segmenter():
    return rectify.Segmenter(rectify.configure(method="maskclip"), rectify.VOC_NAMES)

def test_sentences_and_info_nce():
    """Against loops: several texts an image, several images a text, a text of no image."""
    names, y = ["cat", "dog, hound", "sheep"], torch.tensor([[0, 1, 0], [1, 1, 1]]).bool()
    assert [rivals.sentence(names, row) for row in y] == [
        "a photo of a dog.", "a photo of a cat, a dog and a sheep."]
    logits, P = torch.randn(4, 5), torch.tensor(
        [[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]).bool()

    def one_way(logits, P):
        losses = []
        for row, own in zip(logits.tolist(), P.tolist()):
            each = [-math.log(math.exp(v) / sum(map(math.exp, row))) for v, m in zip(row, own) if m]
            losses += [sum(each) / len(each)] if each else []
        return sum(losses) / len(losses)

    expected = (one_way(logits, P) + one_way(logits.T, P.T)) / 2
    assert rivals.info_nce(logits, P).item() == pytest.approx(expected, rel=1e-5)

def test_reco_is_its_equations():
    """Images of different sizes; the seed is a loop's over patches, images and their patches."""
    phi, T_c, ctx = [unit(n, 8) for n in (5, 7, 3)], unit(8), unit(2, 8)
    w = [rivals.patch_weights(part, T_c, ctx) for part in phi]
    for patch, weight in ((p, v) for part, weights in zip(phi, w) for p, v in zip(part, weights)):
        expected = sigma(10 * (patch @ T_c).item()) * math.prod(
            1 - sigma((patch @ r).item()) for r in ctx)
        assert weight.item() == pytest.approx(expected, rel=1e-5)
    seeds = []
    for own in phi:
        support = [np.mean([max((p @ q).item() * v.item() for q, v in zip(other, weights))
                            for other, weights in zip(phi, w)]) for p in own]
        seeds.append(own[int(np.argmax(support))])
    close(rivals.co_segment(phi, w), F.normalize(sum(seeds), dim=0))
    f, r, T = unit(1, 2, 2, 8).permute(0, 3, 1, 2), unit(3, 8), unit(3, 8)
    value = sigma((f[0, :, 1, 0] @ r[2]).item()) * sigma(10 * (f[0, :, 1, 0] @ T[2]).item())
    assert rivals.reco_logits(f, T, r)[0, 2, 1, 0].item() == pytest.approx(value, rel=1e-5)

def test_clippy_is_its_equations(segmenter):
    """Patches after CLIP's own last block; the maximum is over those that are not padding."""
    clip, x = segmenter.clip, torch.randn(2, 3, 100, 130)
    before, grid = rectify.first_blocks(clip, x)
    after = clip.visual.transformer.resblocks[-1](before)                   # open_clip's own code
    patches = clip.visual.ln_post(after[:, 1:]) @ clip.visual.proj
    close(rivals.patch_features(clip, x), patches)
    assert grid == rivals.grid_of(clip, x)
    features, valid = torch.randn(2, 6, 4), torch.ones(2, 2, 3, dtype=torch.bool)
    valid[1, 1], features[1, 5] = False, 100.0
    z = rivals.max_pool(features, valid)
    for b, n in ((0, 6), (1, 3)):
        close(z[b], F.normalize(features[b, :n].max(0).values, dim=0))

def test_tcl_starts_at_maskclip_and_its_losses_are_their_equations(segmenter):
    clip, x = segmenter.clip, torch.randn(2, 3, 96, 96)
    e, f = rivals.TCL(clip)(clip, x), rectify.encode_image(clip, x, "maskclip")
    close(e, F.interpolate(f, scale_factor=4))                              # the gates are shut
    m, valid = torch.rand(2, 3, 4, 4), torch.ones(2, 4, 4)
    valid[1, 2:] = 0
    m, P = m * valid[:, None], torch.tensor([[1, 0, 0], [0, 1, 0]]).bool()
    means = {(b, u): m[b, u].sum().item() / valid[b].sum().item() for b in (0, 1) for u in range(3)}
    positive, negative = [[v for k, v in means.items() if bool(P[k]) == own] for own in (1, 0)]
    expected = abs(np.mean(positive) - 0.4) + np.mean(negative)
    assert rivals.area_loss(m, P, valid).item() == pytest.approx(expected, rel=1e-5)
    v, e = rivals.pooled(m, e[:, :, :4, :4]), e[:, :, :4, :4]
    slow = sum(m[1, 2, i, j] * e[1, :, i, j] for i in range(4) for j in range(4))
    close(v[1, 2], F.normalize(slow, dim=0))
    assert rivals.total_variation(torch.tensor([[1.0, 3], [2, 7]])).item() == 5 / 2 + 7 / 2
    assert rivals.hard(torch.tensor([-50.0, 50.0])).tolist() == [0, 1]      # beyond the noise

def test_groupvit_assigns_each_patch_to_one_group():
    """The grouping against loops, and the hierarchy: a patch's class is its segment's."""
    block, g, x = rivals.Grouping(8).eval(), torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    found, A = block(g, x)
    q, k, v = (p(n)[0] for p, n in ((block.q, block.norm_g(g)), (block.k, block.norm_x(x)),
                                    (block.v, block.norm_x(x))))
    chosen = [max(range(3), key=lambda G: (q[G] @ k[i]).item()) for i in range(5)]
    assert A[0].argmax(0).tolist() == chosen and (A.sum(1) == 1).all()
    for G in range(3):
        members = [v[i] for i in range(5) if chosen[i] == G] or [torch.zeros(8)]
        token = g[0, G] + block.out(sum(members) / len(members))
        close(found[0, G], token + block.mlp(block.norm(token)))
    segments, T, A = torch.randn(1, 2, 8), unit(4, 8), torch.tensor([[[1., 0, 1, 0], [0, 1, 0, 1]]])
    logits = rivals.group_logits(segments, A, T, (2, 2))
    for i, G in enumerate([0, 1, 0, 1]):
        close(logits[0, :, i // 2, i % 2], F.normalize(segments[0, G], dim=0) @ T.T)

def test_gradients_reach_what_learns_and_nothing_else(segmenter, mini, monkeypatch):
    """TCL's and GroupViT's own parts, a copy of CLIP's tower for CLIPpy; ReCo trains nothing."""
    x, y, valid = torch.randn(4, 3, 96, 96), torch.zeros(4, 20), torch.ones(4, 8, 8)
    y[[0, 1, 1, 2, 3], [3, 4, 5, 3, 9]], valid[3, 4:] = 1, 0        # two with the same sentence
    batch = rivals.Batch(x, valid.bool(), segmenter.T[[3, 4, 9]], torch.tensor([0, 1, 0, 2]),
                         y.bool())
    clip, model = segmenter.clip, rivals.TCL(segmenter.clip)
    for block in model.decoder:
        torch.nn.init.constant_(block.g, 0.5)           # open gates
    rivals.tcl_loss(model, clip, batch, segmenter.scale).backward()
    vit = rivals.GroupViT(clip.visual, clip.visual.proj.size(1)).train()
    rivals.groupvit_loss(vit(batch.x)[0], batch, segmenter.T, segmenter.scale).backward()
    for name, p in (*model.named_parameters(), *vit.named_parameters()):
        assert p.grad is not None and p.grad.any(), name
    taken, samples = [], rectify.list_samples(mini, "train")
    monkeypatch.setattr(rivals, "train", lambda *args: taken.extend(args[2]))
    monkeypatch.setattr(rivals, "EXAMPLES", 2)
    clippy = rivals.clippy(segmenter, samples, RATES["clippy"])
    reco = rivals.reco(segmenter, samples)
    own = [*clip.visual.parameters()]
    assert len(taken) == len(own) and not {*map(id, taken)} & {*map(id, own)}
    images = torch.randint(256, (1, 3, 96, 96), dtype=torch.uint8)
    assert clippy(images).shape == reco(images).shape == (1, 20, 8, 8)
    assert not any(p.requires_grad or p.grad is not None for p in clip.parameters())

@pytest.mark.slow
@pytest.mark.parametrize("name", list(rivals.RIVALS))
def test_masks_of_a_rival_do_not_depend_on_ground_truth(name, mini, tmp_path_factory, monkeypatch):
    """By the command line, on true and on scrambled labels: the same masks, another mIoU."""
    base = tmp_path_factory.getbasetemp() / "rivals"    # all rivals share the ReCLIP of each world
    monkeypatch.setattr(rivals, "EXAMPLES", 2)
    monkeypatch.setattr(rivals, "TRAINING", RATES)
    reports, written = [], []
    for world in ("true", "scrambled"):
        data, out = base / world, base / f"{world}-out"
        if not data.is_dir():
            shutil.copytree(mini, data)
            for path in (data / "SegmentationClass").glob("*.png") if world == "scrambled" else ():
                label = np.asarray(Image.open(path))
                label = np.where((label > 0) & (label < 255), label % 20 + 1, label)
                rectify.write(path, rectify.palette_png(label.astype(np.uint8)))
        rivals.main([name, "--data", str(data), "--dataset", "emoji", "--out", str(out),
                     "--epochs", "1", "--views", "1"])
        reports.append(json.loads((out / name / "rivals.json").read_text())["results"])
        written.append({path.name: path.read_bytes() for path in (out / name).rglob("*.png")
                        if path.name != "figure4.png"})
    title = rivals.RIVALS[name][0]
    assert list(reports[0]) == ["maskclip", "reclip", title]
    assert reports[0][title] != reports[1][title]
    assert len(written[0]) == 32 and written[0] == written[1]

# ------------------------------------------------------------------------------------------- tables

def test_tables_go_on_after_an_interrupt(tmp_path, monkeypatch):
    """What was measured is not measured again; the text around a table stays; ± is over n − 1."""
    monkeypatch.chdir(tmp_path)
    calls, values = [], iter([60.0, 74.0, 62.0, 76.0])

    def measure(dataset, recipe, method, seed):
        calls.append((method, seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"command": "`python`", "mIoU": next(values), "gain": 1.0}

    monkeypatch.setattr(tables, "main_row", measure)
    monkeypatch.setattr(tables, "MAIN", {"ReCLIP": "reclip", "ReCLIP++": "reclip++"})
    results, begin = tmp_path / "RESULTS.md", "# Results\n\n<!-- machine -->\n<!-- /machine -->\n"
    results.write_text(f"{begin}\nBefore.\n\n<!-- main -->\nold\n<!-- /main -->\n\nAfter.\n")
    run = lambda: tables.main(["main", "--seeds", "0", "1", "--results", str(results)])
    with pytest.raises(KeyboardInterrupt):
        run()
    assert "old" in results.read_text()
    run(), run()
    assert calls == [("reclip", 0), ("reclip++", 0), ("reclip", 1), ("reclip", 1), ("reclip++", 1)]
    text = results.read_text()
    for row in ("| ReCLIP | `python` | 61.0 ± 1.4 (60.0 62.0) | +1.0 | 58.5 |",     # sqrt(2), not 1
                "| ReCLIP++ | `python` | 75.0 ± 1.4 (74.0 76.0) | +1.0 | 73.5 |"):
        assert row in text and "old" not in text
    assert "Before.\n\n<!-- main -->" in text and "<!-- /main -->\n\nAfter." in text
    assert torch.__version__ in text and "`python tests/tables.py main`" in text

def test_published_numbers_stand_beside_rows_that_exist():
    for (table, dataset, recipe), published in tables.PUBLISHED.items():
        assert set(published) <= set(tables.units(table, dataset, recipe)), (table, dataset)
    assert list(tables.units("table11", "emoji", "")) == [
        "CLIPpy+", "ReCo+", "MaskCLIP+", "ReCLIP", "ReCLIP++"]

def test_the_commands_in_the_tables_do_what_was_measured():
    for table, rows in tables.RECTIFIED.items():
        for options in rows("emoji").values():
            words = shlex.split(tables.command(options).strip("`"))[2:]
            typed = rectify.command_line(rectify.Config, "", rectify.configure, words)
            assert rectify.configure(**typed) == rectify.configure(**options), table

@pytest.mark.slow
def test_a_row_is_measured(emoji, tmp_path, monkeypatch):
    """On few images; the second row of a seed takes the first one's features."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(emoji)
    splits, kept, few, x = rectify.splits, {}, dict(dataset="emoji", epochs=1), []
    monkeypatch.setattr(rectify, "splits", lambda folder: [part[:24] for part in splits(folder)])
    for options in (dict(method="reclip"), dict(method="reclip++", background="sky, grass")):
        row = tables.rectified(options | few, 0, kept)
        assert 0 < row["mIoU"] < 100 and 0 < row["precision of y"] <= 100
        x.append(kept["x"])
    assert x[0] is x[1] and "IoU of the background" in row

# -------------------------------------------------------------------------------------------- bench

def test_medians_leave_out_what_fails(capsys):
    t = bench.medians({"slow": lambda: time.sleep(0.02), "fails": lambda: 1 / 0, "fast": int}, 3)
    assert t.keys() == {"slow", "fast"} and t["slow"][1] >= 0.02 > t["fast"][1]
    assert "left out: fails" in capsys.readouterr().out

def test_gpu_rows_have_no_int8_and_tensorrt_one_engine(tmp_path, monkeypatch):
    """TensorRT's libraries come before its session, its engine is kept and of one shape."""
    asked, order = [], []

    class Session:
        def __init__(self, path, settings, providers):
            order.append(providers[0][0])
            asked.append((path, *providers[0]))
        get_providers = lambda self: [asked[-1][1]]

    class Finder:                                       # sees what is imported
        find_spec = lambda self, name, *_: name == "tensorrt_libs" and order.append(name)

    (tmp_path / "tensorrt_libs.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.setattr(bench.onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(bench.onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(bench, "bound", lambda session, x: None)
    files = {name: tmp_path / f"{name}.onnx" for name in ("fp32", "fp16", "int8")}
    nothing = SimpleNamespace(to=lambda device: None)
    monkeypatch.setattr(bench.copy, "deepcopy", lambda module: nothing)
    monkeypatch.setattr(bench.torch, "compile", lambda module: None)
    monkeypatch.setattr(bench.torch, "autocast", lambda *_: None)
    calls = bench.ways(None, files, np.zeros((2, 8, 9, 3), np.uint8), "cuda")
    assert {name.split()[-1] for name in calls if "PyTorch" not in name} == {"fp32", "fp16"}
    assert order.index("tensorrt_libs") < order.index("TensorrtExecutionProvider")
    rt = [options for _, name, options in asked if name.startswith("Tensorrt")]
    shapes = {f"trt_profile_{k}_shapes": "image:2x8x9x3" for k in ("min", "opt", "max")}
    assert len(rt) == 2 and all(options["trt_engine_cache_enable"] == "1" for options in rt)
    assert all(shapes.items() <= options.items() for options in rt)

@pytest.mark.slow
def test_a_session_of_one_shape_computes_no_shapes(tmp_path):
    """CUDA graphs refuse nodes that ONNX Runtime puts on the CPU; such a session has none."""
    student = torch.nn.Module()
    student.aspp = torch.nn.ModuleList([torch.nn.Conv2d(3, 4, 3, 8, 1)])
    student.T, student.mean, student.std = torch.eye(4), torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    student.forward = lambda x: (student.aspp[0](x), None)
    path, counts = tmp_path / "student.onnx", []
    export.write_onnx(export.image_to_mask(student, (96, 48), 4), path, {})
    x = np.random.default_rng(0).integers(256, size=(2, 40, 56, 3), dtype=np.uint8)
    for shape in ((2, 40, 56), ()):
        settings = export.onnxruntime.SessionOptions()
        settings.optimized_model_filepath = str(tmp_path / f"{len(shape)}.onnx")
        session = bench.session_of(path, shape, "CPU", {}, settings)
        counts.append(session.run(None, {"image": x})[0])
        nodes = onnx.load(settings.optimized_model_filepath).graph.node
        counts.append([node.op_type for node in nodes].count("Shape"))
    assert counts[1] == 0 < counts[3] and (counts[0] == counts[2]).all()

@pytest.mark.slow
def test_bench_measures_every_row(emoji, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(emoji)
    monkeypatch.setitem(bench.SIZES, "cpu", dict(
        images=16, batch=2, steps=2, repeats=1, base=dict(images=2, classes=3, side=24),
        grow=dict(images=(2, 4), classes=(3, 6), side=(24, 48))))
    bench.main(["--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out/bench.json").read_text())["rows"]
    printed = capsys.readouterr().out
    assert len(rows) == 15
    assert all(math.isfinite(row["value"]) and row["what"] in printed for row in rows)
