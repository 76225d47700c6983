"""What only a GPU can say, as JSON: python tests/probe.py FOLDER [cuda or cpu]; see tests/gpu.sh.

FOLDER/run holds a run of rectify.py and its student. Each part writes FOLDER/probe.json anew, so
that a time limit loses nothing.
"""
import contextlib
import json
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import rectify  # noqa: E402  (after the path to it, and before torch)
import bench  # noqa: E402
import distill  # noqa: E402
import torch  # noqa: E402

OUT, DEVICE = Path(sys.argv[1]), (sys.argv[2:] or ["cuda"])[0]
GPU, found = DEVICE == "cuda", {}
REPEATS = 20 if GPU else 2
wait = torch.cuda.synchronize if GPU else lambda: None

def part(function):
    """Run a part of the probe, keep what it returns or why it fails, and write all to the file."""
    started = time.perf_counter()
    try:
        result = function()
    except Exception:
        result = traceback.format_exc().splitlines()[-6:]
    found[function.__name__] = {"result": result, "seconds": time.perf_counter() - started}
    rectify.write(OUT / "probe.json", json.dumps(found, indent=1, default=str))
    print(function.__name__, result, flush=True)

def seconds(work):
    """The mean of REPEATS calls after one."""
    work(), wait()
    started = time.perf_counter()
    for _ in range(REPEATS):
        work()
    wait()
    return (time.perf_counter() - started) / REPEATS

def at_true_size(dataset, method="reclip++"):
    """(Segmenter with random weights, data of an epoch of two steps); on a CPU the tiny world's."""
    options = dict(dataset=dataset, pretrained=WEIGHTS) if GPU else dict(dataset="emoji")
    cfg = rectify.configure(method=method, device=DEVICE, out=str(OUT / "true"), **options)
    segmenter = rectify.Segmenter(cfg, rectify.class_names(cfg)[0])
    return segmenter, bench.make_features(segmenter, 2 * cfg.batch, cfg.crop)

def optimizer_step(segmenter, data):
    """A function that does one step of training on its own small batch."""
    optimizer, (x, valid, y) = rectify.make_optimizer(segmenter), data
    i = torch.arange(segmenter.cfg.batch, device=x.device)
    segmenter.rectifier.train()

    def step():
        logits, f = segmenter(x[0, i])
        z = rectify.pool(rectify.gumbel_mask(logits, segmenter.cfg.alpha), f, valid[0, i])
        optimizer.zero_grad()
        rectify.contrastive_loss(z, segmenter.T, y[i], segmenter.scale).backward()
        optimizer.step()

    return step

def student_step():
    """A step of the run's student, with the batch made anew."""
    state = rectify.load(OUT / "run/rectify.pt")
    cfg = rectify.configure(state["config"], device=DEVICE)
    segmenter = rectify.Segmenter(cfg, state["names"], state["background"], state)
    samples = rectify.splits(rectify.dataset_folder(cfg))[0][:64]
    course = distill.configure(cfg)
    labeller = distill.Labeller(segmenter, course)
    labeller.see_all(samples)
    student = distill.DeepLabV2(course, segmenter.T, None, segmenter.scale).to(DEVICE).train()
    optimizer = distill.make_optimizer(student, course)
    kept = {"names": segmenter.names, "background": []}
    batch = [distill.read_example(samples[k], k, course, kept) for k in range(course.batch)]
    weights = {"mask": 1.0, "feature": 0.5, "text": 0.5}
    return lambda: distill.step(student, optimizer, *distill.training_batch(
        student, labeller, batch, course), weights)

def waits_and_busy_share():
    """Of a step of each script: warnings of torch's sync debug mode; the GPU's busy share."""
    result = {}
    for name, step in (("rectify", optimizer_step(*at_true_size("voc"))),
                       ("distill", student_step())):
        step(), wait()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn") if GPU else None
            step()
            torch.cuda.set_sync_debug_mode("default") if GPU else None
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * GPU
        each = seconds(step)
        with torch.profiler.profile(activities=kinds) as profile:
            for _ in range(REPEATS):
                step()
            wait()
        busy = sum(event.self_device_time_total for event in profile.key_averages())
        result[name] = {"waits": [f"{w.filename}:{w.lineno}: {w.message}" for w in seen],
                        "step, s": each, "GPU busy, share": busy / 1e6 / REPEATS / each}
    return result

def cudnn_attention():
    """Seconds of MaskCLIP on images of forty sizes, with cuDNN's attention and without."""
    segmenter, result = at_true_size("voc")[0], {}
    for on in (False, True) if GPU else (False,):
        torch.backends.cuda.enable_cudnn_sdp(on)
        predict, started = rectify.predictor(segmenter), time.perf_counter()
        for k in range(40 if GPU else 1):
            predict(bench.noise(1, 3, 375 + 2 * k, 500 - 3 * k))
        wait()
        result["with" if on else "without"] = time.perf_counter() - started
    torch.backends.cuda.enable_cudnn_sdp(False)
    return result

def graphed_reference():
    """reference() as a CUDA graph against eager: seconds of forward and backward, gradients."""
    result = {}
    for dataset in ("voc", "ade"):
        segmenter = at_true_size(dataset)[0]
        V, tokens = segmenter.rectifier.V, segmenter.tokens
        eager = lambda V: rectify.reference_features(segmenter.clip, V, tokens)
        graphed = torch.cuda.make_graphed_callables(eager, (V.detach().requires_grad_(),))
        grads = [torch.autograd.grad(f(V).square().sum(), V)[0] for f in (eager, graphed)]
        both = lambda f: lambda: torch.autograd.grad(f(V).square().sum(), V)
        result[dataset] = {"eager, s": seconds(both(eager)), "graphed, s": seconds(both(graphed)),
                           "largest difference of gradients": (grads[0] - grads[1]).abs().max(),
                           "largest gradient": grads[0].abs().max()}
    return result

def peak_memory():
    """GB at the peak of a step of training and of a prediction; REALITY.md has the estimates."""
    result = {}
    for dataset in ("voc", "ade"):
        segmenter, data = at_true_size(dataset)
        step, predict = optimizer_step(segmenter, data), rectify.predictor(segmenter)
        image = bench.noise(1, 3, 375, 500)
        for name, work in (("step", step), ("prediction", lambda: predict(image))):
            torch.cuda.reset_peak_memory_stats()
            work()
            result[f"{dataset}, {name}"] = torch.cuda.max_memory_allocated() / 1e9
    return result

def cpu_and_gpu_agree():
    """The share of pixels that a student labels alike on both; naclip's error against float64."""
    state = rectify.load(OUT / "run/student.pt", "student")
    cfg = distill.Config(**state["config"])
    images, C = bench.noise(8, 3, 96, 96), len(state["names"])
    masks = [distill.predict_student(distill.load_student(state, place), images, cfg, C).cpu()
             for place in ("cpu", DEVICE)]
    clip, _ = rectify.load_clip(rectify.configure(), torch.device(DEVICE))
    block = clip.visual.transformer.resblocks[-1]
    x = torch.randn(1, 1 + 32 * 43, clip.visual.conv1.out_channels, device=DEVICE)
    out = rectify.attention_block(block, x, (32, 43), "naclip")
    exact = rectify.attention_block(block.double(), x.double(), (32, 43), "naclip")
    return {"pixels alike": (masks[0] == masks[1]).float().mean().item(),
            "naclip, largest error of the largest value": (
                (out - exact).abs().max() / exact.abs().max()).item()}

def resumed_from_the_cpu():
    """A distillation that was interrupted on the CPU goes on here; its losses by epoch."""
    out = OUT / "resumed"
    out.mkdir(exist_ok=True)
    shutil.copy(OUT / "run/rectify.pt", out)
    end, options = distill.end_epoch, ["--out", str(out), "--epochs", "2"]

    def stop(*args):
        end(*args)
        raise KeyboardInterrupt

    with mock.patch.object(distill, "end_epoch", stop), contextlib.suppress(KeyboardInterrupt):
        distill.main([*options, "--device", "cpu"])
    distill.main([*options, "--device", DEVICE, "--resume"])
    return [json.loads(line)["loss"] for line in (out / "distill.jsonl").read_text().splitlines()]

(OUT / "true").mkdir(parents=True, exist_ok=True)
WEIGHTS = GPU and bench.make_world(OUT / "true", 0)
part(cpu_and_gpu_agree)
part(waits_and_busy_share)
if GPU:
    part(peak_memory)
    part(graphed_reference)
part(cudnn_attention)
part(resumed_from_the_cpu)
