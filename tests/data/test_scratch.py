"""The set on disk against Python's."""

from __future__ import annotations

import contextlib
import random

import pytest

from nemo_steerlm.data import scratch


@pytest.mark.parametrize(("latest", "bits"), [(1024, 1 << 23), (7, 64)])  # as it is; and a filter that knows nothing
def test_it_answers_as_pythons_set_does(latest, bits, tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "_LATEST", latest)
    monkeypatch.setattr(scratch, "_BITS", bits)
    choose = random.Random(0)
    known = set()
    with contextlib.closing(scratch.Seen(tmp_path, "seen")) as seen:
        for _ in range(6000):
            number = choose.randrange(4000)
            thing = choose.choice([f"id-{number}", ("train", f"prompt {number}"), hash(("history", number)), number])
            other = choose.randrange(4000)
            assert (other in seen) == (other in known)
            assert seen.add(thing) == (thing not in known)
            known.add(thing)
            assert thing in seen
    assert not list(tmp_path.iterdir())
