"""Images that say which they are."""

import numpy as np
import torch

from lightning_maml.datamodules import ClassImages


def numbered_images(classes: int = 12, per_class: int = 10) -> ClassImages:
    """Every image says which it is: pixel 0 its class, pixel 1 its number, pixel 2 a corner that rotations move."""
    images = torch.zeros(classes * per_class, 1, 3, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(classes).repeat_interleave(per_class) + 100
    images[:, 0, 1, 1] = torch.arange(per_class).repeat(classes)
    return ClassImages(images, list(np.arange(classes * per_class).reshape(classes, per_class)))
