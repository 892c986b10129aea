"""Measures how long the explorer's picture takes after the slider is let go: make latency, on an idle machine.

JupyterLab, kernel and browser are real, the network is DenseNet-121 at 224 pixels with random weights, the image is drawn tissue.
Writes reports/explorer.json: {"latency_ms_p50", "latency_ms_p95", "n", "image_size", "device"}.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import nbformat
import numpy as np
from browser import CHROMIUM, HANDLE, drag, opened

from lib import runs

MOVES, IMAGE_SIZE = 60, 224
CELL = f"""
import tempfile
from lib import data, explorer, loading, models, synthetic
root = synthetic.draw_tree(tempfile.mkdtemp(), cases=4, images_per_case=1, magnifications=(100,))
table = data.index_images(root).assign(split="test", split_by="case", fold=0)
pixels, table = loading.load_pixels(table, {IMAGE_SIZE})
side = loading.Images(table, pixels).side("test")
explorer.Explorer({{"baseline": models.build("none")}}, side).view
"""
# From the slider let go to the new picture decoded and painted.
WATCH = """() => {
  window.moves = [];
  let released = null;
  document.addEventListener("pointerup", () => { released = performance.now(); }, true);
  document.addEventListener("mouseup", () => { released ??= performance.now(); }, true);
  document.querySelector(".widget-image").addEventListener("load", () => requestAnimationFrame(() => {
    if (released !== null) { window.moves.push(performance.now() - released); released = null; }
  }));
}"""


def measure():
    """The milliseconds of each move."""
    folder = Path(tempfile.mkdtemp())
    (folder / "notebooks").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.strip())])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "notebooks" / "latency.ipynb")
    with opened(folder / "notebooks" / "latency.ipynb", folder / "home") as page:
        page.locator(HANDLE).scroll_into_view_if_needed()
        drag(page, 0.9)
        page.wait_for_function(
            "() => document.querySelector('div[role=status]').innerText.includes('Computing')"
        )
        page.wait_for_function(
            "() => !document.querySelector('div[role=status]').innerText.includes('Computing')"
        )
        page.evaluate(WATCH)
        draw = random.Random(0)
        stops = [0.9]
        for number in range(MOVES):
            stops.append(draw.choice([k / 20 for k in range(21) if abs(k / 20 - stops[-1]) > 0.1]))
            drag(page, stops[-1])
            page.wait_for_function("count => window.moves.length > count", arg=number)
            page.wait_for_timeout(200)
        return page.evaluate("() => window.moves")


if __name__ == "__main__":
    if not CHROMIUM:
        sys.exit("no Chromium: install it (Debian: apt-get install chromium) to measure the explorer")
    moves = measure()
    found = {f"latency_ms_p{p}": round(float(np.percentile(moves, p)), 1) for p in (50, 95)}
    found |= {"n": len(moves), "image_size": IMAGE_SIZE, "device": runs.device_name()}
    (runs.ROOT / "reports" / "explorer.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found)
