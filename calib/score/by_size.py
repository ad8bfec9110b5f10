"""Detections through the maps of their sizes, for heads that have such maps."""

import numpy as np
import torch

from calib.boxes import area
from calib.heads.base import Head
from calib.heads.by_size import BySizeHead
from calib.score.detect import Detections


@torch.inference_mode()
def by_size(head: Head, found: Detections) -> Detections:
    """Detections of one image, boxes in pixels of the picture, best first by mapped scores; ties stay in order."""
    if not isinstance(head, BySizeHead) or not len(found.score):
        return found
    device = head.edges.device
    scores, areas = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (found.score, area(found.box)))
    mapped = head.mapped(scores, areas).cpu().numpy()
    order = np.argsort(-mapped, kind="stable")
    return Detections(found.row[order], found.category[order], mapped[order], found.box[order])
