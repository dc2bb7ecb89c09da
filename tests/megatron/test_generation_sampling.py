"""Which token is drawn and where a response ends, against plain Python for every choice."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_steerlm.megatron import drawing, generation
from nemo_steerlm.megatron.drawing import SamplingSettings, draw, uniforms
from nemo_steerlm.megatron.generation import generate
from nemo_steerlm.tokenizer import Tokenizer, load_tokenizer
from tests import tokenizers
from tests.megatron.generation_world import World

pytestmark = pytest.mark.xdist_group("generation")  # one worker builds the world


def filtered(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The distribution the settings ask for, token by token in plain Python."""
    scaled = [x / temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])[: top_k or None]
    weights = {i: math.exp(scaled[i] - scaled[order[0]]) for i in order}
    kept, reached = [], 0.0
    for i in order:
        if reached >= top_p * sum(weights.values()):
            break
        kept.append(i)
        reached += weights[i]
    return [weights[i] / reached if i in kept else 0.0 for i in range(len(scaled))]


SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (2.5, 10, 1.0), (1.0, 0, 0.8), (1.5, 20, 0.6), (1.0, 1, 1.0), (1.0, 99, 1)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_frequencies_follow_the_softmax(temperature: float, top_k: int, top_p: float) -> None:
    from scipy.stats import chisquare

    draws = 20_000
    logits = np.random.default_rng(3).normal(scale=1.5, size=60).astype(np.float32)
    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    numbers = torch.from_numpy(uniforms(settings, range(draws), 1)[:, 0])
    drawn = draw(torch.tensor(logits).expand(draws, -1), settings, numbers)
    expected = np.array(filtered(logits.astype(float).tolist(), temperature, top_k, top_p))
    counts = np.bincount(drawn.numpy(), minlength=60)
    assert counts[expected == 0].sum() == 0
    if (expected > 0).sum() > 1:
        assert chisquare(counts[expected > 0], draws * expected[expected > 0]).pvalue > 1e-3


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_draws_are_the_inverse_distribution_of_the_reference(
    world: World, temperature: float, top_k: int, top_p: float
) -> None:
    """The n-th token of a row belongs to the n-th number of its own stream."""
    found = world.generate(temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=3, seed=5)
    for row, prompt in enumerate(world.prompts):
        tokens, stream = found[row].tokens, np.random.Generator(np.random.Philox(key=np.array([5, row], np.uint64)))
        with torch.no_grad():
            logits = world.reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :].double().tolist()
        for place, token in enumerate(tokens + [world.tokenizer.eos_id] * (found[row].finish == "eos")):
            borders = np.cumsum(filtered(logits[place], temperature, top_k, top_p))
            assert int(np.searchsorted(borders, stream.random(), side="right")) == token, (row, place)


WAYS = {"CPU": drawing._with_numpy, "CUDA": drawing._with_torch}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_ties_and_borders(way: Callable[..., torch.Tensor]) -> None:
    def drawn(logits: torch.Tensor, settings: SamplingSettings, *numbers: float) -> list[int]:
        return way(logits, settings, torch.tensor(numbers, dtype=torch.float64)).tolist()

    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0]])
    assert draw(logits, SamplingSettings(), None).tolist() == [1]  # the lowest id
    top = SamplingSettings(temperature=1.0, top_k=3)  # ids 1 and 3, then 2 and 4 are equally third
    assert {drawn(logits, top, u)[0] for u in np.linspace(0, 0.999, 50)} == {1, 2, 3, 4}
    likely = SamplingSettings(temperature=1.0, top_p=0.8)  # 1 and 3 have 0.68 of it, 2 and 4 are equally next
    assert {drawn(logits, likely, u)[0] for u in np.linspace(0, 0.999, 50)} == {1, 2, 3, 4}
    nearly_one = np.nextafter(1, 0)
    impossible = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for filters in ({}, {"top_k": 3}, {"top_p": 0.9}):
        settings = SamplingSettings(temperature=1.0, **filters)  # type: ignore[arg-type]
        assert drawn(impossible, settings, nearly_one) == [3]
        assert drawn(impossible, settings, 0.0) == [1]
    uneven = torch.tensor([[3.0, 1.0, 1.0, 1.0, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0]])  # four candidates beside three
    assert drawn(uneven, top, nearly_one, nearly_one) == [4, 2]


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [*SETTINGS, (0.9, 50, 0.9), (1e-3, 0, 0.5), (1.0, 0, 1e-9)]
)
def test_both_ways_draw_the_same(temperature: float, top_k: int, top_p: float, rounded: bool) -> None:
    """The way of CUDA, which runs on a CPU too, beside the way of the CPU."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 1500, generator=generator) * 3
    logits = logits.round() if rounded else logits
    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    numbers = torch.from_numpy(uniforms(settings, range(500), 1)[:, 0])
    on_cpu, on_cuda = (way(logits, settings, numbers) for way in WAYS.values())
    assert on_cuda.tolist() == on_cpu.tolist()
    assert on_cpu.dtype == on_cuda.dtype == torch.int64


@pytest.mark.gpu
def test_a_gpu_draws_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    logits = torch.randn(250, 32000, generator=torch.Generator().manual_seed(0)) * 3
    for temperature, top_k, top_p in SETTINGS:
        settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)
        numbers = torch.from_numpy(uniforms(settings, range(250), 1)[:, 0])
        on_cpu, on_gpu = (draw(logits.to(d), settings, numbers.to(d)).tolist() for d in ("cpu", "cuda"))
        assert sum(one != two for one, two in zip(on_cpu, on_gpu, strict=True)) <= 1  # on a border


# ---- ending ---------------------------------------------------------------------------------------------------------


def _tokenizers(folder: Path) -> dict[str, Tokenizer]:
    return {
        "special": load_tokenizer(tokenizers.bpe(folder / "special", markers=True)),
        "pieces": load_tokenizer(tokenizers.bpe(folder / "pieces", markers=False)),
        "sentencepiece": load_tokenizer(tokenizers.sentencepiece_model(folder / "sentencepiece")),
    }


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return _tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.mark.parametrize("kind", ["special", "pieces", "sentencepiece"])
@pytest.mark.parametrize(
    ("said", "stop", "text", "finish"),
    [
        (" I am fine.\n<extra_id_1>User\nHi", ("<extra_id_1>",), " I am fine.\n", "stop"),
        ("Good. <extra_id_2>\n", ("<extra_id_1>", "<extra_id_2>"), "Good. ", "stop"),
        ("The quick brown fox", ("row",), "The quick b", "stop"),  # inside a token, or over its borders
        ("Hello there", ("there", "Hello"), "", "stop"),
        ("gr\u00fcn, hello", ("\u00fc",), "gr", "stop"),  # a character that only bytes can spell
        ("no stop here", ("<extra_id_1>",), "no stop here", "length"),
        ("almost <extra_id_", ("<extra_id_1>",), "almost <extra_id_", "length"),
    ],
)
def test_stop_texts_over_token_borders(
    world: World, kinds: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch,
    kind: str, said: str, stop: tuple[str, ...], text: str, finish: str,
) -> None:  # fmt: skip
    tokenizer = kinds[kind]
    script = tokenizer.encode_continuation(said)
    said_next = iter(script)
    monkeypatch.setattr(generation, "draw", lambda *_: torch.tensor([next(said_next) % world.vocab_size]))
    assert max(script) < world.vocab_size
    settings = SamplingSettings(max_new_tokens=len(script), stop=stop)
    (found,) = generate(world.model, tokenizer, [[5]], settings, vocab_size=world.vocab_size)
    assert (found.text, found.finish) == (text, finish)
    assert text.startswith(tokenizer.decode_continuation(found.tokens))
    assert found.tokens == script[: len(found.tokens)]
    if finish == "length":
        assert found.tokens == script


@pytest.mark.parametrize("kind", ["special", "pieces", "sentencepiece"])
def test_no_stop_is_missed(kinds: dict[str, Tokenizer], kind: str) -> None:
    """Random tokens, bytes of torn characters among them, against decoding everything after every token."""
    tokenizer, random = kinds[kind], np.random.default_rng(0)
    frequent = tokenizer.encode_continuation(" ".join(tokenizers.CORPUS))
    for stop in (("e ",), ("he", "is"), ("a", "\n<"), (">", "é"), ("you?",)):
        judge = generation._StopJudge(tokenizer, stop, tokenizer.vocab_size)
        for _ in range(15):
            tokens = random.choice([*frequent, *range(3, tokenizer.vocab_size)], 40)[None]
            endings = [
                int(judge.endings(tokens[:, n - 1], tokens, np.array([0]), np.array([n]))[0]) for n in range(1, 41)
            ]
            ended = next((n for n, ending in enumerate(endings, 1) if ending == generation._STOP), None)
            texts = [tokenizer.decode_continuation(tokens[0, :n].tolist()) for n in range(1, 41)]
            assert ended == next((n for n, text in enumerate(texts, 1) if any(s in text for s in stop)), None)


def test_stops_in_a_batch(world: World) -> None:
    free, stopped = world.generate(), world.generate(stop=("o", "e "), batch_size=7)
    ends = [min([p for p in map(g.text.find, ("o", "e ")) if p >= 0], default=None) for g in free]
    assert sum(end is not None for end in ends) > 2
    for whole, cut, end in zip(free, stopped, ends, strict=True):
        assert cut.text == whole.text[:end]
        assert cut.finish == ("stop" if end is not None else whole.finish)


def test_end_of_text_token_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter([9, 8, world.tokenizer.eos_id, 7])
    monkeypatch.setattr(generation, "draw", lambda *_: torch.tensor([next(script)]))
    (found,) = world.generate([[5]])
    assert (found.tokens, found.finish) == ([9, 8], "eos")


def test_the_models_own_ends_of_text_end_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for ends, tokens in (((7, 12), [9, 8]), ((12, 10**6), [9, 8, 7, 11])):  # ids beyond the vocabulary mean nothing
        script = iter([9, 8, 7, 11, 12, 6])
        monkeypatch.setattr(generation, "draw", lambda *_, script=script: torch.tensor([next(script)]))
        settings = SamplingSettings(max_new_tokens=6)
        (found,) = generate(world.model, world.tokenizer, [[5]], settings, vocab_size=world.vocab_size, ends=ends)
        assert (found.tokens, found.finish) == (tokens, "eos")


def test_ids_without_a_token_are_never_drawn(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SamplingSettings(max_new_tokens=12)

    def drawn() -> set[int]:
        found = generate(world.model, world.tokenizer, world.prompts, settings, vocab_size=world.vocab_size)
        return {token for answer in found for token in answer.tokens}

    free = drawn()
    highest = max(free)
    monkeypatch.setattr(world.tokenizer, "vocab_size", highest)  # fewer than the model has rows
    monkeypatch.setitem(world.tokenizer.__dict__, "holes", sorted(free - {highest})[:3])
    assert not drawn() & {*range(highest, world.vocab_size), *world.tokenizer.holes}
