"""Episodes as version 0.1 drew them, to compare with what it computed from them."""

import numpy as np
import torch

from lightning_maml.datamodules.gathering import Drawn
from lightning_maml.datamodules.sampler import EpisodeDataset


def draw(self: EpisodeDataset, keys: list[tuple[int, ...]]) -> Drawn:
    """Draw a meta-batch, in place of ``EpisodeDataset.draw``."""
    rows, turns = [], []
    for key in keys:
        random = np.random.RandomState([*self._seed, *key])
        for number in random.choice(self._classes, self._ways, replace=False):
            turn, of_class = divmod(number, len(self._sizes))
            if self._rotations == "augment":
                turn = random.randint(4)
            images = random.permutation(self._sizes[of_class])[: self._images_per_class]
            rows.append(self._first_rows[of_class] + images)
            turns.append(np.full_like(images, turn))
    shape = len(keys), self._ways, self._images_per_class
    in_parts = [self._in_parts(np.reshape(each, shape)) for each in (rows, turns)]
    return Drawn(*map(torch.from_numpy, in_parts))
