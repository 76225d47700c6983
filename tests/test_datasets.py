"""How the real datasets arrive: fetched, checked, unpacked and converted, from miniatures that a
server on the loopback serves; how folders of other layouts are read; and the published protocol on
images of VOC's size.

    python -m pytest tests/test_datasets.py
"""
import contextlib
import errno
import functools
import http.server
import io
import json
import shutil
import tarfile
import threading
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import rectify
from rectify import ADE_NAMES, CONTEXT_IDS, CONTEXT_NAMES, VOC_NAMES, VOID, UserError, configure

H, W = 6, 8                                             # of the miniatures' images


# ========================================================================================= a server

class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's `files`, whole or from the first byte of a Range on, as its `trouble`
    says: "cut" breaks off in the middle, "no range" ignores Range, "error" answers 500.
    """

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        content, trouble = self.server.files.get(self.path), self.server.trouble
        start = int(asked[len("bytes="):-1]) if asked and trouble != "no range" else 0
        if content is None or trouble == "error" or start >= len(content):
            self.send_error(404 if content is None else 500 if trouble == "error" else 416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:len(content) // 2 if trouble == "cut" else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on the loopback with `files` {"/name": bytes}, `trouble`, and the `requests` it got:
    (path, Range).
    """
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests, server.trouble = {}, [], None
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


def md5(content):
    return rectify.hashlib.md5(content).hexdigest()


# =============================================================================== miniature archives

def jpg(seed=0, size=(W, H)):
    """A image of noise as bytes."""
    random = np.random.default_rng(seed)
    return encoded(random.integers(0, 256, (size[1], size[0], 3), np.uint8), "JPEG")


def encoded(array, form="PNG"):
    with io.BytesIO() as file:
        Image.fromarray(np.asarray(array, np.uint8)).save(file, form)
        return file.getvalue()


def tar(members):
    """{path: bytes} as a tar's bytes."""
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return file.getvalue()


def zipped(members):
    """{path: bytes} as a zip's bytes."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return file.getvalue()


LABEL = np.zeros((H, W), int)                           # what a mask file holds: 0 background,
LABEL[1:4, 1:4], LABEL[1:4, 4], LABEL[5] = 3, VOID, 20  # class 2, a void border, class 19
TRUTH = np.where(LABEL == 0, VOID, LABEL - (LABEL != VOID))


def voc(year="2012"):
    """VOC's archive: train1 and val1, which the lists name, and an image that is on no list; labels
    0 to 20 and 255.
    """
    inside = f"VOCdevkit/VOC{year}"
    members = {f"{inside}/JPEGImages/{name}.jpg": jpg(k)
               for k, name in enumerate(["train1", "unlisted", "val1"])}
    for split in ("train", "val"):
        members[f"{inside}/SegmentationClass/{split}1.png"] = encoded(LABEL)
        members[f"{inside}/ImageSets/Segmentation/{split}.txt"] = f"{split}1\n".encode()
    return tar(members)


def context():
    """trainval_merged.json for the images of voc("2010"), with runs as a list and as COCO's string.

    val1 is airplane (the first of the 59) at the left, wood (the last) at the right, and something
    beyond the 59 between them.
    """
    piece = lambda image, category, counts: {"image_id": image, "category_id": category,
                                             "segmentation": {"size": [H, W], "counts": counts}}
    image = lambda id, phase: {"image_id": id, "file_name": f"{phase}1.jpg", "height": H,
                               "width": W, "phase": phase}
    pieces = [piece(2, CONTEXT_IDS[-1], [0, 48]),       # wood everywhere
              piece(1, CONTEXT_IDS[1], "0`1"),          # bag everywhere: runs 0, 48
              piece(2, CONTEXT_IDS[0], "0b0n0"),        # airplane in the left three columns
              piece(2, 1, [15, 6, 27])]                 # accordion: half a column of each
    return json.dumps({"images": [image(1, "train"), image(2, "val")], "annos_segmentation": pieces,
                       "categories": []}).encode()


def ade():
    """ADE20K's archive: folders instead of lists; labels 0 to 150, of which 0 is void."""
    label = np.arange(H * W).reshape(H, W) % 151
    label[0, 0] = 150
    members, root = {}, "ADEChallengeData2016"
    for split in ("training", "validation"):
        for k in (2, 1):
            members[f"{root}/images/{split}/ADE_{split}_{k}.jpg"] = jpg(k)
        for k in (1, 2):
            members[f"{root}/annotations/{split}/ADE_{split}_{k}.png"] = encoded(np.roll(label, k))
    return zipped(members)


MINIATURES = {"voc": {"voc.tar": voc},
              "context": {"voc10.tar": lambda: voc("2010"), "merged.json": context},
              "ade": {"ade.zip": ade}}


@pytest.fixture
def published(server, monkeypatch):
    """DATASETS with the miniatures on the server in place of the real files."""
    for dataset, makers in MINIATURES.items():
        contents = {f"/{name}": make() for name, make in makers.items()}
        server.files.update(contents)
        files = [(server.url + name, md5(content)) for name, content in contents.items()]
        monkeypatch.setitem(rectify.DATASETS, dataset, (files, *rectify.DATASETS[dataset][1:]))
    return server


def load(dataset, root):
    """What a run on a dataset would read: {split: [(name, label or None)]}."""
    cfg = configure(dataset=dataset, root=str(root))
    with contextlib.redirect_stdout(io.StringIO()):
        folder = rectify.dataset_folder(cfg)
    C = len(rectify.class_names(cfg))
    label = lambda s: rectify.load_label(s.label, rectify.load_image(s.image).shape[1:], C).numpy()
    return {split: [(s.name, label(s)) for s in rectify.list_samples(folder, split)]
            for split in ("train", "val")}


def same(found, expected):
    """The same names in order, and the same labels."""
    names = [name for name, _ in found] == [name for name, _ in expected]
    return names and all((a == b).all() for (_, a), (_, b) in zip(found, expected))


# =================================================================================== three datasets

def test_voc_is_fetched_unpacked_and_read(published, tmp_path):
    """The listed images with their labels: background and border void, class c from 0."""
    found = load("voc", tmp_path)
    assert same(found["train"], [("train1", TRUTH)]) and same(found["val"], [("val1", TRUTH)])


def test_context_is_converted_to_its_59_classes(published, tmp_path):
    """From run-length codes to palette PNGs: classes by their alphabetical place, other categories
    void, later ones on top.
    """
    expected = np.full((H, W), 58)
    expected[:, :3] = 0
    expected[3:, 2], expected[:3, 3] = VOID, VOID       # 15 pixels down the columns, then 6
    found = load("context", tmp_path)
    assert same(found["train"], [("train1", np.ones((H, W)))])
    assert same(found["val"], [("val1", expected)])
    folder = tmp_path / "context/VOCdevkit/VOC2010"
    with Image.open(folder / "SegmentationClassContext/val1.png") as mask:
        assert mask.mode == "P" and mask.getpalette()[:768] == rectify.palette()


def test_ade_pairs_folders_by_file_name(published, tmp_path):
    """Every image of the split, sorted, with the label of its own name; 0 is void, c becomes c - 1
    up to 149.
    """
    label = np.arange(H * W).reshape(H, W) - 1
    label[0, 0] = 149
    for split, folder in (("train", "training"), ("val", "validation")):
        expected = [(f"ADE_{folder}_{k}", np.roll(label, k)) for k in (1, 2)]
        assert same(load("ade", tmp_path)[split], expected)


@pytest.mark.parametrize("dataset", MINIATURES)
def test_a_second_start_downloads_nothing(published, tmp_path, dataset):
    """One request a file in all; the dataset on disk is enough, also when the archives are deleted,
    or only they are left.
    """
    first = load(dataset, tmp_path)
    requests = sorted(path for path, _ in published.requests)
    assert requests == sorted(f"/{name}" for name in MINIATURES[dataset])
    for path in (tmp_path / name for name in MINIATURES[dataset]):
        assert path.is_file()
        path.rename(path.with_name("moved." + path.name))
    again = load(dataset, tmp_path)
    shutil.rmtree(tmp_path / dataset)
    for name in MINIATURES[dataset]:
        (tmp_path / f"moved.{name}").rename(tmp_path / name)
    afresh = load(dataset, tmp_path)
    assert all(same(first[split], other[split]) for split in first for other in (again, afresh))
    assert len(published.requests) == len(MINIATURES[dataset])


def test_an_interrupted_conversion_starts_again(published, tmp_path, monkeypatch):
    """Half of the masks are not taken for all of them, and the archive is not fetched and unpacked
    twice.
    """
    def interrupt(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rectify, "decode_rle", interrupt)
        load("context", tmp_path)
    (tmp_path / "voc10.tar").unlink()
    assert len(load("context", tmp_path)["val"]) == 1
    assert [path for path, _ in published.requests] == ["/voc10.tar", "/merged.json"]


def test_annotations_of_another_form_are_refused(tmp_path):
    """The fields that the conversion relies on are missing: one line that names the file, and no
    lists.
    """
    (tmp_path / "merged.json").write_text('{"images": []}')
    message = r"merged\.json: not PASCAL Context's annotations .*annos_segmentation"
    with pytest.raises(UserError, match=message):
        rectify.convert_context(tmp_path, tmp_path / "merged.json")
    assert not (tmp_path / "ImageSets/SegmentationContext").exists()


def test_names_and_recipes_of_the_real_datasets():
    """20, 59 and 150 names, the 59 alphabetical as their ids; Table 12, and the thresholds of the
    released configurations.
    """
    lists = (VOC_NAMES, CONTEXT_NAMES, CONTEXT_IDS, ADE_NAMES)
    assert [len(set(names)) for names in lists] == [20, 59, 59, 150]
    assert CONTEXT_NAMES == sorted(CONTEXT_NAMES) and CONTEXT_IDS == sorted(CONTEXT_IDS)
    expected = dict(epochs=(200, 400, 300), size=((2048, 512), (520, 520), (2048, 512)),
                    crop=(520, 480, 512), batch=(12, 12, 8), t=(0.23, 0.20, 0.21), top_k=(2, 6, 5))
    recipes = [rectify.RECIPES[dataset] for dataset in ("voc", "context", "ade")]
    for key, values in expected.items():
        assert tuple(recipe[key] for recipe in recipes) == values
    assert all(recipe["tile"] == recipe["crop"] // 6 for recipe in recipes)
    denoise = lambda method: [configure(dataset=dataset, method=method).denoise
                              for dataset in ("voc", "context", "ade")]
    assert denoise("reclip") == [0.5, 0.6, 0.5] and denoise("reclip++") == [1.0, 0.85, 0.5]


# ========================================================================================= download

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def remote(server, tmp_path):
    """A file on the server: download() of it, its path here, and the .part beside it."""
    server.files["/file.tar"] = CONTENT
    path = tmp_path / "file.tar"
    return SimpleNamespace(
        server=server, path=path, part=tmp_path / "file.tar.part", md5=md5(CONTENT),
        download=lambda: rectify.download(f"{server.url}/file.tar", md5(CONTENT), path))


def refused(remote, reason):
    """The download fails with one line that has the reason and all that is needed to fetch the file
    by hand.
    """
    with pytest.raises(UserError, match=reason) as error:
        remote.download()
    text = str(error.value)
    return "\n" not in text and all(
        part in text for part in (f"{remote.server.url}/file.tar", remote.md5, str(remote.path)))


@pytest.mark.parametrize("hidden", [False, True])
def test_a_download_appears_whole(remote, monkeypatch, hidden):
    """With a progress bar, and where TQDM_DISABLE hides it."""
    monkeypatch.setattr(rectify, "tqdm", functools.partial(rectify.tqdm, disable=hidden))
    remote.download()
    assert remote.path.read_bytes() == CONTENT and not remote.part.exists()
    remote.download()
    assert remote.server.requests == [("/file.tar", None)]


def test_a_cut_download_goes_on_where_it_was_cut(remote):
    """What arrived stays in .part, never under the file's own name; the next start asks for the
    rest alone.
    """
    remote.server.trouble = "cut"
    assert refused(remote, "cut") and not remote.path.exists()
    assert remote.part.read_bytes() == CONTENT[:len(CONTENT) // 2]
    remote.server.trouble = None
    remote.download()
    assert remote.path.read_bytes() == CONTENT
    assert remote.server.requests == [("/file.tar", None),
                                      ("/file.tar", f"bytes={len(CONTENT) // 2}-")]


def test_a_server_that_ignores_range_sends_all_again(remote):
    remote.part.write_bytes(CONTENT[:100])
    remote.server.trouble = "no range"
    remote.download()
    assert remote.path.read_bytes() == CONTENT


@pytest.mark.parametrize("content, right", [(CONTENT, True), (CONTENT + b"more", False)])
def test_a_part_that_needs_no_more_bytes(remote, content, right):
    """Stopped just before it got its name: it gets it now. Longer than the file: thrown away, and
    the next start is a new one.
    """
    remote.part.write_bytes(content)
    if not right:
        assert refused(remote, "not the published file") and not remote.part.exists()
    remote.download()
    assert remote.path.read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused(remote):
    """Not the published bytes: nothing of them is kept."""
    remote.server.files["/file.tar"] = CONTENT[::-1]
    assert refused(remote, "not the published file") and not remote.path.exists()
    assert not remote.part.exists()


def test_a_file_that_is_in_the_way_is_left_alone(remote):
    remote.path.write_bytes(b"mine")
    assert refused(remote, "another file") and remote.path.read_bytes() == b"mine"
    assert not remote.server.requests


def test_a_server_error_keeps_what_has_arrived(remote):
    remote.part.write_bytes(CONTENT[:100])
    remote.server.trouble = "error"
    assert refused(remote, "500") and remote.part.read_bytes() == CONTENT[:100]
    assert not remote.path.exists()


def test_a_full_disk_keeps_what_has_arrived(remote, monkeypatch):
    """The reason is told, and with room again the download goes on."""
    class Full(io.FileIO):
        def write(self, piece):
            super().write(piece[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    remote.part.touch()
    with monkeypatch.context() as patch:
        patch.setattr(rectify, "open", lambda path, mode: Full(path, mode), raising=False)
        assert refused(remote, "No space left") and not remote.path.exists()
    assert remote.part.read_bytes() == CONTENT[:100]
    remote.download()
    assert remote.path.read_bytes() == CONTENT


@pytest.mark.parametrize("dataset", MINIATURES)
def test_offline_every_missing_file_is_listed(published, tmp_path, dataset):
    """One line with address, md5 and path of each file; one that was fetched by hand and put there
    is no longer asked for.
    """
    published.shutdown()
    published.server_close()
    files = rectify.DATASETS[dataset][0]
    while files:
        with pytest.raises(UserError) as error:
            load(dataset, tmp_path)
        for address, checksum in files:
            assert all(part in str(error.value)
                       for part in (address, checksum, str(tmp_path / address.split("/")[-1])))
        name = files[0][0].split("/")[-1]
        assert "\n" not in str(error.value)
        assert str(error.value).count("not downloaded") == len(files)
        (tmp_path / name).write_bytes(published.files[f"/{name}"])
        files = files[1:]
    assert load(dataset, tmp_path)["val"]


@pytest.mark.parametrize("member", ["../../evil.txt", "fine/../../../evil.txt"])
def test_a_tar_cannot_leave_its_folder(tmp_path, member):
    """A member with a path that leads out: nothing is written out there, and nothing half is left.
    """
    content, target = tar({"fine.txt": b"fine", member: b"evil"}), tmp_path / "a/to"
    target.parent.mkdir()
    (tmp_path / "evil.tar").write_bytes(content)
    with pytest.raises(UserError, match="evil.tar: not unpacked"):
        rectify.unpack(tmp_path / "evil.tar", md5(content), target)
    assert not (tmp_path / "evil.txt").exists() and not list(target.parent.iterdir())


@pytest.mark.parametrize("member", ["../../evil.txt", "fine/../../../evil.txt", "{root}/evil.txt"])
def test_a_zip_cannot_leave_its_folder(tmp_path, member):
    """Such a member of a zip is left out; all else is unpacked."""
    content = zipped({"fine.txt": b"fine", member.format(root=tmp_path): b"evil"})
    (tmp_path / "evil.zip").write_bytes(content)
    (tmp_path / "a").mkdir()
    rectify.unpack(tmp_path / "evil.zip", md5(content), tmp_path / "a/to")
    assert [p.name for p in (tmp_path / "a").rglob("*.txt")] == ["fine.txt"]
    assert not (tmp_path / "evil.txt").exists()


def test_an_absolute_path_in_a_tar_is_taken_from_the_folder_on(tmp_path):
    content = tar({f"{tmp_path}/evil.txt": b"tamed"})
    (tmp_path / "a.tar").write_bytes(content)
    rectify.unpack(tmp_path / "a.tar", md5(content), tmp_path / "to")
    assert not (tmp_path / "evil.txt").exists()
    assert [p.name for p in (tmp_path / "to").rglob("*.txt")] == ["evil.txt"]


# ============================================================================== run-length decoding

@pytest.mark.parametrize("counts, size, rows", [
    ([2, 3, 4, 1, 2], (4, 3), ["010", "001", "100", "100"]),    # down the columns: 0011 1000 0100
    ([0, 2, 4], (3, 2), ["10", "10", "00"]),            # begins with true: no false before it
    ([6], (2, 3), ["000", "000"])])
def test_runs_go_down_the_columns(counts, size, rows):
    assert rectify.decode_rle(counts, size).tolist() == [[v == "1" for v in row] for row in rows]


@pytest.mark.parametrize("string, runs, size", [
    ("234NN", [2, 3, 4, 1, 2], (4, 3)),                 # from the fourth on differences: -2 is N
    ("PeQ3\\^e2", [100_000, 87_500], (375, 500)),       # four characters a number
    ("1X63jI", [1, 200, 3, 2], (103, 2)),               # 2 - 200 = -198 in two characters
    ("0`1", [0, 48], (6, 8))])                          # 48 needs a second character for its sign
def test_strings_of_runs(string, runs, size):
    """Worked out by hand from the format: ord(character) - 48 = 5 bits, and 32 where the number
    goes on.
    """
    assert (rectify.decode_rle(string, size) == rectify.decode_rle(runs, size)).all()


def test_runs_that_do_not_fill_the_mask_are_refused():
    for counts in ([3, 2], "23", "2N"):
        with pytest.raises(ValueError):
            rectify.decode_rle(counts, (2, 3))


# ==================================================================================== other layouts

def layout(folder, files):
    """Write {path: bytes} into a new folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_lists_have_a_name_a_line(tmp_path):
    """Names with spaces; Windows' line ends and empty lines do not matter; a .jpg goes before other
    images of its name.
    """
    images = ("my dog.jpg", "my dog.png", "b.png", "sub/c.jpeg", "d.JPG")
    folder = layout(tmp_path, {f"JPEGImages/{name}": jpg() for name in images}
                    | {"ImageSets/Segmentation/train.txt": b"my dog\r\n\n b \nsub/c\n"})
    samples = rectify.list_samples(folder, "train")
    assert [(s.name, s.image.name, s.label) for s in samples] == [
        ("my dog", "my dog.jpg", None), ("b", "b.png", None), ("sub/c", "c.jpeg", None)]


def test_masks_in_ade20ks_layout_may_be_missing_or_partly_missing(tmp_path):
    """Images to learn from need no labels; where some have one, all must."""
    folder = layout(tmp_path, {
        "images/training/a.jpg": jpg(), "images/validation/b.jpg": jpg(),
        "images/validation/c.jpg": jpg(), "annotations/validation/b.png": encoded(LABEL)})
    assert [(s.name, s.label) for s in rectify.list_samples(folder, "train")] == [("a", None)]
    with pytest.raises(UserError,
                       match=r"annotations/validation/c\.png: missing.*images/validation"):
        rectify.list_samples(folder, "val")


def test_training_images_beside_masks_need_none(tmp_path):
    """VOC's layout with masks for val, and for some of train."""
    folder = layout(tmp_path, {
        **{f"JPEGImages/{name}.jpg": jpg() for name in "abc"},
        **{f"SegmentationClass/{name}.png": encoded(LABEL) for name in "bc"},
        "ImageSets/Segmentation/train.txt": b"a\nb\n", "ImageSets/Segmentation/val.txt": b"c\n"})
    masks = folder / "SegmentationClass"
    train, val = rectify.splits(folder)
    assert [(s.name, s.label) for s in train] == [("a", None), ("b", masks / "b.png")]
    (masks / "c.png").unlink()
    with pytest.raises(UserError, match=r"SegmentationClass/c\.png: missing.*val\.txt lists it"):
        rectify.splits(folder)


def test_a_plain_folder_is_all_train_and_no_val(tmp_path):
    """Whatever its sub-folders are called, as long as there are no annotations beside them."""
    folder = layout(tmp_path, {"images/training/a.jpg": jpg(), "z.png": jpg()})
    assert [s.name for s in rectify.list_samples(folder, "train")] == ["images/training/a", "z"]
    assert not rectify.list_samples(folder, "val")


# =========================================================================== the published protocol

def linear(n, out):
    """out×n: the weights of linear interpolation from n samples to `out`, both seen as cells of the
    same stretch.
    """
    weights = np.zeros((out, n))
    for i in range(out):
        x = min(max((i + 0.5) * n / out - 0.5, 0), n - 1)
        left = min(int(x), n - 1)
        weights[i, left] += 1 - (x - left)
        weights[i, min(left + 1, n - 1)] += x - left
    return weights


def test_upsampling_is_two_bilinear_steps():
    """A 500×375 image at short side 512 is 683×512, and its 43×32 patches of 16 px are 688×512: to
    the padded size, cut, to the original size. One step alone would be something else.
    """
    logits = np.random.default_rng(0).normal(size=(2, 3, 32, 43))
    image = torch.zeros(3, 375, 500, dtype=torch.uint8)
    assert rectify.resize_to_fit(image, rectify.RECIPES["voc"]["size"]).shape[1:] == (512, 683)
    resized = (linear(32, 512) @ logits @ linear(43, 688).T)[..., :683]
    expected = linear(512, 375) @ resized @ linear(683, 500).T
    found = rectify.upsample(torch.from_numpy(logits), 16, (512, 683), (375, 500)).numpy()
    assert found.shape == (2, 3, 375, 500) and np.abs(found - expected).max() < 1e-6
    assert np.abs(found - linear(32, 375) @ logits @ linear(43, 500).T).max() > 0.1


@pytest.fixture
def true_size(tmp_path):
    """A made-up VOC at its true sizes: 8 images of 500×375 or upright, objects of all 20 classes
    with void borders of 5 px.
    """
    random, files = np.random.default_rng(0), {}
    for k in range(8):
        width, height = (500, 375) if k % 3 else (375, 500)
        label = np.zeros((height, width), int)
        for c in (k % 20 + 1, (k + 8) % 20 + 1, (k + 15) % 20 + 1):
            top, left = random.integers(0, height - 120), random.integers(0, width - 120)
            label[top:top + 120, left:left + 120] = VOID
            label[top + 5:top + 115, left + 5:left + 115] = c
        files[f"JPEGImages/p{k}.jpg"] = jpg(k, (width, height))
        files[f"SegmentationClass/p{k}.png"] = encoded(label)
    order = "".join(f"p{k}\n" for k in (3, 1, 0, 7, 6, 5, 4, 2))
    files["ImageSets/Segmentation/val.txt"] = order.encode()
    return layout(tmp_path, files)


def test_the_metric_is_voc20s(true_size):
    """One confusion matrix over all images, 20 classes; background and void are not evaluated, and
    a prediction there costs nothing. Independent of load_label, confusion and iou: numpy on the
    files themselves, paired by name.
    """
    guess = lambda images: {"made-up": (images[:, 0] // 8 + images[:, 1] // 64).long() % 20}
    matrix = np.zeros((20, 20), int)
    for k in range(8):
        truth = np.array(Image.open(true_size / f"SegmentationClass/p{k}.png")).ravel()
        image = np.array(Image.open(true_size / f"JPEGImages/p{k}.jpg"))
        red, green, _ = image.reshape(-1, 3).astype(int).T
        counted = (truth >= 1) & (truth <= 20)
        np.add.at(matrix, (truth[counted] - 1, ((red // 8 + green // 64) % 20)[counted]), 1)
    assert 8 * 3 * 110 ** 2 * 0.4 < matrix.sum() <= 8 * 3 * 110 ** 2
    results, *_ = rectify.evaluate(guess, rectify.list_samples(true_size, "val"), VOC_NAMES)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    expected = (100 * matrix.diagonal() / union).tolist()
    assert list(results["made-up"]["IoU"].values()) == pytest.approx(expected, abs=1e-3)
    assert results["made-up"]["mIoU"] == pytest.approx(np.mean(expected), abs=1e-3)
