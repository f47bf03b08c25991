"""LSTM over tokens: characters of text, or voices of music.

Hochreiter & Schmidhuber, "Long short-term memory" (1997), with the forget gate of Gers, Schmidhuber & Cummins
(2000). The mass of a sequence is a product over its tokens,

    p(x) = prod_t p(x_t | x_1 .. x_(t-1)),

and p(x_t | x_1 .. x_(t-1)) is a softmax of the last layer's h_t. A layer computes, elementwise,

    i, f, g, o = W e_t + U h_(t-1) + b,
    c_t = sigmoid(f) * c_(t-1) + sigmoid(i) * tanh(g),
    h_t = sigmoid(o) * tanh(c_t),

where e_t is the embedding of x_(t-1), or the h_t of the layer below. The initial state is h_0 = c_0 = 0, and
x_0 is the empty token 0, which no sequence contains.

The programs for samples, scores and features use the same step from the same initial state. The log-masses
of a sample are therefore its score, and a prompt is a sequence of tokens that are given instead of drawn. A
text has no end token; a piece of music ends with the token `end`.

Top-k sampling: Fan, Lewis & Dauphin (2018). Top-p sampling: Holtzman et al. (2020).
"""

from export.families.lstm.family import FAMILY
from export.families.lstm.network import LSTM

__all__ = ["FAMILY", "LSTM"]
