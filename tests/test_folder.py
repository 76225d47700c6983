"""A plain folder of unlabelled images through all three command lines, as somebody would use it who
has nothing else.

    python -m pytest tests/test_folder.py
"""
import contextlib
import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import distill
import export
import rectify


def run(script, *args):
    """A script's command line in this process; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        script.main([str(a) for a in args])
    return printed.getvalue()


@pytest.fixture(scope="module")
def folder(mini, tmp_path_factory):
    """Six images of all sorts: JPEG and PNG, five sizes, two in a sub-folder, a stem that comes
    twice, turned, transparent.
    """
    folder = tmp_path_factory.mktemp("plain") / "photos"
    (folder / "sub").mkdir(parents=True)
    images = [Image.open(sample.image) for sample in rectify.list_samples(mini, "train")[:6]]
    exif = Image.Exif()
    exif[0x0112] = 6                                                                # held upright
    images[0].resize((100, 70)).save(folder / "one.jpg")
    images[1].resize((64, 64)).save(folder / "sub/one.png")
    images[2].resize((120, 80)).save(folder / "turned.jpg", exif=exif)
    clear = images[3].resize((90, 110))
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "clear.png")
    images[4].resize((150, 60)).save(folder / "WIDE.JPG")
    images[5].resize((100, 70)).save(folder / "sub/last.jpeg")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """What rectify.py, distill.py and export.py made of it, and what they printed."""
    out = tmp_path_factory.mktemp("done") / "out"
    (out.parent / "names.txt").write_text("\n".join(rectify.VOC_NAMES))
    own = ("--dataset", "emoji", "--data", folder, "--names", out.parent / "names.txt")
    printed = run(rectify, *own, "--out", out, "--epochs", 2, "--views", 1)
    printed += run(distill, "--out", out, "--epochs", 3)
    printed += run(export, "--out", out)
    return SimpleNamespace(out=out, printed=printed)


def test_a_plain_folder_becomes_a_student_in_a_file(done):
    """All files are there, and nothing half-written; all six images were learned from."""
    files = {p.name for p in done.out.iterdir() if not p.name.startswith(".")}
    assert files == {"rectify.pt", "rectify.json", "log.jsonl", "student.pt", "student.onnx",
                     "student.fp16.onnx", "export.json"}
    assert "6 images to learn from, 0 labelled ones to measure on" in done.printed
    assert re.search(r"teaches .* parameters: 6 images, 20 classes", done.printed)
    lines = [json.loads(line) for line in (done.out / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and all(np.isfinite(line["loss"]) for line in lines)


def test_nothing_is_claimed_that_was_not_measured(done):
    """No table, no mIoU: not on the screen, not in the report, not in the files."""
    assert done.printed.count("nothing to measure") == 1
    assert done.printed.count("no labels, so no mIoU") == done.printed.count("mIoU") == 1
    assert "results" not in json.loads((done.out / "rectify.json").read_text())
    report = json.loads((done.out / "export.json").read_text())
    assert report["results"] == {} and report["check"]["student.onnx"]["agreement"] >= 0.9999
    assert torch.load(done.out / "student.pt", weights_only=True)["mIoU"] is None
    meta = export.open_model(done.out / "student.onnx").get_modelmeta().custom_metadata_map
    assert "mIoU" not in meta and json.loads(meta["names"]) == rectify.VOC_NAMES


@pytest.mark.parametrize("image, size", [("one.jpg", (100, 70)), ("turned.jpg", (80, 120)),
                                         ("clear.png", (90, 110))])
def test_the_file_segments_a_picture(done, folder, tmp_path, image, size):
    """A mask of the image's size as it is looked at, with VOC's values, and the names of what is in
    it.
    """
    printed = run(export, "--run", done.out / "student.onnx", "--image", folder / image, "--mask",
                  tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as mask:
        assert mask.mode == "P" and mask.size == size
        pixels = np.bincount(np.asarray(mask).ravel(), minlength=256)
    assert pixels[1:21].sum() == pixels.sum() == size[0] * size[1]
    largest = rectify.VOC_NAMES[pixels.argmax() - 1]
    assert re.search(rf"m\.png: {largest} {pixels.max() / pixels.sum():.0%}", printed)


def test_masks_of_equal_stems_are_told_apart(done, folder, tmp_path, capsys):
    """--teacher DIR: sub/one.png has its mask in sub/, of another size than one.jpg's; of two
    images of one name the second is left out, and said.
    """
    masks, out = tmp_path / "theirs", tmp_path / "run"
    samples = rectify.list_samples(folder, "train")
    assert sorted(s.name
                  for s in samples) == ["WIDE", "clear", "one", "sub/last", "sub/one", "turned"]
    for k, sample in enumerate(samples):
        (masks / sample.name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L",
                  rectify.load_image(sample.image).shape[:0:-1],
                  k + 1).save(masks / f"{sample.name}.png")
    out.mkdir()
    shutil.copy(done.out / "rectify.pt", out)
    assert "6 masks, all sound" in run(distill, "--out", out, "--teacher", masks, "--epochs", 1)
    twins = shutil.copytree(folder, tmp_path / "twins")
    shutil.copy(twins / "clear.png", twins / "one.png")
    twin = {sample.name: sample.image.name for sample in rectify.list_samples(twins, "train")}
    assert twin["one"] == "one.jpg" and len(twin) == 6      # one.png has no mask of its own
    assert "1 of the same name" in capsys.readouterr().out
