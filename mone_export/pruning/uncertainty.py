"""How much more often than the text showed an expert may be used elsewhere: an upper bound, from its count.

An error summed over few tokens is known badly. Each token's own error is the smaller doubt: how many such
tokens another text holds is the larger one, since tokens come in clusters. One page calls an expert a hundred
times, the next one never. The square root of a count varies about equally whatever the count (a Poisson
variable's by 1/2, here by several), so a bound of the form (sqrt(n) + `MARGIN`)^2 holds for rare experts and
frequent ones alike. It protects: an expert seen rarely counts as if it were used more, one seen in
many thousands of tokens as what it is, and with more text the bound and the count agree.

`MARGIN` was chosen on the demo: between texts of one kind and 8192 tokens, nine tenths of the counts stay
below that bound; any value from 5 to 10 does as well (docs/methods.md).
"""

from mone_export.artifacts import ExpertStats
from mone_export.lazily import Tensor

MARGIN = 7.0


def possible_use(stats: ExpertStats) -> Tensor:
    """Return how many times as often as in the text each expert may be used elsewhere, float64 [M], above 1.

    That is (sqrt(n) + MARGIN)^2 / n of the n tokens really seen, whatever weight files were merged with. An
    expert never seen counts like one seen once; its error is 0 all the same.
    """
    return (1 + MARGIN / stats.count.clamp(min=1).double().sqrt()).square()
