"""export.py's files compute what PyTorch computes, in every runtime; its runner needs no PyTorch.
The runtimes and the memory of large images: `python -m pytest tests/test_export.py -m slow`.
"""
import functools
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
from PIL import ExifTags, Image

import distill
import export
import rectify

SIZE = (2048, 96)                       # Emoji VOC's recipe: the long and the short side in px
opened = functools.cache(export.open_model)

def load_student(folder):
    """The DeepLabV2 of a folder's student.pt."""
    return distill.load_student(rectify.load(folder / "student.pt", "student"))

def run(file, images):
    """An ONNX file's masks of uint8 images B×H×W×3."""
    return opened(file).run(["mask"], {"image": np.asarray(images)})[0]

def noise(B, H, W):
    """Smooth random images, uint8 B×H×W×3."""
    coarse = torch.rand(B, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 255
    return F.interpolate(coarse, (H, W), mode="bilinear").byte().permute(0, 2, 3, 1).contiguous()

def refused(capsys, *argv):
    """The one line on stderr with which a command line is refused, after exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        export.main([str(a) for a in argv])
    lines = capsys.readouterr().err.split("\r")[-1].strip().splitlines()    # after a progress bar
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]

@pytest.fixture(scope="module")
def exported(taught, tmp_path_factory):
    """A folder with a student.pt and the three files that the command line made of it."""
    folder = shutil.copytree(taught, tmp_path_factory.mktemp("exported") / "run")
    export.main(["--out", str(folder), "--int8"])
    return folder

@pytest.fixture(scope="module")
def photo(mini):
    return sorted((mini / "JPEGImages").iterdir())[0]

# ============================================================================= the graph, by itself

@pytest.mark.parametrize("size, target", [(112, 300), (300, 112), (113, 37), (37, 113), (14, 512),
                                          (4000, 112), (112, 112), (1, 7), (7, 1)])
def test_the_resize_matrix_is_pytorchs_antialiased_bilinear_resize(size, target):
    x = torch.rand(2, 3, size, 5, generator=torch.Generator().manual_seed(0))
    exact = F.interpolate(x, (target, 5), mode="bilinear", antialias=True)
    assert torch.allclose(export.resize_matrix(size, target) @ x, exact, atol=1e-6)

@pytest.mark.parametrize("H, W, size, seen", [
    (96, 96, SIZE, [88, 88]), (375, 500, SIZE, [88, 120]), (500, 375, SIZE, [120, 88]),
    (1, 1, SIZE, [88, 88]), (400, 500, (520, 520), [416, 520]), (1, 5000, SIZE, [8, 2048]),
    (200, 20_000, SIZE, [24, 2048])])
def test_the_student_sees_an_images_shape_in_multiples_of_8_and_at_a_bounded_cost(H, W, size, seen):
    assert distill.student_size(H, W, size) == seen

@pytest.mark.parametrize("height, width", [(700, 1031), (513, 3), (400, 512)])
def test_a_long_image_is_decided_at_512_px_and_enlarged(taught, height, width):
    """Beyond 512 px the mask is the nearest pixel of the mask that was decided."""
    student, image = load_student(taught), noise(1, height, width)
    seen = distill.student_size(height, width, SIZE)
    with torch.no_grad():
        mask, p = export.image_to_mask(student, SIZE, 20, probabilities=True)(image)
        x = F.interpolate(image.permute(0, 3, 1, 2) / 255, seen, mode="bilinear", antialias=True)
        logits, _ = student(rectify.normalize(student, 255 * x))
    most = max(512, *seen)
    shape = [max(1, n * most // max(height, width, most)) for n in (height, width)]
    exact = F.interpolate(logits, shape, mode="bilinear", antialias=True).softmax(1)
    assert list(p.shape[2:]) == shape and (p - exact).abs().max() < 1e-3
    enlarged = F.interpolate(p.argmax(1)[:, None].float(), (height, width), mode="nearest-exact")
    assert (mask == enlarged[:, 0]).float().mean() > 0.998

def test_all_of_the_graph_lies_on_the_images_device(taught):
    """Tensors without data ("meta") stand for those on a GPU."""
    module = export.image_to_mask(load_student(taught).to("meta"), SIZE, 17, 0.3)
    mask = module(torch.zeros(2, 700, 90, 3, dtype=torch.uint8, device="meta"))
    assert mask.is_meta and mask.shape == (2, 700, 90)

# ============================================================================== the files it writes

def test_the_files_agree_with_pytorch_on_real_images_and_distill_measures_the_same(exported):
    report = json.loads((exported / "export.json").read_text())
    found, mIoU = report["check"], {k: r["mIoU"] for k, r in report["results"].items()}
    assert found["student.onnx"]["agreement"] >= 0.9999
    assert found["student.fp16.onnx"]["agreement"] >= 0.99 > found["student.int8.onnx"]["agreement"]
    assert found["student.fp16.onnx"]["margin"] < 0.1
    own = torch.load(exported / "student.pt", weights_only=True)["mIoU"]
    assert own == mIoU["pytorch"] == pytest.approx(mIoU["student.onnx"], abs=0.1)
    assert mIoU["student.fp16.onnx"] == pytest.approx(mIoU["pytorch"], abs=0.5)

@pytest.mark.parametrize("name", export.BOUNDS)
def test_each_file_is_whole_and_says_what_it_is(exported, name):
    model = onnx.load(exported / name)
    onnx.checker.check_model(model, full_check=True)
    free = ["batch", "height", "width"]
    for value, shape in (model.graph.input[0], [*free, 3]), (model.graph.output[0], free):
        assert [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] == shape
    assert not [t for t in model.graph.initializer if t.external_data]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    operators = {node.op_type for node in model.graph.node}
    assert model.ir_version == 8 and "Resize" not in operators, "runtimes differ in its filter"
    meta = {p.key: p.value for p in model.metadata_props}
    assert json.loads(meta["names"]) == rectify.VOC_NAMES and json.loads(meta["size"]) == [*SIZE]
    assert json.loads(meta["palette"])[0] == list(rectify.colour(0))
    share = {"student.onnx": 1, "student.fp16.onnx": 0.6, "student.int8.onnx": 0.4}[name]
    assert len(model.SerializeToString()) <= share * (exported / "student.onnx").stat().st_size

@pytest.mark.parametrize("shape", [(1, 96, 96), (2, 101, 87), (3, 63, 200), (1, 375, 500),
                                   (1, 9, 1), (1, 1201, 777), (1, 5, 2048)])
def test_any_size_and_any_batch(exported, shape):
    """Sizes that tracing has not seen: the mask has the image's size and is PyTorch's."""
    module, image = export.image_to_mask(load_student(exported), SIZE, 20), noise(*shape)
    mask = run(exported / "student.onnx", image)
    with torch.no_grad():
        assert mask.shape == shape and mask.dtype == np.uint8
        assert (mask == module(image).numpy()).mean() > 0.999
    if image.numel() > 1000:                            # a few pixels may well differ
        assert (mask == run(exported / "student.int8.onnx", image)).mean() > 0.7

def test_a_square_gives_the_network_one_shape(exported, tmp_path):
    export.write_onnx(export.image_to_mask(load_student(exported), 112, 20),
                      tmp_path / "square.onnx", {})
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "square.onnx")).graph
    sides = {d.dim_value for value in graph.value_info if value.name.startswith("relu")
             for d in value.type.tensor_type.shape.dim[2:]}
    assert sides == {56, 28, 14}, "the feature maps of 112 px"

def test_a_mask_with_background_has_0_for_it_and_class_c_is_c_plus_1(exported, tmp_path):
    """Against the definition: the best channel, background where it is a word or below the
    threshold. Two of the classes serve as words."""
    student, image = load_student(exported), noise(1, 100, 90)
    most = np.bincount(run(exported / "student.onnx", image).ravel()).argmax()
    order = [c for c in range(20) if c not in (0, most)] + [0, int(most)]
    student.T, student.R = student.T[order], student.R[order]
    seen = distill.student_size(100, 90, SIZE)
    x = F.interpolate(image.permute(0, 3, 1, 2) / 255, seen, mode="bilinear", antialias=True)
    with torch.no_grad():
        logits, _ = student(rectify.normalize(student, 255 * x))
    best, c = F.interpolate(logits, (100, 90), mode="bilinear").softmax(1).max(1)   # 1 H W each
    threshold = best.quantile(0.3).item()
    expected = torch.where((c < 18) & (best >= threshold), c + 1, 0).numpy()
    assert (c >= 18).any() and (expected[c.numpy() < 18] == 0).any() and expected.any()
    export.write_onnx(export.image_to_mask(student, SIZE, 18, threshold), tmp_path / "b.onnx", {})
    mask = run(tmp_path / "b.onnx", image)
    assert (mask == expected).mean() > 0.998
    png = export.palette_png(Image.fromarray(mask[0]), [[0, 0, 0], [*rectify.colour(0)]])
    assert (np.asarray(png) == mask[0]).all() and png.getpalette()[3:6] == [*rectify.colour(0)]

@pytest.fixture
def copied(exported, tmp_path, monkeypatch):
    """A folder with a student.pt, in which export.py copies files instead of tracing."""
    shutil.copytree(exported, tmp_path / "run", ignore=shutil.ignore_patterns("*.onnx", "*.json"))
    files = iter(["student.onnx", "student.fp16.onnx"])
    monkeypatch.setattr(export, "write_onnx", lambda module, path, meta: export.save_onnx(
        onnx.load(exported / next(files)), path, meta))
    return tmp_path / "run"

@pytest.mark.parametrize("labelled", [True, False])
def test_a_file_that_computes_something_else_is_left_out_and_the_others_are_written(
        copied, labelled, monkeypatch, capsys):
    """The weights of one convolution are shuffled in the fp16 file."""
    def shuffled(model, path, meta):
        if "fp16" in path.name:
            weights = max(model.graph.initializer, key=lambda t: len(t.raw_data))
            values = np.frombuffer(weights.raw_data, np.float16).copy()
            weights.raw_data = np.random.default_rng(0).permutation(values).tobytes()
        save(model, path, meta)

    save, splits = export.save_onnx, rectify.splits
    monkeypatch.setattr(export, "save_onnx", shuffled)
    monkeypatch.setattr(rectify, "splits",
                        lambda folder: splits(folder) if labelled else (splits(folder)[0], []))
    export.main(["--out", str(copied)])
    printed = capsys.readouterr().out
    assert re.search("student.fp16.onnx: .*LEFT OUT", printed) and printed.count("LEFT OUT") == 1
    assert ("mIoU" in printed) == labelled
    assert {path.name for path in copied.glob("*.onnx")} == {"student.onnx"}

def test_a_full_disk_leaves_the_earlier_files(copied, monkeypatch, capsys):
    def full(model, path):
        raise OSError(28, "No space left on device", str(path))

    (copied / "student.onnx").write_text("earlier")
    before = {path.name for path in copied.iterdir()}
    monkeypatch.setattr(onnx, "save", full)
    assert "student.onnx: No space left on device" in refused(capsys, "--out", copied)
    assert {path.name for path in copied.iterdir()} == before
    assert (copied / "student.onnx").read_text() == "earlier"

# =================================================================================== running a file

def test_an_image_becomes_a_mask_without_pytorch(exported, photo, tmp_path):
    """In a process that cannot import torch, and in which ONNX Runtime sends nothing home."""
    argv = ["--run", exported / "student.onnx", "--image", photo, "--mask", tmp_path / "mask.png",
            "--overlay", tmp_path / "over.png"]
    code = ("import os, sys; sys.modules['torch'] = None\n"
            f"import export; export.main({[*map(str, argv)]!r})\n"
            "print(os.environ['ORT_DISABLE_TELEMETRY'], 'rectify' in sys.modules)")
    unset = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=unset,
                          cwd=rectify.HERE)
    assert done.returncode == 0 and "CPUExecutionProvider" in done.stdout, done.stderr
    assert done.stdout.endswith("1 False\n") and re.search(r"mask\.png: \S.* \d+%", done.stdout)
    mask, image, over = (np.asarray(Image.open(path))
                         for path in (tmp_path / "mask.png", photo, tmp_path / "over.png"))
    expected = run(exported / "student.onnx", image[None])[0]
    assert (mask == expected + 1).all(), "VOC's values: class c is c + 1"
    blend = 0.45 * image + 0.55 * np.array([rectify.colour(c) for c in range(20)])[expected]
    assert np.abs(over - blend).max() <= 1

def test_a_folder_becomes_a_folder_of_masks_that_can_teach(exported, mini, tmp_path):
    """The masks have the values that `distill.py --teacher DIR` wants."""
    export.main(["--run", str(exported / "student.onnx"), "--image", str(mini / "JPEGImages"),
                 "--mask", str(tmp_path / "masks")])
    images = list((mini / "JPEGImages").iterdir())
    assert {p.stem for p in (tmp_path / "masks").iterdir()} == {p.stem for p in images}
    for sample in rectify.list_samples(mini, "train"):
        size = rectify.load_image(sample.image).shape[1:]
        rectify.load_label(tmp_path / f"masks/{sample.name}.png", size, rectify.VOC_NAMES)

def test_images_are_read_as_rectify_reads_them(tmp_path):
    """Turned, transparent and 16-bit images. What has more bits is refused."""
    x, turned = noise(1, 40, 60)[0].numpy(), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.fromarray(x).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(np.concatenate([x, x[:, :, :1]], 2), "RGBA").save(tmp_path / "clear.png")
    Image.fromarray(x[:, :, 0]).convert("P").save(tmp_path / "palette.png", transparency=9)
    Image.fromarray(x[:, :, 0].astype(np.uint16) * 256).save(tmp_path / "deep.png")
    for path in tmp_path.iterdir():
        image, size = export.read_image(path)
        theirs = rectify.load_image(path).permute(1, 2, 0).numpy()                  # H W 3
        assert (np.asarray(image) == theirs).all() and size == theirs.shape[1::-1], path
    Image.fromarray(x[:, :, 0].astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(export.UserError, match="float.tif: .*convert it to 8 bits"):
        export.read_image(tmp_path / "float.tif")

def test_what_the_user_can_mend_is_one_line(exported, photo, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "half.jpg").write_bytes(photo.read_bytes()[:900])
    (tmp_path / "half.onnx").write_bytes((exported / "student.onnx").read_bytes()[:50_000])
    (tmp_path / "file").write_text("in the way")
    model, out = exported / "student.onnx", tmp_path / "m.png"
    export.save_onnx(onnx.load(model), tmp_path / "other.onnx", {})
    wrong = [("text.jpg", "cannot identify"), ("half.jpg", "truncated"), ("none.jpg", "No such"),
             ("half.onnx", "open it"), ("none.onnx", "open it"), ("other.onnx", "not a file")]
    for name, words in wrong:
        file, image = (model, tmp_path / name) if "jpg" in name else (tmp_path / name, photo)
        line = refused(capsys, "--run", file, "--image", image, "--mask", out)
        assert words in line and name in line
    refused(capsys, "--run", model, "--image", photo, "--mask", tmp_path / "file/m.png")
    assert "are the same" in refused(capsys, "--run", model, "--image", photo, "--mask", photo)
    assert "together" in refused(capsys, "--run", model) and refused(capsys, "--threshold", 1.5)
    assert "no-such" in refused(capsys, "--out", tmp_path / "no-such")
    if not torch.cuda.is_available():
        assert "pip" in refused(capsys, "--run", model, "--image", photo, "--provider", "cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused(capsys, "--out", exported)
    assert not out.exists() and not list(tmp_path.glob("*.tmp"))

def test_readmes_lines_do_what_they_say(exported, photo, tmp_path, monkeypatch, capsys):
    """The deployment snippet, executed as it stands there."""
    text = (rectify.HERE / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    snippet = next(block for block in blocks if "InferenceSession" in block)
    (tmp_path / "runs/emoji").mkdir(parents=True)
    shutil.copy(exported / "student.onnx", tmp_path / "runs/emoji")
    shutil.copy(photo, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README", "exec"), {})
    assert "%" in capsys.readouterr().out

def test_the_page_lies_beside_the_model_and_its_names(exported, tmp_path):
    export.main(["--run", str(exported / "student.onnx"), "--web", str(tmp_path / "site")])
    files = {path.name: path for path in (tmp_path / "site").iterdir()}
    assert files.keys() == {"index.html", "names.json", "student.onnx"}
    assert json.loads(files["names.json"].read_text())["names"] == rectify.VOC_NAMES

# ================================================================================== what takes long

SHAPES = [(1, 1), (1, 640), (96, 96), (101, 87), (375, 500), (511, 513), (768, 1024), (1201, 777),
          (1500, 2000)]
# file: the share of the pixels on which a runtime agrees with ONNX Runtime, of any image. Runtimes
# round fp16 and int8 in places of their own.
LEAST = {"student.onnx": 0.999, "student.fp16.onnx": 0.98, "student.int8.onnx": 0.8}

@pytest.fixture(scope="module")
def images(mini):
    """Images 1×H×W×3 of every shape: emoji, with a grain that only a good filter removes."""
    grain, made = np.random.default_rng(0), []
    for (H, W), path in zip(SHAPES, sorted((mini / "JPEGImages").iterdir())):
        x = np.asarray(Image.open(path).resize((W, H))) + 40 * grain.standard_normal((H, W, 3))
        made.append(x.clip(0, 255).astype(np.uint8)[None])
    return made

def compare(file, images, theirs):
    """Hold a runtime's masks against ONNX Runtime's."""
    ours = [run(file, x) for x in images]
    assert len(np.unique(np.concatenate([mask.ravel() for mask in ours]))) > 2, "proves nothing"
    for shape, a, b in zip(SHAPES, ours, theirs):
        assert (a == b.reshape(a.shape)).mean() >= LEAST[file.name], shape

@pytest.mark.slow
@pytest.mark.parametrize("name", LEAST)
def test_openvino(name, exported, images):
    """At fp32: left alone it computes in bfloat16 on processors that have it."""
    openvino = pytest.importorskip("openvino")
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(exported / name, "CPU", hint)
    compare(exported / name, images, [model(x)[0] for x in images])

@pytest.mark.slow
@pytest.mark.parametrize("name", LEAST)
def test_opencv(name, exported, images):
    cv2 = pytest.importorskip("cv2", minversion="5.0")
    net, masks = cv2.dnn.readNetFromONNX(str(exported / name)), []
    for x in images:
        net.setInput(x, "image")
        masks.append(net.forward("mask"))
    compare(exported / name, images, masks)

NODE = """
const ort = require("onnxruntime-web"), fs = require("fs");
const {folder, from, files, shapes} = JSON.parse(process.argv[1]);
ort.env.wasm.numThreads = 1;
(async () => {
  for (const name of files) {
    const session = await ort.InferenceSession.create(fs.readFileSync(`${from}/${name}`));
    for (const [k, [h, w]] of shapes.entries()) {
      const rgb = new Uint8Array(fs.readFileSync(`${folder}/${k}`));
      const {mask} = await session.run({image: new ort.Tensor("uint8", rgb, [1, h, w, 3])});
      fs.writeFileSync(`${folder}/${name}.${k}`, mask.data);
    }
  }
})();
"""

@pytest.mark.slow
def test_onnxruntime_web(exported, images, tmp_path):
    """The version that the page loads, fetched by npm."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    page = (rectify.HERE / "tests/web/index.html").read_text("utf-8")
    version = re.search(r"onnxruntime-web@[\d.]+\d", page)[0]
    done = subprocess.run(["npm", "install", version], cwd=tmp_path, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm cannot fetch {version}: {done.stderr.strip().splitlines()[-1]}")
    for k, x in enumerate(images):
        (tmp_path / str(k)).write_bytes(x.tobytes())
    task = {"folder": str(tmp_path), "shapes": SHAPES, "from": str(exported), "files": [*LEAST]}
    done = subprocess.run(["node", "-e", NODE, json.dumps(task)], capture_output=True, text=True,
                          env=os.environ | {"NODE_PATH": str(tmp_path / "node_modules")})
    assert done.returncode == 0, done.stderr
    for name in LEAST:
        compare(exported / name, images, [np.fromfile(tmp_path / f"{name}.{k}", np.uint8)
                                          for k in range(len(SHAPES))])

@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read there")
def test_a_session_gives_memory_back(exported):
    """A large batch takes 100 MB more, and only as long as it is computed."""
    code = ("import export, numpy, sys; session = export.open_model(sys.argv[1])\n"
            "kB = lambda: int(open('/proc/self/status').read().split('VmRSS:')[1].split()[0])\n"
            "x, before = numpy.ones((64, 96, 128, 3), numpy.uint8), kB()\n"
            "session.run(None, {'image': x}); print(kB() - before)")
    done = subprocess.run([sys.executable, "-c", code, exported / "student.onnx"], text=True,
                          capture_output=True, cwd=rectify.HERE)
    assert int(done.stdout) < 40_000, done.stderr

@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read there")
@pytest.mark.parametrize("side, gigabytes", [(13_000, 1.2), (3_464, 0.6)])
def test_memory_is_bounded_up_to_pillows_limit(exported, tmp_path, side, gigabytes):
    """169 megapixels, of which Pillow's own image is 0.7 GB, and 12 megapixels."""
    Image.new("RGB", (side, side), "green").save(tmp_path / "large.png", compress_level=1)
    code = ("import export, sys; export.main(sys.argv[1:])\n"
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
    argv = ["--run", exported / "student.onnx", "--image", tmp_path / "large.png", "--mask",
            tmp_path / "m.png", "--overlay", tmp_path / "o.png"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True,
                          text=True, cwd=rectify.HERE)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert int(done.stdout.split()[-1]) < gigabytes * 1e6, "kB"
    with Image.open(tmp_path / "m.png") as mask, Image.open(tmp_path / "o.png") as over:
        assert mask.size == (side, side) and over.size == (export.LARGEST, export.LARGEST)
