"""Train the same rows, for the same steps, with transformers' Trainer and PEFT, and steer that with transformers.

    python examples/real_model/with_trainer.py --base HF-FOLDER --policy policy/model --train labelled/train.jsonl \\
        --answers steering/answers.jsonl --steps 600 --longest 128 --output trainer

Start, prompts, requests, template, samples, loss mask, rate, batch size, rank and alpha are the policy's. Adapters (of
the attribute tokens too, at the one rate that Trainer has), training and generation are theirs: whether steering is
the recipe's doing or the engine's shows here. Writes steering.json: requested against measured, as
`evaluate task=steerability` does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from label_texts import MEASURES
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from nemo_steerlm.conversation import Conversation, Turn, read_conversations
from nemo_steerlm.evaluate.metrics import json_ready
from nemo_steerlm.evaluate.scorers import text_measures
from nemo_steerlm.evaluate.steerability import Request, describe_answers, steerability
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.verbs.evaluate_steerability import read_answers

LONGEST = 512
BATCH = 4
ANSWERED = 32  # at once


def main() -> None:
    """Train, answer, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "policy", "answers", "train", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True, help="answer, tokens")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=32, help="of the adapters; their alpha is twice that")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    policy = AttributeConditionedGPT.from_pretrained(arguments.policy)  # for its template, tokenizer and attributes
    set_seed(arguments.seed)
    tokens = [policy.tokenizer.token_id(token) for token in policy.schema.tokens]
    lora = LoraConfig(
        r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear", trainable_token_indices=tokens
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32), lora)
    started = time.perf_counter()
    train(model, samples(policy, arguments.train), arguments)
    model = model.merge_and_unload()
    seconds = {"train": round(time.perf_counter() - started, 1)}
    requests, rows = read_answers(arguments.answers, "default")
    texts = answer(model, policy, requests, rows, arguments.longest)
    seconds["answer"] = round(time.perf_counter() - started - seconds["train"], 1)
    found = text_measures([Conversation([Turn("Assistant", text)]) for text in texts], len)
    columns = {name: np.array([one[key] for one in found]) for name, key in MEASURES.items() if name in policy.schema}
    report = steerability(requests, columns, policy.schema, seed=arguments.seed, answers=texts)
    report |= {"answers": describe_answers(texts), "seconds": seconds}
    path = Path(arguments.output) / "steering.json"
    path.write_text(json.dumps(json_ready(report), indent=2) + "\n")
    for name, one in report["steerability"].items():
        sys.stdout.write(f"{name}: requested against measured {one['spearman']:.3f}\n")


def samples(policy: AttributeConditionedGPT, path: str) -> list[dict[str, list[int]]]:
    """Token ids and targets (-100 = none) of every row that is not too long."""
    rows = [(row, True) for row in read_conversations(path, policy.schema)]
    encoded = policy.card.template.encode_policies(rows, schema=policy.schema, tokenizer=policy.tokenizer)
    return [
        {"input_ids": ids, "labels": [one if target else -100 for one, target in zip(ids, mask, strict=True)]}
        for ids, mask in encoded
        if len(ids) <= LONGEST
    ]


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch `[rows, longest]`."""
    longest = max(len(row["input_ids"]) for row in rows)

    def fill(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    there = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": fill("input_ids", 0), "labels": fill("labels", -100), "attention_mask": there}


def train(model: Any, rows: list[dict[str, list[int]]], arguments: argparse.Namespace) -> None:
    """`arguments.steps` optimizer steps of 4 rows."""
    settings = TrainingArguments(
        output_dir=arguments.output, max_steps=arguments.steps, per_device_train_batch_size=BATCH,
        learning_rate=arguments.rate, lr_scheduler_type="cosine", warmup_steps=20, adam_beta2=0.98, weight_decay=0.01,
        max_grad_norm=1.0, bf16=True, use_cpu=True,
        train_sampling_strategy="group_by_length", save_strategy="no", report_to=[], logging_steps=10,
        seed=arguments.seed, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, settings, train_dataset=rows, data_collator=padded).train()


@torch.inference_mode()
def answer(
    model: Any, policy: AttributeConditionedGPT, requests: list[Request], rows: list[Conversation], longest: int
) -> list[str]:
    """Answers to rows that end with one, drawn as the policy's; equal requests are answered once."""
    model.eval()
    pad, ends = policy.tokenizer.pad_id, [policy.tokenizer.eos_id, *policy.card.ends]
    prompts = [dataclasses.replace(row, turns=row.turns[:-1]) for row in rows]
    tokens = [tuple(policy.prompt_tokens(row, one.values)) for row, one in zip(prompts, requests, strict=True)]
    wanted = sorted(set(tokens), key=len)
    found: dict[tuple[int, ...], str] = {}
    for start in range(0, len(wanted), ANSWERED):
        part = wanted[start : start + ANSWERED]
        width = max(map(len, part))
        ids = torch.tensor([[pad] * (width - len(one)) + list(one) for one in part])
        there = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in part])
        out = model.generate(
            ids, attention_mask=there, max_new_tokens=longest, do_sample=True, temperature=1.0, top_k=50, top_p=1.0,
            repetition_penalty=1.0, pad_token_id=pad, eos_token_id=ends,
        )  # fmt: skip
        for one, drawn in zip(part, out[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(drawn) if token in ends), len(drawn))
            found[one] = policy.card.template.parse_response(policy.tokenizer.decode(drawn[:end]))
        sys.stdout.write(f"answers {min(start + ANSWERED, len(wanted))} of {len(wanted)}\n")
        sys.stdout.flush()
    return [found[one] for one in tokens]


if __name__ == "__main__":
    main()
