"""Where variance comes from, as tables for a terminal: the tensors of a group; the estimator's noise and the minibatch's."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from gradiometer.bench import figures, selection
from gradiometer.bench.statistics import Value, jackknife
from gradiometer.bench.uncertain import format_uncertain

__all__ = ["by_source", "by_tensor", "decomposed"]


def decomposed(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of variances over minibatches drawn anew."""
    return rows[rows["minibatches"].notna() & (rows["metric"] == "variance") & (rows["tensor"] == "")]


def by_tensor(rows: pd.DataFrame) -> Table:
    """Each tensor's variance, and its share of its group's, a section per group and estimator.

    Args:
        rows: of one problem, as the store yields them, those of tensors among them.
    """
    shares = figures.shares(rows)
    key = ["label", "group", "tensor"]
    found = shares.merge(selection.parts(selection.tidy(rows)), on=key, suffixes=("", "_of"))
    made = _empty("tensor", "variance\n(nats / parameter)²", "95 % interval", "share of\nits group, %", "95 % interval")
    for group in selection.group_order(found["group"]):
        for label in dict.fromkeys(selection.in_order(found)["label"]):
            of = found[(found["group"] == group) & (found["label"] == label)]
            made.add_section()
            made.add_row(Text(f"{label}, {group}", style="bold italic"))
            for row in selection.records(of):
                variance = format_uncertain(row.value_of, row.stderr_of), _interval(row.low_of, row.high_of)
                share = format_uncertain(row.value, row.stderr), _interval(row.low, min(row.high, 100))
                made.add_row(row.tensor, *variance, *share)
    made.title = Text(f"{_problem(rows)}: variance by tensor")
    return made


def by_source(rows: pd.DataFrame) -> Table:
    """The estimator's noise, the minibatch's and both, a section per group.

    Args:
        rows: of one problem, as the store yields them.
    """
    found = decomposed(rows)
    heads = ("estimator's", "minibatch's", "both", "minibatch's\nshare, %", "95 % interval")
    made = _empty("estimator", "K", "evalu-\nations", *heads)
    for group in selection.group_order(found["group"]):
        made.add_section()
        made.add_row(Text(group, style="bold italic"))
        for _, of in found[found["group"] == group].groupby(["estimator", "seed"], sort=False):
            made.add_row(*_line(of))
    made.title = Text(f"{_problem(rows)}: variance by source, (nats / parameter)²")
    made.caption = Text("\n".join((*_notes(found), *_unmeasured(rows))))
    return made


def _line(of: pd.DataFrame) -> Iterator[str]:
    parts = {row["randomness"]: row for row in of.to_dict("records")}
    row = parts["both"]
    yield from (row["estimator"], f"{row['K']:g}", f"{row['evaluations']:g}")
    yield from (format_uncertain(parts[s]["value"], parts[s]["stderr"]) for s in ("estimator", "minibatch", "both"))
    share = _share(parts["minibatch"], row)
    yield from (format_uncertain(share.value, share.stderr), _interval(share.low, share.high))


def _share(part: Any, both: Any) -> Value:
    """One part of both in percent, paired over shards of minibatches."""
    if not both["value"] > 0:
        return Value(float("nan"))
    without = [100 * p / b for p, b in zip(part["jackknife"] or (), both["jackknife"] or (), strict=True)]
    return jackknife(100 * part["value"] / both["value"], without, positive=False)


def _notes(found: pd.DataFrame) -> Iterator[str]:
    for M, R, B in found[["minibatches", "replicates", "B"]].drop_duplicates().to_numpy():
        yield f"Traces over {M:g} minibatches of {B:g} data points with {R:g} replicates each, ± standard errors."
    yield "The parts add up to both; the minibatch's is unbiased, and may come out below zero where it is small."


def _unmeasured(rows: pd.DataFrame) -> Iterator[str]:
    missing = selection.unmeasured(selection.tidy(rows))
    yield from (
        f"{word} {status}: {reason}" for word, status, reason in missing[["label", "status", "reason"]].to_numpy()
    )


def _problem(rows: pd.DataFrame) -> str:
    return ", ".join(dict.fromkeys(rows["problem"]))


def _interval(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}"


def _empty(first: str, *others: str) -> Table:
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title_style="bold", caption_style="", caption_justify="left")
    made.add_column(first, no_wrap=True)
    for other in others:
        made.add_column(other, justify="right", no_wrap=True)
    return made
