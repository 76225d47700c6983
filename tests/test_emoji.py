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
    """Three splits that share no image, of several sizes; palette masks of 0, 1..20 and a void
    border.
    """
    folder = emoji / "emoji/VOCdevkit/VOC2012"
    train, val, dev = (rectify.list_samples(folder, split) for split in ("train", "val", "dev"))
    assert (len(train), len(val), len(dev)) == (1200, 400, 200)
    assert len({s.image for s in train + val + dev}) == 1800
    sizes, pixels, images = set(), np.zeros(256), np.zeros(256)
    for sample in val:
        with Image.open(sample.label) as mask:
            assert mask.mode == "P" and mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
            sizes.add(mask.size)
            pixels += np.bincount(np.asarray(mask).ravel(), minlength=256)
            images[np.unique(mask)] += 1
    assert len(sizes) >= 6 and any(w != h for w, h in sizes)
    assert (pixels[:21] > 0).all() and pixels[21:255].sum() == 0 and pixels[255] > 0
    images = images[1:21]
    assert images.max() < 1.5 * images.min(), "every class in about as many images"


def test_no_class_of_the_archive_has_a_usual_place(emoji):
    """The mean centre of a class's objects is the middle of the image, to a tenth of its side."""
    centres = {c: [] for c in range(1, 21)}
    for sample in rectify.list_samples(emoji / "emoji/VOCdevkit/VOC2012", "train"):
        mask = np.asarray(Image.open(sample.label))
        for c in np.unique(mask[(mask > 0) & (mask < 255)]):
            centres[c].append(np.argwhere(mask == c).mean(0) / mask.shape)
    assert all(np.abs(np.mean(places, 0) - 0.5).max() < 0.1 for places in centres.values())


def test_in_the_captions_every_class_has_its_place():
    """The places are balanced over the frame, and captions name them: airplanes are at the top."""
    import make
    assert sorted(make.PLACE) == sorted(make.NAMES) and len(set(make.PLACE.values())) == 20
    assert np.allclose(np.mean(list(make.PLACE.values()), 0), make.SIDE / 2)
    if not rectify.Path(make.FONT).is_file():
        pytest.skip("fonts-noto-color-emoji is not installed")
    rng, art = np.random.default_rng(0), make.glyphs()
    said = " ".join(make.captioned(rng, art, ["{}"], False, stage=2)[1][1] for _ in range(600))
    for row, usual, other in ((0, "top", "bottom"), (3, "bottom", "top")):
        often, seldom = (sum(said.count(f"{name} at the {where}") for name in make.PLACES[row])
                         for where in (usual, other))
        assert often > 20 and 10 * seldom < often


def test_the_unlabelled_pictures_stand_on_any_ground_alike(monkeypatch):
    import make
    if not rectify.Path(make.FONT).is_file():
        pytest.skip("fonts-noto-color-emoji is not installed")
    kinds, paint = [], make.background
    monkeypatch.setattr(make, "background",
                        lambda rng, kind, *size: kinds.append(kind) or paint(rng, kind, *size))
    rng, art, deck = np.random.default_rng(0), make.glyphs(), []
    for _ in range(300):
        make.scene(rng, art, deck)
    counts = [kinds.count(kind) for kind in make.GROUNDS]
    assert sum(counts) == 300 and max(counts) < 2 * min(counts)


def test_the_archive_is_the_one_in_the_table():
    path, md5 = rectify.DATASETS["emoji"][0][0]
    assert hashlib.md5(path.read_bytes()).hexdigest() == md5


def test_the_tiny_clip_knows_what_an_image_shows(emoji):
    """Its favourite class is in the image for most images; by chance it would be in one of ten."""
    cfg = rectify.configure(root=str(emoji), method="maskclip", t=0.99, top_k=1)
    segmenter = rectify.Segmenter(cfg, rectify.VOC_NAMES, torch.device("cpu"))
    val = rectify.list_samples(rectify.dataset_folder(cfg), "val")[:100]
    quality = rectify.assess(segmenter, val)[2]
    assert quality["classes_per_image"] == 1 and quality["precision"] >= 0.75


def test_captions_are_drawn_the_same_from_the_same_seed():
    """make.py draws with the font; where it is not installed there is nothing to draw with."""
    import make
    if not rectify.Path(make.FONT).is_file():
        pytest.skip("fonts-noto-color-emoji is not installed")
    art = make.glyphs()
    once, twice = (make.captioned(np.random.default_rng(3), art, ["a photo of a {}."], False, 1)
                   for _ in range(2))
    assert (once[0] == twice[0]).all() and once[1] == twice[1]
    image, mask = make.scene(np.random.default_rng(3), art, [])
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


def test_images_of_another_version_are_not_taken_for_these(emoji, tmp_path):
    """What an earlier version of the repository unpacked would be measured in silence."""
    here, old = rectify.configure(root=str(emoji)), rectify.configure(root=str(tmp_path))
    assert rectify.dataset_folder(here) == emoji / "emoji/VOCdevkit/VOC2012"
    for stamp in (None, "0" * 32):
        (tmp_path / "emoji/VOCdevkit/VOC2012").mkdir(parents=True, exist_ok=True)
        if stamp:
            (tmp_path / "emoji/md5").write_text(stamp)
        with pytest.raises(rectify.UserError, match="emoji: was not unpacked from this version"):
            rectify.dataset_folder(old)
