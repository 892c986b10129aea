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
