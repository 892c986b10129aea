import json
import re

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import precision_score, recall_score

from lib import evaluation, papers, profiles, runs, splits, training

PARAMETERS = {
    "split_by": "image",
    "magnifications": [100],
    "subtypes": ["A", "F", "PT", "TA", "DC"],
    "image_size": 224,
    "pretrained": "densenet121-res224-all",
    "epochs": 6,
    "batch_size": 32,
    "learning_rate": 0.001,
    "noise_sigma": 0.1,
}
EVALUATIONS = [
    *((model, "none") for model in ("baseline", "gaussian_noise", "merged_fgsm")),
    *((model, "fgsm") for model in ("baseline", "gaussian_noise", "merged_fgsm")),
    *((model, "transfer_fgsm") for model in ("gaussian_noise", "merged_fgsm")),
]


@pytest.fixture(scope="module")
def split():
    """Forty images of each class in ten cases, by image."""
    labels = np.repeat(["benign", "malignant"], 40)
    cases = [f"{label[0]}{k % 10}" for k, label in enumerate(labels)]
    images = [f"{k}.png" for k in range(80)]
    table = pd.DataFrame({"image": images, "path": images, "case": cases, "label": labels, "subtype": "A"})
    return splits.by_image(table.assign(magnification=100), seed=0)


def table_of(split, right, side="test"):
    """Predictions of all evaluations: right(epsilon) is the share of images that each attack leaves right."""
    part = split[split["split"] == side].reset_index(drop=True)
    signs = np.where(part["label"] == "malignant", 1.0, -1.0)
    order, rows = np.random.default_rng(2).permutation(len(part)), []
    for model, attack in EVALUATIONS:
        for epsilon in (0.0,) if attack == "none" else (1 / 255, 2 / 255, 4 / 255):
            count = round(right(epsilon * 255) * len(part))
            margins = np.where(order < count, signs, -signs)
            kind = {"model": model, "attack": attack, "epsilon": epsilon, "seed": 0}
            if attack == "transfer_fgsm":  # the audit shows every model the images of every other
                kind["source_model"] = "adversarial_training"
                rows.append(evaluation.prediction_rows(part, margins=-margins, **kind))
                kind["source_model"] = "baseline"
            rows.append(evaluation.prediction_rows(part, margins=margins, **kind))
    return pd.concat(rows, ignore_index=True)


def test_the_published_splits_are_those_of_the_floor_rule():
    assert papers.PUBLISHED_SPLITS[papers.LI] == {"benign": (515, 64, 65), "malignant": (722, 90, 91)}
    for sides in papers.PUBLISHED_SPLITS.values():
        for train, validation, test in sides.values():
            n = train + validation + test
            assert (train, validation) == (n * 8 // 10, n // 10)


@pytest.mark.parametrize(("name", "paper"), [("li2023", papers.LI), ("alam2023", papers.ALAM)])
def test_the_profiles_are_the_papers_recipes(name, paper):
    profile = profiles.load(name)
    assert not any("instead of" in sentence for sentence in papers.deviations(paper, profile))
    assert any(
        "instead of" in sentence for sentence in papers.deviations(paper, profile | {"split_by": "case"})
    )


def test_only_what_differs_is_a_deviation():
    def said(paper, **changes):
        recipe = papers.RECIPES[paper] | {"pretrained": "densenet121-res224-all"} | changes
        return [each for each in papers.deviations(paper, recipe, changes.get("n")) if "instead of" in each]

    assert said(papers.LI, subtypes=["DC", "A", "F", "PT", "TA"]) == []
    assert said(papers.ALAM, magnifications=[40, 100, 200, 400]) == []
    assert said(papers.LI, patience=5) == ["patience 5 instead of 0"]
    assert said(papers.ALAM, pretrained="none") == ["pretrained none instead of transfer learning"]
    assert said(papers.ALAM, n=338) == ["338 images instead of 7,909"] and said(papers.LI, n=1547) == []


def test_a_run_says_how_it_departs_from_what_the_papers_did():
    """What depends on a parameter is said only where it holds, and noise drawn anew is no open choice: their text says before."""

    def said(paper, epsilon=None, **changes):
        recipe = papers.RECIPES[paper] | {"pretrained": "densenet121-res224-all"} | changes
        return "\n".join(papers.deviations(paper, recipe, epsilon=epsilon))

    resized = "images are resized to a height of 96 pixels before squares are cut"
    assert resized in said(papers.LI, image_size=96) and resized in said(papers.ALAM, image_size=96)
    assert "are resized to a height" not in said(papers.LI, image_size=460), "the height as published"
    assert "points to noise drawn once" in said(papers.LI, noise_drawn="anew")
    assert "points to noise drawn once" in said(papers.LI, noise_drawn="anew_unclipped")
    assert "points to noise drawn once" not in said(papers.LI, noise_drawn="once")
    assert "once or anew" not in said(papers.LI) and "noise" not in said(papers.ALAM)
    assert "they are, so that images stay images" in said(papers.LI, noise_drawn="once")
    assert "pixel values is not given: they are not" in said(papers.LI, noise_drawn="anew_unclipped")
    merged = "the merged images are made at 4/255, the models attacked at 8/255"
    assert merged in said(papers.ALAM, 8 / 255, train_epsilon=4)
    assert "merged images are made at 4/255" not in said(papers.ALAM, 4 / 255, train_epsilon=4)
    assert "merged images are made at 4/255" not in said(papers.ALAM, None, train_epsilon=4)
    assert "to tell authentic from manipulated images" in said(papers.ALAM) and "authentic" not in said(
        papers.LI
    )
    for paper in (papers.LI, papers.ALAM):
        assert "least loss on clean validation images" in said(paper) and "stored at another size" in said(
            paper
        )


def test_the_selection_of_li_and_liu_is_inferred_from_its_counts():
    """By the published counts no other whole subtypes at common magnifications have 644 benign and 903 malignant images."""
    assert papers.selections(644, 903) == [((100,), ("A", "F", "PT", "TA"), ("DC",))]
    assert papers.selections(644, 904) == []
    assert ((40, 100, 200, 400), ("A", "F", "PT", "TA"), ("DC", "LC", "MC", "PC")) in papers.selections(
        2480, 5429
    )
    said = [sentence for paper, sentence, agrees in papers.contradictions() if paper == papers.LI and agrees]
    (sentence,) = (each for each in said if "magnification" in each)
    assert "113 + 260 + 121 + 150 images of A, F, PT, TA against 903 images of DC at 100X" in sentence
    assert "only 1 of 3,375 choices" in sentence and "inference" in sentence
    run = papers.RECIPES[papers.LI] | {"pretrained": "densenet121-res224-all", "magnifications": [200]}
    assert "magnifications 200 instead of 100, which is inferred" in papers.deviations(papers.LI, run)


# By hand, from the published values: whether they agree when rounded to five points (accuracy to one), and within five points.
BY_HAND = {
    "model A: accuracy is given as 0.96, the matrix has 0.920": (False, True),
    "model A: sensitivity is given as 0.90, the matrix has 0.938": (False, True),
    "model A: specificity is given as 0.90, the matrix has 0.904": (True, True),
    "model A: precision is given as 0.85, the matrix has 0.900": (False, True),
    "model A: accuracy is given as 0.96; it must lie between": (False, True),
    "model A: sensitivity and recall are one quantity, given as 0.90 and 0.90": (True, True),
    "model A: precision is given as 0.85; sensitivity, specificity": (False, False),  # 0.952, at least 0.926
    "model A under FGSM: accuracy is given as 0.25, the matrix has 0.375": (False, False),
    "model A under FGSM: sensitivity is given as 0.30, the matrix has 0.333": (False, True),
    "model A under FGSM: specificity is given as 0.25, the matrix has 0.400": (False, False),
    "model A under FGSM: precision is given as 0.15, the matrix has 0.250": (False, False),
    "model A under FGSM: accuracy is given as 0.25; it must lie between": (True, True),
    "model A under FGSM: sensitivity and recall are one quantity, given as 0.30 and 0.30": (True, True),
    "model A under FGSM: precision is given as 0.15; sensitivity, specificity": (False, False),  # 0.467
    "model B: accuracy is given as 0.75, the matrix has 0.700": (False, True),
    "model B: sensitivity is given as 0.70, the matrix has 0.750": (False, True),
    "model B: specificity is given as 0.70, the matrix has 0.667": (False, True),
    "model B: precision is given as 0.60, the matrix has 0.600": (True, True),
    "model B: recall is given as 0.65, the matrix has 0.750": (False, False),
    "model B: accuracy is given as 0.75; it must lie between": (False, True),
    "model B: sensitivity and recall are one quantity, given as 0.70 and 0.65": (True, True),
    "model B: precision is given as 0.60; sensitivity, specificity": (False, False),  # 0.837
}


def test_contradictions_are_what_rounding_does_not_explain():
    found = {sentence: agrees for paper, sentence, agrees in papers.contradictions() if paper == papers.ALAM}
    of_metrics = [sentence for sentence in found if sentence.startswith("model")]
    assert len(of_metrics) == len(BY_HAND)
    for start, (agrees, explained) in BY_HAND.items():
        (sentence,) = (each for each in of_metrics if each.startswith(start))
        assert found[sentence] == agrees, sentence
        assert sentence.endswith("five points would explain it") == (explained and not agrees), sentence
        assert sentence.endswith("five points would not explain it either") == (not explained), sentence
    models = "the matrices of model A, model A under FGSM, model B hold"
    assert not found[f"{models} 1,000, 1,000, 1,000 images; all are of one test set, which has 792"]
    assert not found[f"{models} 480, 375, 400 malignant images; all are of one test set, which has 544"]
    assert not found[f"{models} 520, 625, 600 benign images; all are of one test set, which has 248"]
    assert not found["the split holds 7,909 images, the text says 7,902"]
    assert sum("imply 0.952" in sentence for sentence in of_metrics) == 1


def test_li_and_lius_clean_numbers_show_no_lean():
    found = {sentence: agrees for paper, sentence, agrees in papers.contradictions() if paper == papers.LI}
    assert all(found.values())
    right = "benign and {} of 91 malignant test images right when clean"
    assert f"original model: Tables 2 and 3 imply 64 of 65 {right.format(90)}" in found
    assert f"trained with noise: Tables 2 and 3 imply 65 of 65 {right.format(88)}" in found
    assert any("under FGSM is not published" in sentence for sentence in found)


def test_the_nearest_epsilon_is_chosen_on_validation_images_alone(split):
    test = table_of(split, lambda k: 0)
    falling = table_of(split, lambda k: {0: 1, 1: 0.75, 2: 0.25, 4: 0.0}[k], "validation")
    both = pd.concat([test, falling], ignore_index=True)
    assert papers.nearest_epsilon(test, papers.LI) is None
    assert papers.nearest_epsilon(both, papers.ALAM) == (2 / 255, 0.25, True)
    standing = pd.concat([test, table_of(split, lambda k: 0.9, "validation")], ignore_index=True)
    assert papers.nearest_epsilon(standing, papers.ALAM)[2] is False
    two_of_eight = table_of(split, lambda k: 2 / 8, "validation")
    wrong = two_of_eight["image"][~evaluation.is_right(two_of_eight)].iloc[0]
    two_of_seven = two_of_eight[two_of_eight["image"] != wrong]
    assert papers.nearest_epsilon(two_of_seven, papers.ALAM)[1:] == (2 / 7, True), (
        "as near as the images allow"
    )


def test_every_published_number_has_a_value_or_a_reason(split):
    test = table_of(split, lambda k: 0.5)
    falling = table_of(split, lambda k: {0: 1, 1: 0.75, 2: 0.25, 4: 0.0}[k], "validation")
    whole = papers.records(pd.concat([test, falling]), splits.counts(split), PARAMETERS)
    assert all(record["measured"] is not None for record in whole)
    names = {(record["paper"], record["table"], record["quantity"], record["tested"]) for record in whole}
    assert len(names) == len(whole) > len(papers.CLAIMS) + 12
    one = next(record for record in whole if record["quantity"] == "benign images, train")
    assert (one["published"], one["measured"]) == (515, 32)
    sums = {record["quantity"]: record["measured"] for record in whole if record["paper"] == papers.ALAM}
    assert (sums["malignant images, all"], sums["images"]) == (40, 80)
    assert "epochs 6 instead of 400" in one["deviations"]
    assert "80 images instead of 1,547" in one["deviations"]
    assert not any("pretrained" in sentence and "instead" in sentence for sentence in one["deviations"])

    without = papers.records(test[test["model"] == "baseline"], splits.counts(split), PARAMETERS)
    reasons = {record["quantity"]: record["reason"] for record in without if record["measured"] is None}
    assert reasons["trained with noise: accuracy"] == "the run has no gaussian_noise under none"
    assert "no validation images" in reasons["original model under FGSM: malignant accuracy"]


def test_transferred_images_are_the_baselines(split):
    """The audit shows every model the images of every other: three in four stand against the baseline's, the rest against those."""
    table = pd.concat([table_of(split, lambda k: 0.75), table_of(split, lambda k: 0.75, "validation")])
    found = papers.records(table, splits.counts(split), PARAMETERS)
    (own,) = (
        record
        for record in found
        if record["quantity"] == "model B: accuracy" and record["tested"].startswith("the baseline's")
    )
    assert (own["measured"], own["n"]) == (0.75, 8)


def test_measured_quantities_are_those_of_scikit_learn(split):
    part = split[split["split"] != "test"].assign(split="test").reset_index(drop=True)
    margins = np.random.default_rng(1).normal(size=len(part))
    rows = evaluation.prediction_rows(part, model="m", attack="none", epsilon=0.0, margins=margins, seed=0)
    truth, answer = part["label"] == "malignant", margins > 0
    expected = {
        "accuracy": (truth == answer).mean(),
        "sensitivity": recall_score(truth, answer),
        "malignant accuracy": recall_score(truth, answer),
        "specificity": recall_score(~truth, ~answer),
        "precision": precision_score(truth, answer),
        "fp": (~truth & answer).sum(),
        "fn": (truth & ~answer).sum(),
    }
    for quantity, value in expected.items():
        found = papers.measure(rows, quantity)
        assert found["measured"] == pytest.approx(value)
        if quantity not in ("fp", "fn"):
            assert found["low"] <= found["measured"] <= found["high"]
    never = rows.assign(margin=-1.0)
    assert papers.measure(never, "precision") == {"n": 0, "reason": "no image to count"}


def text_of(name):
    """A page as one line, so that a sentence is found however it is wrapped."""
    return re.sub(r"\s+", " ", (runs.ROOT / name).read_text("utf-8"))


def by_class(report, model, attack="none", epsilon=0.0):
    """Sensitivity and specificity as pages say them, "0.77 and 0.72", from a committed report."""
    recorded = json.loads((runs.ROOT / "reports" / report / "results.json").read_text("utf-8"))
    (row,) = (
        row
        for row in recorded["metrics"]
        if (row["model"], row["attack"], row["subset"]) == (model, attack, "all")
        and row["split_by"] == recorded["parameters"]["split_by"]
        and row["source_model"] in evaluation.SOURCES
        and abs(row["epsilon"] - epsilon) < 1e-4
    )
    return f"{row['sensitivity']:.2f} and {row['specificity']:.2f}"


def test_the_lean_is_told_as_this_studys_with_the_numbers_of_its_reports():
    readme, said = text_of("README.md"), text_of("reports/README.md")
    assert "The lean is a finding of this study and not of theirs" in readme
    for model in ("baseline", "gaussian_noise"):
        assert (
            by_class("breakhis_folds_short", model).split()[-1]
            in readme.split("**Noise in training**")[1][:300]
        )
    folds, sample = "breakhis_folds", "li2023_sample"
    assert (
        f"on clean images: sensitivity and specificity are {by_class(folds, 'gaussian_noise_0.05')}" in said
    )
    assert (
        f"(sigma 0.1: {by_class(folds, 'gaussian_noise')}; baseline: {by_class(folds, 'baseline')})" in said
    )
    worst = [by_class(folds, name, "worst_case", 4 / 255) for name in ("gaussian_noise_0.05", "baseline")]
    assert "In the worst case they are {} (baseline: {})".format(*worst) in said
    smaller = [by_class(sample, f"gaussian_noise{end}") for end in ("_0.05", "_0.02", "")]
    assert "are {} at sigma 0.05, {} at 0.02, but {} at 0.1".format(*smaller) in said


def test_what_is_inferred_or_departs_from_a_paper_is_called_so_on_every_page():
    notebook = text_of("notebooks/04_gaussian_noise_defense.ipynb")
    for page in (
        text_of("README.md"),
        text_of("reports/README.md"),
        notebook,
        training.add_gaussian_noise.__doc__,
    ):
        assert re.search(r"(points to|suggests) (noise (that is )?drawn )?once", re.sub(r"\s+", " ", page))
    assert "section 3.3" in training.add_gaussian_noise.__doc__ and "section 3.3" in notebook
    for page in ("README.md", "reports/README.md", "notebooks/profiles/li2023.yaml"):
        assert re.search(r"[Ii]nferred|inference", text_of(page))
    for page in ("README.md", "reports/README.md", "notebooks/profiles/alam2023.yaml"):
        assert re.search("manipulated (images )?from authentic|authentic from manipulated", text_of(page))


def test_both_papers_and_both_surveys_are_cited():
    references = yaml.safe_load((runs.ROOT / "CITATION.cff").read_text("utf-8"))["references"]
    titles, readme = [each["title"] for each in references], text_of("README.md")
    for title in (
        "Adversarial Attack and Defense in Breast Cancer Deep Learning Systems",
        "Model Fooling Attacks Against Medical Imaging: A Short Survey",
        "Securing the Diagnosis of Medical Imaging: An In-depth Analysis of AI-Resistant Attacks",
    ):
        assert title in titles and title in readme
    people = [{person.get("family-names") for person in each["authors"]} for each in references]
    assert {"Alam", "Raim", "Saifee", "Santo"} in people and "Alam, Raim, Saifee and Santo" in readme
