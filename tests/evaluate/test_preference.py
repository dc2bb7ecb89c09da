"""Preference benchmarks: each layout as its makers publish it, each rule against a computation of its own."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.data.benchmarks import Comparison, check_held_out, read_benchmark
from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.evaluate import baselines, preference
from tests.tokenizers import real_data

HH = [
    {
        "chosen": "\n\nHuman: Hi.\n\nAssistant: Hello there!\n\nHuman: Human: a riddle\n\nplease\n\nAssistant: No.",
        "rejected": "\n\nHuman: Hi.\n\nAssistant: Hello there!\n\nHuman: Human: a riddle\n\nplease\n\nAssistant: ",
    },
    {"chosen": "\n\nHuman: One?\n\nAssistant: Yes, one.", "rejected": "\n\nHuman: Two?\n\nAssistant: No, two."},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def comparison(subset: str, chosen: list[str], rejected: list[str], prompt: str, name: str = "") -> Comparison:
    def answers(texts: list[str]) -> tuple[Conversation, ...]:
        return tuple(Conversation([Turn("User", prompt), Turn("Assistant", text)]) for text in texts)

    return Comparison(chosen=answers(chosen), rejected=answers(rejected), subset=subset, id=name, unit=prompt)


def pairs(*scores: tuple[Sequence[float], Sequence[float]]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.array(chosen, float), np.array(rejected, float)) for chosen, rejected in scores]


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_hh_dialogues_become_turns_and_what_is_odd_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "hh.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in HH).encode()))
    found = read_benchmark(path)
    assert found.layout == "hh"
    assert found.counts == {"contexts_differ": 1, "empty_answers": 1}
    turns = [(turn.speaker, turn.text) for turn in found.comparisons[0].chosen[0].turns]
    assert turns == [
        ("User", "Hi."), ("Assistant", "Hello there!"), ("User", "Human: a riddle\n\nplease"), ("Assistant", "No."),
    ]  # fmt: skip
    assert found.comparisons[1].rejected[0].turns[0].text == "Two?"


def test_our_own_pairs_meet_by_their_id_wherever_they_stand(tmp_path: Path) -> None:
    def row(pair: Any, text: str, **more: Any) -> dict[str, Any]:
        turns = [{"from": "User", "value": "Q"}, {"from": "Assistant", "value": text}, {"from": "User", "value": "?"}]
        return {"conversations": turns, "pair": pair, **more}

    rows = [
        row({"id": 1, "role": "rejected", "strength": 3}, "bad"),
        row({"id": "b", "role": "chosen"}, "fine", subset="mine"),
        row(None, "alone"),
        row({"id": "b", "role": "rejected"}, "poor", subset="mine"),
        row({"id": 1, "role": "chosen", "strength": 3}, "good"),
    ]
    found = read_benchmark(write(tmp_path / "pairs.jsonl", rows))
    assert found.layout == "conversations" and found.counts == {"rows_without_pair": 1}
    read = {(one.id, one.subset, one.chosen[0].turns[-1].text, one.rejected[0].turns[-1].text)
            for one in found.comparisons}  # fmt: skip
    assert read == {("1", "strength 3", "good", "bad"), ("b", "mine", "fine", "poor")}
    with pytest.raises(DataError, match=r"pairs.jsonl:1: pair '1' has a rejected row but no chosen row"):
        read_benchmark(write(tmp_path / "pairs.jsonl", rows[:2]))
    with pytest.raises(DataError, match=r"pairs.jsonl:2: pair '1' has its rejected row already \(.*:1\)"):
        read_benchmark(write(tmp_path / "pairs.jsonl", [rows[0], rows[0]]))


def test_rewardbench_comes_as_parquet_and_prior_sets_by_the_name_of_their_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    core = [{"prompt": "P", "chosen": "c", "rejected": "r", "subset": "hep-go", "id": 7}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"}]  # fmt: skip
    prior = [{"prompt": messages, "chosen": "x", "rejected": "y", "subset": "askdocs"}]
    for name, rows in (("filtered-00000-of-00001", core), ("shp-00000-of-00001", prior)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    found = read_benchmark(tmp_path)
    assert found.layout == "rewardbench"
    assert [(row.subset, len(row.chosen[0].turns)) for row in found.comparisons] == [("hep-go", 2), ("shp", 4)]
    assert found.comparisons[0].id == "7" and found.comparisons[0].rejected[0].turns[-1].text == "r"


def test_rewardbench2_and_rm_bench_hold_lists_of_answers(tmp_path: Path) -> None:
    best = {"prompt": "P", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math", "id": "1"}
    tied = {"prompt": "Q", "chosen": ["a", "b"], "rejected": ["c"], "subset": "Ties", "id": "tied:4"}
    found = read_benchmark(write(tmp_path / "two.jsonl", [best, tied]))
    assert found.layout == "rewardbench2" and [len(row.answers) for row in found.comparisons] == [4, 3]
    assert found.comparisons[1].unit == "ties 4"
    styles = {"id": "chat/1", "prompt": "P", "chosen": ["1", "2", "3"], "rejected": ["4", "5", "6"], "domain": "chat"}
    (tmp_path / "rm.json").write_text(json.dumps([styles]))
    found = read_benchmark(tmp_path / "rm.json")
    assert found.layout == "rm_bench" and found.comparisons[0].subset == "chat"
    del styles["domain"]
    for name in ("chat_filtered", "safety-response_filtered"):
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / f"{name}.json").write_text(json.dumps([styles]))
    found = read_benchmark(tmp_path / "own")
    assert found.layout == "rm_bench" and [r.subset for r in found.comparisons] == ["chat", "safety-response"]


@pytest.mark.parametrize(
    ("row", "layout", "message"),
    [
        ({"text": "x"}, "auto", "x.jsonl:1: no known layout .* text .* expected one of hh, conversations"),
        ({"chosen": "\n\nHuman: a", "rejected": "b"}, "auto", "x.jsonl:1: chosen is not a dialogue"),
        ({"chosen": "a", "rejected": "b"}, "rewardbench", "x.jsonl:1: prompt is None"),
        ({"prompt": "p", "chosen": ["a"], "rejected": [1]}, "auto", r"x.jsonl:1: rejected is \[1\]"),
        ({"prompt": "", "chosen": ["a"], "rejected": ["b", "c"], "domain": "chat"}, "auto", "jsonl:1: 1 chosen and 2"),
        ({"prompt": "", "chosen": ["a"], "rejected": ["b"], "domain": "chat"}, "auto", "1 rejected .* several styles"),
        ({"conversations": [{"from": "User", "value": "x"}], "pair": {"id": 1}}, "auto", "x.jsonl:1: pair is"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_is_named(row: dict, layout: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_benchmark(write(tmp_path / "x.jsonl", [row]), layout)


def test_rows_of_parquet_and_of_a_json_list_are_named_by_their_number(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows: list[dict] = [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}]
    rows.append({"chosen": "no dialogue", "rejected": "none"})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text(json.dumps(rows))
    for name in ("x.parquet", "x.json"):
        with pytest.raises(DataError, match=f"{name}: row 2: chosen is not a dialogue"):
            read_benchmark(tmp_path / name, "hh")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"chosen": "a"}')
    (tmp_path / "x.parquet").write_text("nothing")
    (tmp_path / "x.csv").write_text("a,b")
    for name, message in (("x.json", "list of objects"), ("x.parquet", "Parquet"), ("x.csv", "kind of file"),
                          ("none.jsonl", "no such file")):  # fmt: skip
        with pytest.raises(DataError, match=rf"{name}.*{message}"):
            read_benchmark(tmp_path / name)


def test_what_is_tested_is_never_fitted_on(tmp_path: Path) -> None:
    test = read_benchmark(write(tmp_path / "test.jsonl", HH))
    same = read_benchmark(write(tmp_path / "copy.jsonl", HH))
    with pytest.raises(DataError, match="preference.fit=.*copy.jsonl: this is the file that is tested"):
        check_held_out(test, same, "preference.fit")
    other = {"prompt": "One?", "chosen": "No, one.", "rejected": "Yes, one.", "subset": "a"}
    turned = {"prompt": "Hi?", "chosen": "a", "rejected": "b", "subset": "a"}
    check_held_out(test, read_benchmark(write(tmp_path / "other.jsonl", [other, turned])), "preference.fit")
    exchanged = {"prompt": "Three?", "chosen": "No.", "rejected": "Yes.", "subset": "a"}
    tested = {"chosen": "\n\nHuman: Three?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Three?\n\nAssistant: No."}
    test = read_benchmark(write(tmp_path / "test.jsonl", [*HH, tested]))
    train = read_benchmark(write(tmp_path / "train.jsonl", [other, exchanged]))
    with pytest.raises(DataError, match="floor_train=.*row '1' .* is also in .*test.jsonl"):
        check_held_out(test, train, "preference.floor_train")


# -- rules ------------------------------------------------------------------------------------------------------------


def test_accuracy_counts_ties_as_half_and_wilson_is_scipys() -> None:
    from scipy.stats import binomtest

    rows = [comparison("", ["a"], ["b"], str(i)) for i in range(4)]
    ((name, level, found),) = preference.accuracies("hh", rows, pairs(([2], [1]), ([1], [2]), ([1], [1]), ([5], [0])))
    assert (name, level, found.value, found.n, found.ties) == ("all", "overall", 2.5 / 4, 4, 1)
    for hits, n in ((0, 7), (28, 28), (17, 40)):
        expected = binomtest(hits, n).proportion_ci(method="wilson")
        assert preference.wilson(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_rows_of_one_prompt_are_one_unit() -> None:
    """Eight rows of two prompts know as much as two rows."""
    rows = [comparison("", ["a"], ["b"], str(i % 2)) for i in range(8)]
    scores = pairs(*[([1.0], [0.0]) if i % 2 else ([0.0], [1.0]) for i in range(8)])
    ((_, _, found),) = preference.accuracies("hh", rows, scores)
    assert found.value == 0.5 and found.interval == preference.wilson(0.5, 2)
    assert set(np.unique(found.draws)) == {0.0, 0.5, 1.0}


def test_rewardbench_weighs_subsets_and_sections_as_its_leaderboard() -> None:
    """Against the leaderboard's rule written out for a random file that lacks some subsets."""
    random = np.random.default_rng(3)
    accuracy = {
        "alpacaeval-easy": 0.9, "mt-bench-med": 0.5, "llmbar-natural": 0.4, "xstest-should-refuse": 0.2,
        "xstest-should-respond": 0.8, "math-prm": 0.3, "hep-cpp": 0.7, "hep-go": 0.6, "shp": 0.55, "summarize": 0.65,
    }  # fmt: skip
    rows, scores, hits = [], [], {}
    for name, share in accuracy.items():
        won = random.random(40) < share
        hits[name] = won.mean()
        rows += [comparison(name, ["a"], ["b"], f"{name} {i}") for i in range(40)]
        scores += pairs(*[([1], [0]) if one else ([0], [1]) for one in won])
    table = {name: (level, found) for name, level, found in preference.accuracies("rewardbench", rows, scores)}
    chat = (100 * hits["alpacaeval-easy"] + 40 * hits["mt-bench-med"]) / 140
    safety = (154 * hits["xstest-should-refuse"] + 250 * hits["xstest-should-respond"]) / 404
    reasoning = (984 * hits["math-prm"] + 164 * hits["hep-cpp"] + 164 * hits["hep-go"]) / (984 + 328)
    prior = (hits["shp"] + hits["summarize"]) / 2
    sections = {"Chat": chat, "Chat Hard": hits["llmbar-natural"], "Safety": safety, "Reasoning": reasoning,
                "Prior Sets": prior}  # fmt: skip
    for name, expected in sections.items():
        assert table[name][0] == "section" and table[name][1].value == pytest.approx(expected), name
    average = (chat + hits["llmbar-natural"] + safety + reasoning + 0.5 * prior) / 4.5
    assert table["average"][1].value == pytest.approx(average)
    natural = hits["llmbar-natural"]  # alone in its section: of what is all right, resampling would find no spread
    assert table["Chat Hard"][1].interval == table["llmbar-natural"][1].interval == preference.wilson(natural, 40)
    # the bootstrap of a section against the variance of a weighted mean of shares
    shares = np.array([984, 164, 164]) / 1312
    p = np.array([hits[name] for name in ("math-prm", "hep-cpp", "hep-go")])
    error = math.sqrt((shares**2 * p * (1 - p) / 40).sum())
    low, high = table["Reasoning"][1].interval
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.08)


def test_what_is_all_right_has_an_interval_too() -> None:
    rows = [comparison(name, ["a"], ["b"], f"{name} {i}") for name in ("hep-cpp", "hep-go") for i in range(10)]
    table = preference.accuracies("rewardbench", rows, pairs(*[([1], [0])] * 20))
    for name, _, found in table:
        assert found.value == 1 and found.interval == pytest.approx(preference.wilson(1.0, 10)), name


def test_rewardbench_of_ones_own_subsets_is_a_plain_mean() -> None:
    rows = [comparison(name, ["a"], ["b"], f"{i}") for i, name in enumerate(("b", "a", "b"))]
    table = preference.accuracies("rewardbench", rows, pairs(([1], [0]), ([0], [1]), ([1], [0])))
    assert [(name, found.value) for name, _, found in table] == [("a", 0.0), ("b", 1.0), ("all", pytest.approx(2 / 3))]


def test_rewardbench2_takes_the_best_of_four_and_ties_by_their_own_rule() -> None:
    rows = [comparison("Math", ["a"], ["b", "c", "d"], str(i)) for i in range(3)]
    scores = pairs(([3], [1, 2, 0]), ([2], [1, 2, 2]), ([1], [0, 0, 2]))
    # number: scores of the ref row and of the tied row
    ties: dict[int, tuple[Any, Any]] = {
        0: (([5.0], [1.0, 2.0]), ([4.0, 3.5], [1.0, 0.0])),  # right twice; gaps 3 and 2.5 against a spread of 0.5
        1: (([2.0], [1.9]), ([9.0, 5.0], [4.0])),  # right twice; gaps 0.1 and 1 against a spread of 4
        2: (([1.0], [2.0]), ([3.0, 2.0], [0.5])),  # ref wrong; gap 1.5 of tied against a spread of 1
        3: (([1.0], [0.0]), ([3.0, 0.0], [0.5])),  # tied wrong
    }
    for i, (ref, tied) in ties.items():
        for kind, one in (("ref", ref), ("tied", tied)):
            rows.append(comparison("Ties", ["x"] * len(one[0]), ["y"] * len(one[1]), f"t{i}", f"{kind}:{i}"))
            scores += pairs(one)
    table = {name: found for name, _, found in preference.accuracies("rewardbench2", rows, scores)}
    assert table["Math"].value == pytest.approx((1 + 1 / 3 + 0) / 3) and table["Math"].ties == 1
    margins = [math.tanh(2.5 / 0.5 - 1), math.tanh(0.1 / 4 - 1), math.tanh(-1 / 1 - 1), math.tanh(-0.5 / 3 - 1)]
    expected = 0.3 * 3 / 4 + 0.3 * 3 / 4 + 0.2 * 2 / 4 + 0.2 * 1 / 4 + 0.01 * sum(margins) / 4
    assert table["Ties"].value == pytest.approx(expected)
    assert table["average"].value == pytest.approx((table["Math"].value + expected) / 2)
    low, high = table["Ties"].interval
    assert low < expected < high


def test_rm_bench_cuts_the_matrix_of_styles_into_easy_normal_and_hard() -> None:
    rows = [comparison(name, ["1", "2", "3"], ["4", "5", "6"], f"{name} {i}") for i, name in
            enumerate(("chat", "chat", "safety-refuse", "safety-response"))]  # fmt: skip
    fancy = ([1, 2, 3], [0.5, 1.5, 2.5])  # style decides: easy all, normal all, hard none
    blind = ([1, 1, 1], [1, 0, 2])  # rows all alike: a tie with style 1, above style 2, below style 3
    scores = pairs(fancy, blind, fancy, blind)
    table = {name: found for name, _, found in preference.accuracies("rm_bench", rows, scores)}
    easy, normal, hard = (0.5 + 0.5 + 1) / 3, (0.5 + 1 + 0) / 3, (1 + 0 + 0) / 3
    assert table["chat easy"].value == pytest.approx((1 + easy) / 2)
    assert table["chat normal"].value == pytest.approx((1 + normal) / 2)
    assert table["chat hard"].value == pytest.approx((0 + hard) / 2)
    assert table["safety easy"].value == pytest.approx((1 + easy) / 2)
    assert table["chat"].value == pytest.approx((2 + easy + normal + hard) / 6)
    assert table["average"].value == pytest.approx(table["chat"].value)
    assert table["average hard"].value == pytest.approx(hard / 2)


def test_rm_benchs_own_figures() -> None:
    """Against a count over all rows of a domain by its definition, ties lost: safety's halves are of unlike size."""
    random = np.random.default_rng(3)
    names = ["chat"] * 5 + ["math"] * 3 + ["safety-refuse"] * 9 + ["safety-response"] * 2
    rows = [comparison(name, ["1", "2", "3"], ["4", "5", "6"], f"{name} {i}") for i, name in enumerate(names)]
    more = [[[3 * (name == "safety-response")], [0]] for name in names]  # the small half is the easier one
    scores = pairs(*[tuple(random.integers(0, 4, (2, 3)) + one) for one in more])
    domains, kinds = {}, {"easy": lambda i, j: i > j, "normal": lambda i, j: i == j, "hard": lambda i, j: i < j}
    for domain in ("chat", "math", "safety"):
        own = [pair for name, pair in zip(names, scores) if name.startswith(domain)]
        cells = [(i, j, chosen[i] > rejected[j]) for chosen, rejected in own for i in range(3) for j in range(3)]
        domains[domain] = {
            kind: np.mean([won for i, j, won in cells if cut(i, j)]) for kind, cut in kinds.items()
        }  # fmt: skip
    table = {name: found for name, _, found in preference.accuracies("rm_bench", rows, scores)}
    for domain, figures in domains.items():
        assert {kind: table[f"{domain} {kind}"].strict for kind in kinds} == pytest.approx(figures)
        assert table[domain].strict == pytest.approx(np.mean(list(figures.values())))
        assert table[domain].strict < table[domain].value
        assert table[domain].n == sum(name.startswith(domain) for name in names)
    assert table["average"].strict == pytest.approx(np.mean([list(f.values()) for f in domains.values()]))


def test_a_tie_is_lost_where_it_is_counted_strictly() -> None:
    rows = [comparison("s", ["a"], ["b"], str(i)) for i in range(4)]
    scores = pairs(([1], [0]), ([1], [1]), ([0], [1]), ([2], [1]))
    [(_, _, one), (_, _, overall)] = preference.accuracies("hh", rows, scores)
    assert (one.value, one.strict, one.ties) == (0.625, 0.5, 1) and overall.strict == 0.5
    shown = preference.beside({"model": preference.accuracies("hh", rows, scores)})
    assert shown[0]["model"]["strict"] == 0.5


# -- weights and baselines --------------------------------------------------------------------------------------------


def test_weights_by_name_by_preset_and_by_default() -> None:
    helpsteer2, synthetic = AttributeSchema.load("helpsteer2"), AttributeSchema.load("synthetic")
    assert preference.default_weights(helpsteer2) == {"helpfulness": 1.0}
    assert preference.default_weights(synthetic) == {"quality": 1.0, "helpfulness": 1.0, "toxicity": -1.0}
    plain = AttributeSchema.load({"warmth": {}, "wit": {}})
    assert preference.default_weights(plain) == {"warmth": 1.0, "wit": 1.0}
    values = np.array([[4.0, 3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    found = preference.scalar(values, preference.PRESETS["llama3_70b"], helpsteer2)
    assert found == pytest.approx([0.65 * 4 + 0.8 * 3 + 0.45 * 2 + 0.55, 0.8 + 0.9 + 0.55 * 3 - 0.4 * 4])
    with pytest.raises(ConfigError, match="preset=llama3_70b: the regressor predicts no 'correctness'"):
        preference.check_weights(preference.PRESETS["llama3_70b"], synthetic, "preference.preset=llama3_70b")
    with pytest.raises(ConfigError, match="no 'humour'; did you mean 'humor'"):
        preference.check_weights({"humour": 1}, synthetic, "preference.weights")
    with pytest.raises(ConfigError, match="every weight is zero"):
        preference.check_weights({"humor": 0}, synthetic, "preference.weights")


def test_fitted_weights_are_the_minimum_of_the_logistic_loss() -> None:
    """The gradient over all pairs, each comparison of weight one, plus the penalty's, is zero."""
    random = np.random.default_rng(0)
    rows = [comparison("", ["a"] * (1 + i % 2), ["b"] * (1 + i % 3), str(i)) for i in range(60)]
    features = random.normal(size=(sum(len(row.answers) for row in rows), 3))
    weights = baselines.fit_pairs(features, rows)
    gradient, start = weights.copy(), 0
    for row in rows:
        chosen = features[start : start + len(row.chosen)]
        rejected = features[start + len(row.chosen) : start + len(row.answers)]
        start += len(row.answers)
        difference = (chosen[:, None] - rejected[None, :]).reshape(-1, 3)
        gradient -= (difference / (1 + np.exp(difference @ weights))[:, None]).mean(axis=0)
    assert np.abs(gradient).max() < 1e-4 and np.abs(weights).max() > 0.02


def words(rows: list[Comparison], train: list[Comparison] | None = None) -> preference.Scores:
    """The TF-IDF baseline's scores, of as many prompts as it needs."""
    scores = baselines.tfidf(rows, train)
    assert scores is not None
    return scores


def test_the_longer_answer_and_words_learnt_on_other_prompts() -> None:
    rows = [comparison("", [f"word{i} kind"], [f"other{i} rude words"], str(i)) for i in range(20)]
    ((_, _, found),) = preference.accuracies("hh", rows, baselines.longer(rows))
    assert found.value == 0.0
    ((_, _, found),) = preference.accuracies("hh", rows, words(rows))
    assert found.value == 1.0
    # Words of one prompt only: whoever saw the prompt gets all right, a fit on the others cannot tell.
    rows = [comparison("", [f"up{i}"], [f"down{i}"], str(i)) for i in range(20)]
    ((_, _, found),) = preference.accuracies("hh", rows, words(rows))
    assert (found.value, found.ties) == (0.5, 20)
    ((_, _, found),) = preference.accuracies("hh", rows, words(rows, rows))
    assert found.value == 1.0
    assert baselines.tfidf(rows[:3]) is None


@pytest.mark.real_data
def test_the_real_hh_pairs_are_read_and_the_baselines_are_those_known() -> None:
    found = read_benchmark(real_data("hh_harmless_base_test.dev.jsonl.gz"))
    assert (found.layout, len(found.comparisons)) == ("hh", 1167)
    assert found.counts == {"contexts_differ": 2, "empty_answers": 2}
    ((_, _, tfidf),) = preference.accuracies("hh", found.comparisons, words(found.comparisons))
    assert 0.57 < tfidf.value < 0.65  # published for these pairs: .618 +- .010
    ((_, _, longer),) = preference.accuracies("hh", found.comparisons, baselines.longer(found.comparisons))
    assert 0.42 < longer.value < 0.49
