"""Before and after: speed, quality, the table and the page."""

from accelplug.comparison.result import Comparison, Row, Sample
from accelplug.comparison.study import compare

__all__ = ["Comparison", "Row", "Sample", "compare"]
