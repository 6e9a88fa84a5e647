"""InterNeg among the detectors of pytorch-ood, which count the other way: high is unknown."""

from typing import Any

from torch import Tensor

from internet_neg.detector import InterNegDetector

__all__ = ["InterNegOOD"]


class InterNegOOD:
    """A fitted detector with pytorch-ood's interface; no base class is needed for that.

    Args:
        detector: A detector; its score S in [0, 1] comes out as -S.

    Examples:
        >>> import torch
        >>> from internet_neg import InterNegConfig
        >>> detector = InterNegDetector.from_features(
        ...     torch.eye(3)[:1], torch.eye(3)[:1], torch.eye(3)[1:],
        ...     config=InterNegConfig(text_only=True, negatives=2, groups=1),
        ... )
        >>> InterNegOOD(detector).predict_features(torch.eye(3)[:1]) < -0.99
        tensor([True])
    """

    def __init__(self, detector: InterNegDetector) -> None:
        self.detector = detector

    def fit(self, data_loader: Any, device: Any = None) -> "InterNegOOD":
        """Fit the detector to labelled images; the device is the encoder's own."""
        self.detector.fit(data_loader)
        return self

    def fit_features(self, z: Tensor, labels: Tensor) -> "InterNegOOD":
        """Fit the detector to image embeddings [n, D] with labels [n]."""
        self.detector.fit({"features": z, "labels": labels})
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Outlier scores -S of preprocessed images [B, C, H, W]."""
        return -self.detector.predict(x).score

    def predict_features(self, z: Tensor) -> Tensor:
        """Outlier scores -S of image embeddings [B, D]."""
        return -self.detector.predict(features=z).score

    def __call__(self, x: Tensor) -> Tensor:
        """As `predict`."""
        return self.predict(x)
