"""Class-conditional Gated PixelCNN for gray images of integers.

van den Oord, Kalchbrenner & Kavukcuoglu, "Pixel Recurrent Neural Networks" (2016a): the mass of an image is a
product over its pixels in raster order,

    p(x | label) = prod_i p(x_i | x_1 .. x_(i-1), label).

Each factor is a softmax over the levels. One pass of a masked network gives all factors.

van den Oord et al., "Conditional Image Generation with PixelCNN Decoders" (2016b) add gates, a bias for the
class, and two stacks of features, which together have no blind spot: at (row, column) the vertical stack
reads the rows above, and the horizontal stack also the pixels to the left. Here, padding and cropping replace
the masks. This gives the same result without multiplications by 0.

Without a label, the model is the mixture of its classes, weighted by their frequency in the training rows.
This holds for samples, scores and class probabilities, which are exact and consistent. If the known pixels
come first in raster order, they are continued exactly, class included.
"""

from export.families.pixelcnn.family import FAMILY
from export.families.pixelcnn.network import PixelCNN

__all__ = ["FAMILY", "PixelCNN"]
