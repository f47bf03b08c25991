"""The programs of a classifier: classify and encode."""

import torch
from torch import Tensor, nn

from export.evaluation.calibration import TEMPERATURE_RANGE
from export.families.classifier.network import Classifier
from export.graphs.program import Input, Parameter, Program, TensorSpec

# Largest and default number of ranked labels.
MAX_TOP_K, DEFAULT_TOP_K = 10, 5


class Encode(nn.Module):
    """Image -> features."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier.encode(image)


class Classify(nn.Module):
    """Image -> probabilities at a temperature, and the labels ranked by probability."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.num_ranked = min(MAX_TOP_K, classifier.num_classes)

    def forward(
        self, image: Tensor, temperature: Tensor, top_k: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logits = self.classifier.logits(image)
        probabilities = (logits / temperature.unsqueeze(1)).softmax(1)
        # Rank by logits: they still differ where probabilities round to zero.
        labels = logits.topk(self.num_ranked, dim=1).indices
        ranked_probabilities = probabilities.gather(1, labels)
        is_requested = torch.arange(self.num_ranked, device=labels.device).unsqueeze(0) < top_k.unsqueeze(1)
        return (
            probabilities,
            labels[:, 0],
            torch.where(is_requested, labels, torch.full_like(labels, -1)),
            torch.where(is_requested, ranked_probabilities, torch.zeros_like(ranked_probabilities)),
            logits,
        )


def build_classify(served: Classifier, image: TensorSpec, temperature: float) -> Program:
    """Return the program classify.

    Args:
        served: classifier without batch norm and dropout.
        image: input tensor.
        temperature: default of the parameter `temperature`.
    """
    num_ranked = min(MAX_TOP_K, served.num_classes)
    return Program(
        operation="classify",
        readout=Classify(served),
        outputs=_classify_outputs(served.num_classes, num_ranked),
        doc="Compute the class probabilities of an image, and its most probable labels.",
        parameters=(
            Parameter(
                "temperature",
                "float",
                temperature,
                *TEMPERATURE_RANGE,
                doc="divisor of the logits; the default is fitted on validation rows, 1 changes nothing",
            ),
            Parameter(
                "top_k",
                "integer",
                min(DEFAULT_TOP_K, num_ranked),
                1,
                num_ranked,
                doc="number of labels to rank",
            ),
        ),
        inputs=(Input(image),),
    )


def _classify_outputs(num_classes: int, num_ranked: int) -> tuple[TensorSpec, ...]:
    last = num_classes - 1
    return (
        TensorSpec(
            "probabilities",
            "float32",
            (num_classes,),
            0,
            1,
            "probability of each class, in the order of the class labels",
        ),
        TensorSpec("top_label", "int64", (), 0, last, "index of the most probable class"),
        TensorSpec(
            "ranked_labels",
            "int64",
            (num_ranked,),
            -1,
            last,
            "indices of the top_k classes, most probable first, then -1",
        ),
        TensorSpec(
            "ranked_probabilities",
            "float32",
            (num_ranked,),
            0,
            1,
            "probabilities of the ranked labels, then 0",
        ),
        TensorSpec(
            "logits", "float32", (num_classes,), doc="class logits, before division by the temperature"
        ),
    )


def build_encode(served: Classifier, image: TensorSpec) -> Program:
    """Return the program encode, for a classifier without batch norm and dropout."""
    return Program(
        operation="encode",
        readout=Encode(served),
        outputs=(
            TensorSpec(
                "features",
                "float32",
                (served.num_features,),
                0,
                doc="activations of the last hidden layer, from which the logits are computed",
            ),
        ),
        doc=f"Compute the {served.num_features} features of an image on which the classifier decides.",
        inputs=(Input(image),),
    )
