from __future__ import annotations

from nemo_steerlm import cli
from nemo_steerlm.terminal import readable


def test_control_characters_are_shown_not_obeyed():
    hostile = "\x1b]0;title\x07\x1b[2J\rred\x9b31m\x00\u202egnp.exe\ud800\x7f"
    assert readable(hostile) == "\\x1b]0;title\\x07\\x1b[2J\\rred\\x9b31m\\x00\\u202egnp.exe\\ud800\\x7f"
    plain = "line\n\ttab é 漢\u3000字 \u0646\u200c\u0645 👩\u200d👧 \xa0"
    assert readable(plain) == plain


def test_the_command_line_shows_no_control_character_of_a_file(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"conversations": [{"from": "x\\u001b[2J", "value": "a"}]}\n')
    words = ["prepare", "source=steerlm", f"input={tmp_path}/a.jsonl", f"output={tmp_path}/o"]
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert "the speaker 'x\\x1b[2J' is neither masked" in shown and "\x1b" not in shown
