"""What can be asked about a run, answered by its database: counts, curves, histograms, maps.

A question is a function from a :class:`Record` and a few numbers to something that JSON can hold, small
whatever the size of the run, for it is aggregated where the data is. So the same question is asked of a
folder on this machine and, by its name, of a coordinator (``Control.Ask``).
"""

from __future__ import annotations

from hansa.core.questions.clients import contributors, judged, partition, quality, taking_part
from hansa.core.questions.gossip import topology
from hansa.core.questions.jobs import ages, grid, pace, tuned, waits
from hansa.core.questions.record import Columns, Record, answer, asked, question
from hansa.core.questions.rounds import curve, events, facts, metric_names, outcome, recipe, rounds, series
from hansa.core.questions.scores import layers, spread

__all__ = [
    "Columns",
    "Record",
    "ages",
    "answer",
    "asked",
    "contributors",
    "curve",
    "events",
    "facts",
    "grid",
    "judged",
    "layers",
    "metric_names",
    "outcome",
    "pace",
    "partition",
    "quality",
    "question",
    "recipe",
    "rounds",
    "series",
    "spread",
    "taking_part",
    "topology",
    "tuned",
    "waits",
]
