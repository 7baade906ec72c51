"""Language models on long texts: needles, RULER's tasks, associative recall, how a text goes on; time, memory and what plans keep."""

from accelplug.comparison.texts.exam import TextExam

__all__ = ["TextExam"]
