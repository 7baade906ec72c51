"""The rules of a calibrated recipe: a method with its tables, or the rules that were there, their selectors with tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accelplug.calibration.tally import Tally
from accelplug.registry import patch_class


def rules_with(tally: Tally, tables: Mapping[str, Any], dense_steps: str | None) -> list[dict[str, Any]]:
    """Return the rules of the recipe, as plain data but for the tables, which go by `Tally.key`."""
    target = tally.target
    if target.base is not None:
        return [rule for found in target.base.rules for rule in _with_tables(found, tally, tables)]
    rules: list[dict[str, Any]] = [{"where": {"steps": dense_steps}, "patch": "dense"}] if dense_steps is not None else []
    for where, mine in _by_denoiser(tally, tables):
        rules.append(
            {"where": {"kind": sorted(tally.kinds), **where}, "patch": target.patch, "with": {**target.config, **mine}}
        )
    return rules


def _with_tables(rule: Any, tally: Tally, tables: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A rule of the base recipe; where its patch takes them, one per denoiser, with the tables."""
    plain = {"where": {}, **rule.to_mapping()}
    if rule.patch == "dense" or not tally.target.make().serves(patch_class(rule.patch)(_constants(rule.settings))):
        yield plain
        return
    for where, mine in _by_denoiser(tally, tables):
        yield {**plain, "where": {**plain["where"], **where}, "with": {**plain.get("with", {}), **mine}}


def _by_denoiser(tally: Tally, tables: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """For each denoiser the condition that names it, and its tables by setting."""
    for denoiser, calibration in tally.calibrations.items():
        where = {"denoiser": denoiser} if len(tally.calibrations) > 1 else {}
        yield where, {key: tables[tally.key(denoiser, key)] for key in calibration.axes}


def _constants(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings but for ramps, whose values do not matter here."""
    return {key: value for key, value in settings.items() if not isinstance(value, Mapping)}
