"""What a check says of an estimator: as a text of a screen, and as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gradiometer.bench.checks.claims import Claim
from gradiometer.bench.uncertain import format_uncertain

MEANS = ("unbiased", "biased as declared", "direction", "consistent", "own value")  # claims about a group's mean
SHOWN = 4  # broken claims of one kind that are printed whole
EXPLAINED = {
    "unbiased": "mean gradient against the exact one",
    "biased as declared": "a bias, where one was declared",
    "rescaled as declared": "a positive factor, where one was declared",
    "uphill": "a biased gradient that still points uphill",
    "direction": "a positive multiple of the exact gradient",
    "consistent": "a bias that vanishes as K grows",
    "own value": "mean gradient against that of the value it names",
    "value": "the objective it reports",
    "same mean": "the mean of another estimator",
    "same draws": "another estimator's gradients, draw by draw",
    "no bias found": "sequential test of the mean, about a thousand coordinates",
    "shapes": "terms [*batch], log weights detached",
    "deterministic": "same noise, same gradient",
    "frozen": "nothing changes by measuring",
    "learns": "learn() trains what is learned beside the estimate",
    "rows": "replicates as rows of one batch",
    "data apart": "data points do not touch",
    "noiseless": "no noise at the exact posterior",
    "engine": "the harness's fast way against the slow one",
    "level": "log weights of any size",
    "precision": "float32 against float64",
    "learning": "learning makes the gradient quieter",
    "runs": "it can be built and run",
}


@dataclass(frozen=True)
class Card:
    """The outcome of a check.

    Attributes:
        planted: mistakes that were planted, and whether each was found.
        about: measured characteristics: evaluations, SNR exponents, engine, relative time.
        seconds: that the check took.
    """

    word: str
    family: str
    objective: str
    code: str
    level: str
    claims: Sequence[Claim]
    planted: Mapping[str, bool] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def broken(self) -> list[Claim]:
        return [claim for claim in self.claims if claim.holds is False]

    @property
    def untested(self) -> list[str]:
        """Groups whose mean was compared with nothing, though nothing of it is declared biased."""
        tested = {c.group for c in self.claims if c.holds is not None and c.name in MEANS}
        missing = {c.group for c in self.claims if c.holds is None and c.name == "unbiased"}
        return sorted(missing - tested)

    @property
    def passed(self) -> bool:
        """Every claim that could be tested holds, and the mean of every group was tested that is not declared biased."""
        some = any(claim.holds and claim.name in MEANS for claim in self.claims)
        return some and not self.broken and not self.untested

    def as_dict(self) -> dict[str, Any]:
        """Plain, for JSON; what is not a number is None."""
        claims = [{k: None if v != v else v for k, v in asdict(claim).items()} for claim in self.claims]
        return {"passed": self.passed} | asdict(self) | {"claims": claims}

    def text(self) -> str:
        """A screen of text, its lines at most 132 columns."""
        verdict = "passed" if self.passed else "BROKEN" if self.broken else "NOT CHECKED"
        head = f"{self.word}   {self.family}, {self.objective}"
        lines = [f"{head:<100} {verdict} ({self.level}, {self.seconds:.1f} s)"]
        lines += list(self._held())
        lines += list(self._broken())
        lines += [
            f"  untested  {claim.place}: {claim.says}" for claim in _distinct(c for c in self.claims if c.holds is None)
        ]
        if self.planted:
            missed = [name for name, found in self.planted.items() if not found]
            said = f"  planted   {len(self.planted) - len(missed)} of {len(self.planted)} mistakes planted in it were found"
            lines.append(said + (f"; not: {', '.join(missed)}" if missed else ""))
        lines += [f"  measured  {text}" for text in self._about()]
        return "\n".join(lines)

    def _held(self) -> Iterator[str]:
        broken = {claim.name for claim in self.broken}
        for name, claims in _by_name(c for c in self.claims if c.holds and c.name not in broken).items():
            said = [
                f"{EXPLAINED.get(name, name)}: {len(claims)} {'test' if len(claims) == 1 else 'tests'}{_size(claims)}"
            ]
            for text in [claim.says for claim in claims] if name == "no bias found" else said:
                yield f"  held      {name:<18} {text}"

    def _broken(self) -> Iterator[str]:
        for name, claims in _by_name(self.broken).items():
            distinct = _distinct(claims)
            for claim in distinct[:SHOWN]:
                yield f"  BROKEN    {name:<18} {claim.place}: {claim.says}"
            if len(claims) > len(distinct[:SHOWN]):
                yield f"            {'':<18} and {len(claims) - len(distinct[:SHOWN])} more like these"

    def _about(self) -> Iterator[str]:
        about = self.about
        parts = []
        if "evaluations" in about:
            count = about["evaluations"]
            parts.append(f"{count:g} {'evaluation' if count == 1 else 'evaluations'} per datum and gradient")
        if "engine" in about:
            parts.append(
                {"loop": "one replicate at a time", "rows": "replicates as rows"}.get(about["engine"], about["engine"])
            )
        if "relative_time" in about:
            parts.append(f"{about['relative_time']:.2g} x the time of {about['relative_to']}")
        if parts:
            yield "; ".join(parts)
        for group, slope in about.get("snr_exponents", {}).items():
            yield (
                f"SNR of the {group} gradient ~ K^({format_uncertain(slope['value'], slope['stderr'])}), "
                f"K = {slope['K'][0]} to {slope['K'][-1]}, on {slope['on']}"
            )


def _size(claims: Sequence[Claim]) -> str:
    """The sizes of claims of one name that held, as they are read: an error at most so large, and what would be seen."""
    sizes, limits = (
        [c.off for c in claims if c.off == c.off],
        [c.detectable for c in claims if c.detectable == c.detectable],
    )
    if not sizes:
        return ""
    match claims[0].name:
        case "learning":
            return f"; variance times {max(sizes):.2g}"
        case "uphill":
            return f"; cosine at least {min(sizes):.2g}"
        case "biased as declared" | "rescaled as declared":
            return f"; up to {max(sizes):.2g}"
    return f"; off by {max(sizes):.1g} at most" + (f", would see {max(limits):.1g}" if limits else "")


def _by_name(claims: Any) -> dict[str, list[Claim]]:
    found: dict[str, list[Claim]] = {}
    for claim in claims:
        found.setdefault(claim.name, []).append(claim)
    return found


def _distinct(claims: Any) -> list[Claim]:
    """The first claim of each kind: of a group, what is said but for numbers."""
    found: dict[tuple[str, str], Claim] = {}
    for claim in claims:
        kind = re.sub(r"[\d.e+-]+", "", re.sub(r"'[^']*'", "", claim.says.partition(";")[0].partition(" (cos")[0]))
        found.setdefault((claim.group, kind), claim)
    return list({kind: claim for (_, kind), claim in reversed(found.items())}.values())[::-1]
