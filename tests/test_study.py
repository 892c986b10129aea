"""The runner, on a study of three tiny notebooks with real kernels."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import nbformat
import pytest
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lib import data, database, profiles, runs, study, training

# Each notebook adds a line to calls.txt beside the runs, so that a test can count what really ran.
FIRST = """
from pathlib import Path
import json, os
from lib import runs
folder = runs.folder(run)
with open(runs.home() / "calls.txt", "a") as calls:
    calls.write("first\\n")
(folder / "split.csv").write_text(f"image,path,label\\na.png,/somewhere/a.png,{len(subtypes)}\\n")
synthetic = data_root == "synthetic"
dataset = {"name": "toy", "synthetic": synthetic, "images": 1, "cases": 1, "fingerprint": "0"}
(folder / "dataset.json").write_text(json.dumps(dataset))
"""
SECOND = """
import sys, time
from lib import runs
folder = runs.folder(run)
runs.require(run, "split.csv")
with open(runs.home() / "calls.txt", "a") as calls:
    calls.write("second\\n")
for epsilon in epsilons:
    path = folder / "predictions" / f"baseline-fgsm_{epsilon:g}.csv.gz"
    path.parent.mkdir(exist_ok=True)
    if not runs.is_current(path, {"epsilon": epsilon}):
        with open(runs.home() / "calls.txt", "a") as calls:
            calls.write(f"epsilon {epsilon:g}\\n")
        path.write_text(str(epsilon))
        runs.write_recipe(path, {"epsilon": epsilon})
        print(f"epoch of {epsilon:g}", file=sys.stderr)
        time.sleep(seconds)
(folder / "attacks.csv").write_text("name\\nfgsm\\n")
"""
THIRD = """
import gzip, json
from lib import runs
folder = runs.folder(run)
with open(runs.home() / "calls.txt", "a") as calls:
    calls.write("third\\n")
pieces = sorted(path.name for path in folder.glob("predictions/*.csv.gz"))
with gzip.open(folder / "predictions.csv.gz", "wt") as table:
    table.write("\\n".join(["image", *pieces]))
parameters = runs.runner_parameters(run) | {"seed": seed, "weights_dir": "/some/where"}
results = {"run": run, "parameters": parameters, "training_precision": "float32"}
results["metrics"] = [{"n": len(pieces)}, {"n": 0}]
(folder / "results.json").write_text(json.dumps(results))
(folder / "summary.md").write_text(f"# Toy\\n\\n{len(pieces)} pieces\\n")
"""
TOY = ("01_first", "02_second", "03_third")


def write_notebook(path, parameters, code):
    cells = [
        new_markdown_cell(f"# Notebook {path.stem}\n\nThe next one is [02](02_second.ipynb)."),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_code_cell(code.strip()),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A study of three notebooks and one profile, its runs and reports in the same temporary folder."""
    folder = tmp_path / "notebooks"
    (folder / "profiles").mkdir(parents=True)
    (folder / "profiles" / "toy.yaml").write_text("run: toy\nepsilons: [1, 2]\nlearning_rate: 1e-3\n")
    write_notebook(folder / "00_welcome.ipynb", "", "raise SystemExit")
    write_notebook(
        folder / "01_first.ipynb",
        'run: str = "toy"\ndata_root: str = "synthetic"\nsubtypes: list[str] = []\nlearning_rate: float = 0.1',
        FIRST,
    )
    write_notebook(
        folder / "02_second.ipynb",
        'run: str = "toy"\nepsilons: list[float] = [1, 2]\nseconds: float = 0.0',
        SECOND,
    )
    write_notebook(folder / "03_third.ipynb", 'run: str = "toy"\nseed: int = 0', THIRD)
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))
    monkeypatch.setattr(study, "STAGES", TOY)
    monkeypatch.setattr(study, "OPTIONAL", ())
    return folder


def calls(notebooks):
    """The notebooks that ran since the last call."""
    path = notebooks.parent / "calls.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def replace_in(notebook, old, new):
    text = notebook.read_text()
    assert old in text
    notebook.write_text(text.replace(old, new))


# ---------------------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toy", "--set", "epsilon=[1]"], "unknown parameter 'epsilon': did you mean 'epsilons'?"),
        (
            ["toy", "--set", "q=1"],
            "there are: data_root, epsilons, learning_rate, run, seconds, seed, subtypes",
        ),
        (["toy", "--set", "seed=1.5"], "seed must be a whole number, not '1.5' (such as 64)"),
        (["toy", "--set", "seed=true"], "seed must be a whole number, not 'true'"),
        (
            ["toy", "--set", "epsilons=[1, two]"],
            "must be a list, such as [2, 4]; 'two' in it is not a number",
        ),
        (["toy", "--set", "epsilons=[.nan]"], "nan in it is not a number"),
        (["toy", "--set", "epsilons=[1, [2]]"], "[2] in it is not a number"),
        (["toy", "--set", "epsilons="], "such as [2, 4] (or [] for none); '' in it is not a number"),
        (["toy", "--set", "epsilons=[4, 300]"], "epsilons must be 0 to 255, not 300"),
        (["toy", "--set", "seed=-1"], "seed must be 0 to 4294967295, not -1"),
        (["toy", "--set", "epsilons"], "write --set NAME=VALUE"),
        (["toy", "--set", "run=../elsewhere"], "must be a plain folder name"),
        (["toy", "--data-root", "nowhere"], "nowhere is not a folder"),
        (["tyo"], "no profile 'tyo': did you mean 'toy'?"),
        (["toy", "--without", "09"], "notebook 09 cannot be left out, only "),
    ],
)
def test_wrong_use_ends_with_one_clear_line_before_anything_is_written(notebooks, capsys, arguments, words):
    assert study.main(arguments, notebooks) == 2
    message = capsys.readouterr().err
    assert words in message and message.startswith("error: ") and message.count("\n") == 1
    assert not (notebooks.parent / "runs").exists()


def test_a_profile_with_a_typo_or_broken_yaml_is_named(notebooks):
    profile = notebooks / "profiles" / "typo.yaml"
    profile.write_text("run: toy\nepsilonz: [1]\n")
    with pytest.raises(
        profiles.ParameterError,
        match=r"profile typo: unknown parameter 'epsilonz': did you mean 'epsilons'",
    ):
        study.run_study("typo", notebooks=notebooks)
    for text in ("run: [toy", "just words", "run: toy\nmore: {a: 1}"):
        profile.write_text(text)
        with pytest.raises(profiles.ParameterError, match=r"typo\.yaml"):
            profiles.load("typo", notebooks)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "is not a readable notebook"),
        ('{"cells": [1]}', "is not a readable notebook"),
        ('{"cells": [{"cell_type": "code"}]}', "is not a readable notebook"),
        ("[]", "is not a readable notebook"),
    ],
)
def test_a_damaged_notebook_is_named(notebooks, capsys, text, words):
    (notebooks / "02_second.ipynb").write_text(text)
    assert study.main(["toy"], notebooks) == 2
    assert "02_second.ipynb" in (shown := capsys.readouterr().err) and words in shown


@pytest.mark.parametrize("parameters", ["run: str =", "run: str = 2 * text", "a, b = 1, 2"])
def test_a_parameter_that_is_no_constant_is_named(notebooks, capsys, parameters):
    write_notebook(notebooks / "02_second.ipynb", parameters, SECOND)
    assert study.main(["toy"], notebooks) == 2
    shown = capsys.readouterr().err
    assert "02_second.ipynb" in shown and "lines of the form 'name: type = constant'" in shown


def test_parameters_are_read_with_types_and_paths_become_absolute(notebooks, monkeypatch):
    assert profiles.declared_in(notebooks / "02_second.ipynb") == {
        "run": ("str", "toy"),
        "epsilons": ("list[float]", [1, 2]),
        "seconds": ("float", 0.0),
    }
    monkeypatch.chdir(notebooks)
    (notebooks / "tissue").mkdir()
    parameters = profiles.resolve(
        "toy", "tissue", ["run=7", "subtypes=[DC, A]", "seconds=2"], sorted(notebooks.glob("0[1-3]*.ipynb"))
    )
    assert parameters == {
        "run": "7",
        "epsilons": [1, 2],
        "learning_rate": 0.001,  # YAML reads 1e-3 as a text
        "data_root": str(notebooks / "tissue"),
        "subtypes": ["DC", "A"],
        "seconds": 2,
    }


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("recipes=[fgsm, pdg]", "there is no 'pdg' (in 'pdg'): did you mean 'pgd'?"),
        ("recipes=[pgd+noisy]", "there is no 'noisy' (in 'pgd+noisy'): did you mean 'noise'?"),
        ("recipes=[]", "recipes must name at least one"),
        ("epsilons=[]", "epsilons must name at least one"),
        ("epsilons=[4, 4.0]", "epsilons: [4, 4.0] lists a value twice"),
        ("epsilons=[0, 4]", "epsilons: leave 0 out; results on clean images are always shown"),
        ("epsilons=[0.01, 0.03]", "if you meant fractions of the value range: [2.55, 7.65]"),
        ("epsilons=0.5", "below 1 no 8-bit image changes: name at least one of 1 or more"),
        ("train_epsilon=0.016", "that trains no defense (if you meant a fraction of the value range: 4.08)"),
        ("train_epsilon=0", "train_epsilon 0 is counted in 255ths, below one gray level"),
        (
            "noise_sigma=25",
            "noise_sigma must be 0.001 to 1, not 25 (if you meant gray levels: 25/255 is 0.098)",
        ),
        ("other_sigmas=[0]", "other_sigmas must be 0.001 to 1, not 0"),
        ("learning_rate=0", "learning_rate must be 1e-08 to 1, not 0"),
        ("image_size=100", "image_size must be a multiple of 32 pixels, such as 96, not 100"),
        ("precision=flaot32", "precision: there is no 'flaot32': did you mean 'float32'?"),
        ("compare_with=[smoke]", "compare_with: 'smoke' is this run itself"),
        ("other_starts=[one/x.safetensors, two/x.safetensors]", "other_starts: two have the same name"),
        ("augmentation=stian", "there is no 'stian' (in 'stian'): did you mean 'stain'?"),
        ("augmentation=plain+stain", "there is no 'plain' (in 'plain+stain')"),
        ("other_augmentations=[scale, balancd+stain]", "other_augmentations: there is no 'balancd'"),
        ("noise_drawn=onse", "noise_drawn: there is no 'onse': did you mean 'once'?"),
        ("split_by=cases", "split_by: there is no 'cases': did you mean 'case'?"),
    ],
)
def test_what_would_fail_late_is_refused_before_hours_of_training(setting, words):
    with pytest.raises(profiles.ParameterError) as error:
        profiles.resolve("smoke", None, [setting], study._stages(study.NOTEBOOKS))
    assert words in str(error.value)


def test_a_report_names_all_versions_that_its_stages_ran_with():
    stages = [{"torch": "2.9.0"}, {"torch": "2.10.0", "numpy": "2.4"}, {"torch": "2.10.0"}, {}]
    assert study._versions(stages) == {"torch": "2.9.0 and 2.10.0", "numpy": "2.4"}


def test_the_time_of_all_trainings_is_foretold_from_what_they_show(smoke, tmp_path, capsys):
    home, printed = smoke
    assert "all trainings together" not in printed, "seconds are no news"
    folder = home / "runs" / "smoke"
    shown = 0
    for file in (folder / "models").glob("*.json"):
        recipe = runs.read_json(file)["recipe"]
        if "epochs" in recipe and file.stem != "adversarial_training":  # a copy of the best of its recipes
            worth = training.EPOCHS_WORTH[recipe["recipe"].split("+")[0]] if "recipe" in recipe else 1
            shown += recipe["images"][0] * recipe["epochs"] * worth
    parameters, split = profiles.load("smoke"), data.load_split(home / "reports" / "smoke" / "split.csv.gz")
    assert training.images_ahead(parameters, split) == shown

    split.to_csv(tmp_path / "split.csv", index=False)
    shutil.copy(folder / "dataset.json", tmp_path)
    study._foretell(parameters | {"epochs": 10_000, "precision": "float23"}, tmp_path)
    study._foretell(parameters, tmp_path)
    assert capsys.readouterr().out == "", "the notebook says what is wrong; seconds are no news"
    study._foretell(parameters | {"epochs": 10_000_000}, tmp_path)
    (hours,) = re.findall(r"all trainings together take about ([\d.]+) hours", capsys.readouterr().out)
    assert float(hours) > 1


def test_makefile_and_runner_agree_on_the_environment():
    text = (runs.ROOT / "Makefile").read_text()
    found = dict(re.findall(r"^export (\w+) \?= (\S+)$", text, re.MULTILINE))
    assert found == study.ENVIRONMENT


def test_a_stage_depends_on_the_modules_it_imports_through_others_too(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    for name, text in [
        ("data", ""),
        ("models", "import torch\nfrom lib import data, study\n"),
        ("figures", ""),
        ("study", ""),
    ]:
        (tmp_path / "lib" / f"{name}.py").write_text(text)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert study._modules_named_in(
        "# Title\nfrom lib import (\n    models,\n    study,\n)  # no figures"
    ) == {"models", "data"}
    assert study._modules_named_in("from lib.figures import curve") == {"figures"}
    assert study._modules_named_in("the models and data, in words") == set()


# ---------------------------------------------------------------------------------------------- running


def test_only_what_changed_runs_again(notebooks, capfd, snapshot, monkeypatch):
    assert study.main(["toy"], notebooks) == 0
    assert calls(notebooks) == ["first", "second", "epsilon 1", "epsilon 2", "third"]
    shown = capfd.readouterr()
    assert "ran in" in shown.out and "index.html" in shown.out
    assert "epoch of 1" in shown.err, "progress of the kernel is seen on the terminal"
    run, published = notebooks.parent / "runs" / "toy", notebooks.parent / "reports" / "toy"
    first = snapshot(published)
    assert not list(published.parent.glob(".*")), "nothing is left beside the report"
    record = json.loads((run / "stages" / "02_second.json").read_text())
    assert {"attacks.csv", "predictions/baseline-fgsm_1.csv.gz"} <= set(record["outputs"])

    began = time.monotonic()
    assert study.main(["toy", "--set", "epsilons=[1.0, 2]"], notebooks) == 0
    assert time.monotonic() - began < 5
    assert calls(notebooks) == [] and snapshot(published) == first
    assert capfd.readouterr().out.count("unchanged, skipped") == 3

    # A parameter of 02 only: 01 is kept, and within 02 the epsilon that was done. The dropped epsilon's piece goes.
    assert study.main(["toy", "--set", "epsilons=[2, 4]"], notebooks) == 0
    assert calls(notebooks) == ["second", "epsilon 4", "third"]
    pieces = gzip.decompress((published / "predictions.csv.gz").read_bytes()).decode().splitlines()
    assert pieces == ["image", "baseline-fgsm_2.csv.gz", "baseline-fgsm_4.csv.gz"]

    # A parameter of 03 only.
    assert study.main(["toy", "--set", "epsilons=[2, 4]", "--set", "seed=1"], notebooks) == 0
    assert calls(notebooks) == ["third"]

    # A lost and a damaged output.
    (run / "predictions" / "baseline-fgsm_2.csv.gz").unlink()
    (run / "predictions" / "baseline-fgsm_4.csv.gz").write_text("damaged")
    assert study.main(["toy", "--set", "epsilons=[2, 4]", "--set", "seed=1"], notebooks) == 0
    assert calls(notebooks) == ["second", "epsilon 2", "epsilon 4"], "03 finds the same inputs again"

    # A report that someone changed is published again, without running anything.
    (published / "summary.md").write_text("by hand")
    assert study.main(["toy", "--set", "epsilons=[2, 4]", "--set", "seed=1"], notebooks) == 0
    assert calls(notebooks) == [] and "2 pieces" in (published / "summary.md").read_text()

    assert study.main(["toy", "--set", "epsilons=[2, 4]", "--set", "seed=1", "--force"], notebooks) == 0
    assert calls(notebooks) == ["first", "second", "epsilon 2", "epsilon 4", "third"]

    # One notebook left out; where it has run, its results would be compared.
    monkeypatch.setattr(study, "OPTIONAL", TOY[:2])
    assert study.main(["toy", "--without", "01", "--set", "run=other"], notebooks) == 1
    assert "split.csv" in capfd.readouterr().err and calls(notebooks) == []
    assert study.main(["toy", "--without", "02"], notebooks) == 2
    assert "holds results of 02_second:" in capfd.readouterr().err


def test_the_report_says_the_parameters_of_stages_that_wrote_the_same(notebooks):
    results = notebooks.parent / "reports" / "toy" / "results.json"
    study.run_study("toy", notebooks=notebooks)
    assert json.loads(results.read_text())["parameters"]["learning_rate"] == 0.001
    calls(notebooks)
    study.run_study("toy", settings=["learning_rate=0.01"], notebooks=notebooks)
    assert calls(notebooks) == ["first", "third"], (
        "01 wrote what it had written, and 02 does not ask for the rate"
    )
    assert json.loads(results.read_text())["parameters"]["learning_rate"] == 0.01


def test_a_copy_of_a_notebook_is_left_alone(notebooks, capsys):
    study.run_study("toy", notebooks=notebooks)
    capsys.readouterr(), calls(notebooks)
    for copy in ("02_second-Copy1.ipynb", "04_mine.ipynb"):
        shutil.copy(notebooks / "02_second.ipynb", notebooks / copy)
    study.run_study("toy", notebooks=notebooks)
    shown = capsys.readouterr().out
    assert shown.count("unchanged, skipped") == 3 and calls(notebooks) == []
    assert "not part of the study, ignored: 02_second-Copy1.ipynb, 04_mine.ipynb\n" in shown
    (notebooks / "02_second.ipynb").unlink()
    with pytest.raises(profiles.ParameterError, match=r"lacks 02_second\.ipynb"):
        study.run_study("toy", notebooks=notebooks)


def test_what_an_older_runner_recorded_is_not_taken_for_this_study(notebooks):
    stages = notebooks.parent / "runs" / "toy" / "stages"
    stages.mkdir(parents=True)
    runs.write_note(stages / "02.json", {"finished": True, "parameters": {"gone": 1, "seconds": 7}})
    study.run_study("toy", notebooks=notebooks)
    results = json.loads((notebooks.parent / "reports" / "toy" / "results.json").read_text())
    assert "gone" not in results["parameters"] and results["parameters"]["seconds"] == 0


def test_damaged_records_are_named_and_their_stages_run_again(notebooks, capsys):
    study.run_study("toy", notebooks=notebooks)
    calls(notebooks), capsys.readouterr()
    stages = notebooks.parent / "runs" / "toy" / "stages"
    lacking = json.loads((stages / "02_second.json").read_text())
    del lacking["key"]
    damages = {
        "01_first": "[1, 2]",
        "02_second": json.dumps(lacking),
        "03_third": "[" * 100_000,
        "published": '{"state": 1, "commit": 2, "files": 3}',
    }
    for name, text in damages.items():
        (stages / f"{name}.json").write_text(text)
    assert study.main(["toy"], notebooks) == 0
    shown = capsys.readouterr().out
    assert calls(notebooks) == ["first", "second", "third"], "the work inside a stage is kept"
    for name in damages:
        assert f"stages/{name}.json is damaged and is ignored: what it recorded runs again\n" in shown
    assert study.main(["toy"], notebooks) == 0 and calls(notebooks) == []

    # One digit of one record.
    record = (stages / "02_second.json").read_text()
    number = re.search(r'"seconds": (\d)', record)
    (stages / "02_second.json").write_text(
        record.replace(number[0], f'"seconds": {(int(number[1]) + 1) % 10}')
    )
    assert study.main(["toy"], notebooks) == 0 and calls(notebooks) == ["second"]


def test_only_this_environments_kernel_and_code_compute_and_the_report_names_them(
    notebooks, monkeypatch, tmp_path
):
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {"argv": ["false", "{connection_file}"], "display_name": "another Python", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    (tmp_path / "elsewhere" / "lib").mkdir(parents=True)
    (tmp_path / "elsewhere" / "lib" / "__init__.py").write_text("raise ImportError('other code')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    # The last notebook says what computes there; for the others this process speaks.
    says = "import gzip, json, sys\nfrom lib import runs\nruns.show_environment()\nassert sys.executable == "
    write_notebook(
        notebooks / "03_third.ipynb",
        'run: str = "toy"\nseed: int = 0',
        THIRD.replace("import gzip, json\nfrom lib import runs", says + repr(sys.executable)),
    )
    real = runs.environment()
    lies = {"versions": {"torch": "0.1"}, "device": "another machine", "commit": ""}
    monkeypatch.setattr(runs, "environment", lambda: lies)
    study.run_study("toy", notebooks=notebooks)
    found = json.loads((notebooks.parent / "reports" / "toy" / "results.json").read_text())["provenance"]
    assert found["device"] == f"another machine and {real['device']}"
    assert found["versions"]["torch"] == f"0.1 and {real['versions']['torch']}"
    assert found["versions"]["numpy"] == real["versions"]["numpy"]


def test_a_report_names_the_commits_whose_code_computed_it(notebooks, monkeypatch):
    def published(commit, *settings):
        monkeypatch.setattr(runs, "commit", lambda: commit)
        report = study.run_study("toy", settings=settings, notebooks=notebooks)
        return json.loads((report.parent / "results.json").read_text())["provenance"]["commit"]

    assert published("one-dirty") == "one-dirty"
    assert published("two") == "two", "the same code, committed since"
    assert published("three") == "two", "nothing was computed since"
    assert published("four", "run=clean") == "four"
    assert published("five", "run=clean", "seed=1") == "four and five"


def test_a_failing_cell_is_named_and_the_last_report_stays(notebooks, capsys, snapshot):
    assert study.main(["toy"], notebooks) == 0
    published = snapshot(notebooks.parent / "reports")
    calls(notebooks)
    replace_in(
        notebooks / "02_second.ipynb", "for epsilon in", "values = {}\\nvalues['mean']\\nfor epsilon in"
    )
    assert study.main(["toy"], notebooks) == 1
    shown = capsys.readouterr()
    assert "02_second.ipynb, cell 3" in shown.err and "KeyError: 'mean'" in shown.err
    assert "> values['mean']" in shown.err and "\x1b" not in shown.err.split("error: ")[1]
    assert "failed after" in shown.out
    assert calls(notebooks) == ["second"], "01 is not run again, 03 not at all"
    assert snapshot(notebooks.parent / "reports") == published

    # Mended, it goes on; the work that 02 had finished before is not done again.
    replace_in(notebooks / "02_second.ipynb", "values['mean']", "values.get('mean')")
    assert study.main(["toy"], notebooks) == 0
    assert calls(notebooks) == ["second"]


def test_a_full_disk_is_said_and_the_last_report_stays(notebooks, capsys, full_disk, snapshot):
    assert study.main(["toy"], notebooks) == 0
    published = snapshot(notebooks.parent / "reports")
    big = 'with runs.whole_file(folder / "big") as part:\n    part.write_bytes(bytes(10**6))\nfor epsilon in'
    replace_in(notebooks / "02_second.ipynb", "for epsilon in", json.dumps(big)[1:-1])
    with full_disk(5 * 10**5):
        assert study.main(["toy"], notebooks) == 1
    assert (
        "could not write" in (shown := capsys.readouterr().err) and "free some space and run again" in shown
    )
    assert snapshot(notebooks.parent / "reports") == published
    assert study.main(["toy"], notebooks) == 0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit()", "SystemExit: a notebook must not end itself"),
        ("import os; os._exit(9)", "DeadKernelError"),
        ('runs.require(run, "models/x.json")', "run notebooks/02_transfer_learning.ipynb first"),
    ],
)
def test_a_notebook_that_ends_early_is_a_failure(notebooks, monkeypatch, code, words):
    monkeypatch.setattr(study, "STAGES", TOY[:1])
    write_notebook(
        notebooks / "01_first.ipynb", 'run: str = "toy"\nseed: int = 0', f"from lib import runs\n{code}"
    )
    (notebooks / "profiles" / "toy.yaml").write_text("run: toy\n")
    with pytest.raises(study.StudyError, match=r"01_first\.ipynb, cell 3") as error:
        study.run_study("toy", notebooks=notebooks)
    assert words in str(error.value)


def test_new_images_in_the_data_folder_run_the_stages_that_read_it(notebooks, tmp_path):
    (tmp_path / "tissue").mkdir()
    (tmp_path / "tissue" / "a.png").write_bytes(b"1")
    study.run_study("toy", tmp_path / "tissue", notebooks=notebooks)
    calls(notebooks)
    study.run_study("toy", tmp_path / "tissue", notebooks=notebooks)
    assert calls(notebooks) == []
    (tmp_path / "tissue" / "b.png").write_bytes(b"2")
    study.run_study("toy", tmp_path / "tissue", notebooks=notebooks)
    assert calls(notebooks) == ["first"], "01 wrote the same again, so nothing else ran"


@pytest.mark.parametrize(("end", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_ended_half_way_it_resumes(notebooks, end, status):
    """SIGKILL reaches the whole process group; SIGINT is Ctrl-C."""
    command = textwrap.dedent(
        f"""
        import signal, sys
        from pathlib import Path
        from lib import study
        study.STAGES = {TOY}
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(study.main(["toy", "--set", "seconds=60"], Path({str(notebooks)!r})))
        """
    )

    arguments = [sys.executable, "-c", command]
    process = subprocess.Popen(
        arguments, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    recipe = notebooks.parent / "runs" / "toy" / "predictions" / "baseline-fgsm_1.json"
    deadline = time.monotonic() + 40
    while not recipe.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, end)
    assert process.wait(timeout=20) == status
    assert calls(notebooks) == ["first", "second", "epsilon 1"]
    assert not (notebooks.parent / "reports" / "toy").exists()
    assert study.main(["toy"], notebooks) == 0
    assert calls(notebooks) == ["second", "epsilon 2", "third"]


def test_one_run_takes_one_study_at_a_time(notebooks):
    folder = notebooks.parent / "runs" / "toy"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"), pytest.raises(study.StudyError, match="another study is running on"):
        study.run_study("toy", notebooks=notebooks)
    assert calls(notebooks) == []


def test_fold_files_put_beside_the_whole_database_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))
    monkeypatch.setattr(database, "TOTAL", 2)
    assert study._data_state("breakhis") is None, "before the download"
    root = tmp_path / "data" / "BreaKHis_v1"
    root.mkdir(parents=True)
    for name in ("a.png", "b.png", "README.txt"):
        (root / name).touch()
    assert study._data_state("breakhis") is None, "and after it, so that 01 is not run twice"
    (root / "dsfold1.txt").write_text("a.png|100|1|train\n")
    one = study._data_state("breakhis")
    (root / "dsfold1.txt").write_text("a.png|100|1|test\n")
    assert list(one) == ["dsfold1.txt"] and study._data_state("breakhis") != one
    (root / "b.png").unlink()
    assert "a.png" in study._data_state("breakhis"), "of a part every file counts"


def test_what_a_folder_of_images_says_counts_even_with_size_and_time_kept(tmp_path):
    for name in ("a.png", "images.csv", "dsfold1.txt"):
        (tmp_path / name).write_text("benign")
    before = study._data_state(tmp_path)
    for name in before:
        state = (tmp_path / name).stat()
        (tmp_path / name).write_text("Benign")
        os.utime(tmp_path / name, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert study._data_state(tmp_path)[name] != before[name]
    (tmp_path / "images.csv").write_text("benign")
    assert study._data_state(tmp_path)["images.csv"] == before["images.csv"], "its content alone"
