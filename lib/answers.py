"""What a model says of one image at every stop of an attack: the numbers and images that the explorer picks from.

They are the rows of `evaluation.prediction_rows` for the images of `robustness.perturb`: the same as in the table of predictions.
"""

from functools import cached_property

import numpy as np
import torch

from lib import evaluation, loading, pictures, robustness, saliency, training, wording

# "gaussian_noise" is what Li & Liu add to training images: no attack bounded by epsilon, so its slider turns sigma.
SHOWN = {name: wording.ATTACK_NAMES[name] for name in ("fgsm", "pgd", "random_noise")} | {
    "gaussian_noise": "Gaussian noise"
}
UNKNOWN = "unknown"  # the label of an image of which nobody said what is true
SEEDED = ("pgd", "random_noise", "gaussian_noise")


def axis_of(attack):
    """What the slider turns: sigma for Gaussian noise, epsilon for all others."""
    return pictures.SIGMA if attack == "gaussian_noise" else pictures.EPSILON


class Answers:
    """What one model says of one image under one attack, at every stop that was asked for so far.

    network: the model; name: its name; side: `loading.Side`; position: of the image there; attack: one of `SHOWN`. `rows`, `images`
    and `maps` hold, by stop of `axis`, the row of predictions, the image, and where the model looks. Attacks lead away from the true
    label, and where that is `UNKNOWN` from what this model answers to the clean image.
    """

    def __init__(self, network, name, side, position, attack, seed=0, pgd_steps=10):
        self.network, self.name, self.attack, self.seed, self.steps = network, name, attack, seed, pgd_steps
        self.axis = axis_of(attack)
        self.table = side.table.iloc[[position]]
        self.clean = loading.center_crop(side.pixels[[position]])
        self.told = torch.from_numpy(side.labels[[position]])
        self.images, self.rows, self.maps = {}, {}, {}

    @cached_property
    def label(self):
        """What the attack leads away from: int64 (1,), 1 malignant."""
        if self.table["label"].iloc[0] != UNKNOWN:
            return self.told
        return torch.from_numpy((evaluation.predict(self.network, self.clean) > 0).astype(np.int64))

    def has(self, k, method=None):
        """Whether stop k is answered; method: a name of `saliency.METHODS` that is asked for too."""
        return k in self.rows and (method is None or (method, k) in self.maps)

    def missing(self, near=0, method=None):
        """The stops without an answer, the nearest to stop `near` first; the clean image before all."""
        left = [k for k in range(len(self.axis.stops)) if not self.has(k, method)]
        return sorted(left, key=lambda k: (k > 0, abs(k - near)))

    def answer(self, stops, method=None):
        """Make the images of these stops and show them to the model. One backward pass serves all stops of FGSM."""
        self._make([k for k in stops if k not in self.images])
        new = [k for k in stops if k not in self.rows]
        if new:
            margins = evaluation.predict(self.network, torch.cat([self.images[k] for k in new]))
            for k, margin in zip(new, margins, strict=True):
                bounded = self.attack != "gaussian_noise"
                rows = evaluation.prediction_rows(
                    self.table,
                    model=self.name,
                    attack=self.attack,
                    epsilon=self.axis.stops[k] if bounded else 1.0,
                    margins=[margin],
                    seed=self.seed,
                    clean=self.clean,
                    perturbed=self.images[k],
                )
                self.rows[k] = rows.iloc[0].to_dict()
        for k in stops if method else ():
            if (method, k) not in self.maps:
                found = saliency.METHODS[method](self.network, self.images[k])
                self.maps[method, k] = found[0].numpy()

    def _make(self, stops):
        if stops and self.attack != "pgd":
            stops = range(len(self.axis.stops))
        values = [self.axis.stops[k] for k in stops]
        if self.attack == "gaussian_noise":
            made = [
                training.add_gaussian_noise(sigma)(
                    None, self.clean, None, torch.Generator().manual_seed(self.seed)
                )
                for sigma in values
            ]
        else:
            made = robustness.perturb(
                self.network, self.clean, self.label, self.attack, values, self.steps, self.seed
            )
        self.images |= dict(zip(stops, made, strict=True))

    def wrong(self):
        """Whether the answer to the clean image, stop 0, is known to be wrong."""
        row = self.rows[0]
        return row["label"] != UNKNOWN and (row["margin"] > 0) != (row["label"] == "malignant")

    def turns_at(self):
        """The smallest stop that changes the clean decision; None where there is none, or one below is not answered yet."""
        for k in range(len(self.axis.stops)):
            if k not in self.rows:
                return None
            if (self.rows[k]["margin"] > 0) != (self.rows[0]["margin"] > 0):
                return k
        return None
