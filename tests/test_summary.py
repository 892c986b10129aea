"""The summary, on the committed report of drawn tissue."""

import json
from html.parser import HTMLParser

import pandas as pd
import pytest
from nbconvert.filters import markdown2html

from lib import evaluation, profiles, results, runs, summary, wording

QUICK = runs.ROOT / "reports" / "quick"


@pytest.fixture
def quick():
    return json.loads((QUICK / "results.json").read_text())


def of(quick, model, attack, epsilon=0.0):
    (row,) = (
        row
        for row in quick["metrics"]
        if row["model"] == model
        and row["attack"] == attack
        and row["subset"] == "all"
        and row["split_by"] == "case"
        and row["source_model"] in ("", "baseline")
        and abs(row["epsilon"] - epsilon) < 1e-6
    )
    return row


def test_it_says_in_short_what_the_tables_hold(quick):
    text = summary.write(quick, "case", "adversarial_training")
    short = text.split("## In short")[1].split("## ")[0]
    defended = of(quick, "adversarial_training", "worst_case", 4 / 255)
    (difference,) = (
        row
        for row in quick["comparisons"]
        if (row["model_a"], row["model_b"]) == ("adversarial_training", "baseline")
        and row["attack"] == "worst_case"
        and row["split_by"] == "case"
        and abs(row["epsilon"] - 4 / 255) < 1e-6
    )
    line = next(
        line for line in short.splitlines() if "**Adversarial training** (the primary defense" in line
    )
    assert f"{defended['accuracy']:.2f} [{defended['accuracy_low']:.2f}, " in line
    assert f"{100 * difference['difference']:+.0f} points [{100 * difference['low']:+.0f}, " in line
    assert f"p = {difference['p_value']:.2g} (corrected {difference['p_main']:.2g})" in line
    assert f"{of(quick, 'baseline', 'none')['accuracy']:.2f} [" in short
    networks = ("baseline", *profiles.DEFENSES)
    most = max(of(quick, model, "pgd", 8 / 255)["accuracy"] for model in networks)
    assert f"Under PGD at 8/255 no model keeps more than {most:.2f}" in short, "64/255 turns everything"
    assert text == (QUICK / "summary.md").read_text("utf-8")
    assert text.startswith(f"# {summary.DRAWN_BANNER}") and "nan" not in text.lower().split()
    assert "Beside other runs" not in text and "Beside the papers" not in text
    assert "tried on validation: 1 recipe (fgsm) and 1 augmentation)" in line


def test_one_table_says_which_defense_at_what_cost_against_whom(quick):
    text = summary.write(quick, "case", "adversarial_training")
    section = text.split("## Which defense, at what cost, against whom")[1].split("## ")[0]
    defended = of(quick, "adversarial_training", "worst_case", 4 / 255)
    (line,) = (line for line in section.splitlines() if line.startswith("| adversarial training | "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    clean = of(quick, "adversarial_training", "none")
    rates = [clean["balanced_accuracy"], of(quick, "baseline", "none")["balanced_accuracy"]]
    assert cells[1].startswith(f"{rates[0]:.2f} [")
    assert cells[2] == wording.points(rates[0] - rates[1])
    transfers = [
        row["balanced_accuracy"]
        for row in quick["metrics"]
        if (row["model"], row["attack"], row["subset"]) == ("adversarial_training", "transfer_fgsm", "all")
        and abs(row["epsilon"] - 4 / 255) < 1e-6
    ]
    assert len(transfers) == 4 and cells[4].startswith(f"{min(transfers):.2f} [")
    assert cells[6].startswith(f"{defended['balanced_accuracy']:.2f} [")
    assert cells[7] == f"{defended['sensitivity']:.2f}, {defended['specificity']:.2f}"
    assert section.count(" against baseline | clean | ") == len(profiles.DEFENSES)
    assert section.count("| adversarial training against ") == 2 * len(profiles.DEFENSES)


def test_candidates_and_what_fails_are_said(quick):
    quick["recipes"] = [
        {"recipe": recipe, "kept": recipe == "pgd", "fold": fold}
        for fold in (0, 1)
        for recipe in ("fgsm", "pgd")
    ]
    quick["checks"][0] |= {"model": "merged_fgsm", "verdict": "fails", "name": "a check", "meaning": "It."}
    text = summary.write(quick, "case", "adversarial_training")
    assert "2 recipes (fgsm kept in 0 of 2 folds, pgd kept in 2 of 2 folds) and 1 augmentation)" in text
    assert "- merged FGSM, a check: It." in text.split("What fails for the defenses:")[1]


def test_what_noise_certifies_is_a_share_of_the_images():
    votes = [
        {"model": "gaussian_noise", "case": str(k), "label": ("benign", "malignant")[k % 2], "sigma": 0.1}
        | {"samples": 100, "right": k < 10, "radius": None if k == 0 else 0.04 * (1 + k % 2)}
        for k in range(12)
    ]
    (line,) = (line for line in summary._certified(votes) if line.startswith("| Gaussian noise | "))
    cells = [cell.strip()[:4] for cell in line.strip("|").split("|")]
    assert cells[1:] == ["12", "0.08", "0.75", "0.42", "0.00", "0.00"]
    assert summary._certified([]) == []


def test_a_worst_case_that_is_not_pgd_has_its_own_lines(quick):
    for row in quick["metrics"]:
        if row["attack"] == "worst_case" and row["subset"] == "all" and row["split_by"] == "case":
            row["accuracy"] = of(quick, row["model"], "pgd", row["epsilon"])["accuracy"]
    assert "\n| worst case" not in summary.write(quick, "case", "adversarial_training")
    of(quick, "baseline", "worst_case", 4 / 255)["accuracy"] = 0.01
    assert "| worst case 4/255 | 0.01" in summary.write(quick, "case", "adversarial_training")


def test_other_seeds_and_the_other_split_stand_beside(quick):
    clean = of(quick, "baseline", "none")
    alone = summary.write(quick, "case", "adversarial_training")
    assert (
        "| color only | " in alone.split("| leakage |")[1]
        and "| baseline | " not in alone.split("leakage")[1].split("##")[0]
    )
    lower = dict(clean, seed=1, accuracy=0.123)
    seed = quick | {
        "metrics": [lower if row is clean else dict(row, seed=1) for row in quick["metrics"]],
        "parameters": quick["parameters"] | {"run": "second", "seed": 1},
    }
    both = summary.write(quick, "case", "adversarial_training", {"second": seed})
    assert "1. quick, this one\n2. second: seed 1\n" in both
    assert f"| clean | {clean['accuracy']:.2f}, 0.12 | " in both.split("Beside other runs")[1]
    spread = f"{(clean['accuracy'] + 0.123) / 2:.2f} (0.12 to {clean['accuracy']:.2f})"
    assert f"| clean | {spread} | " in both.split("Over 2 seeds (0, 1), models otherwise made alike")[1]
    again = summary.write(quick, "case", "adversarial_training", {"second": seed, "again": seed})
    assert "Over 2 seeds (0, 1), models otherwise made alike" in again, "a seed counts once"
    spread_alone = both.split("otherwise made alike")[1].split("## ")[0]
    assert "| worst case 4/255 |" in spread_alone
    wider = summary.write(
        quick, "case", "adversarial_training", {"w": seed | {"training_precision": "bfloat16"}}
    )
    assert "Over 2 seeds (0 in float32, 1 in bfloat16), models otherwise made alike" in wider
    seed["metrics"] = [lower]
    told = summary.write(quick, "case", "adversarial_training", {"second": seed})
    told = told.split("otherwise made alike")[1].split("## ")[0]
    assert "| worst case" not in told and "| FGSM 4/255 |" in told, (
        "no images of the models that one run lacks"
    )
    empty = told.split("| PGD 4/255 |")[1].split("\n")[0]
    assert set(empty) <= set(" |"), "no spread of what one run alone has"
    fewer = {"epsilons": [4], "square_queries": 0}
    fewer = seed | {"parameters": seed["parameters"] | fewer}
    told = summary.write(quick, "case", "adversarial_training", {"fewer": fewer})
    told = told.split("otherwise made alike")[1].split("## ")[0]
    assert "| worst case" not in told and f"| clean | {spread} | " in told, "other attacks, the same models"
    other_recipe = [row | {"recipe": "pgd"} for row in quick["recipes"]]
    other_recipe = {"recipes": other_recipe, "parameters": seed["parameters"] | {"recipes": ["pgd"]}}
    told = summary.write(quick, "case", "adversarial_training", {"pgd": seed | other_recipe})
    assert "otherwise made alike" not in told
    longer = seed | {"parameters": seed["parameters"] | {"epochs": 9}}
    assert "otherwise made alike" not in summary.write(
        quick, "case", "adversarial_training", {"longer": longer}
    )
    color = of(quick, "color_only", "none")
    by_image = quick | {
        "metrics": [
            dict(clean, split_by="image", balanced_accuracy=0.999, balanced_accuracy_low=None),
            dict(color, accuracy=0.456),  # of its own split, which that run shows too
        ],
        "parameters": quick["parameters"] | {"run": "by_image", "split_by": "image"},
    }
    table = evaluation.read_piece(QUICK / "predictions.csv.gz")
    tables = [table, table[table["model"] == "baseline"].assign(split_by="image")]
    quick["leakage"] = evaluation.records(evaluation.leakage(tables))
    both = summary.write(quick, "case", "adversarial_training", {"by_image": by_image})
    beside = both.split("Beside other runs")[1].split("## ")[0]
    assert f"| clean | {clean['accuracy']:.2f}, {clean['accuracy']:.2f} | " in beside and "0.46" not in beside
    assert f"| 1.00 | {clean['balanced_accuracy']:.2f} [" in both
    assert "] | +0 points [+0, +0] |" in both  # from the same predictions by either split


def test_a_training_is_told_by_the_epoch_that_was_kept(quick):
    columns = ("epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
    histories = {
        "baseline": pd.DataFrame([(1, 0.9, 0.5, 0.8, 0.6), (2, 0.3, 0.9, 0.4, 0.81)], columns=columns),
        "start_none": pd.DataFrame([(1, 0.9, 0.5, 0.7, 0.62), (2, 0.1, 1.0, 2.0, 0.7)], columns=columns),
    }
    quick["trainings"] = evaluation.records(results.trainings(histories))
    told = summary.write(quick, "case", "adversarial_training").split("## Training")[1].split("##")[0]
    assert "| baseline | 2 | 2 | 0.30 | 0.90 | 0.40 | 0.81 |\n" in told
    assert "| start_none | 2 | 1 | 0.90 | 0.50 | 0.70 | 0.62 |\n" in told


NAMES = (
    "<img src=x onerror=alert(1)>",
    "a|b*c_d",
    "`x` _y_ [z](javascript:0) ~~s~~ &lt; $\\frac{$ \\begin{a}0\\end{a}",
)


def seen(page):
    """The tags of a page and what a reader sees of it."""
    tags, words = [], []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes)))

        def handle_data(self, words_here):
            words.append(words_here)

    Parser().feed(page)
    return tags, "".join(words)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_wherever_the_summary_shows_it(quick, name):
    plain, _ = seen(markdown2html(summary.write(quick, "case", "adversarial_training", {"b": quick})))
    quick["dataset"]["name"] = f"own images in {name}"
    quick["run"] = quick["parameters"]["pretrained"] = name
    quick["trainings"][0]["model"] = name
    other = quick | {"parameters": quick["parameters"] | {"pretrained": f"{name} too"}}
    text = summary.write(quick, "case", "adversarial_training", {f"{name} 2": other})
    tags, words = seen(markdown2html(text))
    shown = (
        f"Own images in {name}, ",
        f"holds? ({name})",
        f"starts from {name},",
        f"{name}, this one",
        f"{name} 2: ",
    )
    assert all(each in words for each in (*shown, f"pretrained {name} too"))
    assert [tag for tag, _ in tags] == [tag for tag, _ in plain], "no tag comes from a name"
    assert "<img" not in text
