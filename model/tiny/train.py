#!/usr/bin/env python3
"""Trains the embedded model, or one of another shape, in a few minutes on one GPU; or trains one further.

    train.py --text DOCS:3 SOURCES:2 --minutes 7 --out FOLDER
    train.py --text DOCS:3 SOURCES:2 --minutes 5 --config second_shape.json --stages … --out FOLDER
    train.py --text DOCS:3 SOURCES:2 --minutes 3 --start . --stages 2048:0:0,8192:0:0,32768:1:1 --muon_lr 0.004 --out FOLDER

Retrieval over bytes is learnt in short sequences first, where answers are dense, and then stretched: the context grows
when answers are right, at the latest when its share of the time is spent. The learning rate follows the clock too, so
the run ends on time on any GPU. README.md (the model card) describes the data.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

START = time.monotonic()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import corpus  # noqa: E402
import training_mix  # noqa: E402
from decoder import Decoder, after_attention, before_attention, dense_causal  # noqa: E402
from training_mix import ANSWER, FILLER, STREAM, TEXT  # noqa: E402

HERE = Path(__file__).parent
STAGES = "512:0.14:0.38,2048:0.30:0.54,8192:0.55:0.70,16384:0.91:0.91,32768:1:1"
ADVANCE_AT = 0.95  # share of right answer bytes that ends a stage once its least time is over
SHORTER_SHARE = 0.2  # of the batches, from the lengths already learnt
TEXT_WEIGHTS = {FILLER: 0.05, TEXT: 1.0}
ANSWER_WEIGHTS = {ANSWER: 1.0, STREAM: 0.25}
ANSWER_LOSS_SCALE = 2.0


# --- data -------------------------------------------------------------------------------------------------------------


def produce(text: corpus.Corpus, seed: int, lengths: list[int], tokens: int, stage, queue) -> None:
    mix = training_mix.Mix(text, seed)
    while True:
        at = stage.value
        length = lengths[at]
        if at > 0 and mix.rng.random() < SHORTER_SHARE:
            length = mix.rng.choice(lengths[:at])
        queue.put(mix.batch(length, tokens // length))


class Feed:
    """Batches made by other processes, which follow the stage. Must be started before CUDA is."""

    def __init__(self, text: corpus.Corpus, lengths: list[int], tokens: int, workers: int):
        context = multiprocessing.get_context("fork")
        self.queue = context.Queue(maxsize=2 * workers)
        self.stage = context.Value("i", 0)
        self.workers = [
            context.Process(target=produce, args=(text, seed, lengths, tokens, self.stage, self.queue), daemon=True)
            for seed in range(workers)
        ]
        for worker in self.workers:
            worker.start()

    def next(self, device: str) -> tuple[Tensor, Tensor]:
        ids, kinds = (torch.from_numpy(a) for a in self.queue.get(timeout=120))
        if device == "cuda":
            ids, kinds = ids.pin_memory(), kinds.pin_memory()
        return ids.to(device, non_blocking=True).long(), kinds.to(device, non_blocking=True).long()

    def stop(self) -> None:
        for worker in self.workers:
            worker.terminate()


# --- optimiser --------------------------------------------------------------------------------------------------------


class Muon:
    """Momentum whose update is made orthogonal by Newton-Schulz (Jordan et al. 2024), for stacks of matrices."""

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.01):
        self.parameters, self.momentum, self.weight_decay = parameters, momentum, weight_decay
        self.buffers = [torch.zeros_like(p) for p in parameters]

    @staticmethod
    def orthogonal(update: Tensor, steps: int = 5) -> Tensor:
        x = update.bfloat16()
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(steps):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.mT if tall else x

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for parameter, buffer in zip(self.parameters, self.buffers):
            buffer.lerp_(parameter.grad, 1 - self.momentum)
            update = self.orthogonal(parameter.grad.lerp(buffer, self.momentum))
            scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
            parameter.mul_(1 - lr * self.weight_decay).add_(update.to(parameter.dtype), alpha=-lr * scale)


def rate(progress: float, warm_up: float, decay_from: float, least: float = 0.02) -> float:
    """Returns the rate: linear warm-up, constant, linear decay."""
    if progress < warm_up:
        return max(0.05, progress / warm_up)
    return 1.0 if progress < decay_from else max(least, (1 - progress) / (1 - decay_from))


# --- one step ---------------------------------------------------------------------------------------------------------


def grade(hidden: Tensor, embedding: Tensor, targets: Tensor, kinds: Tensor, text_weight: Tensor, answer_weight: Tensor):
    """Returns, from hidden [N,D], the loss, and sums for the log: text nats, text bytes, right and all answers, right
    and all stream.
    """
    logits = F.linear(hidden, embedding.to(hidden.dtype)).float()
    nats = F.cross_entropy(logits, targets, reduction="none")
    text, answer = text_weight[kinds], answer_weight[kinds]
    loss = (nats * text).sum() / text.sum().clamp_min(1)
    loss = loss + ANSWER_LOSS_SCALE * (nats * answer).sum() / answer.sum().clamp_min(1)
    with torch.no_grad():
        right = (logits.argmax(-1) == targets).float()
        masks = [(kinds == kind).float() for kind in (TEXT, ANSWER, STREAM)]
        sums = torch.stack(
            [(nats * masks[0]).sum(), masks[0].sum(), (right * masks[1]).sum(), masks[1].sum(),
             (right * masks[2]).sum(), masks[2].sum()]  # fmt: skip
        )
    return loss, sums


def repeated_kv(backend: SDPBackend):
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        with sdpa_kernel([backend]):
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def grouped_kv(backend: SDPBackend):
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return dense_causal(layer, q, k, v)

    return attend


def fastest_attention(model: Decoder, batch: int, length: int):
    """Times the fused backends forward and backward on this shape and takes the fastest. One that fails or gives other
    results is left out.
    """
    shape = (batch, length, model.num_heads, model.head_dim)
    kv_shape = (batch, length, model.num_kv_heads, model.head_dim)
    make = lambda s: torch.randn(s, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()  # noqa: E731
    q, k, v = make(shape), make(kv_shape), make(kv_shape)
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    candidates = {
        f"{backend.name.lower()}/{kind.__name__}": kind(backend)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        for kind in (repeated_kv, grouped_kv)
    }
    best, best_name, best_time, reference = None, "", math.inf, None
    for name, attend in candidates.items():
        try:
            for attempt in range(3):
                torch.cuda.synchronize()
                begin = time.monotonic()
                out = attend(0, q, k, v)
                grads = torch.autograd.grad(out, (q, k, v), weight)
                torch.cuda.synchronize()
                seconds = time.monotonic() - begin
            results = [t.float() for t in (out, *grads)]
            reference = reference or results
            stray = max(((a - b).norm() / b.norm()).item() for a, b in zip(results, reference))
        except RuntimeError as error:
            print(f"  {name}: {str(error).splitlines()[0][:100]}")
            continue
        print(f"  {length}: {name} {seconds * 1e3:.2f} ms, off by {stray:.1e}")
        if stray < 0.02 and seconds < best_time:
            best, best_name, best_time = attend, name, seconds
    print(f"  {length}: attention by {best_name or 'default'}", flush=True)
    return best or dense_causal


class Trainer:
    def __init__(self, args: argparse.Namespace, config: dict, feed: Feed, lengths: list[int]):
        self.args, self.feed, self.device = args, feed, args.device
        torch.manual_seed(args.seed)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        if args.start:
            self.model = Decoder.load(args.start, self.device, dtype).requires_grad_(True)
        else:
            self.model = Decoder(config, dtype).to(self.device)
        self.attend = {n: dense_causal for n in lengths}
        self.grade = grade
        table = lambda weights: torch.tensor([weights.get(k, 0.0) for k in range(5)], device=self.device)  # noqa: E731
        self.text_weight, self.answer_weight = table(TEXT_WEIGHTS), table(ANSWER_WEIGHTS)
        self.rotations = {}
        for n in lengths:
            tables = self.model.rotation(torch.arange(n, device=self.device))
            self.rotations[n] = tuple(t.repeat(args.tokens_per_step // n, 1) for t in tables)
        matrices = [p for p in self.model.parameters() if p.ndim == 3]
        others = [p for p in self.model.parameters() if p.ndim < 3]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)

    def prepare(self) -> None:
        """Compiles everything but attention once: it sees [tokens_per_step, …] at every context length."""
        if self.device != "cuda":
            return
        for length in self.attend:
            self.attend[length] = fastest_attention(self.model, self.args.tokens_per_step // length, length)
        try:
            self.model.before_attention = torch.compile(before_attention, dynamic=False)
            self.model.after_attention = torch.compile(after_attention, dynamic=False)
            self.grade = torch.compile(grade, dynamic=False)
            for _ in range(2):
                self.backward(*self.feed.next(self.device))
        except Exception as error:  # a compiler that fails must not cost the run
            print(f"without torch.compile: {type(error).__name__}: {str(error)[:300]}")
            self.model.before_attention, self.model.after_attention = before_attention, after_attention
            self.grade = grade
        self.model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    def backward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        batch, length = ids.shape
        targets, target_kinds = torch.roll(ids, -1, 1), torch.roll(kinds, -1, 1)
        target_kinds[:, -1] = training_mix.IGNORE
        hidden = self.model.run(ids, self.attend[length], *self.rotations[length])
        loss, sums = self.grade(
            hidden.flatten(0, 1), self.model.embedding, targets.flatten(), target_kinds.flatten(), self.text_weight,
            self.answer_weight,
        )  # fmt: skip
        loss.backward()
        return sums

    def update(self, progress: float) -> None:
        factor = self.rate(progress)
        self.muon.step(self.args.muon_lr * factor)
        for group in self.adam.param_groups:
            group["lr"] = self.args.adam_lr * factor
        self.adam.step()
        self.model.bound_logits()
        self.model.zero_grad(set_to_none=True)

    def rate(self, progress: float) -> float:
        return rate(progress, self.args.warm_up, self.args.decay_from)

    def save(self) -> None:
        self.model.export(self.args.out)


def train(args: argparse.Namespace) -> None:
    config_file = args.start / "config.json" if args.start else args.config
    config = json.loads(config_file.read_text())
    stages = [(int(n), float(least), float(most)) for n, least, most in (s.split(":") for s in args.stages.split(","))]
    lengths = [s[0] for s in stages]
    text = corpus.load(args.text)
    print(f"text: {', '.join(f'{len(b) / 1e6:.1f} MB' for b in text.blobs)}", flush=True)
    feed = Feed(text, lengths, args.tokens_per_step, args.workers)
    trainer = Trainer(args, config, feed, lengths)
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(config_file, args.out / "config.json")
    shutil.copy(HERE / "generation_config.json", args.out)
    count = sum(p.numel() for p in trainer.model.parameters())
    print(f"{count / 1e6:.2f} M parameters, ready for compiling after {time.monotonic() - START:.0f} s", flush=True)
    trainer.prepare()

    begin, end = time.monotonic(), START + 60 * args.minutes
    print(f"training starts after {begin - START:.0f} s", flush=True)
    at, step, trained, sums, recent = 0, 0, 0, torch.zeros(6, device=args.device), 0.0
    answer_share, answers_seen, last_save, log_time = 0.0, 0, begin, begin
    events: list[torch.cuda.Event] = []
    while (now := time.monotonic()) < end:
        progress = (now - begin) / (end - begin)
        ids, kinds = feed.next(args.device)
        stats = trainer.backward(ids, kinds)
        sums += stats
        trainer.update(progress)
        trained += ids.numel()
        step += 1
        if args.device == "cuda":  # let the host run ahead by two steps and no more, so that the clock means something
            events.append(torch.cuda.Event())
            events[-1].record()
            if len(events) > 2:
                events.pop(0).synchronize()
        if step % args.log_every == 0:
            nats, text_bytes, right, answers, stream_right, stream_all = sums.tolist()
            if not math.isfinite(nats):
                sys.exit("the loss is not finite")
            answer_share = right / max(answers, 1)
            seconds = time.monotonic() - log_time
            print(
                f"{now - begin:5.0f} s  step {step:5d}  {lengths[at]:5d}  {trained / 1e6:6.1f} M  "
                f"{(trained - recent) / seconds / 1e6:5.2f} M/s  text {nats / max(text_bytes, 1) / math.log(2):.3f} bpc  "
                f"answers {answer_share:.3f}  stream {stream_right / max(stream_all, 1):.3f}  lr {trainer.rate(progress):.3f}  "
                f"queue {feed.queue.qsize()}",
                flush=True,
            )
            recent, log_time = trained, time.monotonic()
            sums.zero_()
            if now - last_save > 60:
                trainer.save()
                last_save = now
        _, least, most = stages[at]
        if at + 1 < len(stages) and (progress >= most or (progress >= least and answer_share >= ADVANCE_AT)):
            at += 1
            answer_share = 0.0
            feed.stage.value = at
            print(f"context {lengths[at]} from {progress:.2f} of the time", flush=True)
    feed.stop()
    trainer.save()
    print(f"{step} steps, {trained / 1e6:.0f} M bytes, exported after {time.monotonic() - START:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model, or one like it.")
    parser.add_argument("--text", nargs="+", required=True, metavar="FOLDER[:WEIGHT]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.0, help="wall clock, from the start of the program")
    beginning = parser.add_mutually_exclusive_group()
    beginning.add_argument("--config", type=Path, default=HERE / "config.json", help="shape of a new model")
    beginning.add_argument("--start", type=Path, metavar="FOLDER", help="go on from the weights of this one")
    parser.add_argument("--stages", default=STAGES, help="context:least:most share of the time at which it ends, …")
    parser.add_argument("--tokens_per_step", type=int, default=131072)
    parser.add_argument("--muon_lr", type=float, default=0.02)
    parser.add_argument("--adam_lr", type=float, default=0.003)
    parser.add_argument("--warm_up", type=float, default=0.01, help="share of the time in which the rates rise")
    parser.add_argument("--decay_from", type=float, default=0.4, help="share of the time after which they fall")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 3))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log_every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
