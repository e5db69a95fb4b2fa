#!/usr/bin/env python3
"""Draws what heads of the real model attend to in one text, and which blocks the rules of rules.py choose for them.

    python3 tests/evaluation/real_weights/draw_heads.py --model FOLDER --texts FOLDER --maps maps.npz --heads 4.2 11.7

--maps keeps the maps of all heads, and is made unless it is there; from it alone heads are drawn without a model. The
text is computed densely. Needs PyTorch, safetensors and numpy for the maps, matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
RULES = {
    "share's rule": "antidiagonal:score_threshold=0.95,last_rows_gamma=0.3",
    "FlashPrefill, α 0.1": "flash_prefill:alpha=0.1",
    "vertical-slash, γ 0.9": "vertical_slash:gamma=0.9",
}
LEAST_MASS = 1e-4  # where the logarithmic colours begin
CHOSEN, LEFT_OUT = (0.0, 0.447, 0.698), (0.925, 0.925, 0.925)


def make_maps(model_folder: Path, texts_folder: Path, index: int, length: int) -> dict[str, np.ndarray]:
    """Returns block mass [heads of all layers, n, n] and every rule's pattern as bool of the same shape."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[2] / "model" / "tiny")]
    import rules
    import texts
    import torch
    from decoder import Decoder

    chosen = {title: rule for title, spec in RULES.items() for rule in rules.parse(spec).values()}
    maps: dict[str, list] = {name: [] for name in ("mass", *chosen)}

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        q, k, v = q[0], k[0].repeat_interleave(group, 0), v[0].repeat_interleave(group, 0)
        out, mass = rules.reference.dense_with_mass(q, k, v, 128)
        maps["mass"].append(mass.half().cpu().numpy())
        for title, rule in chosen.items():
            maps[title].append(rule.choose(q, k).cpu().numpy())
        return out[None]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Decoder.load(model_folder, device, torch.bfloat16 if device == "cuda" else torch.float32)
    ids = texts.load(texts_folder, "judging").ids(index, length)
    with torch.no_grad():
        model(torch.tensor([ids], device=device), attend)
    return {"heads": np.array(len(maps["mass"][0])), **{name: np.concatenate(made) for name, made in maps.items()}}


def draw(maps: dict[str, np.ndarray], names: list[str], path: Path) -> None:
    """Draws a column for each head, LAYER.HEAD: its mass, then what each rule computes of it."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "prefilld"})
    import matplotlib.pyplot as plt

    per_layer, n = int(maps["heads"]), maps["mass"].shape[-1]
    causal = np.tril(np.ones((n, n), bool))
    colours = plt.get_cmap("magma_r", 24)
    figure, axes = plt.subplots(
        1 + len(RULES), len(names), figsize=(1.25 * len(names) + 0.6, 1.5 * (1 + len(RULES)) + 0.8), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, name in zip(axes.T, names):
        layer, _, head = name.partition(".")
        at = int(layer) * per_layer + int(head)
        mass = maps["mass"][at].astype(np.float32)
        height = 1 - np.log10(np.clip(mass, LEAST_MASS, 1)) / np.log10(LEAST_MASS)
        column[0].imshow(np.where(causal[..., None], colours(height)[..., :3], 1), interpolation="none")
        column[0].set_title(f"layer {layer}, head {head}", fontsize=8)
        for axis, title in zip(column[1:], RULES):
            pattern = maps[title][at]
            tile = np.where(pattern[..., None], CHOSEN, LEFT_OUT)
            axis.imshow(np.where(causal[..., None], tile, 1), interpolation="none")
            held = (mass * pattern).sum(-1).mean()
            axis.set_title(f"density {pattern.sum() / causal.sum():.2f}, holds {held:.2f}", fontsize=7)
    for axis, title in zip(axes[:, 0], ["attention", *RULES]):
        axis.set_ylabel(title, fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("#bbbbbb")
    scale = plt.cm.ScalarMappable(matplotlib.colors.LogNorm(LEAST_MASS, 1), colours)
    bar = figure.colorbar(scale, ax=axes, location="bottom", shrink=0.5, pad=0.02, aspect=40)
    bar.set_label("mean share of a query's attention that falls on a block of 128 keys", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder, of get_model.py")
    parser.add_argument("--texts", type=Path, help="folder of prepare_texts.py")
    parser.add_argument("--text", type=int, default=0, help="which of the texts for judging (%(default)s)")
    parser.add_argument("--length", type=int, default=8192, help="tokens, a multiple of 128 (%(default)s)")
    parser.add_argument("--maps", type=Path, required=True, help="file of the maps")
    parser.add_argument("--heads", nargs="*", default=[], metavar="LAYER.HEAD", help="heads to draw")
    parser.add_argument("--out", type=Path, default=HERE / "figures" / "heads.svg", help="the picture (%(default)s)")
    args = parser.parse_args()
    if not args.maps.exists():
        if args.model is None or args.texts is None:
            parser.error(f"{args.maps} is not there; --model and --texts are needed to make it")
        np.savez_compressed(args.maps, **make_maps(args.model, args.texts, args.text, args.length))
    if args.heads:
        draw(dict(np.load(args.maps)), args.heads, args.out)


if __name__ == "__main__":
    main()
