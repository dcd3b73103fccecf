"""Which weights of a base are kept in fewer bits, and how many."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from popax.errors import ConfigError

# The largest magnitude that a value has: a row's or a group's largest weight becomes it.
LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
# All linear maps of all layers. A name is that of the adapter's site; experts are `layers.moe.experts.gate_proj`.
LAYERS = r"(dense_)?layers\..*"
GROUP = {"int8": None, "fp8": None, "int4": 128}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantiseRule:
    """pattern: a regular expression for the whole of a weight's name. dtype: int8, fp8 (e4m3), int4; None: as stored.

    group: so many input features share a factor in each output channel; None: all of them.
    """

    pattern: str = LAYERS
    dtype: str | None
    group: int | None = None

    def __post_init__(self):
        if self.dtype is not None and self.dtype not in LARGEST:
            raise ConfigError(f"QuantiseRule.dtype={self.dtype!r}: one of {', '.join(LARGEST)}, or None")
        if self.group is not None and (not isinstance(self.group, int) or self.group < 1):
            raise ConfigError(f"QuantiseRule.group={self.group!r}: None, or a whole number of at least 1")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"QuantiseRule.pattern={self.pattern!r} is no regular expression: {error}") from error

    def groups(self, rows: int) -> int:
        """How many factors each output channel of a matrix of `rows` input features has."""
        if self.group is None or self.group >= rows:
            return 1
        if rows % self.group:
            raise ConfigError(
                f"QuantiseRule.group={self.group} does not divide the {rows} input features of a weight that "
                f"{self.pattern!r} matches: take a divisor of them, or a rule of its own for it"
            )
        return rows // self.group


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantiseRules:
    """Rules are tried in order, the first that matches wins; a weight that none matches stays as stored.

    Embeddings, norms, biases and routers are no linear maps that a rule could name: they always stay.
    """

    rules: tuple[QuantiseRule, ...]

    def __post_init__(self):
        rules = tuple(QuantiseRule(**rule) if isinstance(rule, Mapping) else rule for rule in self.rules)
        object.__setattr__(self, "rules", rules)
        if not any(rule.dtype for rule in rules):
            raise ConfigError("QuantiseRules.rules keep every weight as stored: leave quantise out, or name a dtype")

    def rule(self, name: str) -> QuantiseRule | None:
        """The rule of the weight of this name; None where it stays as stored."""
        found = next((rule for rule in self.rules if re.fullmatch(rule.pattern, name)), None)
        return found if found is not None and found.dtype is not None else None

    def check(self, names: list[str]) -> None:
        """Raises ConfigError for a rule that is the first to match none of these."""
        taken = {next((at for at, rule in enumerate(self.rules) if re.fullmatch(rule.pattern, n)), -1) for n in names}
        for at, rule in enumerate(self.rules):
            if at not in taken:
                raise ConfigError(
                    f"QuantiseRule.pattern={rule.pattern!r} matches no weight, or only what earlier rules take; the "
                    f"weights are {', '.join(names)}"
                )


def as_rules(value: Any) -> QuantiseRules | None:
    """None, the rules themselves, a mapping of their fields, or what a person writes: int8, fp8, int4, int4:64.

    A number is the group; int4 alone is int4:128. Raises ConfigError for anything else.
    """
    if value is None or isinstance(value, QuantiseRules):
        return value
    if isinstance(value, Mapping) and set(value) == {"rules"}:
        return QuantiseRules(rules=tuple(value["rules"]))
    dtype, colon, group = value.partition(":") if isinstance(value, str) else ("", "", "")
    if dtype not in LARGEST or (colon and not group.isdigit()):
        raise ConfigError(
            f"quantise={value!r}: one of {', '.join(LARGEST)}, each with :GROUP behind it if wanted, or QuantiseRules"
        )
    return QuantiseRules(rules=(QuantiseRule(dtype=dtype, group=int(group) if colon else GROUP[dtype]),))
