"""Shows a model the test images, as they are and under attack, and keeps the rows of the predictions table."""

from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lib import (
    attacks,
    checks,
    data,
    decoding,
    evaluation,
    lineage,
    loading,
    models,
    runs,
    splits,
    training,
    wording,
)

AT_EVERY_EPSILON = ("random_noise", "fgsm", "pgd", "transfer_fgsm")
BATCH_PIXELS = 2**19  # of the images attacked at once; bounds the memory of a backward pass


def checkpoint(folder, model, fold=0):
    """Where a run keeps a model's weights: models/<model>.safetensors, with the fold's number from the second fold on."""
    return folder / "models" / f"{model}{f'_fold{fold}' if fold else ''}.safetensors"


def load(folder, name, images, fold=0):
    """A run's model, in eval mode, on the CPU.

    images: `loading.Images` that it is to be shown. Raises `lineage.StaleError` where it is missing, learned from another split than
    theirs, or was made from other weights than the run holds now.
    """
    path = checkpoint(folder, name, fold)
    lineage.check([path], images.table, images.image_size)
    return models.load(path)


def read(folder, names=None, attacks=None, images=None):
    """The predictions that a run keeps as one table with `evaluation.COLUMNS`.

    names: of models, all by default; attacks: all by default, otherwise these, on the model's own images or the baseline's; images:
    `loading.Images`, of whose split alone the rows are. Raises FileNotFoundError where a model has none, and `lineage.StaleError`
    where they were made from other images, models or settings than the run holds now, or at another size than `images`.
    """
    made = {piece: runs.recipe_of(piece) for piece in sorted((folder / "predictions").glob("*.csv.gz"))}
    for name in names or ([] if made else ["baseline"]):
        if name not in {recipe.get("name") for recipe in made.values()}:
            writer = runs.writer(f"predictions/{name}-none")
            raise FileNotFoundError(
                f"No predictions of {name} in {folder / 'predictions'}: run notebooks/{writer}.ipynb first."
            )

    def asked(piece, recipe):
        if not recipe:  # `lineage.check` names it
            return names is None or piece.name.startswith(tuple(f"{name}-" for name in names))
        if names is not None and recipe["name"] not in names:
            return False
        return attacks is None or (recipe["attack"][0] in attacks and recipe["source"] in evaluation.SOURCES)

    pieces = [piece for piece, recipe in made.items() if asked(piece, recipe)]
    split = data.load_split(folder / "split.csv")
    lineage.check(pieces, split, images and images.image_size)
    lineage.check_alike(pieces, split)
    rows = evaluation.read_predictions(pieces)
    return rows if images is None else rows[rows["split_by"].isin(images.table["split_by"])]


def starting_weights(folder, pretrained, fold=0):
    """What `models.build` starts from: the checkpoint that 02 trained on another magnification for "200X", else as given.

    Raises as `load` does.
    """
    magnification = splits.source_magnification(pretrained)
    if not magnification:
        return pretrained
    path = checkpoint(folder, f"source_{magnification}X", fold)
    lineage.check([path], data.load_split(folder / "split.csv"))
    return path


def made_from(folder, start, *others):
    """What a recipe says of starting weights (a path or a name) and of the run's other checkpoints that a model is made from."""
    own = [path for path in (start, *others) if Path(path).parent == folder / "models"]
    weights = runs.file_hash(start) if Path(start).is_file() else str(start)
    return {"start": weights, "models": lineage.checkpoints(*own)}


def write_table(folder, name, table, models, folds):
    """Write a table of a run with a note of the models, in these folds, that it was made from: `lineage.check` asks for it."""
    runs.write_table(folder / name, table)
    paths = [checkpoint(folder, model, fold) for model in models for fold in folds]
    runs.write_recipe(folder / name, {"models": lineage.checkpoints(*paths)})


def attack_table(epsilons, steps, audited=()):
    """What each attack name means in this run, one row an attack: steps, restarts, step size, queries, precision.

    epsilons: fractions in [0, 1]; steps: of the attacks that take several, by name ("square": queries); audited: the epsilons of the
    `evaluation.CASCADE`, of which attacks without steps are left out. queries counts passes through the model for an image, at most.
    """
    starts, of_pgd = 2, steps["pgd"]
    rows = {
        "none": (0, 0, "", 1),
        "random_noise": (0, 0, "", 1),
        "fgsm": (1, 0, "epsilon", 2),
        "pgd": (
            of_pgd,
            starts - 1,
            f"{attacks.pgd_step_size(1, of_pgd):g} epsilon",
            2 + starts * (2 * of_pgd + 1),
        ),
        "transfer_fgsm": (1, 0, "epsilon", 1),
    }
    cascade = {}
    if audited:
        cascade = {
            "apgd_ce": (steps["apgd_ce"], 0, "2 epsilon, halved where it stalls", 2 * steps["apgd_ce"] + 3),
            "fab": (steps["fab"], 0, "to the nearest boundary", 4 * steps["fab"] + 8),
            "square": (0, 0, "", steps["square"] + 3),
        }
    rows |= {name: values for name, values in cascade.items() if steps[name]}
    rows["worst_case"] = (0, 0, "", pd.NA)  # all of the others, at several epsilons
    columns = ["name", "description", "steps", "restarts", "step_size", "queries", "epsilons", "precision"]

    def shown(name):
        of_it = [0.0] if name == "none" else audited if name in evaluation.CASCADE else epsilons
        return " ".join(map(wording.format_epsilon, of_it))

    return pd.DataFrame(
        [
            (name, attacks.DESCRIPTIONS[name], *values, shown(name), "float32")
            for name, values in rows.items()
        ],
        columns=columns,
    ).astype({"queries": "Int64"})


def evaluate(
    folder,
    name,
    images,
    names,
    *,
    side="test",
    epsilons=(),
    steps=None,
    seed=0,
    source="baseline",
    margins=None,
):
    """The model's predictions on one side's images of every fold under each attack of `names`. Returns the rows.

    folder: the run's; images: `loading.Images`; epsilons: fractions in [0, 1]; steps: of the attacks that take several, by name
    ("square": queries); source: the model whose FGSM images `transfer_fgsm` shows; margins(fold) gives, for a model without a
    network, a function from images (n, H, W, 3) to margins.
    An attack of the `evaluation.CASCADE` goes on from the rows of the one before it, of PGD the first: an image that was fooled is not
    shown again and keeps its row, and one that stands keeps the row that came nearest.
    Each attack's rows (of those with steps: each epsilon's) are a file in predictions/, kept: the same call goes on where it was
    killed. Raises FileNotFoundError where an attack of the cascade lacks the one before it, and `lineage.StaleError` where a model
    learned from other images than these.
    """
    steps = steps or {}
    if not margins:
        of_model = [checkpoint(folder, name, fold) for fold in images.folds]
        lineage.check(of_model, images.table, images.image_size)
    _remove_outdated(folder, name)
    code = runs.code_hash(
        decoding.decode,
        loading.Side,
        models.load,
        evaluation.predict,
        _transferred,
        _rows_under,
        _go_on,
        margins,
    )
    rows = []
    for fold in images.folds:
        shown = images.side(side, fold)
        batch, labels = shown.tensors()
        split_by = shown.table["split_by"].iloc[0]
        path, source_path = checkpoint(folder, name, fold), checkpoint(folder, source, fold)
        if margins:
            own, sides = {}, [images.side("train", fold).origin]
        else:
            own, sides = lineage.checkpoints(path), []
        made_for = {}  # the source of transferred images
        if "transfer_fgsm" in names and name != source:
            lineage.check([source_path], images.table, images.image_size)
            made_for = lineage.checkpoints(source_path)
        tail = f"{'' if side == 'test' else f'-{side}'}-{split_by}{fold}.csv.gz"
        network = answer = None
        for attack in names:
            transfers = attack == "transfer_fgsm"
            if transfers and name == source:
                continue  # its own FGSM images are not a transfer
            stem = f"{name}-{attack}" + f"-from_{source}" * (transfers and source != "baseline")
            kept = []
            alone = attack == "pgd" or attack in evaluation.CASCADE
            groups = [(e,) for e in epsilons] if alone else [(0.0,) if attack == "none" else tuple(epsilons)]
            for group in groups:
                end = f"-{group[0] * 255:g}{tail}" if alone else tail
                piece = folder / "predictions" / f"{stem}{end}"
                kept.append(piece.name)
                recipe = {
                    "name": name,
                    "source": source if transfers else "",
                    "models": own | made_for if transfers else own,
                    "sides": [shown.origin, *sides],
                    "images": list(batch.shape),
                    "attack": [attack, list(group), steps.get(attack, 0)],
                    "seed": seed,
                    "split_by": split_by,
                    "code": code,
                }
                before, standing = None, np.arange(len(shown))
                if attack in evaluation.CASCADE:
                    ran = [each for each in evaluation.CASCADE if steps.get(each) or each == attack]
                    one_before = ("pgd", *ran)[ran.index(attack)]
                    earlier = folder / "predictions" / f"{name}-{one_before}{end}"
                    if not earlier.exists():
                        writer = runs.writer(f"predictions/{earlier.name}")
                        raise FileNotFoundError(
                            f"{attack} goes on from {earlier.name}: run {one_before} first, in notebooks/{writer}.ipynb."
                        )
                    lineage.check([earlier], images.table, images.image_size)
                    before = evaluation.read_piece(earlier)
                    standing = np.flatnonzero(evaluation.is_right(before))
                    recipe["pieces"] = {earlier.name: runs.file_hash(earlier)}
                if runs.is_current(piece, recipe):
                    rows.append(evaluation.read_piece(piece))
                    continue
                if answer is None and margins:
                    fitted = margins(fold)
                    answer = lambda x, fitted=fitted: fitted(x.permute(0, 2, 3, 1).numpy())  # noqa: E731
                elif answer is None:
                    network = _load(path)
                    answer = partial(evaluation.predict, network)
                if transfers:
                    made = _transferred(source_path, made_for[source_path.name], images, side, fold, group)
                else:
                    attacked = batch[standing], labels[standing], attack, group, steps.get(attack, 0), seed
                    made = perturb(network, *attacked, f"{name} under {attack}")
                part = _rows_under(
                    shown.table.iloc[standing],
                    batch[standing],
                    made,
                    answer,
                    attack,
                    group,
                    {"model": name, "seed": seed, "source_model": source if transfers else ""},
                )
                part = part if before is None else _go_on(before, part, attack)
                evaluation.write_piece(part, piece)
                runs.write_recipe(piece, recipe)
                rows.append(part)
            if alone:
                _remove_others(folder, f"{stem}-*-{split_by}{fold}", side, kept)
    return pd.concat(rows, ignore_index=True)


@lru_cache(maxsize=splits.FOLDS)
def _transferred(source, sha256, images, side, fold, epsilons):
    """The FGSM images of a checkpoint; those of the last folds are kept: several models are shown them. sha256: of the checkpoint."""
    batch, labels = images.side(side, fold).tensors()
    return perturb(
        _load(source), batch, labels, "transfer_fgsm", epsilons, label=f"FGSM images of {source.stem}"
    )


def _rows_under(table, clean, made, answer, attack, epsilons, columns):
    """The rows of a side's images under one attack: what the model answers to the images made of them, a batch each epsilon."""
    rows = []
    for epsilon, perturbed in zip(epsilons, made, strict=True):
        margins = answer(perturbed)
        changed = {}
        if attack != "none":
            saved, saved_margins = in_8_bits(perturbed), margins.copy()
            # One step of a whole epsilon from whole values ends on whole values: nothing to show the model again.
            moved = (saved - perturbed).abs().amax((1, 2, 3)) > 1e-6
            if moved.any():
                saved_margins[moved.numpy()] = answer(saved[moved])
            changed = {"clean": clean, "perturbed": perturbed, "margins_8bit": saved_margins}
        rows.append(
            evaluation.prediction_rows(
                table, attack=attack, epsilon=epsilon, margins=margins, **columns, **changed
            )
        )
    return pd.concat(rows, ignore_index=True)


def _go_on(before, part, attack):
    """The rows of an attack of the cascade: those of the attack before it, but for the images that this one (`part`) fooled."""
    fooled = part[~evaluation.is_right(part)]
    rows = before[~before["image"].isin(fooled["image"])]
    rows = pd.concat([rows, fooled] if len(fooled) else [rows]).set_index("image").loc[before["image"]]
    return rows.reset_index()[evaluation.COLUMNS].assign(attack=attack)


def in_8_bits(images):
    """Images as a file with 8 bits a channel keeps them; values in [0, 1]."""
    return images.mul(255).round().div(255)


def _remove_outdated(folder, name):
    """Remove a model's pieces of other splits, and of earlier checkpoints: nothing can use them, and nothing would write them anew."""
    split = folder / "split.csv"
    pieces = [
        piece
        for piece in (folder / "predictions").glob(f"{name}-*.csv.gz")
        if runs.recipe_of(piece).get("name") == name
    ]
    if not pieces or not split.exists():
        return
    if outdated := lineage.outdated(pieces, data.load_split(split)):
        tqdm.write(
            f"removed {len(outdated)} pieces of predictions of {name} on another split or by another checkpoint"
        )
    for piece in outdated:
        runs.discard(piece)


def _remove_others(folder, pattern, side, kept):
    """Pieces of epsilons that are no longer asked for would enter the table as if they belonged to this run."""
    for piece in (folder / "predictions").glob(f"{pattern}.csv.gz"):
        if piece.name not in kept and ("-validation-" in piece.name) == (side == "validation"):
            runs.discard(piece)


def evaluate_without_network(folder, images, names, *, epsilons=(), seed=0, source="baseline"):
    """`evaluate` for always_malignant and for color_only, fitted to the training images (whole fields of view)."""

    def color_only(fold):
        train = images.side("train", fold)
        return models.fit_color_only((image / 255 for image in train.pixels), train.labels)

    answers = {"always_malignant": lambda fold: models.always_malignant, "color_only": color_only}
    options = {"epsilons": epsilons, "seed": seed, "source": source}
    return [
        evaluate(folder, name, images, names, margins=margins, **options) for name, margins in answers.items()
    ]


def under_gaussian_noise(folder, names, images, sigma, seed=0):
    """What models say of the test images, as they are and with Gaussian noise as in training: rows of `evaluation.metrics`.

    folder: the run's; names: of models; images: `loading.Images`, folds pooled; sigma: of the noise, of the range [0, 1]. The rows
    are those of all images, with `sigma` in place of epsilon, 0 without noise.
    """
    rows = [evaluate(folder, name, images, ["none"], seed=seed) for name in names]
    for fold in images.folds:
        shown = images.side("test", fold)
        generator = torch.Generator().manual_seed(seed)
        noisy = training.add_gaussian_noise(sigma)(None, shown.tensors()[0], None, generator)
        for name in names:
            margins = evaluation.predict(_load(checkpoint(folder, name, fold)), noisy)
            kind = {"attack": "gaussian_noise", "epsilon": sigma, "seed": seed}
            rows.append(evaluation.prediction_rows(shown.table, model=name, margins=margins, **kind))
    found = evaluation.metrics(pd.concat(rows, ignore_index=True))
    return found[found["subset"] == "all"].rename(columns={"epsilon": "sigma"})


def examples(model, side, epsilon):
    """Positions of two images of each class: one that the model gets right and FGSM at epsilon turns, one that stands.

    They are the first such of the first eight images of the class; where there is no such image, the first others, and an only
    image twice.
    """
    batch, labels = side.tensors()
    chosen = []
    for label in (0, 1):
        mine = np.flatnonzero(side.labels == label)[:8]
        (turned,) = perturb(model, batch[mine], labels[mine], "fgsm", [epsilon])
        before, after = (
            (evaluation.predict(model, shown) > 0) == (label == 1) for shown in (batch[mine], turned)
        )
        falls, stands = mine[before & ~after], mine[before & after]
        first = [*falls[:1], *stands[:1]]
        chosen += [*first, *np.setdiff1d(mine, first), *mine][:2]
    return [int(k) for k in chosen]


def pgd_by_steps(folder, name, images, epsilon, settings, among, seed=0):
    """How PGD's success grows with its steps, on `among` test images spread over all folds: rows of `checks.AUDIT`.

    settings: (steps, restarts, step size as a share of epsilon), each tried on all of these images. The first row, of 0 steps, is
    the clean image and the share of its channel values on which the margin does not depend. margin is the mean that is left toward
    the truth, 0 for an image that is fooled. Nothing is found with among = 0. Kept in audit/.
    """
    asked = {"epsilon": epsilon, "settings": settings, "among": among, "seed": seed}
    rows = _kept(folder, name, images, "steps", _margins_by_steps, asked)
    if rows.empty:
        return pd.DataFrame(columns=checks.AUDIT)
    rows = rows.assign(accuracy=rows["margin"] > 0, margin=rows["margin"].clip(lower=0), n=1)
    rows = rows.groupby(["steps", "restarts", "step_size"], as_index=False).agg(
        {"n": "sum", "accuracy": "mean", "margin": "mean", "zero_gradient": "mean"}
    )
    return rows.assign(model=name, epsilon=epsilon)[checks.AUDIT]


def _margins_by_steps(name, shown, epsilon, settings, seed):
    found = []
    for network, _, x, y in shown:
        size = batch_size(x)
        for images, labels in zip(x.split(size), y.split(size), strict=True):
            with attacks.frozen(network):
                margins, gradient = attacks.margin_gradient(network, images, labels)
            clean = {"steps": 0, "restarts": 0, "step_size": 0.0, "margin": -margins.cpu()}
            clean["zero_gradient"] = (gradient == 0).flatten(1).double().mean(1).cpu()
            found.append(pd.DataFrame(clean))
        for steps, restarts, share in tqdm(settings, desc=f"{name}, PGD by steps", delay=10, leave=False):
            generator = torch.Generator().manual_seed(seed)
            step_size = share * epsilon
            made = attacks.pgd(network, x, y, epsilon, steps, step_size, generator, restarts, size)
            # Toward the truth: `predict` gives malignant minus benign.
            margins = evaluation.predict(network, made) * (2 * y.cpu().numpy() - 1)
            row = {"steps": steps, "restarts": restarts, "step_size": share, "margin": margins}
            found.append(pd.DataFrame(row))
    columns = ["steps", "restarts", "step_size", "margin", "zero_gradient"]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)


def vote_under_noise(folder, name, images, sigma, samples, among, seed=0):
    """What the model says of `samples` noisy copies of each of `among` test images spread over all folds, for `audit.certify`.

    sigma: standard deviation of the Gaussian noise in pixel values of [0, 1]; the copies are not clipped, as the certificate asks.
    Returns rows with model, image, case, label, sigma, samples and votes (copies called malignant). Kept in audit/.
    """
    asked = {"sigma": sigma, "samples": samples, "among": among, "seed": seed}
    found = _kept(folder, name, images, "votes", _votes, asked)
    return found.assign(model=name, sigma=sigma, samples=samples)


def _votes(name, shown, sigma, samples, seed):
    found = []
    for network, table, x, _ in shown:
        generator = torch.Generator().manual_seed(seed)
        bar = tqdm(table.index, desc=f"{name} under noise", delay=10, leave=False)
        for row, image in zip(bar, x, strict=True):
            noise = torch.randn((samples, *image.shape), generator=generator).to(image)
            found.append(table.loc[row, ["image", "case", "label"]].to_dict())
            found[-1]["votes"] = int((evaluation.predict(network, image + sigma * noise) > 0).sum())
    return pd.DataFrame(found, columns=["image", "case", "label", "votes"])


def _kept(folder, name, images, what, make, asked):
    """The table that `make` makes of a model and some test images of every fold, from audit/ where it is there already.

    asked: the options of `make`, and of how many images (`among`).
    """
    path = folder / "audit" / f"{name}-{what}.csv"
    sides = [images.side("test", fold) for fold in images.folds]
    of_model = [checkpoint(folder, name, fold) for fold in images.folds]
    lineage.check(of_model, images.table, images.image_size)
    recipe = asked | {
        "models": lineage.checkpoints(*of_model),
        "sides": [side.origin for side in sides],
        "code": runs.code_hash(make, _some, models.load, decoding.decode, loading.Side),
    }
    if not runs.is_current(path, recipe):
        options = dict(asked)
        shown = _some(folder, name, images, options.pop("among"))
        runs.write_table(path, make(name, shown, **options))
        runs.write_recipe(path, recipe)
    return runs.read_table(path)


def _some(folder, name, images, among):
    """Of each fold: the network, and the table, images and labels of its share of `among` test images, evenly spread."""
    for fold in images.folds if among else ():
        shown = images.side("test", fold)
        rows = np.unique(np.linspace(0, len(shown) - 1, -(-among // len(images.folds))).astype(int))
        x, y = (part[rows].to(training.device()) for part in shown.tensors())
        yield _load(checkpoint(folder, name, fold)), shown.table.iloc[rows], x, y


def batch_size(images):
    """How many images of this size to attack at once."""
    return max(8, BATCH_PIXELS // (images.shape[-1] * images.shape[-2]))


def _load(path):
    return models.load(path).to(training.device(), memory_format=torch.channels_last)


def perturb(model, images, labels, attack, epsilons, steps=0, seed=0, label=None):
    """The images under one attack: a list of float32 batches (n, 3, H, W) on the CPU, one for each epsilon (a fraction).

    model: on any device; images, labels: on the CPU; steps: of PGD, APGD-CE and FAB, queries of Square. Random parts depend on
    `seed` and the epsilon only. `label` names the work where it takes long enough to show progress. Raises ValueError for an
    unknown attack.
    """
    if attack not in (known := ("none", *AT_EVERY_EPSILON, *evaluation.CASCADE)):
        raise ValueError(f"Unknown attack {attack!r}: use {', '.join(known)}.")
    if attack == "none" or len(images) == 0:
        return [images for _ in epsilons]
    generators = [
        torch.Generator().manual_seed(seed * 100_003 + round(epsilon * 255_000)) for epsilon in epsilons
    ]
    if attack == "random_noise":
        return [
            attacks.random_noise(images, epsilon, generator)
            for epsilon, generator in zip(epsilons, generators, strict=True)
        ]
    size = batch_size(images)
    if attack == "pgd":
        return [
            attacks.pgd(
                model,
                images,
                labels,
                epsilon,
                steps,
                attacks.pgd_step_size(epsilon, steps),
                generator,
                batch_size=size,
                label=label,
            )
            for epsilon, generator in zip(epsilons, generators, strict=True)
        ]
    where = next(model.parameters(), images).device
    done = [[] for _ in epsilons]
    for start in tqdm(range(0, len(images), size), desc=label, unit="batch", delay=10, leave=False):
        x, y = (part[start : start + size].to(where) for part in (images, labels))
        x = x.contiguous(memory_format=torch.channels_last)
        if attack in ("fgsm", "transfer_fgsm"):
            batches = attacks.fgsm(model, x, y, epsilons)
        else:
            batches = (attacks.autoattack(model, x, y, attack, epsilon, steps, seed) for epsilon in epsilons)
        for kept, batch in zip(done, batches, strict=True):
            kept.append(batch.cpu())
    return [torch.cat(kept) for kept in done]
