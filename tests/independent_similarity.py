"""WhoWhatBench's text metrics, written from their definitions alone: NumPy, nothing of ovexport, nothing of difflib."""

from collections.abc import Callable, Sequence

import numpy as np

Tokens = Sequence[int]
Pair = tuple[Tokens, Tokens]
Block = tuple[int, int, int]

POPULAR_FROM_LENGTH = 200


def popular_elements(tokens: Tokens) -> set[int]:
    """The elements that start no match: those of a long sequence that occur more often than 1 % of its length + 1."""
    if len(tokens) < POPULAR_FROM_LENGTH:
        return set()
    values, counts = np.unique(np.asarray(tokens), return_counts=True)
    return set(values[counts > len(tokens) // 100 + 1].tolist())


def run_lengths(equal: np.ndarray) -> np.ndarray:
    """How many cells in a row, down the diagonal and up to each cell, are true; (rows, columns) as `equal`."""
    runs = np.zeros((equal.shape[0] + 1, equal.shape[1] + 1), np.int64)
    for row, cells in enumerate(equal):
        runs[row + 1, 1:] = np.where(cells, runs[row, :-1] + 1, 0)
    return runs[1:, 1:]


def matching_blocks(reference: Tokens, candidate: Tokens) -> list[Block]:
    """The blocks (start in reference, start in candidate, size) that `difflib` documents, without its closing one.

    The longest block is found first, of equally long ones the leftmost in the reference, then in the candidate; then
    the same to its left and to its right. Blocks that touch on both sides become one.
    """
    if not len(reference) or not len(candidate):
        return []
    equal = np.asarray(reference)[:, None] == np.asarray(candidate)[None, :]
    runs = run_lengths(equal & ~np.isin(candidate, list(popular_elements(candidate))))
    found, windows = [], [(0, len(reference), 0, len(candidate))]
    while windows:
        top, bottom, left, right = windows.pop()
        row, column, size = longest_block(equal[top:bottom, left:right], runs[top:bottom, left:right])
        if not size:
            continue
        row, column = row + top, column + left
        found.append((row, column, size))
        windows += [(top, row, left, column), (row + size, bottom, column + size, right)]
    return joined(sorted(found))


def longest_block(equal: np.ndarray, runs: np.ndarray) -> Block:
    """The longest block of a window, lengthened on both sides by equal elements whatever their frequency.

    Args:
        equal: which elements are the same, (reference, candidate).
        runs: lengths of the runs that end in each cell, counted without the popular elements and from the start of the
            whole sequences; a run that enters the window from outside counts from the border.
    """
    if not equal.size:
        return 0, 0, 0
    rows, columns = (np.arange(1, length + 1) for length in equal.shape)
    inside = np.minimum(runs, np.minimum(rows[:, None], columns[None, :]))
    last_row, last_column = np.unravel_index(np.argmax(inside), inside.shape)
    size = int(inside[last_row, last_column])
    # Where no unpopular element matches, the empty block at the window's corner is what is lengthened.
    row, column = (int(last_row) + 1 - size, int(last_column) + 1 - size) if size else (0, 0)
    while row and column and equal[row - 1, column - 1]:
        row, column, size = row - 1, column - 1, size + 1
    while row + size < equal.shape[0] and column + size < equal.shape[1] and equal[row + size, column + size]:
        size += 1
    return row, column, size


def joined(blocks: Sequence[Block]) -> list[Block]:
    """The same blocks in order, those that touch in both sequences made one."""
    whole: list[Block] = []
    for block in blocks:
        row, column, size = whole[-1] if whole else (0, 0, 0)
        if size and (row + size, column + size) == block[:2]:
            whole[-1] = (row, column, size + block[2])
        else:
            whole.append(block)
    return whole


def divergent_tokens(reference: Tokens, candidate: Tokens) -> tuple[int, int, float]:
    """FDT, SDT and SDT norm of one question."""
    if not len(reference) and not len(candidate):
        return 0, 0, 0.0
    if not len(reference) or not len(candidate):
        return 0, len(reference) + len(candidate), 1.0
    blocks = matching_blocks(reference, candidate)
    first = blocks[0][2] if blocks and blocks[0][:2] == (0, 0) else 0
    different = len(candidate) - sum(size for _, _, size in blocks)
    return first, different, different / len(candidate)


def counted(tokens: Tokens) -> Tokens:
    """The tokens as WhoWhatBench counts them: a text of one token becomes a plain number there, and 0 is taken for
    nothing."""
    return [] if len(tokens) == 1 and not tokens[0] else tokens


def metrics(pairs: Sequence[Pair], cosines: Sequence[float]) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Every figure of each question and of all of them.

    Args:
        pairs: the tokens of reference and candidate, one pair per question, at least one.
        cosines: of the two texts' embeddings, one per question.

    Returns:
        Per question and in aggregate: similarity, fdt, fdt_norm, sdt, sdt_norm. `fdt_norm` is NaN where every
        reference is empty.

    Raises:
        ValueError: there is no pair, or there are more pairs than cosines or fewer.
    """
    if not pairs or len(pairs) != len(cosines):
        raise ValueError(f"{len(pairs)} pairs and {len(cosines)} cosines; give as many of each, and at least one")
    counts = [(counted(reference), counted(candidate)) for reference, candidate in pairs]
    reference_length = np.float64(np.mean([len(reference) for reference, _ in counts]))
    questions = []
    for (reference, candidate), cosine in zip(counts, cosines, strict=True):
        first, different, share = divergent_tokens(reference, candidate)
        fdt_norm = first / reference_length if reference_length else np.nan
        figures = {"similarity": cosine, "fdt": first, "fdt_norm": fdt_norm, "sdt": different, "sdt_norm": share}
        questions.append({name: float(value) for name, value in figures.items()})
    total = {name: float(np.mean([question[name] for question in questions])) for name in questions[0]}
    total["fdt_norm"] = float(total["fdt"] / reference_length) if reference_length else float("nan")
    return questions, total


def random_pairs(seed: int, count: int = 500) -> list[Pair]:
    """Pairs of every kind in KINDS by turns, drawn from a seed."""
    generator = np.random.default_rng(seed)
    kinds = list(KINDS.values())
    return [kinds[number % len(kinds)](generator) for number in range(count)]


def drawn(generator: np.random.Generator, shortest: int, longest: int, symbols: int) -> list[int]:
    """Random tokens, between `shortest` and `longest` of them."""
    return [int(token) for token in generator.integers(0, symbols, generator.integers(shortest, longest + 1))]


def edited(generator: np.random.Generator, tokens: list[int], edits: str, symbols: int) -> list[int]:
    """The tokens after one edit per letter: i inserts up to five tokens, d deletes as many, s replaces one."""
    changed = list(tokens)
    for edit in edits:
        at = int(generator.integers(0, len(changed) + 1))
        removed = {"i": 0, "s": 1, "d": int(generator.integers(1, 6))}[edit]
        added = {"i": int(generator.integers(1, 6)), "s": 1, "d": 0}[edit]
        changed[at : at + removed] = generator.integers(0, symbols, added).tolist()
    return changed


def variant(shortest: int, longest: int, symbols: int, edits: str) -> Callable[[np.random.Generator], Pair]:
    """A kind of pair: random tokens and the same after edits."""

    def pair(generator: np.random.Generator) -> Pair:
        reference = drawn(generator, shortest, longest, symbols)
        return reference, edited(generator, reference, edits, symbols)

    return pair


def unrelated(first: tuple[int, int, int], second: tuple[int, int, int]) -> Callable[[np.random.Generator], Pair]:
    """A kind of pair: two drawings, each given by its least and greatest length and its number of symbols."""
    return lambda generator: (drawn(generator, *first), drawn(generator, *second))


def disjoint(generator: np.random.Generator) -> Pair:
    """No token in common."""
    return drawn(generator, 1, 150, 50), [50 + token for token in drawn(generator, 1, 150, 50)]


def shared_prefix(generator: np.random.Generator) -> Pair:
    """The same beginning, different endings."""
    prefix = drawn(generator, 1, 100, 1000)
    return prefix + drawn(generator, 0, 60, 1000), prefix + drawn(generator, 0, 60, 1000)


def prefix_of_the_other(generator: np.random.Generator) -> Pair:
    """One answer stops where the other goes on, whichever it is."""
    longer = drawn(generator, 2, 150, 1000)
    shorter = longer[: int(generator.integers(1, len(longer)))]
    return (longer, shorter) if generator.random() < 0.5 else (shorter, longer)


def moved(generator: np.random.Generator) -> Pair:
    """Two parts that change places, so that the longest block hides an earlier shorter one."""
    first, second = drawn(generator, 1, 60, 300), drawn(generator, 1, 60, 300)
    return first + second, second + first


def repeated(generator: np.random.Generator) -> Pair:
    """The first token comes again before the part that is the same, so that the common prefix is no first block."""
    same = drawn(generator, 3, 60, 300)
    return [same[0], 300, *same], same


def looping(generator: np.random.Generator) -> Pair:
    """A phrase over and over, another number of times on each side, up to lengths at which tokens become popular."""
    phrase = drawn(generator, 1, 8, 1000)
    return phrase * int(generator.integers(1, 60)), phrase * int(generator.integers(1, 60))


KINDS: dict[str, Callable[[np.random.Generator], Pair]] = {
    "both empty": lambda _: ([], []),
    "empty reference": lambda generator: ([], drawn(generator, 1, 60, 1000)),
    "empty candidate": lambda generator: (drawn(generator, 2, 60, 1000), []),
    "one token against none": lambda generator: (drawn(generator, 1, 1, 1000), []),
    "token 0 alone": lambda generator: ([0], drawn(generator, 0, 3, 2)),
    "against token 0 alone": lambda generator: (drawn(generator, 0, 3, 2), [0]),
    "identical": variant(1, 150, 1000, ""),
    "identical and long": variant(200, 400, 5, ""),
    "one token each": unrelated((1, 1, 2), (1, 1, 2)),
    "one token against many": unrelated((1, 1, 20), (1, 60, 20)),
    "many against one token": unrelated((1, 60, 20), (1, 1, 20)),
    "disjoint": disjoint,
    "unrelated, few symbols": unrelated((1, 80, 3), (1, 80, 3)),
    "unrelated, many symbols": unrelated((1, 150, 200), (1, 150, 200)),
    "shared prefix": shared_prefix,
    "prefix of the other": prefix_of_the_other,
    "insertion": variant(1, 150, 1000, "i"),
    "deletion": variant(10, 150, 1000, "d"),
    "substitution": variant(1, 150, 1000, "s"),
    "many edits": variant(20, 150, 200, "sidsidsid"),
    "moved": moved,
    "repeated": repeated,
    "looping": looping,
    "at the border of long": variant(199, 201, 30, "s"),
    "long, all popular": variant(200, 350, 8, "sid"),
    "long, some popular": variant(200, 400, 120, "sidsid"),
    "long, unrelated": unrelated((150, 300, 90), (200, 350, 90)),
}
