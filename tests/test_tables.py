"""tables.py measures what it names and puts the published numbers beside it: smoke tests on 24 pictures."""
import rectify
import tables


def test_a_table_is_measured_and_appended(emoji, tmp_path, monkeypatch, capsys):
    """Rows in their order, means over the seeds; a second run is appended. One view serves all variants of a seed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(emoji)
    listed, computed, features = rectify.list_samples, [], rectify.training_data
    monkeypatch.setattr(rectify, "list_samples", lambda folder, split: listed(folder, split)[:24])
    monkeypatch.setattr(rectify, "training_data", lambda *args: computed.append(1) or features(*args))
    monkeypatch.setitem(tables.VARIANTS, "main", lambda dataset: {
        "ReCLIP": dict(method="reclip", epochs=1, views=1), "ReCLIP++": dict(method="reclip++", epochs=1, views=1)})
    monkeypatch.setitem(tables.PUBLISHED, ("main", "emoji", ""), {"ReCLIP++": 12.3})
    for _ in range(2):
        tables.main(["main", "--seeds", "0", "1"])
    text = (tmp_path / "runs/tables.md").read_text()
    assert len(computed) == 4 and text.count("### main emoji, seeds 0 1") == 2
    assert capsys.readouterr().out.count("seed 1, ReCLIP++: mIoU") == 2
    first, second = (part.strip().splitlines()[2:] for part in text.split("###")[1:])
    assert first == second, "the same seeds, the same numbers"
    assert first[0] == "|  | mIoU | gain over MaskCLIP | precision of y | recall of y | published |"
    assert first[2].startswith("| ReCLIP |") and first[2].endswith("| - |") and "±" in first[2]
    assert first[3].startswith("| ReCLIP++ |") and first[3].endswith("| 12.3 |")


def test_published_numbers_stand_beside_rows_that_exist():
    """Every published row is a row of its table, but other methods' masks, which the user brings."""
    for (table, dataset, recipe), published in tables.PUBLISHED.items():
        assert set(published) <= set(tables.rows_of(table, dataset, recipe, ["masks/CLIPpy", "masks/ReCo"])), (table, dataset)
