"""The coloured regions of a picture: for each colour of the palette the largest connected one, measured."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from noisepolicy.worlds.shapes.renderer import PALETTE

_COLOR_TOLERANCE = 0.14  # squared RGB distance in [0, 1] units up to which a pixel has a palette colour
_FILL_LIMITS = (0.65, 0.89)  # region area / bounding box: triangle 0.52, circle 0.785, square 1

_FILL_ORDER = np.array([2, 0, 1])  # shape index by rising fill: triangle, circle, square
_IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
_IN_PLANE[1] = True


@dataclass(frozen=True)
class Regions:
    """The largest connected region of each colour, each array `(batch, colours)`, and all coloured area `(batch,)`."""

    area: np.ndarray
    center_x: np.ndarray
    center_y: np.ndarray
    shape: np.ndarray
    total_area: np.ndarray


def largest_regions(
    images: torch.Tensor, palette: torch.Tensor = PALETTE, backgrounds: torch.Tensor | None = None
) -> Regions:
    """Measure pictures in [0, 1], `(batch, 3, height, width)`.

    Args:
        images: The pictures.
        palette: RGB of each colour whose regions are measured.
        backgrounds: RGB of colours that backgrounds have: what is nearer to one of them has no palette colour.
    """
    num_colors = len(palette)
    known = palette if backgrounds is None else torch.cat([palette, backgrounds])
    pixels = images.detach().float().cpu()
    distance = ((pixels[:, None] - known[None, :, :, None, None]) ** 2).sum(2)
    nearest_distance, nearest = distance.min(1)
    is_colored = nearest_distance < _COLOR_TOLERANCE
    masks = torch.stack([(nearest == k) & is_colored for k in range(num_colors)], 1).numpy()
    batch, _, height, width = masks.shape

    labels, num_regions = ndimage.label(masks.reshape(-1, height, width), structure=_IN_PLANE)
    plane, y, x = np.nonzero(labels)
    label = labels[plane, y, x]
    size = num_regions + 1
    area = np.bincount(label, minlength=size)
    plane_of = np.zeros(size, dtype=np.int64)
    plane_of[label] = plane

    # Sorted by plane, then area: the last region of each plane is its largest.
    order = np.lexsort((area, plane_of))
    order = order[area[order] > 0]
    largest = np.zeros(batch * num_colors, dtype=np.int64)
    largest[plane_of[order]] = order

    divisor = np.maximum(area, 1)
    center_x = np.bincount(label, weights=x + 0.5, minlength=size) / divisor
    center_y = np.bincount(label, weights=y + 0.5, minlength=size) / divisor
    boxes = ndimage.find_objects(labels)
    box_area = np.ones(size)
    box_area[1:] = [(b[1].stop - b[1].start) * (b[2].stop - b[2].start) for b in boxes]
    shape = _FILL_ORDER[np.digitize(area / box_area, _FILL_LIMITS)]

    def per_color(values: np.ndarray) -> np.ndarray:
        return values[largest].reshape(batch, num_colors)

    return Regions(
        area=per_color(area),
        center_x=per_color(center_x),
        center_y=per_color(center_y),
        shape=per_color(shape),
        total_area=masks.sum((1, 2, 3)),
    )
