"""Images that identify themselves."""

import numpy as np
import torch

from lightning_maml.datamodules import ClassImages


def numbered_images(classes: int = 12, per_class: int = 10) -> ClassImages:
    """Return images that identify themselves, of 3 x 3 pixels.

    The first corner is 100 plus the number of the class, and shows how an image was turned. The
    middle is the number of the image in its class.
    """
    with torch.device("cpu"):
        images = torch.zeros(classes * per_class, 1, 3, 3, dtype=torch.uint8)
        images[:, 0, 0, 0] = torch.arange(classes).repeat_interleave(per_class) + 100
        images[:, 0, 1, 1] = torch.arange(per_class).repeat(classes)
    return ClassImages(images, list(np.arange(classes * per_class).reshape(classes, per_class)))
