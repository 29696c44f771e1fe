"""The shuffle is as random as numpy's: the same statistics, and bounds that bad shuffles break."""

import itertools
import json

import numpy as np
import pytest

from franca.data.shuffle import ShuffleConfig, shuffle

FILES, ROWS, CHUNKS = 4, 5000, 8
NUM_ROWS = FILES * ROWS
SEEDS = range(1, 9)
EQUAL = [[NUM_ROWS // CHUNKS] * CHUNKS] * len(SEEDS)


def table(order, sizes):
    """Chi-square of (file, tenth of the file) x (chunk, tenth of the chunk), over its degrees of freedom."""
    sources = order // (ROWS // 10)
    targets = np.concatenate([10 * chunk + np.arange(size) * 10 // size for chunk, size in enumerate(sizes)])
    found = np.zeros((10 * FILES, 10 * len(sizes)))
    np.add.at(found, (sources, targets), 1)
    expected = np.outer(found.sum(1), found.sum(0)) / NUM_ROWS
    return float(((found - expected) ** 2 / expected).sum() / ((found.shape[0] - 1) * (found.shape[1] - 1)))


def neighbours(order):
    """How many neighbours of the input are neighbours of the output: about 2 by chance, whatever the number of rows."""
    return int(np.count_nonzero(np.abs(np.diff(order)) == 1))


def distance(order):
    """The mean distance in the input of neighbours in the output, of NUM_ROWS / 3 by chance."""
    return float(np.abs(np.diff(order)).mean() / (NUM_ROWS / 3))


def statistics(orders, sizes):
    """Mean table, sum of neighbours, mean distance of some orders."""
    tables = [table(order, size) for order, size in zip(orders, sizes, strict=True)]
    return np.array([np.mean(tables), sum(map(neighbours, orders)), np.mean(list(map(distance, orders)))])


@pytest.fixture(scope="module")
def chance():
    """Lowest and highest of the statistics in 100 rounds of numpy's own permutations, as many in a round as SEEDS."""
    rng = np.random.default_rng(0)
    rounds = np.array([statistics([rng.permutation(NUM_ROWS) for _ in SEEDS], EQUAL) for _ in range(100)])
    spread = rounds.max(0) - rounds.min(0)
    return rounds.min(0) - spread / 4, rounds.max(0) + spread / 4


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    """Of every seed the order of 20,000 rows, numbered through the files, and the sizes of the chunks."""
    folder = tmp_path_factory.mktemp("uniform")
    (folder / "in").mkdir()
    for file in range(FILES):
        lines = (json.dumps({"row": file * ROWS + row}) + "\n" for row in range(ROWS))
        (folder / "in" / f"{file}.jsonl").write_text("".join(lines))
    found = []
    for seed in SEEDS:
        places = {"final_dir": str(folder / f"out{seed}"), "tmp_dir": str(folder / "tmp"), "paths": (str(folder / "in" / "*"),)}
        final = shuffle(ShuffleConfig(name="x", memory=1_000_000, num_chunks=CHUNKS, validation_share=0.0, seed=seed, **places))
        chunks = [path.read_text().splitlines() for path in sorted(final.glob("*.jsonl"))]
        rows = [json.loads(line)["row"] for line in itertools.chain.from_iterable(chunks)]
        assert sorted(rows) == list(range(NUM_ROWS))
        found.append((np.array(rows), list(map(len, chunks))))
    return found


def test_the_order_looks_like_numpys(orders, chance):
    low, high = chance
    found = statistics(*zip(*orders, strict=True))
    assert (found > low).all(), f"{found}, by chance from {low} to {high}"
    assert (found < high).all(), f"{found}, by chance from {low} to {high}"


def test_chunks_have_the_sizes_of_chance(orders):
    sizes = np.array([size for _, size in orders])
    chi = ((sizes - NUM_ROWS / CHUNKS) ** 2 / (NUM_ROWS / CHUNKS)).sum()
    assert 24.7 < chi < 105.2, f"seeds {SEEDS}"  # 56 degrees of freedom: one in ten thousand on either side
    assert len({tuple(size) for size in sizes.tolist()}) == len(SEEDS)


def test_seeds_are_independent(orders):
    ranks = np.array([np.argsort(order) for order, _ in orders])
    correlations = np.corrcoef(ranks)[np.triu_indices(len(SEEDS), 1)]
    assert np.abs(correlations).max() < 4.5 / NUM_ROWS**0.5  # standard deviations, of 28 pairs


def within_chunks(rng):
    return np.concatenate([rng.permutation(part) for part in np.split(np.arange(NUM_ROWS), CHUNKS)])


def within_files_then_dealt(rng):
    """Each file shuffled, and then one row of every file in turn."""
    return np.stack([rng.permutation(ROWS) + file * ROWS for file in range(FILES)], axis=1).ravel()


def blocks_of_two(rng):
    return (2 * rng.permutation(NUM_ROWS // 2)[:, None] + np.arange(2)).ravel()


def a_buffer(rng):
    """A buffer of a quarter of all rows, from which a random one is replaced by the next, as data loaders shuffle."""
    size = NUM_ROWS // 4
    buffer, out = list(range(size)), []
    for row, place in enumerate(rng.integers(size, size=NUM_ROWS - size), size):
        out.append(buffer[place])
        buffer[place] = row
    return np.array([*out, *rng.permutation(buffer)])


def sorted_chunks(rng):
    """Every row in a random chunk, and the chunks as they were filled."""
    return np.sort(rng.permutation(NUM_ROWS).reshape(CHUNKS, -1), axis=1).ravel()


@pytest.mark.parametrize("bad", [within_chunks, within_files_then_dealt, blocks_of_two, a_buffer, sorted_chunks])
def test_a_bad_shuffle_is_found_out(chance, bad):
    low, high = chance
    rng = np.random.default_rng(1)
    found = statistics([bad(rng) for _ in SEEDS], EQUAL)
    assert ((found < low) | (found > high)).any(), f"{bad.__name__}: {found}, by chance from {low} to {high}"
