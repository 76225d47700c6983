"""What export.py promises: files that compute what PyTorch computes, and a runner that needs no PyTorch."""
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import bench
import distill
import export
import rectify
from export import BadInput


def load_student(path):
    """The DeepLabV2 of a student.pt."""
    return distill.load_student(rectify.load_checkpoint(path, "student"))


@pytest.fixture(scope="module")
def exported(taught):
    """The folder of `taught` with student.onnx and student.fp16.onnx, written and checked by the command line."""
    export.main(["--out", str(taught)])
    return taught


@pytest.fixture(scope="module")
def photo(mini):
    return sorted((mini / "JPEGImages").iterdir())[0]


def noise(B, H, W, grain=6):
    """Smooth random images, uint8 B×H×W×3."""
    coarse = torch.rand(B, 3, grain, grain, generator=torch.Generator().manual_seed(0)) * 255
    return F.interpolate(coarse, (H, W), mode="bilinear").byte().permute(0, 2, 3, 1).contiguous()


def refused(capsys, *argv):
    """The one line on stderr with which a command line is refused, after exit code 2."""
    with pytest.raises(SystemExit) as stop:
        export.main([str(a) for a in argv])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_the_files_agree_with_pytorch_on_real_pictures(exported):
    report = json.loads((exported / "export.json").read_text())
    assert report["check"]["student.onnx"]["agreement"] >= 0.9999 and report["check"]["student.fp16.onnx"]["agreement"] >= 0.998
    assert report["results"]["student.onnx"]["mIoU"] == pytest.approx(report["results"]["pytorch"]["mIoU"], abs=0.1)


def test_each_file_is_whole_and_says_what_it_is(exported):
    report = json.loads((exported / "export.json").read_text())
    for name in ("student.onnx", "student.fp16.onnx"):
        model = onnx.load(exported / name)
        onnx.checker.check_model(model, full_check=True)
        assert not [t for t in model.graph.initializer if t.external_data] and [i.name for i in model.graph.input] == ["image"]
        meta = {p.key: p.value for p in model.metadata_props}
        assert json.loads(meta["names"]) == rectify.VOC_NAMES and json.loads(meta["palette"])[0] == list(rectify.colour(0))
        assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (8, [("", 18)])
        assert "Resize" not in {node.op_type for node in model.graph.node}, "runtimes differ in its filter"
        assert (meta["ignore_index"], meta["inner"]) == ("255", "112")
        assert float(meta["mIoU"]) == report["results"][name]["mIoU"] and meta["measured_on"] == "8 validation images"
    assert (exported / "student.fp16.onnx").stat().st_size < 0.6 * (exported / "student.onnx").stat().st_size
    assert not list(exported.glob("*tmp*")), "nothing half-written is left"


@pytest.mark.parametrize("size, target", [(112, 300), (300, 112), (113, 37), (37, 113), (14, 512),
                                          (4000, 112), (112, 112), (1, 7), (7, 1)])
def test_the_resize_matrix_is_pytorchs_antialiased_bilinear_resize(size, target):
    x = torch.rand(2, 3, size, 5, generator=torch.Generator().manual_seed(0))
    exact = F.interpolate(x, (target, 5), mode="bilinear", antialias=True)
    assert torch.allclose(export.resize_matrix(size, target) @ x, exact, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 96, 96), (2, 101, 87), (3, 63, 200), (1, 375, 500), (1, 9, 1),
                                   (1, 1201, 777), (1, 5, 2048)])
def test_any_size_and_any_batch(exported, shape):
    """Sizes that tracing has not seen, odd ones, batches: the mask has the image's size and is PyTorch's."""
    module = export.image_to_mask(load_student(exported / "student.pt"), 112, 20)
    image = noise(*shape)
    mask = export.open_model(exported / "student.onnx").run(None, {"image": image.numpy()})[0]
    with torch.no_grad():
        assert mask.shape == shape and mask.dtype == np.uint8 and (mask == module(image).numpy()).mean() > 0.999


@pytest.mark.parametrize("height, width", [(700, 1031), (513, 3), (400, 512)])
def test_a_long_image_is_decided_at_512_px_and_enlarged(exported, height, width):
    """Up to 512 px the mask is that of full-size logits; beyond, the nearest pixel of the decided mask."""
    student = load_student(exported / "student.pt")
    image = noise(1, height, width)
    with torch.no_grad():
        mask, p = export.image_to_mask(student, 112, 20, probabilities=True)(image)
        x = F.interpolate(image.permute(0, 3, 1, 2) / 255, (112, 112), mode="bilinear", antialias=True)
        logits, _ = student(distill.prepare(x))
    assert p.shape[2:] == (min(512, height * 512 // max(height, width, 512)), max(1, width * 512 // max(height, width, 512)))
    exact = F.interpolate(logits, p.shape[2:], mode="bilinear", antialias=True).argmax(1)
    assert (p.argmax(1) == exact).float().mean() > 0.999
    enlarged = F.interpolate(p.argmax(1)[:, None].float(), (height, width), mode="nearest-exact")[:, 0]
    assert (mask == enlarged).float().mean() > 0.998


def test_the_square_has_the_pixels_of_a_training_image(mini):
    """Short side 96: the mean area is a little above 96², and 8 divides the side."""
    samples = rectify.list_samples(mini, "train")
    shown = [rectify.resize_to_fit(rectify.load_image(s.image), (2048, 96)).shape for s in samples]
    side = export.inner_size(samples, (2048, 96))
    assert side % 8 == 0 and 0 <= side - np.mean([h * w for _, h, w in shown]) ** 0.5 < 8


def test_buffers_kept_on_the_device_give_the_same_masks(exported, photo):
    """`bound`, the way of CUDA graphs: one output buffer, filled anew by every call."""
    session, pictures = export.open_model(exported / "student.onnx"), np.asarray(Image.open(photo))[None]
    other = np.ascontiguousarray(pictures[:, ::-1])
    call = bench.bound(session, pictures)
    for x in (pictures, other, pictures):
        assert (call(x) == session.run(["mask"], {"image": x})[0]).all()


def test_probabilities_on_request(taught, photo, tmp_path):
    student = load_student(taught / "student.pt")
    export.write_onnx(export.image_to_mask(student, 96, 20, probabilities=True), tmp_path / "p.onnx", {})
    image = np.asarray(Image.open(photo))[None]
    mask, p = export.open_model(tmp_path / "p.onnx").run(["mask", "probabilities"], {"image": image})
    assert p.shape == (1, 20, *image.shape[1:3]) and np.allclose(p.sum(1), 1, atol=1e-5) and (p.argmax(1) == mask).mean() > 0.999


def test_int8_is_a_quantised_file_that_runs(exported, mini, photo, tmp_path):
    export.write_int8(exported / "student.onnx", tmp_path / "student.int8.onnx", rectify.list_samples(mini, "train")[:8],
                      {p.key: p.value for p in onnx.load(exported / "student.onnx").metadata_props})
    assert (tmp_path / "student.int8.onnx").stat().st_size < 0.4 * (exported / "student.onnx").stat().st_size
    image = np.asarray(Image.open(photo))[None]
    mask, exact = (export.open_model(p).run(None, {"image": image})[0]
                   for p in (tmp_path / "student.int8.onnx", exported / "student.onnx"))
    assert (mask == exact).mean() > 0.85


def test_the_check_notices_a_file_that_computes_something_else(exported, mini, tmp_path):
    """One convolution's weights shuffled: the check refuses the file and says how far it is off."""
    model = onnx.load(exported / "student.onnx")
    weights = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    values = np.frombuffer(weights.raw_data, np.float32).copy()
    weights.raw_data = np.random.default_rng(0).permutation(values).tobytes()
    onnx.save(model, tmp_path / "wrong.onnx")
    module = export.image_to_mask(load_student(exported / "student.pt"), 112, 20, probabilities=True)
    with pytest.raises(BadInput, match="is not what PyTorch computes"):
        export.check(module, {"student.onnx": export.open_model(tmp_path / "wrong.onnx")}, [],
                     rectify.list_samples(mini, "val"), rectify.VOC_NAMES)


def test_a_folder_without_labels_is_checked_on_its_own_pictures(exported, mini):
    module = export.image_to_mask(load_student(exported / "student.pt"), 112, 20, probabilities=True)
    found, results = export.check(module, {"student.onnx": export.open_model(exported / "student.onnx")},
                                  rectify.list_samples(mini, "train"), [], rectify.VOC_NAMES)
    assert found["student.onnx"]["agreement"] > 0.999 and results == {}


def without_torch(*argv, after=""):
    """Run export.py in a process in which importing torch fails, and then the code `after`."""
    code = (f"import sys; sys.modules['torch'] = None; sys.path.insert(0, {str(rectify.HERE)!r})\n"
            f"import export; export.main({[str(a) for a in argv]!r})\n{after}")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_a_picture_becomes_a_mask_without_pytorch(exported, photo, tmp_path):
    done = without_torch("--run", exported / "student.onnx", "--image", photo, "--mask", tmp_path / "mask.png",
                         "--overlay", tmp_path / "over.png")
    assert done.returncode == 0 and "CPUExecutionProvider" in done.stdout, done.stderr
    with Image.open(tmp_path / "mask.png") as mask, Image.open(photo) as picture, Image.open(tmp_path / "over.png") as over:
        assert mask.mode == "P" and mask.size == picture.size and over.width >= picture.width
        values, picture = np.asarray(mask), np.asarray(picture)
    expected = export.open_model(exported / "student.onnx").run(None, {"image": picture[None]})[0][0]
    assert (values == expected + 1).all(), "VOC's values: class c is c + 1"


def test_a_folder_becomes_a_folder_of_masks_that_can_teach(exported, mini, tmp_path):
    """The masks have the values that `distill.py --teacher DIR` wants."""
    export.main(["--run", str(exported / "student.onnx"), "--image", str(mini / "JPEGImages"), "--mask", str(tmp_path / "masks")])
    samples = rectify.list_samples(mini, "train")
    assert len(list((tmp_path / "masks").glob("*.png"))) == len(list((mini / "JPEGImages").iterdir()))
    distill.check_masks(tmp_path / "masks", samples, 20)


@pytest.fixture(scope="module", params=["words", "threshold", "both"])
def with_background(request, exported, tmp_path_factory):
    """(folder of a hand-made student.pt with files, its state, threshold): background words and a threshold, or one."""
    kind, folder = request.param, tmp_path_factory.mktemp("background")
    state = torch.load(exported / "student.pt", weights_only=True)
    if kind != "threshold":                                         # two of its classes serve as background words
        session = export.open_model(exported / "student.onnx")
        most = np.bincount(session.run(None, {"image": noise(1, 100, 90).numpy()})[0].ravel()).argmax()
        order = [c for c in range(20) if c not in (0, most)] + [0, int(most)]
        for key in ("T", "R"):
            state["student"][key] = state["student"][key][order]
        names = [state["names"][c] for c in order]
        state["names"], state["background"] = names[:18], names[18:]
    torch.save(state, folder / "student.pt")
    student, inner = load_student(folder / "student.pt"), 112
    with torch.no_grad():
        _, p = export.image_to_mask(student, inner, 20, probabilities=True)(noise(1, 100, 90))
    threshold = 0.0 if kind == "words" else p.amax(1).quantile(0.3).item()
    meta = {"names": json.dumps(["background", *state["names"]]), "inner": "112",
            "palette": json.dumps([(0, 0, 0), *(rectify.colour(c) for c in range(len(state["names"])))])}
    export.write_onnx(export.image_to_mask(student, inner, len(state["names"]), threshold), folder / "student.onnx", meta)
    return folder, state, threshold


def test_a_mask_with_background_has_0_for_it_and_class_c_is_c_plus_1(with_background, tmp_path):
    """Against the definition: the best channel at full size, background where it is a word or below the threshold."""
    folder, state, threshold = with_background
    student, C = load_student(folder / "student.pt"), len(state["names"])
    image = noise(1, 100, 90)[0].numpy().copy()
    Image.fromarray(image).save(tmp_path / "image.png")
    session = export.open_model(folder / "student.onnx")
    mask = session.run(None, {"image": image[None]})[0][0]
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        logits, _ = student(distill.prepare(F.interpolate(x, (112, 112), mode="bilinear", antialias=True)))
    best, c = F.interpolate(logits, image.shape[:2], mode="bilinear")[0].softmax(0).max(0)
    expected = torch.where((c < C) & (best >= threshold), c + 1, 0).numpy()
    assert 0 in expected and (expected > 0).any(), "both must occur, or nothing is tested"
    assert (mask == expected).mean() > 0.999
    names, palette = export.classes_of(session, folder / "student.onnx")
    assert (names[0], palette[0], len(names)) == ("background", [0, 0, 0], C + 1)
    export.main(["--run", str(folder / "student.onnx"), "--image", str(tmp_path / "image.png"),
                 "--mask", str(tmp_path / "m.png"), "--overlay", str(tmp_path / "o.png")])
    with Image.open(tmp_path / "m.png") as png:
        assert (np.asarray(png) == mask).all() and png.getpalette()[:6] == [0, 0, 0, *rectify.colour(0)]


def test_the_command_line_bakes_the_threshold_in(taught, photo, tmp_path, capsys):
    """--threshold: names, palette and the check know the background; a higher threshold gives more of it."""
    shutil.copy(taught / "student.pt", tmp_path)
    share = []
    for threshold, output in (("0.2", "mask"), ("0.9", "probs")):
        export.main(["--out", str(tmp_path), "--threshold", threshold, "--output", output])
        session = export.open_model(tmp_path / "student.onnx")
        names, palette = export.classes_of(session, tmp_path / "student.onnx")
        assert names == ["background", *rectify.VOC_NAMES] and [*palette[0]] == [0, 0, 0]
        assert [o.name for o in session.get_outputs()] == ["mask", "probabilities"][:1 + (output == "probs")]
        share.append((session.run(["mask"], {"image": np.asarray(Image.open(photo))[None]})[0] == 0).mean())
        report = json.loads((tmp_path / "export.json").read_text())
        assert report["check"]["student.onnx"]["agreement"] >= 0.9999
        assert list(report["results"]["pytorch"]["IoU"]) == [*rectify.VOC_NAMES, "background"]
    assert share[0] < share[1]
    capsys.readouterr()
    assert "a probability" in refused(capsys, "--out", tmp_path, "--threshold", "1.5")


def test_labels_are_read_as_the_student_read_them(exported, tmp_path, monkeypatch, capsys):
    """--label-base of distill.py is the student's, which need not be the teacher's."""
    state, seen = torch.load(exported / "student.pt", weights_only=True), []
    state["config"]["label_base"] = 0
    torch.save(state, tmp_path / "student.pt")

    def check(*args):
        seen.append(args[-1])
        raise BadInput("enough")

    monkeypatch.setattr(export, "write_onnx", lambda net, path, meta: shutil.copy(exported / "student.onnx", path))
    monkeypatch.setattr(export, "check", check)
    assert "enough" in refused(capsys, "--out", tmp_path) and seen == [0]


def test_paths_from_standard_input_and_several_arguments(exported, mini, tmp_path, monkeypatch, capsys):
    images = sorted((mini / "JPEGImages").iterdir())[:3]
    lines = "\n" + "".join(f"{path}\n" for path in images) + "  \n"         # blank lines are no path
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    export.main(["--run", str(exported / "student.onnx"), "--image", "-", "--mask", str(tmp_path / "a")])
    assert re.search(r"3 masks, [\d.]+ images/s", capsys.readouterr().out)
    export.main(["--run", str(exported / "student.onnx"), "--image", *map(str, images), "--mask", str(tmp_path / "b"),
                 "--overlay", str(tmp_path / "c")])
    for folder in "abc":
        assert sorted(p.stem for p in (tmp_path / folder).iterdir()) == [p.stem for p in images]
    assert all((tmp_path / "a" / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "b").iterdir())
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "names no images" in refused(capsys, "--run", exported / "student.onnx", "--image", "-")


BROKEN = {"names missing": {"palette": "[]"}, "not JSON": {"names": "["}, "deep": {"names": "[" * 100_000},
          "numbers": {"names": json.dumps([7] * 20)}, "escapes": {"names": json.dumps(["\x1b[2J"] * 20)},
          "too few colours": {"palette": "[[1, 2, 3]]"}, "colours out of range": {"palette": json.dumps([[1, 2, 300]] * 20)},
          "ragged": {"palette": json.dumps([[1, 2, 3]] * 19 + [[1]])}, "a word": {"palette": '"red"'}, "empty": {"names": "[]",
          "palette": "[]"}, "huge": {"palette": json.dumps([[1, 2, 10 ** 30]] * 20)}}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_broken_metadata_is_one_line(broken, exported, photo, tmp_path, capsys):
    meta = {p.key: p.value for p in onnx.load(exported / "student.onnx").metadata_props} | broken
    if set(broken) == {"palette"} and broken["palette"] == "[]":
        del meta["names"]
    export.save_onnx(exported / "student.onnx", tmp_path / "broken.onnx", meta)
    line = refused(capsys, "--run", tmp_path / "broken.onnx", "--image", photo, "--mask", tmp_path / "m.png")
    assert "damaged, or not one of export.py" in line and not (tmp_path / "m.png").exists()


def test_flipped_bits_are_found(exported, photo, tmp_path, capsys):
    """ONNX has no checksum, ours does: a file with one damaged weight is opened by ONNX Runtime, and refused."""
    data = bytearray((exported / "student.onnx").read_bytes())
    for place in (len(data) // 3, len(data) // 2):
        damaged = tmp_path / f"{place}.onnx"
        damaged.write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1:])
        export.open_model(damaged)
        line = refused(capsys, "--run", damaged, "--image", photo, "--mask", tmp_path / "m.png")
        assert "damaged" in line and not (tmp_path / "m.png").exists()


def test_a_fifo_is_no_image(exported, tmp_path, capsys):
    """Opening it would wait for its writer for ever."""
    os.mkfifo(tmp_path / "f.jpg")
    assert "no such file" in refused(capsys, "--run", exported / "student.onnx", "--image", tmp_path / "f.jpg")
    assert "holds no images" in refused(capsys, "--run", exported / "student.onnx", "--image", tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_memory_is_bounded_up_to_pillows_limit(exported, tmp_path):
    """169 megapixels in a file of 2 MB: mask and overlay within 1.2 GB, of which Pillow's own image is 0.7."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("reads the peak memory from /proc")
    Image.new("RGB", (13_000, 13_000), "green").save(tmp_path / "large.png", compress_level=1)
    done = without_torch("--run", exported / "student.onnx", "--image", tmp_path / "large.png", "--mask", tmp_path / "m.png",
                         "--overlay", tmp_path / "o.png", after="print(open('/proc/self/status').read().split('VmHWM:')[1])")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert int(done.stdout.splitlines()[2].split()[0]) < 1.2e6, "kB"
    with Image.open(tmp_path / "m.png") as mask, Image.open(tmp_path / "o.png") as over:
        assert mask.size == (13_000, 13_000) and over.size == (export.LARGEST, export.LARGEST)


def made(folder):
    """The names of the files in a folder, without its lock."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_what_a_killed_run_left_is_cleared_and_a_running_one_is_not_disturbed(exported, tmp_path, capsys):
    shutil.copy(exported / "student.pt", tmp_path)
    (tmp_path / "export.tmp").mkdir()
    (tmp_path / "export.tmp/student.onnx").write_text("half")
    with rectify.output_folder(tmp_path):
        assert "process" in refused(capsys, "--out", str(tmp_path))
        assert (tmp_path / "export.tmp/student.onnx").exists()
    with export.workplace(tmp_path / "export.tmp") as place:
        assert not list(place.iterdir())
    assert made(tmp_path) == {"student.pt"}


def test_a_full_disk_leaves_the_earlier_files(exported, tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    shutil.copy(exported / "student.pt", tmp_path)
    (tmp_path / "student.onnx").write_text("earlier")
    monkeypatch.setattr(export.Path, "write_bytes", full)
    with pytest.raises(SystemExit) as stop:
        export.main(["--out", str(tmp_path)])
    assert stop.value.code == 2 and "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert made(tmp_path) == {"student.pt", "student.onnx"}
    assert (tmp_path / "student.onnx").read_text() == "earlier"


def test_an_interrupt_says_that_nothing_is_half_written(exported, tmp_path, monkeypatch, capsys):
    """Also where one file is complete and another has begun."""
    def interrupt(net, path, meta):
        path.write_bytes((exported / "student.onnx").read_bytes()[:1000 if "fp16" in path.name else None])
        if "fp16" in path.name:
            raise KeyboardInterrupt

    shutil.copy(exported / "student.pt", tmp_path)
    monkeypatch.setattr(export, "write_onnx", interrupt)
    with pytest.raises(SystemExit) as stop:
        export.main(["--out", str(tmp_path)])
    assert stop.value.code == 130 and "half-written" in capsys.readouterr().err
    assert made(tmp_path) == {"student.pt"}


def test_a_reader_that_leaves_ends_it_quietly():
    """As in `python export.py --help | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, rectify.HERE / "export.py", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode != 0 and done.stderr == ""


def test_masks_with_values_that_have_no_name_are_refused(exported, photo, tmp_path, capsys):
    meta = {"names": '["a"]', "palette": "[[1, 2, 3]]"}
    export.save_onnx(exported / "student.onnx", tmp_path / "few.onnx", meta)
    assert "does not name" in refused(capsys, "--run", tmp_path / "few.onnx", "--image", photo, "--mask", tmp_path / "m.png")


def test_weights_that_are_not_finite_are_refused(taught, tmp_path, capsys):
    state = torch.load(taught / "student.pt", weights_only=True)
    state["student"]["aspp.0.weight"][0] = float("nan")
    torch.save(state, tmp_path / "student.pt")
    assert "not finite" in refused(capsys, "--out", tmp_path)
    state = torch.load(taught / "student.pt", weights_only=True)
    torch.save(state | {"config": {k: v for k, v in state["config"].items() if k != "size"}}, tmp_path / "student.pt")
    assert "another version" in refused(capsys, "--out", tmp_path)


def test_a_long_picture_is_segmented_smaller_and_its_mask_is_not(exported, tmp_path):
    session = export.open_model(exported / "student.onnx")
    for height in (40, 1):
        picture = Image.new("RGB", (3 * export.LARGEST, height), "green")
        picture.save(tmp_path / "long.png")
        image, size = export.read_image(tmp_path / "long.png")
        assert image.width == export.LARGEST and size == picture.size
        assert export.segment(session, image, size).size == picture.size


def test_bad_input_is_one_line(exported, photo, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "half.jpg").write_bytes(photo.read_bytes()[:900])
    (tmp_path / "half.onnx").write_bytes((exported / "student.onnx").read_bytes()[:50_000])
    node = onnx.helper.make_node("Identity", ["image"], ["mask"])
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, [1]) for n in ("image", "mask")]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "other", info[:1], info[1:]),
                                     opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), tmp_path / "other.onnx")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "empty").mkdir()
    model, out = exported / "student.onnx", tmp_path / "m.png"
    for image, words in (("text.jpg", "not a readable image"), ("half.jpg", "not a readable image"), ("none.jpg", "no such file"),
                         ("empty", "holds no images")):
        assert words in refused(capsys, "--run", model, "--image", tmp_path / image, "--mask", out)
    for file, words in (("half.onnx", "does not open it"), ("other.onnx", "not one of export.py's"), ("none.onnx", "no such file")):
        assert words in refused(capsys, "--run", tmp_path / file, "--image", photo, "--mask", out)
    for mask in ("file/m.png", "empty"):
        assert "cannot be written" in refused(capsys, "--run", model, "--image", photo, "--mask", tmp_path / mask)
    assert "go together" in refused(capsys, "--run", model) and "go together" in refused(capsys, "--image", photo)
    assert "are the same" in refused(capsys, "--run", model, "--image", photo, "--mask", out, "--overlay", out)
    assert "are the same" in refused(capsys, "--run", model, "--image", photo, "--mask", photo)
    for typed in (["--threshold", 0.5], ["--inner", 64], ["--int8"], ["--output", "probs"], ["--out", tmp_path]):
        assert f"{typed[0]} is for writing a file" in refused(capsys, "--run", model, "--image", photo, *typed)
    assert not out.exists() and not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "decompression bomb" in refused(capsys, "--run", model, "--image", photo, "--mask", out)


def test_a_provider_that_is_not_there_is_an_error_where_it_was_named(exported, photo, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    line = refused(capsys, "--run", exported / "student.onnx", "--image", photo, "--mask", tmp_path / "m.png", "--provider", "cuda")
    assert "ONNX Runtime runs on CPUExecutionProvider" in line and "pip install" in line


def test_without_a_student_the_command_that_makes_one_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "python distill.py" in refused(capsys)
    assert "no such checkpoint" in refused(capsys, "--out", tmp_path)


def test_readmes_ten_lines_do_what_they_say(exported, photo, tmp_path, monkeypatch, capsys):
    """The deployment snippet, executed as it stands there."""
    text = (rectify.HERE / "README.md").read_text()
    snippet = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "InferenceSession" in block)
    assert len(snippet.strip().splitlines()) <= 10
    (tmp_path / "runs/emoji").mkdir(parents=True)
    (tmp_path / "runs/emoji/student.onnx").write_bytes((exported / "student.onnx").read_bytes())
    (tmp_path / "photo.jpg").write_bytes(photo.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README", "exec"), {})
    assert "%" in capsys.readouterr().out


def test_timing_is_interleaved_and_the_first_call_stands_apart():
    order = []
    times = bench.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0, least=3)
    assert order[:4] == ["a", "a", "b", "b"] and order[4:] == ["a"] * 4 + ["b"] * 4 and set(times) == {"a", "b"}


def test_what_cannot_run_is_left_out_of_the_timing(capsys):
    times = bench.interleaved({"broken": lambda: 1 / 0, "whole": lambda: 0}, seconds=0, least=1)
    assert set(times) == {"whole"} and "left out: broken (division by zero)" in capsys.readouterr().out


def test_the_chart_bears_a_row_that_is_missing(tmp_path):
    rows = [{"name": "a", "device": "CPU", "batch": b, "images_per_s": 10.0 * b} for b in (1, 8)]
    bench.bar_chart(rows + [{"name": "b", "device": "CPU", "batch": 1, "images_per_s": 3.0}], tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart:
        assert chart.height > 150


def test_bench_times_every_runtime_and_says_how_far_each_agrees(exported, tmp_path, monkeypatch, capsys):
    for name in ("student.pt", "student.onnx"):
        shutil.copy(exported / name, tmp_path)
    monkeypatch.setattr(torch, "compile", lambda model: lambda x: 1 / 0)          # as without a compiler, and a minute shorter
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.bench_export(tmp_path, seconds=0)
    report, printed = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    assert (tmp_path / "bench.png").is_file() and "left out: PyTorch compiled bf16" in printed
    rows = {(row["name"], row["batch"]): row for row in report["rows"]}
    for batch in (1, 8):
        assert rows["ONNX Runtime fp32", batch]["agrees"] > 0.999 and rows["the network alone fp32", batch]["agrees"] is None
    assert all(row["median_ms"] > 0 and f"{row['name']}, CPU" in printed for row in rows.values())
    assert all(ratio > 0 for ratio in report["ratios"].values())
    assert all(gigabytes < 0.6 for _, gigabytes in report["large"].values()), "of 12 megapixels, also with 150 classes"
    assert not os.path.exists("/proc/self/status") or set(report["large"]) == {"20", "150"}
