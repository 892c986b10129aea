"""What the repository promises about itself: locks in step, packages in use, reports that can be recomputed."""

import ast
import json
import re
import subprocess
import tomllib

import pytest
import yaml

from lib import data, evaluation, profiles, report, results, runs, wording

REPORTS = sorted(path.parent for path in (runs.ROOT / "reports").glob("*/results.json"))
ASKED_FOR = {
    "torch",
    "torchvision",
    "torchxrayvision",
    "jupyterlab",
    "papermill",
    "ipywidgets",
    "seaborn",
    "pandas",
    "nbval",
}


def locked():
    return {
        re.split(r"[=; ]", line)[0].lower()
        for line in (runs.ROOT / "requirements.txt").read_text().splitlines()
        if line
    }


def dependencies():
    return tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def test_the_lock_holds_every_dependency_for_all_platforms():
    assert set(dependencies()) <= locked()
    assert set(dependencies()) >= ASKED_FOR
    text = (runs.ROOT / "requirements.txt").read_text()
    assert "sys_platform == 'linux'" in text and "://" not in text


def test_conda_installs_the_same_lock():
    environment = yaml.safe_load((runs.ROOT / "environment.yml").read_text())
    conda, pip = environment["dependencies"][:-1], environment["dependencies"][-1]["pip"]
    assert {item.split()[0] for item in conda} == {"python", "pip"}
    assert pip == ["-r requirements.txt", "-e ."]
    requires = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f"python {requires}" in conda


def test_nothing_is_depended_on_that_nothing_uses():
    imported = set()
    for path in [*(runs.ROOT / "lib").glob("*.py"), *(runs.ROOT / "tests").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported |= {name.split(".")[0] for name in names}
            if isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    modules = {"pillow": "PIL", "pyyaml": "yaml", "scikit-image": "skimage", "scikit-learn": "sklearn"}
    # run by the Makefile, the tests and papermill
    commands = {"jupyterlab", "nbval", "ruff", "ipykernel", "voila"}
    assert {name for name in dependencies() if modules.get(name, name) not in imported} <= commands


@pytest.mark.parametrize("folder", REPORTS, ids=lambda path: path.name)
def test_every_row_of_a_committed_report_follows_from_its_predictions(folder):
    recorded = json.loads((folder / "results.json").read_text())
    table = evaluation.read_piece(folder / "predictions.csv.gz")
    used, about = recorded["parameters"], recorded["dataset"]
    split = data.load_split(folder / "split.csv.gz")
    split = split[split["magnification"].isin(about["magnifications"])]
    beside = results.tables(results.published(used["compare_with"], about), used)
    found = results.plain(results.statistics(table, split, used, about, recorded["audit"], beside))
    for part, rows in found.items():
        assert rows == recorded[part], part


def test_the_drawn_tissue_is_as_hard_as_it_should_be():
    """Hard enough that there is something to learn, easy enough to be learned, and not by color."""
    recorded = json.loads((runs.ROOT / "reports" / "quick" / "results.json").read_text())
    clean = {
        row["model"]: row["accuracy"]
        for row in recorded["metrics"]
        if (row["attack"], row["subset"], row["split_by"]) == ("none", "all", "case")
    }
    assert 0.85 <= clean["baseline"] <= 0.98 and clean["color_only"] < 0.75


@pytest.mark.parametrize("folder", REPORTS, ids=lambda path: path.name)
def test_a_committed_report_is_small_and_shows_no_real_tissue(folder):
    listed = subprocess.run(
        ["git", "ls-files", "-z", str(folder)], cwd=runs.ROOT, capture_output=True, text=True
    )
    files = [runs.ROOT / name for name in listed.stdout.split("\0") if name]
    assert sum(path.stat().st_size for path in files) < 3e6
    assert report.tissue_leaks(folder, files) == []
    assert "nan" not in (folder / "summary.md").read_text().lower().split()


def test_the_table_of_the_readme_is_what_the_reports_say():
    """Balanced accuracy, clean and in the worst case at 4/255, split by image and by case; null where nothing was attacked."""
    columns = [
        (name, attack)
        for name in ("breakhis_folds_short_image", "breakhis_folds_short")
        for attack in (("none", 0.0), ("worst_case", 4 / 255))
    ]
    values = {}
    for name in dict(columns):
        recorded = json.loads((runs.ROOT / "reports" / name / "results.json").read_text())
        for row in recorded["metrics"]:
            if row["subset"] == "all" and row["split_by"] == recorded["parameters"]["split_by"]:
                at = (row["attack"], 4 / 255 if abs(row["epsilon"] - 4 / 255) < 1e-4 else row["epsilon"])
                rate = "balanced_accuracy"
                told = f"{row[rate]:.2f} [{row[f'{rate}_low']:.2f}, {row[f'{rate}_high']:.2f}]"
                values[row["model"], (name, at)] = told
    readme = (runs.ROOT / "README.md").read_text()
    for model in ("baseline", *profiles.DEFENSES, "color_only"):
        cells = [values.get((model, column), "") for column in columns]
        line = re.sub(" +", " ", f"| {wording.model_name(model)} | {' | '.join(cells)} |")
        assert line in readme
