"""The summary of a run in Markdown: what it found in short, then the tables that say so."""

from collections import Counter
from statistics import fmean

import pandas as pd

from lib import checks, evaluation, figures, papers, profiles, wording
from lib.results import COSTLY, made_alike

DRAWN_BANNER = "Drawn tissue: these numbers are no medical evidence."
DRAWN_NOTE = (
    "The difficulty, number of cases and size of the drawn images were settled while looking at test accuracy, so that the baseline "
    "of the quick profile gets about nine in ten right: these results show the method and are no test on unseen data."
)
SPLIT_WORDS = {
    "case": "no case on two sides",
    "image": "as the papers split: images of one case are on several sides",
    "fold": "the database's own five folds, by patient folder: some cases are on both sides, some images are tested several times",
}
# What a reader has to know before quoting a number.
READING = (
    "In brackets 95 % intervals from resampling cases. With few cases they are too narrow, and 0.00 or 1.00 with no width only says that "
    "every resample agrees. p comes from an exact test that flips the sign of whole cases; with k cases that differ it cannot fall below "
    "2 / 2^k. Intervals and p are about these trained networks; they do not cover the chance in training (one seed). Corrected (Holm), p "
    "holds for the main comparisons together, the same in every run: each defense with the baseline, and the primary defense with each "
    "other defense, clean and in the worst case at the epsilon of training; p of any other comparison is corrected for all of the run, "
    "and says so."
)


def write(results, split_by, primary_defense, other=None):
    """The summary of a run as Markdown. results: what 06 records; other: the results of other runs by name (`published`)."""
    about, used, other = results["dataset"], results["parameters"], other or {}
    rows = _rows(results, split_by)
    baseline = rows["baseline", "none", 0.0]
    text = [
        *[f"# {DRAWN_BANNER}", ""] * about["synthetic"],
        f"# How easily is the classifier fooled, and which defense holds? ({wording.as_text(results['run'])})",
        "",
        f"{wording.as_text(about['name'][:1].upper() + about['name'][1:])}, {about['images']} images of {about['cases']} cases; split by {split_by} "
        f"({SPLIT_WORDS[split_by]}). {baseline['n']} test images of {baseline['n_cases']} cases; seed {baseline['seed']}.",
        *["", DRAWN_NOTE] * about["synthetic"],
        "",
        "## In short",
        "",
        *_in_short(results, rows, split_by, primary_defense),
        *_which_defense(results, rows, split_by),
        "",
        "## Accuracy on the test images",
        "",
        *_accuracy(rows),
        "",
        f"{READING} PGD took {used.get('pgd_steps', 'some')} steps from the FGSM point and as many from a random one; APGD-CE, FAB and "
        "Square, where they ran, were shown, one after the other, only the images that nothing before had fooled. Accuracies under "
        "attack are upper bounds. The worst case, right clean and right under every attack at every epsilon up to the one named, "
        f"{_against_pgd(rows)}. The two models without a network were not attacked themselves and have none.",
        "",
        "![Accuracy against epsilon for every model](figures/06_curves.png)",
        "",
        "## Clean, by class",
        "",
        *_by_class(rows),
    ]
    text += _falls(results, split_by)
    text += _reliability(results, split_by)
    text += _certified(results["certified"])
    text += _leakage(results, other)
    text += _beside(results, other)
    text += _augmentations(results, rows)
    text += _trainings(results, split_by)
    return "\n".join([*text, *_checks(results["checks"]), *_papers(results["papers"])]) + "\n"


def _rows(results, split_by):
    """The metrics of all images under one split: (model, attack, epsilon) -> row."""
    return {
        (row["model"], row["attack"], row["epsilon"]): row
        for row in results["metrics"]
        if row["subset"] == "all"
        and row["split_by"] == split_by
        and row["source_model"] in evaluation.SOURCES
    }


def _models(rows):
    return [name for name in figures.MODEL_COLORS if (name, "none", 0.0) in rows]


def _epsilons(rows):
    return sorted({epsilon for _, attack, epsilon in rows if attack == "pgd"})


def _reference(results, epsilons):
    """Of these, the one nearest to the epsilon of training."""
    return evaluation.nearest(epsilons, results["parameters"].get("train_epsilon", 4) / 255)


def _value(row, rate="accuracy"):
    return "" if row is None else wording.number(row[rate]) + wording.interval(row, rate)


def _header(*names):
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def _in_short(results, rows, split_by, primary_defense):
    """A few sentences: how the baseline falls, and what each defense changes at the epsilon it was trained for."""
    epsilons = _epsilons(rows)
    if not epsilons:
        return ["No model was attacked with PGD."]
    epsilon = _reference(results, epsilons)
    differences = {
        (row["model_a"], row["attack"], row["epsilon"]): row
        for row in results["comparisons"]
        if (row["split_by"], row["model_b"]) == (split_by, "baseline")
    }

    def change(model, attack, epsilon):
        row = differences.get((model, attack, epsilon))
        if row is None:
            return "not compared"
        points = wording.difference(row["difference"], row)
        main = row["p_main"] is not None
        corrected = "corrected" if main else "corrected for all comparisons:"
        return f"{points}, p = {row['p_value']:.2g} ({corrected} {row['p_main' if main else 'p_holm']:.2g})"

    attack, at = "worst_case", f"in the worst case at {wording.format_epsilon(epsilon)}"
    lines = [
        f"- **Undefended**, the baseline has {_value(rows['baseline', 'none', 0.0])} clean and "
        f"{_value(rows.get(('baseline', attack, epsilon)))} {at}."
    ]
    for model in _models(rows):
        if model != "baseline" and (model, attack, epsilon) in rows:
            name = wording.model_name(model)
            said = ["the primary defense, as the run's parameters name it"] * (model == primary_defense)
            said += _candidates(results) * (model == "adversarial_training")
            named = f" ({'; '.join(said)})" if said else ""
            lines.append(
                f"- **{name[:1].upper()}{name[1:]}**{named}: {_value(rows[model, attack, epsilon])} {at}, "
                f"against the baseline {change(model, attack, epsilon)}; clean {change(model, 'none', 0.0)}; "
                f"clean specificity {wording.number(rows[model, 'none', 0.0]['specificity'])}."
            )
    largest = max([each for each in evaluation.visible(epsilons) if each < checks.HUGE], default=epsilons[-1])
    strongest = [rows[key] for key in rows if key[1:] == ("pgd", largest)]
    lines.append(
        f"- Under PGD at {wording.format_epsilon(largest)} no model keeps more than "
        f"{wording.number(max(row['accuracy'] for row in strongest))}."
    )
    if ("color_only", "none", 0.0) in rows:
        lines.append(
            f"- **Color only**, six numbers an image and no network, has {_value(rows['color_only', 'none', 0.0])} clean: "
            f"against the baseline {change('color_only', 'none', 0.0)}."
        )
    return lines


def _candidates(results):
    """How many recipes of adversarial training and augmentations were tried on validation, with the recipes kept, as a list of one."""
    recipes, augmentations = results["recipes"], {row["augmentation"] for row in results["augmentations"]}
    if not recipes:
        return []
    tried = list(dict.fromkeys(row["recipe"] for row in recipes))
    kept = Counter(row["recipe"] for row in recipes if row["kept"])
    counts = ", ".join(f"{name} kept in {kept[name]} of {kept.total()} folds" for name in tried)
    parts = [f"1 recipe ({tried[0]})" if len(tried) == 1 else f"{len(tried)} recipes ({counts})"]
    if augmentations:
        parts.append(f"{len(augmentations)} augmentation{'s' * (len(augmentations) > 1)}")
    return [f"tried on validation: {' and '.join(parts)}"]


def _which_defense(results, rows, split_by):
    """One table: what each model is worth clean, how that differs from the baseline, and what is left of it against whom."""
    epsilons = _epsilons(rows)
    if not epsilons:
        return []
    epsilon, rate = _reference(results, epsilons), "balanced_accuracy"
    transferred = ("transfer_fgsm", epsilon, "all", split_by)
    keys = ("attack", "epsilon", "subset", "split_by")
    transfers = [row for row in results["metrics"] if tuple(row[key] for key in keys) == transferred]
    compared = [row for row in results["comparisons"] if row["split_by"] == split_by]
    costs = {
        row["model_a"]: row for row in compared if (row["attack"], row["model_b"]) == ("none", "baseline")
    }
    heads = ("clean", "change, points", "random noise", "another model's images", "FGSM", "all attacks")
    lines = _header("model", *heads, "sensitivity, specificity")
    for model in (model for model in _models(rows) if (model, "worst_case", epsilon) in rows):
        clean, worst = rows[model, "none", 0.0], rows[model, "worst_case", epsilon]
        cost = costs.get(model)
        of_others = min(
            (row for row in transfers if row["model"] == model), key=lambda row: row[rate], default=None
        )
        cells = [
            _value(clean, rate),
            ""
            if cost is None or cost["balanced_difference"] is None
            else wording.points(cost["balanced_difference"]),
            _value(rows.get((model, "random_noise", epsilon)), rate),
            _value(of_others, rate),
            _value(rows.get((model, "fgsm", epsilon)), rate),
            _value(worst, rate),
            ", ".join(wording.number(worst[each]) for each in ("sensitivity", "specificity")),
        ]
        lines.append(f"| {' | '.join([wording.model_name(model), *cells])} |")
    values = ("accuracy, points", "balanced accuracy, points", "p", "corrected")
    tests = _header("main comparison", "test", *values)
    for row in (row for row in compared if row["p_main"] is not None):
        names = f"{wording.model_name(row['model_a'])} against {wording.model_name(row['model_b'])}"
        test = wording.attack_name(row["attack"], row["epsilon"])
        cells = [names, test, wording.difference(row["difference"], row, ""), _balanced(row)]
        cells += [f"{row[name]:.2g}" for name in ("p_value", "p_main")]
        tests.append(f"| {' | '.join(cells)} |")
    return [
        "",
        "## Which defense, at what cost, against whom",
        "",
        f"Balanced accuracy at {wording.format_epsilon(epsilon)}: clean, and the change from the baseline there (its interval is below); under random "
        "noise of the attack's size; under FGSM images of another model (the one that does most harm); under its own; and under all "
        "attacks that were run, with the sensitivity and specificity that are left then.",
        "",
        *lines,
        "",
        "![Balanced accuracy in the worst case over clean](figures/06_trade_off.png)",
        "",
        *tests,
    ]


def _balanced(row):
    ends = {"low": row["balanced_difference_low"], "high": row["balanced_difference_high"]}
    return (
        "–"
        if row["balanced_difference"] is None
        else wording.difference(row["balanced_difference"], ends, "")
    )


def _accuracy(rows):
    models, epsilons = _models(rows), _epsilons(rows)
    order = [attack for attack in evaluation.ATTACKS if attack not in ("none", *evaluation.NOT_AIMED)]
    ran = {key[1:] for key in rows}
    tests = [("none", 0.0), *((attack, e) for attack in order for e in epsilons if (attack, e) in ran)]
    if _against_pgd(rows) == SAME:
        tests = [test for test in tests if test[0] != "worst_case"]
    lines = _header("test", *map(wording.model_name, models))
    for attack, epsilon in tests:
        cells = [_value(rows.get((model, attack, epsilon))) for model in models]
        lines.append(f"| {' | '.join([wording.attack_name(attack, epsilon), *cells])} |")
    return lines


SAME = "equals PGD in every cell"


def _against_pgd(rows):
    pairs = [
        (row["accuracy"], rows[model, "pgd", epsilon]["accuracy"])
        for (model, attack, epsilon), row in rows.items()
        if attack == "worst_case" and (model, "pgd", epsilon) in rows
    ]
    return SAME if pairs and all(one == two for one, two in pairs) else "has lines of its own"


def _by_class(rows):
    rates = ("balanced_accuracy", "sensitivity", "specificity", "auroc", "patient_score")
    lines = _header("model", *map(wording.heading, rates))
    for model in _models(rows):
        cells = [_value(rows[model, "none", 0.0], rate) for rate in rates]
        lines.append(f"| {' | '.join([wording.model_name(model), *cells])} |")
    return [
        *lines,
        "",
        "AUROC, the area under the ROC curve, does not ask where the decision lies: a model with a high one and a low specificity ranks "
        "the images well and leans to malignant. The patient score is the mean over cases of the share of images that is right in each "
        "(Spanhol et al. 2016).",
    ]


def _falls(results, split_by):
    """How far images are from falling: the smallest epsilon for half of them, what stands, and how alike PGD's images look."""
    shown = {row["model"]: row for row in results["smallest_epsilons"] if row["split_by"] == split_by}
    alike = {
        (row["model"], row["epsilon"]): row
        for row in results["distances"]
        if (row["attack"], row["split_by"]) == ("pgd", split_by)
    }
    few = {model for (model, *_), row in _rows(results, split_by).items() if row["accuracy_low"] is None}
    epsilons = sorted({epsilon for _, epsilon in alike})
    ssim = [f"SSIM, PGD {wording.format_epsilon(epsilon)}" for epsilon in epsilons]
    lines = _header("model", "half fall at", "stand at every epsilon", *ssim)
    for model in filter(shown.get, figures.MODEL_COLORS):
        at = [shown[model][end] for end in ("median", "low", "high")]
        first, low, high = ("–" if each is None else wording.format_epsilon(each) for each in at)
        cells = [_value(alike.get((model, epsilon)), "ssim") for epsilon in epsilons]
        cells = [
            first if model in few else f"{first} [{low}, {high}]",
            wording.number(shown[model]["standing"]),
            *cells,
        ]
        lines.append(f"| {' | '.join([wording.model_name(model), *cells])} |")
    return [
        "",
        "## How far an image is from falling",
        "",
        "An image stands while the answer to it is right. The first epsilon tested at which at most half stand in the worst case (0: clean; "
        "– where more than half stand at every epsilon), the share that nothing fooled, and the mean SSIM of the images that PGD changed with their originals (1: the same picture).",
        "",
        *lines,
        "",
        "![The smallest epsilon that fools an image, by model](figures/07_smallest.png)",
    ]


def _reliability(results, split_by):
    """Whether probabilities can be believed, and what it buys to leave half of the images unanswered."""
    found = {
        (row["model"], row["epsilon"]): row for row in results["reliability"] if row["split_by"] == split_by
    }
    at = {"clean": 0.0}
    if epsilons := {epsilon for _, epsilon in found if epsilon}:
        epsilon = _reference(results, epsilons)
        at[f"FGSM {wording.format_epsilon(epsilon)}"] = epsilon
    heads = [f"{what}, {where}" for what in ("calibration error", "surer half") for where in at]
    lines = _header("model", *heads)
    for model in (model for model in figures.MODEL_COLORS if (model, 0.0) in found):
        of_model = [found.get((model, each)) for each in at.values()]
        values = [
            f"{_value(row, 'calibration_error')}; {wording.number(row['by_chance'])}" if row else ""
            for row in of_model
        ]
        values += [_value(row, "half_answered") for row in of_model]
        lines.append(f"| {' | '.join([wording.model_name(model), *values])} |")
    return [
        "",
        "## Can the probabilities be believed?",
        "",
        "The calibration error is, in five bins of P(malignant), the mean distance between the probability and the share that is malignant "
        "(0: honest); after the semicolon what honest probabilities would show by chance on as many images. The surer half: accuracy on the half "
        "of the images that lies farthest from the decision.",
        "",
        *lines,
    ]


def _certified(rows):
    """What randomized smoothing certifies: the share of images that are right and cannot change within a Euclidean radius."""
    if not rows:
        return []
    votes = pd.DataFrame(rows)
    votes["radius"] = votes["radius"].astype(float)
    radii = [0.0, *(k * rows[0]["sigma"] / 2 for k in (1, 2, 3))]
    lines = _header("model", "images", "abstains", *(f"right within {radius:g}" for radius in radii))
    for model, group in votes.groupby("model"):
        cells = [str(len(group)), wording.number(group["radius"].isna().mean())]
        for radius in radii:
            holds = group["right"] & (group["radius"] >= radius)
            low, high = evaluation.bootstrap_interval(holds, group["case"], group["label"])
            cells.append(wording.number(holds.mean()) + wording.between(low, high))
        lines.append(f"| {' | '.join([wording.model_name(model), *cells])} |")
    return [
        "",
        "## What noise certifies",
        "",
        f"Randomized smoothing (Cohen et al. 2019), from {rows[0]['samples']} noisy copies of an image, sigma {rows[0]['sigma']:g}: with 99.9 % "
        "confidence, the answer to most noisy copies cannot change within a Euclidean radius, whatever the attacker does; if the votes "
        "are too even, the model abstains. Share of images that are right and certified at least so far:",
        "",
        *lines,
    ]


def _leakage(results, other):
    """The models that were judged on both splits: how much of an accuracy is the images that share a case with training."""
    if not results["leakage"]:
        return []
    used = results["parameters"]
    every = [results, *(them for them in other.values() if made_alike(used, them["parameters"]))]

    def clean(model, kind):
        return next(filter(None, (_rows(each, kind).get((model, "none", 0.0)) for each in every)))

    lines = [
        "",
        "## What accuracy is made of: split by image and by case",
        "",
        "Split by image, cases lie on both sides, and a model may know the case by its stain. Clean test images; the last column is the "
        "balanced accuracy that goes when no case is known, with an interval from resampling the cases of both splits together.",
        "",
        *_header("model", "by image", "by case", "balanced by image", "balanced by case", "leakage"),
    ]
    found = {row["model"]: row for row in results["leakage"]}
    for name in filter(found.get, figures.MODEL_COLORS):
        pair = [clean(name, kind) for kind in ("image", "case")]
        cells = [_value(row, rate) for rate in ("accuracy", "balanced_accuracy") for row in pair]
        cells.append(wording.difference(found[name]["leakage"], found[name]))
        lines.append(f"| {' | '.join([wording.model_name(name), *cells])} |")
    crossing = results["dataset"].get("crossing", ())
    return [*lines, *[""] * bool(crossing), *leak_sentences(crossing)]


def leak_sentences(crossing):
    """What crosses from training to test in each split, a Markdown item each; crossing: the rows of `splits.leaks` as dicts."""
    return [
        f"- Split by {row['split_by']}: {row['cases']} cases have images in training and outside it; of {row['test_images']} test images "
        f"{row['shared_case']} belong to a case in training and {row['near_duplicates']} have a near duplicate there."
        for row in crossing
    ]


def _beside(results, other):
    """Runs on the same images, such as other seeds, each by its own split: every value in the order of the runs."""
    if not other:
        return []
    every = [_rows(each, each["parameters"]["split_by"]) for each in (results, *other.values())]
    lines = [
        "",
        "## Beside other runs",
        "",
        "Values in the order of the runs:",
        "",
        f"1. {wording.as_text(results['run'])}, this one",
    ]
    for number, (name, them) in enumerate(other.items(), 2):
        differs = [
            f"{key} {wording.as_text(value)}"
            for key, value in _made(them).items()
            if value != _made(results).get(key, value)
        ]
        lines.append(f"{number}. {wording.as_text(name)}: {', '.join(differs) or 'the same parameters'}")
    models = _models(every[0])
    lines += ["", *_header("test", *map(wording.model_name, models))]

    def line(name, key, rate="accuracy"):
        found = [[rows.get((model, *key)) for rows in every] for model in models]
        cells = [
            ", ".join(wording.number(row and row[rate]) for row in values) if any(values) else ""
            for values in found
        ]
        return f"| {' | '.join([name, *cells])} |"

    lines.append(line("clean", ("none", 0.0)))
    for attack in ("fgsm", "pgd"):
        lines += [line(wording.attack_name(attack, e), (attack, e)) for e in _epsilons(every[0])]
    for rate in ("balanced_accuracy", "sensitivity", "specificity"):
        lines.append(line(f"clean {wording.heading(rate)}", ("none", 0.0), rate))
    return [
        *lines,
        "",
        "A seed draws split, starting weights, batches and noise anew, so test images differ too, as they do between splits.",
        *_over_seeds(results, other),
    ]


def _over_seeds(results, other):
    """How far chance in split and training moves the values: their spread over runs whose models differ in the seed, or in precision too.

    The worst case is over all attacks of a run: it stands beside others only where all runs have the same ones, the images made
    for other models among them.
    """
    runs_by_seed = {}
    for each in (results, *other.values()):
        if _differ_in_seed(each, results):
            runs_by_seed.setdefault(each["parameters"].get("seed"), each)
    if len(runs_by_seed) < 2:
        return []
    alike = list(runs_by_seed.values())
    every = [_rows(each, each["parameters"]["split_by"]) for each in alike]
    models, epsilon = _models(every[0]), _reference(results, _epsilons(every[0]))
    asked = [
        [_models(rows), *(each["parameters"].get(name) for name in ("epsilons", *COSTLY))]
        for each, rows in zip(alike, every, strict=True)
    ]
    attacked = ("fgsm", "pgd", *["worst_case"] * all(each == asked[0] for each in asked))
    tests = [("none", 0.0), *((attack, epsilon) for attack in attacked)]
    shown = [(*test, rate) for rate in ("accuracy", "balanced_accuracy") for test in tests]
    lines = _header("test", *map(wording.model_name, models))
    for attack, at, rate in shown:
        cells = []
        for model in models:
            values = [rows.get((model, attack, at), {}).get(rate) for rows in every]
            told = None not in values
            cells.append(f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if told else "")
        name = wording.attack_name(attack, at) + " balanced accuracy" * (rate != "accuracy")
        lines.append(f"| {' | '.join([name, *cells])} |")
    precisions = {each["training_precision"] for each in alike}
    seeds = ", ".join(
        f"{seed} in {each['training_precision']}" if len(precisions) > 1 else str(seed)
        for seed, each in runs_by_seed.items()
    )
    return [
        "",
        f"Over {len(alike)} seeds ({seeds}), models otherwise made alike: the mean, and from the least to the most.",
        "",
        *lines,
    ]


def _made(results):
    """What a run's numbers depend on: its parameters, and what "auto" chose as precision."""
    used = {
        name: value
        for name, value in results["parameters"].items()
        if name not in ("run", "compare_with", "data_root")
    }
    return used | {"precision": results["training_precision"]}


def _differ_in_seed(one, two):
    """Whether models differ in seed and precision at most; of the recipes, what one run kept the other must have tried."""
    tried = [set(each["parameters"].get("recipes", [])) for each in (one, two)]
    kept = [{row["recipe"] for row in each.get("recipes", []) if row["kept"]} for each in (one, two)]
    alike = made_alike(one["parameters"], two["parameters"], ("seed", "precision"))
    return alike and kept[0] <= tried[1] and kept[1] <= tried[0]


def _augmentations(results, rows):
    """The augmentations that were tried on validation, and what each gives on test images."""
    tried = pd.DataFrame(results.get("augmentations", ()))
    if tried.empty or tried["augmentation"].nunique() < 2:
        return []
    chosen = tried["augmentation"].iloc[0]  # the run's own stands first
    differences = {
        row["model_a"]: row
        for row in results["comparisons"]
        if (row["attack"], row["model_b"]) == ("none", "baseline")
    }
    lines = [
        "",
        "## What helps on tissue never seen",
        "",
        f"The same training with other augmentations, clean. This run uses {chosen}; validation is at the epoch kept, the mean of "
        "the folds.",
        "",
        *_header(
            "augmentation",
            "validation loss",
            "validation accuracy",
            "accuracy",
            "balanced accuracy",
            "AUROC",
            f"accuracy against {chosen}",
        ),
    ]
    numbers = ["validation_loss", "validation_accuracy"]
    for name, means in tried.groupby("augmentation", sort=False)[numbers].mean().iterrows():
        model = "baseline" if name == chosen else f"baseline_{name}"
        row, change = rows[model, "none", 0.0], differences.get(model)
        cells = [wording.number(means[number]) for number in numbers]
        cells += [_value(row, rate) for rate in ("accuracy", "balanced_accuracy", "auroc")]
        cells.append("" if change is None else wording.difference(change["difference"], change))
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def _trainings(results, split_by):
    """What each training came to on validation, the other starts of the baseline included."""
    if not results["trainings"]:
        return []
    folds = len({row["fold"] for row in results["split"] if row["split_by"] == split_by})
    numbers = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
    lines = [
        "",
        "## Training",
        "",
        "At the epoch that was kept: the one with the least validation loss, on PGD images for adversarial training and on clean ones for "
        f"the others. The baseline starts from {wording.as_text(results['parameters'].get('pretrained', 'unrecorded weights'))}, start_... from others.",
        *["", f"The first of {folds} folds."] * (folds > 1),
        "",
        *_header("training", "epochs", "kept", *map(wording.heading, numbers)),
    ]
    for row in results["trainings"]:
        cells = [str(row["epochs"]), str(row["kept"]), *(wording.number(row[name]) for name in numbers)]
        lines.append(f"| {' | '.join([wording.as_text(row['model']), *cells])} |")
    return lines


def _checks(verdicts):
    """One line a check, one column a model; below it what the check asks."""
    found = {(check["name"], check["model"]): check for check in verdicts}
    models = [name for name in figures.MODEL_COLORS if any(model == name for _, model in found)]
    lines = [
        "",
        "## Checks",
        "",
        *_header("what a claim of robustness must survive", *map(wording.model_name, models)),
    ]
    for name in dict.fromkeys(name for name, _ in found):
        bound = next(check["bound"] for check in verdicts if check["name"] == name)
        cells = []
        for model in models:
            check = found.get((name, model), {"value": None})
            value = None if check["value"] is None else round(check["value"], 6) + 0.0
            cells.append("–" if value is None else f"{check['verdict']} ({wording.number(value)})")
        lines.append(f"| {' | '.join([f'{name} ({bound})', *cells])} |")
    lines += ["", "What the values say, for the baseline:", ""]
    lines += [
        f"- {check['name']}: {check['meaning']}"
        for check in verdicts
        if check["model"] == "baseline" and check["value"] is not None
    ]
    fails = [
        check for check in verdicts if check["verdict"] == "fails" and check["model"] in profiles.DEFENSES
    ]
    lines += ["", "What fails for the defenses:", ""] if fails else []
    lines += [
        f"- {wording.model_name(check['model'])}, {check['name']}: {check['meaning']}" for check in fails
    ]
    return lines


def _papers(records):
    """What two papers published, beside ours: a table each, what differs from their recipes, and where they contradict themselves."""
    if not records:
        return []
    lines = ["", "## Beside the papers", "", "With a star where a reason stands below the table."]
    for number, paper in enumerate(dict.fromkeys(row["paper"] for row in records), 1):
        own = [row for row in records if row["paper"] == paper]
        lines += [
            "",
            f"### {paper}",
            "",
            f"![Published values and ours: {paper}](figures/06_paper_{number}.png)",
            "",
            *_header("where", "what", "tested on", "published", "ours", "images"),
        ]
        for row in own:
            ours = wording.number(row["measured"]) if isinstance(row["measured"], float) else row["measured"]
            spread = wording.between(row["low"], row["high"])
            ours = "*" if ours is None else f"{ours}{spread}{'*' * bool(row['reason'])}"
            said = (row["table"], row["quantity"], row["tested"], row["published"], ours, row["n"] or "")
            lines.append(f"| {' | '.join(map(str, said))} |")
        reasons = dict.fromkeys(row["reason"] for row in own if row["reason"])
        lines += [""] * bool(reasons) + [f"\\* {reason}" for reason in reasons]
        lines += ["", f"What differs from {paper}, and what they leave open:", ""]
        lines += [f"- {each}" for each in own[0]["deviations"]]
    for words, wanted in (
        (f"Where the published numbers contradict each other, by computation. {papers.ROUNDING}", False),
        ("Where they agree, and what they depend on:", True),
    ):
        lines += ["", words, ""]
        lines += [
            f"- {paper}: {said}." for paper, said, agrees in papers.contradictions() if agrees == wanted
        ]
    return lines
