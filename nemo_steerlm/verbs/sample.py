"""Step 4a: the policy answers prompts at the best attribute combinations observed in the data."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import SampleConfig
from nemo_steerlm.conversation import Conversation, Turn, read_conversations
from nemo_steerlm.data.tokenise import without_oldest
from nemo_steerlm.errors import CheckpointError, DataError
from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.drawing import SamplingSettings
from nemo_steerlm.megatron.jobs import Record, count_rows, run_in_parts
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.progress import Progress
from nemo_steerlm.provenance import fingerprint_folder, sha256_file, write_run_json
from nemo_steerlm.speakers import ASSISTANT

Combination = dict[str, float]


def main(config: SampleConfig) -> None:
    """`steerlm sample`: write `config.output`, `responses` answers to each prompt."""
    parallel.start(config)
    model = AttributeConditionedGPT.from_pretrained(
        config.checkpoint, parallel=config.parallel, precision=config.trainer.precision
    )
    with contextlib.closing(model):
        sample(model, config)


def observed_combinations(
    conversations: Iterator[Conversation], schema: AttributeSchema, target: list[str]
) -> list[Combination]:
    """The attribute combinations of the annotated data whose target attributes are at their maximum.

    Each combination counts once, however often it occurs (SteerLM, arXiv 2310.05344, section 3.4: V is a set and
    v' is uniform over it). Where no response of the data has all targets at the top of their range, the combinations
    with the highest observed sum of targets are used.

    Raises:
        ConfigError: a target is no attribute of the schema.
        DataError: no response carries all targets.
    """
    highs = {name: schema[name].high for name in target}
    found: dict[tuple[tuple[str, float], ...], float] = {}
    for conversation in conversations:
        for turn in conversation.turns:
            if turn.label and all(name in turn.label for name in target):
                found[tuple(sorted(turn.label.items()))] = sum(turn.label[name] for name in target)
    if not found:
        raise DataError(f"no response of the annotated data has a label for {', '.join(target)}; run annotate first")
    best = min(max(found.values()), sum(highs.values()))
    return [dict(combination) for combination, total in sorted(found.items()) if total == best]


def sample(model: AttributeConditionedGPT, config: SampleConfig) -> None:
    """Answer `config.prompts` with a loaded policy.

    Each row is the prompt with one answer; the requested combination stands in its `requested` key, and the answer
    has no label until it is annotated. Answers are a function of (seed, prompt, number of the answer) alone.
    """
    schema = model.card.schema
    if schema is None:
        raise CheckpointError(
            f"{config.checkpoint}: an imported language model knows no attributes; run train-sft first"
        )
    combinations = observed_combinations(read_conversations(config.annotated, schema), schema, list(config.target))
    prompts, output = Path(config.prompts), Path(config.output)
    settings = SamplingSettings(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
        top_p=1.0 if config.top_p is None else config.top_p, stop=model.card.template.stops, seed=config.seed,
    )  # fmt: skip
    job = {
        "verb": "sample", "prompts": parallel.on_rank_zero(lambda: sha256_file(prompts)),
        "checkpoint": parallel.on_rank_zero(lambda: fingerprint_folder(config.checkpoint)),
        "combinations": combinations, "responses": config.responses, "settings": dataclasses.asdict(settings),
        "part_size": config.part_size, "precision": model.cfg.precision,
    }  # fmt: skip

    tokens, started = 0, time.perf_counter()

    def part(index: int, rows: list[Conversation], bar: Progress) -> list[Record]:
        def moved(ended: int, drawn: int) -> None:
            nonlocal tokens
            tokens += drawn
            bar.update(ended, f"{tokens / (time.perf_counter() - started):,.0f} tokens/s")

        room = model.card.architecture.max_position_embeddings - config.max_new_tokens
        requests_ = [(row, prompt) for row in rows if (prompt := _fit(model, row, room))]
        seeds = [_number(config.seed, row.id) for row, _ in requests_]
        answers = model.sample(
            [prompt for _, prompt in requests_], settings, seeds=seeds, batch_size=config.batch_size,
            progress=moved,
        )  # fmt: skip
        for (row, _), answer in zip(requests_, answers, strict=True):
            text = model.response(answer)
            name = next((row.turns[index].speaker for index in row.response_indices), ASSISTANT)
            row.turns.append(Turn(name, text))
            row.extra |= {"finish": answer.finish, "logprob": round(answer.logprob, 4)}
        return [row.to_record() for row in rows]

    requests = _requests(read_conversations(prompts, schema), combinations, config)
    rows = count_rows(prompts)
    run_in_parts(
        requests, part, output=output, job=job, part_size=config.part_size * config.responses,
        total=None if rows is None else rows * config.responses, unit="responses",
    )  # fmt: skip
    if parallel.is_rank_zero():
        inputs: list[str | Path] = [prompts, config.annotated]
        name = f"{output.name.split('.')[0]}.run.json"
        write_run_json(output.parent, "sample", config, inputs, schema, name=name, combinations=len(combinations))


def _fit(model: AttributeConditionedGPT, row: Conversation, room: int) -> list[int]:
    """Prompt tokens of a row; where they leave no room for an answer, the oldest turns are dropped.

    Empty when that is not enough: the row stays without an answer, marked `finish: overlong`.
    """
    while len(tokens := model.prompt_tokens(row, row.extra["requested"])) > room:
        shorter = without_oldest(row, len(row.turns) - 1)
        if shorter is None:
            row.extra["finish"] = "overlong"
            return []
        row.turns = shorter.turns
    return tokens


def _requests(
    conversations: Iterator[Conversation], combinations: list[Combination], config: SampleConfig
) -> Iterator[Conversation]:
    """For each prompt `responses` copies without its last answer, each with a combination drawn uniformly."""
    for conversation in conversations:
        last = max(
            (i for i, turn in enumerate(conversation.turns) if turn.speaker in conversation.masked_speakers),
            default=-1,
        )
        if last < 0:
            raise DataError(f"{config.prompts}: row '{conversation.id}' has no turn of {conversation.mask} to answer")
        for number in range(config.responses):
            name = f"{conversation.id}/{number}"
            draw = np.random.default_rng([config.seed, _number(config.seed, name)])
            requested = combinations[int(draw.integers(len(combinations)))]
            yield dataclasses.replace(
                conversation, turns=conversation.turns[: last + 1], id=name, extra={"requested": requested}
            )


def _number(seed: int, name: str | None) -> int:
    """A number that depends on the seed and the row's name, not on its part."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:6], "big")
