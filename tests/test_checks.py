"""The checks: each holds on a healthy study and fails on what it is for."""

import numpy as np
import pandas as pd
import pytest
from test_evaluation import rows, split_table

from lib import checks


def study(right, model="adversarial_training", lost_by_rounding=0, **more):
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


def audit(usual=0.4, most=0.4, zero=0.0, left=(2.0, 0.5, 0.4, 0.1), model="adversarial_training"):
    """What PGD finds with 5 and with 20 steps, and the margin that it leaves."""
    settings = [(0, 0, 0.0, 0.9), (5, 1, 0.5, usual), (20, 1, 0.125, usual), (20, 4, 0.125, most)]
    rows = [
        {"model": model, "epsilon": 4 / 255, "steps": steps, "restarts": restarts, "step_size": size}
        | {"n": 10, "accuracy": accuracy, "margin": margin, "zero_gradient": None if steps else zero}
        for (steps, restarts, size, accuracy), margin in zip(settings, left, strict=True)
    ]
    return pd.DataFrame(rows)


def verdict_of(predictions, model="adversarial_training", audited=None):
    found = checks.verdicts(predictions, audit() if audited is None else audited)
    return {row["name"]: row["verdict"] for row in found if row["model"] == model}


HEALTHY = {
    ("none", 0): 10,
    ("random_noise", 4): 10,
    ("transfer_fgsm", 4): 10,
    ("fgsm", 2): 10,
    ("fgsm", 4): 9,
}
HEALTHY |= {("pgd", 2): 10, ("pgd", 4): 9, ("fab", 4): 9, ("square", 4): 9, ("pgd", 64): 0}
AT_4 = [("fgsm", 4), ("pgd", 4), ("fab", 4), ("square", 4)]
# What cannot break alone.
IMPLIED = {
    "an attack without gradients finds little more": {"stronger attacks find little more"},
    "no catastrophic overfitting": {"FGSM does not overstate accuracy"},
    "the attack does something": {"a huge epsilon turns everything"},
}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, None),
        ({("fgsm", 2): 9}, "PGD fools what FGSM fools"),
        ({("pgd", 2): 9, ("fgsm", 2): 9} | dict.fromkeys(AT_4, 10), "success grows with epsilon"),
        (dict.fromkeys([("pgd", 64), *AT_4], 10), "the attack does something"),
        ({("transfer_fgsm", 4): 8}, "white-box beats transfer, transfer beats noise"),
        ({("random_noise", 4): 8}, "white-box beats transfer, transfer beats noise"),
        ({("fgsm", 2): 10, ("pgd", 2): 8} | dict.fromkeys(AT_4, 8), "FGSM does not overstate accuracy"),
        (dict.fromkeys(AT_4, 8) | {("fgsm", 4): 10}, "no catastrophic overfitting"),
        ({("square", 4): 8}, "an attack without gradients finds little more"),
        ({("fab", 4): 8, ("square", 4): 8}, "stronger attacks find little more"),
        ({("pgd", 64): 1}, "a huge epsilon turns everything"),
        (dict.fromkeys(AT_4, 5), "attacked, better than one answer for all"),
    ],
)
def test_each_check_fails_on_what_it_is_for(change, broken):
    found = verdict_of(study(HEALTHY | change))
    fails = {name for name, verdict in found.items() if verdict == "fails"}
    assert fails - IMPLIED.get(broken, set()) == ({broken} if broken else set())
    assert "not applicable" not in found.values()


def test_overfitting_is_asked_of_adversarial_training_at_its_epsilon():
    gap = dict.fromkeys(AT_4, 8) | {("fgsm", 4): 10}
    assert verdict_of(study(gap, "baseline"), "baseline")["no catastrophic overfitting"] == "not applicable"
    assert verdict_of(study(gap))["no catastrophic overfitting"] == "fails"
    elsewhere = verdict_of(study(HEALTHY | {("pgd", 2): 8} | dict.fromkeys(AT_4, 8)))
    assert elsewhere["no catastrophic overfitting"] == "holds"


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
    (fails,) = (row for row in found if row["verdict"] != "not applicable")
    assert (fails["name"], fails["verdict"], fails["value"]) == ("answers both classes", "fails", 0.0)
    assert "specificity" in fails["meaning"] and len(found) == len(checks.CHECKS)
    assert all(row["value"] is None for row in found if row is not fails)
    network = pd.concat([rows(table, np.ones(20)), rows(table, np.ones(20), attack="pgd", epsilon=4 / 255)])
    found = {row["name"]: row for row in checks.verdicts(network)}
    worth = found["attacked, better than one answer for all"]
    assert (worth["verdict"], worth["value"]) == ("fails", 0.5)
    alone = checks.verdicts(rows(table[:10], np.ones(10)))
    assert {row["verdict"] for row in alone} == {"not applicable"}


def test_checks_tell_the_most_unfavorable_seed():
    worse = HEALTHY | dict.fromkeys(AT_4, 5) | {("fgsm", 4): 10}
    made = pd.concat([study(HEALTHY), study(worse, seed=1), study(HEALTHY, "other")])
    found = {(row["model"], row["name"]): row for row in checks.verdicts(made)}
    row = found["adversarial_training", "FGSM does not overstate accuracy"]
    assert row["value"] == pytest.approx(0.5)
    assert "4/255" in row["meaning"]
    assert "seed 1" in row["meaning"]
    assert found["other", "FGSM does not overstate accuracy"]["verdict"] == "holds"
    assert list(row) == ["name", "model", "value", "bound", "verdict", "meaning"]
