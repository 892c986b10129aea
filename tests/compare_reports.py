"""A coarse comparison of the accuracies of two reports: python tests/compare_reports.py reports/quick /tmp/x/reports/quick

It finds rows that are missing and accuracies that moved very far, and prints what it does not check (`NOT_CHECKED`).

On one machine the same seed gives the same numbers. Another processor rounds differently, and training carries that on, so
a clean accuracy may move by CLEAN, an attacked one, or one class's clean one, by ATTACKED, one class's attacked one by LEAN: to which
class an attacked model leans is chance (two processors differed by up to 0.70 there, by 0.35 over both classes). Which rows there
are must be equal everywhere. What adversarial training gains over the baseline is a result where it is LARGE: a quarter must be there again.
"""

import json
import sys
from pathlib import Path

CLEAN, ATTACKED, LEAN, LARGE = 0.12, 0.35, 0.75, 0.3
NOT_CHECKED = (
    "A coarse check: a fault that moves accuracies by less than these bounds is not found, nor to which class an attacked model leans; "
    "intervals, p, AUROC, 8 bits, the tables of the audit, certified radii, texts and figures are not compared at all."
)
KEY = ("model", "attack", "epsilon", "split_by", "seed", "source_model", "subset")


def rows(folder):
    """The report's metrics and its comparisons with the baseline, each by their key."""
    results = json.loads((Path(folder) / "results.json").read_text("utf-8"))
    return [
        {
            tuple(str(row.get(name, row.get("model_a"))) for name in KEY): row
            for row in results[part]
            if row.get("model_b", "baseline") == "baseline"
        }
        for part in ("metrics", "comparisons")
    ]


def differences(committed, fresh):
    """What is not within tolerance, in words; empty where nothing is."""
    found = [f"only in one report: {key}" for key in sorted(set(committed) ^ set(fresh))]
    for key in sorted(set(committed) & set(fresh)):
        tolerance = CLEAN if key[1] == "none" else ATTACKED if key[-1] == "all" else LEAN
        one, two = committed[key], fresh[key]
        by_class = ("sensitivity", "specificity") if key[1] == "none" else ()
        for rate, most in (("accuracy", tolerance), *((rate, ATTACKED) for rate in by_class)):
            there = [row[rate] for row in (one, two) if row[rate] is not None]
            if (
                one["n"] != two["n"]
                or len(there) == 1
                or max(there, default=0) - min(there, default=0) > most
            ):
                found.append(
                    f"{' '.join(key)}: {rate} {one[rate]} of {one['n']} committed, {two[rate]} of {two['n']} fresh"
                )
    return found


def lost(committed, fresh):
    """The large gains of adversarial training that are not there again, in words."""
    return [
        f"{' '.join(key)}: {row['difference']:+.3f} against the baseline committed, {fresh[key]['difference']:+.3f} fresh"
        for key, row in committed.items()
        if key in fresh
        and row["model_a"] == "adversarial_training"
        and row["difference"] >= LARGE
        and fresh[key]["difference"] < row["difference"] / 4
    ]


if __name__ == "__main__":
    (committed, its_results), (fresh, new_results) = (rows(folder) for folder in sys.argv[1:3])
    found = differences(committed, fresh) + lost(its_results, new_results)
    moved = max(
        (abs(committed[key]["accuracy"] - fresh[key]["accuracy"]) for key in set(committed) & set(fresh)),
        default=0,
    )
    within = (
        f"{len(fresh)} rows in both reports, none moved beyond its bound ({CLEAN:g} clean, {ATTACKED:g} attacked, {LEAN:g} for one class "
        f"attacked); the largest move is {moved:.3f}."
    )
    print("\n".join(found) or f"{within}\n{NOT_CHECKED}")
    sys.exit(bool(found))
