"""Turn epsilon and watch the diagnosis change: one image, one or all models, one attack, a slider.

What is shown are `answers.Answers`, made ahead in a background thread, nearest to the slider first; the slider only picks one.
Pictures go into an `Image` widget and words and curves into HTML: a headless run with Output widgets can hang, and figures would
flicker.
"""

import contextlib
import io
import threading
import weakref
from dataclasses import replace
from html import escape
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython import get_ipython
from IPython.display import Markdown
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from lib import (
    data,
    decoding,
    evaluation,
    figures,
    lineage,
    loading,
    pictures,
    profiles,
    robustness,
    runs,
    saliency,
    wording,
)
from lib.answers import SEEDED, SHOWN, UNKNOWN, Answers, axis_of
from lib.files import left_by_system

CHUNK = 4  # stops answered at a time, so that the one that is waited for comes soon
PAGE = 8  # thumbnails
OWN, STUDY = "own", "study"  # which images are browsed; OWN is also the case of your own images
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
AMPLIFICATIONS = (1, 4, 8, 16, 32, 64)


def still_figure(networks, side, position, attack="fgsm"):
    """What the explorer shows, standing still: an image at one stop and each model's P(malignant) at all. A matplotlib Figure.

    networks: {name: model}, the image as the first is given it; side: `loading.Side`; position: of the image there; attack: one of
    `SHOWN`.
    """
    shown = [Answers(network, name, side, position, attack) for name, network in networks.items()]
    for answers in shown:
        answers.answer(range(len(answers.axis.stops)))
    first, axis, k = shown[0], axis_of(attack), 16
    figure = Figure(figsize=(figures.WIDTH, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    left.imshow(_pixels(first.images[k]))
    left.set_axis_off()
    at = f"{SHOWN[attack]} at {axis.name(k)}"
    own = "" if attack == "gaussian_noise" else f" on {wording.model_name(first.name)}"
    left.set_title(f"{at}{own}", fontsize=10)
    colors = figures.colors_of(list(networks))
    values = [stop * axis.unit for stop in axis.stops]
    for answers in shown:
        p = [answers.rows[stop]["p_malignant"] for stop in range(len(values))]
        label = f"{wording.model_name(answers.name)}: {_word_of(answers.rows[k])}"
        right.plot(values, p, color=colors[answers.name], label=label)
        right.plot(values[k], p[k], "o", color=colors[answers.name], markersize=9)
    right.axhline(0.5, color="0.6", linestyle=":", linewidth=1)
    right.set(xlabel=axis.label, ylabel="P(malignant)", ylim=(-0.03, 1.03))
    right.set_title(f"P(malignant), answers at {axis.name(k)}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a $ in the name of a model is a $
    return figure


def own_images(files, network, image_size):
    """Images of your own as a `loading.Side`: uint8 pixels (n, image_size, W, 3), label `UNKNOWN`, since nobody knows the truth.

    files: a folder, a list of paths or of (name, bytes), or {name: bytes}; files of one name are all kept, as a.png, a.png (2).
    network: its answers become `labels`, int64 (n,); the explorer itself leads each model away from that model's own answer.
    image_size: height in pixels, as the network was trained. Images are cut around their center to the shape of 700 x 460.
    Raises ValueError, naming the file, where one is not readable, not RGB or too small, and where there are no files.
    """
    if isinstance(files, str | Path):
        folder = Path(files).expanduser()
        files = sorted(
            path
            for path in folder.glob("*")
            if path.suffix.lower() in SUFFIXES and not left_by_system(path.name)
        )
        if not files:
            raise ValueError(f"{folder} holds no image: files ending in {', '.join(SUFFIXES)} are read.")
    if not isinstance(files, dict):
        named = [each if isinstance(each, tuple) else (Path(each).name, Path(each)) for each in files]
        files = dict(zip(_distinct(name for name, _ in named), (each for _, each in named), strict=True))
    pixels = np.stack(
        [
            decoding.fit(io.BytesIO(content) if isinstance(content, bytes) else content, image_size, name)
            for name, content in files.items()
        ]
    )
    contents = [io.BytesIO(each) if isinstance(each, bytes) else each for each in files.values()]
    decoding.say_transparent(pd.DataFrame({"image": list(files), "path": contents}))
    answered = evaluation.predict(network, loading.center_crop(pixels)) > 0
    table = pd.DataFrame({"image": list(files)}).assign(label=UNKNOWN, case=OWN, subtype="", magnification=0)
    table = table.assign(split=OWN, split_by=OWN, fold=0)
    return loading.Side(table, pixels, answered.astype(np.int64), OWN)


def _distinct(names):
    """The names in their order, each that was there before with a number: a.png, a.png (2)."""
    found = {}
    for name in names:
        told, number = name, 1
        while told in found:
            number += 1
            told = f"{name} ({number})"
        found[told] = None
    return list(found)


def _together(one, two):
    """Two sides of own images as one."""
    table = pd.concat([one.table, two.table], ignore_index=True)
    table["image"] = _distinct(table["image"])
    pixels, labels = (np.concatenate(pair) for pair in ((one.pixels, two.pixels), (one.labels, two.labels)))
    return loading.Side(table, pixels, labels, OWN)


def of_run(run, **options):
    """The `Explorer` on the test images of a run with every model that is trained; a run of several folds shows its first.

    options: of `Explorer`. Raises FileNotFoundError, naming the notebook to run, where split or baseline are missing, and
    `lineage.StaleError` where a model learned from another split.
    """
    folder, split = runs.folder(run), runs.require(run, "split.csv")
    baseline = runs.require(run, "models/baseline.safetensors")
    lineage.check([baseline], data.load_split(split))
    image_size = runs.recipe_of(baseline)["sides"][0]["image_size"]
    images = loading.open_images(split, image_size, runs.dataset(run)["magnifications"])
    names = [
        name for name in ("baseline", *profiles.DEFENSES) if robustness.checkpoint(folder, name).exists()
    ]
    networks = {name: robustness.load(folder, name, images) for name in names}
    return Explorer(networks, images.side("test"), **options)


def view_of(*names):
    """What a notebook shows of the first of these runs whose baseline is trained: the explorer, or words that say what to run."""
    for name in names:
        if robustness.checkpoint(runs.folder(name), "baseline").exists():
            try:
                return of_run(name).view
            except (ValueError, FileNotFoundError) as error:
                return Markdown(f"```\n{error}\n```")
    return Markdown("No model is trained yet: start `make reports`, or run notebooks 1 and 2.")


OPEN = weakref.WeakSet()  # the explorers whose widgets live


def _cell():
    """Which cell of a notebook is running, and which run of it this is; (None, None) where no cell is."""
    shell = get_ipython()
    asked = shell.get_parent() if hasattr(shell, "get_parent") else {}
    # Where a front end does not say the cell's name, its code stands for it.
    cell = asked.get("metadata", {}).get("cellId") or asked.get("content", {}).get("code")
    return cell, asked.get("header", {}).get("msg_id")


class Explorer:
    """The explorer as an ipywidgets box, `view`: choose an image, a model and an attack, and turn epsilon.

    networks: {name: model}; side: the `loading.Side` to browse; position: of the first image shown; attack: the first, one of `SHOWN`;
    trained_at: the epsilon (a fraction) or sigma of a defense, marked in the curve; seed: of what is random; background: False
    answers in the calling thread. Until something is moved only what is shown is computed, at once, so that a headless run
    loses no time. When its cell is run again, what it made is closed (`close`).
    """

    def __init__(
        self,
        networks,
        side,
        position=0,
        *,
        attack="fgsm",
        trained_at=None,
        pgd_steps=10,
        seed=0,
        background=True,
    ):
        self.cell, self.cell_run = _cell()
        for other in list(OPEN):
            if self.cell and other.cell == self.cell and other.cell_run != self.cell_run:
                other.close()
        OPEN.add(self)
        self.networks, self.pgd_steps, self.background = networks, pgd_steps, background
        own = (side.table["case"] == OWN).all()
        # What the user says of own images is noted in the side's table; the caller's stays as it is.
        self.side = replace(side, table=side.table.copy(), labels=side.labels.copy()) if own else side
        self.sides = {OWN if own else STUDY: self.side}
        self.mark = (axis_of(attack), trained_at) if trained_at is not None else (None, None)
        self.known, self.clean, self.page = {}, {}, None
        self.lock, self.busy, self.thread, self.touched = threading.RLock(), threading.Lock(), None, False
        self.quiet = self.closed = False
        self._make_controls(attack, position, seed)
        self._lay_out()
        for control in (
            self.image,
            self.model,
            self.attack,
            self.seed,
            self.amplify,
            self.saliency,
            self.compare,
            self.epsilon,
        ):
            control.observe(self._guarded(self._changed), "value")
        for control in (self.filter, self.case, self.model):  # what is right depends on the model
            control.observe(self._guarded(self._filtered), "value")
        self.upload.observe(self._guarded(self._uploaded), "value")
        self.source.observe(self._guarded(self._sourced), "value")
        self.truth.observe(self._guarded(self._told), "value")
        self.typed.observe(self._guarded(self._from_text), "value")
        self.before.on_click(self._guarded(lambda _: self._move(-1)))
        self.after.on_click(self._guarded(lambda _: self._move(1)))
        for place, button in enumerate(self.thumbnails):
            button.on_click(self._guarded(lambda _, place=place: self._pick(place)))
        self._guarded(self._changed)(None)

    def _make_controls(self, attack, position, seed):
        short = widgets.Layout(width="auto")

        def dropdown(description, options, width="230px", **more):
            return widgets.Dropdown(
                description=description,
                options=options,
                style={"description_width": "initial"},
                layout=widgets.Layout(width=width),
                **more,
            )

        self.source = dropdown("images", [("the study's", STUDY), ("your own", OWN)], "180px")
        self.source.value = next(iter(self.sides))
        self.truth = dropdown("truth", [UNKNOWN, *data.CLASSES], "160px")
        self.filter = dropdown("show", ["all", "benign", "malignant", "right", "wrong"], "160px")
        self.case = dropdown("case", self._cases(), "190px")
        self.image = dropdown("image", self._offered("all", "all"), "360px", value=position)
        self.before, self.after = (
            widgets.Button(description=words, layout=short) for words in ("◀ previous", "next ▶")
        )
        self.upload = widgets.FileUpload(
            accept=",".join(SUFFIXES), multiple=True, description="your own", layout=short
        )
        self.thumbnails = [widgets.Button(layout=widgets.Layout(margin="2px")) for _ in range(PAGE)]
        for place, button in enumerate(self.thumbnails):
            button.add_class(self._class_of(place))
        self.model = dropdown("model", [(wording.model_name(name), name) for name in self.networks])
        self.attack = dropdown("attack", [(words, name) for name, words in SHOWN.items()], value=attack)
        self.seed = widgets.BoundedIntText(
            value=seed,
            max=10**6,
            description="seed",
            style={"description_width": "initial"},
            layout=widgets.Layout(width="110px"),
        )
        self.amplify = dropdown("perturbation", [(f"x {k}", k) for k in AMPLIFICATIONS], "160px", value=16)
        self.saliency = dropdown("saliency", ["off", *saliency.METHODS])
        self.compare = widgets.Checkbox(
            value=len(self.networks) > 1,
            description="all models side by side",
            indent=False,
            disabled=len(self.networks) == 1,
            layout=short,
        )
        self.epsilon = widgets.FloatSlider(
            readout=False, continuous_update=False, layout=widgets.Layout(width="420px", max_width="100%")
        )
        self.typed = widgets.Text(
            continuous_update=False,
            style={"description_width": "initial"},
            layout=widgets.Layout(width="210px"),
        )
        self._turn(axis_of(attack), 8)

    def _lay_out(self):
        self.pictures = widgets.Image(
            format="png", layout=widgets.Layout(max_width="100%", object_fit="contain")
        )
        self.looks, self.count, self.caption, self.words, self.curve, self.message = (
            widgets.HTML() for _ in range(6)
        )

        def row(*children):
            return widgets.Box(
                children, layout=widgets.Layout(flex_flow="row wrap", align_items="center", min_width="0")
            )

        self.view = widgets.VBox(
            [
                row(
                    self.source,
                    self.filter,
                    self.case,
                    self.image,
                    self.truth,
                    self.before,
                    self.after,
                    self.upload,
                ),
                row(*self.thumbnails, self.count, self.looks),
                row(self.model, self.attack, self.seed, self.amplify, self.saliency, self.compare),
                row(self.epsilon, self.typed),
                self.message,
                self.caption,
                self.pictures,
                row(self.words, self.curve),
            ]
        )

    def close(self):
        """Take the explorer from the page and give back what it holds; the thread that answers ends after its piece of work."""
        with self.lock:
            self.closed = True
            OPEN.discard(self)
            parts = [self.view]
            for each in parts:
                inside = (
                    *getattr(each, "children", ()),
                    getattr(each, "layout", None),
                    getattr(each, "style", None),
                )
                parts += [part for part in inside if isinstance(part, widgets.Widget)]
            for each in parts:
                each.close()
            # Notebooks keep the box in Out; without its parts it keeps nothing alive.
            self.view.children = ()
            self.known.clear()

    # ------------------------------------------------------------ what is chosen

    @property
    def axis(self):
        """The `pictures.Axis` of the chosen attack."""
        return axis_of(self.attack.value)

    @property
    def method(self):
        """The name of the chosen saliency method, or None."""
        return None if self.saliency.value == "off" else self.saliency.value

    @property
    def stop(self):
        """Where the slider stands."""
        return round(self.epsilon.value / self.epsilon.step)

    def _turn(self, axis, k):
        """Set the slider to stop k of an axis."""
        # In one message: a page that is told the new end first sets its own value to it, and says so.
        with self.lock, self.epsilon.hold_sync(), self.epsilon.hold_trait_notifications():
            self.epsilon.max, self.epsilon.step = axis.stops[-1] * axis.unit, axis.stops[1] * axis.unit
            self.epsilon.value = k * self.epsilon.step
            self.epsilon.description, self.typed.description = axis.turned, axis.typed

    def _offered(self, kind, case):
        """The images that the filters leave, as (name, position)."""
        table = self.side.table
        keep = np.ones(len(table), bool)
        if kind in ("benign", "malignant"):
            keep = keep & (table["label"] == kind)
        elif kind in ("right", "wrong"):
            name = self.model.value
            if name not in self.clean:
                with self.busy:
                    self.clean[name] = evaluation.predict(self.networks[name], self.side.tensors()[0])
            right = (self.clean[name] > 0) == (self.side.labels == 1)
            keep = (right == (kind == "right")) & (table["label"] != UNKNOWN)
        if case != "all":
            keep = keep & (table["case"] == case)
        return [(f"{table['label'].iloc[k]}: {table['image'].iloc[k]}", int(k)) for k in np.flatnonzero(keep)]

    def _cases(self):
        return ["all", *sorted(set(self.side.table["case"]) - {OWN})]

    @contextlib.contextmanager
    def _at_once(self):
        """Several controls are set, and nothing follows from any of them alone."""
        with self.lock:
            self.quiet = True
            try:
                yield
            finally:
                self.quiet = False

    def _filtered(self, _):
        if not self.quiet:
            self._offer()

    def _offer(self, position=None):
        """Offer the images that the filters leave, and show the one at a position, or the first of them."""
        offered = self._offered(self.filter.value, self.case.value)
        self.message.value = "" if offered else "No image is left by these filters: choose others."
        if offered and offered != list(self.image.options):
            with self._at_once():
                self.image.options = offered
                if position in (each for _, each in offered):
                    self.image.value = position
            self._changed("offered")

    def _sourced(self, _):
        if not self.quiet:
            self._browse(self.source.value)

    def _browse(self, whose, position=0):
        """Browse the images of the study or own ones, from the one at a position."""
        with self._at_once():
            self.side, self.clean, self.page = self.sides[whose], {}, None
            self.known.clear()
            self.source.value, self.filter.value, self.case.options = whose, "all", self._cases()
            self.image.options = self._offered("all", "all")
            self.image.value = position
        self._changed("browsed")

    def _uploaded(self, _):
        """Browse what was uploaded, beside earlier own images."""
        files = [(each["name"], bytes(each["content"])) for each in self.upload.value]
        if files:
            with self.busy:
                new = own_images(files, self.networks[self.model.value], self.side.pixels[:1].shape[1])
            earlier = self.sides.get(OWN)
            self.sides[OWN] = _together(earlier, new) if earlier else new
            self.upload.value = ()  # so that the same file can be chosen again
            self._browse(OWN, len(earlier) if earlier else 0)

    def _told(self, _):
        """The user says what an own image truly is: from now on the attacks lead away from that."""
        k, word = self.image.value, self.truth.value
        if self.quiet or self.side is not self.sides.get(OWN) or word == self.side.table["label"].iloc[k]:
            return
        with self.lock:
            self.side.table.loc[k, "label"] = word
            if word != UNKNOWN:
                self.side.labels[k] = data.CLASSES.index(word)
            self.known.clear()
            self.page = None
            with self._at_once():
                self.filter.value = "all"  # or the image might be gone from those on offer
        self._offer(k)

    def _positions(self):
        """The positions of the images on offer, and where the chosen one stands among them."""
        positions = [position for _, position in self.image.options]
        return positions, positions.index(self.image.value)

    def _move(self, step):
        positions, at = self._positions()
        self.image.value = positions[(at + step) % len(positions)]

    def _pick(self, place):
        positions, at = self._positions()
        self.image.value = positions[at // PAGE * PAGE + place]

    def _from_text(self, _):
        axis = self.axis
        largest = f"from 0 to {axis.stops[-1] * axis.unit:g}"
        try:
            asked = float(self.typed.value) / axis.unit
        except ValueError:
            self.message.value = (
                f"{escape(repr(self.typed.value))} is not a number: type one {largest}, such as "
                f"{axis.stops[5] * axis.unit:g}."
            )
            return
        if not 0 <= asked <= axis.stops[-1]:
            self.message.value = f"{asked * axis.unit:g} is out of range: type a number {largest}."
            return
        self._turn(axis, axis.nearest(asked))

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
        key = name, self.image.value, self.attack.value, self.seed.value
        with self.lock:
            answers = self.known.pop(key, None)
            while len(self.known) >= 2 * len(self.networks):
                self.known.pop(next(iter(self.known)))  # the one that was not used for longest
            if answers is None:
                answers = Answers(self.networks[name], name, self.side, *key[1:], pgd_steps=self.pgd_steps)
            self.known[key] = answers
            return answers

    def _next(self):
        """The next piece of work for the current choice: (answers, stops, method), or None. What the slider shows comes first."""
        k, wanted, method = self.stop, self._wanted(), self.method
        for answers in wanted:
            if left := [stop for stop in dict.fromkeys((0, k)) if not answers.has(stop, method)]:
                return answers, left, method
        for then in dict.fromkeys((None, method)) if self.touched else ():
            for answers in wanted:
                if missing := answers.missing(k, then):
                    return answers, missing[: 1 if then or answers.attack == "pgd" else CHUNK], then
        return None

    def _work(self):
        try:
            while True:
                with self.lock:
                    work = None if self.closed else self._next()
                    if work is None:
                        self.thread = None
                        return
                answers, stops, method = work
                with self.busy:
                    answers.answer(stops, method)
                self._show()
        except Exception as error:
            with self.lock:
                self.thread = None
            self.message.value = f"This did not work: {escape(f'{type(error).__name__}: {error}')}"

    def _changed(self, change):
        if self.quiet or self.image.value is None:
            return
        self.touched |= change is not None
        self.message.value = ""
        self.seed.disabled = self.attack.value not in SEEDED
        if self.epsilon.max != self.axis.stops[-1] * self.axis.unit:
            self._turn(self.axis, self.stop)
        self.typed.value = f"{self.epsilon.value:g}"
        own = self.side is self.sides.get(OWN)
        self.source.layout.display = None if len(self.sides) > 1 else "none"
        self.truth.layout.display = None if own else "none"
        if own:
            self.truth.value = self.side.table["label"].iloc[self.image.value]
        self._show_thumbnails()
        self._show()
        if not (self.background and self.touched):
            self._work()
            return
        with self.lock:
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, daemon=True)
                self.thread.start()

    # ------------------------------------------------------------ what is shown

    def _class_of(self, place):
        return f"explorer-{id(self):x}-{place}"

    def _show_thumbnails(self):
        """The page of images around the chosen one, as the backgrounds of buttons; the chosen one is framed."""
        positions, at = self._positions()
        page = positions[at // PAGE * PAGE :][:PAGE]
        if self.page != page:
            self.page, rules = page, [pictures.FRAME]
            for place, button in enumerate(self.thumbnails):
                button.layout.display = None if place < len(page) else "none"
            for place, position in enumerate(page):
                row, pixels = self.side.table.iloc[position], self.side.pixels[[position]]
                self.thumbnails[place].tooltip = f"{row['label']}: {row['image']}"
                rules.append(pictures.thumbnail(_pixels(loading.center_crop(pixels)), self._class_of(place)))
            self.looks.value = f"<style>{' '.join(rules)}</style>"
        for place, button in enumerate(self.thumbnails):
            (button.add_class if place == at % PAGE else button.remove_class)(pictures.FRAMED)
        self.count.value = f"{at + 1} of {len(positions)}"

    def _show(self):
        with self.lock:
            if self.closed:
                return
            k, wanted, method = self.stop, self._wanted(), self.method
            colors = {name: to_hex(color) for name, color in figures.colors_of(list(self.networks)).items()}
            ready = [answers for answers in wanted if answers.has(0, method) and answers.has(k, method)]
            left = sum(len(answers.missing(method=method)) for answers in wanted)
            words = (
                f"Computing, {left} of {len(wanted) * len(self.axis.stops)} stops left."
                if left and self.touched
                else ""
            )
            if ready and ready[0] is wanted[0]:
                self.pictures.value = pictures.picture(self._panels(ready, k, method))
                self.caption.value = self._caption(ready, method)
            self.words.value = (
                self._table(ready, k, words, colors)
                if ready
                else f'<div role="status"><i>Computing {self.axis.name(k)} …</i></div>'
            )
            curves = {
                wording.model_name(answers.name): (
                    colors[answers.name],
                    {stop: row["p_malignant"] for stop, row in list(answers.rows.items())},
                )
                for answers in wanted
            }
            axis, value = self.mark
            mark = (value, "trained at") if axis is self.axis else None
            self.curve.value = pictures.curve_svg(curves, self.axis, k, mark)

    def _panels(self, ready, k, method):
        first = ready[0]
        clean = _pixels(first.clean)
        change = self.amplify.value * (_pixels(first.images[k]) - clean)
        rows = [[clean, np.clip(0.5 + change, 0, 1), *(_pixels(answers.images[k]) for answers in ready)]]
        if method:

            def seen(answers, stop):
                under = _pixels(answers.images[stop]) if method == "Grad-CAM" else None
                return pictures.heat(answers.maps[method, stop], under)

            rows.append([seen(first, 0), None, *(seen(answers, k) for answers in ready)])
        return rows

    def _caption(self, ready, method):
        row = ready[0].rows[0]
        known = f"case {escape(str(row['case']))}, truly {row['label']}"
        if row["case"] == OWN:
            known = f"an image of your own; you say it is {row['label']}"
            if row["label"] == UNKNOWN:
                known = "an image of your own: each attack leads away from the attacked model's own answer"
        changed = "noisy" if self.attack.value == "gaussian_noise" else "adversarial"
        names = ["original", f"perturbation x {self.amplify.value}"]
        names += (
            [changed] if len(ready) == 1 else [f"for {escape(wording.model_name(a.name))}" for a in ready]
        )
        below = f" Below: {method} of each image's answer, each in its own scale." if method else ""
        return f"<b>{escape(str(row['image']))}</b>, {known}. From left to right: {', '.join(names)}.{below}"

    def _table(self, ready, k, words, colors):
        head = ["", "clean", self.axis.name(k), "SSIM", "L∞ (255ths)", "L2", "turns at"]
        lines = []
        for answers in ready:
            clean, row, turns = answers.rows[0], answers.rows[k], answers.turns_at()
            turned = (clean["margin"] > 0) != (row["margin"] > 0)
            said = [f"{each['p_malignant']:.2f} {_word_of(each)}" for each in (clean, row)]
            at = "…" if answers.missing() else "not up to here"
            if answers.wrong():
                at, turns = "wrong already", None  # led away from the truth, it has nowhere to turn
            cells = [
                f'<span style="color: {colors[answers.name]}">●</span> {escape(wording.model_name(answers.name))}',
                said[0],
                f"<b>{said[1]}{' – turned' if turned else ''}</b>",
                f"{row['ssim']:.3f}",
                f"{row['linf'] * 255:.2f}",
                f"{row['l2']:.2f}",
                at if turns is None else self.axis.name(turns),
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
