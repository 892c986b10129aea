"""The publishing, on the folder of a run made by hand."""

import ctypes
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lib import report, runs, summary, wording

PROVENANCE = {
    "commit": "abc",
    "versions": {"torch": "2"},
    "device": "cpu",
    "started": "2026-01-01T00:00:00+00:00",
    "seconds": 61.0,
    "training_seconds": 120.0,
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

    def finish(synthetic, name="BreaKHis"):
        dataset = {"name": name, "synthetic": synthetic, "images": 2, "cases": 1, "fingerprint": "0"}
        (folder / "dataset.json").write_text(json.dumps(dataset))
        results = {
            "run": "toy",
            "parameters": {"data_root": "/some/where/breakhis"},
            "training_precision": "bfloat16",
            "metrics": [{"n": 1}, {"n": None}],
        }
        (folder / "results.json").write_text(json.dumps(results))
        pd.DataFrame({"image": ["a.png"], "path": ["/some/a.png"], "case": ["14-1"]}).to_csv(
            folder / "split.csv", index=False
        )
        (folder / "attacks.csv").write_text("name\nfgsm\n")
        with gzip.open(folder / "predictions.csv.gz", "wt") as table:
            table.write("image,margin\nb.png,0.10\na.png,NA\nb.png,\na.png,0.5\n")
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


def test_the_report_of_drawn_tissue_says_so_and_holds_figures_once(finished, snapshot):
    finished(synthetic=True)
    index = report.publish("toy", PROVENANCE)
    folder = index.parent
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == [
        "03_fgsm_attack.html", "06_comparison.html", "attacks.csv", "dataset.json", "figures", "figures/curve.png",
        "figures/sample.png", "figures/unmarked.png", "index.html", "predictions.csv.gz", "results.json", "split.csv.gz", "summary.md",
    ]  # fmt: skip
    for page in folder.glob("*.html"):
        text = page.read_text()
        assert summary.DRAWN_BANNER in text and "https://" not in text and "<script" not in text
        assert len(text) < 150_000
        assert all(link.is_file() for link in links(page)), page
    page = (folder / "03_fgsm_attack.html").read_text()
    assert '<img alt="a &lt;curve&gt;" src="figures/curve.png"' in page and 'src="figures/sample.png"' in page
    assert "aGVsbG8" not in page and report.WIDGET_NOTE in page and "IntSlider" not in page
    assert "<pre>epoch 1: loss 0.5</pre></details>" in page
    assert "written to runs/toy" in page, "the folders of this machine are left out"
    assert 'href="06_comparison.html#findings"' in page
    results = json.loads((folder / "results.json").read_text())
    assert "<td>2 minutes, in bfloat16</td>" in (folder / "index.html").read_text()
    assert results["provenance"] == PROVENANCE and results["metrics"] == [{"n": 1}, {"n": None}]
    assert results["parameters"] == {"data_root": "breakhis"}
    assert gzip.decompress((folder / "split.csv.gz").read_bytes()).decode() == "image,case\na.png,14-1\n"
    predictions = gzip.decompress((folder / "predictions.csv.gz").read_bytes()).decode()
    assert predictions == "image,margin\na.png,NA\na.png,0.5\nb.png,0.10\nb.png,\n", "cells stay as they are"
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
        assert summary.DRAWN_BANNER not in page.read_text()
        assert all(link.is_file() for link in links(page)), page
    subprocess.run(["git", "init", "-q", folder], check=True)
    subprocess.run(["git", "-C", folder, "add", "."], check=True)
    tracked = subprocess.run(
        ["git", "-C", folder, "ls-files"], check=True, capture_output=True, text=True
    ).stdout.split()
    assert tracked == [
        ".gitignore", "attacks.csv", "dataset.json", "figures/curve.png", "predictions.csv.gz", "results.json", "split.csv.gz", "summary.md",
    ]  # fmt: skip
    assert report.tissue_leaks(folder, tracked) == []
    assert (folder / "images" / "figures" / "sample.png").is_file() and (
        folder / "images" / "03_fgsm_attack.html"
    ).is_file()
    text = (folder / "summary.md").read_text()
    assert "figures/curve.png" in text and "sample" not in text
    assert "images/figures/sample.png" in index.read_text(), "on this machine the reader sees it"


def test_a_report_on_own_images_stays_out_of_git(finished):
    finished(synthetic=False, name="own images in biopsies")
    folder = report.publish("toy", PROVENANCE).parent
    subprocess.run(["git", "init", "-q", folder], check=True)
    status = ["git", "-C", folder, "status", "--porcelain"]
    assert subprocess.run(status, check=True, capture_output=True, text=True).stdout == ""


def test_a_value_and_its_interval_stay_on_one_line():
    page = "<td>0.91 [0.82, 0.97]</td> <td>[a link, b]</td>"
    assert report._unbroken(page) == "<td>0.91&nbsp;[0.82,&nbsp;0.97]</td> <td>[a link, b]</td>"


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
        ["git", "-C", runs.ROOT, "ls-files", "-z", "reports"], capture_output=True, text=True
    )
    files = [Path(name) for name in listed.stdout.split("\0") if name]
    folders = {Path(*file.parts[:2]) for file in files if len(file.parts) > 2}
    if not folders:
        pytest.skip("no committed report")
    for folder in sorted(folders):
        inside = [file.relative_to(folder) for file in files if file.is_relative_to(folder)]
        assert report.tissue_leaks(runs.ROOT / folder, inside) == []


@pytest.mark.parametrize("break_it", ["missing", "not a number", "no notebook"])
def test_a_report_is_published_whole_or_not_at_all(finished, break_it, snapshot):
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


def test_a_publisher_killed_between_its_renames_loses_nothing(finished, snapshot):
    folder = finished(synthetic=True)
    published = report.publish("toy", PROVENANCE).parent
    before = snapshot(published)
    published.rename(published.with_name(".toy.old"))
    (published.with_name(".toy.new")).mkdir()
    (folder / "results.json").unlink()
    with pytest.raises(FileNotFoundError):
        report.publish("toy", PROVENANCE)
    assert snapshot(published) == before


ACTIVE = []  # functions that are told what the system is asked for; an audit hook cannot be taken away


def told(event, arguments):
    for watch in ACTIVE:
        watch(event, arguments)


sys.addaudithook(told)


def as_a_process(work):
    """Do this in a process of its own and return its exit status."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def without_swap(monkeypatch):
    """A system that cannot swap two folders in one step, as on many network disks."""

    def forbid(*_):
        return object()

    monkeypatch.setattr(ctypes, "CDLL", forbid)


def test_at_no_moment_of_publishing_is_there_no_whole_report(finished):
    folder = finished(synthetic=True)
    published = report.publish("toy", PROVENANCE).parent
    names = {path.name for path in published.iterdir()}
    seen = []

    def look(*_):
        ACTIVE.clear()  # looking asks the system too
        seen.append(published.is_dir() and {path.name for path in published.iterdir()} == names)
        ACTIVE.append(look)

    (folder / "attacks.csv").write_text("name\nnew\n")
    ACTIVE.append(look)
    try:
        report.publish("toy", PROVENANCE)
    finally:
        ACTIVE.clear()
    assert len(seen) > 30 and all(seen)
    assert (published / "attacks.csv").read_text() == "name\nnew\n"
    assert [path.name for path in published.parent.iterdir()] == ["toy"]


def test_a_publisher_killed_anywhere_leaves_a_whole_report_and_the_next_one_succeeds(
    finished, without_swap, snapshot
):
    folder = finished(synthetic=True)
    published = report.publish("toy", PROVENANCE).parent
    (folder / "attacks.csv").write_text("name\nnew\n")
    before, killed = snapshot(published), 0

    def kill_at_step():
        steps = []  # what is done to whole folders

        def watch(event, arguments):
            path = arguments[0] if arguments and isinstance(arguments[0], str | os.PathLike) else ""
            if event in ("os.mkdir", "os.rename", "shutil.rmtree") and Path(path).parent == published.parent:
                steps.append(event)
                if len(steps) > killed:
                    os._exit(9)

        ACTIVE.append(watch)
        report.publish("toy", PROVENANCE)

    while as_a_process(kill_at_step) == 9:
        killed += 1
        left = snapshot(runs.report("toy"))
        changed = {str(name) for name in left if left[name] != before[name]}
        assert left.keys() == before.keys() and changed in (set(), {"attacks.csv"})
    assert killed > 4
    assert (published / "attacks.csv").read_text() == "name\nnew\n"
    assert [path.name for path in published.parent.iterdir()] == ["toy"]


def test_a_report_put_aside_is_found_until_it_is_put_back(finished):
    finished(synthetic=True)
    published = report.publish("toy", PROVENANCE).parent
    assert runs.report("toy") == published
    published.rename(published.with_name(".toy.old"))
    assert (runs.report("toy") / "index.html").is_file()
    runs.restore_report("toy")
    assert (published / "index.html").is_file() and runs.report("toy") == published


@pytest.fixture
def as_anybody(finished, monkeypatch):
    """A finished run in a home of an ordinary user's, and that user; root may write everywhere."""
    folder = finished(synthetic=True)
    report.publish("toy", PROVENANCE)  # what is imported late is there then
    with tempfile.TemporaryDirectory() as home:
        shutil.copytree(folder.parents[1], home, dirs_exist_ok=True)
        monkeypatch.setenv("STUDY_HOME", home)
        if os.getuid():
            yield Path(home)
            return
        nobody = 65534
        for path in [Path(home), *Path(home).rglob("*")]:
            os.chown(path, nobody, nobody)
        os.setresuid(nobody, nobody, 0)
        try:
            yield Path(home)
        finally:
            os.setresuid(0, 0, 0)


def test_a_read_only_report_is_left_as_it_is(as_anybody, snapshot):
    reports = as_anybody / "reports"
    before = snapshot(reports)
    folders = [path for path in reports.rglob("*") if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    with pytest.raises(
        PermissionError, match=r"toy is read-only.*chmod -R u\+w .*toy\), or choose another run"
    ):
        report.publish("toy", PROVENANCE)
    assert snapshot(reports) == before and [path.name for path in reports.iterdir()] == ["toy"]
    for folder in folders:
        folder.chmod(0o755)
    report.publish("toy", PROVENANCE)


@pytest.mark.parametrize("name", [".toy.old", ".toy.new"])
def test_nothing_left_behind_makes_the_next_publishing_fail(as_anybody, name):
    reports = as_anybody / "reports"
    left = reports / name / "figures"
    left.mkdir(parents=True)
    (left / "a.png").touch(0o444)
    for folder in (left, left.parent):
        folder.chmod(0o555)
    report.publish("toy", PROVENANCE)
    assert [path.name for path in reports.iterdir()] == ["toy"]


def test_names_are_text_on_every_page(finished):
    name = "<img src=x onerror=alert(1)>"
    folder = finished(synthetic=False, name=f"own images in {name}")
    (folder / "summary.md").write_text(f"# Summary ({wording.as_text(name)})\n")
    notebook = nbformat.read(folder / "notebooks" / "06_comparison.ipynb", 4)
    notebook.cells = [
        new_markdown_cell(f"# Findings in {wording.as_text(name)}"),
        new_code_cell("x", outputs=[new_output("stream", text=f"case {name}\n")]),
        new_code_cell("x", outputs=[new_output("stream", name="stderr", text=f"case {name}\n")]),
        new_code_cell(
            "x",
            outputs=[
                new_output(
                    "display_data",
                    {
                        "text/html": wording.readable([{"case": name}], ["case"]).data,
                        "text/plain": name,
                    },
                )
            ],
        ),
    ]
    nbformat.write(notebook, folder / "notebooks" / "06_comparison.ipynb")
    report.publish("toy", PROVENANCE)
    for page in (folder.parents[1] / "reports" / "toy").rglob("*.html"):
        assert "<img src=x" not in page.read_text(), page
    index = (folder.parents[1] / "reports" / "toy" / "index.html").read_text()
    assert index.count("&lt;img src=x onerror=alert(1)&gt;") >= 2
