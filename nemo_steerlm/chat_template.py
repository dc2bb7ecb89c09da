"""A chat model's own format, from its tokenizer: the strings of a :class:`PromptTemplate` that renders the same text.

A chat template is a program. It renders messages of known texts, and the strings are the parts between these texts.
Other messages then check that the strings render the same text as the program.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import DEFAULT_SYSTEM, Conversation, Turn
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.speakers import ASSISTANT, USER
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_SYSTEM, _ASK, _ANSWER, _ASK_AGAIN = "Qsystemq", "Qaskq", "Qanswerq", "Qagainq"  # as no template writes
_SAYS_END = re.compile(r"end.?of|</s>|eo[smt]", re.IGNORECASE)
_TRIED = ("Why?", "1. Because, of\n\n  2 things:  3 < 4", "É ﬁ 😀 'x'", "{{ a }}\nEnd.")


def own_strings(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the fields of a :class:`PromptTemplate`, except ``label_start``, that renders like the chat template.

    White space around a text, which some chat templates strip, is kept.

    Raises:
        ConfigError: There is no chat template, or the strings cannot express it.
    """
    if tokenizer.chat_template is None:
        raise ConfigError("the model's tokenizer has no chat template; choose template=steerlm or template=chatml")
    if "strftime_now" in tokenizer.chat_template:
        raise _inexpressible("it writes the date")
    try:
        strings = _solve(tokenizer)
        template = PromptTemplate(**strings)
    except ConfigError as error:
        raise _inexpressible(str(error)) from None
    schema = AttributeSchema.load("helpsteer")  # nothing of it is shown
    for system, texts in ((None, _TRIED[:1]), (None, _TRIED[:3]), (_TRIED[3], _TRIED[1:2]), (_TRIED[1], _TRIED[:3])):
        expected = tokenizer.render_chat(_messages(system, texts), prompt=True)
        turns = [Turn((USER, ASSISTANT)[n % 2], text) for n, text in enumerate((*texts, ""))]
        row = Conversation(turns, system=DEFAULT_SYSTEM if system is None else system)
        found = "".join(span.text for span in template.spans(row, schema, clean=str)[:-1])
        if found != expected:
            at = max(0, len(os.path.commonprefix([found, expected])) - 9)
            raise _inexpressible(f"it writes {expected[at:]!r:.70} where they write {found[at:]!r:.70}")
    return strings


def _inexpressible(why: str) -> ConfigError:
    return ConfigError(
        f"the model's own chat template cannot be written with the strings of template: {why}; choose template=chatml "
        f"or template=steerlm"
    )


def _messages(system: str | None, texts: Iterable[str]) -> list[dict[str, str]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def _between(text: str, *said: str) -> list[str]:
    """The parts of a rendered text around the texts `said`."""
    parts = re.split("|".join(said), text)
    if re.findall("|".join(said), text) != list(said):
        raise ConfigError(f"it writes {text!r:.120} for the texts {', '.join(said)}")
    return parts


def _solve(tokenizer: Tokenizer) -> dict[str, str]:
    """The strings, as the first messages show them."""
    chat = tokenizer.render_chat(_messages(_SYSTEM, (_ASK, _ANSWER, _ASK_AGAIN)), prompt=True)
    head, to_user, to_answer, again, _ = _between(chat, _SYSTEM, _ASK, _ANSWER, _ASK_AGAIN)
    end = _between(tokenizer.render_chat(_messages(_SYSTEM, (_ASK,)), prompt=False), _SYSTEM, _ASK)[-1]
    opening = os.path.commonprefix([to_answer, again])  # end_of_turn + turn_start
    end_of_name = os.path.commonprefix([to_answer[::-1], again[::-1]])[::-1]
    if not opening.startswith(end) or not end:
        raise ConfigError(f"a turn ends with {end!r:.70} when it is the last one, else with {opening!r:.70}")
    turn_start = opening[len(end) :].lstrip()
    if not turn_start or not end_of_name or turn_start not in head:
        raise ConfigError(f"turns of users begin with {again!r:.70}, those of the model with {to_answer!r:.70}")
    if not head.endswith(end_of_name):
        raise ConfigError(f"it writes {head!r:.120} before a system prompt")
    start, _, name = head.removesuffix(end_of_name).rpartition(turn_start)
    plain = tokenizer.render_chat(_messages(None, (_ASK,)), prompt=True)
    before = _between(plain, _ASK)[0]
    if before == start + again[len(opening) - len(turn_start) :]:
        system = ""
    elif before.startswith(head) and before.endswith(to_user):
        system = before[len(head) : -len(to_user)]
    else:
        raise ConfigError(f"it begins with {before!r:.120} where there is no system prompt")
    return {
        "system_start": start + turn_start, "turn_start": turn_start, "end_of_name": end_of_name,
        "end_of_turn": opening.removesuffix(turn_start), "system_name": name,
        "user": again[len(opening) :].removesuffix(end_of_name),
        "assistant": to_answer[len(opening) :].removesuffix(end_of_name), "system": system,
    }  # fmt: skip


def unused_token(tokenizer: Tokenizer, strings: Iterable[str], ends: Collection[int] = ()) -> str:
    """Return the special token that may open an attribute string: the first unused one.

    Used ones are those of the chat template and of these strings, begin and end of text (also by name: Llama 3's chat
    models have two), padding and unknown.

    Args:
        tokenizer: The model's.
        strings: Of the prompt template.
        ends: Further end-of-text ids of the model.

    Raises:
        ConfigError: There is none.
    """
    taken = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *ends}
    used = " ".join([*strings, tokenizer.chat_template or "", tokenizer.unknown or ""])
    atoms = sorted((id_, text) for text, id_ in tokenizer.atoms.items() if id_ in tokenizer.special_ids - taken)
    free = [text for _, text in atoms if text not in used and text.split() == [text] and not _SAYS_END.search(text)]
    if not free:
        raise ConfigError(
            "template.label_start=null: the tokenizer has no special token that is not used yet; give one, or a text "
            "that nobody writes, as template.label_start="
        )
    _log.info("template.label_start is %r, the first special token of the tokenizer that nothing else uses", free[0])
    return free[0]
