"""RealNVP, a normalizing flow for points and for images of integers.

Dinh, Sohl-Dickstein & Bengio, "Density estimation using Real NVP" (2017): an invertible map f takes a row x
to a latent z ~ N(0, I), and

    log p(x) = log N(f(x); 0, I) + log |det df/dx|.

A coupling layer keeps the coordinates of a mask. It scales and shifts the others by functions of the kept
ones, so the determinant is a product of scales. The masks alternate. Scales are bounded, so that the
inverse is exact up to rounding (Behrmann et al., "Understanding and mitigating exploding inverses", 2021).

The score of a point is its exact log-density. The probability of an integer image is the density integrated
over the image's unit cube. The density at uniform draws from that cube gives a lower bound (uniform
dequantization, Theis, van den Oord & Bethge 2016).
"""

from export.families.realnvp.family import FAMILY

__all__ = ["FAMILY"]
