"""Rounding one entry after the other, each on a target that makes up for the errors of those before it.

With the second moments of a layer's inputs and of the slopes at its outputs (see moments), the cost of an error
E = W - Q, (output, input), is tr(H_O · E · H_I · Eᵀ). Each of the two matrices is Mᵀ·D·M, with M lower triangular and 1
on its diagonal, so the cost is a weighted sum of squares of

    Ẽ = M_O · E · M_Iᵀ

whose entry (row, column) holds the error of that entry, plus known multiples of the errors above it and left of it. So
each entry is rounded from W plus the sum of those. Rows and columns come in falling order of their energy: what matters
most is rounded while there is most left to make up for it. With M_O the identity this is GPTQ.

An entry depends on those above and left of it, so all tiles on an anti-diagonal can be done at once, and within tiles
all entries on one; what goes from tile to tile is products of matrices.

Afterwards the steps of small groups are fitted to the codes (`fitted_steps`), and single codes are moved by one where
that lowers the cost (`exchange`).

Sources: Frantar et al., arXiv:2210.17323 (GPTQ); Tseng, Sun and De Sa, arXiv:2505.22988 (both sides). The factor
without an inverse, the tiles, the exchange and the fit are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ovexport.compress.moments import Moments
from ovexport.errors import UnsupportedModelError
from ovexport.weights.quantizer import LARGEST_STEP, TunableQuantizer

INPUT_DAMPING = 0.01
OUTPUT_DAMPING = 0.03
"""What is added to the diagonals, in units of their means."""
TILE = 32
BLOCK_ELEMENTS = 2**24
_FITS = 3
_LARGEST_FITTED_GROUP = 32
"""Steps of larger groups are not fitted: that took 25 % off the cost with groups of 4, 2 % with 32 and 0.6 % with 64,
in four times the time."""
_FIT_SHARE = 0.7
LONGEST_EXCHANGE = 100
_EXCHANGE_PRODUCTS = 1e11


@dataclass(frozen=True, slots=True)
class Side:
    """One side's second moments, damped, and what rounding needs of them.

    Attributes:
        moments: (size, size) float32.
        order: of the indices, by falling energy, (size,).
        factor: M, lower triangular with 1 on its diagonal, in that order: Mᵀ·D·M are the moments.
    """

    moments: Tensor
    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, moments: Tensor, damping: float, name: str) -> "Side":
        """The side of second moments; the damping is raised until they can be factored.

        Args:
            name: of the layer, for the error.

        Raises:
            UnsupportedModelError: they are not finite, or hold next to nothing.
        """
        if not torch.isfinite(moments).all():
            raise UnsupportedModelError(
                f"{name}: its inputs or slopes are not finite on the calibration text; set compress.rounding = "
                '"nearest", without a budget'
            )
        order = moments.diagonal().argsort(descending=True, stable=True)
        identity = torch.eye(len(moments), device=moments.device)
        energy = moments.diagonal().mean()
        while damping <= 1:
            damped = moments + (damping * energy + 1e-30) * identity
            backwards = order.flip(0)
            lower, failed = torch.linalg.cholesky_ex(damped[backwards][:, backwards])
            if not failed:
                upper = lower.flip(0, 1)
                return cls(damped, order, (upper / upper.diagonal()).T.contiguous())
            damping *= 10
        raise UnsupportedModelError(
            f'{name}: its inputs hardly vary on the calibration text; set compress.rounding = "nearest", without a '
            "budget"
        )

    def targets(self, weight: Tensor, values: Tensor) -> Tensor:
        """What the entries of a weight were rounded from by this side alone, (output, input).

        Args:
            values: the rounded weight.
        """
        errors = (weight - values)[:, self.order]
        result = torch.empty_like(weight)
        result[:, self.order] = weight[:, self.order] + errors @ self.factor.tril(-1).T
        return result


@dataclass(frozen=True, slots=True)
class Curvature:
    """What an error of a layer's weights costs.

    Attributes:
        inputs: the side of what the layer reads.
        outputs: the side of the slopes at its outputs; None where every output counts alike.
    """

    inputs: Side
    outputs: Side | None

    @classmethod
    def of(cls, moments: Moments, name: str) -> "Curvature":
        """The curvature that a text shows.

        Raises:
            UnsupportedModelError: as Side.of.
        """
        outputs = None if moments.outputs is None else Side.of(moments.outputs, OUTPUT_DAMPING, name)
        return cls(Side.of(moments.inputs, INPUT_DAMPING, name), outputs)

    @property
    def damped(self) -> Moments:
        """The moments that rounding works with."""
        return Moments(self.inputs.moments, None if self.outputs is None else self.outputs.moments)

    def slope_of_entries(self, row: Tensor, column: Tensor, values: Tensor, rows: int) -> Tensor:
        """`Moments.slope` of an error that is 0 but for some entries, one in a row at most.

        Args:
            row, column, values: of the entries, (entries,).
            rows: of the error.
        """
        weighted = values[:, None] * self.inputs.moments[column]
        if self.outputs is None:
            return weighted.new_zeros(rows, weighted.shape[1]).index_copy_(0, row, weighted)
        return self.outputs.moments[:, row] @ weighted

    @property
    def diagonal(self) -> Tensor:
        """What a change of single entries costs, (output or 1, input)."""
        inputs = self.inputs.moments.diagonal()
        return inputs[None] if self.outputs is None else torch.outer(self.outputs.moments.diagonal(), inputs)


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that entries can take: (code - zero_point) · step, for codes from `lowest` to `highest`.

    Attributes:
        step, zero_point: (output, groups, 1) float32.
        group_size: entries of a row that share both.
    """

    step: Tensor
    zero_point: Tensor
    lowest: int
    highest: int
    group_size: int

    @classmethod
    def of(cls, quantizer: TunableQuantizer) -> "Grid":
        """A quantizer's present grid."""
        step, zero_point = quantizer.grid()
        return cls(step, zero_point, quantizer.level_low, quantizer.level_high, quantizer.layer.group_size)

    def to(self, device: torch.device) -> "Grid":
        """The grid on a device."""
        return replace(self, step=self.step.to(device), zero_point=self.zero_point.to(device))

    def with_steps(self, step: Tensor) -> "Grid":
        """The grid with other steps, (output, groups, 1), on the float16 values that scales are stored in."""
        stored = step.clamp(-LARGEST_STEP, LARGEST_STEP).half().float()
        return replace(self, step=torch.where(stored == 0, self.step, stored))

    def rows(self, rows: slice) -> "Grid":
        """The grid of some rows."""
        return replace(self, step=self.step[rows], zero_point=self.zero_point[rows])

    def spread(self, values: Tensor) -> Tensor:
        """Values of groups, (output, groups, 1), for each entry, (output, input)."""
        return values.expand(-1, -1, self.group_size).flatten(1)


def round_successively(weight: Tensor, grid: Grid, curvature: Curvature) -> Tensor:
    """The values of the grid, (output, input) float32, that entry after entry make up for the errors before.

    Args:
        weight: (output, input).
    """
    columns = curvature.inputs
    rows = curvature.outputs
    chosen = columns.order if rows is None else (rows.order[:, None], columns.order[None])
    pick = (slice(None), columns.order) if rows is None else chosen
    ordered = _Entries(
        weight.float()[pick],
        grid.spread(grid.step)[pick],
        grid.spread(grid.zero_point)[pick],
        grid.lowest,
        grid.highest,
    )
    if rows is None:
        rounded = _round_columns(ordered, columns.factor)
    else:
        rounded = _round_tiles(ordered, rows.factor, columns.factor)
    result = torch.empty_like(rounded)
    result[pick] = rounded
    return result


def refined(weight: Tensor, grid: Grid, curvature: Curvature) -> tuple[Tensor, Grid]:
    """Round successively; of small groups, fit the steps to the codes and round again, as long as the cost falls; then
    exchange codes. Where rows do not hang together, a block of them is done at a time.

    Args:
        weight: (output, input).

    Returns:
        The rounded values, (output, input) float32, and the grid that they are on.
    """
    height = len(weight) if curvature.outputs is not None else max(1, BLOCK_ELEMENTS // weight.shape[1])
    blocks = [slice(begin, begin + height) for begin in range(0, len(weight), height)]
    done = [_refined(weight[rows], grid.rows(rows), curvature) for rows in blocks]
    step = torch.cat([block.step for _, block in done])
    return torch.cat([values for values, _ in done]), replace(grid, step=step)


def _refined(weight: Tensor, grid: Grid, curvature: Curvature) -> tuple[Tensor, Grid]:
    values = round_successively(weight, grid, curvature)
    cost = curvature.damped.cost(weight - values)
    fitted, fitted_values = grid, values
    for _ in range(_FITS if grid.group_size <= _LARGEST_FITTED_GROUP else 0):
        fitted = fitted_steps(weight, fitted_values, fitted, curvature)
        fitted_values = round_successively(weight, fitted, curvature)
        fitted_cost = curvature.damped.cost(weight - fitted_values)
        if fitted_cost < cost:
            values, grid, cost = fitted_values, fitted, fitted_cost
    return exchange(weight, values, grid, curvature), grid


def fitted_steps(weight: Tensor, values: Tensor, grid: Grid, curvature: Curvature) -> Grid:
    """The grid with each step moved towards the one that costs least with the codes as they are.

    A step is fitted with the others as they are, all rows at once, which hang together: so it takes a share of its way.

    Args:
        values: the rounded weight, (output, input).
    """
    size = grid.group_size
    codes = (values.reshape(*grid.step.shape[:2], size) / grid.step).round()
    inputs = curvature.inputs.moments
    rows = 1 if curvature.outputs is None else curvature.outputs.moments.diagonal()
    step, error = grid.step.clone(), weight - values
    for group in range(step.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        own = codes[:, group]
        curve = rows * ((own @ inputs[columns, columns]) * own).sum(-1)
        slope = error @ inputs[:, columns]
        if curvature.outputs is not None:
            slope = curvature.outputs.moments @ slope
        change = _FIT_SHARE * (slope * own).sum(-1) / curve.clamp_min(1e-30)
        step[:, group, 0] += change
        error[:, columns] -= change[:, None] * own
    return grid.with_steps(torch.where(step * grid.step > 0, step, grid.step))


def exchange(weight: Tensor, values: Tensor, grid: Grid, curvature: Curvature) -> Tensor:
    """The rounded values with single codes moved by one, in rounds, while that lowers the cost.

    In a round, the codes that move are those whose gain is the largest of their row, and of their column where rows
    hang together, so that they hardly get in each other's way. The number of rounds is bounded by the arithmetic that
    they take.

    Args:
        values: the rounded weight, (output, input), on the grid.
    """
    step, zero_point = grid.spread(grid.step), grid.spread(grid.zero_point)
    codes = (values / step).round() + zero_point
    curve = step.square() * curvature.diagonal / 2
    slope = curvature.damped.slope(weight - values) * step
    least, most = _allowed_slopes(codes, grid)
    gain = torch.empty_like(slope)
    out_features, in_features = weight.shape
    products = out_features * in_features * min(out_features, in_features)
    for _ in range(min(LONGEST_EXCHANGE, max(1, int(_EXCHANGE_PRODUCTS / products)))):
        torch.clamp(slope, least, most, out=gain).abs_().sub_(curve)
        of_row, at = gain.max(1)
        moves = of_row > 0
        if curvature.outputs is not None:
            moves &= of_row == gain.amax(0)[at]
        row = moves.nonzero()[:, 0]
        if not len(row):
            break
        column = at[row]
        change = torch.where(slope[row, column] >= 0, 1.0, -1.0)
        codes[row, column] += change
        least[row, column], most[row, column] = _allowed_slopes(codes[row, column], grid)
        slope -= curvature.slope_of_entries(row, column, change * step[row, column], len(weight)).mul_(step)
    return (codes - zero_point) * step


def _allowed_slopes(codes: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Between which slopes a code may follow its slope: none that leads out of the grid, for codes at its ends."""
    nothing, any_slope = codes.new_zeros(()), codes.new_full((), torch.inf)
    least = torch.where(codes <= grid.lowest, nothing, -any_slope)
    return least, torch.where(codes >= grid.highest, nothing, any_slope)


@dataclass(frozen=True, slots=True)
class _Entries:
    """Entries that are to be rounded, and the grid of each: weight, step and zero point have one shape."""

    weight: Tensor
    step: Tensor
    zero_point: Tensor
    lowest: int
    highest: int

    def __getitem__(self, index: Any) -> "_Entries":
        return _Entries(self.weight[index], self.step[index], self.zero_point[index], self.lowest, self.highest)

    def diagonal(self, offset: int) -> "_Entries":
        """The entries on a diagonal of tiles, (tiles, entries)."""
        parts = (self.weight, self.step, self.zero_point)
        weight, step, zero_point = (part.diagonal(offset, 1, 2) for part in parts)
        return _Entries(weight, step, zero_point, self.lowest, self.highest)

    def mirrored(self) -> "_Entries":
        """The entries of tiles with the columns turned around."""
        weight, step, zero_point = (part.flip(2) for part in (self.weight, self.step, self.zero_point))
        return _Entries(weight, step, zero_point, self.lowest, self.highest)

    def nearest(self, target: Tensor) -> Tensor:
        """The value of each entry's grid next to its target."""
        codes = (target / self.step).round_().add_(self.zero_point).clamp_(self.lowest, self.highest)
        return codes.sub_(self.zero_point).mul_(self.step)


def _round_columns(entries: _Entries, factor: Tensor) -> Tensor:
    """The rounded values, one column after the other, all rows at once; everything in the order of rounding."""
    weight = entries.weight
    values, errors = torch.empty_like(weight), torch.zeros_like(weight)
    for begin in range(0, weight.shape[1], TILE):
        end = min(begin + TILE, weight.shape[1])
        carried = errors[:, :begin] @ factor[begin:end, :begin].T
        for column in range(begin, end):
            target = weight[:, column] + carried[:, column - begin]
            target += errors[:, begin:column] @ factor[column, begin:column]
            values[:, column] = entries[:, column].nearest(target)
            errors[:, column] = weight[:, column] - values[:, column]
    return values


def _round_tiles(entries: _Entries, rows: Tensor, columns: Tensor) -> Tensor:
    """The rounded values, tiles on an anti-diagonal at once; everything in the order of rounding.

    Tiles at the lower and right edge are filled up with entries that are 0 and stay 0.

    Args:
        rows, columns: the factors of the two sides.
    """
    shape = entries.weight.shape
    high, wide = (-(-size // TILE) for size in shape)
    filled = _Entries(
        _filled(entries.weight), _filled(entries.step, 1), _filled(entries.zero_point), entries.lowest, entries.highest
    )
    rows, columns = _filled(rows).tril(-1), _filled(columns).tril(-1)
    errors, carried = torch.zeros_like(filled.weight), torch.zeros_like(filled.weight)  # E, and M_O·E
    for diagonal in range(high + wide - 1):
        tiles = _Tiles(
            [(row, diagonal - row) for row in range(max(0, diagonal - wide + 1), min(high, diagonal + 1))],
        )
        inside = _Entries(
            tiles.of(filled.weight), tiles.of(filled.step), tiles.of(filled.zero_point), filled.lowest, filled.highest
        )
        target = inside.weight + tiles.products(
            lambda row, column: rows[row, : row.start] @ errors[: row.start, column]
        )
        along = tiles.products(lambda row, column: carried[row, : column.start] @ columns[column, : column.start].T)
        own_rows = tiles.products(lambda row, _: rows[row, row])
        own_columns = tiles.products(lambda _, column: columns[column, column])
        found = _round_inside(inside, target, along, own_rows, own_columns)
        tiles.put(errors, found[0])
        tiles.put(carried, found[1])
    return (filled.weight - errors)[: shape[0], : shape[1]]


def _round_inside(
    entries: _Entries, target: Tensor, along: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Round tiles that do not depend on each other, (tiles, rows, columns), entries on an anti-diagonal at once.

    Columns are turned around, which makes an anti-diagonal a diagonal, and that is a view: no entry is copied to get at
    it.

    Args:
        target: the weights, and the multiples of the errors in the tiles above.
        along: what the tiles to the left add.
        rows, columns: the factors within the tiles.

    Returns:
        Their errors E, and M_O·E.
    """
    mirrored = entries.mirrored()
    target, along, columns = target.flip(2), along.flip(2), columns.flip((1, 2))
    errors, carried = torch.zeros_like(target).transpose(1, 2), torch.zeros_like(target)  # errors by column, then row
    for diagonal in range(2 * TILE - 1):
        offset = TILE - 1 - diagonal
        row = slice(max(0, -offset), TILE - max(0, offset))
        column = slice(row.start + offset, row.stop + offset)
        here = target.diagonal(offset, 1, 2) + (rows[:, row] * errors[:, column]).sum(-1)
        ahead = along.diagonal(offset, 1, 2) + (carried[:, row] * columns[:, column]).sum(-1)
        own = mirrored.diagonal(offset)
        value = own.nearest(here + ahead)
        errors.diagonal(-offset, 1, 2).copy_(own.weight - value)
        carried.diagonal(offset, 1, 2).copy_(here - value)
    return errors.transpose(1, 2).flip(2), carried.flip(2)


class _Tiles:
    """Tiles of a matrix, by the row and column of each among the tiles."""

    def __init__(self, places: list[tuple[int, int]]) -> None:
        self._spans = [(_span(row), _span(column)) for row, column in places]

    def of(self, matrix: Tensor) -> Tensor:
        """Their entries, (tiles, rows, columns)."""
        return torch.stack([matrix[span] for span in self._spans])

    def products(self, of: Callable[[slice, slice], Tensor]) -> Tensor:
        """What a function of each tile's rows and columns gives, (tiles, rows, columns)."""
        return torch.stack([of(*span) for span in self._spans])

    def put(self, matrix: Tensor, tiles: Tensor) -> None:
        """Write tiles to a matrix."""
        for span, tile in zip(self._spans, tiles, strict=True):
            matrix[span] = tile


def _span(index: int) -> slice:
    return slice(index * TILE, (index + 1) * TILE)


def _filled(matrix: Tensor, value: float = 0.0) -> Tensor:
    """A matrix with both sides filled up to whole tiles."""
    return pad(matrix, (0, -matrix.shape[1] % TILE, 0, -matrix.shape[0] % TILE), value=value)
