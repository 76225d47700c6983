"""The world that ships with the repository is what tests/emoji/README.md says it is."""
import json

import make
import numpy as np
import pytest
import rectify
from PIL import Image

needs_font = pytest.mark.skipif(not rectify.Path(make.FONT).is_file(),
                                reason="fonts-noto-color-emoji, to draw with, is not installed")

@pytest.fixture(scope="module")
def folder(emoji):
    return rectify.dataset_folder(rectify.configure(root=str(emoji)))

def test_the_archive_is_vocs_layout(folder):
    """Three splits that share no image, of several sizes; palette masks of 0, 1..20 and a void
    border; every class in about as many images."""
    train, val = rectify.splits(folder)
    dev = (folder / "ImageSets/Segmentation/dev.txt").read_text().split()
    assert (len(train), len(val), len(dev)) == (1200, 400, 200)
    assert len({*dev, *(sample.name for sample in train + val)}) == 1800
    sizes, pixels, images = set(), np.zeros(256), np.zeros(256)
    for sample in val:
        with Image.open(sample.label) as mask:
            assert mask.mode == "P" and mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
            sizes.add(mask.size)
            pixels += np.bincount(np.asarray(mask).ravel(), minlength=256)
            images[np.unique(mask)] += 1
    assert len(sizes) >= 6 and any(w != h for w, h in sizes)
    assert (pixels[:21] > 0).all() and pixels[21:255].sum() == 0 and pixels[255] > 0
    assert images[1:21].max() < 1.5 * images[1:21].min()

def test_no_class_of_the_archive_has_a_usual_place(folder):
    """The mean centre of a class's objects is the middle of the image, to a tenth of its side. In
    the captioned pictures it has one, and the places are balanced over the frame."""
    centres = {c: [] for c in range(1, 21)}
    for sample in rectify.splits(folder)[0]:
        mask = np.asarray(Image.open(sample.label))
        for c in np.unique(mask[(mask > 0) & (mask < 255)]):
            centres[c].append(np.argwhere(mask == c).mean(0) / mask.shape)
    assert all(np.abs(np.mean(places, 0) - 0.5).max() < 0.1 for places in centres.values())
    assert sorted(make.PLACE) == sorted(make.NAMES) and len({*make.PLACE.values()}) == 20
    assert np.allclose(np.mean([*make.PLACE.values()], 0), make.SIDE / 2)

def test_the_tiny_clip_knows_what_an_image_shows(emoji, folder):
    """Its favourite class is in the image for most images; by chance it would be in one of ten. Its
    folder is open_clip's own format."""
    config = json.loads((rectify.HERE / "tests/emoji/clip/open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["patch_size"] == 12
    segmenter = rectify.Segmenter(rectify.configure(method="maskclip"), rectify.VOC_NAMES)
    favourites = lambda images: rectify.multi_label(rectify.encode_image(
        segmenter.clip, rectify.normalize(segmenter.clip, images), "clip") @ segmenter.T.T, 2, 1)
    guess = lambda images: {"none": images[:, 0] * 0}
    val = rectify.splits(folder)[1][::4]
    with rectify.torch.no_grad():
        quality = rectify.evaluate(guess, val, rectify.VOC_NAMES, 1, favourites)[2]
    assert quality["classes_per_image"] == 1 and quality["precision"] >= 0.75

@needs_font
def test_what_make_draws():
    """The same from the same seed. Captions name a class's usual place; unlabelled pictures stand
    on any ground alike; the backbone has met none of Emoji VOC's emoji."""
    art, others = make.glyphs(), {image.tobytes() for image in make.other_glyphs()}
    once, twice = (make.captioned(np.random.default_rng(3), art, ["a photo of a {}."], False, 1)
                   for _ in range(2))
    assert (once[0] == twice[0]).all() and once[1] == twice[1]
    image, mask = make.scene(np.random.default_rng(3), art, [])
    assert image.shape[:2] == mask.shape and {*np.unique(mask)} <= {*range(21), 255}
    rng = np.random.default_rng(0)
    said = " ".join(make.captioned(rng, art, ["{}"], False, stage=2)[1][1] for _ in range(600))
    for row, usual, other in ((0, "top", "bottom"), (3, "bottom", "top")):
        often, seldom = (sum(said.count(f"{name} at the {where}") for name in make.PLACES[row])
                         for where in (usual, other))
        assert often > 20 and 10 * seldom < often
    assert len(others) > 1200
    assert not others & {image.tobytes() for images in art.values() for image in images}
