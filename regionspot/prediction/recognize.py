"""From batches of samples to regions: one image's mistakes cost itself alone."""

from collections.abc import Callable, Sequence

import numpy as np

from regionspot.modeling.region_predictions import RegionPredictions
from regionspot.prediction.batch_predictor import RegionBatchPredictor, predict_each
from regionspot.prediction.loading import Sample

# Returns the regions of each sample, None for those whose ``error`` is set, which it may set itself.
Recognize = Callable[[Sequence[Sample]], list[RegionPredictions | None]]


def recognize_boxes(predictor: RegionBatchPredictor) -> Recognize:
    """Return what recognizes the boxes of samples, or those that the model finds, a batch at once."""

    def recognize(samples: Sequence[Sample]) -> list[RegionPredictions | None]:
        def predict(rows: list[int]) -> list[RegionPredictions]:
            chosen = [samples[row] for row in rows]
            return predictor.predict(
                [sample.image for sample in chosen if sample.image is not None],
                [sample.boxes for sample in chosen],
                [sample.proposal_scores for sample in chosen],
            )

        results, errors = predict_each(predict, [row for row, sample in enumerate(samples) if not sample.error])
        for row, message in errors.items():
            samples[row].error = message.replace("image 0", samples[row].record.name)
        return [results.get(row) for row in range(len(samples))]

    return recognize


def recognize_points(predictor: RegionBatchPredictor, points: np.ndarray, point_labels: np.ndarray) -> Recognize:
    """Return what recognizes the same points in every sample, together with its boxes if there are any.

    Args:
        predictor: its filter and its number of classes count.
        points: (N, P, 2) XY, original pixels.
        point_labels: (N, P): 1 foreground, 0 background, -1 padding.
    """
    single = predictor.predictor

    def recognize(samples: Sequence[Sample]) -> list[RegionPredictions | None]:
        results: list[RegionPredictions | None] = []
        for sample in samples:
            result = None
            if not sample.error:
                assert sample.image is not None
                try:
                    result = single.predict(
                        sample.boxes,
                        points,
                        point_labels,
                        top_k=predictor.top_classes,
                        features=single.encode(sample.image),
                    )
                    result = predictor.region_filter(result)
                except ValueError as error:
                    sample.error = f"{sample.record.name}: {error}"
            results.append(result)
        return results

    return recognize
