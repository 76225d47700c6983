"""DeepLabV2 as published, three losses that each train it, and a student without CLIP."""
import copy
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import rectify
import torch
import torch.nn.functional as F
from PIL import Image
from rectify import VOID, UserError
from safetensors.torch import load_file

import distill

def net_of(T, backbone="resnet18", width=0.25):
    """An untrained DeepLabV2 with text features T."""
    cfg = distill.Config(backbone=backbone, width=width, weights="")
    return distill.DeepLabV2(cfg, T, scale=20.0)

def beginner(taught, folder):
    """A folder with the rectify.pt of `taught` and nothing else."""
    folder.mkdir()
    return Path(shutil.copy(taught / "rectify.pt", folder)).parent

go = lambda out, *args: distill.main(["--out", str(out), *map(str, args)])
student = lambda folder: torch.load(folder / "student.pt", weights_only=True)["student"]
same = lambda a, b: a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
results = lambda folder: json.loads((folder / "distill.json").read_text())["results"]
log_of = lambda folder: [*map(json.loads, (folder / "distill.jsonl").read_text().splitlines())]
settings = lambda **typed: distill.configure(rectify.configure(), **typed)  # after a ReCLIP++

@pytest.fixture(scope="module")
def segmenter(taught):
    """The teacher of `taught`."""
    state = rectify.load(taught / "rectify.pt")
    cfg = rectify.configure(state["config"], out=str(taught), device="cpu")
    return rectify.Segmenter(cfg, state["names"], state["background"], state)

def test_deeplab_has_the_published_size():
    """44.05 M parameters with ResNet-101 and 21 classes; u, one for each 8 pixels, is the sum of
    what ASPP's four branches say."""
    net, x = net_of(torch.eye(21), "resnet101", 1.0).eval(), torch.randn(1, 3, 65, 96)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(44.05e6, rel=1e-3)
    with torch.no_grad():
        (logits, u), parts = net(x), [conv(net.backbone(x)[0]) for conv in net.aspp]
    assert logits.shape == u.shape == (1, 21, 9, 12) and len(parts) == 4
    assert torch.allclose(u, sum(parts), atol=1e-5)

@pytest.mark.parametrize("alone", ["mask", "feature", "text"])
def test_each_loss_alone_trains_the_student(alone):
    """The authors' feature and text terms are detached; here each moves the first convolution."""
    torch.manual_seed(0)
    net = net_of(F.normalize(torch.randn(4, 16), dim=1)).train()
    before = net.backbone.conv1.weight.clone()
    weights = {name: float(name == alone) for name in ("mask", "feature", "text")}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    found = distill.step(net, optimizer, torch.randn(2, 3, 64, 64), torch.randint(4, (2, 64, 64)),
                         F.normalize(torch.randn(2, 16, 8, 8), dim=1), weights)
    assert found.keys() == weights.keys() and (net.backbone.conv1.weight != before).any()

def test_the_losses_equal_slow_loops():
    B, C, D, s = 2, 3, 5, 4
    u, f, T = (F.normalize(torch.randn(*n), dim=1) for n in ((B, D, s, s), (B, D, s, s), (C, D)))
    label = torch.randint(C, (B, s, s))
    label[0, 0] = VOID
    logits = distill.classify(3 * u, T, torch.zeros_like(T), 10.0)
    mask, feature, text = [], [], []
    for b in range(B):
        members = {c: [] for c in range(C)}
        for i, j in itertools.product(range(s), repeat=2):
            if (c := label[b, i, j].item()) != VOID:
                members[c].append(u[b, :, i, j])
                mask.append(-torch.log_softmax(logits[b, :, i, j], 0)[c])
                feature.append(D ** 0.5 * (u[b, :, i, j] - f[b, :, i, j]).abs().mean())
        z = {c: torch.stack(pixels).mean(0) for c, pixels in members.items() if pixels}
        text.append(torch.stack([-torch.log_softmax(10 * T @ z[c], 0)[c] for c in z]).mean())
    for found, slow in ((distill.mask_guided(logits, label), mask),
                        (distill.feature_guided(3 * u, 2 * f, label), feature),
                        (distill.text_guided(3 * u, T, label, 10.0), text)):
        assert found.item() == pytest.approx(torch.stack(slow).mean().item(), abs=1e-5)

def test_weights_that_do_not_fit_are_not_forced(monkeypatch, capsys):
    """A file is refused. Where ImageNet's cannot be had it starts from scratch, and says so."""
    weights, make = distill.RECIPES["emoji"]["weights"], distill.make_backbone
    stored = load_file(rectify.HERE / weights)["layer1.0.conv1.weight"].float()
    assert torch.equal(make("resnet18", 0.5, weights).layer1[0].conv1.weight, stored)
    with pytest.raises(UserError, match="--width 0.25 --weights .*: timm cannot make it"):
        make("resnet18", 0.25, weights)

    create = distill.timm.create_model                  # fails as a machine without a network does
    monkeypatch.setattr(distill.timm, "create_model", lambda name, pretrained, **options: (
        {}["no route to host"] if pretrained else create(name, **options)))
    assert make("resnet18", 0.25, "imagenet").feature_info.channels() == [128]
    assert "STARTS FROM SCRATCH" in capsys.readouterr().err

def test_a_label_is_void_outside_the_image_and_where_the_mask_is(segmenter, monkeypatch):
    """There the student sees 0, the mean colour after normalization, and the teacher the mean
    colour of its CLIP, 0 to within a rounding of uint8."""
    net, crops, side = net_of(segmenter.T), [], torch.full((3, 16, 32), 128).byte()
    cfg = settings(targets="crop", crop=32, jitter=(1.0, 1.0), stretch=1.0)
    for value, known in ((1, 16 * 32), (VOID, 0)):
        examples = [(0, side, torch.full((1, 16, 32), value).byte())]
        x, label, f = distill.training_batch(net, None, examples, cfg)
        assert x.shape == (1, 3, 32, 32) and label.shape == (1, 32, 32) and f is None
        assert (label == 1).sum() == known and (label == VOID).sum() == 32 * 32 - known
        assert (x != 0).all(1).sum() == 16 * 32 == (x == 0).all(1).sum()
    labeller = distill.Labeller(segmenter, cfg)
    look = labeller.look
    monkeypatch.setattr(labeller, "look", lambda seen: crops.append(seen) or look(seen))
    examples = [(0, side, torch.zeros(1, 1, 1).byte())]
    _, label, f = distill.training_batch(net, labeller, examples, cfg)
    padding = rectify.normalize(segmenter.clip, crops[0]).movedim(1, -1)[label == VOID]
    assert len(padding) == 16 * 32 and f.shape == (1, segmenter.T.size(1), 4, 4)
    assert padding.abs().max() < 0.5 / 255 / segmenter.clip.std.min() + 1e-6
    assert (crops[0].movedim(1, -1)[label != VOID] == 128).all()

def test_an_example_is_read_as_the_settings_say(mini):
    """The image has the recipe's size, mask and truth the file's; of truth no class is kept."""
    sample, masks = rectify.list_samples(mini, "train")[0], str(mini / "SegmentationClass")
    kept = {"names": rectify.VOC_NAMES, "background": []}
    read = lambda **typed: distill.read_example(sample, 5, settings(**typed), kept)
    (i, image, none), mask = read(), read(teacher=masks)[2]
    truth = read(ignore_gt_background=True)[2]
    assert i == 5 and min(image.shape[1:]) == 96 and none.shape == (1, 1, 1) and not none.any()
    assert mask.shape[1:] == rectify.load_image(sample.image).shape[1:]
    assert torch.equal(truth == VOID, mask == VOID) and {*truth.unique().tolist()} <= {0, VOID}

@pytest.fixture
def noise(tmp_path):
    """A Sample of noise of the size that the tiny CLIP sees, and its pixels 3×H×W."""
    torch.manual_seed(0)
    image = torch.randint(256, (192, 192, 3)).byte()
    Image.fromarray(image.numpy()).save(tmp_path / "noise.png")
    return rectify.Sample("noise", tmp_path / "noise.png", None), image.permute(2, 0, 1)

def seen(segmenter, sample, **typed):
    """A Labeller, and its logits C×h×w of a whole image."""
    labeller = distill.Labeller(segmenter, distill.configure(segmenter.cfg, **typed))
    labeller.see_all([sample])
    return labeller, labeller.seen[0][0].float()

def test_a_whole_image_is_seen_once_with_its_mirror_image(segmenter, noise, monkeypatch):
    """The maps are the mean over both, smoothed; a window of all of the image has their argmax."""
    (sample, image), net, typed = noise, net_of(segmenter.T), dict(denoise=0, penalty=0, crop=192)
    labeller, logits = seen(segmenter, sample, **typed)
    one, other = (labeller.look(x[None])[0] for x in (image, image.flip(-1)))
    both = F.avg_pool2d((one + other.flip(-1)) / 2, 3, 1, 1, count_include_pad=False)
    assert torch.allclose(logits, both[0], atol=1e-2)
    monkeypatch.setattr(distill, "random_window", lambda size, cfg: torch.eye(2, 3))
    for maps in (both, one):                            # seen once, then as a crop
        x, label, f = distill.training_batch(net, labeller, [(0, image, torch.zeros(1, 1, 1))],
                                             distill.configure(segmenter.cfg, **typed))
        expected = F.interpolate(maps, (192, 192), mode="bilinear").argmax(1)
        assert (label == expected).float().mean() > 0.98 and f.shape[2:] == (24, 24)
        labeller.seen = None

def test_a_class_that_the_hypothesis_does_not_name_is_doubted(segmenter, noise):
    """penalty: named classes keep their logits, others lose half a standard deviation. Denoising
    comes last: its -1e4 is no part of that."""
    named = rectify.hypothesize(segmenter, noise[1][None])[0]
    free, doubted, denoised = (seen(segmenter, noise[0], penalty=p, denoise=least)[1]
                               for p, least in ((0.0, 0.0), (0.5, 0.0), (0.5, 0.3)))
    lost = (free - doubted).mean((1, 2))
    assert (lost[named].abs() < 1e-2).all() and (lost[~named] > 0.1).all()
    stays = (denoised > -1e3).all(2).all(1)
    assert 0 < stays.sum() < len(stays) and torch.equal(doubted[stays], denoised[stays])

def test_maskclip_plus_learns_from_the_clip_that_nobody_trained(segmenter):
    """Also from a run whose image tower was trained with --finetune."""
    images, tower = torch.randint(256, (1, 3, 96, 120), dtype=torch.uint8), copy.copy(segmenter)
    look = lambda s, t: distill.Labeller(s, distill.configure(s.cfg, teacher=t)).look(images)
    tower.clip = copy.deepcopy(segmenter.clip)
    tower.clip.visual.proj.data.neg_()
    (before, f), (after, g) = (look(s, "maskclip") for s in (segmenter, tower))
    assert torch.equal(before, after) and torch.equal(f, g)
    assert torch.allclose(look(tower, "reclip++")[1], -f, atol=1e-5)

def test_the_run_reports_three_losses_that_fall(taught):
    log = log_of(taught)
    assert all(log[-1][name] < log[0][name] for name in ("loss", "mask", "feature", "text"))
    assert len(log) == 8 and (taught / "figure4.png").is_file()

@pytest.mark.parametrize("lr, floor, last", [(0.1, 1e-4, 1e-4), (1e-5, 1e-4, 1e-5)])
def test_the_schedule_falls_to_its_floor(mini, tmp_path, monkeypatch, lr, floor, last):
    """floor + (lr − floor) · (1 − step/steps)^0.9; ASPP's from head · lr; one below it stays."""
    rates = []

    def step(model, optimizer, *_):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return {"mask": torch.tensor(1.0)}

    monkeypatch.setattr(distill, "step", step)
    masks, samples = str(mini / "SegmentationClass"), rectify.list_samples(mini, "train")
    cfg = settings(teacher=masks, epochs=5, batch=12, lr=lr, floor=floor, head=10.0)
    kept = {"names": rectify.VOC_NAMES, "background": []}
    distill.train(net_of(torch.eye(20)), None, samples, cfg, kept, tmp_path)
    assert rates == [pytest.approx([last + (start - last) * (1 - k / 10) ** 0.9
                                    for start in (lr, 10 * lr)]) for k in range(10)]
    assert [entry["lr"] for entry in log_of(tmp_path)] == [backbone for backbone, _ in rates[1::2]]

def test_killed_and_resumed_to_the_bit(taught, tmp_path, monkeypatch):
    """--resume knows the run's settings: the weights and the log of a run without a break."""
    whole, killed = beginner(taught, tmp_path / "whole"), beginner(taught, tmp_path / "killed")
    step, left = distill.step, [5]
    monkeypatch.setattr(distill, "measure", lambda *_: 0.0)         # that is not the question
    go(whole, "--epochs", 4, "--seed", 1)

    def dies(*args):
        left[0] -= 1
        return step(*args) if left[0] >= 0 else sys.exit("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(distill, "step", dies)
        go(killed, "--epochs", 4, "--seed", 1)
    with pytest.raises(UserError, match="partial.pt: has seed 1, not 2"):
        go(killed, "--resume", "--seed", 2)
    go(killed, "--resume")
    assert same(student(whole), student(killed)) and log_of(whole) == log_of(killed)
    assert len(log_of(whole)) == 4 and not (killed / "distill.partial.pt").exists()

@pytest.mark.slow
def test_the_teacher_may_see_every_crop(taught, tmp_path):
    """targets crop, the paper's way: the loss falls, and it is another student."""
    go(out := beginner(taught, tmp_path / "run"), "--epochs", 8, "--targets", "crop")
    assert log_of(out)[-1]["loss"] < 0.9 * log_of(out)[0]["loss"]
    assert not same(student(out), student(taught))

@pytest.mark.slow
def test_ground_truth_teaches_nothing(taught, mini, tmp_path):
    """With other labels the student is the same to the last bit, unless it was told to look."""
    folder, look = shutil.copytree(mini, tmp_path / "mini"), "--ignore-gt-background"
    (folder / "ImageSets/Segmentation/val.txt").unlink()                    # nothing is measured
    state, students = torch.load(taught / "rectify.pt", weights_only=True), []
    state["config"]["data"] = str(folder)
    for k, flags in enumerate(([], [look], [], [look])):
        (tmp_path / str(k)).mkdir()
        torch.save(state, tmp_path / f"{k}/rectify.pt")
        go(tmp_path / str(k), "--epochs", 1, *flags)
        students.append(student(tmp_path / str(k)))
        for sample in rectify.list_samples(folder, "train") if k == 1 else []:
            Image.new("L", Image.open(sample.label).size, 7).save(sample.label)
    assert same(students[0], students[2]) and not same(students[1], students[3])

def test_masks_of_any_other_method_can_teach(taught, mini, tmp_path):
    """--teacher FOLDER (Table 11): no features, so two losses; in a folder of that name. A mask
    that is missing or wrong is named before training."""
    out = beginner(taught, tmp_path / "run")
    masks = shutil.copytree(mini / "SegmentationClass", tmp_path / "theirs")
    go(out, "--teacher", masks, "--epochs", 1)
    assert (out / "theirs/student.pt").is_file() and "feature" not in log_of(out / "theirs")[0]
    victim = masks / f"{rectify.list_samples(mini, 'train')[3].name}.png"
    size = Image.open(victim).size
    for wrong, message in ((Image.new("P", (9, 9)), "the mask has another size"),
                           (Image.new("L", size, 77), "the mask holds .*77"),
                           (None, "not a readable mask")):
        wrong.save(victim) if wrong else victim.unlink()
        with pytest.raises(UserError, match=f"{victim.name}.*{message}"):
            go(out, "--teacher", masks)

def test_maskclip_plus_is_a_student_beside_ours(taught, tmp_path, monkeypatch, capsys):
    """--teacher maskclip gives MaskCLIP+ in a folder of its own; --eval measures it beside ours,
    where settings, names and images are the same."""
    out = beginner(taught, tmp_path / "run")
    shutil.copy(taught / "student.pt", out)
    go(out, "--teacher", "maskclip", "--epochs", 8)
    distill.main(["--eval", str(out / "student.pt")])
    assert list(results(out)) == ["maskclip", "reclip++", "maskclip+", "student"]
    assert results(out)["student"] == results(taught)["student"]
    plus = out / "maskclip/student.pt"
    assert results(plus.parent)["student"] == results(out)["maskclip+"]
    state = torch.load(plus, weights_only=True)
    monkeypatch.setattr(rectify, "evaluate", lambda predict, *_: sys.exit(
        str([*predict(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))])))
    for odd in ({"config": state["config"] | {"epochs": 1}}, {"names": state["names"][::-1]},
                {"rectify": state["rectify"] | {"attention": "naclip"}}, {"images": ["0"]}):
        torch.save(state | odd, plus)
        with pytest.raises(SystemExit, match=r"\['maskclip', 'reclip\+\+', 'student'\]"):
            distill.main(["--eval", str(out / "student.pt")])
        assert "MaskCLIP+ is left out" in capsys.readouterr().out

def test_a_reclip_teacher_gives_the_student_its_reference(mini, tmp_path):
    """Logits are scale · (norm(u)·Tᵀ − norm(u)·Rᵀ) with ReCLIP's R; ReCLIP++ has none."""
    short = "--dataset emoji --epochs 1 --views 1 --method reclip"
    rectify.main([*short.split(), "--data", str(mini), "--out", str(tmp_path)])
    go(tmp_path, "--epochs", 1)
    net = distill.load_student(rectify.load(tmp_path / "student.pt", "student"))
    with torch.no_grad():
        logits, u = net(torch.randn(1, 3, 64, 64))
        unit = F.normalize(u, dim=1)[0, :, 2, 3]
        expected = net.scale * (unit @ net.T.T - unit @ net.R.T)
    assert net.R.any() and torch.allclose(logits[0, :, 2, 3], expected, atol=1e-4)

def test_the_student_needs_no_clip(taught, monkeypatch):
    """student.pt holds nothing of CLIP, and segments where no CLIP can be loaded."""
    monkeypatch.delattr(rectify, "load_clip")
    state = rectify.load(taught / "student.pt", "student")
    assert not [k for k in state["student"] if "visual" in k or "resblocks" in k or "token" in k]
    assert state["mIoU"] == results(taught)["student"]["mIoU"]
    net, cfg = distill.load_student(state), distill.Config(**state["config"])
    images = torch.zeros(1, 3, 50, 70, dtype=torch.uint8)
    assert distill.predict_student(net, images, cfg, 20).shape == (1, 50, 70)

@pytest.mark.parametrize("image, size, expected", [
    ((96, 128), (2048, 96), [88, 120]), ((500, 375), (2048, 512), [672, 504]),
    ((10, 4000), (2048, 96), [8, 2048]), ((1, 1), (2048, 96), [88, 88])])
def test_the_student_sees_an_image_in_its_own_shape(image, size, expected):
    assert distill.student_size(*image, size) == expected

def test_photographs_go_through_the_student_a_few_at_a_time(taught, tmp_path):
    """A measured batch of large images is bounded; its masks are those of each image alone."""
    state, seen = rectify.load(taught / "student.pt", "student"), []
    student, cfg = distill.load_student(state), distill.Config(**state["config"])
    student.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    images, samples, masks = torch.randint(256, (7, 3, 600, 800)).byte(), [], []
    for k, image in enumerate(images):
        paths = tmp_path / f"{k}.png", tmp_path / f"label{k}.png"
        for path, pixels in zip(paths, (image.permute(1, 2, 0), 1 + 0 * image[0])):
            Image.fromarray(pixels.numpy()).save(path)
        samples.append(rectify.Sample(str(k), *paths))

    def predict(images):
        masks.append(distill.predict_student(student, images, cfg, 20))
        return {"student": masks[-1]}

    rectify.evaluate(predict, samples, [f"class {k}" for k in range(20)])
    assert seen == [2, 2, 2, 1] and torch.cat(masks).shape == (7, 600, 800)
    alone = [distill.predict_student(student, image[None], cfg, 20)[0] for image in images]
    assert (torch.cat(masks) == torch.stack(alone)).float().mean() > 0.999

def test_flips_and_scales_average_to_a_mask(taught):
    state = rectify.load(taught / "student.pt", "student")
    net, cfg = distill.load_student(state), distill.Config(**state["config"] | {"tta": True})
    x = F.interpolate(torch.rand(2, 3, 5, 8) * 255, (40, 64), mode="bilinear").byte()
    mask, mirrored = (distill.predict_student(net, images, cfg, 20) for images in (x, x.flip(-1)))
    assert mask.shape == (2, 40, 64) and (mask == mirrored.flip(-1)).float().mean() > 0.99
    cfg = distill.configure(rectify.configure(), vars(cfg))     # what is kept of one measurement
    assert not cfg.tta
    assert (mask != distill.predict_student(net, x, cfg, 20)).any()

def test_flips_and_scales_keep_the_meaning_of_the_threshold():
    """The mean of the logits over looks, not their sum, makes the probability, here 0.62."""
    net = lambda x: (torch.tensor([0.5, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4), None)
    net.T, net.mean, net.std = torch.zeros(2, 3), 0.0, 1.0
    cfg, image = distill.Config(size=(64, 32), tta=True), torch.zeros(1, 3, 32, 32).byte()
    for threshold, expected in ((0.7, 2), (0.6, 0)):
        assert (distill.predict_student(net, image, cfg, 2, threshold) == expected).all()

def test_a_student_of_another_teacher_is_refused(taught, tmp_path):
    """--eval and --resume; and so is a file that is no student."""
    shutil.copy(taught / "student.pt", out := beginner(taught, tmp_path / "run"))
    state = torch.load(out / "rectify.pt", weights_only=True)
    torch.save(state | {"config": state["config"] | {"alpha": 7.0}}, out / "rectify.pt")
    for args in (["--eval", str(out / "student.pt")], ["--out", str(out), "--resume"]):
        with pytest.raises(UserError, match="student.pt: has alpha"):
            distill.main(args)
    shutil.copy(out / "rectify.pt", out / "student.pt")
    with pytest.raises(UserError, match="student.pt: no checkpoint with a student"):
        distill.main(["--eval", str(out / "student.pt")])

def test_a_bare_command_goes_on_with_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run rectify.py, then distill.py"):
        distill.main([])
    for when, name in enumerate(("new", "old")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "rectify.pt").touch()
        os.utime(tmp_path / "runs" / name / "rectify.pt", (-when, -when))
    assert distill.find_checkpoint({}).parent.name == "new"
    assert distill.find_checkpoint({"dataset": "voc"}).parent.name == "voc"

@pytest.mark.parametrize("args, message", [
    (["--teacher", "reclip"], r"rectify.pt has reclip\+\+ and maskclip"),
    (["--teacher", "nowhere"], "no folder of masks"),
    (["--backbone", "vgg0", "--weights", ""], "timm cannot make it"),
    (["--dataset", "voc"], "rectify.pt: has dataset emoji, not voc")])
def test_what_makes_no_sense_is_refused(taught, args, message):
    with pytest.raises(UserError, match=message):
        go(taught, *args)
