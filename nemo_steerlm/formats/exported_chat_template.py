"""The Jinja chat template of an exported regressor, with which other software renders the prompt of its training."""

from __future__ import annotations

from nemo_steerlm.conversation import DEFAULT_SYSTEM
from nemo_steerlm.template import PromptTemplate

# Without line breaks, and with text in literals only, so that Jinja's options for white space have no effect.
_CHAT_TEMPLATE = (
    "{{% macro clean(text) %}}{{{{ (text if text is string else text | map(attribute='text') | join){clean} }}}}"
    "{{% endmacro %}}"
    "{{% set names = {names} %}}"
    "{{% set heads = messages | selectattr('role', 'in', ['system', 'developer']) | list %}}"
    "{head}"
    "{{% for message in messages[heads | length :] %}}"
    "{{% if message.role not in names %}}"
    "{{{{ raise_exception('expected system (only first), user or assistant, found the role ' ~ message.role) }}}}"
    "{{% endif %}}"
    "{{{{ {turn} }}}}{{{{ names[message.role] }}}}{{{{ {end_of_name} }}}}{{{{ clean(message.content) }}}}"
    "{{{{ {end_of_turn} }}}}"
    "{{% endfor %}}"
    "{{{{ {label} }}}}"
)
_SAID = "{{% for message in heads %}}{{{{ clean(message.content) }}}}{{{{ '' if loop.last else '\\n' }}}}"
_HEAD = "{{{{ {start} }}}}" + _SAID + "{{% else %}}{{{{ {system} }}}}{{% endfor %}}{{{{ {end} }}}}"
_OWN_HEAD = (
    "{{% set said %}}" + _SAID + "{{% endfor %}}{{% endset %}}"
    "{{% if not heads or said == {system} or {empty} %}}{{{{ {none} }}}}"
    "{{% else %}}{{{{ {start} }}}}{{{{ said }}}}{{{{ {end} }}}}{{% endif %}}"
)


def chat_template(template: PromptTemplate) -> str:
    """Return the Jinja template, for `messages`, of :meth:`PromptTemplate.render_regression` of the last turn.

    It reads OpenAI rows as :class:`nemo_steerlm.conversation.Conversation` does and renders the same text, but for one
    thing: Jinja can break up markers only where they are written out, not what a tokenizer's normaliser might turn
    into one.
    """
    clean = template.clean
    broken = [(marker, f"{marker[0]} {marker[1:]}" if len(marker) > 1 else " ") for marker in template.markers]
    names = {"user": template.name_of(template.user, clean), "assistant": template.name_of(template.assistant, clean)}
    start = _literal(f"{template.system_start}{template.system_name}{template.end_of_name}")
    system, end = _literal(clean(DEFAULT_SYSTEM)), _literal(template.end_of_turn)
    if template.system == DEFAULT_SYSTEM:
        head = _HEAD.format(start=start, system=system, end=end)
    else:
        none = _literal(template.head(DEFAULT_SYSTEM, clean))
        empty = "false" if template.system else "not said"
        head = _OWN_HEAD.format(start=start, system=system, end=end, none=none, empty=empty)
    return _CHAT_TEMPLATE.format(
        clean="".join(f" | replace({_literal(one)}, {_literal(other)})" for one, other in broken),
        head=head,
        names="{" + ", ".join(f"{_literal(role)}: {_literal(name)}" for role, name in names.items()) + "}",
        turn=_literal(template.turn_start),
        end_of_name=_literal(template.end_of_name),
        end_of_turn=end,
        label=_literal(template.label_start),
    )


def _literal(text: str) -> str:
    """A string literal of Jinja, in ASCII."""
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
