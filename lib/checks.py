"""What a claim of robustness must survive, computed from the table of predictions."""

from lib.evaluation import TESTED, format_epsilon, tested_rows


def verdicts(predictions):
    """What a robustness claim must survive (Carlini et al. 2019, Athalye et al. 2018), for each model.

    Returns dicts with name, model, value, verdict ("holds", "fails" or "not applicable") and meaning. The value is
    the most unfavorable one over splits, seeds and epsilons, and the meaning says where it was found; it is null
    where an attack that the check needs was not run. Accuracies are compared on the images that both attacks had.
    """
    rows = tested_rows(predictions)
    found = []
    for model, group in rows.groupby("model", sort=True):
        wide = [
            (f"split by {split_by}, seed {seed}", _right_by_run(part), part)
            for (split_by, seed), part in group.groupby(["split_by", "seed"], sort=True)
        ]
        for name, measure, bound, limit, words in CHECKS:
            values = [
                (float(v), f"{at}, {where}") for where, right, part in wide for v, at in measure(right, part)
            ]
            if values:
                value, where = (max if bound == "at most" else min)(values, key=lambda pair: pair[0])
                holds = value <= limit + 1e-9 if bound == "at most" else value >= limit - 1e-9
                verdict = "holds" if holds else "fails"
                meaning = f"{words.format(value=value)} ({where}); it holds with {bound} {limit:g}."
            else:
                value, verdict = None, "not applicable"
                meaning = "This model has no predictions under an attack that the check needs."
            row = {"name": name, "model": model, "value": value, "verdict": verdict, "meaning": meaning}
            found.append(row)
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


def _out_of_order(right, part):
    for strong, weak in [
        ("pgd", "transfer_fgsm"),
        ("pgd", "random_noise"),
        ("transfer_fgsm", "random_noise"),
    ]:
        yield from _gaps(right, strong, weak)


def _fgsm_only(right, part):
    yield from _gaps(right, "fgsm", "pgd")


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
        "The accuracy under PGD changes by {value:+.3f} from the lowest at a smaller epsilon",
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
        "answers both classes",
        _weaker_class,
        "at least",
        0.5,
        "Clean, the class that is recognized worse is right in {value:.1%} of its images",
    ),
]
