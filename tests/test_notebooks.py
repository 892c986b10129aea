"""The notebooks as files, under nbval, by hand out of order, and from a kernel opened in their folder."""

import json
import os
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import yaml

from lib import data, database, loading, profiles, robustness, runs, study

NOTEBOOKS = study._stages(study.NOTEBOOKS)
PROFILES = sorted((study.NOTEBOOKS / "profiles").glob("*.yaml"))


def test_the_comparison_comes_last():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "07", "06"]


WELCOME = study.NOTEBOOKS / "00_welcome.ipynb"


def test_the_welcome_page_names_every_notebook_and_the_state_of_the_runs(smoke, tmp_path, monkeypatch):
    notebook = nbformat.read(WELCOME, 4)
    nbformat.validate(notebook)
    assert all(cell.outputs == [] for cell in notebook.cells if cell.cell_type == "code")
    assert all(f"]({path.name})" in notebook.cells[0].source for path in NOTEBOOKS)
    for home, expected in (
        (smoke[0], f'<td style="text-align: left">{len(NOTEBOOKS)} of {len(NOTEBOOKS)}</td>'),
        (tmp_path, None),
    ):
        monkeypatch.setenv("STUDY_HOME", str(home))
        done = papermill.execute_notebook(
            WELCOME, tmp_path / "out.ipynb", kernel_name="python3", progress_bar=False
        )
        state, tried = (cell.outputs for cell in done.cells if cell.cell_type == "code")
        assert (expected in str(state)) if expected else state == []
        assert ("widget-view" if expected else "No model is trained yet") in str(tried)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs_for_the_kernel_python3(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert not any(line.startswith(("def ", "class ")) for cell in code for line in cell.source.splitlines())
    assert "assert" in code[-1].source
    assert [cell.metadata.get("tags") for cell in notebook.cells].count(["parameters"]) == 1


def declared():
    return [(path.stem, profiles.declared_in(path)) for path in NOTEBOOKS]


def test_the_quick_profile_is_the_notebooks_defaults():
    quick = profiles.load("quick")
    for stem, parameters in declared():
        for name, (annotation, default) in parameters.items():
            assert annotation in ("int", "float", "str", "bool", "list[int]", "list[float]", "list[str]"), (
                stem,
                name,
            )
            assert default == quick[name], (stem, name)
    assert set(quick) == {name for _, parameters in declared() for name in parameters}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_each_profile_sets_every_parameter(path):
    profile = yaml.safe_load(path.read_text())
    assert list(profile) == list(yaml.safe_load((path.parent / "quick.yaml").read_text()))
    assert profile["run"] == path.stem


def parameters_by_hand(notebook, **edited):
    """The variables of a notebook whose cell of parameters was edited, after the cell of imports."""
    cells = [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    variables = {"__name__": "__main__"}
    exec(cells[0], variables)
    variables.update(edited)
    exec(cells[1], variables)
    return variables


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_reads_its_parameters_as_the_runner_does(path, capsys):
    spelled = {
        "run": 7,
        "split_by": " case",
        "image_size": 64.0,
        "epsilons": "2, 4",
        "magnifications": 100,
        "skip_bad_files": "no",
        "seed": "1e0",
        "pretrained": None,
        "recipes": "pgd",
        "compare_with": "[]",
    }
    meant = {
        "run": "7",
        "split_by": "case",
        "image_size": 64,
        "epsilons": [2, 4],
        "magnifications": [100],
        "skip_bad_files": False,
        "seed": 1,
        "pretrained": "none",
        "recipes": ["pgd"],
        "compare_with": [],
    }
    own = profiles.declared_in(path)
    found = parameters_by_hand(path, **_own(path, spelled))
    assert {name: found[name] for name in _own(path, meant)} == _own(path, meant)
    assert {name: found[name] for name in own.keys() - meant.keys()} == {
        name: default for name, (_, default) in own.items() if name not in meant
    }
    for name, value, words in (
        ("skip_bad_files", "maybe", "skip_bad_files must be true or false, not 'maybe'"),
        ("noise_sigma", 25, "25/255 is 0.098"),
        ("epsilons", [0.01, 0.03], r"fractions of the value range: \[2.55, 7.65\]"),
        ("split_by", "cases", "there is no 'cases': did you mean 'case'"),
        ("run", "../x", "must be a plain folder name"),
    ):
        if name in own:
            with pytest.raises(profiles.ParameterError, match=words):
                parameters_by_hand(path, **{name: value})
    if "epsilons" in own:
        capsys.readouterr()
        parameters_by_hand(path, epsilons=[0.25, 0.5, 1, 8])
        assert "below one gray level: 0.25/255, 0.5/255. No 8-bit image" in capsys.readouterr().out


def test_each_notebook_alone_says_which_to_run_first(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))
    for path in NOTEBOOKS[1:]:
        out = tmp_path / path.name
        with pytest.raises(papermill.exceptions.PapermillExecutionError, match=r"01_data_split\.ipynb first"):
            papermill.execute_notebook(path, out, kernel_name="python3", progress_bar=False)


@pytest.fixture
def copied(smoke, tmp_path, monkeypatch):
    """The folder of a copy of the smoke run, which the notebooks take for the run: they may leave other files than the study's."""
    home, _ = smoke
    shutil.copytree(home / "runs", tmp_path / "runs")
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))
    return tmp_path / "runs" / "smoke"


@pytest.mark.parametrize("number", ["04", "05", "07"])
def test_a_notebook_left_out_is_named(copied, number):
    (path,) = (path for path in NOTEBOOKS if path.stem.startswith(number))
    for piece in (copied / "predictions").glob("baseline-[!n]*"):
        piece.unlink()  # all that 03 predicted
    parameters = _own(path, profiles.load("smoke"))
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match=r"03_fgsm_attack\.ipynb first"):
        papermill.execute_notebook(path, None, parameters, kernel_name="python3", progress_bar=False)


def test_one_notebook_by_papermill_with_a_profile_and_a_parameter(copied, tmp_path):
    command = [
        sys.executable,
        "-m",
        "papermill",
        "notebooks/03_fgsm_attack.ipynb",
        str(tmp_path / "out.ipynb"),
    ]
    command += ["-f", "notebooks/profiles/smoke.yaml", "-p", "epsilons", "[1, 2, 4]"]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (copied / "predictions" / "baseline-pgd-1-case0.csv.gz").exists()


def test_audit_and_comparison_go_without_notebook_4_and_the_costly_parts(copied, tmp_path):
    for file in [*copied.glob("*/gaussian_noise*"), *copied.glob("figures/04_*")]:
        file.unlink()
    left_out = dict.fromkeys(("audit_steps", "square_queries", "audit_images"), 0)
    for name in ("07_robustness_audit", "06_comparison"):
        notebook = study.NOTEBOOKS / f"{name}.ipynb"
        own = _own(notebook, profiles.load("smoke") | left_out)
        papermill.execute_notebook(
            notebook, tmp_path / "out.ipynb", own, kernel_name="python3", progress_bar=False
        )
    meaning = pd.read_csv(copied / "attacks.csv")
    assert set(meaning["name"]) == {"none", *robustness.AT_EVERY_EPSILON, "worst_case"}
    recorded = json.loads((copied / "results.json").read_text())
    attacked = {row["model"] for row in recorded["metrics"] if row["attack"] == "worst_case"}
    assert attacked == {"baseline", "merged_fgsm", "adversarial_training"}


def _own(notebook, parameters):
    declared = profiles.declared_in(notebook)
    return {name: value for name, value in parameters.items() if name in declared}


def test_the_official_folds_can_be_chosen(drawn, tmp_path, monkeypatch):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    index = data.index_images(tree)
    for k, fold in enumerate(database.FOLDS):
        sides = np.where(np.arange(len(index)) % 5 == k, "test", "train")
        (tree / f"ds{fold}.txt").write_text("\n".join(index["image"] + "|100|1|" + sides) + "\n")
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))
    asked = {"data_root": str(tree), "split_by": "fold", "magnifications": [100], "pretrained": "none"}
    parameters = _own(NOTEBOOKS[0], profiles.load("smoke") | asked | {"other_starts": []})
    papermill.execute_notebook(NOTEBOOKS[0], None, parameters, kernel_name="python3", progress_bar=False)
    images = loading.open_images(tmp_path / "runs" / "smoke" / "split.csv", 32, [100], "fold")
    assert images.folds == [0, 1, 2, 3, 4]
    tested = pd.concat([images.side("test", fold).table for fold in images.folds])
    assert sorted(tested["image"]) == sorted(index["image"])


def test_own_images_are_studied_and_not_taken_for_the_database(own, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))
    asked = {"data_root": str(own), "magnifications": [], "pretrained": "none", "allow_incomplete": False}
    parameters = _own(NOTEBOOKS[0], profiles.load("smoke") | asked | {"other_starts": []})
    papermill.execute_notebook(NOTEBOOKS[0], None, parameters, kernel_name="python3", progress_bar=False)
    about = runs.dataset("smoke")
    assert (
        about["name"] == f"own images in {own.name}"
        and not about["synthetic"]
        and about["magnifications"] == [250]
    )
    table = data.load_split(tmp_path / "runs" / "smoke" / "split.csv")
    assert table.groupby("split_by")["image"].nunique().to_dict() == {"case": 20, "image": 20}


@pytest.fixture(scope="module")
def under_nbval(tmp_path_factory):
    """The home folder of all notebooks run in the smoke profile by nbval, and what pytest said."""
    folder = tmp_path_factory.mktemp("nbval")
    for path in NOTEBOOKS:
        papermill.execute_notebook(
            path,
            folder / path.name,
            parameters=profiles.load("smoke"),
            prepare_only=True,
            progress_bar=False,
        )
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-q"]
    command += ["-p", "no:cacheprovider", "--nbval-cell-timeout=600", "-c", os.devnull]
    command += [str(folder / path.name) for path in NOTEBOOKS]
    environment = os.environ | {"STUDY_HOME": str(folder / "home")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    return folder / "home", done


def test_all_notebooks_pass_under_nbval(under_nbval):
    _, done = under_nbval
    assert done.returncode == 0, done.stdout[-5000:]


def test_the_same_seed_gives_the_same_metrics_even_when_killed_on_the_way(under_nbval, smoke):
    once, again = (
        json.loads((home / "runs" / "smoke" / "results.json").read_text())
        for home in (under_nbval[0], smoke[0])
    )
    assert once["metrics"] == again["metrics"]


def test_a_kernel_opened_in_the_notebooks_folder_finds_the_library(tmp_path):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("from lib import data, study\nprint(study.NOTEBOOKS)")]
    )
    nbformat.write(notebook, tmp_path / "in.ipynb")
    done = papermill.execute_notebook(
        tmp_path / "in.ipynb", None, kernel_name="python3", cwd=study.NOTEBOOKS, progress_bar=False
    )
    assert done.cells[0].outputs[0].text.strip() == str(study.NOTEBOOKS)


def test_a_killed_study_goes_on_where_it_was(smoke):
    home, printed = smoke
    assert "source_200X: resumed after epoch 1 of 2" in printed or "source_200X: already trained" in printed
    assert "unchanged, skipped" in printed.split("02_transfer_learning")[0]
    report = home / "reports" / "smoke"
    results = json.loads((report / "results.json").read_text())
    assert results["dataset"]["synthetic"] and results["provenance"]["seconds"] > 0
    assert results["provenance"]["training_seconds"] > 0
    assert results["training_precision"] in ("float32", "bfloat16")
    counted = [row["images"] for row in results["split"] if (row["split_by"], row["fold"]) == ("case", 0)]
    assert sum(counted) == results["dataset"]["images"], "images that only gave starting weights do not count"
    assert {"index.html", "summary.md", "predictions.csv.gz", "attacks.csv", "figures"} <= {
        path.name for path in report.iterdir()
    }
    assert "no medical evidence" in (report / "index.html").read_text()


def test_of_several_recipes_the_best_on_validation_is_kept(smoke):
    home, _ = smoke
    results = json.loads((home / "reports" / "smoke" / "results.json").read_text())
    found = {row["recipe"]: row for row in results["recipes"]}
    assert list(found) == results["parameters"]["recipes"] and len(found) == 2
    folder = home / "runs" / "smoke"
    losses = {}
    for recipe in found:
        history = pd.read_csv(folder / "history" / f"adversarial_training_{recipe}.csv")
        losses[recipe] = history["validation_loss"].min()
        assert found[recipe]["validation_loss"] == pytest.approx(losses[recipe], rel=1e-5)
    best = min(losses, key=losses.get)
    assert [recipe for recipe in found if found[recipe]["kept"]] == [best]
    kept = robustness.checkpoint(folder, "adversarial_training")
    assert kept.read_bytes() == robustness.checkpoint(folder, f"adversarial_training_{best}").read_bytes()
    summary = (home / "reports" / "smoke" / "summary.md").read_text()
    assert "tried on validation: 2 recipes (" in summary and f"{best} kept in 1 of 1 folds" in summary


def test_other_augmentations_are_compared_by_validation_and_on_test(smoke):
    home, _ = smoke
    results = json.loads((home / "reports" / "smoke" / "results.json").read_text())
    found = {row["augmentation"]: row for row in results["augmentations"]}
    assert list(found) == ["plain", "scale+stain+balanced"]
    summary = (home / "reports" / "smoke" / "summary.md").read_text()
    section = summary.split("## What helps on tissue never seen")[1].split("## ")[0]
    for name, model in zip(found, ("baseline", "baseline_scale+stain+balanced"), strict=True):
        history = pd.read_csv(home / "runs" / "smoke" / "history" / f"{model}.csv")
        assert found[name]["validation_loss"] == pytest.approx(history["validation_loss"].min(), rel=1e-5)
        (row,) = (
            r
            for r in results["metrics"]
            if r["model"] == model and r["subset"] == "all" and r["attack"] == "none"
        )
        assert f"| {name} | {found[name]['validation_loss']:.2f} | " in section
        assert f"| {row['accuracy']:.2f} [" in section


def test_an_unchanged_study_is_skipped(smoke):
    home, _ = smoke
    command = [sys.executable, "-m", "lib.study", "smoke", "--home", str(home)]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("unchanged, skipped") == len(NOTEBOOKS)


def test_a_failing_stage_is_named_and_the_report_stays(smoke):
    home, _ = smoke
    before = (home / "reports" / "smoke" / "index.html").read_bytes()
    command = [sys.executable, "-m", "lib.study", "smoke", "--home", str(home), "--set", "pretrained=nowhere"]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert (
        "02_transfer_learning.ipynb, cell" in done.stderr
        and "Unknown starting weights 'nowhere'" in done.stderr
    )
    assert (home / "reports" / "smoke" / "index.html").read_bytes() == before
