"""Plain Python versions of what the C++ library does, written from the contracts in csrc/include/taco."""

from __future__ import annotations

import math
from collections.abc import Iterator

WORD = 2**32
ORDER, MASKS = 0x4F524452, 0x4D41534B


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second // WORD ^ c[1] ^ k[0], second % WORD, first // WORD ^ c[3] ^ k[1], first % WORD]
        k = [(k[0] + 0x9E3779B9) % WORD, (k[1] + 0xBB67AE85) % WORD]
    return tuple(c)


class Draws:
    def __init__(self, purpose: int, seed: int, epoch: int, number: int) -> None:
        self.words = self._words((seed % WORD ^ purpose, seed // WORD), epoch, number)

    @staticmethod
    def _words(key: tuple[int, int], epoch: int, number: int) -> Iterator[int]:
        block = 0
        while True:
            yield from philox4x32((block, epoch, number % WORD, number // WORD), key)
            block += 1

    def next(self) -> int:
        return next(self.words)

    def below(self, bound: int) -> int:
        product = self.next() * bound
        while product % WORD < WORD % bound:
            product = self.next() * bound
        return product // WORD


class Permutation:
    def __init__(self, seed: int, epoch: int, size: int) -> None:
        draws = Draws(ORDER, seed, epoch, size)
        self.size = size
        self.table = list(range(size)) if size <= 1024 else []
        for last in reversed(range(1, len(self.table))):
            other = draws.below(last + 1)
            self.table[last], self.table[other] = self.table[other], self.table[last]
        bits = (size - 1).bit_length()
        self.right_bits, self.left_bits = bits // 2, bits - bits // 2
        self.keys = [draws.next() + WORD * draws.next() for _ in range(8)]

    def __call__(self, position: int) -> int:
        return self.table[position] if self.table else self._walk(position, range(8))

    def inverse(self, sample: int) -> int:
        return self.table.index(sample) if self.table else self._walk(sample, range(7, -1, -1))

    def _walk(self, element: int, rounds: range) -> int:
        while True:
            left, right = divmod(element, 2**self.right_bits)
            for i in rounds:
                if i % 2 == 0:
                    left ^= self._mix(right, self.keys[i]) % 2**self.left_bits
                else:
                    right ^= self._mix(left, self.keys[i]) % 2**self.right_bits
            element = left * 2**self.right_bits + right
            if element < self.size:
                return element

    @staticmethod
    def _mix(half: int, key: int) -> int:
        return ((half ^ key) * 0x9E3779B97F4A7C15 % 2**64) >> 33


def rows_of(documents: list[list[int]], mode: str, seq_length: int) -> list[list[int]]:
    """All rows with [CLS] 2, [SEP] 3, padding 0."""
    capacity = seq_length - 2
    if mode == "stream":
        line = [token for document in documents if document for token in [*document, 3]]
        pieces = [line[i : i + capacity] for i in range(0, len(line), capacity)]
        pieces = [piece for piece in pieces if len(piece) == capacity]
    else:
        pieces = [d[i : i + capacity] for d in documents for i in range(0, len(d), capacity)]
    return [[2, *piece, 3] + [0] * (capacity - len(piece)) for piece in pieces]


def mask_row(
    row: list[int],
    *,
    seed: int,
    epoch: int,
    sample: int,
    rate: float,
    kind: str,
    mean: float,
    mask_id: int,
    special: set[int],
    continues: set[int],
    vocab_size: int,
    num_predictions: int,
) -> tuple[list[int], list[int]]:
    """The masked row and the chosen columns."""
    draws = Draws(MASKS, seed, epoch, sample)
    units = find_units(row, kind, special, continues)
    num_candidates = sum(len(unit) for unit in units)
    budget = max(1, math.floor(rate * num_candidates + 0.5)) if units else 0
    chosen: set[int] = set()
    for i in range(len(units)):
        if len(chosen) >= budget:
            break
        other = i + draws.below(len(units) - i)
        units[i], units[other] = units[other], units[i]
        if kind == "span":
            chosen |= find_span(draws, row, units[i][0], chosen, special, mean, budget)
        elif len(chosen) + len(units[i]) <= num_predictions:
            chosen |= set(units[i])
    masked = list(row)
    for column in sorted(chosen):
        word = draws.next()
        if word < 3435973837:
            masked[column] = mask_id
        elif word < 3865470566:
            ordinary = [token for token in range(vocab_size) if token not in special]
            masked[column] = ordinary[draws.below(len(ordinary))]
    return masked, sorted(chosen)


def find_units(row: list[int], kind: str, special: set[int], continues: set[int]) -> list[list[int]]:
    units: list[list[int]] = []
    for column, token in enumerate(row):
        if token in special:
            continue
        is_after_token = bool(units) and units[-1][-1] == column - 1
        if kind == "whole_word" and is_after_token and token in continues:
            units[-1].append(column)
        else:
            units.append([column])
    return units


def find_span(
    draws: Draws, row: list[int], first: int, chosen: set[int], special: set[int], mean: float, budget: int
) -> set[int]:
    if first in chosen:
        return set()
    length = 1
    while length < 10 and draws.next() < int((1 - 1 / mean) * WORD):
        length += 1
    span: set[int] = set()
    for column in range(first, min(first + length, len(row))):
        if row[column] in special or column in chosen or len(chosen) + len(span) >= budget:
            break
        span.add(column)
    return span


def sentence_rows(documents: list[list[list[int]]], seq_length: int) -> list[list[int]]:
    """Tokens of every row of mode sentence; a document is a list of sentences."""
    capacity, rows = seq_length - 2, []
    for document in documents:
        row: list[int] = []
        for sentence in document:
            if row and len(row) + len(sentence) > capacity:
                rows.append(row)
                row = []
            if len(sentence) > capacity:
                rows += [sentence[i : i + capacity] for i in range(0, len(sentence), capacity)]
            else:
                row = row + sentence
        if row:
            rows.append(row)
    return rows


def packed_rows(documents: list[list[int]], seq_length: int, window: int = 2**18) -> list[list[list[int]]]:
    """Rows of mode pack, each a list of pieces."""
    capacity = seq_length - 2
    pieces = [d[i : i + capacity] for d in documents for i in range(0, len(d), capacity)]
    return [row for first in range(0, len(pieces), window) for row in _pack(pieces[first : first + window], seq_length)]


def _pack(pieces: list[list[int]], seq_length: int) -> list[list[list[int]]]:
    rows: list[list[int]] = []
    rooms: list[int] = []
    changed: list[int] = []  # when a row came to its room
    for time, number in enumerate(sorted(range(len(pieces)), key=lambda i: -len(pieces[i]))):
        places = len(pieces[number]) + 2
        fitting = [row for row, room in enumerate(rooms) if room >= places]
        if not fitting:
            rows.append([])
            rooms.append(seq_length)
            changed.append(0)
        row = min(fitting, key=lambda row: (rooms[row], -changed[row])) if fitting else len(rows) - 1
        rows[row].append(number)
        rooms[row] -= places
        changed[row] = time
    return [[pieces[number] for number in sorted(row)] for row in rows]


def blended(seed: int, weights: list[int], num_rows: list[int], position: int) -> tuple[int, int, int]:
    """Dataset, epoch and row at a position of a blend with weights that add up to 2^20."""

    def derived(stream: int) -> int:
        draws = Draws(0x424C4E44, seed, 0, stream)
        return draws.next() + WORD * draws.next()

    period, place = divmod(position, 2**20)
    share, dataset = Permutation(derived(0), period, 2**20)(place), 0
    while share >= weights[dataset]:
        share -= weights[dataset]
        dataset += 1
    epoch, row = divmod(period * weights[dataset] + share, num_rows[dataset])
    return dataset, epoch, Permutation(derived(dataset + 1), epoch, num_rows[dataset])(row)
