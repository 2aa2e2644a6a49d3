"""What is written as JSON is read as it was."""

import json
from pathlib import Path

import pytest

from blip2train.run_dir import read_json, read_jsonl, write_json, write_jsonl, write_text


def test_a_file_name_that_is_no_utf8_survives_json_and_everything_else_stays_readable(tmp_path: Path) -> None:
    rows = [{"name": "\udc81.jpg", "other": "é\\udc81 \U0001f600"}, {"\ud800": 1}]
    write_json(tmp_path / "a.json", {"rows": rows})
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_json(tmp_path / "a.json") == {"rows": rows} and read_jsonl(tmp_path / "a.jsonl") == rows
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "é" in text and json.loads(text) == {"rows": rows}


def test_other_texts_are_told_what_to_do_with_it(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "\udc81")
    write_text(tmp_path / "a.txt", "\udc81", errors="replace")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "?"
