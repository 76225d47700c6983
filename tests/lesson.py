"""The tools of tutorial.ipynb: claims, pictures, measurements. Nothing of the method is in here.

    python tests/lesson.py --blank lesson.ipynb         # a copy without outputs and answers
"""
import ast
import contextlib
import inspect
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image, Markdown, display
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from PIL import Image as Photo

sys.path.append(str(Path(__file__).resolve().parents[1]))
import rectify  # noqa: E402
from rectify import VOID  # noqa: E402

plt.rcParams.update({
    "figure.constrained_layout.use": True, "font.size": 12, "axes.titlesize": 12,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
STROKE = [withStroke(linewidth=2.5, foreground="black")]
TITLES = {"maskclip": "MaskCLIP", "reclip": "ReCLIP", "reclip++": "ReCLIP++",
          "maskclip student": "MaskCLIP's\nstudent", "student": "ReCLIP's\nstudent"}

# ======================================================================= claims and what is printed
def shown(figure, alt):
    """Show a figure as a small PNG of 255 colours, VOC's as they are. No panel may be empty."""
    for axis in figure.axes:
        assert np.isfinite(axis.dataLim.get_points()).all(), f"empty panel: {axis.get_title()}"
    figure.savefig(png := io.BytesIO(), format="png", dpi=90)
    full = Photo.open(png).convert("RGB")
    few, exact = full.quantize(255 - 21), rectify.palette()[:63]            # 0 and 20 classes
    index, colours = np.array(few), few.getpalette()[:3 * (255 - 21)]
    colours += [255] * (3 * (255 - 21) - len(colours)) + exact
    for c in range(21):                                 # what is drawn in VOC's colour keeps it
        index[(np.array(full) == exact[3 * c:3 * c + 3]).all(-1)] = 255 - 21 + c
    small = Photo.fromarray(index)
    small.putpalette(colours)
    small.save(png := io.BytesIO(), "PNG", optimize=True)
    display(Image(png.getvalue(), alt=alt))
    plt.close(figure)

def here(text, *claims, figure=None):
    """The pictures of a cell, and below them what they show; stops where a claim is false."""
    assert all(claims), f"not true any more: {text}"
    for drawn in [figure] if figure else map(plt.figure, plt.get_fignums()):
        shown(drawn, text)
    display(Markdown(f"**Here:** {text}"))

def by_hand(what, value, expected):
    """A computed value beside one worked out with pencil and paper; stops where they differ."""
    value, expected = (torch.as_tensor(v).float().flatten().cpu() for v in (value, expected))
    told = [", ".join(f"{x:.4f}" for x in v.tolist()) for v in (value, expected)]
    print(f"{what}: {told[0]}; by hand: {told[1]}")
    assert torch.allclose(value, expected, atol=2e-3), what

def show(*functions):
    """The source of functions of the scripts; a long one is folded."""
    for function in functions:
        source, name = inspect.getsource(function), f"{function.__module__}.{function.__qualname__}"
        code = f"\n\n```python\n{source}```\n"
        if source.count("\n") > 16:
            code = f"<details><summary>source of <code>{name}</code></summary>{code}\n</details>"
        display(Markdown(code))

def quietly(call, *arguments):
    """The call's result, without its prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*arguments)

def logged(folder, stage, key):
    """A number of every epoch, from the log that rectify.py or distill.py wrote."""
    return [json.loads(line)[key] for line in open(Path(folder) / f"{stage}.jsonl")]

def verdict(difference, noise):
    """The one rule: a gain or a loss is more than the noise, twice the standard error."""
    return "a gain" if difference > noise else "a loss" if difference < -noise else "noise"

# ========================================================================================= pictures
KIND = {"frozen": dict(facecolor="#a9c8ea"), "learned": dict(facecolor="#f5a34b", hatch="///"),
        "data": dict(facecolor="#e4e4e4"), "step": dict(facecolor="white")}
BOXES = {                                               # name: column, row, text, kind
    "image": (0, 3, "image", "data"), "names": (0, 2, "class names", "data"),
    "prompt": (0, 1, "prompt v", "learned"), "PE": (0, 0, "places PE", "frozen"),
    "f": (1.5, 3, "image tower\n→ f", "frozen"), "T": (1.5, 2, "text tower\n→ T", "frozen"),
    "R": (1.5, 1, "text tower\n→ R", "frozen"), "P": (1.5, 0, "g → P", "learned"),
    "fT": (3, 2.4, "f·Tᵀ", "step"), "B": (3, 0.5, "bias B\nf·Rᵀ + P", "step"),
    "minus": (4.2, 1.5, "f·Tᵀ − B", "step"), "M": (5.5, 1.5, "Gumbel\n→ mask M", "step"),
    "y": (3, 4, "hypothesis y", "frozen"), "loss": (6.9, 2.7, "loss", "step"),
    "again": (5.5, -0.1, "image", "data"), "student": (6.9, 0.3, "student u", "learned")}
ARROWS = {                                              # "from to": the points, where it is bent
    **dict.fromkeys(["image f", "names T", "prompt R", "names R", "PE P", "f fT", "T fT", "f B",
                     "R B", "P B", "fT minus", "B minus", "minus M", "M loss", "again student"]),
    "f loss": [(2.45, 3.5), (6.9, 3.3)], "T loss": [(2.45, 2.1), (6.9, 2.9)],
    "y loss": [(3.95, 4.3), (6.9, 3.4)], "T y": [(2.45, 2.6), (3.25, 4)],
    "image y": [(0.5, 3.72), (3, 4.4)], "minus student": [(4.8, 1.5), (6.9, 0.8)]}
BACK = [(7.85, 3.06), (8.05, 3.06), (8.05, -0.45), (-0.2, -0.45), (-0.2, 1.36), (0, 1.36)]

def pipeline(*lit, plus=False):
    """The method as boxes, with plus that of ReCLIP++; the boxes `lit` in full colour, or all."""
    boxes, arrows = dict(BOXES), dict(ARROWS)
    if plus:
        boxes |= {"B": (3, 0.5, "bias B\nP·Rᵀ", "step"), "M": (6.9, 1.5, "Gumbel → M", "step"),
                  "decoder": (5.5, 1.5, "decoder\n5×5", "learned")}
        arrows |= {"minus decoder": None, "decoder M": None, "M loss": [(7.4, 2.22), (7.4, 2.7)],
                   "f decoder": [(2.45, 3.4), (5.97, 3.4), (5.97, 2.22)]}
        for gone in ("f B", "minus M", "minus student", "again student", "student", "again"):
            (arrows if " " in gone else boxes).pop(gone)
    (figure, axis), lines = plt.subplots(figsize=(11, 4.2)), []
    for name, (x, y, text, kind) in boxes.items():
        style = dict(alpha=1 if name in lit or not lit else 0.25, linewidth=1 + 2 * (name in lit))
        axis.add_patch(plt.Rectangle((x, y), 0.95, 0.72, edgecolor="black", **KIND[kind], **style))
        back = dict(facecolor="white", edgecolor="none", pad=0.5) if kind == "learned" else None
        axis.text(x + 0.475, y + 0.36, text, ha="center", va="center", fontsize=10, bbox=back)
    for pair, points in arrows.items():
        (x, y, *_), (u, v, *_) = (boxes[name] for name in pair.split())
        color = "black" if not lit or {*pair.split()} <= {*lit} else "0.75"
        lines.append((points or [(x + 0.95, y + 0.36), (u, v + 0.36)], color, "-"))
    color = "firebrick" if "loss" in lit or not lit else "#dbb"
    lines += [(BACK, color, "--"), ([(1.97, -0.45), (1.97, 0)], color, "--")]
    for points, color, dash in lines:
        axis.plot(*zip(*points[:-1]), color=color, linestyle=dash, zorder=0)
        axis.annotate("", points[-1], points[-2], zorder=0, arrowprops=dict(
            arrowstyle="->", color=color, linestyle=dash, shrinkA=0, shrinkB=0))
    axis.text(4.2, -0.38, "gradient", color=color, ha="center", fontsize=10)
    axis.set(xlim=(-0.3, 8.15), ylim=(-0.6, 4.85))
    axis.axis("off")
    handles = [Patch(edgecolor="black", label=kind, **style) for kind, style in KIND.items()]
    axis.legend(handles=handles, loc="upper right", ncols=2)
    shown(figure, "the method as boxes; lit: " + (", ".join(lit) or "all"))

def picture(axis, image, title=""):
    """An image 3×H×W uint8."""
    axis.imshow(image.permute(1, 2, 0))
    axis.set(title=title, xticks=[], yticks=[], frame_on=False)

# ===================================================================================== measurements
mean_iou = lambda table: rectify.iou(table).nanmean().item()                # C×C, percent

class Bench:
    """Labelled images, seen once by CLIP, and what is measured of each method on them."""

    @torch.no_grad()
    def __init__(self, segmenter, samples):
        self.names, self.C, self.T = segmenter.names, len(segmenter.names), segmenter.T
        self.patch, self.seen = segmenter.clip.visual.patch_size[0], []     # (names, H W, size, f)
        self.images, self.truth, self.sample = {}, {}, {s.name: s for s in samples}
        self.masks, self.counts, self.matrix, self.mIoU, self.things = {}, {}, {}, {}, {}
        read = lambda sample: rectify.read_pair(sample, self.names, 1)
        for batch, pairs in rectify.batches_of_one_size(samples, read, "reading"):
            images, labels = map(torch.stack, zip(*pairs))                  # B 3 H W, B H W
            x = rectify.resize_to_fit(images, segmenter.cfg.size)
            some, shape = [samples[n].name for n in batch], (x.shape[-2:], labels.shape[-2:])
            self.seen.append((some, shape, segmenter.features(x).half()))
            self.images |= zip(some, images)
            self.truth |= zip(some, labels)
        self.keep("maskclip", self.predict(lambda f: rectify.similarity(f, self.T)))

    @torch.no_grad()
    def predict(self, logits_of, parts=None):
        """{image: mask} of a trained Segmenter, or of logits_of(f); parts: some of `seen`."""
        if isinstance(logits_of, rectify.Segmenter):
            logits_of = lambda f, model=logits_of, R=logits_of.reference(): model.rectified(f, R)
        made = {}
        for some, sizes, f in parts or self.seen:
            logits = logits_of(f.float())
            made |= zip(some, rectify.decide(logits, self.patch, *sizes, self.C).cpu())
        return made

    def count(self, made):
        """The confusion matrix of each image of {image: mask}: N×C×C."""
        return torch.stack([rectify.confusion(self.truth[n], m, self.C) for n, m in made.items()])

    def keep(self, method, made):
        """Keep and measure a method's masks {image: mask}."""
        self.masks[method], self.counts[method] = made, self.count(made)
        self.matrix[method] = self.counts[method].sum(0)                    # C C
        self.mIoU[method] = mean_iou(self.matrix[method])
        self.things[method] = [thing for n, mask in made.items() for thing in rectify.objects(
            self.truth[n], mask, self.sample[n], self.C)]

    def noise(self, of, seeds=0.0):
        """Twice the standard error of of(images drawn anew); seeds: what another seed adds."""
        draw, N = np.random.default_rng(0), len(self.truth)
        found = [of(draw.integers(N, size=N)) for _ in range(200)]
        return 2 * (np.var(found, ddof=1) + seeds ** 2) ** 0.5

    def gain(self, before, after, of=mean_iou, seeds=0.0):
        """(By how much a number of the confusion matrix is larger after than before; its noise)."""
        by = lambda n: of(self.counts[after][n].sum(0)) - of(self.counts[before][n].sum(0))
        return by(range(len(self.truth))), self.noise(by, seeds)

    def right(self, method, n):
        """The percentage of an image's scored pixels that a method has right."""
        hit = (self.masks[method][n] == self.truth[n])[self.truth[n] != VOID]
        return 100 * hit.float().mean().item()

    def legend(self, figure, *masks):
        """The colours of the classes in these masks, VOC's own, below the figure."""
        classes = sorted({*torch.cat([mask.flatten() for mask in masks]).tolist()} - {VOID})
        handles = [Patch(facecolor=[v / 255 for v in rectify.colour(c)], edgecolor="black",
                         label=self.names[c]) for c in classes]
        columns = max(1, min(len(handles), int(figure.get_figwidth() / 1.8)))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)

    def panel(self, axis, mask, label=None, title=""):
        """A mask in the classes' colours, pale where nothing is scored, names on large parts."""
        label, (H, W), free = mask if label is None else label, mask.shape, []
        axis.imshow(rectify.paint(mask, self.names, (label == VOID) & (mask != VOID)))
        axis.set(title=title, xticks=[], yticks=[], frame_on=False)
        scored = torch.where(label == VOID, VOID, mask.long())
        for c, n in Counter(scored[scored != VOID].tolist()).most_common(3):
            y, x = (scored == c).nonzero()[n // 2].tolist()                 # a pixel of its middle
            if n > 0.12 * (label != VOID).sum() and all(abs(y - v) > 0.14 * H for v in free):
                free.append(y)
                edge = min(0.5, 0.05 + 0.032 * len(self.names[c])) * W      # no name leaves
                axis.text(min(max(x, edge), W - edge), y, self.names[c], color="white", fontsize=10,
                          ha="center", va="center", path_effects=STROKE)

    def compare(self, rows, *methods):
        """A row for each image: itself, its ground truth, and the masks of the methods."""
        size = (min(11, 3 * (2 + len(methods))), 2 * len(rows) + 0.6)
        figure, axes = plt.subplots(len(rows), 2 + len(methods), figsize=size, squeeze=False)
        for row, n in zip(axes, rows):
            picture(row[0], self.images[n], "image")
            self.panel(row[1], self.truth[n], title="ground truth")
            for axis, m in zip(row[2:], methods):
                self.panel(axis, self.masks[m][n], self.truth[n], TITLES[m].replace("\n", " "))
        self.legend(figure, *(of[n][self.truth[n] != VOID] for n in rows
                              for of in [self.truth, *(self.masks[m] for m in methods)]))

# ========================================================================== a copy to be filled in
def blank(notebook):
    """Take the outputs and answers out of a notebook; of a solution its head stays."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\n*<details>.*?</details>", "", cell.source, flags=re.DOTALL)
        else:
            cell.outputs, cell.execution_count = [], None
        if "solution" in cell.metadata.get("tags", []):
            function = ast.parse(cell.source).body[0]
            head = cell.source.splitlines()[:function.body[0].end_lineno]   # def and docstring
            cell.source = "\n".join([*head, "    raise NotImplementedError  # your lines"])
            cell.metadata = {"tags": ["solution"]}
    return notebook

if __name__ == "__main__":
    import nbformat
    if len(sys.argv) != 3 or sys.argv[1] != "--blank":
        sys.exit(__doc__)
    nbformat.write(blank(nbformat.read(rectify.HERE / "tutorial.ipynb", 4)), sys.argv[2])
