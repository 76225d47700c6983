"""tables.py measures what it names and puts the published numbers beside it: smoke tests on 24
images.
"""
import re
import shutil

import pytest
import rectify
import tables


@pytest.fixture
def few(emoji, tmp_path, monkeypatch):
    """A folder to run tables.py in, where Emoji VOC has 24 images to learn from and 8 others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(emoji)
    listed = rectify.list_samples
    monkeypatch.setattr(rectify, "list_samples", lambda folder, split: listed(
        folder, split)[:24 if split == "train" else 8])
    return tmp_path


def test_a_table_is_measured_and_appended(few, monkeypatch, capsys):
    """Rows in their order, means over the seeds; a second run is appended. One view serves all
    variants of a seed.
    """
    computed, features = [], rectify.training_data
    monkeypatch.setattr(rectify, "training_data",
                        lambda *args: computed.append(1) or features(*args))
    monkeypatch.setitem(tables.VARIANTS, "main", lambda dataset: {
        "ReCLIP": dict(method="reclip", epochs=1, views=1),
        "ReCLIP++": dict(method="reclip++", epochs=1, views=1)})
    monkeypatch.setitem(tables.PUBLISHED, ("main", "emoji", ""), {"ReCLIP++": 12.3})
    for _ in range(2):
        tables.main(["main", "--seeds", "0", "1"])
    text = (few / "runs/tables.md").read_text()
    assert len(computed) == 4 and text.count("### main emoji, seeds 0 1") == 2
    assert capsys.readouterr().out.count("seed 1, ReCLIP++: mIoU") == 2
    first, second = (part.strip().splitlines()[2:] for part in text.split("###")[1:])
    assert first == second, "the same seeds, the same numbers"
    assert first[0] == ("|  | mIoU | gain over MaskCLIP | precision of y | recall of y "
                        "| published |")
    assert first[2].startswith("| ReCLIP |") and first[2].endswith("| - |") and "±" in first[2]
    assert first[3].startswith("| ReCLIP++ |") and first[3].endswith("| 12.3 |")


def test_a_run_of_an_earlier_recipe_is_refused(few, taught):
    """A kept run is measured again only where it was trained as today's recipe says."""
    out = few / "runs/table11/emoji-reclip++-0"
    shutil.copytree(taught, out)
    with pytest.raises(rectify.UserError, match=r"emoji-reclip\+\+-0: is not of today's recipe"):
        tables.trained("emoji", "", "reclip++", 0)


def test_published_numbers_stand_beside_rows_that_exist():
    """Every published row is a row of its table, but masks of other methods, which users bring."""
    for (table, dataset, recipe), published in tables.PUBLISHED.items():
        rows = tables.rows_of(table, dataset, recipe, ["masks/CLIPpy", "masks/ReCo"])
        assert set(published) <= set(rows), (table, dataset)


def test_published_settings_are_vocs_row(few, monkeypatch, capsys):
    """published: VOC's row but for what its CLIP decides, measured on the way in the very run that
    measures the end; Emoji VOC's own recipe beside it. Seed 0 unless others are given.
    """
    voc = rectify.RECIPES["voc"]
    for method in ("reclip", "reclip++"):
        cfg = rectify.configure(dataset="emoji", **tables.published(method))
        assert (cfg.method, cfg.alpha, cfg.epochs) == (method, voc[method]["alpha"], 200)
        assert all(getattr(cfg, name) == voc[name] for name in tables.LEARNING)
        assert (cfg.hypothesis, cfg.denoise) == ("softmax", 0)
    monkeypatch.setitem(tables.VARIANTS, "published", lambda dataset: {
        "short": dict(method="reclip", epochs=1, views=1),
        "long": tables.published("reclip") | dict(epochs=3, views=1)})
    monkeypatch.setattr(tables, "MARKS", (2, 3))
    tables.main(["published"])
    line, = re.findall("seed 0, long: (.*)", capsys.readouterr().out)
    found = dict(cell.rsplit(" ", 1) for cell in line.split(", "))
    assert found["mIoU"] == found["after epoch 3"] != found["after epoch 2"]
    text = (few / "runs/tables.md").read_text()
    assert "### published emoji, seeds 0\n" in text
    assert re.search(r"^\| short \|.*\|  \|  \|$", text, re.M), "one epoch, so nothing after two"
    with pytest.raises(rectify.UserError, match="are Emoji VOC's"):
        tables.main(["published", "--dataset", "voc"])
