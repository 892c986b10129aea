import numpy as np
import pandas as pd
import pytest

from lib import data, database, loading, papers, profiles, splits


def sides(index, **selection):
    table = splits.by_image(data.select(index, **selection), seed=3)
    counts = table.groupby(["label", "split"]).size()
    return {label: tuple(counts[label][["train", "validation", "test"]]) for label in data.CLASSES}


def check_both_papers(index):
    assert len(index) == 7909
    for name, paper in {"li2023": papers.LI, "alam2023": papers.ALAM}.items():
        profile = profiles.load(name)
        selection = {key: profile[key] for key in ("magnifications", "subtypes")}
        assert sides(index, **selection) == papers.PUBLISHED_SPLITS[paper]


def test_both_papers_split_tables_from_the_published_counts(published):
    check_both_papers(published)


def test_both_papers_split_tables_on_the_real_names(listing):
    names = listing["file"]
    index = pd.DataFrame([data.parse_name(name) for name in names])
    check_both_papers(index)
    counts = index.groupby(["subtype", "magnification"]).size()
    assert {subtype: tuple(counts[subtype]) for subtype in database.COUNTS} == database.COUNTS


@pytest.mark.parametrize("cases", [6, 20])
def test_cases_of_both_classes_are_split_whole(cases):
    """Every patient has an image of each class: in folds and in one split alike."""
    case = np.repeat([f"p{k}" for k in range(cases)], 2)
    index = pd.DataFrame({"case": case, "label": ["benign", "malignant"] * cases, "image": range(2 * cases)})
    index = index.assign(magnification=100)
    for _, rows in splits.by_case(index, seed=0).groupby("fold"):
        assert rows.groupby("case")["split"].nunique().max() == 1
        assert rows.groupby("split")["label"].nunique().tolist() == [2, 2, 2]


@pytest.mark.parametrize("cases", [6, 14, 16])
def test_no_case_on_two_sides(published, cases):
    """Six or fourteen cases in a class give five folds, sixteen one split; each image is tested once."""
    number = published["image"].str.extract(r"-(\d+)\.png")[0].astype(int)
    index = published.assign(case=published["label"].str[:1] + (number % cases).astype(str))
    table = splits.by_case(index, seed=1)
    assert sorted(table["fold"].unique()) == (list(range(5)) if cases < 15 else [0])
    for _, rows in table.groupby("fold"):
        assert rows.groupby("case")["split"].nunique().max() == 1
        assert (rows.groupby(["split", "label"]).size() > 0).sum() == 6
    if cases < 15:
        assert sorted(table.loc[table["split"] == "test", "image"]) == sorted(index["image"])


@pytest.mark.parametrize("folds", [2, 5])
def test_in_folds_by_case_every_image_is_tested_once_however_many_cases_there_are(published, folds):
    index = data.select(published, magnifications=[100])
    index = index.assign(case=index["label"] + (index.index % 20).astype(str))
    table = splits.by_case(index, seed=0, folds=folds)
    assert sorted(table["fold"].unique()) == list(range(folds))
    assert sorted(table.loc[table["split"] == "test", "image"]) == sorted(index["image"])
    for _, rows in table.groupby("fold"):
        assert rows.groupby("case")["split"].nunique().max() == 1


def test_in_folds_by_image_every_image_is_tested_once(published):
    table = splits.by_image(published, seed=2, folds=5)
    assert sorted(table.loc[table["split"] == "test", "image"]) == sorted(published["image"])
    counts = published["label"].value_counts().sort_index()
    for _, rows in table.groupby("fold"):
        assert len(rows) == len(published)
        sides = pd.crosstab(rows["label"], rows["split"])
        assert (sides["validation"] == counts // 10).all() and ((sides["test"] - counts / 5).abs() < 1).all()


def test_validation_by_case_holds_images_enough_where_cases_are_uneven(published):
    """Ten small cases and one of three quarters of the images in each class."""
    number = published["image"].str.extract(r"-(\d+)\.png")[0].astype(int)
    index = published.assign(case=published["label"].str[:1] + np.minimum(number % 40, 10).astype(str))
    for seed in range(5):
        for _, rows in splits.by_case(index, seed).groupby("fold"):
            rest = rows[rows["split"] != "test"]
            counts = pd.crosstab(rest["label"], rest["split"])
            assert (counts["validation"] >= 0.1 * counts.sum(axis=1)).all() and (counts["train"] > 0).all()


def test_too_few_cases_or_images_to_split(published):
    with pytest.raises(ValueError, match="Too few cases"):
        splits.by_case(published.assign(case=published["label"]), seed=0)
    with pytest.raises(ValueError, match="at least 9 of each are needed"):
        splits.by_case(published.assign(case=published["label"] + (published.index % 8).astype(str)), 0, 9)
    few = published.groupby("label").head(9).reset_index(drop=True)
    with pytest.raises(ValueError, match="too few to split"):
        splits.by_image(few, seed=0)
    with pytest.raises(ValueError, match="at least 9999 are needed"):
        splits.by_image(published, seed=0, folds=9999)


def listed(benign, malignant, magnifications=(100,)):
    """An index of cases with these numbers of images at each magnification."""
    rows = [
        (f"{label}{number}", label, magnification)
        for label, sizes in (("benign", benign), ("malignant", malignant))
        for number, size in enumerate(sizes)
        for magnification in magnifications
        for _ in range(size)
    ]
    index = pd.DataFrame(rows, columns=["case", "label", "magnification"])
    return index.assign(image=[f"{n}.png" for n in range(len(index))], path="", sha256="", subtype="")


def tally(table):
    """Images of each class (columns) on each side of each fold (rows), zeros included."""
    sides = pd.crosstab([table["fold"], table["split"]], table["label"])
    every = pd.MultiIndex.from_product([sorted(table["fold"].unique()), ["train", "validation", "test"]])
    return sides.reindex(every, fill_value=0)


SHAPES = [
    ([40, 2, 1, 1, 1], [9] * 12),  # four trainings, then "train side of fold 4 holds ... 1 classes"
    ([40, 2, 1, 1, 1], [30, 1, 1, 1, 1]),
    ([1] * 5, [1] * 5),
    ([60, 60, 1, 1, 1], [20] * 20),
    ([90, 5, 5, 5, 5, 5], [12, 3, 3, 2, 1, 1, 1]),
    ([200, *[1] * 14], [150, 140, *[2] * 18]),  # one split, where the largest case may be drawn for any side
]
SHAPES += [
    tuple(
        np.ceil(rng.pareto(0.7, cases)).clip(max=300).astype(int).tolist() for cases in rng.integers(5, 24, 2)
    )
    for rng in map(np.random.default_rng, range(20))
]


@pytest.mark.parametrize("folds", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{len(shape[0])}+{len(shape[1])}")
def test_by_case_every_side_of_every_fold_has_both_classes_however_uneven_the_cases(shape, folds):
    index = listed(*shape)
    for seed in range(3):
        table = splits.by_case(index, seed, folds)
        counts = tally(table)
        assert (counts > 0).all(axis=None)
        for _, rows in table.groupby("fold"):
            assert rows.groupby("case")["split"].nunique().max() == 1
        if folds > 1:
            assert sorted(table.loc[table["split"] == "test", "image"]) == sorted(index["image"])
        train, validation = (counts.xs(side, level=1) for side in ("train", "validation"))
        assert (validation <= 1.5 * train).all(axis=None), "most of a class was taken from training"


def test_starting_weights_find_both_classes_by_case_too():
    """Their magnification is studied or not, and some cases have no image of it."""
    index = listed([6] * 12, [5] * 20, (100, 200))
    scarce = (index["label"] == "benign") & (index["magnification"] == 200)
    index = index[~scarce | index["case"].isin([f"benign{n}" for n in range(5)])].reset_index(drop=True)
    at = {magnification: data.select(index, [magnification]) for magnification in (100, 200)}
    for seed in range(10):
        for table in (
            splits.make(at[100], at[200], "case", seed),
            splits.make(index, None, "case", seed, sources=[200]),
        ):
            rows = table[(table["split_by"] == "case") & (table["magnification"] == 200)]
            counts = tally(rows)
            assert (counts.drop("test", level=1) > 0).all(axis=None)


def test_a_split_that_cannot_give_both_classes_is_refused_with_the_counts(capsys):
    """Before anything is trained: at 200X, where starting weights are trained, one case holds all benign images."""
    index = listed([6] * 12, [5] * 20, (100, 200))
    scarce = (index["label"] == "benign") & (index["magnification"] == 200) & (index["case"] != "benign3")
    index = index[~scarce].reset_index(drop=True)
    selected, source = data.select(index, [100]), data.select(index, [200])
    said = r"The split by case leaves a side without .*fold \d, starting weights at 200X: train [06] \+ \d+, .*: take more images"
    with pytest.raises(ValueError, match=said):
        splits.make(selected, source, "case", seed=0)
    assert set(splits.make(selected, None, "case", seed=0)["split_by"]) == {"case", "image"}
    assert set(splits.make(index, None, "image", seed=0, sources=[100])["split_by"]) == {"case", "image"}
    assert "starting weights" not in capsys.readouterr().out


@pytest.mark.parametrize(("scarce", "said"), [(12, ""), (3, "train 1 \\+ 9, validation 0 \\+ 1")])
def test_published_folds_are_checked_too(tmp_path, scarce, said):
    """Where a fold trains on a single benign image of the starting weights' magnification, none is left for validation."""
    images = [("B_A", 100, 20), ("B_A", 200, scarce), ("M_DC", 100, 20), ("M_DC", 200, 20)]
    names = [f"SOB_{kind}-14-{n}-{at}-001.png" for kind, at, count in images for n in range(count)]
    for fold in database.FOLDS:
        lines = [
            f"{name}|{name.split('-')[3]}|1|{'train' if int(name.split('-')[2]) % 2 else 'test'}\n"
            for name in names
        ]
        (tmp_path / f"ds{fold}.txt").write_text("".join(lines))
    index = pd.DataFrame(map(data.parse_name, names)).assign(path="", sha256="")
    selected, source = data.select(index, [100]), data.select(index, [200])
    for asked in ((selected, source), (index, None)):
        if said:
            with pytest.raises(ValueError, match=rf"split by fold .*starting weights at 200X: {said}"):
                database.split_by_fold(tmp_path, index, *asked, sources=[200])
        else:
            assert len(database.split_by_fold(tmp_path, index, *asked, sources=[200])) == 5 * len(index)


def test_few_images_to_train_on_are_said_with_the_counts(capsys):
    splits.make(listed([40, 2, 1, 1, 1], [9] * 12), None, "case", seed=0)
    said = capsys.readouterr().out
    assert "The split by case leaves few images to train on" in said and "test 40 + " in said
    splits.make(listed([20] * 15, [20] * 15), None, "case", seed=0)
    splits.make(listed([1] * 10, [1] * 10), None, "image", seed=0)
    assert "split by image leaves few" not in capsys.readouterr().out


def test_by_image_each_magnification_of_starting_weights_gets_both_classes():
    index = listed([1] * 12, [9] * 20, (40, 100, 200))
    selected, source = data.select(index, [100]), data.select(index, [40, 200])
    for seed in range(8):
        table = splits.make(selected, source, "image", seed)
        for _, rows in table[table["split_by"] == "image"].groupby("magnification"):
            assert (tally(rows).drop("test", level=1) > 0).all(axis=None)


def test_images_for_starting_weights_fall_with_their_case(published):
    number = published["image"].str.extract(r"-(\d+)\.png")[0].astype(int)
    index = published.assign(case=published["label"].str[:1] + (number % 20).astype(str))
    selected, source = data.select(index, [100]), data.select(index, [200])
    table = splits.make(selected, source, "case", seed=0)
    assert table["split_by"].iloc[0] == "case" and set(table["split_by"]) == {"case", "image"}
    assert table[table["split_by"] == "case"].groupby("case")["split"].nunique().max() == 1
    papers = splits.by_image(selected, seed=0)
    assert (
        papers["split"].tolist()
        == table[(table["split_by"] == "image") & (table["magnification"] == 100)]["split"].tolist()
    )


def test_near_duplicates_and_shared_cases_are_counted_across_the_split(drawn):
    index = data.index_images(drawn)
    pixels = loading.load_pixels(index, 64)[0][:]
    assert splits.near_duplicates(pixels, index) == []
    twice = np.concatenate([pixels, np.clip(pixels[:1] + 3.0, 0, 255).astype(np.uint8)])
    copy = index.iloc[[0]].assign(image="copy.png")
    table = pd.concat([index, copy], ignore_index=True)
    pairs = splits.near_duplicates(twice, table)
    assert pairs == [(index["image"][0], "copy.png")]

    sides = ["test", *["train"] * (len(index) - 1), "train"]
    found = splits.leaks(table.assign(split=sides, split_by="image", fold=0), pairs)
    assert found.to_dict("records") == [
        {"split_by": "image", "cases": 1, "test_images": 1, "shared_case": 1, "near_duplicates": 1}
    ]
