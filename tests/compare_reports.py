"""Compares the accuracies of two published reports: python tests/compare_reports.py reports/quick /tmp/x/reports/quick

On one machine the same seed gives the same numbers. Another processor rounds differently, and training carries that on, so
a clean accuracy may move by CLEAN and an attacked one by ATTACKED; which rows there are must be equal everywhere.
"""

import json
import sys
from pathlib import Path

CLEAN, ATTACKED = 0.12, 0.35
KEY = ("model", "attack", "epsilon", "split_by", "seed", "source_model", "subset")


def rows(folder):
    """The report's metrics by their key."""
    metrics = json.loads((Path(folder) / "results.json").read_text("utf-8"))["metrics"]
    return {tuple(str(row[name]) for name in KEY): row for row in metrics}


def differences(committed, fresh):
    """What is not within tolerance, in words; empty where the reports agree."""
    found = [f"only in one report: {key}" for key in sorted(set(committed) ^ set(fresh))]
    for key in sorted(set(committed) & set(fresh)):
        tolerance = CLEAN if key[1] == "none" else ATTACKED
        one, two = committed[key], fresh[key]
        if one["n"] != two["n"] or abs(one["accuracy"] - two["accuracy"]) > tolerance:
            found.append(
                f"{' '.join(key)}: {one['accuracy']:.3f} of {one['n']} committed, {two['accuracy']:.3f} of {two['n']} fresh"
            )
    return found


if __name__ == "__main__":
    committed, fresh = (rows(folder) for folder in sys.argv[1:3])
    found = differences(committed, fresh)
    moved = max(
        (abs(committed[key]["accuracy"] - fresh[key]["accuracy"]) for key in set(committed) & set(fresh)),
        default=0,
    )
    print("\n".join(found) or f"{len(fresh)} rows agree; the largest move is {moved:.3f}")
    sys.exit(bool(found))
