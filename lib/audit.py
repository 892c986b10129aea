"""What an audit reads from the table of predictions besides accuracy: how far each image is from falling, how honest the
probabilities are, what abstaining buys, and which radii noise certifies. Pure functions, like those of `evaluation`.
"""

import numpy as np
import pandas as pd
from scipy import stats

from lib import evaluation


def smallest_epsilons(metrics):
    """The smallest epsilon that fools half of the images, for each model: split_by, seed, model, median, low, high, standing.

    metrics: rows of `evaluation.metrics` with the worst case. An image stands in the worst case up to its own smallest epsilon, so
    the accuracy there is the share of images whose epsilon is larger. median is the first epsilon tested (a fraction, 0 for
    clean images) at which at most half stand, low and high the same for the ends of the interval of that share, where there is
    one; null where more than half stand everywhere. standing: the share that nothing fooled.
    """
    rows = metrics[(metrics["subset"] == "all") & metrics["attack"].isin(["none", "worst_case"])]
    found = []
    for (split_by, seed, model), group in rows.groupby(["split_by", "seed", "model"], sort=True):
        if (group["attack"] == "worst_case").any():
            group = group.sort_values("epsilon")
            ends = {"median": "accuracy", "low": "accuracy_low", "high": "accuracy_high"}
            at = {name: group.loc[group[column] <= 0.5, "epsilon"].min() for name, column in ends.items()}
            standing = group["accuracy"].iloc[-1]
            found.append({"split_by": split_by, "seed": seed, "model": model} | at | {"standing": standing})
    return pd.DataFrame(found, columns=["split_by", "seed", "model", "median", "low", "high", "standing"])


def distances(predictions):
    """Mean SSIM and mean Euclidean length of the change of the test images that were changed, with intervals over cases.

    A row for each model, attack and epsilon of the white-box attacks: n (PGD leaves alone what is wrong without it), ssim, ssim_low,
    ssim_high, l2 (pixel values in [0, 1]).
    """
    rows = evaluation.tested_rows(predictions)
    rows = rows[(rows["l2"] > 0) & ~rows["attack"].isin(evaluation.NOT_AIMED)]
    found = []
    keys = ["split_by", "seed", "model", "attack", "epsilon"]
    for key, group in rows.groupby(keys, sort=True):
        low, high = evaluation.bootstrap_interval(group["ssim"], group["case"], group["malignant"])
        found.append(
            dict(zip(keys, key, strict=True), n=len(group))
            | {"ssim": group["ssim"].mean(), "ssim_low": low, "ssim_high": high, "l2": group["l2"].mean()}
        )
    return pd.DataFrame(found, columns=[*keys, "n", "ssim", "ssim_low", "ssim_high", "l2"])


def calibration(rows, bins=10):
    """How far probabilities are from frequencies: (points, error) of the rows of one evaluation.

    points: a DataFrame with p (mean P(malignant)), malignant (share) and n in bins of equal width that hold an image; error: the
    expected calibration error, the mean of |p - malignant| weighted by n (Naeini et al. 2015, for the positive class).
    """
    malignant = (rows["label"] == "malignant").astype(float)
    points = pd.DataFrame({"p": rows["p_malignant"], "malignant": malignant}).groupby(_bin_of(rows, bins))
    points = points.mean().assign(n=points.size()).reset_index(drop=True)
    error = float(((points["p"] - points["malignant"]).abs() * points["n"]).sum() / max(len(rows), 1))
    return points, error if len(rows) else np.nan


def abstention(rows):
    """Accuracy on the images that are left when the least sure ones are not answered: a DataFrame with abstained and accuracy.

    rows: those of one evaluation. abstained: a share from 0 to below 1, the images in the order of their absolute margin.
    """
    order = rows.assign(sure=rows["margin"].abs()).sort_values("sure", ascending=False, kind="stable")
    right = evaluation.is_right(order).to_numpy()
    kept = np.arange(1, len(right) + 1)
    table = pd.DataFrame({"abstained": 1 - kept / max(len(right), 1), "accuracy": right.cumsum() / kept})
    return table.iloc[::-1].reset_index(drop=True)


def reliability(predictions):
    """How far probabilities of test images are from frequencies, and what leaving the less sure half unanswered buys.

    A row for each network, clean and under FGSM at each epsilon (not under PGD, which stops at an image as soon as it is fooled):
    calibration_error, the error of `calibration` in five bins; by_chance, what it would be on average if each image were malignant
    with just the probability stated (normal approximation); and half_answered, the accuracy on the surer half; the first and the
    last each with the ends _low and _high of a 95 % interval over cases. Held fixed in the resamples: on which side of
    the frequency each bin lies, as the error would only grow otherwise, and which images the half holds.
    """
    rows = evaluation.tested_rows(predictions)
    rows = rows[rows["attack"].isin(["none", "fgsm"]) & ~rows["model"].isin(evaluation.WITHOUT_NETWORK)]
    keys, bins, found = ["split_by", "seed", "model", "attack", "epsilon"], 5, []
    for key, group in rows.groupby(keys, sort=True):
        by_case = group["case"], group["malignant"]
        off = (group["p_malignant"] - group["malignant"]).to_numpy()
        bin_of = _bin_of(group, bins)
        sides = np.sign(np.bincount(bin_of, off, minlength=bins))
        low, high = np.maximum(0, evaluation.bootstrap_interval(off * sides[bin_of], *by_case))
        sure = group["margin"].abs().rank(method="first", ascending=False) <= -(-len(group) // 2)
        counted = np.column_stack([sure & group["right"], sure])
        half = group["right"][sure].mean(), *evaluation.bootstrap_interval(counted, *by_case, _share)
        variance = np.bincount(bin_of, group["p_malignant"] * (1 - group["p_malignant"]), minlength=bins)
        by_chance = np.sqrt(2 / np.pi * variance).sum() / len(group)
        found.append((*key, calibration(group, bins)[1], low, high, by_chance, *half))
    error, half = "calibration_error", "half_answered"
    columns = [error, f"{error}_low", f"{error}_high", "by_chance", half, f"{half}_low", f"{half}_high"]
    return pd.DataFrame(found, columns=[*keys, *columns])


def _share(sums, n):
    """What share the first column is of the second; NaN where that is nothing."""
    with np.errstate(invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def _bin_of(rows, bins):
    """The bin of P(malignant) that each row falls in, of so many of equal width."""
    return np.minimum((rows["p_malignant"] * bins).astype(int), bins - 1).to_numpy()


def certify(counts, samples, sigma, alpha=0.001):
    """Randomized smoothing's answer and certified radius from votes under Gaussian noise (Cohen et al. 2019, section 3.2).

    counts: (n,), how many of `samples` noisy copies of each image were called malignant; sigma: of the noise, in pixel values of
    [0, 1]. Returns (malignant, radius): the voted answer (bool) and the Euclidean radius within which it cannot change with
    confidence 1 - alpha, null (NaN) where the votes are too even to tell: the smoothed model abstains. The bound is two-sided
    (alpha / 2 a side), so one set of votes serves both to choose the class and to certify it.
    """
    counts = np.asarray(counts)
    malignant = counts > samples / 2
    votes = np.maximum(counts, samples - counts)
    low = stats.beta.ppf(alpha / 2, votes, samples - votes + 1)  # Clopper and Pearson
    return malignant, np.where(low > 0.5, sigma * stats.norm.ppf(np.maximum(low, 0.5)), np.nan)
