"""Evaluators of vision-language answers: yes/no questions, captions, and whether a difference is one. Needs no model."""

from accelplug.comparison.evaluators import amber, chair, coco, mme, pope, statistics
from accelplug.comparison.evaluators.amber import Amber
from accelplug.comparison.evaluators.chair import Chair, Vocabulary
from accelplug.comparison.evaluators.coco import Coco
from accelplug.comparison.evaluators.mme import Mme, Pair
from accelplug.comparison.evaluators.pope import Question
from accelplug.comparison.evaluators.statistics import Health, YesNo, collapsed, holm, mcc, mcnemar, paired_bootstrap, wilson

__all__ = [
    "Amber",
    "Chair",
    "Coco",
    "Health",
    "Mme",
    "Pair",
    "Question",
    "Vocabulary",
    "YesNo",
    "amber",
    "chair",
    "coco",
    "collapsed",
    "holm",
    "mcc",
    "mcnemar",
    "mme",
    "paired_bootstrap",
    "pope",
    "statistics",
    "wilson",
]
