from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Pair, Turn
from nemo_steerlm.data.mixture import Mixture
from nemo_steerlm.data.policy_dataset import PolicyDataset
from nemo_steerlm.data.regression_dataset import RegressionDataset
from nemo_steerlm.data.units import require_pairs, unit_lengths
from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import load_tokenizer
from tests import tokenizers

SCHEMA = AttributeSchema.load("helpsteer2")
TEMPLATE = PromptTemplate()
FULL = {"helpfulness": 4.0, "correctness": 3.0, "coherence": 2.0, "complexity": 1.0, "verbosity": 0.0}


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "bpe":
        return load_tokenizer(tokenizers.bpe(folder, markers=True))
    return load_tokenizer(tokenizers.sentencepiece_model(folder))


def row(*texts, labels=(FULL,), **settings):
    turns = [Turn(("User", "Assistant")[i % 2], text) for i, text in enumerate(texts)]
    for i, turn in enumerate(turns[1::2]):
        turn.label = labels[i % len(labels)]
    return Conversation(turns, **{"system": "S.", "id": "row", **settings})


def build(kind, rows, tokenizer, max_length=10_000, **settings):
    return kind.build(rows, SCHEMA, TEMPLATE, tokenizer, max_length, **settings)


def text(item, tokenizer):
    return tokenizer.decode(item["tokens"])


# -- regression -------------------------------------------------------------------------------------------------------


def test_one_item_for_each_labelled_response(tokenizer):
    rows = [
        row("a", "b", "c", "d", labels=({"verbosity": 2.5}, {"correctness": 0})),
        row("e", "f", labels=(None,)),
        row("g", "h", labels=({},)),
    ]
    data = build(RegressionDataset, iter(rows), tokenizer)
    assert len(data) == 2 and data.report == {
        "conversations": 3, "kept": 2, "dropped_overlong": 0, "truncated": 0, "unlabelled": 2,
        "tokens": int(data.lengths.sum()), "datasets": {"data": 2}, "unused_keys": {},
    }  # fmt: skip
    for index, turn in ((0, 1), (1, 3)):
        item = data.item(index)
        assert text(item, tokenizer) == TEMPLATE.render_regression(rows[0], turn)
        assert item["tokens"].tolist() == TEMPLATE.encode_regression(rows[0], turn, tokenizer)
        assert len(item["tokens"]) == data.lengths[index] and item["labels"].dtype == np.float32
    assert data.item(0)["labels"].tolist()[:4] == pytest.approx([math.nan] * 4, nan_ok=True)
    assert data.item(0)["labels"][4] == 2.5 and data.item(1)["labels"][1] == 0


def test_over_long_regression_items(tokenizer):
    long = row("one " * 20, "two", "three", "four", "five", "six", id="long-1")
    short = row("a", "b", id="short")
    limit = len(TEMPLATE.encode_regression(row("three", "four", "five", "six"), 3, tokenizer))
    dropped = build(RegressionDataset, [long, short], tokenizer, limit)
    assert (len(dropped), dropped.report["dropped_overlong"], dropped.report["truncated"]) == (1, 3, 0)

    kept = build(RegressionDataset, [long, short], tokenizer, limit, overlong="truncate_history")
    assert (len(kept), kept.report["dropped_overlong"], kept.report["truncated"]) == (3, 1, 2)
    texts = [text(kept.item(i), tokenizer) for i in range(3)]
    assert texts[0] == TEMPLATE.render_regression(row("three", "four"), 1)
    assert texts[1] == TEMPLATE.render_regression(row("three", "four", "five", "six"), 3)  # no more goes than must
    assert kept.lengths.max() <= limit

    with pytest.raises(DataError, match=r"row 'long-1', turn 1 has \d+ tokens, more than max_length="):
        build(RegressionDataset, [short, long], tokenizer, limit, overlong="error")
    with pytest.raises(DataError, match="no sample is left: 3 are too long"):
        build(RegressionDataset, [long], tokenizer, 10)


def half(pair, role, *texts, strength=1.0, label=None, **settings):
    settings = {"id": f"{pair} {role}", "pair": Pair(pair, role, strength), **settings}
    return row(*texts, labels=(label,), **settings)


def test_pairs_are_matched_by_id_and_a_lone_half_only_regresses(tokenizer):
    long = "one " * 40
    rows = [
        half("a", "rejected", "q", "bad"),
        row("x", "single"),
        half("b", "chosen", "q", "fine", strength=2.0, label={"verbosity": 1}),
        half("c", "chosen", "q", "alone", label={"verbosity": 3}),
        half("d", "rejected", "q", "alone, unlabelled"),
        half("a", "chosen", "q", "good", strength=3.0),
        half("e", "rejected", "q", "its other half is too long"),
        half("e", "chosen", "q", long),
        half("b", "rejected", "q", "poor", strength=1.0),
    ]
    data = build(RegressionDataset, rows, tokenizer, max_length=100, pairs=True)
    said = [text(data.item(i), tokenizer).split("Assistant\n")[1].split("\n")[0] for i in range(len(data))]
    units = [tuple(said[i] if i >= 0 else None for i in unit) for unit in data.units.tolist()]
    assert sorted(units, key=str) == [("alone", None), ("fine", "poor"), ("good", "bad"), ("single", None)]
    strengths = {said[i]: float(data.item(i)["strength"]) for i in range(len(data))}
    assert {name: value for name, value in strengths.items() if not math.isnan(value)} == {"good": 3.0, "fine": 2.0}
    report = data.report
    assert (report["pairs"], report["incomplete_pairs"], report["dropped_overlong"]) == (2, 3, 1)
    assert (report["kept"], report["unlabelled"], report["datasets"]) == (6, 6, {"data": 6})
    lengths = unit_lengths(data.lengths, data.units)
    assert lengths.sum() == report["tokens"] == sum(data.lengths[i] for unit in data.units for i in unit if i >= 0)

    alone = build(RegressionDataset, rows, tokenizer, max_length=100, pairs=True, singles=False)
    assert len(alone.units) == 2 and (alone.units >= 0).all() and alone.report["kept"] == 4
    without = build(RegressionDataset, rows, tokenizer, max_length=100)
    assert len(without) == 3 and "pairs" not in without.report and (without.units[:, 1] == -1).all()
    with pytest.raises(DataError, match="row 'a chosen': pair 'a' has a chosen row already"):
        build(RegressionDataset, [*rows, rows[5]], tokenizer, pairs=True)
    with pytest.raises(DataError, match=r"none of the 3 conversations is in a complete one \(1 lack their other half"):
        build(RegressionDataset, [rows[1], rows[4], rows[1]], tokenizer, pairs=True, singles=False)


def test_items_know_their_dataset_and_how_many_people_judged_them(tokenizer):
    rows = [row("a", "b"), row("c", "d", extra={"dataset": "helpsteer2"}), row("e", "f")]
    rows[0].turns[1].label_count = 3
    data = build(RegressionDataset, rows, tokenizer, name="mine")
    assert data.datasets == ["mine", "helpsteer2"] and data.report["datasets"] == {"mine": 2, "helpsteer2": 1}
    assert [int(data.item(i)["dataset"]) for i in range(3)] == [0, 1, 0]
    np.testing.assert_array_equal([data.item(i)["label_count"] for i in range(3)], [3, np.nan, np.nan])


def test_a_mixture_is_its_parts_one_after_another(tokenizer):
    parts = [
        build(RegressionDataset, [row("a", "b"), row("c", "d", extra={"dataset": "two"})], tokenizer, name="one"),
        build(
            RegressionDataset,
            [half("p", "chosen", "e", "f", label=FULL), row("g", "h"), half("p", "rejected", "i", "j")],
            tokenizer, name="two", pairs=True,
        ),
    ]  # fmt: skip
    mixture = Mixture(parts, [1.0, 2.5], ["1.jsonl", "2.jsonl"])
    assert mixture.units.tolist() == [[0, -1], [1, -1], [2, 4], [3, -1]] and mixture.shares == [(2, 1.0), (2, 2.5)]
    assert mixture.unit_lengths.tolist() == [*parts[0].lengths, parts[1].lengths[[0, 2]].sum(), parts[1].lengths[1]]
    assert mixture.datasets == ["one", "two"]
    assert [mixture.datasets[mixture.item(i)["dataset"]] for i in range(5)] == ["one", "two", "two", "two", "two"]
    assert text(mixture.item(3), tokenizer) == text(parts[1].item(1), tokenizer)
    assert mixture.labels.shape == (5, 5) and mixture.draws.tolist() == [1, 1, 2.5, 2.5, 2.5]
    assert set(mixture.report) == {"1.jsonl", "2.jsonl"} and Mixture(parts[:1]).report is parts[0].report
    one, two = mixture.counts
    one.update({"pairs": 0, "incomplete_pairs": 2})
    two["pairs"] = 0
    with pytest.raises(DataError, match=r"loss.preference needs pairs: none of the 5 conversations.*\(2 lack"):
        require_pairs(mixture.counts)


# -- policy -----------------------------------------------------------------------------------------------------------


def test_policy_items_are_the_templates(tokenizer):
    rows = [row("a", "b", "c", "d", "e"), row("x", "y", labels=(None,)), row("p", "q", labels=(None,), type=None)]
    data = build(PolicyDataset, rows, tokenizer)
    assert len(data) == 2 and data.report["unlabelled"] == 1 and data.report["kept"] == 2
    ids, mask = TEMPLATE.encode_policy(rows[0], SCHEMA, tokenizer)
    end = max(i for i, one in enumerate(mask) if one) + 1  # the unanswered "e" teaches nothing
    assert data.item(0)["tokens"].tolist() == ids[:end] and data.item(0)["loss_mask"].tolist() == mask[:end]
    assert data.report["loss_tokens"] == sum(int(data.item(i)["loss_mask"].sum()) for i in range(2))
    assert text(data.item(1), tokenizer).endswith("Assistant\nq\n<extra_id_1>")


def test_labels_that_are_not_shown_and_keys_without_a_use_are_announced(tokenizer, caplog):
    rows = [row("a", "b", type=None), row("c", "d"), row("e", "f", type=None, labels=(None,))]
    rows[1].turns[1].extra = {"weight": 0}
    caplog.set_level("INFO")
    for kind in (PolicyDataset, RegressionDataset):
        mixture = Mixture([build(kind, rows, tokenizer)], names=["data/a.jsonl"])
        assert mixture.report["unused_keys"] == {"weight": 1}
    assert build(PolicyDataset, rows, tokenizer).report["labels_not_shown"] == 1
    said = [message.partition(";")[0] for message in caplog.messages]
    keys = "data/a.jsonl: keys of turns that have no place in a prompt: weight (1)"
    hidden = 'data/a.jsonl: 1 labelled rows have "type": null, so they are trained on without their labels'
    assert said == [hidden, keys, keys]


def test_many_samples_left_out_as_over_long_are_announced(tokenizer, caplog):
    rows = [row("a", "b"), row("a", "b " * 400)]
    for kind in (PolicyDataset, RegressionDataset):
        Mixture([build(kind, rows, tokenizer, 200)], names=["data/a.jsonl"])
        Mixture([build(kind, [*rows[:1] * 30, rows[1]], tokenizer, 200)], names=["few.jsonl"])
    found = "data/a.jsonl: 1 of 2 samples are too long and left out; a larger data.max_length keeps more"
    assert caplog.messages == [found, found]


def under_mask(item, tokenizer):
    tokens, mask = item["tokens"], item["loss_mask"]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [tokenizer.decode_continuation(tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def test_dropout_of_attributes_and_labels_leaves_the_loss_alone(tokenizer):
    rows = [row("a", "b", "c", "d", labels=(FULL, {"verbosity": 4, "coherence": 0})) for _ in range(50)]
    shares = {"attribute_dropout": 0.5, "label_dropout": 0.2}
    data = build(PolicyDataset, rows, tokenizer, **shares, seed=5)
    whole = text(build(PolicyDataset, rows, tokenizer).item(0), tokenizer)
    kinds: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    for epoch in range(20):
        for index in range(50):
            item = data.item(index, epoch)
            assert under_mask(item, tokenizer) == ["b\n<extra_id_1>", "d\n<extra_id_1>"]
            assert len(item["tokens"]) == len(item["loss_mask"]) <= data.lengths[index]
            shown = text(item, tokenizer)
            lines = [line for line in shown.split("\n") if line.startswith("<extra_id_2>")]
            kinds["whole" if shown == whole else "none" if not lines else "some"] += 1
            if lines and shown != whole:
                parsed = [SCHEMA.parse(line.removeprefix("<extra_id_2>")) for line in lines]
                assert all(FULL[name] == value for name, value in parsed[0].items() if len(parsed) == 2)
                sizes[len(set().union(*parsed))] += 1
    assert abs(kinds["some"] / 1000 - 0.5) < 0.05 and abs(kinds["none"] / 1000 - 0.2) < 0.05
    assert set(sizes) == {1, 2, 3, 4}  # never all five, never none

    again = build(PolicyDataset, rows, tokenizer, **shares, seed=5)
    other = build(PolicyDataset, rows, tokenizer, **shares, seed=6)
    stream = [text(d.item(i, e), tokenizer) for d in (data, again, other) for e in (7, 3) for i in (49, 2, 8, 30, 31)]
    assert stream[:10] == stream[10:20] != stream[20:]
    everything = build(PolicyDataset, rows, tokenizer, label_dropout=1.0)
    assert "<extra_id_2>" not in text(everything.item(3, 9), tokenizer)


def test_over_long_policy_items(tokenizer):
    long = row("one " * 20, "two", "three", "four", "five", "six", id="long-1")
    short = row("a", "b")
    limit = len(TEMPLATE.encode_policy(row("three", "four", "five", "six"), SCHEMA, tokenizer)[0])
    dropped = build(PolicyDataset, [long, short], tokenizer, limit)
    assert (len(dropped), dropped.report["dropped_overlong"]) == (1, 1)
    kept = build(PolicyDataset, [long, short], tokenizer, limit, overlong="truncate_history", attribute_dropout=0.5)
    assert (len(kept), kept.report["truncated"], kept.report["turns_lost"]) == (2, 1, 1)
    for epoch in range(5):
        assert under_mask(kept.item(0, epoch), tokenizer) == ["four\n<extra_id_1>", "six\n<extra_id_1>"]
    with pytest.raises(DataError, match=r"row 'long-1' has \d+ tokens, more than max_length=\d+; raise max_length or"):
        build(PolicyDataset, [short, long], tokenizer, limit, overlong="error")


@pytest.mark.parametrize("kind", [RegressionDataset, PolicyDataset])
def test_data_without_labels_or_rows_is_refused(kind, tokenizer):
    with pytest.raises(DataError, match="all labels are missing: none of the 2 conversations"):
        build(kind, [row("a", "b", labels=(None,))] * 2, tokenizer)
    with pytest.raises(DataError, match="holds no conversation"):
        build(kind, [], tokenizer)
    with pytest.raises(DataError, match="did you mean 'verbosity'"):
        build(kind, [row("a", "b", labels=({"verbosty": 1.0},))], tokenizer)
    with pytest.raises(ConfigError, match="expected one of truncate_history, drop, error"):
        build(kind, [row("a", "b")], tokenizer, overlong="cut")


def test_bad_shares_are_refused(tokenizer):
    for shares in (
        {"attribute_dropout": 1.5},
        {"label_dropout": -0.1},
        {"attribute_dropout": 0.7, "label_dropout": 0.7},
    ):
        with pytest.raises(ConfigError, match="dropout"):
            build(PolicyDataset, [row("a", "b")], tokenizer, **shares)
