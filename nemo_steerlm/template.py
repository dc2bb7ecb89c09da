"""The prompt template: the one place that turns conversations into text and tokens.

Training, annotation and inference all use it, so that their prompts are equal. The format is NeMo-Aligner's::

    <extra_id_0>System\\n{system}\\n<extra_id_1>User\\n{text}\\n<extra_id_1>Assistant\\n<extra_id_2>{label}\\n{text}\\n<extra_id_1>

The attribute string is left out where a turn has no label. A regressor's input is the text up to and including a
response, without labels, and ``<extra_id_2>``. Text of users never opens a turn or an attribute string: see
:meth:`PromptTemplate.clean`.

Other strings give the formats of chat models, here ChatML, which has an end-of-turn marker::

    <|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n
    <|im_start|>assistant\n<label token>{label}\n{text}<|im_end|>

The attribute string has the same place as in SteerLM's format, between the speaker's name and the response, and ends
like a name; the rest is the model's own format.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import DEFAULT_SYSTEM, VALUE_TO_TEXT, Conversation, Turn
from nemo_steerlm.errors import ConfigError, DataError, suggest
from nemo_steerlm.files import encodable
from nemo_steerlm.guard import Guard, TokenGuard, shared_guard
from nemo_steerlm.speakers import ASSISTANT, USER
from nemo_steerlm.tokenizer import Tokenizer

Label = Mapping[str, float] | None
Clean = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a prompt that is tokenised on its own.

    Attributes:
        text: The characters.
        loss: True where the tokens are targets.
        turn: Index of the turn whose response this is, None for everything between responses.
    """

    text: str
    loss: bool
    turn: int | None = None


@dataclass(frozen=True)
class PromptTemplate:
    """The strings of the prompt; the defaults are NeMo-Aligner's documented ones.

    Attributes:
        system_start: Opens the prompt; may be, or end with, ``turn_start``.
        turn_start: Opens a turn.
        label_start: Opens an attribute string; a regressor reads its value at the last token of this marker.
        end_of_name: After a speaker's name and after an attribute string.
        end_of_turn: After the system prompt and after a turn's text.
        system_name: Name in the first line.
        user: Name written for the speaker "User" of a row.
        assistant: Name written for the speaker "Assistant".
        system: System prompt of a row that has none of its own (it has the default one, ``DEFAULT_SYSTEM``, then);
            "": no system prompt, and none of the strings around it.
    """

    system_start: str = "<extra_id_0>"
    turn_start: str = "<extra_id_1>"
    label_start: str = "<extra_id_2>"
    end_of_name: str = "\n"
    end_of_turn: str = "\n"
    system_name: str = "System"
    user: str = "User"
    assistant: str = "Assistant"
    system: str = DEFAULT_SYSTEM

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) or not (value or field.name == "system"):
                raise ConfigError(f"template.{field.name} must be a non-empty string, found {value!r}")
        markers = [*filter(None, (self._prefix, self.turn_start, self.label_start))]
        if any(character.isspace() for marker in markers for character in marker):
            raise ConfigError(f"template markers must not contain white space, found {markers}")
        for one, two in itertools.permutations(markers, 2):
            if _may_overlap(one, two):
                raise ConfigError(f"template markers {one!r} and {two!r} overlap; choose others")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptTemplate:
        """Build a template from a mapping; fields left out keep their default (raises ConfigError)."""
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ConfigError(f"template has no field '{key}'{suggest(str(key), names)}")
        return cls(**values)

    def to_dict(self) -> dict[str, str]:
        """Return the fields as a plain dict."""
        return dataclasses.asdict(self)

    @property
    def _prefix(self) -> str:
        """The beginning of a prompt without system prompt, before its first ``turn_start``."""
        return self.system_start.removesuffix(self.turn_start)

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings at which generation stops: the marker in ``end_of_turn``, where there is one; ``turn_start``."""
        return tuple(dict.fromkeys(filter(None, (self.end_of_turn.strip(), self.turn_start))))

    @functools.cached_property
    def closing(self) -> str:
        """The trained text after a response: all up to the first of `stops`, at which generation stops."""
        text = self.end_of_turn + self.turn_start
        return text[: text.index(self.stops[0]) + len(self.stops[0])]

    # -- text -------------------------------------------------------------------------------------------------------

    @property
    def markers(self) -> tuple[str, ...]:
        """The strings that structure a prompt; they never occur in cleaned text of users or models."""
        others = (self.end_of_name.strip(), self.end_of_turn.strip())
        return tuple(filter(None, (self._prefix, self.turn_start, self.label_start, *others)))

    @functools.cached_property
    def _guard(self) -> Guard:
        return shared_guard(self.markers)

    def clean(self, text: str) -> str:
        """Return ``text`` with every marker broken up, so that it cannot open a turn or an attribute string.

        A space goes after the first character of a marker; a marker of one character becomes a space. Text that a
        tokenizer's normaliser could turn into a marker (full-width or accented letters, other case, invisible
        characters inside) is broken up too. All other text is returned unchanged, and cleaning twice changes nothing.
        With a tokenizer, its own normalisation counts too: :class:`nemo_steerlm.guard.TokenGuard`.
        """
        return self._guard(text)

    def name_of(self, speaker: str, clean: Clean) -> str:
        """Return a speaker's name as in a prompt: on one line, without markers."""
        return " ".join(clean(speaker).split())

    def head(self, system: str, clean: Clean) -> str:
        """Return the beginning of a prompt with this system prompt, up to the first turn."""
        system = self.system if system == DEFAULT_SYSTEM else system
        if not (system or self.system):
            return self._prefix
        return f"{self.system_start}{self.system_name}{self.end_of_name}{clean(system)}{self.end_of_turn}"

    def _opening(self, speaker: str, clean: Clean) -> str:
        known = {USER: self.user, ASSISTANT: self.assistant}
        return f"{self.name_of(known.get(speaker, speaker), clean)}{self.end_of_name}"

    def label_line(self, schema: AttributeSchema, label: Label) -> str:
        """Return ``<extra_id_2>quality:4,...`` with its line end, or "" without a label."""
        text = schema.format(label)
        return f"{self.label_start}{text}{self.end_of_name}" if text else ""

    def render_regression(self, conversation: Conversation, turn_index: int, clean: Clean | None = None) -> str:
        """Return a regressor's input for one turn: the history, the response, ``label_start``; no labels.

        The row's own system prompt is used (NeMo-Aligner puts a fixed one here, another one in fine-tuning).
        ``clean`` is applied to the text of users, :meth:`clean` by default.
        """
        clean = clean or self.clean
        parts = [self.head(conversation.system, clean)]
        for turn in conversation.turns[: turn_index + 1]:
            parts += (self.turn_start, self._opening(turn.speaker, clean), clean(turn.text), self.end_of_turn)
        return "".join(parts) + self.label_start

    def spans(
        self,
        conversation: Conversation,
        schema: AttributeSchema,
        with_labels: bool | Sequence[Label] = True,
        clean: Clean | None = None,
    ) -> list[Span]:
        """Return the spans of a policy's prompt, cut before each response and after the marker that closes it.

        Loss lies on a response and its :attr:`closing` (the end-of-turn signal), for each turn that has a label; the
        first turn, masked speakers and shared turns never carry loss. With ``type`` None (plain fine-tuning) every
        other turn carries loss and no attribute string is written. The closing ends a final response too. By default
        it is ``end_of_turn`` with the ``turn_start`` after it, bare at the end: the reference's mask (NeMo's chat
        dataset), but an unlabelled response has no loss. In ChatML it is ``<|im_end|>`` without the line end after it.

        Args:
            conversation: The dialogue.
            schema: Orders and rounds the labels.
            with_labels: True shows each turn's label, False none; or the label to show, one entry a turn. It does not
                change the loss mask.
            clean: As in :meth:`render_regression`.
        """
        clean = clean or self.clean
        masked = conversation.masked_speakers
        found: list[Span] = []
        between = (self.end_of_turn + self.turn_start).removeprefix(self.closing)
        context = self.head(conversation.system, clean) + self.turn_start
        last = len(conversation.turns) - 1
        for index, turn in enumerate(conversation.turns):
            text = clean(turn.text)
            context += self._opening(turn.speaker, clean)
            if turn.speaker in masked:
                context += text + self.end_of_turn + (self.turn_start if index < last else "")
                continue
            if conversation.type is not None:
                context += self.label_line(schema, _shown(with_labels, turn, index))
            loss = index > 0 and not turn.shared and (conversation.type is None or bool(turn.label))
            found += (Span(context, False), Span(text + self.closing, loss, index))
            context = between if index < last else ""
        return [*found, Span(context, False)] if context else found

    # -- tokens -----------------------------------------------------------------------------------------------------

    def encode_policies(
        self,
        rows: Sequence[tuple[Conversation, bool | Sequence[Label]]],
        schema: AttributeSchema,
        tokenizer: Tokenizer,
    ) -> list[tuple[list[int], list[int]]]:
        """Return :meth:`encode_policy` of each conversation and its ``with_labels``; faster than one by one."""

        def render(number: int, clean: Clean) -> list[Span]:
            row, shown = rows[number]
            return self.spans(row, schema, shown, clean)

        return self._encode([row for row, _ in rows], render, tokenizer)

    def encode_policy(
        self,
        conversation: Conversation,
        schema: AttributeSchema,
        tokenizer: Tokenizer,
        with_labels: bool | Sequence[Label] = True,
    ) -> tuple[list[int], list[int]]:
        """Return ids and loss mask, both [sequence]; mask[i] is 1 where token i itself is a target.

        The decoded text under the mask is exactly ``response + closing`` of every trained turn, for any tokenizer,
        because no token crosses a border of the mask. Special tokens of the base model that stand in text are spelled
        out in ordinary ones.

        Raises:
            DataError: The tokenizer reads a text as a marker, even a cleaned one.
        """
        return self.encode_policies([(conversation, with_labels)], schema, tokenizer)[0]

    def encode_prompt(
        self, conversation: Conversation, schema: AttributeSchema, values: Label, tokenizer: Tokenizer
    ) -> list[int]:
        """Return the ids that end where the response starts: an exact prefix of :meth:`encode_policy` of the answer.

        Args:
            conversation: The history, ending with the turn to answer; earlier responses show their own labels.
            schema: Orders and checks the values.
            values: The request: all attributes, some of them, or None for no attribute string.
            tokenizer: The policy's.

        Raises:
            DataError: Unknown attribute or a value outside its range, and as :meth:`encode_policy`.
        """
        asked = schema.check(values or {}, "requested attributes")
        answer = Turn(ASSISTANT, "", label=asked or None)
        row_type = VALUE_TO_TEXT if asked else conversation.type
        answered = dataclasses.replace(conversation, turns=[*conversation.turns, answer], type=row_type)

        def render(_: int, clean: Clean) -> list[Span]:
            return self.spans(answered, schema, clean=clean)[:-1]

        return self._encode([answered], render, tokenizer)[0][0]

    def encode_regressions(self, places: Sequence[tuple[Conversation, int]], tokenizer: Tokenizer) -> list[list[int]]:
        """Return :meth:`encode_regression` of each turn of a conversation; faster than one by one."""

        def render(number: int, clean: Clean) -> list[Span]:
            return [Span(self.render_regression(*places[number], clean), False)]

        return [ids for ids, _ in self._encode([row for row, _ in places], render, tokenizer)]

    def encode_regression(self, conversation: Conversation, turn_index: int, tokenizer: Tokenizer) -> list[int]:
        """Return the ids of :meth:`render_regression`; the regressor reads the last one's hidden state.

        Text is kept apart from the template, and errors are raised, as in :meth:`encode_policy`.
        """
        return self.encode_regressions([(conversation, turn_index)], tokenizer)[0]

    def special_names(self, tokenizer: Tokenizer) -> frozenset[str]:
        """Special tokens of the base model, whose names are ordinary characters in a text."""
        return _token_guard(self, tokenizer).names

    def _encode(
        self, rows: Sequence[Conversation], render: Callable[[int, Clean], list[Span]], tokenizer: Tokenizer
    ) -> list[tuple[list[int], list[int]]]:
        """Ids and loss mask, both [sequence], of each row, rendered by `render(number, clean)`."""
        guard = _token_guard(self, tokenizer)
        prompts = [render(number, guard.clean) for number in range(len(rows))]
        found = _encode_spans(prompts, tokenizer, guard)
        encoded = []
        for number, row in enumerate(rows):
            spans, tokens = prompts[number], found[number]
            if None in tokens:
                spans = render(number, _apart)
                [tokens] = _encode_spans([spans], tokenizer, guard)
            ids: list[int] = []
            mask: list[int] = []
            for span, span_ids in zip(spans, tokens, strict=True):
                if span_ids is None:
                    raise DataError(f"row '{row.id}': the tokenizer takes a text of it for a marker of the template")
                ids += span_ids
                mask += [int(span.loss)] * len(span_ids)
            encoded.append((ids, mask))
        return encoded

    def parse_response(self, text: str, cut: bool = True) -> str:
        """Return a generated response without its closing.

        Args:
            text: The generated text, with or without the text at which it stopped.
            cut: Whether a text that holds no stop may have been cut inside the closing, for want of length.
        """
        whole = text
        for stop in self.stops:
            text = text.split(stop, 1)[0]
        longest = len(self.closing) - (1 if cut and text == whole else len(self.stops[0]))
        for length in range(longest, 0, -1):
            if text.endswith(self.closing[:length]):
                return text[:-length]
        return text


def _shown(with_labels: bool | Sequence[Label], turn: Turn, index: int) -> Label:
    if isinstance(with_labels, bool):
        return turn.label if with_labels else None
    return with_labels[index]


def _may_overlap(one: str, two: str) -> bool:
    return one in two or any(one.endswith(two[:length]) for length in range(1, len(two)))


@functools.lru_cache(maxsize=8)
def _token_guard(template: PromptTemplate, tokenizer: Tokenizer) -> TokenGuard:
    strings = dataclasses.replace(template, system="").to_dict()  # the system prompt is text like any other
    return TokenGuard(tuple(strings.values()), template.markers, tokenizer)


def _apart(text: str) -> str:
    """Every character on its own: the last resort for a text that a tokenizer reads as a marker."""
    return " ".join(encodable(text))


def _encode_spans(
    prompts: Sequence[Sequence[Span]], tokenizer: Tokenizer, guard: TokenGuard
) -> list[list[list[int] | None]]:
    """The ids of the spans of several prompts, in one call; None where a text is read as a marker."""
    heads = iter(tokenizer.encode_batch([spans[0].text for spans in prompts]))
    rest = iter(tokenizer.encode_continuations([s.text for spans in prompts for s in spans[1:]]))
    return [
        [
            guard.checked(span.text, next(rest if place else heads), continues=place > 0)
            for place, span in enumerate(spans)
        ]
        for spans in prompts
    ]
