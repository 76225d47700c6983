"""The world that ships with the repository is what README says it is."""
import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

import rectify

HERE = rectify.HERE / "tests/emoji"


def test_the_archive_is_vocs_layout(emoji):
    """1,200 training and 400 validation images of several sizes; palette masks of 0, 1..20 and a
    void border.
    """
    folder = emoji / "emoji/VOCdevkit/VOC2012"
    train, val = (rectify.list_samples(folder, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1200, 400)
    assert not {s.name for s in train} & {s.name for s in val}
    sizes, pixels = set(), np.zeros(256)
    for sample in val:
        with Image.open(sample.label) as mask:
            assert mask.mode == "P" and mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
            sizes.add(mask.size)
            pixels += np.bincount(np.asarray(mask).ravel(), minlength=256)
    assert len(sizes) >= 6 and any(w != h for w, h in sizes)
    assert (pixels[:21] > 0).all() and pixels[21:255].sum() == 0 and pixels[255] > 0
    images = rectify.classes_present(val, 20).sum(0)
    assert images.max() < 2 * images.min(), "every class in about as many images"


def test_the_archive_is_the_one_in_the_table():
    path, md5 = rectify.DATASETS["emoji"][0][0]
    assert hashlib.md5(path.read_bytes()).hexdigest() == md5


def test_the_tiny_clip_knows_what_an_image_shows(emoji):
    """Its favourite class is in the image for most images; by chance it would be in one of ten."""
    cfg = rectify.configure(root=str(emoji), method="maskclip", t=0.99, top_k=1)
    segmenter = rectify.Segmenter(cfg, rectify.VOC_NAMES, torch.device("cpu"))
    val = rectify.list_samples(rectify.dataset_folder(cfg), "val")[:100]
    favourite, there = rectify.hypotheses(segmenter, val), rectify.classes_present(val, 20)
    assert favourite.sum() == 100 and (favourite & there).sum() >= 75


def test_captions_are_drawn_the_same_from_the_same_seed():
    """make.py draws with the font; where it is not installed there is nothing to draw with."""
    import make
    if not rectify.Path(make.FONT).is_file():
        pytest.skip("fonts-noto-color-emoji is not installed")
    art = make.glyphs()
    once, twice = (make.captioned(np.random.default_rng(3), art, ["a photo of a {}."], close=False)
                   for _ in range(2))
    assert (once[0] == twice[0]).all() and once[1] == twice[1]
    image, mask = make.scene(np.random.default_rng(3), art)
    assert image.shape[:2] == mask.shape and set(np.unique(mask)) <= {*range(21), 255}


def test_the_clip_folder_is_open_clips_own_format():
    config = json.loads((HERE / "clip/open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["patch_size"] == 12
    assert (HERE / "clip/open_clip_model.safetensors").is_file()


def test_the_backbone_has_met_none_of_emoji_vocs_images():
    import make
    if not rectify.Path(make.FONT).is_file():
        pytest.skip("fonts-noto-color-emoji is not installed")
    others, ours = {image.tobytes() for image in make.other_glyphs()}, make.glyphs()
    assert len(others) > 1200
    assert not others & {image.tobytes() for images in ours.values() for image in images}
