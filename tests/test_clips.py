"""Which CLIPs rectify.py works with: any of open_clip's own ViTs. Here small ones with random weights.

    python -m pytest tests/test_clips.py
"""
import json
import math

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

import rectify
from rectify import Config, UserError, complete

CPU, NAMES = torch.device("cpu"), ["cat", "potted plant", "dog"]


def smaller(name):
    """open_clip's configuration of a model with two narrow layers in both towers; LayerScale, where it has one, not near 0."""
    config = open_clip.get_model_config(name)
    config["vision_cfg"] |= dict(layers=2, width=64, head_width=32)
    if "ls_init_value" in config["vision_cfg"]:
        config["vision_cfg"]["ls_init_value"] = 0.5
    config["text_cfg"] |= dict(layers=2, width=48, heads=2)
    return config


def save_random(clip, path):
    """Random weights as a safetensors file, and the positional embedding not as flat as open_clip's start."""
    torch.nn.init.normal_(clip.visual.positional_embedding, std=0.1)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, path)


def noise(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ================================================================================================= any of open_clip's ViTs

@pytest.fixture(params=["ViT-B-32", "ViT-L-14", "ViT-L-14-336-quickgelu", "ViT-B-16-plus-240", "ViT-M-16-alt"])
def segmenter(request, tmp_path):
    """A Segmenter with a small CLIP in a folder of its own: other patches, sizes, activations, widths; LayerScale (alt)."""
    torch.manual_seed(0)
    config = smaller(request.param)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_random(open_clip.model.CLIP(**config), tmp_path / "open_clip_model.safetensors")
    return rectify.Segmenter(complete(Config(clip=f"local-dir:{tmp_path}", root=str(tmp_path), method="reclip")), NAMES, CPU)


def test_a_vit_gives_features_and_learns(segmenter):
    """Stock CLIP at its own size, dense features of any size, R through its text tower, and a loss that falls."""
    clip, D = segmenter.clip, segmenter.T.size(1)
    p, side = clip.visual.patch_size[0], clip.visual.image_size[0]
    with torch.no_grad():
        x = rectify.normalise(clip, noise(2, 3, side, side))
        assert torch.allclose(rectify.encode_image(clip, x, "stock"), clip.encode_image(x, normalize=True), atol=1e-5)
        block, tokens = clip.visual.transformer.resblocks[-1], torch.randn(2, 5, clip.visual.conv1.out_channels)
        alone = torch.full((5, 5), -torch.inf).fill_diagonal_(0)                        # who sees itself alone is its own value
        expected = block(tokens, attn_mask=alone)
        assert torch.allclose(rectify.last_block(block, tokens, (2, 2), "maskclip"), expected, atol=1e-5)
    H, W = 2 * p + 3, 4 * p - 5
    for features in ("maskclip", "sclip", "clearclip", "naclip"):
        segmenter.cfg.features = features
        f = segmenter.features(noise(2, 3, H, W))
        assert f.shape == (2, D, math.ceil(H / p), math.ceil(W / p))
        assert torch.allclose(f.norm(dim=1), torch.ones(()), atol=1e-5)
    segmenter.cfg.features = "maskclip"
    assert segmenter.reference().shape == segmenter.T.shape == (3, D)
    y, f = rectify.hypothesise(segmenter, noise(4, 3, H, W)), segmenter.features(noise(4, 3, H, W))
    optimizer, losses, learned = torch.optim.Adam(segmenter.rectifier.parameters(), 1e-2), [], segmenter.rectifier.V.clone()
    for _ in range(8):
        torch.manual_seed(0)                                                            # the same Gumbel noise in every step
        M = rectify.gumbel_mask(segmenter.rectified(f, segmenter.reference()), 100)
        loss = rectify.contrastive_loss(M, f, segmenter.T, y, segmenter.scale, torch.ones_like(M[:, 0]).bool(), "grid")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and min(losses[1:]) < losses[0] and not torch.equal(segmenter.rectifier.V, learned)


def test_the_prompt_goes_through_any_text_tower(segmenter):
    """With a sentence's embeddings in place of the learnable tokens, R is open_clip's encode_text of sentence and name."""
    clip, tokenizer = segmenter.clip, segmenter.tokenizer
    V = clip.token_embedding(tokenizer(["a small red"])[0, 1:4])
    R = rectify.reference_features(clip, V, segmenter.tokens)
    assert torch.allclose(R, clip.encode_text(tokenizer([f"a small red {name}" for name in NAMES])), atol=1e-5)


@pytest.mark.parametrize("name, tower", [
    ("RN50", "image"), ("convnext_base", "image"), ("ViT-B-16-SigLIP", "image"), ("MobileCLIP-B", "image"),
    ("coca_ViT-B-32", "image"), ("ViT-L-14-CLIPA", "text"), ("xlm-roberta-base-ViT-B-32", "text"),
    ("ViT-H-14-worldwide", "text")])
def test_other_towers_are_refused_before_anything_is_fetched(monkeypatch, name, tower):
    for fetch in ("create_model", "get_tokenizer"):
        monkeypatch.setattr(open_clip, fetch, lambda *_, **__: pytest.fail("was asked for a model that cannot be used"))
    with pytest.raises(UserError, match=rf"{name} .*its {tower} tower is not .*; take a CLIP like") as error:
        rectify.load_clip(complete(Config(clip=name, pretrained="some")), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil, message", [
    (lambda d: None, "could not be loaded"), (lambda d: (d / "open_clip_config.json").write_text("{"), "Expecting"),
    (lambda d: (d / "open_clip_model.safetensors").write_text("no weights"), "")])
def test_a_folder_without_weights_is_not_taken_at_random(tmp_path, spoil, message):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": smaller("ViT-B-32")}))
    spoil(tmp_path)
    with pytest.raises(UserError, match=f"cannot load CLIP local-dir:.*{message}") as error:
        rectify.load_clip(complete(Config(clip=f"local-dir:{tmp_path}")), CPU)
    assert "\n" not in str(error.value)
