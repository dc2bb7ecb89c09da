"""Near-duplicates between the prompts of val and train: MinHash (Broder 1997) over word triples, by `datasketch`."""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Mapping
from typing import Any

THRESHOLD = 0.8  # of the Jaccard similarity of two prompts' word triples
_CHARACTERS = 2000  # of a prompt that are compared
_KEYED = 400  # of them, the ones that determine its key in the sample
_PERMUTATIONS = 32
_EXAMPLES = 5


class PromptSample:
    """At most `size` different prompts, independent of their order: those with the lowest MinHash.

    Two prompts have the same MinHash with the probability of their similarity, so two samples mostly hold a prompt and
    its near-duplicate, or neither: a few thousand prompts estimate the share of near-duplicates in a million.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: dict[int, str] = {}
        self._heap: list[int] = []  # negative keys: the highest is on top
        self._last = ""
        self._complete = True

    def add(self, prompt: str) -> None:
        """Offer a prompt, white space and case already made equal."""
        if prompt == self._last:  # rows of one prompt follow each other
            return
        self._last = prompt
        key = min(map(zlib.crc32, _triples(prompt[:_KEYED]))) << 32 | zlib.crc32(prompt.encode())
        if key in self._kept:
            return
        self._kept[key] = prompt[:_CHARACTERS]
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, -key)
        else:
            self._complete = False
            del self._kept[-heapq.heappushpop(self._heap, -key)]

    def reach(self) -> float:
        """The key up to which all prompts were kept."""
        return math.inf if self._complete else -self._heap[0]

    def prompts(self, reach: float = math.inf) -> list[str]:
        """The prompts kept up to a key, in the order of their keys."""
        return [self._kept[key] for key in sorted(self._kept) if key <= reach]


def leaks(train: PromptSample, val: PromptSample) -> Mapping[str, Any] | None:
    """Return how many sampled prompts of val have a near-duplicate among those of train, with examples.

    Only those prompts of val are compared whose near-duplicates the sample of train would hold. MinHash finds the
    candidates, the exact similarity decides. None where `datasketch` is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        return None
    only = MinHash(num_perm=_PERMUTATIONS, hashfunc=zlib.crc32)

    def sketch(triples: set[bytes]) -> Any:
        only.clear()  # the index keeps no sketch, and making a new one takes as long as filling it
        only.update_batch(list(triples))
        return only

    index = MinHashLSH(threshold=THRESHOLD, num_perm=_PERMUTATIONS)
    held_out = [(prompt, _triples(prompt)) for prompt in val.prompts(train.reach())]
    for number, (_, triples) in enumerate(held_out):
        index.insert(number, sketch(triples))
    prompts = train.prompts()
    examples: dict[int, str] = {}
    for prompt in prompts if held_out else ():
        triples = _triples(prompt)
        for number in index.query(sketch(triples)):
            other = held_out[number][1]
            if number not in examples and len(triples & other) >= THRESHOLD * len(triples | other):
                examples[number] = prompt
    shown = sorted(examples.items())[:_EXAMPLES]
    return {
        "threshold": THRESHOLD,
        "train_prompts_compared": len(prompts),
        "val_prompts_compared": len(held_out),
        "val_prompts_with_a_near_twin": len(examples),
        "examples": [{"val": held_out[number][0][:200], "train": prompt[:200]} for number, prompt in shown],
    }


def _triples(prompt: str) -> set[bytes]:
    words = prompt.encode().split()
    return {b" ".join(words[start : start + 3]) for start in range(max(len(words) - 2, 1))}
