"""Made-up photographs in the tree that the archive of CUB-200-2011 unpacks to."""

from pathlib import Path

import numpy as np
from PIL import Image

KINDS = ["Albatross", "Auklet", "Blackbird", "Bunting"]
SPECIES = [f"{number:03d}.Made_up_{KINDS[number % 4]}" for number in range(1, 201)]


def write_cub(root: Path, per_class: int = 3, seed: int = 0) -> Path:
    """Write ``CUB_200_2011`` with photographs of several sizes, and return it."""
    folder, random = root / "CUB_200_2011", np.random.RandomState(seed)
    listed = []
    for species in SPECIES:
        (folder / "images" / species).mkdir(parents=True)
        for number in range(per_class):
            name = f"{species}/{species[4:]}_{number:04d}_{len(listed) + 1}.jpg"
            height, width = random.randint(30, 60, 2)
            colour = random.randint(0, 256, 3, np.uint8)
            pixels = np.broadcast_to(colour, (height, width, 3))
            Image.fromarray(np.ascontiguousarray(pixels)).save(folder / "images" / name)
            listed.append(name)
    lines = [f"{number} {name}\n" for number, name in enumerate(listed, 1)]
    (folder / "images.txt").write_text("".join(lines))
    (folder / "classes.txt").write_text("".join(f"{int(s[:3])} {s}\n" for s in SPECIES))
    return folder
