"""Which tensors, and how much of each, are worth training within a memory limit: evolution under a sum of gains.

"On-Device Training Under 256KB Memory" (Lin et al., arXiv 2206.15472, §3.2): what is trained are the biases of the last
k layers and of some layers a share r of the weights' output channels,

    max over k, layers, r of  Δacc(biases of the last k) + Σ Δacc(share r of layer i),   memory(k, layers, r) <= limit,

the gains being measured for each part alone (`sparse_update.contributions`). Alternatives of which one is taken at most
(the values of k, the shares of one layer) are a group; memory need not add up.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lowprec.errors import UsageError
from lowprec.optim.paths import matching
from lowprec.optim.sparse_update import Candidate, Selection, joint_selection

Group = Sequence[Candidate]
Memory = Callable[[Sequence[Candidate]], int]

# Shares of the output channels of a layer that the paper chooses from.
RATIOS = (1 / 8, 1 / 4, 1 / 2, 1.0)


def total_bytes(chosen: Sequence[Candidate]) -> int:
    """Memory that adds up."""
    return sum(candidate.bytes for candidate in chosen)


def evolve(
    groups: Sequence[Group],
    limit: int,
    *,
    memory: Memory = total_bytes,
    population: int = 64,
    generations: int = 50,
    mutation: float = 0.1,
    seed: int = 0,
) -> tuple[Selection, list[Candidate]]:
    """At most one candidate of each group, for the most gain within so many bytes, by evolutionary search.

    A genome names a candidate, or none, of each group. The first ones are nothing, a greedy choice by gain per byte,
    and random ones; of each generation the better half has children, genes from either parent, each drawn anew with
    some chance. A genome that does not fit loses genes at random until it does. The best of a generation stays: what is
    found is never worse than the greedy choice, and it is the same for the same seed.

    Args:
      groups: alternatives; candidates that gain nothing are never taken.
      limit: in bytes.
      memory: of a choice; it need not add up (layers share the activations that are saved for them).
      population, generations: their product is how many choices are looked at; at least 2 and 1.
      mutation: the chance of a gene to be drawn anew, besides the one gene that always is.
    Returns:
      What they select together, and which they are, in the order of the groups.
    Raises:
      UsageError: (a ValueError) if nothing at all exceeds the limit.
    """
    if population < 2 or generations < 1 or not 0 <= mutation <= 1:
        raise UsageError(
            f"evolution takes 2 genomes, a generation and a chance, not {population}, {generations} and {mutation}"
        )
    if memory([]) > limit:
        raise UsageError(f"training nothing takes {memory([]):,} bytes, the limit is {limit:,}")
    random = np.random.default_rng(seed)
    useful = [tuple(candidate for candidate in group if candidate.gain > 0) for group in groups]
    choices = np.array([len(group) + 1 for group in useful])
    chosen = lambda genome: [group[gene - 1] for group, gene in zip(useful, genome, strict=True) if gene]
    gain = lambda genome: math.fsum(candidate.gain for candidate in chosen(genome))

    def fitted(genome):
        genome = genome.copy()
        while memory(chosen(genome)) > limit:
            genome[random.choice(np.flatnonzero(genome))] = 0
        return genome

    def child(first, second):
        genome = np.where(random.random(len(choices)) < 0.5, first, second)
        drawn = random.random(len(choices)) < mutation
        drawn[random.integers(len(choices))] = True
        return fitted(np.where(drawn, random.integers(choices), genome))

    nothing = np.zeros(len(choices), int)
    if not len(choices):
        return Selection(), []
    living = [nothing, _greedy(useful, limit, memory)]
    living += [fitted(random.integers(choices)) for _ in range(population - len(living))]
    for _ in range(generations):
        parents = _distinct(sorted(living, key=gain, reverse=True))[: max(population // 2, 1)]
        pick = lambda parents=parents: parents[random.integers(len(parents))]
        living = parents + [child(pick(), pick()) for _ in range(population - len(parents))]
    best = chosen(max(living, key=gain))
    return joint_selection(best), best


def ratio_selections(
    params: Mapping[str, Any], pattern: str, ratios: Sequence[float] = RATIOS
) -> dict[str, list[Selection]]:
    """Path -> selections of the first output channels of each tensor that matches, rounded up; one a group of `evolve`.

    Raises:
      UsageError: (a ValueError) if none matches, or a ratio is not above 0 and at most 1.
    """
    if not all(0 < ratio <= 1 for ratio in ratios):
        raise UsageError(
            f"a share of the output channels lies above 0 and is at most 1, not {', '.join(map(str, ratios))}"
        )
    groups = {}
    for path, leaf in matching(params, pattern).items():
        counts = sorted({math.ceil(ratio * leaf.shape[-1]) for ratio in ratios})
        groups[path] = [Selection((), ((re.escape(path), count),)) for count in counts]
    return groups


def last_selections(paths: Sequence[str]) -> list[Selection]:
    """Of tensors in the order of the layers, biases for one: the last, the last two, … all of them; one group."""
    escaped = [re.escape(path) for path in paths]
    return [Selection(tuple(escaped[-count:])) for count in range(1, len(paths) + 1)]


def _greedy(groups, limit, memory):
    """By gain per byte, one of each group, skipping what does not fit."""
    genome, chosen = np.zeros(len(groups), int), list[Candidate]()
    each = [(index, gene, c) for index, group in enumerate(groups) for gene, c in enumerate(group, start=1)]
    for index, gene, candidate in sorted(each, key=lambda item: item[2].gain / max(item[2].bytes, 1), reverse=True):
        if not genome[index] and memory([*chosen, candidate]) <= limit:
            genome[index] = gene
            chosen.append(candidate)
    return genome


def _distinct(genomes):
    """Each once, in their order."""
    return list({genome.tobytes(): genome for genome in genomes}.values())
