"""Rounded weights that wait on disk: a budget rounds each layer in every format that it may get, and a start takes the
one that was chosen."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ovexport.compress.successive import Grid
from ovexport.weights.layer import LayerFormat


class Roundings:
    """Codes and grids by layer and format, one byte for each weight, in files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[LayerFormat, Path] = {}

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._files)

    def keep(self, layer: LayerFormat, values: Tensor, grid: Grid) -> None:
        """Write what a layer was rounded to.

        Args:
            values: (output, input) float32, on the grid.
        """
        codes = (values / grid.spread(grid.step)).round() + grid.spread(grid.zero_point) - grid.lowest
        tensors = {"codes": codes.to(torch.uint8), "step": grid.step, "zero_point": grid.zero_point}
        path = self._folder / f"{len(self._files)}.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
        self._files[layer] = path

    def take(self, layer: LayerFormat, grid: Grid) -> tuple[Tensor, Grid] | None:
        """The values that a layer was rounded to, (output, input) float32 on the CPU, and their grid; None where it was
        not rounded in this format.

        Args:
            grid: of the layer before it was rounded.
        """
        if layer not in self._files:
            return None
        tensors = load_file(self._files[layer])
        grid = Grid(tensors["step"], tensors["zero_point"], grid.lowest, grid.highest, grid.group_size)
        codes = tensors["codes"].float() + grid.lowest
        return (codes - grid.spread(grid.zero_point)) * grid.spread(grid.step), grid
