"""The comparison of two quick reports says what it found and what it did not look at, and claims no more."""

import json
import shutil
import subprocess
import sys

from lib import runs

QUICK = runs.ROOT / "reports" / "quick"


def compare(one, two):
    return subprocess.run(
        [sys.executable, runs.ROOT / "tests" / "compare_reports.py", one, two], capture_output=True, text=True
    )


def changed(folder, change):
    """A copy of the quick report's results in which `change` alters one row of the baseline under PGD on malignant images."""
    results = json.loads((QUICK / "results.json").read_text("utf-8"))
    row = next(
        row
        for row in results["metrics"]
        if (row["model"], row["attack"], row["subset"]) == ("baseline", "pgd", "malignant")
    )
    change(results, row)
    (folder / "results.json").write_text(json.dumps(results), "utf-8")
    return folder


def test_a_comparison_that_finds_nothing_does_not_say_that_reports_agree(tmp_path):
    shutil.copy(QUICK / "results.json", tmp_path)
    done = compare(QUICK, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agree" not in done.stdout
    assert "none moved beyond its bound (0.12 clean, 0.35 attacked, 0.75 for one class" in done.stdout
    assert "A coarse check" in done.stdout and "intervals, p, AUROC" in done.stdout


def test_a_large_move_passes_and_is_named_and_a_missing_row_fails(tmp_path):
    moved = compare(
        QUICK, changed(tmp_path, lambda results, row: row.update(accuracy=row["accuracy"] + 0.62))
    )
    assert moved.returncode == 0 and "the largest move is 0.620" in moved.stdout
    assert "to which class an attacked model leans" in moved.stdout
    lost = compare(QUICK, changed(tmp_path, lambda results, row: results["metrics"].remove(row)))
    assert lost.returncode == 1 and lost.stdout.startswith("only in one report")
