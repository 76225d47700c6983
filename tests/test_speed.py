"""What makes it fast changes nothing else: bfloat16, threads that read ahead, a step that waits for
nothing.
"""
import os
import subprocess
import sys
import threading

import pytest
import rectify
import torch
from rectify import UserError, configure
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2

CPU = torch.device("cpu")


def test_bfloat16_moves_features_and_masks_but_little(mini):
    """--precision bf16: features turn by less than two degrees, and hardly a pixel of MaskCLIP's
    changes its class.
    """
    full, half = (rectify.Segmenter(cfg, rectify.VOC_NAMES, CPU) for cfg in (
        configure(precision=precision, method="maskclip") for precision in ("auto", "bf16")))
    exact, near = rectify.predictor(full), rectify.predictor(half)
    for _, images, _ in rectify.batches_of_one_size(rectify.list_samples(mini, "val"), 8):
        x = rectify.resize_to_fit(images, full.cfg.size)
        f, g = full.features(x), half.features(x)
        assert g.dtype == torch.float32 and not torch.equal(f, g)
        assert (f * g).sum(1).min() > 0.9994                                            # cos 2°
        same = exact(images)["maskclip"] == near(images)["maskclip"]
        assert same.float().mean() > 0.98
        assert rectify.hypothesize(half, images).any(1).all()


def test_bfloat16_is_taken_where_the_hardware_has_it(monkeypatch, fp32):
    """--precision auto: on processors with and without it, and on a torch that does not tell."""
    for can in ({"avx512_bf16": True}, {"amx_bf16": True}, {"avx512_bf16": False, "avx2": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
        assert fp32(CPU) == any(name in can and can[name] for name in ("avx512_bf16", "amx_bf16"))
        assert fp32(CPU, "bf16") and not fp32(CPU, "fp32")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not fp32(CPU)


def test_reading_ahead_keeps_the_order_and_its_bound():
    """Results come in order; no more than `ahead` are read before they are wanted; an error comes
    in its place.
    """
    lock, begun = threading.Lock(), []

    def read(k):
        assert torch.get_num_threads() == 1
        with lock:
            begun.append(k)
        if k == 50:
            raise UserError("broken")
        return k * k

    threads = torch.get_num_threads()
    stream, got = rectify.read_ahead(read, range(100), ahead=8), []
    with pytest.raises(UserError, match="broken"):
        for value in stream:
            got.append(value)
            assert len(begun) <= len(got) + 8
    assert got == [k * k for k in range(50)] and torch.get_num_threads() == threads


class Crossings(TorchDispatchMode):
    """Collects the operations in which host and GPU meet: copies between them, and values that the
    host asks for.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        places = {t.device.type for t in tree_leaves((args, kwargs, result))
                  if isinstance(t, torch.Tensor)}
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        if len(places) > 1 or function.overloadpacket in waits:
            self.found.append(str(function))
        return result


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch does not know CUDA")
@pytest.mark.parametrize("method, prompt", [
    ("reclip", "shared"), ("reclip", "per-class"), ("reclip++", "shared")])
def test_a_step_on_a_gpu_makes_nobody_wait(method, prompt):
    """Of a training step's forward and loss no tensor goes between host and GPU. Tensors without
    data stand for the GPU's.
    """
    cfg = configure(method=method, prompt=prompt)
    segmenter = rectify.Segmenter(cfg, rectify.VOC_NAMES, CPU)
    segmenter.rectifier.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda")
        named = (*segmenter.named_parameters(), *segmenter.named_buffers())
        weights = {name: on_gpu(t) for name, t in named}
        segmenter.T, segmenter.tokens = on_gpu(segmenter.T), on_gpu(segmenter.tokens)
        clip = segmenter.clip
        clip.mean, clip.std = on_gpu(clip.mean), on_gpu(clip.std)
        x, y, valid, i, images = (on_gpu(torch.empty(shape, dtype=dtype)) for shape, dtype in (
            ((2, 9, segmenter.T.size(1), 12, 12), torch.half), ((9, 20), torch.bool),
            ((2, 9, 12, 12), torch.bool), ((4,), torch.long), ((4, 3, 24, 24), torch.uint8)))
        with Crossings() as crossings:
            rectify.normalize(clip, images)     # as --finetune does, and distill's teacher
            logits, f = torch.func.functional_call(segmenter, weights, (x[1, i],))
            M = rectify.gumbel_mask(logits, cfg.alpha)
            loss = rectify.contrastive_loss(M, f, segmenter.T, y[i], segmenter.scale, valid[1, i],
                                            cfg.pool)
        assert loss.is_cuda and not crossings.found
        with Crossings() as crossings:          # the check itself: an index from the host is found
            x[1, torch.arange(4)]
        assert crossings.found


def test_distorted_colours_are_torchvisions():
    """The same draws give the same image as torchvision's own transform, with and without changed
    channels.
    """
    image, changed = torch.randint(256, (3, 9, 11), dtype=torch.uint8), 0
    for seed in range(20):
        torch.manual_seed(seed)
        own = rectify.PhotometricDistort()(image)
        torch.manual_seed(seed)
        assert torch.equal(own, v2.RandomPhotometricDistort()(image))
        changed += not torch.equal(own, image)
    assert changed > 10


@pytest.mark.parametrize("script", ["rectify", "distill", "rivals", "tables"])
@pytest.mark.parametrize("chosen, expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_waiting_threads_yield_before_torch_is_loaded(script, chosen, expected):
    """OpenMP reads its settings once, when torch loads it; what the user has set stays."""
    code = f"""
import os, sys
class Watch:
    def find_spec(name, *rest):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            raise SystemExit                            # all is known, and torch takes seconds
sys.meta_path.insert(0, Watch)
sys.path.append("tests")
import {script}
"""
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | chosen
    done = subprocess.run([sys.executable, "-c", code], cwd=rectify.HERE, env=env, check=True,
                          capture_output=True, text=True)
    assert done.stdout.split() == [expected]


def test_who_reads_ahead_keeps_all_threads():
    """Also where the readers are the first that compute in a process: torch settles a thread's
    number at its first operation, and takes the last one that was set anywhere.
    """
    code = """
import rectify, torch
assert [*rectify.read_ahead(lambda k: torch.get_num_threads(), [0])] == [1]
torch.randn(1000, 1000).exp()
print(torch.get_num_threads())
"""
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], cwd=rectify.HERE, env=env, check=True,
                          capture_output=True, text=True)
    assert done.stdout.split() == ["2"]
