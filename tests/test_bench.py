"""bench.py measures what it says: a smoke test with the smallest sizes, of its rows and not of its
times.
"""
import json
import math

import bench
import rectify
import torch

ROWS = ["dense CLIP against open_clip's forward", "epoch of 4 images, cached features",
        "epoch that augments and recomputes them", "epoch of the authors' recipe",
        "cached epoch against the authors' recipe", "200 cached epochs", "teacher, of that step",
        "cached epoch, growth with images", "cached epoch, growth with classes",
        "cached epoch, growth with side", "dense CLIP, growth with side",
        "peak memory of the process"]


def test_bench_prints_a_table_and_writes_it(emoji, tmp_path, monkeypatch, capsys):
    """Every row with a number, on the screen and in bench.json; what is not measured says so; a
    target is met or missed.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(emoji)
    monkeypatch.setattr(rectify, "pick_device", lambda cfg: torch.device("cpu"))
    monkeypatch.setitem(bench.SIZES, "cpu", dict(
        images=4, batch=2, steps=2, repeats=1, base=dict(images=2, classes=3, side=24),
        grow=dict(images=(2, 4), classes=(3, 6), side=(24, 48))))
    bench.main(["--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out/bench.json").read_text())
    rows = {row["what"]: row for row in report["rows"]}
    assert set(ROWS) <= rows.keys() and len(rows) == len(report["rows"])
    for what, row in rows.items():
        assert math.isfinite(row["value"])
        assert row["how"].split(":")[0] in ("measured", "projected", "fitted")
        assert f"\n{what} " in printed
    assert rows["200 cached epochs"]["how"].startswith("projected")
    assert {what for what, row in rows.items() if "met" in row} == bench.TARGETS["cpu"].keys()
    assert report["versions"]["torch"] == torch.__version__


def test_a_quarter_of_emoji_voc(emoji, tmp_path, monkeypatch):
    """What `bench.py busy` runs on: 300 training and 100 validation images, all 20 classes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(emoji)
    options = bench.quarter(tmp_path / "small")
    cfg = rectify.configure(**rectify.command_line(rectify.Config, "", rectify.RECIPES, options))
    train, val = rectify.splits(rectify.dataset_folder(cfg))
    assert (len(train), len(val)) == (300, 100) and rectify.class_names(cfg) == rectify.VOC_NAMES
