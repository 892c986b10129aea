"""The runner and the publishing, on a study of three tiny notebooks with real kernels."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from filelock import FileLock
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lib import report, study

# Each notebook adds a line to calls.txt beside the runs, so that a test can count what really ran.
FIRST = """
from pathlib import Path
import json, os
from lib import study
folder = study.run_folder(run)
with open(study.home() / "calls.txt", "a") as calls:
    calls.write("first\\n")
(folder / "split.csv").write_text(f"image,path,label\\na.png,/somewhere/a.png,{len(subtypes)}\\n")
synthetic = data_root == "synthetic"
dataset = {"name": "toy", "synthetic": synthetic, "images": 1, "cases": 1, "fingerprint": "0"}
(folder / "dataset.json").write_text(json.dumps(dataset))
"""
SECOND = """
import sys, time
from lib import study
folder = study.run_folder(run)
study.require(run, "split.csv")
with open(study.home() / "calls.txt", "a") as calls:
    calls.write("second\\n")
for epsilon in epsilons:
    path = folder / "predictions" / f"baseline-fgsm_{epsilon:g}.csv.gz"
    path.parent.mkdir(exist_ok=True)
    if not study.is_current(path, {"epsilon": epsilon}):
        with open(study.home() / "calls.txt", "a") as calls:
            calls.write(f"epsilon {epsilon:g}\\n")
        path.write_text(str(epsilon))
        study.write_recipe(path, {"epsilon": epsilon})
        print(f"epoch of {epsilon:g}", file=sys.stderr)
        time.sleep(seconds)
(folder / "attacks.csv").write_text("name\\nfgsm\\n")
"""
THIRD = """
import gzip, json
from lib import study
folder = study.run_folder(run)
with open(study.home() / "calls.txt", "a") as calls:
    calls.write("third\\n")
pieces = sorted(path.name for path in folder.glob("predictions/*.csv.gz"))
with gzip.open(folder / "predictions.csv.gz", "wt") as table:
    table.write("\\n".join(pieces))
results = {"run": run, "parameters": {"seed": seed, "weights_dir": "/some/where"}, "metrics": [{"n": len(pieces)}, {"n": 0}]}
(folder / "results.json").write_text(json.dumps(results))
(folder / "summary.md").write_text(f"# Toy\\n\\n{len(pieces)} pieces\\n")
"""


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
    return folder


def calls(notebooks):
    """The notebooks that ran since the last call."""
    path = notebooks.parent / "calls.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def snapshot(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


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
        (["toy", "--set", "seed=1.5"], "seed must be int, not 1.5"),
        (["toy", "--set", "seed=true"], "seed must be int, not True"),
        (["toy", "--set", "epsilons=4"], "epsilons must be a list (list[float]), such as [4]"),
        (["toy", "--set", "epsilons=[1, two]"], "epsilons must be float, not 'two'"),
        (["toy", "--set", "epsilons=[.nan]"], "epsilons must be finite"),
        (["toy", "--set", "epsilons"], "write --set NAME=VALUE"),
        (["toy", "--set", "run=../elsewhere"], "must be a plain folder name"),
        (["toy", "--data-root", "nowhere"], "nowhere is not a folder"),
        (["tyo"], "no profile 'tyo': did you mean 'toy'?"),
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
        study.ParameterError, match=r"profile typo: unknown parameter 'epsilonz': did you mean 'epsilons'"
    ):
        study.run_study("typo", notebooks=notebooks)
    for text in ("run: [toy", "just words", "run: toy\nmore: {a: 1}"):
        profile.write_text(text)
        with pytest.raises(study.ParameterError, match=r"typo\.yaml"):
            study.load_profile("typo", notebooks)


def test_parameters_are_read_with_types_and_paths_become_absolute(notebooks, monkeypatch):
    assert study.parameters_of(notebooks / "02_second.ipynb") == {
        "run": ("str", "toy"),
        "epsilons": ("list[float]", [1, 2]),
        "seconds": ("float", 0.0),
    }
    monkeypatch.chdir(notebooks)
    (notebooks / "tissue").mkdir()
    parameters = study._all_parameters("toy", "tissue", ["run=7", "subtypes=[DC, A]", "seconds=2"], notebooks)
    assert parameters == {
        "run": "7",
        "epsilons": [1, 2],
        "learning_rate": 0.001,  # YAML reads 1e-3 as a text
        "data_root": str(notebooks / "tissue"),
        "subtypes": ["DC", "A"],
        "seconds": 2,
    }


# ---------------------------------------------------------------------------------------------- helpers of notebooks


def test_require_says_which_notebook_writes_the_missing_file(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))
    for name, notebook in [
        ("split.csv", "01_data_split"),
        ("models/baseline.safetensors", "02_transfer_learning"),
        ("predictions/baseline-none.csv.gz", "02_transfer_learning"),
        ("predictions/baseline-pgd.csv.gz", "03_fgsm_attack"),
        ("models/gaussian_noise_fold2.safetensors", "04_gaussian_noise_defense"),
        ("history/merged_fgsm.csv", "05_adversarial_training_defense"),
        ("results.json", "06_comparison"),
    ]:
        expected = rf"runs/quick/{name} is missing: run notebooks/{notebook}.ipynb first \(with run='quick'\)"
        with pytest.raises(FileNotFoundError, match=expected):
            study.require("quick", name)
    (tmp_path / "runs" / "quick").mkdir(parents=True)
    (tmp_path / "runs" / "quick" / "split.csv").touch()
    assert study.require("quick", "split.csv") == tmp_path / "runs" / "quick" / "split.csv"


def test_finished_work_is_current_only_with_its_recipe_and_undamaged(tmp_path):
    path, recipe = tmp_path / "baseline-pgd.csv.gz", {"steps": 20, "epsilons": (1, 2)}
    assert not study.is_current(path, recipe)
    path.write_text("table")
    (tmp_path / "baseline-pgd.json").write_text('{"note": "kept"}')
    assert not study.is_current(path, recipe)
    study.write_recipe(path, recipe)
    assert study.is_current(path, recipe)
    assert json.loads((tmp_path / "baseline-pgd.json").read_text())["note"] == "kept"
    assert not study.is_current(path, recipe | {"steps": 21})
    path.write_text("tabl")
    assert not study.is_current(path, recipe)


def test_code_hash_follows_the_named_modules():
    assert study.code_hash("study", "report") == study.code_hash("report", "study")
    assert study.code_hash("study") != study.code_hash("report")


def test_code_hash_follows_code_not_words(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    module = tmp_path / "lib" / "one.py"
    module.parent.mkdir()

    def of(source):
        module.write_text(source)
        return study.code_hash("one")

    plain = of("def f(x):\n    return x + 1\n")
    assert plain != of("def f(x):\n    return x + 2\n")
    assert plain == of('"""A module."""\n\ndef f(x):\n    """Adds."""\n    return (x + 1)  # one\n')


def test_makefile_and_runner_agree_on_the_environment():
    text = (study.ROOT / "Makefile").read_text()
    found = dict(re.findall(r"^export (\w+) \?= (\S+)$", text, re.MULTILINE))
    assert found == study.ENVIRONMENT


def test_the_commit_says_when_code_differs_but_not_when_a_report_does(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROOT", tmp_path.resolve())
    assert study.commit() == ""

    def git(*arguments):
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True
        )

    for name in ("lib/data.py", "reports/quick/summary.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean = study.commit()
    assert len(clean) == 12
    (tmp_path / "reports/quick/summary.md").write_text("2")
    assert study.commit() == clean
    (tmp_path / "lib/data.py").write_text("2")
    assert study.commit() == f"{clean}-dirty"


def test_a_stage_depends_on_the_modules_it_imports_through_others_too(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    for name, text in [
        ("data", ""),
        ("models", "import torch\nfrom lib import data, study\n"),
        ("figures", ""),
        ("study", ""),
    ]:
        (tmp_path / "lib" / f"{name}.py").write_text(text)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    assert study._modules_named_in(
        "# Title\nfrom lib import (\n    models,\n    study,\n)  # no figures"
    ) == {"models", "data"}
    assert study._modules_named_in("from lib.figures import curve") == {"figures"}
    assert study._modules_named_in("the models and data, in words") == set()


# ---------------------------------------------------------------------------------------------- running


def test_only_what_changed_runs_again(notebooks, capfd):
    assert study.main(["toy"], notebooks) == 0
    assert calls(notebooks) == ["first", "second", "epsilon 1", "epsilon 2", "third"]
    shown = capfd.readouterr()
    assert "ran in" in shown.out and "index.html" in shown.out
    assert "epoch of 1" in shown.err, "progress of the kernel is seen on the terminal"
    run, published = notebooks.parent / "runs" / "toy", notebooks.parent / "reports" / "toy"
    first = snapshot(published)
    assert not list(published.parent.glob(".*")), "nothing is left beside the report"
    record = json.loads((run / "stages" / "02.json").read_text())
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
    assert pieces == ["baseline-fgsm_2.csv.gz", "baseline-fgsm_4.csv.gz"]

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


def test_a_failing_cell_is_named_and_the_last_report_stays(notebooks, capsys):
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


def test_a_full_disk_is_said_and_the_last_report_stays(notebooks, capsys, full_disk):
    assert study.main(["toy"], notebooks) == 0
    published = snapshot(notebooks.parent / "reports")
    big = 'with study.whole_file(folder / "big") as part:\n    part.write_bytes(bytes(10**6))\nfor epsilon in'
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
        ('study.require(run, "models/x.json")', "run notebooks/02_transfer_learning.ipynb first"),
    ],
)
def test_a_notebook_that_ends_early_is_a_failure(notebooks, code, words):
    write_notebook(
        notebooks / "01_first.ipynb", 'run: str = "toy"\nseed: int = 0', f"from lib import study\n{code}"
    )
    for name in ("02_second", "03_third"):
        (notebooks / f"{name}.ipynb").unlink()
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


# ---------------------------------------------------------------------------------------------- publishing

PROVENANCE = {
    "commit": "abc",
    "versions": {"torch": "2"},
    "device": "cpu",
    "started": "2026-01-01T00:00:00+00:00",
    "seconds": 61.0,
}


def draw(path, tissue):
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = {} if tissue is None else {"Shows tissue": tissue}
    Figure(figsize=(1, 1)).savefig(path, metadata=mark)
    return path


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Makes the folder of a finished run by hand, of drawn or of real tissue."""
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))
    folder = tmp_path / "runs" / "toy"
    (folder / "notebooks").mkdir(parents=True)
    for name, tissue in [("curve", "no"), ("sample", "yes"), ("unmarked", None)]:
        draw(folder / "figures" / f"{name}.png", tissue)
    png = {"image/png": "aGVsbG8=", "text/plain": "<Figure>"}
    outputs = [
        new_output("stream", name="stderr", text="epoch 1:  0%\repoch 1: loss \x1b[31m0.5\x1b[0m\n"),
        new_output("display_data", png, metadata={"filename": "figures/curve.png", "alt": "a <curve>"}),
        new_output(
            "display_data", png, metadata={"image/png": {"filename": "figures/sample.png", "alt": "a sample"}}
        ),
        new_output("display_data", {report.WIDGET: {"model_id": "1"}, "text/plain": "IntSlider()"}),
        new_output("stream", name="stdout", text=f"written to {tmp_path}/runs/toy\n"),
    ]
    cells = [
        new_markdown_cell("# What *fools* it\n\nNext: [notebook 06](06_comparison.ipynb#findings)"),
        new_code_cell("x = 1", outputs=outputs, execution_count=1),
    ]
    nbformat.write(new_notebook(cells=cells), folder / "notebooks" / "03_fgsm_attack.ipynb")
    nbformat.write(
        new_notebook(cells=[new_markdown_cell("# Findings")]), folder / "notebooks" / "06_comparison.ipynb"
    )

    def finish(synthetic):
        dataset = {"name": "toy", "synthetic": synthetic, "images": 2, "cases": 1, "fingerprint": "0"}
        (folder / "dataset.json").write_text(json.dumps(dataset))
        results = {
            "run": "toy",
            "parameters": {"data_root": "/some/where/breakhis"},
            "metrics": [{"n": 1}, {"n": None}],
        }
        (folder / "results.json").write_text(json.dumps(results))
        pd.DataFrame({"image": ["a.png"], "path": ["/some/a.png"], "case": ["14-1"]}).to_csv(
            folder / "split.csv", index=False
        )
        (folder / "attacks.csv").write_text("name\nfgsm\n")
        with gzip.open(folder / "predictions.csv.gz", "wt") as table:
            table.write("image,margin\na.png,0.5\n")
        (folder / "summary.md").write_text(
            "# Summary\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n![curve](figures/curve.png)\n\n![sample](figures/sample.png)\n\nSee [03](03_fgsm_attack.ipynb).\n"
        )
        return folder

    return finish


def links(page):
    """What a page links to and shows, as files."""
    from html.parser import HTMLParser

    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.extend(
                value.split("#")[0]
                for name, value in attributes
                if name in ("src", "href") and value[0] != "#"
            )

    Parser().feed(page.read_text())
    return [page.parent / link for link in found]


def test_the_report_of_drawn_tissue_says_so_and_holds_figures_once(finished):
    finished(synthetic=True)
    index = report.publish("toy", PROVENANCE)
    folder = index.parent
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == [
        "03_fgsm_attack.html", "06_comparison.html", "attacks.csv", "dataset.json", "figures", "figures/curve.png",
        "figures/sample.png", "figures/unmarked.png", "index.html", "predictions.csv.gz", "results.json", "split.csv", "summary.md",
    ]  # fmt: skip
    for page in folder.glob("*.html"):
        text = page.read_text()
        assert report.DRAWN_BANNER in text and "https://" not in text and "<script" not in text
        assert len(text) < 150_000
        assert all(link.is_file() for link in links(page)), page
    page = (folder / "03_fgsm_attack.html").read_text()
    assert '<img alt="a &lt;curve&gt;" src="figures/curve.png"' in page and 'src="figures/sample.png"' in page
    assert "aGVsbG8" not in page and report.WIDGET_NOTE in page and "IntSlider" not in page
    assert "<pre>epoch 1: loss 0.5</pre></details>" in page
    assert "written to runs/toy" in page, "the folders of this machine are left out"
    assert 'href="06_comparison.html#findings"' in page
    results = json.loads((folder / "results.json").read_text())
    assert results["provenance"] == PROVENANCE and results["metrics"] == [{"n": 1}, {"n": None}]
    assert results["parameters"] == {"data_root": "breakhis"}
    assert (folder / "split.csv").read_text() == "image,case\na.png,14-1\n"
    assert report.tissue_leaks(folder, ["index.html", "figures/sample.png"]) == []
    first = snapshot(folder)
    time.sleep(1.1)  # gzip would note another second
    finished(synthetic=True)
    report.publish("toy", PROVENANCE)
    assert snapshot(folder) == first, "the same results give the same bytes"


def test_in_a_report_of_real_tissue_everything_that_shows_it_is_ignored_by_git(finished):
    finished(synthetic=False)
    index = report.publish("toy", PROVENANCE)
    folder = index.parent
    for page in folder.rglob("*.html"):
        assert report.DRAWN_BANNER not in page.read_text()
        assert all(link.is_file() for link in links(page)), page
    subprocess.run(["git", "init", "-q", folder], check=True)
    subprocess.run(["git", "-C", folder, "add", "."], check=True)
    tracked = subprocess.run(
        ["git", "-C", folder, "ls-files"], check=True, capture_output=True, text=True
    ).stdout.split()
    assert tracked == [
        ".gitignore", "attacks.csv", "dataset.json", "figures/curve.png", "predictions.csv.gz", "results.json", "split.csv", "summary.md",
    ]  # fmt: skip
    assert report.tissue_leaks(folder, tracked) == []
    assert (folder / "images" / "figures" / "sample.png").is_file() and (
        folder / "images" / "03_fgsm_attack.html"
    ).is_file()
    summary = (folder / "summary.md").read_text()
    assert "figures/curve.png" in summary and "sample" not in summary
    assert "images/figures/sample.png" in index.read_text(), "on this machine the reader sees it"


def test_leaks_of_tissue_are_found(tmp_path):
    (tmp_path / "dataset.json").write_text('{"synthetic": false}')
    draw(tmp_path / "figures" / "plain.png", "no")
    draw(tmp_path / "figures" / "tissue.png", "yes")
    draw(tmp_path / "figures" / "unmarked.png", None)
    draw(tmp_path / "images" / "hidden.png", "no")
    (tmp_path / "figures" / "damaged.png").write_bytes(b"no picture")
    allowed = ["summary.md", "results.json", "figures/plain.png", tmp_path / "figures" / "plain.png"]
    assert report.tissue_leaks(tmp_path, allowed) == []
    refused = [
        "index.html",
        "x.ipynb",
        "figures/tissue.png",
        "figures/unmarked.png",
        "figures/damaged.png",
        "images/hidden.png",
        "a.jpg",
    ]
    for file in [*refused, "figures/missing.png"]:
        assert len(report.tissue_leaks(tmp_path, [file])) == 1, file
    (tmp_path / "dataset.json").unlink()
    assert report.tissue_leaks(tmp_path, refused), "a report that does not say counts as real"


def test_committed_reports_leak_no_tissue():
    listed = subprocess.run(
        ["git", "-C", study.ROOT, "ls-files", "-z", "reports"], capture_output=True, text=True
    )
    files = [Path(name) for name in listed.stdout.split("\0") if name]
    folders = {Path(*file.parts[:2]) for file in files if len(file.parts) > 2}
    if not folders:
        pytest.skip("no committed report")
    for folder in sorted(folders):
        inside = [file.relative_to(folder) for file in files if file.is_relative_to(folder)]
        assert report.tissue_leaks(study.ROOT / folder, inside) == []


@pytest.mark.parametrize("break_it", ["missing", "not a number", "no notebook"])
def test_a_report_is_published_whole_or_not_at_all(finished, break_it):
    folder = finished(synthetic=True)
    published = report.publish("toy", PROVENANCE).parent
    before = snapshot(published.parent)
    if break_it == "missing":
        (folder / "results.json").unlink()
    elif break_it == "not a number":
        (folder / "results.json").write_text('{"metrics": [{"auroc": NaN}]}')
    else:
        (folder / "notebooks" / "06_comparison.ipynb").write_text("{")
    (folder / "attacks.csv").write_text("name\nnew\n")
    with pytest.raises((FileNotFoundError, ValueError)):
        report.publish("toy", PROVENANCE)
    assert snapshot(published.parent) == before
    assert [path.name for path in published.parent.iterdir()] == ["toy"]


def test_a_publisher_killed_between_its_renames_loses_nothing(finished):
    folder = finished(synthetic=True)
    published = report.publish("toy", PROVENANCE).parent
    before = snapshot(published)
    published.rename(published.with_name(".toy.old"))
    (published.with_name(".toy.new")).mkdir()
    (folder / "results.json").unlink()
    with pytest.raises(FileNotFoundError):
        report.publish("toy", PROVENANCE)
    assert snapshot(published) == before
