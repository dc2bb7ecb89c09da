"""Generation against transformers on the same weights, and against itself: in every batch, order and layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from nemo_steerlm.config import ParallelConfig
from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.megatron import decoding, drawing, generation, gpt
from nemo_steerlm.megatron.decoding import Decoder, serving
from nemo_steerlm.megatron.drawing import SamplingSettings, draw
from nemo_steerlm.megatron.generation import generate
from nemo_steerlm.tokenizer import load_tokenizer
from tests.distributed import run_distributed
from tests.host_reads import HostReads
from tests.megatron.generation_world import CONTEXT, LENGTHS, NEW, World, build, make_prompts
from tests.megatron.reference import forward

pytestmark = pytest.mark.xdist_group("generation")  # one worker builds the world


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

    def noted(self, what: str, count: int, logits: Any) -> torch.Tensor:
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
def test_continuous_batches_equal_one_by_one(world: World, recorder: type[Recorder], settings: dict[str, Any]) -> None:
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


def test_slots_are_as_many_as_there_is_memory_for(
    world: World, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch as large as asked for would not fit: fewer rows decode together, with the same tokens."""
    settings: dict[str, Any] = {"temperature": 1.2, "top_k": 30, "seed": 4}
    whole = world.generate(**settings)
    longest = min(max(LENGTHS) + NEW, CONTEXT)
    slot = decoding.slot_bytes(world.model, longest, world.vocab_size)
    fixed = decoding.activation_bytes(world.model, generation._PREFILL_TOKENS)
    recorder.calls.clear()
    monkeypatch.setattr(decoding, "_free_memory", lambda _: fixed + 4 * slot - 1)
    assert [g.tokens for g in world.generate(**settings)] == [g.tokens for g in whole]
    assert [g.tokens for g in world.generate(**settings)] == [g.tokens for g in whole]
    assert max(slots for _, _, slots, _ in recorder.calls) == 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "batch_size=64: the free GPU memory holds 3 rows of 48 tokens, which decode together"
    assert [g.tokens for g in world.generate(batch_size=2, **settings)] == [g.tokens for g in whole]
    assert len(caplog.records) == 1  # as asked for: nothing to say
    monkeypatch.setattr(decoding, "_free_memory", lambda _: fixed + slot - 1)
    with pytest.raises(ConfigError, match=r"response of 48 tokens.* lower max_new_tokens.*parallel.tensor"):
        world.generate(**settings)


def test_a_slot_is_as_large_as_it_is_said_to_be(world: World) -> None:
    """What is allocated for a slot, and what `keep` and the drawing of its token need for a moment."""
    cached = []
    for slots in (3, 4):
        decoder = Decoder(world.model, slots, world.vocab_size, CONTEXT)
        decoder._reserve(CONTEXT)
        cached.append(sum(tensor.nbytes for tensor in (*decoder._keys, *decoder._values, decoder._bias)))
    copy = decoder._keys[0].nbytes // 4
    said = decoding.slot_bytes(world.model, CONTEXT, world.vocab_size)
    assert said == cached[1] - cached[0] + copy + world.vocab_size * decoding._DRAW_BYTES


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.2, "top_k": 30, "top_p": 0.9}])
def test_a_step_waits_for_the_device_once(
    world: World, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """For the tokens, which say what ends; everything else stays there, the log probabilities up to the end."""
    monkeypatch.setattr(Recorder, "noted", lambda self, what, count, logits: (self.calls.append(what), logits)[1])
    monkeypatch.setattr(drawing, "_with_numpy", drawing._with_torch)  # as on CUDA
    reads = HostReads(monkeypatch)
    with reads:
        world.generate(batch_size=4, **settings)
    assert reads.count == len(recorder.calls) + 1


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
        dataclasses.replace(world.generate([prompt], seeds=[i], **settings)[0], logprob=pytest.approx(row.logprob))  # type: ignore[arg-type]
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


# ---- the model afterwards, and bad input ----------------------------------------------------------------------------


def _check_trainable(model: gpt.LanguageModel) -> None:
    assert model.training and not any("_forward_impl" in vars(module) for module in model.modules())
    model.zero_grad()
    model(torch.tensor([[1, 2, 3]]), None, None).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_model_is_left_ready_for_training(world: World) -> None:
    def fail(ended: int, drawn: int) -> None:
        raise KeyboardInterrupt

    try:
        world.model.train()
        done: list[tuple[int, int]] = []
        responses = world.generate(batch_size=3, progress=lambda *counts: done.append(counts))
        ended, drawn = map(sum, zip(*done, strict=True))
        assert ended == len(world.prompts)
        assert drawn == sum(len(one.tokens) + (one.finish != "length") for one in responses)
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
        found = half_by_half(Decoder(model, 3, vocab_size, CONTEXT), prompts)
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


class Counting:
    """`draw`, with the number of rows drawn on this rank."""

    rows = 0

    def __call__(self, logits: torch.Tensor, *args: Any) -> torch.Tensor:
        self.rows += len(logits)
        return draw(logits, *args)


def check_layouts(folder: str, tokenizer_folder: str) -> dict[str, Any]:
    """Greedy and sampled tokens of three layouts, and whether all ranks returned the same."""
    import torch.distributed as dist

    tokenizer = load_tokenizer(tokenizer_folder)
    found: dict[str, Any] = {}
    prompts = make_prompts(tokenizer.vocab_size)
    drawn = Counting()
    generation.draw = drawn  # type: ignore[attr-defined, assignment]
    for tensor, pipeline in ((2, 1), (1, 2), (2, 2)):
        drawn.rows = 0
        model = build(folder, tokenizer.vocab_size, ParallelConfig(tensor=tensor, pipeline=pipeline))
        rows: dict[str, Any] = {}
        for name, settings in LAYOUT_SETTINGS.items():
            out = generate(model, tokenizer, prompts, settings, vocab_size=tokenizer.vocab_size, batch_size=4)
            rows[name] = [[g.tokens, g.text, g.finish, g.logprob] for g in out]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, rows)
        rows["same"] = all(other == rows for other in everywhere)
        dist.all_gather_object(everywhere, drawn.rows)
        rows["ranks that draw"] = [rank for rank, count in enumerate(everywhere) if count]
        free = 10**9 if dist.get_rank() else decoding.activation_bytes(model, 64) + 5 * 10**5  # less on one rank
        decoding._free_memory = lambda _, free=free: free  # type: ignore[assignment, misc]
        dist.all_gather_object(everywhere, decoding.slots_that_fit(model, 64, CONTEXT, 64, tokenizer.vocab_size))
        rows["slots"] = list(everywhere)
        decoding._free_memory = lambda _: None  # type: ignore[assignment]
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
        tensor, pipeline = int(layout[2]), int(layout[-1])
        replicas = 4 // (tensor * pipeline)  # the first rank of the last stage of each
        last = 4 // pipeline * (pipeline - 1)
        assert rows.pop("ranks that draw") == [last + tensor * replica for replica in range(replicas)], layout
        slots = rows.pop("slots")
        of_the_first = [4 // pipeline * stage + rank for stage in range(pipeline) for rank in range(tensor)]
        assert 0 < slots[0] < 64 and [rank for rank in range(4) if slots[rank] == slots[0]] == of_the_first
        assert 0 < rows.pop("distance") < 1e-4, layout
        for name, expected in alone.items():
            assert [row[:3] for row in rows[name]] == [[g.tokens, g.text, g.finish] for g in expected], (layout, name)
            assert [row[3] for row in rows[name]] == pytest.approx([g.logprob for g in expected], abs=1e-3)
