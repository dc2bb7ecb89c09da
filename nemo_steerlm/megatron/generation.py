"""Sample responses from a language model: batches of ragged prompts, cached keys and values, any TP x PP layout.

How a batch runs. Prompts are padded on the right and go through the model once, causally, so that no real token sees
padding and every token has its true position. Then each row decodes one token a step at its own position; new keys
stand behind the padding, which a bias hides. Rows that end leave the batch.

What decides a token. The last pipeline stage draws it and all stages get it. A draw depends on the row's logits, its
seed and its step, and on nothing else: not on the batch it is in, the layout, or a job resumed half-way. (Logits of
another batch or layout differ in their last bits, so a draw that falls that close to a border can differ.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.megatron.gpt import LanguageModel
from nemo_steerlm.megatron.inference import broadcast_from_last_stage, forward
from nemo_steerlm.megatron.layers import KeyValueCache, SDPACoreAttention
from nemo_steerlm.tokenizer import Tokenizer

# A batch is compacted once this share of its rows is left: copying the caches costs about as much as one step.
_COMPACT_AT = 0.8
# What a token means for its row; the last three end it.
_CONTINUES, _LENGTH, _STOP, _EOS = 0, 1, 2, 3
_FINISH = {_LENGTH: "length", _STOP: "stop", _EOS: "eos"}


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How responses are drawn.

    Attributes:
        max_new_tokens: at most so many tokens, the one that ends the response included. A row also ends where the
            model's `max_position_embeddings` does.
        temperature: 0 takes the most likely token (the lowest id among equals); otherwise logits are divided by it.
        top_k: draw from the k most likely tokens only, and those that equal the k-th; 0 for all.
        top_p: then from the smallest set of most likely tokens whose probability reaches this, and those that equal
            the last of it; 1 for all ("The Curious Case of Neural Text Degeneration", arXiv 1904.09751).
        stop: texts that end a response, in whatever tokens they come; they are not part of it.
        seed: with a row's own seed, decides its draws.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value that has no meaning.
        """
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("stop", isinstance(self.stop, tuple) and all(self.stop), "a tuple of texts, none of them empty"),
        ):
            if not valid:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One response.

    Attributes:
        tokens: its ids, without the stop text or end-of-text token. A token that holds the stop's beginning and also
            text before it is left out, that text is in `text`.
        text: the response, cut at the stop text.
        finish: "stop" (a stop text), "eos" (the tokenizer's end-of-text token), or "length".
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
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Continue every prompt; all ranks of the model's TP x PP group call it with the same arguments.

    Args:
        model: this rank's stage, without sequence parallelism and virtual stages; left as it was, also on errors.
        prompts: token ids.
        vocab_size: the true vocabulary; padded ids beyond it are never drawn.
        seeds: one a prompt, by default its index; for jobs in parts, give a row the same number in every part.
        batch_size: rows decoded together; prompts of like length share a batch.
        progress: called with the number of responses that just ended.

    Returns:
        A response for each prompt, in the order of the prompts, on every rank.

    Raises:
        DataError: a prompt is empty, leaves no room for a token, or holds ids beyond the vocabulary.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: expected at least 1")
    _check_prompts(prompts, vocab_size, model.max_sequence_length)
    seeds = range(len(prompts)) if seeds is None else seeds
    assert len(seeds) == len(prompts), f"{len(seeds)} seeds for {len(prompts)} prompts"
    judge = _stop_judge(tokenizer, settings.stop, vocab_size)
    results: list[Generation | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the longest first: memory fails at once
    with torch.inference_mode(), _inference_state(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = _Batch(
                model, [prompts[i] for i in chosen], [seeds[i] for i in chosen], settings, vocab_size, judge, progress
            )
            for i, generation in zip(chosen, batch.run(tokenizer), strict=True):
                results[i] = generation
    return results  # type: ignore[return-value]


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


@contextlib.contextmanager
def _inference_state(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode inside; caches, positions and mode as for training afterwards, whatever happens."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        for attention in _core_attentions(model):
            attention.cache = None
        model.rotary_pos_emb.positions = model.last_positions = None
        model.train(training)


def _core_attentions(model: LanguageModel) -> list[SDPACoreAttention]:
    return [layer.self_attention.core_attention for layer in model.decoder.layers]


# ---- one batch ------------------------------------------------------------------------------------------------------


class _Batch:
    """Rows that are decoded together.

    Arrays named for all rows keep their size; `rows` says which of them are still in the model's batch, and `alive`
    which of those have not ended.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: list[Sequence[int]],
        seeds: list[int],
        settings: SamplingSettings,
        vocab_size: int,
        judge: _StopJudge,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.model, self.prompts, self.settings = model, prompts, settings
        self.vocab_size, self.judge, self.progress = vocab_size, judge, progress
        self.device = next(model.parameters()).device
        count = len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts])
        self.budgets = np.minimum(settings.max_new_tokens, model.max_sequence_length - lengths)
        self.steps = int(self.budgets.max())
        self.uniforms = uniforms(settings, seeds, self.steps) if settings.temperature else None
        self.tokens = np.zeros((count, self.steps), np.int64)
        self.counts = np.zeros(count, np.int64)
        self.endings = np.full(count, _LENGTH)
        self.logprobs = np.zeros(count)
        self.rows, self.alive = np.arange(count), np.ones(count, bool)
        self.positions = torch.as_tensor(lengths, device=self.device)  # of the next token
        self.bias = self._padding_bias(int(lengths.max()), int(lengths.max()) + self.steps)
        for attention in _core_attentions(model):
            attention.cache = KeyValueCache(int(lengths.max()) + self.steps, self.bias)
        model.rotary_pos_emb.reserve(int(lengths.max()) + self.steps)

    def _padding_bias(self, width: int, capacity: int) -> torch.Tensor | None:
        """-inf `[rows, 1, 1, capacity]` behind each prompt, up to the longest; None without padding."""
        slots = torch.arange(capacity, device=self.device)
        hidden = (slots >= self.positions[:, None]) & (slots < width)
        if not hidden.any():
            return None
        bias = torch.zeros(hidden.shape, dtype=self.model.config.params_dtype, device=self.device)
        return bias.masked_fill_(hidden, -torch.inf)[:, None, None]

    def run(self, tokenizer: Tokenizer) -> list[Generation]:
        """Decode until every row has ended."""
        logits = self._prefill()
        for step in range(self.steps):
            ids = self._draw(logits, step)
            self._end_rows(ids, step)
            if not self.alive.any():
                break
            if self.alive.sum() <= _COMPACT_AT * len(self.alive):
                ids = ids[self.alive]
                self._compact()
            logits = self._decode(ids)
        broadcast_from_last_stage(logprobs := torch.as_tensor(self.logprobs, device=self.device))
        return [self._generation(tokenizer, row, float(logprob)) for row, logprob in enumerate(logprobs.cpu().numpy())]

    def _prefill(self) -> torch.Tensor | None:
        """Run the prompts; returns the logits of each one's last token, on the last pipeline stage."""
        width = max(map(len, self.prompts))
        padded = np.zeros((len(self.prompts), width), np.int64)
        for row, prompt in zip(padded, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        model = self.model
        model.rotary_pos_emb.positions, model.last_positions = None, self.positions - 1
        logits = forward(model, torch.as_tensor(padded, device=self.device))
        model.last_positions = None
        return self._whole_vocabulary(logits)

    def _decode(self, ids: np.ndarray) -> torch.Tensor | None:
        """Feed the drawn tokens; returns the next logits, on the last pipeline stage."""
        self.model.rotary_pos_emb.positions = self.positions
        logits = forward(self.model, torch.as_tensor(ids, device=self.device)[:, None])
        self.positions = self.positions + 1
        return self._whole_vocabulary(logits)

    def _whole_vocabulary(self, logits: torch.Tensor | None) -> torch.Tensor | None:
        """Logits `[rows, vocab_size]` in fp32 of this rank's `[rows, 1, padded / tp]`."""
        if logits is None:
            return None
        group = parallel_state.get_tensor_model_parallel_group()
        return gather_from_tensor_model_parallel_region(logits[:, 0], group=group)[:, : self.vocab_size].float()

    def _draw(self, logits: torch.Tensor | None, step: int) -> np.ndarray:
        """The next token of every row in the batch, the same on all ranks."""
        if logits is None:
            ids = torch.empty(len(self.rows), dtype=torch.int64, device=self.device)
        else:
            drawn = None if self.uniforms is None else self.uniforms[self.rows, step]
            ids = draw(logits, self.settings, drawn)
            if parallel_state.get_tensor_model_parallel_world_size() > 1:  # one rank decides, for kernels on a border
                group = parallel_state.get_tensor_model_parallel_group()
                dist.broadcast(ids, parallel_state.get_tensor_model_parallel_src_rank(), group=group)
            chosen = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)
            self.logprobs[self.rows[self.alive]] += chosen.cpu().numpy()[self.alive]
        return broadcast_from_last_stage(ids).cpu().numpy()

    def _end_rows(self, ids: np.ndarray, step: int) -> None:
        """Note the tokens of this step, and which rows end with it."""
        self.tokens[self.rows, step] = ids
        endings = self.judge.endings(ids, self.tokens, self.rows, self.alive, step + 1)
        endings[(endings == _CONTINUES) & (step + 1 >= self.budgets[self.rows])] = _LENGTH
        ended = self.alive & (endings != _CONTINUES)
        if ended.any():
            self.counts[self.rows[ended]] = step + 1
            self.endings[self.rows[ended]] = endings[ended]
            self.alive = self.alive & ~ended
            if self.progress is not None:
                self.progress(int(ended.sum()))

    def _compact(self) -> None:
        """Take the rows that have ended out of the model's batch."""
        kept = torch.as_tensor(np.flatnonzero(self.alive), device=self.device)
        self.positions = self.positions[kept]
        self.bias = None if self.bias is None else self.bias[kept]
        for attention in _core_attentions(self.model):
            assert attention.cache is not None
            attention.cache.select(kept, self.bias)
        self.rows = self.rows[self.alive]
        self.alive = np.ones(len(self.rows), bool)

    def _generation(self, tokenizer: Tokenizer, row: int, logprob: float) -> Generation:
        tokens, ending = self.tokens[row, : self.counts[row]].tolist(), int(self.endings[row])
        if ending == _EOS or (ending == _STOP and tokens[-1] in self.judge.stop_ids):
            tokens, text = tokens[:-1], tokenizer.decode_continuation(tokens[:-1])
        elif ending == _STOP:
            tokens, text = self.judge.cut(tokens)
        else:
            text = tokenizer.decode_continuation(tokens)
        return Generation(tokens=tokens, text=text, finish=_FINISH[ending], logprob=logprob)


# ---- drawing --------------------------------------------------------------------------------------------------------


def uniforms(settings: SamplingSettings, seeds: Sequence[int], steps: int) -> np.ndarray:
    """Numbers in [0, 1) `[rows, steps]`: a row's depend on (`settings.seed`, its seed) alone, as does every prefix."""
    keys = [np.array([settings.seed % 2**64, seed % 2**64], np.uint64) for seed in seeds]
    return np.stack([np.random.Generator(np.random.Philox(key=key)).random(steps) for key in keys])


def draw(logits: torch.Tensor, settings: SamplingSettings, uniform: np.ndarray | None) -> torch.Tensor:
    """Choose one token a row.

    The filtered probabilities stand in the order of the ids, not sorted by size: two tokens whose logits are equal up
    to rounding then cannot change places, and with them the draw.

    Args:
        logits: `[rows, vocabulary]`, fp32.
        uniform: `[rows]` in [0, 1); None with temperature 0.

    Returns:
        Ids `[rows]` on the logits' device.
    """
    if uniform is None:
        return logits.argmax(-1)
    ids: np.ndarray | None = None
    if 0 < settings.top_k < logits.shape[1]:
        values, ids = _largest(logits, settings.top_k)
    else:
        values = logits.cpu().numpy()
    scaled = values.astype(np.float64)
    scaled -= scaled.max(-1, keepdims=True)
    scaled /= settings.temperature
    weights = np.exp(scaled, out=scaled)
    if settings.top_p < 1:
        descending = -np.sort(-weights, axis=-1)
        before = descending.cumsum(-1) - descending
        inside = (before < settings.top_p * descending.sum(-1, keepdims=True)).sum(-1)
        weights[weights < np.take_along_axis(descending, inside[:, None] - 1, -1)] = 0
    borders = weights.cumsum(-1)
    index = (borders <= uniform[:, None] * borders[:, -1:]).sum(-1)  # the product stays below: uniform <= 1 - 2**-53
    chosen = index if ids is None else ids[np.arange(len(ids)), index]
    return torch.as_tensor(chosen, device=logits.device)


def _largest(logits: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and ids `[rows, m]` of each row's k largest logits, in the order of the ids.

    On the CPU logits that equal the k-th stay too (then m > k, and rows with fewer end in -inf); CUDA's selection
    keeps k of them. NumPy's partition is about ten times as fast as torch's on the CPU.
    """
    if logits.is_cuda:
        largest = logits.topk(k, sorted=False).indices.sort(-1).values
        return logits.gather(1, largest).cpu().numpy(), largest.cpu().numpy()
    array = logits.numpy()
    size = array.shape[1]
    smallest = np.partition(array, size - k, axis=-1)[:, size - k, None]
    flat = np.flatnonzero(array >= smallest)
    rows, found = np.divmod(flat, size)
    counts = np.bincount(rows, minlength=len(array))
    columns = np.arange(len(flat)) - np.repeat(counts.cumsum() - counts, counts)
    values = np.full((len(array), counts.max()), -np.inf, array.dtype)
    ids = np.zeros(values.shape, np.int64)
    values[rows, columns], ids[rows, columns] = array[rows, found], found
    return values, ids


# ---- ending ---------------------------------------------------------------------------------------------------------


class _StopJudge:
    """Says whether a token ends its row.

    A stop text may come as one token or in pieces that do not respect its borders. Only a token in whose text a stop
    text can end is worth decoding the row's tail for; which tokens these are is found out once for each token.
    """

    _UNSEEN, _TAIL = -1, 4  # beside the endings: not looked at yet; look at the tail

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], vocab_size: int) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stop_ids = {tokenizer.token_id(text) for text in stop} - {None}
        # Every token holds a byte or more; the slack is for characters cut at the tail's beginning.
        self.window = 8 + max((len(text.encode()) for text in stop), default=0)
        self.kinds = np.full(vocab_size, self._UNSEEN if stop else _CONTINUES, np.int8)
        if tokenizer.eos_id is not None and tokenizer.eos_id < vocab_size:
            self.kinds[tokenizer.eos_id] = _EOS
        for token in self.stop_ids:
            self.kinds[token] = _STOP

    def endings(
        self, ids: np.ndarray, tokens: np.ndarray, rows: np.ndarray, alive: np.ndarray, count: int
    ) -> np.ndarray:
        """How the newest tokens `ids` of `rows` end them; `tokens[rows, :count]` is what each row holds."""
        kinds = self.kinds[ids]
        for i in np.flatnonzero(kinds == self._UNSEEN):
            self.kinds[ids[i]] = kinds[i] = self._kind(int(ids[i]))
        for i in np.flatnonzero(kinds == self._TAIL):
            tail = tokens[rows[i], max(0, count - self.window) : count]
            kinds[i] = _STOP if alive[i] and self._holds_stop(tail.tolist()) else _CONTINUES
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

    def cut(self, tokens: list[int]) -> tuple[list[int], str]:
        """Tokens and text before the first stop text."""
        text = self.tokenizer.decode_continuation(tokens)
        end = min((place for place in map(text.find, self.stop) if place >= 0), default=len(text))
        while tokens and len(self.tokenizer.decode_continuation(tokens)) > end:
            tokens = tokens[:-1]
        return tokens, text[:end]


@functools.lru_cache(maxsize=4)
def _stop_judge(tokenizer: Tokenizer, stop: tuple[str, ...], vocab_size: int) -> _StopJudge:
    """One judge for all parts of a job: what it found out about tokens stays true."""
    return _StopJudge(tokenizer, stop, vocab_size)
