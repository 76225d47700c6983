"""What the tests share: Emoji VOC unpacked once, a miniature of it, and the tiny CLIP."""
import functools
import shutil
import sys
from pathlib import Path
from unittest import mock

import open_clip
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/emoji")]

import distill  # noqa: E402  (after the path to it)
import rectify  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def fp32():
    """Numbers are compared in fp32, also where the processor has bfloat16. Gives the function that
    would decide.
    """
    decides = rectify.uses_bf16
    with mock.patch.object(rectify, "uses_bf16",
                           lambda device, precision="auto": precision == "bf16"):
        yield decides


@pytest.fixture(scope="session", autouse=True)
def text_features_once():
    """T is computed once for equal names and an equal CLIP: a second in dozens of runs."""
    compute, known = rectify.text_features, {}

    def remembered(clip, tokenizer, names):
        key = clip.logit_scale.device, rectify.digest(clip), repr(clip), *names  # repr: which GELU
        if key not in known:
            known[key] = compute(clip, tokenizer, names)
        return known[key]

    with mock.patch.object(rectify, "text_features", remembered):
        yield


@pytest.fixture(scope="session", autouse=True)
def tokenizer_once():
    """And so are the tokenizers, which hold no state."""
    with mock.patch.object(open_clip, "get_tokenizer", functools.cache(open_clip.get_tokenizer)):
        yield


@pytest.fixture(scope="session")
def emoji(tmp_path_factory):
    """The folder to give as --root: Emoji VOC, unpacked by the very code that a user runs."""
    root = tmp_path_factory.mktemp("data")
    rectify.dataset_folder(rectify.configure(root=str(root)))
    return root


@pytest.fixture(scope="session")
def mini(emoji, tmp_path_factory):
    """A folder for --data, in VOC's layout: 24 training and 8 validation images of Emoji VOC, and
    its names.txt.
    """
    source, folder = emoji / "emoji/VOCdevkit/VOC2012", tmp_path_factory.mktemp("own") / "mini"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    for split, count in (("train", 24), ("val", 8)):
        index = f"ImageSets/Segmentation/{split}.txt"
        names = sorted((source / index).read_text().split())
        names = names[::len(names) // count][:count]
        (folder / index).write_text("\n".join(names) + "\n")
        for name in names:
            shutil.copy(source / f"JPEGImages/{name}.jpg", folder / "JPEGImages")
            shutil.copy(source / f"SegmentationClass/{name}.png", folder / "SegmentationClass")
    (folder / "names.txt").write_text("\n".join(rectify.VOC_NAMES) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny():
    """The tiny CLIP that ships with the repository, and its tokenizer."""
    return rectify.load_clip(rectify.configure(), torch.device("cpu"))


@pytest.fixture(scope="session")
def taught(mini, tmp_path_factory):
    """A folder with the rectify.pt of two epochs on `mini`, and beside it the student of eight."""
    out = tmp_path_factory.mktemp("taught")
    rectify.main(["--dataset", "emoji", "--data", str(mini), "--names", str(mini / "names.txt"),
                  "--out", str(out), "--epochs", "2", "--views", "1"])
    distill.main(["--out", str(out), "--epochs", "8"])
    return out
