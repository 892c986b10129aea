"""Turn epsilon and watch the diagnosis change: one image, one or all models, one attack, a slider.

What is shown are the rows of `evaluation.prediction_rows` for the images of `robustness.perturb`: the same numbers as in the
table of predictions. They are made ahead in a background thread, nearest to the slider first; the slider only picks one. Pictures
go into an `Image` widget and words and curves into HTML: a headless run with Output widgets can hang, and figures would flicker.
"""

import io
import threading
from html import escape
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from lib import attacks, data, evaluation, figures, models, robustness
from lib.evaluation import format_epsilon

STOPS = [k / 2 / 255 for k in range(33)]  # of the slider
SHOWN = ("fgsm", "pgd", "random_noise")
CHUNK = 4  # stops answered at a time, so that the one that is waited for comes soon
OWN = "own"  # the case of images that are not of the study
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
AMPLIFICATIONS = (1, 4, 8, 16, 32, 64)
HEIGHT, GAP = 224, 8  # of a picture on the screen, and between two


def epsilon_curve(model, image, label, epsilons):
    """P(malignant) of FGSM images over epsilon, as a list of (epsilon, probability), from one backward pass.

    image: float32 (1, 3, H, W) in [0, 1]; label: int64 (1,); epsilons: fractions.
    """
    batches = torch.cat(list(attacks.fgsm(model, image, label, epsilons)))
    return list(zip(epsilons, models.p_malignant(model, batches).tolist(), strict=True))


def epsilon_figure(shown, curves, epsilon):
    """The image that the first model is given and each model's P(malignant) over epsilon, with the current points.

    shown: the FGSM image at epsilon, float32 (1, 3, H, W) in [0, 1]; curves: {model: of `epsilon_curve`}; epsilon: a fraction, one
    of the curves'. Returns a matplotlib Figure.
    """
    figure = Figure(figsize=(figures.WIDTH, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    left.imshow(shown[0].permute(1, 2, 0).clamp(0, 1).numpy())
    left.set_axis_off()
    first = figures.model_name(next(iter(curves)))
    left.set_title(f"under FGSM at {format_epsilon(epsilon)} on {first}", fontsize=10)
    colors = figures.colors_of(list(curves))
    for name, curve in curves.items():
        nearest, now = min(curve, key=lambda point: abs(point[0] - epsilon))
        label = f"{figures.model_name(name)}: {'malignant' if now > 0.5 else 'benign'}"
        right.plot([e * 255 for e, _ in curve], [p for _, p in curve], ".-", color=colors[name], label=label)
        right.plot(nearest * 255, now, "o", color=colors[name], markersize=9)
    right.axhline(0.5, color="0.6", linestyle=":", linewidth=1)
    right.set(xlabel="epsilon (gray levels of 255)", ylabel="P(malignant)", ylim=(-0.03, 1.03))
    right.set_title(f"P(malignant) over epsilon, answers at {format_epsilon(epsilon)}", fontsize=10)
    right.legend(frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    return figure


class Answers:
    """What one model says of one image under one attack, at every stop that was asked for so far: `rows` and `images` by stop.

    network: the model; name: its name; side: `data.Side`; position: of the image there; attack: one of `SHOWN`.
    """

    def __init__(self, network, name, side, position, attack, pgd_steps=10, seed=0):
        self.network, self.name, self.attack, self.steps, self.seed = network, name, attack, pgd_steps, seed
        self.table = side.table.iloc[[position]]
        self.clean = data.center_crop(side.pixels[[position]])
        self.label = torch.from_numpy(side.labels[[position]])
        self.images, self.rows = {}, {}

    def missing(self, near=0):
        """The stops without an answer, the nearest to stop `near` first; the clean image before all."""
        return sorted(set(range(len(STOPS))) - set(self.rows), key=lambda k: (k > 0, abs(k - near)))

    def answer(self, stops):
        """Make the images of these stops and show them to the model. One backward pass serves all stops of FGSM."""
        to_make = [k for k in stops if k not in self.images]
        if to_make and self.attack != "pgd":
            to_make = range(len(STOPS))
        if to_make:
            chosen = [STOPS[k] for k in to_make]
            made = robustness.perturb(
                self.network, self.clean, self.label, self.attack, chosen, self.steps, self.seed
            )
            self.images |= dict(zip(to_make, made, strict=True))
        margins = evaluation.predict(self.network, torch.cat([self.images[k] for k in stops]))
        for k, margin in zip(stops, margins, strict=True):
            rows = evaluation.prediction_rows(
                self.table,
                model=self.name,
                attack=self.attack,
                epsilon=STOPS[k],
                margins=[margin],
                seed=self.seed,
                clean=self.clean,
                perturbed=self.images[k],
            )
            self.rows[k] = rows.iloc[0].to_dict()

    def flips_at(self):
        """The smallest epsilon among the answered stops that changes the clean decision (a fraction), or None."""
        turned = [
            k for k in sorted(self.rows) if (self.rows[k]["margin"] > 0) != (self.rows[0]["margin"] > 0)
        ]
        return STOPS[turned[0]] if turned else None


def own_images(files, network, image_size):
    """Images that are not of the study, as a `data.Side`; each one's label is the network's own answer, as nobody knows the truth.

    files: a folder, a list of paths, or {name: bytes}; image_size: pixels, as the network was trained. An image is cropped to the
    shape of BreaKHis's field of view, 700 x 460, around its center. Raises ValueError, naming the file, where one is no image, not
    RGB or too small, and where there is none.
    """
    if isinstance(files, str | Path):
        folder = Path(files)
        files = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"{folder} holds no image: files ending in {', '.join(SUFFIXES)} are read.")
    if not isinstance(files, dict):
        files = {Path(path).name: Path(path) for path in files}
    size = data.field_width(image_size), image_size
    pixels = []
    for name, content in files.items():
        try:
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                image.load()
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{name} is not a readable image: {error}") from error
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(f"{name} is not an RGB image (its mode is {image.mode}): convert it first.")
        if image.width < size[0] or image.height < size[1]:
            raise ValueError(
                f"{name} is {image.width} x {image.height} pixels: at least {size[0]} x {size[1]} are needed."
            )
        pixels.append(np.asarray(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)))
    pixels = np.stack(pixels)
    malignant = evaluation.predict(network, data.center_crop(pixels)) > 0
    table = pd.DataFrame({"image": list(files), "label": np.where(malignant, "malignant", "benign")})
    table = table.assign(case=OWN, subtype="", magnification=0, split=OWN, split_by=OWN, fold=0)
    return data.Side(table, pixels, malignant.astype(np.int64), OWN)


def picture(panels, height=HEIGHT):
    """Pictures side by side as the bytes of a PNG, enlarged by a whole factor to at least `height`, the gaps transparent.

    panels: arrays (H, W, 3), uint8 or float in [0, 1].
    """
    panels = [np.asarray(panel) for panel in panels]
    panels = [
        panel if panel.dtype == np.uint8 else (panel * 255).round().astype(np.uint8) for panel in panels
    ]
    factor = -(-height // panels[0].shape[0])
    panels = [panel.repeat(factor, 0).repeat(factor, 1) for panel in panels]
    rows, columns = panels[0].shape[:2]
    canvas = np.zeros((rows, len(panels) * (columns + GAP) - GAP, 4), np.uint8)
    for k, panel in enumerate(panels):
        left = k * (columns + GAP)
        canvas[:, left : left + columns, :3] = panel
        canvas[:, left : left + columns, 3] = 255
    drawn = io.BytesIO()
    Image.fromarray(canvas).save(drawn, "png", compress_level=1)
    return drawn.getvalue()


def curve_svg(curves, epsilon, width=460, height=200):
    """P(malignant) over epsilon as SVG text in the colors of the page; a point at the current epsilon.

    curves: {name: (color, {epsilon: probability})}; what is not answered yet is left out.
    """
    left, bottom, top = 44, 34, 8
    inside = width - left - 10, height - bottom - top

    def at(e, p):
        return left + e / STOPS[-1] * inside[0], top + (1 - p) * inside[1]

    def text(x, y, words, anchor="middle"):
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="11" fill="currentColor">{words}</text>'

    def line(x1, y1, x2, y2, dash=""):
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" opacity=".4"{dash}/>'

    parts = [
        line(*at(0, 0), *at(STOPS[-1], 0)),
        line(*at(0, 0), *at(0, 1)),
        line(*at(0, 0.5), *at(STOPS[-1], 0.5), ' stroke-dasharray="2 3"'),
        *(text(at(k / 255, 0)[0], height - 18, f"{k}") for k in range(0, 17, 4)),
        *(text(left - 6, at(0, p)[1] + 4, f"{p:g}", "end") for p in (0, 0.5, 1)),
        text(left + inside[0] / 2, height - 3, "epsilon (gray levels of 255)"),
        f'<text transform="translate(11 {top + inside[1] / 2:.0f}) rotate(-90)" text-anchor="middle" font-size="11" '
        'fill="currentColor">P(malignant)</text>',
    ]
    for color, curve in curves.values():
        points = " ".join("{:.1f},{:.1f}".format(*at(e, curve[e])) for e in sorted(curve))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        if epsilon in curve:
            x, y = at(epsilon, curve[epsilon])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}" stroke="currentColor"/>')
    words = "; ".join(
        f"{name} {curve[epsilon]:.2f}" for name, (_, curve) in curves.items() if epsilon in curve
    )
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="P(malignant) at {format_epsilon(epsilon)}: {escape(words)}">{"".join(parts)}</svg>'
    )


class Explorer:
    """The explorer as an ipywidgets box, `view`: choose an image, a model and an attack, and turn epsilon.

    networks: {name: model}; side: the `data.Side` to browse; position: of the first image shown; background: False answers in the
    calling thread. Until something is moved only what is shown is computed, at once, so that a headless run loses no time.
    """

    def __init__(self, networks, side, position=0, *, pgd_steps=10, seed=0, background=True):
        self.networks, self.side, self.options = networks, side, {"pgd_steps": pgd_steps, "seed": seed}
        self.background, self.known, self.clean = background, {}, {}
        self.lock, self.thread, self.touched = threading.RLock(), None, False
        wide = {"style": {"description_width": "90px"}, "layout": widgets.Layout(width="300px")}
        cases = sorted(side.table["case"].unique())
        self.filter = widgets.Dropdown(
            options=["all", "benign", "malignant", "right", "wrong"], description="images", **wide
        )
        self.case = widgets.Dropdown(options=["all", *cases], description="case", **wide)
        self.image = widgets.Dropdown(options=self._offered(), value=position, description="image", **wide)
        self.model = widgets.Dropdown(
            options=[(figures.model_name(name), name) for name in networks], description="model", **wide
        )
        self.attack = widgets.Dropdown(
            options=[(figures.ATTACK_NAMES[name], name) for name in SHOWN], description="attack", **wide
        )
        self.amplify = widgets.Dropdown(
            options=[(f"x {k}", k) for k in AMPLIFICATIONS], value=16, description="perturbation", **wide
        )
        self.compare = widgets.Checkbox(
            description="all models side by side", indent=False, disabled=len(networks) == 1
        )
        self.epsilon = widgets.SelectionSlider(
            options=[(format_epsilon(e), k) for k, e in enumerate(STOPS)],
            value=8,
            description="epsilon",
            continuous_update=False,
            style={"description_width": "90px"},
            layout=widgets.Layout(width="420px"),
        )
        self.typed = widgets.Text(
            value="4", description="in 255ths", continuous_update=False, layout=widgets.Layout(width="160px")
        )
        self.before, self.after = (
            widgets.Button(description=words, tooltip=tooltip, layout=widgets.Layout(width="40px"))
            for words, tooltip in (("◀", "previous image"), ("▶", "next image"))
        )
        self.upload = widgets.FileUpload(accept=",".join(SUFFIXES), multiple=True, description="your own")
        self.pictures = widgets.Image(
            format="png", layout=widgets.Layout(max_width="100%", object_fit="contain")
        )
        self.caption, self.words, self.curve, self.message = (widgets.HTML() for _ in range(4))
        row = widgets.Layout(flex_flow="row wrap", align_items="center")
        self.view = widgets.VBox(
            [
                widgets.Box(
                    [self.filter, self.case, self.image, self.before, self.after, self.upload], layout=row
                ),
                widgets.Box([self.model, self.attack, self.amplify, self.compare], layout=row),
                widgets.Box([self.epsilon, self.typed], layout=row),
                self.message,
                self.caption,
                self.pictures,
                widgets.Box([self.words, self.curve], layout=row),
            ]
        )
        for control in (self.image, self.model, self.attack, self.amplify, self.compare, self.epsilon):
            control.observe(self._guarded(self._changed), "value")
        for control in (self.filter, self.case, self.model):  # what is right depends on the model
            control.observe(self._guarded(self._filtered), "value")
        self.upload.observe(self._guarded(self._uploaded), "value")
        self.typed.observe(self._guarded(self._from_text), "value")
        self.before.on_click(self._guarded(lambda _: self._move(-1)))
        self.after.on_click(self._guarded(lambda _: self._move(1)))
        self._guarded(self._changed)(None)

    # ------------------------------------------------------------ what is chosen

    def _offered(self):
        """The images that the filters leave, as (name, position)."""
        table, kind = self.side.table, self.filter.value
        keep = np.ones(len(table), bool)
        if kind in ("benign", "malignant"):
            keep = keep & (table["label"] == kind)
        elif kind in ("right", "wrong"):
            name = self.model.value
            if name not in self.clean:
                self.clean[name] = evaluation.predict(self.networks[name], self.side.tensors()[0])
            keep = ((self.clean[name] > 0) == (self.side.labels == 1)) == (kind == "right")
        if self.case.value != "all":
            keep = keep & (table["case"] == self.case.value)
        return [(f"{table['label'].iloc[k]}: {table['image'].iloc[k]}", int(k)) for k in np.flatnonzero(keep)]

    def _filtered(self, _):
        offered = self._offered()
        self.message.value = "" if offered else "No image is left by these filters: choose others."
        if offered and offered != list(self.image.options):
            self.image.options = offered  # takes the first, and tells `_changed`

    def _uploaded(self, _):
        """Browse the images that were uploaded instead of the study's."""
        files = {each["name"]: bytes(each["content"]) for each in self.upload.value}
        if files:
            side = own_images(files, self.networks[self.model.value], self.side.pixels[:1].shape[1])
            with self.lock:
                self.side, self.clean = side, {}
                self.known.clear()
                self.filter.value = "all"
                self.case.options = ["all"]
                self.image.options = self._offered()
            self._changed("uploaded")  # the first image may have the number of the one before

    def _move(self, step):
        positions = [position for _, position in self.image.options]
        self.image.value = positions[(positions.index(self.image.value) + step) % len(positions)]

    def _from_text(self, _):
        try:
            asked = float(self.typed.value) / 255
        except ValueError:
            self.message.value = f"{escape(repr(self.typed.value))} is not a number: type gray levels from 0 to 16, such as 2.5."
            return
        if not STOPS[0] <= asked <= STOPS[-1]:
            self.message.value = f"{asked * 255:g} is out of range: type gray levels from 0 to 16."
            return
        self.epsilon.value = int(np.abs(np.array(STOPS) - asked).argmin())

    def _guarded(self, react):
        """An error in a callback would be lost without a word: it is shown."""

        def reacts(change):
            try:
                react(change)
            except Exception as error:
                self.message.value = f"This did not work: {escape(f'{type(error).__name__}: {error}')}"

        return reacts

    # ------------------------------------------------------------ what is answered

    def _wanted(self):
        """The answers that the current choice needs, those of the chosen model first."""
        names = [self.model.value] + [
            name for name in self.networks if name != self.model.value
        ] * self.compare.value
        return [self._answers(name) for name in names]

    def _answers(self, name):
        key = name, self.image.value, self.attack.value
        with self.lock:
            answers = self.known.pop(key, None)
            while len(self.known) >= 2 * len(self.networks):
                self.known.pop(next(iter(self.known)))  # the one that was not used for longest
            if answers is None:
                answers = Answers(self.networks[name], name, self.side, *key[1:], **self.options)
            self.known[key] = answers
            return answers

    def _next(self):
        """The next piece of work for the current choice: (answers, stops), or None. What the slider shows comes first."""
        k, wanted = self.epsilon.value, self._wanted()
        for answers in wanted:
            if not {0, k} <= set(answers.rows):
                return answers, [stop for stop in dict.fromkeys((0, k)) if stop not in answers.rows]
        for answers in wanted if self.touched else ():
            if missing := answers.missing(k):
                return answers, missing[: 1 if answers.attack == "pgd" else CHUNK]
        return None

    def _work(self):
        try:
            while True:
                with self.lock:
                    work = self._next()
                    if work is None:
                        self.thread = None
                        return
                answers, stops = work
                answers.answer(stops)
                self._show()
        except Exception as error:
            with self.lock:
                self.thread = None
            self.message.value = f"This did not work: {escape(f'{type(error).__name__}: {error}')}"

    def _changed(self, change):
        if self.image.value is None:
            return
        self.touched |= change is not None
        self.message.value = ""
        self.typed.value = f"{STOPS[self.epsilon.value] * 255:g}"
        self._show()
        if not (self.background and self.touched):
            self._work()
            return
        with self.lock:
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, daemon=True)
                self.thread.start()

    # ------------------------------------------------------------ what is shown

    def _show(self):
        with self.lock:
            k, wanted, colors = self.epsilon.value, self._wanted(), figures.colors_of(list(self.networks))
            ready = [answers for answers in wanted if {0, k} <= set(answers.rows)]
            left = sum(len(answers.missing()) for answers in wanted)
            words = (
                f"Computing, {left} of {len(wanted) * len(STOPS)} stops left."
                if left and self.touched
                else ""
            )
            if ready and ready[0] is wanted[0]:
                self.pictures.value = picture(self._panels(ready, k))
                self.caption.value = self._caption(ready)
            self.words.value = (
                self._table(ready, k, words)
                if ready
                else f'<div role="status"><i>Computing {format_epsilon(STOPS[k])} …</i></div>'
            )
            self.curve.value = curve_svg(
                {
                    figures.model_name(answers.name): (
                        to_hex(colors[answers.name]),
                        {STOPS[stop]: row["p_malignant"] for stop, row in list(answers.rows.items())},
                    )
                    for answers in wanted
                },
                STOPS[k],
            )

    def _panels(self, ready, k):
        first = ready[0]
        clean = _pixels(first.clean)
        change = self.amplify.value * (_pixels(first.images[k]) - clean)
        return [clean, np.clip(0.5 + change, 0, 1), *(_pixels(answers.images[k]) for answers in ready)]

    def _caption(self, ready):
        row = ready[0].rows[0]
        known = f"case {escape(str(row['case']))}, truly {row['label']}"
        if row["case"] == OWN:
            known = "an image of your own: the attacks lead away from the model's answer"
        names = ["original", f"perturbation x {self.amplify.value}"]
        names += ["adversarial"] if len(ready) == 1 else [f"for {figures.model_name(a.name)}" for a in ready]
        return f"<b>{escape(str(row['image']))}</b>, {known}. From left to right: {', '.join(names)}."

    def _table(self, ready, k, words):
        head = ["", "clean", format_epsilon(STOPS[k]), "SSIM", "L∞ (255ths)", "L2", "turns at"]
        lines = []
        for answers in ready:
            clean, row, turns = answers.rows[0], answers.rows[k], answers.flips_at()
            turned = (clean["margin"] > 0) != (row["margin"] > 0)
            said = [f"{each['p_malignant']:.2f} {_word_of(each)}" for each in (clean, row)]
            at = format_epsilon(turns) if turns else ("not up to here" if not answers.missing() else "…")
            cells = [
                figures.model_name(answers.name),
                said[0],
                f"<b>{said[1]}{' – turned' if turned else ''}</b>",
                f"{row['ssim']:.3f}",
                f"{row['linf'] * 255:.2f}",
                f"{row['l2']:.2f}",
                at,
            ]
            lines.append("".join(f'<td style="padding: 2px 8px">{cell}</td>' for cell in cells))
        head = "".join(f'<th style="padding: 2px 8px; text-align: left">{cell}</th>' for cell in head)
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return (
            f'<div role="status" aria-live="polite"><table><tr>{head}</tr>{body}</table>'
            f"P(malignant) and the decision. <i>{words}</i></div>"
        )


def _word_of(row):
    return "malignant" if row["margin"] > 0 else "benign"


def _pixels(batch):
    return batch[0].permute(1, 2, 0).numpy()
