"""Publishing: a finished run becomes `reports/<run>/`, whole or not at all.

`publish` builds the folder beside its place and swaps it in. The pages need nothing from the network, link the figures instead
of holding them, and read well in light and dark. Of a run on real tissue everything that shows tissue goes into images/, which
git ignores; `tissue_leaks` checks that for the files git tracks.
"""

import contextlib
import copy
import ctypes
import gzip
import html
import json
import os
import re
import shutil
from pathlib import Path

from lib import data, runs
from lib.summary import DRAWN_BANNER

DATA_FILES = (
    "summary.md",
    "results.json",
    "predictions.csv.gz",
    "attacks.csv",
    "split.csv.gz",
    "dataset.json",
)
WIDGET_NOTE = "In JupyterLab a slider stands here; the figure above is the same function at fixed values."
WIDGET = "application/vnd.jupyter.widget-view+json"
# Longer messages are cut to their end; the executed notebook under runs/ has them all.
MESSAGE_LINES = 200


def _unbroken(page):
    """A value and its interval stay on one line: no breaks in "0.91 [0.82, 0.97]"."""
    return re.sub(r"(\d) \[(-?[\d.]+), (-?[\d.]+)\]", "\\1&nbsp;[\\2,&nbsp;\\3]", page)


def publish(run, provenance):
    """Build `reports/<run>/` from `runs/<run>/`, put it in the place of the last one, and return its index.html.

    provenance: {"commit", "versions", "device", "started", "seconds", "training_seconds"}, which goes into
    results.json.
    Raises FileNotFoundError when the run lacks a file, ValueError when results.json is no valid JSON (a NaN counts as that), and
    PermissionError when the last report is read-only; then the last report is as it was.
    """
    report = runs.home() / "reports" / run
    new, old = (report.with_name(f".{run}.{part}") for part in ("new", "old"))
    report.parent.mkdir(parents=True, exist_ok=True)
    runs.restore_report(run)
    _refuse_read_only(report)
    for leftover in (new, old):
        _clear(leftover)
    try:
        new.mkdir()
        _build(run, new, provenance)
        _put(new, report, old)
    finally:
        # What cannot be removed now is in nobody's way: the next publishing tries again.
        with contextlib.suppress(OSError):
            _clear(new)
            if report.exists():
                _clear(old)
    return report / "index.html"


def _refuse_read_only(report):
    """Raise PermissionError where the last report is read-only: it could be moved, but not removed."""
    folders = [report.parent, report, *(path for path in report.rglob("*") if path.is_dir())]
    for folder in folders:
        if folder.exists() and not os.access(folder, os.W_OK):
            whole = report if folder.is_relative_to(report) else folder
            raise PermissionError(
                f"{folder} is read-only, so no report was built: make it writable (chmod -R u+w {whole}), or choose another run name"
            )


def _put(new, report, old):
    """Put the folder `new` in the place of `report`; where the system can swap folders, a whole report is there at every moment."""
    if not report.exists():
        new.rename(report)
    elif not _swapped(new, report):
        report.rename(old)
        try:
            new.rename(report)
        except OSError:
            old.rename(report)
            raise


def _swapped(one, two):
    """Swap two folders in one step, which Linux and macOS can on most disks; False, and nothing is done, where they cannot."""
    here, exchange = -100, 2  # Linux's AT_FDCWD and RENAME_EXCHANGE; macOS's RENAME_SWAP is 2 too
    paths = os.fsencode(one), os.fsencode(two)
    system = ctypes.CDLL(None)
    if hasattr(system, "renameat2"):
        return system.renameat2(here, paths[0], here, paths[1], exchange) == 0
    return hasattr(system, "renamex_np") and system.renamex_np(*paths, exchange) == 0


def _clear(path):
    """Remove what an earlier publishing left, read-only folders too. Raises OSError, naming it, where that cannot be."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        folders = [path]
        for folder in folders:
            with contextlib.suppress(OSError):
                folder.chmod(0o700)
            folders += [each for each in folder.iterdir() if each.is_dir() and not each.is_symlink()]
        shutil.rmtree(path)


def tissue_leaks(report_folder, files):
    """What must not be tracked in a report on real tissue, one sentence each; an empty list for synthetic tissue.

    files: the tracked files, absolute or relative to the report folder. A report counts as real unless its dataset.json or
    results.json says that the tissue is synthetic. Refused are all files of a report on own images, and
    of one on BreaKHis HTML, notebooks, anything under images/, and every picture that is not a PNG marked "Shows tissue": "no".
    """
    report_folder = Path(report_folder)
    if _about(report_folder, "synthetic") is True:
        return []
    leaks, own = [], _about(report_folder, "name") not in (None, data.DATABASE)
    for file in files:
        path = report_folder / file
        if own:
            leaks.append(f"{path}: a report on own images names them and their cases")
            continue
        if path.suffix.lower() in (".html", ".htm", ".ipynb"):
            leaks.append(f"{path}: a page of a real-data report may hold tissue")
        elif "images" in path.relative_to(report_folder).parts[:-1]:
            leaks.append(f"{path}: images/ is for what shows tissue")
        elif path.suffix.lower() == ".png":
            mark = _shows_tissue(path)
            if mark != "no":
                leaks.append(
                    f"{path}: Shows tissue = {mark or 'not said'}, only a figure marked 'no' may be tracked"
                )
        elif path.suffix.lower() in (
            ".jpg",
            ".jpeg",
            ".tif",
            ".tiff",
            ".gif",
            ".webp",
            ".bmp",
            ".svg",
            ".pdf",
            ".npy",
        ):
            leaks.append(f"{path}: only PNG files say whether they show tissue")
    return leaks


def _about(report_folder, key):
    """What a report says of its data set, in dataset.json or results.json; None where it does not."""
    for name in ("dataset.json", "results.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads((report_folder / name).read_text("utf-8"))
            return (about if name == "dataset.json" else about["dataset"])[key]
    return None


def _shows_tissue(path):
    """What a PNG says of itself under "Shows tissue": "yes", "no", or "" when it says nothing or cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Shows tissue", "")
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------------- the report's files


def _build(run, report, provenance):
    source = runs.folder(run)
    dataset = json.loads(runs.require(run, "dataset.json").read_text("utf-8"))
    drawn = dataset["synthetic"] is True
    shutil.copyfile(source / "dataset.json", report / "dataset.json")
    shutil.copyfile(runs.require(run, "attacks.csv"), report / "attacks.csv")
    for name in ("split.csv", "predictions.csv.gz"):
        _write_table(runs.require(run, name), report / f"{name.removesuffix('.gz')}.gz")
    results = _write_results(runs.require(run, "results.json"), report / "results.json", provenance)

    # Where everything lies that a page can link to, by the name under which notebooks and summary know it.
    places = {name: name for name in DATA_FILES}
    for figure in sorted((source / "figures").glob("*.png")):
        hidden = not drawn and _shows_tissue(figure) != "no"
        place = f"{'images/' if hidden else ''}figures/{figure.name}"
        places[f"figures/{figure.name}"] = place
        (report / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(figure, report / place)

    notebooks = sorted((source / "notebooks").glob("*.ipynb"))
    folder = "" if drawn else "images/"
    for notebook in notebooks:
        # Links between notebooks become links between their pages.
        places[notebook.name] = places[f"{notebook.stem}.html"] = f"{folder}{notebook.stem}.html"
    places["index.html"] = "index.html"

    summary = runs.require(run, "summary.md").read_text("utf-8")
    (report / "summary.md").write_text(_without_hidden_figures(summary, places), "utf-8")
    if not drawn:
        (report / "images").mkdir(exist_ok=True)
        hidden = "# Whatever can show tissue stays out of git.\nimages/\n*.html\n"
        if dataset["name"] != data.DATABASE:
            hidden = "# Names and cases of your own images stay out of git: the tables hold them.\n*\n"
        (report / ".gitignore").write_text(hidden, "utf-8")

    pages = [(notebook.stem, _title(notebook)) for notebook in notebooks]
    index = _index_body(run, summary, dataset, results, pages)
    for place in {"index.html", f"{folder}index.html"}:
        _write_page(report / place, f"{run}: summary", index, "index", pages, places, drawn)
    for notebook, (stem, title) in zip(notebooks, pages, strict=True):
        body = _notebook_body(notebook, places)
        _write_page(report / places[notebook.name], title, body, stem, pages, places, drawn)


def _write_table(source, target):
    """A table without the machine's own paths, image by image, which packs best. The same table always gives the same bytes."""
    import pandas as pd

    table = pd.read_csv(source, dtype=str, keep_default_na=False).drop(columns="path", errors="ignore")
    table = table.sort_values("image", kind="stable")
    target.write_bytes(gzip.compress(table.to_csv(index=False).encode(), mtime=0))


def _write_results(source, target, provenance):
    """One row of a table a line, which keeps changes readable in git. Returns what was written."""
    results = json.loads(source.read_text("utf-8"), parse_constant=_no_constant) | {"provenance": provenance}
    parameters = results.get("parameters", {})
    # The folders of one machine tell a reader nothing; their last part does.
    results["parameters"] = {
        name: Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
        for name, value in parameters.items()
    }
    parts = []
    for name, value in results.items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in value) + "\n ]"
        else:
            text = json.dumps(value, ensure_ascii=False)
        parts.append(f" {json.dumps(name)}: {text}")
    target.write_text("{\n" + ",\n".join(parts) + "\n}\n", "utf-8")
    return results


def _no_constant(name):
    raise ValueError(f"results.json holds {name}; what does not exist must be null")


def _without_hidden_figures(summary, places):
    """The summary without the lines whose figure shows tissue; it is tracked, and its figures with it."""

    def is_shown(line):
        figures = re.findall(r"figures/[^\s)\"'>]+", line)
        return all(places.get(figure, figure) == figure for figure in figures)

    return "".join(line for line in summary.splitlines(keepends=True) if is_shown(line))


# ---------------------------------------------------------------------------------------------- the pages


def _title(notebook):
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        heading = re.search(r"^# +(.+)", "".join(cell["source"]), re.MULTILINE)
        if cell["cell_type"] == "markdown" and heading:
            return re.sub(r"[*_`]", "", heading[1]).strip()
    return notebook.stem


def _index_body(run, summary, dataset, results, pages):
    from nbconvert.filters import markdown2html

    provenance = results["provenance"]
    links = "".join(
        f'<li><a href="{html.escape(stem)}.html">{html.escape(title)}</a></li>' for stem, title in pages
    )
    files = ", ".join(f'<a href="{name}">{name}</a>' for name in DATA_FILES)
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    facts = [
        ("Run", run),
        ("Images", f"{dataset['name']}: {dataset['images']} images of {dataset['cases']} cases"),
        ("Started", provenance["started"]),
        ("Device", provenance["device"]),
        (
            "All trainings",
            f"{provenance['training_seconds'] / 60:.0f} minutes, in {results['training_precision']}",
        ),
        ("This pass", f"{provenance['seconds'] / 60:.1f} minutes, finished work of earlier ones kept"),
        ("Commit", provenance["commit"] or "not under git"),
        ("Versions", versions),
    ]
    rows = "".join(f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>" for name, value in facts)
    return (
        f"{_unbroken(markdown2html(summary))}\n<h2>The notebooks, as they ran</h2>\n<ul>{links}</ul>\n"
        f'<h2>The data behind it</h2>\n<p>{files}</p>\n<h2>How it was made</h2>\n<table class="facts">{rows}</table>'
    )


def _notebook_body(notebook, places):
    import nbformat
    from nbconvert import HTMLExporter

    content = nbformat.read(notebook, as_version=4)
    content.metadata.pop("widgets", None)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs = _readable_outputs(cell.outputs, places)
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(content)
    return body.replace(f"{runs.home()}{os.sep}", "")


def _readable_outputs(outputs, places):
    """Figures as links, widgets as a note, what went to stderr folded away."""
    kept, messages = [], ""
    for output in copy.deepcopy(outputs):
        data = output.get("data", {})
        if output.output_type == "stream" and output.name == "stderr":
            messages += output.text
        elif WIDGET in data:
            kept.append(_html_output(f'<p class="note">{WIDGET_NOTE}</p>'))
        elif "image/png" in data and (figure := _figure(output.metadata, places)):
            kept.append(_html_output(figure))
        else:
            kept.append(output)
    lines = [
        re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", line).rstrip("\r").rsplit("\r", 1)[-1]
        for line in messages.split("\n")
    ]
    lines = [line for line in lines if line.strip()][-MESSAGE_LINES:]
    if lines:
        text = html.escape("\n".join(lines))
        kept.append(
            _html_output(f"<details><summary>Progress and messages</summary><pre>{text}</pre></details>")
        )
    return kept


def _figure(metadata, places):
    """The link to a published figure, or "" when the output does not say which it is."""
    about = {**metadata, **metadata.get("image/png", {})}
    if about.get("filename") not in places:
        return ""
    return f'<img src="{html.escape(about["filename"])}" alt="{html.escape(about.get("alt", ""))}">'


def _html_output(text):
    from nbformat.v4 import new_output

    return new_output("display_data", {"text/html": text})


def _write_page(path, title, body, current, pages, places, drawn):
    """One page: banner, links to all pages, body; every link to a published file made relative to this page."""
    links = [("index", "Summary"), *((stem, stem[:2]) for stem, _ in pages)]
    titles = dict(pages)
    navigation = ""
    for stem, label in links:
        here = ' aria-current="page"' if stem == current else ""
        navigation += f'<a href="{html.escape(stem)}.html" title="{html.escape(titles.get(stem, label))}"{here}>{html.escape(label)}</a> '
    following = [stem for stem, _ in pages if stem > current or current == "index"][:1]
    ending = "".join(
        f'<p class="next"><a href="{html.escape(stem)}.html">Next: {html.escape(titles[stem])}</a></p>'
        for stem in following
    )
    text = PAGE.format(
        title=html.escape(title),
        style=STYLE + _code_style(),
        banner=f'<p class="banner">{DRAWN_BANNER}</p>' if drawn else "",
        navigation=navigation,
        body=body,
        ending=ending,
    )
    report = path.parents[1] if path.parent.name == "images" else path.parent

    def relative(match):
        if match[2] not in places:
            return match[0]
        return f'{match[1]}="{os.path.relpath(report / places[match[2]], path.parent)}{match[3]}"'

    path.write_text(re.sub(r'(src|href)="([^"#:]+)((?:#[^"]*)?)"', relative, text), "utf-8")


def _code_style():
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n.highlight {{ background: var(--code) }}\n"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{banner}
<nav>{navigation}</nav>
<main>
{body}
</main>
{ending}
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --page: #fff; --code: #f5f6f8; --line: #d5d9de; --link: #0a58ca; --soft: #5b636b;
  --banner: #8a1c1c }
@media (prefers-color-scheme: dark) {
  :root { --text: #dfe3e8; --page: #16191d; --code: #20252b; --line: #3a424b; --link: #7db3ff; --soft: #9aa4ae; --banner: #a12a2a } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 70rem; padding: 0 1.2rem 4rem; background: var(--page); color: var(--text);
  font: 1.02rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
a { color: var(--link) }
.banner { margin: 0 -1.2rem; padding: .8rem 1.2rem; background: var(--banner); color: #fff; font-size: 1.35rem; font-weight: 700;
  text-align: center }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; padding: .8rem 0; border-bottom: 1px solid var(--line) }
nav a { text-decoration: none }
nav a[aria-current] { color: var(--text); font-weight: 700 }
h1, h2, h3 { line-height: 1.25; margin: 1.8rem 0 .6rem }
h1 { font-size: 1.9rem } h2 { font-size: 1.4rem } h3 { font-size: 1.15rem }
.anchor-link { display: none }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
pre, code { font: .88rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
p code, li code, td code { background: var(--code); padding: .1em .3em; border-radius: 3px }
pre { margin: .6rem 0; overflow-x: auto }
.highlight { margin: .6rem 0; padding: .1rem .9rem; border: 1px solid var(--line); border-radius: 5px }
.celltag_parameters .highlight, .celltag_injected-parameters .highlight { border-left: 4px solid var(--link) }
.output, .jp-OutputArea { overflow-x: auto }
table { display: block; overflow-x: auto; width: max-content; max-width: 100%; border: 0; border-collapse: collapse; margin: .8rem 0; font-size: .88rem;
  font-variant-numeric: tabular-nums }
th, td { padding: .3rem .55rem; border: 0 solid var(--line); border-bottom-width: 1px; text-align: right; vertical-align: top }
th { font-weight: 600 }
th:first-child, td:first-child, .facts td { text-align: left } td:first-child { white-space: nowrap } .facts th { white-space: nowrap } .facts td { white-space: normal; overflow-wrap: anywhere }
details { margin: .6rem 0; color: var(--soft) } summary { cursor: pointer }
.note { color: var(--soft); font-style: italic }
.next { margin-top: 2.5rem; padding-top: 1rem; border-top: 1px solid var(--line) }
"""
