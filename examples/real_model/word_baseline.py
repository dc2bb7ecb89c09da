"""What words and length alone tell of the labels on which a regressor was measured.

    python examples/real_model/word_baseline.py --train trees/train.jsonl picked/train.jsonl --test trees/val.jsonl \\
        --report regressor-report/report.json --attributes all.yaml --output regressor.json

Words: ridge regression on TF-IDF of words and pairs of words, fitted on the regressor's own training rows. Length: the
logarithm of the number of words. Both are compared as the regressor is, by Pearson correlation on held-out rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from nemo_steerlm.agreement import pearson
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.evaluate.samples import Response, labelled_responses
from nemo_steerlm.report.tables import number, text_table


def main() -> None:
    """Write the figures of every attribute, print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True)
    for name in ("test", "report", "attributes", "output"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    schema = AttributeSchema.load(arguments.attributes)
    train = list(labelled_responses(arguments.train, schema))
    test = list(labelled_responses([arguments.test], schema))
    measured = next(iter(json.loads(Path(arguments.report).read_text())["datasets"].values()))["attributes"]
    found = {
        name: {"pearson": one["pearson"], "interval": one["interval"]["pearson"], **baselines(train, test, name)}
        for name, one in measured.items()
    }
    Path(arguments.output).write_text(json.dumps(found, indent=2) + "\n")
    rows = [[name, *(number(one[key]) for key in ("pearson", "words", "length"))] for name, one in found.items()]
    sys.stdout.write(text_table(rows, ["attribute", "regressor", "words", "length"]) + "\n")


def baselines(train: list[Response], test: list[Response], name: str) -> dict[str, float]:
    """Pearson of both baselines with the labels of one attribute."""
    train, test = ([one for one in part if name in one.label] for part in (train, test))
    label = np.array([one.label[name] for one in test])
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    model = Ridge(alpha=1.0).fit(words.fit_transform(map(text, train)), [one.label[name] for one in train])
    length = np.log([1 + len(text(one).split()) for one in test])
    return {
        "words": float(pearson(model.predict(words.transform(map(text, test))), label)),
        "length": abs(float(pearson(length, label))),
    }


def text(response: Response) -> str:
    """The response itself."""
    return response.conversation.turns[response.turn].text


if __name__ == "__main__":
    main()
