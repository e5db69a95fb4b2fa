"""Draws the time of one layer by stage, dense beside share, from the JSON of whole prefills.

    draw_layer_time.py PREFILL_JSON... --layers 28 --out layer_time.svg

Reads the rows "prefill dense" and "prefill share" of prefill-bench. If several have the same length, the first counts.
Needs matplotlib.
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402: the backend comes first

STAGES = [("linear layers and the rest", "#9aa5b1"), ("attention", "#2b6cb0"), ("finding patterns", "#dd6b20")]


def read_rows(paths, layers):
    """Returns {(tokens, policy): [ms of one layer per stage]}, with the stages in the order of STAGES."""
    cells = {}
    for path in paths:
        for row in json.loads(path.read_text())["rows"]:
            policy = row["what"].removeprefix("prefill ")
            cell = (int(row["shape"].split()[0]), policy)
            if policy not in ("dense", "share") or cell in cells:
                continue
            attention, pattern = row["attention_ms"], row["pattern_ms"]
            rest = row["median_ms"] - attention - pattern
            cells[cell] = [ms / layers for ms in (rest, attention, pattern)]
    return cells


def draw(cells, out):
    lengths = sorted({tokens for tokens, _ in cells})
    figure, panels = plt.subplots(1, len(lengths), figsize=(2.2 * len(lengths), 3.2), layout="constrained")
    for panel, tokens in zip(panels, lengths):
        policies = [policy for policy in ("dense", "share") if (tokens, policy) in cells]
        bottom = [0.0] * len(policies)
        for stage, (name, colour) in enumerate(STAGES):
            heights = [cells[tokens, policy][stage] for policy in policies]
            panel.bar(policies, heights, 0.6, bottom, color=colour, label=name)
            bottom = [b + h for b, h in zip(bottom, heights)]
        for place, top in enumerate(bottom):
            panel.text(place, top, f"{top:,.0f}" if top >= 100 else f"{top:.1f}", ha="center", va="bottom", fontsize=8)
        panel.set_title(f"{tokens:,} tokens", fontsize=9)
        panel.set_xlim(-0.6, max(len(policies), 2) - 0.4)
        panel.set_ylim(0, 1.12 * max(bottom))
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ms of one layer", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(STAGES), fontsize=8, frameon=False)
    figure.savefig(out, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("json", nargs="+", type=pathlib.Path)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    plt.rcParams["svg.hashsalt"] = "layer time"  # the same file every time
    draw(read_rows(arguments.json, arguments.layers), arguments.out)


if __name__ == "__main__":
    main()
