"""What makes it fast changes nothing else: bfloat16, a compiled step, threads that read ahead, a step that waits for nothing."""
import functools
import json
import threading

import distill
import pytest
import rectify
import torch
from rectify import Config, UserError, complete
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2

CPU = torch.device("cpu")


def learn(mini, out, **options):
    """Two epochs on `mini`: their losses."""
    cfg = complete(Config(data=str(mini), names=str(mini / "names.txt"), out=str(out), epochs=2, views=1, **options))
    torch.manual_seed(0)
    segmenter, samples = rectify.Segmenter(cfg, rectify.VOC_NAMES, CPU), rectify.list_samples(mini, "train")
    out.mkdir()
    rectify.train(segmenter, rectify.training_data(segmenter, samples), len(samples), out, resume=False)
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["reclip", "reclip++"])
def test_a_compiled_step_is_one_graph_and_learns_the_same(mini, tmp_path, monkeypatch, method):
    """--compile: all of the step's forward is one graph, and each epoch's loss is the eager one's."""
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)    # needs no C++ compiler
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(rectify.shutil, "which", lambda name: name)
    eager, compiled = (learn(mini, tmp_path / str(c), method=method, compile=c) for c in (False, True))
    assert compiled == pytest.approx(eager, rel=1e-3) and len(eager) == 2


def test_a_compiled_student_learns_the_same(monkeypatch):
    """A step of the student, compiled or not, has the same losses."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    T = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    x, label = torch.rand(2, 3, 48, 48), torch.randint(5, (2, 48, 48))
    found, weights = [], {"mask": 1.0, "text": 0.5, "feature": 0.5}
    for compiled in (False, True):
        torch.manual_seed(1)
        net = distill.DeepLabV2("resnet18", T, scale=20.0, width=0.25).train()
        model, optimizer = rectify.in_step(net, CPU, compiled), torch.optim.SGD(net.parameters(), 0.1)
        f = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(2))
        found.append([distill.step(model, optimizer, x, label, f, weights) for _ in range(2)])
    for plain, same in zip(*found):
        assert plain.keys() == same.keys() == weights.keys()
        assert all(torch.allclose(plain[name], same[name], rtol=1e-3) for name in plain)


@pytest.mark.parametrize("script, options", [(rectify, []), (distill, ["--out"])])
def test_compile_wants_a_compiler(taught, tmp_path, monkeypatch, capsys, script, options):
    """--compile without one is refused in one line, before anything is computed."""
    monkeypatch.setattr(rectify.shutil, "which", lambda name: None)
    args = [*options, str(taught)] if options else ["--out", str(tmp_path)]
    with pytest.raises(UserError, match=r"--compile wants a C\+\+ compiler"):
        script.main([*args, "--compile"])


def test_bfloat16_moves_features_and_masks_but_little(mini):
    """--precision bf16: features turn by less than two degrees, and hardly a pixel of MaskCLIP's changes its class."""
    full, half = (rectify.Segmenter(complete(Config(precision=p, method="maskclip")), rectify.VOC_NAMES, CPU)
                  for p in ("auto", "bf16"))
    for _, images, _ in rectify.batches_of_one_size(rectify.list_samples(mini, "val"), 8):
        x = rectify.fit(images, (2048, 192))
        f, g = full.features(x), half.features(x)
        assert g.dtype == torch.float32 and not torch.equal(f, g)
        assert (f * g).sum(1).min() > 0.9994                                            # cos 2°
        same = rectify.predict(full, images)["maskclip"] == rectify.predict(half, images)["maskclip"]
        assert same.float().mean() > 0.98
        assert rectify.hypothesise(half, images).any(1).all()


def test_reading_ahead_keeps_the_order_and_its_bound():
    """Results come in order; no more than `ahead` are read before they are wanted; an error comes in its place."""
    lock, begun = threading.Lock(), []

    def read(k):
        with lock:
            begun.append(k)
        if k == 50:
            raise UserError("broken")
        return k * k

    stream, got = rectify.read_ahead(read, range(100), ahead=8), []
    with pytest.raises(UserError, match="broken"):
        for value in stream:
            got.append(value)
            assert len(begun) <= len(got) + 8
    assert got == [k * k for k in range(50)]


class Crossings(TorchDispatchMode):
    """Collects the operations in which host and GPU meet: copies between them, and values that the host asks for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        places = {t.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        if len(places) > 1 or function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.found.append(str(function))
        return result


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch does not know CUDA")
@pytest.mark.parametrize("method, prompt", [("reclip", "shared"), ("reclip", "per-class"), ("reclip++", "shared")])
def test_a_step_on_a_gpu_makes_nobody_wait(method, prompt):
    """Of a training step's forward and loss no tensor goes between host and GPU. Tensors without data stand for the GPU's."""
    segmenter = rectify.Segmenter(complete(Config(method=method, prompt=prompt)), rectify.VOC_NAMES, CPU)
    segmenter.rectifier.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda")
        weights = {name: on_gpu(t) for name, t in (*segmenter.named_parameters(), *segmenter.named_buffers())}
        segmenter.T, segmenter.tokens = on_gpu(segmenter.T), on_gpu(segmenter.tokens)
        x, y, valid = (on_gpu(torch.empty(shape, dtype=dtype)) for shape, dtype in (
            ((2, 9, segmenter.T.size(1), 12, 12), torch.half), ((9, 20), torch.bool), ((2, 9, 12, 12), torch.bool)))
        i, images = on_gpu(torch.empty(4, dtype=torch.long)), on_gpu(torch.empty(4, 3, 24, 24, dtype=torch.uint8))
        with Crossings() as crossings:
            rectify.normalise(segmenter.clip, images)   # as --finetune does in a step, and the student's teacher
            logits, f = torch.func.functional_call(segmenter, weights, (x[1, i],))
            M = rectify.gumbel_mask(logits, segmenter.cfg.alpha)
            loss = rectify.contrastive_loss(M, f, segmenter.T, y[i], segmenter.scale, valid[1, i], "grid")
        assert loss.is_cuda and not crossings.found
        with Crossings() as crossings:                  # the check itself: an index from the host is found
            x[1, torch.arange(4)]
        assert crossings.found


def test_distorted_colours_are_torchvisions():
    """The same draws give the same picture as torchvision's own transform, with and without changed channels."""
    image, changed = torch.randint(256, (3, 9, 11), dtype=torch.uint8), 0
    for seed in range(20):
        torch.manual_seed(seed)
        own = rectify.PhotometricDistort()(image)
        torch.manual_seed(seed)
        assert torch.equal(own, v2.RandomPhotometricDistort()(image))
        changed += not torch.equal(own, image)
    assert changed > 10


@pytest.mark.parametrize("script, name", [(rectify, "rectify.pt"), (distill, "student.pt")])
def test_what_was_trained_with_compile_needs_no_compiler_later(taught, tmp_path, monkeypatch, script, name):
    """--eval of such a checkpoint compiles nothing, and asks for no compiler."""
    for file in ("rectify.pt", "student.pt"):
        state = torch.load(taught / file, weights_only=True)
        state["config"]["compile"] = True
        torch.save(state, tmp_path / file)
    monkeypatch.setattr(rectify.shutil, "which", lambda program: None)
    script.main(["--eval", str(tmp_path / name), "--out", str(tmp_path)])
    assert (tmp_path / f"{script.__name__}.json").is_file()
