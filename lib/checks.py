"""What a claim of robustness must survive, computed from the table of predictions."""

import pandas as pd

from lib.evaluation import CASCADE, TESTED, metrics, nearest, tested_rows, worst_case
from lib.wording import format_epsilon

# PGD at one epsilon with other numbers of steps, on some test images: a row for each model and setting. steps 0 is the clean image.
AUDIT = ["model", "epsilon", "steps", "restarts", "step_size", "n", "accuracy", "margin", "zero_gradient"]
# From here on an attack that works turns every image: benign and malignant fit into each other's balls.
HUGE = round(64 / 255, 6)  # a hair below, as records hold it


def verdicts(predictions, audit=(), train_epsilon=4 / 255):
    """What a robustness claim must survive (Carlini et al. 2019, Athalye et al. 2018), for each model.

    train_epsilon: a fraction; two checks look at the tested epsilon nearest to it alone. audit: what `robustness.pgd_by_steps` found,
    a DataFrame or dicts; without it the checks that need it are not applicable.
    Returns dicts with name, model, value, bound, verdict ("holds", "fails" or "not applicable") and meaning. The value is
    the most unfavorable one over splits, seeds and epsilons, and the meaning says where it was found; it is null
    where an attack that the check needs was not run. Accuracies are compared on the images that both attacks had.
    """
    rows = tested_rows(predictions)
    audit = pd.DataFrame(audit, columns=AUDIT)
    found = []
    for model, group in rows.groupby("model", sort=True):
        audited = audit[audit["model"] == model]
        wide = [
            (f"split by {split_by}, seed {seed}", _right_by_run(part), part)
            for (split_by, seed), part in group.groupby(["split_by", "seed"], sort=True)
        ]
        for name, measure, bound, limit, words in CHECKS:
            if measure in OF_AUDIT:
                values = [(float(v), at) for v, at in measure(audited)]
            elif measure in AT_TRAINING:
                values = [
                    (float(v), f"{at}, {where}")
                    for where, right, part in wide
                    if (epsilons := _epsilons(right, "pgd"))
                    for v, at in measure(right, part, nearest(epsilons, train_epsilon))
                ]
            else:
                values = [
                    (float(v), f"{at}, {where}")
                    for where, right, part in wide
                    for v, at in measure(right, part)
                ]
            values = [pair for pair in values if pd.notna(pair[0])]
            if values:
                value, where = (max if bound == "at most" else min)(values, key=lambda pair: pair[0])
                holds = value <= limit + 1e-9 if bound == "at most" else value >= limit - 1e-9
                verdict = "holds" if holds else "fails"
                meaning = (
                    f"{words.format(value=value)} ({where}); the check holds if this is {bound} {limit:g}."
                )
            else:
                value, verdict = None, "not applicable"
                meaning = "The check is not for this model, or what it needs was not run or has no interval."
            row = {"name": name, "model": model, "value": value, "bound": f"{bound} {limit:g}"}
            found.append(row | {"verdict": verdict, "meaning": meaning})
    return found


def _right_by_run(part):
    """Right or wrong, one row an image and one column each (attack, epsilon); missing where not run."""
    # Of several surrogates the strongest counts: an image is right only if it is right against all of them.
    runs = ["attack", "epsilon"]
    return part.astype({"right": float}).pivot_table("right", index=TESTED, columns=runs, aggfunc="min")


def _epsilons(right, *attacks):
    """The epsilons at which all of these attacks ran."""
    return sorted(set.intersection(*[{e for a, e in right.columns if a == attack} for attack in attacks]))


def _gaps(right, strong, weak):
    """Accuracy under the strong attack minus that under the weak one, at each epsilon on the images of both."""
    for epsilon in _epsilons(right, strong, weak):
        both = right[[(strong, epsilon), (weak, epsilon)]].dropna().mean()
        yield both.iloc[0] - both.iloc[1], f"{strong} against {weak} at {format_epsilon(epsilon)}"


def _missed_by_pgd(right, part):
    for epsilon in _epsilons(right, "pgd", "fgsm"):
        both = right[[("pgd", epsilon), ("fgsm", epsilon)]].dropna()
        yield (both.iloc[:, 0] > both.iloc[:, 1]).mean(), f"at {format_epsilon(epsilon)}"


def _rise_with_epsilon(right, part):
    runs = [("none", 0.0)] * (("none", 0.0) in right.columns)
    runs += [("pgd", epsilon) for epsilon in _epsilons(right, "pgd")]
    accuracy = right[runs].dropna().mean().to_numpy()
    for k in range(1, len(runs)):
        yield accuracy[k] - accuracy[:k].min(), f"at {format_epsilon(runs[k][1])}"


def _fall(right, part):
    for epsilon in _epsilons(right, "pgd")[-1:] if ("none", 0.0) in right.columns else ():
        both = right[[("none", 0.0), ("pgd", epsilon)]].dropna().mean()
        yield both.iloc[0] - both.iloc[1], f"at {format_epsilon(epsilon)}"


def _out_of_order(right, part):
    for strong, weak in [
        ("pgd", "transfer_fgsm"),
        ("pgd", "random_noise"),
        ("transfer_fgsm", "random_noise"),
    ]:
        yield from _gaps(right, strong, weak)


def _fgsm_only(right, part):
    yield from _gaps(right, "fgsm", "pgd")


def _overfitted(right, part, epsilon):
    if part["model"].iloc[0] == "adversarial_training":  # on fresh examples: others have none to overfit to
        yield from _gaps(right[[run for run in right if run[1] == epsilon]], "fgsm", "pgd")


def _lost_by_rounding(right, part):
    rounded = part[part["right_8bit"].notna()]
    for (attack, epsilon), group in rounded.groupby(["attack", "epsilon"]):
        yield group["right_8bit"].mean() - group["right"].mean(), f"{attack} at {format_epsilon(epsilon)}"


def _found_without_gradients(right, part):
    ran = _cascade(right)
    if "square" in ran[1:]:  # it comes last
        yield from _gaps(right, ran[-2], "square")


def _found_by_the_cascade(right, part):
    ran = _cascade(right)
    if ran[1:] and ran[0] == "pgd":
        yield from _gaps(right, "pgd", ran[-1])


def _cascade(right):
    """PGD and the attacks that go on from it, those that ran."""
    return [attack for attack in ("pgd", *CASCADE) if _epsilons(right, attack)]


def _left_at_a_huge_epsilon(right, part):
    for epsilon in _epsilons(right, "pgd"):
        if epsilon >= HUGE:
            yield right["pgd", epsilon].mean(), f"at {format_epsilon(epsilon)}"


def _found_by_more_steps(audit):
    tried = audit[audit["steps"] > 0].sort_values(["steps", "restarts"])
    for most in tried.tail(1).to_dict("records"):
        for row in tried[tried["steps"] < most["steps"]].tail(1).to_dict("records"):
            steps = f"{row['steps']} steps against {most['steps']} with {most['restarts']} random starts"
            where = f"{steps} at {format_epsilon(row['epsilon'])}, {row['n']} images"
            yield row["accuracy"] - most["accuracy"], where


def _rise_over_steps(audit):
    tried = audit[audit["restarts"] <= 1].sort_values("steps").to_dict("records")
    for k in range(1, len(tried)):
        row, lowest = tried[k], min(earlier["margin"] for earlier in tried[:k])
        if tried[0]["margin"] > 0:
            where = f"{row['steps']} steps at {format_epsilon(row['epsilon'])}, {row['n']} images"
            yield (row["margin"] - lowest) / tried[0]["margin"], where


def _without_gradient(audit):
    for row in audit[audit["steps"] == 0].to_dict("records"):
        yield row["zero_gradient"], f"{row['n']} clean images"


def _worth_in_the_worst_case(right, part, epsilon):
    worst = worst_case(part[part["epsilon"] <= epsilon])
    rows = metrics(worst[worst["epsilon"] == epsilon])
    for row in rows[rows["subset"] == "all"].to_dict("records"):
        yield row["balanced_accuracy_low"], f"at {format_epsilon(epsilon)}"


AT_TRAINING = (_overfitted, _worth_in_the_worst_case)
OF_AUDIT = (_found_by_more_steps, _rise_over_steps, _without_gradient)


def _weaker_class(right, part):
    by_class = part[part["attack"] == "none"].groupby("malignant")["right"].mean()
    if len(by_class) == 2:
        weaker = by_class.idxmin()
        yield by_class[weaker], "sensitivity" if weaker else "specificity"


# name, function that yields (value, where), bound, limit, what the value says
CHECKS = [
    (
        "PGD fools what FGSM fools",
        _missed_by_pgd,
        "at most",
        0.05,
        "{value:.1%} of the images are wrong under FGSM but right under PGD, which starts where FGSM ends",
    ),
    (
        "success grows with epsilon",
        _rise_with_epsilon,
        "at most",
        0.02,
        "The accuracy under PGD, minus the lowest at any smaller epsilon, is {value:+.3f}",
    ),
    (
        "the attack does something",
        _fall,
        "at least",
        0.05,
        "PGD lowers the accuracy by {value:.3f}",
    ),
    (
        "white-box beats transfer, transfer beats noise",
        _out_of_order,
        "at most",
        0.02,
        "The accuracy under the attack that should be stronger, minus that under the weaker one, is {value:+.3f}",
    ),
    (
        "FGSM does not overstate accuracy",
        _fgsm_only,
        "at most",
        0.15,
        "The accuracy under FGSM, minus that under PGD, which is the one to read, is {value:+.3f}",
    ),
    (
        "no catastrophic overfitting",
        _overfitted,
        "at most",
        0.15,
        "At the epsilon of training, the accuracy under FGSM minus that under PGD is {value:+.3f}",
    ),
    (
        "an attack without gradients finds little more",
        _found_without_gradients,
        "at most",
        0.02,
        "Square turns another {value:.1%} of all images after the attacks before it; more would mean masked gradients",
    ),
    (
        "stronger attacks find little more",
        _found_by_the_cascade,
        "at most",
        0.05,
        "The attacks after PGD turn another {value:.1%} of all images",
    ),
    (
        "more steps and restarts find little more",
        _found_by_more_steps,
        "at most",
        0.05,
        "PGD with more steps and restarts turns another {value:.1%} of some images",
    ),
    (
        "the loss grows over the steps",
        _rise_over_steps,
        "at most",
        0.05,
        "The mean margin left under PGD, as a share of the clean one, minus the lowest after fewer steps, is {value:+.3f}",
    ),
    (
        "a huge epsilon turns everything",
        _left_at_a_huge_epsilon,
        "at most",
        0.01,
        "The accuracy under PGD is still {value:.3f}",
    ),
    (
        "gradients are there",
        _without_gradient,
        "at most",
        0.05,
        "The margin does not depend on {value:.1%} of the channel values: a large share would mean masked gradients",
    ),
    (
        "adversarial images survive saving",
        _lost_by_rounding,
        "at most",
        0.05,
        "Rounding the perturbed images to 8 bits changes the accuracy by {value:+.3f}",
    ),
    (
        "answers both classes",
        _weaker_class,
        "at least",
        0.5,
        "Clean, the class that is recognized worse is right in {value:.1%} of its images",
    ),
    (
        "attacked, better than one answer for all",
        _worth_in_the_worst_case,
        "at least",
        0.501,  # above 0.5
        "The interval of the balanced accuracy in the worst case begins at {value:.3f}; answering one class always has 0.500",
    ),
]
