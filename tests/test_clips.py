"""Which CLIPs rectify.py works with: any of open_clip's own ViTs, and OpenAI's in two regimes. Here
small, with random weights.

    python -m pytest tests/test_clips.py
"""
import json
import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import v2

import distill
import rectify
from rectify import Config, UserError, configure

CPU, NAMES = torch.device("cpu"), ["cat", "potted plant", "dog"]


def smaller(name):
    """open_clip's configuration of a model with two narrow layers in both towers; LayerScale, where
    it has one, not near 0.
    """
    config = open_clip.get_model_config(name)
    config["vision_cfg"] |= dict(layers=2, width=64, head_width=32)
    if "ls_init_value" in config["vision_cfg"]:
        config["vision_cfg"]["ls_init_value"] = 0.5
    config["text_cfg"] |= dict(layers=2, width=48, heads=2)
    return config


def save_random(clip, path):
    """Random weights as a safetensors file, and the positional embedding not as flat as open_clip's
    start.
    """
    torch.nn.init.normal_(clip.visual.positional_embedding, std=0.1)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, path)


def noise(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ========================================================================== any of open_clip's ViTs

@pytest.fixture(params=["ViT-B-32", "ViT-L-14", "ViT-L-14-336-quickgelu", "ViT-B-16-plus-240",
                        "ViT-M-16-alt"])
def segmenter(request, tmp_path):
    """A Segmenter with a small CLIP in a folder of its own: other patches, sizes, activations,
    widths; LayerScale (alt).
    """
    torch.manual_seed(0)
    config = smaller(request.param)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_random(open_clip.model.CLIP(**config), tmp_path / "open_clip_model.safetensors")
    cfg = configure(clip=f"local-dir:{tmp_path}", root=str(tmp_path), method="reclip")
    return rectify.Segmenter(cfg, NAMES, CPU)


def test_a_vit_gives_features_and_learns(segmenter):
    """Stock CLIP at its own size, dense features of any size, R through its text tower, and a loss
    that falls.
    """
    clip, D = segmenter.clip, segmenter.T.size(1)
    p, side = clip.visual.patch_size[0], clip.visual.image_size[0]
    with torch.no_grad():
        x = rectify.normalize(clip, noise(2, 3, side, side))
        assert torch.allclose(rectify.encode_image(clip, x, "stock"),
                              clip.encode_image(x, normalize=True), atol=1e-5)
        block = clip.visual.transformer.resblocks[-1]
        tokens = torch.randn(2, 5, clip.visual.conv1.out_channels)
        # a token that sees itself alone has its own value
        alone = torch.full((5, 5), -torch.inf).fill_diagonal_(0)
        expected = block(tokens, attn_mask=alone)
        assert torch.allclose(rectify.attention_block(block, tokens, (2, 2), "maskclip"), expected,
                              atol=1e-5)
    H, W = 2 * p + 3, 4 * p - 5
    for attention in rectify.ATTENTION:
        segmenter.cfg.attention = attention
        f = segmenter.features(noise(2, 3, H, W))
        assert f.shape == (2, D, math.ceil(H / p), math.ceil(W / p))
        assert torch.allclose(f.norm(dim=1), torch.ones(()), atol=1e-5)
    segmenter.cfg.attention = "maskclip"
    assert segmenter.reference().shape == segmenter.T.shape == (3, D)
    y, f = rectify.hypothesize(segmenter, noise(4, 3, H, W)), segmenter.features(noise(4, 3, H, W))
    optimizer = torch.optim.Adam(segmenter.rectifier.parameters(), 1e-2)
    losses = []
    learned = segmenter.rectifier.V.clone()
    for _ in range(8):
        torch.manual_seed(0)            # the same Gumbel noise in every step
        M = rectify.gumbel_mask(segmenter.rectified(f, segmenter.reference()), 100)
        loss = rectify.contrastive_loss(M, f, segmenter.T, y, segmenter.scale,
                                        torch.ones_like(M[:, 0]).bool(), "grid")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert not torch.equal(segmenter.rectifier.V, learned)


def test_the_prompt_goes_through_any_text_tower(segmenter):
    """With a sentence's embeddings in place of the learnable tokens, R is open_clip's encode_text
    of sentence and name.
    """
    clip, tokenizer = segmenter.clip, segmenter.tokenizer
    V = clip.text.token_embedding(tokenizer(["a small red"])[0, 1:4])
    R = rectify.reference_features(clip, V, segmenter.tokens)
    assert torch.allclose(R, clip.encode_text(tokenizer([f"a small red {name}" for name in NAMES])),
                          atol=1e-5)


@pytest.mark.parametrize("name, tower", [
    ("RN50", "image"), ("convnext_base", "image"), ("ViT-B-16-SigLIP", "image"),
    ("MobileCLIP-B", "image"), ("coca_ViT-B-32", "image"), ("ViT-L-14-CLIPA", "text"),
    ("xlm-roberta-base-ViT-B-32", "text"), ("ViT-H-14-worldwide", "text")])
def test_other_towers_are_refused_before_anything_is_fetched(monkeypatch, name, tower):
    for fetch in ("create_model", "get_tokenizer"):
        monkeypatch.setattr(open_clip, fetch, lambda *_, **__: pytest.fail("asked for a model"))
    message = rf"{name} .*its {tower} tower is not .*; take a CLIP like"
    with pytest.raises(UserError, match=message) as error:
        rectify.load_clip(configure(clip=name, pretrained="some"), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil, message", [
    (lambda d: None, "could not be loaded"),
    (lambda d: (d / "open_clip_config.json").write_text("{"), "Expecting"),
    (lambda d: (d / "open_clip_model.safetensors").write_text("no weights"), "")])
def test_a_folder_without_weights_is_not_taken_at_random(tmp_path, spoil, message):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": smaller("ViT-B-32")}))
    spoil(tmp_path)
    with pytest.raises(UserError, match=f"cannot load CLIP local-dir:.*{message}") as error:
        rectify.load_clip(configure(clip=f"local-dir:{tmp_path}"), CPU)
    assert "\n" not in str(error.value)


# ===================================================================== the regime of the CVPR paper

@pytest.fixture
def openai(monkeypatch, tmp_path):
    """Small random weights, which open_clip "downloads" as openai's for ViT-B-16 and
    ViT-B-16-quickgelu; their file.
    """
    for name in ("ViT-B-16", "ViT-B-16-quickgelu"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, smaller(name))
    torch.manual_seed(0)
    save_random(open_clip.create_model("ViT-B-16"), tmp_path / "openai.safetensors")
    monkeypatch.setattr(open_clip.factory, "download_pretrained",
                        lambda *_, **__: str(tmp_path / "openai.safetensors"))
    return tmp_path / "openai.safetensors"


def small_voc(folder):
    """VOC's layout: two training and two validation images with masks of three classes; and
    names.txt.
    """
    random = np.random.default_rng(0)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    for split in ("train", "val"):
        for k in "01":
            image = Image.fromarray(random.integers(256, size=(40, 56, 3), dtype=np.uint8))
            image.save(folder / f"JPEGImages/{split}{k}.jpg")
            mask = Image.fromarray(random.integers(4, size=(40, 56), dtype=np.uint8))
            mask.save(folder / f"SegmentationClass/{split}{k}.png")
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text(f"{split}0\n{split}1\n")
    (folder / "names.txt").write_text("\n".join(NAMES))
    return folder


def by_hand(name, file, mean, std):
    """open_clip's own model on a file of weights, its T, and a function that normalizes uint8
    images.
    """
    clip = open_clip.create_model(name, pretrained=str(file)).eval()
    T = rectify.text_features(clip, open_clip.get_tokenizer(name), NAMES)
    return clip, T, lambda images: v2.functional.normalize(images.float() / 255, mean, std)


@torch.no_grad()
def test_the_regime_of_2024_has_two_clips(openai, tmp_path, capsys, recwarn):
    """Dense features, T and MaskCLIP: GELU, ImageNet's mean and std. Hypothesis: QuickGELU, CLIP's
    own, with T of its own.
    """
    cfg = configure(dataset="voc", recipe="2024", root=str(tmp_path), method="maskclip")
    segmenter, images = rectify.Segmenter(cfg, NAMES, CPU), noise(2, 3, 512, 640)
    dense, T, prepare = by_hand("ViT-B-16", openai, distill.IMAGENET_DEFAULT_MEAN,
                                distill.IMAGENET_DEFAULT_STD)
    logits = rectify.similarity(rectify.encode_image(dense, prepare(images), "maskclip"), T)
    assert torch.allclose(segmenter.T, T, atol=1e-5)
    assert torch.allclose(rectify.similarity(segmenter.features(images), segmenter.T), logits,
                          atol=1e-5)
    expected = rectify.upsample(logits, 16, (512, 640), (512, 640)).argmax(1)
    assert (rectify.predictor(segmenter)(images)["maskclip"] == expected).float().mean() > 0.999
    stock, T, prepare = by_hand("ViT-B-16-quickgelu", openai, open_clip.OPENAI_DATASET_MEAN,
                                open_clip.OPENAI_DATASET_STD)
    crop = v2.functional.center_crop(v2.functional.resize(images, [224, 280]), 224)
    s = stock.encode_image(prepare(crop), normalize=True) @ T.T
    segmenter.cfg.t = s.flatten().sort().values[2:4].mean().item()
    segmenter.cfg.top_k = 1
    y = s >= segmenter.cfg.t
    y[~y.any(1), s.argmax(1)[~y.any(1)]] = True
    assert torch.equal(rectify.hypothesize(segmenter, images), y)
    assert torch.allclose(segmenter.stock[1], T, atol=1e-5)
    assert not torch.allclose(T, segmenter.T, atol=1e-3)
    assert "QuickGELU" not in capsys.readouterr().out + "".join(str(w.message) for w in recwarn)


def test_the_default_regime_has_one_clip_and_warns_of_gelu(openai, tmp_path, capsys):
    segmenter = rectify.Segmenter(configure(dataset="voc", root=str(tmp_path), method="maskclip"),
                                  NAMES, CPU)
    assert segmenter.stock[0] is segmenter.clip and segmenter.stock[1] is segmenter.T
    assert "warning" not in capsys.readouterr().out
    with pytest.warns(UserWarning, match="QuickGELU mismatch"):
        rectify.load_clip(configure(dataset="voc", clip="ViT-B/16", pretrained="openai"), CPU)
    assert "trained with QuickGELU" in capsys.readouterr().out


def test_the_checkpoint_remembers_the_regime(openai, tmp_path, monkeypatch, capsys):
    """--eval, --image and distill.py go on in the regime that rectify.py was given, here with the
    weights in a file.
    """
    folder, out = small_voc(tmp_path / "own"), tmp_path / "out"
    for key, side in (("size", (2048, 128)), ("crop", 128)):  # 512 would take the convolutions 20 s
        monkeypatch.setitem(rectify.RECIPES["voc"], key, side)
    rectify.main(["--dataset", "voc", "--data", str(folder), "--names", str(folder / "names.txt"),
                  "--recipe", "2024", "--pretrained", str(openai), "--root", str(tmp_path),
                  "--out", str(out), "--epochs", "1", "--views", "1"])
    report = json.loads((out / "rectify.json").read_text())
    regime = [report["config"][k] for k in ("recipe", "clip", "pretrained")]
    assert regime == ["2024", "ViT-B-16", str(openai)]
    rectify.main(["--eval", str(out / "rectify.pt"), "--out", str(tmp_path / "again"),
                  "--root", str(tmp_path)])
    assert json.loads((tmp_path / "again/rectify.json").read_text())["results"] == report["results"]
    rectify.main(["--image", str(folder / "JPEGImages/val0.jpg"), "--out", str(out)])
    assert (out / "val0.overlay.png").is_file()
    distill.main(["--out", str(out), "--epochs", "1", "--backbone", "resnet18", "--width", "0.25",
                  "--weights", ""])
    state = torch.load(out / "student.pt", weights_only=True)
    dense = by_hand("ViT-B-16", openai, (0,) * 3, (1,) * 3)
    assert state["rectify"]["recipe"] == "2024"
    assert torch.allclose(state["student"]["T"], dense[1], atol=1e-5)
    results = json.loads((out / "distill.json").read_text())["results"]
    assert results["maskclip"] == report["results"]["maskclip"]
    assert "QuickGELU" not in capsys.readouterr().out


@pytest.mark.parametrize("args, message", [
    ([], "--recipe 2024 is not for Emoji VOC"),
    (["--dataset", "emoji", "--data", "own", "--names", "dog"], "is not for Emoji VOC"),
    (["--dataset", "voc", "--clip", "ViT-L-14", "--pretrained", "openai"],
     "--clip ViT-L-14: --recipe 2024 means ViT-B-16; leave out --clip")])
def test_the_regime_belongs_to_the_real_datasets_and_their_clip(args, message):
    with pytest.raises(UserError, match=message):
        configure(**rectify.command_line(Config, "", {}, [*args, "--recipe", "2024"]))


def test_eval_refuses_another_regime(taught, tmp_path):
    with pytest.raises(UserError, match="--recipe 2024: the checkpoint was trained with .*; leave"):
        rectify.main(["--eval", str(taught / "rectify.pt"), "--out", str(tmp_path),
                      "--recipe", "2024"])
