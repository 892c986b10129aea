"""Names, numbers, sentences and tables as people read them."""

import pandas as pd
import pytest

from lib import wording

ROW = {
    "model": "merged_fgsm",
    "split_by": "case",
    "attack": "none",
    "epsilon": 0.0,
    "n": 80,
    "tp": 40,
    "tn": 33,
    "accuracy": 0.9125,
    "accuracy_low": 0.82,
    "accuracy_high": 0.97,
    "sensitivity": 1.0,
    "sensitivity_low": 1.0,
    "sensitivity_high": 1.0,
    "specificity": None,
    "specificity_low": None,
    "specificity_high": None,
}


def test_a_readable_table_has_intervals_epsilons_and_no_nan():
    found = pd.DataFrame([ROW, ROW | {"attack": "fgsm", "epsilon": 4 / 255, "accuracy": 0.0}])
    page = wording.readable(found, ["model", "epsilon", "n", "accuracy", "specificity"]).data
    assert page.count("<tr>") == 3
    assert ">4/255<" in page and ">nan" not in page and ">–<" in page
    assert ">0.91 [0.82, 0.97]<" in page and ">0.00 [0.82, 0.97]<" in page and ">80<" in page
    checks = [
        {"name": "a < b", "value": None, "p_value": 0.0123},
        {"name": "c", "value": 0.5, "p_value": 1.0},
    ]
    page = wording.readable(checks, ["name", "value", "p_value"]).data
    assert ">a &lt; b<" in page and ">0.012<" in page and ">1.000<" in page and ">0.50<" in page
    counts = [{"measured": 515, "low": None, "high": None}, {"measured": 0.5, "low": 0.25, "high": 0.75}]
    assert ">515<" in (page := wording.readable(counts, ["measured"]).data) and ">0.50 [0.25, 0.75]<" in page
    page = wording.readable([{"balanced_accuracy": 0.5, "auroc": 0.5}], ["balanced_accuracy", "auroc"]).data
    assert ">balanced accuracy<" in page and ">AUROC<" in page


def test_sentences_say_counts_intervals_and_what_is_undefined():
    attacked = [ROW | {"attack": "fgsm", "epsilon": k / 255, "accuracy": 1 / k} for k in (4, 2)]
    assert wording.sentences(pd.DataFrame([ROW, *attacked])) == [
        "**merged FGSM (split by case)**, clean: 0.91 (73 of 80) right [0.82, 0.97]; "
        "sensitivity 1.00 [1.00, 1.00], specificity –.",
        "**merged FGSM (split by case)** under FGSM: accuracy 0.50 [0.82, 0.97] at 2/255, 0.25 [0.82, 0.97] at 4/255.",
    ]


@pytest.mark.parametrize(
    ("epsilon", "text"), [(4 / 255, "4/255"), (0.0, "0"), (0.1, "25.5/255"), (0.015686, "4/255")]
)
def test_epsilons_are_shown_in_255ths(epsilon, text):
    assert wording.format_epsilon(epsilon) == text


def test_models_and_attacks_have_names():
    assert wording.model_name("gaussian_noise_recalibrated") == "Gaussian noise recalibrated"
    assert wording.model_name("merged_fgsm") == "merged FGSM"
    assert wording.attack_name("apgd_ce", 4 / 255) == "APGD-CE 4/255"
    assert wording.attack_name("none", 0.0) == "clean" and wording.attack_name("new_one") == "new one"


def test_a_difference_is_in_whole_points_but_for_one_that_would_vanish():
    assert [wording.points(each) for each in (-0.275, 0.0, -0.0002, -0.002, 0.005, 0.3)] == [
        "-28",
        "+0",
        "+0",
        "-0.2",
        "+0.5",
        "+30",
    ]


def test_what_a_defense_gains_is_a_sentence_with_intervals():
    row = {
        "model_a": "merged_fgsm",
        "model_b": "baseline",
        "split_by": "case",
        "attack": "pgd",
        "epsilon": 4 / 255,
    }
    row |= {"difference": -0.18, "low": -0.28, "high": -0.08}
    clean = row | {"attack": "none", "epsilon": 0.0, "difference": 0.02, "low": None, "high": None}
    assert wording.gains(pd.DataFrame([row, clean, clean | {"model_b": "merged_fgsm"}])) == [
        "**merged FGSM (split by case)** against the baseline: +2 points clean, -18 points [-28, -8] under PGD 4/255."
    ]
