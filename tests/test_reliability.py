"""What goes wrong around a run: full disks, two runs at once, damaged and crafted files, hostile
servers and archives, signals. Whatever a person can mend is one line with the file's name and exit
code 2; a file is there whole or not at all; what is damaged is never used.

    python -m pytest tests/test_reliability.py
"""
import functools
import importlib.util
import io
import itertools
import os
import shutil
import signal
import socketserver
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import distill
import rectify
from rectify import UserError


@pytest.fixture(autouse=True)
def handlers():
    """`run` sets signal handlers; each test gives the old ones back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def refusal(capsys):
    """The function from a main and its command line to what `run` says of it: one printable line,
    exit code 2.
    """
    def refuse(main, *argv):
        for bar in list(tqdm._instances):       # of runs that earlier tests interrupted
            bar.close()
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            rectify.run(lambda: main([*map(str, argv)]) if argv else main())
        *before, line, rest = capsys.readouterr().err.split("\n")
        line = line.split("\r")[-1]                                     # progress bars end in it
        assert (end.value.code, rest) == (2, "") and line.startswith("error: ")
        assert line.isprintable() and not any("error" in text for text in before)
        return line
    return refuse


@pytest.fixture(scope="module")
def own(mini, tmp_path_factory):
    """Six unlabelled images under photos/, and under run/ a rectify.pt and a student.pt of one
    epoch on them.
    """
    folder = tmp_path_factory.mktemp("own")
    (folder / "photos").mkdir()
    for path in sorted((mini / "JPEGImages").iterdir())[:6]:
        shutil.copy(path, folder / "photos")
    rectify.main([*learning(folder / "photos"), "--out", str(folder / "run")])
    distill.main(["--out", str(folder / "run"), "--epochs", "1"])
    return folder


def learning(photos):
    """The arguments of a short run on a folder of images."""
    return ["--dataset", "emoji", "--data", str(photos), "--names", "cow, dog, horse",
            "--epochs", "1", "--views", "1"]


@pytest.fixture
def run(own, tmp_path):
    """A copy of that run that a test may damage."""
    return Path(shutil.copytree(own / "run", tmp_path / "run"))


@pytest.fixture
def photo(own):
    return sorted((own / "photos").iterdir())[0]


def kill(*_, **__):
    raise KeyboardInterrupt


def denied(path, *_, **__):
    raise PermissionError(13, "Permission denied", str(path))


# =========================================================================== files that are written

WRITERS = {
    "checkpoint": lambda path: rectify.save(path, {"T": torch.ones(3)}),
    "text": lambda path: rectify.write_text(path, "whole"),
    "figure": lambda path: rectify.save_figure(Figure((1, 1)), path),
    "mask": lambda path: rectify.write_mask(torch.zeros(4, 4, dtype=torch.uint8), 3, path)}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_on_a_full_disk_the_earlier_file_stays(write, tmp_path):
    """Linux has a full disk at /dev/full: what is written there raises ENOSPC."""
    path = tmp_path / "file.png"
    path.write_text("earlier")
    (tmp_path / "file.png.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"file\.png: cannot be written \(No space left on device"):
        write(path)
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_is_killed_while_writing_leaves_no_half(write, tmp_path, monkeypatch):
    """Interrupted before the file has its name: the earlier one stays. Killed for good, so that
    nothing is cleaned: the next run writes over what is left.
    """
    path = tmp_path / "file.png"
    path.write_text("earlier")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            write(path)
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]
    (tmp_path / "file.png.tmp").write_text("half" * 10_000)
    write(path)
    assert path.read_bytes() != b"earlier" and b"half" not in path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["log.jsonl", "rectify.partial.pt", "rectify.pt", "rectify.json"])
def test_a_run_on_a_full_disk_is_one_line(own, tmp_path, refusal, name):
    (tmp_path / f"{name}.tmp").symlink_to("/dev/full")
    line = refusal(rectify.main, *learning(own / "photos"), "--out", tmp_path)
    assert f"{tmp_path}/{name}: cannot be written (No space left on device)" in line
    assert not (tmp_path / name).exists() and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("ending", ["mask.png", "overlay.png"])
def test_an_image_on_a_full_disk_leaves_no_empty_file(run, photo, refusal, ending):
    (run / f"{photo.stem}.{ending}.tmp").symlink_to("/dev/full")
    line = refusal(rectify.main, "--image", photo, "--out", run)
    assert f"{photo.stem}.{ending}: cannot be written (No space left on device)" in line
    assert not (run / f"{photo.stem}.{ending}").exists() and not list(run.glob("*.tmp"))


def test_a_writers_own_error_is_told(tmp_path):
    """Pillow raises OSErrors that have a message alone."""
    with pytest.raises(UserError, match="encoder error"):
        with rectify.whole_file(tmp_path / "file.png"):
            raise OSError("encoder error -2 when writing image file")


def test_a_folder_that_is_deleted_in_training_is_one_line(own, tmp_path, monkeypatch, refusal):
    finish = rectify.finish_epoch

    def delete(*args):
        shutil.rmtree(args[-1])
        finish(*args)

    monkeypatch.setattr(rectify, "finish_epoch", delete)
    line = refusal(rectify.main, *learning(own / "photos"), "--out", tmp_path / "gone")
    assert "gone/log.jsonl: cannot be written (No such file or directory)" in line


# ==================================================================================== places, paths

@pytest.fixture
def no_features(monkeypatch):
    """Whatever is wrong is found before the features are computed."""
    monkeypatch.setattr(rectify, "training_data",
                        lambda *_: pytest.fail("the features were computed first"))


@pytest.mark.parametrize("place", ["file", "file/run", "x" * 300])
@pytest.mark.parametrize("option", ["--out", "--root"])
def test_a_bad_place_is_one_line(own, tmp_path, no_features, refusal, option, place):
    """A file in the way, and a name that is too long, are named."""
    (tmp_path / "file").write_text("mine")
    argv = learning(own / "photos") if option == "--out" else ["--out", tmp_path / "run"]
    assert place[:100] in refusal(rectify.main, *argv, option, tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_out_is_found_first(own, tmp_path, no_features, monkeypatch, refusal):
    monkeypatch.setattr(rectify.FileLock, "acquire", lambda self: denied(self.lock_file))
    line = refusal(rectify.main, *learning(own / "photos"), "--out", tmp_path / "run")
    assert f"{tmp_path}/run: cannot be written to (Permission denied); give another --out" in line


@pytest.mark.parametrize("name", ["names.txt", "train.txt"])
def test_an_unreadable_text_is_named(mini, tmp_path, no_features, monkeypatch, refusal, name):
    """Not --out, where the run writes: the very text that cannot be read."""
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *args: (
        denied(self) if self.name == name else read(self, *args)))
    line = refusal(rectify.main, "--dataset", "emoji", "--data", mini, "--names",
                   mini / "names.txt", "--out", tmp_path / "run")
    assert f"{name}: Permission denied" in line


@pytest.mark.parametrize("name", ["names.txt", "train.txt"])
def test_a_text_that_is_not_utf8_is_named(mini, tmp_path, no_features, refusal, name):
    data = Path(shutil.copytree(mini, tmp_path / "data"))
    next(data.rglob(name)).write_bytes("Kühe\n".encode("latin-1"))
    line = refusal(rectify.main, "--dataset", "emoji", "--data", data, "--names",
                   data / "names.txt", "--out", tmp_path / "run")
    assert f"{name}: not a text in UTF-8" in line


def test_a_log_that_is_not_utf8_does_not_stop_the_student(run):
    """Its lines are kept as far as they can be read."""
    (run / "log.jsonl").write_bytes(b'{"epoch": "\xff"}\n')
    distill.main(["--out", str(run), "--epochs", "1"])
    assert len((run / "log.jsonl").read_text("utf-8").splitlines()) == 2


def test_an_unreadable_checkpoint_is_not_called_damaged(run, photo, monkeypatch, refusal):
    monkeypatch.setattr(rectify, "open", denied, raising=False)
    line = refusal(rectify.main, "--image", photo, "--out", run)
    assert "rectify.pt: cannot be read (Permission denied)" in line and "again" not in line


def test_a_file_name_that_is_not_utf8(own, tmp_path):
    """An image like any other."""
    photos = Path(shutil.copytree(own / "photos", tmp_path / "photos"))
    first = sorted(photos.iterdir())[0]
    os.rename(first, os.fsencode(photos) + b"/\xff.jpg")
    rectify.main([*learning(photos), "--out", str(tmp_path / "run")])
    assert (tmp_path / "run/rectify.pt").is_file()


@pytest.mark.parametrize("option", ["--image", "--names", "--eval"])
def test_a_pipe_is_not_waited_for(run, tmp_path, refusal, option):
    os.mkfifo(tmp_path / "pipe.txt")
    argv = ["--dataset", "emoji"] if option == "--names" else ["--out", run]
    assert "pipe.txt: no such" in refusal(rectify.main, *argv, option, tmp_path / "pipe.txt")


# ================================================================================= two runs at once

def packed(members, form="w"):
    """A tar of {path: bytes}, as bytes."""
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode=form) as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return file.getvalue()


def publish(monkeypatch, path, content):
    """Let these bytes be the published archive of Emoji VOC."""
    path.write_bytes(content)
    files = [(path, rectify.hashlib.md5(content).hexdigest())]
    monkeypatch.setitem(rectify.DATASETS, "emoji", (files, "VOC", rectify.VOC_NAMES))


def test_two_first_runs_wait_for_each_others_unpacking(tmp_path, monkeypatch):
    """Both find nothing; one unpacks, the other then finds it whole."""
    publish(monkeypatch, tmp_path / "a.tar", packed({f"VOC/{k}": b"image" for k in range(50)}))
    unpack, together, unpacked = rectify.unpack, threading.Barrier(2), []

    def slowly(*args):
        time.sleep(0.2)
        unpacked.append(args)
        unpack(*args)

    def first_run(_):
        together.wait()
        return rectify.dataset_folder(rectify.configure(root=str(tmp_path / "root")))

    monkeypatch.setattr(rectify, "unpack", slowly)
    with ThreadPoolExecutor(2) as pool:
        folders = [*pool.map(first_run, range(2))]
    assert len(unpacked) == 1 and len(set(folders)) == 1
    assert len(list(folders[0].iterdir())) == 50 and not list(tmp_path.rglob("*.partial"))


def test_what_a_killed_unpacking_left_is_cleared(tmp_path, monkeypatch):
    publish(monkeypatch, tmp_path / "a.tar", packed({"VOC/new": b"image"}))
    (tmp_path / "root/emoji.partial/VOC").mkdir(parents=True)
    (tmp_path / "root/emoji.partial/VOC/old").write_text("half")
    folder = rectify.dataset_folder(rectify.configure(root=str(tmp_path / "root")))
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_first_run_that_has_not_told_its_number_yet(own, tmp_path, refusal):
    """Between its lock and its number stands a moment."""
    with rectify.FileLock(tmp_path / ".lock"):
        line = refusal(rectify.main, *learning(own / "photos"), "--out", tmp_path)
    assert f"{tmp_path}: " in line and "is writing there" in line


@pytest.mark.parametrize("script", [rectify, distill], ids=["rectify", "distill"])
def test_a_second_run_in_the_same_folder_is_refused(own, run, no_features, refusal, script):
    """It names the process that is there, and leaves every file as it is."""
    argv = learning(own / "photos") if script is rectify else []
    before = {path: path.read_bytes() for path in run.iterdir() if path.suffix != ".lock"}
    with rectify.output_folder(run):
        line = refusal(script.main, *argv, "--out", run)
        assert f"{run}: process {os.getpid()} is writing there" in line
    assert all(path.read_bytes() == content for path, content in before.items()
               if not path.name.startswith("."))
    with rectify.output_folder(run):                                    # the first one has ended
        pass


# ========================================================================================= --resume

@pytest.mark.parametrize("ended", ["complete", "in its second epoch"])
def test_resume_refuses_another_list_of_images(own, tmp_path, monkeypatch, refusal, ended):
    """Also where the list changed and the new run was killed before it saved anything: the old
    run's weights are not measured as the new one's.
    """
    photos = Path(shutil.copytree(own / "photos", tmp_path / "photos"))
    argv = [*learning(photos), "--out", str(tmp_path / "run")]
    argv[argv.index("--epochs") + 1] = "2"
    if ended == "complete":
        rectify.main(argv)
    else:
        finish = rectify.finish_epoch
        monkeypatch.setattr(rectify, "finish_epoch", lambda *args: (
            kill() if len(args[5]) else finish(*args)))
        with pytest.raises(KeyboardInterrupt):
            rectify.main(argv)
    shutil.copy(sorted(photos.iterdir())[0], photos / "new.jpg")
    line = refusal(rectify.main, *argv, "--resume")
    assert f"{photos}: its list of training images changed" in line and "--resume" in line


def test_a_copied_run_needs_no_file_times(own, run, capsys):
    """A folder copied without them resumes: what a run is stands in its checkpoints."""
    for k, path in enumerate(sorted(run.iterdir(), reverse=True)):
        os.utime(path, (k, k))
    capsys.readouterr()
    rectify.main([*learning(own / "photos"), "--out", str(run), "--resume"])
    assert "measuring a complete run" in capsys.readouterr().out
    distill.main(["--out", str(run), "--epochs", "1", "--resume"])
    assert "measuring a complete student" in capsys.readouterr().out


def test_a_student_does_not_resume_with_another_list_of_images(own, run, photo, monkeypatch,
                                                               refusal):
    finish = distill.finish_epoch
    with monkeypatch.context() as patch:
        patch.setattr(distill, "finish_epoch", lambda *args: (
            kill() if len(args[6]) else finish(*args)))
        with pytest.raises(KeyboardInterrupt):
            distill.main(["--out", str(run), "--epochs", "2"])
    shutil.copy(photo, own / "photos/new.jpg")
    try:
        line = refusal(distill.main, "--out", run, "--epochs", "2", "--resume")
    finally:
        (own / "photos/new.jpg").unlink()
    assert f"{own}/photos: its list of training images changed" in line


# ================================================================== damaged and crafted checkpoints

def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two nested states are equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name, part", [("rectify.pt", "rectifier"), ("student.pt", "student")])
def test_no_flipped_bit_changes_what_is_read(run, name, part):
    """At 40 places over the file, and in the middle of its largest tensor: refused, or one of the
    bytes that mean nothing.
    """
    sound, content = load(run / name), (run / name).read_bytes()
    with zipfile.ZipFile(run / name) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    middle, refused = largest.header_offset + largest.file_size // 2, []
    for place in [middle, *range(0, len(content), len(content) // 40)]:
        flipped = bytearray(content)
        flipped[place] ^= 64
        (run / name).write_bytes(flipped)
        try:
            assert same(rectify.load_checkpoint(run / name, part), sound)
        except UserError as error:
            assert name in str(error)
            refused.append(place)
    assert middle in refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name, part, key", [
    ("rectify.pt", "rectifier", "V"), ("rectify.pt", "T", None), ("student.pt", "student", "T"),
    ("rectify.pt", "clip", "proj")])
def test_weights_that_are_not_finite_are_refused(run, name, part, key, value):
    state = load(run / name)
    if part == "clip":                                                      # of --finetune
        state["clip"] = {"proj": torch.ones(2, 2)}
    (state[part][key] if key else state[part]).view(-1)[3] = value
    torch.save(state, run / name)
    with pytest.raises(UserError, match=f"{name}: .*not finite"):
        rectify.load_checkpoint(run / name, "student" if name == "student.pt" else "rectifier")


def put(*path):
    """A change of a state: its value at this path becomes the last argument."""
    *path, last, value = path
    return lambda state: rectify.functools.reduce(dict.get, path, state).update({last: value})


def drop(*path):
    """A change of a state: without what is at this path."""
    return lambda state: rectify.functools.reduce(dict.get, path[:-1], state).pop(path[-1])


CRAFTED = {
    "no T": drop("T"), "T is a row": put("T", torch.ones(3)), "T is narrow": put(
        "T", torch.ones(3, 7)), "T has three dimensions": put("T", torch.ones(3, 4, 4)),
    "no prompt": drop("rectifier", "V"), "another prompt": put("rectifier", "V", torch.ones(1, 1)),
    "weights are words": put("rectifier", "V", "words"), "no names": drop("names"),
    "names are numbers": put("names", [1, 2, 3]), "more names": put("names", list("abcd")),
    "no settings": drop("config"), "a setting is missing": drop("config", "alpha"),
    "a setting is a word": put("config", "crop", "wide"),
    "sizes are words": put("config", "size", ("a", "b")),
    "an unknown CLIP": put("config", "clip", "local-dir:/nowhere"), "a list": lambda state: [state]}


@pytest.mark.parametrize("change", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_rectifier_is_one_line(run, photo, refusal, change):
    state = load(run / "rectify.pt")
    made = change(state)
    torch.save(made if isinstance(made, list) else state, run / "rectify.pt")
    line = refusal(rectify.main, "--image", photo, "--out", run)
    assert f"{run}/rectify.pt" in line or "local-dir:/nowhere" in line
    assert not list(run.glob("*.mask.png"))


@pytest.mark.parametrize("change", [
    drop("log"), drop("schedule"), put("optimizer", {}), drop("images"), drop("rectifier", "V")],
    ids=["no log", "no schedule", "another optimizer", "no list of images", "no prompt"])
def test_a_crafted_interrupted_run_is_one_line(own, tmp_path, monkeypatch, refusal, change):
    argv, out = [*learning(own / "photos"), "--out", str(tmp_path)], tmp_path / "rectify.partial.pt"
    with monkeypatch.context() as patch:
        patch.setattr(rectify, "remove_stale", kill)
        with pytest.raises(KeyboardInterrupt):
            rectify.main(argv)
    state = load(out)
    change(state)
    torch.save(state, out)
    refusal(rectify.main, *argv, "--resume")


@pytest.mark.parametrize("change", [
    put("student", "T", torch.ones(3)), put("student", "T", torch.ones(3, 7)),
    drop("student", "aspp.0.weight"), put("config", "rates", (1, 2, 3, 4, 5)),
    put("config", "width", 1e9), put("config", "width", -1.0), drop("config", "backbone"),
    put("config", "backbone", "hf-hub:someone/something"), put("config", "backbone", "a/b"),
    put("config", "backbone", "resnet0"), drop("taught_by")],
    ids=["T is a row", "T is narrow", "no ASPP", "five rates", "wide", "negative", "no backbone",
         "a hub's", "a path", "unknown", "no teacher"])
def test_a_crafted_student_is_one_line_and_reaches_no_network(run, monkeypatch, refusal, change):
    state, reached = load(run / "student.pt"), []
    change(state)
    torch.save(state, run / "student.pt")
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **_: reached.append(args) or [])
    refusal(distill.main, "--eval", run / "student.pt")
    assert not reached


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04}.", b"words\n"])
def test_what_is_no_checkpoint_is_one_line(run, photo, refusal, content):
    """No advice to open it unsafely either."""
    (run / "rectify.pt").write_bytes(content)
    line = refusal(rectify.main, "--image", photo, "--out", run)
    assert "rectify.pt: not a checkpoint of rectify.py" in line and "weights_only" not in line


def test_a_backbone_that_cannot_be_read_is_an_error(tmp_path, refusal, run):
    """Not the start from scratch of one that cannot be fetched."""
    sound = (rectify.HERE / "tests/emoji/resnet18.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(sound[:len(sound) // 2])
    line = refusal(distill.main, "--out", run, "--weights", tmp_path / "cut.safetensors")
    assert "cut.safetensors: cannot be read" in line


# =========================================================================================== images

def png(width, height, data=b""):
    """A PNG of one bit a pixel; its header alone where no data are given."""
    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)
            + chunk(b"IEND", b""))


@pytest.mark.parametrize("load", [rectify.load_image, lambda path: rectify.load_label(path, (9, 9),
                                                                                      3)])
@pytest.mark.parametrize("content", [png(20_000, 20_000), png(13_000, 13_000), b"", b"\xff\xd8"])
def test_bombs_and_broken_images_and_masks_are_refused(tmp_path, load, content):
    """More pixels than Pillow's limit, or than the file has."""
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.png: not a readable (image|mask)"):
        load(tmp_path / "x.png")


@pytest.fixture
def enlarged(monkeypatch):
    """The numbers of elements of all tensors of floats that F.interpolate makes."""
    sizes, interpolate = [], torch.nn.functional.interpolate

    def measured(x, *args, **options):
        found = interpolate(x, *args, **options)
        sizes.append(found.numel() * found.is_floating_point())
        return found

    monkeypatch.setattr(rectify.F, "interpolate", measured)
    return sizes


def test_many_classes_take_bounded_memory(enlarged, monkeypatch):
    """A few of 200 classes at a time, and the same mask as from all at once."""
    logits = torch.randn(2, 200, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = rectify.decide(logits, 8, (32, 32), (32, 32), 200)
    assert max(enlarged) == logits.numel() * 64
    monkeypatch.setattr(rectify, "LARGEST_MASK", 32 * 32)
    enlarged.clear()
    assert torch.equal(rectify.decide(logits, 8, (32, 32), (32, 32), 200), whole)
    assert max(enlarged) <= 8 * rectify.LARGEST_MASK


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_mask_of_169_megapixels_takes_bounded_memory(run, tmp_path, enlarged):
    """A small file of 13000×13000: no tensor of floats is larger than the limit, and the mask has
    the image's size.
    """
    image = zlib.compress(bytes(13_000 * (1 + 1625)), 1)
    (tmp_path / "large.png").write_bytes(png(13_000, 13_000, image))
    peak, page, done = [0], os.sysconf("SC_PAGE_SIZE"), threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], int(Path("/proc/self/statm").read_text().split()[1]) * page)

    before = int(Path("/proc/self/statm").read_text().split()[1]) * page
    threading.Thread(target=watch, daemon=True).start()
    rectify.main(["--image", str(tmp_path / "large.png"), "--out", str(run)])
    done.set()
    assert 0 < max(enlarged) <= 8 * rectify.LARGEST_MASK and peak[0] - before < 2e9
    with Image.open(run / "large.mask.png") as mask:
        assert mask.size == (13_000, 13_000)


def test_images_of_extreme_shapes_take_bounded_work(own, tmp_path, monkeypatch):
    """Stripes and a single pixel in training: CLIP never sees more than eight squares at once of
    any of them, nor more than a strip of the longest side that the recipe allows.
    """
    photos = Path(shutil.copytree(own / "photos", tmp_path / "photos"))
    for width, height in ((50_000, 20), (20, 50_000), (1, 1)):
        Image.new("RGB", (width, height), "red").save(photos / f"{width}x{height}.png")
    seen, encode = [], rectify.encode_image
    monkeypatch.setattr(rectify, "encode_image", lambda clip, x, attention: (
        seen.append(x[0, 0].numel()) or encode(clip, x, attention)))
    rectify.main([*learning(photos), "--out", str(tmp_path / "run")])
    side, size = 192, rectify.RECIPES["emoji"]["size"]
    assert max(seen) <= max(8 * side * side, size[0] * size[1])


# ========================================================================================== servers

class Raw(socketserver.StreamRequestHandler):
    """Answers every request with the server's bytes, piece by piece, until the other side goes."""

    def handle(self):
        while self.rfile.readline().strip():
            pass
        try:
            for piece in self.server.pieces():
                self.wfile.write(piece)
        except OSError:
            pass


class Server(socketserver.ThreadingTCPServer):
    daemon_threads, block_on_close = True, False


@pytest.fixture
def fetch(tmp_path, monkeypatch, refusal):
    """The function from a server's reply (bytes, or a function to pieces of them) to the line in
    which `download` gives up; no file appears.
    """
    monkeypatch.setenv("no_proxy", "*")

    def fetch(reply):
        with Server(("127.0.0.1", 0), Raw) as server:
            url = f"http://127.0.0.1:{server.server_address[1]}/a.tar"
            server.pieces = lambda: (piece.replace(b"URL", url.encode()) for piece in (
                reply() if callable(reply) else [reply]))
            threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
            line = refusal(lambda: rectify.download(url, "0" * 32, tmp_path / "a.tar"))
            server.shutdown()
        assert f"{tmp_path}/a.tar: not downloaded" in line and url in line and "0" * 32 in line
        assert not (tmp_path / "a.tar").exists()
        return line
    return fetch


OK, FOUND = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: "


@pytest.mark.parametrize("reply", [
    OK + b"Content-Length: abc\r\n\r\nxyz", OK + b"\r\nxyz", OK + b"Content-Length: -5\r\n\r\nxyz",
    OK + b"Content-Length: 1e9\r\n\r\nxyz", OK + b"Content-Length: 99\r\n\r\ncut",
    OK + b"Transfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\nnonsense\r\n",
    FOUND + b"http://[\r\n\r\n", FOUND + b"http://127.0.0.1:port/\r\n\r\n",
    FOUND + b"file:///etc/passwd\r\n\r\n", FOUND + b"URL\r\n\r\n", b"\x1b[2Jhello\r\n\r\n",
    b"HTTP/1.1 500 \x1b[31mred\r\nContent-Length: 0\r\n\r\n", b""])
def test_what_a_server_may_answer_is_one_line(fetch, reply):
    """Nonsense for a length, none, a cut, redirects in a loop, to nowhere and to files, escape
    sequences for a status, nothing at all.
    """
    fetch(reply)


@pytest.mark.parametrize("hidden", [False, True])
def test_more_bytes_than_announced_are_not_taken(fetch, tmp_path, monkeypatch, hidden):
    """A stream without an end (here it has one, so that the test has) does not fill the disk, also
    where TQDM_DISABLE hides the progress bar.
    """
    monkeypatch.setattr(rectify, "tqdm", functools.partial(rectify.tqdm, disable=hidden))
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    stream = lambda: itertools.chain(
        [OK + b"Transfer-Encoding: chunked\r\nContent-Length: 1000\r\n\r\n"],
        itertools.repeat(chunk, 100))
    assert "more than it announced" in fetch(stream)
    assert (tmp_path / "a.tar.part").stat().st_size < 2 ** 21


def test_a_slow_server_is_given_up(fetch, monkeypatch):
    """By a clock that runs 50 seconds between two looks at it: after a minute of grace, fewer than
    SLOWEST bytes a second. What has come stays.
    """
    clock = itertools.count(0, 50)
    monkeypatch.setattr(rectify, "time", SimpleNamespace(time=lambda: next(clock)))
    drops = lambda: itertools.chain([OK + b"Content-Length: 1000000\r\n\r\n"],
                                    (time.sleep(0.02) or b"x" for _ in range(200)))
    assert f"less than {rectify.SLOWEST} bytes a second" in fetch(drops)


def test_a_silent_server_is_given_up(fetch, monkeypatch):
    """Within the minute that `download` allows, here made shorter."""
    open_url, allowed = rectify.urlopen, []

    def impatient(request, timeout):
        allowed.append(timeout)
        return open_url(request, timeout=0.2)

    monkeypatch.setattr(rectify, "urlopen", impatient)
    silent = lambda: ((time.sleep(1) if k else None) or OK for k in range(2))
    assert "timed out" in fetch(silent) and allowed == [60]


# ========================================================================================= archives

def zipped(name, change=lambda content: content):
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, b"image" * 99)
        return change(bytearray(file.getvalue()))


def patched(offset, value):
    """A change of a zip's bytes: this field (its offset in the local header) of the local and the
    central header.
    """
    def change(content):
        struct.pack_into("<H", content, offset, value)
        struct.pack_into("<H", content, content.rindex(b"PK\x01\x02") + offset + 2, value)
        return content
    return change


@pytest.mark.parametrize("name, content", [
    ("a.tar", packed({})), ("a.tar", b""), ("a.zip", b""), ("a.tar", b"words" * 999),
    ("a.zip", zipped("VOC/a", patched(6, 1))), ("a.zip", zipped("VOC/a", patched(8, 77))),
    ("a.zip", zipped("VOC/a", lambda content: content[:-30])), ("a.zip", zipped("a/" * 3000 + "b")),
    ("a.tar", packed({"a/" * 3000 + "b": b"x"})), ("a.tar", packed({"a/" * 900 + "b": b"x"})),
    ("a.tgz", packed({"VOC/a": os.urandom(99_999)}, "w:gz")[:50_000]),
    ("a.tar", packed({"VOC/a": os.urandom(99_999)})[:50_000]), ("a.rar", b"Rar!")],
    ids=["empty", "no bytes", "no bytes, zip", "words", "encrypted", "unknown method", "cut zip",
         "deep zip", "deep tar", "less deep", "cut tgz", "cut tar", "unknown kind"])
def test_an_odd_archive_with_the_right_md5_is_one_line(tmp_path, monkeypatch, refusal, name,
                                                       content):
    """Nothing half-unpacked is taken for the dataset, in this run or the next."""
    publish(monkeypatch, tmp_path / name, bytes(content))
    cfg = rectify.configure(root=str(tmp_path / "root"))
    for _ in range(2):
        refusal(lambda: rectify.dataset_folder(cfg))
    assert not list((tmp_path / "root").glob("*.partial"))


# ======================================================================== terminals, pipes, signals

ESCAPE = "\x1b[2J\x9b31m"


@pytest.mark.parametrize("where", ["list", "image", "names"])
def test_escape_sequences_do_not_reach_the_terminal(mini, run, tmp_path, refusal, capsys, where):
    """Of a list's entry, a file's name, a class's name: the refusal shows none of them raw."""
    data = Path(shutil.copytree(mini, tmp_path / "data"))
    if where == "list":
        (data / "ImageSets/Segmentation/train.txt").write_text(f"{ESCAPE}cow\n")
    argv = {"list": ["--names", data / "names.txt", "--data", data],
            "names": ["--names", f"cow, {ESCAPE}dog", "--data", data],
            "image": ["--image", f"{ESCAPE}cow.jpg"]}[where]
    argv += ["--out", run] if where == "image" else ["--dataset", "emoji", "--out", tmp_path / "r"]
    refusal(rectify.main, *argv)
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x9b" not in said


@pytest.mark.parametrize("kind", ["suffix", "image", "leftover"])
def test_escape_sequences_in_file_names_are_harmless(own, run, photo, tmp_path, capsys, kind):
    """Also where nothing is wrong: what is skipped, what is segmented, what lies in --out."""
    photos = Path(shutil.copytree(own / "photos", tmp_path / "photos"))
    if kind == "suffix":
        (photos / f"x.{ESCAPE}").write_text("not an image")
        rectify.main([*learning(photos), "--out", str(tmp_path / "run")])
    elif kind == "leftover":
        (run / f"x{ESCAPE}").write_text("mine")
        rectify.main([*learning(photos), "--out", str(run)])
    else:
        shutil.copy(photo, photos / f"{ESCAPE}.jpg")
        rectify.main(["--image", str(photos / f"{ESCAPE}.jpg"), "--out", str(run)])
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out and "\x9b" not in captured.out


def test_escape_sequences_in_a_checkpoint_are_refused(run):
    state = load(run / "rectify.pt")
    torch.save(state | {"names": [f"{ESCAPE}cow", "dog", "horse"]}, run / "rectify.pt")
    with pytest.raises(UserError, match="rectify.pt"):
        rectify.load_checkpoint(run / "rectify.pt")


def test_a_long_line_is_cut_and_keeps_its_reason(own, tmp_path, refusal):
    """20,000 names are not printed; what is wrong with them is."""
    names = ", ".join(f"name {k}" for k in range(20_000))
    line = refusal(rectify.main, "--dataset", "emoji", "--data", own / "photos", "--names", names,
                   "--out", tmp_path / "run")
    assert len(line) < 800 and "20000 names" in line and "254" in line


def stream(encoding="utf-8"):
    return io.TextIOWrapper(io.BytesIO(), encoding)


def test_an_ascii_terminal_shows_names_in_any_script(monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream("ascii"))
    rectify.run(lambda: print("猫"))
    assert sys.stdout.buffer.getvalue() == b"\\u732b\n"


@pytest.mark.parametrize("flush", [True, False])
def test_a_pipe_that_is_closed_ends_the_run_quietly(monkeypatch, capfd, flush):
    """`| head -1`: while printing, or at the last flush."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as end:
            rectify.run(lambda: print("line", flush=flush))
        monkeypatch.undo()
    assert end.value.code == 141 and not capfd.readouterr().err


def test_closed_streams_are_no_errors(monkeypatch, own, tmp_path):
    """`>&- 2>&-`: Python has no streams then. A run runs all the same, an error has its code."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    rectify.run(lambda: rectify.main([*learning(own / "photos"), "--out", str(tmp_path)]))
    assert (tmp_path / "rectify.pt").is_file()
    with pytest.raises(SystemExit) as end:
        rectify.run(lambda: rectify.main(["--seed", "-1"]))
    assert end.value.code == 2


SIGNALLED = """
import os, signal, sys, time
import rectify
number, folder = int(sys.argv[1]), rectify.Path(sys.argv[2])
signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

def main():
    with rectify.output_folder(folder), rectify.whole_file(folder / "file") as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), number)
        time.sleep(5)

rectify.run(main)
"""                                                         # nohup and background jobs ignore some


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_orderly(number, tmp_path):
    """One line, the shell's code for it, and nothing half-written or locked. In a process of its
    own: OpenVINO, which other tests load, takes away the stack on which signals are handled.
    """
    command = [sys.executable, "-c", SIGNALLED, str(int(number)), str(tmp_path)]
    ended = subprocess.run(command, cwd=rectify.HERE, capture_output=True, text=True)
    assert ended.returncode == 128 + number and ended.stderr.count("\n") == 1, ended.stderr
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    with rectify.output_folder(tmp_path):
        pass


def test_nohup_is_respected():
    """A signal that whoever started us ignores stays ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    rectify.run(lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_what_cannot_be_mended_keeps_its_traceback():
    """A bug is not dressed up as a user's mistake."""
    with pytest.raises(ZeroDivisionError):
        rectify.run(lambda: 1 / 0)


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2 ** 60), lambda: bytes(2 ** 62)])
def test_out_of_memory_is_one_line(refusal, allocate):
    assert "out of memory; give a smaller" in refusal(allocate)


# ======================================================================== environment and arguments

@pytest.fixture
def imported(monkeypatch):
    """The function from environment variables to rectify.py as it is imported under them."""
    def imported(**environment):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        spec = importlib.util.spec_from_file_location("under", rectify.HERE / "rectify.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "under", module)
        spec.loader.exec_module(module)
        return module
    return imported


@pytest.mark.parametrize("environment", [
    {"RANK": "x"}, {"RANK": "", "WORLD_SIZE": "two"}, {"RANK": "1"}, {"WORLD_SIZE": "0"},
    {"RANK": "²"}, {"LOCAL_RANK": "-1"}], ids=str)
def test_without_torchrun_a_run_is_alone(imported, environment):
    """Whatever else means by these variables: with no number of processes there is one, the
    first.
    """
    module = imported(**environment)
    assert (module.RANK, module.WORLD) == (0, 1)


def test_a_number_of_processes_without_torchrun_is_one_line(imported, monkeypatch, capsys):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as end:
        imported(WORLD_SIZE="2").run(lambda: pytest.fail("it began"))
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and "torchrun" in line


@pytest.mark.parametrize("argv", [
    ["--seed", str(2 ** 64)], ["--seed", "-1"], ["--ring", "0"], ["--ring", "-5"],
    ["--lr", "nan"], ["--lr", "inf"], ["--alpha", "nan"], ["--weight-decay", "-1"],
    ["--weight-decay", "nan"], ["--lr-encoder", "-1", "--finetune"], ["--jitter", "nan", "nan"],
    ["--jitter", "1", "inf"], ["--jitter", "-1", "1"], ["--batch", str(10 ** 20)],
    ["--sharpness", "nan"], ["--denoise", "nan"], ["--t", "nan"], ["--threshold", "nan"]],
    ids=" ".join)
def test_values_that_make_no_sense_are_one_line(own, tmp_path, no_features, refusal, argv):
    argv = [*learning(own / "photos"), "--out", tmp_path / "run", *argv]
    assert argv[len(learning("")) + 2] in refusal(rectify.main, *argv)


@pytest.mark.parametrize("argv", [
    ["--crop", str(10 ** 7)], ["--views", str(10 ** 9)], ["--size", str(10 ** 9), str(10 ** 9)]],
    ids=" ".join)
def test_more_than_the_machine_holds_is_one_line(own, tmp_path, refusal, argv):
    line = refusal(rectify.main, *learning(own / "photos"), "--out", tmp_path / "run", *argv)
    assert "memory" in line and "give " in line


@pytest.mark.parametrize("argv", [
    ["--seed", str(2 ** 64)], ["--rates", "0", "1", "1", "1"], ["--crop", "0"], ["--crop", "-8"],
    ["--size", "0", "0"], ["--stretch", "0"], ["--stretch", "nan"], ["--jitter", "0", "0"],
    ["--jitter", "nan", "1"], ["--head", "-1"], ["--head", "nan"], ["--weight-decay", "-1"],
    ["--floor", "-1"], ["--mask-weight", "nan"], ["--penalty", "nan"], ["--batch", str(10 ** 20)]],
    ids=" ".join)
def test_values_that_make_no_student_are_one_line(run, monkeypatch, refusal, argv):
    monkeypatch.setattr(distill, "train", lambda *_: pytest.fail("it began to learn"))
    refusal(distill.main, "--out", run, "--epochs", "1", *argv)
