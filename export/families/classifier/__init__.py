"""Code shared by the image classifiers: network layers, programs, exporter family.

Everything about p(label | image). There is no score: log p(label | image) is not a density of images.
"""

from export.families.classifier.family import ClassifierFamily
from export.families.classifier.network import Block, Classifier

__all__ = ["Block", "Classifier", "ClassifierFamily"]
