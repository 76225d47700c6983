"""The three files in runtimes that are not ONNX Runtime: OpenVINO, OpenCV and onnxruntime-web compute its masks."""
import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
from PIL import Image

import distill
import export
import rectify


def load_student(path):
    """The DeepLabV2 of a student.pt."""
    return distill.load_student(rectify.load_checkpoint(path, "student"))

SHAPES = [(1, 1), (1, 640), (96, 96), (101, 87), (375, 500), (511, 513), (768, 1024), (1201, 777), (1500, 2000)]


@pytest.fixture(scope="module")
def files(taught, mini, tmp_path_factory):
    """{name: path} of fp32, fp16 and int8 files, and of an fp32 file with background words and a threshold."""
    folder = tmp_path_factory.mktemp("runtimes")
    paths = {name: folder / f"{name}.onnx" for name in ("fp32", "fp16", "int8", "background")}
    student = load_student(taught / "student.pt")
    export.write_onnx(export.image_to_mask(student, 112, 20), paths["fp32"], {})
    export.write_onnx(export.image_to_mask(student, 112, 17, threshold=0.3), paths["background"], {})
    export.write_int8(paths["fp32"], paths["int8"], rectify.list_samples(mini, "train")[:8], {})
    export.write_onnx(export.image_to_mask(export.halved(student), 112, 20), paths["fp16"], {})
    return paths


@pytest.fixture(scope="module")
def images(mini):
    """Uint8 images 1×H×W×3 of every shape: emoji images, with a grain that only a good filter removes."""
    grain, made = np.random.default_rng(0), []
    for (H, W), path in zip(SHAPES, sorted((mini / "JPEGImages").iterdir())):
        with Image.open(path) as image:
            x = np.asarray(image.resize((W, H))) + 40 * grain.standard_normal((H, W, 3))
        made.append(x.clip(0, 255).astype(np.uint8)[None])
    return made


@pytest.fixture(scope="module")
def masks(files, images):
    """{name of the file: ONNX Runtime's masks}."""
    sessions = {name: export.open_model(path) for name, path in files.items()}
    return {name: [session.run(["mask"], {"image": x})[0] for x in images] for name, session in sessions.items()}


# file: smallest share of the pixels on which a runtime agrees with ONNX Runtime, of any image. Runtimes round
# fp16 and int8 in places of their own.
LEAST = {"fp32": 0.999, "background": 0.999, "fp16": 0.98, "int8": 0.8}


def compare(ours, theirs, least):
    assert len(np.unique(np.concatenate([mask.ravel() for mask in ours]))) > 2, "masks of one class would prove nothing"
    for shape, a, b in zip(SHAPES, ours, theirs):
        assert (a == b.reshape(a.shape)).mean() >= least, shape


@pytest.mark.parametrize("name", LEAST)
def test_openvino(name, files, images, masks):
    """At fp32: left alone it computes in bfloat16 on processors that have it."""
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(files[name], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    compare(masks[name], [model(x)[0] for x in images], LEAST[name])


@pytest.mark.parametrize("name", LEAST)
def test_opencv(name, files, images, masks):
    cv2 = pytest.importorskip("cv2", minversion="5.0")
    net = cv2.dnn.readNetFromONNX(str(files[name]))

    def run(x):
        net.setInput(x, "image")
        return net.forward("mask")

    compare(masks[name], [run(x) for x in images], LEAST[name])


NODE = """
const ort = require("onnxruntime-web"), fs = require("fs"), {folder, files, shapes} = JSON.parse(process.argv[1]);
ort.env.wasm.numThreads = 1;
(async () => {
  for (const [name, file] of Object.entries(files)) {
    const session = await ort.InferenceSession.create(fs.readFileSync(file), {executionProviders: ["wasm"]});
    for (const [k, [h, w]] of shapes.entries()) {
      const image = new ort.Tensor("uint8", new Uint8Array(fs.readFileSync(`${folder}/${k}`)), [1, h, w, 3]);
      fs.writeFileSync(`${folder}/${name}.${k}`, (await session.run({image})).mask.data);
    }
  }
})();
"""


def test_onnxruntime_web(files, images, masks, tmp_path, web):
    for k, x in enumerate(images):
        (tmp_path / str(k)).write_bytes(x.tobytes())
    task = {"folder": str(tmp_path), "files": {n: str(p) for n, p in files.items()}, "shapes": SHAPES}
    done = subprocess.run(["node", "-e", NODE, json.dumps(task)], capture_output=True, text=True,
                          env=os.environ | {"NODE_PATH": str(web)})
    assert done.returncode == 0, done.stderr
    for name, least in LEAST.items():
        compare(masks[name], [np.frombuffer((tmp_path / f"{name}.{k}").read_bytes(), np.uint8)
                              for k in range(len(SHAPES))], least)


CHROMIUM = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --virtual-time-budget=60000 --window-size=900,900").split()


def test_a_browser_shows_the_runners_mask(taught, mini, tmp_path, web, monkeypatch):
    """--web: the page's legend has the names and shares that the runner computes; the screenshot is a PNG."""
    chromium = shutil.which("chromium") or pytest.skip("needs chromium")
    state = rectify.load_checkpoint(taught / "student.pt", "student")
    student = distill.load_student(state)
    names = [*state["names"][:-1], "</script> & <b>"]               # a name is text, never markup
    meta = {"names": json.dumps(names), "palette": json.dumps([rectify.colour(c) for c in range(20)])}
    export.write_onnx(export.image_to_mask(student, 112, 20), tmp_path / "model.onnx", meta)
    site = tmp_path / "site"
    export.main(["--run", str(tmp_path / "model.onnx"), "--web", str(site), "--ort", str(web / "onnxruntime-web/dist")])
    with Image.open(sorted((mini / "JPEGImages").iterdir())[0]) as image:
        image.save(site / "photo.png")                              # a PNG, since decoders of JPEG differ
        mask = np.asarray(export.segment(export.open_model(tmp_path / "model.onnx"), image))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/index.html#photo.png"
        done = subprocess.run([chromium, *CHROMIUM, f"--user-data-dir={tmp_path}/profile", "--dump-dom",
                               f"--screenshot={tmp_path}/web.png", address], capture_output=True, text=True)
        server.shutdown()
    legend = [html.unescape(item) for item in re.findall(r"</i>(.*?)</li>", done.stdout)]
    shares = {c: 100 * (mask == c).mean() for c in np.unique(mask)}
    most = sorted(shares, key=lambda c: -shares[c])
    assert f"{mask.shape[1]}×{mask.shape[0]} px" in done.stdout, done.stderr
    assert legend[0] == f"{names[most[0]]} {shares[most[0]]:.1f} %" and len(legend) == len(shares)
    with Image.open(tmp_path / "web.png") as screenshot:
        assert screenshot.size == (900, 900)


def test_the_page_takes_the_runtime_from_a_cdn_or_says_what_is_missing(files, taught, tmp_path, capsys):
    meta = {"names": '["a", "b"]', "palette": "[[1, 2, 3], [4, 5, 6]]"}
    export.save_onnx(files["fp32"], tmp_path / "model.onnx", meta)
    export.write_page(tmp_path / "model.onnx", tmp_path / "site")
    assert f'src="{export.ORT_CDN}/ort.wasm.min.js"' in (tmp_path / "site/index.html").read_text()
    assert {path.name for path in (tmp_path / "site").iterdir()} == {"index.html", "student.onnx"}
    with pytest.raises(export.BadInput, match="holds no ort.wasm.min.js"):
        export.write_page(tmp_path / "model.onnx", tmp_path / "other", ort=str(tmp_path))
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="session")
def web(tmp_path_factory):
    """A node_modules with onnxruntime-web, fetched by npm; a skip with its reason where that is not possible."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.mktemp("npm")
    done = subprocess.run(["npm", "install", "--no-audit", "--no-fund", f"onnxruntime-web@{export.ORT_WEB}"], cwd=folder,
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm cannot fetch onnxruntime-web: {done.stderr.strip().splitlines()[-1]}")
    return folder / "node_modules"
