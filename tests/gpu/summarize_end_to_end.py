"""Collects the answers that end_to_end.sh left in OUT_DIR into one file, end_to_end.json, for the results folder.

    summarize_end_to_end.py OUT_DIR

Rows of the embedded model are medians over its prompts. Rows of the synthetic checkpoint are one request each.
"""

import json
import pathlib
import statistics
import sys

OF_PREFILL = ["density", "compute_us", "attention_us", "pattern_us", "stall_us", "kv_bytes"]
OF_ANSWER = ["ttft_us", "first_frame_us", "last_frame_us", "kv_transfer_us", "kv_overlap", "decode_us", "total_us"]


def figures(answer):
    row = {key: answer["prefill"][key] for key in OF_PREFILL}
    row.update({key: answer[key] for key in OF_ANSWER if key in answer})
    return row


def tiny_rows(path):
    cells = {}
    for line in path.read_text().splitlines():
        answer = json.loads(line)
        cells.setdefault((answer["prefill"]["prompt_tokens"], answer["prefill"]["policy"]), []).append(answer)
    rows = []
    for (tokens, policy), answers in cells.items():
        row = {"model": "tiny", "command": "generate", "tokens": tokens, "policy": policy, "prompts": len(answers)}
        row["right"] = sum(answer["expected"] in answer["text"] for answer in answers)
        every = [figures(answer) for answer in answers]
        row.update({key: statistics.median(one[key] for one in every) for key in every[0]})
        rows.append(row)
    return rows


def synthetic_row(path, command):
    answer = json.loads(path.read_text())
    prefill = answer["prefill"]
    return {
        "model": "qwen2.5-7b, synthetic",
        "command": command,
        "tokens": prefill["prompt_tokens"],
        "policy": prefill["policy"],
        "first_tokens": answer.get("token_ids", [])[:4] or [answer["first_token"]["token_id"]],
        **figures(answer),
    }


def main():
    out = pathlib.Path(sys.argv[1])
    rows = tiny_rows(out / "tiny.jsonl") if (out / "tiny.jsonl").exists() else []
    for prefix, command in (("synthetic_", "generate"), ("synthetic_prefill_", "prefill")):
        for policy in ("dense", "share"):
            path = out / f"{prefix}{policy}.json"
            if path.exists():
                rows.append(synthetic_row(path, command))
    facts = out / "facts.json"
    head = json.loads(facts.read_text()) if facts.exists() else {}
    text = ",\n".join("  " + json.dumps(row) for row in rows)
    (out / "end_to_end.json").write_text(f'{{"facts": {json.dumps(head)},\n "rows": [\n{text}\n ]}}\n')


if __name__ == "__main__":
    main()
