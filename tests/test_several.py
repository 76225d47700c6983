"""Several processes under torchrun are one run: the same weights as a single process, one voice,
one set of files.
"""
import json
import os
import shutil
import subprocess
import sys

import rectify
import torch

WITHOUT_NOISE = f"""
import sys
sys.path.insert(0, {str(rectify.HERE)!r})
import rectify, torch

def hard(logits, alpha):
    soft = (alpha * logits).softmax(1)
    return torch.zeros_like(soft).scatter(1, soft.argmax(1, keepdim=True), 1) - soft.detach() + soft

rectify.gumbel_mask = hard
rectify.run(rectify.main)
"""


def start(script, *args, processes=1, fails=False):
    """Run a script in so many processes, one thread each; what it printed, or, where it is to fail,
    what it complained of.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun * (processes > 1), str(script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


def test_two_processes_learn_what_one_learns(mini, tmp_path):
    """ReCLIP without Gumbel's noise, with a batch of 3 (unequal shares, sometimes none): weights
    and log are those of one process.
    """
    script, weights, logs = tmp_path / "go.py", [], []
    script.write_text(WITHOUT_NOISE)
    for processes in (1, 2):
        out = tmp_path / str(processes)
        printed = start(script, "--dataset", "emoji", "--data", mini, "--names", mini / "names.txt",
                        "--method", "reclip", "--optimizer", "sgd", "--lr", 0.01, "--lr-conv", 0.01,
                        "--epochs", 3, "--views", 2, "--batch", 3, "--precision", "fp32",
                        "--out", out, processes=processes)
        assert printed.count("mIoU") == 1 and ("2 processes" in printed) == (processes == 2)
        weights.append(torch.load(out / "rectify.pt", weights_only=True)["rectifier"])
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        logs.append(torch.tensor([[line["loss"], line["agreement"]] for line in lines]))
    assert len(logs[0]) == 3 and torch.allclose(*logs, rtol=1e-4)
    for name, w in weights[0].items():
        assert torch.allclose(w.float(), weights[1][name].float(), rtol=1e-3, atol=1e-5), name


TELL_WEIGHTS = f"""
import sys
sys.path.insert(0, {str(rectify.HERE)!r})
import distill, torch

def train(student, *args):
    learn(student, *args)
    sums = [None] * distill.WORLD
    own = [p.double().sum().item() for p in student.parameters()]
    torch.distributed.all_gather_object(sums, own)
    print("equal" if sums[0] == sums[1] else "apart")

learn, distill.train = distill.train, train
distill.run(distill.main)
"""


def test_two_processes_teach_one_student(taught, tmp_path):
    """distill.py under torchrun: to the bit the same weights in both processes, losses that fall,
    one table.
    """
    out, script = tmp_path / "out", tmp_path / "go.py"
    out.mkdir()
    script.write_text(TELL_WEIGHTS)
    (out / "rectify.pt").write_bytes((taught / "rectify.pt").read_bytes())
    printed = start(script, "--out", out, "--epochs", 6, "--batch", 5, processes=2)
    log = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert "equal" in printed and printed.count("mIoU") == 1 and len(log) == 6 and log[-1] < log[0]
    assert torch.load(out / "student.pt", weights_only=True)["mIoU"] > 0
    assert not (out / "distill.partial.pt").exists()


def test_an_error_in_one_process_ends_all(mini, tmp_path):
    """One of two processes meets a broken image: its line is shown, and the other does not wait for
    it for ever.
    """
    folder = shutil.copytree(mini, tmp_path / "mini")
    broken = folder / f"JPEGImages/{rectify.list_samples(mini, 'train')[1].name}.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    done = start(rectify.__file__, "--dataset", "emoji", "--data", folder, "--names",
                 folder / "names.txt", "--epochs", 1, "--out", tmp_path / "out", processes=2,
                 fails=True)
    assert done.count(f"{broken}: not a readable image") == 1
    assert not (tmp_path / "out/rectify.pt").exists()
