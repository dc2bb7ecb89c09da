"""Ask one question at every level of one attribute, and let the regressor judge the answers.

python examples/steer.py outputs/quickstart humor "How do I grow tomatoes?"
"""

from __future__ import annotations

import sys

from nemo_steerlm import AttributeConditionedGPT, AttributeRegressor
from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.terminal import readable


def main(run: str, attribute: str, question: str) -> None:
    """Print requested level, judged level and answer, one level a line."""
    policy = AttributeConditionedGPT.from_pretrained(f"{run}/policy/model")
    regressor = AttributeRegressor.from_pretrained(f"{run}/regressor/model")
    schema = policy.schema
    for level in range(schema[attribute].low, schema[attribute].high + 1):
        wanted = {attribute: level}  # the others take the schema's defaults
        answer = policy.generate(question, wanted, temperature=0.85, top_k=50, max_new_tokens=160, seed=level)
        judged = regressor.score([Conversation([Turn("User", question), Turn("Assistant", answer)])])[0][attribute]
        sys.stdout.write(f"{attribute} asked {level}, judged {judged:.1f}: {readable(answer)}\n")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
