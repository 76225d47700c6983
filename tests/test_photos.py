"""Photographs of one's own: the right CLIP by default, background words, synonyms, and the files
that people have.

    python -m pytest tests/test_photos.py
"""
import contextlib
import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import distill
import export
import rectify
from rectify import UserError, configure

WORDS = "grass, sky, sea"                                       # background words in these tests


def run(script, *args):
    """A script's command line in this process; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        script.main([str(a) for a in args])
    return printed.getvalue()


def picture(path, size=(8, 6), turn=1):
    """Write an image of noise, (width, height); turn: its EXIF orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = turn
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path, exif=exif)


def label(path, rows):
    """Write a mask from its values, a row a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(rows, np.uint8)).save(path)


def voc(folder, rows, turn=1, size=(8, 6)):
    """A folder in VOC's layout with an image to learn from and a labelled one to measure on."""
    for split in ("train", "val"):
        picture(folder / f"JPEGImages/{split}1.jpg", size, turn)
        index = folder / f"ImageSets/Segmentation/{split}.txt"
        index.parent.mkdir(parents=True, exist_ok=True)
        index.write_text(f"{split}1\n")
        label(folder / f"SegmentationClass/{split}1.png", rows)
    return folder


def values(path):
    """The values in a palette PNG, H×W."""
    with Image.open(path) as mask:
        assert mask.mode == "P" and mask.getpalette()[:768] == rectify.palette()
        return np.array(mask)


# ======================================================================================== defaults

def test_own_photographs_get_openais_clip():
    """--data takes VOC's recipe; the tiny CLIP, which knows emoji only, has to be asked for."""
    own = configure(data="photos", names="dog, horse")
    assert (own.dataset, own.clip, own.pretrained) == ("voc", "ViT-B-16-quickgelu", "openai")
    assert own.out == "runs/photos" and own.epochs == rectify.RECIPES["voc"]["epochs"]
    tiny = configure(data="photos", names="dog, horse", dataset="emoji")
    assert "tests/emoji/clip" in tiny.clip and configure().clip == tiny.clip


@pytest.mark.parametrize("own", [["--data", "photos"], ["--image", "photos/a.jpg"]])
def test_offline_one_line_says_how_to_get_the_weights(own, tmp_path, monkeypatch, capsys):
    """What to fetch, where to put it, --pretrained FILE, and what to try without; exit code 2."""
    def offline(name, *args, **options):
        raise FileNotFoundError(f"Failed to download file (x.bin) for {name}. Last error: offline")
    picture(tmp_path / "photos/a.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(SystemExit) as stop:
        rectify.run(lambda: rectify.main([*own, "--names", "dog, horse"]))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and said.startswith("error: ")
    for part in ("create_model('ViT-B-16-quickgelu', 'openai')", "huggingface",
                 "--pretrained FILE", "--dataset emoji"):
        assert part in said
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("name", ["epochs", "views", "t", "lr", "batch", "crop", "method"])
def test_help_shows_the_default_of_each_dataset(name, capsys):
    with pytest.raises(SystemExit):
        rectify.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    shown = ", ".join(f"{dataset} {row[name]}" for dataset, row in rectify.RECIPES.items())
    about = re.search(rf" --{name} (?!.* --{name} )(.*?)( --[a-z]|$)", said)[1]
    assert f"({shown})" in about


@pytest.mark.parametrize("typed, width, weights", [
    ({}, 0.5, "tests/emoji/resnet18.safetensors"),
    ({"backbone": "resnet18d"}, 1.0, "imagenet"),
    ({"backbone": "resnet18d", "width": 0.25, "weights": ""}, 0.25, "")])
def test_another_backbone_is_whole_and_begins_with_its_own_weights(typed, width, weights):
    """The emoji student's width and file belong to its own network, unless they are told."""
    cfg = distill.configure(configure(), **typed)
    assert (cfg.width, cfg.weights) == (width, weights)


# ================================================================================ names of classes

def names_of(tmp_path, content, **typed):
    """(classes, background words) of a names file with these bytes or this text."""
    path = tmp_path / "names.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    cfg = configure(data=str(tmp_path), names=str(path), **typed)
    return rectify.class_names(cfg), rectify.background_words(cfg)


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbfdog\npotted plant\n",                                     # a byte-order mark
    "dog\r\n\r\n  potted plant \r\n", "dog\npotted plant",
    "__ignore__\n_background_\ndog\npotted plant\n",                        # labelme's
    "_background_\ndog\npotted plant\n", "dog,\npotted plant , \n"])
def test_names_files_as_other_tools_write_them(content, tmp_path):
    assert names_of(tmp_path, content) == (["dog", "potted plant"], [])


@pytest.mark.parametrize("content, message", [
    ("dog\ncat\n".encode("utf-16"), "save it as UTF-8"),
    ("dog\ncat\n".encode("utf-16-le"), "control characters"),
    ("Pixel Value, Class\n0, background\n1, airplane\n", "begins with 0"),  # Roboflow's
    ("1, airplane\n2, dog\n", "a line begins with 1; write one class name a line"),
    ("dog\nbackground\n", "write 'background: sky, wall"),
    ("Background\ndog\n", "write 'background: sky, wall"),
    ("dog\ncat\ndog\n", "'dog' is named twice"),
    ("dog, puppy\ncat\ndog\n", "'dog.*' is named twice"),                   # one title for two
    ("dog\n\x1b[31mcat\n", "control characters"),
    ("dog\ncat\nbackground: s\x1b[31mky", "control characters"),
    ("\n_background_\n", "holds no class name"),
    ("background: sky\n", "holds no class name"),
    ("\n".join(f"dog {'x' * k}" for k in range(255)), "255 names; a mask of 8 bits holds 254")])
def test_names_that_cannot_be_meant_are_refused(content, message, tmp_path):
    """One line, which names the file."""
    with pytest.raises(UserError, match=message) as error:
        names_of(tmp_path, content)
    assert "names.txt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flag, content, classes, words", [
    ("", "dog\nbackground: sky, tall grass\ncat\n", ["dog", "cat"], ["sky", "tall grass"]),
    ("", "dog\nBackground: sky\ncat", ["dog", "cat"], ["sky"]),
    ("", "dog\ncat\n", ["dog", "cat"], []),
    ("sea", "dog\nbackground: sky\ncat\n", ["dog", "cat"], ["sea"]),
    ("sea, sand", "dog\ncat\n", ["dog", "cat"], ["sea", "sand"]),
    ("first", "sky, wall\ndog, puppy\ncat\n", ["dog, puppy", "cat"], ["sky", "wall"]),
    ("field", "dog\ncat\n", ["dog", "cat"], rectify.VOC_BACKGROUND.split(", "))])
def test_three_ways_to_name_the_background(flag, content, classes, words, tmp_path):
    """A line of the names file, words on the command line, or the field's own 21-class files."""
    assert names_of(tmp_path, content, background=flag) == (classes, words)


def test_a_background_word_is_no_class(tmp_path):
    """The field's words serve any classes: what is a class, or its synonym, is not background."""
    names, words = names_of(tmp_path, "sky\nstreet, road\n", background="field")
    assert names == ["sky", "street, road"]
    assert words == [w for w in rectify.VOC_BACKGROUND.split(", ") if w not in ("sky", "road")]


def test_synonyms_are_one_class(tiny, tmp_path):
    """Words on a line: T is the normalized mean of theirs, and the first is the class's title."""
    names, _ = names_of(tmp_path, "person\ncat,dog , horse\n")
    T = rectify.text_features(*tiny, names)
    alone = rectify.text_features(*tiny, ["cat", "dog", "horse", "person"])
    assert torch.allclose(T[0], alone[3], atol=1e-6)
    assert torch.allclose(T[1], F.normalize(alone[:3].mean(0), dim=0), atol=1e-6)
    cfg = configure(method="maskclip")
    segmenter = rectify.Segmenter(cfg, names, torch.device("cpu"), T)
    assert segmenter.classes == ["person", "cat"] and len(segmenter.tokens) == 2


# ================================================================================== files of images

def test_hidden_files_and_folders_are_nobodys_images(tmp_path):
    """Suffixes in capitals are images as others are; a Mac's and a notebook's copies are not."""
    for name in ("a.jpg", "B.JPG", "sub/c.PNG", "d.Jpeg", ".ipynb_checkpoints/a-checkpoint.jpg"):
        picture(tmp_path / name)
    for name in ("._a.jpg", "sub/._c.PNG"):                               # AppleDouble: no image
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    assert [s.name for s in rectify.list_samples(tmp_path, "train")] == ["B", "a", "d", "sub/c"]


def test_a_hidden_folder_may_hold_all(tmp_path):
    """What is above the folder that was given does not matter."""
    picture(tmp_path / ".hidden/a.jpg")
    assert list(rectify.find_images(tmp_path / ".hidden")) == ["a"]


def test_what_is_no_image_is_named(tmp_path, capsys):
    for name in ("a.csv", "b.csv", "c.heic"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"holds no images .*2 \.csv, 1 \.heic; convert HEIC to JP"):
        rectify.find_images(tmp_path)
    picture(tmp_path / "a.jpg")
    assert list(rectify.find_images(tmp_path)) == ["a"]
    assert "skipped 2 .csv, 1 .heic; convert HEIC" in capsys.readouterr().out


def test_what_is_skipped_is_said_once_and_is_no_command(tmp_path, capsys):
    """Not again for the second list; and a terminal is not driven by the name of a file."""
    folder = voc(tmp_path, ONES)
    (folder / "JPEGImages/a.c\x1b[31msv").write_text("x")
    rectify.splits(folder)
    said = capsys.readouterr().out
    assert said.count("skipped 1 ") == 1 and "\x1b" not in said


def test_images_alone_are_not_remarked_on(tmp_path, capsys):
    picture(tmp_path / "a.jpg")
    rectify.find_images(tmp_path)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("mask", ["x_mask.png", "x_Mask.PNG", "x_gt.png", "x_labels.png", "x.png"])
def test_masks_beside_images_are_no_images(mask, tmp_path, capsys):
    """They are skipped, and that is said; the same ending without such an image is an image."""
    picture(tmp_path / "x.jpg")
    picture(tmp_path / "my_mask.jpg")
    label(tmp_path / mask, [[0, 1]])
    found = rectify.find_images(tmp_path)
    assert {p.name for p in found.values()} == {"x.jpg", "my_mask.jpg"}
    assert "skipped 1 " in capsys.readouterr().out


@pytest.mark.parametrize("content", [
    b"a\nsub/c\n", b"a 1\nsub/c -1\n", b"a.jpg\nsub/c.JPG\n", b"\xef\xbb\xbfa\r\n\r\nsub/c\r\n",
    b"JPEGImages/a.jpg SegmentationClass/a.png\n/JPEGImages/sub/c.JPG /SegmentationClass/c.png\n",
    b"./JPEGImages/a.jpg\tSegmentationClass/a.png\nJPEGImages/sub/c.JPG\tx.png\n"])
def test_lists_as_other_tools_write_them(content, tmp_path):
    """Names, flags, file names, two columns of paths, a byte-order mark. Only train.txt is there:
    nothing to measure on.
    """
    for name in ("a.jpg", "c.jpg", "sub/c.JPG"):            # c: of the name, but in another folder
        picture(tmp_path / "JPEGImages" / name)
    index = tmp_path / "ImageSets/Segmentation/train.txt"
    index.parent.mkdir(parents=True)
    index.write_bytes(content)
    samples = rectify.list_samples(tmp_path, "train")
    assert [s.name for s in samples] == ["a", "sub/c"]
    assert [s.image.name for s in samples] == ["a.jpg", "c.JPG"]
    assert rectify.list_samples(tmp_path, "val") == []


@pytest.mark.parametrize("line, name", [
    ("my dog", "my dog"), ("my dog.jpg", "my dog"), ("my.jpg", "my"), ("my 1", "my"),
    ("sub/my dog.jpg", "sub/my dog"), ("/photos/sub/my dog.jpg", "sub/my dog"),
    ("v1.2.jpg", "v1.2"), ("v1.2", "v1.2"), ("my cat.jpg", None)])
def test_names_with_spaces_on_lists(line, name):
    """Never another image than the one that is meant."""
    images = dict.fromkeys(["my", "my dog", "sub/my dog", "v1.2"])
    found = rectify.listed_name(line, images)
    assert found == name if name else found not in images


@pytest.mark.parametrize("content, message", [
    ("a\n".encode("utf-16"), r"train\.txt: not a text in UTF-8; save it as UTF-8"),
    (b"a\nb 1\n", r"b\.jpg: missing, though .*train\.txt lists it"),
    (b"\n", r"train\.txt: empty"), (b"a\n.\n", "missing")])
def test_lists_that_cannot_be_meant_are_refused(content, message, tmp_path):
    picture(tmp_path / "JPEGImages/a.jpg")
    index = tmp_path / "ImageSets/Segmentation/train.txt"
    index.parent.mkdir(parents=True)
    index.write_bytes(content)
    with pytest.raises(UserError, match=message):
        rectify.list_samples(tmp_path, "train")


# =========================================================================== labels before training

ONES = np.ones((6, 8), int)


@pytest.mark.parametrize("rows, turn, message", [
    (np.ones((6, 8, 3)), 1, "one class number a pixel .* this one is RGB"),
    (255 * (ONES.cumsum(1) > 4), 1, "hold no class, only background or void"),   # a binary mask
    (np.ones((8, 6)), 1, "the mask is 6×8, its image 8×6"),
    (ONES, 6, "the mask is 8×6, its image 6×8"),            # EXIF turned the image, not its mask
    (3 * ONES, 1, "holds 3, with 2 classes")])
def test_labels_that_cannot_match_are_found_before_training(rows, turn, message, tmp_path,
                                                            monkeypatch):
    """The label of the validation image, in one line, before CLIP is loaded."""
    monkeypatch.setattr(rectify, "Segmenter", lambda *_: pytest.fail("training would begin"))
    voc(tmp_path, rows, turn)
    with pytest.raises(UserError, match=message):
        run(rectify, "--dataset", "emoji", "--data", tmp_path, "--names", "dog, cat",
            "--out", tmp_path / "out")


def looked_at(folder, names, **typed):
    """What check_labels says of a folder's validation labels."""
    cfg = configure(dataset="emoji", data=str(folder), names=",".join(names), **typed)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        rectify.check_labels(rectify.list_samples(folder, "val"), names, cfg)
    return printed.getvalue()


@pytest.mark.parametrize("turn, size", [(3, (8, 6)), (6, (6, 8))])
def test_a_label_belongs_to_the_image_as_it_is_looked_at(turn, size, tmp_path):
    """Whatever EXIF turns: the mask fits the turned image, and a warning says so."""
    voc(tmp_path, 2 * ONES, turn, size)
    assert "1 images are rotated by EXIF" in looked_at(tmp_path, ["dog", "cat"])


def test_classes_that_seem_to_begin_at_0(tmp_path):
    """0 1 2 with three classes: said, with the classes' values as they are understood; --label-base
    0 is the other way. Where the third occurs too nothing is said.
    """
    rows, names = np.arange(48).reshape(6, 8) % 3, ["sky", "dog", "cat"]
    said = looked_at(voc(tmp_path / "0", rows), names)
    assert "0 background, 1 sky, ..., 3 cat" in said and "--label-base 0" in said
    assert not looked_at(tmp_path / "0", names, label_base=0)
    assert not looked_at(voc(tmp_path / "1", rows + 1), names)
    path = tmp_path / "0/SegmentationClass/val1.png"
    assert (rectify.load_label(path, (6, 8), 3, base=0).numpy() == rows).all()
    from_1 = rectify.load_label(path, (6, 8), 3, base=1).numpy()
    assert (from_1 == np.where(rows == 0, 255, rows - 1)).all()


# ============================================================== background, threshold, windows

def test_the_background_counts_where_it_was_named(tmp_path):
    """A prediction that says "dog" everywhere, half of it right: among 1 class 100, among a class
    and the background 50 and 0.
    """
    samples = rectify.list_samples(voc(tmp_path, ONES.cumsum(1) > 4), "val")
    dogs = lambda images: {"all dog": torch.zeros(images[:, 0].shape, dtype=torch.uint8)}
    for names, IoU, mean in ((["dog"], {"dog": 100}, 100),
                             (["dog", "background"], {"dog": 50, "background": 0}, 25)):
        results, found, truth = rectify.evaluate(dogs, samples, names)
        assert results["all dog"] == {"mIoU": mean, "IoU": IoU}
        assert [thing.label for thing in found["all dog"]] == [0]         # the background is none
        assert truth.tolist() == [[True] * len(names)]


def test_the_background_is_black_and_in_legends():
    names = ["dog", "cat", "background"]
    assert rectify.paint(torch.tensor([[2, 0]]), names).tolist() == [[[0, 0, 0], [128, 0, 0]]]
    figure = rectify.draw_rows({"": [np.zeros((4, 4, 3), np.uint8)]}, names, [0, 2])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["dog", "background"]


@pytest.fixture
def maps():
    """Logits of 5 queries for 2 images, 2×5×3×4, on patches of 4 px, and two sizes of the images:
    11×15 as they were resized, 20×28 as they are.
    """
    torch.manual_seed(0)
    return torch.randn(2, 5, 3, 4), 4, (11, 15), (20, 28)


def test_a_mask_is_the_best_query_of_every_pixel(maps):
    """Two classes and three background words, which are all one value."""
    best = rectify.upsample(*maps).argmax(1)
    assert (rectify.decide(*maps, classes=5) == best).all() and len(best.unique()) == 5
    assert (rectify.decide(*maps, classes=2) == best.clamp(max=2)).all()


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_mask_is_the_same_in_chunks(maps, threshold, monkeypatch):
    """However few queries fit memory at once: here one."""
    whole = rectify.decide(*maps, 2, 3.0, threshold)
    monkeypatch.setattr(rectify, "LARGEST_MASK", 20 * 28)
    logits, *sizes = maps
    eight = rectify.decide(logits.repeat(4, 1, 1, 1), *sizes, 2, 3.0, threshold)
    assert (eight == whole.repeat(4, 1, 1)).all()


def test_a_mask_beyond_the_largest_is_coarser_but_whole(maps, monkeypatch):
    """Decided at a quarter of the pixels, and enlarged by nearest neighbour."""
    logits, patch, resized, (H, W) = maps
    monkeypatch.setattr(rectify, "LARGEST_MASK", H * W // 4)
    small = rectify.upsample(logits, patch, resized, (H // 2, W // 2)).argmax(1)
    found = rectify.decide(*maps, classes=5)
    assert (found == small.repeat_interleave(2, 1).repeat_interleave(2, 2)).all()


def test_a_pixel_below_the_threshold_is_background(maps):
    """Pixel by pixel: softmax(sharpness · logits) of the best query, compared with p."""
    full, sharpness, p = rectify.upsample(*maps), 3.0, 0.7
    found = rectify.decide(*maps, 4, sharpness, p)
    for b, i, j in np.ndindex(2, 20, 28):
        chances = (sharpness * full[b, :, i, j].double()).softmax(0)
        sure = chances.max() >= p and chances.argmax() < 4
        assert found[b, i, j] == (chances.argmax() if sure else 4)
    assert 0.1 < (found == 4).float().mean() < 0.9


@pytest.mark.parametrize("threshold", [0.0, 0.35])
def test_the_student_knows_background_and_threshold(maps, threshold):
    """Its masks are decided as the teacher's are: here by a student that always says the same."""
    class Student:
        T = torch.zeros(5, 4)

        def __call__(self, x):
            return maps[0], None
    images, cfg = torch.zeros(2, 3, 20, 28, dtype=torch.uint8), SimpleNamespace(tta=False)
    cfg.size = (28, 20)
    full = rectify.upsample(maps[0], 1, (3, 4), (20, 28))
    chance, best = full.softmax(1).max(1)
    expected = torch.where(chance < threshold, 2, best.clamp(max=2))
    assert (distill.predict_student(Student(), images, cfg, 2, threshold) == expected).all()
    assert len(expected.unique()) == 3


def test_windows_are_averaged_where_they_overlap():
    """slide against a loop that asks each window for each pixel; the last ones end at the edge."""
    torch.manual_seed(0)
    x, patch = torch.rand(2, 3, 22, 31), 4
    cfg = SimpleNamespace(window=12, stride=5)

    def dense(window):                                              # depends on the whole window
        grid = F.avg_pool2d(window, patch) * window.mean((2, 3), keepdim=True)
        return {"a": grid, "b": -2 * grid}

    heard = [[[] for _ in range(31)] for _ in range(22)]
    for top in (0, 5, 10):
        for left in (0, 5, 10, 15, 19):
            window = x[..., top:top + 12, left:left + 12]
            pixels = rectify.upsample(dense(window)["a"], patch, (12, 12), (12, 12))
            for i, j in np.ndindex(12, 12):
                heard[top + i][left + j].append(pixels[..., i, j])
    rows = [torch.stack([torch.stack(p).mean(0) for p in row], -1) for row in heard]
    slow = torch.stack(rows, -2)                                            # B C H W
    found, step = rectify.slide(dense, x, patch, cfg)
    assert step == 1 and torch.allclose(found["a"], slow, atol=1e-5)
    assert torch.allclose(found["b"], -2 * slow, atol=1e-5)
    whole, step = rectify.slide(dense, x, patch, SimpleNamespace(window=0))
    assert step == patch and torch.equal(whole["a"], dense(x)["a"])


# ================================================================================ runs, whole ones

@pytest.fixture(scope="module")
def photos(mini, tmp_path_factory):
    """A plain folder with five images of Emoji VOC, one in a sub-folder; beside it names.txt with
    a background line.
    """
    folder = tmp_path_factory.mktemp("plain") / "photos"
    (folder / "sub").mkdir(parents=True)
    for k, sample in enumerate(rectify.list_samples(mini, "train")[:5]):
        shutil.copy(sample.image, folder / (f"sub/p{k}.jpg" if k == 4 else f"p{k}.jpg"))
    (folder.parent / "names.txt").write_text(f"dog, horse\ncat\nboat\nbackground: {WORDS}\n")
    return folder


@pytest.fixture(scope="module")
def plain(photos, tmp_path_factory):
    """Two epochs on the plain folder, and a student: their folder, command line and words."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    own = ["--dataset", "emoji", "--data", photos, "--names", photos.parent / "names.txt"]
    own += ["--epochs", 2, "--views", 1]
    said = run(rectify, *own, "--out", out)
    taught = run(distill, "--out", out, "--epochs", 1)
    return SimpleNamespace(out=out, own=own, said=said, taught=taught)


@pytest.fixture
def again(plain, tmp_path):
    """A copy of that run, to change."""
    return SimpleNamespace(out=shutil.copytree(plain.out, tmp_path / "again"), own=plain.own)


def weights_of(out):
    return torch.load(out / "rectify.pt", weights_only=True)["rectifier"]


def test_background_words_are_learned_like_classes(plain):
    """Queries as classes are, after them: in T, in the prompts, in the decoder; and the student."""
    state = torch.load(plain.out / "rectify.pt", weights_only=True)
    student = torch.load(plain.out / "student.pt", weights_only=True)
    for kept in (state, student):
        assert kept["names"] == ["dog, horse", "cat", "boat"]
        assert kept["background"] == WORDS.split(", ")
    assert len(state["T"]) == len(state["rectifier"]["V"]) == len(student["student"]["T"]) == 6
    assert state["rectifier"]["V"][3:].std(0).min() > 0
    with torch.no_grad():
        start = rectify.configure(**{"dataset": "emoji", "epochs": 2, "views": 1})
        torch.manual_seed(start.seed)
        before = rectify.Segmenter(start, state["names"], torch.device("cpu"), state["T"],
                                   state["background"]).rectifier.V
    assert ((state["rectifier"]["V"] - before).abs().amax((1, 2)) > 0).all()    # all were moved


def test_a_run_without_labels_says_what_can_be_known(plain, photos):
    """rectify.json: the share of each class and of the pixels that changed, as a count of the
    predictions gives them; no mIoU, and not a word of labels that are not there.
    """
    report = json.loads((plain.out / "rectify.json").read_text())
    segmenter = rectify.load_segmenter(plain.out / "rectify.pt")
    predict, samples = rectify.predictor(segmenter), rectify.list_samples(photos, "train")
    masks = [predict(rectify.load_image(s.image)[None]) for s in samples]
    own = torch.cat([m["reclip++"].flatten() for m in masks])
    clip = torch.cat([m["maskclip"].flatten() for m in masks])
    assert report["images"] == 5 and list(report["share"]) == ["dog", "cat", "boat", "background"]
    shares = [(own == c).float().mean().item() for c in range(4)]
    assert list(report["share"].values()) == pytest.approx(shares, abs=1e-3)
    assert report["changed"] == pytest.approx((own != clip).float().mean().item(), abs=1e-3)
    assert "results" not in report and "no labels, so no mIoU" in plain.said
    assert "background" in plain.said and f"Wrote {plain.out}/" in plain.said
    assert "nothing to measure" in plain.taught


def test_a_labelled_run_measures_the_background(mini, photos, tmp_path):
    """In the table, rectify.json and distill.json a class more; every class has its row."""
    folder, out = voc(tmp_path / "voc", ONES), tmp_path / "out"
    for split, count in (("train", 4), ("val", 2)):
        for k, sample in enumerate(rectify.list_samples(mini, split)[:count]):
            shutil.copy(sample.image, folder / f"JPEGImages/{split}{k}.jpg")
            rows = values(sample.label)
            label(folder / f"SegmentationClass/{split}{k}.png", np.where(rows < 255, rows % 4, 255))
        index = folder / f"ImageSets/Segmentation/{split}.txt"
        index.write_text("".join(f"{split}{k}\n" for k in range(count)))
    said = run(rectify, "--dataset", "emoji", "--data", folder, "--names",
               photos.parent / "names.txt", "--out", out, "--epochs", 1, "--views", 1)
    taught = run(distill, "--out", out, "--epochs", 1)
    for report, printed in (("rectify", said), ("distill", taught)):
        for result in json.loads((out / f"{report}.json").read_text())["results"].values():
            assert list(result["IoU"]) == ["dog", "cat", "boat", "background"]
            known = [v for v in result["IoU"].values() if v is not None]
            assert result["IoU"]["background"] is not None
            assert result["mIoU"] == pytest.approx(np.mean(known), abs=2e-3)
        assert sum(line.startswith("background ") for line in printed.splitlines()) == 1
    assert {"figure1a.png", "figure4.png", "figure5.png"} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize("threshold, words", [(0.0, WORDS), (0.5, "")])
def test_a_threshold_or_words_make_a_background(threshold, words):
    """Either of them; without both a mask holds classes alone."""
    T = F.normalize(torch.randn(2 + 3 * bool(words), 128), dim=1)
    cfg = configure(method="maskclip", threshold=threshold)
    segmenter = lambda cfg, words: rectify.Segmenter(
        cfg, ["dog", "cat"], torch.device("cpu"), T, words.split(", ") if words else [])
    assert segmenter(cfg, words).classes == ["dog", "cat", "background"]
    if not words:
        assert segmenter(configure(method="maskclip"), "").classes == ["dog", "cat"]


def test_a_window_larger_than_the_image_is_none(plain, photos):
    """And a smaller one is something else."""
    image = rectify.load_image(photos / "p0.jpg")[None]
    masks = [rectify.predictor(rectify.load_segmenter(plain.out / "rectify.pt", window=window))(
        image)["reclip++"] for window in (0, 10_000, 96)]
    assert (masks[0] == masks[1]).all() and (masks[0] != masks[2]).any()


def test_a_class_leaves_the_image_and_not_a_window(plain, photos, monkeypatch):
    """Denoising looks at the mean of all windows: one that alone does not see a class keeps it."""
    image = rectify.load_image(photos / "p0.jpg")[None]
    monkeypatch.setattr(rectify, "decide", lambda logits, *_: logits)
    segment = lambda least: rectify.predictor(rectify.load_segmenter(
        plain.out / "rectify.pt", window=96, denoise=least))(image)
    raw = segment(0.0)
    logits, sharpness = raw["reclip++"], rectify.configure(method="reclip++").sharpness
    least = (sharpness * logits).softmax(1).amax((2, 3)).median().item()
    found, expected = segment(least), rectify.denoise(logits, sharpness, least)
    assert (found["reclip++"] == expected).all() and (expected != logits).any()
    assert (found["maskclip"] == raw["maskclip"]).all()


def test_the_baseline_of_a_threshold_is_the_same_for_every_method(plain, photos):
    """Beside ReCLIP++, whose logits are no cosines, MaskCLIP has the background that it has alone.
    """
    image = rectify.load_image(photos / "p0.jpg")[None]
    beside = rectify.load_segmenter(plain.out / "rectify.pt", threshold=0.2)
    alone = rectify.Segmenter(configure(method="maskclip", threshold=0.2), beside.names,
                              torch.device("cpu"), beside.T, beside.background)
    masks = [rectify.predictor(segmenter)(image)["maskclip"] for segmenter in (beside, alone)]
    assert (masks[0] == masks[1]).all() and 0 < (masks[0] == 3).sum() < masks[0].numel()


def test_windows_segment_an_image_too(again, photos):
    """--image --window is not --image."""
    found = []
    for window in (0, 96):
        run(rectify, "--image", photos / "p0.jpg", "--out", again.out, "--window", window)
        found.append(values(again.out / "p0.mask.png"))
    assert found[0].shape == found[1].shape and (found[0] != found[1]).any()


def test_background_words_are_held_against_the_runs_own_names(again, photos, monkeypatch):
    """"dog" is a class of the run, "horse" its synonym; "sofa" is a class of VOC's alone."""
    asked, words = [], rectify.rectify_words
    monkeypatch.setattr(rectify, "rectify_words", lambda s, w: asked.append(w) or words(s, w))
    run(rectify, "--image", photos / "p0.jpg", "--out", again.out, "--background",
        "horse, dog, sofa")
    assert asked == [["dog, horse", "cat", "boat", "sofa"]]


@pytest.mark.parametrize("attention", ["maskclip", "naclip"])
def test_an_image_before_anything_was_trained(attention, photos, tmp_path, monkeypatch):
    """By CLIP alone, and it says so: a mask in VOC's values, 0 where a background word is best."""
    monkeypatch.chdir(tmp_path)
    given = ["--image", photos / "p0.jpg", "--dataset", "emoji", "--attention", attention,
             "--names", "dog, cat"]
    said = run(rectify, *given)
    assert "nothing was trained" in said and "CLIP alone" in said
    assert set(np.unique(values("p0.mask.png"))) <= {1, 2}
    run(rectify, *given, "--background", WORDS)
    found = values("p0.mask.png")
    assert 0 in found and set(np.unique(found)) <= {0, 1, 2}
    with Image.open(photos / "p0.jpg") as image, Image.open("p0.overlay.png") as overlay:
        assert found.shape == image.size[::-1] and overlay.width > image.width
    assert {p.name for p in tmp_path.iterdir()} == {"p0.mask.png", "p0.overlay.png"}


def test_what_was_written_beside_images_is_no_image(photos, tmp_path, monkeypatch):
    """--image in the folder of the images itself, twice: the mask and the overlay are not taken
    for photographs.
    """
    picture(tmp_path / "x.jpg", (64, 64))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run(rectify, "--image", ".", "--dataset", "emoji", "--names", "dog, cat")
    assert {p.name for p in tmp_path.iterdir()} == {"x.jpg", "x.mask.png", "x.overlay.png"}


def test_a_folder_gives_a_mask_and_an_overlay_each(again, photos):
    """--image FOLDER: of all images, also of equal names in two folders; the mask is what the
    checkpoint predicts, its classes as 1, 2, .. and the background as 0.
    """
    folder = shutil.copytree(photos, again.out.parent / "twins")
    shutil.copy(folder / "p1.jpg", folder / "sub/p0.jpg")
    before = set(again.out.rglob("*"))
    said = run(rectify, "--image", folder, "--out", again.out)
    new = {p for p in set(again.out.rglob("*")) - before if p.is_file()}
    assert sum(p.name.endswith(".mask.png") for p in new) == 6 == said.count("wrote ")
    assert sum(p.name.endswith(".overlay.png") for p in new) == 6
    segmenter = rectify.load_segmenter(again.out / "rectify.pt", denoise=0.0)
    mask = rectify.predictor(segmenter)(rectify.load_image(photos / "p2.jpg")[None])["reclip++"][0]
    expected = np.array([1, 2, 3, 0])[mask.numpy()]
    assert (values(again.out / "p2.mask.png") == expected).all()
    run(rectify, "--image", folder / "p2.jpg", "--out", again.out, "--threshold", 0.9999,
        "--sharpness", 1)
    assert (values(again.out / "p2.mask.png") == 0).mean() > 0.9


def test_resume_alone_takes_the_runs_own_settings(plain, tmp_path, monkeypatch):
    """Interrupted after the first epoch: --resume --out is enough to learn what would have been
    learned; a complete run is described again.
    """
    out, finish = tmp_path / "out", rectify.finish_epoch

    def interrupted(*args):
        finish(*args)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rectify, "finish_epoch", interrupted)
        run(rectify, *plain.own, "--out", out)
    assert "resuming after epoch 1 of 2" in run(rectify, "--resume", "--out", out)
    assert all((w == weights_of(plain.out)[k]).all() for k, w in weights_of(out).items())
    reports = [json.loads((folder / "rectify.json").read_text()) for folder in (plain.out, out)]
    assert reports[0]["share"] == reports[1]["share"]
    settings = [report["config"] | {"out": "", "resume": False} for report in reports]
    assert settings[0] == settings[1]
    (out / "rectify.json").unlink()
    assert "complete run" in run(rectify, "--resume", "--out", out)
    assert json.loads((out / "rectify.json").read_text())["share"] == reports[0]["share"]


# ================================================================= what an earlier run left behind

def test_what_other_weights_taught_is_removed(again):
    """A new run with another seed: the old student and its files would be taken for this run's."""
    for name in ("student.onnx", "distill.json", "export.json", "p0.mask.png", "p0.overlay.png",
                 "figure4.png"):
        (again.out / name).write_text("old")
    (again.out / "notes.txt").write_text("mine")
    said = run(rectify, *again.own, "--seed", 1, "--out", again.out)
    assert "removed an earlier run's " in said and "student.pt" in said
    left = {p.name for p in again.out.iterdir() if not p.name.startswith(".")}
    assert left == {"rectify.pt", "rectify.json", "log.jsonl", "notes.txt"}


def test_what_is_not_of_a_run_is_never_removed(again):
    """Whatever it is called: --out may be the folder of somebody's photographs or scripts."""
    mine = ["students.jpg", "student_01.png", "figure2.png", "export.py", "distill.py",
            "x.mask.png"]
    for name in mine:
        (again.out / name).write_text("mine")
    run(rectify, *again.own, "--seed", 1, "--out", again.out)
    assert all((again.out / name).is_file() for name in mine)


def test_what_the_same_weights_taught_stays(again):
    """The same command again learns the same weights: the student is still theirs."""
    student = (again.out / "student.pt").read_bytes()
    (again.out / "student.onnx").write_text("of this student")
    assert "removed" not in run(rectify, *again.own, "--out", again.out)
    assert (again.out / "student.pt").read_bytes() == student
    assert (again.out / "student.onnx").is_file()


def test_a_student_that_cannot_be_read_is_an_earlier_runs(again):
    """It does not stop a run that has just learned."""
    (again.out / "student.pt").write_bytes(b"damaged")
    assert "removed an earlier run's" in run(rectify, *again.own, "--out", again.out)
    assert (again.out / "rectify.json").is_file() and not (again.out / "student.pt").exists()
    assert not (again.out / "rectify.partial.pt").exists()


# ====================================================================== the whole way with ViT-B/16

def test_photographs_go_the_whole_way_with_weights_from_a_file(tmp_path, monkeypatch):
    """A plain folder, background words, --pretrained FILE (random weights in half precision): the
    recipe of real photographs, made small, a student that knows the background, and its ONNX file.
    Two sentences instead of 85: they are most of the time.
    """
    weights, out, templates = tmp_path / "clip.pt", tmp_path / "out", rectify.templates()
    monkeypatch.setattr(rectify, "templates", lambda: templates[:2])
    torch.manual_seed(0)
    random = open_clip.create_model("ViT-B-16-quickgelu")
    torch.save({name: w.half() for name, w in random.state_dict().items()}, weights)
    for k in range(3):
        picture(tmp_path / f"photos/{k}.jpg", (100, 70))
    (tmp_path / "photos/notes.csv").write_text("a,b")
    (tmp_path / "names.txt").write_text("dog, puppy\ncat\nbackground: grass, sky\n")
    said = run(rectify, "--data", tmp_path / "photos", "--names", tmp_path / "names.txt",
               "--pretrained", weights, "--out", out, "--size", 2048, 64, "--crop", 64,
               "--views", 1, "--epochs", 1)
    said += run(distill, "--out", out, "--backbone", "resnet18", "--width", 0.25, "--weights", "",
                "--targets", "once", "--crop", 64, "--epochs", 1)
    assert "skipped 1 .csv" in said and "3 images to learn from, 0 labelled ones" in said
    report = json.loads((out / "rectify.json").read_text())
    assert list(report["share"]) == ["dog", "cat", "background"] and "results" not in report
    assert report["config"]["clip"] == "ViT-B-16-quickgelu"
    assert sum(report["share"].values()) == pytest.approx(1, abs=1e-3)
    state = torch.load(out / "student.pt", weights_only=True)
    assert state["background"] == ["grass", "sky"] and state["student"]["T"].shape == (4, 512)
    assert all(w.isfinite().all() for w in state["student"].values() if w.is_floating_point())
    image = rectify.load_image(tmp_path / "photos/0.jpg")[None]
    cfg = SimpleNamespace(size=(2048, 64), tta=False)
    mask = distill.predict_student(distill.load_student(state), image, cfg, 2)
    assert mask.shape == (1, 70, 100) and mask.max() <= 2
    run(export, "--out", out)
    run(export, "--run", out / "student.onnx", "--image", tmp_path / "photos/0.jpg",
        "--mask", tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.size == (100, 70) and set(np.unique(mask)) <= {0, 1, 2}
    weights.unlink()
