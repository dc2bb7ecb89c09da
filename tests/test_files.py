from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from nemo_steerlm.conversation import Conversation, Turn, write_conversations
from nemo_steerlm.errors import DataError
from nemo_steerlm.files import atomic_writer, parse_line, read_jsonl


def test_gzip_blank_lines_and_byte_order_mark(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xe2\x80\xa8"}')
    assert list(read_jsonl(tmp_path / "a.jsonl.gz")) == [(1, {"a": 1}), (4, {"a": "\u2028"})]


BAD_BYTES = [
    (b'{"a": 1}\n{"a": \n', ":2: malformed JSON at column"),
    (b'{"a": 1}\n{"a": "\xff"}\n', ":2: not UTF-8 (byte 7"),
    (b'{"a": 1}\n[1]\n', ":2: expected a JSON object, found list"),
    (b'{"a": ' + b"9" * 5000 + b"}\n", ":1: JSON that cannot be read"),
    (b'{"a": ' + b"[" * 100000 + b"\n", ":1: "),
    (b"", ": the file holds no row"),
    (b"\n \n", ": the file holds no row"),
]


@pytest.mark.parametrize(("content", "message"), BAD_BYTES)
def test_bad_files_name_the_line(content, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_jsonl(path))
    assert f"{path}{message}" in str(error.value) and "\n" not in str(error.value)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-12])
    with pytest.raises(DataError, match="damaged or cut off"):
        list(read_jsonl(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "text.jsonl.gz").write_bytes(b'{"a": 1}\n')
    with pytest.raises(DataError, match="damaged or cut off"):
        list(read_jsonl(tmp_path / "text.jsonl.gz"))


def test_atomic_writer_leaves_nothing_half_written(tmp_path):
    target = tmp_path / "out" / "a.jsonl"
    with atomic_writer(target) as file:
        file.write("old\n")
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask

    def rows():
        yield Conversation([Turn("User", "x")])
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_conversations(target, rows())
    assert target.read_text() == "old\n" and os.listdir(target.parent) == ["a.jsonl"]


UNUSUAL = [
    r'{"n": 123456789012345678901234567890, "m": -18446744073709551617, "z": -0, "f": 1e400}',
    r'{"n": NaN, "s": "\ud800", "t": "\ud83d\ude00", "u": "a\u0000\u007f"}',
    r'{"k": 1, "k": 2, "f": 0.1234567890123456789012, "g": 2.2250738585072011e-308, "h": 1E5}',
    '{"k": 1} \x0c',
]


@pytest.mark.parametrize("text", UNUSUAL)
def test_a_line_means_what_json_says(text):
    found = parse_line(text.encode() + b"\n", Path("a.jsonl"), 1)
    assert repr(found) == repr(json.loads(text.rstrip()))
    assert repr(parse_line(b"\xef\xbb\xbf" + text.encode(), Path("a.jsonl"), 1)) == repr(found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 01}', "malformed JSON at column 8"),
        (b'{"a": "\xed\xa0\x80"}', r"not UTF-8 \(byte 7"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b'{"a": ' + b"[" * 200_000 + b"}", "cannot be read"),
        (b"[1]", "expected a JSON object, found list"),
    ],
)
def test_a_line_that_cannot_be_read_says_why(line, message):
    with pytest.raises(DataError, match=f"a.jsonl:3: .*{message}"):
        parse_line(line, Path("a.jsonl"), 3)
