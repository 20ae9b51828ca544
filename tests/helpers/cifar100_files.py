"""Made-up images in the files of CIFAR-100 for Python, with its classes, keys and form."""

from pathlib import Path

import numpy as np

from helpers.python2_pickles import write_python2_pickle

SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
"""The classes of each superclass (Krizhevsky 2009)."""

NAMES = sorted(name for names in SUPERCLASSES.values() for name in names.split())
"""The 100 classes, in the order of their labels."""


def write_cifar100(folder: Path, train: int = 5, test: int = 2, seed: int = 0) -> None:
    """Write the three files, with this many images of each class in training and test file.

    The red corner of an image is the number of its class, and the green one its number in the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)
    coarse = {
        name: number for number, names in enumerate(SUPERCLASSES.values()) for name in names.split()
    }
    for part, per_class in (("train", train), ("test", test)):
        labels = np.tile(np.arange(100), per_class)
        random.shuffle(labels)
        images = random.randint(0, 256, (len(labels), 3, 32, 32), np.uint8)
        images[:, 0, 0, 0], images[:, 1, 0, 0] = labels, np.arange(len(labels)) % 256
        content = {
            "filenames": [f"image_s_{number:06d}.png" for number in range(len(labels))],
            "batch_label": f"{part}ing batch 1 of 1",
            "fine_labels": labels.tolist(),
            "coarse_labels": [coarse[NAMES[label]] for label in labels],
            "data": images.reshape(len(labels), 3072),
        }
        write_python2_pickle(folder / part, content)
    names = {"fine_label_names": NAMES, "coarse_label_names": list(SUPERCLASSES)}
    write_python2_pickle(folder / "meta", names)
