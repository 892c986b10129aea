"""The checks: each holds on a healthy study and fails on what it is for."""

import numpy as np
import pandas as pd
import pytest
from test_evaluation import rows, split_table

from lib import checks


def study(right, model="baseline", lost_by_rounding=0, **more):
    """Predictions of ten malignant and ten benign images with given numbers right (the first ones of a class)."""
    table = split_table(["malignant"] * 10 + ["benign"] * 10)
    toward = np.tile(np.arange(10), 2)
    sign = np.repeat([1, -1], 10)
    made = []
    for (attack, k), count in right.items():
        margins = np.where(toward < count, 1, -1) * sign
        saved = np.where(toward < count + lost_by_rounding, 1, -1) * sign
        made.append(rows(table, margins, model, attack, k / 255, margins_8bit=saved, **more))
    return pd.concat(made)


def audit(usual=0.4, most=0.4, zero=0.0, left=(2.0, 0.5, 0.4, 0.1), model="baseline"):
    """What PGD finds with 5 and with 20 steps, and the margin that it leaves."""
    settings = [(0, 0, 0.0, 0.9), (5, 1, 0.5, usual), (20, 1, 0.125, usual), (20, 4, 0.125, most)]
    rows = [
        {"model": model, "epsilon": 4 / 255, "steps": steps, "restarts": restarts, "step_size": size}
        | {"n": 10, "accuracy": accuracy, "margin": margin, "zero_gradient": None if steps else zero}
        for (steps, restarts, size, accuracy), margin in zip(settings, left, strict=True)
    ]
    return pd.DataFrame(rows)


def verdict_of(predictions, model="baseline", audited=None):
    found = checks.verdicts(predictions, audit() if audited is None else audited)
    return {row["name"]: row["verdict"] for row in found if row["model"] == model}


HEALTHY = {("none", 0): 9, ("random_noise", 4): 9, ("transfer_fgsm", 4): 6, ("fgsm", 2): 5, ("fgsm", 4): 4}
HEALTHY |= {("pgd", 2): 5, ("pgd", 4): 3, ("fab", 4): 3, ("square", 4): 3, ("pgd", 64): 0}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, None),
        ({("fgsm", 2): 4}, "PGD fools what FGSM fools"),
        ({("pgd", 4): 6, ("fgsm", 4): 6, ("fab", 4): 6, ("square", 4): 6}, "success grows with epsilon"),
        ({("transfer_fgsm", 4): 2}, "white-box beats transfer, transfer beats noise"),
        ({("random_noise", 4): 5}, "white-box beats transfer, transfer beats noise"),
        ({("fgsm", 4): 8}, "FGSM does not overstate accuracy"),
        ({("fab", 4): 2, ("square", 4): 1}, "an attack without gradients finds little more"),
        ({("fab", 4): 2, ("square", 4): 2}, "stronger attacks find little more"),
        ({("pgd", 64): 1}, "a huge epsilon turns everything"),
    ],
)
def test_each_check_fails_on_what_it_is_for(change, broken):
    found = verdict_of(study(HEALTHY | change))
    fails = {name for name, verdict in found.items() if verdict == "fails"}
    implied = {"stronger attacks find little more"} if "without gradients" in str(broken) else set()
    assert fails - implied == ({broken} if broken else set())
    assert "not applicable" not in found.values()


@pytest.mark.parametrize(
    ("ran", "applicable"),
    [
        ((), set()),
        (("fab",), {"stronger attacks find little more"}),
        (("square",), {"stronger attacks find little more", "an attack without gradients finds little more"}),
    ],
)
def test_attacks_that_a_run_leaves_out_are_passed_over(ran, applicable):
    cascade = {
        key: count for key, count in HEALTHY.items() if key[0] not in ("fab", "square") or key[0] in ran
    }
    found = verdict_of(study(cascade))
    missing = {name for name, verdict in found.items() if verdict == "not applicable"}
    names = {"stronger attacks find little more", "an attack without gradients finds little more"}
    assert missing == names - applicable and "fails" not in found.values()


def test_attacks_on_other_images_are_not_compared():
    fgsm, pgd = study({("none", 0): 9, ("fgsm", 4): 4}), study({("pgd", 4): 3})
    pgd["image"] = "other-" + pgd["image"]
    found = verdict_of(pd.concat([fgsm, pgd]))
    assert found["PGD fools what FGSM fools"] == found["FGSM does not overstate accuracy"] == "not applicable"


@pytest.mark.parametrize(
    ("options", "broken"),
    [
        ({"audited": audit(most=0.3)}, "more steps and restarts find little more"),
        ({"audited": audit(zero=0.5)}, "gradients are there"),
        ({"audited": audit(left=(2.0, 0.2, 0.4, 0.1))}, "the loss grows over the steps"),
        ({"lost_by_rounding": 1}, "adversarial images survive saving"),
    ],
)
def test_each_check_of_the_audit_fails_on_what_it_is_for(options, broken):
    found = verdict_of(study(HEALTHY, lost_by_rounding=options.pop("lost_by_rounding", 0)), **options)
    assert {name for name, verdict in found.items() if verdict == "fails"} == {broken}


def test_a_model_that_always_says_malignant_fails():
    table = split_table(["malignant"] * 10 + ["benign"] * 10)
    found = checks.verdicts(rows(table, np.ones(20), "always_malignant"))
    assert [row["verdict"] for row in found] == ["not applicable"] * 11 + ["fails"]
    assert [row["value"] for row in found] == [None] * 11 + [0.0]
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
