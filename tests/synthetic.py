"""Rows as the store yields them, made up: what a suite of two models would measure, with its skips and failures."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np
import pandas as pd

from gradiometer.bench.metrics import METRICS
from gradiometer.bench.statistics import jackknife

Row = dict[str, object]
SHARDS, REPLICATES, FLOOR = 16, 1024, math.sqrt(2 / (math.pi * 1024))
SNAPSHOTS = {"init": 0.0, "early": 0.5, "late": 1.0}
MACHINE = {
    "date": "2026-11-20", "host": "a laptop", "processor": "8 cores <x86_64>", "python": "3.11.7",
    "versions": {"torch": "2.13.0", "numpy": "2.4.6", "gradiometer": "0.1.0"}, "commit": "0123abc",
}  # fmt: skip

# word: family, K, then per group (generative, inference): log10 of the variance at init and its fall until late
DIGITS = {
    "pathwise": ("reparameterization", 1, (1.1, 0.1), (0.6, 0.3)),
    "stl": ("reparameterization", 1, (1.1, 0.1), (0.9, 2.2)),
    "reinforce:K=8": ("score-function", 8, (0.6, 0.1), (5.1, 0.9)),
    "rloo:K=8": ("score-function", 8, (0.6, 0.1), (2.6, 0.5)),
    "vimco:K=8": ("score-function", 8, (0.5, 0.2), (2.4, 0.4)),
    "iwae:K=8": ("importance-weighted", 8, (0.5, 0.2), (0.1, 0.2)),
    "dreg:K=8": ("importance-weighted", 8, (0.5, 0.2), (0.4, 2.0)),
    "iwae:K=64": ("importance-weighted", 64, (-0.1, 0.3), (-0.5, 0.1)),
    "dreg:K=64": ("importance-weighted", 64, (-0.1, 0.3), (0.0, 2.1)),
    "rws:K=8": ("wake-sleep", 8, (0.5, 0.2), (1.4, 0.6)),
    "nvi:levels=4,K=8": ("nested", 8, (0.7, 0.3), (0.2, 0.4)),
}  # fmt: skip
TOY_K = (8, 16, 32, 64, 128)


def rows(seed: int = 0) -> pd.DataFrame:
    """The rows of a whole suite."""
    noise = np.random.default_rng(seed)
    found = [*_digits(noise), *_toy(noise), *_cost(noise), *_training(noise), *_unmeasured()]
    frame = pd.DataFrame(found).sample(frac=1, random_state=seed).reset_index(drop=True)  # the store promises no order
    return frame


def _about(problem: str, estimator: str, family: str, K: int, kind: str = "gradient") -> Row:
    model, _, snapshot = problem.partition("@")
    about: Row = {"suite": "synthetic", "cell": f"{zlib.crc32(f'{problem}{estimator}{kind}'.encode()):012x}"}
    about |= {"kind": kind, "problem": problem, "model": model, "dataset": "digits" if snapshot else "gaussian"}
    about |= {"snapshot": snapshot, "step": math.nan, "seconds": math.nan, "estimator": estimator, "family": family}
    about |= {"K": K, "B": 20, "evaluations": float(K), "seed": 0, "device": "cpu", "dtype": "float32", "threads": 1}
    about |= {"engine": "rows", "chunk": 64, "group": "", "tensor": "", "space": "group", "randomness": "estimator"}
    about |= {"scale": "batch mean", "replicates": REPLICATES, "precision_met": None, "manifest": "feedbeef"}
    return about | {"checked": model == "digits-vae" and family != "nested", "status": "ok", "reason": ""}


def _row(about: Row, metric: str, value: float, spread: np.ndarray | None = None, group: str = "") -> Row:
    """A row whose error comes from shards that deviate by `spread` (relative), or without error."""
    definition = METRICS[metric]
    found = about | {
        "metric": metric,
        "group": group,
        "unit": definition.unit,
        "reduction": definition.reduction,
        "version": 1,
    }
    if spread is None:
        return found | {"value": value, "stderr": 0.0, "low": value, "high": value, "jackknife": None}
    shards = value * (1 + spread)
    without = (shards.sum() - shards) / (len(shards) - 1)
    measured = jackknife(float(shards.mean()), list(without), positive=definition.positive)
    numbers = {name: getattr(measured, name) for name in ("value", "stderr", "low", "high")}
    return found | numbers | {"jackknife": list(measured.jackknife)}


def _gradient(
    noise: np.random.Generator, about: Row, group: str, variance: float, snr: float, shared: np.ndarray
) -> Iterator[Row]:
    """The rows of one group; estimators share part of their noise, as on common random numbers."""
    spread = 0.03 * shared + 0.01 * noise.standard_normal(SHARDS)
    yield _row(about, "variance", variance, spread, group)
    yield _row(about, "gradient_norm", snr * math.sqrt(variance), spread, group)
    yield _row(about, "snr", math.hypot(snr, FLOOR), -0.5 * spread, group)
    yield _row(about, "snr_floor", FLOOR, None, group)
    yield _row(about, "snr_corrected", snr, -0.5 * spread, group)
    yield _row(about, "directional_snr", 0.6 * snr, -0.5 * spread, group)


def _digits(noise: np.random.Generator) -> Iterator[Row]:
    for snapshot, late in SNAPSHOTS.items():
        shared = noise.standard_normal(SHARDS)
        for word, (family, K, *groups) in DIGITS.items():
            about = _about(f"digits-vae@{snapshot}", word, family, K)
            for group, (start, fall) in zip(("generative", "inference"), groups, strict=True):
                variance = 10 ** (start - fall * late)
                snr = min(3.0, 0.8 * 10 ** (-0.9 * late) / math.sqrt(variance))
                yield from _gradient(noise, about, group, variance, snr, shared)
            bound = -28 + 9 * late + 0.6 * math.log2(K) / 3
            for metric, value in (
                ("objective", bound),
                ("elbo", -28 + 9 * late),
                ("iwelbo", bound),
                ("ess", 1 + 0.5 * (K - 1)),
            ):
                yield _row(about, metric, value, 0.0002 * noise.standard_normal(SHARDS))


def _toy(noise: np.random.Generator) -> Iterator[Row]:
    for K in TOY_K:
        shared = noise.standard_normal(SHARDS)
        for word, slope in (("iwae", -0.5), ("dreg", 0.5)):
            about = _about("gaussian-toy", f"{word}:K={K}", "importance-weighted", K) | {
                "engine": "loop" if K > 32 else "rows"
            }
            yield from _gradient(noise, about, "generative", 0.8 / K, 0.2 * K**0.5, shared)
            level = 0.1 if word == "iwae" else 0.2
            yield from _gradient(
                noise, about, "inference", 0.05 * K ** (-1.0 if word == "iwae" else -3.0), level * K**slope, shared
            )


def _cost(noise: np.random.Generator) -> Iterator[Row]:
    for snapshot, late in SNAPSHOTS.items():
        for word, (family, K, *groups) in DIGITS.items():
            about = _about(f"digits-vae@{snapshot}", word, family, K, "cost") | {"engine": "loop"}
            seconds = 2.1e-3 + 1.6e-4 * K * (2 if word.startswith("nvi") else 1)
            yield _row(about, "seconds_per_gradient", seconds, 0.02 * noise.standard_normal(SHARDS))
            yield _row(about, "gradients_per_second", 1 / seconds, 0.02 * noise.standard_normal(SHARDS))
            yield _row(about, "peak_memory", 3.5 + 0.61 * K)
            for group, (start, fall) in zip(("generative", "inference"), groups, strict=True):
                variance = 10 ** (start - fall * late)
                yield _row(about, "variance_seconds", variance * seconds, 0.03 * noise.standard_normal(SHARDS), group)
                yield _row(about, "variance_evaluations", variance * K, 0.02 * noise.standard_normal(SHARDS), group)


def _training(noise: np.random.Generator) -> Iterator[Row]:
    finals = {
        "pathwise": (-20.1, 1),
        "iwae:K=8": (-19.2, 8),
        "dreg:K=8": (-18.9, 8),
        "rloo:K=8": (-22.5, 8),
        "rws:K=8": (-20.6, 8),
    }
    for word, (final, K) in finals.items():
        for seed in range(3):
            offset = 0.15 * noise.standard_normal()
            for step in range(0, 3001, 150):
                about = _about("digits-vae", word, DIGITS[word][0], K, "training")
                about |= {
                    "seed": seed,
                    "step": float(step),
                    "seconds": step * (2.1e-3 + 1.6e-4 * K) * (1 + 0.01 * seed),
                }
                value = final + offset - 24 * math.exp(-step / 350) + 0.05 * noise.standard_normal()
                yield _row(about, "test_iwelbo", value)
                yield _row(about, "test_elbo", value - 1.2)


def _unmeasured() -> Iterator[Row]:
    skipped = "disarm needs a Bernoulli guide; digits-vae has a Normal one: try dreg, iwae or stl"
    failed = "the gradient of 'encoder.0.weight' is not finite in a replicate between 64 and 127 <loss & scale>"
    for snapshot in SNAPSHOTS:
        nothing = {
            "metric": "",
            "value": math.nan,
            "stderr": math.nan,
            "low": math.nan,
            "high": math.nan,
            "jackknife": None,
            "unit": "",
        }
        about = _about(f"digits-vae@{snapshot}", "disarm", "score-function", 1) | nothing
        yield about | {"status": "skipped", "reason": skipped}
    yield (
        _about("digits-vae@late", "vr:alpha=0.5,K=8", "importance-weighted", 8)
        | nothing
        | {"status": "failed", "reason": failed}
    )
