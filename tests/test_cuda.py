"""A GPU that is not there: all that the scripts do on CUDA, run without one.

CPU tensors stay real. CUDA's are fake: they have a shape, a type and a device, but no values. An
operation that mixes devices raises; one for which the host waits for the GPU is recorded.
"""
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import distill  # noqa: E402  (after the path to it)
import export  # noqa: E402
import rectify  # noqa: E402
from rectify import UserError, configure  # noqa: E402

CUDA, aten = torch.device("cuda", 0), torch.ops.aten
REAL = rectify.in_half, rectify.text_features           # conftest.py puts others in their place

class FakeCuda(TorchDispatchMode):
    """Operations on CUDA make tensors without values; `waits` names those that the host waits for.

    A copy to the GPU makes nobody wait where it is non_blocking and small, or from pinned memory.
    What the host learns from the GPU is invented: 1, False, and zeros.
    """

    def __init__(self):
        super().__init__()
        self.fake, self.waits, self.pinned = FakeTensorMode(allow_non_fake_inputs=True), [], {}
        torch._C._ensureCUDADeviceGuardSet()            # the real one asks the driver

    def pin(self, tensor):
        """Stands for Tensor.pin_memory."""
        copy = tensor.clone()
        self.pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, op = kwargs or {}, function.overloadpacket
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        real = [t for t in tensors if not isinstance(t, FakeTensor)]
        fake, place = len(real) < len(tensors), torch.device(kwargs.get("device") or "cpu").type
        if not fake and place != "cuda":
            return function(*args, **kwargs)
        to_host = (op is aten._to_copy and kwargs.get("device") and place == "cpu"
                   or op is aten.copy_ and args[0] is (real or [None])[0])
        large = [t for t in real if t.ndim]             # a number travels with the operation
        later = kwargs.get("non_blocking") or op is aten.copy_ and args[2:] == (True,)
        pinned = large and (large[0].untyped_storage().data_ptr() in self.pinned
                            or large[0].nbytes <= 2 ** 16)
        if to_host or op is aten._local_scalar_dense or large and not (later and pinned):
            self.waits.append(str(op))
        if op is aten._local_scalar_dense:
            return False if args[0].dtype == torch.bool else 1
        if to_host:
            new = torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            return args[0].zero_() if op is aten.copy_ else new
        with self.fake:
            if op is aten._to_copy and not fake:
                return torch.empty_strided(args[0].shape, args[0].stride(), device=CUDA,
                                           dtype=kwargs.get("dtype") or args[0].dtype)
            return function(*args, **kwargs)

@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU, for the whole test. Gives the FakeCuda."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this PyTorch does not know CUDA")
    mode, put = FakeCuda(), monkeypatch.setattr
    for name, value in [("is_available", True), ("device_count", 1), ("is_bf16_supported", True),
                        ("get_device_name", "H200"), ("mem_get_info", (1e11, 1e11)),
                        ("_lazy_init", None), ("set_device", None), ("empty_cache", None),
                        ("is_current_stream_capturing", False)]:
        put(torch.cuda, name, lambda *args, value=value, **options: value)
    put(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)   # else no autocast
    put(torch._subclasses.fake_tensor, "init_gpu_context", lambda device: None)
    for name in ("tensor", "as_tensor"):
        make = getattr(torch, name)
        put(torch, name, lambda *args, make=make, device=None, **options: (
            make(*args, **options).to(device or "cpu")))
    precision = torch.get_float32_matmul_precision()
    put(FakeTensor, "tolist", lambda self: self.cpu().tolist())
    put(torch.Tensor, "pin_memory", lambda self: mode.pin(self))
    put(torch.Tensor, "backward", backward)
    put(rectify, "save", lambda path, state: path.touch())
    put(rectify, "text_features", REAL[1])
    for module in (rectify, distill):
        put(module, "in_half", REAL[0])
        put(module, "read_ahead", lambda read, items, *rest, **options: map(read, items))
    put(torch.nn.Module, "_apply", convert)
    with mode:
        yield mode
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(True)

def convert(module, function):
    """Stands for Module._apply, which would not make a tensor a fake one."""
    for child in module.children():
        convert(child, function)
    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = torch.nn.Parameter(function(p.detach()), p.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = function(buffer)
    return module

def backward(loss):
    """Stands for Tensor.backward, whose threads want a driver: a gradient for every leaf."""
    seen, todo = {None}, [loss.grad_fn]
    while todo:
        if (node := todo.pop()) not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
            if hasattr(node, "variable"):
                node.variable.grad = torch.empty_like(node.variable)
    assert loss.is_cuda and len(seen) > 10

@pytest.fixture
def samples(tmp_path):
    """Four images of noise in two sizes, and their labels."""
    rng, made = np.random.default_rng(0), []
    for k in range(4):
        image, label = tmp_path / f"{k}.png", tmp_path / f"{k}.label.png"
        size = (40, 56) if k % 2 else (64, 48)
        Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)).save(image)
        mask = np.pad(np.full((9, 9), k + 1, np.uint8), [(9, n - 18) for n in size])
        rectify.write(label, rectify.palette_png(mask))  # no edge cuts the object
        made.append(rectify.Sample(str(k), image, label))
    return made

def on_gpu(tmp_path, background=(), **options):
    """A Segmenter of Emoji VOC's tiny CLIP on the fake GPU."""
    base = dict(dataset="emoji", views=2, size=(96, 48), crop=48, batch=2, device="cuda",
                out=str(tmp_path))
    segmenter = rectify.Segmenter(configure(**base | options), rectify.VOC_NAMES, background)
    assert {t.device for t in (*segmenter.parameters(), segmenter.T, segmenter.tokens)} == {CUDA}
    return segmenter

def test_the_fake_gpu_finds_waits_and_mixed_devices(gpu):
    x, here, image = torch.empty(3, 4, device="cuda"), torch.arange(2), torch.zeros(3, 200, 200)
    assert x.device == CUDA and (2 * x + torch.ones(())).device == CUDA and not gpu.waits
    image.pin_memory().to("cuda", non_blocking=True)
    here.to("cuda", non_blocking=True)
    assert not gpu.waits
    for n, wait in enumerate([
            lambda: x[here], lambda: here.to("cuda"), lambda: x.cpu(), lambda: x.sum().item(),
            lambda: torch.tensor([1, 2], device="cuda"), lambda: x[0].tolist(),
            lambda: image.to("cuda", non_blocking=True), lambda: torch.ones(3, 4).copy_(x)], 1):
        wait()
        assert len(gpu.waits) == n
    with pytest.raises(RuntimeError, match="same device|different devices"):
        x + torch.ones(4)

@pytest.mark.parametrize("options", [
    dict(hypothesis="softmax"), dict(hypothesis="threshold", finetune=True, method="reclip"),
    dict(hypothesis="windows", attention="naclip", crop=144)], ids=lambda o: o["hypothesis"])
def test_features_and_hypothesis(gpu, samples, tmp_path, options):
    """All that is frozen lies on the GPU."""
    segmenter = on_gpu(tmp_path, **options)
    gpu.waits.clear()
    x, valid, y = rectify.training_data(segmenter, samples)
    assert {x.device, valid.device, y.device} == {CUDA}
    S, grid = segmenter.cfg.crop, [segmenter.cfg.crop // 12] * 2
    assert x.shape == (2, 4, *((3, S, S) if segmenter.cfg.finetune else (128, *grid)))
    assert y.shape == (4, 20) and valid.shape == (2, 4, *grid)
    assert "aten._local_scalar_dense" not in gpu.waits

@pytest.mark.parametrize("has_bf16", [True, False])
def test_attentions_in_16_bits(gpu, tmp_path, monkeypatch, has_bf16):
    """In bfloat16; on Turing, which has none, in float16 where nothing learns, else in fp32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: has_bf16)
    segmenter, seen = on_gpu(tmp_path, method="maskclip"), set()
    segmenter.clip.visual.conv1.register_forward_hook(lambda conv, x, out: seen.add(out.dtype))
    gpu.waits.clear()
    images = torch.zeros(2, 3, 50, 70, dtype=torch.uint8, device="cuda")
    with torch.no_grad():
        for attention in ("clip", "maskclip", "sclip", "clearclip", "naclip"):
            f = segmenter.features(images, attention=attention)
            assert f.is_cuda and f.dtype == torch.float and not gpu.waits
            assert f.shape == ((2, 128) if attention == "clip" else (2, 128, 5, 6))
    assert seen == {torch.bfloat16 if has_bf16 else torch.half}
    seen.clear()
    segmenter.features(images)
    assert seen == {torch.bfloat16 if has_bf16 else torch.float}

@pytest.mark.parametrize("options", [
    dict(prompt="shared", optimizer="sgd"), dict(method="reclip", finetune=True),
    dict(space="off")], ids=lambda options: "-".join(map(str, options.values())))
def test_a_training_step_waits_for_nothing(gpu, samples, tmp_path, options):
    """Four steps an epoch have as many waits as one: those of its beginning and its end."""
    segmenter, waits = on_gpu(tmp_path, epochs=2, **options), []
    make = lambda *shape, dtype=torch.bool: torch.empty(shape, dtype=dtype, device="cuda")
    for N in (2, 8):
        x = (make(2, N, 3, 48, 48, dtype=torch.uint8) if segmenter.cfg.finetune
             else make(2, N, 128, 4, 4, dtype=torch.half))
        gpu.waits.clear()
        rectify.train(segmenter, (x, make(2, N, 4, 4), make(N, 20)), samples, tmp_path)
        waits.append([*gpu.waits])
    assert waits[0] == waits[1] and len(waits[0]) < 20

@pytest.mark.parametrize("options", [
    dict(background=["sky"], denoise=0.5), dict(threshold=0.4, window=48), dict(method="maskclip"),
    dict(method="reclip", finetune=True, size=(48, 32))], ids=lambda options: "-".join(options))
def test_prediction_and_measurement(gpu, samples, tmp_path, options, monkeypatch):
    """Evaluation with figures, and --image. Masks are computed on the GPU."""
    segmenter = on_gpu(tmp_path, image=str(samples[0].image), **options)
    masks = rectify.predictor(segmenter)(torch.zeros(2, 3, 40, 56, dtype=torch.uint8))
    assert all(m.device == CUDA and m.shape == (2, 40, 56) for m in masks.values())
    figures = []
    monkeypatch.setattr(rectify, "save_figure", lambda *args: figures.append(args))
    rectify.measure(segmenter, samples, samples[:2], tmp_path, 0.0)
    rectify.segment(segmenter)
    assert len(figures) == 4 and (tmp_path / "0.mask.png").is_file()

@pytest.mark.parametrize("options", [
    dict(teacher="reclip++"), dict(teacher="maskclip", targets="crop", optimizer="sgd"),
    dict(teacher="masks", ignore_gt_background=True)], ids=lambda options: options["teacher"])
def test_a_step_of_the_student_waits_for_nothing(gpu, samples, tmp_path, options):
    """Reading, crops, labels, losses and AdamW: two steps have as many waits as one."""
    segmenter, waits = on_gpu(tmp_path), []
    for sample in samples:
        rectify.write(tmp_path / f"masks/{sample.name}.png", sample.label.read_bytes())
    options = options | {"teacher": options["teacher"].replace("masks", f"{tmp_path}/masks")}
    cfg = distill.configure(segmenter.cfg, crop=48, batch=2, epochs=2, **options)
    labeller = distill.Labeller(segmenter, cfg) if cfg.teacher in distill.METHODS else None
    for N in (2, 4):
        student = distill.DeepLabV2(cfg, segmenter.T, scale=segmenter.scale).to(CUDA)
        if labeller and cfg.targets == "once":
            labeller.see_all(samples)
            labeller.see_all = lambda samples: None     # once for both
        gpu.waits.clear()
        kept = {"names": segmenter.names, "background": []}
        distill.train(student, labeller, samples[:N], cfg, kept, tmp_path)
        waits.append([*gpu.waits])
    assert waits[0] == waits[1] and len(waits[0]) <= 3 * cfg.epochs

def test_a_student_on_a_gpu(gpu, tmp_path):
    """Its masks, with flips and scales, and those of the module that export.py writes."""
    segmenter = on_gpu(tmp_path)
    cfg = distill.configure(segmenter.cfg, tta=True, size=(96, 48))
    student = distill.DeepLabV2(cfg, segmenter.T, scale=segmenter.scale).to(CUDA).eval()
    images = torch.zeros(2, 3, 40, 56, dtype=torch.uint8)
    masks = distill.predict_student(student, images, cfg, 20, threshold=0.5)
    assert masks.device == CUDA and masks.shape == (2, 40, 56)
    for size in ((96, 48), 64):
        module = export.image_to_mask(student, size, 20, 0.5, probabilities=True)
        mask, p = module(images.permute(0, 2, 3, 1).to(CUDA))
        assert mask.device == p.device == CUDA and mask.shape == (2, 40, 56) and p.size(1) == 21

@pytest.mark.parametrize("dtype, spare", [(np.float16, 3e9), (np.uint8, 9e9)])
def test_features_stay_on_the_gpu_where_3_gb_stay_free(gpu, tmp_path, monkeypatch, dtype, spare):
    """Memory is asked for after what the allocator keeps is given back; with --finetune 9 GB."""
    calls, shape = [], (2, 10 ** 7)
    need = math.prod(shape) * np.dtype(dtype).itemsize
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    for free, kind in ((need + spare + 1e6, "cuda"), (need + spare - 1e6, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
        x = rectify.allocate(shape, dtype, CUDA, tmp_path)
        assert x.device.type == kind and x.shape == shape and x.nbytes == need
    assert calls == ["empty"] * 2 and not any(tmp_path.iterdir()), "the file has no name"

def test_a_driver_that_is_too_old_is_named(monkeypatch, capsys, recwarn):
    """NVML counts a GPU that PyTorch cannot use: auto takes the CPU and says why, cuda ends."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(warnings.warn("ten lines")))
    assert rectify.pick_device(configure()).type == "cpu"
    warning = capsys.readouterr().out
    assert warning.startswith("warning: ") and warning.count("\n") == 1 and not recwarn.list
    assert "driver" in warning and torch.__version__ in warning
    with pytest.raises(UserError, match="0 GPUs"):
        rectify.pick_device(configure(device="cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert rectify.pick_device(configure()).type == "cpu" and not capsys.readouterr().out

def test_naclips_distances_are_exact(monkeypatch):
    """Not in TF32, which makes cdist's products wrong by 0.04 here: emulated, against float64."""
    def cdist(a, b, p=2, compute_mode="use_mm_for_euclid_dist_if_necessary"):
        if a.dtype == torch.double or compute_mode == "donot_use_mm_for_euclid_dist":
            return exact(a, b)
        tf32 = lambda x: ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float)
        square = lambda x: x.square().sum(1)
        return (square(a)[:, None] + square(b) - 2 * tf32(a) @ tf32(b).T).clamp(min=0).sqrt()

    exact = torch.cdist
    monkeypatch.setattr(torch, "cdist", cdist)
    clip, _ = rectify.load_clip(configure(), torch.device("cpu"))
    block, x = clip.visual.transformer.resblocks[-1], torch.randn(1, 1 + 32 * 43, 192)
    block.attn.in_proj_weight[:384] = 0                 # queries and keys: only distances decide
    found = rectify.attention_block(block, x, (32, 43), "naclip")
    expected = rectify.attention_block(block.double(), x.double(), (32, 43), "naclip")
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)

def test_moments_of_another_device_are_laid_out_anew():
    """A GPU keeps moments of convolutions channels-last; fused AdamW on a CPU needs them as p."""
    p = torch.nn.Parameter(torch.randn(6, 5, 3, 3))
    optimizer, last = torch.optim.AdamW([p], fused=True), torch.channels_last
    moments = {name: torch.randn(p.shape).to(memory_format=last)
               for name in ("exp_avg", "exp_avg_sq")}
    state = optimizer.state_dict() | {"state": {0: moments | {"step": torch.tensor(3.0)}}}
    assert rectify.resume({"optimizer": state, "log": []}, optimizer) == []
    for name, moment in moments.items():
        found = optimizer.state[p][name]
        assert found.stride() == p.stride() != moment.stride() and torch.equal(found, moment)
