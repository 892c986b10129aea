import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import precision_score, recall_score

from lib import evaluation, papers, profiles, splits

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


def test_contradictions_are_computed():
    found = {sentence: agrees for _, sentence, agrees in papers.contradictions()}
    assert found["original model: Tables 2 and 3 imply 64 of 65 benign test images right"]
    assert not found["model A: accuracy 0.96 must lie between sensitivity and specificity, 0.90 and 0.90"]
    assert not found["model B: sensitivity and recall are one quantity, given as 0.70 and 0.65"]
    assert not found["model A under FGSM: accuracy is 0.25 in the text and 0.375 by the matrix"]
    assert found["model B: precision is 0.60 in the text and 0.600 by the matrix"]
    assert not found["model A: the matrix holds 1000 images, the test set 792"]


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
