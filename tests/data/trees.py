"""OASST trees: a few written by hand, with one of each thing that has to be handled, and many alike."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def message(name: str, role: str, text: str, *replies: dict | str, scores: dict | None = None, **more: Any) -> dict:
    labels = scores and {
        key: {"value": value, "count": 2 + len(scores) - place}  # the least comes last
        for place, (key, value) in enumerate(scores.items())
    }
    row = {"message_id": name, "role": role, "text": text, "lang": "en", "deleted": False, "replies": list(replies)}
    return row | ({"labels": labels} if labels is not None else {}) | more


def ask(name: str, text: str, *replies: dict, **more: Any) -> dict:
    return message(name, "prompter", text, *replies, scores={"quality": 0.5}, **more)


def answer(name: str, text: str, *replies: dict | str, scores: dict | None = None, **more: Any) -> dict:
    return message(name, "assistant", text, *replies, scores=GOOD if scores is None else scores, **more)


GOOD = {"quality": 0.875, "toxicity": 0.0, "humor": 0.375, "creativity": 0.125, "helpfulness": 1.0, "spam": 0.0}


def tree(root: dict) -> dict:
    return {"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root}


def trees() -> list[dict]:
    """Seven trees; what each is for stands behind it."""
    why, how = ask("u2", "Why?", answer("a2", "Because é\u2028.")), ask("u3", "How?", answer("a3", "So."))
    shared = answer("a1", "Shared answer", why, how, ask("u4", "Nobody answers"))
    deleted = answer("d1", "Deleted answer", ask("d2", "Below it", answer("d3", "Below that")), deleted=True)
    unlabelled = message("n1", "assistant", "No label", ask("n2", "More", answer("n3", "Labelled below")))
    return [
        tree(ask("u1", "Hello", shared)),  # a1 is shared by three leaves, one of them unanswered
        tree(ask("l1", "Lone prompt")),
        tree(ask("x1", "A deleted reply", deleted, answer("x2", "A good reply", scores={"quality": 0.625}))),
        tree(ask("m1", "An unlabelled reply", unlabelled, answer("m2", "No scores of ours", scores={"spam": 1.0}))),
        tree(ask("h1", " hello ", answer("h2", "Another tree with the same prompt"))),
        tree(ask("u9", "Hello", answer("a9", "Shared answer"))),  # the same dialogue as in the first tree
        tree(ask("g1", "Hallo", answer("g2", "Guten Tag", lang="de"), lang="de")),
    ]


def many_trees(count: int, prompts: int | None = None, seed: int = 0, padding: str = "") -> Iterator[dict]:
    """Trees with four labelled responses each; of so many prompts, or each of its own."""
    generator = random.Random(seed)
    for index in range(count):
        text = f"Prompt {generator.randrange(prompts) if prompts else index}"
        replies = [answer(f"a{index}.{k}", f"Reply {generator.randrange(30)}{padding}") for k in range(3)]
        nested = answer(f"b{index}", "Then", ask(f"c{index}", "So", *replies[1:]))
        yield tree(ask(f"t{index}", text, replies[0], nested))


def write_trees(path: Path, rows: Iterable[dict]) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
