"""What distill.py promises: DeepLabV2 as published, three losses that each train it, and a student
without CLIP.
"""
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import distill
import rectify
from rectify import VOID, UserError


def test_deeplab_has_the_published_size():
    """44.05 M parameters with ResNet-101 and a plain 21-way classifier; one decision for each 8
    pixels.
    """
    net = distill.DeepLabV2("resnet101", torch.eye(21)).eval()
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(44.05e6, rel=1e-3)
    with torch.no_grad():
        logits, u = net(torch.zeros(1, 3, 65, 96))
    assert logits.shape == u.shape == (1, 21, 9, 12)


def test_aspp_is_a_sum():
    """u is the sum of what four branches say of the backbone's feature; nothing is concatenated."""
    net = distill.DeepLabV2("resnet18", torch.eye(5), width=0.25).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        parts = [conv(net.backbone(x)[0]) for conv in net.aspp]
        assert torch.allclose(net(x)[1], sum(parts), atol=1e-5) and len(parts) == 4


@pytest.mark.parametrize("alone", ["mask", "feature", "text"])
def test_each_loss_alone_trains_the_student(alone):
    """The authors' feature and text terms are detached; here each reaches the first convolution."""
    torch.manual_seed(0)
    T = F.normalize(torch.randn(4, 16), dim=1)
    net = distill.DeepLabV2("resnet18", T, scale=20.0, width=0.25).train()
    label = torch.randint(4, (2, 64, 64))
    logits, u = net(torch.randn(2, 3, 64, 64))
    coarse = distill.on_grid(label, u.shape[-2:])
    f = F.normalize(torch.randn(2, 16, 8, 8), dim=1)
    {"mask": lambda: distill.mask_guided(logits, label),
     "feature": lambda: distill.feature_guided(u, f, coarse),
     "text": lambda: distill.text_guided(u, T, coarse, 20.0)}[alone]().backward()
    assert net.backbone.conv1.weight.grad.abs().sum() > 0


def test_the_losses_equal_slow_loops():
    torch.manual_seed(0)
    B, C, D, s = 2, 3, 5, 4
    u, f, T = torch.randn(B, D, s, s), torch.randn(B, D, s, s), torch.randn(C, D)
    T = F.normalize(T, dim=1)
    label = torch.randint(C, (B, s, s))
    label[0, 0] = VOID
    logits = distill.classify(u, T, torch.zeros_like(T), 10.0)
    mask, feature, text = [], [], []
    for b in range(B):
        per_class = []
        for c in range(C):
            pixels = [F.normalize(u[b, :, i, j], dim=0) for i in range(s) for j in range(s)
                      if label[b, i, j] == c]
            if pixels:
                z = torch.stack(pixels).mean(0)
                per_class.append(-torch.log_softmax(torch.stack([10 * z @ t for t in T]), 0)[c])
        text.append(torch.stack(per_class).mean())
        for i in range(s):
            for j in range(s):
                if label[b, i, j] != VOID:
                    mask.append(-torch.log_softmax(logits[b, :, i, j], 0)[label[b, i, j]])
                    gap = F.normalize(u[b, :, i, j], dim=0) - F.normalize(f[b, :, i, j], dim=0)
                    feature.append(D ** 0.5 * gap.abs().mean())
    for found, slow in ((distill.mask_guided(logits, label), mask),
                        (distill.feature_guided(u, f, label), feature),
                        (distill.text_guided(u, T, label, 10.0), text)):
        assert found.item() == pytest.approx(torch.stack(slow).mean().item(), abs=1e-5)


def test_the_run_reports_all_three_and_keeps_rectifys_log(taught):
    report = json.loads((taught / "distill.json").read_text())
    assert list(report["results"]) == ["maskclip", "reclip++", "student"]
    log = [json.loads(line) for line in (taught / "log.jsonl").read_text().splitlines()]
    own = [line for line in log if line.get("stage") == "distill"]
    assert (len(own), len(log)) == (8, 10) and own[-1]["loss"] < own[0]["loss"]
    assert {"mask", "feature", "text"} <= own[-1].keys() and (taught / "figure4.png").is_file()


def test_the_student_needs_no_clip(taught):
    """student.pt holds nothing of CLIP, and segments in a process that never imports open_clip."""
    state = torch.load(taught / "student.pt", weights_only=True)
    assert not [k for k in state["student"] if "visual" in k or "resblocks" in k or "token" in k]
    code = (f"import sys; sys.path.insert(0, {str(rectify.HERE)!r})\n"
            "import distill, rectify, torch\n"
            f"state = rectify.load_checkpoint({str(taught / 'student.pt')!r}, 'student')\n"
            "net, cfg = distill.load_student(state), distill.Config(**state['config'])\n"
            "images = torch.zeros(1, 3, 50, 70, dtype=torch.uint8)\n"
            "assert distill.predict_student(net, images, cfg, 20).shape == (1, 50, 70)\n"
            "assert 'open_clip' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_of_masks_is_checked_before_training(taught, tmp_path):
    with pytest.raises(UserError, match="24 of 24 training images have no mask"):
        distill.main(["--out", str(taught), "--teacher", str(tmp_path)])


def beginner(taught, folder):
    """A folder with the rectify.pt of `taught` and nothing else."""
    folder.mkdir()
    shutil.copy(taught / "rectify.pt", folder)
    return folder


def student(folder):
    return torch.load(folder / "student.pt", weights_only=True)["student"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("wrong, message", [
    (Image.new("P", (9, 9)), "the mask is 9×9, its image"), (None, "not a readable mask"),
    (77, "the mask holds 77, with 20 classes")])
def test_a_mask_that_is_wrong_is_named_before_training(taught, mini, tmp_path, wrong, message):
    """One of 24 masks has another size, is no image, or has a value that is no class."""
    masks = shutil.copytree(mini / "SegmentationClass", tmp_path / "masks")
    victim = masks / f"{rectify.list_samples(mini, 'train')[3].name}.png"
    if isinstance(wrong, int):
        wrong = Image.new("L", Image.open(victim).size, wrong)
    wrong.save(victim) if wrong else victim.write_text("no image")
    with pytest.raises(UserError, match=f"{victim.name}.*{message}"):
        distill.main(["--out", str(beginner(taught, tmp_path / "run")), "--teacher", str(masks)])


def test_masks_of_any_other_method_can_teach(taught, mini, tmp_path, capsys):
    """--teacher DIR (Table 11): no teacher's features, so two losses; written to a folder of that
    name.
    """
    out = beginner(taught, tmp_path / "run")
    masks = shutil.copytree(mini / "SegmentationClass", tmp_path / "theirs")
    distill.main(["--out", str(out), "--teacher", str(masks), "--epochs", "2"])
    assert "no feature-guided loss" in capsys.readouterr().out
    assert (out / "theirs/student.pt").is_file()
    assert "feature" not in json.loads((out / "theirs/log.jsonl").read_text().splitlines()[0])


def test_maskclip_plus_is_a_student_beside_ours(taught, tmp_path, monkeypatch, capsys):
    """--teacher maskclip gives MaskCLIP+ in a folder of its own; measured later beside ours, where
    the schedules are the same. Measured itself it leaves our files alone.
    """
    out = beginner(taught, tmp_path / "run")
    shutil.copy(taught / "student.pt", out)
    results = lambda: json.loads((out / "distill.json").read_text())["results"]
    distill.main(["--out", str(out), "--teacher", "maskclip", "--epochs", "8"])
    distill.main(["--eval", str(out / "student.pt")])
    assert list(results()) == ["maskclip", "reclip++", "maskclip+", "student"]
    state = torch.load(out / "maskclip/student.pt", weights_only=True)
    monkeypatch.setattr(distill, "evaluate", lambda predict, *_: sys.exit(
        str([*predict(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))])))
    for odd in ({"config": state["config"] | {"epochs": 1}}, {"names": state["names"][::-1]},
                {"rectify": state["rectify"] | {"attention": "naclip"}}, {"images": "0"}):
        torch.save(state | odd, out / "maskclip/student.pt")
        with pytest.raises(SystemExit, match=r"\['maskclip', 'reclip\+\+', 'student'\]"):
            distill.main(["--eval", str(out / "student.pt")])
        assert "or schedule than this student" in capsys.readouterr().out
    torch.save(state, out / "maskclip/student.pt")
    monkeypatch.undo()
    theirs = json.loads((taught / "distill.json").read_text())["results"]
    assert results()["student"] == theirs["student"]
    ours = (out / "distill.json").read_bytes()
    (out / "maskclip/distill.json").unlink()
    distill.main(["--eval", str(out / "maskclip/student.pt")])
    assert (out / "maskclip/distill.json").is_file() and (out / "distill.json").read_bytes() == ours


def test_maskclip_plus_learns_from_the_clip_that_nobody_trained(taught):
    """Also from a run whose image tower was trained with --finetune."""
    segmenter = rectify.load_segmenter(taught / "rectify.pt")
    cfg = distill.configure(segmenter.cfg, teacher="maskclip")
    images = torch.randint(256, (1, 3, 96, 120), dtype=torch.uint8)
    logits, f = distill.Teacher(segmenter, cfg).look(images)
    segmenter.frozen = copy.deepcopy(segmenter.clip)
    segmenter.clip.visual.proj.data.neg_()
    again = distill.Teacher(segmenter, cfg).look(images)
    assert torch.equal(again[0], logits) and torch.equal(again[1], f)
    ours = distill.Teacher(segmenter, distill.configure(segmenter.cfg)).look(images)
    assert torch.allclose(ours[1], -f, atol=1e-5)


def test_an_earlier_students_files_do_not_outlive_it(taught, tmp_path, capsys):
    """What export.py made of a student is not taken for a new one's."""
    out = beginner(taught, tmp_path / "run")
    made = ["student.onnx", "student.int8.onnx", "export.json", "bench.json"]
    for name in [*made, "mine.onnx"]:
        (out / name).write_text("of another student")
    distill.main(["--out", str(out), "--epochs", "1"])
    said = capsys.readouterr().out
    assert f"removed an earlier student's {', '.join(sorted(made))}" in said
    assert not any((out / name).exists() for name in made) and (out / "mine.onnx").is_file()


def test_eval_measures_where_the_student_lies(taught, tmp_path):
    """--out would be ignored, so it is refused."""
    with pytest.raises(UserError, match="--out: --eval measures in the student's own folder"):
        distill.main(["--eval", str(taught / "student.pt"), "--out", str(tmp_path)])


def test_a_reclip_teacher_gives_the_student_its_reference(mini, tmp_path):
    """Logits are scale · (norm(u)·Tᵀ − norm(u)·Rᵀ), with the R of the ReCLIP checkpoint; ReCLIP++
    has none.
    """
    out = tmp_path / "reclip"
    rectify.main(["--dataset", "emoji", "--data", str(mini), "--names", str(mini / "names.txt"),
                  "--out", str(out), "--epochs", "1", "--views", "1", "--method", "reclip"])
    distill.main(["--out", str(out), "--epochs", "1"])
    net = distill.load_student(rectify.load_checkpoint(out / "student.pt", "student"))
    with torch.no_grad():
        logits, u = net(torch.randn(1, 3, 64, 64))
        unit = F.normalize(u, dim=1)[0, :, 2, 3]
        expected = net.scale * (unit @ net.T.T - unit @ net.R.T)
    assert net.R.any() and torch.allclose(logits[0, :, 2, 3], expected, atol=1e-4)


def test_the_teacher_may_see_every_crop(taught, tmp_path):
    """targets crop, the paper's way and the default of the real datasets: the loss falls, and it is
    another student.
    """
    out = beginner(taught, tmp_path / "run")
    distill.main(["--out", str(out), "--epochs", "8", "--targets", "crop"])
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0]
    assert not same(student(out), student(taught))


def test_ground_truth_teaches_nothing(taught, mini, tmp_path, capsys):
    """With every label of the training images blank the student is the same to the last bit, unless
    it was told to look.
    """
    folder, runs = shutil.copytree(mini, tmp_path / "mini"), [tmp_path / name for name in "abcd"]
    (folder / "ImageSets/Segmentation/val.txt").unlink()                    # nothing is measured
    for out, flags in zip(runs, ([], ["--ignore-gt-background"]) * 2):
        state = torch.load(beginner(taught, out) / "rectify.pt", weights_only=True)
        state["config"]["data"] = str(folder)
        torch.save(state, out / "rectify.pt")
        distill.main(["--out", str(out), "--epochs", "1", *flags])
        if out == runs[1]:
            assert "GROUND TRUTH" in capsys.readouterr().out
            for sample in rectify.list_samples(folder, "train"):
                with Image.open(sample.label) as mask:
                    Image.new("L", mask.size, 7).save(sample.label)
    assert same(student(runs[0]), student(runs[2]))
    assert not same(student(runs[1]), student(runs[3]))


def settings(**typed):
    """distill.py's Config after a ReCLIP++ of Emoji VOC's recipe."""
    return distill.configure(rectify.configure(), **typed)


def test_a_label_is_void_outside_the_image_and_where_truth_says_so():
    """Crops larger than the image: void outside; with ground truth given, void on its background
    too.
    """
    cfg = settings(crop=32, jitter=(1.0, 1.0), stretch=1.0)
    image = torch.full((3, 16, 32), 128, dtype=torch.uint8)
    mask = torch.ones(16, 32, dtype=torch.uint8)
    truth = torch.full((16, 32), VOID, dtype=torch.uint8)
    x, label, f = distill.training_batch(None, [(0, image, mask, None)], cfg, "cpu")
    assert x.shape == (1, 3, 32, 32) and f is None
    assert (label == 1).sum() == 16 * 32 and (label == VOID).sum() == 16 * 32
    _, label, _ = distill.training_batch(None, [(0, image, mask, truth)], cfg, "cpu")
    assert (label == VOID).all()


def test_an_example_is_read_as_the_settings_say(mini):
    """The image has the recipe's size, mask and truth the file's; each is read only where asked
    for.
    """
    sample, masks = rectify.list_samples(mini, "train")[0], str(mini / "SegmentationClass")
    i, image, mask, truth = distill.read_example(sample, 5, settings(), 20)
    assert i == 5 and min(image.shape[1:]) == 96 and mask is None and truth is None
    *_, mask, truth = distill.read_example(
        sample, 5, settings(teacher=masks, ignore_gt_background=True), 20)
    assert torch.equal(mask, truth) and mask.shape == rectify.load_image(sample.image).shape[1:]


def noise_file(folder):
    """A Sample of noise of the size that the tiny CLIP sees, and its pixels."""
    image = torch.randint(256, (192, 192, 3), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    Image.fromarray(image.numpy()).save(folder / "noise.png")
    return rectify.Sample("noise", folder / "noise.png", None), image.permute(2, 0, 1)


def test_a_whole_image_is_seen_once_with_its_mirror_image(taught, tmp_path, monkeypatch):
    """The cached maps are the mean over both, smoothed; a window that shows all of the image gives
    their argmax as label.
    """
    segmenter = rectify.load_segmenter(taught / "rectify.pt", device="cpu")
    cfg = distill.configure(segmenter.cfg, denoise=0.0, penalty=0.0, crop=192)
    teacher, (sample, image) = distill.Teacher(segmenter, cfg), noise_file(tmp_path)
    (logits, f), (mirrored, _) = teacher(image[None]), teacher(image.flip(-1)[None])
    teacher.cache_targets([sample])
    both = (logits + mirrored.flip(-1)) / 2
    both = F.avg_pool2d(both, 3, 1, 1, count_include_pad=False)
    assert torch.allclose(teacher.cache[0][0].float(), both[0], atol=1e-2)
    monkeypatch.setattr(distill, "random_window", lambda size, cfg: torch.eye(2, 3))
    batch = [(0, image, None, None)]
    _, label, feature = distill.training_batch(teacher, batch, cfg, "cpu")
    expected = F.interpolate(both, (192, 192), mode="bilinear").argmax(1)
    assert (label == expected).float().mean() > 0.98 and feature.shape == (1, f.size(1), 24, 24)
    teacher.cache = None
    _, label, _ = distill.training_batch(teacher, batch, cfg, "cpu")
    expected = F.interpolate(logits, (192, 192), mode="bilinear").argmax(1)
    assert (label == expected).float().mean() > 0.98


def test_a_class_that_the_hypothesis_does_not_name_is_doubted(taught, tmp_path):
    """penalty: the classes that it names keep their logits, the others lose half a standard
    deviation.
    """
    segmenter = rectify.load_segmenter(taught / "rectify.pt", device="cpu")
    sample, image = noise_file(tmp_path)
    named, maps = rectify.hypothesize(segmenter, image[None])[0], []
    for penalty in (0.0, 0.5):
        cfg = distill.configure(segmenter.cfg, denoise=0.0, penalty=penalty)
        teacher = distill.Teacher(segmenter, cfg)
        teacher.cache_targets([sample])
        maps.append(teacher.cache[0][0].float())
    lost = (maps[0] - maps[1]).mean((1, 2))
    assert (lost[named].abs() < 1e-2).all() and (lost[~named] > 0.1).all()


def test_a_class_that_leaves_does_not_change_what_the_penalty_is(taught, tmp_path):
    """Denoising comes last: its -1e4 is no part of the standard deviation of the logits."""
    segmenter = rectify.load_segmenter(taught / "rectify.pt", device="cpu")
    sample, maps = noise_file(tmp_path)[0], []
    for least in (0.0, 0.3):
        teacher = distill.Teacher(segmenter, distill.configure(segmenter.cfg, denoise=least))
        teacher.cache_targets([sample])
        maps.append(teacher.cache[0][0])
    stays = (maps[1] > -1e3).all(2).all(1)
    assert 0 < stays.sum() < len(stays) and torch.equal(maps[0][stays], maps[1][stays])


def test_kill_and_resume(taught, tmp_path, monkeypatch):
    """kill -9 in the middle, then --resume, which knows the run's own settings: the weights and the
    log of a run that nothing interrupted.
    """
    whole, killed = beginner(taught, tmp_path / "whole"), beginner(taught, tmp_path / "killed")
    args = lambda out: ["--out", str(out), "--epochs", "12", "--seed", "1"]
    monkeypatch.setattr(distill, "measure", lambda *_: 0.0)         # that is not the question
    distill.main(args(whole))
    fp32 = ("import distill, rectify, sys; rectify.uses_bf16 = lambda *_: False; "
            "distill.main(sys.argv[1:])")
    process = subprocess.Popen([sys.executable, "-c", fp32, *args(killed)], cwd=rectify.HERE,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "distill.partial.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (killed / "student.pt").exists()
    distill.main(["--out", str(killed), "--resume"])
    assert same(student(whole), student(killed))
    assert not (killed / "distill.partial.pt").exists()
    untimed = lambda out: [line.split(', "images_per_second"')[0]
                           for line in (out / "log.jsonl").read_text().splitlines()]
    assert untimed(whole) == untimed(killed) and len(untimed(whole)) == 12
    with pytest.raises(UserError, match="--seed 2: the checkpoint was trained with 1"):
        distill.main(["--out", str(whole), "--epochs", "12", "--seed", "2", "--resume"])


def test_what_was_asked_of_one_measurement_is_not_kept(taught):
    """--tta and --resume are of the command, not of the student."""
    segmenter = rectify.load_segmenter(taught / "rectify.pt", device="cpu")
    trained = asdict(distill.configure(segmenter.cfg, tta=True, resume=True))
    again = distill.configure(segmenter.cfg, trained)
    assert not again.tta and not again.resume
    assert distill.configure(segmenter.cfg, trained, tta=True).tta


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(taught, tmp_path):
    out = beginner(taught, tmp_path / "run")
    state = torch.load(taught / "student.pt", weights_only=True)
    torch.save(state | {"log": [], "optimizer": {"state": {}}}, out / "distill.partial.pt")
    with pytest.raises(UserError, match="distill.partial.pt: does not fit"):
        distill.main(["--out", str(out), "--resume"])


def test_a_student_of_another_teacher_is_refused(taught, tmp_path):
    """--eval and --resume know a teacher by its weights: with others in rectify.pt its student is
    nobody's.
    """
    out = beginner(taught, tmp_path / "run")
    shutil.copy(taught / "student.pt", out)
    state = torch.load(out / "rectify.pt", weights_only=True)
    state["rectifier"]["V"][0] += 1
    torch.save(state, out / "rectify.pt")
    for args in (["--eval", str(out / "student.pt")], ["--out", str(out), "--resume"]):
        with pytest.raises(UserError, match=f"{out / 'student.pt'}: has another teacher"):
            distill.main(args)
    assert sorted(path.name for path in out.iterdir()) == ["rectify.pt", "student.pt"]


def test_a_bare_command_goes_on_with_the_newest_run(taught, tmp_path, monkeypatch, capsys):
    """Two runs: the newest is taken and named. None: the command that makes one is."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="python rectify.py"):
        distill.main([])
    (tmp_path / "runs").mkdir()
    old, new = beginner(taught, tmp_path / "runs/old"), beginner(taught, tmp_path / "runs/new")
    os.utime(old / "rectify.pt", (0, 0))
    distill.main(["--epochs", "1"])
    assert capsys.readouterr().out.startswith("distilling runs/new/rectify.pt")
    assert (new / "student.pt").is_file()


@pytest.mark.parametrize("args, message", [
    (["--teacher", "reclip"], "is reclip\\+\\+"), (["--teacher", "nowhere"], "neither reclip"),
    (["--lr", "0"], "must be positive"), (["--mask-weight", "-1"], "none below 0"),
    (["--epochs", "0"], "starts at 1"), (["--backbone", "vgg0"], "timm cannot make it"),
    (["--dataset", "voc"], "no such checkpoint")])
def test_what_makes_no_sense_is_refused(taught, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        distill.main([*(["--out", str(taught)] if "voc" not in args else []), *args])


def test_flips_and_scales_average_to_a_mask(taught):
    state = rectify.load_checkpoint(taught / "student.pt", "student")
    net, cfg = distill.load_student(state), distill.Config(**state["config"])
    x = F.interpolate(torch.rand(2, 3, 5, 8) * 255, (40, 64), mode="bilinear").byte()
    mask, mirrored = (distill.predict_student(net, images, replace(cfg, tta=True), 20)
                      for images in (x, x.flip(-1)))
    assert mask.shape == (2, 40, 64) and (mask == mirrored.flip(-1)).float().mean() > 0.99
    single = distill.predict_student(net, x, cfg, 20)
    assert (mask != single).any(), "and not what a single look gives"


def test_flips_and_scales_keep_the_meaning_of_the_threshold(monkeypatch):
    """Logits of a mean over looks, not of their sum, make the probability."""
    logits = torch.tensor([0.5, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)           # p = 0.62
    net = lambda x: (logits, None)
    net.T = torch.zeros(2, 3)
    cfg = SimpleNamespace(size=(64, 32), tta=True)
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    for threshold, expected in ((0.7, 2), (0.6, 0)):
        assert (distill.predict_student(net, image, cfg, 2, threshold) == expected).all()


@pytest.mark.parametrize("lr, floor, last", [(0.1, 1e-4, 1e-4), (1e-5, 1e-4, 1e-5)])
def test_the_schedule_falls_to_its_floor(taught, mini, tmp_path, monkeypatch, lr, floor, last):
    """floor + (lr − floor) · (1 − step/steps)^0.9 in every step, of ASPP the same from `head` · lr;
    a rate below the floor stays.
    """
    rates = []

    def step(model, optimizer, *_):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return {"mask": torch.tensor(1.0)}

    monkeypatch.setattr(distill, "step", step)
    segmenter = rectify.load_segmenter(taught / "rectify.pt", device="cpu")
    cfg = distill.configure(segmenter.cfg, teacher=str(mini / "SegmentationClass"), epochs=5,
                            batch=12, lr=lr, floor=floor, head=10.0)
    student, samples = distill.make_student(cfg, segmenter), rectify.list_samples(mini, "train")
    fixed = {"names": segmenter.names, "background": []}
    distill.train(student, None, samples, cfg, fixed, tmp_path)
    assert rates == [pytest.approx([last + (start - last) * (1 - k / 10) ** 0.9
                                    for start in (lr, 10 * lr)]) for k in range(10)]
    log = [json.loads(line)["lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log == pytest.approx([backbone for backbone, _ in rates[1::2]], abs=1e-6)


def test_weights_are_looked_for_here_first(tmp_path, monkeypatch):
    """A relative --weights is a file of the current folder, else one beside the script."""
    monkeypatch.chdir(tmp_path)
    stored = load_file(rectify.HERE / distill.RECIPES["emoji"]["weights"])
    save_file({name: torch.zeros_like(value) for name, value in stored.items()}, "own.safetensors")
    network = distill.make_backbone("resnet18", 0.5, "own.safetensors")
    assert not network.state_dict()["layer4.1.conv2.weight"].any()


def test_weights_that_do_not_fit_are_not_forced(monkeypatch, capsys):
    """The shipped backbone is narrow: a fitting one starts from the file, another is refused. Where
    ImageNet's weights cannot be had it starts from scratch, and says so.
    """
    weights, create = distill.RECIPES["emoji"]["weights"], distill.timm.create_model
    fitting = distill.make_backbone("resnet18", 0.5, weights)
    stored = load_file(rectify.HERE / weights)["layer4.1.conv2.weight"].float()
    assert torch.equal(fitting.state_dict()["layer4.1.conv2.weight"], stored)
    with pytest.raises(UserError, match="cannot be read as weights of resnet18, width 0.25"):
        distill.make_backbone("resnet18", 0.25, weights)

    def offline(name, pretrained=False, pretrained_cfg_overlay=None, **options):
        if pretrained:
            raise OSError("no route to host")
        return create(name, **options)

    monkeypatch.setattr(distill.timm, "create_model", offline)
    assert not capsys.readouterr().err
    assert distill.make_backbone("resnet18", 0.25, "imagenet").feature_info.channels() == [128]
    assert "STARTS FROM SCRATCH" in capsys.readouterr().err
