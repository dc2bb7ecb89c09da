"""UltraFeedback's rows."""

from __future__ import annotations

from tests.data.helpers import refused, run, write


def test_ultrafeedback(tmp_path):
    def completion(text, **ratings):
        annotations = {name: {"Rating": value, "Rationale": "r"} for name, value in ratings.items()}
        return {"model": "m", "response": text, "annotations": annotations, "overall_score": 7}

    good = completion("good", helpfulness="5", honesty="N/A", truthfulness=4)
    row = {"source": "s", "instruction": "ask", "models": []}
    row["completions"] = [good, completion("bad", helpfulness="1")]
    report, rows = run("ultrafeedback", write(tmp_path / "a.jsonl", [row]), tmp_path)
    assert rows[0].turns[1].label == {"truthfulness": 4, "helpfulness": 5}
    assert rows[0].turns[1].label_human is None and rows[0].extra["model"] == "m"
    assert report["labels"]["helpfulness"] == {"1": 1, "5": 1} and report["read"] == {"prompts": 1, "responses": 2}
    (tmp_path / "four").mkdir()
    _, rows = run("ultrafeedback", tmp_path / "a.jsonl", tmp_path / "four", attributes="helpsteer")
    assert [row.turns[1].label for row in rows] == [{"helpfulness": 4}, {"helpfulness": 0}]
    (tmp_path / "bad").mkdir()
    bad = write(tmp_path / "bad.jsonl", [{"instruction": "ask", "completions": [completion("x", helpfulness=6)]}])
    message = "bad.jsonl:1: completions[0]: 'helpfulness' is 6, expected 1 to 5"
    refused(message, "ultrafeedback", bad, tmp_path / "bad")
    odd = {"response": "x", "annotations": [5]}
    bad = write(tmp_path / "bad.jsonl", [{"instruction": "ask", "completions": [odd]}])
    message = "bad.jsonl:1: completions[0]: 'annotations' is [5], expected an object"
    refused(message, "ultrafeedback", bad, tmp_path / "bad")
