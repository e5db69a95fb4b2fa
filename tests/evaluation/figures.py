#!/usr/bin/env python3
"""All pictures of an evaluation, in one go. Needs matplotlib and numpy; --dump also safetensors and SciPy.

    figures.py --summary build/evaluation/summary.json --dump dumps/pass_key.safetensors

From summary.json of evaluate.py or of real_weights: score against density, needle depth x length, perplexity against
dense. From a dump of prefill-calibrate: block mass of every head, the patterns chosen from it, and
the shared clusters. Either alone draws its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small files, and the browser's hinting
        "svg.hashsalt": "prefilld",  # the same input gives the same file
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    }
)
import curves  # noqa: E402

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "model" / "tiny"


def save(figure, folder: Path, name: str) -> None:
    path = folder / f"{name}.svg"
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    matplotlib.pyplot.close(figure)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def together(summaries: list[dict]) -> dict:
    """Returns the first summary with the cells of text that only the others have."""
    cells: dict[tuple[int, str], dict] = {}
    for summary in summaries:
        for cell in summary["text"]:
            cells.setdefault((cell["length"], cell["setting"]), cell)
    return {**summaries[0], "text": list(cells.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", type=Path, nargs="+", default=[],
                        help="summary.json of evaluate.py; of further ones the texts that the first has not")  # fmt: skip
    parser.add_argument("--dump", type=Path, help="one prompt's .safetensors, written by prefill-calibrate")
    parser.add_argument("--clusters", type=Path, default=MODEL / "head_clusters.json", help="what --dump is drawn with")
    parser.add_argument("--out", type=Path, default=HERE / "figures", help="folder for the pictures")
    args = parser.parse_args()
    if not (args.summary or args.dump):
        parser.error("nothing to draw: give --summary or --dump")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.summary:
        for name, figure in curves.draw(together([json.loads(path.read_text()) for path in args.summary])):
            save(figure, args.out, name)
    if args.dump:
        import maps

        for name, figure in maps.draw(args.dump, json.loads(args.clusters.read_text())):
            save(figure, args.out, name)


if __name__ == "__main__":
    main()
