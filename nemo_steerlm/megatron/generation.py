"""Sample responses from a language model: continuous batches of ragged prompts, any TP x PP layout.

Batching. Requests wait in a queue, the longest prompts first. At most `batch_size` of them decode together, a token a
step, each in a slot of the cached model (`decoding.py`) at its own position. A finished row frees its slot for the
next request, whose prompt is then prefilled; the others stay where they are.

Drawing. The first tensor-parallel rank of the last pipeline stage draws a token on its device, and all ranks get it:
one wait for the device a step. A draw depends only on the row's logits, its seed and its step, not on its batch, the
layout, or a job resumed half-way. (Logits of another batch or layout differ in their last bits, so a draw that falls
that close to a border can differ.)
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.megatron.decoding import Decoder, serving, slots_that_fit
from nemo_steerlm.megatron.drawing import SamplingSettings, draw, uniforms
from nemo_steerlm.megatron.gpt import LanguageModel
from nemo_steerlm.megatron.inference import broadcast_from_last_stage
from nemo_steerlm.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

# At the end of the queue the cache is compacted once this share of its slots is in use: copying it costs about as much
# as one step.
_COMPACT_AT = 0.8
# Prompts are prefilled so many tokens at a time, which bounds the memory of their activations.
_PREFILL_TOKENS = 16384
# What a token means for its row; the last three end it.
_CONTINUES, _LENGTH, _STOP, _EOS = 0, 1, 2, 3
_FINISH = {_LENGTH: "length", _STOP: "stop", _EOS: "eos"}


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One response.

    Attributes:
        tokens: its ids, without the stop text or end-of-text token. A token that holds text and the beginning of a
            stop text is left out; its text is in `text`.
        text: the response, cut at the stop text.
        finish: "stop" (a stop text), "eos" (an end-of-text token), or "length".
        logprob: sum of the model's log probabilities (temperature 1, nothing filtered) of all tokens it drew, the
            ones that ended the response included.
    """

    tokens: list[int]
    text: str
    finish: str
    logprob: float


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    vocab_size: int,
    seeds: Sequence[int] | None = None,
    ends: tuple[int, ...] = (),
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Continue every prompt; all ranks of the model's TP x PP group call it with the same arguments.

    Args:
        model: this rank's stage, without sequence parallelism and virtual stages; left as it was, also on errors.
        prompts: token ids.
        vocab_size: the model's true vocabulary. Ids beyond it, and those the tokenizer has no token for, are never
            drawn.
        seeds: one a prompt, by default its index; for jobs in parts, give a row the same number in every part.
        ends: ids that end a response as the tokenizer's end-of-text id does.
        batch_size: rows decoded together at most, fewer where a GPU has no memory for so many. Memory is bounded by
            it, not by the number of prompts. Equal prompts that enter together are computed once.
        progress: called after each step with the number of responses that ended, and of tokens that were drawn.

    Returns:
        A response for each prompt, in the order of the prompts, on every rank.

    Raises:
        DataError: a prompt is empty, leaves no room for a token, or holds ids beyond the vocabulary.
        ConfigError: there is no memory for even one row.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: expected at least 1")
    _check_prompts(prompts, vocab_size, model.max_sequence_length)
    seeds = range(len(prompts)) if seeds is None else seeds
    assert len(seeds) == len(prompts), f"{len(seeds)} seeds for {len(prompts)} prompts"
    if not prompts:
        return []
    vocab_size = min(vocab_size, tokenizer.vocab_size)
    judge = _stop_judge(tokenizer, settings.stop, vocab_size, ends)
    with serving(model):
        read = max(map(len, prompts))
        longest = min(read + settings.max_new_tokens, model.max_sequence_length)
        wanted = min(batch_size, len(prompts))
        slots = slots_that_fit(model, wanted, longest, max(read, _PREFILL_TOKENS), vocab_size)
        if slots < wanted:
            _say_lowered(batch_size, slots, longest)
        decoder = Decoder(model, slots, vocab_size, longest)
        rows = [list(prompt) for prompt in prompts]
        return _ContinuousBatch(decoder, rows, seeds, settings, judge, tokenizer.holes, progress).run()


@functools.cache  # logged once for all parts of a job
def _say_lowered(batch_size: int, slots: int, longest: int) -> None:
    _log.warning(
        "batch_size=%d: the free GPU memory holds %d rows of %s tokens, which decode together", batch_size, slots,
        f"{longest:,}",
    )  # fmt: skip


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, max_length: int) -> None:
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {index} is empty: expected at least one token")
        if len(prompt) >= max_length:
            raise DataError(
                f"prompt {index} has {len(prompt)} tokens, the model holds {max_length} (max_position_embeddings) "
                f"with the response; shorten the prompt"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise DataError(
                f"prompt {index} holds token ids from {min(prompt)} to {max(prompt)}, the model's vocabulary has "
                f"{vocab_size}; use the tokenizer the model was trained with"
            )


# ---- the batch ------------------------------------------------------------------------------------------------------


class _ContinuousBatch:
    """Waiting requests, and those that decode together.

    Arrays in `_SLOTS` have a row for each slot of the decoder; `requests` holds its request, -1 for a free slot.
    """

    _SLOTS = ("requests", "tokens", "counts", "budgets", "uniforms")

    def __init__(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        judge: _StopJudge,
        holes: Sequence[int],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.decoder, self.prompts, self.seeds, self.settings = decoder, prompts, seeds, settings
        self.judge, self.progress = judge, progress
        self.holes = decoder.on_device(np.array(holes, np.int64))  # ids without a token
        # The longest first: lack of memory shows at once, and prompts that enter together have similar lengths.
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i])))
        self.limit = decoder.model.max_sequence_length
        slots, steps = len(decoder.lengths), min(settings.max_new_tokens, self.limit - min(map(len, prompts)))
        self.requests = np.full(slots, -1)
        self.tokens, self.counts = np.zeros((slots, steps), np.int64), np.zeros(slots, np.int64)
        self.budgets = np.zeros(slots, np.int64)
        self.uniforms = np.zeros((slots, steps if settings.temperature else 0))
        self.idle = 0  # free slots, summed over the steps since the last prefill
        self.endings = np.full(len(prompts), _CONTINUES)
        self.responses: list[list[int]] = [[] for _ in prompts]
        self.logprobs = decoder.on_device(np.zeros(len(prompts)))  # on the rank that decides

    def run(self) -> list[Generation]:
        """Decode until every request has ended."""
        while self.waiting or (self.requests >= 0).any():
            if self._due():
                self._admit()
            live = np.flatnonzero(self.requests >= 0)
            if not self.waiting and 0 < len(live) <= _COMPACT_AT * len(self.requests):
                self._compact(live)
                live = np.arange(len(live))
            if len(live):
                newest = self.tokens[np.arange(len(self.tokens)), self.counts - 1]
                self._advance(self.decoder.decode(newest, live), live)
        logprobs = self._decided(self.logprobs).tolist()
        return list(map(self.judge.generation, self.responses, self.endings.tolist(), logprobs))

    def _due(self) -> bool:
        """Whether to prefill now: once the free slots have cost as much as a prefill, about one step of all slots.

        (The cheapest batch size where set-up and waiting both cost: Harris's formula.)
        """
        self.idle += int((self.requests < 0).sum())
        return bool(self.waiting) and self.idle >= len(self.requests)

    def _admit(self) -> None:
        """Move waiting requests into the free slots."""
        self.idle, free = 0, np.flatnonzero(self.requests < 0)
        while len(free) and self.waiting:
            rows = max(1, _PREFILL_TOKENS // len(self.prompts[self.waiting[0]]))
            group = [self.waiting.popleft() for _ in range(min(rows, len(free), len(self.waiting)))]
            slots, free = free[: len(group)], free[len(group) :]
            self.requests[slots], self.counts[slots] = group, 0
            unique: list[list[int]] = []
            sources = []
            for slot, request in zip(slots, group, strict=True):
                prompt = self.prompts[request]
                if not unique or prompt != unique[-1]:
                    unique.append(prompt)
                sources.append(len(unique) - 1)
                self.budgets[slot] = min(self.settings.max_new_tokens, self.limit - len(prompt))
            if self.settings.temperature:
                seeds = [self.seeds[request] for request in group]
                self.uniforms[slots] = uniforms(self.settings, seeds, self.uniforms.shape[1])
            self._advance(self.decoder.prefill(unique, slots, np.array(sources)), slots)

    def _advance(self, logits: torch.Tensor | None, slots: np.ndarray) -> None:
        """Give each of `slots` its next token, and end the rows that end with it."""
        ids = self._draw(logits, slots)
        self.tokens[slots, self.counts[slots]] = ids
        self.counts[slots] += 1
        endings = self.judge.endings(ids, self.tokens, slots, self.counts[slots])
        endings[(endings == _CONTINUES) & (self.counts[slots] >= self.budgets[slots])] = _LENGTH
        ended = slots[endings != _CONTINUES]
        self.endings[self.requests[ended]] = endings[endings != _CONTINUES]
        for slot in ended:
            self.responses[self.requests[slot]] = self.tokens[slot, : self.counts[slot]].tolist()
        self.requests[ended] = -1
        if len(ended):
            self.decoder.free(ended)
        if self.progress is not None:
            self.progress(len(ended), len(slots))

    def _draw(self, logits: torch.Tensor | None, slots: np.ndarray) -> np.ndarray:
        """The next token of each of `slots`, the same on all ranks: the one wait for the device in a step."""
        ids = self.decoder.on_device(np.zeros(len(slots), np.int64))
        if logits is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
            if len(self.holes):
                logits[:, self.holes] = -torch.inf
            drawn = self.uniforms[slots, self.counts[slots]] if self.settings.temperature else None
            ids = draw(logits, self.settings, None if drawn is None else self.decoder.on_device(drawn))
            chosen = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)
            self.logprobs.index_add_(0, self.decoder.on_device(self.requests[slots]), chosen.double())
        return self._decided(ids).cpu().numpy()

    def _decided(self, tensor: torch.Tensor) -> torch.Tensor:
        """Broadcast the drawing rank's tensor to every rank of the model (filled in place)."""
        if self.decoder.model.post_process and parallel_state.get_tensor_model_parallel_world_size() > 1:
            group = parallel_state.get_tensor_model_parallel_group()
            dist.broadcast(tensor, parallel_state.get_tensor_model_parallel_src_rank(), group=group)
        return broadcast_from_last_stage(tensor)

    def _compact(self, live: np.ndarray) -> None:
        """The queue is empty: keep only the slots in use."""
        self.decoder.keep(live)
        for name in self._SLOTS:
            setattr(self, name, getattr(self, name)[live])


# ---- ending ---------------------------------------------------------------------------------------------------------


class _StopJudge:
    """Says whether a token ends its row.

    A stop text may be one token or cross token borders. The row's tail is decoded only after a token in whose text a
    stop text can end; this is determined once for each token.
    """

    _UNSEEN, _TAIL = -1, 4  # besides the endings: not examined yet; examine the tail

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...], vocab_size: int, ends: tuple[int, ...] = ()
    ) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stop_ids = {tokenizer.token_id(text) for text in stop} - {None}
        # Every token holds a byte or more; the slack is for characters cut at the tail's beginning.
        self.window = 8 + max((len(text.encode()) for text in stop), default=0)
        self.kinds = np.full(vocab_size, self._UNSEEN if stop else _CONTINUES, np.int8)
        for token in (tokenizer.eos_id, *ends):
            if token is not None and token < vocab_size:
                self.kinds[token] = _EOS
        for token in self.stop_ids:
            self.kinds[token] = _STOP

    def endings(self, ids: np.ndarray, tokens: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """How the newest tokens `ids` of `rows` end them; the tokens of a row are `tokens[rows[i], :counts[i]]`."""
        kinds = self.kinds[ids]
        for i in np.flatnonzero(kinds == self._UNSEEN):
            self.kinds[ids[i]] = kinds[i] = self._kind(int(ids[i]))
        for i in np.flatnonzero(kinds == self._TAIL):
            tail = tokens[rows[i], max(0, counts[i] - self.window) : counts[i]]
            kinds[i] = _STOP if self._holds_stop(tail.tolist()) else _CONTINUES
        return kinds

    def _kind(self, token: int) -> int:
        piece = self.tokenizer.decode_continuation([token])
        if "\ufffd" in piece:  # bytes of a character, which the next ones may complete
            return self._TAIL
        can_end = any(
            text in piece or any(piece.startswith(text[i:]) for i in range(1, len(text))) for text in self.stop
        )
        return self._TAIL if can_end else _CONTINUES

    def _holds_stop(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode_continuation(tokens)
        return any(stop in text for stop in self.stop)

    def generation(self, tokens: list[int], ending: int, logprob: float) -> Generation:
        """The response of all tokens that were drawn for it."""
        if ending == _EOS or (ending == _STOP and tokens[-1] in self.stop_ids):
            tokens, text = tokens[:-1], self.tokenizer.decode_continuation(tokens[:-1])
        elif ending == _STOP:
            tokens, text = self._cut(tokens)
        else:
            text = self.tokenizer.decode_continuation(tokens)
        return Generation(tokens=tokens, text=text, finish=_FINISH[ending], logprob=logprob)

    def _cut(self, tokens: list[int]) -> tuple[list[int], str]:
        """Tokens and text before the first stop text."""
        text = self.tokenizer.decode_continuation(tokens)
        end = min((place for place in map(text.find, self.stop) if place >= 0), default=len(text))
        while tokens and len(self.tokenizer.decode_continuation(tokens)) > end:
            tokens = tokens[:-1]
        return tokens, text[:end]


@functools.lru_cache(maxsize=4)
def _stop_judge(tokenizer: Tokenizer, stop: tuple[str, ...], vocab_size: int, ends: tuple[int, ...]) -> _StopJudge:
    """One judge for all parts of a job: its cache of tokens stays valid."""
    return _StopJudge(tokenizer, stop, vocab_size, ends)
