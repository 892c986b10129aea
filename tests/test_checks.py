"""The checks: each holds on a healthy study and fails on what it is for."""

import numpy as np
import pandas as pd
import pytest
from test_evaluation import rows, split_table

from lib import checks


def study(right, model="baseline", **more):
    """Predictions of ten malignant and ten benign images with given numbers right (the first ones of a class)."""
    table = split_table(["malignant"] * 10 + ["benign"] * 10)
    toward = np.tile(np.arange(10), 2)
    sign = np.repeat([1, -1], 10)
    made = []
    for (attack, k), count in right.items():
        margins = np.where(toward < count, 1, -1) * sign
        made.append(rows(table, margins, model, attack, k / 255, **more))
    return pd.concat(made)


def verdict_of(predictions, model="baseline"):
    return {row["name"]: row["verdict"] for row in checks.verdicts(predictions) if row["model"] == model}


HEALTHY = {("none", 0): 9, ("random_noise", 4): 9, ("transfer_fgsm", 4): 6, ("fgsm", 2): 5, ("fgsm", 4): 4}
HEALTHY |= {("pgd", 2): 5, ("pgd", 4): 3}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, None),
        ({("fgsm", 2): 4}, "PGD fools what FGSM fools"),
        ({("pgd", 4): 6, ("fgsm", 4): 6}, "success grows with epsilon"),
        ({("transfer_fgsm", 4): 2}, "white-box beats transfer, transfer beats noise"),
        ({("random_noise", 4): 5}, "white-box beats transfer, transfer beats noise"),
        ({("fgsm", 4): 8}, "FGSM does not overstate accuracy"),
    ],
)
def test_each_check_fails_on_what_it_is_for(change, broken):
    found = verdict_of(study(HEALTHY | change))
    assert {name for name, verdict in found.items() if verdict == "fails"} == ({broken} if broken else set())
    assert "not applicable" not in found.values()


def test_a_model_that_always_says_malignant_fails():
    table = split_table(["malignant"] * 10 + ["benign"] * 10)
    found = checks.verdicts(rows(table, np.ones(20), "always_malignant"))
    assert [row["verdict"] for row in found] == ["not applicable"] * 4 + ["fails"]
    assert [row["value"] for row in found] == [None] * 4 + [0.0]
    assert "specificity" in found[-1]["meaning"]
    alone = checks.verdicts(rows(table[:10], np.ones(10)))
    assert {row["verdict"] for row in alone} == {"not applicable"}


def test_checks_tell_the_most_unfavorable_seed():
    made = pd.concat([study(HEALTHY), study(HEALTHY | {("fgsm", 4): 8}, seed=1), study(HEALTHY, "other")])
    found = {(row["model"], row["name"]): row for row in checks.verdicts(made)}
    row = found["baseline", "FGSM does not overstate accuracy"]
    assert row["value"] == pytest.approx(0.5)
    assert "4/255" in row["meaning"]
    assert "seed 1" in row["meaning"]
    assert found["other", "FGSM does not overstate accuracy"]["verdict"] == "holds"
    assert list(row) == ["name", "model", "value", "verdict", "meaning"]
