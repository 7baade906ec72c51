"""Before and after: speed, quality, the table and the page."""

from accelplug.comparison.entry import compare
from accelplug.comparison.exam import Exam
from accelplug.comparison.features import FeatureComparison, compare_features
from accelplug.comparison.pictures import Pictures
from accelplug.comparison.result import Comparison
from accelplug.comparison.rows import Row, Sample, Variant
from accelplug.comparison.texts import TextExam
from accelplug.comparison.texts.compared import TextComparison
from accelplug.comparison.vlm import VlmComparison, compare_vlm
from accelplug.comparison.walks import WalkComparison, Walks, compare_walks

__all__ = [
    "Comparison",
    "Exam",
    "FeatureComparison",
    "Pictures",
    "Row",
    "Sample",
    "TextComparison",
    "TextExam",
    "Variant",
    "VlmComparison",
    "WalkComparison",
    "Walks",
    "compare",
    "compare_features",
    "compare_vlm",
    "compare_walks",
]
