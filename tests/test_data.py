"""What comes in: datasets and their downloads, names, folders, labels, images, CLIP's weights."""
import contextlib
import functools
import hashlib
import http.server
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import rectify
from rectify import CONTEXT_IDS, VOC_NAMES, VOID, UserError, configure

H, W = 6, 8                                             # of most images here
ONES, CPU = np.ones((H, W), np.uint8), torch.device("cpu")
NOISE = np.random.default_rng(0).integers(0, 256, (H, W), np.uint8)

def encoded(image, form="PNG", turn=1, **options):
    """An image or an array as the bytes of a file; turn: its EXIF orientation."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    options["exif"] = Image.Exif()
    options["exif"][0x0112] = turn
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()

def jpg(seed=0, turn=1, size=1):
    pixels = np.random.default_rng(seed).integers(0, 256, (size * H, size * W, 3), np.uint8)
    return encoded(pixels, "JPEG", turn)

def tree(folder, files):
    """Write {path: bytes} into a folder; a list of paths gets images."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files[name] if isinstance(files, dict) else jpg())
    return folder

def run(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        rectify.main([str(a) for a in argv])
    return printed.getvalue()

def refused(call, *parts):
    """The call raises UserError: one line that has all these parts."""
    with pytest.raises(UserError) as error, contextlib.redirect_stdout(io.StringIO()):
        call()
    said = str(error.value)
    assert "\n" not in said and not [p for p in map(str, parts) if p not in said], said

# ============================================================================ datasets, by network
LABEL = np.zeros((H, W), np.uint8)                      # what a mask file holds: 0 background,
LABEL[1:4, 1:4], LABEL[1:4, 4], LABEL[5] = 3, VOID, 20  # class 2, a void border, class 19
DEAD = "http://127.0.0.1:1/"                            # an address where nobody listens

def packed(members, kind="tar"):
    """{path: bytes, or a str that a symbolic link points to} as the bytes of a tar or a zip."""
    file, zips = io.BytesIO(), kind == "zip"
    with zipfile.ZipFile(file, "w") if zips else tarfile.open(None, "w", file) as archive:
        for name, content in members.items():
            info, link = tarfile.TarInfo(name), isinstance(content, str)
            info.size, info.type = len(content) * (not link), b"2" if link else b"0"
            info.linkname = content if link else ""
            add = archive.writestr if zips else lambda _, data: archive.addfile(info, data)
            add(name, content if zips or link else io.BytesIO(content))
    return file.getvalue()

def voc(year="2012"):
    """VOC's archive: an image and its mask a split, and an image that is on no list."""
    files = {f"JPEGImages/{name}.jpg": jpg(k) for k, name in enumerate(["train1", "x", "val1"])}
    for split in ("train", "val"):
        files[f"SegmentationClass/{split}1.png"] = encoded(LABEL)
        files[f"ImageSets/Segmentation/{split}.txt"] = f"{split}1\n".encode()
    return packed({f"VOCdevkit/VOC{year}/{name}": content for name, content in files.items()})

def encode_rle(mask):
    """A slow encoder of COCO's run-length code, from its description: see decode_rle."""
    runs, value, text = [0], False, ""
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs, value = [*runs, 0], pixel
        runs[-1] += 1
    for k, number in enumerate(runs):
        number -= runs[k - 2] if k > 2 else 0
        while not -16 <= number < 16:                   # five bits hold it, with its sign
            text, number = text + chr(48 + 32 + number % 32), number // 32
        text += chr(48 + number % 32)
    return text

def context():
    """trainval_merged.json for voc("2010"); the labels that it makes stand in READ."""
    columns, rows = np.indices((H, W))[::-1]
    pieces = [(2, CONTEXT_IDS[-1], rows >= 0), (1, CONTEXT_IDS[1], rows >= 0),
              (2, CONTEXT_IDS[0], columns < 3), (2, 1, (rows < 2) & (columns > 1))]
    images = [dict(image_id=i, file_name=f"{phase}1.jpg", height=H, width=W, phase=phase)
              for i, phase in ((1, "train"), (2, "val"))]
    annotations = [dict(image_id=i, category_id=c, segmentation=dict(counts=encode_rle(mask)))
                   for i, c, mask in pieces]
    return json.dumps(dict(images=images, annos_segmentation=annotations)).encode()

def ade():
    """ADE20K's archive: folders instead of lists; 0 is void, classes are 1 to 150."""
    files = {}
    for split, k in itertools.product(("training", "validation"), (150, 0, 7)):
        files[f"ADEChallengeData2016/images/{split}/{k}.jpg"] = jpg()
        files[f"ADEChallengeData2016/annotations/{split}/{k}.png"] = encoded(k * ONES)
    return packed(files, "zip")

MINIATURES = {"voc": {"voc.tar": voc()}, "ade": {"ade.zip": ade()},
              "context": {"voc10.tar": voc("2010"), "merged.json": context()}}
TRUTH = np.where((LABEL == 0) | (LABEL == VOID), VOID, LABEL - 1).tolist()
READ = {"voc": {split: {f"{split}1": TRUTH} for split in ("train", "val")},     # the right labels
        "ade": {split: {str(k): [[c] * W] * H for k, c in ((0, VOID), (7, 6), (150, 149))}
                for split in ("train", "val")},
        "context": {"train": {"train1": ONES.tolist()}, "val": {
            "val1": [[0, 0, *[VOID] * 6]] * 2 + [[0] * 3 + [58] * 5] * 4}}}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.add(self.path)
        content = self.server.files.get(self.path, b"")
        self.send_response(200 if content else 404)
        self.end_headers()
        self.wfile.write(content)

@pytest.fixture
def archive(monkeypatch):
    """The Internet Archive, on the loopback, has the miniatures; their own addresses are dead."""
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked = {}, set()
        for dataset, contents in MINIATURES.items():
            files = [(name, hashlib.md5(content).hexdigest(), DEAD + name)
                     for name, content in contents.items()]
            monkeypatch.setitem(rectify.DATASETS, dataset, (files, *rectify.DATASETS[dataset][1:]))
            server.files |= {f"/{DEAD}{name}": content for name, content in contents.items()}
        monkeypatch.setattr(rectify, "ARCHIVE", f"http://127.0.0.1:{server.server_port}/")
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()

def load(dataset, root):
    folder = rectify.dataset_folder(configure(dataset=dataset, root=str(root)))
    return {split: {s.name: rectify.read_pair(s, rectify.DATASETS[dataset][2], 1)[1].tolist()
                    for s in rectify.list_samples(folder, split)} for split in ("train", "val")}

@pytest.mark.parametrize("dataset", MINIATURES)
def test_a_dataset_is_fetched_once_from_the_second_address(archive, tmp_path, dataset):
    """Its own is dead. A second start asks for nothing, whether archives or folder are gone."""
    assert load(dataset, tmp_path) == READ[dataset]
    assert archive.asked == {f"/{DEAD}{name}" for name in MINIATURES[dataset]}
    archive.asked.clear()
    [(tmp_path / name).unlink() for name in MINIATURES[dataset]]
    assert load(dataset, tmp_path) == READ[dataset]
    shutil.rmtree(next(tmp_path.glob(f"{dataset}-??????")))
    tree(tmp_path, MINIATURES[dataset])
    assert load(dataset, tmp_path) == READ[dataset] and not archive.asked
    for path in tmp_path.rglob("SegmentationClassContext/*.png"):
        with Image.open(path) as mask:
            assert mask.mode == "P" and mask.getpalette()[:768] == rectify.palette()

@pytest.mark.parametrize("dataset", MINIATURES)
def test_the_md5_decides(archive, tmp_path, dataset):
    """Without the right file one line names the addresses, the md5, and where to put it by hand."""
    files, right = rectify.DATASETS[dataset][0], archive.files.copy()
    parts = [part for name, md5, address in files
             for part in (address, rectify.ARCHIVE + address, md5, tmp_path / name)]
    for wrong in (b"", voc("2011")):
        archive.files = dict.fromkeys(right, wrong)
        refused(lambda: load(dataset, tmp_path), *parts)
        assert not list(tmp_path.glob(f"{dataset}-*"))
    tree(tmp_path, {name: b"the first half of it" for name in MINIATURES[dataset]})
    archive.files = right
    assert load(dataset, tmp_path) == READ[dataset]

def test_two_first_runs_unpack_once(archive, monkeypatch, tmp_path):
    """The second waits for the first, and takes what it unpacked."""
    unpacked, found, unpack = [], [], shutil.unpack_archive

    def slow(archive, *args, **options):
        unpacked.append(archive)
        threading.Event().wait(0.5)                     # the second has reached the lock
        unpack(archive, *args, **options)
    monkeypatch.setattr(rectify.shutil, "unpack_archive", slow)
    threads = [threading.Thread(target=lambda: found.append(rectify.dataset_folder(
        configure(dataset="voc", root=str(tmp_path))))) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert len(unpacked) == 1 and len(found) == 2 and found[0] == found[1]

@pytest.mark.parametrize("dataset, function", [
    ("voc", "shutil.unpack_archive"), ("context", "decode_rle"), ("context", "convert_context")])
def test_what_a_killed_one_left_is_cleared(archive, monkeypatch, tmp_path, dataset, function):
    def killed(_, folder, **__):
        if dataset == "voc":
            tree(folder / "VOCdevkit/VOC2012", ["JPEGImages/half.jpg"])
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"rectify.{function}", killed)
        load(dataset, tmp_path)
    assert load(dataset, tmp_path) == READ[dataset]
    assert not list(tmp_path.rglob("half.jpg")) and not list(tmp_path.glob("*.partial"))

@pytest.mark.parametrize("members", [
    *({name: b"x"} for name in ("../../evil.txt", "a/../../../evil.txt", "ROOT/evil.txt")),
    *({"link": to, "link/evil.txt": b"x"} for to in ("../..", "ROOT"))])
def test_an_archive_cannot_leave_its_folder(monkeypatch, tmp_path, members):
    """Even with the right md5: refused, or unpacked inside."""
    fill = lambda text: text.replace("ROOT", str(tmp_path)) if isinstance(text, str) else text
    members = {fill(k): fill(v) for k, v in members.items()}
    for kind in ("tar", "zip"):
        root = tree(tmp_path / kind, {f"evil.{kind}": packed(members, kind)})
        monkeypatch.setattr(rectify, "fetch", lambda *_: [root / f"evil.{kind}"])
        with contextlib.suppress(UserError, OSError, tarfile.TarError):
            load("voc", root)
        for folder in (tmp_path.parent, tmp_path, root):
            assert not (folder / "evil.txt").exists()

def test_addresses_and_sums_are_the_published_ones():
    """VOC's are torchvision's own; no address is of the host that went offline in 2025."""
    for dataset, year, md5 in (("voc", "2012", "6cd6e144f989b92b3379bac3b3de84fd"),
                               ("context", "2010", "da459979d0c395079b5c75ee67908abb")):
        known = rectify.voc.DATASET_YEAR_DICT[year]
        address = f"https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}/{known['filename']}"
        assert known["md5"] == md5
        assert rectify.DATASETS[dataset][0][0] == (known["filename"], md5, address)
    assert "host" ".robots" not in str(rectify.DATASETS)

def test_runs_of_masks_are_decoded():
    """Against the slow encoder, and by hand: 2 3 4 1 2, from the fourth on differences."""
    hand = rectify.decode_rle("234NN", (4, 3)).T.ravel()
    assert (hand == [0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0]).all()
    for size in ((1, 1), (7, 5), (3, 400), (60, 80)):
        for share in (0, 0.02, 0.5, 1):                 # long runs and short ones
            mask = np.random.default_rng(0).random(size) < share
            assert (rectify.decode_rle(encode_rle(mask), size) == mask).all()

def test_ones_own_voc(monkeypatch, tmp_path):
    """--dataset voc --data PATH/VOC2012 takes names and recipe. It is never read as Context."""
    monkeypatch.setattr(rectify, "Segmenter", lambda cfg, names, *_: (_ for _ in ()).throw(
        UserError(f"{cfg.crop} {cfg.clip} {names == VOC_NAMES}")))
    tree(tmp_path, MINIATURES["voc"])
    shutil.unpack_archive(tmp_path / "voc.tar", tmp_path, filter="data")
    own = ["--data", tmp_path / "VOCdevkit/VOC2012", "--out", tmp_path / "out"]
    refused(lambda: run(*own, "--dataset", "voc"), "520 ViT-B-16-quickgelu True")
    refused(lambda: run(*own), "--names")
    refused(lambda: run(*own, "--dataset", "context"), "--names")

# =========================================================================================== names
def names_of(tmp_path, content, **typed):
    """(classes, background words) of a names file with these bytes or this text."""
    (tmp_path / "names.txt").write_bytes(getattr(content, "encode", lambda: content)())
    return rectify.class_names(configure(data="x", names=str(tmp_path / "names.txt"), **typed))

@pytest.mark.parametrize("content, typed, names, background", [
    (b"\xef\xbb\xbfdog\r\n\r\n  potted plant \r\n", "", ["dog", "potted plant"], []),
    ("person,woman , man,\nT-shirt\nchat d'été\n犬\ndog & co", "",
     ["person, woman, man", "T-shirt", "chat d'été", "犬", "dog & co"], []),
    ("dog\nbackground: sky, tall grass\ncat\n", "", ["dog", "cat"], ["sky", "tall grass"]),
    ("dog\ncat\n", "sea, sand", ["dog", "cat"], ["sea", "sand"]),
    ("dog\nbackground:sky\ncat\n", "sea, dog", ["dog", "cat"], ["sky", "sea"]),  # dog: a class
    ("dog\nbackground: sky\n", "", ["dog"], ["sky"]), ("dog\n", "sky", ["dog"], ["sky"])])
def test_a_names_file_has_a_class_a_line(content, typed, names, background, tmp_path):
    assert names_of(tmp_path, content, background=typed) == (names, background)

@pytest.mark.parametrize("content, message", [
    *((f"cat\n\nbird\n{line}\nfish\n", "names.txt, line 4") for line in (
        "0: dog", "names:", "- dog", "dog: puppy", "dog,64,0,128", "dog 64 0 128", "dog 1", "1 dog",
        "dog;horse", "dog\thorse", '"dog"', "'dog'", "['dog', 'horse']", '{"dog": 1}', "# animals",
        "dog # an animal", "<name>dog</name>", "dog|horse", "Background: sky", "background : sky",
        "void", "Unlabeled", "class", "potted_plant", "dog2", "Name", "ignore", "background: void",
        "_background_", "background: sky; wall", "background: 0", "St. Bernard", "dog\0")),
    ("dog\ncat\n".encode("utf-16"), "line 1"), ("caf\xe9\ncat\n".encode("latin-1"), "line 1"),
    ("dog\nbackground\n", "background: sky"), ("Background\ndog\n", "background: sky"),
    ("dog\ncat\nDog\n", "each word once"), ("dog, puppy\npuppy, cat\n", "each word once"),
    ("dog, cat, bird\n", "one class alone"), ("dog\n", "one class alone wins every pixel; add"),
    *((text, "1 to 254 classes") for text in (
        "\n", "background: sky\n", "\n".join("dog " + "x" * k for k in range(1, 256))))])
def test_names_that_cannot_be_meant_are_refused(content, message, tmp_path):
    refused(lambda: names_of(tmp_path, content), "names.txt", message)

def test_typed_names(tmp_path):
    names = lambda typed: rectify.class_names(configure(data="photos", names=typed))
    assert names("dog,cat, background: sky, wall") == (["dog", "cat"], ["sky", "wall"])
    for typed, why in (("animals.txt", "no file"), ("dog cat", "one class alone"),
                       ("background: sky, dog", "1 to 254"), ("dog;cat", "is no class name")):
        refused(lambda: names(typed), typed, why)
    for background in ("words.txt", "0, 1", "sky; wall", "background: sky"):
        refused(lambda: names_of(tmp_path, "a\nb", background=background), "is no class name")
    assert names_of(tmp_path, "dog\n", threshold=0.5) == (["dog"], [])

# ======================================================================= folders and their lists
@pytest.mark.parametrize("image, mask", [
    ("VOC2012/JPEGImages/x.jpg", "VOC2012/SegmentationClass/x.png"),        # one folder too high
    ("images/x.jpg", "masks/x.png"), ("train/images/x.jpg", "train/masks/x.png"),
    ("images/1.jpg", "masks/mask_1.png"), ("x.jpg", "x.png"), ("x.jpg", "x_segmentation.png"),
    ("x.jpg", "mask_x.png"), ("x.jpg", "xMask.png"), ("x.jpg", "labelX.png"),
    ("x.tif", "xmask.tif"), ("x.jpg", "X_MASK.PNG"), ("x.jpg", "x-mask.png"),
    ("x.jpg", "x (mask).png"), ("x.jpg", "x.mask.png"), ("x.jpg", "x.figure.png"),
    ("x.jpg", "x_seg.png"), ("x.jpg", "x_GT.bmp"), ("x.jpg", "x_color_mask.png"),
    ("IMG_0001.jpg", "MASK_0001.png"), ("1_leftImg8bit.png", "1_gtFine_labelTrainIds.png"),
    ("a/image.png", "a/mask.png"), ("x_json/img.png", "x_json/label.png"), ("犬.jpg", "犬_mask.png")])
def test_what_may_be_a_mask_is_refused(image, mask, tmp_path):
    """In one line that names both files, whatever suffix, folder or word tells the two apart."""
    tree(tmp_path, ["beach.jpg", image, mask])
    refused(lambda: rectify.splits(tmp_path), tmp_path / image, tmp_path / mask)

@pytest.mark.parametrize("mask", [
    "x_mask_0.png", "x_L.png", "x_m.png", "Mask of x.png", "masks/0.png", "seg/1.bmp", "seg/2.tif"])
def test_a_mask_is_refused_by_its_colours(mask, tmp_path):
    """What its name does not tell: palette, grey or coloured; drawings may come as JPEG."""
    tree(tmp_path, {"beach.jpg": jpg(), "drawing.jpg": encoded(ONES, "JPEG")})
    assert len(rectify.splits(tmp_path)[0]) == 2
    grey, form = Image.fromarray(LABEL), {".bmp": "BMP", ".tif": "TIFF"}.get(mask[-4:], "PNG")
    for kind in (grey, Image.open(io.BytesIO(rectify.palette_png(LABEL))).convert("RGB"),
                 Image.open(io.BytesIO(rectify.palette_png(LABEL)))):
        tree(tmp_path, {mask: encoded(kind, form)})
        refused(lambda: rectify.splits(tmp_path), tmp_path / mask, "few colours", "JPEG")

def test_holiday_photographs_are_accepted(tmp_path):
    """Numbered ones; hidden files are none, but what stands above the folder does not matter."""
    own = ["IMG_0001.jpg", "IMG_0002.jpg", "photo (1).jpg", "photo (2).jpg", "photo.JPG", "7.webp",
           "1_1.jpg", "11.jpg", "2020-1-11.jpg", "2020-11-1.jpg", "my mask 1.jpg", "my mask 2.jpg",
           "Rome/DSC001.jpeg", "Rome/DSC002.jpeg", "Paris/DSC003.png", "Paris/image.png", "犬.jpg"]
    hidden = ["._IMG_0001.jpg", ".thumbs/IMG_0001.jpg", "Rome/.cache/DSC001.jpg"]
    folder = tree(tmp_path / ".private", own + hidden + ["notes.txt"])
    drawn = np.arange(100 * 100).reshape(100, 100) % 9999 * 6       # greys of 16 bits, each another
    tree(folder, {"Paris/DSC003.png": encoded(drawn.astype(np.uint16)), "7.webp": jpg(size=40),
                  "Paris/image.png": jpg(size=40)})
    train, val = rectify.splits(folder)
    assert sorted(s.image.relative_to(folder).as_posix() for s in train) == sorted(own)
    assert {s.name for s in train} >= {"Rome/DSC001", "photo (1)"} and not val
    tree(tmp_path / "no", ["notes.txt", ".x.jpg"])
    for name in ("no", "gone"):
        refused(lambda: rectify.splits(tmp_path / name), tmp_path / name, "no images", ".tiff")

def test_layouts_with_masks(tmp_path):
    """VOC's, where lists decide, and ADE20K's. Images of val need masks, those of train do not."""
    tree(tmp_path, [f"JPEGImages/{name}" for name in ("my dog.png", "b.jpg", "sub/c.JPG", "d.jpg")])
    tree(tmp_path, {"SegmentationClass/b.png": b"", "SegmentationClass/d.png": b"",
                    "ImageSets/Segmentation/train.txt": b"\xef\xbb\xbfmy dog\r\n\n b \nsub/c\n"})
    train, val = rectify.splits(tmp_path)
    assert [(s.name, s.image.name, s.label and s.label.name) for s in train] == [
        ("my dog", "my dog.png", None), ("b", "b.jpg", "b.png"), ("sub/c", "c.JPG", None)]
    assert not val
    tree(tmp_path, {"ImageSets/Segmentation/val.txt": b"d\nsub/c\n"})
    refused(lambda: rectify.splits(tmp_path), "SegmentationClass/sub/c.png", "val.txt")
    for content in (b"", b"\n \n", b"gone\n", b"b\nb 1\n", "b\n".encode("utf-16")):
        tree(tmp_path, {"ImageSets/Segmentation/train.txt": content})
        refused(lambda: rectify.splits(tmp_path), "ImageSets/Segmentation/train.txt")
    ade = tree(tmp_path / "ade", ["images/training/a.jpg", "images/validation/b.jpg",
                                  "annotations/validation/b.png"])
    train, val = rectify.splits(ade)
    assert [(s.name, s.label) for s in train] == [("a", None)]
    assert [(s.name, s.label.parent.name) for s in val] == [("b", "validation")]
    refused(lambda: rectify.splits(tree(ade, ["images/validation/c.jpg"])), "validation/c.png")

# ========================================================================================== labels
def own_voc(folder, mask, image=None):
    """A folder in VOC's layout: an image to learn from, and one with a mask to measure on."""
    return tree(folder, {
        "JPEGImages/t.jpg": jpg(), "JPEGImages/v.jpg": image or jpg(1),
        "SegmentationClass/v.png": mask if isinstance(mask, bytes) else encoded(mask),
        "ImageSets/Segmentation/train.txt": b"t\n", "ImageSets/Segmentation/val.txt": b"v\n"})

THREE = ONES.cumsum(1, np.uint8) % 3
VOCS = [tuple(rectify.palette()[3 * v:3 * v + 3]) for v in range(256)]

def painted(colours, values=THREE):
    image = Image.fromarray(values)
    image.putpalette(sum(colours, ()))
    return image

@pytest.mark.parametrize("mask, message", [
    (np.ones((H, W, 3), np.uint8), "holds RGB"), (ONES.astype(np.uint16), "holds I;16"),
    (ONES > 0, "holds 1"), (encoded(ONES, "JPEG"), "holds JPEG"), (ONES.T, "another size"),
    (4 * ONES, "holds [4]"), (254 * ONES, "holds [254]"), (encoded(LABEL)[:60], "not a readable"),
    (255 * (THREE > 1).astype(np.uint8), "no class, only background"),      # a binary mask
    (painted([VOCS[0], VOCS[2], VOCS[1]]), "other numbers"),
    (painted([VOCS[3], VOCS[0], VOCS[1]]), "other numbers"),    # sorted by how often they occur
    (painted([VOCS[0], (255, 255, 255), VOCS[1]]), "other numbers")])       # void painted white
@pytest.mark.parametrize("background", [[], ["--background", "sky"]])
def test_labels_are_looked_at_before_training(mask, message, background, tmp_path, monkeypatch):
    """The first that cannot be meant is named, with a background or none."""
    monkeypatch.setattr(rectify, "Segmenter", lambda _, names, background, *__: SimpleNamespace(
        classes=names + ["background"] * len(background)))      # nothing that could be trained
    own = ["--data", own_voc(tmp_path, mask), "--names", "dog, cat, bird", *background]
    refused(lambda: run(*own, "--out", tmp_path / "out"), tmp_path / "SegmentationClass", message)

def test_one_line_says_how_labels_are_read(tmp_path, capsys):
    """So that who counts from 0 sees it. A label belongs to the image as EXIF turns it."""
    folder, said = own_voc(tmp_path, LABEL), lambda _: capsys.readouterr().out
    reading = lambda *how: said(rectify.check_labels(rectify.splits(folder)[1], *how))
    voc20 = "labels: 0 background, 1 airplane, ..., 20 tv monitor, 255 void; found "
    assert reading(VOC_NAMES, 1) == voc20 + "3 to 20\n"
    assert reading([*VOC_NAMES, "background"], 1) == voc20 + "0 to 20\n"
    own_voc(tmp_path, THREE, jpg(1, turn=3))
    pets = "labels: 0 sky, ..., 2 cat, 255 void; found 0 to 2\n"
    assert reading(["sky", "dog", "cat"], 0) == pets
    refused(lambda: reading(["sky", "dog", "background"], 0), "--label-base 0", "background")
    own_voc(tmp_path, THREE, jpg(1, turn=6))
    refused(lambda: reading(["dog", "cat"], 1), "another size")

def test_values_of_a_label_and_what_they_count(tmp_path):
    """The file's 0, 1, 2 and 255, with VOC's palette, another one or as grey."""
    rows, own = np.array([[0, 1, 2, VOID]], np.uint8), [(9, 9, 9), (255, 0, 0)] + [(1, 1, 1)] * 254
    for content in (encoded(rows), rectify.palette_png(rows), encoded(painted(own, rows))):
        path = tree(tmp_path, {"m.png": content}) / "m.png"
        read = functools.partial(rectify.load_label, path, (1, 4))
        assert read(["dog", "cat", "bird"], 1).tolist() == [[VOID, 0, 1, VOID]]
        assert read(["dog", "cat", "bird"], 0).tolist() == [[0, 1, 2, VOID]]
        assert read(["dog", "cat", "background"], 1).tolist() == [[2, 0, 1, VOID]]
    # the background counts where it is named: "dog" everywhere is right in half of the pixels
    val = rectify.splits(own_voc(tmp_path, (ONES.cumsum(1) > 4).astype(np.uint8)))[1]
    dogs = lambda images: {"all dog": torch.zeros(images[:, 0].shape, dtype=torch.uint8)}
    for IoU, mean in (({"dog": 100, "cat": None}, 100), ({"dog": 50, "background": 0}, 25)):
        results, *_ = rectify.evaluate(dogs, val, [*IoU])
        assert results["all dog"] == {"mIoU": mean, "IoU": IoU}

# ========================================================================================== images
def loaded(tmp_path, content, name="x.png", longest=None):
    return rectify.load_image(tree(tmp_path, {name: content}) / name, longest).numpy()

def test_greys_and_transparency(tmp_path):
    """What would be nearly black is refused; what is transparent is laid on white."""
    word, wide = NOISE.astype(np.uint16), NOISE.astype(np.int32)
    for grey, form in itertools.product((NOISE, 257 * word, 256 * word + 99), ("PNG", "TIFF")):
        assert (loaded(tmp_path, encoded(grey, form)) == np.stack([NOISE] * 3)).all()
    for grey in ((NOISE / 255).astype(np.float32), wide, wide * 2 ** 20, wide * 99 - 9999, word):
        refused(lambda: loaded(tmp_path, encoded(grey, "TIFF")), "x.png", "convert it to 8 bits")
    colours = np.dstack([NOISE, NOISE // 2, NOISE // 3, ONES * 255])
    colours[0, :, 3], colours[1, :, 3] = 0, 51
    found, solid = loaded(tmp_path, encoded(colours)), colours[..., :3].transpose(2, 0, 1)
    assert (found[:, 0] == 255).all() and (found[:, 2:] == solid[:, 2:]).all()
    assert np.abs(found[:, 1] - (0.2 * solid[:, 1] + 0.8 * 255)).max() <= 1
    palette = painted([(10, 20, 30), (40, 50, 60), (70, 80, 90)])
    found = loaded(tmp_path, encoded(palette, transparency=bytes([255, 0, 255])))
    assert found[:, 0, :3].T.tolist() == [[255] * 3, [70, 80, 90], [10, 20, 30]]
    assert (loaded(tmp_path, encoded(np.dstack([NOISE, 0 * ONES]))) == 255).all()

@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_as_exif_turns_them(form, tmp_path):
    """All eight orientations, by their definition."""
    image = np.kron([[255, 128], [60, 0]], np.ones((8, 12))).astype(np.uint8)
    turned = [image, image[:, ::-1], image[::-1, ::-1], image[::-1], image.T, np.rot90(image, -1),
              image[::-1, ::-1].T, np.rot90(image)]
    for turn, grey in enumerate(turned, 1):
        found = loaded(tmp_path, encoded(np.dstack([image] * 3), form, turn))
        assert found.shape[1:] == grey.shape
        assert np.abs(found[0].astype(int) - grey).mean() < 5, turn

def test_sizes_from_one_pixel_to_very_long(tmp_path):
    cfg = SimpleNamespace(jitter=(0.5, 2.0), size=(64, 16), crop=16)
    for size in ((1, 1), (3000, 1), (2, 5000)):
        content = encoded(Image.new("RGB", size, "red"))
        assert loaded(tmp_path, content).shape == (3, *size[::-1])
        image = torch.from_numpy(loaded(tmp_path, content, longest=1000))
        assert max(image.shape[1:]) == min(max(size), 1000) and min(image.shape[1:]) >= 1
        assert max(rectify.resize_to_fit(image, cfg.size).shape[1:]) <= 64
        view, extent = rectify.augment(image, cfg, rectify.draw_view(), image[:, :1, :1])
        assert view.shape == (3, 16, 16) and 1 <= min(extent) <= max(extent) <= 16

def test_broken_images_and_bombs_are_refused(tmp_path, monkeypatch):
    """A bomb has more than twice the pixels of Pillow's bound."""
    for content in (b"", b"no image", jpg()[:200], jpg()[:-300], encoded(NOISE)[:-30]):
        refused(lambda: loaded(tmp_path, content), tmp_path / "x.png", "not a readable image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W // 2 + 1)
    with warnings.catch_warnings(action="ignore"):
        assert loaded(tmp_path, encoded(NOISE)).shape == (3, H, W)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W // 2 - 1)
    refused(lambda: loaded(tmp_path, encoded(NOISE)), "x.png", "decompression bomb")

def test_batches_hold_one_size_and_every_sample_once(tmp_path, monkeypatch):
    """Of two sizes, which some have by EXIF; batches are bounded, and results in order."""
    files = {}
    for k in range(23):
        form, turn = ("JPEG", "PNG", "TIFF")[k % 3], (1, 6, 9, 3)[k % 4]    # 9 is no orientation
        image = Image.new("RGB", ((W, H), (H, W))[k % 2], (10 * k,) * 3)
        files[f"{chr(97 + k)}.{form.lower()}"] = encoded(image, form, turn)
    images = rectify.find_images(tree(tmp_path, files))
    samples = [rectify.Sample(name, path, None) for name, path in images.items()]
    monkeypatch.setattr(rectify, "LARGEST_BATCH", 5 * H * W)
    read, order = lambda sample: rectify.load_image(sample.image), []
    for batch, images in rectify.batches_of_one_size(samples, read, "x"):
        assert len({image.shape for image in images}) == 1 and len(batch) == len(images) <= 5
        assert np.abs([image.float().mean() for image in images] - 10 * np.array(batch)).max() < 3
        order.append(batch)
    assert sorted(sum(order, [])) == list(range(23)) and len(order) < 8
    grey = rectify.each_image(lambda images: images.float().mean((1, 2, 3)), samples, "x")
    assert np.abs(np.array(grey) - 10 * np.arange(23)).max() < 3

def test_windows_are_averaged_where_they_overlap(monkeypatch):
    """slide against a loop over windows. A predictor's logits are then of one image at a time."""
    torch.manual_seed(0)
    x, patch, cfg = torch.rand(2, 3, 22, 31), 4, SimpleNamespace(window=12, stride=5)
    dense = lambda x: {"a": F.avg_pool2d(x, patch) * x.mean((2, 3), keepdim=True)}
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    for top in (0, 5, 10):
        for left in (0, 5, 10, 15, 19):
            place = ..., slice(top, top + 12), slice(left, left + 12)
            total[place] += rectify.upsample(dense(x[place])["a"], patch, (12, 12), (12, 12))
            count[place] += 1
    found, step = rectify.slide(dense, x, patch, cfg)
    assert step == 1 and torch.allclose(found["a"], total / count, atol=1e-5) and count.max() > 4
    monkeypatch.setattr(rectify, "text_features", lambda *_: torch.eye(2, 128))
    cfg, slide, sizes = configure(method="maskclip", window=64, size=(96, 96)), rectify.slide, []
    predict = rectify.predictor(rectify.Segmenter(cfg, ["dog", "cat"]))
    monkeypatch.setattr(rectify, "slide", lambda dense, x, *rest: (
        sizes.append(len(x)) or slide(dense, x, *rest)))
    predict(torch.zeros(3, 3, 80, 100, dtype=torch.uint8))
    assert sizes == [1, 1, 1]

# ================================================================================== a plain folder
WORDS = ["--names", "dog, horse, boat", "--background", "grass, sky"]
SHAPES = {"one.mask.png": (70, 100), "sub/two.mask.png": (64, 64), "turned.mask.png": (120, 80)}

@pytest.fixture(scope="module")
def photos(mini, tmp_path_factory):
    """Three images: one in a sub-folder, transparent, one that was held upright."""
    one, two, three = [Image.open(s.image) for s in rectify.splits(mini)[0][:3]]
    (two := two.resize((64, 64))).putalpha(Image.linear_gradient("L").resize((64, 64)))
    return tree(tmp_path_factory.mktemp("plain"), {
        "one.jpg": encoded(one.resize((100, 70)), "JPEG"), "sub/two.png": encoded(two),
        "turned.jpg": encoded(three.resize((120, 80)), "JPEG", turn=6)})

@pytest.fixture(scope="module")
def plain(photos, tmp_path_factory):
    """A run on them, and what it printed, where no os.sysconf tells how much RAM there is."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(os, "sysconf")                    # as on Windows
        said = run("--dataset", "emoji", "--data", photos, *WORDS, "--out", out, "--epochs", 1)
    return SimpleNamespace(out=out, said=said)

def test_a_plain_folder_is_learned_from(plain):
    """All images; nothing is claimed that was not measured, and no features are left over."""
    assert "3 images to learn from, 0 to measure on" in plain.said
    assert "3 classes: dog; horse; boat; background: grass, sky" in plain.said
    assert "mIoU" not in plain.said
    assert {p.name for p in plain.out.iterdir()} == {"rectify.pt", "rectify.jsonl", "figure4.png"}
    state = torch.load(plain.out / "rectify.pt", weights_only=True)
    assert state["images"] == ["one", "sub/two", "turned"] and len(state["T"]) == 5

def test_features_lie_in_a_file_without_a_name(tmp_path, monkeypatch):
    files, temporary = [], rectify.tempfile.TemporaryFile
    monkeypatch.setattr(rectify.tempfile, "TemporaryFile", lambda **options: (
        files.append(temporary(**options)) or files[0]))
    rectify.allocate((2, 3, 4), np.float16, CPU, tmp_path)[:] = 1.5
    files[0].seek(0)
    assert np.frombuffer(files[0].read(), np.float16).tolist() == [1.5] * 24
    assert not list(tmp_path.iterdir())
    refused(lambda: rectify.allocate((10 ** 9, 10 ** 6), np.float16, CPU, tmp_path), "GB; give")

def masks_in(out):
    """{path: values H×W} of the masks that were written, each beside a figure."""
    found = {}
    for path in out.rglob("*.mask.png"):
        mask, figure = Image.open(path), Image.open(str(path).replace(".mask.", ".figure."))
        assert mask.mode == "P" and mask.getpalette()[:768] == rectify.palette()
        found[path.relative_to(out).as_posix()] = np.array(mask)
        assert figure.width > mask.width
    return found

def test_image_segments_a_file_or_a_folder(plain, photos, tmp_path):
    """Masks with VOC's values, of the images' sizes as they are looked at: the checkpoint's own."""
    out = shutil.copytree(plain.out, tmp_path / "copy")
    assert "3 images" in run("--image", photos, "--out", out)
    masks = masks_in(out)
    assert {name: mask.shape for name, mask in masks.items()} == SHAPES
    state = rectify.load(out / "rectify.pt")
    predict = rectify.predictor(rectify.Segmenter(
        rectify.Config(**state["config"]), state["names"], state["background"], state))
    mask = predict(rectify.load_image(photos / "one.jpg")[None])["reclip++"][0].numpy()
    assert (masks["one.mask.png"] == np.array([1, 2, 3, 0])[mask]).all()
    run("--image", photos / "one.jpg", "--out", out, "--threshold", 0.999, "--sharpness", 1)
    assert (masks_in(out)["one.mask.png"] == 0).all()

def test_image_takes_the_runs_words_alone(plain, photos, tmp_path, monkeypatch):
    """Other words are MaskCLIP's; its own results are no images; it runs in one process."""
    image, out = ["--image", photos / "one.jpg", "--out"], tmp_path / "out"
    for words in (["--names", "dog, cat"], ["--background", "sea"],
                  ["--names", "dog, horse, boat, background: sky"]):
        refused(lambda: run(*image, plain.out, *words), "other class names", "--method maskclip")
    shutil.copytree(plain.out, out)
    run(*image, out, *WORDS)
    refused(lambda: run("--image", out, "--out", out), "one.mask.png", "one.figure.png")
    refused(lambda: run("--image", "gone.jpg", "--out", out), "gone.jpg")
    monkeypatch.setattr(rectify, "WORLD", 2)
    refused(lambda: run(*image, out), "--image", "without torchrun")

def test_image_without_training_takes_any_words(photos, tmp_path):
    """By CLIP alone, by OpenAI's unless --dataset says emoji; 0 where a background word is best."""
    assert configure(method="maskclip", image="a.jpg").clip == "ViT-B-16-quickgelu"
    for background, values in ((["--threshold", 0], {1, 2}), (["--background", "sea"], {0, 1, 2})):
        run("--method", "maskclip", "--image", photos / "one.jpg", "--names", "dog, cat",
            "--dataset", "emoji", "--out", tmp_path, *background)
        assert {0} & values <= {*np.unique(masks_in(tmp_path)["one.mask.png"])} <= values

def test_cut_images_are_named(photos, tmp_path, monkeypatch):
    """One to learn from, and before training one to measure on."""
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "turned.jpg").write_bytes((photos / "turned.jpg").read_bytes()[:1500])
    own = ["--dataset", "emoji", "--names", "dog, cat", "--epochs", 1, "--out", tmp_path / "out"]
    refused(lambda: run("--data", folder, *own), "turned.jpg", "not a readable image")
    monkeypatch.setattr(rectify, "training_data", None)
    voc = own_voc(tmp_path / "voc", ONES, jpg(1)[:-300])
    refused(lambda: run("--data", voc, *own), "JPEGImages/v.jpg", "not a readable image")
    assert not (tmp_path / "out/rectify.pt").exists()

def test_the_user_sees_one_line(tmp_path):
    """The real command line, on a folder that is one too high: both files, exit code 2."""
    tree(tmp_path, ["VOC2012/JPEGImages/x.jpg", "VOC2012/SegmentationClass/x.png"])
    done = subprocess.run([sys.executable, rectify.__file__, "--data", tmp_path, "--names", "a, b"],
                          capture_output=True, text=True, cwd=tmp_path)
    error = done.stderr.strip()
    assert done.returncode == 2 and error.startswith("error: ") and "\n" not in error
    assert "JPEGImages/x.jpg" in error and "SegmentationClass/x.png" in error

# ================================================================================== CLIP's weights
@pytest.fixture(scope="module")
def openais(tiny, tmp_path_factory):
    """(random weights by OpenAI's names for the tiny CLIP, their file in OpenAI's own form)."""
    class Node(torch.nn.Module):
        def forward(self, x: int):                      # for TorchScript
            return x
    torch.manual_seed(1)
    state = {name.removeprefix("text."): (0.02 * torch.randn_like(w)).half()
             for name, w in tiny[0].state_dict().items()}
    root, path = Node(), tmp_path_factory.mktemp("openai") / "ViT-B-16.pt"
    for name, weights in state.items():
        module, (*parts, last) = root, name.split(".")
        for part in parts:
            module.add_module(part, module._modules.get(part) or Node())
            module = module._modules[part]
        module.register_parameter(last, torch.nn.Parameter(weights, requires_grad=False))
    for name, value in (("input_resolution", 96), ("context_length", 32), ("vocab_size", 49408)):
        root.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(root).save(str(path))
    return state, path

def loads(pretrained, **typed):
    """(the CLIP's weights by OpenAI's names, which GELU it has)."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        clip = rectify.load_clip(configure(pretrained=str(pretrained), **typed), CPU)[0]
    blocks = [*clip.visual.transformer.resblocks, *clip.text.transformer.resblocks]
    gelu, = {type(block.mlp.gelu).__name__ for block in blocks}
    return {k.removeprefix("text."): w for k, w in clip.state_dict().items()}, gelu

def test_a_typed_file_of_weights_is_used_or_refused(openais, tiny, tmp_path):
    """Beside a local-dir: CLIP, too: OpenAI's, whose GELU is known, and other files of any name."""
    state, path = openais
    weights, gelu = loads(path)
    assert gelu == "QuickGELU" and weights.keys() == state.keys()
    assert all((weights[k] == w).all() for k, w in state.items())
    other = {name: w + 1 for name, w in tiny[0].state_dict().items()}
    for name, content in (("a.pt", state), ("b", state), ("c.bin", other)):
        torch.save(content, tmp_path / name)
        weights, gelu = loads(tmp_path / name)
        assert weights["logit_scale"] == content["logit_scale"] and gelu == "GELU"
    torch.save({"vision_model.embeddings.class_embedding": torch.zeros(192)}, tmp_path / "hf.bin")
    torch.save({name: w for name, w in state.items() if name != "ln_final.bias"}, tmp_path / "d.pt")
    (tmp_path / "e.pt").write_bytes(b"no weights")
    for name, why in (("hf.bin", "Missing key"), ("d.pt", "ln_final.bias"), ("e.pt", ""),
                      ("gone.pt", "does not exist"), ("gone", "does not exist")):
        refused(lambda: loads(tmp_path / name), tmp_path / name, why, "OpenAI's ViT-B-16.pt")
    refused(lambda: loads("openai"), "openai: not loaded")      # a tag beside the tiny CLIP
