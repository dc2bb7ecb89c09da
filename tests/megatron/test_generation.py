"""Generation against transformers on the same weights, and against plain Python for every choice it makes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from nemo_steerlm.config import Architecture, ParallelConfig
from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.megatron import decoding, generation, gpt, hf, parallel
from nemo_steerlm.megatron.decoding import Decoder, serving
from nemo_steerlm.megatron.generation import Generation, SamplingSettings, draw, generate, uniforms
from nemo_steerlm.tokenizer import Tokenizer, load_tokenizer
from tests import tokenizers
from tests.distributed import run_distributed
from tests.megatron.reference import forward

CONTEXT, NEW = 48, 24
# Ragged, and so near the model's limit that rows end at different steps: finished rows leave the batch.
LENGTHS = (3, 17, 1, 30, 30, 9, 40, 45, 2, 47)


def architecture(vocab_size: int) -> Architecture:
    return Architecture(
        num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2,
        vocab_size=vocab_size, max_position_embeddings=CONTEXT,
    )  # fmt: skip


def build(folder: str | Path, vocab_size: int, layout: ParallelConfig) -> gpt.LanguageModel:
    parallel.initialize(layout)
    chunks = gpt.build(architecture(vocab_size), layout)
    hf.load(hf.SafetensorsFolder(Path(folder)), chunks, architecture(vocab_size))
    return chunks[0]


def make_prompts(vocab_size: int) -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(0, vocab_size, length).tolist() for length in LENGTHS]


class World:
    """One random Llama as transformers and as megatron-core see it."""

    def __init__(self, folder: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.tokenizer = load_tokenizer(tokenizers.bpe(folder / "tokenizer", markers=True))
        self.vocab_size = self.tokenizer.vocab_size  # not a multiple of 128: padded logits exist
        plan = architecture(self.vocab_size)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
            initializer_range=0.2, rope_theta=plan.rope_theta, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        self.reference = LlamaForCausalLM(config).eval()
        self.folder = folder / "hf"
        self.reference.save_pretrained(self.folder)
        self.model = build(self.folder, self.vocab_size, ParallelConfig())
        self.prompts = make_prompts(self.vocab_size)

    def generate(self, prompts: list[list[int]] | None = None, **settings: Any) -> list[Generation]:
        kwargs = {name: settings.pop(name) for name in ("batch_size", "seeds", "progress") if name in settings}
        settings.setdefault("max_new_tokens", NEW)
        return generate(
            self.model, self.tokenizer, prompts or self.prompts, SamplingSettings(**settings),
            vocab_size=self.vocab_size, **kwargs,
        )  # fmt: skip

    @torch.no_grad()
    def expected(self, prompt: list[int]) -> tuple[list[int], float]:
        """transformers' greedy continuation up to the model's limit or EOS, and its log probability."""
        count = min(NEW, CONTEXT - len(prompt))
        given = torch.tensor([prompt])  # without a mask transformers takes tokens that equal its padding for padding
        mask = torch.ones_like(given)
        ids = self.reference.generate(given, attention_mask=mask, max_new_tokens=count, do_sample=False)
        new = ids[0, len(prompt) :].tolist()
        if self.tokenizer.eos_id in new:
            new = new[: new.index(self.tokenizer.eos_id) + 1]
        logits = self.reference(ids).logits[0, len(prompt) - 1 :].double().log_softmax(-1)
        return new, sum(float(logits[i, token]) for i, token in enumerate(new))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("generation"))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_greedy_equals_transformers(world: World, batch_size: int) -> None:
    for prompt, found in zip(world.prompts, world.generate(batch_size=batch_size), strict=True):
        tokens, logprob = world.expected(prompt)
        ended = tokens[-1] == world.tokenizer.eos_id
        assert found.tokens == (tokens[:-1] if ended else tokens)
        assert found.finish == ("eos" if ended else "length")
        assert found.logprob == pytest.approx(logprob, abs=1e-4)
        assert found.text == world.tokenizer.decode_continuation(found.tokens)


class Recorder(Decoder):
    """Notes what the batch asks of the model."""

    calls: list[tuple[str, int, int, int]] = []  # what, prompts or live rows, slots, capacity
    margins: list[float] = []  # between the two likeliest tokens

    def prefill(self, prompts: Any, slots: Any, sources: Any) -> Any:
        logits = super().prefill(prompts, slots, sources)
        return self.noted("prefill", len(prompts), logits)

    def decode(self, tokens: Any, live: Any) -> Any:
        expected = self.lengths + np.isin(np.arange(len(self.lengths)), live)
        logits = super().decode(tokens, live)
        assert self.lengths.tolist() == expected.tolist()
        return self.noted("decode", len(live), logits)

    def noted(self, what: str, count: int, logits: torch.Tensor) -> torch.Tensor:
        first, second = logits.topk(2).values.T
        self.margins.append(float((first - second).min()))
        assert logits.isfinite().all() and self._keys[0].shape[::2] == (len(self.lengths), self.capacity)
        self.calls.append((what, count, len(self.lengths), self.capacity))
        return logits


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(generation, "Decoder", Recorder)
    monkeypatch.setattr(decoding, "_BLOCK", 8)  # the cache grows more than once
    monkeypatch.setattr(Recorder, "calls", [])
    monkeypatch.setattr(Recorder, "margins", [])
    return Recorder


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.2, "top_k": 30, "seed": 4}, {"stop": ("o", "e "), "temperature": 0.8}]
)
def test_continuous_batches_equal_one_by_one(
    world: World, recorder: type[Recorder], settings: dict[str, Any]
) -> None:
    """Token-identical as long as no choice is closer than rounding, which the recorded margins show for greedy."""
    random = np.random.default_rng(2)
    prompts = [random.integers(0, world.vocab_size, length).tolist() for length in random.integers(1, CONTEXT, 23)]
    alone = [world.generate([prompt], seeds=[i], **settings)[0] for i, prompt in enumerate(prompts)]
    assert settings or min(recorder.margins) > 1e-3
    assert len({len(g.tokens) for g in alone}) > 5
    for batch_size in (3, 8, 64):
        recorder.calls.clear()
        together = world.generate(prompts, batch_size=batch_size, **settings)
        assert [(g.tokens, g.text, g.finish) for g in together] == [(g.tokens, g.text, g.finish) for g in alone]
        assert [g.logprob for g in together] == pytest.approx([g.logprob for g in alone], abs=1e-4)
        slots = [slots for _, _, slots, _ in recorder.calls]
        assert max(slots) == min(batch_size, 23) and slots == sorted(slots, reverse=True)  # memory: by slots, ...
        assert max(capacity for *_, capacity in recorder.calls) <= CONTEXT + 8  # ... and the longest row
        # Rows enter while others are on their way: between two prefills rows decode that the first did not bring.
        entered = [i for i, call in enumerate(recorder.calls) if call[0] == "prefill"]
        assert len(entered) == 1 or any(recorder.calls[i + 1][1] > recorder.calls[i][1] for i in entered[1:])


def test_slots_are_kept_busy(world: World, recorder: type[Recorder]) -> None:
    """Against batches that wait for their longest row."""
    prompts, stop = [[i % world.vocab_size, 5 * i % world.vocab_size] for i in range(40)], ("o", "e ", "t")
    rows = world.generate(prompts, batch_size=4, stop=stop)
    steps = [count for what, count, _, _ in recorder.calls if what == "decode"]
    lengths = [len(row.tokens) + (row.finish != "length") for row in rows]
    waiting = sum(max(lengths[i : i + 4]) - 1 for i in range(0, 40, 4))
    assert len(steps) < 0.8 * waiting, (len(steps), waiting)


def test_equal_prompts_are_read_once(world: World, recorder: type[Recorder]) -> None:
    prompts = [[7, 8, 9], [4, 5], [7, 8, 9], [7, 8, 9], [4, 6]]
    settings: dict[str, Any] = dict(temperature=1.0, seed=2, max_new_tokens=6)
    rows = world.generate(prompts, **settings)
    assert recorder.calls[0][:3] == ("prefill", 3, 5)
    assert len({tuple(rows[i].tokens) for i in (0, 2, 3)}) == 3  # each draws for itself
    assert rows == [
        dataclasses.replace(world.generate([prompt], seeds=[i], **settings)[0], logprob=pytest.approx(row.logprob))
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
    ]


def test_prompts_are_read_in_bounded_pieces(
    world: World, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = world.generate()
    monkeypatch.setattr(generation, "_PREFILL_TOKENS", 80)
    recorder.calls.clear()
    assert [g.tokens for g in world.generate()] == [g.tokens for g in whole]
    assert [count for what, count, _, _ in recorder.calls if what == "prefill"] == [1, 1, 2, 2, 4]


def test_only_the_last_position_of_a_prompt_reaches_the_vocabulary(world: World) -> None:
    shapes = []
    hook = world.model.output_layer.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    world.generate(max_new_tokens=2)
    hook.remove()
    assert [tuple(shape[:2]) for shape in shapes] == [(1, len(LENGTHS)), (1, len(LENGTHS) - 1)]  # one has no room


def test_draws_do_not_depend_on_the_batch(world: World) -> None:
    settings: dict[str, Any] = dict(temperature=1.3, top_k=40, top_p=0.95, seed=7)
    together = world.generate(**settings)
    assert [g.tokens for g in world.generate(batch_size=1, **settings)] == [g.tokens for g in together]
    chosen = [8, 2, 5]  # another company, another order: what a resumed job sees
    part = world.generate([world.prompts[i] for i in chosen], seeds=chosen, **settings)
    assert [g.tokens for g in part] == [together[i].tokens for i in chosen]
    assert [g.tokens for g in world.generate(**{**settings, "seed": 8})] != [g.tokens for g in together]
    longer = world.generate(max_new_tokens=NEW - 10, **settings)  # a limit changes nothing before it
    assert all(b.tokens[: len(a.tokens)] == a.tokens for a, b in zip(longer, together, strict=True))


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
    drawn = draw(torch.tensor(logits).expand(draws, -1), settings, uniforms(settings, range(draws), 1)[:, 0])
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


def test_ties_and_borders() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0]])
    assert draw(logits, SamplingSettings(), None).tolist() == [1]  # the lowest id
    top = SamplingSettings(temperature=1.0, top_k=3)  # ids 1 and 3, then 2 and 4 are equally third
    assert {int(draw(logits, top, np.array([u]))) for u in np.linspace(0, 0.999, 50)} == {1, 2, 3, 4}
    nearly_one = np.array([np.nextafter(1, 0)])
    impossible = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert draw(impossible, SamplingSettings(temperature=1.0), nearly_one).tolist() == [3]
    assert draw(impossible, SamplingSettings(temperature=1.0), np.array([0.0])).tolist() == [1]
    uneven = torch.tensor([[3.0, 1.0, 1.0, 1.0, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0]])  # four candidates beside three
    assert draw(uneven, top, np.array([nearly_one[0]] * 2)).tolist() == [4, 2]


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
                int(judge.endings(tokens[:, n - 1], tokens, np.array([0]), np.array([n]))[0])
                for n in range(1, 41)
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


# ---- the model afterwards, and bad input ----------------------------------------------------------------------------


def _check_trainable(model: gpt.LanguageModel) -> None:
    assert model.training and not any("_forward_impl" in vars(module) for module in model.modules())
    model.zero_grad()
    model(torch.tensor([[1, 2, 3]]), None, None).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_model_is_left_ready_for_training(world: World) -> None:
    def fail(count: int) -> None:
        raise KeyboardInterrupt

    try:
        world.model.train()
        done: list[int] = []
        world.generate(batch_size=3, progress=done.append)
        assert sum(done) == len(world.prompts)
        _check_trainable(world.model)
        with pytest.raises(KeyboardInterrupt):
            world.generate(progress=fail)
        _check_trainable(world.model)
    finally:
        world.model.eval()


def test_bad_input_is_refused(world: World) -> None:
    for settings in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": 0}):
        (name,) = settings
        with pytest.raises(ConfigError, match=name):
            world.generate(**settings)
    for stop in (("",), "text"):
        with pytest.raises(ConfigError, match="stop"):
            SamplingSettings(stop=stop)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="batch_size"):
        world.generate(batch_size=0)
    with pytest.raises(DataError, match="prompt 1 is empty"):
        world.generate([[1], []])
    with pytest.raises(DataError, match=f"prompt 0 has {CONTEXT} tokens, the model holds {CONTEXT}"):
        world.generate([[1] * CONTEXT])
    with pytest.raises(DataError, match="vocabulary"):
        world.generate([[world.vocab_size]])
    assert generate(world.model, world.tokenizer, [], SamplingSettings(), vocab_size=1) == []


# ---- layouts --------------------------------------------------------------------------------------------------------

LAYOUT_SETTINGS = {
    "greedy": SamplingSettings(max_new_tokens=12),
    "sampled": SamplingSettings(max_new_tokens=12, temperature=1.0, top_k=50, seed=3),
    "stopped": SamplingSettings(max_new_tokens=12, stop=("o", "e ")),
}


def distance_to_forward(model: gpt.LanguageModel, prompts: list[list[int]], vocab_size: int) -> float:
    """Largest difference of the decoder's logits from those of megatron-core's forward over whole sequences.

    Half of each prompt is prefilled, the rest decoded.
    """
    with serving(model):
        found = half_by_half(Decoder(model, 3, vocab_size), prompts)
    worst = 0.0
    for prompt, rows in zip(prompts, found, strict=True):
        with torch.inference_mode():
            logits = forward(model, torch.tensor([prompt], device=torch.cuda.current_device()))
        if logits is not None:
            whole = gather_from_tensor_model_parallel_region(logits[0])[:, :vocab_size]
            worst = max(worst, float((whole[len(prompt) // 2 - 1 :] - torch.stack(rows)).abs().max()))
    return worst


def half_by_half(decoder: Decoder, prompts: list[list[int]]) -> list[list[torch.Tensor]]:
    """The decoder's logits from the middle of each prompt on; slots 1 and 2 enter two tokens after slot 0."""
    read = [len(prompt) // 2 for prompt in prompts]
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    live: list[int] = []

    def note(rows: list[int], logits: torch.Tensor | None) -> None:
        for i, row in enumerate(rows if logits is not None else []):
            found[row].append(logits[i])  # type: ignore[index]

    for step in range(max(map(len, prompts))):
        for enters, row in ((0, 0), (2, 1), (2, 2)):
            if step == enters:
                note([row], decoder.prefill([prompts[row][: read[row]]], np.array([row]), np.array([0])))
                live.append(row)
        live = [row for row in live if read[row] < len(prompts[row])]
        tokens = [prompt[min(place, len(prompt) - 1)] for prompt, place in zip(prompts, read, strict=True)]
        if live:
            note(live, decoder.decode(np.array(tokens), np.array(live)))
        for row in live:
            read[row] += 1
    return found


def check_layouts(folder: str, tokenizer_folder: str) -> dict[str, Any]:
    """Greedy and sampled tokens of three layouts, and whether all ranks returned the same."""
    import torch.distributed as dist

    tokenizer = load_tokenizer(tokenizer_folder)
    found: dict[str, Any] = {}
    prompts = make_prompts(tokenizer.vocab_size)
    for tensor, pipeline in ((2, 1), (1, 2), (2, 2)):
        model = build(folder, tokenizer.vocab_size, ParallelConfig(tensor=tensor, pipeline=pipeline))
        rows: dict[str, Any] = {}
        for name, settings in LAYOUT_SETTINGS.items():
            out = generate(model, tokenizer, prompts, settings, vocab_size=tokenizer.vocab_size, batch_size=4)
            rows[name] = [[g.tokens, g.text, g.finish, g.logprob] for g in out]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, rows)
        rows["same"] = all(other == rows for other in everywhere)
        dist.all_gather_object(everywhere, distance_to_forward(model, prompts[-3:], tokenizer.vocab_size))
        rows["distance"] = max(everywhere)
        found[f"TP{tensor} PP{pipeline}"] = rows
    return found


def test_layouts_agree(world: World) -> None:
    """More requests than slots at each layout, against one by one without any."""
    found = run_distributed(
        check_layouts, 4, folder=str(world.folder), tokenizer_folder=str(world.folder.parent / "tokenizer")
    )
    alone = {
        name: [
            generate(world.model, world.tokenizer, [prompt], settings, vocab_size=world.vocab_size, seeds=[i])[0]
            for i, prompt in enumerate(world.prompts)
        ]
        for name, settings in LAYOUT_SETTINGS.items()
    }
    assert distance_to_forward(world.model, world.prompts[-3:], world.vocab_size) < 1e-4
    for layout, rows in found.items():
        assert rows.pop("same"), layout
        assert 0 < rows.pop("distance") < 1e-4, layout
        for name, expected in alone.items():
            assert [row[:3] for row in rows[name]] == [[g.tokens, g.text, g.finish] for g in expected], (layout, name)
            assert [row[3] for row in rows[name]] == pytest.approx([g.logprob for g in expected], abs=1e-3)
