"""One table of predictions, and every statistic that is made from it.

A row of the table is one image under one evaluation (`COLUMNS`). Accuracy, intervals, tests and the worst case, like the
verdicts of `checks`, are pure functions of that table, so whoever has the table can redo all of them without a model.
Malignant is the positive class, and a decision is malignant when the margin is above 0. The statistical unit is the case:
the images of one case are not independent.
"""

import gzip
import warnings
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.special import expit

from lib import profiles, runs

COLUMNS = [
    *("image", "case", "label", "subtype", "magnification", "split", "split_by", "fold", "seed"),
    *(
        "model",
        "attack",
        "epsilon",
        "source_model",
        "p_malignant",
        "margin",
        "right_8bit",
        "linf",
        "l2",
        "ssim",
    ),
]
EVALUATION = ["model", "attack", "epsilon", "split_by", "seed", "source_model"]
TESTED = ["image", "fold"]  # one test of one image
RATES = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "precision")
METRICS = [
    *(*EVALUATION, "subset", "n", "n_cases"),
    *(name + end for name in RATES for end in ("", "_low", "_high")),
    *("accuracy_8bit", "accuracy_8bit_low", "accuracy_8bit_high"),
    *(name + end for name in ("patient_score", "auroc") for end in ("", "_low", "_high")),
    *("tp", "fp", "tn", "fn"),
]
COMPARISONS = [
    *("model_a", "model_b", "attack", "epsilon", "split_by", "difference", "low", "high", "p_value", "test"),
    *("p_holm", "p_main", "balanced_difference", "balanced_difference_low", "balanced_difference_high"),
    *("seed", "source_model", "n", "n_cases"),
]
LEAKAGE = ["model", "by_image", "by_case", "leakage", "low", "high", "n_image", "n_case", "n_cases"]
TEXT = ["image", "case", "label", "subtype", "split", "split_by", "model", "attack", "source_model"]
WHOLE = ["magnification", "fold", "seed"]
# From no attack to the strongest.
ATTACKS = ("none", "random_noise", "transfer_fgsm", "fgsm", "pgd", "apgd_ce", "fab", "square", "worst_case")
# Costly: each is shown the images that stand under PGD and all before it; those that a run leaves out are passed over.
CASCADE = ("apgd_ce", "fab", "square")
WITHOUT_NETWORK = ("color_only", "always_malignant")  # what an accuracy is worth
# What tables show: own attacks and the baseline's images; the audit has every model's.
SOURCES = ("", "baseline")
NOT_AIMED = ("random_noise", "transfer_fgsm")  # attacks that were not made for the model that is shown them
# With fewer cases there are too few different resamples for a 95 % interval to mean anything.
MIN_CASES = 5


# ---------------------------------------------------------------- the table


def predict(model, images, batch_size=32):
    """Margins (malignant minus benign logit) of a model, in float32 and eval mode.

    images: float32 tensor (N, 3, H, W) in [0, 1], on any device. Returns a float32 array (N,).
    No gradients are recorded; every part of the model goes back to the mode that it was in.
    """
    import torch

    parameter = next(model.parameters(), None)
    device = images.device if parameter is None else parameter.device
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    margins = [np.zeros(0, np.float32)]
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for batch in images.split(batch_size) if len(images) else ():
                logits = model(batch.to(device)).float()
                margins.append((logits[:, 1] - logits[:, 0]).cpu().numpy())
    finally:
        for part, training in modes:
            part.training = training
    return np.concatenate(margins)


def prediction_rows(
    table,
    *,
    model,
    attack,
    epsilon,
    margins,
    seed,
    source_model="",
    clean=None,
    perturbed=None,
    margins_8bit=None,
):
    """The rows of the predictions table (`COLUMNS`) of one evaluation.

    table: rows of split.csv, one for each image in order; margins: (N,), malignant minus benign logit; margins_8bit: the same
    for the images rounded to 8 bits, of which right_8bit, 1 or 0, is kept, null where nothing was perturbed;
    epsilon: the allowed change of a channel value in [0, 1]; clean, perturbed: float32 tensors (N, 3, H, W) in
    [0, 1], both or neither. They give linf and l2 (over the whole image, in [0, 1] units) and the SSIM of
    Wang et al. 2004 with scikit-image's window of 7 pixels; without them the three are null.
    Asserts that no image was changed by more than epsilon (to 1e-6). All are rounded, as the table is published: the margin
    to four significant digits, which keep its sign.
    """
    margins = np.asarray(margins, np.float32)
    if len(margins) != len(table):
        raise ValueError(f"{len(margins)} margins for {len(table)} images of {model} under {attack}.")
    if not np.isfinite(margins).all():
        raise ValueError(f"{model} under {attack}: {np.sum(~np.isfinite(margins))} margins are not finite.")
    if (clean is None) != (perturbed is None):
        raise ValueError("Give both the clean and the perturbed images, or neither.")
    rows = table[[name for name in COLUMNS if name in table.columns]].reset_index(drop=True)
    rows = rows.assign(
        seed=seed, model=model, attack=attack, epsilon=float(epsilon), source_model=source_model
    )
    rows["p_malignant"] = expit(margins.astype(float)).round(4)
    rows["margin"] = _significant(margins, 4)
    right = None if margins_8bit is None else is_right(rows, np.asarray(margins_8bit))
    rows["right_8bit"] = pd.Series(right, rows.index, dtype="Int8")
    linf = l2 = ssim = np.full(len(rows), np.nan)
    if perturbed is not None:
        linf, l2, ssim = _distances(clean, perturbed)
        worst = linf.max(initial=0.0)
        assert worst <= epsilon + 1e-6, f"{attack} changed a pixel by {worst:.6f}, more than {epsilon:.6f}."
    rows = rows.assign(linf=linf.round(7), l2=_significant(l2, 3), ssim=ssim.round(3))
    return rows[COLUMNS]


def _significant(values, digits):
    return np.array([float(f"{value:.{digits}g}") for value in values])


def _distances(clean, perturbed):
    """Largest change, Euclidean length of the change and SSIM, each (N,), of two batches (N, 3, H, W)."""
    from skimage.metrics import structural_similarity

    clean = clean.detach().cpu().numpy().astype(float)
    perturbed = perturbed.detach().cpu().numpy().astype(float)
    if clean.shape != perturbed.shape:
        raise ValueError(
            f"Clean images {clean.shape} and perturbed images {perturbed.shape} differ in shape."
        )
    change = (perturbed - clean).reshape(len(clean), int(np.prod(clean.shape[1:])))
    ssim = [
        structural_similarity(a, b, channel_axis=0, data_range=1.0)
        for a, b in zip(clean, perturbed, strict=True)
    ]
    return np.abs(change).max(axis=1), np.linalg.norm(change, axis=1), np.array(ssim, float)


def read_predictions(files):
    """Pieces *.csv.gz as one table with `COLUMNS`, in the order given.

    Raises ValueError, naming the file or the row, when a piece has other columns, when a margin is missing or when an evaluation
    of an image is there twice.
    """
    predictions = pd.concat([read_piece(file) for file in files], ignore_index=True)
    _refuse_bad_rows(predictions, ["image", *EVALUATION, "fold"])
    return predictions


def read_piece(file):
    """One file of predictions, with text kept as written. Raises ValueError, naming it, when its columns are others."""
    piece = pd.read_csv(
        file,
        dtype=dict.fromkeys(TEXT, str) | dict.fromkeys(WHOLE, int) | {"right_8bit": "Int8"},
        keep_default_na=False,
        na_values={name: [""] for name in COLUMNS if name not in TEXT},
    )
    if list(piece.columns) != COLUMNS:
        odd = sorted(set(piece.columns) ^ set(COLUMNS)) or "the order"
        raise ValueError(
            f"{file} is not a table of predictions of this version, its columns differ in {odd}: delete it and run again."
        )
    return piece


def write_piece(predictions, file):
    """Write predictions to a file *.csv.gz, whole or not at all; the same rows give the same bytes."""
    content = gzip.compress(predictions.to_csv(index=False).encode(), mtime=0)
    with runs.whole_file(file) as part:
        part.write_bytes(content)


def _refuse_bad_rows(predictions, key):
    """Raises ValueError at rows that no statistic may count: unknown labels, no margin, or a key that repeats."""
    unknown = set(predictions["label"]) - {"benign", "malignant"}
    if unknown:
        raise ValueError(f"Unknown labels in the predictions: {sorted(map(str, unknown))}.")
    bad = predictions[predictions[["case", "epsilon", "margin"]].isna().any(axis=1)]
    if len(bad):
        raise ValueError(f"{len(bad)} predictions lack a value, the first: {bad.iloc[0][key].to_dict()}.")
    bad = predictions[predictions.duplicated(key)]
    if len(bad):
        raise ValueError(f"{len(bad)} predictions are there twice, the first: {bad.iloc[0][key].to_dict()}.")


def tested_rows(predictions):
    """The test rows, with `source_model` never null and `malignant`, `right` and `toward_truth` added.

    toward_truth is the margin toward the true class: positive where the model is right, the attack's target.
    """
    rows = predictions[predictions["split"] == "test"].reset_index(drop=True)
    rows["source_model"] = rows["source_model"].fillna("")
    # Folds are pooled, so an image may be on the test side of one fold only; the published folds overlap.
    _refuse_bad_rows(rows, [*TESTED, *EVALUATION])
    _refuse_bad_rows(rows[rows["split_by"] != "fold"], ["image", *EVALUATION])
    malignant = (rows["label"] == "malignant").to_numpy()
    margin = rows["margin"].to_numpy(float)
    return rows.assign(
        malignant=malignant,
        right=is_right(rows),
        right_8bit=rows["right_8bit"].astype(float),
        toward_truth=np.where(malignant, margin, -margin),
    )


def is_right(rows, margins=None):
    """Whether each row's decision, malignant when the margin is above 0, is its label; margins: others than the row's."""
    return ((rows["margin"] if margins is None else margins) > 0) == (rows["label"] == "malignant")


def margin_falls(predictions):
    """Why images stand or fall under FGSM: medians over test images, a row for each model and epsilon.

    Columns: model, epsilon, clean (margin toward the truth, in logits), fgsm (the same under attack), fall (what the step took).
    """
    rows = tested_rows(predictions).set_index(["model", "image", "fold"])
    clean = rows.loc[rows["attack"] == "none", "toward_truth"].rename("clean")
    attacked = rows[rows["attack"] == "fgsm"].join(clean).rename(columns={"toward_truth": "fgsm"})
    attacked = attacked.assign(fall=attacked["clean"] - attacked["fgsm"])
    return attacked.groupby(["model", "epsilon"])[["clean", "fgsm", "fall"]].median().reset_index()


# ---------------------------------------------------------------- metrics and intervals


def metrics(predictions, resamples=2000, seed=0):
    """Metrics of the test rows: a row (`METRICS`) for each evaluation and subset, the baseline and clean images first.

    Subsets: "all"; "malignant", except on images made for other models (not in `SOURCES`); "100X", ... clean and in the worst
    case, where there are several magnifications. The folds of one split are pooled (out-of-fold predictions). All are
    fractions; _low and _high are those of `bootstrap_interval`.
    What does not exist is null (NaN or NA): with one class in the subset, everything about the other class, and the
    balanced accuracy, precision and AUROC, which need both; precision also when the model never answers malignant.
    accuracy_8bit is the accuracy after rounding the perturbed images to 8 bits, null where there are none.
    The worst case has no AUROC: its margins are of different attacks at different epsilons.
    patient_score is the mean over cases of the share that is right in each (Spanhol et al. 2016, section IV, with cases for
    patients).
    """
    rows = tested_rows(predictions)
    found = []
    for key, group in rows.groupby(EVALUATION, sort=True):
        evaluated = dict(zip(EVALUATION, key, strict=True))
        subsets = {"all": group}
        if evaluated["source_model"] in SOURCES:
            subsets["malignant"] = group[group["malignant"]]
        magnifications = sorted(group["magnification"].unique())
        if len(magnifications) > 1 and evaluated["attack"] in ("none", "worst_case"):
            subsets |= {f"{m}X": group[group["magnification"] == m] for m in magnifications}
        for subset, part in subsets.items():
            if len(part):
                found.append(evaluated | {"subset": subset} | _measure(part, resamples, seed))
    found.sort(key=lambda row: (row["model"] != "baseline", row["model"], _strength(row["attack"])))
    counts = ["n", "n_cases", "tp", "fp", "tn", "fn"]
    return pd.DataFrame(found, columns=METRICS).astype(dict.fromkeys(counts, "Int64"))


def _strength(attack):
    return ATTACKS.index(attack) if attack in ATTACKS else len(ATTACKS)


def _measure(rows, resamples, seed):
    malignant, right = rows["malignant"].to_numpy(), rows["right"].to_numpy()
    outcomes = _counts(right, malignant)
    low, high = bootstrap_interval(outcomes, rows["case"], malignant, _rates, resamples=resamples, seed=seed)
    tp, fn, tn, fp = (int(count) for count in outcomes.sum(0))
    positives, negatives = tp + fn, tn + fp
    rates = zip(
        RATES, _rates(outcomes.sum(0)), np.broadcast_to(low, 5), np.broadcast_to(high, 5), strict=True
    )
    measured = {
        name + end: value
        for name, *three in rates
        for end, value in zip(("", "_low", "_high"), three, strict=True)
    }
    rounded = rows["right_8bit"]
    if rounded.notna().all():
        low, high = bootstrap_interval(rounded, rows["case"], malignant, resamples=resamples, seed=seed)
        measured |= {"accuracy_8bit": rounded.mean(), "accuracy_8bit_low": low, "accuracy_8bit_high": high}
    # Each case counts once, however many images it has.
    weight = 1 / rows.groupby("case")["image"].transform("size")
    measured["patient_score"] = (weight * right).sum() / weight.sum()
    measured["patient_score_low"], measured["patient_score_high"] = bootstrap_interval(
        np.column_stack([weight * right, weight]),
        rows["case"],
        malignant,
        lambda sums, _: sums[:, 0] / sums[:, 1],
        resamples=resamples,
        seed=seed,
    )
    if positives and negatives and rows["attack"].iloc[0] != "worst_case":
        found = _auroc(rows, malignant, resamples, seed)
        measured |= dict(zip(("auroc", "auroc_low", "auroc_high"), found, strict=True))
    return measured | {
        "n": len(rows),
        "n_cases": rows["case"].nunique(),
        "tp": tp if positives else None,
        "fp": fp if negatives else None,
        "tn": tn if negatives else None,
        "fn": fn if positives else None,
    }


def _counts(right, malignant):
    """Of each image whether it is a tp, fn, tn or fp: bool (N, 4)."""
    return np.column_stack([right & malignant, ~right & malignant, right & ~malignant, ~right & ~malignant])


def _rates(sums, n=None):
    """`RATES` from the counts tp, fn, tn, fp (..., 4), as (..., 5); NaN where one does not exist."""
    tp, fn, tn, fp = np.moveaxis(np.asarray(sums, float), -1, 0)
    with np.errstate(invalid="ignore"):
        sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
        precision = np.where((tp + fn) * (tn + fp) > 0, tp / (tp + fp), np.nan)
        accuracy = (tp + tn) / (tp + fn + tn + fp)
    return np.stack([accuracy, (sensitivity + specificity) / 2, sensitivity, specificity, precision], -1)


def _auroc(rows, malignant, resamples, seed):
    """The share of (malignant, benign) pairs in the right order, ties half (Mann-Whitney), and its `bootstrap_interval`.

    Pairs are counted for each malignant image and benign case.
    """
    # The margin and not the probability, which is rounded to 0 or 1 where the model is sure.
    margin = rows["margin"].to_numpy()
    higher, lower = margin[malignant][:, None], margin[~malignant]
    in_case = pd.get_dummies(rows["case"][~malignant]).to_numpy(float)
    names = in_case.shape[1]
    # Summed over images: pairs with each benign case, how often that case is drawn, malignant images, benign images.
    values = np.zeros((len(rows), 2 * names + 2))
    values[malignant, :names] = ((higher > lower) + 0.5 * (higher == lower)) @ in_case
    values[~malignant, names:-2] = in_case / in_case.sum(0)
    values[:, -2], values[:, -1] = malignant, ~malignant

    def area(sums, _):
        pairs, drawn, positives, negatives = np.split(sums, [names, 2 * names, 2 * names + 1], axis=1)
        return ((pairs * drawn).sum(1, keepdims=True) / (positives * negatives))[:, 0]

    low, high = bootstrap_interval(values, rows["case"], malignant, area, resamples=resamples, seed=seed)
    return area(values.sum(0, keepdims=True), None)[0], low, high


def mean_of_sums(sums, n):
    """The mean of the first column, for `bootstrap_interval`."""
    return sums[:, 0] / n


def bootstrap_interval(values, cases, strata, statistic=mean_of_sums, *, resamples=2000, seed=0):
    """95 % percentile interval by resampling cases within strata (Efron and Tibshirani 1993, chapter 13).

    values: (N,) or (N, k), numbers of each image that the statistic adds up; cases: (N,), the case of each image;
    strata: (N,), its class, so that every resample holds both classes; statistic: a function of the sums
    (resamples, k) and the number of images (resamples,) that gives (resamples,), by default the mean, or (resamples, m); where
    it is NaN, the resample is left out.
    Returns (low, high), both NaN with fewer than five cases in a class that is there, or two arrays (m,). Does not depend on
    the order of the rows. Cases that hold several classes are a stratum of their own, and count in each.
    """
    values = np.asarray(values, float)
    values = values[:, None] if values.ndim == 1 else values
    names, case = np.unique(np.asarray(cases, str), return_inverse=True)
    levels, level = np.unique(np.asarray(strata), return_inverse=True)
    holds = np.zeros((len(names), len(levels)), int)
    holds[case, level] = 1
    if not len(levels) or holds.sum(0).min() < MIN_CASES:
        return np.nan, np.nan
    stratum_of_case = np.unique(holds @ (1 << np.arange(len(levels))), return_inverse=True)[1]
    sizes = np.bincount(stratum_of_case)
    columns = np.column_stack([values, np.ones(len(values))])
    per_case = np.column_stack([np.bincount(case, column) for column in columns.T])
    sums = 0
    for k, size in enumerate(sizes):
        sums = sums + _case_counts(size, resamples, seed, k) @ per_case[stratum_of_case == k]
    drawn = statistic(sums[:, :-1], sums[:, -1])
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # nowhere defined: NaN
        return tuple(np.nanquantile(drawn, [0.025, 0.975], axis=0))


@lru_cache(maxsize=32)
def _case_counts(cases, resamples, seed, stratum):
    """How often each case is drawn in each resample, (resamples, cases); the same for every model and attack."""
    rng = np.random.default_rng([seed, stratum])
    return rng.multinomial(cases, np.full(cases, 1 / cases), size=resamples).astype(float)


# ---------------------------------------------------------------- one model against another


def comparisons(predictions, primary="", train_epsilon=0.0, resamples=2000, seed=0):
    """Every other model against the baseline, and `primary` against the other defenses: a row (`COMPARISONS`) an evaluation.

    difference is the accuracy of model_a minus that of model_b on the test images that both were given, balanced_difference that of
    the balanced accuracy; their intervals resample cases, both models together, and are null under five cases in a class. The
    p-value is two-sided, of the difference in accuracy, from `sign_flip_test`. p_holm is corrected for all comparisons of one
    split and seed (`holm`), p_main for the main ones alone, the same in every run: each of `profiles.DEFENSES` with
    the baseline and `primary` with each other, clean and in the worst case at the epsilon nearest to `train_epsilon` (a fraction);
    null for the others. `primary` is compared in these two evaluations only.
    """
    rows = tested_rows(predictions)
    main, worst = [("none", 0.0)], rows.loc[rows["attack"] == "worst_case", "epsilon"].unique()
    if len(worst):
        main.append(("worst_case", nearest(worst, train_epsilon)))
    setting = [name for name in EVALUATION if name != "model"]
    found = []
    for key, together in rows.groupby(setting, sort=True):
        of = dict(list(together.groupby("model", sort=True)))
        pairs = [(model, "baseline") for model in of if model != "baseline"]
        if key[:2] in main:
            pairs += [(primary, model) for model in profiles.DEFENSES if model != primary]
        for a, b in pairs:
            if not {a, b} <= set(of):
                continue
            pair = of[a].merge(of[b][[*TESTED, "right"]], on=TESTED, suffixes=("", "_b"), validate="1:1")
            if pair.empty:
                continue
            is_main = key[:2] in main and {a, b} <= {"baseline", *profiles.DEFENSES}
            found.append(
                dict(zip(setting, key, strict=True), model_a=a, model_b=b, main=is_main)
                | _differences(pair, resamples, seed)
            )
    found = pd.DataFrame(found, columns=[*COMPARISONS, "main"])
    of_run = ["split_by", "seed"]
    found["p_holm"] = found.groupby(of_run)["p_value"].transform(holm)
    found["p_main"] = found[found["main"].astype(bool)].groupby(of_run)["p_value"].transform(holm)
    return found.sort_values(["model_a", *setting, "model_b"], ignore_index=True)[COMPARISONS]


def nearest(epsilons, aim):
    """Of these epsilons the one nearest to another, the smaller of two as near; all are fractions, of records or not.

    Of those below one gray level only where there is no other (`visible`).
    """
    return min(sorted(visible(epsilons)), key=lambda each: round(abs(each - aim), 5))


def visible(epsilons):
    """The epsilons of one gray level or more, since below it no 8-bit image changes; all of them where none is so large."""
    return [each for each in epsilons if round(each * 255, 3) >= 1] or list(epsilons)


def middle(epsilons):
    """The middle one of these epsilons, to show examples at; below one gray level only where there is no other."""
    return nearest(epsilons, sorted(epsilons)[len(epsilons) // 2])


def _differences(pair, resamples, seed):
    """What `comparisons` says of two models on the images of both; right: of the first, right_b: of the second."""
    malignant, cases = pair["malignant"].to_numpy(), pair["case"]
    counts = np.column_stack([_counts(pair[name].to_numpy(), malignant) for name in ("right", "right_b")])

    def differences(sums, _):
        return (_rates(sums[:, :4]) - _rates(sums[:, 4:]))[:, :2]

    values = differences(counts.sum(0, keepdims=True), None)[0]
    low, high = bootstrap_interval(counts, cases, malignant, differences, resamples=resamples, seed=seed)
    names = (
        "difference",
        "balanced_difference",
        "low",
        "balanced_difference_low",
        "high",
        "balanced_difference_high",
    )
    change = pair["right"].astype(int) - pair["right_b"].astype(int)
    return (
        dict(zip(names, [*values, *np.broadcast_to(low, 2), *np.broadcast_to(high, 2)], strict=True))
        | {"p_value": sign_flip_test(change, cases), "test": "sign-flip permutation over cases"}
        | {"n": len(pair), "n_cases": cases.nunique()}
    )


def leakage(tables, resamples=2000, seed=0):
    """What a model's balanced accuracy on clean test images loses when no case is known: a row (`LEAKAGE`) a model judged by both splits.

    tables: predictions of one run or more; of several that hold a model by one split, the first counts. The interval of the difference
    resamples cases, a case with its test images of both splits, and is null under five cases in a class.
    """
    clean = {"image": {}, "case": {}}
    for table in tables:
        rows = tested_rows(table[table["attack"] == "none"])
        for (model, kind), group in rows.groupby(["model", "split_by"]):
            if kind in clean:
                clean[kind].setdefault(model, group)
    found = []
    for model in sorted(set(clean["image"]) & set(clean["case"])):
        both = [clean[kind][model] for kind in ("image", "case")]
        rows = pd.concat(both, ignore_index=True)
        by_image = (rows["split_by"] == "image").to_numpy()[:, None]
        counts = _counts(rows["right"].to_numpy(), rows["malignant"].to_numpy())
        counts = np.column_stack([counts * by_image, counts * ~by_image])

        def fall(sums, _):
            return _rates(sums[:, :4])[:, 1] - _rates(sums[:, 4:])[:, 1]

        of_image, of_case = (_rates(counts.sum(0)[part])[1] for part in (slice(4), slice(4, 8)))
        low, high = bootstrap_interval(
            counts, rows["case"], rows["malignant"], fall, resamples=resamples, seed=seed
        )
        found.append(
            {"model": model, "by_image": of_image, "by_case": of_case, "leakage": of_image - of_case}
            | {"low": low, "high": high, "n_image": len(both[0]), "n_case": len(both[1])}
            | {"n_cases": rows["case"].nunique()}
        )
    return pd.DataFrame(found, columns=LEAKAGE)


def holm(p_values):
    """P-values corrected for their number, so that the chance of one false alarm among all stays below the level (Holm 1979)."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    factors = np.arange(len(p_values), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * p_values[order]))
    return corrected


def sign_flip_test(differences, cases):
    """Two-sided p-value of a paired permutation test over cases, exact.

    differences: (N,), whole numbers, one for each image (right under one model minus right under the other);
    cases: (N,). Under the null hypothesis the two models may be exchanged within a case, so the sum of each case
    keeps its size and takes either sign. With one image a case this is McNemar's exact test.
    """
    sums = pd.Series(np.asarray(differences, int)).groupby(np.asarray(cases, str)).sum().to_numpy()
    # The sums are whole numbers, so the distribution over all 2^cases flips is a product of short polynomials:
    # no need to draw flips at random.
    chances = np.ones(1)
    for size in np.abs(sums[sums != 0]):
        step = np.zeros(2 * size + 1)
        step[[0, -1]] = 0.5
        chances = np.convolve(chances, step)
    totals = np.arange(len(chances)) - len(chances) // 2
    return float(min(1.0, chances[np.abs(totals) >= abs(sums.sum())].sum()))


# ---------------------------------------------------------------- the worst case


def worst_case(predictions):
    """Prediction rows (`COLUMNS`) with attack "worst_case", for each model and each epsilon at which it was attacked.

    At an epsilon an image is right only if it is right clean and right under every attack run at every epsilon up to
    this one; only test images on which all of them ran are in the table. A row is that of the evaluation that fooled
    the model: the wrong one at the smallest epsilon (of several, the most wrong); where none did, the one that came
    nearest. right_8bit is 0 where one evaluation fooled the model in 8 bits, null where one was not tried in them. A
    model without clean predictions, or that was not attacked with PGD, has no rows: one step is no worst case.
    """
    rows = tested_rows(predictions)
    rows = rows[rows["attack"] != "worst_case"]
    # An image that nothing changed is whole in 8 bits.
    rows["right_8bit"] = rows["right_8bit"].where(rows["attack"] != "none", rows["right"].astype(float))
    runs = ["attack", "epsilon", "source_model"]
    found = [pd.DataFrame(columns=COLUMNS)]
    for _, group in rows.groupby(["split_by", "seed", "model"], sort=True):
        if not {"none", "pgd"} <= set(group["attack"]):
            continue
        group = group.sort_values([*runs, *TESTED], kind="stable")
        for epsilon in sorted(group.loc[group["attack"] != "none", "epsilon"].unique()):
            part = group[group["epsilon"] <= epsilon]
            ran = part.groupby(TESTED)["image"].transform("size")
            part = part[ran == len(part[runs].drop_duplicates())]
            # Wrong before right; among the wrong the smallest epsilon; then the lowest margin toward the truth.
            order = part.assign(first=part["epsilon"].where(~part["right"], 2.0))
            order = order.sort_values(["first", "toward_truth"], kind="stable").drop_duplicates(TESTED)
            saved = part.sort_values("right_8bit", kind="stable", na_position="first").drop_duplicates(TESTED)
            order, saved = (each.sort_values(TESTED) for each in (order, saved))
            order = order.assign(right_8bit=saved["right_8bit"].to_numpy())
            order = order.assign(attack="worst_case", epsilon=epsilon, source_model="")
            found.append(order[COLUMNS].astype({"right_8bit": "Int8"}))
    found = [part for part in found if len(part)] or found
    return pd.concat(found, ignore_index=True)


def with_worst_case(predictions):
    """The predictions and their `worst_case` rows, one below the other."""
    return pd.concat([predictions, worst_case(predictions)], ignore_index=True)


# ---------------------------------------------------------------- for files


def records(frame):
    """A DataFrame (or a list of dicts) as a list of dicts for `json.dump(..., allow_nan=False)`.

    NaN, NA and infinities become None, numpy scalars become Python's, floats keep six significant digits.
    """
    frame = frame if isinstance(frame, pd.DataFrame) else pd.DataFrame(frame)
    return [
        {name: _plain(value) for name, value in zip(frame.columns, row, strict=True)}
        for row in frame.itertuples(index=False, name=None)
    ]


def _plain(value):
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or (isinstance(value, float) and not np.isfinite(value)):
        return None
    return float(f"{value:.6g}") if isinstance(value, float) else value
