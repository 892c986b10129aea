"""The audit's statistics against closed forms and other libraries."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_evaluation import random_table, rows, split_table

from lib import audit, evaluation

pytestmark = pytest.mark.filterwarnings("error")


def test_the_median_is_where_half_of_the_images_have_fallen():
    table = split_table(["malignant"] * 10 + ["benign"] * 10)
    toward = np.tile(np.arange(10), 2)
    sign = np.repeat([1, -1], 10)
    made = [
        rows(table, np.where(toward < stand, 1, -1) * sign, model, "pgd" if k else "none", k / 255)
        for model, stands in (("baseline", (9, 7, 4, 1)), ("strong", (9, 9, 8, 7)))
        for k, stand in zip((0, 1, 2, 4), stands, strict=True)
    ]
    found = audit.smallest_epsilons(evaluation.metrics(evaluation.with_worst_case(pd.concat(made))))
    weak, strong = found.set_index("model").loc[["baseline", "strong"]].to_dict("records")
    assert weak["median"] == 2 / 255 and weak["standing"] == pytest.approx(0.1)
    assert weak["low"] <= weak["median"] <= weak["high"]
    assert np.isnan(strong["median"]) and strong["standing"] == pytest.approx(0.7)
    assert audit.smallest_epsilons(evaluation.metrics(made[0])).empty


def test_distances_are_means_over_test_images():
    table, margins = random_table(0)
    attacked = rows(table, margins, attack="pgd", epsilon=0.1)
    attacked = attacked.assign(ssim=np.linspace(0.5, 0.9, len(table)), l2=2.0, linf=0.1)
    found = audit.distances(pd.concat([rows(table, margins), attacked]))
    assert len(found) == 1 and found["l2"].iloc[0] == 2
    row = found.iloc[0]
    assert row["ssim"] == pytest.approx(0.7) and row["ssim_low"] <= 0.7 <= row["ssim_high"]


def test_calibration_is_exact_where_probabilities_are():
    """P(malignant) 0.25 with one of four malignant and 0.75 with three of four: no error; all moved up by 0.1: 0.1."""
    table = split_table(["malignant"] + ["benign"] * 3 + ["malignant"] * 3 + ["benign"])
    made = rows(table, np.zeros(8)).assign(p_malignant=np.repeat([0.25, 0.75], 4))
    points, error = audit.calibration(made)
    assert points.to_numpy().tolist() == [[0.25, 0.25, 4], [0.75, 0.75, 4]] and error == 0
    moved = made.assign(p_malignant=made["p_malignant"] + 0.1)
    assert audit.calibration(moved)[1] == pytest.approx(0.1)
    assert np.isnan(audit.calibration(made[:0])[1])


def test_abstention_leaves_the_surest_images():
    table = split_table(["malignant"] * 4)
    found = audit.abstention(rows(table, [3, -1, 2, 0.5]))
    assert found["abstained"].tolist() == [0, 0.25, 0.5, 0.75]
    assert found["accuracy"].tolist() == pytest.approx([0.75, 2 / 3, 1, 1])


def test_reliability_holds_both_with_intervals_by_case(monkeypatch):
    table, margins = random_table(0)
    made = rows(table, margins)
    (row,) = audit.reliability(made).to_dict("records")
    assert row["calibration_error"] == audit.calibration(made, bins=5)[1]
    kept = audit.abstention(made)
    assert row["half_answered"] == kept.loc[kept["abstained"] <= 0.5, "accuracy"].iloc[-1]
    for name in ("calibration_error", "half_answered"):
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    alone = audit.reliability(made[made["case"] == made["case"].iloc[0]]).iloc[0]
    assert np.isnan(alone["half_answered_low"]) and 0 <= alone["half_answered"] <= 1

    def of_all_images(values, cases, strata, statistic=evaluation.mean_of_sums):
        values = np.asarray(values, float).reshape(len(values), -1)
        (found,) = statistic(values.sum(0, keepdims=True), np.array([len(values)]))
        return found, found

    monkeypatch.setattr(evaluation, "bootstrap_interval", of_all_images)
    (row,) = audit.reliability(made).to_dict("records")
    for name in ("calibration_error", "half_answered"):
        assert row[f"{name}_low"] == row[f"{name}_high"] == pytest.approx(row[name])


def test_the_calibration_error_by_chance_is_what_honest_probabilities_show():
    rng = np.random.default_rng(0)
    table, margins = random_table(0, cases=60)
    made = rows(table, margins)
    expected = audit.reliability(made)["by_chance"].item()
    errors = []
    for _ in range(300):
        malignant = rng.random(len(made)) < made["p_malignant"]
        errors.append(
            audit.calibration(made.assign(label=np.where(malignant, "malignant", "benign")), bins=5)[1]
        )
    assert expected == pytest.approx(np.mean(errors), rel=0.1)


def test_certified_radii_follow_the_exact_binomial_test():
    counts, samples, sigma, alpha = np.array([1000, 990, 520, 10]), 1000, 0.1, 0.01
    malignant, radius = audit.certify(counts, samples, sigma, alpha)
    assert malignant.tolist() == [True, True, True, False]
    for votes, found in zip((1000, 990, 520, 990), radius, strict=True):
        low = stats.binomtest(votes, samples).proportion_ci(1 - alpha, "exact").low
        expected = sigma * stats.norm.ppf(low) if low > 0.5 else np.nan
        assert found == pytest.approx(expected, nan_ok=True)
    assert np.isnan(radius[2]) and radius[1] == radius[3]


def test_a_smoothed_linear_model_has_the_radius_of_its_boundary():
    """Under noise a linear margin m has P(malignant) = Phi(m / sigma): the certified radius comes close to m from below."""
    margin, sigma, samples = 0.08, 0.1, 100_000
    votes = np.random.default_rng(0).normal(margin, sigma, samples) > 0
    radius = audit.certify([votes.sum()], samples, sigma)[1][0]
    assert 0.97 * margin < radius < margin
