"""Finished prompts, one JSON object a line, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

Key = tuple[str, str, int, int]  # setting, task, length, index


def key_of(record: dict) -> Key:
    return record["setting"], record["task"], record["length"], record["index"]


class Journal:
    """The finished prompts of an evaluation. Raises ValueError when the folder holds an evaluation of something else.
    """

    def __init__(self, folder: Path, subject: dict):
        """subject: what makes results comparable (model, seed, depths); kept beside them."""
        folder.mkdir(parents=True, exist_ok=True)
        self._check_subject(folder / "subject.json", subject)
        path = folder / "results.jsonl"
        self.records = read(path)
        self._keys = {key_of(r) for r in self.records}
        # A line that was cut off by a kill is dropped, and its prompt runs again.
        path.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        self._file = path.open("a")

    @staticmethod
    def _check_subject(path: Path, subject: dict) -> None:
        if not path.exists():
            path.write_text(json.dumps(subject, indent=1) + "\n")
            return
        held = json.loads(path.read_text())
        for name in {**held, **subject}:
            here, there = subject.get(name), held.get(name)
            if here != there:
                raise ValueError(
                    f"{path.parent} holds results with {name} {there!r}, this run has {here!r}; take another --out"
                )

    def has(self, key: Key) -> bool:
        return key in self._keys

    def add(self, record: dict) -> None:
        self.records.append(record)
        self._keys.add(key_of(record))
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict]:
    """Reads the whole lines of a results file; none when there is no file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
