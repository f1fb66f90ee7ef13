"""The report's map: all photos in two dimensions, in the units of its SVG drawing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.manifold import TSNE

from npair.data.dataset import Photos, spread
from npair.scoring.pictures import thumbnail
from npair.scoring.retrieval import Vectors

SIZE = (960, 620)
MARGIN = 30
POINTS = 3000
PICTURES, PICTURE = 14, (46, 46)
LETTER, LINE = 9.2, 20  # width and height of a label's text

Box = tuple[float, float, float, float]  # left, top, right, bottom
Places = npt.NDArray[np.float32]


def embedding_map(sides: list[tuple[Vectors, Photos]]) -> dict[str, Any] | None:
    """Place queries and gallery by t-SNE (van der Maaten & Hinton, JMLR 2008), with names and
    thumbnails.

    sides: the queries first. Returns: None for fewer than four different vectors.
    """
    everything = [(photos, index) for _, photos in sides for index in range(len(photos))]
    indices = spread(len(everything), POINTS)
    chosen = [everything[i] for i in indices]
    vectors = np.concatenate([vectors for vectors, _ in sides])[indices]
    if len(np.unique(vectors, axis=0)) < 4:
        return None
    places = _fit(vectors)
    queries = sides[0][1]
    coarse = np.array([photos.coarse[index] for photos, index in chosen])
    fine = np.array([photos.fine[index] for photos, index in chosen])
    taken: list[Box] = []
    pictures, labels, groups = [], [], []
    for i in _far_apart(places, PICTURES):
        if box := _take_box(places[i], PICTURE, places, taken):
            photos, index = chosen[i]
            name, source = photos.fine_names[photos.fine[index]], thumbnail(photos.paths[index])
            point = places[i].round(1).tolist()
            pictures.append({"box": box, "point": point, "name": name, "source": source})
    kinds, counts = np.unique(coarse, return_counts=True)
    for kind in kinds[np.argsort(-counts, kind="stable")]:
        members = places[coarse == kind]
        distances = np.linalg.norm(members - np.median(members, axis=0), axis=1)
        name = queries.coarse_names[kind]
        size = (LETTER * len(name), LINE)
        if box := _take_box(members[np.argmin(distances)], size, places, taken):
            labels.append({"box": box, "name": name})
    for label in np.unique(fine):
        own = np.flatnonzero(fine == label)
        kind = coarse[own[0]]
        # Hues by the golden angle: neighbours in the list of kinds are far apart in colour.
        hue = 137.5 * int(np.searchsorted(kinds, kind)) % 360
        groups.append(
            {
                "name": queries.fine_names[label],
                "kind": queries.coarse_names[kind],
                "colour": f"hsl({hue:.0f} 60% {38 + 14 * (int(kind) % 2)}%)",
                "points": [(*places[i].round(1).tolist(), chosen[i][0] is queries) for i in own],
            }
        )
    return {
        "groups": groups,
        "labels": labels,
        "pictures": pictures,
        "width": SIZE[0],
        "height": SIZE[1],
        "points": len(chosen),
    }


def _fit(vectors: Vectors) -> Places:
    """Place each vector on the map: [n, d] -> [n, 2]."""
    perplexity = min(30, (len(vectors) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(vectors)
    low, high = places.min(axis=0), places.max(axis=0)
    fitted: Places = MARGIN + (places - low) / (high - low) * (np.array(SIZE) - 2 * MARGIN)
    return fitted


def _take_box(
    point: Places, size: tuple[float, float], places: Places, taken: list[Box]
) -> Box | None:
    """Take the free box of this size near a point that covers the fewest places, if any."""
    best: tuple[int, Box] | None = None
    for gap, right, down in itertools.product((6, 20), (0, 1, -1), (-1, 1, 0)):
        if not (right or down):
            continue
        left, top = (
            float(point[axis]) + way * (size[axis] / 2 + gap) - size[axis] / 2
            for axis, way in ((0, right), (1, down))
        )
        box = (
            *(round(left, 1), round(top, 1)),
            *(round(left + size[0], 1), round(top + size[1], 1)),
        )
        inside = min(box[:2]) >= 4 and box[2] <= SIZE[0] - 4 and box[3] <= SIZE[1] - 4
        if inside and all(_apart(box, other) for other in taken):
            covered = int(np.sum(((places > box[:2]) & (places < box[2:])).all(axis=1)))
            if best is None or covered < best[0]:
                best = covered, box
    if best is None:
        return None
    taken.append(best[1])
    return best[1]


def _apart(one: Box, other: Box) -> bool:
    return one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


def _far_apart(places: Places, count: int) -> list[int]:
    """Return indices of points, each as far as possible from those before it."""
    found = [0]
    distances = np.full(len(places), np.inf)
    while len(found) < min(count, len(places)):
        distances = np.minimum(distances, np.linalg.norm(places - places[found[-1]], axis=1))
        found.append(int(distances.argmax()))
    return found
