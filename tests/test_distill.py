"""What distill.py promises: DeepLabV2 as published, three losses that each train it, and a student without CLIP."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import distill
import rectify
from rectify import VOID, UserError


def test_deeplab_has_the_published_size():
    """44.05 M parameters with ResNet-101 and a plain 21-way classifier; one decision for each 8 pixels."""
    net = distill.DeepLabV2("resnet101", torch.eye(21)).eval()
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(44.05e6, rel=1e-3)
    with torch.no_grad():
        logits, u = net(torch.zeros(1, 3, 65, 96))
    assert logits.shape == u.shape == (1, 21, 9, 12)


def test_aspp_is_a_sum():
    """With three of the four branches silent, u is the fourth branch's output; nothing is concatenated."""
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
    {"mask": lambda: distill.mask_guided(logits, label),
     "feature": lambda: distill.feature_guided(u, F.normalize(torch.randn(2, 16, 8, 8), dim=1), coarse),
     "text": lambda: distill.text_guided(u, T, coarse, 20.0)}[alone]().backward()
    assert net.backbone.conv1.weight.grad.abs().sum() > 0


def test_the_losses_equal_slow_loops():
    torch.manual_seed(0)
    B, C, D, s = 2, 3, 5, 4
    u, f, T = torch.randn(B, D, s, s), torch.randn(B, D, s, s), F.normalize(torch.randn(C, D), dim=1)
    label = torch.randint(C, (B, s, s))
    label[0, 0] = VOID
    logits = distill.classify(u, T, torch.zeros_like(T), 10.0)
    mask, feature, text = [], [], []
    for b in range(B):
        per_class = []
        for c in range(C):
            pixels = [F.normalize(u[b, :, i, j], dim=0) for i in range(s) for j in range(s) if label[b, i, j] == c]
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
    assert distill.mask_guided(logits, label).item() == pytest.approx(torch.stack(mask).mean().item(), abs=1e-5)
    assert distill.feature_guided(u, f, label).item() == pytest.approx(torch.stack(feature).mean().item(), abs=1e-5)
    assert distill.text_guided(u, T, label, 10.0).item() == pytest.approx(torch.stack(text).mean().item(), abs=1e-5)


def test_the_run_reports_all_three_and_keeps_rectifys_log(taught):
    report = json.loads((taught / "distill.json").read_text())
    assert list(report["results"]) == ["maskclip", "reclip++", "student"]
    log = [json.loads(line) for line in (taught / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] and (taught / "log.jsonl").is_file() and (taught / "figure4.png").is_file()


def test_the_student_needs_no_clip(taught, mini):
    """student.pt holds nothing of CLIP, and segments in a process that never imports open_clip."""
    state = torch.load(taught / "student.pt", weights_only=True)
    assert not [k for k in state["student"] if "visual" in k or "resblocks" in k or "token" in k]
    code = (f"import sys; sys.path.insert(0, {str(rectify.HERE)!r}); import torch, distill\n"
            f"net, state = distill.load_student({str(taught / 'student.pt')!r})\n"
            "mask = distill.predict_student(net, torch.zeros(1, 3, 50, 70, dtype=torch.uint8), state['size'])\n"
            "assert mask.shape == (1, 50, 70) and 'open_clip' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_of_masks_is_checked_before_training(taught, tmp_path):
    with pytest.raises(UserError, match="24 of 24 training pictures have no mask"):
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
    (Image.new("P", (9, 9)), "the mask is 9×9, its image"), (None, "not a readable mask"), (77, "the mask holds 77, with 20 classes")])
def test_a_mask_that_is_wrong_is_named_before_training(taught, mini, tmp_path, wrong, message):
    """One of 24 masks has another size, is no picture, or has a value that is no class."""
    masks = shutil.copytree(mini / "SegmentationClass", tmp_path / "masks")
    victim = masks / f"{rectify.list_samples(mini, 'train')[3].name}.png"
    if isinstance(wrong, int):
        wrong = Image.new("P", Image.open(victim).size, wrong)
    wrong.save(victim) if wrong else victim.write_text("no picture")
    with pytest.raises(UserError, match=f"{victim.name}.*{message}"):
        distill.main(["--out", str(beginner(taught, tmp_path / "run")), "--teacher", str(masks)])


def test_masks_of_any_other_method_can_teach(taught, mini, tmp_path, capsys):
    """--teacher DIR (Table 11): no teacher's features, so two losses; written to a folder named as DIR."""
    out, masks = beginner(taught, tmp_path / "run"), shutil.copytree(mini / "SegmentationClass", tmp_path / "theirs")
    distill.main(["--out", str(out), "--teacher", str(masks), "--epochs", "2"])
    assert "no feature-guided loss" in capsys.readouterr().out and (out / "theirs/student.pt").is_file()
    assert "feature" not in json.loads((out / "theirs/log.jsonl").read_text().splitlines()[0])


def test_maskclip_plus_is_a_student_beside_ours(taught, mini, tmp_path):
    """--teacher maskclip gives MaskCLIP+ in a folder of its own, and a later measurement shows it beside ours."""
    out = beginner(taught, tmp_path / "run")
    distill.main(["--out", str(out), "--teacher", "maskclip", "--epochs", "1"])
    shutil.copy(taught / "student.pt", out)
    distill.main(["--eval", str(out / "student.pt"), "--out", str(out)])
    results = json.loads((out / "distill.json").read_text())["results"]
    assert list(results) == ["maskclip", "reclip++", "maskclip+", "student"]
    assert results["student"] == json.loads((taught / "distill.json").read_text())["results"]["student"]


def test_ground_truth_teaches_nothing(taught, mini, tmp_path, monkeypatch):
    """With every training label scrambled the student is the same to the last bit; only --ignore-gt-background reads them."""
    args, load = ["--epochs", "1"], rectify.load_label
    distill.main(["--out", str(beginner(taught, tmp_path / "a")), *args])
    monkeypatch.setattr(distill, "load_label", lambda path, size, classes: 19 - load(path, size, classes) % 20)
    distill.main(["--out", str(beginner(taught, tmp_path / "b")), *args])
    assert same(student(tmp_path / "a"), student(tmp_path / "b"))


def test_the_published_protocol_says_that_it_looks(taught, tmp_path, capsys):
    out = beginner(taught, tmp_path / "run")
    distill.main(["--out", str(out), "--epochs", "1", "--ignore-gt-background"])
    assert "GROUND TRUTH" in capsys.readouterr().out


def test_the_lesson_is_void_outside_the_picture_and_where_truth_says_so(taught):
    """Crops larger than the picture: void outside; with ground truth given, void on its background too."""
    recipe = {"crop": 32, "jitter": (1, 1), "stretch": 1}
    picture, mask = torch.full((3, 16, 32), 128, dtype=torch.uint8), torch.ones(16, 32, dtype=torch.uint8)
    truth = torch.full((16, 32), VOID, dtype=torch.uint8)
    x, label, f = distill.lesson(None, [(0, picture, mask, None)], recipe, "cpu")
    assert x.shape == (1, 3, 32, 32) and f is None and (label == 1).sum() == 16 * 32 and (label == VOID).sum() == 16 * 32
    assert (distill.lesson(None, [(0, picture, mask, truth)], recipe, "cpu")[1] == VOID).all()


def test_the_teacher_of_whole_pictures_and_of_crops_agree(taught):
    """targets: the maps of a whole picture cut by a window that shows all of it are what the teacher says of that picture."""
    segmenter = rectify.Segmenter.load(taught / "rectify.pt", device="cpu")
    teacher = distill.Teacher(segmenter, "reclip++", least=0)
    picture = torch.randint(256, (3, 192, 192), dtype=torch.uint8)
    logits, f = teacher(picture[None])
    mirrored, _ = teacher(picture.flip(-1)[None])
    teacher.ask_once([(0, picture, None, None)])
    assert torch.allclose(teacher.known[0][0].float(), (logits[0] + mirrored[0].flip(-1)) / 2, atol=1e-2)
    window = torch.eye(2, 3)[None]
    assert torch.allclose(distill.look([logits[0]], window, logits.size(-1))[0], logits[0], atol=1e-4)


def test_kill_and_resume(taught, tmp_path):
    """kill -9 in the middle, then --resume: the weights and the log of a run that nothing interrupted."""
    whole, killed = beginner(taught, tmp_path / "whole"), beginner(taught, tmp_path / "killed")
    args = lambda out: ["--out", str(out), "--epochs", "12", "--seed", "1"]
    distill.main(args(whole))
    process = subprocess.Popen([sys.executable, distill.__file__, *args(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "distill.partial.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (killed / "student.pt").exists()
    distill.main([*args(killed), "--resume"])
    assert same(student(whole), student(killed)) and not (killed / "distill.partial.pt").exists()
    untimed = lambda out: [line.split(', "images_per_second"')[0] for line in (out / "log.jsonl").read_text().splitlines()]
    assert untimed(whole) == untimed(killed) and len(untimed(whole)) == 12
    with pytest.raises(UserError, match="was trained with --seed 1, not 2"):
        distill.main(["--out", str(whole), "--epochs", "12", "--seed", "2", "--resume"])


def test_a_bare_command_goes_on_with_the_newest_run(taught, tmp_path, monkeypatch, capsys):
    """Two runs: the newest is taken and named. None: the command that makes one is."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="python rectify.py"):
        distill.main([])
    (tmp_path / "runs").mkdir()
    old, new = beginner(taught, tmp_path / "runs/old"), beginner(taught, tmp_path / "runs/new")
    os.utime(old / "rectify.pt", (0, 0))
    distill.main(["--epochs", "1"])
    assert capsys.readouterr().out.startswith("distilling runs/new/rectify.pt") and (new / "student.pt").is_file()


@pytest.mark.parametrize("args, message", [
    (["--teacher", "reclip"], "is reclip\\+\\+"), (["--teacher", "nowhere"], "neither reclip"), (["--lr", "0"], "must be positive"),
    (["--mask-weight", "-1"], "none below 0"), (["--epochs", "0"], "start at 1"), (["--backbone", "vgg0"], "timm cannot make it"),
    (["--dataset", "voc"], "no such checkpoint")])
def test_what_makes_no_sense_is_refused(taught, args, message):
    with pytest.raises(UserError, match=message):
        distill.main([*(["--out", str(taught)] if "voc" not in args else []), *args])


def test_flips_and_scales_average_to_a_mask(taught):
    net, state = distill.load_student(taught / "student.pt")
    images = torch.randint(256, (2, 3, 40, 60), dtype=torch.uint8)
    assert distill.predict_student(net, images, state["size"], tta=True).shape == (2, 40, 60)


def test_the_schedule_falls_to_its_floor():
    assert distill.poly(0, 10, 0.1) == 0.1 and distill.poly(10, 10, 0.1) == distill.FLOOR
    assert distill.poly(5, 10, 1e-5) == 1e-5, "a rate below the floor stays"


def test_weights_that_do_not_fit_are_not_forced(capsys):
    """The shipped backbone is narrow: a wide one starts from scratch and says so; a fitting one starts from the file."""
    weights = distill.RECIPES["emoji"]["weights"]
    fitting = distill.make_backbone("resnet18", 0.5, weights)
    stored = load_file(rectify.HERE / weights)["layer4.1.conv2.weight"].float()
    assert torch.equal(fitting.state_dict()["layer4.1.conv2.weight"], stored) and not capsys.readouterr().out
    distill.make_backbone("resnet18", 0.25, weights)
    assert "starts from scratch" in capsys.readouterr().out
