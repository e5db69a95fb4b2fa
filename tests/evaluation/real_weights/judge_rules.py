#!/usr/bin/env python3
"""Measures rules of rules.py, served or not, as measure.py measures settings of a server: same texts, same figures.

    python3 tests/evaluation/real_weights/judge_rules.py --model FOLDER --stretched FOLDER --texts FOLDER \
        --out build/rules --lengths 8192:48 16384:24 32768:12

The model is computed here, in PyTorch, with attention over the chosen blocks. So a rule that prefilld does not have is
judged beside those that it has, and what both compute tells whether the comparison is fair. Rules are lines of a file,
the most important first. The same command goes on where it was stopped. Needs PyTorch, safetensors and numpy; a GPU for
more than a few texts.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2] / "model" / "tiny")]
import rules  # noqa: E402
import text_scores  # noqa: E402
import texts  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from decoder import Decoder, dense_causal  # noqa: E402
from journal import Journal  # noqa: E402
from text_scores import DENSE  # noqa: E402

LOGIT_ROWS = 2048  # of a vocabulary at once


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder, of get_model.py")
    parser.add_argument("--stretched", type=Path, help="model folder for longer texts")
    parser.add_argument("--texts", type=Path, required=True, help="folder of prepare_texts.py")
    parser.add_argument("--role", choices=("judging", "calibration"), default="judging", help="texts (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--lengths", nargs="+", default=["8192:48"], metavar="TOKENS:TEXTS",
                        help="lengths in order of importance, and how many texts of each (%(default)s)")  # fmt: skip
    parser.add_argument("--rules", type=Path, default=HERE / "rules.txt", help="file of rules (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop starting texts after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        args.lengths = [texts.parse_length(text) for text in args.lengths]
        args.rules = read_rules(args.rules)
    except ValueError as error:
        parser.error(str(error))
    return args


def read_rules(path: Path) -> dict[str, rules.Rule | None]:
    """Reads rules, one a line; # begins a comment. Dense comes first, named or not."""
    read: dict[str, rules.Rule | None] = {DENSE: None}
    for line in filter(None, (line.partition("#")[0].strip() for line in path.read_text().splitlines())):
        read.update({} if line == DENSE else rules.parse(line))
    return read


class Models:
    """The decoder of each model folder, loaded when the first text needs it."""

    def __init__(self, args: argparse.Namespace):
        self._args, self._loaded = args, {}
        # Activations are bf16 on a GPU and fp32 on a CPU, as in prefilld.
        self._dtype = torch.bfloat16 if args.device == "cuda" else torch.float32

    def model(self, length: int) -> Decoder:
        for folder in filter(None, (self._args.model, self._args.stretched)):
            if folder not in self._loaded:
                self._loaded[folder] = Decoder.load(folder, self._args.device, self._dtype)
            if length <= self._loaded[folder].config["max_position_embeddings"]:
                return self._loaded[folder]
        raise ValueError(f"{length} tokens are more than the models' positions")


@torch.no_grad()
def measured(model: Decoder, ids: list[int], rule: rules.Rule | None) -> tuple[list[float], float, int]:
    """Returns the nats of every token but the first, the density, and the token that comes next."""
    attend = rules.Prefill(rule) if rule else dense_causal
    tokens = torch.tensor(ids, device=model.embedding.device)
    hidden = model(tokens[None], attend)[0].float()  # logits in bf16 would be too coarse
    nats = []
    for i in range(0, len(ids) - 1, LOGIT_ROWS):
        targets = tokens[i + 1 : i + 1 + LOGIT_ROWS]
        logits = model.logits(hidden[i : i + len(targets)])
        nats += F.cross_entropy(logits, targets, reduction="none").tolist()
    density = float(torch.stack(attend.density).mean()) if rule else 1.0
    return nats, density, int(model.logits(hidden[-1]).argmax())


def record_of(name: str, index: int, kind: str, ids: list[int], model: Decoder, rule: rules.Rule | None) -> dict:
    begin = time.monotonic()
    nats, density, next_token = measured(model, ids, rule)
    return {
        "setting": name,
        "task": text_scores.TASK,
        "length": len(ids),
        "index": index,
        "kind": kind,
        "density": density,
        **texts.nats_by_sort(ids, nats),
        "next_token": next_token,
        "compute_us": (time.monotonic() - begin) * 1e6,  # of this program, and nothing to compare with a server's
    }


def judge(args: argparse.Namespace) -> dict:
    judged = texts.load(args.texts, args.role)
    # Products of bf16 numbers are exact in TF32.
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    subject = {"model": args.model.name, "device": device, "texts": args.role, "texts_digest": judged.digest}
    journal, models = Journal(args.out, subject), Models(args)
    end, summary = time.monotonic() + args.seconds, {}
    for name, rule in args.rules.items():
        begin = time.monotonic()
        for length, count in args.lengths:
            for index in range(min(count, len(judged.about))):
                if time.monotonic() > end or journal.has((name, text_scores.TASK, length, index)):
                    continue
                kind = judged.about[index]["kind"]
                journal.add(record_of(name, index, kind, judged.ids(index, length), models.model(length), rule))
        summary = text_scores.write_summary(args.out, subject, journal.records, list(args.rules))
        print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)
        if time.monotonic() > end:
            print(f"{args.seconds:.0f} s are over; the same command goes on", file=sys.stderr)
            break
    return summary


def main() -> int:
    args = read_arguments()
    try:
        judge(args)
    except (ValueError, OSError) as error:
        print(f"judge_rules.py: {error}", file=sys.stderr)
        return 1
    print((args.out / "table.txt").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
