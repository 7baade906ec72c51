"""Before and after: speed, quality, the table and the page."""

from accelplug.comparison.exam import Exam
from accelplug.comparison.result import Comparison, Row, Sample
from accelplug.comparison.study import compare
from accelplug.comparison.vlm import Variant, VlmComparison, compare_vlm

__all__ = ["Comparison", "Exam", "Row", "Sample", "Variant", "VlmComparison", "compare", "compare_vlm"]
