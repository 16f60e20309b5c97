"""The drawn data set of the demo: scenes of coloured shapes with captions."""

from data.demo.splits import make_demo
