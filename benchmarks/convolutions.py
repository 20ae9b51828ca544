"""Ways to convolve the images of several tasks, each with a weight of its own.

The tasks as groups of one convolution, as lightning_maml/kernels/grouped_conv.py has them; one task
after the other; and matrix products of unfolded images. With a weight that the tasks share, no
groups are needed. All ways take turns in one process, and are compared with each other first.

.venv/bin/python benchmarks/convolutions.py       # two minutes on two cores
.venv/bin/python benchmarks/convolutions.py --device cuda --dtype bfloat16 --channels last
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lightning_maml.core.precision import full_precision
from lightning_maml.kernels.grouped_conv import convolution, gradient_of_images, gradient_of_weight

FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
SIZE_OF_FILTER, PADDING = 3, 1


class Layer(NamedTuple):
    """A layer of a workload of speed.py."""

    tasks: int
    images: int
    channels: int
    filters: int
    size: int
    stride: int


LAYERS = {
    "omniglot_5w1s, second": Layer(32, 5, 64, 64, 14, 2),
    "omniglot_5w1s, fourth": Layer(32, 5, 64, 64, 4, 2),
    "omniglot_20w1s, first": Layer(16, 20, 1, 64, 28, 2),
    "omniglot_20w1s, second": Layer(16, 20, 64, 64, 14, 2),
    "omniglot_5w1s, second, queries": Layer(32, 75, 64, 64, 14, 2),
    "mini, first": Layer(4, 25, 3, 32, 84, 1),
    "mini, second, queries": Layer(4, 75, 32, 32, 42, 1),
    "mini, fourth, queries": Layer(4, 75, 32, 32, 10, 1),
}


class Case:
    """The images, weights and gradients of a layer, and the ways to compute it.

    Args:
        layer: The layer.
        device: Where to compute.
        dtype: In which numbers.
        memory_format: That of the images.
    """

    def __init__(
        self, layer: Layer, device: str, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> None:
        self.layer, stride = layer, layer.stride
        self.geometry = ((stride, stride), (PADDING, PADDING), (1, 1), 1)
        tasks, images, channels, filters, size, _ = layer
        torch.manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            x = torch.randn(shape).to(device, dtype)
            return x.contiguous(memory_format=memory_format) if len(shape) == 4 else x

        self.x = drawn(images, tasks * channels, size, size)
        self.weight = drawn(tasks, filters, channels, SIZE_OF_FILTER, SIZE_OF_FILTER)
        self.shared = self.weight[:1].expand_as(self.weight)
        self.g = drawn(*convolution(self.x, self.weight, None, self.geometry).shape)

    def ways(self) -> dict[str, dict[str, Callable[[], Tensor]]]:
        """Return for each operation its ways; the first is what the others must agree with."""
        x, weight, g, geometry = self.x, self.weight, self.g, self.geometry
        return {
            "forward": {
                "groups": lambda: convolution(x, weight, None, geometry),
                "one by one": lambda: self._one_by_one(convolution, x, weight, None),
                "unfolded": lambda: self._as_images(self._unfolded() @ self._flat(weight)),
            },
            "forward, shared weight": {
                "groups": lambda: convolution(x, self.shared.clone(), None, geometry),
                "no groups": lambda: convolution(x, self.shared, None, geometry),
            },
            "gradient of images": {
                "groups": lambda: gradient_of_images(g, x, weight, geometry),
                "one by one": lambda: self._one_by_one(gradient_of_images, g, x, weight),
            },
            "gradient of images, shared weight": {
                "groups": lambda: gradient_of_images(g, x, self.shared.clone(), geometry),
                "no groups": lambda: gradient_of_images(g, x, self.shared, geometry),
            },
            "gradient of weight": {
                "groups": lambda: gradient_of_weight(g, x, weight, geometry),
                "one by one": lambda: self._one_by_one(gradient_of_weight, g, x, weight, dim=0),
                "unfolded": lambda: self._as_weight(self._unfolded().mT @ self._pixels(g)),
            },
        }

    def _one_by_one(
        self, operation: Callable[..., Tensor], *tensors: Tensor | None, dim: int = 1
    ) -> Tensor:
        tasks = self.layer.tasks

        def of_task(tensor: Tensor | None, task: int) -> Tensor | None:
            if tensor is None:
                return None
            is_weight = tensor.ndim == 5
            return tensor[task] if is_weight else tensor.chunk(tasks, 1)[task]

        found = [
            operation(*(of_task(tensor, task) for tensor in tensors), self.geometry)
            for task in range(tasks)
        ]
        return torch.cat(found, 1) if dim == 1 else torch.stack(found)

    def _unfolded(self) -> Tensor:
        """Return what each filter sees: ``[T, B H W, C 3 3]``."""
        tasks, images, channels, _, size, stride = self.layer
        batch = self.x.reshape(images * tasks, channels, size, size)
        seen = F.unfold(batch, SIZE_OF_FILTER, padding=PADDING, stride=stride)
        by_task = seen.unflatten(0, (images, tasks)).permute(1, 0, 3, 2)
        return by_task.flatten(1, 2)

    def _pixels(self, x: Tensor) -> Tensor:
        """Return images ``[B, T C, H, W]`` as ``[T, B H W, C]``."""
        by_task = x.unflatten(1, (self.layer.tasks, -1)).permute(1, 0, 3, 4, 2)
        return by_task.flatten(1, 3)

    def _flat(self, weight: Tensor) -> Tensor:
        """Return weights ``[T, O, C, 3, 3]`` as ``[T, C 3 3, O]``."""
        return weight.flatten(2).mT

    def _as_weight(self, flat: Tensor) -> Tensor:
        """Return ``[T, C 3 3, O]`` as ``[T, O, C, 3, 3]``."""
        return flat.mT.reshape(self.weight.shape)

    def _as_images(self, pixels: Tensor) -> Tensor:
        """Return ``[T, B H W, O]`` as ``[B, T O, H, W]``."""
        images, _, height, width = self.g.shape
        by_task = pixels.unflatten(1, (images, height, width)).permute(1, 0, 4, 2, 3)
        return by_task.flatten(1, 2)


def milliseconds(run: Callable[[], Tensor], device: str, least: float = 0.05) -> float:
    """Return the time of one of the calls that fill a turn."""
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < least or not calls:
        run()
        calls += 1
        if device != "cpu":
            torch.cuda.synchronize()
    return 1e3 * passed / calls


def agree(ways: dict[str, Callable[[], Tensor]], tolerance: float) -> None:
    """Raise an error if a way gives other numbers than the first one."""
    first, *others = (run().double() for run in ways.values())
    for found in others:
        torch.testing.assert_close(
            found, first, rtol=tolerance, atol=tolerance * first.std().item()
        )


@full_precision()  # products would be in float32 and convolutions in TF32 otherwise
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--channels", default="first", choices=[*FORMATS])
    parser.add_argument("--turns", type=int, default=9)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    columns = ("groups", "no groups", "one by one", "unfolded")
    print("| layer | operation |" + "".join(f" {column}, ms |" for column in columns))
    print("|---" * (len(columns) + 2) + "|")
    for name, layer in tqdm(LAYERS.items(), desc="Layers"):
        case = Case(layer, arguments.device, dtype, FORMATS[arguments.channels])
        for operation, ways in case.ways().items():
            agree(ways, tolerance=0.1 if dtype is torch.bfloat16 else 1e-2)
            turns = {way: list[float]() for way in ways}
            for _ in range(arguments.turns):
                for way, run in ways.items():
                    turns[way].append(milliseconds(run, arguments.device))
            cells = [
                f"{statistics.median(turns[way]):.3g}" if way in turns else "" for way in columns
            ]
            tqdm.write(f"| {name} | {operation} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
