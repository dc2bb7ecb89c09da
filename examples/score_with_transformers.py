"""Score conversations with an exported regressor: transformers and torch alone, nothing of this package.

    steerlm export checkpoint=regressor/model output=regressor-hf
    python score_with_transformers.py regressor-hf conversations.jsonl > scores.jsonl

Each line of the input is {"messages": [{"role", "content"}, ...]}; the last message is the answer that is rated. Each
line of the output has a value for every attribute, on the attribute's own scale. A correction that was stored with
the regressor lies in the folder as calibration.json; it is applied, as `steerlm annotate` does.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

if len(sys.argv) != 3:
    sys.exit(__doc__)
folder, path = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
names = [model.config.id2label[k] for k in range(model.config.num_labels)]
correction = Path(folder) / "calibration.json"
curves = json.loads(correction.read_text())["attributes"] if correction.is_file() else {}


def corrected(name: str, value: float) -> float:
    """The value of one attribute after its curve, where it has one."""
    curve = curves.get(name)
    if curve is None:
        return value
    if "x" in curve:
        return float(np.interp(value, curve["x"], curve["y"]))
    return curve["slope"] * value + curve["intercept"]


with open(path, encoding="utf-8") as file:
    chats = [json.loads(line)["messages"] for line in file]
for first in range(0, len(chats), 8):
    eight = chats[first : first + 8]
    batch = tokenizer.apply_chat_template(eight, padding=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        for values in model(**batch).logits.tolist():
            scores = {name: corrected(name, value) for name, value in zip(names, values, strict=True)}
            sys.stdout.write(json.dumps(scores) + "\n")
