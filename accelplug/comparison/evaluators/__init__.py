"""Evaluators of vision-language answers: yes/no questions, captions, and whether a difference is one. Needs no model.

A new evaluator is a module with a class like `Evaluator`, and a line here.
"""

from accelplug.comparison.evaluators.amber import AmberEvaluator
from accelplug.comparison.evaluators.chair import ChairEvaluator
from accelplug.comparison.evaluators.evaluator import Evaluator
from accelplug.comparison.evaluators.mme import MmeEvaluator
from accelplug.comparison.evaluators.pope import PopeEvaluator

EVALUATORS: tuple[Evaluator, ...] = (PopeEvaluator(), ChairEvaluator(), MmeEvaluator(), AmberEvaluator())
"""In the order of the table's columns."""
