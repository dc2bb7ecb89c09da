"""The synthetic world: right English, faithful levels, known annotator noise, stable bytes."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import PrepareConfig
from nemo_steerlm.conversation import Conversation, Turn, read_conversations
from nemo_steerlm.data.sources.synthetic import SyntheticSizes, write
from nemo_steerlm.data.synthetic.annotators import AnnotatorPool
from nemo_steerlm.data.synthetic.grammar import (
    CONTENT,
    DICTIONARY,
    JOKES,
    MISSPELLINGS,
    RUDE_REMARKS,
    article,
    fields,
    fill,
)
from nemo_steerlm.data.synthetic.lexicon import DOMAINS, FILLERS, NOUN_DOMAIN, PLAYFUL_WORDS, RUDE_WORDS
from nemo_steerlm.data.synthetic.oracle import ATTRIBUTE_NAMES, asked, count_slips, oracle, words_of
from nemo_steerlm.data.synthetic.world import make_samples
from nemo_steerlm.data.train_tokenizer import corpus, train_tokenizer
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.template import PromptTemplate

SIZES = SyntheticSizes(train=60, val=10, unlabelled=40, test=20, prompts=20, prompts_test=10)


@pytest.fixture(scope="module")
def samples():
    return make_samples(5, 3000)


@pytest.fixture(scope="module")
def truth(samples):
    return np.array([list(sample.oracle.values()) for sample in samples])


@pytest.fixture(scope="module")
def levels(samples):
    return np.array([list(sample.levels.values()) for sample in samples])


@pytest.fixture(scope="module")
def schema():
    return AttributeSchema.load("synthetic")


@pytest.fixture(scope="module")
def human(truth):
    pool = AnnotatorPool()
    generator = np.random.default_rng(0)
    return pool.rate(truth, pool.draw_biases(generator, 5), generator)


def config(folder: Path, seed: int) -> PrepareConfig:
    return PrepareConfig(source="synthetic", output=str(folder), seed=seed)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory, schema):
    folder = tmp_path_factory.mktemp("world")
    write(config(folder, 1), schema, SIZES)
    return list(read_conversations(folder / "train.jsonl"))


def clean(samples):
    return [sample for sample in samples if sample.levels["quality"] == 4]


class TestFaithfulness:
    @pytest.mark.parametrize("column", range(5), ids=ATTRIBUTE_NAMES)
    def test_the_oracle_measures_the_level_that_was_ordered(self, truth, levels, column):
        assert spearmanr(truth[:, column], levels[:, column])[0] >= 0.95

    @pytest.mark.parametrize("column", range(5), ids=ATTRIBUTE_NAMES)
    def test_each_level_has_its_own_mean(self, truth, levels, column):
        means = [truth[levels[:, column] == level, column].mean() for level in range(5)]
        assert np.diff(means).min() > 0.4
        assert means[-1] > 3.5

    def test_attributes_are_almost_independent(self, truth):
        correlations = np.corrcoef(truth.T) - np.eye(5)
        assert np.abs(correlations).max() <= 0.2

    def test_every_domain_and_both_forms_of_prompt_occur(self, samples):
        domains = {domain.name for domain, _ in (asked(sample.turns) for sample in samples) if domain}
        assert domains == set(DOMAINS)
        assert len(domains) >= 8
        two_turns = np.mean([len(sample.turns) == 3 for sample in samples])
        assert 0.2 < two_turns < 0.3

    def test_responses_hardly_repeat(self, samples):
        assert len({sample.response for sample in samples}) > 0.98 * len(samples)


class TestOracle:
    def test_a_known_answer(self):
        answer = (
            "Ugh, what a silly question. Stir the rice with a ladle for two minutes. It could be fine in the end. "
            "Haha, ask my otter."
        )
        values = oracle("How do I cook rice?", answer)
        assert values["quality"] == 4
        assert values["helpfulness"] == pytest.approx((4 + 0) / 2)
        assert len(words_of(answer)) == 25
        assert values["verbosity"] == pytest.approx(11 / 12)
        assert values["humor"] == 2
        assert values["toxicity"] == 2

    @pytest.mark.parametrize(
        ("text", "slips"),
        [
            ("stir the rice", 0),
            ("stir teh rice", 1),
            ("stir the the rice", 1),
            ("um stir the rice", 1),
            ("use a oven", 1),
            ("use an oven and a um oven", 2),
            ("use an um ladle", 2),
            ("play a ukulele", 0),
            ("qwx zzt", 2),
        ],
    )
    def test_slips(self, text, slips):
        assert count_slips(words_of(text)) == slips

    def test_a_word_repeated_across_sentences_is_no_slip(self):
        assert oracle("How do I cook rice?", "Time will tell, so some suspect. Suspect that.")["quality"] == 4
        assert oracle("How do I cook rice?", "Time will tell, so some suspect suspect that.")["quality"] < 4

    def test_the_last_thing_named_by_the_user_is_the_one_asked(self):
        turns = ["How do I grow roses?", "Ask about my guitar.", "And what about the ferns?"]
        conversation = Conversation([Turn(s, t) for s, t in zip(("User", "Assistant", "User"), turns, strict=True)])
        answer = "Water the ferns with a hose for two weeks."
        assert asked(conversation)[1] == "ferns"
        assert oracle(conversation, answer) == oracle(turns, answer) == oracle("\n".join(turns), answer)
        assert oracle(turns[:1], answer)["helpfulness"] == 3

    @pytest.mark.parametrize("text", ["", " \n ", "...", "?!", "\u200b", "<>"])
    def test_text_without_words_scores_zero(self, text):
        assert oracle("How do I cook rice?", text) == dict.fromkeys(ATTRIBUTE_NAMES, 0.0)

    def test_any_text_gets_values_in_range(self):
        draw = random.Random(0)
        alphabet = "abc the . , ! \n 0 é 漢 <extra_id_1> um a rice"
        for _ in range(300):
            text = "".join(draw.choice(alphabet) for _ in range(draw.randrange(200)))
            for prompt in ("How do I cook rice?", "", text, [text, text]):
                values = oracle(prompt, text)
                assert list(values) == list(ATTRIBUTE_NAMES)
                assert all(0 <= value <= 4 and np.isfinite(value) for value in values.values())

    def test_foreign_text_is_poor(self):
        values = oracle("How do I cook rice?", "Lorem ipsum dolor sit amet consectetur adipiscing elit sed do.")
        assert values["quality"] == values["helpfulness"] == 0


class TestEnglish:
    def test_clean_responses_hold_no_slip_and_no_unknown_word(self, samples):
        for sample in clean(samples):
            assert sample.oracle["quality"] == 4, sample.response

    def test_articles_fit_the_next_word(self, samples):
        vowel_sound = re.compile(r"[aeio]|u(?!kulele)")
        texts = [text for sample in clean(samples) for text in (*sample.turns, sample.response)]
        found = [match for text in texts for match in re.finditer(r"\b(an?) (\w+)", text.lower())]
        assert {match[1] for match in found} == {"a", "an"}
        for match in found:
            assert match[1] == ("an" if vowel_sound.match(match[2]) else "a"), match[0]

    def test_verbs_agree_with_their_subject(self, samples):
        verbs = {False: {"needs", "is", "looks"}, True: {"need", "are", "look"}}
        checked = 0
        for sample in clean(samples):
            for text in (sample.turns[-1], sample.response):
                for subject, verb in re.findall(r"\b(\w+) (needs?|is|are|looks?)\b", text.lower()):
                    if subject in NOUN_DOMAIN:
                        assert verb in verbs[NOUN_DOMAIN[subject][1].plural], text
                        checked += 1
        assert checked > 100

    def test_pronouns_agree_with_the_thing_asked(self):
        for domain, noun in NOUN_DOMAIN.values():
            for pattern in itertools.chain(*CONTENT.values()):
                words = fill(pattern, random.Random(1), fields(domain, noun))
                if "{it}" in pattern:
                    assert ("them" if noun.plural else "it") in words

    def test_amounts_are_plural_and_do_not_repeat_their_number(self, samples):
        units = {unit for domain in DOMAINS.values() for unit in domain.units}
        assert all(unit.endswith("s") for unit in units)
        assert not any(re.search(r"\b(one|1) (" + "|".join(units) + ")", s.response.lower()) for s in samples)

    def test_sentences_start_with_a_capital_and_end_with_a_stop(self, samples):
        for sample in samples:
            for text in (*sample.turns, sample.response):
                assert re.fullmatch(r"(?:[A-Z][^.?!]*[.?!](?: |$))+", text), text

    def test_remarks_and_jokes_hold_the_words_they_promise(self):
        choices = fields(DOMAINS["repair"], DOMAINS["repair"].nouns[0])
        for table, lexicon in ((RUDE_REMARKS, RUDE_WORDS), (JOKES, PLAYFUL_WORDS)):
            for count, patterns in table.items():
                for pattern in patterns:
                    words = fill(pattern, random.Random(2), choices)
                    found = [word for word in words if word in lexicon]
                    assert len(found) == len(set(found)) == count, words

    def test_vocabulary_is_unambiguous(self):
        assert not PLAYFUL_WORDS & RUDE_WORDS
        assert not DICTIONARY & set(MISSPELLINGS.values())
        assert set(MISSPELLINGS) <= DICTIONARY
        nouns = [noun.text for domain in DOMAINS.values() for noun in domain.nouns]
        assert len(nouns) == len(set(nouns))
        special = PLAYFUL_WORDS | RUDE_WORDS | set(FILLERS) | set(nouns)
        for domain in DOMAINS.values():
            assert not special & {*domain.verbs, *domain.tools, *domain.units}
            assert len(domain.nouns) >= 10
        assert [article(word) for word in ("oven", "ukulele", "hose", "um", "unit")] == ["an", "a", "a", "an", "a"]


class TestAnnotators:
    def test_labels_are_whole_in_range_and_some_are_missing(self, human):
        given = human[~np.isnan(human)]
        assert set(np.unique(given)) == {0, 1, 2, 3, 4}
        assert np.isnan(human).mean() == pytest.approx(AnnotatorPool().missing, abs=0.01)

    @pytest.mark.parametrize("column", range(5), ids=ATTRIBUTE_NAMES)
    def test_labels_are_noisy_but_informative(self, human, truth, column):
        given = ~np.isnan(human[:, column])
        assert 0.8 < pearsonr(human[given, column], truth[given, column])[0] < 0.9

    def test_without_noise_the_label_is_the_rounded_truth(self, truth):
        pool = AnnotatorPool(bias=0, ambiguity=0, noise=0, contrast=1, missing=0)
        generator = np.random.default_rng(0)
        labels = pool.rate(truth, pool.draw_biases(generator, 5), generator)
        assert np.array_equal(labels, np.rint(truth))


class TestFiles:
    def test_files_hold_what_they_promise(self, tmp_path, schema):
        report = write(config(tmp_path, 4), schema, SIZES)
        rows = {name: list(read_conversations(tmp_path / f"{name}.jsonl", schema)) for name in report["rows"]}
        assert {name: len(found) for name, found in rows.items()} == vars(SIZES) == report["rows"]
        for name, found in rows.items():
            for row in found:
                last = row.turns[-1]
                if name.startswith("prompts"):
                    assert last.speaker == "User" and "oracle" not in row.extra
                    continue
                assert last.speaker == "Assistant"
                assert row.extra["oracle"] == pytest.approx(oracle(row, last.text), abs=1e-4)
                assert last.label == (last.label_human if name in ("train", "val") else None)
                assert all(turn.label is None and turn.label_human is None for turn in row.turns[:-1])
                assert [turn.shared for turn in row.turns] == [False, True, False, False][-len(row.turns) :]
        assert len({row.id for found in rows.values() for row in found}) == sum(report["rows"].values())
        assert len({row.system for row in rows["train"]}) == 2
        assert 0.1 < report["human"]["humor"]["missing"] < 0.3

    def test_same_seed_same_bytes_whatever_the_hash_seed(self, tmp_path):
        code = (
            "import sys; from nemo_steerlm.attributes import AttributeSchema as S;"
            "from nemo_steerlm.data.sources.synthetic import *; "
            "config = PrepareConfig(source='synthetic', output=sys.argv[1], seed=int(sys.argv[2]));"
            f"write(config, S.load('synthetic'), {SIZES!r})"
        )
        digests = []
        for run, (hash_seed, seed) in enumerate([("0", 7), ("123", 7), ("0", 8)]):
            folder = tmp_path / str(run)
            environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
            subprocess.run([sys.executable, "-c", code, folder, str(seed)], check=True, env=environment)
            files = sorted(folder.iterdir())
            assert len(files) == len(vars(SIZES))
            digests.append(hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest())
        assert digests[0] == digests[1] != digests[2]

    def test_a_schema_of_other_attributes_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="attributes=synthetic"):
            write(
                config(tmp_path, 4),
                AttributeSchema.load("helpsteer2"),
                SIZES,
            )
        assert not list(tmp_path.iterdir())


class TestTokenizer:
    def test_round_trip_and_whole_labels(self, conversations, schema, tmp_path):
        template = PromptTemplate()
        texts = list(corpus(conversations, template))
        tokenizer = train_tokenizer(texts, 600, template, schema, tmp_path / "tokenizer")
        assert tokenizer.vocab_size == 600 + 25
        for text in (*texts, "Ünïcode 漢字 \t\n\n  1234 quality:9"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        for marker in (template.system_start, template.turn_start, template.label_start):
            assert tokenizer.token_id(marker) is not None
        assert all(tokenizer.token_id(f"{name}:{value}") is not None for name in schema.names for value in range(5))
        assert len(tokenizer.encode("1234")) == 4
        assert tokenizer.pad_id == 0
        assert tokenizer.eos_id == tokenizer.token_id(template.turn_start)

    def test_training_twice_gives_the_same_files(self, conversations, schema, tmp_path):
        template = PromptTemplate()
        first, second = (
            train_tokenizer(corpus(conversations, template), 500, template, schema, tmp_path / name) for name in "ab"
        )
        assert first.fingerprint == second.fingerprint
        for file in (tmp_path / "a").iterdir():
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()

    def test_a_vocabulary_too_small_for_the_bytes_is_refused(self, schema, tmp_path):
        with pytest.raises(ConfigError, match="expected at least 260"):
            train_tokenizer(["text"], 200, PromptTemplate(), schema, tmp_path)
