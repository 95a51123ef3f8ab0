"""A language model whose replies carry marks: the first half of the tokens is thought."""

import numpy as np

from embodied_rft.agents.language import LanguagePolicy
from embodied_rft.data import MARK, Field, Ragged
from embodied_rft.registry import register


@register("agent", "marked")
class Marked(LanguagePolicy):
    """`language` with marks."""

    trace_fields = {**LanguagePolicy.trace_fields, MARK: Field((), "int8", "ragged")}

    def act(self, observation, **options):
        made = super().act(observation, **options)
        made.trace[MARK] = halves(made.trace["reply"])
        return made

    def retrace(self, observation, action):
        trace = super().retrace(observation, action)
        return {**trace, MARK: halves(trace["reply"])}


def halves(reply):
    """0 for the first half of each row, then 1."""
    return Ragged.of([np.arange(n) >= n // 2 for n in reply.lengths], np.int8)
