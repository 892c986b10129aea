"""Compares the accuracies of two published reports: python tests/compare_reports.py reports/quick /tmp/x/reports/quick

On one machine the same seed gives the same numbers. Another processor rounds differently, and training carries that on: two kinds
of processor differed by up to 0.09 clean and 0.35 under attack, of one class by 0.22 and 0.70, since to which class a model
leans is chance. So the accuracy of all images may move by CLEAN or ATTACKED, that of one class clean by ATTACKED, and the rows
must be the same. What adversarial training gains over the baseline is a result where it is LARGE: a quarter must be there again.
"""

import json
import sys
from pathlib import Path

CLEAN, ATTACKED, LARGE = 0.15, 0.45, 0.3
KEY = ("model", "attack", "epsilon", "split_by", "seed", "source_model", "subset")


def rows(folder):
    """The report's metrics and its comparisons, each by their key."""
    results = json.loads((Path(folder) / "results.json").read_text("utf-8"))
    return [
        {tuple(str(row.get(name, row.get("model_a"))) for name in KEY): row for row in results[part]}
        for part in ("metrics", "comparisons")
    ]


def differences(committed, fresh):
    """What is not within tolerance, in words; empty where the reports agree."""
    found = [f"only in one report: {key}" for key in sorted(set(committed) ^ set(fresh))]
    for key in sorted(set(committed) & set(fresh)):
        one, two, clean = committed[key], fresh[key], key[1] == "none"
        allowed = {"n": 0}
        if key[-1] == "all":
            allowed["accuracy"] = CLEAN if clean else ATTACKED
        if clean:
            allowed |= {"sensitivity": ATTACKED, "specificity": ATTACKED}
        found += [
            f"{' '.join(key)}: {rate} {one[rate]} of {one['n']} committed, {two[rate]} of {two['n']} fresh"
            for rate, most in allowed.items()
            if abs((one[rate] or 0) - (two[rate] or 0)) > most
        ]
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
        (
            abs(committed[key]["accuracy"] - fresh[key]["accuracy"])
            for key in set(committed) & set(fresh)
            if key[-1] == "all"
        ),
        default=0,
    )
    print("\n".join(found) or f"{len(fresh)} rows agree; the largest move is {moved:.3f}")
    sys.exit(bool(found))
