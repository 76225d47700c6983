"""What distill.py promises: DeepLabV2 as published, three losses that each train it, and a student without CLIP."""
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import distill
import rectify
from rectify import VOID, UserError


@pytest.fixture(scope="module")
def taught(mini, tmp_path_factory):
    """A folder with the rectify.pt of two epochs on `mini`, and the student of eight epochs beside it."""
    out = tmp_path_factory.mktemp("taught")
    rectify.main(["--data", str(mini), "--names", str(mini / "names.txt"), "--out", str(out), "--epochs", "2", "--views", "1"])
    distill.main(["--out", str(out), "--epochs", "8", "--lr", "0.01"])
    return out


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
    log = [json.loads(line) for line in (taught / "distill.log.jsonl").read_text().splitlines()]
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
